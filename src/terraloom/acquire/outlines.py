"""Outlines of items in longitude and latitude, also across the 180th meridian.

STAC asks for outlines that are cut at the 180th meridian (RFC 7946, section 3.1.9). Many items have
one ring that jumps from 179 to -179 degrees, or runs on to 181; read as it stands, the first would
span the whole Earth.
"""

from __future__ import annotations

import math
from typing import Any

from shapely import make_valid, union_all
from shapely.affinity import translate
from shapely.errors import ShapelyError
from shapely.geometry import MultiPolygon, Polygon, box, shape
from shapely.geometry.base import BaseGeometry

__all__ = ["outline"]

#: A ring that jumps further than this between two corners crosses the 180th meridian instead.
_JUMP_DEG = 180.0


def outline(geometry: dict[str, Any] | None, bbox: list[float] | None) -> BaseGeometry:
    """Valid outline in degrees, within -180 to 180, cut at the 180th meridian.

    Args:
        geometry: GeoJSON geometry, or None.
        bbox: West, south, east, north (or with heights), used without a geometry; west greater
            than east means across the 180th meridian.

    Raises:
        ValueError: Neither, coordinates that are no degrees, no area, or a ring around a pole,
            which longitude and latitude cannot describe.
    """
    try:
        if geometry:
            result = _of_geometry(shape(geometry))
        elif bbox:
            result = _cut(_box([float(v) for v in bbox]))
        else:
            raise ValueError("neither a geometry nor a bounding box")
    except (ShapelyError, TypeError, KeyError, IndexError, AttributeError) as err:
        raise ValueError(f"not a geometry ({err})") from err
    if result.is_empty or result.area == 0:
        raise ValueError("the outline has no area")
    return result


def _of_geometry(found: BaseGeometry) -> BaseGeometry:
    parts = found.geoms if isinstance(found, MultiPolygon) else [found]
    polygons = [p for p in parts if isinstance(p, Polygon)]
    if not polygons:
        raise ValueError(f"a {found.geom_type} has no area")
    return make_valid(union_all([make_valid(_wrapped(p)) for p in polygons]))


def _box(b: list[float]) -> BaseGeometry:
    if len(b) not in (4, 6):
        raise ValueError(f"a bounding box of {len(b)} numbers")
    west, south, east, north = b[0], b[1], b[len(b) // 2], b[len(b) // 2 + 1]
    for lon, lat in ((west, south), (east, north)):
        _check(lon, lat)
    return box(west, south, east + 360 if west > east else east, north)


def _wrapped(polygon: Polygon) -> BaseGeometry:
    rings = [_unrolled(polygon.exterior.coords), *(_unrolled(r.coords) for r in polygon.interiors)]
    centre = sum(lon for lon, _ in rings[0]) / max(len(rings[0]), 1)
    holes = []
    for ring in rings[1:]:  # a hole is unrolled from its own first corner
        turns = round((centre - sum(lon for lon, _ in ring) / len(ring)) / 360)
        holes.append([(lon + 360 * turns, lat) for lon, lat in ring])
    return _cut(make_valid(Polygon(rings[0], holes)))


def _cut(whole: BaseGeometry) -> BaseGeometry:
    """The parts of a shape that runs on beyond 180 degrees, each where it belongs."""
    pieces = []
    for turn in (-1, 0, 1):
        part = whole.intersection(box(360 * turn - 180, -90, 360 * turn + 180, 90))
        if part.area > 0:
            pieces.append(translate(part, xoff=-360.0 * turn))
    return union_all(pieces)


def _unrolled(corners: Any) -> list[tuple[float, float]]:
    """Corners without jumps: longitudes run on beyond 180 degrees."""
    out: list[tuple[float, float]] = []
    shift = 0.0
    for corner in corners:
        lon, lat = float(corner[0]), float(corner[1])
        _check(lon, lat)
        if out and not abs(lon) == abs(corners[len(out) - 1][0]) == 180:  # not an edge of the Earth
            shift += 360.0 * (lon + shift - out[-1][0] < -_JUMP_DEG)
            shift -= 360.0 * (lon + shift - out[-1][0] > _JUMP_DEG)
        out.append((lon + shift, lat))
    if out and out[0] != out[-1] and abs(out[0][0] - out[-1][0]) > _JUMP_DEG:
        raise ValueError("the outline runs around a pole")
    return out


def _check(lon: float, lat: float) -> None:
    if not (math.isfinite(lon) and abs(lon) <= 360 and abs(lat) <= 90):
        raise ValueError(f"corner {lon:g}, {lat:g} is not in degrees of longitude, latitude")
