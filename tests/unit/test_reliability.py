"""Held-out skill and the spatial block bootstrap."""

from __future__ import annotations

import json
from math import isnan

import numpy as np
import pytest

from terraloom.assess.reliability import (
    block_bootstrap,
    confusion_matrix,
    skill_from_matrix,
    skill_report,
)
from terraloom.errors import DesignError


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_confusion_matrix_rows_are_reference() -> None:
    m = confusion_matrix([[3, 3, 7], [7, 255, 3]], [[3, 7, 7], [7, 7, 255]], [7, 3])
    assert m.tolist() == [[2, 0], [1, 1]]
    assert confusion_matrix([255, 3], [3, 3], [3, 255], ignore=None).tolist() == [[1, 0], [1, 0]]
    with pytest.raises(DesignError, match=r"predicted codes \[5\]"):
        confusion_matrix([3], [5], [7, 3])
    with pytest.raises(DesignError, match="same shape"):
        confusion_matrix([3, 3], [3], [3])


def test_metrics_by_hand_and_undefined_classes() -> None:
    skill = skill_from_matrix([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    assert float(skill.oa) == pytest.approx(17 / 20)
    np.testing.assert_allclose(skill.precision, [8 / 9, 9 / 11, np.nan])
    np.testing.assert_allclose(skill.recall, [0.8, 0.9, np.nan])
    np.testing.assert_allclose(skill.f1, [16 / 19, 18 / 21, np.nan])
    assert float(skill.macro_f1) == pytest.approx((16 / 19 + 18 / 21) / 2)
    assert float(skill.miou) == pytest.approx((8 / 11 + 9 / 12) / 2)
    # A class that is predicted but never real has precision 0 and no recall, and does count.
    ghost = skill_from_matrix([[8, 2], [0, 0]])
    assert ghost.precision[1] == 0
    assert isnan(ghost.recall[1])
    assert float(ghost.macro_f1) == pytest.approx(16 / 18 / 2)
    assert isnan(float(skill_from_matrix(np.zeros((2, 2))).oa))


def _field(n_blocks: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Blocks that are mostly right or mostly wrong: errors are correlated inside a block."""
    block = np.repeat(np.arange(n_blocks), size)
    truth = rng.integers(1, 3, block.size)
    accuracy = rng.beta(2, 1, n_blocks)[block]
    predicted = np.where(rng.random(block.size) < accuracy, truth, 3 - truth)
    return truth, predicted, block


def test_report_agrees_with_the_generic_bootstrap_and_is_seeded() -> None:
    truth, predicted, block = _field(40, 50, _rng(1))
    a = skill_report(truth, predicted, block, [1, 2], rng=_rng(7))
    b = skill_report(truth, predicted, block, [1, 2], rng=_rng(7))
    assert a.to_dict() == b.to_dict()
    generic = block_bootstrap(
        lambda t, p: float((t == p).mean()), [truth, predicted], block, rng=_rng(8)
    )
    oa = a.overall["oa"]
    assert oa.value == generic.value == (truth == predicted).mean()
    assert oa.se == pytest.approx(generic.se, rel=0.1)
    assert oa.lower == pytest.approx(generic.lower, abs=0.02)
    assert oa.upper == pytest.approx(generic.upper, abs=0.02)
    assert oa.lower < oa.value < oa.upper
    assert (a.n, a.n_blocks, a.notes) == (2000, 40, ())
    assert "not map accuracy" in json.loads(json.dumps(a.to_dict()))["what"]


def test_blocks_widen_the_interval_over_pixels() -> None:
    truth, predicted, block = _field(40, 50, _rng(2))
    by_block = skill_report(truth, predicted, block, [1, 2], rng=_rng()).overall["oa"]
    by_pixel = skill_report(truth, predicted, np.arange(truth.size), [1, 2], rng=_rng())
    assert by_block.se > 2 * by_pixel.overall["oa"].se


def test_block_interval_covers_where_the_pixel_interval_does_not() -> None:
    """Expected accuracy is E[beta(2, 1)] = 2/3; 90 % intervals over 100 simulated campaigns."""
    rng, inside = _rng(3), Counts()
    for _ in range(100):
        truth, predicted, block = _field(40, 20, rng)
        for name, unit in (("block", block), ("pixel", np.arange(truth.size))):
            report = skill_report(
                truth, predicted, unit, [1, 2], rng=rng, n_resamples=150, level=0.9
            )
            oa = report.overall["oa"]
            inside.add(name, oa.lower <= 2 / 3 <= oa.upper)
    assert 0.83 <= inside.share("block") <= 0.96
    assert inside.share("pixel") < 0.6


class Counts:
    def __init__(self) -> None:
        self.hits: dict[str, list[bool]] = {}

    def add(self, name: str, hit: bool) -> None:
        self.hits.setdefault(name, []).append(hit)

    def share(self, name: str) -> float:
        return float(np.mean(self.hits[name]))


def test_ignored_labels_and_few_blocks() -> None:
    truth = np.array([1, 1, 2, 255, 2, 1])
    predicted = np.array([1, 2, 2, 1, 2, 1])
    report = skill_report(truth, predicted, [0, 0, 1, 2, 1, 1], [1, 2, 3], rng=_rng())
    assert (report.n, report.n_blocks) == (5, 2)
    assert "too narrow" in report.notes[0]
    assert report.per_class[3]["f1"].to_dict()["value"] is None
    with pytest.raises(DesignError, match="1 spatial block"):
        skill_report(truth, predicted, np.zeros(6), [1, 2], rng=_rng())
    with pytest.raises(DesignError, match="first axis"):
        block_bootstrap(lambda a: 0.0, [truth], [0, 1], rng=_rng())
    with pytest.raises(DesignError, match="confidence level"):
        block_bootstrap(lambda a: 0.0, [truth], np.arange(6), rng=_rng(), level=95)
