"""Composites: many clear looks at one place become one value or one vector.

All functions take a stack in which a missing value is NaN and return float32; where nothing was
seen the result is NaN. They work in blocks of pixels that stay in the processor's cache, so they
need little memory beside the stack and its result. The order of the dates does not matter.

``median`` and ``mean`` treat every band by itself. ``medoid``, ``geometric_median`` and
``best_pixel`` decide once per pixel for all bands given, so that the bands of a pixel stay
together. A cube calls them once per group: bands of one sensor and one pixel size share the choice;
a coarser group of the same sensor decides for its own, larger pixels. A date counts for a pixel
where it has every band that any date has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = [
    "best_pixel", "geometric_median", "mean", "median", "medoid", "pixel_scores",
    "sum_of_distances",
]  # fmt: skip

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

#: Values that a block holds: half a megabyte of float32.
_BLOCK = 1 << 17
#: Weiszfeld's iteration ends when a step is shorter than this, in reflectance: far below the step
#: of 1e-4 that reflectance is stored with, since the last steps are many.
_STEP = 2e-6
_ITERATIONS = 300


def _blocks(size: int, per_pixel: int) -> Iterator[slice]:
    n = max(_BLOCK // max(per_pixel, 1), 256)
    for start in range(0, size, n):
        yield slice(start, min(start + n, size))


@lru_cache(maxsize=256)
def _network(n: int) -> tuple[tuple[int, int], ...]:
    """Comparators of Batcher's odd-even merge sort (1968) for n values."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(pairs)


def _sorted(rows: list[Float]) -> list[Float]:
    """Sort T rows of N values by whole rows, a network needs no branches; the rows are used up."""
    spare = np.empty_like(rows[0])
    for a, b in _network(len(rows)):
        low, high = rows[a], rows[b]
        np.minimum(low, high, out=spare)
        np.maximum(low, high, out=high)
        rows[a], spare = spare, low
    return rows


def median(values: Float) -> Float:
    """Median over the first axis without the missing values; the same as ``np.nanmedian``.

    Args:
        values: (T, ...) float32; NaN and infinite values are missing.
    """
    t, shape = len(values), values.shape[1:]
    if t == 1:
        only: Float = np.where(np.isfinite(values[0]), values[0], np.float32(np.nan))
        return only
    flat = values.reshape(t, -1)
    out = np.empty(flat.shape[1], np.float32)
    for at in _blocks(flat.shape[1], t):
        out[at] = _median(flat[:, at])
    return out.reshape(shape)


def _median(block: Float) -> Float:
    known = np.isfinite(block)
    n = np.zeros(block.shape[1], np.int16)
    for row in known:
        n += row
    # Infinity sorts behind every value.
    rows = _sorted([np.where(k, x, np.float32(np.inf)) for k, x in zip(known, block, strict=True)])
    middle = np.full(block.shape[1], np.nan, np.float32)
    for count in np.flatnonzero(np.bincount(n)):
        if count == 0:
            continue
        low, high = rows[(count - 1) // 2], rows[count // 2]
        value = low if low is high else (low + high) / np.float32(2)
        np.copyto(middle, value, where=n == count)
    return middle


def mean(values: Float) -> Float:
    """Mean over the first axis without the missing values.

    Args:
        values: (T, ...) float32; NaN is missing.
    """
    total = np.zeros(values.shape[1:], np.float64)
    count = np.zeros(values.shape[1:], np.int32)
    for layer in values:
        known = np.isfinite(layer)
        np.add(total, layer, out=total, where=known)
        count += known
    with np.errstate(invalid="ignore"):
        total /= np.where(count == 0, np.nan, count)
    return total.astype(np.float32)


def _vectors(block: Float) -> tuple[Float, Bool, Bool]:
    """Vectors (T, B, N) with 0 for what is missing, dates that count (T, N), bands seen (B, N)."""
    known = np.isfinite(block)
    seen: Bool = np.any(known, axis=0)
    counts: Bool = np.all(known | ~seen, axis=1) & np.any(seen, axis=0)
    # Distances are wanted between dates that count: for them only bands nobody saw are missing.
    filled: Float = np.where(known, block, np.float32(0))
    return filled, counts, seen


def _by_pixel(values: Float, solve: Callable[[Float], Float]) -> Float:
    t, bands = values.shape[:2]
    flat = values.reshape(t, bands, -1)
    out = np.empty(flat.shape[1:], np.float32)
    for at in _blocks(flat.shape[2], t * bands):
        out[:, at] = solve(flat[:, :, at])
    return out.reshape(values.shape[1:])


def medoid(values: Float) -> Float:
    """The observed vector with the least sum of distances to the others (Flood 2013).

    Of vectors that are equally good, as any two are, the darkest is taken: haze brightens.

    Args:
        values: (T, B, ...) float32; NaN is missing.

    Returns:
        (B, ...): bands of one date in every pixel.
    """
    return _by_pixel(values, _medoid)


def _medoid(block: Float) -> Float:
    x, counts, seen = _vectors(block)
    t = len(x)
    total = np.zeros(counts.shape, np.float64)
    for i in range(t):
        for j in range(i + 1, t):
            d = np.sqrt(np.square(x[i] - x[j]).sum(axis=0)) * (counts[i] & counts[j])
            total[i] += d
            total[j] += d
    total[~counts] = np.inf
    best = total.min(axis=0)
    # The sums of equals differ by rounding, which depends on the order of the dates.
    equal = total <= best * (1 + 1e-5)
    brightness = np.where(equal & counts, x.sum(axis=1), np.inf)
    pick = brightness.argmin(axis=0)
    return _picked(x, pick, counts, seen)


def _picked(x: Float, pick: npt.NDArray[np.intp], counts: Bool, seen: Bool) -> Float:
    out: Float = np.take_along_axis(x, pick[None, None], axis=0)[0].copy()
    out[~seen] = np.nan
    out[:, ~counts.any(axis=0)] = np.nan
    return out


def geometric_median(values: Float) -> Float:
    """The vector with the least sum of distances to the observed ones (Roberts et al. 2017).

    Weiszfeld's iteration in the form of Vardi and Zhang (2000), which does not stick to an observed
    vector, from the median of each band, until steps are shorter than 2e-6.

    Args:
        values: (T, B, ...) float32; NaN is missing.

    Returns:
        (B, ...): in general no observed vector; with one band its median.
    """
    return _by_pixel(values, _geometric_median)


def _geometric_median(block: Float) -> Float:
    x, counts, seen = _vectors(block)
    y = median(np.where(counts[:, None], x, np.float32(np.nan)))
    y[~np.isfinite(y)] = 0
    todo = np.flatnonzero(counts.sum(axis=0) > 1)
    for _ in range(_ITERATIONS):
        if not len(todo):
            break
        moved = _weiszfeld(x[:, :, todo], counts[:, todo], y[:, todo])
        step = np.abs(moved - y[:, todo]).max(axis=0)
        y[:, todo] = moved
        todo = todo[step > _STEP]
    y[~seen] = np.nan
    y[:, ~counts.any(axis=0)] = np.nan
    return y


def _weiszfeld(x: Float, counts: Bool, y: Float) -> Float:
    """One step of Vardi and Zhang (2000), 1.5 times as long: up to 2 converges (Ostresh 1978)."""
    near = np.float32(1e-7)
    delta = x - y
    d = np.sqrt(np.einsum("tbn,tbn->tn", delta, delta))
    at = counts & (d < near)
    weight = np.where(counts & ~at, 1 / np.maximum(d, near), np.float32(0))
    total = np.maximum(weight.sum(axis=0), np.float32(1e-30))
    # As a difference to y: the sum of vectors itself would lose digits.
    pull = np.einsum("tn,tbn->bn", weight, delta) / total
    # Where y lies on observed vectors they hold it back with the force of their number.
    held = at.sum(axis=0)
    force = total * np.sqrt(np.einsum("bn,bn->n", pull, pull))
    length = np.where(held == 0, 1.5, np.maximum(1 - held / np.maximum(force, 1e-30), 0))
    moved: Float = (y + length * pull).astype(np.float32)
    return moved


def sum_of_distances(values: Float, point: Float) -> Float:
    """Sum of the distances of a vector to the observed ones, what both medians make small.

    Args:
        values: (T, B, ...) float32; NaN is missing.
        point: (B, ...).
    """
    x, counts, _ = _vectors(values)
    d = np.sqrt(np.square(x - np.nan_to_num(point)).sum(axis=1))
    total: Float = np.where(counts, d, 0).sum(axis=0, dtype=np.float32)
    return total


def pixel_scores(
    days: npt.NDArray[np.float64],
    cloud_distance_m: Float,
    haze: Float | None = None,
    *,
    spread_days: float,
    reach_m: float = 1000.0,
) -> Float:
    """Scores of dates for ``best_pixel``, after White et al. (2014).

    The sum of three parts of 0 to 1: how near the date is to the middle of the period (Gaussian),
    how far the next cloud or shadow is (sigmoid that is .5 at half ``reach_m``), and how
    little haze there is (sigmoid about .03 of the haze measure).

    Args:
        days: (T,) days from the middle of the period.
        cloud_distance_m: (T, H, W) metres to the nearest cloud or shadow.
        haze: (T, H, W) haze-optimised transform ``blue - .5 red`` (Zhang et al. 2002) in
            reflectance, less that of haze-free ground; NaN where unknown, which counts as .5.
        spread_days: Standard deviation of the first part.
        reach_m: Distance from which clouds do no harm.

    Returns:
        (T, H, W).
    """
    day = np.exp(-0.5 * np.square(days / spread_days)).astype(np.float32)
    near = np.minimum(cloud_distance_m, np.float32(reach_m)) / np.float32(reach_m)
    far = 1 / (1 + np.exp(-10 * (near - np.float32(0.5))))
    scores: Float = np.asarray(day[:, None, None] + far, np.float32)
    if haze is not None:
        part = 1 / (1 + np.exp(np.clip((haze - np.float32(0.03)) / np.float32(0.01), -50, 50)))
        scores = (scores + np.where(np.isfinite(part), part, 0.5)).astype(np.float32)
    return scores


def best_pixel(values: Float, scores: Float) -> Float:
    """The observed vector with the highest score; of equal ones the darkest.

    Args:
        values: (T, B, ...) float32; NaN is missing.
        scores: (T, ...).

    Returns:
        (B, ...): bands of one date in every pixel.
    """
    t, bands = values.shape[:2]
    x, s = values.reshape(t, bands, -1), scores.reshape(t, -1)
    out = np.empty(x.shape[1:], np.float32)
    for at in _blocks(x.shape[2], t * bands):
        filled, counts, seen = _vectors(x[:, :, at])
        score = np.where(counts, s[:, at], -math.inf)
        best = score >= score.max(axis=0)
        brightness = np.where(best & counts, filled.sum(axis=1), np.inf)
        out[:, at] = _picked(filled, brightness.argmin(axis=0), counts, seen)
    return out.reshape(values.shape[1:])
