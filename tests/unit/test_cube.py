"""Cubes: masked composites at native resolutions, and reasons where there is nothing to see."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rioxarray  # noqa: F401  (the accessor .rio)
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import box

from support.cubes import (
    BANDS,
    GEOBOX,
    LEFT,
    SIDE,
    TOP,
    build,
    campaign,
    cloud,
    grid,
    optical,
)
from terraloom.config.campaign import Campaign
from terraloom.errors import SceneError
from terraloom.grid import coarsen
from terraloom.io import sha256, write_raster
from terraloom.preprocess import stack
from terraloom.preprocess.channels import channel_names, cube_inputs
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.cube import (
    MASK_OUTSIDE,
    Scene,
    build_tile,
    mask_on,
)
from terraloom.preprocess.harmonise import c_factor
from terraloom.preprocess.reasons import INVALID, Reason


def test_period_of_a_day_includes_both_ends() -> None:
    days = {"2023-03-01": "spring", "2023-05-31": "spring", "2023-06-01": "summer",
            "2023-02-28": None, "2023-09-01": None}  # fmt: skip
    for day, name in days.items():
        assert campaign().cube.period_of(date.fromisoformat(day)) == name


def test_bands_keep_their_native_pixels(tmp_path: Path) -> None:
    """Unshifted bands on the lattice come through untouched, to the storage step of 1e-4."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        b: rng.integers(1, 9000, coarsen(GEOBOX, r // 10).shape) for b, r in BANDS.items()
    }
    store = build(tmp_path, [optical(tmp_path, "2023-04-01", values)])
    for band, res in BANDS.items():
        got = store[f"s2_{res}"].sel(period="spring")[0].to_numpy()
        assert got.shape == (SIDE * 10 // res,) * 2
        assert got == pytest.approx(values[band] * 1e-4, abs=6e-5), band
    assert np.isnan(store["s2_10"].sel(period="summer")).all()
    assert channel_names(store)["s2_20"] == ["spring/B11", "summer/B11"]
    assert {g: x.shape[0] for g, x in cube_inputs(store).items()} == dict.fromkeys(
        ("s2_10", "s2_20", "s2_60"), 2
    )


def test_the_composite_is_the_median_of_the_clear_looks(tmp_path: Path) -> None:
    hidden = cloud(slice(0, 48), slice(None))
    scenes = [
        optical(tmp_path, "2023-04-01", {"B04": 1000, "B11": 1000, "B09": 1000}),
        optical(tmp_path, "2023-04-11", {"B04": 2000, "B11": 2000, "B09": 2000}),
        optical(tmp_path, "2023-05-01", {"B04": 9000, "B11": 9000, "B09": 9000}, hidden),
    ]
    store = build(tmp_path, scenes)
    for group in ("s2_10", "s2_20", "s2_60"):
        x = store[group].sel(period="spring")[0].to_numpy()
        half = x.shape[0] // 2
        assert x[: half - 1] == pytest.approx(0.15, abs=1e-4), "two looks under the cloud"
        assert x[half + 1 :] == pytest.approx(0.2, abs=1e-4), "three looks elsewhere"
    counts = store["clear_count"].sel(period="spring").to_numpy()
    assert np.all(counts[:96] == 2) and np.all(counts[96:] == 3)
    assert store["clear_count"].sel(period="summer").to_numpy().max() == 0


@pytest.mark.parametrize("reason", [Reason.CLOUD, Reason.SHADOW, Reason.CLOUD_EDGE, Reason.SNOW])
def test_every_invalid_reason_hides_the_pixel(tmp_path: Path, reason: Reason) -> None:
    mask = cloud(slice(0, 6), slice(0, 6), reason)
    store = build(tmp_path, [optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 3000), mask)])
    bits = store["reasons"].to_numpy()
    assert np.all(bits[:12, :12] == reason) and not bits[12:].any() and not bits[:, 12:].any()
    for res in BANDS.values():
        n = 120 // res
        x = store[f"s2_{res}"].sel(period="spring")[0].to_numpy()
        assert np.isnan(x[:n, :n]).all() and np.isfinite(x[n:]).all()


def test_water_is_a_mark_and_no_gap(tmp_path: Path) -> None:
    mask = cloud(slice(None), slice(None), Reason.WATER)
    store = build(tmp_path, [optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 300), mask)])
    assert not store["reasons"].to_numpy().any()
    assert np.isfinite(store["s2_10"].sel(period="spring")).all()


def test_reasons_of_all_looks_are_joined_and_one_clear_look_clears(tmp_path: Path) -> None:
    scenes = [
        optical(tmp_path, "2023-04-01", {"B04": 1}, cloud(slice(0, 10), slice(None))),
        optical(tmp_path, "2023-07-01", {"B04": 1},
                cloud(slice(0, 5), slice(None), Reason.SHADOW)),
    ]  # fmt: skip
    bits = build(tmp_path, scenes)["reasons"].to_numpy()
    assert np.all(bits[:10] == Reason.CLOUD | Reason.SHADOW)
    assert not bits[10:].any(), "the second date sees rows 10 to 19"


def test_outside_aoi_and_scene_there_is_no_data(tmp_path: Path) -> None:
    aoi = box(LEFT, TOP - 960, LEFT + 1920, TOP)
    store = build(tmp_path, [optical(tmp_path, "2023-04-01", {"B04": 1})], g=grid(aoi))
    bits = store["reasons"].to_numpy()
    assert not bits[:96].any() and np.all(bits[96:] & Reason.NODATA)
    assert store.attrs["clear_pct"] == 50


def test_a_sixty_metre_pixel_takes_every_reason_in_it(tmp_path: Path) -> None:
    scene = optical(tmp_path, "2023-04-01", {"B09": 1}, cloud(slice(4, 5), slice(7, 8)))
    coarse = mask_on(coarsen(GEOBOX, 6), scene)
    assert coarse[1, 2] == Reason.CLOUD and (coarse != 0).sum() == 1
    assert (mask_on(GEOBOX, scene) != 0).sum() == 4


def test_no_mask_means_clear_and_outside_a_mask_means_no_data(tmp_path: Path) -> None:
    scene = optical(tmp_path, "2023-04-01", {"B04": 1})
    assert not mask_on(GEOBOX, Scene(scene.item, (), None)).any()
    far = GeoBox((12, 12), Affine(10, 0, LEFT + 60_000, 0, -10, TOP), "EPSG:32633")
    assert np.all(mask_on(far, scene) == Reason.NODATA)


def test_strips_are_joined(tmp_path: Path) -> None:
    scene = optical(tmp_path, "2023-04-01", {"B04": 1})
    whole = coarsen(GEOBOX, 2)
    parts = []
    for n, rows in enumerate((slice(0, 30), slice(30, 96))):
        strip = whole[rows, :]
        path = tmp_path / f"p{n}.tif"
        data = np.stack([np.full(strip.shape, 255 if b else n * 2, np.uint8) for b in range(2)])
        write_raster(path, data, strip, nodata=MASK_OUTSIDE)
        parts.append((path, 1))
    bits = mask_on(GEOBOX, Scene(scene.item, tuple(parts), None))
    assert not bits[:60].any() and np.all(bits[60:] == Reason.CLOUD)


def test_a_shift_is_taken_back(tmp_path: Path) -> None:
    """Content that lies two pixels down and three to the right comes back to its place."""
    rng = np.random.default_rng(1)
    true = rng.integers(1, 9000, GEOBOX.shape)
    moved = np.roll(true, (2, 3), axis=(0, 1))
    shift = Shift(2.0, 3.0, 1.0, 0.0, 9)
    store = build(tmp_path, [optical(tmp_path, "2023-04-01", {"B04": moved}, shift=shift)])
    got = store["s2_10"].sel(period="spring")[0].to_numpy()
    assert got[4:-4, 4:-4] == pytest.approx(true[4:-4, 4:-4] * 1e-4, abs=2e-3)


def test_radar_is_averaged_in_power_and_seen_through_cloud(tmp_path: Path) -> None:
    c = campaign({"source": "sentinel-2-l2a", "bands": ["B04"]},
                 {"source": "sentinel-1-rtc", "bands": ["VV"]})  # fmt: skip
    scenes = [optical(tmp_path, "2023-04-01", {"B04": 1}, cloud(slice(None), slice(None)))]
    for n, power in enumerate((0.01, 0.1)):
        path = tmp_path / f"vv{n}.tif"
        write_raster(path, np.full(GEOBOX.shape, power, np.float32), GEOBOX, nodata=-9999)
        record = {
            "href": str(path), "size": None, "checksum": None, "scale": 1.0, "offset": 0.0,
            "nodata": -9999, "resolution_m": 10.0, "shape": None, "unit": "power",
        }  # fmt: skip
        item = {"id": f"S1-{n}", "source": "sentinel-1-rtc", "crs": "EPSG:32633",
                "datetime": f"2023-04-0{n + 2}T05:00:00Z", "assets": {"VV": record}}  # fmt: skip
        scenes.append(Scene(item, (), None))
    store = build(tmp_path, scenes, c)
    vv = store["s1_10"].sel(period="spring")[0].to_numpy()
    assert vv == pytest.approx(10 * np.log10(0.055), abs=1e-4), "not the mean of -20 and -10 dB"
    assert np.isnan(store["s2_10"]).all() and np.all(store["reasons"] == Reason.CLOUD)


def test_a_finished_tile_is_kept_until_something_it_depends_on_changes(tmp_path: Path) -> None:
    g, c, path = grid(), campaign(), tmp_path / "cube.zip"
    scene = optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 3000))

    def make(code: str = "a", scenes: tuple[Scene, ...] = (scene,), c: Campaign = c) -> str:
        return str(build_tile(g.tiles()[0], g, c, list(scenes), path, code)["digest"])

    first, stamp, bytes_ = make(), path.stat().st_mtime_ns, sha256(path)
    assert make() == first and path.stat().st_mtime_ns == stamp
    path.unlink()
    assert make() == first and sha256(path) == bytes_, "the same inputs, the same bytes"
    other = Scene(scene.item, scene.masks, Shift(0.3, 0.0, 1.0, 0.0, 9))
    one_period = c.model_copy(update={"cube": c.cube.model_copy(
        update={"periods": c.cube.periods[:1]})})  # fmt: skip
    digests = {first, make("b"), make(scenes=(other,)), make(c=one_period)}
    optical(tmp_path, "2023-04-01", {}, cloud(slice(0, 2), slice(0, 2)))  # another mask
    digests.add(make())
    assert len(digests) == 5


def test_invalid_bits_are_those_that_hide_the_ground() -> None:
    assert Reason.CLOUD in INVALID and Reason.WATER not in INVALID and Reason.FILLED not in INVALID


# --- harmonised ----------------------------------------------------------------------------------


def test_band_pass_and_view_are_adjusted_in_the_cube(tmp_path: Path) -> None:
    scene = optical(tmp_path, "2023-04-01", {"B04": 3000, "B11": 3000, "B09": 3000})
    angles = {"sun_azimuth_deg": 150.0, "sun_elevation_deg": 45.0, "view_azimuth_deg": 100.0,
              "view_zenith_deg": 9.0}  # fmt: skip
    known = replace(scene, item=dict(scene.item, platform="sentinel-2b", **angles))
    store = build(tmp_path, [known], campaign(bandpass="landsat-8", brdf="c-factor"))
    expected = 0.9761 * 0.3 * c_factor("B04", 45, 9, 50) + 0.0010
    assert float(store["s2_10"][0, 0, 0, 0]) == pytest.approx(expected, abs=6e-5)
    assert float(store["s2_60"][0, 0, 0, 0]) == pytest.approx(0.3, abs=6e-5)
    assert json.loads(store.attrs["brdf_not_applied"]) == {}
    unknown = replace(scene, item=dict(scene.item, platform="sentinel-2b"))
    store = build(tmp_path, [unknown], campaign(brdf="c-factor"))
    assert float(store["s2_10"][0, 0, 0, 0]) == pytest.approx(0.3, abs=6e-5)
    why = json.loads(store.attrs["brdf_not_applied"])
    assert "view zenith" in why[scene.item["id"]]
    third = replace(scene, item=dict(scene.item, platform="sentinel-2c"))
    with pytest.raises(SceneError, match="sentinel-2c"):
        build(tmp_path, [third], campaign(bandpass="landsat-8"))


# --- reuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cube",
    [{"method": "medoid"}, {"fill": "linear", "series": "dates", "fill_max_days": 400}],
    ids=["composites", "filled dates"],
)
def test_new_scenes_rebuild_their_period_alone_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cube: dict[str, Any]
) -> None:
    rng = np.random.default_rng(9)

    def look(day: str, rows: slice) -> Scene:
        return optical(
            tmp_path, day,
            {b: rng.integers(1, 5000, coarsen(GEOBOX, r // 10).shape) for b, r in BANDS.items()},
            cloud(rows, slice(None)),
        )  # fmt: skip

    spring = [look("2023-03-11", slice(0, 9)), look("2023-04-01", slice(0, 30))]
    summer = [look("2023-06-11", slice(50, 70))]
    new = look("2023-07-20", slice(0, 0))
    c = campaign(**cube)
    build(tmp_path, [*spring, *summer], c)
    read: list[str] = []
    real = stack.read_placed

    def counted(item: Any, *rest: Any) -> np.ndarray:
        read.append(str(item["id"]))
        return real(item, *rest)

    monkeypatch.setattr(stack, "read_placed", counted)
    build(tmp_path, [*spring, *summer, new], c)
    again = sha256(tmp_path / "cube.zip")
    assert new.item["id"] in read
    assert not {s.item["id"] for s in spring} & set(read), "spring has not changed"
    if cube.get("series") == "dates":
        assert set(read) == {new.item["id"]}, "nor have the other days"
    (tmp_path / "cube.zip").unlink()
    build(tmp_path, [*spring, *summer, new], c)
    assert sha256(tmp_path / "cube.zip") == again
    build(tmp_path, [*spring, *summer], c)
    assert sha256(tmp_path / "cube.zip") != again


def test_a_source_without_a_day_in_any_period_is_empty_not_an_error(tmp_path: Path) -> None:
    scenes = [optical(tmp_path, "2022-01-01", dict.fromkeys(BANDS, 3000))]
    store = build(tmp_path, scenes, campaign(series="dates", fill="linear"))
    assert store["s2_10"].shape == (0, 1, SIDE, SIDE)
    assert channel_names(store)["s2_10"] == [] and cube_inputs(store)["s2_10"].shape[0] == 0
