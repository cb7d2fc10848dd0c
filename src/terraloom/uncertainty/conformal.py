"""Conformal sets of classes and intervals of values, calibrated on held-out labels.

Pixels of one label repeat each other, so the unit that counts is the label (or the block), not the
pixel: each unit has weight 1 / (n + 1), shared by its pixels, and 1 / (n + 1) is left for the unit
to come. For units of one pixel this is split conformal prediction: the ceil((n + 1) coverage)-th
smallest score.

A few lines of numpy: crepes (BSD) and MAPIE (BSD) hold the same rules for rows that are
exchangeable, but neither knows units of many pixels or blocks, and both wrap a learner.

References:
    Vovk et al. (2005), Algorithmic Learning in a Random World; Vovk (2012) for Mondrian categories.
    Sadinle et al. (2019), Least ambiguous set-valued classifiers (LAC: score 1 - p).
    Romano et al. (2020), Classification with valid and adaptive coverage (APS).
    Romano et al. (2019), Conformalized quantile regression.
    Dunn, Wasserman and Ramdas (2022), Distribution-free prediction sets for two-layer hierarchical
    models; Lee, Barber and Willett (2023), Distribution-free inference with hierarchical data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from terraloom.errors import ModelError

__all__ = [
    "ClassSets", "Interval", "Method", "Score", "block_quantile", "class_scores", "fit_interval",
    "fit_sets", "scores_of_classes", "unit_quantile", "value_scores",
]  # fmt: skip

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Method = Literal["split", "class", "block"]
Score = Literal["lac", "aps"]

#: Sums of n weights 1 / (n + 1) miss a coverage by rounding only; this is below 1 / n of any n.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class ClassSets:
    """Which classes stay possible: those whose score is at most the threshold.

    Attributes:
        score: ``lac``: 1 - p; ``aps``: the sum of all probabilities that are not smaller.
        thresholds: One per class; infinite for a class that had too few units to leave it out.
    """

    score: Score
    thresholds: tuple[float, ...]

    def contains(self, p: npt.NDArray[Any], top: npt.NDArray[Any] | None = None) -> Bools:
        """Sets of pixels.

        Args:
            p: (K, ...) class probabilities as those of the calibration; NaN is in no set.
            top: (...) index of the most probable class, where it is known.

        Returns:
            (K, ...); the most probable class is always in, so that no set is empty.
        """
        if p.shape[0] != len(self.thresholds):
            raise ModelError(f"{p.shape[0]} classes", where="conformal sets",
                             allowed=str(len(self.thresholds)),
                             fix="run target `model` again")  # fmt: skip
        if self.score == "lac":
            cuts = 1 - np.array(self.thresholds).reshape(-1, *[1] * (p.ndim - 1))
            inside = p >= cuts.astype(p.dtype)
        else:
            limits = np.array(self.thresholds).reshape(-1, *[1] * (p.ndim - 1))
            inside = _sums_above(p) <= limits
        if top is None:
            top = p.argmax(axis=0)
        for k in range(len(p)):
            inside[k] |= top == k
        known = np.isfinite(p.sum(axis=0))  # a NaN in any class is one in the sum
        if not known.all():
            inside &= known
        return inside

    def record(self) -> dict[str, Any]:
        """Plain values, an infinite threshold as None."""
        each = [t if np.isfinite(t) else None for t in self.thresholds]
        return {"score": self.score, "thresholds": each}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ClassSets:
        """The inverse of :meth:`record`."""
        each = (np.inf if t is None else float(t) for t in record["thresholds"])
        return cls(record["score"], tuple(each))


@dataclass(frozen=True)
class Interval:
    """How a predicted distribution becomes an interval.

    Attributes:
        kind: ``normalised``: mean -+ factor x sd; ``quantile``: the predicted quantiles moved
            outward by ``factor`` (inward where it is negative), in the unit of the task.
        factor: Infinite where there were too few units.
    """

    kind: Literal["normalised", "quantile"]
    factor: float

    def bounds(self, low: npt.NDArray[Any], high: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Lower and upper bound, (2, ...).

        Args:
            low: Mean of ``normalised``, lower quantile of ``quantile``.
            high: Standard deviation of ``normalised``, upper quantile of ``quantile``.
        """
        if self.kind == "normalised":
            reach = self.factor * high
            return np.stack([low - reach, low + reach])
        middle = (low + high) / 2  # a band that is narrowed too far ends at its middle
        lower = np.minimum(low - self.factor, middle)
        return np.stack([lower, np.maximum(high + self.factor, middle)])

    def record(self) -> dict[str, Any]:
        """Plain values, an infinite factor as None."""
        return {"kind": self.kind, "factor": self.factor if np.isfinite(self.factor) else None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Interval:
        """The inverse of :meth:`record`."""
        factor = record["factor"]
        return cls(record["kind"], np.inf if factor is None else float(factor))


def class_scores(p: npt.NDArray[Any], y: npt.NDArray[Any], score: Score = "lac") -> F64:
    """Score of the true class, (N,); high where the prediction was far off.

    Args:
        p: (N, K) class probabilities.
        y: (N,) class index.
        score: See :class:`ClassSets`.
    """
    rows = np.arange(len(y))
    true = p[rows, y].astype(np.float64)
    if score == "lac":
        return np.asarray(1 - true)
    return np.asarray(_sums_above(p.T.astype(np.float64))[y, rows])


def scores_of_classes(p: npt.NDArray[Any], score: Score = "lac") -> F64:
    """Score of every class as if it were the true one, (N, K)."""
    if score == "lac":
        return np.asarray(1 - p.astype(np.float64))
    return np.asarray(_sums_above(p.T.astype(np.float64)).T)


def _sums_above(p: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Per class the sum of all probabilities that are not smaller, (K, ...)."""
    return np.stack([np.where(p >= p[k], p, 0).sum(axis=0) for k in range(len(p))])


def value_scores(
    y: npt.NDArray[Any], low: npt.NDArray[Any], high: npt.NDArray[Any], kind: str
) -> F64:
    """Score of true values: |y - mean| / sd, or how far y lies outside the quantiles.

    Args:
        y: (N,) true values.
        low: (N,) mean of ``normalised``, lower quantile of ``quantile``.
        high: (N,) standard deviation, or upper quantile.
        kind: See :class:`Interval`.
    """
    y, low, high = (np.asarray(v, dtype=np.float64) for v in (y, low, high))
    if kind == "normalised":
        if (high <= 0).any():
            raise ModelError("standard deviations that are not above 0", where="intervals",
                             allowed="a head that predicts its spread")  # fmt: skip
        return np.asarray(np.abs(y - low) / high)
    return np.asarray(np.maximum(low - y, y - high))


def unit_quantile(score: npt.NDArray[Any], unit: npt.NDArray[Any], coverage: float) -> float:
    """Smallest score that covers a pixel of a new unit with at least this probability.

    Args:
        score: (N,) scores.
        unit: (N,) unit of each; units are exchangeable, pixels of a unit need not be.
        coverage: Between 0 and 1.

    Returns:
        The score; infinite with fewer than coverage / (1 - coverage) units.
    """
    _, of, count = np.unique(unit, return_inverse=True, return_counts=True)
    weight = 1 / ((len(count) + 1) * count[of]) if len(count) else np.zeros(0)
    return _weighted_quantile(np.asarray(score, dtype=np.float64), weight, coverage)


def _weighted_quantile(score: F64, weight: F64, share: float) -> float:
    """Smallest score at which the weights up to it reach the share; infinite if they never do."""
    order = np.argsort(score, kind="stable")
    reached = np.cumsum(weight[order]) >= share - _ROUNDING
    return float(score[order[np.argmax(reached)]]) if reached.any() else np.inf


def block_quantile(
    score: npt.NDArray[Any],
    unit: npt.NDArray[Any],
    block: npt.NDArray[Any],
    coverage: float,
    blocks: float,
) -> float:
    """Smallest score that covers the wanted share of a new block with probability ``blocks``.

    Each block has the score that covers this share of its own units. Of B blocks it is the
    ceil((B + 1) blocks)-th smallest; where that is more than B, the largest, which holds for a new
    block with probability B / (B + 1).

    Args:
        score: (N,) scores.
        unit: (N,) unit of each; within a block all count alike.
        block: (N,) block of each.
        coverage: Share of a block, between 0 and 1.
        blocks: Share of blocks, up to 1 (the worst block).
    """
    own = []
    for b in np.unique(block):
        here = block == b
        _, of, count = np.unique(unit[here], return_inverse=True, return_counts=True)
        weight = 1 / (len(count) * count[of])
        own.append(_weighted_quantile(np.asarray(score, dtype=np.float64)[here], weight, coverage))
    if not own:
        return np.inf
    rank = int(np.ceil((len(own) + 1) * blocks - _ROUNDING))
    return float(np.sort(own)[min(rank, len(own)) - 1])


def fit_sets(
    p: npt.NDArray[Any],
    y: npt.NDArray[Any],
    unit: npt.NDArray[Any],
    block: npt.NDArray[Any],
    *,
    method: Method,
    coverage: float,
    blocks: float = 0.9,
    score: Score = "lac",
) -> ClassSets:
    """Thresholds of the sets.

    Args:
        p: (N, K) probabilities by networks that have not seen the labels.
        y: (N,) class index.
        unit: (N,) label of each pixel.
        block: (N,) spatial block of each pixel.
        method: ``split``: one threshold; ``class``: one per class, so that each class is covered
            and the shares of classes in the labels do not matter; ``block``: one that holds block
            by block, see :func:`block_quantile`.
        coverage: Probability that the set holds the true class.
        blocks: With ``block``, share of the blocks.
        score: See :class:`ClassSets`.
    """
    k = p.shape[1]
    s = class_scores(p, y, score)
    if method == "class":
        each = [unit_quantile(s[y == c], unit[y == c], coverage) for c in range(k)]
    elif method == "split":
        each = [unit_quantile(s, unit, coverage)] * k
    else:
        each = [block_quantile(s, unit, block, coverage, blocks)] * k
    return ClassSets(score, tuple(each))


def fit_interval(
    y: npt.NDArray[Any],
    low: npt.NDArray[Any],
    high: npt.NDArray[Any],
    block: npt.NDArray[Any],
    *,
    kind: Literal["normalised", "quantile"],
    method: Method,
    coverage: float,
    blocks: float = 0.9,
) -> Interval:
    """The factor of an interval; the units are blocks, as values have no labels of many pixels.

    Args:
        y: (N,) true values.
        low: See :func:`value_scores`.
        high: See :func:`value_scores`.
        block: (N,) spatial block of each pixel.
        kind: See :class:`Interval`.
        method: ``split`` or ``class``: covered on average over blocks; ``block``: block by block.
        coverage: Probability that the interval holds the true value.
        blocks: With ``block``, share of the blocks.
    """
    s = value_scores(y, low, high, kind)
    if method == "block":
        pixel = np.arange(len(s))
        return Interval(kind, block_quantile(s, pixel, block, coverage, blocks))
    return Interval(kind, unit_quantile(s, block, coverage))
