from __future__ import annotations

import math

import numpy as np
import pytest
from odc.geo.geobox import GeoBox
from scipy import ndimage
from skimage.data import camera
from skimage.registration import phase_cross_correlation

from terraloom.errors import SceneError
from terraloom.preprocess.coregister import (
    Shift,
    estimate_shift,
    phase_shift,
    shifted_geobox,
    solve_shifts,
)


def _fourier(image: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    return np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(image), shift)).real


@pytest.mark.parametrize(
    ("shift", "upsample"), [((-7, 12), 1), ((-7, 12), 10), ((-2.4, 1.32), 100), ((0.05, 0.1), 100)]
)
def test_e7a_sub_pixel_shifts_of_the_camera_image(shift, upsample):
    image = camera().astype(float)
    moved = _fourier(image, shift)
    y, x, peak = phase_shift(image, moved, max_shift_px=20, upsample=upsample)
    assert (y, x) == pytest.approx(shift, abs=0.0101)
    assert peak > 20
    # scikit-image gives the shift to apply to the moving image: the opposite sign.
    theirs, _, _ = phase_cross_correlation(image, moved, upsample_factor=upsample)
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
    # methods.md: .080/.021 with phase normalisation; no worse than that here.
    assert (rmse < [0.08, 0.05]).all(), rmse


def _texture(seed: int, n: int = 420) -> np.ndarray:
    """Fields of random brightness: what a scene at 10 m looks like; (N, N)."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, n, (400, 2))
    from scipy.spatial import cKDTree

    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
    _, label = cKDTree(seeds).query(grid)
    return rng.uniform(0.05, 0.4, 400)[label].reshape(n, n)


def _scene(fine: np.ndarray, shift: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    moved = ndimage.shift(ndimage.gaussian_filter(fine, 0.7), shift, order=3, mode="nearest")
    return moved + rng.normal(0, 0.004, fine.shape)


def test_season_and_clouds_do_not_disturb():
    fine = _texture(1)
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
    fine = _texture(3)
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
    fine = _texture(6)
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
    fine = _texture(9)
    rng = np.random.default_rng(10)
    images = [_scene(fine, s, rng) for s in ((0.5, 0.0), (0.5, 0.25))]
    valid = [np.ones(fine.shape, dtype=bool)] * 2
    found = solve_shifts(images, valid, reference=_scene(fine, (0, 0), rng))
    assert (found[0].dy_px, found[0].dx_px) == pytest.approx((0.5, 0.0), abs=0.05)
    assert (found[1].dy_px, found[1].dx_px) == pytest.approx((0.5, 0.25), abs=0.05)


def test_an_overcast_scene_is_unknown_and_leaves_the_others_alone():
    fine = _texture(11)
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

    fine = _texture(13, 200)
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
