"""Exact statistics of raster bands, gathered while they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BandStats"]


class BandStats:
    """Count, extremes, mean and spread of one band's stored values.

    Windows and tiles are added in any number; whole numbers give the same result in whatever
    parts they come, other values up to rounding (Chan et al. 1983).
    """

    def __init__(self, nodata: float | None = None) -> None:
        """Begin with nothing.

        Args:
            nodata: Stored value that means missing; NaN is missing always.
        """
        self.nodata = nodata
        self.pixels = 0
        self.count = 0
        self.low = math.inf
        self.high = -math.inf
        self.mean = 0.0
        self.squares = 0.0
        self._levels: npt.NDArray[np.int64] | None = None

    def add(self, data: npt.NDArray[Any]) -> None:
        """Add the pixels of one window, any shape."""
        self.pixels += data.size
        if data.dtype in (np.uint8, np.uint16):
            found = np.bincount(data.ravel(), minlength=np.iinfo(data.dtype).max + 1)
            if self.nodata is not None:
                found[int(self.nodata)] = 0
            self._levels = found if self._levels is None else self._levels + found
            self._settle(self._levels)
            return
        seen = data[np.isfinite(data)] if data.dtype.kind == "f" else data.ravel()
        if self.nodata is not None:
            seen = seen[seen != self.nodata]
        if seen.size:
            wide = seen.astype(np.float64)
            mean = float(wide.mean())
            squares = float(((wide - mean) ** 2).sum())
            self._join(wide.size, float(wide.min()), float(wide.max()), mean, squares)

    def _settle(self, levels: npt.NDArray[np.int64]) -> None:
        """Moments of counted levels, in whole numbers of any size."""
        at = np.flatnonzero(levels)
        if not at.size:
            return
        pairs = [(int(n), int(v)) for n, v in zip(levels[at], at, strict=True)]
        self.count = sum(n for n, _ in pairs)
        first = sum(n * v for n, v in pairs)
        second = sum(n * v * v for n, v in pairs)
        self.low, self.high = float(at[0]), float(at[-1])
        self.mean = first / self.count
        # Exact before the one division: the difference of whole numbers loses nothing.
        self.squares = (second * self.count - first * first) / self.count

    def _join(self, count: int, low: float, high: float, mean: float, squares: float) -> None:
        total = self.count + count
        step = mean - self.mean
        self.squares += squares + step * step * self.count * count / total
        self.mean += step * count / total
        self.count = total
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, record: Mapping[str, Any]) -> None:
        """Add what another band part gathered, from its :meth:`record`."""
        self.pixels += int(record["pixels"])
        if record["count"]:
            self._join(
                int(record["count"]), record["low"], record["high"], record["mean"],
                record["squares"],
            )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = {"pixels": self.pixels, "count": self.count}
        return found | {
            k: getattr(self, k) if self.count else None for k in ("low", "high", "mean", "squares")
        }

    def tags(self) -> dict[str, str]:
        """GDAL's ``STATISTICS_*`` of the stored values; empty where there is no value."""
        if not self.count:
            return {}
        deviation = math.sqrt(max(self.squares, 0.0) / self.count)
        values = {
            "MINIMUM": self.low, "MAXIMUM": self.high, "MEAN": self.mean, "STDDEV": deviation,
            "VALID_PERCENT": 100 * self.count / self.pixels,
        }  # fmt: skip
        return {f"STATISTICS_{k}": f"{v:.10g}" for k, v in values.items()}
