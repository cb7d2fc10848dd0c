"""Estimates with intervals: normal ones, and Wilson ones that hold for small strata.

A normal interval takes the standard error as known. Where a class rests on a handful of units the
error is itself a guess that is too small whenever the estimate is: with two omitted units found by
chance instead of five, the interval is short and in the wrong place. The Wilson form asks instead
which true shares could have given these counts. Per stratum this is the Wilson score interval; the
strata are put together by recovering a variance from each limit (MOVER), and ratios of two such
sums by the same argument.

References:
    Wilson (1927), J. Am. Stat. Assoc. 22.
    Zou, Huang & Zhang (2009), Comput. Stat. Data Anal. 53: linear functions of proportions.
    Donner & Zou (2012), Stat. Methods Med. Res. 21: limits of ratios.
    Korn & Graubard (1998), Survey Methodology 24: effective sample size in clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from terraloom.assess.survey import Linear, Survey
from terraloom.errors import DesignError

__all__ = [
    "Estimate",
    "Interval",
    "critical_value",
    "mean_estimates",
    "ratio_estimates",
    "wilson_estimate",
]

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Interval(StrEnum):
    """How the ends of an interval are found."""

    WILSON = "wilson"
    NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimated quantity with its sampling uncertainty.

    Attributes:
        value: Point estimate; NaN where the quantity is undefined.
        se: Standard error over repeated samples of the same design; NaN where undefined.
        lower: Lower end of the interval, inside the possible range.
        upper: Upper end of the interval, inside the possible range.
        half_width: Unclipped normal half-width, critical value times `se`.
    """

    value: float
    se: float
    lower: float
    upper: float
    half_width: float

    @classmethod
    def normal(cls, value: float, se: float, z: float) -> Estimate:
        """Normal interval of a proportion, clipped to 0-1."""
        half = z * se
        return cls(value, se, max(0.0, value - half), min(1.0, value + half), half)

    def scaled(self, factor: float) -> Estimate:
        """The same estimate in another unit (for example share times total hectares)."""
        return Estimate(
            self.value * factor,
            self.se * factor,
            self.lower * factor,
            self.upper * factor,
            self.half_width * factor,
        )

    def contains(self, truth: float) -> bool:
        """Whether the interval covers `truth`; False when undefined."""
        # An exact estimate (se 0) must not miss its truth by the last bit of a sum.
        slack = 1e-9 * abs(truth)
        return self.lower - slack <= truth <= self.upper + slack

    def to_dict(self) -> dict[str, float | None]:
        """JSON-able form, NaN as null."""
        names = ("value", "se", "lower", "upper", "half_width")
        return {name: _or_none(getattr(self, name)) for name in names}


UNDEFINED = Estimate(nan, nan, nan, nan, nan)


def critical_value(level: float, survey: Survey | None = None) -> float:
    """Two-sided critical value: normal, or Student's t where there are few clusters.

    Raises:
        DesignError: If the level is not between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise DesignError(f"confidence level {level}", allowed="between 0 and 1, exclusive")
    tail = 0.5 + level / 2
    if survey is not None and survey.clustered:
        return float(stats.t.ppf(tail, survey.degrees))
    return float(stats.norm.ppf(tail))


def mean_estimates(
    survey: Survey, found: Linear, z: float, how: Interval = Interval.WILSON
) -> list[Estimate]:
    """Estimates of the population shares of V indicators.

    Args:
        survey: The design.
        found: `survey.summarise` of the (N, V) indicators.
        z: Critical value.
        how: Kind of interval.
    """
    mean, se = found.mean, np.sqrt(found.variance)
    if how is Interval.NORMAL:
        return [Estimate.normal(float(m), float(s), z) for m, s in zip(mean, se, strict=True)]
    below, above = _Limits.of(survey, found, None, z).distances
    return _estimates(mean, se, np.clip(mean - below, 0, 1), np.clip(mean + above, 0, 1), z)


def wilson_estimate(value: float, se: float, z: float) -> Estimate:
    """Wilson interval of a share of which only the standard error is known.

    The effective sample size is that of a simple random sample with this standard error. A value
    outside 0-1, which a corrected estimate can take, is drawn to the end of the range.
    """
    p = min(max(value, 0.0), 1.0)
    if se <= 0 or p in (0.0, 1.0):
        return Estimate.normal(p, se, z)
    low, high, _ = _wilson(np.array(p), np.array(p * (1 - p) / se**2), z)
    return Estimate(p, se, float(low), float(high), z * se)


def ratio_estimates(
    survey: Survey,
    hit: Linear,
    miss: Linear,
    z: float,
    how: Interval = Interval.WILSON,
    *,
    worth: float | F64 = 1.0,
    possible: tuple[Mask, Mask] | None = None,
) -> list[Estimate]:
    """Estimates of V ratios hit / (hit + miss) of the shares of disjoint indicators.

    Args:
        survey: The design.
        hit: Indicators of success.
        miss: Indicators of failure, never 1 where `hit` is.
        z: Critical value.
        how: Kind of interval.
        worth: What a miss counts, one number or (V,); F1 is hits with misses that count half.
        possible: (H, V) masks for hit and miss, False where the design excludes the outcome, as a
            stratum of forest excludes units mapped as water. None: everything is possible.

    Returns:
        V estimates, NaN where neither was found.
    """
    a, b = hit.mean, worth * miss.mean
    defined = a + b > 0
    total = np.where(defined, a + b, 1.0)
    ratio = a / total
    se = np.sqrt((((1 - ratio) * hit.scores - ratio * worth * miss.scores) ** 2).sum(0)) / total
    if how is Interval.NORMAL:
        low, high = np.clip(ratio - z * se, 0, 1), np.clip(ratio + z * se, 0, 1)
    else:
        first, second = possible or (None, None)
        la, lb = _Limits.of(survey, hit, first, z), _Limits.of(survey, miss, second, z)
        rho = _correlation(survey, hit, miss, la, lb)
        (below_a, above_a), (below_b, above_b) = la.distances, lb.distances
        low = _share(_least_ratio(a, b, below_a, worth * above_b, rho))
        high = 1 - _share(_least_ratio(b, a, worth * below_b, above_a, rho))
    found = _estimates(ratio, se, low, high, z)
    return [e if ok else UNDEFINED for e, ok in zip(found, defined, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Limits:
    """Wilson limits per stratum and what they recover.

    Attributes:
        distances: How far the limits of the shares lie below and above, each (V,).
        weight: (H, V) share of the domain in each stratum, 0 where the outcome is impossible.
        centre: (H, V) centres of the limits: shares that are never 0 or 1.
        n: (H, V) effective sample sizes.
    """

    distances: tuple[F64, F64]
    weight: F64
    centre: F64
    n: F64

    @classmethod
    def of(cls, survey: Survey, found: Linear, possible: Mask | None, z: float) -> _Limits:
        p, n = np.clip(found.within, 0, 1), survey.effective_size(found)
        low, high, centre = _wilson(p, n, z)
        w = np.broadcast_to(survey.share[:, None], p.shape)
        if possible is not None:
            w = np.where(possible, w, 0.0)
        below = np.sqrt(((w * (p - low)) ** 2).sum(axis=0))
        above = np.sqrt(((w * (high - p)) ** 2).sum(axis=0))
        return cls((below, above), w, centre, n)

    @property
    def spread(self) -> F64:
        """(V,) variance of the share at the centres."""
        return np.asarray((self.weight**2 * self.centre * (1 - self.centre) / self.n).sum(axis=0))


def _correlation(survey: Survey, a: Linear, b: Linear, la: _Limits, lb: _Limits) -> F64:
    """Correlation (V,) of the errors of two disjoint shares.

    In clusters it is what the clusters show. Else it is that of multinomial counts, taken at the
    centres of the limits: counts of 0 would have none.
    """
    n = np.minimum(la.n, lb.n)
    shared = np.where((la.weight > 0) & (lb.weight > 0), la.weight, 0.0)
    cov = -(shared**2 * la.centre * lb.centre / n).sum(axis=0)
    size = np.sqrt(la.spread * lb.spread)
    rho = np.divide(cov, size, out=np.zeros_like(size), where=size > 0)
    if survey.clustered:
        seen = np.sqrt(a.variance * b.variance)
        both = (a.scores * b.scores).sum(axis=0)
        rho = np.divide(both, seen, out=rho, where=seen > 0)
    return np.asarray(np.clip(rho, -1.0, 1.0))


def _wilson(p: F64, n: F64, z: float) -> tuple[F64, F64, F64]:
    """Wilson score limits of a proportion p with n units, and their middle; n may be infinite."""
    t = z**2 / n
    centre, half = (p + t / 2) / (1 + t), np.sqrt(t * (p * (1 - p) + t / 4)) / (1 + t)
    # Rounding must not move the limits off 0 and 1, which they touch exactly.
    low = np.where(p <= 0, 0.0, np.minimum(centre - half, p))
    high = np.where(p >= 1, 1.0, np.maximum(centre + half, p))
    return low, high, centre


def _least_ratio(a: F64, b: F64, below: F64, above: F64, rho: F64) -> F64:
    """Lower limit of a / b, from a's distance below and b's distance above.

    It is the smaller t with (a - t b)^2 = below^2 + (t above)^2 - 2 rho t below above.
    """
    square = np.maximum(a**2 - below**2, 0.0)
    middle = a * b - rho * below * above
    inner = np.maximum(middle**2 - (b**2 - above**2) * square, 0.0)
    bottom = middle + np.sqrt(inner)
    # Without a miss and without doubt about it, the ratio has no limit.
    endless = np.where(square > 0, np.inf, 0.0)
    return np.divide(square, bottom, out=endless, where=bottom > 0)


def _share(ratio: F64) -> F64:
    """Share a / (a + b) from the ratio a / b."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(np.isinf(ratio), 1.0, ratio / (1 + ratio)))


def _estimates(value: F64, se: F64, low: F64, high: F64, z: float) -> list[Estimate]:
    low, high = np.minimum(low, value), np.maximum(high, value)
    columns = zip(value, se, low, high, strict=True)
    return [
        Estimate(float(v), float(s), float(a), float(b), float(z * s)) for v, s, a, b in columns
    ]


def _or_none(value: float) -> float | None:
    return float(value) if isfinite(value) else None
