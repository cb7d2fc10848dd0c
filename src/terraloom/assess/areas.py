"""True ellipsoidal pixel areas of any raster window."""

from __future__ import annotations

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from terraloom.grid import row_areas_m2

__all__ = ["AREA_KNOT_PX", "PixelAreas"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Most pixels, and about the most metres, between exact pixel areas. Bilinear interpolation over
#: 5 km is good to 1e-7 in UTM and in latitude; the floor bounds the work on coarse rasters.
AREA_KNOT_PX = 512
_KNOT_M = 5_000.0
_MIN_KNOT_PX = 16

#: Metres per degree of latitude, near enough to choose a spacing.
_M_PER_DEG = 111_320.0

#: `row_areas_m2` measures a strip this many pixels wide that starts at the pixel it is asked for.
_STRIP_PX = 16


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
        geographic = bool(geobox.crs is not None and geobox.crs.geographic)
        unit_m = _M_PER_DEG if geographic else 1.0
        self._rows = _knots(h, abs(float(geobox.resolution.y)) * unit_m)
        # Along a parallel the area does not change: two knots say it all.
        self._cols = (
            np.array([0, max(1, w - 1)])
            if geographic
            else _knots(w, abs(float(geobox.resolution.x)) * unit_m)
        )
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
    # Start half a strip to the left, so that the strip is centred on the pixel.
    a, dx = geobox.affine, col - (_STRIP_PX - 1) / 2
    origin = (a.c + a.a * dx + a.b * row, a.f + a.d * dx + a.e * row)
    affine = Affine(a.a, a.b, origin[0], a.d, a.e, origin[1])
    return float(row_areas_m2(GeoBox((1, 1), affine, geobox.crs))[0])


def _knots(n: int, pixel_m: float) -> I64:
    """Knot positions 0 .. n-1; at least two, so that every pixel lies in an interval."""
    if n == 1:
        return np.array([0, 1], dtype=np.int64)
    step = int(np.clip(_KNOT_M / pixel_m, _MIN_KNOT_PX, AREA_KNOT_PX))
    return np.unique(np.append(np.arange(0, n, step), n - 1)).astype(np.int64)


def _position(knots: I64, at: I64) -> tuple[I64, F64]:
    index = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, knots.size - 2)
    share: F64 = (at - knots[index]) / (knots[index + 1] - knots[index])
    return index.astype(np.int64), share
