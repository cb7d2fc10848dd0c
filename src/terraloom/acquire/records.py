"""From a STAC item to what Terraloom records of it: time, place, sun, radiometry, files.

Items differ by age and provider: ``proj:epsg`` or ``proj:code``, raster extension or none, STAC 1.0
``raster:bands`` or 1.1 ``bands``, ``s2:`` or ``sentinel:`` properties. This is the only module that
knows.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

from pystac.utils import str_to_datetime
from shapely import make_valid
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry

from terraloom.acquire.catalogue import safe_href, safe_id
from terraloom.acquire.sources import BandTable, SourceTable
from terraloom.acquire.sun import sun_position
from terraloom.errors import SceneError

__all__ = ["item_baseline", "item_footprint", "item_record", "item_time", "s2_offset"]

#: Reflectance added to the stored value from processing baseline 04.00 on.
S2_OFFSET = -0.1
S2_OFFSET_BASELINE = (4, 0)
#: First day of baseline 04.00, for items that do not tell their baseline.
S2_OFFSET_SINCE = datetime(2022, 1, 25, tzinfo=UTC)

_BASELINE_KEYS = ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version")
_PRODUCT_KEYS = ("s2:product_uri", "sentinel:product_id", "s2:granule_id", "s2:datatake_id")
_APPLIED_KEYS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")


def item_time(item: dict[str, Any]) -> datetime:
    """Acquisition time, UTC; the start of the range where an item has a range.

    Raises:
        SceneError: The item has no readable time.
    """
    properties = item.get("properties", {})
    text = properties.get("datetime") or properties.get("start_datetime")
    try:
        return str_to_datetime(str(text)).astimezone(UTC)
    except (ValueError, OverflowError) as err:
        raise SceneError(f"the time {text!r} is not readable", where=f"item {item['id']}") from err


def item_baseline(item: dict[str, Any]) -> tuple[int, int] | None:
    """Sentinel-2 processing baseline (4, 0) from properties or product names, or None."""
    properties = item.get("properties", {})
    for key in _BASELINE_KEYS:
        match = re.fullmatch(r"0?(\d{1,2})\.(\d{2})", str(properties.get(key, "")))
        if match:
            return int(match[1]), int(match[2])
    for text in [*(str(properties.get(k, "")) for k in _PRODUCT_KEYS), item["id"]]:
        match = re.search(r"_N(\d{2})\.?(\d{2})(?:_|\.|$)", text)
        if match:
            return int(match[1]), int(match[2])
    return None


def s2_offset(item: dict[str, Any], declared: float | None) -> tuple[float, str]:
    """Offset of Sentinel-2 reflectance, and the rule that gave it.

    Order: a flag that the offset was taken off the pixels already (Earth Search keeps -0.1 in
    raster:bands of such items, see Element84/earth-search issue 66); the offset the item declares;
    the processing baseline; the date. Flags are known to be wrong now and then, which is why the
    pixels are checked as well, after reading.

    Args:
        item: STAC item.
        declared: Offset of the asset's raster metadata, or None.
    """
    properties = item.get("properties", {})
    for key in _APPLIED_KEYS:
        if properties.get(key) is True:
            return 0.0, f"0: {key}"
    if declared is not None:
        return declared, f"{declared:g}: declared by the item"
    baseline = item_baseline(item)
    if baseline is not None:
        offset = S2_OFFSET if baseline >= S2_OFFSET_BASELINE else 0.0
        return offset, f"{offset:g}: processing baseline {baseline[0]:02d}.{baseline[1]:02d}"
    offset = S2_OFFSET if item_time(item) >= S2_OFFSET_SINCE else 0.0
    return offset, f"{offset:g}: no baseline given, by date"


def item_footprint(item: dict[str, Any]) -> BaseGeometry:
    """Outline of an item in longitude and latitude, degrees.

    Raises:
        SceneError: Neither a geometry nor a bounding box.
    """
    try:
        if item.get("geometry"):
            return make_valid(shape(item["geometry"]))
        b = item["bbox"]
        return box(b[0], b[1], b[len(b) // 2], b[len(b) // 2 + 1])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as err:
        raise SceneError("the item has no usable outline", where=f"item {item['id']}") from err


def item_record(
    item: dict[str, Any], source: SourceTable, bands: list[str], catalogue: str
) -> dict[str, Any]:
    """Record of an item for the lock; ``decision`` is ``use`` and ``why`` names absent bands.

    Args:
        item: STAC item with absolute asset addresses.
        source: Its source table.
        bands: Band keys asked for.
        catalogue: Address of its catalogue; bounds what its assets may name.

    Raises:
        SceneError: An id or address that is refused, or none of the bands.
    """
    where = f"item {item['id']}"
    when = item_time(item)
    wanted = {b: source.band(b) for b in bands} | ({"SCL": source.scl} if source.scl else {})
    assets: dict[str, Any] = {}
    rules: list[str] = []
    crs: str | None = None
    for band, table in wanted.items():
        key = next((a for a in table.assets if a in item.get("assets", {})), None)
        if key is None:
            continue
        try:
            record, asset_crs, rule = _asset(item, key, band, table, source, catalogue)
        except SceneError as err:
            raise SceneError(
                err.found, where=f"{where}, asset {key}", allowed=err.allowed, fix=err.fix
            ) from err
        assets[band] = record
        crs = crs or asset_crs
        if band != "SCL":
            rules.append(rule)
    absent = [b for b in bands if b not in assets]
    if len(absent) == len(bands):
        raise SceneError(
            f"none of the bands {', '.join(bands)} among its assets",
            where=where,
            allowed=f"assets here: {', '.join(sorted(item.get('assets', {}))) or 'none'}",
            fix="correct sources[].bands or sources[].collection",
        )
    azimuth, elevation = _sun(item, source, when)
    cloud = _number(item["properties"].get("eo:cloud_cover"))
    return {
        "id": safe_id(item["id"]),
        "source": source.key,
        "collection": str(item.get("collection") or source.collection),
        "datetime": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cloud_pct": cloud,
        "sun_azimuth_deg": azimuth,
        "sun_elevation_deg": elevation,
        "crs": crs,
        "offset_rule": "; ".join(sorted(set(rules))),
        "assets": assets,
        "decision": "use",
        "why": f"without {', '.join(absent)}" if absent else "",
    }


def _asset(
    item: dict[str, Any],
    key: str,
    band: str,
    table: BandTable,
    source: SourceTable,
    catalogue: str,
) -> tuple[dict[str, Any], str | None, str]:
    asset, properties = item["assets"][key], item.get("properties", {})
    href = str(asset["href"])
    for old, new in source.href_rewrite.items():
        if href.startswith(old):
            href = new + href.removeprefix(old)
    raster = _raster(asset)
    scale, offset, unit, rule = source.scale, source.offset, str(source.unit), ""
    if band == "SCL":
        scale, offset, unit = 1.0, 0.0, "class"
    else:
        scale = _first(_number(raster.get("scale")), scale)
        declared = _number(raster.get("offset"))
        if source.offset_rule == "sentinel-2":
            offset, rule = s2_offset(item, declared)
        else:
            offset = _first(declared, offset)
        if str(raster.get("unit", "")).lower() == "db":
            unit = "dB"
    nodata = raster.get("nodata", asset.get("nodata", 0 if band == "SCL" else source.nodata))
    size = asset.get("file:size")
    checksum = str(asset.get("file:checksum") or "")
    crs = _crs(asset) or _crs(properties)
    shape_px = asset.get("proj:shape")
    record = {
        "href": safe_href(href, catalogue),
        "size": int(size) if size is not None else None,
        # Multihash 0x12 0x20 is SHA-256; other kinds are not checked.
        "checksum": checksum[4:] if re.fullmatch(r"1220[0-9a-f]{64}", checksum) else None,
        "scale": scale,
        "offset": offset,
        "unit": unit,
        "nodata": _number(nodata),
        "resolution_m": _resolution_m(asset, raster, properties, crs, table.resolution_m),
        # Only an asset's own shape is trusted: bands of one item differ in resolution.
        "shape": list(shape_px) if shape_px else None,
    }
    return record, crs, rule


def _raster(asset: dict[str, Any]) -> dict[str, Any]:
    """Raster metadata of the first band: STAC 1.1 fields, over those of 1.0."""
    merged: dict[str, Any] = {}
    for bands in (asset.get("raster:bands"), asset.get("bands")):
        if isinstance(bands, list) and bands and isinstance(bands[0], dict):
            merged |= bands[0]
    merged |= {k: v for k, v in asset.items() if k in ("nodata", "unit") or k[:7] == "raster:"}
    names = ("scale", "offset", "spatial_resolution")
    merged |= {n: merged[f"raster:{n}"] for n in names if f"raster:{n}" in merged}
    return merged


def _crs(fields: dict[str, Any]) -> str | None:
    if fields.get("proj:code"):
        return str(fields["proj:code"])
    if fields.get("proj:epsg"):
        return f"EPSG:{fields['proj:epsg']}"
    return str(fields["proj:wkt2"]) if fields.get("proj:wkt2") else None


def _resolution_m(
    asset: dict[str, Any],
    raster: dict[str, Any],
    properties: dict[str, Any],
    crs: str | None,
    default: float,
) -> float:
    """Native pixel size, metres; the table's where the item's is in degrees or not given."""
    transform = asset.get("proj:transform")
    projected = crs is not None and crs not in ("EPSG:4326", "EPSG:4979") and "GEOG" not in crs[:7]
    if transform and projected:
        return float(abs(transform[0]))
    return float(_first(_number(raster.get("spatial_resolution")), default))


def _sun(
    item: dict[str, Any], source: SourceTable, when: datetime
) -> tuple[float | None, float | None]:
    if source.kind != "optical":
        return None, None
    p = item["properties"]
    azimuth = _number(p.get("view:sun_azimuth", p.get("s2:mean_solar_azimuth")))
    elevation = _number(p.get("view:sun_elevation"))
    zenith = _number(p.get("s2:mean_solar_zenith"))
    if elevation is None and zenith is not None:
        elevation = 90 - zenith
    if azimuth is None or elevation is None:
        centre = item_footprint(item).centroid
        azimuth, elevation = (round(v, 3) for v in sun_position(when, centre.x, centre.y))
    return azimuth, elevation


def _number(value: Any) -> float | None:
    """Finite number, or None (absent, text such as "nan", infinite)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
