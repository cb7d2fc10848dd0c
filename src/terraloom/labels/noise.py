"""Labels that are probably wrong: confident learning on held-out probabilities.

Reference:
    Northcutt, Jiang, Chuang (2021), Confident Learning: Estimating Uncertainty in Dataset Labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import LabelError

__all__ = ["confident_thresholds", "noise_matrix", "suspect_labels"]


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
    speaks = p >= confident_thresholds(p, y)  # NaN threshold: never
    best = np.where(speaks, p, -1.0).argmax(axis=1)
    best = np.where(speaks.any(axis=1), best, y)
    return best != y, best


def noise_matrix(
    labels: npt.NDArray[Any], likely: npt.NDArray[Any], classes: int
) -> npt.NDArray[np.float64]:
    """Probability of a label (column) given the true class (row), (K, K); rows sum to 1.

    From the confident joint: labels against the class that counts (:func:`suspect_labels`). A
    class that never counts is taken as labelled without error.
    """
    joint = np.zeros((classes, classes))
    np.add.at(joint, (np.asarray(likely), np.asarray(labels)), 1.0)
    empty = joint.sum(axis=1) == 0
    joint[empty, empty.nonzero()[0]] = 1.0
    out: npt.NDArray[np.float64] = joint / joint.sum(axis=1, keepdims=True)
    return out
