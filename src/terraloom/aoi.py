"""From a campaign's area of interest to its pixel grid."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError
from shapely import force_2d, from_wkb, make_valid, transform, union_all
from shapely.affinity import translate
from shapely.geometry import Point, box
from shapely.geometry.base import BaseGeometry
from shapely.validation import explain_validity

from terraloom.config.campaign import Campaign
from terraloom.errors import AoiError, ConfigError
from terraloom.grid import CampaignGrid, pick_crs

__all__ = ["campaign_grid", "read_aoi", "to_crs"]

#: Campaign resolution, metres: the finest native pixel of the sources at hand.
RESOLUTION_M = 10.0
#: Areas end this far from a pole, degrees.
_POLE_DEG = 0.01


def campaign_grid(campaign: Campaign) -> CampaignGrid:
    """Grid of a campaign.

    Raises:
        AoiError: The area is empty, crosses itself, crosses the 180th meridian or reaches a pole,
            its coordinates cannot be of its CRS, or its file cannot be used.
        ConfigError: ``grid.crs`` is not a projected system in metres.
    """
    aoi, crs = read_aoi(campaign.aoi.file, campaign.aoi.bbox, campaign.aoi.crs)
    where = f"aoi.file {campaign.aoi.file}" if campaign.aoi.file else "aoi.bbox"
    aoi = _plausible(aoi, crs, where)
    degrees = to_crs(aoi, crs, "EPSG:4326")
    _check_place(degrees, aoi, crs, where)
    target = campaign.grid.crs
    if target == "auto":
        target = pick_crs(degrees)
    else:
        _check_target(target)
    projected = to_crs(aoi, crs, target)
    if not np.isfinite(projected.bounds).all():
        raise AoiError(
            "the area cannot be projected", where=f"{where}, grid.crs {target}",
            allowed="a CRS that holds the area", fix="set grid.crs to auto",
        )  # fmt: skip
    return CampaignGrid.from_aoi(
        projected,
        target,
        resolution_m=RESOLUTION_M,
        tile_px=campaign.grid.tile_px,
        lattice_m=campaign.grid.lattice_m,
    )


def _plausible(aoi: BaseGeometry, crs: str, where: str) -> BaseGeometry:
    """The area, if its coordinates can be of its CRS; longitudes of 180 to 360 are turned back."""
    west, south, east, north = aoi.bounds
    if not _crs(crs, "aoi.crs").is_geographic:
        if max(abs(west), abs(east)) <= 180 and max(abs(south), abs(north)) <= 90:
            raise AoiError(
                f"coordinates {west:g} to {east:g}, {south:g} to {north:g} look like degrees, "
                f"but {_named(crs)} has metres",
                where=where, allowed="coordinates in the unit of the CRS",
                fix="set aoi.crs to EPSG:4326, or give metres",
            )  # fmt: skip
        return aoi
    if west >= 180 and east <= 360:
        aoi = translate(aoi, -360)
        west, east = west - 360, east - 360
    if south < -90 or north > 90:
        turned = max(abs(west), abs(east)) <= 90 and max(abs(south), abs(north)) <= 180
        raise AoiError(
            f"latitudes {south:g} to {north:g}", where=where,
            allowed="longitude, latitude in degrees (west, south, east, north)",
            fix="exchange longitude and latitude" if turned else "give the CRS of the coordinates "
            "(aoi.crs, or in the file)",
        )  # fmt: skip
    return aoi


def _check_place(degrees: BaseGeometry, aoi: BaseGeometry, crs: str, where: str) -> None:
    """Refuse areas that longitude and latitude cannot describe as one piece.

    Archives are searched, and scenes compared with the area, in longitude and latitude.
    """
    bounds = degrees.bounds
    if not np.isfinite(bounds).all():
        raise AoiError(
            f"the area has no place in longitude and latitude ({_named(crs)})", where=where,
            allowed="an area inside the range of its CRS",
            fix="check aoi.crs, or the CRS of the file",
        )  # fmt: skip
    west, south, east, north = bounds
    if max(-south, north) > 90 - _POLE_DEG or _around_pole(aoi, crs):
        raise AoiError(
            f"the area reaches a pole (latitudes {south:.2f} to {north:.2f})", where=where,
            allowed=f"latitudes up to {90 - _POLE_DEG:g} degrees on either side",
            fix="cut the area before the pole; no archive of optical scenes covers it",
        )  # fmt: skip
    if west < -180 or east > 180 or east - west > 180:
        raise AoiError(
            "the area crosses the 180th meridian (or is wider than half the Earth)", where=where,
            allowed="an area on one side of it",
            fix="make two campaigns, one up to 180 and one from -180 degrees; their grids may "
            "share one grid.crs",
        )  # fmt: skip


def _around_pole(aoi: BaseGeometry, crs: str) -> bool:
    """Whether a projected area has a pole in it, which its outline in degrees cannot tell."""
    if _crs(crs, "aoi.crs").is_geographic:
        return False
    forward = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    back = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    for pole in (90.0, -90.0):
        x, y = forward.transform(0.0, pole)
        # Some projections put a pole at a place that is not its own.
        held = np.isfinite([x, y]).all() and abs(back.transform(x, y)[1] - pole) < _POLE_DEG
        if held and aoi.distance(Point(x, y)) == 0:
            return True
    return False


def _check_target(crs: str) -> None:
    found = _crs(crs, "grid.crs")
    unit = found.axis_info[0].unit_conversion_factor if found.is_projected else 0.0
    if unit != 1.0:
        raise ConfigError(
            f"{_named(crs)} " + ("is not in metres" if found.is_projected else "is in degrees"),
            where="grid.crs", allowed="a projected CRS in metres, or auto",
            fix="set grid.crs to auto, or name a UTM zone or an equal-area CRS",
        )  # fmt: skip


def _crs(text: str, where: str) -> CRS:
    try:
        return CRS.from_user_input(text)
    except CRSError as err:
        raise AoiError(
            f"unknown coordinate system ({err})", where=where, allowed="an EPSG code such as "
            "EPSG:32633",
        ) from err  # fmt: skip


def _named(crs: str) -> str:
    return crs if len(crs) < 40 else CRS.from_user_input(crs).name


def to_crs(geometry: BaseGeometry, src: str, dst: str) -> BaseGeometry:
    """Project a geometry (x, y order); long edges are densified so that they stay true."""
    if src == dst:
        return geometry
    try:
        forward = Transformer.from_crs(src, dst, always_xy=True)
    except ProjError as err:
        raise AoiError(
            f"unknown coordinate system ({err})", where="aoi.crs",
            allowed="an EPSG code such as EPSG:32633",
        ) from err  # fmt: skip
    span = max(geometry.bounds[2] - geometry.bounds[0], geometry.bounds[3] - geometry.bounds[1])
    dense = geometry.segmentize(span / 50) if span > 0 else geometry
    moved: BaseGeometry = transform(dense, forward.transform, interleaved=False)  # type: ignore[arg-type]
    return moved


def _parts(geometry: BaseGeometry) -> list[BaseGeometry]:
    return list(getattr(geometry, "geoms", [geometry]))


@lru_cache(maxsize=8)
def read_aoi(
    file: str | None, bbox: tuple[float, float, float, float] | None, crs: str
) -> tuple[BaseGeometry, str]:
    """AOI geometry and its CRS from a bounding box or a vector file.

    Raises:
        AoiError: Missing file, no CRS, no polygon, an empty or self-crossing polygon.
    """
    if bbox is not None:
        return box(*bbox), crs
    import pyogrio

    where = f"aoi.file {file}"
    fix = "give a polygon file with a coordinate system"
    if not Path(str(file)).exists():
        raise AoiError("there is no such file", where=where, fix=fix)
    try:
        meta, _, wkb, _ = pyogrio.raw.read(str(file), columns=[])
    except pyogrio.errors.DataSourceError as err:
        raise AoiError(f"not a readable vector file ({err})", where=where, fix=fix) from err
    if not meta["crs"]:
        raise AoiError("the file has no coordinate system", where=where, fix=fix)
    shapes = [force_2d(g) for g in from_wkb(wkb) if g is not None and not g.is_empty]
    parts = [p for g in shapes for p in (_parts(g) if "Collection" in g.geom_type else [g])]
    polygons = [g for g in parts if g.geom_type in ("Polygon", "MultiPolygon")]
    if not polygons:
        kinds = sorted({g.geom_type for g in shapes})
        raise AoiError(f"no polygon in it (found {kinds or 'nothing'})", where=where, fix=fix)
    for n, g in enumerate(polygons):
        if not g.is_valid:
            raise AoiError(
                f"polygon {n} is not valid: {explain_validity(g)}",
                where=where,
                allowed="polygons that do not cross themselves",
                fix="repair it, for example with `Fix geometries` in QGIS",
            )
    return make_valid(union_all(polygons)), str(meta["crs"])
