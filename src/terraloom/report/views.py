"""Small images around sample points, from the cubes: several dates, colours for the eye.

Every tile's cube is read once, image by image, so that memory holds one image of one tile and the
finished chips. A chip does not depend on the tiles it lies in.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import xarray as xr
from PIL import Image
from rasterio.windows import Window

from terraloom.grid import CampaignGrid, Tile
from terraloom.io import GDAL_ENV, INDEXES, open_file, read_store
from terraloom.predict.picture import Picture, paint, plan_picture
from terraloom.preprocess.groups import group_facts

__all__ = ["CONTEXT_TIMES", "View", "Views", "look_around", "pack"]

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

#: The last image shows this many times the width of the others.
CONTEXT_TIMES = 4
#: Near infrared of vegetation is brighter than the visible: reflectance .02-.50.
_NIR_HIGH = 0.50
#: Qualities of JPEG that are tried in turn until the page is small enough.
_QUALITIES = (90, 82, 74, 66, 58, 50)


@dataclass(frozen=True)
class View:
    """One image of a point.

    Attributes:
        when: Name of the period, or the date.
        colours: What is shown, in words.
        metres: Width of the image on the ground.
    """

    when: str
    colours: str
    metres: float


@dataclass(frozen=True, eq=False)
class Views:
    """Images of all points; N points.

    Attributes:
        views: Views of each point, in the order of its strip.
        strips: N arrays (side, side x views, 3) uint8; 0 where there is no value.
    """

    views: list[list[View]]
    strips: list[U8]


def look_around(
    rows: I64, cols: I64, grid: CampaignGrid, cubes: Path, image: Path | None, *, side: int,
    dates: int,
) -> Views:  # fmt: skip
    """Cut the images around N pixels.

    Args:
        rows: (N,) rows of the pixels on the campaign's grid.
        cols: (N,) columns.
        grid: Grid of the campaign.
        cubes: Folder of the tile stores.
        image: Picture of the whole map for the wider view, (3, H, W) uint8; None leaves it out.
        side: Height and width of a chip, pixels.
        dates: Most time steps per point; of those with a value at the pixel, evenly spread ones.
    """
    tiles = grid.tiles()
    plans = _pictures(
        [_cube(cubes, t) for t in tiles[:1]], lambda: (_cube(cubes, t) for t in tiles)
    )
    first = _cube(cubes, tiles[0])
    over = {p.group: str(first[p.group].dims[0]) for p in plans}
    names = {p.group: _step_names(first, p.group, over[p.group]) for p in plans}
    seen = _seen(rows, cols, grid, cubes, plans[0], over[plans[0].group])
    chosen = [_spread(np.flatnonzero(row), dates) for row in seen]
    wanted = [[(t, p) for p in range(len(plans)) for t in steps] for steps in chosen]
    chips = [np.zeros((side, side * len(w), 3), np.uint8) for w in wanted]
    for tile in tiles:
        _paste_tile(tile, grid, cubes, plans, over, rows, cols, wanted, chips, side)
    width = side * grid.resolution_m
    views = [
        [View(names[plans[p].group][t], _words(plans[p]), width) for t, p in w] for w in wanted
    ]
    if image is not None:
        for i, wide in enumerate(_context(rows, cols, image, side)):
            chips[i] = np.concatenate([chips[i], wide], axis=1)
            views[i].append(View("", "surroundings", width * CONTEXT_TIMES))
    return Views(views, chips)


def pack(strips: Sequence[U8], max_bytes: float) -> tuple[list[str], int]:
    """JPEG of every strip as data URI, at the best quality whose sum stays below a size.

    Colours are not subsampled and chips start at blocks of 8 pixels, so none bleeds into the next.

    Returns:
        The URIs and their quality; the lowest quality where nothing is small enough.
    """
    packed: list[str] = []
    for quality in _QUALITIES:
        packed = [_jpeg(strip, quality) for strip in strips]
        if sum(map(len, packed)) <= max_bytes:
            return packed, quality
    return packed, _QUALITIES[-1]


def _jpeg(strip: U8, quality: int) -> str:
    if not strip.size:
        return ""
    out = io.BytesIO()
    Image.fromarray(strip).save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _cube(folder: Path, tile: Tile) -> xr.Dataset:
    store: xr.Dataset = read_store(folder / f"{tile.name}.zip")
    return store


def _pictures(first: Sequence[xr.Dataset], every: Any) -> list[Picture]:
    """The picture of the map and, where its group has near infrared, one of vegetation in red."""
    natural = plan_picture(every())
    plans = [natural]
    if natural.kind == "natural":
        facts = group_facts(natural.group, first[0][natural.group].attrs)
        bands = {str(b) for b in first[0][f"band_{natural.group}"].to_numpy()}
        infrared = next((b for b in bands if facts.roles.get(b) == "B08"), None)
        if infrared is not None:
            red, green = natural.bands[0], natural.bands[1]
            brighter = natural.high[0] * _NIR_HIGH / 0.30
            plans.append(
                replace(
                    natural, kind="false-colour", bands=(infrared, red, green),
                    low=(natural.low[0], natural.low[0], natural.low[1]),
                    high=(brighter, natural.high[0], natural.high[1]),
                )
            )  # fmt: skip
    return plans


def _words(picture: Picture) -> str:
    if picture.kind == "natural":
        return "natural colours"
    if picture.kind == "grey":
        return picture.bands[0]
    return "false colours: " + ", ".join(picture.bands)


def _step_names(store: xr.Dataset, group: str, dim: str) -> list[str]:
    if dim == f"band_{group}":
        return [""]
    return [str(v) if dim == "period" else str(v)[:10] for v in store[dim].to_numpy()]


def _step(store: xr.Dataset, dim: str, group: str, t: int) -> xr.Dataset:
    return store if dim == f"band_{group}" else store.isel({dim: slice(t, t + 1)})


def _seen(
    rows: I64, cols: I64, grid: CampaignGrid, cubes: Path, picture: Picture, dim: str
) -> npt.NDArray[np.bool_]:
    """Which time steps have a value at each pixel, (N, T)."""
    found: npt.NDArray[np.bool_] | None = None
    for tile in grid.tiles():
        top, left = tile.row * grid.tile_px, tile.column * grid.tile_px
        h, w = tile.geobox.shape
        mine = np.flatnonzero((rows >= top) & (rows < top + h) & (cols >= left) & (cols < left + w))
        store = _cube(cubes, tile)
        steps = len(_step_names(store, picture.group, dim))
        found = np.zeros((rows.size, steps), np.bool_) if found is None else found
        for t in range(steps if mine.size else 0):
            rgb = paint(picture, _step(store, dim, picture.group, t), (h, w))
            found[mine, t] = (rgb[:, rows[mine] - top, cols[mine] - left] > 0).all(axis=0)
    return np.zeros((rows.size, 1), np.bool_) if found is None else found


def _spread(steps: I64, most: int) -> list[int]:
    """At most that many of the steps, evenly spread, the first and the last among them."""
    if steps.size <= most:
        return [int(s) for s in steps]
    at = np.rint(np.linspace(0, steps.size - 1, most)).astype(int)
    return [int(s) for s in steps[np.unique(at)]]


def _paste_tile(
    tile: Tile, grid: CampaignGrid, cubes: Path, plans: Sequence[Picture], over: Mapping[str, str],
    rows: I64, cols: I64, wanted: Sequence[Sequence[tuple[int, int]]], chips: Sequence[U8],
    side: int,
) -> None:  # fmt: skip
    top, left = tile.row * grid.tile_px, tile.column * grid.tile_px
    h, w = tile.geobox.shape
    r0, c0 = rows - side // 2 - top, cols - side // 2 - left
    near = np.flatnonzero((r0 < h) & (r0 + side > 0) & (c0 < w) & (c0 + side > 0))
    todo: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in near.tolist():
        for k, key in enumerate(wanted[i]):
            todo.setdefault(key, []).append((i, k))
    if not todo:
        return
    store = _cube(cubes, tile)
    for (t, p), places in sorted(todo.items()):
        group = plans[p].group
        rgb = paint(plans[p], _step(store, over[group], group, t), (h, w))
        for i, k in places:
            r, c = int(r0[i]), int(c0[i])
            rs, cs = slice(max(r, 0), min(r + side, h)), slice(max(c, 0), min(c + side, w))
            there = chips[i][:, k * side : (k + 1) * side]
            there[rs.start - r : rs.stop - r, cs.start - c : cs.stop - c] = np.moveaxis(
                rgb[:, rs, cs], 0, -1
            )


def _context(rows: I64, cols: I64, image: Path, side: int) -> list[U8]:
    """The wider view of every point at a fraction of the pixels, (side, side, 3)."""
    found, wide = [], side * CONTEXT_TIMES
    with rasterio.Env(**GDAL_ENV), open_file(image, INDEXES) as src:
        for r, c in zip(rows.tolist(), cols.tolist(), strict=True):
            # The marked pixel lies at the same share of the image as in the chips.
            window = Window(c - wide // 2, r - wide // 2, wide, wide)
            part = src.read(
                (1, 2, 3), window=window, boundless=True, fill_value=0,
                out_shape=(3, side, side), resampling=rasterio.enums.Resampling.average,
            )  # fmt: skip
            found.append(np.ascontiguousarray(np.moveaxis(part, 0, -1)).astype(np.uint8))
    return found
