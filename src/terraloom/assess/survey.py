"""The general form behind every design: weights, residuals, and one sum for every variance.

A sample of any probability design gives each unit a share of the domain that it stands for. A mean
is the weighted sum of a variable; its variance comes from weighted residuals, summed over the
primary units and centred within the design strata. A ratio, a difference or any smooth function
has the variance of its linear combination of these residuals (Taylor linearisation), so residuals
are computed once and combined.

References:
    Särndal, Swensson & Wretman (1992), Model Assisted Survey Sampling, ch. 3-7.
    Stehman (2014), Int. J. Remote Sensing 35(13), for strata that differ from map classes.
    Hansen & Hurwitz (1943), for primary units of unequal chances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.errors import DesignError

__all__ = ["MIN_POST_UNITS", "Linear", "Survey", "merge_post_strata"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Least units of a post-stratum: with fewer, the variance given the counts is poorly known
#: (Cochran 1977, section 5A.9, wants about 20 on average).
MIN_POST_UNITS = 10
_ROUNDING = 1e-13
#: Columns worked on at once: their residuals should stay in the cache of a core.
_COLUMNS = 16
_NONE: I64 = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Means of V variables and what their errors are made of; adds and subtracts like them.

    Attributes:
        mean: (V,) estimated means over the domain.
        within: (H, V) means within the design strata.
        scores: (P, V) contributions to the error, see `Survey.scores`.
    """

    mean: F64
    within: F64
    scores: F64

    def __add__(self, other: Linear) -> Linear:
        return Linear(
            self.mean + other.mean, self.within + other.within, self.scores + other.scores
        )

    def __sub__(self, other: Linear) -> Linear:
        return Linear(
            self.mean - other.mean, self.within - other.within, self.scores - other.scores
        )

    def __getitem__(self, columns: slice) -> Linear:
        return Linear(self.mean[columns], self.within[:, columns], self.scores[:, columns])

    @classmethod
    def join(cls, parts: Sequence[Linear]) -> Linear:
        """All variables side by side."""
        return cls(
            np.concatenate([p.mean for p in parts]),
            np.concatenate([p.within for p in parts], axis=1),
            np.concatenate([p.scores for p in parts], axis=1),
        )

    @property
    def variance(self) -> F64:
        """(V,) variances of the means."""
        return np.asarray(np.einsum("pv,pv->v", self.scores, self.scores))


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """Units of a sample as the estimators see them; N units, R residual rows, P primary units.

    R is N, plus the units that a stratum with one unit borrows for its variance.

    Attributes:
        weight: (N,) share of the domain each unit stands for; sums to 1.
        take: (R,) unit of each residual row.
        scale: (R,) factor of each residual: shares of the domain, and where each row is a primary
            unit also the square root of (1 - f) n / (n - 1).
        group: (R,) group whose mean a residual is taken from: units of one known area.
        mean_of: (G, R) sparse, means by group.
        sum_of: (P, R) sparse, sums by primary unit; None where every row is one, and then the
            next three are not needed: residuals have mean 0 in each stratum.
        stratum: (P,) design stratum of each primary unit.
        centre_of: (H, P) sparse, means by design stratum.
        factor: (P,) square root of m / (m - 1), m being the primary units of the stratum.
        within: (H, N) sparse, means of the units by design stratum.
        share: (H,) share of the domain in each design stratum.
        n_effective: (H,) units of a simple random sample that would be as good for an
            indicator; only where every unit is its own primary unit, else NaN.
        n_primary: Primary units in all.
        clustered: Whether the chances differ or units come in clusters.
        merged: Map classes that share one post-stratum, for want of units.
    """

    weight: F64
    take: I64
    scale: F64
    group: I64
    mean_of: sparse.csr_array
    sum_of: sparse.csr_array | None
    stratum: I64
    centre_of: sparse.csr_array | None
    factor: F64
    within: sparse.csr_array
    share: F64
    n_effective: F64
    n_primary: int
    clustered: bool
    merged: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        sample: ReferenceSample,
        strata: Strata,
        *,
        fpc: bool = True,
        collapse: Mapping[int, int] | None = None,
        post_strata: Strata | None = None,
    ) -> Survey:
        """Weights and residual rows of a sample.

        Args:
            sample: The units. A two-stage sample names the cluster of each; with unequal chances
                the inclusion probability.
            strata: Known sizes of the design strata.
            fpc: Finite population correction 1 - n_h / N_h. Never for clusters and unequal
                chances: their variance is that of draws with replacement, slightly too large.
            collapse: {stratum: partner} for strata with one unit.
            post_strata: Known areas of the map classes, where these are not the strata. Weights
                are then calibrated to them, and only what varies within a class is uncertain.

        Raises:
            DesignError: For units that do not fit the strata, and for designs whose variance
                cannot be estimated.
        """
        if sample.kind.is_clustered:
            return _clustered(sample, strata, post_strata)
        if post_strata is None:
            return _elements(sample.stratum, sample, strata, fpc, collapse or {})
        if sample.kind is SampleKind.STRATIFIED_RANDOM:
            raise DesignError(
                "post-strata of a stratified sample", where="accuracy and area estimation",
                allowed="post-strata with a simple, systematic or cluster sample",
                fix="use the strata that the sample was drawn from",
            )  # fmt: skip
        of_unit, sizes, merged = merge_post_strata(sample.map_class, post_strata)
        return replace(_elements(of_unit, sample, sizes, fpc, {}), merged=merged)

    def summarise(self, y: F64) -> Linear:
        """Means, means by stratum and contributions to the error of variables y (N, V)."""
        return Linear(
            np.asarray(self.weight @ y), np.asarray(self.within @ y), self.scores(y)
        )  # fmt: skip

    def scores(self, y: F64) -> F64:
        """Centred contributions (P, V) of variables y (N, V) to the error of their means.

        The variance of a mean is the sum of squares of its column; of two columns, the sum of
        products is the covariance.
        """
        rows = y[self.take]
        mean = self.mean_of @ rows
        # Units that all agree must have no error at all, not that of rounding a weighted mean.
        whole = np.rint(mean)
        mean = np.where(np.abs(mean - whole) < _ROUNDING, whole, mean)
        rows -= mean[self.group]
        rows *= self.scale[:, None]
        if self.sum_of is not None:
            rows = self.sum_of @ rows
            rows -= (self.centre_of @ rows)[self.stratum]
            rows *= self.factor[:, None]
        return np.asarray(rows)

    def standard_errors(self, y: F64) -> F64:
        """Standard errors (V,) of the means of y (N, V), a few columns at a time."""
        parts = [np.sqrt((self.scores(y[:, i : i + _COLUMNS]) ** 2).sum(axis=0))
                 for i in range(0, y.shape[1], _COLUMNS)]  # fmt: skip
        return np.concatenate(parts) if parts else np.zeros(0)

    def effective_size(self, found: Linear) -> F64:
        """Effective sample size (H, V) per design stratum for indicators.

        Size of the simple random sample with the same variance, p (1 - p) / V. Where all units
        of a stratum agree it is the number of primary units: the data cannot tell more.
        """
        p = found.within
        if not self.clustered:
            return np.broadcast_to(self.n_effective[:, None], p.shape)
        by = sparse.csr_array(
            (np.ones(self.stratum.size), (self.stratum, np.arange(self.stratum.size)))
        )
        variance = (by @ found.scores**2) / self.share[:, None] ** 2
        least = np.broadcast_to(np.bincount(self.stratum)[:, None].astype(np.float64), p.shape)
        spread = p * (1 - p)
        known = (variance > 0) & (spread > 0)
        return np.asarray(np.divide(spread, variance, out=least.copy(), where=known))

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the variance: primary units less design strata."""
        return self.n_primary - self.share.size


def merge_post_strata(
    map_class: I64, sizes: Strata, least: int = MIN_POST_UNITS
) -> tuple[I64, Strata, tuple[int, ...]]:
    """Merge map classes with too few units into common post-strata.

    Args:
        map_class: (N,) map class of each unit.
        sizes: Known sizes of the map classes.
        least: Units that a post-stratum should have.

    Returns:
        (post-stratum of each unit, sizes of the post-strata, classes that were merged). A merged
        post-stratum bears the code of its first class.
    """
    units = {code: int((map_class == code).sum()) for code in sizes.codes}
    live = sorted((c for c, n in zip(sizes.codes, sizes.n_pixels, strict=True) if n),
                  key=lambda c: (units[c], c))  # fmt: skip
    small = [c for c in live if units[c] < least]
    rest = [c for c in live if units[c] >= least]
    while small and sum(units[c] for c in small) < least and rest:
        small.append(rest.pop(0))
    if len(small) < 2:
        return map_class, sizes, ()
    target = {c: min(small) if c in small else c for c in sizes.codes}
    codes = tuple(dict.fromkeys(target.values()))
    pixels, area = dict.fromkeys(codes, 0), dict.fromkeys(codes, 0.0)
    for code, n, a in zip(sizes.codes, sizes.n_pixels, sizes.area_m2, strict=True):
        pixels[target[code]] += n
        area[target[code]] += a
    merged = Strata(codes, tuple(pixels.values()), tuple(area.values()))
    of_unit = np.array([target.get(int(c), int(c)) for c in map_class], dtype=np.int64)
    return of_unit, merged, tuple(sorted(small))


def _elements(
    stratum: I64, sample: ReferenceSample, strata: Strata, fpc: bool, collapse: Mapping[int, int]
) -> Survey:
    """Every unit is drawn by itself, with equal chances within a stratum (or post-stratum)."""
    _require_known(stratum, strata)
    area = _unit_area(sample)
    units = {code: np.flatnonzero(stratum == code) for code in strata.codes}
    share, effective = [], []
    rows: list[tuple[I64, F64]] = []
    lent: list[tuple[I64, F64]] = []
    weight = np.zeros(stratum.size)
    for code, n_pixels, m2 in zip(strata.codes, strata.n_pixels, strata.area_m2, strict=True):
        own = units[code]
        _check_stratum(code, own.size, n_pixels)
        if n_pixels == 0:
            continue
        share.append(m2 / strata.total_area_m2)
        weight[own] = share[-1] * area[own] / area[own].sum()
        # A census has no sampling error, whatever the caller thinks of the correction.
        correction = 1.0 - own.size / n_pixels if fpc or own.size == n_pixels else 1.0
        equal = area[own].sum() ** 2 / (area[own] ** 2).sum()
        effective.append(equal / correction if correction else np.inf)
        pooled = _variance_units(code, n_pixels, units, collapse)
        if pooled.size > own.size:
            width = share[-1] * np.sqrt(correction / own.size / (pooled.size - 1))
            lent.append((pooled, width * area[pooled] / area[pooled].mean()))
        spread = own.size / (own.size - 1) if pooled.size == own.size > 1 else 0.0
        rows.append((own, weight[own] * np.sqrt(correction * spread)))
    every = rows + lent
    take = np.concatenate([r for r, _ in every])
    group = np.repeat(np.arange(len(every)), [r.size for r, _ in every])
    h, n = len(share), stratum.size
    within = _means_by(group[:n], area[take[:n]], (h, n), take[:n])
    return Survey(
        weight, take, np.concatenate([s for _, s in every]), group,
        _means_by(group, area[take], (len(every), take.size)), None, _NONE, None, np.zeros(0),
        within, np.array(share), np.array(effective), n, clustered=False,
    )  # fmt: skip


def _clustered(sample: ReferenceSample, strata: Strata, post_strata: Strata | None) -> Survey:
    """Units in clusters, or drawn with unequal chances: ratio form, ultimate-cluster variance."""
    _require_known(sample.stratum, strata)
    n = sample.stratum.size
    # Samples of these kinds always have their chances.
    expand = _unit_area(sample) / np.asarray(sample.inclusion_prob, dtype=np.float64)
    label, known = sample.stratum, strata
    merged: tuple[int, ...] = ()
    if post_strata is not None:
        label, known, merged = merge_post_strata(sample.map_class, post_strata)
        _require_known(label, known)
    share_of = dict(zip(known.codes, np.array(known.area_m2) / known.total_area_m2, strict=True))
    codes, group = np.unique(label, return_inverse=True)
    missing = [c for c, s in share_of.items() if s > 0 and c not in set(codes.tolist())]
    if missing:
        _check_stratum(missing[0], 0, known.n_pixels[known.codes.index(missing[0])])
    sums = np.bincount(group, expand)
    weight = np.array([share_of[int(c)] for c in codes])[group] * expand / sums[group]
    cluster = np.arange(n) if sample.cluster is None else sample.cluster
    _, stratum_of_unit = np.unique(sample.stratum, return_inverse=True)
    names, primary = np.unique(cluster, return_inverse=True)
    stratum = np.zeros(names.size, dtype=np.int64)
    stratum[primary] = stratum_of_unit
    if (stratum[primary] != stratum_of_unit).any():
        raise DesignError(
            "a cluster in two strata", where="reference sample",
            allowed="each cluster in the stratum that it was drawn from",
        )  # fmt: skip
    per_stratum = np.bincount(stratum)
    if per_stratum.min() < 2:
        raise DesignError(
            f"a stratum with {int(per_stratum.min())} cluster: its variance cannot be estimated",
            where="reference sample", allowed="two or more clusters in every stratum",
            fix="draw more clusters, or join strata",
        )  # fmt: skip
    rows, h = np.arange(n), per_stratum.size
    return Survey(
        weight, rows, weight, group.astype(np.int64), _means_by(group, weight, (codes.size, n)),
        sparse.csr_array((np.ones(n), (primary, rows))), stratum,
        _means_by(stratum, np.ones(names.size), (h, names.size)),
        np.sqrt(per_stratum / (per_stratum - 1))[stratum],
        _means_by(stratum_of_unit, weight, (h, n)),
        np.bincount(stratum_of_unit, weight).astype(np.float64), np.full(per_stratum.size, np.nan),
        int(names.size), clustered=True, merged=merged,
    )  # fmt: skip


def _unit_area(sample: ReferenceSample) -> F64:
    area = sample.unit_area_m2
    return np.ones(sample.stratum.size) if area is None else area


def _means_by(
    index: I64, weight: F64, shape: tuple[int, int], column: I64 | None = None
) -> sparse.csr_array:
    """Matrix that takes weighted means by group; column is the unit of each entry."""
    at = np.arange(index.size) if column is None else column
    sums = np.bincount(index, weight)
    return sparse.csr_array((weight / sums[index], (index, at)), shape=shape)


def _require_known(stratum: I64, strata: Strata) -> None:
    unknown = sorted(set(stratum.tolist()) - set(strata.codes))
    if unknown:
        raise DesignError(
            f"units in strata {unknown}",
            where="reference sample",
            allowed=f"strata {list(strata.codes)}",
            fix="use the stratum in force when the unit was drawn, from the design record",
        )


def _check_stratum(code: int, n: int, n_pixels: int) -> None:
    if n > n_pixels:
        raise DesignError(
            f"stratum {code} has {n} units but {n_pixels} pixels",
            where="reference sample",
            fix="check the stratum sizes against the design record",
        )
    if n == 0 < n_pixels:
        raise DesignError(
            f"stratum {code} has {n_pixels} pixels and no unit",
            where="reference sample",
            allowed="at least two units in every stratum",
            fix="interpret units there, or remove the stratum from the domain and say so",
        )


def _variance_units(
    code: int, n_pixels: int, units: Mapping[int, I64], collapse: Mapping[int, int]
) -> I64:
    own = units[code]
    if own.size > 1 or own.size == n_pixels:
        return own
    partner = collapse.get(code)
    if partner is None or partner == code or units.get(partner, own[:0]).size == 0:
        raise DesignError(
            f"stratum {code} has one unit: its variance cannot be estimated",
            where="reference sample",
            allowed="two or more units, or an explicit `collapse` partner that has units",
            fix=f"interpret another unit, or pass collapse={{{code}: <similar stratum>}}",
        )
    return np.concatenate([own, units[partner]])
