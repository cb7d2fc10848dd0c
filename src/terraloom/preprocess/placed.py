"""Reading a scene so that its content lies on the campaign's pixels: always one resampling.

With a global shift alone the warp reads from a moved geobox. With a local field every target pixel
is looked up in the native pixels at its own displaced position, through the change of coordinate
system, in one interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from scipy import ndimage

from terraloom.acquire.assets import read_band
from terraloom.acquire.sources import load_source
from terraloom.io import geobox_of, read_window
from terraloom.preprocess.coregister import Shift, shifted_geobox
from terraloom.preprocess.field import ShiftField

__all__ = ["read_placed", "read_placed_mask"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

#: Shifts are counted in pixels of this size, metres.
PIXEL_M = 10
#: Coarser than this many native pixels, continuous bands are averaged instead of interpolated.
_AVERAGE_FROM = 1.5
#: Positions are transformed between coordinate systems on every so many pixels, linear between:
#: over 160 m a projection is straight to a millimetre.
_TRANSFORM_EVERY = 16
#: A pixel interpolated from less valid neighbours than this is missing.
_MIN_WEIGHT = 0.5


def read_placed(
    item: Mapping[str, Any],
    band: str,
    geobox: GeoBox,
    shift: Shift | None,
    field: ShiftField | None = None,
    *,
    resampling: str | None = None,
) -> Float32:
    """Read one band of a locked item so that its content lies on a geobox.

    Args:
        item: Item of the lock.
        band: Key of a band or of a layer.
        geobox: Target pixels in the campaign's CRS, (H, W).
        shift: How far the scene's content lies off, 10 m pixels; None or unknown: not at all.
        field: Local shifts, which take the place of ``shift``.
        resampling: Method by rasterio's names; default: that of :func:`read_band`.

    Returns:
        (H, W) float32 as of :func:`read_band`: physical units, NaN missing; layers: codes.

    Raises:
        SceneError: The source has no such band, or the asset is missing or damaged.
    """
    record = dict(item)
    asset = record["assets"].get(band)
    if field is None or asset is None:
        moved = geobox if shift is None else shifted_geobox(geobox, shift, pixel_m=PIXEL_M)
        return read_band(record, band, moved, resampling=resampling)
    table = load_source(record["source"])
    layer = table.layers.get(band)
    coarse = float(abs(geobox.resolution.x)) > _AVERAGE_FROM * float(asset["resolution_m"])
    method = resampling or ("average" if coarse else table.resampling)
    if layer is not None:
        method = "nearest"
    native = geobox_of(asset["href"])
    reach = 1 if method == "nearest" else 3
    times = math.ceil(float(abs(geobox.resolution.x)) / float(asset["resolution_m"]) - 0.25)
    fine = _zoomed(geobox, times) if method == "average" and times > 1 else geobox
    rows, cols = _positions(fine, field, native)
    window = _window(rows, cols, (native.height, native.width), reach)
    nothing = np.nan if layer is None else layer.nodata
    if window is None:
        return np.full(geobox.shape, nothing, np.float32)
    # On the raster's own lattice, so nothing is resampled here.
    values = read_band(record, band, native[window], resampling="nearest")
    power = asset.get("unit") == "power"
    if power:  # power is what adds up, not decibels
        values = np.power(10, values / 10, dtype=np.float32)
    out = sample(
        values, rows - window[0].start, cols - window[1].start,
        method="bilinear" if method == "average" else method, outside=nothing,
    )  # fmt: skip
    if fine is not geobox:
        h, w = geobox.shape
        out = _mean(out.reshape(h, times, w, times))
    return 10 * np.log10(out, dtype=np.float32) if power else out


def read_placed_mask(
    path: Path | str,
    geobox: GeoBox,
    shift: Shift | None,
    field: ShiftField | None = None,
    *,
    band: int = 1,
    outside: int = 255,
) -> npt.NDArray[Any]:
    """Read codes, such as the reasons of a mask, so that they lie on a geobox; nearest pixel.

    Args:
        path: The raster.
        geobox: Target pixels, (H, W).
        shift: As of :func:`read_placed`.
        field: As of :func:`read_placed`.
        band: Band number, from 1.
        outside: Code of pixels outside the raster.

    Returns:
        (H, W) of the raster's dtype.
    """
    if field is None:
        moved = geobox if shift is None else shifted_geobox(geobox, shift, pixel_m=PIXEL_M)
        return read_window(path, moved, band=band, src_nodata=outside)
    native = geobox_of(path)
    rows, cols = _positions(geobox, field, native)
    window = _window(rows, cols, (native.height, native.width), 1)
    if window is None:
        return np.full(geobox.shape, outside, np.uint8)
    codes = read_window(path, native[window], band=band, src_nodata=outside)
    i, j = _nearest(rows - window[0].start), _nearest(cols - window[1].start)
    inside = (i >= 0) & (i < codes.shape[0]) & (j >= 0) & (j < codes.shape[1])
    out = np.full(geobox.shape, outside, codes.dtype)
    out[inside] = codes[i[inside], j[inside]]
    return out


def _zoomed(geobox: GeoBox, times: int) -> GeoBox:
    h, w = geobox.shape
    return GeoBox(
        (h * times, w * times), geobox.affine @ geobox.affine.scale(1 / times), geobox.crs
    )


def _positions(geobox: GeoBox, field: ShiftField, native: GeoBox) -> tuple[Float64, Float64]:
    """Where target pixels lie in a raster: (H, W) rows and columns, 0 the first pixel's centre."""
    down, right = field.on(geobox)
    h, w = geobox.shape
    scale = field.pixel_m / float(abs(geobox.resolution.x))
    rows = np.arange(h)[:, None] + down * scale
    cols = np.arange(w)[None, :] + right * scale
    if geobox.crs == native.crs:
        a = ~native.affine @ geobox.affine
        cc, rr = cols + 0.5, rows + 0.5
        return a.d * cc + a.e * rr + a.f - 0.5, a.a * cc + a.b * rr + a.c - 0.5
    step = _TRANSFORM_EVERY
    at_r = np.arange(-step, h + 2 * step, step)
    at_c = np.arange(-step, w + 2 * step, step)
    x, y = geobox.affine @ tuple(np.meshgrid(at_c + 0.5, at_r + 0.5))
    to = Transformer.from_crs(str(geobox.crs), str(native.crs), always_xy=True)
    node_c, node_r = ~native.affine @ to.transform(x, y)
    where = np.stack([rows / step + 1, cols / step + 1])
    return (
        ndimage.map_coordinates(node_r - 0.5, where, order=1, mode="nearest"),
        ndimage.map_coordinates(node_c - 0.5, where, order=1, mode="nearest"),
    )


def _window(
    rows: Float64, cols: Float64, shape: tuple[int, int], reach: int
) -> tuple[slice, slice] | None:
    """Native pixels that the positions need; None where they all lie outside."""
    found = []
    for at, size in ((rows, shape[0]), (cols, shape[1])):
        first = max(math.floor(float(at.min())) - reach, 0)
        last = min(math.ceil(float(at.max())) + reach + 1, size)
        if last <= first:
            return None
        found.append(slice(first, last))
    return found[0], found[1]


def _nearest(at: Float64) -> npt.NDArray[np.int64]:
    return np.floor(at + 0.5).astype(np.int64)


def _mean(parts: Float32) -> Float32:
    """(H, n, W, n) to (H, W): mean of the valid parts, NaN where they are less than half."""
    fine = np.isfinite(parts)
    count = fine.sum(axis=(1, 3), dtype=np.float32)
    total = np.where(fine, parts, 0).sum(axis=(1, 3), dtype=np.float32)
    enough = count >= _MIN_WEIGHT * parts.shape[1] * parts.shape[3]
    mean: Float32 = np.where(enough, total / np.maximum(count, 1), np.float32(np.nan))
    return mean


def sample(
    image: Float32, rows: Float64, cols: Float64, *, method: str, outside: float = math.nan
) -> Float32:
    """Values of an image at fractional positions, missing pixels left out.

    Args:
        image: (h, w), NaN missing.
        rows: (H, W) positions, 0 the centre of the first pixel.
        cols: (H, W), likewise.
        method: ``nearest``, ``bilinear`` or ``cubic`` (Keys 1981, a = -1/2, as GDAL has it); any
            other is read as ``bilinear``.
        outside: Value beyond the image.

    Returns:
        (H, W) float32. Weights of missing neighbours go to the others; with less than half of the
        weight valid the result is missing.
    """
    h, w = image.shape
    if method == "nearest":
        i, j = _nearest(rows), _nearest(cols)
        inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
        near = image[i.clip(0, h - 1), j.clip(0, w - 1)]
        return np.where(inside, near, np.float32(outside))
    weights = _cubic if method == "cubic" else _linear
    first_r, by_row = weights(rows)
    first_c, by_col = weights(cols)
    fine = np.isfinite(image)
    filled = np.where(fine, image, np.float32(0))
    total = np.zeros(rows.shape, np.float32)
    weight = np.zeros(rows.shape, np.float32)
    for m, wr in enumerate(by_row):
        i = first_r + m
        row_in, i = (i >= 0) & (i < h), i.clip(0, h - 1)
        for n, wc in enumerate(by_col):
            j = first_c + n
            inside = row_in & (j >= 0) & (j < w)
            j = j.clip(0, w - 1)
            part = wr * wc * (inside & fine[i, j])
            total += part * filled[i, j]
            weight += part
    return np.where(
        weight >= _MIN_WEIGHT, total / np.maximum(weight, 1e-3), np.float32(np.nan)
    ).astype(np.float32)


def _linear(at: Float64) -> tuple[npt.NDArray[np.int64], list[Float32]]:
    first = np.floor(at).astype(np.int64)
    t = (at - first).astype(np.float32)
    return first, [1 - t, t]


def _cubic(at: Float64) -> tuple[npt.NDArray[np.int64], list[Float32]]:
    first = np.floor(at).astype(np.int64)
    t = (at - first).astype(np.float32)
    weights = []
    for d in (1 + t, t, 1 - t, 2 - t):
        near = 1.5 * d**3 - 2.5 * d**2 + 1
        far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        weights.append(np.where(d <= 1, near, far).astype(np.float32))
    return first - 1, weights
