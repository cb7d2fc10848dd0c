from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from odc.geo.geobox import GeoBox
from shapely.geometry import box

from terraloom.config.load import parse_campaign
from terraloom.errors import SceneError
from terraloom.grid import CampaignGrid
from terraloom.io import geobox_of, write_json, write_raster
from terraloom.preprocess import masking, omnicloud
from terraloom.preprocess.compare import (
    USED,
    combine,
    compare_rows,
    count_agreement,
    merge_counts,
)
from terraloom.preprocess.masking import mask_part
from terraloom.preprocess.masks import METHOD_BANDS, MaskMethod
from terraloom.preprocess.reasons import INVALID, Reason, invalid_mask

N, C, E, S, SNOW, W = (int(Reason[k]) for k in (
    "NODATA", "CLOUD", "CLOUD_EDGE", "SHADOW", "SNOW", "WATER"))  # fmt: skip


def row(*values: int) -> np.ndarray:
    return np.array([values], dtype=np.uint8)


# --- several methods -------------------------------------------------------------------------

masks_of = st.lists(hnp.arrays(np.uint8, (3, 4)), min_size=1, max_size=5)


@given(masks_of)
def test_union_and_vote_of_any_masks(masks):
    union, vote = combine(masks, "union"), combine(masks, "vote")
    bad = np.stack([invalid_mask(m) for m in masks])
    np.testing.assert_array_equal(union, np.bitwise_or.reduce(masks))
    most = bad.sum(axis=0) > len(masks) / 2
    nodata = (union & N) != 0
    np.testing.assert_array_equal(invalid_mask(vote) | nodata, most | nodata)
    assert ((vote & ~union) == 0).all()  # no reason that nobody gave
    for how in ("union", "vote"):
        np.testing.assert_array_equal(combine(masks[::-1], how), combine(masks, how))
        np.testing.assert_array_equal(combine([masks[0]] * 3, how), masks[0])


def test_vote_takes_the_reasons_of_the_majority():
    a, b, c = row(C, C, C, 0, N, W), row(C, S, 0, 0, 0, W), row(0, S | W, S, C, 0, 0)
    #                  2 of 3, shadow, bad but not why, 1 of 3, missing, remark
    assert combine([a, b, c], "vote").tolist() == [[C, S, C | S, 0, N, W]]
    # Two methods: both have to say so.
    assert combine([a, b], "vote").tolist() == [[C, C | S, 0, 0, N, W]]


def test_masks_that_cannot_be_combined_are_refused():
    for masks in ([], [row(0), row(0, 0)]):
        with pytest.raises(SceneError, match="shapes"):
            combine(masks, "union")
    with pytest.raises(SceneError, match="union, vote"):
        combine([row(0)], "mean")


def test_agreement_by_hand():
    masks = {"a": row(C, C, 0, S, 0, N, C), "b": row(C, 0, C, S, 0, 0, C), USED: row(*[0] * 7)}
    inside = np.array([[True] * 6 + [False]])
    counts = count_agreement(masks, inside)
    assert counts["methods"]["a"] == {"n": 5, "clear": 2, "cloud": 2, "shadow": 1, "snow": 0}
    assert counts["pairs"] == {
        "a|b": {"n": 5, "cloud": [1, 1, 1], "shadow": [1, 0, 0], "invalid": [2, 1, 1]}
    }
    twice = merge_counts([counts, json.loads(json.dumps(counts))])
    manifests = [{"compare": {"x": counts}}, {"files": {}}, {"compare": {"x": counts, "w": twice}}]
    rows = compare_rows(manifests)
    assert [(r["id"], r["method"], r["other"]) for r in rows] == [
        (i, m, o) for i in ("w", "x") for m, o in (("a", ""), ("b", ""), (USED, ""), ("a", "b"))
    ]
    for r in rows[:4], rows[4:]:
        assert (r[0]["n_px"], r[0]["clear_pct"], r[0]["cloud_pct"]) == (10, 40.0, 40.0)
        assert (r[3]["agreement_pct"], r[3]["cloud_f1"], r[3]["shadow_f1"]) == (60.0, 0.5, 1.0)
        assert r[3]["clear_pct"] is r[0]["cloud_f1"] is None


def test_agreement_of_nothing():
    rows = compare_rows(
        [{"compare": {"x": count_agreement({"a": row(N), "b": row(N)}, row(1) > 0)}}]
    )
    assert [r["n_px"] for r in rows] == [0, 0, 0]
    assert rows[0]["clear_pct"] is rows[2]["agreement_pct"] is rows[2]["cloud_f1"] is None


# --- jobs ------------------------------------------------------------------------------------

GRID = CampaignGrid.from_aoi(
    box(600_000, 5_797_920, 602_400, 5_800_320), "EPSG:32633", tile_px=240, lattice_m=480
)
SPECTRA = {"blue": 0.04, "green": 0.07, "red": 0.05, "nir08": 0.30, "swir16": 0.20, "swir22": 0.12}
LANDSAT, HLS, S2 = "landsat-c2-l2", "hls-l30", "sentinel-2-l2a"
ROLES = dict(zip(SPECTRA, ("B02", "B03", "B04", "B08", "B11", "B12"), strict=True))
PERIODS = [("spring", "2022-03-01", "2022-05-31"), ("summer", "2022-06-01", "2022-08-31"),
           ("autumn", "2022-09-01", "2022-11-30")]  # fmt: skip


def campaign(*sources: str | dict[str, Any], jobs: int = 1, **masks: Any) -> Any:
    return parse_campaign({
        "name": "trial", "title": "Trial", "aoi": {"bbox": [13, 52, 13.1, 52.1]},
        "sources": [s if isinstance(s, dict) else {"source": s} for s in sources],
        "cube": {"periods": [dict(zip(("name", "start", "end"), p, strict=True)) for p in PERIODS]},
        "scenes": {"jobs": jobs}, "masks": masks,
        "tasks": [{"name": "lc", "kind": "segmentation", "classes": "c.csv",
                   "labels": {"file": "l.gpkg", "column": "c"}}],
    })  # fmt: skip


def cloud_at(row: int, col: int, side: int = 12) -> np.ndarray:
    found = np.zeros((120, 120), dtype=bool)
    found[row : row + side, col : col + side] = True
    return found


def write_scene(
    name: str, source: str, day: str, *, cloud: np.ndarray | None = None,
    layers: dict[str, np.ndarray] | None = None, bands: tuple[str, ...] = tuple(SPECTRA),
) -> dict[str, Any]:  # fmt: skip
    """A scene of 120 x 120 px of 30 m around the AOI, and its item of the lock."""
    where = GeoBox((120, 120), Affine(30, 0, 599_400, 0, -30, 5_800_920), "EPSG:32633")
    rng = np.random.default_rng(int.from_bytes(name.encode(), "big") % 2**32)
    assets = {}
    for band in bands:
        values = SPECTRA[band] + rng.normal(0, 0.002, where.shape)
        if cloud is not None:
            values[cloud] = 0.6
        key = band if source != S2 else ROLES[band]
        assets[key] = asset(name, key, np.rint(values * 1e4).astype(np.uint16), where, 1e-4, 0)
    for key, codes in (layers or {}).items():
        assets[key] = asset(name, key, codes, where, 1, None)
    return {
        "id": name, "source": source, "datetime": f"{day}T10:00:00Z", "assets": assets,
        "crs": "EPSG:32633", "sun_azimuth_deg": 150.0, "sun_elevation_deg": 50.0,
    }  # fmt: skip


def asset(
    name: str, key: str, values: np.ndarray, where: GeoBox, scale: float, nodata: int | None
) -> dict[str, Any]:
    path = Path(f"{name}-{key}.tif")
    write_raster(path, values, where, nodata=nodata)
    return {
        "href": path.as_posix(), "size": path.stat().st_size, "scale": scale, "offset": 0.0,
        "nodata": nodata, "resolution_m": 30.0,
    }  # fmt: skip


def lock(*items: dict[str, Any]) -> None:
    write_json("results/scenes/items.json", {"items": list(items)})
    write_json("results/scenes/verified.json", {i["id"]: "ok" for i in items})


def run(c: Any, period: str = "summer", part: str = "p000") -> dict[str, Any]:
    mask_part(c, GRID, period, part)
    record: dict[str, Any] = json.loads(
        Path(f"results/scenes/masks/{period}-{part}.json").read_text()
    )
    return record


def mask_of(record: dict[str, Any], source: str, name: str) -> tuple[np.ndarray, GeoBox]:
    with rasterio.open(record["files"][source]) as src:
        band = record["scenes"][source].index(name) + 1
        return src.read(band), geobox_of(src)


def of_scene(mask: np.ndarray, where: GeoBox) -> np.ndarray:
    """The part of a mask of 30 m that lies on the scene."""
    col, row = (round(v) for v in ~where.affine @ (599_400, 5_800_920))
    return mask[max(row, 0) :, max(col, 0) :][:120, :120]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


CLEAR, QA_CLOUD, QA_SHADOW = 21824, 22280, 23888


def test_landsat_by_its_own_layers_on_its_own_pixels(here):
    qa = np.full((120, 120), CLEAR, np.uint16)
    qa[50:60, 50:60], qa[70:80, 50:60], qa[20, 20] = QA_CLOUD, QA_SHADOW, 1
    radsat = np.zeros((120, 120), np.uint16)
    radsat[90, 90] = 4
    # No pixel of a band is needed: the layers know all.
    lock(write_scene("a", LANDSAT, "2022-07-01", bands=(),
                     layers={"QA_PIXEL": qa, "QA_RADSAT": radsat}))  # fmt: skip
    record = run(campaign(LANDSAT, dilation_m=60))
    mask, where = mask_of(record, LANDSAT, "a")
    assert where.resolution.x == 30
    at = of_scene(mask, where)
    assert (at[50:60, 50:60] == C).all()
    assert (at[70:80, 50:60] == S).all()
    assert at[20, 20] == N
    assert at[90, 90] == Reason.SATURATED
    assert at[48, 55] == E and at[47, 55] == 0  # 60 m are two pixels
    assert (mask[0] == N).all()  # beyond the scene
    counts = record["compare"]["a"]
    assert set(counts["methods"]) == {"layer", USED} and not counts["pairs"]
    assert counts["methods"][USED]["n"] == 80 * 80 - 1  # the AOI with data
    assert counts["methods"]["layer"]["cloud"] == 100


def test_auto_takes_spectral_tests_for_an_item_without_a_layer(here):
    qa = np.full((120, 120), CLEAR, np.uint16)
    cloud = cloud_at(50, 50)
    lock(write_scene("a", LANDSAT, "2022-07-01", layers={"QA_PIXEL": qa}, cloud=cloud),
         write_scene("b", LANDSAT, "2022-07-17", cloud=cloud))  # fmt: skip
    record = run(campaign(LANDSAT, dilation_m=0))
    assert "layer" in record["compare"]["a"]["methods"]
    assert "spectral" in record["compare"]["b"]["methods"]
    assert not (mask_of(record, LANDSAT, "a")[0] & C).any()
    assert ((mask_of(record, LANDSAT, "b")[0] & C) != 0).sum() == pytest.approx(144, rel=0.35)
    with pytest.raises(SceneError, match="item b") as caught:
        run(campaign(LANDSAT, methods=["layer"]))
    assert "spectral" in caught.value.fix


@pytest.mark.parametrize(("how", "expected"), [("union", 3), ("vote", 1)])
def test_two_methods_are_compared_and_combined(here, how, expected):
    qa = np.full((120, 120), CLEAR, np.uint16)
    qa[50:62, 50:62], qa[80:92, 30:42] = QA_CLOUD, QA_CLOUD
    cloud = cloud_at(50, 50) | cloud_at(30, 80)
    lock(write_scene("a", LANDSAT, "2022-07-01", layers={"QA_PIXEL": qa}, cloud=cloud))
    record = run(campaign(LANDSAT, methods=["layer", "spectral"], combine=how, dilation_m=0))
    pair = record["compare"]["a"]["pairs"]["layer|spectral"]
    assert pair["cloud"][0] == pytest.approx(144, rel=0.05)
    assert pair["cloud"][1] == pytest.approx(144, rel=0.05)
    mask = mask_of(record, LANDSAT, "a")[0]
    assert ((mask & C) != 0).sum() == pytest.approx(144 * expected, rel=0.25)
    (pair_row,) = [r for r in compare_rows([record]) if r["other"]]
    assert 0.3 < pair_row["cloud_f1"] < 0.6
    assert 90 < pair_row["agreement_pct"] < 99


def test_neighbouring_periods_help_but_are_not_written(here, monkeypatch):
    days = ["2022-04-01", "2022-05-01", "2022-07-01", "2022-07-17", "2022-09-10", "2022-10-01"]
    roof = cloud_at(60, 60, 8)  # as bright as a cloud on every date
    items = [write_scene(f"s{n}", LANDSAT, d, cloud=roof | cloud_at(30, 20 + 10 * n))
             for n, d in enumerate(days)]  # fmt: skip
    lock(*items)
    seen = []
    series = masking.mask_series
    monkeypatch.setattr(
        masking, "mask_series", lambda s, **k: seen.append((len(s), k["wanted"])) or series(s, **k)
    )
    record = run(campaign(LANDSAT, dilation_m=0))
    assert record["scenes"] == {LANDSAT: ["s2", "s3"]}
    assert seen[0] == (6, [2, 3])
    mask, where = mask_of(record, LANDSAT, "s2")
    at = of_scene(mask, where)
    assert (at[32:40, 42:50] & C).any()
    assert not (at[60:68, 60:68] & C).any()


def test_strips_and_blocks_join_to_the_same_mask(here, monkeypatch):
    qa = np.full((120, 120), CLEAR, np.uint16)
    qa[40:80, 55:65] = QA_CLOUD
    lock(write_scene("a", LANDSAT, "2022-07-01", bands=(), layers={"QA_PIXEL": qa}))
    whole = mask_of(run(campaign(LANDSAT, jobs=1)), LANDSAT, "a")[0]
    counts = run(campaign(LANDSAT, jobs=1))["compare"]["a"]
    monkeypatch.setattr(masking, "_BLOCK_PX", (40, 40))
    parts = [run(campaign(LANDSAT, jobs=3), part=f"p{n:03d}") for n in range(3)]
    strips = [mask_of(p, LANDSAT, "a")[0] for p in parts]
    np.testing.assert_array_equal(np.concatenate(strips), whole)
    assert merge_counts(p["compare"]["a"] for p in parts) == counts


def test_block_width_keeps_the_memory_whatever_the_number_of_dates():
    assert masking._block_px(6, 150) == 1024
    for planes in (60, 200, 500):
        side = masking._block_px(planes, 100)
        assert side == 256 or (side + 200) ** 2 * planes * 4 <= masking._BLOCK_BYTES


def test_each_source_has_its_pixels_and_may_have_its_own_methods(here):
    fmask = np.zeros((120, 120), np.uint8)
    fmask[50:60, 50:60] = 2
    scl = np.full((120, 120), 4, np.uint8)
    scl[50:60, 50:60] = 9
    lock(write_scene("h", HLS, "2022-07-01", bands=(), layers={"Fmask": fmask}),
         write_scene("s", S2, "2022-07-02", layers={"SCL": scl}))  # fmt: skip
    c = campaign(HLS, {"source": S2, "masks": ["spectral", "layer"]}, dilation_m=0)
    record = run(c)
    assert set(record["files"]) == {HLS, S2}
    assert mask_of(record, HLS, "h")[1].resolution.x == 30
    assert mask_of(record, S2, "s")[1].resolution.x == 20
    assert set(record["compare"]["h"]["methods"]) == {"layer", USED}
    assert set(record["compare"]["s"]["methods"]) == {"spectral", "layer", USED}


def test_an_index_is_masked_by_its_reliability(here):
    codes = np.zeros((120, 120), np.int16)
    codes[40:80, 40:80] = 3
    item = write_scene("m", "modis-vi", "2022-07-01", bands=(),
                       layers={"pixel_reliability": codes})  # fmt: skip
    item["sun_azimuth_deg"] = item["sun_elevation_deg"] = None
    lock(item)
    record = run(campaign("modis-vi", methods=["s2cloudless"]))
    mask, where = mask_of(record, "modis-vi", "m")
    assert where.resolution.x == 240
    assert (mask & C).any() and (mask == 0).any()


def test_radar_is_not_masked(here):
    lock({**write_scene("r", "sentinel-1-rtc", "2022-07-01", bands=())})
    record = run(campaign("sentinel-1-rtc"))
    assert record == {"stamp": "", "files": {}, "scenes": {}, "compare": {}}


def test_what_a_method_lacks_is_said_before_pixels_are_read(here):
    lock(write_scene("a", LANDSAT, "2022-07-01"))
    with pytest.raises(SceneError, match="B10") as caught:
        run(campaign(LANDSAT, methods=["s2cloudless"]))
    assert "landsat-c2-l2" in caught.value.where
    assert "sources[].masks" in caught.value.fix


def test_a_sun_below_the_horizon_is_named_with_its_item(here):
    item = write_scene("night", LANDSAT, "2022-07-01", cloud=cloud_at(50, 50))
    lock({**item, "sun_elevation_deg": -2.0})
    with pytest.raises(SceneError, match="item night"):
        run(campaign(LANDSAT))
    run(campaign(LANDSAT, shadow=False))


def test_codes_a_layer_cannot_hold_are_named_with_item_and_layer(here):
    scl = np.full((120, 120), 4, np.uint8)
    scl[60, 60] = 17
    lock(write_scene("s", S2, "2022-07-02", bands=(), layers={"SCL": scl}))
    with pytest.raises(SceneError, match=r"item s, layer SCL.*17"):
        run(campaign(S2))


def test_pictures_without_infrared_are_masked_where_they_miss_only(here, caplog):
    lock(write_scene("a", LANDSAT, "2022-07-01", bands=("blue", "green", "red")))
    record = run(campaign(LANDSAT))
    assert "only missing pixels" in caplog.text
    mask, _ = mask_of(record, LANDSAT, "a")
    assert (mask[0] == N).all()
    assert not (mask & (int(INVALID) - N)).any()


def test_omnicloudmask_runs_on_landsat(here, monkeypatch):
    def predict_from_array(image: np.ndarray, **options: Any) -> np.ndarray:
        return (image[:1] > 0.5).astype(np.uint8)

    monkeypatch.setattr(omnicloud, "_predictor", lambda: predict_from_array)
    lock(write_scene("a", LANDSAT, "2022-07-01", cloud=cloud_at(50, 50)))
    record = run(campaign(LANDSAT, methods=["omnicloudmask"], dilation_m=0))
    assert ((mask_of(record, LANDSAT, "a")[0] & C) != 0).sum() == 144


def test_every_method_of_the_campaign_is_one_of_the_masks():
    named = campaign(LANDSAT, methods=["auto", "layer", "spectral", "s2cloudless", "csmask",
                                       "omnicloudmask"]).masks.methods  # fmt: skip
    assert (
        {*named, "none"} - {"auto"} == {str(m) for m in MaskMethod} == set(map(str, METHOD_BANDS))
    )
