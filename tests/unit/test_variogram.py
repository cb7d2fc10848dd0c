"""Residual variogram: a known range is found, trends are no range, noise has none."""

from __future__ import annotations

import numpy as np
import pytest

from terraloom.errors import FoldError
from terraloom.labels.variogram import Variogram, empirical_variogram, fit_variogram, residuals


def field(
    n: int, range_m: float, seed: int, *, model: str = "spherical", copies: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Places in a square of 12 km and Gaussian values: sill 1, nugget .1."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 12_000, (n, 2))
    u = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) / range_m
    near = np.where(u < 1, 1 - 1.5 * u + 0.5 * u**3, 0) if model == "spherical" else np.exp(-3 * u)
    root = np.linalg.cholesky(0.9 * near + 0.1 * np.eye(n) + 1e-9 * np.eye(n))
    return xy, root @ rng.normal(size=(n, copies))


def fitted(xy: np.ndarray, z: np.ndarray, seed: int = 0) -> Variogram:
    return fit_variogram(*empirical_variogram(xy, z, rng=np.random.default_rng(seed)))


@pytest.mark.parametrize("model", ["spherical", "exponential"])
@pytest.mark.parametrize("range_m", [800, 2000])
def test_the_range_of_a_simulated_field_is_found(model: str, range_m: float) -> None:
    """Within 15 % where eight fields share their places, with the right model and sill."""
    v = fitted(*field(600, range_m, 1, model=model, copies=8))
    assert v.range_m == pytest.approx(range_m, rel=0.15)
    assert v.model == model
    assert v.sill == pytest.approx(8, rel=0.15)
    assert v.structured and v.at([0.0]) == pytest.approx(v.nugget)


def test_single_fields_scatter_around_their_range() -> None:
    found = [fitted(*field(400, 1500, seed)).range_m for seed in range(9)]
    assert np.median(found) == pytest.approx(1500, rel=0.2)


def test_the_range_follows_the_unit_and_no_other_place() -> None:
    xy, z = field(300, 1500, 2)
    v = fitted(xy, z)
    assert fitted(2 * xy, z).range_m == pytest.approx(2 * v.range_m, rel=1e-3)
    assert fitted(xy + np.array([5e5, 5.8e6]), 3 * z).range_m == pytest.approx(v.range_m, rel=1e-3)
    assert fitted(xy, 3 * z).sill == pytest.approx(9 * v.sill, rel=1e-6)


def test_a_model_gives_back_its_own_curve() -> None:
    lag = np.geomspace(50, 5000, 20)
    u = np.minimum(lag / 1200, 1)
    v = fit_variogram(lag, 0.2 + 0.6 * (1.5 * u - 0.5 * u**3), np.full(20, 100))
    assert (v.range_m, v.nugget, v.sill) == pytest.approx((1200, 0.2, 0.8), rel=1e-3)
    assert v.record()["model"] == "spherical"
    assert v.at(lag) == pytest.approx(v.gamma, rel=1e-3)


def test_noise_has_no_structure() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(5):
        v = fitted(rng.uniform(0, 12_000, (400, 2)), rng.normal(size=(400, 4)))
        shares.append((v.sill - v.nugget) / v.sill)
    assert np.median(shares) < 0.1


def test_a_trend_is_taken_away() -> None:
    xy, z = field(400, 1000, 4)
    tilted = z[:, 0] + xy @ [5e-4, -3e-4]
    flat = residuals(xy, tilted, classes=False)
    assert np.abs(np.corrcoef(flat[:, 0], xy[:, 0])[0, 1]) < 1e-9
    raw, clean = fitted(xy, tilted), fitted(xy, flat)
    assert clean.range_m < 0.7 * raw.range_m
    assert residuals(xy, 10 * tilted + 3, classes=False) == pytest.approx(flat)


def test_indicators_count_the_pairs_that_differ() -> None:
    rng = np.random.default_rng(5)
    xy = rng.uniform(0, 1000, (200, 2))
    name = rng.choice(["a", "b", "c"], 200)
    z = np.eye(3)[np.unique(name, return_inverse=True)[1]]
    lag, gamma, pairs = empirical_variogram(xy, z, rng=rng, least_m=100, most_m=1000)
    d = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))[np.triu_indices(200, 1)]
    differ = (name[:, None] != name[None])[np.triu_indices(200, 1)]
    ok = (d >= 100) & (d < 1000)
    assert pairs.sum() == ok.sum()
    assert (gamma * pairs).sum() == pytest.approx(differ[ok].sum())
    assert (lag * pairs).sum() == pytest.approx(d[ok].sum())


def test_many_labels_are_sampled_and_labels_without_value_left_out() -> None:
    rng = np.random.default_rng(6)
    xy = rng.uniform(0, 50_000, (40_000, 2))
    z = np.sin(xy[:, 0] / 3000)  # a wave: alike up to a few km
    z[::7] = np.nan
    lag, gamma, _ = empirical_variogram(xy, z, rng=rng)
    assert np.isfinite(gamma).all()
    assert gamma[lag < 500].max() < 0.05 < 0.3 < gamma[lag > 5000].max()


def test_bad_input_is_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(FoldError, match="not finite"):
        empirical_variogram([[0, np.nan]], [1], rng=rng)
    with pytest.raises(FoldError, match="one place"):
        empirical_variogram([[0, 0]] * 5, np.arange(5.0), rng=rng)
    with pytest.raises(FoldError, match="0 labels with a value"):
        empirical_variogram([[0, 0], [1, 1]], [np.nan, np.nan], rng=rng)
    with pytest.raises(FoldError, match="4 or more") as caught:
        fit_variogram([1, 2, 3], [1, 1, 1], [50, 50, 50])
    assert "block_m" in caught.value.fix
