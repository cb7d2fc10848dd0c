from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage

from support.alignment import averaged, fractal
from terraloom.preprocess.coregister import UNKNOWN, Shift
from terraloom.preprocess.field import ShiftField, fit_field, measure_field, spacing_for, tie_points
from terraloom.preprocess.matching import TiePoints

N = 1024
BOX = GeoBox((N, N), Affine(10, 0, 300_000, 0, -10, 5_000_000), "EPSG:32633")
SHIFT = Shift(0.3, -0.2, 1.0, 0.0, 9)


def truth(rows, cols):
    """Smooth distortion of about half a pixel around a whole shift of (.3, -.2)."""
    down = 0.3 + 0.5 * np.sin(2 * np.pi * rows / 1500 + 0.3) * np.cos(2 * np.pi * cols / 1500)
    right = -0.2 + 0.5 * np.cos(2 * np.pi * (cols + 0.4 * rows) / 1500)
    return down, right


@pytest.fixture(scope="module")
def pair():
    k, n = 2, N
    fine = fractal(n * k, seed=7)
    at = (np.arange(n * k) + 0.5) / k - 0.5
    rows, cols = np.meshgrid(at, at, indexing="ij", sparse=True)
    down, right = truth(rows, cols)
    index = np.arange(n * k)
    where = np.stack([index[:, None] - down * k, index[None] - right * k])
    there = ndimage.map_coordinates(fine, where, order=3, mode="reflect")
    rng = np.random.default_rng(1)
    images = [averaged(a, k) + 0.01 * rng.standard_normal((n, n)) for a in (fine, there)]
    return tuple(a[None].astype(np.float32) for a in images)


def expected(rows, cols):
    """The scene's pixel p shows the ground of p - d(p): seen from the ground, iterated once."""
    down, right = truth(rows, cols)
    return truth(rows + down, cols + right)


def test_a_smooth_distortion_is_found_within_the_published_errors(pair):
    field = measure_field(*pair, None, SHIFT, BOX, max_shift_px=3)
    assert field is not None and field.n_points >= 40
    rows, cols = np.meshgrid(np.arange(N), np.arange(N), indexing="ij")
    down, right = field.on(BOX)
    want = expected(rows, cols)
    error = np.hypot(down - want[0], right - want[1])
    inside = error[96:-96, 96:-96]
    assert np.median(inside) <= 0.02
    assert np.percentile(inside, 95) <= 0.06
    # Better than the peers' whole-scene shift by far.
    assert np.median(inside) < 0.1 * np.median(np.hypot(want[0] - 0.3, want[1] + 0.2))


def test_outliers_and_clouds_are_left_out(pair):
    reference, moving = pair
    wrong = moving.copy()
    wrong[:, 300:520, 500:800] = np.roll(moving, (2, -2), axis=(1, 2))[:, 300:520, 500:800]
    ok = np.ones((N, N), bool)
    ok[600:900, 100:500] = False
    wrong[:, ~ok] = 5.0
    points = tie_points(reference, wrong, ok, SHIFT, max_shift_px=4)
    # A cloud leaves windows without an answer, a displaced patch leaves wrong ones.
    assert np.isnan(points.shifts).any()
    field = fit_field(points, SHIFT, BOX, max_shift_px=4)
    assert field is not None and field.n_rejected >= 1
    rows, cols = np.meshgrid(np.arange(100, N - 100), np.arange(100, N - 100), indexing="ij")
    want = expected(rows, cols)
    down, right = (v[100:-100, 100:-100] for v in field.on(BOX))
    error = np.hypot(down - want[0], right - want[1])
    assert np.median(error) < 0.03 and error.max() < 0.5


def _points(rows, cols, shifts) -> TiePoints:
    n = len(rows)
    return TiePoints(np.asarray(rows, float), np.asarray(cols, float), np.asarray(shifts, float),
                     np.full(n, 20.0), np.ones(n))  # fmt: skip


def _grid(lo=200, hi=800, step=100):
    rows, cols = np.meshgrid(np.arange(lo, hi + 1, step), np.arange(lo, hi + 1, step))
    return rows.ravel(), cols.ravel()


def test_nothing_is_extrapolated_beyond_the_tie_points():
    rows, cols = _grid()
    slope = np.column_stack([0.3 + (rows - 500) * 1e-3, np.full(len(rows), -0.2)])
    field = fit_field(_points(rows, cols, slope), SHIFT, BOX, max_shift_px=3)
    assert field is not None
    down, right = field.on(BOX)
    assert down[500, 500] == pytest.approx(0.3, abs=0.01)
    assert down[700, 500] == pytest.approx(0.5, abs=0.02)
    # A spline would reach .82 in the last row; far from the hull the global shift stands.
    assert down[-1, 500] == pytest.approx(0.3, abs=0.05)
    assert down[0, 0] == pytest.approx(0.3, abs=0.02)
    assert down.max() < 0.66 and down.min() > -0.06
    assert np.allclose(right, -0.2, atol=0.01)
    # From the hull outwards it fades, without a step.
    assert np.abs(np.diff(down, axis=0)).max() < 0.02


def test_a_field_that_tells_nothing_is_none():
    rows, cols = _grid()
    rng = np.random.default_rng(2)
    noise = rng.normal((0.3, -0.2), 0.02, (len(rows), 2))
    assert fit_field(_points(rows, cols, noise), SHIFT, BOX, max_shift_px=3) is None
    few = _points(rows[:8], cols[:8], noise[:8])
    assert fit_field(few, SHIFT, BOX, max_shift_px=3) is None
    assert fit_field(_points(rows, cols, noise), UNKNOWN, BOX, max_shift_px=3) is None
    lost = _points(rows, cols, np.full((len(rows), 2), math.nan))
    assert fit_field(lost, SHIFT, BOX, max_shift_px=3) is None


def test_tie_points_beyond_the_maximum_are_rejected():
    rows, cols = _grid()
    slope = np.column_stack([0.3 + (rows - 500) * 1e-3, np.full(len(rows), -0.2)])
    slope[7] = (9.0, 0.0)
    field = fit_field(_points(rows, cols, slope), SHIFT, BOX, max_shift_px=3)
    assert field is not None
    assert field.n_rejected == 1 and field.largest_px < 1


def test_a_field_survives_its_record():
    rng = np.random.default_rng(3)
    field = ShiftField(
        x=300_005.0, y=4_999_995.0, spacing_m=1280.0, pixel_m=10.0,
        dy_px=rng.normal(0, 0.3, (9, 9)), dx_px=rng.normal(0, 0.3, (9, 9)),
        n_points=60, n_rejected=4, residual_px=0.02,
    )  # fmt: skip
    again = ShiftField.from_record(json.loads(json.dumps(field.record())))
    for a, b in zip(again.on(BOX), field.on(BOX), strict=True):
        assert np.abs(a - b).max() < 2e-4
    assert again.n_points == 60 and again.spacing_m == 1280.0
    # Nodes hold their values, at the centre of the pixels they stand for.
    down, _ = field.on(BOX)
    assert down[128, 256] == pytest.approx(field.dy_px[1, 2], abs=1e-6)


def test_a_field_is_evaluated_by_position_not_by_pixel():
    field = ShiftField(300_005.0, 4_999_995.0, 1280.0, 10.0, np.arange(81.0).reshape(9, 9) / 80,
                       np.zeros((9, 9)), 60, 0, 0.0)  # fmt: skip
    whole, _ = field.on(BOX)
    part, _ = field.on(BOX[400:500, 300:350])
    assert np.allclose(part, whole[400:500, 300:350])
    coarse, _ = field.on(BOX.zoom_out(2))
    assert np.allclose(coarse, averaged(whole, 2), atol=1e-3)


def test_tie_points_move_apart_on_large_areas():
    assert spacing_for((1000, 1000)) == 128
    assert spacing_for((10_980, 10_980)) == 352


def test_a_flat_image_has_no_tie_points():
    flat = np.full((1, 300, 300), 0.2, np.float32)
    points = tie_points(flat, flat, None, replace(SHIFT, dy_px=0.0), max_shift_px=3)
    assert np.isnan(points.shifts).all()
