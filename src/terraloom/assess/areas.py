"""True ellipsoidal pixel areas of any raster window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from terraloom.grid import row_areas_m2

__all__ = ["AREA_KNOT_PX", "PixelAreas"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Spacing of exact pixel areas; bilinear in between is good to 1e-6 for 10 m pixels.
AREA_KNOT_PX = 512


class PixelAreas:
    """True ellipsoidal area of every pixel of a raster, square metres.

    `grid.row_areas_m2` is evaluated at knots and interpolated: along a row too, because in UTM
    the scale changes mostly with easting (8e-4 within one Sentinel-2 tile).
    """

    def __init__(self, geobox: GeoBox) -> None:
        """Evaluate the knots.

        Args:
            geobox: Pixels of the raster, (H, W).
        """
        h, w = geobox.shape
        self._rows, self._cols = _knots(h), _knots(w)
        self._table = np.array(
            [[_pixel_m2(geobox, r, c) for c in self._cols.tolist()] for r in self._rows.tolist()]
        )

    def window(self, rows: slice, cols: slice) -> F64:
        """Areas of a window, (h, w) float64, square metres."""
        row, col = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
        return self._interpolate(row[:, None], col[None, :])

    def at(self, row: I64, col: I64) -> F64:
        """Areas of N pixels, (N,) float64, square metres."""
        return self._interpolate(row, col)

    def _interpolate(self, row: I64, col: I64) -> F64:
        i, u = _position(self._rows, row)
        j, v = _position(self._cols, col)
        t = self._table
        upper = t[i, j] * (1 - v) + t[i, j + 1] * v
        lower = t[i + 1, j] * (1 - v) + t[i + 1, j + 1] * v
        area: F64 = upper * (1 - u) + lower * u
        return area


def _pixel_m2(geobox: GeoBox, row: int, col: int) -> float:
    # The knot past the edge of a one-pixel side repeats the edge.
    r, c = min(row, geobox.shape[0] - 1), min(col, geobox.shape[1] - 1)
    return float(row_areas_m2(geobox[r : r + 1, c : c + 1])[0])


def _knots(n: int) -> I64:
    """Knot positions 0 .. n-1; at least two, so that every pixel lies in an interval."""
    if n == 1:
        return np.array([0, 1], dtype=np.int64)
    return np.unique(np.append(np.arange(0, n, AREA_KNOT_PX), n - 1)).astype(np.int64)


def _position(knots: I64, at: I64) -> tuple[I64, F64]:
    index = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, knots.size - 2)
    share: F64 = (at - knots[index]) / (knots[index + 1] - knots[index])
    return index.astype(np.int64), share
