"""Scores against simulated truth."""

from __future__ import annotations

import json
from math import isnan, sqrt

import numpy as np
import pytest

from terraloom.assess.estimators import estimate_accuracy
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.assess.scoreboard import (
    SCORE_KEYS,
    areas_inside_ci,
    build_scoreboard,
    class_boundary_iou,
    height_scores,
    label_noise_scores,
    map_scores,
    pooled_mask_f1,
    shift_rmse_px,
)
from terraloom.errors import StateError
from terraloom.preprocess.reasons import Reason


def test_mask_f1_pools_pixels_and_leaves_out_nodata() -> None:
    cloud = int(Reason.CLOUD)
    a = (np.array([cloud, cloud | 64, 0, 0], np.uint8), np.array([1, 0, 1, 0]))
    b = (np.array([cloud, 1 | cloud, 1], np.uint8), np.array([True, True, True]))
    # TP 2, FP 1, FN 1; nodata pixels of b count nowhere. The mean of per-scene F1 is .75.
    assert pooled_mask_f1([a, b], Reason.CLOUD) == pytest.approx(4 / 6)
    assert isnan(pooled_mask_f1([a], Reason.SNOW)) is False
    assert pooled_mask_f1([a], Reason.SNOW) == 0
    assert isnan(pooled_mask_f1([(np.zeros(3, np.uint8), np.zeros(3))], Reason.CLOUD))
    assert isnan(pooled_mask_f1([], Reason.CLOUD))


def test_mask_f1_has_no_tolerance() -> None:
    truth = np.zeros((10, 10), bool)
    truth[2:6, 2:6] = True
    exact = truth.astype(np.uint8) * int(Reason.SHADOW)
    assert pooled_mask_f1([(exact, truth)], Reason.SHADOW) == 1
    assert pooled_mask_f1([(np.roll(exact, 1, 0), truth)], Reason.SHADOW) == pytest.approx(0.75)
    with pytest.raises(StateError, match="shape"):
        pooled_mask_f1([(exact, truth[:5])], Reason.SHADOW)


def test_shift_error_ignores_the_common_offset_but_not_the_sign() -> None:
    true = np.array([[0.5, -1.0], [-0.3, 0.2], [1.1, 0.4], [0.0, -0.6]])
    assert shift_rmse_px(true + np.array([3.0, -2.0]), true) == pytest.approx(0, abs=1e-12)
    assert shift_rmse_px(-true, true) > 1
    noise = np.array([[0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]])
    assert shift_rmse_px(true + noise, true) == pytest.approx(0.1)
    assert isnan(shift_rmse_px(true[:1], true[:1]))


def test_failed_shift_counts_as_no_correction() -> None:
    true = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    est = true.copy()
    est[2] = np.nan
    assert shift_rmse_px(est, true) == pytest.approx(sqrt(4 / 3))
    with pytest.raises(StateError, match=r"\(N, 2\)"):
        shift_rmse_px(np.zeros((3, 3)), np.zeros((3, 3)))


def test_label_noise() -> None:
    recall, precision = label_noise_scores([1, 1, 0, 0, 1], [1, 0, 0, 1, 0])
    assert (recall, precision) == (0.5, pytest.approx(1 / 3))
    recall, precision = label_noise_scores([0, 0], [1, 0])
    assert recall == 0
    assert isnan(precision)
    assert isnan(label_noise_scores([1, 0], [0, 0])[0])


def test_map_scores() -> None:
    truth = np.array([[1, 1, 2, 2], [2, 2, 0, 3]])
    mapped = np.array([[1, 2, 2, 2], [2, 0, 1, 3]])
    oa, miou = map_scores(mapped, truth, [1, 2, 3, 4])
    assert oa == pytest.approx(5 / 6)
    assert miou == pytest.approx((1 / 2 + 3 / 4 + 1) / 3)
    assert all(isnan(v) for v in map_scores(np.zeros(3), np.ones(3), [1]))


def test_outlines_moved_by_a_band_overlap_nowhere() -> None:
    truth = np.ones((40, 40), int)
    truth[10:30, 10:30] = 2
    assert class_boundary_iou(truth, truth, [1, 2, 3], pixel_m=10) == 1
    unseen = np.where(truth == 2, 0, truth)  # where the map has no class nothing is scored
    assert class_boundary_iou(unseen, truth, [1, 2], pixel_m=10) == 1
    smaller = np.ones_like(truth)
    smaller[12:28, 12:28] = 2
    both = [class_boundary_iou(smaller, truth, [c], pixel_m=10) for c in (1, 2)]
    assert both[1] == 0, "bands of 20 m, moved by 20 m"
    assert class_boundary_iou(smaller, truth, [1, 2], pixel_m=10) == pytest.approx(sum(both) / 2)
    assert isnan(class_boundary_iou(truth * 0, truth, [1], pixel_m=10))


def test_height_scores() -> None:
    truth = np.array([1.0, 2.0, 3.0, np.nan, 9.0])
    rmse, r2 = height_scores(np.array([1.0, 2.0, 3.0, 4.0, np.nan]), truth)
    assert (rmse, r2) == (0, 1)
    rmse, r2 = height_scores(np.array([3.0, 4.0, 5.0, 4.0, np.nan]), truth)
    assert rmse == pytest.approx(2)
    assert r2 == pytest.approx(1 - 12 / 2)  # perfectly correlated, yet biased
    assert isnan(height_scores(np.ones(2), np.ones(2))[1])
    assert all(isnan(v) for v in height_scores(np.array([np.nan]), np.ones(1)))


def test_areas_inside_ci() -> None:
    sample = ReferenceSample.from_matrix([[40, 10], [5, 45]], [1, 2], SampleKind.STRATIFIED_RANDOM)
    report = estimate_accuracy(sample, Strata.from_pixels({1: 1000, 2: 3000}, 1e4), classes=[1, 2])
    value = report.area_ha[1].value
    assert value == pytest.approx(1000 * 0.8 + 3000 * 0.1)
    assert areas_inside_ci(report, {1: value + 1, 2: 4000 - value}) == (2, 2)
    assert areas_inside_ci(report, {1: value + 5000, 2: 4000 - value}) == (1, 2)
    with pytest.raises(StateError, match=r"\[7\]"):
        areas_inside_ci(report, {7: 1.0})


def test_scoreboard_has_exactly_its_keys_and_null_for_nothing() -> None:
    empty = build_scoreboard()
    assert tuple(empty) == SCORE_KEYS
    assert set(empty.values()) == {None}
    board = build_scoreboard(
        oa=np.float64(0.9), miou=float("inf"), areas_inside_ci=3, areas_total=np.int64(4)
    )
    assert board["oa"] == 0.9
    assert board["miou"] is None
    assert (board["areas_inside_ci"], board["areas_total"]) == (3, 4)
    assert isinstance(board["areas_total"], int)
    assert json.loads(json.dumps(board, allow_nan=False))["ece"] is None
