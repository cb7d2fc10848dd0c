"""Composites: order does not matter, the medoid was seen, the geometric median is the nearest."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from terraloom.preprocess.composites import (
    best_pixel,
    geometric_median,
    mean,
    median,
    medoid,
    pixel_scores,
    sum_of_distances,
)

VECTORS = {"medoid": medoid, "geometric_median": geometric_median}


def stack(t: int, b: int, n: int = 400, missing: float = 0.4, seed: int = 0) -> np.ndarray:
    """(T, B, 20, N/20) of reflectance; missing dates are missing in all bands."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 0.6, (t, b, 20, n // 20)).astype(np.float32)
    values[np.broadcast_to(rng.random((t, 1, 20, n // 20)) < missing, values.shape)] = np.nan
    return values


@given(t=st.integers(1, 40), missing=st.floats(0, 1), seed=st.integers(0, 99))
def test_median_is_numpys(t: int, missing: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(t, 3, 50)).astype(np.float32)
    values[rng.random(values.shape) < missing] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.nanmedian(values, axis=0)
    assert np.array_equal(median(values), expected, equal_nan=True)


def test_median_of_stored_integers_is_exact() -> None:
    """Values with many ties, as digital numbers are, and more dates than a byte counts."""
    values = np.random.default_rng(1).integers(0, 9, (300, 64)).astype(np.float32)
    values[::7] = np.nan
    assert np.array_equal(median(values), np.nanmedian(values, axis=0))


def test_mean_is_numpys() -> None:
    values = stack(7, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.nanmean(values, axis=0)
    assert mean(values) == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("method", [median, mean, medoid, geometric_median])
@pytest.mark.parametrize("t", [1, 2, 5, 8])
def test_order_of_dates_does_not_matter(method: Callable[..., np.ndarray], t: int) -> None:
    values = stack(t, 3)
    order = np.random.default_rng(2).permutation(t)
    tolerance = 3e-5 if method is geometric_median else 1e-7
    assert method(values[order]) == pytest.approx(method(values), abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("method", [median, mean, medoid, geometric_median])
def test_nothing_seen_gives_nan_and_one_look_is_itself(method: Callable[..., np.ndarray]) -> None:
    values = stack(4, 3, missing=0)
    values[:, :, 0] = np.nan
    values[1:, :, 1] = np.nan
    out = method(values)
    assert np.isnan(out[:, 0]).all() and np.isfinite(out[:, 1:]).all()
    assert out[:, 1] == pytest.approx(values[0, :, 1], abs=1e-7)


def test_medoid_returns_an_observed_vector_with_the_least_sum() -> None:
    values = stack(6, 4, missing=0.3)
    out = medoid(values)
    same = (values == out).all(axis=1)
    seen = np.isfinite(values).all(axis=1)
    assert np.array_equal(same.any(axis=0), seen.any(axis=0))
    sums = np.stack([sum_of_distances(values, np.where(seen[t], v, 9)) for t, v in
                     enumerate(values)])  # fmt: skip
    least = np.where(seen, sums, np.inf).min(axis=0)
    ok = seen.any(axis=0)
    assert sum_of_distances(values, out)[ok] == pytest.approx(least[ok], rel=1e-4)


def test_medoid_of_two_is_the_darker() -> None:
    values = stack(2, 3, missing=0)
    darker = np.where(values[0].sum(axis=0) < values[1].sum(axis=0), values[0], values[1])
    assert np.array_equal(medoid(values), darker)


@pytest.mark.parametrize("t", [1, 3, 4, 7, 10])
def test_geometric_median_in_one_dimension_is_the_median(t: int) -> None:
    values = stack(t, 1, missing=0.2)
    assert geometric_median(values) == pytest.approx(median(values), abs=3e-5, nan_ok=True)


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    values = stack(7, 3, n=40, missing=0.2)
    out = geometric_median(values)
    flat, got = values.reshape(7, 3, -1), out.reshape(3, -1)
    for n in range(flat.shape[2]):
        points = flat[:, :, n][np.isfinite(flat[:, 0, n])].astype(np.float64)

        def total(p: np.ndarray, points: np.ndarray = points) -> float:
            return float(np.sqrt(((points - p) ** 2).sum(axis=1)).sum())

        best = min(minimize(total, s, method="Nelder-Mead", options={"xatol": 1e-7}).fun
                   for s in (points.mean(axis=0), *points))  # fmt: skip
        assert total(got[:, n]) <= best * (1 + 1e-5) + 1e-7


def test_geometric_median_leaves_an_observed_vector_that_is_not_the_best() -> None:
    """The band medians are one of the dates here; plain Weiszfeld would never leave it."""
    points = np.array([[0, 0], [1, 0], [0, 1], [0.2, 0.1], [0.9, 0.9]], np.float32)
    points = np.concatenate([points, [[0.2, 0.1 + 1e-9]]]).astype(np.float32)
    values = points[:, :, None]
    best = minimize(lambda p: np.sqrt(((points - p) ** 2).sum(axis=1)).sum(), [0.3, 0.3],
                    method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).fun  # fmt: skip
    total = sum_of_distances(values, geometric_median(values))
    assert float(total[0]) == pytest.approx(best, rel=1e-5)


def test_half_of_the_looks_may_be_clouds_for_the_geometric_median_but_one() -> None:
    rng = np.random.default_rng(3)
    ground = rng.uniform(0.02, 0.3, (1, 4, 1, 200))
    values = (ground + rng.normal(0, 0.005, (9, 4, 1, 200))).astype(np.float32)
    values[:4] = rng.uniform(0.6, 1, (4, 4, 1, 200))
    assert np.abs(geometric_median(values) - ground[0]).max() < 0.05
    assert np.abs(mean(values) - ground[0]).mean() > 0.2


@pytest.mark.parametrize("method", VECTORS.values(), ids=list(VECTORS))
def test_a_date_counts_where_it_has_every_band_that_was_seen(
    method: Callable[..., np.ndarray],
) -> None:
    values = stack(5, 3, missing=0)
    values[2, 1] = np.nan  # one date lacks a band everywhere
    assert method(values) == pytest.approx(method(np.delete(values, 2, axis=0)), abs=3e-5)
    nobody = values.copy()
    nobody[:, 2] = np.nan  # a band that no date has decides nothing, and stays missing
    nobody[2, 1] = 0.1
    out = method(nobody)
    assert np.isnan(out[2]).all()
    assert out[:2] == pytest.approx(method(nobody[:, :2]), abs=1e-6)


def test_best_pixel_prefers_far_from_clouds_near_the_middle_and_no_haze() -> None:
    days = np.array([-30.0, 0.0, 30.0])
    far = np.full((3, 1, 1), 1000, np.float32)
    near = far.copy()
    near[1] = 100
    haze = np.zeros((3, 1, 1), np.float32)
    hazy = haze.copy()
    hazy[1] = 0.1

    def pick(distance: np.ndarray, haze: np.ndarray | None) -> int:
        return int(pixel_scores(days, distance, haze, spread_days=20)[:, 0, 0].argmax())

    assert pick(far, None) == pick(far, haze) == 1
    assert pick(near, None) != 1 and pick(far, hazy) != 1
    missing = np.full_like(haze, np.nan)
    assert pick(far, missing) == 1


def test_best_pixel_takes_whole_vectors_and_only_clear_ones() -> None:
    values = stack(5, 3, missing=0.4)
    scores = np.random.default_rng(4).random((5, 20, 20)).astype(np.float32)
    out = best_pixel(values, scores)
    seen = np.isfinite(values).all(axis=1)
    pick = np.where(seen, scores, -1).argmax(axis=0)
    expected = np.take_along_axis(values, pick[None, None], axis=0)[0]
    expected[:, ~seen.any(axis=0)] = np.nan
    assert np.array_equal(out, expected, equal_nan=True)
    order = [3, 1, 4, 0, 2]
    assert np.array_equal(best_pixel(values[order], scores[order]), out, equal_nan=True)


@pytest.mark.parametrize("method", [median, medoid, geometric_median])
def test_memory_beside_the_stack_is_bounded(method: Callable[..., np.ndarray]) -> None:
    values = stack(8, 2, n=20 * 4000, missing=0.2)
    out_bytes = values[0].nbytes
    tracemalloc.start()
    method(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out_bytes + 12e6
