"""Reading windows of the cubes across tile borders."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import StateError
from terraloom.grid import CampaignGrid
from terraloom.predict.windows import Window
from terraloom.preprocess.channels import channel_names
from terraloom.preprocess.groups import group_factor
from terraloom.preprocess.reasons import Reason
from terraloom.preprocess.tilestore import CHUNK_PX, decode, open_arrays

__all__ = ["CubeReader"]

#: Bytes of blocks that are held: neighbouring windows share the blocks on their border.
_HELD_BYTES = 96_000_000
#: Stores that are held open: a window and its halo seldom touch more.
_OPEN = 16

Block = tuple[int, int, str, int, int]


class CubeReader:
    """Windows of the network inputs anywhere on the grid; NaN where there is no cube.

    Cubes are read and decoded by blocks of one chunk, so memory does not depend on the tile.
    Several threads may read at once.

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
        self._stores: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._blocks: OrderedDict[Block, npt.NDArray[np.float32]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()
        self.channels = channel_names(self._store(next(iter(self._tiles))))
        self._factor = {g: group_factor(g) for g in self.channels}

    def window(self, row: int, col: int, h: int, w: int) -> dict[str, npt.NDArray[np.float32]]:
        """Inputs of a window, per group (C, h / factor, w / factor).

        Args:
            row: First row of the window in grid pixels; may lie outside the grid.
            col: First column.
            h: Rows; with row, multiples of the pixels of all groups, so that these are whole.
            w: Columns; likewise.
        """
        window = Window(row, col, h, w)
        out = {}
        for g, names in self.channels.items():
            f = self._factor[g]
            out[g] = np.full((len(names), h // f, w // f), np.nan, np.float32)
            for key, part in self._touched(window):
                self._paste(out[g], window, key, part, g, f)
        return out

    def reasons(self, window: Window) -> npt.NDArray[np.uint8]:
        """Reason bits (h, w) of a window in grid pixels; no data where there is no cube."""
        out = np.full((window.height, window.width), Reason.NODATA, np.uint8)
        for key, part in self._touched(window):
            rows, cols = part.within(Window.of(self._tiles[key], self._grid.tile_px))
            out[part.within(window)] = self._store(key)["reasons"][rows, cols]
        return out

    def _touched(self, window: Window) -> list[tuple[tuple[int, int], Window]]:
        """Tiles that have pixels in a window, and the window of these."""
        size, found = self._grid.tile_px, []
        for tr in range(max(window.row, 0) // size, (window.row + window.height - 1) // size + 1):
            for tc in range(
                max(window.col, 0) // size, (window.col + window.width - 1) // size + 1
            ):
                if (tc, tr) in self._tiles:
                    part = window.common(Window.of(self._tiles[tc, tr], size))
                    if part.height and part.width:
                        found.append(((tc, tr), part))
        return found

    def _store(self, key: tuple[int, int]) -> Any:
        with self._lock:
            return self._opened(key)

    def _opened(self, key: tuple[int, int]) -> Any:
        if key not in self._stores:
            path = self._folder / f"{self._tiles[key].name}.zip"
            store = open_arrays(path)
            if store is None:
                raise StateError("the cube is missing or damaged", where=str(path),
                                 fix="delete it and run the stage before")  # fmt: skip
            self._stores[key] = store
            if len(self._stores) > _OPEN:
                self._stores.popitem(last=False)
        self._stores.move_to_end(key)
        return self._stores[key]

    def _paste(
        self, out: npt.NDArray[np.float32], window: Window, key: tuple[int, int], part: Window,
        group: str, f: int,
    ) -> None:  # fmt: skip
        size = self._grid.tile_px
        r0, c0 = key[1] * size, key[0] * size
        top, left = (part.row - r0) // f, (part.col - c0) // f
        bottom, right = top + part.height // f, left + part.width // f
        # Where rows and columns of the tile's array stand in that of the window.
        down, over = (r0 - window.row) // f, (c0 - window.col) // f
        for br in range(top // CHUNK_PX, (bottom - 1) // CHUNK_PX + 1):
            for bc in range(left // CHUNK_PX, (right - 1) // CHUNK_PX + 1):
                y0, x0 = max(br * CHUNK_PX, top), max(bc * CHUNK_PX, left)
                y1, x1 = min((br + 1) * CHUNK_PX, bottom), min((bc + 1) * CHUNK_PX, right)
                y, x = y0 - br * CHUNK_PX, x0 - bc * CHUNK_PX
                block = self._block((*key, group, br, bc))
                out[:, down + y0 : down + y1, over + x0 : over + x1] = block[
                    :, y : y + y1 - y0, x : x + x1 - x0
                ]

    def _block(self, key: Block) -> npt.NDArray[np.float32]:
        """All channels (C, h, w) of a group in one block of a tile."""
        with self._lock:
            return self._decoded(key)

    def _decoded(self, key: Block) -> npt.NDArray[np.float32]:
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        column, row, group, br, bc = key
        array = self._store((column, row))[group]
        rows, cols = (slice(b * CHUNK_PX, (b + 1) * CHUNK_PX) for b in (br, bc))
        values = decode(array[..., rows, cols])
        block = values.reshape(-1, *values.shape[-2:])
        self._blocks[key] = block
        self._bytes += block.nbytes
        while self._bytes > _HELD_BYTES and len(self._blocks) > 1:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes
        return block
