"""Does low confidence find the errors? Risk-coverage, sparsification, and what curves sum up to.

Conventions, since names alone do not settle them. Units are taken surest first; units of equal
confidence share their errors, so that the order in which they come does not matter.

* AURC: mean over i of the errors among the first i, divided by i.
* E-AURC: AURC less that of the best possible order.
* AUGRC: mean over i of the errors among the first i, divided by n; an error among the first few
  weighs no more than any other (Traub et al. 2024).
* Trapezoid: area under the curve of AURC over coverage 1/n to 1, divided by 1 - 1/n; what
  torch-uncertainty calls AURC.
* AUSE: area between the sparsification curve (error of what is left after taking out the least
  sure) and that of an oracle who takes out the largest errors, over shares taken out from 0 to 1,
  both divided by the error of all; 0 is perfect (Ilg et al. 2018).

References:
    Geifman, Uziel & El-Yaniv (2019), ICLR: E-AURC.
    Traub et al. (2024), NeurIPS: AUGRC.
    Ilg et al. (2018), ECCV: sparsification.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.errors import DesignError

__all__ = ["RiskCoverage", "Sparsification", "risk_coverage", "sparsification"]

F64 = NDArray[np.float64]

#: Shares taken out at which sparsification curves are given.
_STEPS = 20


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """What the risk-coverage curve sums up to.

    Attributes:
        aurc: Area under the risk-coverage curve, 0-1; lower is better.
        excess: E-AURC, AURC less the least possible.
        augrc: Area under the generalised risk-coverage curve, 0-0.5.
        trapezoid: AURC by the trapezoid rule.
        n: Units.
    """

    aurc: float
    excess: float
    augrc: float
    trapezoid: float
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class Sparsification:
    """Error of what is left when the least sure units are taken out.

    Attributes:
        removed: (S,) share of units taken out, from 0.
        curve: (S,) error of the rest over the error of all.
        oracle: (S,) the same when the largest errors are taken out first.
        ause: Area between the two; 0 is perfect.
    """

    removed: F64
    curve: F64
    oracle: F64
    ause: float


def risk_coverage(confidence: ArrayLike, wrong: ArrayLike) -> RiskCoverage:
    """AURC and its kin.

    Args:
        confidence: (N,) larger is surer.
        wrong: (N,) loss of each unit: 1 for an error, 0 else, or any value of at least 0.

    Raises:
        DesignError: If the lengths differ, there is no unit, or a value is not finite.
    """
    conf, loss = _checked(confidence, wrong)
    n = loss.size
    first = np.arange(1, n + 1)
    errors = np.cumsum(_shared(loss, -conf))
    risk = errors / first
    best = np.cumsum(np.sort(loss)) / first
    area = float(((risk[1:] + risk[:-1]) / 2).sum() / (n - 1)) if n > 1 else float(risk[0])
    return RiskCoverage(
        float(risk.mean()), float(risk.mean() - best.mean()), float(errors.mean() / n), area, n
    )


def sparsification(
    uncertainty: ArrayLike, error: ArrayLike, *, root: bool = False
) -> Sparsification:
    """Sparsification curve of an uncertainty and its area above the oracle's.

    Args:
        uncertainty: (N,) larger is less sure.
        error: (N,) error of each unit, at least 0; squared errors for `root`.
        root: Take the root of each mean, as for RMSE.

    Raises:
        DesignError: If the lengths differ, there is no unit, or a value is not finite.
    """
    unsure, loss = _checked(uncertainty, error)
    steps = np.arange(_STEPS) / _STEPS

    def curve(order_by: F64) -> F64:
        # Surest first: the first j units are what is left after the rest was taken out.
        total = np.cumsum(_shared(loss, order_by))
        mean = total / np.arange(1, loss.size + 1)
        left = np.maximum(np.ceil((1 - steps) * loss.size - 1e-9).astype(int), 1)
        part = np.sqrt(mean[left - 1]) if root else mean[left - 1]
        return np.asarray(part)

    own, oracle = curve(unsure), curve(loss)
    whole = own[0]
    if whole == 0:
        zero = np.zeros(_STEPS)
        return Sparsification(steps, zero, zero, 0.0)
    own, oracle = own / whole, oracle / whole
    # The last step, where nothing is left, adds nothing.
    gap = np.append(own - oracle, 0.0)
    return Sparsification(steps, own, oracle, float(((gap[1:] + gap[:-1]) / 2).sum() / _STEPS))


def _shared(loss: F64, order_by: F64) -> F64:
    """Losses in ascending order of a key; units of one key share the mean of their losses."""
    keys, index, count = np.unique(order_by, return_inverse=True, return_counts=True)
    mean = np.bincount(index, loss, keys.size) / count
    return np.asarray(np.repeat(mean, count))


def _checked(key: ArrayLike, loss: ArrayLike) -> tuple[F64, F64]:
    a, b = np.asarray(key, dtype=np.float64).ravel(), np.asarray(loss, dtype=np.float64).ravel()
    if a.size != b.size or not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DesignError(
            f"{a.size} confidences, {b.size} losses", where="risk and coverage",
            allowed="the same number of finite values, at least one",
        )  # fmt: skip
    return a, b
