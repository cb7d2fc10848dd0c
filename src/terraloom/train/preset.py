"""Settings of training by rule of thumb, for who knows the labels but not the networks.

The rules look at labels and dates only; a search (:mod:`terraloom.train.search`) compares settings
by their score. They are rules of experience, not optima.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from terraloom.errors import ModelError
from terraloom.models.heads import TaskSpec
from terraloom.train.windows import modalities_of

__all__ = ["LabelFacts", "Preset", "facts_of", "preset", "preset_of"]

#: Steps of training that small campaigns need to settle (count).
_LEAST_STEPS = 300
#: Dates from which a network over time pays (count).
_MANY_DATES = 8
#: Share of labelled pixels around which labels count as points.
_POINTS = 0.002


@dataclass(frozen=True)
class LabelFacts:
    """What the rules look at.

    Attributes:
        chips: Chips with a label (count).
        windows: Training windows of 72 px that these chips hold (count).
        pixels: Labelled pixels of the task that has fewest (count).
        share: Labelled pixels in all pixels of these chips (0-1).
        classes: Most classes of a task (count); 0 without classes.
        rarest: Share of the rarest class that has a label (0-1); 1 without classes.
        dates: Most periods or dates of a sensor (count).
    """

    chips: int
    windows: int
    pixels: int
    share: float
    classes: int
    rarest: float
    dates: int


@dataclass(frozen=True)
class Preset:
    """Settings of ``model`` and the reason of each, by key."""

    settings: dict[str, Any]
    reasons: dict[str, str]


def facts_of(chips: xr.Dataset, tasks: Sequence[TaskSpec]) -> LabelFacts:
    """Count labels and dates of chips.

    Raises:
        ModelError: A task has no label.
    """
    any_label = np.zeros(chips["fold"].shape, bool)
    counts, classes, rarest = [], 0, 1.0
    for t in tasks:
        y = np.asarray(chips[f"y_{t.name}"].values)
        has = y < len(t.classes) if t.classed else np.isfinite(y)
        if not has.any():
            raise ModelError("no label", where=f"task {t.name}", fix="add labels or leave it out")
        counts.append(int(has.sum()))
        any_label |= has
        if t.classed:
            seen = np.bincount(y[has])
            classes = max(classes, len(t.classes))
            rarest = min(rarest, float(seen[seen > 0].min() / seen.sum()))
    with_label = any_label.any((1, 2))
    area = with_label.sum() * any_label[0].size
    names = modalities_of(chips).values()
    dates = max(len({n.rpartition("/")[0] for n in channels}) for channels in names)
    return LabelFacts(
        int(with_label.sum()), max(1, round(area / 72**2)), min(counts),
        float(any_label.sum() / area), classes, rarest, dates,
    )  # fmt: skip


def preset(chips: xr.Dataset, tasks: Sequence[TaskSpec]) -> Preset:
    """Settings for these chips; see :func:`preset_of`."""
    return preset_of(facts_of(chips, tasks))


def preset_of(facts: LabelFacts) -> Preset:
    """Settings by rule of thumb.

    - ``network``: below 8 dates ``fusion``. From 8 on ``utae``, or ``ltae`` where labels are
      points (less than 0.2 % of the pixels of their chips).
    - ``width``: 8 below 5,000 labelled pixels, 12 below 500,000, 16 below 5 million, else 24; at
      least the number of classes, up to 24.
    - ``batch``: 4 below 500 windows, 8 below 5,000, else 16.
    - ``epochs``: as many as make 300 steps, but between 6 and 60; 12 where that is enough.
    - ``sampling``: ``class`` where the rarest class has less than 5 % of the labels, else
      ``area``.
    """
    f = facts
    s: dict[str, Any] = {}
    why: dict[str, str] = {}

    def put(key: str, value: Any, reason: str) -> None:
        s[key], why[key] = value, reason

    if f.dates < _MANY_DATES:
        put("network", "fusion", f"{f.dates} dates or periods, fewer than {_MANY_DATES}")
    elif f.share < _POINTS:
        put("network", "ltae", f"{f.dates} dates, labels are points ({100 * f.share:.2g} %)")
    else:
        put("network", "utae", f"{f.dates} dates, labels cover areas")
    width = next(w for w, most in ((8, 5e3), (12, 5e5), (16, 5e6), (24, math.inf))
                 if f.pixels < most)  # fmt: skip
    width = max(width, min(24, 4 * math.ceil(f.classes / 4)))
    put("width", width, f"{f.pixels:,} labelled pixels, {f.classes} classes")
    batch = next(b for b, most in ((4, 500), (8, 5000), (16, math.inf)) if f.windows < most)
    put("batch", batch, f"{f.windows:,} windows with labels")
    epochs = math.ceil(_LEAST_STEPS * batch / f.windows)
    enough = 12 if epochs <= 12 and f.windows < 5000 else 6
    epochs = min(60, max(enough, epochs))
    put("epochs", epochs, f"{math.ceil(epochs * f.windows / batch):,} steps")
    rare = f.rarest < 0.05
    put("sampling", "class" if rare else "area", f"the rarest class has {100 * f.rarest:.2g} %")
    return Preset(s, why)
