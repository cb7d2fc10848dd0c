"""Cubes of any sensor, as composites or dates, filled or not; blocks make no difference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rioxarray  # noqa: F401  (the accessor .rio)
from affine import Affine
from odc.geo.geobox import GeoBox

from support.cubes import (
    BANDS,
    GEOBOX,
    LEFT,
    SIDE,
    TOP,
    asset,
    build,
    campaign,
    cloud,
    optical,
    scene_of,
    table,
)
from terraloom.errors import ConfigError, SceneError
from terraloom.grid import coarsen
from terraloom.io import sha256
from terraloom.preprocess import layering
from terraloom.preprocess.channels import channel_names, cube_inputs
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.cube import (
    Scene,
)
from terraloom.preprocess.reasons import Reason

# --- reading -------------------------------------------------------------------------------------


def smooth(geobox: GeoBox) -> np.ndarray:
    """Digital numbers that depend on the place alone: a bilinear warp restores them."""
    xs, ys = np.meshgrid(np.arange(geobox.shape[1]) + 0.5, np.arange(geobox.shape[0]) + 0.5)
    x, y = geobox.affine @ (xs, ys)
    if geobox.crs != GEOBOX.crs:
        from pyproj import Transformer

        x, y = Transformer.from_crs(str(geobox.crs), "EPSG:32633", always_xy=True).transform(x, y)
    return 3000 + 2000 * np.sin((x - LEFT) / 400) * np.cos((y - TOP) / 500)


def test_a_scene_of_the_next_zone_is_read_right(tmp_path: Path) -> None:
    here = optical(tmp_path, "2023-04-01", {"B04": smooth(GEOBOX)})
    b = GEOBOX.extent.to_crs("EPSG:32632").boundingbox
    west = GeoBox((300, 300), Affine(10, 0, b.left // 10 * 10 - 300, 0, -10,
                                     b.top // 10 * 10 + 300), "EPSG:32632")  # fmt: skip
    there = dict(here.item, id="W", crs="EPSG:32632", datetime="2023-07-01T10:00:00Z",
                 assets={"B04": asset(tmp_path / "w.tif", smooth(west).astype(np.uint16), west)},
                 footprint=west.extent.to_crs("EPSG:4326").wkt)  # fmt: skip
    c = campaign({"source": "sentinel-2-l2a", "bands": ["B04"]})
    store = build(tmp_path, [here, Scene(there, here.masks, None)], c)
    x = store["s2_10"].to_numpy()[:, 0]
    assert np.isfinite(x).all()
    assert np.abs(x[1] - x[0]).max() < 4e-4, "a pixel beside would differ by .05"


def test_only_scenes_that_touch_the_tile_are_opened(tmp_path: Path) -> None:
    near = optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 3000))
    gone = {b: a | {"href": str(tmp_path / "nowhere.tif")} for b, a in near.item["assets"].items()}
    far = "POLYGON((20 52, 21 52, 21 53, 20 53, 20 52))"
    elsewhere = Scene(dict(near.item, id="F", assets=gone, footprint=far), near.masks, None)
    alone = build(tmp_path, [near])
    digest = alone.attrs["digest"]
    both = build(tmp_path, [near, elsewhere])
    assert both.attrs["digest"] == digest, "a scene elsewhere changes nothing"
    with pytest.raises(SceneError, match="item F"):
        build(tmp_path, [near, replace(elsewhere, item=dict(elsewhere.item, footprint=None))])
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("method", ["median", "medoid", "geometric_median", "best_pixel"])
def test_blocks_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rng = np.random.default_rng(5)
    scenes = [
        optical(tmp_path, f"2023-04-{d:02}",
                {b: rng.integers(1, 5000, coarsen(GEOBOX, r // 10).shape)
                 for b, r in BANDS.items()},
                cloud(slice(d * 4, d * 4 + 20), slice(30, 60)), Shift(0.3, -0.2, 1, 0, 9))
        for d in (1, 5, 9)
    ]  # fmt: skip
    c = campaign(method=method)
    build(tmp_path, scenes, c)
    whole = sha256(tmp_path / "cube.zip")
    (tmp_path / "cube.zip").unlink()
    monkeypatch.setattr(layering, "_VALUES", 3 * 192 * 32)
    build(tmp_path, scenes, c)
    assert sha256(tmp_path / "cube.zip") == whole


# --- other sensors, other pixel sizes -----------------------------------------------------------


@pytest.mark.parametrize("mask_res", [10, 20, 30, 60])
def test_masks_of_any_pixel_size_reach_pixels_of_any_size(tmp_path: Path, mask_res: int) -> None:
    """A pixel takes what touches it: every coarse pixel that a cloudy mask pixel overlaps."""
    sizes = (10, 20, 30, 60, 120, 240, 480)
    source = table(tmp_path, "any", {f"b{r}": r for r in sizes}, mask_resolution_m=mask_res)
    rng = np.random.default_rng(6)
    cloudy = rng.random((SIDE * 10 // mask_res,) * 2) < 0.01
    scene = scene_of(tmp_path, source, "2023-04-01", {f"b{r}": (r, 3000) for r in sizes},
                     (mask_res, cloudy * int(Reason.CLOUD)))  # fmt: skip
    store = build(tmp_path, [scene], campaign({"source": source}))
    fine = np.repeat(np.repeat(cloudy, mask_res // 10, 0), mask_res // 10, 1)
    for res in sizes:
        f = res // 10
        touched = fine.reshape(SIDE // f, f, SIDE // f, f).any(axis=(1, 3))
        gone = np.isnan(store[f"any_{res}"].to_numpy()[0, 0])
        assert not (gone & ~touched).any(), res
        if res % mask_res == 0 or mask_res % res == 0:
            assert np.array_equal(gone, touched), res
    assert channel_names(store)["any_480"] == ["spring/b480", "summer/b480"]


def test_sources_of_one_group_are_composed_together(tmp_path: Path) -> None:
    sources = [table(tmp_path, n, {"b": 30}, mask_resolution_m=30) for n in ("one", "two")]
    for source in sources:
        text = Path(source).read_text().replace(f"{Path(source).stem}_30", "both_30")
        Path(source).write_text(text)
    clear = (30, np.zeros((64, 64)))
    scenes = [scene_of(tmp_path, s, "2023-04-01", {"b": (30, v)}, clear)
              for s, v in zip(sources, (1000, 2000), strict=True)]  # fmt: skip
    store = build(tmp_path, scenes, campaign(*({"source": s} for s in sources)))
    assert store["both_30"].sel(period="spring").to_numpy() == pytest.approx(0.15, abs=6e-5)
    other = Path(sources[1]).read_text().replace('"b":', '"d":')
    Path(sources[1]).write_text(other)
    with pytest.raises(ConfigError, match=r"both_30 has other bands"):
        build(tmp_path, scenes, campaign(*({"source": s} for s in sources)))


def test_static_layers_have_no_time_and_indices_are_medians(tmp_path: Path) -> None:
    dem = table(tmp_path, "dem", {"h": 30}, kind="dem", unit="m", scale=1, static=True)
    ndvi = table(tmp_path, "veg", {"v": 240}, kind="index", unit="index")
    scenes = [scene_of(tmp_path, dem, "1999-01-01", {"h": (30, 123)}, scale=1.0)]
    scenes += [scene_of(tmp_path, ndvi, f"2023-04-0{d}", {"v": (240, v)})
               for d, v in ((1, 1000), (2, 9000), (3, 2000))]  # fmt: skip
    store = build(tmp_path, scenes, campaign({"source": dem}, {"source": ndvi}))
    assert store["dem_30"].dims == ("band_dem_30", "y_30", "x_30")
    assert np.all(store["dem_30"] == 123) and store["dem_30"].attrs["unit"] == "m"
    assert store["veg_240"].to_numpy()[0, 0] == pytest.approx(0.2)
    assert store["veg_240"].dtype == np.float32
    assert channel_names(store)["dem_30"] == ["h"]
    assert store.attrs["clear_pct"] == 100


# --- composites, dates, gaps ---------------------------------------------------------------------


def test_bands_of_a_pixel_come_from_one_date(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    source = table(tmp_path, "two", {"a": 10, "b": 10})
    shape = GEOBOX.shape
    values = [{"a": rng.integers(1, 5000, shape), "b": rng.integers(1, 5000, shape)}
              for _ in range(4)]  # fmt: skip
    clear = (20, np.zeros((96, 96)))
    scenes = [scene_of(tmp_path, source, f"2023-04-{n + 1:02}",
                       {b: (10, v) for b, v in look.items()}, clear)
              for n, look in enumerate(values)]  # fmt: skip
    pairs = np.stack([np.stack([v["a"], v["b"]]) for v in values])
    for method in ("medoid", "best_pixel"):
        store = build(tmp_path, scenes, campaign({"source": source}, method=method))
        dn = np.rint(store["two_10"].to_numpy()[0] * 1e4)
        assert (pairs == dn).all(axis=1).any(axis=0).all(), method


def test_best_pixel_shuns_the_neighbourhood_of_clouds(tmp_path: Path) -> None:
    """Both dates are equally far from the middle of spring; one has a cloud to the west."""
    mask = cloud(slice(None), slice(0, 8))
    scenes = [
        optical(tmp_path, "2023-04-15", {"B04": 1000}, mask),
        optical(tmp_path, "2023-04-16", {"B04": 2000}),
    ]
    c = campaign({"source": "sentinel-2-l2a", "bands": ["B04"]}, method="best_pixel")
    x = build(tmp_path, scenes, c)["s2_10"].to_numpy()[0, 0]
    assert x[:, :40] == pytest.approx(0.2, abs=1e-4)
    assert x[:, 150:] == pytest.approx(0.1, abs=1e-4), "equal scores: the darker"


def test_a_series_keeps_every_day(tmp_path: Path) -> None:
    days = ("2023-04-01", "2023-04-11", "2023-07-02")
    scenes = [optical(tmp_path, d, dict.fromkeys(BANDS, 1000 * (n + 1)))
              for n, d in enumerate(days)]  # fmt: skip
    twin = optical(tmp_path, "2023-04-11", dict.fromkeys(BANDS, 4000))
    twin = replace(twin, item=dict(twin.item, id="twin"))
    (tmp_path / "o").mkdir()
    outside = optical(tmp_path / "o", "2023-10-01", dict.fromkeys(BANDS, 9000))
    far = "POLYGON((20 52, 21 52, 21 53, 20 53, 20 52))"
    elsewhere = Scene(dict(outside.item, id="E", datetime="2023-05-01T10:00:00Z", footprint=far),
                      outside.masks, None)  # fmt: skip
    store = build(tmp_path, [*scenes, twin, outside, elsewhere], campaign(series="dates"))
    assert store["s2_10"].dims == ("time_s2_10", "band_s2_10", "y_10", "x_10")
    assert channel_names(store)["s2_10"] == [
        f"{d}/B04" for d in ("2023-04-01", "2023-04-11", "2023-05-01", "2023-07-02")
    ], "all tiles have the same days; nothing outside the periods"
    x = cube_inputs(store)["s2_10"]
    assert x[[0, 1, 3]].mean(axis=(1, 2)) == pytest.approx([0.1, 0.4, 0.3], abs=1e-4)
    assert np.isnan(x[2]).all(), "seen elsewhere on that day"
    assert store["clear_count"].sel(period="spring").to_numpy().max() == 3


@pytest.mark.parametrize("fill", ["linear", "whittaker"])
def test_gaps_are_filled_marked_and_never_at_the_ends(tmp_path: Path, fill: str) -> None:
    hidden = cloud(slice(0, 20), slice(None))
    scenes = [
        optical(tmp_path, "2023-04-01", {"B04": 1000}, cloud(slice(60, 80), slice(None))),
        optical(tmp_path, "2023-04-21", {"B04": 9000}, hidden),
        optical(tmp_path, "2023-05-11", {"B04": 3000}),
    ]
    c = campaign({"source": "sentinel-2-l2a", "bands": ["B04"]}, series="dates", fill=fill,
                 fill_max_days=25)  # fmt: skip
    store = build(tmp_path, scenes, c)
    x, marks = store["s2_10"].to_numpy()[:, 0], store["filled_s2_10"].to_numpy()[:, 0]
    assert x[1, :40] == pytest.approx(0.2, abs=1e-4), "between .1 and .3"
    assert x[1, 40:] == pytest.approx(0.9, abs=1e-4), "observed: kept"
    assert np.isnan(x[0, 120:160]).all(), "nothing before the first observation"
    assert marks[1, :40].all() and marks.sum() == marks[1, :40].sum()
    bits = store["reasons"].to_numpy()
    assert np.all(bits[:40] == Reason.FILLED) and not bits[40:].any()
    assert store.attrs["clear_pct"] == 100
    assert list(cube_inputs(store)) == ["s2_10"], "marks are no input"
    near = c.model_copy(update={"cube": c.cube.model_copy(update={"fill_max_days": 19.0})})
    assert np.isnan(build(tmp_path, scenes, near)["s2_10"].to_numpy()[1, 0, :40]).all()


def test_filtered_radar_has_more_looks(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    scenes = [
        scene_of(tmp_path, "sentinel-1-rtc", f"2023-04-{n + 1:02}",
                 {"VV": (10, 0.1 * rng.gamma(4.4, 1 / 4.4, GEOBOX.shape))},
                 dtype=np.float32, scale=1.0, unit="power", nodata=-9999)
        for n in range(4)
    ]  # fmt: skip
    source = {"source": "sentinel-1-rtc", "bands": ["VV"]}
    looks = {}
    for speckle in ("none", "multitemporal"):
        store = build(tmp_path, scenes, campaign(source, series="dates", speckle=speckle))
        power = 10 ** (store["s1_10"].to_numpy()[0, 0] / 10)
        assert power.mean() == pytest.approx(0.1, rel=0.02)
        looks[speckle] = power.mean() ** 2 / power.var()
    assert looks["none"] == pytest.approx(4.4, rel=0.05)
    assert looks["multitemporal"] > 3 * looks["none"]
    assert store["s1_10"].attrs["unit"] == "dB" and store["s1_10"].attrs["kind"] == "sar"
