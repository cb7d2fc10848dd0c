"""Measures of calibration, and the rescaling of probabilities that :mod:`.ensemble` fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from terraloom.errors import ModelError

__all__ = [
    "Reliability",
    "adaptive_calibration_error",
    "brier_score",
    "calibration_error",
    "class_calibration_errors",
    "log_probabilities",
    "negative_log_likelihood",
    "reliability",
    "rescale",
]

Array = npt.NDArray[np.float64]
#: Probabilities are floored here before logarithms; float32 softmax gives exact zeros.
_FLOOR = 1e-12


@dataclass(frozen=True)
class Reliability:
    """Reliability table over equal-width, right-closed bins of the top-label confidence.

    Attributes:
        confidence: (n_bins,) mean confidence; NaN in an empty bin.
        accuracy: (n_bins,) share of correct labels; NaN in an empty bin.
        count: (n_bins,) pixels.
    """

    confidence: Array
    accuracy: Array
    count: npt.NDArray[np.int64]

    @property
    def gaps(self) -> Array:
        """|accuracy - confidence| of the bins that are not empty."""
        ok = self.count > 0
        return np.abs(self.accuracy[ok] - self.confidence[ok])

    def error(self, norm: str = "l1") -> float:
        """Expected (l1), root mean square (l2) or maximum (max) calibration error."""
        share = self.count[self.count > 0] / max(int(self.count.sum()), 1)
        if norm == "l1":
            return float((share * self.gaps).sum())
        if norm == "l2":
            return float(np.sqrt((share * self.gaps**2).sum()))
        if norm == "max":
            return float(self.gaps.max(initial=0.0))
        raise ModelError(f"norm {norm!r}", where="calibration error", allowed="l1, l2, max")


def _checked(p: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.int64]]:
    prob = np.asarray(p, dtype=np.float64)
    label = np.asarray(y).astype(np.int64)
    if prob.ndim != 2 or label.shape != prob.shape[:1] or not len(label):
        raise ModelError(f"probabilities {prob.shape} beside labels {label.shape}",
                         allowed="(N, K) and (N,), N > 0")  # fmt: skip
    if label.min() < 0 or label.max() >= prob.shape[1]:
        raise ModelError(
            f"labels {label.min()} to {label.max()}", allowed=f"0 to {prob.shape[1] - 1}"
        )
    if not np.isfinite(prob).all():
        raise ModelError("probabilities that are not finite", where="calibration")
    return prob, label


def reliability(p: npt.ArrayLike, y: npt.ArrayLike, *, n_bins: int = 15) -> Reliability:
    """Reliability table of top-label confidence.

    Args:
        p: (N, K) probabilities.
        y: (N,) true class indices.
        n_bins: Equal-width bins (b/n, (b+1)/n] of confidence; a confidence of 0 joins the first.
    """
    prob, label = _checked(p, y)
    conf = prob.max(1)
    right = (prob.argmax(1) == label).astype(np.float64)
    edges = np.linspace(0, 1, n_bins + 1)
    b = np.clip(np.searchsorted(edges, conf, side="left") - 1, 0, n_bins - 1)
    n = np.bincount(b, minlength=n_bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(b, conf, n_bins) / n
        acc = np.bincount(b, right, n_bins) / n
    return Reliability(mean, acc, n.astype(np.int64))


def calibration_error(
    p: npt.ArrayLike, y: npt.ArrayLike, *, n_bins: int = 15, norm: str = "l1"
) -> float:
    """Calibration error of top-label confidence; ``l1`` is the ECE. Biased upward for small N."""
    return reliability(p, y, n_bins=n_bins).error(norm)


def adaptive_calibration_error(p: npt.ArrayLike, y: npt.ArrayLike, *, n_bins: int = 15) -> float:
    """Calibration error of the top label over bins of equal mass (pixels in order of confidence).

    Equal widths leave most bins of a confident model empty; equal mass does not.
    """
    prob, label = _checked(p, y)
    conf, right = prob.max(1), (prob.argmax(1) == label).astype(np.float64)
    order = np.argsort(conf, kind="stable")
    parts = np.array_split(order, min(n_bins, len(order)))
    gaps = [len(i) * abs(float(right[i].mean() - conf[i].mean())) for i in parts]
    return sum(gaps) / len(order)


def class_calibration_errors(p: npt.ArrayLike, y: npt.ArrayLike, *, n_bins: int = 15) -> Array:
    """Calibration error (K,) of each class against the rest, over equal-width bins of p_k."""
    prob, label = _checked(p, y)
    k = prob.shape[1]
    out = np.zeros(k)
    for c in range(k):
        b = np.clip(np.ceil(prob[:, c] * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
        gap = np.bincount(b, prob[:, c] - (label == c), n_bins)
        out[c] = np.abs(gap).sum() / len(label)
    return out


def brier_score(p: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Multi-class Brier score, mean of sum_k (p_k - y_k)^2, from 0 to 2."""
    prob, label = _checked(p, y)
    true = prob[np.arange(len(label)), label]
    return float(((prob**2).sum(1) - 2 * true + 1).mean())


def negative_log_likelihood(p: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Mean of -ln p of the true class (nats)."""
    prob, label = _checked(p, y)
    return float(-np.log(prob[np.arange(len(label)), label].clip(_FLOOR)).mean())


def rescale(p: npt.ArrayLike, scale: npt.ArrayLike, shift: npt.ArrayLike = 0.0) -> Array:
    """Probabilities proportional to exp(scale ln p + shift): softmax of rescaled logits.

    Args:
        p: (..., K) probabilities.
        scale: One number or (K,), > 0; below 1 flattens. One number (1 / temperature) keeps the
            order of classes, so that the map does not change; several may change it.
        shift: One number or (K,), in nats.

    Returns:
        (..., K) probabilities that sum to 1; NaN stays NaN.

    Raises:
        ModelError: A scale that is not above 0, or numbers that are not finite.
    """
    a, b = np.asarray(scale, dtype=np.float64), np.asarray(shift, dtype=np.float64)
    if not (np.isfinite(a).all() and (a > 0).all() and np.isfinite(b).all()):
        raise ModelError(f"scale {a.tolist()}, shift {b.tolist()}", where="calibration",
                         allowed="scale > 0, both finite")  # fmt: skip
    z = log_probabilities(p) * a
    if b.any():
        z += b
    z = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(z / z.sum(-1, keepdims=True))


def log_probabilities(p: npt.ArrayLike) -> Array:
    """Logarithms of probabilities, floored where a network says exactly 0."""
    return np.asarray(np.log(np.asarray(p, dtype=np.float64).clip(_FLOOR)))
