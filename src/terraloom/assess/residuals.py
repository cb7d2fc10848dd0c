"""How errors of the ensemble go together over distance, at labelled pixels that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.grid import geobox_from_record
from terraloom.legend import Legend
from terraloom.train.held_out import HeldOut
from terraloom.uncertainty.covariance import ErrorCovariance, fit_covariance
from terraloom.uncertainty.decompose import decompose_regression

__all__ = ["LEAST_SD", "class_covariances", "residual_covariances"]

Floats = npt.NDArray[np.float64]

#: The shape of a class's covariance is measured where its probability is from 5 to 95 %.
LEAST_SD = float(np.sqrt(0.05 * 0.95))


def residual_covariances(
    campaign: Campaign,
    chips: xr.Dataset,
    legend: Legend,
    cover: HeldOut,
    probabilities: Floats,
    held: dict[str, HeldOut],
) -> dict[str, Any]:
    """Covariances of the standardised errors of all tasks, for ``covariance.json``.

    Args:
        campaign: The campaign.
        chips: The training chips, for the places of their pixels.
        legend: Classes.
        cover: Held-out pixels of the class map.
        probabilities: (S, K) calibrated probabilities of the *labels* of these pixels, by
            calibrations that have not seen them.
        held: Held-out pixels of every task.

    Returns:
        ``tasks``: per task ``classes``, or of a regression ``value``. A class with too few
        uncertain pixels has the covariance of the class whose errors reach farthest
        (``borrowed``); None where no class has one.
    """
    rng = np.random.default_rng(campaign.seed)
    name = campaign.land_cover.name
    found = class_covariances(_places(chips, cover), cover.y.astype(np.int64), probabilities, rng)
    tasks: dict[str, Any] = {name: {"classes": dict(zip(legend.names, found, strict=True))}}
    for task in campaign.tasks:
        if task.kind is TaskKind.REGRESSION:
            some = held[task.name]
            parts = decompose_regression(some.p[..., 0], some.p[..., 1])
            error = some.y.astype(np.float64) - parts.mean
            value = fit_covariance(_places(chips, some), error, parts.sd, rng=rng)
            tasks[task.name] = {"value": None if value is None else value.record()}
    return {"tasks": tasks}


def class_covariances(
    xy: Floats, y: npt.NDArray[np.int64], p: Floats, rng: np.random.Generator
) -> list[dict[str, Any] | None]:
    """Covariance of the errors of each class, as records.

    Args:
        xy: (S, 2) places, metres.
        y: (S,) true class, 0 to K - 1.
        p: (S, K) probabilities.
        rng: Chooses among many pixels.
    """
    own: list[ErrorCovariance | None] = []
    for k in range(p.shape[1]):
        sd = np.sqrt(p[:, k] * (1 - p[:, k]))
        own.append(fit_covariance(xy, (y == k) - p[:, k], sd, rng=rng, least_sd=LEAST_SD))
    known = [c for c in own if c is not None]
    if not known:
        return [None] * len(own)
    worst = max(known, key=lambda c: c.range_m * (1 - c.nugget))
    lent = replace(worst, dispersion=max(c.dispersion for c in known))
    return [(lent if c is None else c).record() | {"borrowed": c is None} for c in own]


def _places(chips: xr.Dataset, held: HeldOut) -> Floats:
    """(S, 2) coordinates of held-out pixels in the grid's CRS."""
    geobox = geobox_from_record(chips.attrs)
    _, h, w = chips["fold"].shape
    n, row, col = np.unravel_index(held.index, (chips.sizes["n"], h, w))
    east = chips["col"].to_numpy()[n] + col + 0.5
    south = chips["row"].to_numpy()[n] + row + 0.5
    a = geobox.affine
    return np.column_stack([a.c + a.a * east, a.f + a.e * south])
