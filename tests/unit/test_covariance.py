"""Errors that go together: closed forms, brute force, and coverage by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import norm

from support.correlated import Fields
from terraloom.assess.residuals import LEAST_SD, class_covariances
from terraloom.errors import ModelError
from terraloom.uncertainty.covariance import ErrorCovariance, fit_covariance, total_variance

PIXEL = 10.0


def exponential(r: float, nugget: float = 0.0) -> ErrorCovariance:
    """exp(-h / r), which falls to 5 % at 3 r."""
    return ErrorCovariance(1.0, nugget, "exponential", 3 * r)


def places(h: int, w: int) -> np.ndarray:
    row, col = np.mgrid[:h, :w]
    return np.column_stack([col.ravel(), row.ravel()]) * PIXEL


def blocks_of(w: np.ndarray, b: int) -> np.ndarray:
    h, v = (-(-n // b) * b for n in w.shape)
    full = np.zeros((h, v))
    full[: w.shape[0], : w.shape[1]] = w
    return full.reshape(h // b, b, v // b, b).sum(axis=(1, 3))


@pytest.mark.parametrize(("r", "se", "effective"), [(20, 0.09548, 109.7), (50, 0.21926, 20.8)])
def test_mean_of_50_by_50_pixels_has_the_published_error(r, se, effective):
    w = np.full((50, 50), 1 / 2500)
    squares = float((w**2).sum())
    found = total_variance(w, squares, exponential(r), PIXEL)
    assert round(found**0.5, 5) == se
    assert round(2500 * squares / found, 1) == effective
    assert found**0.5 / squares**0.5 == pytest.approx({20: 4.77, 50: 10.96}[r], abs=0.005)


@pytest.mark.parametrize("model", ["exponential", "spherical"])
@pytest.mark.parametrize("range_m", [25.0, 130.0, 5000.0])
def test_equals_the_double_sum(model, range_m):
    w = np.random.default_rng(1).random((23, 40))
    w[w < 0.3] = 0
    c = ErrorCovariance(1.3, 0.2, model, range_m)
    at = places(*w.shape)
    h = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))
    each = 1.3 * (0.8 * c.structured(h) + 0.2 * (h == 0))
    assert total_variance(w, float((w**2).sum()), c, PIXEL) == pytest.approx(
        float(w.ravel() @ each @ w.ravel()), rel=2e-6
    )


def test_independent_errors_and_full_dependence_are_the_two_ends():
    w = np.random.default_rng(2).random((30, 30))
    squares = float((w**2).sum())
    alone = ErrorCovariance(1.0, 1.0, "spherical", 100.0)
    assert total_variance(w, squares, alone, PIXEL) == pytest.approx(squares)
    together = total_variance(w, squares, exponential(1e7), PIXEL)
    assert together == pytest.approx(w.sum() ** 2, rel=1e-3)


def test_blocks_of_even_weight_change_nothing():
    w = np.ones((48, 96))
    for r in (8, 20, 200):
        exact = total_variance(w, w.size, exponential(r, 0.3), PIXEL)
        for b in (2, 3, 8, 24, 48):
            coarse = total_variance(blocks_of(w, b), w.size, exponential(r, 0.3), PIXEL, block=b)
            assert coarse == pytest.approx(exact, rel=2e-3), (r, b)


def test_blocks_wider_than_the_range_stay_near_the_exact_error():
    """Weights as a map has them: near 0 inside, high along the borders of patches."""
    rng = np.random.default_rng(3)
    field = gaussian_filter(rng.normal(size=(256, 256)), 6)
    p = norm.cdf(8 * field / field.std())
    w = np.sqrt(p * (1 - p))
    for r in (10, 30, 100):
        exact = total_variance(w, float((w**2).sum()), exponential(r, 0.2), PIXEL) ** 0.5
        for b in (4, 16, 64):
            found = total_variance(
                blocks_of(w, b), float((w**2).sum()), exponential(r, 0.2), PIXEL, block=b
            )
            assert 0.65 < found**0.5 / exact < 1.05, (r, b)
            assert b * PIXEL > r / 2 or found**0.5 == pytest.approx(exact, rel=0.02), (r, b)


def test_far_ends_of_a_region_do_not_meet_around_the_torus():
    w = np.zeros((4, 400))
    w[:, :3] = w[:, -3:] = 1
    one = np.ones((4, 3))
    c = exponential(100)
    both = total_variance(w, 24.0, c, PIXEL)
    assert both == pytest.approx(2 * total_variance(one, 12.0, c, PIXEL), rel=1e-4)


def test_fit_finds_the_covariance_of_simulated_errors():
    true = ErrorCovariance(1.0, 0.3, "exponential", 240.0)
    rng = np.random.default_rng(4)
    one, two = Fields(200, true, PIXEL).draw(rng)
    sd = 0.2 + rng.random(one.shape)
    found = [fit_covariance(places(200, 200), (1.3 * z * sd).ravel(), sd.ravel(), rng=rng)
             for z in (one, two)]  # fmt: skip
    for c in found:
        assert c is not None and c.pixels == 40_000
        assert c.dispersion == pytest.approx(1.69, rel=0.12)
        lag = np.array([20.0, 50.0, 100.0, 200.0])
        assert (1 - c.nugget) * c.structured(lag) == pytest.approx(
            0.7 * true.structured(lag), abs=0.12
        )


def test_too_few_residuals_show_nothing():
    rng = np.random.default_rng(5)
    sd = np.ones(199)
    assert fit_covariance(rng.random((199, 2)), sd, sd, rng=rng) is None
    sd = np.full(5000, 0.01)
    assert fit_covariance(rng.random((5000, 2)), sd, sd, rng=rng, least_sd=0.2) is None


def test_a_class_without_uncertain_pixels_borrows_the_farthest_covariance():
    rng = np.random.default_rng(6)
    z, _ = Fields(80, exponential(40), PIXEL).draw(rng)
    p = np.full(z.size, 0.4)
    y = (norm.cdf(z.ravel()) < p).astype(np.int64)
    probabilities = np.column_stack([1 - p - 0.001, p, np.full(z.size, 0.001)])
    records = class_covariances(places(80, 80), y, probabilities, rng)
    assert [r["borrowed"] for r in records if r] == [False, False, True]
    lent = max((r for r in records[:2] if r), key=lambda r: r["range_m"] * (1 - r["nugget"]))
    assert records[2] is not None and records[2]["range_m"] == lent["range_m"]
    none = class_covariances(places(80, 80), y, np.tile([0.999, 0.001], (z.size, 1)), rng)
    assert none == [None, None]


def test_record_goes_both_ways_and_nonsense_is_refused():
    c = ErrorCovariance(1.2, 0.3, "spherical", 450.0, 1000)
    assert ErrorCovariance.from_record(c.record() | {"borrowed": True}, "x") == c
    for bad in ({"nugget": 1.2}, {"model": "gaussian"}, {"range_m": 0}, {"dispersion": None}):
        with pytest.raises(ModelError, match="covariance"):
            ErrorCovariance.from_record(c.record() | bad, "covariance.json")


def coverage(draws: int, *, classes: bool, seed: int) -> tuple[float, float]:
    """Share of 90 % intervals that hold the truth: with the covariance, and without.

    The covariance is not told but measured, at labelled pixels of other places. With classes the
    truth is 1 with probability p, neighbours going together (a Gaussian copula).
    """
    rng = np.random.default_rng(seed)
    true = ErrorCovariance(1.0, 0.25, "exponential", 210.0)
    size = 64
    fields = Fields(size, true, PIXEL)
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(size, size)), 5)
    p = norm.cdf(1.5 * smooth / smooth.std())
    sd = np.sqrt(p * (1 - p)) if classes else 0.5 + p

    def error(z: np.ndarray) -> np.ndarray:
        return (norm.cdf(z) < p) - p if classes else z * sd

    at, seen = places(size, size), []
    for k in range(60):  # labelled places far from each other
        some = rng.choice(size * size, 100, replace=False)
        z = fields.draw(rng)[0]
        seen.append(
            (at[some] + 2e4 * np.array([k % 8, k // 8]), error(z).ravel()[some], sd.ravel()[some])
        )
    xy, e, s = (np.concatenate(v) for v in zip(*seen, strict=True))
    measured = fit_covariance(xy, e, s, rng=rng, least_sd=LEAST_SD if classes else 0)
    assert measured is not None
    row, col = np.mgrid[:size, :size]
    regions = [np.hypot(row - 30, col - 26) < 22, (row > 8) & (col > 40), row + col < 50]
    z90 = float(norm.ppf(0.95))
    half, naive = [], []
    for inside in regions:
        w = sd * inside
        squares = float((w**2).sum())
        half.append(z90 * total_variance(w, squares, measured, PIXEL) ** 0.5)
        naive.append(z90 * squares**0.5)
    off = np.array([
        [abs(float(error(z)[inside].sum())) for inside in regions]
        for _ in range(draws // 2) for z in fields.draw(rng)
    ])  # fmt: skip
    return float((off <= half).mean()), float((off <= naive).mean())


def campaigns(count: int, draws: int, *, classes: bool) -> np.ndarray:
    """Mean coverage over campaigns, each with labels and a measured covariance of its own."""
    return np.mean([coverage(draws, classes=classes, seed=s) for s in range(count)], axis=0)


@pytest.mark.parametrize("classes", [True, False])
def test_intervals_cover_what_they_promise(classes):
    with_it, without = campaigns(3, 200, classes=classes)
    assert 0.84 <= with_it <= 0.96  # of three campaigns
    assert without < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("classes", [True, False])
def test_intervals_cover_87_to_93_percent_over_many_campaigns(classes):
    with_it, without = campaigns(24, 400, classes=classes)
    assert 0.87 <= with_it <= 0.93
    assert without < 0.6


def test_variance_is_proportional_to_the_dispersion():
    w = np.ones((10, 10))
    c = exponential(50)
    assert total_variance(w, 100.0, replace(c, dispersion=2.0), PIXEL) == pytest.approx(
        2 * total_variance(w, 100.0, c, PIXEL)
    )
