"""Spread of regional totals between the networks of an ensemble.

A total is a sum, so each network's is had from its means over small cells, which prediction keeps
when the campaign names regions (:mod:`terraloom.predict.members`). Cells on the outline of a region
count by the share that it covers, as if a network said the same all over a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from terraloom.assess.areas import PixelAreas
from terraloom.grid import Tile
from terraloom.legend import IGNORE_INDEX
from terraloom.plan import TILES
from terraloom.predict.members import MEMBER_CELL_PX, decode_members
from terraloom.preprocess.tilestore import open_arrays
from terraloom.uncertainty.regions import Block, Window, sum_regions

__all__ = ["MemberCells", "member_spread"]

F64 = npt.NDArray[np.float64]

#: Values of the members in one window (count): 64 megabytes.
_MOST_VALUES = 1 << 24


class MemberCells:
    """Reads the members' means over cells from the stores of predicted tiles.

    Args:
        layer: Name of the layer in the stores.
        geobox: Pixels of the map.
        tiles: Its tiles.
        folder: Folder of the stores.
    """

    def __init__(
        self, layer: str, geobox: GeoBox, tiles: Sequence[Tile], folder: Path = TILES
    ) -> None:
        s, a = MEMBER_CELL_PX, geobox.affine
        self.geobox = GeoBox(
            (-(-geobox.shape[0] // s), -(-geobox.shape[1] // s)),
            Affine(a.a * s, a.b, a.c, a.d, a.e * s, a.f), geobox.crs,
        )  # fmt: skip
        self._layer = layer
        self._stores: list[tuple[tuple[int, int, int, int], Any]] = []
        self.members, self.channels = 0, 0
        self.missing: list[str] = []
        for tile in tiles:
            store = open_arrays(folder / f"{tile.name}.zip")
            if store is None or layer not in store:
                self.missing.append(tile.name)
                continue
            self.members, self.channels = store[layer].shape[:2]
            t, (h, w) = tile.geobox.affine, tile.geobox.shape
            row, col = round((t.f - a.f) / a.e) // s, round((t.c - a.c) / a.a) // s
            self._stores.append(((row, row + h // s, col, col + w // s), store))

    def __call__(self, window: Window) -> Block:
        """Members' means (M x c, h, w) of a window of cells, and the valid share of each cell."""
        rows, cols = window
        h, w = rows.stop - rows.start, cols.stop - cols.start
        values = np.zeros((self.members * self.channels, h, w), np.float32)
        valid = np.zeros((h, w), np.float32)
        s = MEMBER_CELL_PX
        for (r0, r1, c0, c1), store in self._stores:
            top, bottom = max(r0, rows.start), min(r1, rows.stop)
            left, right = max(c0, cols.start), min(c1, cols.stop)
            if top >= bottom or left >= right:
                continue
            y, x = slice(top - r0, bottom - r0), slice(left - c0, right - c0)
            at = slice(top - rows.start, bottom - rows.start)
            to = slice(left - cols.start, right - cols.start)
            part = decode_members(store[self._layer][:, :, y, x])
            values[:, at, to] = part.reshape(len(values), *part.shape[2:])
            index = store["class_index"][y.start * s : y.stop * s, x.start * s : x.stop * s]
            known = (index != IGNORE_INDEX).reshape(bottom - top, s, right - left, s)
            valid[at, to] = known.mean(axis=(1, 3))
        return Block(values, valid)

    def size(self) -> tuple[int, int]:
        """Rows and columns of the windows to read."""
        side = max(48, math.isqrt(_MOST_VALUES // max(1, self.members * self.channels)))
        return side, side


def member_spread(cells: MemberCells, regions: Sequence[BaseGeometry]) -> F64:
    """Standard deviation between members of the mean over each region.

    Args:
        cells: Means of the members.
        regions: N polygons in the CRS of the map.

    Returns:
        (N, c) per unit of area (a share, or in units of the value); NaN outside the map. The
        denominator is M - 1.
    """
    sums = sum_regions(
        regions, cells.geobox, cells, layers=cells.members * cells.channels,
        areas=PixelAreas(cells.geobox).window, size=cells.size(),
    )  # fmt: skip
    shape = (cells.members, cells.channels)
    each = [s.total.reshape(shape) / (s.covered or np.nan) for s in sums]
    return np.array([e.std(axis=0, ddof=1) for e in each])
