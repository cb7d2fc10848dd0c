"""STAC records of the simulated scenes: a static, self-contained catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely import set_precision, union_all
from shapely.geometry import box, mapping, shape
from shapely.geometry.base import BaseGeometry

from terraloom.io import sha256

__all__ = ["AssetRecord", "ItemRecord", "lonlat_box", "utc", "write_catalogue"]

_EXTENSIONS = [
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
]
_EXTENSION_OF = {
    "eo": "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
    "view": "https://stac-extensions.github.io/view/v1.0.0/schema.json",
    "sar": "https://stac-extensions.github.io/sar/v1.0.0/schema.json",
}
_LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class AssetRecord:
    """One raster file of an item.

    Attributes:
        path: The finished file.
        geobox: Its pixels.
        dtype: Data type by raster extension name.
        nodata: Value that means missing.
        scale: Value = stored * scale + offset.
        offset: See ``scale``.
        unit: Unit of the value.
    """

    path: Path
    geobox: GeoBox
    dtype: str
    nodata: float
    scale: float
    offset: float
    unit: str


@dataclass(frozen=True)
class ItemRecord:
    """One scene: id, collection, time, assets by band key, further STAC properties."""

    id: str
    collection: str
    when: datetime
    assets: Mapping[str, AssetRecord]
    properties: Mapping[str, Any] = field(default_factory=dict)


def lonlat_box(geobox: GeoBox, inset_m: float = 0.0) -> BaseGeometry:
    """Outline of a geobox in longitude and latitude (EPSG:4326) with points along its edges."""
    b = geobox.boundingbox
    outline = box(b.left + inset_m, b.bottom + inset_m, b.right - inset_m, b.top - inset_m)
    dense = outline.segmentize((b.right - b.left) / 20)
    to_deg = Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True)
    degrees: BaseGeometry = shapely.transform(
        dense, lambda xy: np.column_stack(to_deg.transform(*xy.T))
    )
    return degrees


def _asset(record: AssetRecord, folder: Path, band: str) -> pystac.Asset:
    resolution = float(record.geobox.resolution.x)
    fields = {
        "gsd": resolution,
        "data_type": record.dtype,
        "nodata": record.nodata,
        "bands": [{"name": band}],
        "proj:code": str(record.geobox.crs),
        "proj:shape": list(record.geobox.shape),
        "proj:transform": [float(v) for v in record.geobox.affine[:6]],
        "raster:bands": [
            {
                "data_type": record.dtype,
                "nodata": record.nodata,
                "scale": record.scale,
                "offset": record.offset,
                "spatial_resolution": resolution,
                "unit": record.unit,
            }
        ],
        "file:size": record.path.stat().st_size,
        # Multihash: 0x12 = SHA-256, 0x20 = 32 bytes.
        "file:checksum": "1220" + sha256(record.path),
    }
    return pystac.Asset(
        href=f"./{record.path.relative_to(folder).as_posix()}",
        title=band,
        media_type=pystac.MediaType.COG,
        roles=["data"],
        extra_fields=fields,
    )


def _item(record: ItemRecord, root: Path) -> pystac.Item:
    outline = lonlat_box(next(iter(record.assets.values())).geobox)
    rounded = set_precision(outline, 1e-8)  # a millimetre: more digits say nothing
    first = next(iter(record.assets.values()))
    properties = {
        "proj:code": str(first.geobox.crs),
        "proj:shape": list(first.geobox.shape),
        "proj:transform": [float(v) for v in first.geobox.affine[:6]],
        "terraloom:simulated": True,
        **record.properties,
    }
    prefixes = {k.split(":")[0] for k in record.properties}
    item = pystac.Item(
        id=record.id,
        geometry=mapping(rounded),
        bbox=list(rounded.bounds),
        datetime=record.when,
        properties=properties,
        stac_extensions=[*_EXTENSIONS, *(v for k, v in _EXTENSION_OF.items() if k in prefixes)],
    )
    folder = root / record.collection / record.id
    for band, asset in record.assets.items():
        item.add_asset(band, _asset(asset, folder, band))
    return item


def write_catalogue(
    root: Path, items: list[ItemRecord], descriptions: Mapping[str, str], title: str
) -> Path:
    """Write ``catalog.json``, one collection each and all items below ``root``.

    Asset files must stand in ``root/<collection>/<item id>/`` already.

    Returns:
        Path of ``catalog.json``; all links and asset paths are relative.
    """
    catalogue = pystac.Catalog(id="terraloom-simulated", title=title, description=title)
    for name, text in descriptions.items():
        mine = [r for r in items if r.collection == name]
        if not mine:
            continue
        built = [_item(r, root) for r in mine]
        bounds = union_all([shape(i.geometry) for i in built if i.geometry]).bounds
        times = [r.when for r in mine]
        extent = pystac.Extent(
            pystac.SpatialExtent([list(bounds)]),
            pystac.TemporalExtent([[min(times), max(times)]]),
        )
        collection = pystac.Collection(
            id=name, description=text, extent=extent, license=_LICENCE, title=name
        )
        catalogue.add_child(collection)
        collection.add_items(built)
    catalogue.normalize_hrefs(str(root))
    catalogue.save(catalog_type=pystac.CatalogType.SELF_CONTAINED)
    return root / "catalog.json"


def utc(year: int, month: int, day: int, hour: int, minute: int) -> datetime:
    """A time in UTC."""
    return datetime(year, month, day, hour, minute, tzinfo=UTC)
