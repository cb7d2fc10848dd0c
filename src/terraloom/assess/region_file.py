"""Reading a file of regions: any polygons, in any CRS, each with a name of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyogrio
import shapely
from pyproj import Geod
from shapely.geometry.base import BaseGeometry

from terraloom.aoi import to_crs
from terraloom.config.campaign import Regions
from terraloom.errors import AoiError

__all__ = ["RegionSet", "read_regions"]

_DEGREES = "EPSG:4326"
#: Longest edge of an outline whose area is measured, degrees: geodesics differ from its edges.
_EDGE_DEG = 0.01


@dataclass(frozen=True)
class RegionSet:
    """Regions in the CRS of a map.

    Attributes:
        names: (N,) name of each, all different.
        polygons: (N,) valid polygons or multipolygons.
        area_m2: (N,) true area on the WGS 84 ellipsoid, square metres.
        repaired: Names of regions whose geometry was invalid and was repaired.
        crs: CRS of the file, as text.
    """

    names: tuple[str, ...]
    polygons: tuple[BaseGeometry, ...]
    area_m2: npt.NDArray[np.float64]
    repaired: tuple[str, ...]
    crs: str


def read_regions(settings: Regions, crs: str) -> RegionSet:
    """Read the file of regions and bring it into the CRS of the map.

    Edges are divided before they are projected, so that long ones stay where they are. Lines and
    points that a repair leaves over are dropped.

    Raises:
        AoiError: The file cannot be read, has no rows, no CRS or several layers; a row is no
            polygon or has no area; names are missing or not unique; a region cannot be projected.
    """
    where = f"regions.file {settings.file}"
    frame = _read(settings.file, where)
    names = _names(frame, settings.name_column, where)
    stated = str(frame.crs.to_wkt())
    shapes = [None if g is None or g.is_empty else shapely.force_2d(g) for g in frame.geometry]
    wrong = [
        f"{n} ({'nothing' if g is None else g.geom_type})"
        for n, g in zip(names, shapes, strict=True)
        if g is None or shapely.get_dimensions(g) != 2
    ]
    if wrong:
        raise AoiError(
            f"{len(wrong)} of {len(shapes)} regions are no polygons: {_few(wrong)}", where=where,
            allowed="polygons and multipolygons", fix="remove these rows",
        )  # fmt: skip
    whole = [g for g in shapes if g is not None]
    repaired = tuple(n for n, g in zip(names, whole, strict=True) if not g.is_valid)
    polygons, areas = [], []
    for name, shape in zip(names, whole, strict=True):
        valid = _polygonal(shape)
        moved = _polygonal(to_crs(valid, stated, crs))
        degrees = to_crs(valid, stated, _DEGREES)
        if not (moved.area > 0 and np.isfinite(moved.bounds).all()):
            raise AoiError(
                f"region {name} has no area, or no place in the CRS of the map", where=where,
                allowed="polygons with an area", fix="remove it, or correct the file's CRS",
            )  # fmt: skip
        polygons.append(moved)
        areas.append(_true_area(degrees))
    return RegionSet(names, tuple(polygons), np.array(areas), repaired, _short(frame))


def _read(file: str, where: str) -> gpd.GeoDataFrame:
    fix = "give a file of polygons with a coordinate system"
    if not Path(file).exists():
        raise AoiError("there is no such file", where=where,
                       fix="correct regions.file (a path from the project folder)")  # fmt: skip
    try:
        layers = [str(n) for n, kind in pyogrio.list_layers(file) if kind is not None]
        if len(layers) != 1:
            raise AoiError(
                f"{len(layers)} layers with geometry: {', '.join(layers) or 'none'}", where=where,
                allowed="one layer", fix="write the regions to a file of their own",
            )  # fmt: skip
        frame = gpd.read_file(file, layer=layers[0])
    except pyogrio.errors.DataSourceError as err:
        raise AoiError(f"not a readable vector file ({err})", where=where, fix=fix) from err
    if frame.crs is None:
        raise AoiError("the file has no coordinate system", where=where, fix=fix)
    if not len(frame):
        raise AoiError("the file has no rows", where=where, fix=fix)
    return frame


def _names(frame: gpd.GeoDataFrame, column: str | None, where: str) -> tuple[str, ...]:
    if column is None:
        return tuple(str(n) for n in range(1, len(frame) + 1))
    columns = [str(c) for c in frame.columns if c != frame.geometry.name]
    if column not in columns:
        raise AoiError(
            f"no column {column!r}", where=where, allowed=", ".join(columns) or "no column",
            fix="correct regions.name_column, or leave it out: regions are then numbered",
        )  # fmt: skip
    names = ["" if pd.isna(v) else str(v).strip() for v in frame[column]]
    unnamed = [str(n) for n, name in enumerate(names, 1) if not name]
    if unnamed:
        raise AoiError(
            f"{len(unnamed)} regions without a name: rows {_few(unnamed)}",
            where=f"{where}, column {column}", allowed="a name in every row",
        )  # fmt: skip
    twice = [f"{n} ({k} times)" for n, k in Counter(names).items() if k > 1]
    if twice:
        raise AoiError(
            f"names that are not unique: {_few(twice)}", where=f"{where}, column {column}",
            allowed="another name for each region",
            fix="join the rows of a region into one multipolygon, or name another column",
        )  # fmt: skip
    return tuple(names)


def _few(words: list[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")


def _polygonal(shape: BaseGeometry) -> BaseGeometry:
    """The valid polygons of a geometry."""
    valid = shape if shape.is_valid else shapely.make_valid(shape)
    if valid.geom_type in ("Polygon", "MultiPolygon"):
        return valid
    parts = [g for g in shapely.get_parts(valid) if shapely.get_dimensions(g) == 2]
    return shapely.union_all(parts) if parts else shapely.Polygon()


def _true_area(degrees: BaseGeometry) -> float:
    """Area on the ellipsoid of an outline in degrees, square metres."""
    dense = shapely.segmentize(degrees, _EDGE_DEG)
    oriented = [shapely.geometry.polygon.orient(g) for g in getattr(dense, "geoms", [dense])]
    geod = Geod(ellps="WGS84")
    return float(sum(geod.geometry_area_perimeter(g)[0] for g in oriented))


def _short(frame: gpd.GeoDataFrame) -> str:
    code = frame.crs.to_authority()
    return ":".join(code) if code else str(frame.crs.name)
