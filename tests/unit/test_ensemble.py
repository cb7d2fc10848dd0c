"""One temperature for all members, found where they did not train."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terraloom.errors import FoldError
from terraloom.train.ensemble import (
    averaged,
    cross_fitted_average,
    fit_ensemble_temperature,
    sharpen,
)
from terraloom.uncertainty.decompose import decompose_entropy


def softmax(z: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def members_of(
    factor: float, n: int = 6000, k: int = 4, m: int = 3, spread: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Members (M, N, K) whose logits are ``factor`` times those that made the labels."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, k))
    y = (softmax(z).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    noisy = z[None] + rng.normal(0, spread, (m, n, k))
    return softmax(factor * noisy), y


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_overconfidence_is_measured(factor: float) -> None:
    """Logits too large by a factor need that temperature (members without spread)."""
    p, y = members_of(factor, spread=0)
    assert fit_ensemble_temperature(p, y) == pytest.approx(factor, rel=0.08)


def test_label_noise_does_not_pass_for_doubt() -> None:
    """Labels wrong at a known rate would soften the probabilities of the true class."""
    p, y = members_of(1.0, spread=0, n=20_000)
    rng = np.random.default_rng(3)
    matrix = np.full((4, 4), 0.3 / 3)
    np.fill_diagonal(matrix, 0.7)
    label = (matrix.cumsum(axis=1)[y] < rng.random((len(y), 1))).sum(axis=1)
    assert fit_ensemble_temperature(p, label) > 1.4
    assert fit_ensemble_temperature(p, label, matrix) == pytest.approx(1, abs=0.1)


@given(t=st.floats(0.3, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_sharpening_keeps_order_and_sum(t: float, seed: int) -> None:
    p, _ = members_of(1.0, n=6, seed=seed)
    planes = np.moveaxis(p, 2, 1)  # (M, K, N)
    out = sharpen(planes, t)
    assert out.shape == planes.shape and out.dtype == np.float32
    assert out.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(out.argmax(axis=1), planes.argmax(axis=1))
    larger, before = out.max(axis=1), planes.max(axis=1)
    assert np.all(larger <= before + 1e-6) if t >= 1 else np.all(larger >= before - 1e-6)


def test_the_average_is_what_prediction_decomposes() -> None:
    """Calibration and map use the same probabilities, so the scores are those of the map."""
    p, _ = members_of(2.0, n=50)
    mean = averaged(p, 1.7)
    assert decompose_entropy(sharpen(np.moveaxis(p, 2, 1), 1.7)).mean == pytest.approx(
        mean.T, abs=1e-6
    )


def test_each_fold_uses_the_temperature_of_the_others() -> None:
    """Labels of a fold do not reach its own probabilities."""
    p, y = members_of(2.0)
    fold = np.arange(len(y)) % 3
    out = cross_fitted_average(p, y, fold)
    here = fold == 1
    t = fit_ensemble_temperature(p[:, ~here], y[~here])
    assert out[here] == pytest.approx(averaged(p[:, here], t))
    changed = y.copy()
    changed[here] = 0
    again = cross_fitted_average(p, changed, fold)
    assert np.array_equal(again[here], out[here]) and not np.array_equal(again[~here], out[~here])


def test_one_fold_cannot_be_cross_fitted() -> None:
    p, y = members_of(1.0, n=20)
    with pytest.raises(FoldError, match="1 fold with held-out labels"):
        cross_fitted_average(p, y, np.zeros(20))
