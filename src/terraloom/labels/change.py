"""Did the ground change between a label's date and the last image? The series itself answers.

Each label's pixels are compared, period by period, with the trajectories of all classes. A label
whose ground follows its own class up to some period and another class from then on has changed;
one that follows another class all along is wrong rather than outdated, and is left to
:mod:`terraloom.labels.noise`.

References:
    Distances: Mahalanobis, in a Student-t density (Lange, Little, Taylor 1989), so that no single
    period decides alone. Posterior of one change point: Smith (1975), Biometrika 62.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from terraloom.errors import LabelError

__all__ = ["ChangeTest", "PeriodLike", "change_test", "days_since_1970", "period_bounds"]

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: Degrees of freedom of the density; few mean heavy tails.
_NU = 6.0
#: Chances, before looking, that a label's ground changed and that its class is wrong.
_PRIOR_CHANGE, _PRIOR_WRONG = 0.1, 0.1
#: A class is a trajectory only with this many labels in a period.
_LEAST_LABELS = 3
#: Least weight of the diagonal in the covariance of a period.
_SHRINK = 0.1
#: A ground that fits no class at all lies this far out, as quantile of the distance of a class.
_UNKNOWN_QUANTILE = 0.9999
#: Logarithm of a likelihood that excludes a hypothesis; finite, so that sums stay numbers.
_NEVER = -1e6


class PeriodLike(Protocol):
    """A period of the cube: ``name``, first day ``start`` and last day ``end`` (included)."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def start(self) -> date: ...  # noqa: D102
    @property
    def end(self) -> date: ...  # noqa: D102


@dataclass(frozen=True)
class ChangeTest:
    """What the series says about each label, all (N,).

    Attributes:
        p_change: Probability (0-1) that the ground was of the label's class at the label's date
            and is not in the last period. 0 where nothing can be said.
        p_earlier: Probability that it became the label's class within the series: the label is
            right in the last period, and images before the change show something else.
        p_wrong: Probability that it is of another class in all periods (see
            :func:`change_test` for labels outside the images).
        tested: False where the label has no pixels or its class has no trajectory.
    """

    p_change: Float
    p_earlier: Float
    p_wrong: Float
    tested: Bool


def days_since_1970(dates: Sequence[Any]) -> Float:
    """Days since 1970 of dates or texts ``YYYY-MM-DD``, (N,); NaN where there is no date.

    Raises:
        LabelError: A date cannot be read.
    """
    text = ["NaT" if d is None or d != d else str(d)[:10] for d in dates]
    try:
        days = np.array(text, dtype="datetime64[D]")
    except ValueError as err:
        raise LabelError(f"a date cannot be read ({err})", where="label dates",
                         allowed="ISO 8601, YYYY-MM-DD") from err  # fmt: skip
    return np.where(np.isnat(days), np.nan, days.astype(np.int64).astype(np.float64))


def period_bounds(periods: Sequence[PeriodLike]) -> tuple[Float, Float]:
    """First and last day of each period, days since 1970, both (T,).

    Raises:
        LabelError: There is no period.
    """
    if not periods:
        raise LabelError("no period to compare labels with", where="cube.periods",
                         fix="give at least one period")  # fmt: skip
    return days_since_1970([p.start for p in periods]), days_since_1970([p.end for p in periods])


def change_test(
    series: npt.ArrayLike,
    classes: npt.ArrayLike,
    dates: Sequence[Any],
    periods: Sequence[PeriodLike],
    *,
    fit: npt.ArrayLike | None = None,
) -> ChangeTest:
    """Test whether the ground left the label's class between the label and the last period.

    Per period, classes are Gaussian-like clouds around robust centres (medians) with one robust
    covariance, widened per class. The hypotheses are: the label's class throughout; another class
    throughout (a wrong label); the label's class up to a period and another one from then on; the
    reverse. A change after the label cannot show in a period that had ended at the label's date,
    and a change before it not in one that had not begun. Where the label lies before the first
    or after the last period, a wrong label and a change look the same, and count as change.

    Args:
        series: (N, T, F) features of labels, or of pixels; NaN = missing.
        classes: (N,) class index; negative = none, not tested.
        dates: (N,) dates; without one a change may lie anywhere.
        periods: T periods, in any order.
        fit: (N,) rows that the trajectories of the classes are taken from, such as the labels
            outside a held-out fold; all rows are tested. Default: all.

    Returns:
        See :class:`ChangeTest`. The order of rows, periods and features does not matter.

    Raises:
        LabelError: Shapes do not fit.
    """
    x = np.asarray(series, dtype=np.float64)
    y = np.asarray(classes).astype(np.intp)
    start, end = period_bounds(periods)
    if x.ndim != 3 or x.shape[:2] != (len(y), len(periods)) or len(dates) != len(y):
        raise LabelError(
            f"series {x.shape}, {len(y)} classes, {len(dates)} dates, {len(periods)} periods",
            where="change test", allowed="(N, T, F), N, N, T",
        )  # fmt: skip
    order = np.lexsort((end, start))
    x, start, end = x[:, order], start[order], end[order]
    zero = np.zeros(len(y))
    usable = (y >= 0) & np.isfinite(x).any(axis=(1, 2))
    if not usable.any():
        return ChangeTest(zero, zero.copy(), zero.copy(), np.zeros(len(y), dtype=bool))
    k = int(y.max()) + 1
    known = np.where(True if fit is None else np.asarray(fit, dtype=bool), y, -1)
    score = np.stack([_likelihood(x[:, t], known, k) for t in range(x.shape[1])], axis=1)
    own = np.take_along_axis(score, np.maximum(y, 0)[:, None, None], axis=2)
    tested = usable & np.isfinite(own[..., 0]).any(axis=1)
    # Periods in which nothing is known of the label or of its class speak for no class.
    own = np.where(np.isfinite(own), own, np.nan)
    against = np.nan_to_num(score - own, nan=0.0, neginf=_NEVER)
    np.put_along_axis(against, np.maximum(y, 0)[:, None, None], _NEVER, axis=2)
    return _posterior(against, days_since_1970(dates), start, end, tested)


def _posterior(against: Float, day: Float, start: Float, end: Float, tested: Bool) -> ChangeTest:
    """Posterior of the hypotheses from the evidence for other classes, (N, T, K + 1)."""
    n, t, k = against.shape
    total = np.concatenate([np.zeros((n, 1, k)), np.cumsum(against, axis=1)], axis=1)
    # Mean likelihood over the candidate classes, (N, T + 1): another class up to a period, the
    # label's own from then on; and the reverse.
    share = np.log(np.maximum((against > _NEVER).any(axis=1).sum(axis=1), 1))[:, None]
    before = np.logaddexp.reduce(total, axis=2) - share
    after = np.logaddexp.reduce(total[:, -1:] - total, axis=2) - share
    d = np.where(np.isnan(day), (start[0] + end[-1]) / 2, day)[:, None]
    undated = np.isnan(day)[:, None]
    inner = np.log(_PRIOR_CHANGE / 2 / max(t - 1, 1))
    later = np.where((undated | (end > d))[:, 1:], after[:, 1:t] + inner, -np.inf)
    sooner = np.where((undated | (start <= d))[:, :-1], before[:, 1:t] + inner, -np.inf)
    outside = (d[:, 0] < start[0]) | (d[:, 0] > end[-1])
    wrong = before[:, -1] + np.log(_PRIOR_WRONG)
    parts = np.stack([
        np.full(n, np.log(1 - _PRIOR_CHANGE - _PRIOR_WRONG)),
        np.logaddexp.reduce(later, axis=1, initial=-np.inf),
        np.logaddexp.reduce(sooner, axis=1, initial=-np.inf),
        np.where(outside, -np.inf, wrong),
        np.where(outside, wrong, -np.inf),
    ])  # fmt: skip
    p = np.exp(parts - np.logaddexp.reduce(parts, axis=0))
    p = np.where(tested, p, 0.0)
    return ChangeTest(np.minimum(p[1] + p[4], 1.0), p[2], p[3], tested)


def _likelihood(x: Float, y: npt.NDArray[np.intp], k: int) -> Float:
    """Log-density of each row under each class and under none, (N, K + 1); NaN = nothing known.

    Rows with a negative class have no part in the classes' trajectories.
    """
    n, f = x.shape
    centre = np.full((k, f), np.nan)
    for c in np.unique(y[y >= 0]):
        mine = x[y == c]
        enough = np.isfinite(mine).sum(axis=0) >= _LEAST_LABELS
        if enough.any():
            centre[c, enough] = np.nanmedian(mine[:, enough], axis=0)
    # A sensor that saw nothing in a period says nothing; a class must be known by all others.
    bands_there = np.isfinite(centre).any(axis=0)
    known = np.isfinite(centre[:, bands_there]).all(axis=1) & bands_there.any()
    residual = np.where((y >= 0)[:, None], x - centre[np.maximum(y, 0)], np.nan)
    cov = _covariance(residual)
    out = np.full((n, k + 1), -np.inf)
    seen = np.isfinite(x) & np.isfinite(np.diag(cov)) & bands_there
    distance = np.full((n, k), np.nan)
    logdet, dims = np.zeros(n), seen.sum(axis=1)
    patterns, of = np.unique(seen, axis=0, return_inverse=True)
    for i, bands in enumerate(patterns):
        rows = np.flatnonzero(of.reshape(-1) == i)
        if not bands.any():
            continue
        root = np.linalg.cholesky(cov[np.ix_(bands, bands)])
        logdet[rows] = np.log(np.diag(root)).sum()
        for c in np.flatnonzero(known):
            e = np.linalg.solve(root, (x[rows][:, bands] - centre[c, bands]).T)
            distance[rows, c] = (e**2).sum(axis=0)
    width = _widths(distance, y, dims)
    for c in np.flatnonzero(known):
        out[:, c] = _density(distance[:, c] / width[c], dims) - dims / 2 * np.log(width[c])
    out[:, k] = _density(chi2.ppf(_UNKNOWN_QUANTILE, np.maximum(dims, 1)), dims)
    out -= logdet[:, None]
    out[dims == 0] = np.nan
    return out


def _density(d2: Float, dims: npt.NDArray[np.intp]) -> Float:
    """Logarithm of a Student-t density but for constants that all classes share."""
    return np.asarray(-(_NU + dims) / 2 * np.log1p(d2 / _NU), dtype=np.float64)


def _covariance(residual: Float) -> Float:
    """Covariance of residuals with outliers pulled in to 3 sd, drawn to its diagonal, (F, F).

    Features never seen get NaN on the diagonal; few rows mean more of the diagonal.
    """
    f = residual.shape[1]
    seen = np.isfinite(residual)
    sd = np.full(f, np.nan)
    some = seen.sum(axis=0) > _LEAST_LABELS
    if some.any():
        sd[some] = 1.4826 * np.nanmedian(np.abs(residual[:, some]), axis=0)
        # Where most labels of a class agree exactly the median deviation is zero.
        floor = 1e-3 * np.nanstd(residual[:, some], axis=0) + 1e-6
        sd[some] = np.maximum(sd[some], floor)
    z = np.where(seen, np.clip(residual / np.where(some, sd, 1.0), -3, 3), 0.0)
    pairs = np.maximum(seen.T.astype(float) @ seen, 1.0)
    r = z.T @ z / pairs
    spread = np.sqrt(np.maximum(np.diag(r), 1e-12))
    r /= np.outer(spread, spread)
    share = float(np.clip(2 * f / max(int(seen.all(axis=1).sum()), 1), _SHRINK, 1.0))
    r = (1 - share) * r + share * np.eye(f)
    # Pairs seen by different rows may give a matrix that is no covariance.
    values, axes = np.linalg.eigh(r)
    r = (axes * np.maximum(values, 1e-3)) @ axes.T
    return np.asarray(r * np.outer(sd, sd), dtype=np.float64)


def _widths(distance: Float, y: npt.NDArray[np.intp], dims: npt.NDArray[np.intp]) -> Float:
    """Variance of each class relative to all, (K,), drawn to 1 where it has few labels."""
    width = np.ones(distance.shape[1])
    ratio = np.full(len(y), np.nan)
    ok = (y >= 0) & (dims > 0)
    ratio[ok] = distance[ok, y[ok]] / chi2.ppf(0.5, dims[ok])
    for c in np.unique(y[ok]):
        r = ratio[(y == c) & np.isfinite(ratio)]
        if len(r):
            share = len(r) / (len(r) + 10.0)
            width[c] = np.exp(share * np.log(np.clip(np.median(r), 0.1, 10.0)))
    return width
