"""Design-based accuracy and area estimates from a probability sample.

The general form is Stehman (2014): strata may differ from map classes, and every quantity is
either a stratified mean of an indicator or a ratio of two such means. Olofsson et al. (2014),
where strata are map classes, is the special case kept in `olofsson` as an independent check.

References:
    Stehman, S. V. (2014). Estimating area and map accuracy for stratified random sampling when
    the strata are different from the map classes. Int. J. Remote Sensing 35(13).
    Olofsson, P. et al. (2014). Good practices for estimating area and assessing accuracy of
    land change. Remote Sensing of Environment 148.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.assess.samples import ReferenceSample, SampleKind, Strata, square_counts
from terraloom.errors import DesignError

__all__ = [
    "M2_PER_HA",
    "AccuracyReport",
    "Disagreement",
    "Estimate",
    "OlofssonEstimates",
    "ReferenceSample",
    "SampleKind",
    "Strata",
    "disagreement",
    "estimate_accuracy",
    "olofsson",
]

M2_PER_HA = 10_000.0

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimated quantity with its sampling uncertainty.

    Attributes:
        value: Point estimate; NaN where the quantity is undefined.
        se: Standard error over repeated samples of the same design; NaN where undefined.
        lower: Lower end of the interval, clipped to the possible range.
        upper: Upper end of the interval, clipped to the possible range.
        half_width: Unclipped normal half-width, z times `se`.
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


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """Accuracy and area of every class, estimated from a probability sample.

    Attributes:
        classes: K class codes of the legend; row and column order of the matrices.
        kind: How the sample was chosen.
        level: Confidence level of every interval, 0-1.
        n_units: Sample units used.
        total_area_ha: True area of the sampled domain in hectares.
        overall: Overall accuracy.
        users: User's accuracy by class; NaN where no sampled unit is mapped as the class.
        producers: Producer's accuracy by class; NaN where the class is not in the reference.
        f1: Harmonic mean of the two, as one ratio; NaN where neither side has the class.
        area_share: Share of the domain that truly is the class.
        area_ha: The same in hectares.
        mapped_ha: Mapped hectares by class: exact where strata are map classes (se 0),
            otherwise estimated from the sample.
        matrix: (K, K) estimated area shares, rows = map, columns = reference; sums to 1.
        matrix_se: (K, K) standard errors of `matrix`.
        counts: (K, K) sample counts.
        notes: Plain sentences on what limits these numbers.
    """

    classes: tuple[int, ...]
    kind: SampleKind
    level: float
    n_units: int
    total_area_ha: float
    overall: Estimate
    users: dict[int, Estimate]
    producers: dict[int, Estimate]
    f1: dict[int, Estimate]
    area_share: dict[int, Estimate]
    area_ha: dict[int, Estimate]
    mapped_ha: dict[int, Estimate]
    matrix: F64 = field(compare=False)
    matrix_se: F64 = field(compare=False)
    counts: I64 = field(compare=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: class codes as text keys, NaN as null, matrices as nested lists."""
        per_class = ("users", "producers", "f1", "area_share", "area_ha", "mapped_ha")
        return {
            "classes": list(self.classes),
            "kind": str(self.kind),
            "level": self.level,
            "n_units": self.n_units,
            "total_area_ha": self.total_area_ha,
            "overall": self.overall.to_dict(),
            **{
                name: {str(code): est.to_dict() for code, est in getattr(self, name).items()}
                for name in per_class
            },
            "matrix": self.matrix.tolist(),
            "matrix_se": self.matrix_se.tolist(),
            "counts": self.counts.tolist(),
            "notes": list(self.notes),
        }


def estimate_accuracy(
    sample: ReferenceSample,
    strata: Strata,
    *,
    classes: Sequence[int],
    level: float = 0.95,
    fpc: bool = True,
    collapse: Mapping[int, int] | None = None,
) -> AccuracyReport:
    """Estimate accuracy and area per class from a probability sample of pixels.

    Any indicator y has the estimate sum_h W_h ybar_h and the variance
    sum_h W_h^2 (1 - n_h/N_h) s_h^2 / n_h, W_h being the true area share of stratum h. User's and
    producer's accuracy and F1 are ratios R = Y/X, with the variance of (y - R x) / X. A simple
    random or systematic sample is one stratum, or post-strata (variance then given n_h).

    Args:
        sample: The interpreted units; `sample.kind` must be a probability kind.
        strata: Known stratum sizes. A stratum of zero pixels is skipped.
        classes: Legend codes; classes without mapped area are kept.
        level: Confidence level, 0-1 exclusive.
        fpc: Apply the finite population correction 1 - n_h/N_h.
        collapse: {stratum: partner} for strata with one unit: the variance, not the estimate, is
            borrowed from the units of both together (conservative). Never done silently.

    Returns:
        Estimates with standard errors and normal intervals.

    Raises:
        DesignError: For a convenience or active sample, unknown codes, a stratum without units,
            or a stratum with one unit that is not collapsed.

    References:
        Stehman (2014), eq. 1-3 and 23-28.
    """
    _require_probability(sample.kind)
    z = _critical_value(level)
    legend = _legend(classes)
    design = _Design.build(sample, strata, fpc=fpc, collapse=collapse or {})
    in_map = _one_hot(sample.map_class, legend, "map class")
    in_ref = _one_hot(sample.reference_class, legend, "reference class")
    both = in_map * in_ref

    k = len(legend)
    pairs = (in_map[:, :, None] * in_ref[:, None, :]).reshape(len(in_map), k * k)
    # One pass for all linear quantities and one for all ratios: the strata are looped over once.
    agree = both.sum(axis=1, keepdims=True)
    linear = design.means(np.hstack([agree, in_ref, in_map, pairs]), z)
    overall, share, mapped = linear[0], linear[1 : 1 + k], linear[1 + k : 1 + 2 * k]
    cells = linear[1 + 2 * k :]
    ratios = design.ratios(
        np.hstack([both, both, 2 * both]), np.hstack([in_map, in_ref, in_map + in_ref]), z
    )
    users = _by_class(legend, ratios[:k])
    total_ha = strata.total_area_m2 / M2_PER_HA
    return AccuracyReport(
        classes=legend,
        kind=sample.kind,
        level=level,
        n_units=len(in_map),
        total_area_ha=total_ha,
        overall=overall,
        users=users,
        producers=_by_class(legend, ratios[k : 2 * k]),
        f1=_by_class(legend, ratios[2 * k :]),
        area_share=_by_class(legend, share),
        area_ha=_by_class(legend, [est.scaled(total_ha) for est in share]),
        mapped_ha=_by_class(legend, [est.scaled(total_ha) for est in mapped]),
        matrix=np.array([est.value for est in cells]).reshape(k, k),
        matrix_se=np.array([est.se for est in cells]).reshape(k, k),
        counts=np.rint(in_map.T @ in_ref).astype(np.int64),
        notes=_notes(sample, users, in_map, legend, collapse or {}),
    )


@dataclass(frozen=True, slots=True)
class _Design:
    """Index and weights of the strata that hold units; strata in the order of `Strata`."""

    members: tuple[I64, ...]
    variance_members: tuple[I64, ...]
    weight: F64
    correction: F64
    unit_area: F64

    @classmethod
    def build(
        cls, sample: ReferenceSample, strata: Strata, *, fpc: bool, collapse: Mapping[int, int]
    ) -> _Design:
        """Group the units by stratum and refuse designs whose variance cannot be estimated."""
        unknown = sorted(set(sample.stratum.tolist()) - set(strata.codes))
        if unknown:
            raise DesignError(
                f"units in strata {unknown}",
                where="reference sample",
                allowed=f"strata {list(strata.codes)}",
                fix="use the stratum in force when the unit was drawn, from the design record",
            )
        units = {code: np.flatnonzero(sample.stratum == code) for code in strata.codes}
        members, borrowed, weight, correction = [], [], [], []
        for code, n_pixels, area in zip(strata.codes, strata.n_pixels, strata.area_m2, strict=True):
            own = units[code]
            _check_stratum(code, own.size, n_pixels)
            if n_pixels == 0:
                continue
            members.append(own)
            borrowed.append(_variance_units(code, n_pixels, units, collapse))
            weight.append(area / strata.total_area_m2)
            fraction = own.size / n_pixels
            # A census has no sampling error, whatever the caller thinks of the correction.
            correction.append(1.0 - fraction if fpc or own.size == n_pixels else 1.0)
        area_m2 = sample.unit_area_m2
        return cls(
            tuple(members),
            tuple(borrowed),
            np.array(weight),
            np.array(correction),
            np.ones(sample.stratum.size) if area_m2 is None else area_m2,
        )

    def mean_and_variance(self, y: F64) -> tuple[F64, F64]:
        """Stratified mean (V,) and its variance (V,) for V variables y (N, V)."""
        mean = np.zeros(y.shape[1])
        variance = np.zeros(y.shape[1])
        for own, pooled, weight, correction in zip(
            self.members, self.variance_members, self.weight, self.correction, strict=True
        ):
            mean += weight * np.average(y[own], axis=0, weights=self.unit_area[own])
            if correction == 0.0:
                continue
            area = self.unit_area[pooled]
            residual = y[pooled] - np.average(y[pooled], axis=0, weights=area)
            residual *= (area / area.mean())[:, None]
            s2 = (residual**2).sum(axis=0) / (pooled.size - 1)
            variance += weight**2 * correction * s2 / own.size
        return mean, variance

    def means(self, y: F64, z: float) -> list[Estimate]:
        """Estimates of the V population means of y (N, V)."""
        mean, variance = self.mean_and_variance(y)
        return [Estimate.normal(float(m), sqrt(v), z) for m, v in zip(mean, variance, strict=True)]

    def ratios(self, y: F64, x: F64, z: float) -> list[Estimate]:
        """Estimates of the V ratios Y/X of y, x (N, V); NaN where X is 0."""
        totals, _ = self.mean_and_variance(np.hstack([y, x]))
        total_y, total_x = np.split(totals, 2)
        defined = total_x > 0
        safe = np.where(defined, total_x, 1.0)
        ratio = total_y / safe
        _, variance = self.mean_and_variance((y - ratio * x) / safe)
        return [
            Estimate.normal(float(r), sqrt(v), z) if ok else Estimate(nan, nan, nan, nan, nan)
            for r, v, ok in zip(ratio, variance, defined, strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class OlofssonEstimates:
    """Estimates where strata are map classes; arrays (K,) in matrix order, SE without fpc."""

    oa: float
    oa_se: float
    ua: F64
    ua_se: F64
    pa: F64
    pa_se: F64
    share: F64
    share_se: F64


def olofsson(matrix: ArrayLike, mapped: ArrayLike) -> OlofssonEstimates:
    """Closed forms of Olofsson et al. (2014) from a count matrix: the independent cross-check.

    Args:
        matrix: (K, K) sample counts, rows = map class = stratum, columns = reference class.
        mapped: (K,) mapped size of each class, pixels or any area unit.

    Returns:
        Proportions and standard errors, without finite population correction.

    Raises:
        DesignError: If a mapped class has fewer than two units.

    References:
        Olofsson et al. (2014), eq. 4-11; methods note section 1.1.
    """
    counts = square_counts(matrix).astype(np.float64)
    size = np.asarray(mapped, dtype=np.float64)
    row = counts.sum(axis=1)
    for i, (n, total) in enumerate(zip(row, size, strict=True)):
        if total > 0 and n < 2:
            raise DesignError(
                f"row {i} has {int(n)} unit(s)", where="error matrix", allowed="at least 2"
            )
    live = size > 0
    n = np.where(live, row, np.nan)
    w = size / size.sum()
    q = np.where(live[:, None], counts / n[:, None], 0.0)
    unit_var = np.where(live[:, None], q * (1 - q) / (n[:, None] - 1), 0.0)
    share = w @ q
    ua = np.where(live, np.diag(q), np.nan)
    ua_var = np.where(live, np.diag(unit_var), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        pa = w * np.diag(q) / share
        other = (w**2) @ unit_var - w**2 * np.diag(unit_var)
        pa_var = ((w * (1 - pa)) ** 2 * np.diag(unit_var) + pa**2 * other) / share**2
    return OlofssonEstimates(
        oa=float(w @ np.diag(q)),
        oa_se=sqrt(float(w**2 @ np.diag(unit_var))),
        ua=ua,
        ua_se=np.sqrt(ua_var),
        pa=pa,
        pa_se=np.sqrt(pa_var),
        share=share,
        share_se=np.sqrt((w**2) @ unit_var),
    )


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Shares of the domain where map and reference differ, by cause.

    Quantity and allocation sum to 1 - OA; exchange and shift sum to allocation.
    """

    quantity: float
    allocation: float
    exchange: float
    shift: float


def disagreement(matrix: F64) -> Disagreement:
    """Split 1 - OA into quantity and allocation (exchange + shift) disagreement.

    Args:
        matrix: (K, K) area-weighted shares summing to 1, never raw sample counts.

    References:
        Pontius & Millones (2011); Pontius & Santacruz (2014) for exchange and shift.
    """
    quantity = 0.5 * float(np.abs(matrix.sum(axis=0) - matrix.sum(axis=1)).sum())
    allocation = float(1.0 - np.trace(matrix)) - quantity
    pair = np.minimum(matrix, matrix.T)
    exchange = float(pair.sum() - np.trace(pair))
    return Disagreement(quantity, allocation, exchange, allocation - exchange)


def _require_probability(kind: SampleKind) -> None:
    if not kind.is_probability:
        raise DesignError(
            f"a {kind} sample: the result would be map area, not an estimate",
            where="accuracy and area estimation",
            allowed=", ".join(k for k in SampleKind if k.is_probability),
            fix="draw a probability sample with `stratified_sample`, or report map area as such",
        )


def _critical_value(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise DesignError(f"confidence level {level}", allowed="between 0 and 1, exclusive")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _legend(classes: Sequence[int]) -> tuple[int, ...]:
    legend = tuple(int(code) for code in classes)
    if len(set(legend)) != len(legend) or not legend:
        raise DesignError(f"legend {list(legend)}", allowed="unique class codes, at least one")
    return legend


def _one_hot(codes: I64, legend: tuple[int, ...], what: str) -> F64:
    unknown = sorted(set(codes.tolist()) - set(legend))
    if unknown:
        raise DesignError(
            f"{what} codes {unknown}",
            where="reference sample",
            allowed=f"codes of the legend {list(legend)}",
            fix="correct the codes or add the class to the legend",
        )
    return np.asarray(codes[:, None] == np.asarray(legend), dtype=np.float64)


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


def _by_class(legend: tuple[int, ...], estimates: Sequence[Estimate]) -> dict[int, Estimate]:
    return dict(zip(legend, estimates, strict=True))


def _notes(
    sample: ReferenceSample,
    users: Mapping[int, Estimate],
    in_map: F64,
    legend: tuple[int, ...],
    collapse: Mapping[int, int],
) -> tuple[str, ...]:
    notes = []
    for code, n in zip(legend, in_map.sum(axis=0), strict=True):
        if n > 0 and users[code].se == 0:
            notes.append(
                f"class {code}: all {int(n)} mapped units have one outcome, so the standard error "
                "is 0 by construction; it is not certainty (rule of three: "
                f"about {min(1.0, 3 / n):.0%} may differ)"
            )
    if sample.kind is SampleKind.SYSTEMATIC:
        notes.append("systematic sample: variance of a random sample used, usually conservative")
    notes.extend(f"stratum {a}: variance borrowed with stratum {b}" for a, b in collapse.items())
    return tuple(notes)


def _or_none(value: float) -> float | None:
    return float(value) if isfinite(value) else None
