"""Stores of predicted tiles, written window by window."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.grid import CampaignGrid, Tile
from terraloom.models.mapnet import FEATURES
from terraloom.predict.layers import Layers
from terraloom.predict.windows import Window
from terraloom.preprocess.reasons import INVALID
from terraloom.preprocess.tilestore import CHUNK_PX, TileStore
from terraloom.uncertainty.applicability import CELL_PX

__all__ = ["TileWriter", "encoded"]

#: Values of a strip that is encoded at once (count): a few megabytes.
_STRIP_VALUES = 1 << 20
#: Rows of a strip are whole numbers of this: of all cells that a layer may work on.
_STRIP_ROWS = 12

Array = npt.NDArray[Any]


@dataclass
class _Open:
    """A store in the making, and how many windows it still waits for."""

    store: TileStore
    stack: ExitStack
    left: int
    arrays: dict[str, Any] = field(default_factory=dict)


class TileWriter:
    """Encodes predictions and writes them; a tile stands when its last window has come.

    Args:
        folder: Folder of the stores.
        job: Name of the job, of which only one runs at a time. What it has begun is in a folder
            of its own, ``.JOB``, so that nothing of a job that was killed stays behind.
        layers: What is kept.
        grid: Grid of the campaign.
        digests: Digest by tile.
        windows: All windows that will come, with their tiles.
        threads: Threads that encode a window.

    Several threads may write at once.
    """

    def __init__(
        self, folder: Path, job: str, layers: Layers, grid: CampaignGrid,
        digests: Mapping[str, str], windows: Sequence[tuple[Window, Sequence[Tile]]],
        threads: int = 1,
    ) -> None:  # fmt: skip
        self._folder, self._layers, self._grid = folder, layers, grid
        self._begun = folder / f".{job}"
        shutil.rmtree(self._begun, ignore_errors=True)
        self._digests = digests
        self._left: dict[str, int] = {}
        self._chunk: dict[str, tuple[int, int]] = {}
        for window, tiles in windows:
            for tile in tiles:
                self._left[tile.name] = self._left.get(tile.name, 0) + 1
                h, w = self._chunk.get(tile.name, (0, 0))
                self._chunk[tile.name] = max(h, window.height), max(w, window.width)
        self._open: dict[str, _Open] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __enter__(self) -> TileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._pool is not None:
            self._pool.shutdown()
        for waiting in self._open.values():  # tiles that were not finished leave nothing
            waiting.stack.__exit__(kind or RuntimeError, err, trace)
        self._open.clear()
        shutil.rmtree(self._begun, ignore_errors=True)

    def write(
        self, window: Window, tiles: Sequence[Tile], values: Mapping[str, npt.NDArray[np.float32]],
        reasons: npt.NDArray[np.uint8],
    ) -> None:  # fmt: skip
        """Write a window to its tiles.

        Args:
            window: Where it lies.
            tiles: Tiles to write; pixels of others are left out.
            values: Members' predictions per task, (M, c, h, w), and features of cells.
            reasons: (h, w) bits; a pixel with an invalid bit gets no prediction.
        """
        found = encoded(self._layers, values, reasons, self._pool)
        with self._lock:
            self._place(window, tiles, found)

    def _place(self, window: Window, tiles: Sequence[Tile], found: Mapping[str, Array]) -> None:
        for tile in tiles:
            place = Window.of(tile, self._grid.tile_px)
            part = window.common(place)
            here, there = part.within(window), part.within(place)
            target = self._target(tile, found, window.height)
            for name, array in found.items():
                step = window.height // array.shape[-2]
                at, of = _cells(there, step), _cells(here, step)
                target.arrays[name][(..., *at)] = array[(..., *of)]
            target.left -= 1
            if not target.left:
                target.store.attrs.update({"tile": tile.name, "digest": self._digests[tile.name]})
                del self._open[tile.name]
                target.stack.close()
                name = f"{tile.name}.zip"
                (self._begun / name).replace(self._folder / name)

    def _target(self, tile: Tile, like: Mapping[str, Array], height: int) -> _Open:
        if tile.name in self._open:
            return self._open[tile.name]
        stack = ExitStack()
        path = self._begun / f"{tile.name}.zip"
        store = stack.enter_context(TileStore(path, tile.geobox.crs))
        target = self._open[tile.name] = _Open(store, stack, self._left[tile.name])
        # All windows of a tile but the last of a row or column have one size: each is a chunk.
        size = self._chunk[tile.name]
        chunk = size if max(size) <= 2 * CHUNK_PX else (CHUNK_PX, CHUNK_PX)
        for name, array in sorted(like.items()):
            step = height // array.shape[-2]
            shape = (*array.shape[:-2], *(n // step for n in tile.geobox.shape))
            dims = self._layers.dims(name, array.ndim)
            target.arrays[name] = store.variable(
                name, dims, shape, str(array.dtype), plain=True,
                chunk_px=(chunk[0] // step, chunk[1] // step),
            )  # fmt: skip
        return target


def encoded(
    layers: Layers, values: Mapping[str, npt.NDArray[np.float32]], reasons: npt.NDArray[np.uint8],
    pool: ThreadPoolExecutor | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Layers of a window with ``reasons`` among them, strip by strip, so that copies stay small."""
    h, w = reasons.shape
    valid = (reasons & np.uint8(INVALID)) == 0
    per_row = w * max(v.shape[0] * v.shape[1] for v in values.values())
    most = max(_STRIP_VALUES // per_row // _STRIP_ROWS, 1) * _STRIP_ROWS
    strips = [slice(r, min(r + most, h)) for r in range(0, h, most)]

    def one(rows: slice) -> dict[str, Array]:
        cells = slice(rows.start // CELL_PX, rows.stop // CELL_PX)
        here = {k: v[..., cells if k == FEATURES else rows, :] for k, v in values.items()}
        return layers.encode(here, valid[rows])

    out: dict[str, Array] = {"reasons": reasons}
    for rows, found in zip(strips, (pool.map if pool else map)(one, strips), strict=True):
        for name, part in found.items():
            if name not in out:
                step = w // part.shape[-1]
                out[name] = np.empty((*part.shape[:-2], h // step, w // step), part.dtype)
            at = _cells((rows, slice(0, w)), w // part.shape[-1])
            out[name][(..., *at)] = part
    return out


def _cells(at: tuple[slice, slice], step: int) -> tuple[slice, slice]:
    """Pixels of whole cells as cells of ``step`` pixels."""
    rows, cols = at
    return (
        slice(rows.start // step, rows.stop // step),
        slice(cols.start // step, cols.stop // step),
    )
