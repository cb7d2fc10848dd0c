from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from rasterio import Affine
from scipy import ndimage
from shapely.geometry import box

from support.alignment import averaged, moved, texture, write_item
from terraloom.config.load import load_campaign
from terraloom.errors import SceneError
from terraloom.grid import CampaignGrid, pad
from terraloom.preprocess import looks, shifts
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.field import ShiftField
from terraloom.preprocess.looks import choose_blocks, pixels_per, read_look
from terraloom.preprocess.placed import read_placed
from terraloom.preprocess.stack import Scene

ROOT = Path(__file__).parents[2]
GRID = CampaignGrid.from_aoi(box(300_000, 4_996_980, 303_000, 4_999_980), "EPSG:32633")
#: Scenes reach beyond the AOI, as real ones do.
WIDE = pad(GRID.geobox, 30)
SIZE = WIDE.shape[0]
TRUE = {"a": (0.2, -0.3), "b": (-0.6, 0.1), "c": (0.4, 0.8), "d": (0.0, -0.2)}


def optical(folder, name, shift, *, clouds=None, source="sentinel-2-l2a", added=0, factor=1,
            bands=("B04", "B08"), seed=1, gain=1.0) -> Scene:  # fmt: skip
    rng = np.random.default_rng([seed, *name.encode()])
    ground = {bands[0]: texture(seed, SIZE, 300), bands[1]: 0.5 - 0.8 * texture(seed, SIZE, 300)}
    box_ = WIDE
    values = {}
    for band, image in ground.items():
        there = gain * moved(image, shift)
        if clouds is not None:
            there[clouds] = np.nan
        values[band] = there + rng.normal(0, 0.003, there.shape)
    if factor > 1:
        values = {b: averaged(v, factor) for b, v in values.items()}
        box_ = WIDE.zoom_out(factor)
    item = write_item(folder, name, values, box_, source=source, added=added)
    return Scene(item, (), None)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    return [optical(folder, n, s) for n, s in TRUE.items()]


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs the stage on given scenes; the content of shifts.json."""

    def run(scenes, *, clear=None, sources=None, **settings) -> dict:
        campaign = load_campaign(ROOT / "config/campaigns/rehearsal.yaml")
        keys = sources or list(dict.fromkeys(str(s.item["source"]) for s in scenes))
        campaign = campaign.model_copy(
            update={
                "coregister": campaign.coregister.model_copy(update=settings),
                "sources": [campaign.sources[0].model_copy(update={"source": k}) for k in keys],
            }
        )
        stats = {s.item["id"]: {"clear_pct": (clear or {}).get(s.item["id"], 90.0)} for s in scenes}
        monkeypatch.setattr(shifts, "gather_scenes", lambda c, decided: list(scenes))
        monkeypatch.setattr(shifts, "mask_statistics", lambda c, g: stats)
        monkeypatch.setattr(shifts, "SHIFTS", tmp_path / "shifts.json")
        shifts.measure_shifts(campaign, GRID)
        return json.loads((tmp_path / "shifts.json").read_text())

    return run


def table(result, names=TRUE) -> np.ndarray:
    return np.array([[result["shifts"][n][k] for k in ("dy_px", "dx_px")] for n in names])


TRUTH = np.array(list(TRUE.values()))


def test_shifts_are_found_in_the_frame_of_their_mean(measure, series):
    result = measure(series)
    assert np.abs(table(result) - (TRUTH - TRUTH.mean(axis=0))).max() < 0.03
    assert result["refused"] == {} and result["unaligned"] == {}
    assert result["pixel_m"] == 10
    for name, record in result["shifts"].items():
        assert record["field"] is None and record["reliability"] > 0.8
        # Before: the shift itself; after: read again with it, what is left of it.
        size = np.hypot(*(TRUTH[list(TRUE).index(name)] - TRUTH.mean(axis=0)))
        assert record["before_px"] == pytest.approx(size, abs=0.05)
        assert record["after_px"] < 0.06
        assert Shift.from_record(record).known


def test_two_scenes_that_are_aligned_are_not_refused(measure, series, tmp_path):
    pair = [optical(tmp_path, n, (0.0, 0.0)) for n in ("x", "y")]
    result = measure(pair)
    assert result["refused"] == {}
    assert np.abs(table(result, ("x", "y"))).max() < 0.02


def test_a_shift_that_does_not_mend_a_scene_is_not_applied(measure, series, monkeypatch):
    solve = shifts._Campaign.solve

    def worse(self):
        found = solve(self)
        name = min(found)
        found[name].before_px, found[name].after_px = 0.9, 1.2
        return found

    monkeypatch.setattr(shifts._Campaign, "solve", worse)
    record = measure(series)
    name = min(record["shifts"])
    one = record["shifts"][name]
    assert (one["dy_px"], one["dx_px"], one["after_px"]) == (0, 0, 0.9)
    assert name not in record["refused"]
    assert any(s["dy_px"] for k, s in record["shifts"].items() if k != name)


def test_one_scene_alone_is_neither_measured_nor_refused(measure, series):
    result = measure(series[:1])
    assert result["shifts"] == {} and result["refused"] == {}
    assert measure(series, enabled=False)["shifts"] == {}


def test_the_clearest_or_the_median_scene_can_be_the_frame(measure, series):
    result = measure(series, reference="clearest", clear={"c": 99.0})
    assert np.abs(table(result) - (TRUTH - TRUTH[2])).max() < 0.03
    assert result["shifts"]["c"]["dy_px"] == pytest.approx(0, abs=1e-9)
    result = measure(series, reference="median")
    assert np.abs(table(result) - (TRUTH - np.median(TRUTH, axis=0))).max() < 0.03


def test_a_given_image_is_the_frame(measure, series, tmp_path):
    path = tmp_path / "reference.tif"
    fine = moved(texture(1, SIZE, 300), (0.5, 0.5)) * 1000
    with rasterio.open(
        path, "w", driver="GTiff", height=SIZE, width=SIZE, count=1, dtype="float32",
        crs="EPSG:32633", transform=WIDE.affine,
    ) as dst:  # fmt: skip
        dst.write(fine.astype(np.float32), 1)
    result = measure(series, reference=str(path))
    assert np.abs(table(result) - (TRUTH - 0.5)).max() < 0.04
    # One scene alone can be held against it.
    alone = measure(series[:1], reference=str(path))
    assert table(alone, ["a"])[0] == pytest.approx(TRUTH[0] - 0.5, abs=0.04)


def test_a_given_image_elsewhere_is_an_error_that_names_it(measure, series, tmp_path):
    path = tmp_path / "elsewhere.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=50, width=50, count=1, dtype="float32",
        crs="EPSG:32633", transform=Affine(10, 0, 900_000, 0, -10, 9_000_000), nodata=-1,
    ) as dst:  # fmt: skip
        dst.write(np.ones((1, 50, 50), np.float32))
    with pytest.raises(SceneError, match=r"covers none[\s\S]*clearest"):
        measure(series, reference=str(path))
    with pytest.raises(SceneError, match=r"missing\.tif"):
        measure(series, reference=str(tmp_path / "missing.tif"))


def test_a_scene_that_cannot_be_aligned_is_dropped_or_kept_and_named(measure, series, tmp_path):
    lost = optical(tmp_path, "lost", (0.0, 0.0), seed=77)  # another place
    result = measure([*series, lost])
    assert (
        set(result["refused"]) == {"lost"}
        and "no shift of at most 20 m" in result["refused"]["lost"]
    )
    assert result["shifts"]["lost"]["dy_px"] is None
    assert np.abs(table(result) - (TRUTH - TRUTH.mean(axis=0))).max() < 0.04
    kept = measure([*series, lost], on_unaligned="keep")
    assert kept["refused"] == {} and kept["unaligned"]["lost"].startswith("kept unaligned")


def test_a_shift_beyond_the_maximum_is_refused(measure, series, tmp_path):
    far = optical(tmp_path, "far", (4.0, 0.0))
    result = measure([*series, far], max_shift_m=20)
    assert set(result["refused"]) == {"far"}


def test_scenes_without_a_band_to_compare_are_an_error_that_says_so(measure, tmp_path):
    odd = [optical(tmp_path, n, (0, 0), bands=("B05", "B06")) for n in "pq"]
    with pytest.raises(SceneError, match=r"no band in common[\s\S]*B04"):
        measure(odd)


def test_scenes_that_are_too_cloudy_are_not_measured(measure, series):
    result = measure(series, clear={"d": 1.0})
    assert set(result["shifts"]) == {"a", "b", "c"}


def test_later_scenes_change_nothing_of_those_before(measure, series, tmp_path):
    first = measure(series[:3])
    late = optical(tmp_path, "late", (0.7, -0.5), added=1)
    later = optical(tmp_path, "later", (-0.4, 0.4), added=2)
    result = measure([*series[:3], late])
    assert {n: result["shifts"][n] for n in "abc"} == first["shifts"]
    want = np.array([(0.7, -0.5)]) - TRUTH[:3].mean(axis=0)
    assert np.abs(table(result, ["late"]) - want).max() < 0.03
    assert result["shifts"]["late"]["after_px"] < 0.06 < result["shifts"]["late"]["before_px"]
    again = measure([*series[:3], late, later])
    assert {n: again["shifts"][n] for n in ("a", "b", "c", "late")} == result["shifts"]


def test_another_sensor_is_aligned_to_the_first(measure, series, tmp_path):
    coarse = [
        optical(tmp_path, n, s, source="landsat-c2-l2", factor=3, bands=("red", "nir08"), gain=0.9)
        for n, s in (("l1", (1.1, -0.9)), ("l2", (0.5, -0.3)))
    ]
    result = measure([*series, *coarse])
    assert result["refused"] == {}
    want = np.array([(1.1, -0.9), (0.5, -0.3)]) - TRUTH.mean(axis=0)
    # Tenths of its own 30 m pixel are .3 px here.
    assert np.abs(table(result, ["l1", "l2"]) - want).max() < 0.15
    assert np.abs(table(result) - (TRUTH - TRUTH.mean(axis=0))).max() < 0.03


def test_radar_is_aligned_when_asked(measure, series, tmp_path):
    rng = np.random.default_rng(5)
    ground = (
        0.02
        + 0.3
        * np.random.default_rng(6).permutation(64)[(texture(1, SIZE, 300) * 150).astype(int) % 64]
        / 64
    )
    radar = []
    for n in range(8):
        power = moved(ground, (0.9, -0.8), 1.0) * rng.gamma(4, 0.25, ground.shape)
        bands = {"VV": power, "VH": power * 0.2 * rng.gamma(4, 0.25, ground.shape)}
        item = write_item(tmp_path, f"s1-{n}", bands, WIDE, source="sentinel-1-rtc", unit="power")
        radar.append(Scene(item, (), None))
    assert set(measure([*series, *radar])["shifts"]) == set(TRUE)
    result = measure([*series, *radar], sar=True)
    want = np.array([(0.9, -0.8)] * 8) - TRUTH.mean(axis=0)
    assert np.abs(table(result, [f"s1-{n}" for n in range(8)]) - want).max() < 0.25


def test_local_shifts_are_found_and_take_the_distortion_away(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(looks, "spacing_for", lambda shape: 64)
    n = SIZE
    rows, cols = np.meshgrid(np.arange(n, dtype=float), np.arange(n, dtype=float), indexing="ij")
    bend = 0.5 * np.sin(2 * np.pi * rows / 600), 0.4 * np.cos(2 * np.pi * cols / 600)
    fine = ndimage.gaussian_filter(texture(1, n, 800), 0.7)
    rng = np.random.default_rng(9)
    scenes = []
    for name, size in (("a", 0.0), ("b", 0.0), ("c", 0.0), ("bent", 1.0)):
        where = np.stack([rows - size * bend[0], cols - size * bend[1]])
        image = ndimage.map_coordinates(fine, where, order=3, mode="nearest")
        values = {b: image + rng.normal(0, 0.002, image.shape) for b in ("B04", "B08")}
        scenes.append(Scene(write_item(tmp_path, name, values, WIDE), (), None))
    result = measure(scenes, local=True)
    record = result["shifts"]["bent"]["field"]
    assert record is not None and record["n_points"] >= 12
    assert result["shifts"]["bent"]["after_px"] < 0.1 < result["shifts"]["bent"]["before_px"]
    images = []
    for name, scene in (("a", scenes[0]), ("bent", scenes[3])):
        found = result["shifts"][name]
        field = ShiftField.from_record(found["field"]) if found["field"] else None
        # The frame is the mean of all four, so a quarter of the bend is the straight one's.
        shift = Shift.from_record(found)
        images.append(
            [read_placed(scene.item, "B04", GRID.geobox, shift, f) for f in (None, field)]
        )
    inner = (slice(40, -40),) * 2
    before, after = (np.nanstd((images[1][k] - images[0][k])[inner]) for k in (0, 1))
    assert after < 0.6 * before  # two thirds of the rest is the noise of the scenes


# --- blocks ----------------------------------------------------------------------------------


def test_small_areas_are_one_block_and_large_ones_a_few(series):
    look = choose_blocks(series, GRID, 1, len(series))
    assert len(look.blocks) == 1 and look.shape == (300, 300)
    large = CampaignGrid.from_aoi(box(300_000, 4_880_000, 420_000, 5_000_000), "EPSG:32633")
    look = choose_blocks(series, large, 1, 24)
    assert 4 <= len(look.blocks) <= 8
    assert look.shape[0] * look.shape[1] * 2 * 24 <= 2 * looks._VALUES
    boxes = [b.extent.geom for b in look.blocks]
    assert all(
        not a.buffer(-1).intersects(b.buffer(-1)) for a in boxes for b in boxes if a is not b
    )


def test_every_scene_is_seen_in_some_block():
    rng = np.random.default_rng(1)
    shares = rng.uniform(0, 1, (10, 40)) * 0.2
    shares[3] = 0
    shares[3, 17] = 0.9  # one scene is clear in one place only
    assert 17 in looks._greedy(shares)


def test_blocks_lie_below_each_other_with_gaps(series):
    look = replace(
        choose_blocks(series, GRID, 1, 4),
        blocks=(GRID.geobox[0:100, 0:120], GRID.geobox[200:300, 200:320]),
    )
    image = read_look(series[0], look)
    assert image.shape == (2, 216, 120)
    assert np.isnan(image[:, 100:116]).all() and np.isfinite(image[:, 116:]).all()
    direct = read_placed(series[0].item, "B04", GRID.geobox[200:300, 200:320], None)
    np.testing.assert_array_equal(image[0, 116:], direct)


def test_scenes_are_compared_on_the_coarsest_of_their_pixels(series, tmp_path):
    coarse = optical(
        tmp_path, "l", (0, 0), source="landsat-c2-l2", factor=3, bands=("red", "nir08")
    )
    assert pixels_per(series, GRID) == 1
    assert pixels_per([series[0], coarse], GRID) == 3
    assert isinstance(WIDE, GeoBox)
