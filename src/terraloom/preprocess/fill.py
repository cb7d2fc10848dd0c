"""Gaps filled over time: only between observations, only near them, and always marked.

A missing value is filled where the same pixel and band was observed at most ``max_days`` before and
at most ``max_days`` after it. Before the first and after the last observation nothing is invented.
Observed values are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from terraloom.errors import CoverageError

__all__ = ["fill_linear", "fill_whittaker", "whittaker"]

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: Series solved at a time: bounds memory and stays in the cache.
_BLOCK = 1 << 14
#: Smoothness of the Whittaker filler, days: the larger the stiffer. On five years of Landsat, with
#: looks hidden, 8 to 16 fill about equally well, 32 is too stiff.
SMOOTH_DAYS = 10.0


def _checked(values: Float, days: npt.NDArray[np.floating]) -> Double:
    at = np.asarray(days, np.float64)
    if at.shape != (len(values),) or not np.all(np.diff(at) > 0):
        raise CoverageError(
            f"{len(values)} images and the days {at.tolist()}", where="gap filling",
            allowed="one day for each image, in rising order without repeats",
            fix="give periods that do not overlap",
        )  # fmt: skip
    return at


def _neighbours(known: Bool) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Index of the last observation up to each date and of the first from it on; -1, T: none."""
    t = len(known)
    index = np.arange(t, dtype=np.int32)[:, None]
    before = np.maximum.accumulate(np.where(known, index, -1), axis=0)
    after = np.minimum.accumulate(np.where(known, index, t)[::-1], axis=0)[::-1]
    return before.astype(np.int32), after.astype(np.int32)


def _fillable(known: Bool, days: Double, max_days: float) -> Bool:
    before, after = _neighbours(known)
    t = len(days)
    back = days[:, None] - np.append(days, -np.inf)[before]
    ahead = np.append(days, np.inf)[np.minimum(after, t)] - days[:, None]
    ok: Bool = ~known & (back <= max_days) & (ahead <= max_days)
    return ok


def _series(values: Float) -> Iterator[tuple[slice, Float]]:
    flat = values.reshape(len(values), -1)
    for start in range(0, flat.shape[1], _BLOCK):
        at = slice(start, min(start + _BLOCK, flat.shape[1]))
        yield at, flat[:, at]


def fill_linear(
    values: Float, days: npt.NDArray[np.floating], max_days: float
) -> tuple[Float, Bool]:
    """Fill gaps on the straight line between the observations before and after.

    Args:
        values: (T, ...) float32; NaN is missing.
        days: (T,) rising.
        max_days: Farthest observation on either side.

    Returns:
        The filled series and what was filled, both (T, ...).

    Raises:
        CoverageError: Days do not rise or do not fit the values.
    """
    at_day = _checked(values, days)
    out = np.array(values, dtype=np.float32)
    filled = np.zeros(values.shape, bool)
    flat, marks = out.reshape(len(out), -1), filled.reshape(len(out), -1)
    for at, block in _series(values):
        known = np.isfinite(block)
        gaps = _fillable(known, at_day, max_days)
        if not gaps.any():
            continue
        before, after = _neighbours(known)
        t, n = np.nonzero(gaps)
        a, b = before[t, n], after[t, n]
        share = (at_day[t] - at_day[a]) / (at_day[b] - at_day[a])
        low = block[a, n].astype(np.float64)
        flat[t, n + at.start] = low + share * (block[b, n] - low)
        marks[t, n + at.start] = True
    return out, filled


def fill_whittaker(
    values: Float, days: npt.NDArray[np.floating], max_days: float,
    smooth_days: float = SMOOTH_DAYS,
) -> tuple[Float, Bool]:  # fmt: skip
    """Fill gaps from the Whittaker smoother of each series; observed values stay as they are.

    Args:
        values: (T, ...) float32; NaN is missing.
        days: (T,) rising; need not be regular.
        max_days: Farthest observation on either side.
        smooth_days: Stiffness, see :func:`whittaker`.

    Returns:
        The filled series and what was filled, both (T, ...).

    Raises:
        CoverageError: Days do not rise or do not fit the values.
    """
    at_day = _checked(values, days)
    out = np.array(values, dtype=np.float32)
    filled = np.zeros(values.shape, bool)
    flat, marks = out.reshape(len(out), -1), filled.reshape(len(out), -1)
    for at, block in _series(values):
        known = np.isfinite(block)
        gaps = _fillable(known, at_day, max_days)
        columns = np.flatnonzero(gaps.any(axis=0))
        if not len(columns):
            continue
        smooth = whittaker(block[:, columns], at_day, smooth_days)
        where = gaps[:, columns]
        target = flat[:, at.start + columns]
        target[where] = smooth[where]
        flat[:, at.start + columns] = target
        marks[:, at.start + columns] = where
    return out, filled


def whittaker(
    values: npt.NDArray[np.floating], days: npt.NDArray[np.floating], smooth_days: float
) -> Double:
    """Whittaker smoother of irregular series (Eilers 2003): fit plus roughness is least.

    The sum of squared residuals at the observed dates plus ``smooth_days ** 3`` times the integral
    of the squared second derivative, taken by divided differences of the dates. A straight line
    is left as it is. Two or more observations are needed; else the result is NaN.

    Args:
        values: (T, N); NaN is missing.
        days: (T,) rising.
        smooth_days: Days; with observations every d days, oscillations of a period of about
            ``6.3 (smooth_days ** 3 d) ** .25`` days keep half their height.

    Returns:
        (T, N) float64 at all dates.
    """
    known = np.isfinite(values)
    y = np.where(known, values, 0).astype(np.float64)
    bands = _roughness(np.asarray(days, np.float64)) * smooth_days**3
    z = _solve(known.astype(np.float64), bands, y)
    z[:, known.sum(axis=0) < 2] = np.nan
    return z


def _roughness(days: Double) -> Double:
    """Diagonals 0, 1 and 2 of the roughness matrix, (3, T); the unused ends are 0."""
    t = len(days)
    bands = np.zeros((3, t))
    for i in range(t - 2):
        h1, h2 = days[i + 1] - days[i], days[i + 2] - days[i + 1]
        c = 2 / (h1 + h2) * np.array([1 / h1, -1 / h1 - 1 / h2, 1 / h2])
        length = (h1 + h2) / 2
        bands[0, i : i + 3] += length * c**2
        bands[1, i : i + 2] += length * c[:2] * c[1:]
        bands[2, i] += length * c[0] * c[2]
    return bands


def _solve(weights: Double, bands: Double, y: Double) -> Double:
    """Solve (diag(weights) + five-diagonal matrix) z = weights * y for each column.

    Cholesky factors L D L' row by row, all columns at once.
    """
    t, n = y.shape
    # A tiny weight keeps columns with too few observations regular; they become NaN afterwards.
    d = weights + bands[0][:, None] + 1e-12
    e, f = np.zeros((t, n)), np.zeros((t, n))
    z = weights * y
    for i in range(t):
        if i >= 1:
            d[i] -= e[i - 1] ** 2 * d[i - 1]
            z[i] -= e[i - 1] * z[i - 1]
        if i >= 2:
            d[i] -= f[i - 2] ** 2 * d[i - 2]
            z[i] -= f[i - 2] * z[i - 2]
        if i + 1 < t:
            e[i] = bands[1, i]
            if i >= 1:
                e[i] -= f[i - 1] * e[i - 1] * d[i - 1]
            e[i] /= d[i]
        if i + 2 < t:
            f[i] = bands[2, i] / d[i]
    z /= d
    for i in range(t - 2, -1, -1):
        z[i] -= e[i] * z[i + 1]
        if i + 2 < t:
            z[i] -= f[i] * z[i + 2]
    return z
