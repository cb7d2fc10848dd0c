"""Scores of held-out predictions beyond the confusion matrix, and how they vary over folds.

Model skill on labels, not map accuracy: labels are no probability sample. Every score has its n;
neighbouring pixels are alike, so n says little about how sure a score is, and the spread over folds
says more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terraloom.assess.boundaries import BoundaryScores, boundary_f1
from terraloom.assess.reliability import confusion_matrix, skill_from_matrix
from terraloom.assess.selective import risk_coverage, sparsification
from terraloom.train.calibrate import (
    adaptive_calibration_error,
    brier_score,
    calibration_error,
    class_calibration_errors,
    negative_log_likelihood,
)

__all__ = ["EDGE_TOLERANCE_M", "edge_scores", "fold_spread", "probability_scores", "value_scores"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Distance at which two outlines count as one, metres: two pixels of the grid.
EDGE_TOLERANCE_M = 20.0


def probability_scores(
    p: F64, y: I64, fold: NDArray[np.generic], names: Sequence[str], *, n_bins: int
) -> dict[str, Any]:
    """Calibration, sharpness and selection of class probabilities, JSON-able.

    Args:
        p: (N, K) calibrated probabilities.
        y: (N,) class indices.
        fold: (N,) fold of each pixel.
        names: K class names.
        n_bins: Bins of the calibration errors.

    Returns:
        ``ece`` (equal-width bins of the top label), ``ece_adaptive`` (bins of equal mass),
        ``ece_class`` by class (one against the rest), ``rmsce``, ``mce``; ``brier`` (0-2), ``nll``
        (nats); ``aurc``, ``e_aurc``, ``augrc``, ``aurc_trapezoid``; ``n``, ``n_bins``; ``folds``.
    """
    wrong = p.argmax(axis=1) != y
    chosen = risk_coverage(p.max(axis=1), wrong)
    by_class = class_calibration_errors(p, y, n_bins=n_bins)

    def scores(at: NDArray[np.bool_]) -> dict[str, float]:
        skill = skill_from_matrix(
            confusion_matrix(y[at], p[at].argmax(axis=1), range(len(names)), ignore=None)
        )
        return {
            "oa": float(skill.oa),
            "macro_f1": float(skill.macro_f1),
            "ece": calibration_error(p[at], y[at], n_bins=n_bins),
            "brier": brier_score(p[at], y[at]),
            "nll": negative_log_likelihood(p[at], y[at]),
        }

    return {
        "n": len(y),
        "n_bins": n_bins,
        "ece": calibration_error(p, y, n_bins=n_bins),
        "ece_adaptive": adaptive_calibration_error(p, y, n_bins=n_bins),
        "ece_class": dict(zip(names, by_class.tolist(), strict=True)),
        "rmsce": calibration_error(p, y, n_bins=n_bins, norm="l2"),
        "mce": calibration_error(p, y, n_bins=n_bins, norm="max"),
        "brier": brier_score(p, y),
        "nll": negative_log_likelihood(p, y),
        "aurc": chosen.aurc,
        "e_aurc": chosen.excess,
        "augrc": chosen.augrc,
        "aurc_trapezoid": chosen.trapezoid,
        "folds": fold_spread(fold, scores),
    }


def fold_spread(
    fold: NDArray[np.generic], scores: Callable[[NDArray[np.bool_]], dict[str, float]]
) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of scores over folds.

    Args:
        fold: (N,) fold of each pixel.
        scores: Scores of the pixels of a mask.

    Returns:
        Per score ``mean``, ``sd`` (None with one fold) and ``values`` in the order of ``fold``.
    """
    names = np.unique(fold)
    rows = [scores(fold == name) for name in names]
    out: dict[str, Any] = {"fold": [int(name) for name in names]}
    for key in rows[0]:
        values = np.array([row[key] for row in rows])
        known = values[np.isfinite(values)]
        out[key] = {
            "mean": float(known.mean()) if known.size else None,
            "sd": float(known.std(ddof=1)) if known.size > 1 else None,
            "values": [float(v) if np.isfinite(v) else None for v in values],
        }
    return out


def value_scores(mean: F64, variance: F64, y: F64, fold: NDArray[np.generic]) -> dict[str, Any]:
    """Errors of predicted values, and whether the predicted variance finds them; JSON-able.

    Args:
        mean: (N,) predicted means.
        variance: (N,) predicted total variances.
        y: (N,) true values.
        fold: (N,) fold of each pixel.

    Returns:
        ``mae``; ``ause`` (root mean squared error, 0 is perfect) and ``sparsification``: share
        taken out and error of the rest over that of all, with the oracle's; ``folds``.
    """
    error = mean - y
    curve = sparsification(variance, error**2, root=True)

    def scores(at: NDArray[np.bool_]) -> dict[str, float]:
        e = error[at]
        return {"rmse": float(np.sqrt((e**2).mean())), "bias": float(e.mean()),
                "mae": float(np.abs(e).mean())}  # fmt: skip

    return {
        "mae": float(np.abs(error).mean()),
        "ause": curve.ause,
        "sparsification": {
            "removed": curve.removed.tolist(),
            "curve": curve.curve.tolist(),
            "oracle": curve.oracle.tolist(),
        },
        "folds": fold_spread(fold, scores),
    }


def edge_scores(
    index: I64, found: NDArray[np.bool_], true: NDArray[np.bool_], shape: tuple[int, int],
    pixel_m: float, tolerance_m: float = EDGE_TOLERANCE_M,
) -> dict[str, Any]:  # fmt: skip
    """Precision, recall and F1 of outlines within a tolerance, over all chips; JSON-able.

    Args:
        index: (S,) ascending positions of the labelled pixels in the flattened (N, h, w) chips.
        found: (S,) predicted outline.
        true: (S,) labelled outline.
        shape: (h, w) of a chip.
        pixel_m: Pixel size, metres.
        tolerance_m: What counts as near, metres.
    """
    size = shape[0] * shape[1]
    order = np.argsort(index, kind="stable")
    index, found, true = index[order], found[order], true[order]
    counts = np.zeros(4, dtype=np.int64)
    chips, starts = np.unique(index // size, return_index=True)
    for chip, lo, hi in zip(chips, starts, [*starts[1:], index.size], strict=True):
        masks = np.zeros((3, size), dtype=np.bool_)
        at = index[lo:hi] - chip * size
        masks[0, at], masks[1, at], masks[2, at] = found[lo:hi], true[lo:hi], True
        a, b, valid = masks.reshape(3, *shape)
        counts += boundary_f1(a, b, tolerance_m=tolerance_m, pixel_m=pixel_m, valid=valid)
    near_found, n_found, near_true, n_true = (int(n) for n in counts)
    s = BoundaryScores.of_counts(near_found, n_found, near_true, n_true, tolerance_m)
    return {
        name: value if np.isfinite(value) else None
        for name, value in (
            ("near_precision", s.precision), ("near_recall", s.recall), ("near_f1", s.f1),
            ("tolerance_m", tolerance_m),
        )
    }  # fmt: skip
