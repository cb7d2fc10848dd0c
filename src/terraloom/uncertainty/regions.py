"""Sums over regions and their variance, in one pass over a raster with bounded memory.

The raster is read once, block by block, while the next block is being read. The cover of a region
is computed once per block for all layers. Regions may overlap: each is treated on its own. For the
variance a region keeps one grid per layer, of pixels or, where it is large, of blocks of pixels;
the grids of all regions that are open at a time share :data:`GRID_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from terraloom.uncertainty.covariance import ErrorCovariance, total_variance
from terraloom.uncertainty.coverage_fractions import Outline

__all__ = ["GRID_BYTES", "Block", "RegionSums", "Window", "sum_regions"]

F32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Window = tuple[slice, slice]

#: Memory of the grids of all open regions together, bytes.
GRID_BYTES = 400_000_000
#: Cells of one region's grid: at most, and where finer ones would show nothing new.
_MOST_CELLS, _ENOUGH_CELLS = 1 << 20, 160 * 160
#: Blocks for speed alone are at most this share of the range of the covariance.
_FINE = 1 / 12
#: Size of the blocks that are read, pixels; a multiple of the tiles of products.
_ROWS, _COLS = 1024, 2048


class Block(NamedTuple):
    """Layers of one window of a raster.

    Attributes:
        values: (Q, h, w) float32, 0 where there is no data.
        valid: (h, w) float32, 1 where there are data, else 0.
        variance: (Q, h, w) float32 variance of each value, 0 without data; None: not wanted.
        codes: (h, w) integers to be counted, 0 to C - 1; None: nothing to count.
    """

    values: F32
    valid: F32
    variance: F32 | None = None
    codes: npt.NDArray[Any] | None = None


@dataclass
class RegionSums:
    """Sums of one region; weights are cover times pixel area (or cover alone).

    Attributes:
        inside: Weight of the pixels of the raster that the region covers.
        covered: That of those with data.
        pixels: Those with data, by cover (count).
        total: (Q,) sum of weight x value.
        independent: (Q,) variance of ``total`` if pixels were independent.
        variance: (Q,) variance of ``total`` with correlated errors; NaN where not known.
        counted: (C,) weight of each code.
        block: Pixels per side of the grid's cells (count); 1: the variance is exact.
    """

    inside: float
    covered: float
    pixels: float
    total: Floats
    independent: Floats
    variance: Floats
    counted: Floats
    block: int = 1


@dataclass
class _Open:
    """A region while blocks are read."""

    outline: Outline
    window: tuple[int, int, int, int]
    left: int
    sums: RegionSums
    grid: F32 | None = None
    steps: list[int] = field(default_factory=list)


def sum_regions(
    regions: Sequence[BaseGeometry],
    geobox: GeoBox,
    read: Callable[[Window], Block],
    *,
    layers: int,
    codes: int = 0,
    areas: Callable[[slice, slice], Floats] | None = None,
    covariances: Sequence[ErrorCovariance | None] = (),
    grid_bytes: int = GRID_BYTES,
    size: tuple[int, int] | None = None,
) -> list[RegionSums]:
    """Sums of the layers of a raster over polygons, with their variance.

    Args:
        regions: Valid polygons in the CRS of ``geobox``; they may overlap and reach outside.
        geobox: Pixels of the raster, (H, W).
        read: Gives the layers of a window; called from one other thread.
        layers: Number of layers Q.
        codes: Number of codes C of ``Block.codes``.
        areas: True areas of the pixels of a window; default: 1 each.
        covariances: Of the errors of each layer; none: no variance is computed.
        grid_bytes: Memory for grids, bytes.
        size: Rows and columns of the windows that are read; default: 1024 x 2048.

    Returns:
        One per region, in order; of a region outside the raster all sums are 0.
    """
    opened = [_open(p, geobox, layers, codes) for p in regions]
    windows = list(_windows(geobox, size or (_ROWS, _COLS)))
    touching = [[k for k, o in enumerate(opened) if _meet(o.window, w)] for w in windows]
    for here in touching:
        for k in here:
            opened[k].left += 1
    if covariances:
        _choose_blocks(opened, touching, covariances, abs(float(geobox.resolution.x)), grid_bytes)
    todo = [(w, here) for w, here in zip(windows, touching, strict=True) if here]
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, todo[0][0]) if todo else None
        for n, (window, here) in enumerate(todo):
            if coming is None:  # pragma: no cover - set above
                break
            block = coming.result()
            coming = ahead.submit(read, todo[n + 1][0]) if n + 1 < len(todo) else None
            weights = None if areas is None else areas(*window)
            sd = np.sqrt(block.variance) if covariances and block.variance is not None else None
            for k in here:
                _add(opened[k], window, block, weights, sd, layers)
                if not opened[k].left:
                    _close(opened[k], covariances, abs(float(geobox.resolution.x)))
    return [o.sums for o in opened]


def _open(polygon: BaseGeometry, geobox: GeoBox, layers: int, codes: int) -> _Open:
    outline = Outline.of(polygon, geobox.affine)
    h, w = geobox.shape
    r0, r1, c0, c1 = outline.bounds
    window = (max(r0, 0), min(r1, h), max(c0, 0), min(c1, w))
    zero = np.zeros(layers)
    nothing = RegionSums(0.0, 0.0, 0.0, zero, zero.copy(), np.full(layers, np.nan), np.zeros(codes))
    return _Open(outline, window, 0, nothing)


def _windows(geobox: GeoBox, size: tuple[int, int]) -> Iterator[Window]:
    h, w = geobox.shape
    for r in range(0, h, size[0]):
        for c in range(0, w, size[1]):
            yield slice(r, min(r + size[0], h)), slice(c, min(c + size[1], w))


def _meet(region: tuple[int, int, int, int], window: Window) -> bool:
    r0, r1, c0, c1 = region
    rows, cols = window
    across = max(c0, cols.start) < min(c1, cols.stop)
    return bool(across and max(r0, rows.start) < min(r1, rows.stop))


def _choose_blocks(
    opened: Sequence[_Open],
    touching: Sequence[Sequence[int]],
    covariances: Sequence[ErrorCovariance | None],
    pixel_m: float,
    grid_bytes: int,
) -> None:
    """Cells of each region's grid: as fine as memory allows, and no finer than is of use."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for n, here in enumerate(touching):
        for k in here:
            first.setdefault(k, n)
            last[k] = n
    change = np.zeros(len(touching) + 1, dtype=np.int64)
    for k, n in first.items():
        change[n] += 1
        change[last[k] + 1] -= 1
    together = max(1, int(change.cumsum().max()))
    most = min(_MOST_CELLS, max(64, grid_bytes // (4 * len(covariances) * together)))
    ranges = [c.range_m for c in covariances if c is not None and c.nugget < 1]
    useful = max(1, int(min(ranges) * _FINE / pixel_m)) if ranges else 1 << 30
    for k in first:
        r0, r1, c0, c1 = opened[k].window
        h, w = r1 - r0, c1 - c0
        needed = _block(h, w, most)
        block = max(needed, min(useful, _block(h, w, _ENOUGH_CELLS)))
        opened[k].sums.block = block
        opened[k].steps = [-(-h // block), -(-w // block)]


def _block(h: int, w: int, cells: int) -> int:
    """Smallest blocks of which no more than ``cells`` cover h x w pixels."""
    block = max(1, math.isqrt(h * w // cells))
    while -(-h // block) * -(-w // block) > cells:
        block += 1
    return block


def _add(
    region: _Open, window: Window, block: Block, areas: Floats | None, sd: F32 | None, layers: int
) -> None:
    """Add what a block has of a region."""
    r0, r1, c0, c1 = region.window
    rows = slice(max(r0, window[0].start), min(r1, window[0].stop))
    cols = slice(max(c0, window[1].start), min(c1, window[1].stop))
    ys = slice(rows.start - window[0].start, rows.stop - window[0].start)
    xs = slice(cols.start - window[1].start, cols.stop - window[1].start)
    cover = region.outline.cover(rows, cols)
    sums, valid = region.sums, block.valid[ys, xs]
    weight = cover if areas is None else cover * areas[ys, xs]
    sums.inside += float(weight.sum())
    weight = weight * valid
    sums.covered += float(weight.sum())
    sums.pixels += float(np.vdot(cover, valid))
    if block.codes is not None:
        sums.counted += np.bincount(block.codes[ys, xs].ravel(), weight.ravel(), len(sums.counted))[
            : len(sums.counted)
        ]
    narrow = weight.astype(np.float32)
    sums.total += _dot(block.values[:, ys, xs], narrow)
    region.left -= 1
    if sd is None or block.variance is None:
        return
    sums.independent += _dot(block.variance[:, ys, xs], narrow * narrow)
    if region.grid is None:
        region.grid = np.zeros((layers, *region.steps), np.float32)
    _blocks(region.grid, sd[:, ys, xs], narrow, (rows.start - r0, cols.start - c0), sums.block)


def _dot(layers: F32, weight: F32) -> Floats:
    """(Q,) sums of layers x weight: float32 along a row, float64 over rows."""
    each = np.matmul(layers.transpose(1, 0, 2), weight[:, :, None])
    return np.asarray(each[..., 0].sum(axis=0, dtype=np.float64))


def _blocks(grid: F32, sd: F32, weight: F32, at: tuple[int, int], block: int) -> None:
    """Add sd x weight to the cells of a region's grid; the first pixel is pixel ``at``."""
    h, w = weight.shape
    if block == 1:
        grid[:, at[0] : at[0] + h, at[1] : at[1] + w] += sd * weight
        return
    ys, xs = ((np.arange(n) + start) // block for n, start in zip((h, w), at, strict=True))
    y0, x0 = int(ys[0]), int(xs[0])
    starts = (
        np.flatnonzero(np.diff(ys, prepend=y0 - 1)),
        np.flatnonzero(np.diff(xs, prepend=x0 - 1)),
    )
    for layer, s in zip(grid, sd, strict=True):
        some = np.add.reduceat(s * weight, starts[0], axis=0)
        some = np.add.reduceat(some, starts[1], axis=1)
        layer[y0 : y0 + some.shape[0], x0 : x0 + some.shape[1]] += some


def _close(region: _Open, covariances: Sequence[ErrorCovariance | None], pixel_m: float) -> None:
    """Variance of a region whose blocks have all been added; its grid is let go."""
    if region.grid is None:
        return
    sums = region.sums
    for q, covariance in enumerate(covariances):
        if covariance is not None:
            squares = float(sums.independent[q])
            sums.variance[q] = total_variance(
                region.grid[q], squares, covariance, pixel_m, block=sums.block
            )
    region.grid = None
