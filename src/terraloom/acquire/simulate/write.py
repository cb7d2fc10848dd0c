"""Writing a simulated region: scenes with their STAC catalogue, labels, truth."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyogrio
from odc.geo.geobox import GeoBox
from shapely import set_precision
from shapely.affinity import affine_transform
from shapely.geometry import Polygon, box, mapping

from terraloom.acquire.simulate.districts import make_districts
from terraloom.acquire.simulate.labels import LabelSet, make_labels
from terraloom.acquire.simulate.landscape import (
    LEGEND,
    NEVER,
    SCENE_MARGIN_PX,
    WORK_MARGIN_PX,
    Landscape,
    aoi_geobox,
    build_landscape,
    class_map,
    edge_mask,
    height_map,
    period,
)
from terraloom.acquire.simulate.optical import (
    NODATA_DN,
    SCALE,
    Scene,
    encode_dn,
    make_sky,
    optical_scenes,
    render,
    sky_codes,
)
from terraloom.acquire.simulate.sar import SarScene, render_sar, sar_scenes
from terraloom.acquire.static import AssetRecord, ItemRecord, lonlat_box, utc, write_catalogue
from terraloom.config.simulation import Simulation
from terraloom.grid import coarsen, pad
from terraloom.io import replace_folder, write_json, write_raster, write_text
from terraloom.log import get_logger, progress
from terraloom.scratch import prefix
from terraloom.tables import csv_text

__all__ = ["COLLECTIONS", "build_region"]

COLLECTIONS = {
    "sim-s2-l2a": "SIMULATED optical surface reflectance in the manner of Sentinel-2 L2A.",
    "sim-s1-rtc": "SIMULATED radar backscatter (gamma nought, linear power) in the manner of "
    "Sentinel-1 RTC.",
    "sim-dem": "SIMULATED elevation.",
}
_README = """SIMULATED DATA - NOT OBSERVATIONS

Everything in this folder was made by `terraloom simulate` from random numbers (seed {seed}).
No satellite saw it, no place on Earth looks like it. It exists to rehearse a campaign where the
truth is known. Never publish a map of it as if it were real.

catalog.json      static STAC catalogue of the scenes: {collections}
aoi.gpkg          area of interest (EPSG:32633, on the 60 m lattice); aoi.geojson: the same in
                  longitude and latitude
classes.csv       legend: code,name,color
labels.gpkg       layers landcover, height, boundary: what a campaign may use
regions.gpkg      districts that cover the area, to compute totals of
truth/            what is really there: what a campaign must never read, except to be marked
"""
_DEM_NODATA = -9999.0

log = get_logger(__name__)


@dataclass
class _Region:
    """What the parts of the writer share."""

    sim: Simulation
    land: Landscape
    root: Path
    items: list[ItemRecord] = field(default_factory=list)
    truth: dict[str, Any] = field(default_factory=dict)

    @property
    def aoi(self) -> GeoBox:
        return aoi_geobox(self.sim)

    @property
    def scene(self) -> GeoBox:
        return pad(self.aoi, SCENE_MARGIN_PX)


def build_region(sim: Simulation, out_dir: Path) -> Path:
    """Build a region in a folder beside ``out_dir`` and rename it when complete.

    Returns:
        Path of the STAC ``catalog.json`` inside ``out_dir``.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=prefix("simulate")))
    try:
        region = _Region(sim, build_landscape(sim), tmp)
        _write_dem(region)
        for scene in progress(optical_scenes(sim, region.land), what="optical scenes"):
            _write_optical(region, scene)
        for sar in progress(sar_scenes(sim), what="radar scenes"):
            _write_sar(region, sar)
        write_catalogue(
            tmp, region.items, COLLECTIONS, "SIMULATED region, not observations",
            catalogue_id="terraloom-simulated", licence="CC0-1.0",
            properties={"terraloom:simulated": True},
        )  # fmt: skip
        _write_frame(region)
        _write_truth(region, _write_labels(region))
        tmp.chmod(0o755)
        replace_folder(tmp, out_dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return out_dir / "catalog.json"


def _inner(array: npt.NDArray[Any], margin_px: int) -> npt.NDArray[Any]:
    cut = WORK_MARGIN_PX - margin_px
    return np.ascontiguousarray(array[cut:-cut, cut:-cut])


def _write_dem(region: _Region) -> None:
    path = region.root / "sim-dem" / "SIM_DEM" / "elevation.tif"
    data = _inner(region.land.elevation, SCENE_MARGIN_PX)
    write_raster(path, data, region.scene, nodata=_DEM_NODATA, overviews="average")
    asset = AssetRecord(path, region.scene, "float32", _DEM_NODATA, 1.0, 0.0, "m")
    when = utc(region.sim.year - 1, 1, 1, 0, 0)
    region.items.append(ItemRecord("SIM_DEM", "sim-dem", when, {"elevation": asset}))


def _write_optical(region: _Region, scene: Scene) -> None:
    sim, land = region.sim, region.land
    sky = make_sky(sim, land, scene)
    codes = sky_codes(scene, sky)
    write_raster(region.root / "truth" / "cloud" / f"{scene.id}.tif", codes, region.scene)
    assets: dict[str, AssetRecord] = {}
    folder = region.root / "sim-s2-l2a" / scene.id
    for band, field_ in render(sim, land, scene, sky):
        fine = field_.shape == region.scene.shape
        geobox = region.scene if fine else coarsen(region.scene, 2)
        path = folder / f"{band}.tif"
        dn = encode_dn(field_, scene.offset_dn)
        write_raster(path, dn, geobox, nodata=NODATA_DN, overviews="average")
        offset = -scene.offset_dn * SCALE
        assets[band] = AssetRecord(path, geobox, "uint16", NODATA_DN, SCALE, offset, "1")
    share = {name: round(100 * float((codes == k).mean()), 3) for name, k in _SKY.items()}
    properties = {
        "platform": "simulated",
        "constellation": "simulated",
        "instruments": ["simulated"],
        "eo:cloud_cover": share["cloud"],
        "view:sun_azimuth": scene.sun_azimuth_deg,
        "view:sun_elevation": scene.sun_elevation_deg,
        "s2:processing_baseline": "04.00" if scene.offset_dn else "03.01",
    }
    when = utc(scene.when.year, scene.when.month, scene.when.day, 10, 12)
    region.items.append(ItemRecord(scene.id, "sim-s2-l2a", when, assets, properties))
    region.truth[scene.id] = {
        "shift_px": list(scene.shift),
        "cloud_height_m": scene.cloud_height_m,
        "snow": scene.snow,
        **{f"{name}_pct": value for name, value in share.items()},
    }


_SKY = {"cloud": 1, "shadow": 2, "snow": 3}


def _write_sar(region: _Region, scene: SarScene) -> None:
    assets: dict[str, AssetRecord] = {}
    folder = region.root / "sim-s1-rtc" / scene.id
    for polarisation, power in render_sar(region.sim, region.land, scene):
        path = folder / f"{polarisation}.tif"
        write_raster(path, power, region.scene, nodata=0, overviews="average")
        assets[polarisation] = AssetRecord(path, region.scene, "float32", 0, 1.0, 0.0, "1")
    properties = {
        "platform": "simulated",
        "constellation": "simulated",
        "sar:instrument_mode": "IW",
        "sar:frequency_band": "C",
        "sar:polarizations": list(assets),
        "sar:product_type": "RTC",
        "sar:looks_equivalent_number": region.sim.sar_looks,
    }
    when = utc(scene.when.year, scene.when.month, scene.when.day, 16, 50)
    region.items.append(ItemRecord(scene.id, "sim-s1-rtc", when, assets, properties))


@contextmanager
def _fixed_clock(day: date) -> Iterator[None]:
    """Keep today's date out of GeoPackages, so that the same region has the same bytes."""
    key = "OGR_CURRENT_DATE"
    before = pyogrio.get_gdal_config_option(key)
    pyogrio.set_gdal_config_options({key: f"{day.isoformat()}T00:00:00.000Z"})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({key: before})


def _write_layers(path: Path, layers: dict[str, gpd.GeoDataFrame], day: date) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _fixed_clock(day):
        for i, (name, table) in enumerate(layers.items()):
            table.to_file(path, layer=name, driver="GPKG", engine="pyogrio", append=i > 0)


def _write_frame(region: _Region) -> None:
    """Area of interest, districts, legend and readme."""
    b = region.aoi.boundingbox
    outline = box(b.left, b.bottom, b.right, b.top)
    table = gpd.GeoDataFrame({"name": ["aoi"]}, geometry=[outline], crs=str(region.aoi.crs))
    last = period(region.sim)[1]
    _write_layers(region.root / "aoi.gpkg", {"aoi": table}, last)
    districts = make_districts(region.sim, region.aoi)
    _write_layers(region.root / "regions.gpkg", {"districts": districts}, last)
    # Half a metre inside: rounding on the way to degrees must not touch the next lattice cell.
    degrees = set_precision(lonlat_box(region.aoi, inset_m=0.5), 1e-9)
    feature = {"type": "Feature", "properties": {"name": "aoi"}, "geometry": mapping(degrees)}
    write_json(region.root / "aoi.geojson", {"type": "FeatureCollection", "features": [feature]})
    rows = zip(LEGEND.codes, LEGEND.names, LEGEND.colors, strict=True)
    write_text(region.root / "classes.csv", csv_text(("code", "name", "color"), rows))
    readme = _README.format(seed=region.sim.seed, collections=", ".join(COLLECTIONS))
    write_text(region.root / "README.txt", readme)


def _write_labels(region: _Region) -> LabelSet:
    labels = make_labels(region.sim, region.land)
    _write_layers(region.root / "labels.gpkg", labels.layers, period(region.sim)[1])
    return labels


def _write_truth(region: _Region, labels: LabelSet) -> None:
    sim, land, folder = region.sim, region.land, region.root / "truth"
    last = period(sim)[1]
    day = land.day(last)
    codes = np.array(LEGEND.codes, dtype=np.uint8)
    changed = land.parcels.before != land.parcels.after
    rasters = {
        "landcover": (codes[class_map(land, day)], 255),
        "height": (height_map(land, day), -9999.0),
        "boundary": (edge_mask(land).astype(np.uint8), 255),
        "change": (changed[land.parcel].astype(np.uint8), 255),
    }
    for name, (data, nodata) in rasters.items():
        look: dict[str, Any] = {}
        if name == "landcover":
            look = {"colormap": LEGEND.colormap(), "category_names": LEGEND.category_names()}
        write_raster(folder / f"{name}.tif", _inner(data, 0), region.aoi, nodata=nodata, **look)
    _write_layers(folder / "parcels.gpkg", {"parcels": _parcel_table(land)}, last)
    write_json(folder / "truth.json", _truth_record(region, labels, last))


def _parcel_table(land: Landscape) -> gpd.GeoDataFrame:
    """Outlines of all land parcels (water not cut out) with their classes and change date."""
    p = land.parcels
    n = len(p.polygons)
    t = land.geobox.affine
    world = [t.a, t.b, t.d, t.e, t.c, t.f]
    names = np.array(LEGEND.names)
    return gpd.GeoDataFrame(
        {
            "parcel_id": np.arange(n),
            "class_before": names[p.before[:n]],
            "class_after": names[p.after[:n]],
            "change_date": [_day_text(land, int(d)) for d in p.change_day[:n]],
        },
        geometry=[Polygon(affine_transform(g, world)) for g in p.polygons],
        crs=str(land.geobox.crs),
    )


def _day_text(land: Landscape, day: int) -> str | None:
    if day >= NEVER:
        return None
    return date.fromordinal(land.start.toordinal() + day).isoformat()


def _truth_record(region: _Region, labels: LabelSet, last: date) -> dict[str, Any]:
    p = region.land.parcels
    moved = [int(i) for i in np.flatnonzero(p.change_day < NEVER)]
    radar = {i.id: [0.0, 0.0] for i in region.items if i.collection == "sim-s1-rtc"}
    return {
        "simulated": True,
        "settings": region.sim.model_dump(mode="json"),
        "map_date": last.isoformat(),
        "classes": [
            {"code": c, "name": n, "color": k}
            for c, n, k in zip(LEGEND.codes, LEGEND.names, LEGEND.colors, strict=True)
        ],
        "shift_convention": "item id: [dy, dx] in 10 m pixels; the content moved by dy down and "
        "dx right; to undo it, move by [-dy, -dx]",
        "shifts": {k: v["shift_px"] for k, v in region.truth.items()} | radar,
        "scenes": region.truth,
        "cloud_codes": {"clear": 0, **_SKY},
        "noisy_label_ids": [n["parcel_id"] for n in labels.noisy],
        "noisy_labels": labels.noisy,
        "outdated_label_ids": labels.outdated,
        "changes": [
            {
                "parcel_id": i,
                "date": _day_text(region.land, int(p.change_day[i])),
                "from": LEGEND.names[p.before[i]],
                "to": LEGEND.names[p.after[i]],
            }
            for i in moved
        ],
    }
