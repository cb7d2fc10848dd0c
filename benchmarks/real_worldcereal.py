"""Two sites of 640 m in Flanders: three sensors, land cover and crop type, few fields."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import xarray as xr
import yaml
from affine import Affine
from rasterio.features import shapes
from real_data import DATA, Rows, Scene, chips_of, held_scores, layers, legend_of, train
from shapely.geometry import shape

from terraloom.acquire.files import import_files
from terraloom.acquire.lock import lock_items
from terraloom.config.base import TaskKind
from terraloom.config.labels import LabelSource, Task
from terraloom.config.load import parse_campaign
from terraloom.grid import geobox_from_record
from terraloom.io import read_store, write_json
from terraloom.labels.folds import assign_folds
from terraloom.labels.rasterise import burn
from terraloom.labels.read import read_labels
from terraloom.models.heads import TaskSpec
from terraloom.plan import Plan
from terraloom.preprocess.audit import audit_scenes
from terraloom.preprocess.build import build_batch
from terraloom.preprocess.channels import channel_names, cube_inputs
from terraloom.preprocess.masking import mask_part
from terraloom.preprocess.shifts import measure_shifts
from terraloom.preprocess.verify import verify_items
from terraloom.train.baseline import pixel_forest
from terraloom.train.fit import Augmentation, FitSettings, HeldOut, fit_member, predict_held_out
from terraloom.train.windows import modalities_of

FOLDER = DATA / "worldcereal"
#: Site: year, and corner of its 640 m (left, bottom) in EPSG:32631.
SITES = {"a": (2018, 501360, 5629040), "c": (2019, 526140, 5669560)}
#: Crop types of the register with two fields or more of some size; the rest are other crops.
CODES = {
    "lc": {11: "cropland", 13: "grassland", 60: "other", 99: "other"},
    "ct": {1200: "maize", 9120: "grass", 1110: "winter wheat", 1910: "cereals", 5100: "potatoes"},
}  # fmt: skip
OTHER_CROP = "other crop"
LEAST_M2 = 1500.0
FOLDS, BLOCK_M, CHIP_PX = 3, 160.0, 96
S2 = {
    "B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B05": "rededge071",
    "B06": "rededge075", "B07": "rededge078", "B8A": "nir08", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
L8 = {"B02": "blue", "B03": "green", "B04": "red", "B05": "nir08", "B06": "swir16", "B07": "swir22"}
#: Landsat Collection 1 pixel_qa as Fmask codes.
QA = {
    **dict.fromkeys((322, 386, 834, 898, 1346), 0),
    **dict.fromkeys((324, 388, 836, 900, 1348), 1),
    **dict.fromkeys((328, 392, 840, 904, 1350), 2),
    **dict.fromkeys((336, 400, 848, 912, 1352), 3),
    **dict.fromkeys((352, 368, 416, 432, 480, 864, 880, 928, 944, 992), 4),
}
SEASONS = {"spring": ("04-01", "05-31"), "summer": ("06-01", "07-31"), "late": ("08-01", "09-30")}


def descriptions(site: str) -> dict[str, dict[str, Any]]:
    """Descriptions of the site's sources, April to September."""
    folder, year = FOLDER / f"site_{site}", SITES[site][0]
    days = {"start": f"{year}-04-01", "end": f"{year}-09-30", "nodata": 0, "empty": "skip"}
    fine = any(folder.glob("S2_L2A_10m_*"))
    bands = {b: n for b, n in S2.items() if fine or b not in ("B02", "B03", "B04", "B08")}
    optical = {"kind": "optical", "unit": "reflectance", "scale": 1e-4, **days}
    files = [{"path": f"{folder}/S2_L2A_{r}m_*.nc"} for r in (10, 20) if fine or r == 20]
    return {
        "s2": {**optical, "title": "Sentinel-2", "bands": _named(bands), "files": files,
               "layers": {"SCL": {"codes": "scl"}}},
        "s1": {**days, "title": "Sentinel-1", "kind": "sar", "unit": "dB",
               "bands": {"VV": {}, "VH": {}}, "files": [{"path": f"{folder}/S1_GRD-*.nc"}]},
        "l8": {**optical, "title": "Landsat 8", "bands": _named(L8), "cube_m": 30,
               "layers": {"qa": {"codes": "fmask", "nodata": 255, "recode": QA}},
               "files": [{"path": f"{folder}/L8_SR_*.nc",
                          "bands": {**{b: b for b in L8}, "qa": "pixel_qa"}}]},
    }  # fmt: skip


def _named(bands: dict[str, str]) -> dict[str, dict[str, str]]:
    return {b: {"common_name": n} for b, n in bands.items()}


def scene(site: str, work: Path) -> Scene:
    """Composites of three seasons of all sensors, by the stages of a campaign.

    A cube that stands in ``work`` is read again.
    """
    folder = work.resolve() / f"worldcereal-{site}"
    cube = next(folder.glob("work/cube/*.zip"), None) or _built(site, folder)
    store = read_store(cube)
    groups = list(cube_inputs(store))
    return Scene(geobox_from_record(_record(store)), cube_inputs(store), channel_names(store),
                 {g: dict(store[g].attrs) for g in groups})  # fmt: skip


def _record(store: Any) -> dict[str, Any]:
    y, x = store["y_10"].to_numpy(), store["x_10"].to_numpy()
    transform = [10.0, 0.0, float(x[0]) - 5, 0.0, -10.0, float(y[0]) + 5]
    return {"crs": store.attrs["crs"], "shape": [len(y), len(x)], "transform": transform}


def _built(site: str, folder: Path) -> Path:
    year, left, bottom = SITES[site]
    folder.mkdir(parents=True, exist_ok=True)
    with _inside(folder):
        for name, spec in descriptions(site).items():
            file = Path(f"{name}.yaml")
            file.write_text(yaml.safe_dump(spec, sort_keys=False))
            import_files(file, Path("resources/files") / name)
        campaign = parse_campaign({
            "name": f"site-{site}", "title": "Site",
            # On the lattice of 60 m: what lies around the site has no image.
            "aoi": {"bbox": [left, bottom, left + 640, bottom + 640], "crs": "EPSG:32631"},
            "grid": {"crs": "EPSG:32631", "tile_px": 96},
            "sources": [{"source": f"resources/files/{n}/source.yaml"} for n in descriptions(site)],
            "masks": {"methods": ["layer"]}, "coregister": {"enabled": False},
            # Clouds that the product's mask misses make a scene of site C unlike the others.
            "scenes": {"jobs": 1, "on_audit": "report"},
            "cube": {"periods": [{"name": n, "start": f"{year}-{a}", "end": f"{year}-{b}"}
                                 for n, (a, b) in SEASONS.items()]},
            "tasks": [{"name": "lc", "kind": "segmentation", "classes": "c.csv",
                       "labels": {"file": "l.gpkg", "column": "c"}}],
        })  # fmt: skip
        plan = Plan.of(campaign)
        write_json("results/scenes/items.json", lock_items(campaign, plan.grid))
        verify_items(campaign, plan.grid)
        for period in plan.period_names:
            for part in plan.part_names:
                mask_part(campaign, plan.grid, period, part)
        measure_shifts(campaign, plan.grid)
        audit_scenes(campaign, plan.grid)
        for batch in plan.batch_names:
            build_batch(campaign, plan.grid, batch)
    return next(folder.glob("work/cube/*.zip"))


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fields(site: str) -> gpd.GeoDataFrame:
    """Fields of the register: connected pixels of one land cover and crop type."""
    _, left, bottom = SITES[site]
    path = next((FOLDER / f"site_{site}").glob("OUTPUT_POLY-110_*.nc"))
    code = {}
    with warnings.catch_warnings(), rasterio.Env(GDAL_NETCDF_BOTTOMUP="NO"):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        for name in ("LC", "CT"):
            with rasterio.open(f"netcdf:{path}:{name}") as src:
                code[name] = src.read(1).astype(np.int32)
    both = code["LC"] * 10_000 + code["CT"]
    affine = Affine(10, 0, left, 0, -10, bottom + 640)
    rows = []
    for geometry, value in shapes(both, transform=affine):
        lc, ct = divmod(int(value), 10_000)
        rows.append({
            "lc": CODES["lc"].get(lc), "ct": CODES["ct"].get(ct, OTHER_CROP) if ct else None,
            "geometry": shape(geometry),
        })  # fmt: skip
    frame = gpd.GeoDataFrame(rows, crs="EPSG:32631")
    large = frame[frame.area > LEAST_M2]["ct"].value_counts()
    few = frame["ct"].notna() & ~frame["ct"].isin(large.index[large >= 2])
    frame.loc[few, "ct"] = OTHER_CROP
    return frame


def chips(site: str, work: Path, *, folds: int, seed: int) -> tuple[xr.Dataset, list[TaskSpec]]:
    """Chips of a site with both tasks; a field is in one fold, whatever the task."""
    place, frame = scene(site, work), fields(site)
    file = work / f"fields-{site}.gpkg"
    frame.to_file(file, driver="GPKG")
    parts, specs, start = [], [], 0
    for name in ("lc", "ct"):
        names = tuple(sorted(frame[name].dropna().unique()))
        task = Task(name=name, kind=TaskKind.SEGMENTATION, classes="-",
                    labels=LabelSource(file=str(file), column=name))  # fmt: skip
        labels, _ = read_labels(task, place.grid, legend_of(names))
        labels["task"], labels["stratum"] = name, labels["value"].astype(np.int64) + start
        parts.append(labels)
        specs.append(TaskSpec(name, "segmentation", names))
        start += len(names)
    union = gpd.GeoDataFrame(pd.concat(parts, ignore_index=True), crs=parts[0].crs)
    names = [f"{s.name} {c}" for s in specs for c in s.classes]
    union, fold_map = assign_folds(
        union, geobox=place.geobox, count=folds, block_m=BLOCK_M, seed=seed, names=names
    )
    out: dict[str, np.ndarray] = {}
    for name in ("ct", "lc"):  # land cover last: its fields cover all of the others
        mine = union[union["task"] == name].reset_index(drop=True)
        burned = burn(mine, place.geobox, kind=TaskKind.SEGMENTATION)
        made = layers(burned.value, burned.label, mine, fold_map, place.geobox)
        out |= {f"y_{name}": made["y"], "fold": made["fold"], "block": made["block"]}
    return chips_of(place, out, size_px=CHIP_PX), specs


def without(chips: xr.Dataset, sensor: str) -> xr.Dataset:
    """The same chips with all values of a sensor missing."""
    groups = [f"x_{g}" for g in modalities_of(chips) if g.rsplit("_", 1)[0] == sensor]
    return chips.assign({g: chips[g].copy(data=np.full_like(chips[g], np.nan)) for g in groups})


#: Few fields: a small network, few steps, strong changes of the inputs, sensors left out.
SETTINGS = FitSettings(
    width=6, epochs=80,
    # Gain, bias, share of bands and share of sensors that are left out.
    augmentation=Augmentation(0.15, 0.2, 0.1, 0.2),
)  # fmt: skip
SENSORS = ("s2", "s1", "l8")


def trial(site: str, work: Path, seed: int, rows: Rows) -> None:
    """One seed of one site: folds, networks and forest are all drawn anew."""
    data, specs = chips(site, work, folds=FOLDS, seed=seed)
    joint: dict[str, list[HeldOut]] = {}
    for fold in range(FOLDS):
        net = fit_member(data, specs, SETTINGS, held_out_fold=fold, member=0, seed=seed).network()
        for case in ("all", *SENSORS):
            seen = data if case == "all" else without(data, case)
            for task, held in predict_held_out(seen, [net], fold).items():
                joint.setdefault(f"{task} {case}", []).append(held)
    for spec in specs:
        forest = pixel_forest(data, spec, seed=seed)
        rows.add(f"{site.upper()} {spec.name}: forest", held_scores(forest))
        _, alone = train(data, [spec], SETTINGS, folds=range(FOLDS), seed=seed)
        rows.add(f"{site.upper()} {spec.name}: network, one task", held_scores(alone[spec.name]))
        for case in ("all", *SENSORS):
            what = "network, both tasks" if case == "all" else f"the same, {case} missing"
            part = HeldOut.join(joint[f"{spec.name} {case}"])
            rows.add(f"{site.upper()} {spec.name}: {what}", held_scores(part))


def report(work: Path, seeds: Sequence[int]) -> None:
    """Print the score table of both sites."""
    rows, start = Rows(), time.process_time()
    for site in SITES:
        for seed in seeds:
            trial(site, work, seed, rows)
    print(f"worldcereal: {FOLDS} folds by field, {len(seeds)} seeds of folds and networks; pixels; "
          f"{time.process_time() - start:.0f} CPU s")  # fmt: skip
    print(rows.text())
