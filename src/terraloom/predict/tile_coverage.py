"""How well the scenes covered each tile, period by period: the table ``tiles.csv``."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.grid import Tile
from terraloom.legend import IGNORE_INDEX

__all__ = ["TileCover"]

#: What the columns of the table mean.
_COLUMNS = (
    "tile", "column", "row", "mapped_pct", "period", "clear_dates", "least_clear_dates",
    "never_clear_pct",
)  # fmt: skip


class TileCover:
    """Rows of the table, gathered tile by tile: one per tile and period."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, tile: Tile, cube: xr.Dataset, class_index: npt.NDArray[np.uint8]) -> None:
        """Add a tile.

        Args:
            tile: The tile.
            cube: Its cube, with ``clear_count`` (period, H, W), the clear observations of each
                pixel; a cube without optical scenes has none.
            class_index: (H, W) predicted classes, 255 = none.
        """
        own = {
            "tile": tile.name, "column": tile.column, "row": tile.row,
            "mapped_pct": round(100 * float((class_index != IGNORE_INDEX).mean()), 2),
        }  # fmt: skip
        if "clear_count" not in cube:
            self._rows.append(own)
            return
        periods = [str(p) for p in cube["period"].to_numpy()]
        for period, count in zip(periods, cube["clear_count"].to_numpy(), strict=True):
            self._rows.append(
                own
                | {
                    "period": period, "clear_dates": round(float(count.mean()), 2),
                    "least_clear_dates": int(np.percentile(count, 5, method="lower")),
                    "never_clear_pct": round(100 * float((count == 0).mean()), 2),
                }
            )  # fmt: skip

    def csv(self) -> str:
        """The table; cells of a tile without optical scenes are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        return text.getvalue()
