"""Calibration of class probabilities on folds that did not train.

Temperature scaling of the ensemble mean: members are averaged first, then one number (or one per
class) sharpens or flattens the result. The calibration error that is reported is cross-fitted:
each fold is judged with the temperature of the other folds, never with its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

from terraloom.errors import FoldError, ModelError

__all__ = [
    "Calibration",
    "Reliability",
    "apply_temperature",
    "brier_score",
    "calibrate",
    "calibration_error",
    "cross_fitted",
    "fit_temperature",
    "negative_log_likelihood",
    "reliability",
]

Array = npt.NDArray[np.float64]
#: Probabilities are floored here before logarithms; float32 softmax gives exact zeros.
_FLOOR = 1e-12
#: Temperatures outside of this are not sensible and mean that the members are unusable.
_T_RANGE = (0.05, 20.0)


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


def brier_score(p: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Multi-class Brier score, mean of sum_k (p_k - y_k)^2, from 0 to 2."""
    prob, label = _checked(p, y)
    true = prob[np.arange(len(label)), label]
    return float(((prob**2).sum(1) - 2 * true + 1).mean())


def negative_log_likelihood(p: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Mean of -ln p of the true class (nats)."""
    prob, label = _checked(p, y)
    return float(-np.log(prob[np.arange(len(label)), label].clip(_FLOOR)).mean())


def apply_temperature(p: npt.ArrayLike, temperature: float | npt.ArrayLike) -> Array:
    """Probabilities proportional to p^(1/T).

    Args:
        p: (..., K) probabilities.
        temperature: T > 0; above 1 flattens. One number keeps the order of classes (the map does
            not change); a vector (K,) may change it.

    Returns:
        (..., K) probabilities that sum to 1; NaN stays NaN.
    """
    t = np.asarray(temperature, dtype=np.float64)
    if not (np.isfinite(t).all() and (t > 0).all()):
        raise ModelError(f"temperature {t.tolist()}", allowed="> 0")
    z = np.log(np.asarray(p, dtype=np.float64).clip(_FLOOR)) / t
    z = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(z / z.sum(-1, keepdims=True))


def fit_temperature(p: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """The temperature with the smallest negative log likelihood.

    The likelihood is convex in 1/T, so a bounded line search finds the minimum.
    """
    prob, label = _checked(p, y)
    z = np.log(prob.clip(_FLOOR))
    true = z[np.arange(len(label)), label]

    def loss(beta: float) -> float:
        s = z * beta
        top = s.max(1)
        return float((top + np.log(np.exp(s - top[:, None]).sum(1)) - beta * true).mean())

    low, high = 1 / _T_RANGE[1], 1 / _T_RANGE[0]
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded",
                                     options={"xatol": 1e-6})  # fmt: skip
    return float(1 / found.x)


def cross_fitted(
    p: npt.ArrayLike, y: npt.ArrayLike, fold: npt.ArrayLike
) -> tuple[Array, dict[int, float]]:
    """Calibrated probabilities where each fold uses the temperature of all other folds.

    Returns:
        (N, K) probabilities and the temperature used per fold.

    Raises:
        FoldError: Fewer than two folds have labels.
    """
    prob, label = _checked(p, y)
    folds = np.asarray(fold)
    names = [int(f) for f in np.unique(folds)]
    if len(names) < 2:
        raise FoldError(f"{len(names)} fold with held-out labels", where="calibration",
                        allowed="2 or more", fix="use more folds or more labels")  # fmt: skip
    out = np.empty_like(prob)
    used: dict[int, float] = {}
    for f in names:
        here = folds == f
        used[f] = fit_temperature(prob[~here], label[~here])
        out[here] = apply_temperature(prob[here], used[f])
    return out, used


@dataclass(frozen=True)
class Calibration:
    """Result of calibration; the temperature goes into prediction.

    Attributes:
        temperature: Fitted on all folds, for the map.
        fold_temperature: Temperature used for each fold's report.
        before: ece, rmsce, mce, brier, nll of the plain ensemble mean.
        after: The same after cross-fitted scaling.
        table_before: Reliability before.
        table_after: Reliability after cross-fitted scaling.
        n_bins: Bins of the calibration error.
        n_pixels: Held-out pixels.
    """

    temperature: float
    fold_temperature: dict[int, float]
    before: dict[str, float]
    after: dict[str, float]
    table_before: Reliability
    table_after: Reliability
    n_bins: int
    n_pixels: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``calibration.json``."""
        return {
            "method": "temperature scaling of the ensemble mean, cross-fitted over spatial folds",
            "temperature": self.temperature,
            "fold_temperature": {str(k): v for k, v in self.fold_temperature.items()},
            "before": self.before,
            "after": self.after,
            "n_bins": self.n_bins,
            "n_pixels": self.n_pixels,
        }


def calibrate(
    p: npt.ArrayLike, y: npt.ArrayLike, fold: npt.ArrayLike, *, n_bins: int = 15
) -> Calibration:
    """Fit the temperature and report calibration honestly.

    Args:
        p: (N, K) out-of-fold probabilities, mean of the members of each pixel's fold.
        y: (N,) classes.
        fold: (N,) fold of each pixel.
        n_bins: Bins of the calibration error.
    """
    prob, label = _checked(p, y)
    scaled, used = cross_fitted(prob, label, fold)
    return Calibration(
        fit_temperature(prob, label), used, _scores(prob, label, n_bins),
        _scores(scaled, label, n_bins), reliability(prob, label, n_bins=n_bins),
        reliability(scaled, label, n_bins=n_bins), n_bins, len(label),
    )  # fmt: skip


def _scores(p: Array, y: npt.NDArray[np.int64], n_bins: int) -> dict[str, float]:
    table = reliability(p, y, n_bins=n_bins)
    return {
        "ece": table.error("l1"),
        "rmsce": table.error("l2"),
        "mce": table.error("max"),
        "brier": brier_score(p, y),
        "nll": negative_log_likelihood(p, y),
    }
