"""Scores of held-out predictions and their spread over folds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from terraloom.assess.skill import edge_scores, fold_spread, probability_scores, value_scores
from terraloom.train.calibrate import adaptive_calibration_error, class_calibration_errors

P4 = np.array([[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]])
Y4 = np.array([0, 1, 2, 0])


def test_probability_scores_are_those_of_torchmetrics() -> None:
    got = probability_scores(P4, Y4, np.array([0, 0, 1, 1]), ["a", "b", "c"], n_bins=3)
    assert got["ece"] == pytest.approx(0.2, abs=1e-6)
    assert got["rmsce"] == pytest.approx(0.208167, abs=1e-6)
    assert got["mce"] == pytest.approx(0.233333, abs=1e-6)
    assert got["brier"] == pytest.approx(0.63625)
    assert got["nll"] == pytest.approx(1.249553, abs=1e-6)
    assert (got["n"], got["n_bins"]) == (4, 3)
    assert got["folds"]["oa"] == {"mean": 0.5, "sd": pytest.approx(0.5**0.5), "values": [0, 1]}
    assert got["folds"]["fold"] == [0, 1]
    json.dumps(got)


def test_calibration_errors_by_class_and_of_equal_mass() -> None:
    # Class a: p .25 in the first third, .55 in the second, .10 in the first, .90 in the last.
    by_hand = (abs(0.25 + 0.10 - 1) + abs(0.55 - 0) + abs(0.90 - 1)) / 4
    assert class_calibration_errors(P4, Y4, n_bins=3)[0] == pytest.approx(by_hand)
    # In order of confidence: .55 wrong, .55 wrong, .60 right, .90 right.
    assert adaptive_calibration_error(P4, Y4, n_bins=2) == pytest.approx((1.1 + 0.5) / 4)
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1, 1, 1], 20_000)
    y = (rng.random(20_000)[:, None] > np.cumsum(p, axis=1)).sum(axis=1)
    assert adaptive_calibration_error(p, y) < 0.015
    assert class_calibration_errors(p, y).max() < 0.015
    assert adaptive_calibration_error(p**3 / (p**3).sum(1, keepdims=True), y) > 0.1


def test_value_scores_find_an_uncertainty_that_knows() -> None:
    rng = np.random.default_rng(2)
    sd = rng.uniform(0.5, 3, 5000)
    y = rng.normal(10, 4, 5000)
    mean = y + rng.normal(0, sd)
    knows = value_scores(mean, sd**2, y, rng.integers(0, 4, 5000))
    blind = value_scores(mean, rng.random(5000), y, rng.integers(0, 4, 5000))
    assert knows["ause"] < 0.7 * blind["ause"]
    assert knows["mae"] == pytest.approx(np.abs(mean - y).mean())
    assert knows["folds"]["rmse"]["sd"] < 0.2
    assert len(knows["sparsification"]["curve"]) == len(knows["sparsification"]["removed"])
    json.dumps(knows)


def test_spread_leaves_out_what_a_fold_cannot_say() -> None:
    fold = np.array([0, 0, 3, 5])
    got = fold_spread(fold, lambda at: {"x": float(at.sum()) if at.sum() == 1 else float("nan")})
    assert got == {"fold": [0, 3, 5], "x": {"mean": 1, "sd": 0, "values": [None, 1, 1]}}
    assert fold_spread(fold * 0, lambda at: {"x": 2.0})["x"]["sd"] is None


def test_edges_are_compared_within_each_chip() -> None:
    shape = (8, 8)
    true, found = np.zeros((2, 2, 8, 8), bool)
    true[:, :, 3] = True
    found[0, :, 4] = True  # one pixel off in the first chip, four in the second
    found[1, :, 7] = True
    index = np.arange(128)
    got = edge_scores(index, found.ravel(), true.ravel(), shape, 10.0, 10.0)
    assert got == {
        "near_precision": 0.5, "near_recall": 0.5, "near_f1": 0.5, "tolerance_m": 10.0,
    }  # fmt: skip
    mixed = np.random.default_rng(3).permutation(128)
    again = edge_scores(index[mixed], found.ravel()[mixed], true.ravel()[mixed], shape, 10.0, 10.0)
    assert again == got
    none = edge_scores(index, found.ravel() & False, true.ravel() & False, shape, 10.0)
    assert none["near_f1"] is None and none["tolerance_m"] == 20.0
