"""Conformal sets for the true class where the labels of the calibration are wrong at a known rate.

Labels that are wrong at random lie where the prediction says something else: their scores are
high, so thresholds and sets become larger than the true class needs. Let T hold the probability
of a label (column) given the true class (row). If a label depends on the true class alone,

    P(Y = k, s_k <= t) = sum over l of V[k, l] P(label = l, s_k <= t),

V being the transposed inverse of T and s_k the score of class k whatever the label says. So the
distribution of the true class's score is a sum of observed ones with signed weights; its quantile
is the threshold.

References:
    Sesia, Wang and Tong (2024), Adaptive conformal classification with noisy labels.
    Einbinder et al. (2024), Label noise robustness of conformal prediction: why plain sets are
    too large.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.uncertainty.conformal import ClassSets, Method, Score, fit_sets, scores_of_classes

__all__ = ["fit_noise_aware_sets", "true_class_hits", "true_class_weights"]

F64 = npt.NDArray[np.float64]

#: Least probability of a right label, per class: below, the inverse doubts every label.
_LEAST_RIGHT = 0.5
#: As of plain sets: sums of weights miss a coverage by rounding only.
_ROUNDING = 1e-10


def true_class_weights(noise: npt.NDArray[Any]) -> F64 | None:
    """Weights V (K, K) of class k (row) for a label l (column); columns sum to 1.

    Args:
        noise: (K, K) probability of a label (column) given the true class (row).

    Returns:
        None where a class's labels are more often wrong than right: nothing can be said then.
    """
    t = np.asarray(noise, dtype=np.float64)
    if (np.diag(t) < _LEAST_RIGHT).any():
        return None
    weights: F64 = np.asarray(np.linalg.inv(t).T, dtype=np.float64)
    return weights


def true_class_hits(
    inside: npt.NDArray[np.bool_], y: npt.NDArray[Any], noise: npt.NDArray[Any]
) -> F64 | None:
    """Per pixel a number (N,) whose mean is the share of sets that hold the true class.

    Single numbers can be below 0 or above 1.

    Args:
        inside: (N, K) sets.
        y: (N,) class of the label.
        noise: See :func:`true_class_weights`; None is returned where that is.
    """
    weights = true_class_weights(noise)
    if weights is None:
        return None
    hits: F64 = (inside * weights[:, y].T).sum(axis=1)
    return hits


def fit_noise_aware_sets(
    p: npt.NDArray[Any],
    y: npt.NDArray[Any],
    unit: npt.NDArray[Any],
    block: npt.NDArray[Any],
    noise: npt.NDArray[Any],
    *,
    method: Method,
    coverage: float,
    score: Score = "lac",
) -> ClassSets:
    """Thresholds of sets that hold the true class; never larger than those of the labels.

    Without noise they are those of :func:`fit_sets`, to the bit. There is no guarantee for few
    labels: the weights are estimates, and so is the distribution.

    Args:
        p: (N, K) probabilities by networks that have not seen the labels.
        y: (N,) class of the label.
        unit: (N,) label of each pixel.
        block: (N,) spatial block of each pixel; of the plain thresholds.
        noise: See :func:`true_class_weights`.
        method: ``split`` or ``class``; with ``block`` the plain thresholds are kept.
        coverage: Probability that the set holds the true class.
        score: See :class:`ClassSets`.
    """
    plain = fit_sets(p, y, unit, block, method=method, coverage=coverage, score=score)
    weights = true_class_weights(noise)
    if method == "block" or weights is None or not len(y):
        return plain
    scores = scores_of_classes(p, score)
    _, of, count = np.unique(unit, return_inverse=True, return_counts=True)
    each = weights[:, y] / count[of]  # (K, N): what a pixel counts for each class
    if method == "split":
        found = [_signed_quantile(scores.T.ravel(), each.ravel(), len(count), coverage)] * len(each)
    else:
        found = [
            _signed_quantile(scores[:, k], each[k], float(each[k].sum()), coverage)
            for k in range(len(each))
        ]
    return ClassSets(score, tuple(min(a, b) for a, b in zip(found, plain.thresholds, strict=True)))


def _signed_quantile(score: F64, weight: F64, n: float, share: float) -> float:
    """Smallest score from which on the weights up to it stay at or above share x (n + 1).

    Signed weights may fall back below; what is reached for good counts, which is the larger
    threshold.
    """
    some = weight != 0
    score, weight = score[some], weight[some]
    order = np.argsort(score, kind="stable")
    reached = np.cumsum(weight[order]) / (n + 1) >= share - _ROUNDING
    if not len(reached) or not reached[-1]:
        return np.inf
    short = np.flatnonzero(~reached)
    return float(score[order[short[-1] + 1 if len(short) else 0]])
