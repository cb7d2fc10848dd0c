"""Speckle: the figures of L looks, averaging in power, and what the multitemporal filter gains."""

from __future__ import annotations

import numpy as np
import pytest

from terraloom.preprocess.speckle import (
    bias_db,
    expected_looks,
    looks_of,
    mean_db,
    multitemporal,
    spread_db,
    to_db,
    to_power,
)

#: Looks: coefficient of variation, bias and spread in dB (digamma and trigamma functions).
FIGURES = {
    1: (1.0, -2.5068, 5.5700), 4: (0.5, -0.5654, 2.3137), 4.4: (0.4767, -0.5121, 2.1932),
    9: (0.3333, -0.2457, 1.4888), 16: (0.25, -0.1371, 1.1029),
}  # fmt: skip


def speckle(looks: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Power of mean .1 with speckle of L looks."""
    rng = np.random.default_rng(seed)
    return (0.1 * rng.gamma(looks, 1 / looks, shape)).astype(np.float32)


@pytest.mark.parametrize("looks", FIGURES)
def test_published_figures(looks: float) -> None:
    cv, bias, spread = FIGURES[looks]
    assert (bias_db(looks), spread_db(looks)) == pytest.approx((bias, spread), abs=6e-5)
    power = speckle(looks, (2_000_000,))
    assert power.std() / power.mean() == pytest.approx(cv, rel=0.005)
    assert to_db(power).mean() + 10 == pytest.approx(bias, abs=0.02)
    assert to_db(power).std() == pytest.approx(spread, rel=0.005)
    assert looks_of(power) == pytest.approx(looks, rel=0.01)


def test_averaging_in_power_has_no_bias_and_averaging_decibels_has() -> None:
    db = to_db(speckle(4.4, (60, 200, 200)))
    assert mean_db(db).mean() == pytest.approx(-10, abs=0.03)
    assert db.mean(axis=0).mean() == pytest.approx(-10 - 0.5121, abs=0.03)


def test_mean_db_leaves_out_what_is_missing() -> None:
    db = np.array([[-10, np.nan, np.nan], [-20, -13, np.nan]], np.float32)
    assert mean_db(db) == pytest.approx([10 * np.log10(0.055), -13, np.nan], abs=1e-5, nan_ok=True)


def test_decibels_round_trip_and_no_power_is_missing() -> None:
    power = np.array([1e-4, 0.1, 3], np.float32)
    assert to_power(to_db(power)) == pytest.approx(power, rel=1e-6)
    assert np.isnan(to_db(np.array([0, -1, np.nan], np.float32))).all()


@pytest.mark.parametrize(("looks", "images"), [(4.4, 8), (1, 6), (9, 3), (4.4, 1)])
def test_looks_rise_as_expected_and_the_mean_stays(looks: float, images: int) -> None:
    out = multitemporal(speckle(looks, (images, 400, 400)))[:, 4:-4, 4:-4]
    assert looks_of(out[0]) == pytest.approx(expected_looks(looks, images), rel=0.05)
    assert out.mean() == pytest.approx(0.1, rel=0.01)


def test_a_change_between_dates_stays_and_so_does_an_edge() -> None:
    truth = np.full((6, 120, 120), 0.05, np.float32)
    truth[:, :, 60:] = 0.4  # an edge in all images
    truth[3:, 20:60, 10:50] *= 4  # a field that changes
    noise = speckle(4.4, truth.shape) / 0.1
    out = multitemporal(truth * noise)
    field = np.s_[24:56, 14:46]
    gain = out[3:, *field].mean() / out[:3, *field].mean()
    assert gain == pytest.approx(4, rel=0.1)
    near_edge = to_db(out[0, 70:, 66:70].mean()) - to_db(out[0, 70:, 50:54].mean())
    assert near_edge == pytest.approx(10 * np.log10(8), abs=0.6)


def test_missing_pixels_take_no_part_and_stay_missing() -> None:
    power = speckle(4.4, (5, 80, 80))
    power[1, :, :40] = np.nan
    power[2, 10] = 0
    out = multitemporal(power)
    assert np.array_equal(np.isnan(out), ~(power > 0))
    alone = multitemporal(np.delete(power, 1, axis=0))
    assert out[[0, 2, 3, 4], :, :30] == pytest.approx(alone[:, :, :30], rel=1e-4, nan_ok=True)


def test_order_of_the_images_does_not_matter() -> None:
    power = speckle(4.4, (4, 40, 40))
    order = [2, 0, 3, 1]
    assert multitemporal(power[order]) == pytest.approx(multitemporal(power)[order], rel=1e-5)


def test_a_gain_of_one_image_is_kept() -> None:
    """Calibration that differs between dates must not leak from one image into another."""
    power = speckle(4.4, (4, 60, 60))
    brighter = power * np.array([1, 3, 1, 1], np.float32)[:, None, None]
    assert multitemporal(brighter)[0] == pytest.approx(multitemporal(power)[0], rel=1e-4)
    assert multitemporal(brighter)[1] == pytest.approx(3 * multitemporal(power)[1], rel=1e-4)
