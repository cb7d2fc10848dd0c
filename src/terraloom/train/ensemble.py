"""Calibration of an ensemble: one temperature for all members, before they are averaged.

The temperature is chosen so that the *average of the sharpened members* fits held-out labels
best. Scaling the average instead would calibrate as well, but its entropy would no longer be the
sum of the members' mean entropy and their disagreement.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

from terraloom.errors import FoldError
from terraloom.train.calibrate import apply_temperature, negative_log_likelihood

__all__ = ["averaged", "cross_fitted_average", "fit_ensemble_temperature", "sharpen"]

F32 = npt.NDArray[np.float32]

#: Range of temperatures that is searched; the ends mean a useless model.
_RANGE = (0.2, 5.0)
#: Pixels used for the search: neighbouring pixels repeat each other, more only cost time.
_SEARCH_PX = 40_000


def sharpen(members: npt.NDArray[Any], temperature: float) -> F32:
    """Members (M, K, ...) with probabilities proportional to p^(1/T) along K."""
    moved = np.moveaxis(members, 1, -1)
    return np.moveaxis(apply_temperature(moved, temperature), -1, 1).astype(np.float32)


def averaged(members: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    """(N, K) average of sharpened members (M, N, K)."""
    total = sum(apply_temperature(p, temperature) for p in members)
    return np.asarray(total / len(members), dtype=np.float64)


def fit_ensemble_temperature(
    members: npt.NDArray[Any], y: npt.ArrayLike, noise: npt.NDArray[np.float64] | None = None
) -> float:
    """Temperature with the smallest negative log likelihood of the averaged members.

    Args:
        members: (M, N, K) held-out probabilities.
        y: (N,) class index.
        noise: (K, K) probability of a label (column) given the true class (row). With it the
            probabilities are those of the true class, and what the labels should show of them is
            compared with the labels (forward correction, Patrini et al. 2017).
    """
    label = np.asarray(y)
    step = max(1, len(label) // _SEARCH_PX)
    few, true = members[:, ::step], label[::step]

    def loss(log_t: float) -> float:
        p = averaged(few, float(np.exp(log_t)))
        return negative_log_likelihood(p if noise is None else p @ noise, true)

    low, high = np.log(_RANGE)
    found = optimize.minimize_scalar(
        loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3}
    )
    return float(np.exp(found.x))


def cross_fitted_average(
    members: npt.NDArray[Any],
    y: npt.ArrayLike,
    fold: npt.ArrayLike,
    noise: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    """(N, K) averages where each fold uses the temperature found on all other folds.

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
        t = fit_ensemble_temperature(members[:, ~here], label[~here], noise)
        out[here] = averaged(members[:, here], t)
    return out
