"""Local shifts: a smooth field through robust tie points, never extrapolated.

Tie points are windows on a regular grid, each measured by itself (:mod:`.matching`). Points with
a low peak, beyond the maximum, or off the trend of the others are rejected. A thin-plate spline
whose smoothness is chosen by cross-validation goes through the rest (Wahba 1990). Outside the
convex hull of the tie points, and far from all of them, the field fades into the scene's global
shift: nothing is extrapolated. A field that predicts left-out points no better than the global
shift does is no field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from scipy import ndimage

from terraloom.preprocess.coregister import Shift, window_starts
from terraloom.preprocess.matching import Pair, TiePoints, match_windows

if TYPE_CHECKING:
    from scipy.interpolate import RBFInterpolator

__all__ = [
    "SPACING_PX", "WINDOW_PX", "ShiftField", "fit_field", "measure_field", "spacing_for",
    "tie_points",
]  # fmt: skip

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]

#: Distance of tie points and size of their windows, pixels.
SPACING_PX, WINDOW_PX = 128, 192
#: Most tie points along one axis: on larger areas they lie further apart.
_MOST_NODES = 32
#: Fewer tie points than this make no field, nor a smaller share of those measured.
_MIN_POINTS, _MIN_SHARE = 12, 0.3
#: Points closer to the trend than this are kept, whatever the spread, pixels.
_FLOOR_PX = 0.1
#: A field must predict left-out points this much better than the global shift does.
_GAIN = 0.8
#: Smoothness that is tried, from following every point to a plane.
_SMOOTHING = (0.0, 0.01, 0.1, 1.0, 10.0)
#: Points that a value of the spline depends on.
_NEIGHBOURS = 60


@dataclass(frozen=True)
class ShiftField:
    """Shifts of a scene's content on a coarse grid of nodes.

    Attributes:
        x: x coordinate of the first node, in the campaign's CRS.
        y: y coordinate of the first node (the northernmost).
        spacing_m: Distance of the nodes, metres.
        pixel_m: Pixel size that shifts are counted in, metres.
        dy_px: (R, C) float64, downwards shift at the nodes, pixels.
        dx_px: (R, C), likewise to the right.
        n_points: Tie points used.
        n_rejected: Tie points measured but rejected.
        residual_px: Median distance of left-out tie points from the field, pixels.
    """

    x: float
    y: float
    spacing_m: float
    pixel_m: float
    dy_px: Float64
    dx_px: Float64
    n_points: int
    n_rejected: int
    residual_px: float

    def at(self, x: FloatArray, y: FloatArray) -> tuple[Float64, Float64]:
        """Down and right shift, pixels, at positions in the campaign's CRS.

        Between nodes by cubic spline; beyond them the value of the border, which is the global
        shift where no tie point was near.
        """
        rows = (self.y - np.asarray(y)) / self.spacing_m
        cols = (np.asarray(x) - self.x) / self.spacing_m
        where = np.stack(np.broadcast_arrays(rows, cols))
        order = min(3, min(self.dy_px.shape) - 1)
        down, right = (
            ndimage.map_coordinates(v, where, order=order, mode="nearest")
            for v in (self.dy_px, self.dx_px)
        )
        return down, right

    def on(self, geobox: GeoBox) -> tuple[Float64, Float64]:
        """Down and right shift, pixels, at the pixel centres of a geobox, (H, W) each."""
        h, w = geobox.shape
        cols, rows = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
        a = geobox.affine
        return self.at(a.a * cols + a.b * rows + a.c, a.d * cols + a.e * rows + a.f)

    @property
    def largest_px(self) -> float:
        """Largest shift of a node, pixels."""
        return float(np.hypot(self.dy_px, self.dx_px).max())

    def record(self) -> dict[str, Any]:
        """JSON form, rounded to a ten thousandth of a pixel."""
        return {
            "x": self.x, "y": self.y, "spacing_m": self.spacing_m, "pixel_m": self.pixel_m,
            "dy_px": self.dy_px.round(4).tolist(), "dx_px": self.dx_px.round(4).tolist(),
            "n_points": self.n_points, "n_rejected": self.n_rejected,
            "residual_px": round(self.residual_px, 4),
        }  # fmt: skip

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ShiftField:
        """Inverse of :meth:`record`."""
        nodes = {k: np.asarray(record[k], dtype=np.float64) for k in ("dy_px", "dx_px")}
        return cls(**{**record, **nodes})


def measure_field(
    reference: FloatArray,
    moving: FloatArray,
    valid: BoolArray | None,
    shift: Shift,
    geobox: GeoBox,
    *,
    max_shift_px: float,
    spacing_px: int = SPACING_PX,
    window_px: int = WINDOW_PX,
    gradient: bool = True,
) -> ShiftField | None:
    """Field of shifts of a scene against a reference on the same pixels.

    Args:
        reference: (B, H, W), NaN invalid.
        moving: (B, H, W) on the same grid, not moved by ``shift``.
        valid: (H, W) bool, clear in both; None: all.
        shift: The scene's global shift: first guess, and what the field fades into.
        geobox: Pixels of the arrays, in the campaign's CRS.
        max_shift_px: Tie points with a larger shift are rejected.
        spacing_px: Distance of the tie points.
        window_px: Size of their windows.
        gradient: Compare edges, not values.

    Returns:
        The field; None where too few points agree or they tell no more than the global shift.
    """
    points = tie_points(
        reference, moving, valid, shift, max_shift_px=max_shift_px, spacing_px=spacing_px,
        window_px=window_px, gradient=gradient,
    )  # fmt: skip
    return fit_field(points, shift, geobox, max_shift_px=max_shift_px, spacing_px=spacing_px)


def tie_points(
    reference: FloatArray,
    moving: FloatArray,
    valid: BoolArray | None,
    shift: Shift,
    *,
    max_shift_px: float,
    spacing_px: int = SPACING_PX,
    window_px: int = WINDOW_PX,
    gradient: bool = True,
) -> TiePoints:
    """Shifts of windows on a regular grid; arguments as of :func:`measure_field`."""
    h, w = reference.shape[1:]
    size = min(window_px, h), min(window_px, w)
    pair = Pair(reference, moving, valid, size, gradient)
    rows, cols = (window_starts(n, s, 0, spacing_px) for n, s in zip((h, w), size, strict=True))
    corners = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
    start = (shift.dy_px, shift.dx_px) if shift.known else (0.0, 0.0)
    return match_windows(pair, corners, max_shift_px=max_shift_px, start=start, passes=2)


def spacing_for(shape: tuple[int, int]) -> int:
    """Distance of tie points on an area of so many pixels: further apart on large ones."""
    return max(SPACING_PX, math.ceil(max(shape) / _MOST_NODES / 16) * 16)


def fit_field(
    points: TiePoints,
    shift: Shift,
    geobox: GeoBox,
    *,
    max_shift_px: float,
    spacing_px: int = SPACING_PX,
) -> ShiftField | None:
    """Smooth field through tie points; see :func:`measure_field`.

    Args:
        points: Measured windows, pixel coordinates of ``geobox``.
        shift: The scene's global shift.
        geobox: Pixels that the coordinates count, in the campaign's CRS.
        max_shift_px: Largest shift of a tie point.
        spacing_px: Distance of the tie points; nodes lie twice as close.
    """
    if not shift.known:
        return None
    base = np.array([shift.dy_px, shift.dx_px])
    measured = np.isfinite(points.shifts).all(axis=1)
    keep = measured & (np.hypot(*np.nan_to_num(points.shifts).T) <= max_shift_px)
    at = np.column_stack([points.rows, points.cols]) / spacing_px
    rest = points.shifts - base
    keep[keep] = _on_trend(at[keep], rest[keep])
    smoothing, errors = _cross_validate(at[keep], rest[keep])
    for _ in range(2):  # points that the others do not foretell
        if len(errors) < _MIN_POINTS:
            break
        good = errors <= max(4 * 1.4826 * float(np.median(errors)), _FLOOR_PX)
        keep[keep] = good
        if good.all():
            break
        smoothing, errors = _cross_validate(at[keep], rest[keep])
    n = int(keep.sum())
    if n < _MIN_POINTS or n < _MIN_SHARE * len(keep):
        return None
    before = np.hypot(*rest[keep].T)
    if math.sqrt(float((errors**2).mean())) > _GAIN * math.sqrt(float((before**2).mean())):
        return None
    step = spacing_px // 2  # finer than the points, to hold the bend where the field fades
    nodes = _nodes(geobox, step)
    values = _surface(at[keep], rest[keep], smoothing, nodes.reshape(-1, 2) / spacing_px)
    down, right = (values + base).T.reshape(2, *nodes.shape[:2])
    a = geobox.affine
    return ShiftField(
        x=a.c + 0.5 * a.a, y=a.f + 0.5 * a.e, spacing_m=step * float(a.a),
        pixel_m=float(a.a), dy_px=down, dx_px=right, n_points=n,
        n_rejected=int(measured.sum()) - n, residual_px=float(np.median(errors)),
    )  # fmt: skip


def _nodes(geobox: GeoBox, step_px: int) -> Float64:
    """(R, C, 2) pixel coordinates of the nodes; they cover the geobox."""
    rows, cols = (np.arange(math.ceil((n - 1) / step_px) + 1) for n in geobox.shape)
    grid = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1)
    nodes: Float64 = grid * np.float64(step_px)
    return nodes


def _on_trend(at: Float64, values: Float64) -> BoolArray:
    """Points near a quadratic trend, fitted without those that lie off it."""
    keep: BoolArray = np.ones(len(at), dtype=bool)
    if len(at) < _MIN_POINTS:
        return keep
    y, x = (at - at.mean(axis=0)).T / max(float(at.std()), 1e-9)
    design = np.column_stack([np.ones_like(x), y, x, y * y, y * x, x * x])
    centre = np.median(values, axis=0)
    distance: FloatArray = np.hypot(*(values - centre).T)
    for _ in range(5):
        # A wide gate: a field may bend more than a quadratic; wrong peaks are off by a pixel.
        near = distance <= max(5 * 1.4826 * float(np.median(distance)), 3 * _FLOOR_PX)
        if near.sum() < design.shape[1]:
            break
        keep = near
        factors, *_ = np.linalg.lstsq(design[keep], values[keep], rcond=None)
        distance = np.hypot(*(values - design @ factors).T)
    return keep


def _spline(at: Float64, values: Float64, smoothing: float) -> RBFInterpolator:
    from scipy.interpolate import RBFInterpolator  # a field is fitted once, and used by every job

    few = None if len(at) <= _NEIGHBOURS * 20 else _NEIGHBOURS
    return RBFInterpolator(at, values, neighbors=few, smoothing=smoothing, degree=1)


def _cross_validate(at: Float64, values: Float64) -> tuple[float, FloatArray]:
    """Smoothness that foretells left-out points best, and (N,) its errors, pixels."""
    if len(at) < _MIN_POINTS:
        return _SMOOTHING[-1], np.zeros(0)
    fold = np.arange(len(at)) % 5
    best: tuple[float, float, FloatArray] = (math.inf, _SMOOTHING[-1], np.zeros(len(at)))
    for smoothing in _SMOOTHING:
        errors = np.zeros(len(at))
        for k in range(5):
            rest = fold != k
            told = _spline(at[rest], values[rest], smoothing)(at[~rest])
            errors[~rest] = np.hypot(*(told - values[~rest]).T)
        score = float(np.mean(np.minimum(errors, 1.0) ** 2))
        if score < best[0]:
            best = (score, smoothing, errors)
    return best[1], best[2]


def _surface(at: Float64, values: Float64, smoothing: float, nodes: Float64) -> Float64:
    """(M, 2) spline at the nodes; 0 away from the hull and from all points."""
    from scipy.spatial import cKDTree

    hull = shapely.convex_hull(shapely.MultiPoint(at))
    where = shapely.points(nodes)
    # A node outside takes the value of the hull's nearest point, less the further off it is.
    near = shapely.get_coordinates(shapely.shortest_line(hull, where)).reshape(-1, 2, 2)[:, 0]
    inside = shapely.contains(hull, where)
    near[inside] = nodes[inside]
    off = np.where(inside, 0.0, np.hypot(*(nodes - near).T))
    lonely, _ = cKDTree(at).query(near)
    fade = np.clip(1.0 - off, 0.0, 1.0) * np.clip(2.0 - lonely / 1.5, 0.0, 1.0)
    fade = fade * fade * (3.0 - 2.0 * fade)
    surface: Float64 = _spline(at, values, smoothing)(near) * fade[:, None]
    return surface
