"""Minimum mapping unit: small patches of a class are given to their largest neighbour.

Which neighbour is the largest is a question to the whole map: a neighbour may reach any distance,
so no halo around a tile settles it. The whole raster is therefore sieved at once, by GDAL's
scanline algorithm, over files: memory grows with the number of patches (about 24 bytes each), not
with the raster, and the result knows nothing of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.features import sieve
from rasterio.windows import Window

from terraloom.grid import CampaignGrid, block_windows, row_areas_m2, window_of
from terraloom.legend import NODATA_CODE
from terraloom.log import get_logger

__all__ = ["least_pixels", "sieved_windows"]

#: A cluster of small patches is taken in from its rim, pass by pass; a stable map ends it earlier.
_MAX_PASSES = 50

Codes = npt.NDArray[np.uint8]
Windows = Iterator[tuple[slice, slice, npt.NDArray[Any]]]
log = get_logger(__name__)


def least_pixels(grid: CampaignGrid, unit_ha: float) -> int:
    """Fewest pixels of a patch that reaches an area, at the mean true pixel area of the grid."""
    pixel_ha = float(row_areas_m2(grid.geobox).mean()) / 1e4
    return max(1, math.ceil(unit_ha / pixel_ha - 1e-9))


def sieved_windows(
    windows: Windows, grid: CampaignGrid, scratch: Path, *, least: int, connectivity: int,
    facts: dict[str, Any],
) -> Windows:  # fmt: skip
    """The class map without patches of fewer than ``least`` pixels.

    Pixels without a class stay as they are: they neither give nor take pixels. A small patch stays
    where all around it, through other small patches, has no class.

    Args:
        windows: The class map, (1, h, w) per window, all of it.
        grid: Grid of the map.
        scratch: Folder for a few files of one byte per pixel.
        least: Fewest pixels of a patch that stays.
        connectivity: 4 (sides) or 8 (sides and corners).
        facts: Filled with ``passes``, ``changed_px`` and ``mapped_px``.

    Yields:
        Windows of the sieved map.
    """
    shape = tuple(grid.geobox.shape)
    source: Codes = np.memmap(scratch / "source.raw", np.uint8, "w+", shape=shape)
    sieved: Codes = np.memmap(scratch / "sieved.raw", np.uint8, "w+", shape=shape)
    for rows, cols, data in windows:
        source[rows, cols] = data[0]
    mask = _mask_file(scratch / "mask.tif", source)
    before: Codes = np.memmap(scratch / "before.raw", np.uint8, "w+", shape=shape)
    for rows, _ in block_windows(grid.geobox):
        before[rows] = source[rows]
    facts |= {"passes": 0, "changed_px": 0, "mapped_px": 0}
    with rasterio.open(mask) as valid:
        while facts["passes"] < _MAX_PASSES:
            facts["passes"] += 1
            sieve(source, least, out=sieved, mask=rasterio.band(valid, 1),
                  connectivity=connectivity)  # fmt: skip
            changed = 0
            for rows, _ in block_windows(grid.geobox):
                changed += int((sieved[rows] != source[rows]).sum())
                source[rows] = sieved[rows]
            if not changed:
                break
    for rows, _ in block_windows(grid.geobox):
        facts["changed_px"] += int((sieved[rows] != before[rows]).sum())
        facts["mapped_px"] += int((before[rows] != NODATA_CODE).sum())
    log.info(
        "patches below %d pixels: %d of %d pixels changed, %d passes",
        least, facts["changed_px"], facts["mapped_px"], facts["passes"],
    )  # fmt: skip
    for row in range(-(-shape[0] // grid.tile_px)):
        for column in range(-(-shape[1] // grid.tile_px)):
            rows, cols = window_of(grid.tile(column, row).geobox, grid.geobox)
            yield rows, cols, np.array(sieved[rows, cols])[None]


def _mask_file(path: Path, codes: Codes) -> Path:
    """Pixels with a class, as a file: GDAL would hold an array of it in memory twice."""
    h, w = codes.shape
    profile = {"driver": "GTiff", "width": w, "height": h, "count": 1, "dtype": "uint8",
               "compress": "lzw"}  # fmt: skip
    with rasterio.open(path, "w", **profile) as dst:
        for top in range(0, h, 512):
            part = (codes[top : top + 512] != NODATA_CODE).astype(np.uint8)
            dst.write(part, 1, window=Window(0, top, w, part.shape[0]))
    return path
