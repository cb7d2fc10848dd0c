"""Labels that are probably wrong: confident learning on held-out probabilities.

Reference:
    Northcutt, Jiang, Chuang (2021), Confident Learning: Estimating Uncertainty in Dataset Labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import LabelError

__all__ = [
    "confident_joint", "confident_thresholds", "noise_beyond_chance", "noise_matrix",
    "suspect_labels",
]  # fmt: skip

#: A probability this far below its threshold still reaches it: both are sums of rounded numbers.
_ROUNDING = 1e-6


def confident_thresholds(
    probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Mean probability of class j over the labels that say j, (K,); NaN for a class without one.

    Args:
        probabilities: (N, K) held-out class probabilities.
        labels: (N,) class index.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 2 or y.shape != (len(p),):
        raise LabelError(f"probabilities {p.shape}, labels {y.shape}", where="confident learning")
    k = p.shape[1]
    return np.array([p[y == j, j].mean() if (y == j).any() else np.nan for j in range(k)])


def suspect_labels(
    probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
    """Labels that another class contradicts with confidence.

    A class speaks for a sample when its probability reaches the class's own threshold; of the
    classes that speak the most probable one counts. A label is suspect when that is not its own.

    Returns:
        (N,) flags and (N,) the class that counts (the label itself where none speaks).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels).astype(np.intp)
    best = _confident_class(p, y)
    best = np.where(best < 0, y, best)
    return best != y, best


def _confident_class(p: npt.NDArray[np.float64], y: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The most probable of the classes that reach their threshold, (N,); -1 where none does."""
    speaks = p >= confident_thresholds(p, y) - _ROUNDING  # NaN threshold: never
    return np.where(speaks.any(axis=1), np.where(speaks, p, -1.0).argmax(axis=1), -1)


def confident_joint(
    probabilities: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    *,
    weights: npt.NDArray[Any] | None = None,
    calibrated: bool = True,
) -> npt.NDArray[np.float64]:
    """Labels (row) against the true classes that held-out predictions are sure of, (K, K).

    Only samples for which a class reaches its threshold count. Samples nobody is sure of are
    often wrong as well: to take them as they are would make the noise look smaller than it is.

    Args:
        probabilities: (N, K) held-out class probabilities.
        labels: (N,) class index.
        weights: (N,) what a sample counts, >= 0; default: 1. Without influence on the thresholds.
        calibrated: Scale each row to the number of its labels; a label that nobody is sure of
            counts as right.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels).astype(np.intp)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    best = _confident_class(p, y)
    sure = best >= 0
    joint = np.zeros((p.shape[1], p.shape[1]))
    np.add.at(joint, (y[sure], best[sure]), w[sure])
    if calibrated:
        count = np.bincount(y, w, minlength=len(joint))
        none = np.flatnonzero(joint.sum(axis=1) == 0)
        joint[none, none] = count[none]
        total = joint.sum(axis=1)
        joint *= (count / np.where(total > 0, total, 1.0))[:, None]
    return joint


def noise_matrix(joint: npt.NDArray[np.float64], *, prior: float = 0.0) -> npt.NDArray[np.float64]:
    """Probability of a label (column) given the true class (row), (K, K); rows sum to 1.

    Args:
        joint: (K, K) labels (row) against true classes (column), of :func:`confident_joint`.
        prior: Right labels that each class is taken to have beside those counted (count). A class
            that never counts is taken as labelled without error.
    """
    counts = joint.T + prior * np.eye(len(joint))
    empty = np.flatnonzero(counts.sum(axis=1) == 0)
    counts[empty, empty] = 1.0
    out: npt.NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
    return out


def noise_beyond_chance(
    probabilities: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    rng: np.random.Generator,
    *,
    draws: int = 20,
) -> npt.NDArray[np.float64]:
    """Noise that labels show beyond what labels drawn from the predictions would show, (K, K).

    Where classes look alike, right labels are contradicted too, and :func:`noise_matrix` takes that
    for noise. What as many labels drawn from the predicted probabilities show is taken off, entry
    by entry, so that noise is rather missed than made up.

    Args:
        probabilities: (N, K) held-out, calibrated probabilities of N labels.
        labels: (N,) class index.
        rng: Source of the draws.
        draws: How often labels are drawn (count).

    Returns:
        Probability of a label (column) given the true class (row); rows sum to 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    found = noise_matrix(confident_joint(p, labels))
    limits = np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    chance = np.zeros_like(found)
    for _ in range(draws):
        drawn = (rng.random((len(p), 1)) > limits).sum(axis=1)
        chance += noise_matrix(confident_joint(p, drawn)) / draws
    beyond: npt.NDArray[np.float64] = np.clip(found - chance, 0, None)
    np.fill_diagonal(beyond, 0)
    np.fill_diagonal(beyond, 1 - beyond.sum(axis=1))
    return beyond
