"""The simulator keeps what it promises of its truth."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import geopandas as gpd
import numpy as np
import pystac
import pytest
import rasterio
from pydantic import ValidationError
from skimage.registration import phase_cross_correlation

from terraloom.acquire.simulate import optical, sar, simulate_region
from terraloom.acquire.simulate.fields import fractal, move, stream
from terraloom.acquire.simulate.landscape import (
    LEGEND,
    SCENE_MARGIN_PX,
    aoi_geobox,
    build_landscape,
    class_map,
    height_map,
)
from terraloom.config.simulation import Simulation
from terraloom.io import sha256
from terraloom.legend import read_legend

SIM = Simulation(
    size_px=384, optical_dates=5, sar_dates=1, seed=7, label_share_pct=40, label_change_pct=10
)


def files(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): sha256(p) for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_region(SIM, tmp_path_factory.mktemp("sim") / "region").parent


@pytest.fixture(scope="module")
def truth(region: Path) -> dict:
    return json.loads((region / "truth" / "truth.json").read_text())


@pytest.fixture(scope="module")
def land():
    return build_landscape(SIM)


@pytest.fixture(scope="module")
def scenes(land):
    return optical.optical_scenes(SIM, land)


def test_same_seed_same_bytes_and_older_region_is_replaced(region, tmp_path):
    out = tmp_path / "again"
    (out / "left-over").mkdir(parents=True)
    simulate_region(SIM, out)
    assert files(out) == files(region)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_another_seed_is_another_landscape(land):
    other = build_landscape(SIM.model_copy(update={"seed": 8}))
    assert (class_map(other, 0) != class_map(land, 0)).mean() > 0.5


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("terraloom.acquire.simulate.write._write_truth", fail)
    monkeypatch.setattr("terraloom.acquire.simulate.write.optical_scenes", lambda *_: [])
    monkeypatch.setattr("terraloom.acquire.simulate.write.sar_scenes", lambda *_: [])
    with pytest.raises(KeyboardInterrupt):
        simulate_region(SIM, tmp_path / "region")
    assert list(tmp_path.iterdir()) == []


def test_catalogue_is_relative_complete_and_movable(region, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(region, moved)
    catalogue = pystac.Catalog.from_file(str(moved / "catalog.json"))
    items = {i.id: i for i in catalogue.get_items(recursive=True)}
    assert len(items) == SIM.optical_dates + SIM.sar_dates + 1
    assert {i.collection_id for i in items.values()} == {"sim-s2-l2a", "sim-s1-rtc", "sim-dem"}
    for item in items.values():
        for band, asset in item.assets.items():
            assert asset.href.startswith("./")
            path = Path(asset.get_absolute_href())
            assert moved in path.parents
            fields = asset.extra_fields
            assert fields["file:size"] == path.stat().st_size
            assert fields["file:checksum"] == "1220" + sha256(path)
            with rasterio.open(path) as src:
                assert list(src.shape) == fields["proj:shape"]
                assert list(src.transform[:6]) == fields["proj:transform"]
                assert str(src.crs) == fields["proj:code"]
                assert src.nodata == fields["raster:bands"][0]["nodata"], band
    scene = next(i for i in items.values() if i.collection_id == "sim-s2-l2a")
    assert set(scene.assets) == set(optical.BANDS)
    assert {"eo:cloud_cover", "view:sun_azimuth", "view:sun_elevation"} <= set(scene.properties)


def test_both_sides_of_the_offset_decode_to_equal_reflectance(region, land, scenes):
    before = [s for s in scenes if s.when < date(2022, 1, 25)]
    assert len(before) >= 2
    assert len(scenes) > len(before)
    for scene in (before[-1], scenes[-1]):
        folder = region / "sim-s2-l2a" / scene.id
        record = json.loads((folder / f"{scene.id}.json").read_text())
        raster = record["assets"]["B04"]["raster:bands"][0]
        late = scene.when >= date(2022, 1, 25)
        assert raster["offset"] == pytest.approx(-0.1 if late else 0.0)
        assert record["properties"]["s2:processing_baseline"] == ("04.00" if late else "03.01")
        with rasterio.open(folder / "B04.tif") as src:
            value = src.read(1) * raster["scale"] + raster["offset"]
        sky = optical.make_sky(SIM, land, scene)
        drawn = dict(optical.render(SIM, land, scene, sky))["B04"]
        # What the older encoding cannot hold, a reflectance below one step, is left out.
        assert np.abs((value - drawn)[drawn > 1e-4]).max() < 0.51e-4 + 1e-6


def test_encoding_never_writes_nodata_and_inverts():
    value = np.array([-0.05, 0.0, 0.1234, 1.2], dtype=np.float32)
    for offset in (0, 1000):
        dn = optical.encode_dn(value, offset)
        assert dn.min() >= 1
        back = optical.decode_dn(dn, offset)
        assert back[2:] == pytest.approx(value[2:], abs=1e-6)
    assert np.isnan(optical.decode_dn(np.zeros(1, np.uint16), 1000)).all()


def test_shadow_falls_away_from_the_sun():
    # Sun in the south at 45 degrees: a cloud 1000 m up throws its shadow 100 px north (up).
    assert optical.shadow_offset_px(1000, 180, 45) == pytest.approx((-100, 0), abs=1e-6)
    assert optical.shadow_offset_px(1000, 90, 45) == pytest.approx((0, -100), abs=1e-6)


def test_shadow_raster_is_displaced_by_height_times_tangent(land, scenes):
    scene = max(scenes, key=lambda s: s.sun_elevation_deg)
    scene = optical.Scene(**{**scene.__dict__, "cover": 0.3, "cloud_height_m": 1200.0})
    sky = optical.make_sky(SIM, land, scene)
    found, _, _ = phase_cross_correlation(
        sky.shadow, sky.cloud, reference_mask=np.ones_like(sky.cloud, bool), overlap_ratio=0.5
    )
    zenith, azimuth = np.radians([90 - scene.sun_elevation_deg, scene.sun_azimuth_deg])
    length_px = 1200 * np.tan(zenith) / 10
    want = (np.cos(azimuth) * length_px, -np.sin(azimuth) * length_px)
    assert length_px > 20
    assert np.abs(found - want).max() <= 1


def test_speckle_has_the_variation_of_its_looks():
    looks = SIM.sar_looks
    noise = sar.speckle(stream(1, "test"), (400, 400), looks)
    assert noise.mean() == pytest.approx(1, abs=0.01)
    assert noise.std() / noise.mean() == pytest.approx(1 / np.sqrt(looks), rel=0.05)


def test_speckle_in_the_delivered_scene(region, land):
    scene = sar.sar_scenes(SIM)[0]
    with rasterio.open(region / "sim-s1-rtc" / scene.id / "VV.tif") as src:
        power = src.read(1)
    cut = slice(6, -6)
    clean = 10 ** (sar.backscatter_db(land, scene, "VV")[cut, cut] / 10)
    ratio = power / clean
    assert ratio.std() / ratio.mean() == pytest.approx(SIM.sar_looks**-0.5, rel=0.05)


def test_moving_a_field_moves_its_content():
    field = fractal(stream(3, "test"), (128, 128), scale_px=30, power=3)
    whole = move(field, (2.0, -3.0))
    still = move(field, (0.0, 0.0))
    inner = slice(20, -20)
    assert np.allclose(whole[22:-18, 17:-23], still[inner, inner], atol=1e-5)


def test_true_shift_is_found_in_the_clear_scenes(region, truth, land, scenes):
    clear = [s for s in scenes if truth["scenes"][s.id]["cloud_pct"] < 3]
    assert max(np.hypot(*s.shift) for s in clear) > 0.15
    for scene in clear:
        with rasterio.open(region / "sim-s2-l2a" / scene.id / "B08.tif") as src:
            seen = src.read(1).astype(float)
        still = dict(optical.surface(land, scene))["B08"][6:-6, 6:-6]
        found, _, _ = phase_cross_correlation(seen, still, upsample_factor=100, normalization=None)
        assert found == pytest.approx(truth["shifts"][scene.id], abs=0.1)


def test_shifts_are_clipped(land):
    wild = SIM.model_copy(update={"shift_sd_px": 1.2, "optical_dates": 60})
    shifts = np.array([s.shift for s in optical.optical_scenes(wild, land)])
    assert np.abs(shifts).max() == pytest.approx(1.2)


def test_cloud_truth_matches_what_the_scene_shows(region, truth, scenes):
    scene = max(scenes, key=lambda s: truth["scenes"][s.id]["cloud_pct"])
    with rasterio.open(region / "truth" / "cloud" / f"{scene.id}.tif") as src:
        codes = src.read(1)
    with rasterio.open(region / "sim-s2-l2a" / scene.id / "B02.tif") as src:
        blue = src.read(1).astype(float) - scene.offset_dn
        assert src.shape == codes.shape
    assert 100 * (codes == 1).mean() == pytest.approx(
        truth["scenes"][scene.id]["cloud_pct"], abs=1e-3
    )
    clear, cloud, shadow = (np.median(blue[codes == k]) for k in (0, 1, 2))
    assert cloud > 3 * clear
    assert shadow < 0.9 * clear
    snowy = next(s for s in scenes if s.snow)
    with rasterio.open(region / "truth" / "cloud" / f"{snowy.id}.tif") as src:
        assert (src.read(1) == 3).mean() > 0.2


def test_label_noise_and_age_are_as_told(region, truth):
    labels = gpd.read_file(region / "labels.gpkg", layer="landcover").set_index("parcel_id")
    parcels = gpd.read_file(region / "truth" / "parcels.gpkg").set_index("parcel_id")
    land = labels.join(parcels[["class_before", "class_after", "change_date"]], how="inner")
    old = land.change_date.isna() | (land.label_date < land.change_date)
    true = land.class_before.where(old, land.class_after)
    wrong = set(land.index[land.class_name != true])
    noisy = set(truth["noisy_label_ids"])
    assert wrong == noisy & set(land.index)
    assert 100 * len(noisy) / len(labels) == pytest.approx(SIM.label_noise_pct, abs=1)
    stale = set(land.index[old & land.change_date.notna()])
    assert stale == set(truth["outdated_label_ids"])
    assert stale
    assert set(labels.class_name) == set(LEGEND.names)
    area = gpd.read_file(region / "aoi.gpkg").geometry[0]
    whole = parcels.geometry.within(area).sum()
    assert 100 * len(labels) / whole == pytest.approx(SIM.label_share_pct, abs=4)


def test_labels_lie_in_the_area_and_on_their_class(region, truth):
    area = gpd.read_file(region / "aoi.gpkg").geometry[0]
    labels = gpd.read_file(region / "labels.gpkg", layer="landcover")
    plots = gpd.read_file(region / "labels.gpkg", layer="height")
    outlines = gpd.read_file(region / "labels.gpkg", layer="boundary")
    for table in (labels, plots, outlines):
        assert table.geometry.is_valid.all()
        assert table.within(area.buffer(0.01)).all()
    with rasterio.open(region / "truth" / "landcover.tif") as src:
        points = labels.geometry.representative_point()
        codes = np.array([v[0] for v in src.sample(zip(points.x, points.y, strict=True))])
    names = np.array(["", *LEGEND.names])[codes]
    doubtful = labels.parcel_id.isin(truth["noisy_label_ids"] + truth["outdated_label_ids"])
    assert (names == labels.class_name)[~doubtful].all()
    with rasterio.open(region / "truth" / "height.tif") as src:
        center = plots.geometry.centroid
        height = np.array([v[0] for v in src.sample(zip(center.x, center.y, strict=True))])
    assert np.median(np.abs(height - plots.height_m)) < 3 * SIM.height_noise_m
    assert (plots.height_m == 0).any()


def test_truth_is_on_the_grid_of_the_area(region, land):
    box = aoi_geobox(SIM)
    assert [v % 60 for v in box.boundingbox.bbox] == [0, 0, 0, 0]
    assert gpd.read_file(region / "aoi.gpkg").total_bounds == pytest.approx(box.boundingbox.bbox)
    for name in ("landcover", "height", "boundary", "change"):
        with rasterio.open(region / "truth" / f"{name}.tif") as src:
            assert src.shape == box.shape
            assert tuple(src.bounds) == pytest.approx(box.boundingbox.bbox)
    assert read_legend(region / "classes.csv") == LEGEND
    assert "SIMULATED" in (region / "README.txt").read_text()
    last = land.day(date(2022, 10, 31))
    forest = np.isin(class_map(land, last), (1, 2))
    height = height_map(land, last)
    assert (height[~forest] == 0).all()
    assert height[forest].min() >= 5
    assert height[forest].max() <= 30
    assert SCENE_MARGIN_PX * 10 % 60 == 0


def test_settings_are_bounded():
    for bad in ({"size_px": 500}, {"sar_looks": 0}, {"cloud_share": 1.5}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            Simulation(**bad)
    assert all(f.description for f in Simulation.model_fields.values())
