"""Risk-coverage, sparsification, outlines and objects, against numbers of the literature."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest

from terraloom.assess.boundaries import BoundaryScores, boundary_f1, boundary_iou
from terraloom.assess.selective import risk_coverage, sparsification
from terraloom.errors import DesignError


def test_the_published_conventions_by_number() -> None:
    found = risk_coverage([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 0])
    assert found.aurc == pytest.approx(0.145833, abs=5e-7)
    assert found.trapezoid == pytest.approx(0.152778, abs=5e-7)
    assert found.augrc == pytest.approx(0.125)
    assert found.excess == pytest.approx(0.083333, abs=5e-7)
    # The example of torch-uncertainty: probabilities (.7 .3) (.6 .4) (.8 .2), labels 0 1 0.
    assert risk_coverage([0.7, 0.6, 0.8], [0, 1, 0]).trapezoid == pytest.approx(0.0833, abs=5e-5)


def test_risk_coverage_of_perfect_random_and_tied_confidence() -> None:
    rng = np.random.default_rng(1)
    wrong = (rng.random(4000) < 0.2).astype(float)
    assert risk_coverage(1 - wrong, wrong).excess < 0.04  # ties: the errors share one place
    assert risk_coverage(-wrong - rng.random(4000) * 1e-3, wrong).excess == pytest.approx(0)
    random = risk_coverage(rng.random(4000), wrong)
    assert random.aurc == pytest.approx(wrong.mean(), abs=0.02)
    assert random.augrc == pytest.approx(wrong.mean() / 2, abs=0.01)
    tied = risk_coverage(np.ones(4000), wrong)
    assert tied.aurc == pytest.approx(wrong.mean())
    order = rng.permutation(4000)
    conf = np.round(rng.random(4000), 1)
    assert risk_coverage(conf, wrong).aurc == risk_coverage(conf[order], wrong[order]).aurc
    with pytest.raises(DesignError, match="2 confidences, 1 losses"):
        risk_coverage([0.1, 0.2], [1])


def test_sparsification_of_a_perfect_and_a_useless_uncertainty() -> None:
    rng = np.random.default_rng(2)
    sd = rng.uniform(0.1, 2, 20_000)
    error = np.abs(rng.normal(0, sd))
    perfect, good, useless = (
        sparsification(u, error**2, root=True) for u in (error, sd, rng.random(20_000))
    )
    assert perfect.ause == pytest.approx(0, abs=1e-12)
    assert perfect.curve[0] == 1 and perfect.curve[-1] < 0.05
    assert 0 < good.ause < 0.6 * useless.ause
    assert useless.curve == pytest.approx(np.ones(20), abs=0.1)
    assert (np.diff(good.oracle) <= 0).all()
    assert sparsification([1, 2], [0, 0]).ause == 0


def test_boundary_iou_of_squares_that_touch_and_shift() -> None:
    a = np.zeros((20, 20), bool)
    a[5:15, 5:15] = True
    assert boundary_iou(a, a, width_m=10, pixel_m=10) == 1
    b = np.roll(a, 1, axis=1)
    # Bands of one pixel: 36 each; the two long sides overlap in 9 pixels, the short ones in none.
    assert boundary_iou(a, b, width_m=10, pixel_m=10) == pytest.approx(18 / (72 - 18))
    assert boundary_iou(a, b, width_m=50, pixel_m=10) == pytest.approx(90 / 110)
    assert isnan(boundary_iou(a & False, a & False, width_m=10, pixel_m=10))
    full = np.ones((6, 6), bool)
    inner = full.copy()
    inner[0] = False
    assert boundary_iou(full, inner, width_m=10, pixel_m=10) < 1, "the image border counts"


def test_boundary_f1_has_its_tolerance_in_metres() -> None:
    true = np.zeros((30, 30), bool)
    true[:, 10] = True
    said = np.roll(true, 2, axis=1)
    said[:, 25] = True
    near = BoundaryScores.of_counts(*boundary_f1(said, true, tolerance_m=20, pixel_m=10), 20)
    assert (near.precision, near.recall) == (0.5, 1) and near.f1 == pytest.approx(2 / 3)
    far = BoundaryScores.of_counts(*boundary_f1(said, true, tolerance_m=19, pixel_m=10), 19)
    assert far.f1 == 0
    left = np.zeros((30, 30), bool)
    left[:, :20] = True
    part = boundary_f1(said, true, tolerance_m=20, pixel_m=10, valid=left)
    assert part == (30, 30, 30, 30)
    none = BoundaryScores.of_counts(*boundary_f1(true & False, true, tolerance_m=9, pixel_m=9), 9)
    assert isnan(none.precision) and none.recall == 0 and none.f1 == 0
    assert isnan(BoundaryScores.of_counts(0, 0, 0, 0, 9).f1)
