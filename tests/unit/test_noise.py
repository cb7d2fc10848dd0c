"""Confident learning finds labels that were flipped, and leaves sound ones alone."""

from __future__ import annotations

import numpy as np
import pytest

from terraloom.errors import LabelError
from terraloom.labels.noise import (
    confident_joint,
    confident_thresholds,
    noise_matrix,
    suspect_labels,
)


def world(n: int = 4000, rate: float = 0.2, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Held-out probabilities of a good model, labels with errors, and which ones are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, n)
    p = rng.dirichlet((1, 1, 1), n) * 0.3
    p[np.arange(n), true] += 0.7
    wrong = rng.random(n) < rate
    label = np.where(wrong, (true + rng.integers(1, 3, n)) % 3, true)
    return p, label, wrong, true


def test_thresholds_are_mean_self_confidence() -> None:
    p = np.array([[0.9, 0.1, 0], [0.5, 0.5, 0], [0.2, 0.8, 0]])
    t = confident_thresholds(p, np.array([0, 0, 1]))
    assert t[:2] == pytest.approx([0.7, 0.8]) and np.isnan(t[2])


def test_worked_example() -> None:
    """Thresholds .6 and .7: class 1 speaks against the third label; nobody for the last."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.15, 0.85], [0.55, 0.45]])
    suspect, best = suspect_labels(p, np.array([0, 0, 0, 1, 1, 1]))
    assert suspect.tolist() == [False, False, True, False, False, False]
    assert best.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.35])
def test_flipped_labels_are_found(rate: float) -> None:
    p, label, wrong, true = world(rate=rate)
    suspect, best = suspect_labels(p, label)
    # The threshold is the class's mean confidence: where few labels are wrong, some stay below it.
    assert wrong[suspect].mean() > 0.95 and suspect[wrong].mean() > (0.6 if rate < 0.1 else 0.95)
    assert (best[suspect] == true[suspect]).mean() > 0.95


def test_sound_labels_are_left_alone() -> None:
    p, label, _, _ = world(rate=0)
    assert not suspect_labels(p, label)[0].any()


def test_a_class_without_labels_never_speaks() -> None:
    p = np.array([[0.1, 0.1, 0.8], [0.3, 0.6, 0.1], [0.7, 0.2, 0.1]])
    suspect, best = suspect_labels(p, np.array([0, 1, 0]))
    assert 2 not in best and not suspect.any()


def test_noise_matrix_recovers_the_rates() -> None:
    rng = np.random.default_rng(2)
    given = np.array([[0.8, 0.2, 0.0], [0.1, 0.85, 0.05], [0.0, 0.0, 1.0]])
    true = rng.integers(0, 3, 60_000)
    label = (given.cumsum(axis=1)[true] < rng.random(len(true))[:, None]).sum(axis=1)
    joint = confident_joint(np.eye(3)[true], label)
    matrix = noise_matrix(joint)
    assert matrix == pytest.approx(given, abs=0.01)
    assert matrix.sum(axis=1) == pytest.approx(1)


def test_a_class_that_never_counts_has_no_error() -> None:
    joint = np.array([[2.0, 0, 0], [1.0, 0, 0], [0, 0, 0]])
    matrix = noise_matrix(joint)
    assert matrix == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 1]]))
    cautious = noise_matrix(joint, prior=1)
    assert cautious == pytest.approx(np.array([[3 / 4, 1 / 4, 0], [0, 1, 0], [0, 0, 1]]))


def test_labels_without_weight_are_no_noise() -> None:
    p, label, wrong, _ = world()
    sound = confident_joint(p, label, weights=~wrong)
    assert sound.sum() == pytest.approx((~wrong).sum())
    assert (
        np.diag(noise_matrix(sound)).min()
        > 0.99
        > np.diag(noise_matrix(confident_joint(p, label))).max()
    )
    none = confident_joint(p, label, weights=np.zeros(len(label)))
    assert none.sum() == 0 and np.array_equal(noise_matrix(none), np.eye(3))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LabelError, match=r"\(3, 2\), labels \(2,\)"):
        confident_thresholds(np.full((3, 2), 0.5), np.array([0, 1]))
