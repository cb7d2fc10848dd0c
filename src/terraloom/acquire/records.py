"""From a STAC item to what Terraloom records of it: time, place, sun, radiometry, files.

Items differ by age and provider: ``proj:epsg`` or ``proj:code``, raster extension or none, STAC 1.0
``raster:bands`` or 1.1 ``bands``, ``s2:``, ``sentinel:`` or ``eo:`` properties, one time or a
range. This is the only module that knows.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pyproj import CRS
from pyproj.exceptions import CRSError
from pystac.utils import str_to_datetime
from shapely import to_wkt
from shapely.geometry.base import BaseGeometry

from terraloom.acquire.catalogue import UNREADABLE
from terraloom.acquire.hrefs import safe_href, safe_id
from terraloom.acquire.outlines import outline
from terraloom.acquire.sources import BandTable, LayerTable, SourceTable
from terraloom.acquire.sun import sun_position
from terraloom.errors import SceneError

__all__ = ["item_baseline", "item_footprint", "item_record", "item_time", "s2_offset"]

#: Reflectance added to the stored value from processing baseline 04.00 on.
S2_OFFSET = -0.1
S2_OFFSET_BASELINE = (4, 0)
#: First day of baseline 04.00, for items that do not tell their baseline.
S2_OFFSET_SINCE = datetime(2022, 1, 25, tzinfo=UTC)

#: Multihash codes of checksums that are checked (multiformats table), as their hexadecimal
#: beginning: md5, sha1, sha2-256, sha2-512, each followed by the length of the digest.
_MULTIHASH = {"d50110": 32, "1114": 40, "1220": 64, "1340": 128}

#: Radius of the Earth and usual height of optical satellites, kilometres; enough to turn an angle
#: at the satellite into one on the ground within .2 degrees.
_EARTH_KM, _ORBIT_KM = 6371.0, 740.0

_BASELINE_KEYS = ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version")
_PRODUCT_KEYS = ("s2:product_uri", "sentinel:product_id", "s2:granule_id", "s2:datatake_id")
_APPLIED_KEYS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")


def item_time(item: dict[str, Any]) -> datetime:
    """Acquisition time, UTC; the start of the range where an item has a range.

    A time without zone is UTC, as STAC prescribes.

    Raises:
        SceneError: The item could not be read, or has no readable time.
    """
    where = _name(item)
    if UNREADABLE in item:
        raise SceneError(str(item[UNREADABLE]), where=where)
    properties = _properties(item)
    when = _time(properties, "datetime", where)
    if when is not None:
        return when
    start = _time(properties, "start_datetime", where)
    end = _time(properties, "end_datetime", where)
    if start is None:
        raise SceneError("the item has no time", where=where, allowed="datetime, start_datetime")
    if end is not None and end < start:
        raise SceneError(f"its time ends ({end}) before it starts ({start})", where=where)
    return start


def _time(properties: dict[str, Any], key: str, where: str) -> datetime | None:
    text = properties.get(key)
    if text is None:
        return None
    try:
        when = str_to_datetime(str(text))
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as err:
        raise SceneError(
            f"the time {text!r} is not readable", where=where, allowed="RFC 3339"
        ) from err


def _name(item: dict[str, Any]) -> str:
    return f"item {item.get('id')}"


def _properties(item: dict[str, Any]) -> dict[str, Any]:
    properties = item.get("properties")
    if not isinstance(properties, dict) or not isinstance(item.get("id"), str):
        raise SceneError("the record is not a STAC item", where=_name(item))
    return properties


def item_baseline(item: dict[str, Any]) -> tuple[int, int] | None:
    """Sentinel-2 processing baseline (4, 0) from properties or product names, or None."""
    properties = item.get("properties", {})
    for key in _BASELINE_KEYS:
        match = re.fullmatch(r"0?(\d{1,2})\.(\d{2})", str(properties.get(key, "")))
        if match:
            return int(match[1]), int(match[2])
    for text in [*(str(properties.get(k, "")) for k in _PRODUCT_KEYS), str(item["id"])]:
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
    """Outline of an item in longitude and latitude, degrees, cut at the 180th meridian.

    Raises:
        SceneError: No usable geometry or bounding box, or one that runs around a pole.
    """
    try:
        return outline(item.get("geometry"), item.get("bbox"))
    except ValueError as err:
        raise SceneError(f"the item has no usable outline: {err}", where=_name(item)) from err


def item_record(
    item: dict[str, Any],
    source: SourceTable,
    bands: list[str],
    catalogue: str,
    *,
    sign: str | None = None,
    allow_local: bool = False,
) -> dict[str, Any]:
    """Record of an item for the lock; ``decision`` is ``use`` and ``why`` names absent bands.

    Args:
        item: STAC item with absolute asset addresses.
        source: Its source table.
        bands: Band keys asked for.
        catalogue: Address of its catalogue; bounds what its assets may name.
        sign: Hook that signs its addresses when they are read.
        allow_local: Its assets may name any file of this machine.

    Raises:
        SceneError: An id, address, time, outline or scale that is refused, or none of the bands.
    """
    where, when = _name(item), item_time(item)
    footprint = item_footprint(item)
    given = item.get("assets")
    given = given if isinstance(given, dict) else {}
    assets: dict[str, Any] = {}
    rules: list[str] = []
    crs: str | None = None
    for band in [*bands, *source.layers]:
        table = source.band(band)
        key = next((a for a in table.assets if a in given), None)
        if key is None:
            continue
        try:
            record, asset_crs, rule = _asset(item, key, table, source)
            record["href"] = safe_href(record["href"], catalogue, allow_local=allow_local)
            record["sign"] = sign
        except SceneError as err:
            raise SceneError(
                err.found, where=f"{where}, asset {key}", allowed=err.allowed, fix=err.fix
            ) from err
        assets[band] = record
        crs = crs or asset_crs
        if band not in source.layers:
            rules.append(rule)
    absent = [b for b in bands if b not in assets]
    if len(absent) == len(bands):
        raise SceneError(
            f"none of the bands {', '.join(bands)} among its assets",
            where=where,
            allowed=f"assets here: {', '.join(sorted(given)) or 'none'}",
            fix="correct sources[].bands or sources[].collection",
        )
    azimuth, elevation = _sun(item, source, when, footprint)
    view_azimuth, view_zenith = _view(item, source)
    cloud = _number(_properties(item).get("eo:cloud_cover"))
    return {
        "id": safe_id(item["id"]),
        "source": source.key,
        "collection": str(item.get("collection") or source.collection),
        "datetime": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cloud_pct": cloud if cloud is None or 0 <= cloud <= 100 else None,
        "sun_azimuth_deg": azimuth,
        "sun_elevation_deg": elevation,
        "view_azimuth_deg": view_azimuth,
        "view_zenith_deg": view_zenith,
        "platform": _platform(item),
        "crs": crs,
        "offset_rule": "; ".join(sorted(set(rules))),
        "footprint": to_wkt(footprint, rounding_precision=5),
        "assets": assets,
        "decision": "use",
        "why": f"without {', '.join(absent)}" if absent else "",
    }


def _asset(
    item: dict[str, Any], key: str, table: BandTable | LayerTable, source: SourceTable
) -> tuple[dict[str, Any], str | None, str]:
    """Record of an asset, its CRS, and the rule that gave its offset."""
    asset, properties = item["assets"][key], item["properties"]
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        raise SceneError("the asset has no address")
    href = asset["href"]
    for old, new in source.href_rewrite.items():
        if href.startswith(old):
            href = new + href.removeprefix(old)
    raster = _raster(asset, table.band)
    scale, offset, unit, rule = source.scale, source.offset, str(source.unit), ""
    nodata = _number(raster.get("nodata"))
    if isinstance(table, LayerTable):
        scale, offset, unit = 1.0, 0.0, "class"
        # A code below zero is left to the file: bytes without sign hold it as another number.
        missing = table.nodata if table.nodata >= 0 else None
    else:
        missing = source.nodata
        scale = _first(_number(raster.get("scale")), scale)
        if not scale > 0:
            raise SceneError(f"its scale is {scale:g}", allowed="above 0")
        declared = _number(raster.get("offset"))
        if source.offset_rule == "sentinel-2":
            offset, rule = s2_offset(item, declared)
        else:
            offset = _first(declared, offset)
        if str(raster.get("unit", "")).lower() == "db":
            unit = "dB"
    crs = _crs(asset) or _crs(properties)
    record = {
        "href": href,
        "band": table.band,
        "size": _size(asset),
        "checksum": _checksum(asset),
        "etag": str(asset["etag"]) if asset.get("etag") else None,
        "scale": scale,
        "offset": offset,
        "unit": unit,
        "nodata": missing if nodata is None else nodata,
        "resolution_m": _resolution_m(asset, raster, properties, crs, table.resolution_m),
        # Only an asset's own shape is trusted: bands of one item differ in resolution.
        "shape": _shape(asset),
    }
    return record, crs, rule


def _size(asset: dict[str, Any]) -> int | None:
    size = asset.get("file:size", asset.get("size"))
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise SceneError(f"its size is {size!r}", allowed="a whole number of bytes above 0")
    return size


def _checksum(asset: dict[str, Any]) -> str | None:
    """Digest of the file, hexadecimal: md5, sha1, sha256 or sha512, told apart by their length.

    Other kinds, and texts that are no multihash, are not checked.
    """
    text = str(asset.get("file:checksum") or asset.get("checksum:multihash") or "").lower()
    for prefix, length in _MULTIHASH.items():
        if re.fullmatch(f"{prefix}[0-9a-f]{{{length}}}", text):
            return text.removeprefix(prefix)
    return None


def _shape(asset: dict[str, Any]) -> list[int] | None:
    shape = asset.get("proj:shape")
    if not shape:
        return None
    if not isinstance(shape, list) or len(shape) != 2 or not all(_number(v) for v in shape):
        raise SceneError(f"its shape is {shape!r}", allowed="rows and columns")
    return [int(v) for v in shape]


def _raster(asset: dict[str, Any], band: int) -> dict[str, Any]:
    """Raster metadata of one band: STAC 1.1 fields, over those of 1.0."""
    merged: dict[str, Any] = {}
    for bands in (asset.get("raster:bands"), asset.get("bands")):
        if isinstance(bands, list) and len(bands) >= band and isinstance(bands[band - 1], dict):
            merged |= bands[band - 1]
    own = {k: v for k, v in asset.items() if k in ("nodata", "unit") or k[:7] == "raster:"}
    merged = own | merged  # what a band says of itself goes before what its file says
    names = ("scale", "offset", "spatial_resolution")
    return merged | {n: merged[f"raster:{n}"] for n in names if f"raster:{n}" in merged}


def _crs(fields: dict[str, Any]) -> str | None:
    if fields.get("proj:code"):
        return str(fields["proj:code"])
    if fields.get("proj:epsg"):
        return f"EPSG:{fields['proj:epsg']}"
    if fields.get("proj:wkt2"):
        return str(fields["proj:wkt2"])
    return json.dumps(fields["proj:projjson"]) if fields.get("proj:projjson") else None


def _resolution_m(
    asset: dict[str, Any],
    raster: dict[str, Any],
    properties: dict[str, Any],
    crs: str | None,
    default: float,
) -> float:
    """Native pixel size, metres; the table's where the item's is in degrees or not given.

    The transform of the asset is exact. ``spatial_resolution`` may be nominal (MODIS says 250 and
    has 231.656), and a transform of the whole item may be that of another band: they are taken
    where the more exact one agrees within a tenth.
    """
    own = _pixel(asset, crs)
    if own is not None:
        return own
    nominal = _first(_number(raster.get("spatial_resolution")), default)
    for exact in (_pixel(properties, crs), default):
        if exact is not None and abs(exact - nominal) <= 0.1 * nominal:
            return exact
    return nominal


def _pixel(fields: dict[str, Any], crs: str | None) -> float | None:
    transform = fields.get("proj:transform")
    size = _number(transform[0]) if isinstance(transform, list) and transform else None
    return abs(size) if size and _metric(crs) else None


@lru_cache(maxsize=256)
def _metric(crs: str | None) -> bool:
    """Whether coordinates are metres; a CRS that cannot be read is no reason to trust them."""
    if crs is None:
        return False
    try:
        found = CRS.from_user_input(crs)
    except CRSError:
        return False
    return found.is_projected and all(a.unit_conversion_factor == 1 for a in found.axis_info[:2])


def _sun(
    item: dict[str, Any], source: SourceTable, when: datetime, footprint: BaseGeometry
) -> tuple[float | None, float | None]:
    """Azimuth and elevation of the sun, degrees: the item's, else computed for its centre."""
    if source.kind != "optical":
        return None, None
    p = item["properties"]
    azimuth = _number(
        p.get("view:sun_azimuth", p.get("s2:mean_solar_azimuth", p.get("eo:sun_azimuth")))
    )
    elevation = _number(p.get("view:sun_elevation", p.get("eo:sun_elevation")))
    zenith = _number(p.get("s2:mean_solar_zenith"))
    if elevation is None and zenith is not None:
        elevation = 90 - zenith
    if azimuth is None or elevation is None or not -90 <= elevation <= 90:
        centre = footprint.centroid
        azimuth, elevation = (round(v, 3) for v in sun_position(when, centre.x, centre.y))
    return azimuth % 360, elevation


def _view(item: dict[str, Any], source: SourceTable) -> tuple[float | None, float | None]:
    """Azimuth and zenith of the satellite seen from the ground, degrees; None where unknown.

    ``view:incidence_angle`` is that zenith; ``view:off_nadir`` is the angle at the satellite, which
    the curved ground makes larger: sin(zenith) = (R + h) / R sin(off nadir). Of Sentinel-2 the
    catalogues say 0 for every tile, though they reach 10 degrees; that is taken as unknown.
    """
    p = item["properties"]
    azimuth = _number(p.get("view:azimuth"))
    zenith = _number(p.get("view:incidence_angle"))
    off_nadir = _number(p.get("view:off_nadir"))
    if zenith is None and off_nadir is not None:
        sine = (_EARTH_KM + _ORBIT_KM) / _EARTH_KM * math.sin(math.radians(off_nadir))
        zenith = round(math.degrees(math.asin(sine)), 3) if 0 <= sine <= 1 else None
        if source.offset_rule == "sentinel-2" and off_nadir == 0:
            zenith = None
    if zenith is None or not 0 <= zenith < 90:
        return None, None
    return None if azimuth is None else azimuth % 360, zenith


def _platform(item: dict[str, Any]) -> str:
    """Satellite, as ``landsat-8`` or ``sentinel-2a``; empty where unknown."""
    p = item["properties"]
    text = str(p.get("platform") or p.get("eo:platform") or "").strip().lower()
    text = re.sub(r"[\s_]+", "-", text)
    if not text:
        match = re.match(r"(?:HLS\.)?(S[12][A-D]|L[COTEM]0[4-9])(?=[_.])", str(item["id"]))
        if match and match[1][0] == "L":
            text = f"landsat-{match[1][3]}"
        elif match:
            text = f"sentinel-{match[1][1:].lower()}"
    return text


def _number(value: Any) -> float | None:
    """Finite number, or None (absent, text such as "nan", infinite)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
