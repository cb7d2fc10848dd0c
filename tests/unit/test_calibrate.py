"""Measures of calibration: published fixtures; rescaled probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from terraloom.errors import ModelError
from terraloom.train.calibrate import (
    brier_score,
    calibration_error,
    negative_log_likelihood,
    reliability,
    rescale,
)

# Fixtures of methods.md 2.4 (torchmetrics' own examples, checked there with torchmetrics 1.9.0).
P4 = [[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]]
Y4 = [0, 1, 2, 0]


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


def probabilities(n: int = 500, k: int = 4) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(k), n)


def test_one_scale_keeps_the_map_and_sums_to_one() -> None:
    p = probabilities()
    q = rescale(p, 1 / 3.7)
    assert (q.argmax(1) == p.argmax(1)).all() and (q.max(1) <= p.max(1)).all()
    assert q.sum(1) == pytest.approx(1)
    assert rescale(p, 1.0) == pytest.approx(p)
    assert rescale(q, 3.7) == pytest.approx(p)
    assert np.isnan(rescale([[np.nan, np.nan]], 2.0)).all()


def test_a_shift_changes_odds_by_its_exponential() -> None:
    p = probabilities()
    q = rescale(p, 1.0, [0.7, 0, 0, 0])
    assert q[:, 0] / q[:, 1] == pytest.approx(np.exp(0.7) * p[:, 0] / p[:, 1])
    assert rescale(p, [2.0, 1, 1, 1], [0.1, 0.2, 0.3, 0.4]).sum(1) == pytest.approx(1)
    assert rescale(p, 1.0, [5.0] * 4) == pytest.approx(p)


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), ([1, -1, 1, 1], 0.0), (1.0, np.nan)])
def test_scales_that_are_none_are_refused(scale: object, shift: float) -> None:
    with pytest.raises(ModelError, match="scale > 0"):
        rescale(probabilities(), scale, shift)


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ModelError):
        calibration_error(P4, [0, 1, 2, 3])
    with pytest.raises(ModelError):
        calibration_error(P4, [0, 1])
    with pytest.raises(ModelError):
        calibration_error([[np.nan, 1.0]], [0])
