"""Calibration of an ensemble: all members are rescaled alike, before they are averaged.

What is fitted is the *average of the rescaled members*, to labels on which the members did not
train. Rescaling the average instead would calibrate as well, but its entropy would no longer be
the sum of the members' mean entropy and their disagreement.

References:
    Guo et al. (2017), On Calibration of Modern Neural Networks (temperature and vector scaling).
    Patrini et al. (2017), Making Deep Neural Networks Robust to Label Noise (forward correction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from terraloom.errors import FoldError, ModelError
from terraloom.train.calibrate import log_probabilities, negative_log_likelihood, rescale

__all__ = ["Calibration", "averaged", "calibrated", "cross_fitted_average", "fit_calibration"]

F64 = npt.NDArray[np.float64]
Method = Literal["temperature", "vector"]

#: Range of temperatures that is searched; the ends mean a useless model.
_RANGE = (0.2, 5.0)
#: A class's scale stays within this factor of that of all, its shift within this many nats.
_LOG_FACTOR, _MOST_SHIFT = float(np.log(4.0)), 4.0
#: Pixels used for the search: neighbouring pixels repeat each other, more only cost time.
_SEARCH_PX = 40_000
#: Weight of squared departures from the common temperature, beside a mean log likelihood; a class
#: with fewer pixels than `_FEW_PX` is held closer to it.
_RIDGE, _FEW_PX = 0.01, 100


@dataclass(frozen=True)
class Calibration:
    """How class probabilities are rescaled: proportional to exp(scale ln p + shift).

    Attributes:
        method: ``temperature``: one scale for all classes, no shift; ``vector``: a scale and a
            shift per class.
        scale: One number (1 / temperature) or K, > 0.
        shift: None, or K, in nats.
    """

    method: Method = "temperature"
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = ()

    @property
    def temperature(self) -> float:
        """Temperature; of ``vector``, the geometric mean of those of the classes."""
        return float(1 / np.exp(np.log(self.scale).mean()))

    def record(self) -> dict[str, Any]:
        """Plain values, for ``calibration.json``."""
        if self.method == "temperature":
            return {"method": self.method, "temperature": self.temperature}
        return {"method": self.method, "scale": list(self.scale), "shift": list(self.shift)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Calibration:
        """The calibration that :meth:`record` wrote.

        Raises:
            ModelError: It is none.
        """
        try:
            if record["method"] == "temperature":
                return cls("temperature", (1 / float(record["temperature"]),))
            if record["method"] == "vector":
                scale, shift = (tuple(float(v) for v in record[k]) for k in ("scale", "shift"))
                if len(scale) == len(shift):
                    return cls("vector", scale, shift)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as err:
            raise ModelError(f"a calibration that cannot be read ({err!r})",
                             where="results/model/calibration.json",
                             fix="run target `model` again") from err  # fmt: skip
        raise ModelError(f"calibration {dict(record)}", where="results/model/calibration.json",
                         allowed="method `temperature` or `vector` with as many shifts as scales",
                         fix="run target `model` again")  # fmt: skip


def calibrated(
    members: npt.NDArray[Any], calibration: Calibration, *, axis: int = -1
) -> npt.NDArray[Any]:
    """Members with their class probabilities rescaled; shape and dtype stay.

    Args:
        members: Probabilities with the classes along ``axis``.
        calibration: See :func:`fit_calibration`.
        axis: Axis of the K classes.

    Raises:
        ModelError: Another number of classes than the calibration's.
    """
    moved = np.moveaxis(members, axis, -1)
    if len(calibration.scale) not in (1, moved.shape[-1]):
        raise ModelError(f"{moved.shape[-1]} classes", where="calibration",
                         allowed=str(len(calibration.scale)),
                         fix="run target `model` again")  # fmt: skip
    out = rescale(moved, calibration.scale, calibration.shift or 0.0)
    return np.moveaxis(out, -1, axis).astype(members.dtype)


def averaged(members: npt.NDArray[Any], calibration: Calibration | None = None) -> F64:
    """(N, K) average of rescaled members (M, N, K); without a calibration of plain ones."""
    how = calibration or Calibration()
    total = sum(calibrated(np.asarray(p, dtype=np.float64), how) for p in members)
    return np.asarray(total / len(members), dtype=np.float64)


def fit_calibration(
    members: npt.NDArray[Any],
    y: npt.ArrayLike,
    method: Method = "temperature",
    noise: F64 | None = None,
) -> Calibration:
    """The calibration with the smallest negative log likelihood of the averaged members.

    With ``vector``, departures of a class from the common temperature are penalised, so that a
    class with few labels stays near it; the likelihood is never worse than the temperature's.

    Args:
        members: (M, N, K) held-out probabilities.
        y: (N,) class index.
        method: ``temperature`` or ``vector``.
        noise: (K, K) probability of a label (column) given the true class (row). With it the
            probabilities are those of the true class, and what the labels should show of them is
            compared with the labels (forward correction).
    """
    from scipy import optimize  # prediction only applies what is found here

    label = np.asarray(y).astype(np.intp)
    step = max(1, len(label) // _SEARCH_PX)
    few, true = members[:, ::step], label[::step]

    def loss(p: npt.NDArray[Any], k: npt.NDArray[np.intp], how: Calibration) -> float:
        q = averaged(p, how)
        return negative_log_likelihood(q if noise is None else q @ noise, k)

    low, high = np.log(_RANGE)
    found = optimize.minimize_scalar(
        lambda log_t: loss(few, true, Calibration(scale=(float(np.exp(-log_t)),))),
        bounds=(low, high), method="bounded", options={"xatol": 1e-3},
    )  # fmt: skip
    common = Calibration(scale=(float(np.exp(-found.x)),))
    if method == "temperature":
        return common
    vector = _fit_vector(few, true, common.scale[0], noise)
    # The search sees a part of the pixels; all of them have the last word.
    start = Calibration("vector", common.scale * members.shape[2], (0.0,) * members.shape[2])
    return vector if loss(members, label, vector) <= loss(members, label, common) else start


def _fit_vector(
    members: npt.NDArray[Any], y: npt.NDArray[np.intp], scale: float, noise: F64 | None
) -> Calibration:
    """Scales and shifts of the classes, searched from the common scale."""
    from scipy import optimize

    m, n, k = members.shape
    z = [log_probabilities(p) for p in members]
    seen = np.eye(k)[:, y].T if noise is None else noise[:, y].T  # (N, K): P(label of n | class)
    ridge = _RIDGE / k * (1 + _FEW_PX / np.maximum(np.bincount(y, minlength=k), 1))

    def value(v: F64) -> tuple[float, F64]:
        a, b = scale * np.exp(v[:k]), v[k:]
        q = [_softmax(each * a + b) for each in z]
        like = np.maximum(sum((each * seen).sum(1) for each in q) / m, 1e-12)
        slope = np.zeros(2 * k)
        for each, p in zip(z, q, strict=True):
            push = -seen / (like * n * m)[:, None]
            push = p * (push - (p * push).sum(1, keepdims=True))
            slope[:k] += (push * each).sum(0) * a
            slope[k:] += push.sum(0)
        both = np.concatenate([ridge, ridge])
        return float(-np.log(like).mean() + (both * v**2).sum()), slope + 2 * both * v

    bounds = [(-_LOG_FACTOR, _LOG_FACTOR)] * k + [(-_MOST_SHIFT, _MOST_SHIFT)] * k
    v = optimize.minimize(value, np.zeros(2 * k), jac=True, method="L-BFGS-B", bounds=bounds).x
    return Calibration(
        "vector", tuple(float(s) for s in scale * np.exp(v[:k])), tuple(float(b) for b in v[k:])
    )


def _softmax(z: F64) -> F64:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def cross_fitted_average(
    members: npt.NDArray[Any],
    y: npt.ArrayLike,
    fold: npt.ArrayLike,
    method: Method = "temperature",
    noise: F64 | None = None,
) -> F64:
    """(N, K) averages where each fold uses the calibration found on all other folds.

    Raises:
        FoldError: Fewer than two folds have labels.
    """
    label, folds = np.asarray(y), np.asarray(fold)
    names = np.unique(folds)
    if len(names) < 2:
        raise FoldError(
            f"{len(names)} fold with held-out labels", where="calibration", allowed="2 or more",
            fix="use more folds or more labels",
        )  # fmt: skip
    out = np.empty(members.shape[1:], dtype=np.float64)
    for f in names:
        here = folds == f
        how = fit_calibration(members[:, ~here], label[~here], method, noise)
        out[here] = averaged(members[:, here], how)
    return out
