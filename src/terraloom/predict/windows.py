"""How the tiles of a job are cut into the windows that networks are run on.

Small tiles of a job that lie side by side are predicted in one window, so that less is computed
twice; large ones are cut, so that memory is bounded by the window. The cut depends on the job's
tiles alone, not on what is finished: a job that goes on after a kill computes what it would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from terraloom.grid import Tile

__all__ = ["Place", "Window", "cut", "in_batches"]

#: Rows and columns of an array.
Place = tuple[slice, slice]

#: Cuts lie on multiples of this many pixels, as the borders of tiles do.
_UNIT_PX = 48


@dataclass(frozen=True)
class Window:
    """A rectangle of the campaign's grid, in its pixels.

    Attributes:
        row: First row; may lie outside the grid.
        col: First column.
        height: Rows.
        width: Columns.
    """

    row: int
    col: int
    height: int
    width: int

    def padded(self, reach_px: int, stride_px: int) -> Window:
        """The window to read, so that each pixel of this one sees all that it can see.

        Its corners are multiples of ``stride_px`` of the grid, so that pixels are pooled in the
        same way wherever the window lies.
        """
        top, left = (math.floor((v - reach_px) / stride_px) for v in (self.row, self.col))
        bottom = math.ceil((self.row + self.height + reach_px) / stride_px)
        right = math.ceil((self.col + self.width + reach_px) / stride_px)
        s = stride_px
        return Window(top * s, left * s, (bottom - top) * s, (right - left) * s)

    def within(self, outer: Window) -> Place:
        """Rows and columns of this window in an array of a window around it."""
        r, c = self.row - outer.row, self.col - outer.col
        return slice(r, r + self.height), slice(c, c + self.width)

    def common(self, other: Window) -> Window:
        """What two windows have in common; it has no pixels where they do not meet."""
        r0, c0 = max(self.row, other.row), max(self.col, other.col)
        r1 = min(self.row + self.height, other.row + other.height)
        c1 = min(self.col + self.width, other.col + other.width)
        return Window(r0, c0, max(r1 - r0, 0), max(c1 - c0, 0))

    @classmethod
    def of(cls, tile: Tile, tile_px: int) -> Window:
        """The window of a tile."""
        return cls(tile.row * tile_px, tile.column * tile_px, *tile.geobox.shape)


def cut(
    tiles: Sequence[Tile], tile_px: int, window_px: int, stride_px: int = 1
) -> list[tuple[Window, tuple[Tile, ...]]]:
    """Windows that cover the tiles of a job, with the tiles of each.

    A window holds whole tiles, or lies in one tile; windows of a tile follow each other.

    Args:
        tiles: Tiles of the job.
        tile_px: Height and width of a tile.
        window_px: Largest height and width of a window.
        stride_px: Cuts inside a tile are multiples of it.
    """
    most = window_px // tile_px
    if most > 1:
        return [(_around(stack, tile_px), tuple(stack)) for stack in _stacks(tiles, most)]
    unit = math.lcm(_UNIT_PX, stride_px)
    return [
        (part, (tile,))
        for tile in tiles
        for part in _parts(Window.of(tile, tile_px), window_px, unit)
    ]


def _stacks(tiles: Sequence[Tile], most: int) -> list[list[Tile]]:
    """Tiles in rectangles of at most ``most`` tiles per side."""
    runs: list[list[Tile]] = []
    for tile in sorted(tiles, key=lambda t: (t.row, t.column)):
        last = runs[-1][-1] if runs else None
        next_to = last is not None and (last.row, last.column + 1) == (tile.row, tile.column)
        if next_to and len(runs[-1]) < most:
            runs[-1].append(tile)
        else:
            runs.append([tile])
    stacks: dict[tuple[int, int, int], list[Tile]] = {}
    done: list[list[Tile]] = []
    for run in runs:
        row, first, n = run[0].row, run[0].column, len(run)
        above = stacks.pop((row - 1, first, n), None)
        if above is not None and row - above[0].row < most:
            above += run
            stacks[row, first, n] = above
        else:
            done.append(stack := list(run))
            stacks[row, first, n] = stack
    return done


def _around(tiles: Sequence[Tile], tile_px: int) -> Window:
    first, last = (Window.of(t, tile_px) for t in (tiles[0], tiles[-1]))
    return Window(
        first.row, first.col, last.row + last.height - first.row, last.col + last.width - first.col
    )


def _parts(whole: Window, window_px: int, unit_px: int) -> Iterator[Window]:
    """Windows of about equal size, row by row."""

    def edges(first: int, size: int) -> list[int]:
        n = math.ceil(size / max(window_px // unit_px * unit_px, unit_px))
        step = math.ceil(size / n / unit_px) * unit_px
        return [*range(first, first + size, step), first + size]

    rows, cols = edges(whole.row, whole.height), edges(whole.col, whole.width)
    for top, bottom in pairwise(rows):
        for left, right in pairwise(cols):
            yield Window(top, left, bottom - top, right - left)


def in_batches(
    windows: Sequence[tuple[Window, tuple[Tile, ...]]], most: int
) -> Iterator[list[tuple[Window, tuple[Tile, ...]]]]:
    """Windows of one shape that follow each other, at most ``most`` together."""
    batch: list[tuple[Window, tuple[Tile, ...]]] = []
    for item in windows:
        same = bool(batch) and (batch[0][0].height, batch[0][0].width) == (
            item[0].height, item[0].width
        )  # fmt: skip
        if batch and (not same or len(batch) == most):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
