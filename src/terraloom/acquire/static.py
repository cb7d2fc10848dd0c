"""Writing static, self-contained STAC catalogues of raster files.

Simulated regions, sample scenes and imported local files all come out of here, so that the item
search reads them like any other archive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from terraloom.errors import SceneError
from terraloom.io import sha256

__all__ = ["AssetRecord", "ItemRecord", "lonlat_box", "utc", "write_catalogue"]

_EXTENSIONS = [
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
]
_EXTENSION_OF = {
    "eo": "https://stac-extensions.github.io/eo/v2.0.0/schema.json",
    "view": "https://stac-extensions.github.io/view/v1.0.0/schema.json",
    "sar": "https://stac-extensions.github.io/sar/v1.0.0/schema.json",
}


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
        resolution_m: Pixel size, metres; default: the geobox's own, in the unit of its CRS.
        common_name: Common name of the STAC eo extension.
        center_wavelength_um: Centre of the band, micrometres.
    """

    path: Path
    geobox: GeoBox
    dtype: str
    nodata: float
    scale: float
    offset: float
    unit: str
    resolution_m: float | None = None
    common_name: str = ""
    center_wavelength_um: float | None = None


@dataclass(frozen=True)
class ItemRecord:
    """One scene: id, collection, time, assets by band key, further STAC properties."""

    id: str
    collection: str
    when: datetime
    assets: Mapping[str, AssetRecord]
    properties: Mapping[str, Any] = field(default_factory=dict)


def lonlat_box(geobox: GeoBox, inset_m: float = 0.0) -> BaseGeometry:
    """Outline of a geobox in longitude and latitude (EPSG:4326) with points along its edges.

    Raises:
        SceneError: The geobox reaches beyond the domain of its projection.
    """
    b = geobox.boundingbox
    outline = box(b.left + inset_m, b.bottom + inset_m, b.right - inset_m, b.top - inset_m)
    dense = outline.segmentize((b.right - b.left) / 20)
    to_deg = Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True)
    degrees: BaseGeometry = shapely.transform(
        dense, lambda xy: np.column_stack(to_deg.transform(*xy.T))
    )
    if not np.isfinite(shapely.get_coordinates(degrees)).all():
        raise SceneError(
            f"the raster reaches beyond the Earth's edge in {str(geobox.crs)[:60]}",
            where=str(tuple(round(v) for v in b.bbox)),
            fix="cut it to where its projection has longitude and latitude, or correct its CRS",
        )
    return degrees


def _projection(geobox: GeoBox) -> dict[str, Any]:
    crs = str(geobox.crs)
    # A code where there is one; systems without (sinusoidal, local ones) by their text.
    named = {"proj:code": crs} if ":" in crs[:12] else {"proj:code": None, "proj:wkt2": crs}
    return {
        **named,
        "proj:shape": list(geobox.shape),
        "proj:transform": [float(v) for v in geobox.affine[:6]],
    }


def _asset(record: AssetRecord, folder: Path, band: str) -> pystac.Asset:
    resolution = record.resolution_m or float(record.geobox.resolution.x)
    # JSON has no NaN; the raster extension writes it as text.
    nodata = record.nodata if np.isfinite(record.nodata) else "nan"
    spectrum: dict[str, Any] = {}
    if record.common_name:
        spectrum["eo:common_name"] = record.common_name
    if record.center_wavelength_um is not None:
        spectrum["eo:center_wavelength"] = record.center_wavelength_um
    fields = {
        "gsd": resolution,
        "data_type": record.dtype,
        "nodata": nodata,
        "bands": [{"name": band, **spectrum}],
        **_projection(record.geobox),
        "raster:bands": [
            {
                "data_type": record.dtype,
                "nodata": nodata,
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


def _item(record: ItemRecord, root: Path, extra: Mapping[str, Any]) -> pystac.Item:
    first = next(iter(record.assets.values()))
    rounded = set_precision(lonlat_box(first.geobox), 1e-8)  # a millimetre
    properties = {**_projection(first.geobox), **extra, **record.properties}
    prefixes = {k.split(":")[0] for k in record.properties}
    if any(a.common_name or a.center_wavelength_um for a in record.assets.values()):
        prefixes.add("eo")
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
    root: Path,
    items: Sequence[ItemRecord],
    descriptions: Mapping[str, str],
    title: str,
    *,
    catalogue_id: str,
    licence: str,
    licence_file: str | None = None,
    properties: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``catalog.json``, one collection each and all items below ``root``.

    Asset files must stand in ``root/<collection>/<item id>/`` already.

    Args:
        root: Folder of the catalogue.
        items: All items.
        descriptions: Description of each collection; collections without items are left out.
        title: Title of the catalogue.
        catalogue_id: Its id.
        licence: SPDX name of the data's licence, or ``other``.
        licence_file: Markdown file in ``root`` with the terms.
        properties: Properties that all items share.

    Returns:
        Path of ``catalog.json``; all links and asset paths are relative.
    """
    catalogue = pystac.Catalog(id=catalogue_id, title=title, description=title)
    for name, text in descriptions.items():
        mine = [r for r in items if r.collection == name]
        if not mine:
            continue
        built = [_item(r, root, properties or {}) for r in mine]
        bounds = union_all([shape(i.geometry) for i in built if i.geometry]).bounds
        times = [r.when for r in mine]
        extent = pystac.Extent(
            pystac.SpatialExtent([list(bounds)]),
            pystac.TemporalExtent([[min(times), max(times)]]),
        )
        collection = pystac.Collection(
            id=name, description=text, extent=extent, license=licence, title=name
        )
        catalogue.add_child(collection)
        if licence_file is not None:
            link = pystac.Link("license", f"../{licence_file}", media_type="text/markdown")
            collection.add_link(link)
        collection.add_items(built)
    catalogue.normalize_hrefs(str(root))
    catalogue.save(catalog_type=pystac.CatalogType.SELF_CONTAINED)
    return root / "catalog.json"


def utc(year: int, month: int, day: int, hour: int, minute: int) -> datetime:
    """A time in UTC."""
    return datetime(year, month, day, hour, minute, tzinfo=UTC)
