"""Label noise put in on purpose, for tests and benchmarks: what a method must survive.

Each model takes labels and a ``numpy.random.Generator`` and returns new labels; the input is not
changed. Pixels without a label (255) stay without one and make no noise.

References:
    Frénay, Verleysen (2014), Classification in the Presence of Label Noise: A Survey.
    Patrini et al. (2017), Making Deep Neural Networks Robust to Label Noise (class-dependent T).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from terraloom.errors import LabelError
from terraloom.legend import IGNORE_INDEX

__all__ = [
    "checked_transition",
    "flip",
    "flip_patches",
    "noise_rate",
    "omit",
    "pair_transition",
    "shift_boundaries",
    "symmetric_transition",
]

Labels = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]

#: Rows of a transition matrix may miss 1 by this much.
_ROW_TOLERANCE = 1e-6


def checked_transition(transition: npt.ArrayLike, classes: int | None = None) -> Matrix:
    """A transition matrix as float64, (K, K): row = true class, column = label; rows sum to 1.

    Args:
        transition: The matrix.
        classes: Number of classes it must have, where known.

    Raises:
        LabelError: It is not square, not of this size, or a row is no distribution.
    """
    t = np.asarray(transition, dtype=np.float64)
    if t.ndim != 2 or t.shape[0] != t.shape[1] or t.shape[0] < 2 or classes not in (None, len(t)):
        raise LabelError(
            f"shape {t.shape}", where="transition matrix",
            allowed=f"({classes}, {classes})" if classes else "(K, K), K >= 2",
        )  # fmt: skip
    good = np.isfinite(t).all(axis=1) & (t >= 0).all(axis=1)
    good &= np.abs(t.sum(axis=1) - 1) <= _ROW_TOLERANCE
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise LabelError(
            f"row {row} is {t[row].round(4).tolist()}", where="transition matrix",
            allowed="values >= 0 with a sum of 1",
            fix="row = true class, column = label; divide each row by its sum",
        )  # fmt: skip
    return t


def symmetric_transition(classes: int, rate: float) -> Matrix:
    """A wrong label is any of the other classes, equally likely; (K, K).

    Args:
        classes: K, at least 2.
        rate: Share of labels that become wrong, 0-1.
    """
    _share(rate, "rate")
    t = np.full((classes, classes), rate / max(classes - 1, 1))
    np.fill_diagonal(t, 1 - rate)
    return checked_transition(t)


def pair_transition(
    classes: int, rate: float, confused: Mapping[int, int] | None = None
) -> Matrix:  # fmt: skip
    """A wrong label is always the one class that looks alike; (K, K).

    Args:
        classes: K, at least 2.
        rate: Share of labels of a confused class that become wrong, 0-1.
        confused: True class: label it is taken for; classes not named are labelled without error.
            Default: each class for the next, the last for the first.
    """
    _share(rate, "rate")
    pairs = {k: (k + 1) % classes for k in range(classes)} if confused is None else dict(confused)
    t = np.eye(classes)
    for true, taken in pairs.items():
        if not (0 <= true < classes and 0 <= taken < classes) or true == taken:
            raise LabelError(
                f"{true}: {taken}", where="confused", allowed=f"two classes of 0-{classes - 1}"
            )
        t[true, true], t[true, taken] = 1 - rate, rate
    return checked_transition(t)


def flip(y: Labels, transition: npt.ArrayLike, rng: np.random.Generator) -> Labels:
    """Draw each label anew from its class's row of ``transition``, independently.

    For labels that are wrong as a whole (a polygon), give one label per polygon.

    Args:
        y: Integer classes of any shape, 255 = no label.
        transition: (K, K), see :func:`checked_transition`.
        rng: Source of randomness.

    Returns:
        Labels of the same shape and dtype.
    """
    t = checked_transition(transition)
    has = _labelled(y, len(t))
    out = np.array(y)
    draw = rng.random(int(has.sum()))
    # The last edge is 1 up to rounding; without it a draw just below 1 would find no class.
    edges = t.cumsum(axis=1)[:, :-1]
    out[has] = (draw[:, None] >= edges[np.asarray(y)[has].astype(np.intp)]).sum(axis=1)
    return out


def flip_patches(
    y: Labels, rate: float, patch_px: int, rng: np.random.Generator, *, classes: int
) -> Labels:
    """Connected discs of a wrong class until the share ``rate`` of the labelled pixels is wrong.

    Args:
        y: (H, W) integer classes, 255 = no label.
        rate: Share of labelled pixels that become wrong, 0-1; the last disc may exceed it.
        patch_px: Radius of a disc, pixels, at least 1.
        rng: Source of randomness.
        classes: K, at least 2. A disc has one class, drawn from all but the one at its centre.

    Returns:
        (H, W) labels of the same dtype.
    """
    _share(rate, "rate")
    _plane(y)
    if patch_px < 1 or classes < 2:
        raise LabelError(f"radius {patch_px} px, {classes} classes", where="patches",
                         allowed="radius >= 1, classes >= 2")  # fmt: skip
    has = _labelled(y, classes)
    out = np.array(y)
    centres = np.argwhere(has)
    rows, cols = np.ogrid[: y.shape[0], : y.shape[1]]
    wanted = rate * len(centres)
    for r, c in centres[rng.permutation(len(centres))]:
        if (out != y).sum() >= wanted:
            break
        wrong = (int(y[r, c]) + int(rng.integers(1, classes))) % classes
        out[((rows - r) ** 2 + (cols - c) ** 2 <= patch_px**2) & has] = wrong
    return out


def shift_boundaries(y: Labels, shift_px: int, rng: np.random.Generator) -> Labels:
    """Move each boundary between two classes by ``shift_px``, to one side or the other.

    Connected regions of a class get a random order; a region grows over all lower ones. A pixel
    further than ``shift_px`` from another class keeps its label.

    Args:
        y: (H, W) integer classes, 255 = no label.
        shift_px: Distance, pixels (Euclidean), 0 or more.
        rng: Source of randomness.

    Returns:
        (H, W) labels of the same dtype.
    """
    _plane(y)
    if shift_px < 0:
        raise LabelError(f"{shift_px} px", where="boundary shift", allowed="0 or more")
    region, count = _regions(y)
    order = np.concatenate([[0], 1 + rng.permutation(count)])  # no label: below all regions
    rank = order[region]
    reach = np.arange(-shift_px, shift_px + 1)
    disc = reach[:, None] ** 2 + reach**2 <= shift_px**2
    above = ndimage.grey_dilation(rank, footprint=disc, mode="nearest")
    value = np.full(count + 1, IGNORE_INDEX, dtype=np.asarray(y).dtype)
    value[rank] = y
    return np.where(y == IGNORE_INDEX, y, value[above])


def omit(
    y: Labels,
    rate: float,
    rng: np.random.Generator,
    *,
    classes: Iterable[int] | None = None,
    into: int = IGNORE_INDEX,
) -> Labels:
    """Leave objects out: connected regions (or entries of a 1-D array) that nobody mapped.

    Args:
        y: (H, W), or (N,) with one entry per object; integer classes, 255 = no label.
        rate: Share of the objects left out, 0-1, rounded to whole objects.
        rng: Source of randomness.
        classes: Only objects of these classes; default: all.
        into: What is there instead: 255 where the label is missing, or the background class where
            the map says that there is nothing.

    Returns:
        Labels of the same shape and dtype.
    """
    _share(rate, "rate")
    labels = np.asarray(y)
    if labels.ndim == 1:
        region, count = np.where(labels != IGNORE_INDEX, np.arange(1, len(labels) + 1), 0), len(y)
    else:
        _plane(labels)
        region, count = _regions(labels)
    value = np.full(count + 1, IGNORE_INDEX, dtype=np.int64)
    value[region] = labels
    value[0] = IGNORE_INDEX
    may = value != IGNORE_INDEX if classes is None else np.isin(value, list(classes))
    objects = np.flatnonzero(may & (value != into))
    gone = rng.choice(objects, round(rate * len(objects)), replace=False)
    return np.where(np.isin(region, gone), np.array(into, labels.dtype), labels)


def noise_rate(true: Labels, labels: Labels) -> float:
    """Share of wrong labels among the pixels that have one in both; NaN without any."""
    both = (np.asarray(true) != IGNORE_INDEX) & (np.asarray(labels) != IGNORE_INDEX)
    return float((true != labels)[both].mean()) if both.any() else float("nan")


def _regions(y: Labels) -> tuple[npt.NDArray[np.int64], int]:
    """Connected regions (4 neighbours) of one class from 1 on, (H, W), and how many."""
    out = np.zeros(y.shape, dtype=np.int64)
    count = 0
    for k in np.unique(y[y != IGNORE_INDEX]):
        part, found = ndimage.label(y == k)
        out += np.where(part > 0, part + count, 0)
        count += found
    return out, count


def _labelled(y: Labels, classes: int) -> npt.NDArray[np.bool_]:
    """Where there is a label, after a check that each is one of the classes."""
    has = np.asarray(y) != IGNORE_INDEX
    found = np.unique(np.asarray(y)[has])
    if not np.isin(found, np.arange(classes)).all():
        raise LabelError(f"classes {found.tolist()}", where="labels",
                         allowed=f"0-{classes - 1}, or {IGNORE_INDEX} for none")  # fmt: skip
    return np.asarray(has, dtype=bool)


def _plane(y: Labels) -> None:
    if np.ndim(y) != 2:
        raise LabelError(f"labels of shape {np.shape(y)}", where="label noise", allowed="(H, W)")


def _share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise LabelError(f"{name} = {value}", where="label noise", allowed="0-1")
