"""Reading windows of the cube across tile borders."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from terraloom.grid import CampaignGrid
from terraloom.io import read_store
from terraloom.preprocess.cube import channel_names, cube_inputs
from terraloom.preprocess.groups import group_factor

__all__ = ["CubeReader"]

#: Tiles held in memory: the tile itself and its eight neighbours.
_HELD = 9


class CubeReader:
    """Windows of the network inputs anywhere on the grid; NaN where there is no cube.

    Args:
        folder: Folder of the tile stores.
        grid: Grid of the campaign.

    Attributes:
        channels: Channel names per group, in order.
    """

    def __init__(self, folder: Path, grid: CampaignGrid) -> None:
        self._folder = folder
        self._grid = grid
        self._tiles = {(t.column, t.row): t for t in grid.tiles()}
        self._held: OrderedDict[tuple[int, int], dict[str, npt.NDArray[np.float32]]] = OrderedDict()
        first = next(iter(self._tiles.values()))
        store = read_store(folder / f"{first.name}.zip")
        self.channels = channel_names(store)
        self._factor = {g: group_factor(g) for g in self.channels}

    def _tile(self, key: tuple[int, int]) -> dict[str, npt.NDArray[np.float32]]:
        if key not in self._held:
            store = read_store(self._folder / f"{self._tiles[key].name}.zip")
            self._held[key] = cube_inputs(store)
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def window(self, row: int, col: int, h: int, w: int) -> dict[str, npt.NDArray[np.float32]]:
        """Inputs of a window, per group (C, h / factor, w / factor).

        Args:
            row: First row of the window in grid pixels; may lie outside the grid.
            col: First column.
            h: Rows; with row, multiples of the pixels of all groups, so that these are whole.
            w: Columns; likewise.
        """
        out = {
            g: np.full((len(names), h // self._factor[g], w // self._factor[g]), np.nan, np.float32)
            for g, names in self.channels.items()
        }
        size = self._grid.tile_px
        for tr in range(max(row, 0) // size, (row + h - 1) // size + 1):
            for tc in range(max(col, 0) // size, (col + w - 1) // size + 1):
                if (tc, tr) in self._tiles:
                    self._paste(out, (tc, tr), row, col, h, w)
        return out

    def _paste(
        self, out: dict[str, npt.NDArray[np.float32]], key: tuple[int, int],
        row: int, col: int, h: int, w: int,
    ) -> None:  # fmt: skip
        size = self._grid.tile_px
        th, tw = self._tiles[key].geobox.shape
        r0, c0 = key[1] * size, key[0] * size
        top, left = max(row, r0), max(col, c0)
        bottom, right = min(row + h, r0 + th), min(col + w, c0 + tw)
        if bottom <= top or right <= left:
            return
        for g, x in self._tile(key).items():
            f = self._factor[g]
            out[g][
                :, (top - row) // f : (bottom - row) // f, (left - col) // f : (right - col) // f
            ] = x[:, (top - r0) // f : (bottom - r0) // f, (left - c0) // f : (right - c0) // f]
