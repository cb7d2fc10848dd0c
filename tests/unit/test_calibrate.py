"""Calibration: published fixtures, temperature, cross-fitting."""

from __future__ import annotations

import numpy as np
import pytest

from terraloom.errors import FoldError, ModelError
from terraloom.train.calibrate import (
    apply_temperature,
    brier_score,
    calibrate,
    calibration_error,
    cross_fitted,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)

# Fixtures of methods.md 2.4 (torchmetrics' own examples, checked there with torchmetrics 1.9.0).
P4 = [[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]]
Y4 = [0, 1, 2, 0]


def sampled(n: int, t: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities p whose labels follow p^(1/t): the right temperature is t."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (n, 4))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    q = apply_temperature(p, t)
    return p, (q.cumsum(1) > rng.random((n, 1))).argmax(1)


@pytest.mark.parametrize(("norm", "want"), [("l1", 0.2), ("l2", 0.208167), ("max", 0.233333)])
def test_three_class_fixture(norm: str, want: float) -> None:
    assert calibration_error(P4, Y4, n_bins=3, norm=norm) == pytest.approx(want, abs=1e-6)


def test_brier_and_nll_fixture() -> None:
    assert brier_score(P4, Y4) == pytest.approx(0.63625)
    assert negative_log_likelihood(P4, Y4) == pytest.approx(1.249553, abs=1e-6)


def test_bins_are_right_closed() -> None:
    table = reliability([[0.5, 0.5], [0.500001, 0.499999], [1.0, 0.0]], [0, 0, 0], n_bins=2)
    assert table.count.tolist() == [1, 2]
    assert int(reliability(P4, Y4, n_bins=10).count.sum()) == 4


@pytest.mark.parametrize("t", [0.5, 1.0, 2.5])
def test_temperature_is_recovered(t: float) -> None:
    p, y = sampled(40_000, t)
    assert fit_temperature(p, y) == pytest.approx(t, rel=0.05)
    after = apply_temperature(p, fit_temperature(p, y))
    assert calibration_error(after, y) < 0.01
    assert negative_log_likelihood(after, y) <= negative_log_likelihood(p, y) + 1e-9


def test_temperature_keeps_the_map_and_sums_to_one() -> None:
    p, _ = sampled(500, 1.0)
    q = apply_temperature(p, 3.7)
    assert (q.argmax(1) == p.argmax(1)).all()
    assert np.allclose(q.sum(1), 1)
    assert np.isnan(apply_temperature([[np.nan, np.nan]], 2.0)).all()
    with pytest.raises(ModelError):
        apply_temperature(p, 0.0)


def test_a_fold_never_sees_its_own_temperature() -> None:
    p, y = sampled(6000, 1.0)
    fold = np.arange(6000) % 3
    _, t = cross_fitted(p, y, fold)
    y2 = y.copy()
    y2[fold == 0] = (y2[fold == 0] + 1) % 4
    _, t2 = cross_fitted(p, y2, fold)
    assert t2[0] == t[0]
    assert t2[1] != t[1]
    with pytest.raises(FoldError):
        cross_fitted(p, y, np.zeros(6000))


def test_calibrate_reports_cross_fitted_scores() -> None:
    p, y = sampled(20_000, 3.0)
    c = calibrate(p, y, np.arange(20_000) % 4)
    assert c.temperature == pytest.approx(3.0, rel=0.1)
    assert c.before["ece"] > 0.1 and c.after["ece"] < 0.02
    assert c.after["nll"] < c.before["nll"] and c.after["brier"] < c.before["brier"]
    assert c.n_pixels == int(c.table_after.count.sum()) == 20_000
    assert set(c.to_json()["fold_temperature"]) == {"0", "1", "2", "3"}


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ModelError):
        calibration_error(P4, [0, 1, 2, 3])
    with pytest.raises(ModelError):
        calibration_error(P4, [0, 1])
    with pytest.raises(ModelError):
        calibration_error([[np.nan, 1.0]], [0])
