"""From a campaign's area of interest to its pixel grid."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pyproj import Transformer
from pyproj.exceptions import CRSError
from shapely import from_wkb, make_valid, transform, union_all
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry
from shapely.validation import explain_validity

from terraloom.config.campaign import Campaign
from terraloom.errors import AoiError
from terraloom.grid import CampaignGrid, pick_crs

__all__ = ["campaign_grid", "read_aoi", "to_crs"]

#: Campaign resolution, metres: the finest native pixel of the sources at hand.
RESOLUTION_M = 10.0


def campaign_grid(campaign: Campaign) -> CampaignGrid:
    """Grid of a campaign.

    Raises:
        AoiError: The area is empty, crosses itself, or its file cannot be used.
    """
    aoi, crs = read_aoi(campaign.aoi.file, campaign.aoi.bbox, campaign.aoi.crs)
    target = campaign.grid.crs
    if target == "auto":
        target = pick_crs(to_crs(aoi, crs, "EPSG:4326"))
    return CampaignGrid.from_aoi(
        to_crs(aoi, crs, target),
        target,
        resolution_m=RESOLUTION_M,
        tile_px=campaign.grid.tile_px,
    )


def to_crs(geometry: BaseGeometry, src: str, dst: str) -> BaseGeometry:
    """Project a geometry (x, y order); long edges are densified so that they stay true."""
    if src == dst:
        return geometry
    try:
        forward = Transformer.from_crs(src, dst, always_xy=True)
    except CRSError as err:
        raise AoiError(f"unknown coordinate system ({err})", where="aoi.crs") from err
    span = max(geometry.bounds[2] - geometry.bounds[0], geometry.bounds[3] - geometry.bounds[1])
    dense = geometry.segmentize(span / 50) if span > 0 else geometry
    moved: BaseGeometry = transform(dense, forward.transform, interleaved=False)  # type: ignore[arg-type]
    return moved


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
    shapes = [g for g in from_wkb(wkb) if g is not None and not g.is_empty]
    polygons = [g for g in shapes if g.geom_type in ("Polygon", "MultiPolygon")]
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
