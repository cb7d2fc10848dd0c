"""Design-based accuracy and area estimates from a probability sample.

The general form is Stehman (2014): strata may differ from map classes, and every quantity is
either a mean of an indicator or a ratio of two such means. Which design the sample has decides
weights and variance (`survey`); the quantities are the same for all. Olofsson et al. (2014), where
strata are map classes, is the special case kept in `matrix.olofsson` as an independent check.

References:
    Stehman, S. V. (2014). Estimating area and map accuracy for stratified random sampling when
    the strata are different from the map classes. Int. J. Remote Sensing 35(13).
    Olofsson, P. et al. (2014). Good practices for estimating area and assessing accuracy of
    land change. Remote Sensing of Environment 148.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terraloom.assess.intervals import (
    Estimate,
    Interval,
    critical_value,
    mean_estimates,
    ratio_estimates,
)
from terraloom.assess.matrix import Disagreement, disagreement
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.assess.survey import Linear, Survey
from terraloom.errors import DesignError

__all__ = ["M2_PER_HA", "AccuracyReport", "class_indicators", "estimate_accuracy", "survey_of"]

M2_PER_HA = 10_000.0
#: Below this (estimate / standard error)^2, the units that an estimate rests on, a normal interval
#: misses noticeably more often than it says (benchmarks/estimators.py).
FEW_UNITS = 10.0

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """Accuracy and area of every class, estimated from a probability sample.

    Attributes:
        classes: K class codes of the legend; row and column order of the matrices.
        kind: How the sample was chosen.
        method: Name of the estimator.
        interval: Kind of the intervals.
        level: Confidence level of every interval, 0-1.
        n_units: Sample units used.
        total_area_ha: True area of the sampled domain in hectares.
        overall: Overall accuracy.
        users: User's accuracy by class; NaN where no sampled unit is mapped as the class.
        producers: Producer's accuracy by class; NaN where the class is not in the reference.
        f1: Harmonic mean of the two, as one ratio; NaN where neither side has the class.
        area_share: Share of the domain that truly is the class.
        area_ha: The same in hectares.
        mapped_ha: Mapped hectares by class: exact where strata or post-strata are map classes
            (se 0), otherwise estimated from the sample.
        matrix: (K, K) estimated area shares, rows = map, columns = reference; sums to 1.
        matrix_se: (K, K) standard errors of `matrix`.
        counts: (K, K) sample counts.
        notes: Plain sentences on what limits these numbers.
    """

    classes: tuple[int, ...]
    kind: SampleKind
    method: str
    interval: Interval
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

    @property
    def disagreement(self) -> Disagreement:
        """Quantity, exchange and shift disagreement of the estimated area matrix."""
        return disagreement(self.matrix)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: class codes as text keys, NaN as null, matrices as nested lists."""
        per_class = ("users", "producers", "f1", "area_share", "area_ha", "mapped_ha")
        return {
            "classes": list(self.classes),
            "kind": str(self.kind),
            "method": self.method,
            "interval": str(self.interval),
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
            "disagreement": self.disagreement.to_dict(),
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
    post_strata: Strata | None = None,
    interval: Interval = Interval.WILSON,
) -> AccuracyReport:
    """Estimate accuracy and area per class from a probability sample of pixels.

    An indicator y has the estimate sum_h W_h ybar_h and, where units are drawn one by one, the
    variance sum_h W_h^2 (1 - n_h/N_h) s_h^2 / n_h, W_h being the true area share of stratum h;
    a simple random or systematic sample is one stratum, or post-strata. With clusters or unequal
    chances units weigh area / chance; the variance is that between clusters. User's and
    producer's accuracy and F1 are ratios R = Y/X, with the variance of (y - R x) / X.

    Args:
        sample: The interpreted units; `sample.kind` must be a probability kind.
        strata: Known stratum sizes. A stratum of zero pixels is skipped.
        classes: Legend codes; classes without mapped area are kept.
        level: Confidence level, 0-1 exclusive.
        fpc: Apply the finite population correction 1 - n_h/N_h.
        collapse: {stratum: partner} for strata with one unit: the variance, not the estimate, is
            borrowed from the units of both together (conservative). Never done silently.
        post_strata: Known sizes of the map classes, for a sample that was not stratified by
            them; classes with few units are merged, which a note says.
        interval: Kind of the intervals; the standard errors do not depend on it.

    Returns:
        Estimates with standard errors and intervals.

    Raises:
        DesignError: For a convenience or active sample, unknown codes, a stratum without units,
            or a stratum with one unit that is not collapsed.
    """
    legend = _legend(classes)
    survey = survey_of(sample, strata, fpc=fpc, collapse=collapse, post_strata=post_strata)
    z = critical_value(level, survey)
    in_map = class_indicators(sample.map_class, legend, "map class")
    in_ref = class_indicators(sample.reference_class, legend, "reference class")
    k = len(legend)
    both = in_map * in_ref
    # One pass over the units: all quantities are combinations of these columns.
    found = survey.summarise(np.hstack([both.sum(axis=1, keepdims=True), in_ref, in_map, both]))
    ref, mapped, hit = (found[1 + i * k : 1 + (i + 1) * k] for i in range(3))
    exact = _exact_mapped(sample, strata, post_strata)
    users, producers, f1 = _ratios(survey, legend, (hit, mapped, ref), z, interval, exact)
    total_ha = strata.total_area_m2 / M2_PER_HA
    overall, *shares = mean_estimates(survey, found[: 1 + k], z, interval)
    known = mean_estimates(survey, mapped, z, interval)
    if exact is not None:
        known = [Estimate.normal(exact.get(code, 0.0), 0.0, z) for code in legend]
    counts, matrix, matrix_se = _matrix(survey, in_map, in_ref)
    return AccuracyReport(
        classes=legend,
        kind=sample.kind,
        method=_method(sample, post_strata),
        interval=Interval(interval),
        level=level,
        n_units=len(in_map),
        total_area_ha=total_ha,
        overall=overall,
        users=users,
        producers=producers,
        f1=f1,
        area_share=_by_class(legend, shares),
        area_ha=_by_class(legend, [est.scaled(total_ha) for est in shares]),
        mapped_ha=_by_class(legend, [est.scaled(total_ha) for est in known]),
        matrix=matrix,
        matrix_se=matrix_se,
        counts=counts,
        notes=(
            *_unit_notes(users, counts, legend),
            *_few_notes(_by_class(legend, shares), users, producers, interval),
            *_design_notes(sample, survey, collapse or {}),
        ),
    )


def survey_of(
    sample: ReferenceSample,
    strata: Strata,
    *,
    fpc: bool = True,
    collapse: Mapping[int, int] | None = None,
    post_strata: Strata | None = None,
) -> Survey:
    """`Survey.of` for probability samples only.

    Raises:
        DesignError: For a convenience or active sample, or units that do not fit the strata.
    """
    if not sample.kind.is_probability:
        raise DesignError(
            f"a {sample.kind} sample: the result would be map area, not an estimate",
            where="accuracy and area estimation",
            allowed=", ".join(k for k in SampleKind if k.is_probability),
            fix="draw a probability sample with `stratified_sample`, or report map area as such",
        )
    return Survey.of(sample, strata, fpc=fpc, collapse=collapse, post_strata=post_strata)


def class_indicators(codes: I64, classes: Sequence[int], what: str) -> F64:
    """(N, K) indicators, 1 where a unit has the class.

    Raises:
        DesignError: If a code is not in the legend.
    """
    unknown = sorted(set(codes.tolist()) - set(classes))
    if unknown:
        raise DesignError(
            f"{what} codes {unknown}",
            where="reference sample",
            allowed=f"codes of the legend {list(classes)}",
            fix="correct the codes or add the class to the legend",
        )
    return np.asarray(codes[:, None] == np.asarray(classes), dtype=np.float64)


def _legend(classes: Sequence[int]) -> tuple[int, ...]:
    legend = tuple(int(code) for code in classes)
    if len(set(legend)) != len(legend) or not legend:
        raise DesignError(f"legend {list(legend)}", allowed="unique class codes, at least one")
    return legend


def _by_class(legend: tuple[int, ...], estimates: Sequence[Estimate]) -> dict[int, Estimate]:
    return dict(zip(legend, estimates, strict=True))


def _exact_mapped(
    sample: ReferenceSample, strata: Strata, post_strata: Strata | None
) -> dict[int, float] | None:
    """Mapped shares by class where they are known, not estimated; else None."""
    if post_strata is None and not (
        sample.kind is SampleKind.STRATIFIED_RANDOM
        and np.array_equal(sample.stratum, sample.map_class)
    ):
        return None
    sizes = post_strata or strata
    return dict(zip(sizes.codes, np.array(sizes.area_m2) / sizes.total_area_m2, strict=True))


def _matrix(survey: Survey, in_map: F64, in_ref: F64) -> tuple[I64, F64, F64]:
    """Counts, area shares and their standard errors, each (K, K)."""
    counts = np.rint(in_map.T @ in_ref).astype(np.int64)
    rows, cols = np.nonzero(counts)
    # Cells without a unit are 0 and cost nothing.
    cells = in_map[:, rows] * in_ref[:, cols]
    share, se = np.zeros(counts.shape), np.zeros(counts.shape)
    share[rows, cols] = survey.weight @ cells
    se[rows, cols] = survey.standard_errors(cells)
    return counts, share, se


def _ratios(
    survey: Survey,
    legend: tuple[int, ...],
    parts: tuple[Linear, Linear, Linear],
    z: float,
    interval: Interval,
    exact: Mapping[int, float] | None,
) -> list[dict[int, Estimate]]:
    """User's and producer's accuracy and F1 from what agrees, is mapped, and is in the reference.

    All in one call: with small samples the time goes into calls, not into numbers.
    """
    hit, mapped, ref = parts
    k = len(legend)
    found = ratio_estimates(
        survey,
        Linear.join([hit, hit, hit]),
        Linear.join([mapped - hit, ref - hit, mapped + ref - hit - hit]),
        z,
        interval,
        worth=np.repeat([1.0, 1.0, 0.5], k),
        possible=None if exact is None else _possible(mapped.within),
    )
    return [_by_class(legend, found[i * k : (i + 1) * k]) for i in range(3)]


def _possible(mapped: F64) -> tuple[Mask, Mask]:
    """Outcomes (H, 3K) that strata of map classes allow, for the hits and misses of the ratios.

    A hit of class k, and a unit wrongly mapped as k, are mapped as k; an omitted one is not.
    """
    own, other = mapped > 0, mapped < 1
    return np.hstack([own, own, own]), np.hstack([own, other, own | other])


def _method(sample: ReferenceSample, post_strata: Strata | None) -> str:
    if sample.kind is SampleKind.STRATIFIED_RANDOM:
        return "stratified estimator (Stehman 2014)"
    if sample.kind is SampleKind.CLUSTER:
        name = "two-stage cluster sample: ratio estimator, variance between clusters"
    elif sample.kind is SampleKind.UNEQUAL:
        name = "unequal probabilities: ratio estimator, variance of weighted units"
    else:
        name = "simple random estimator"
    return f"{name}, post-stratified by map class" if post_strata else name


def _unit_notes(users: Mapping[int, Estimate], counts: I64, legend: tuple[int, ...]) -> list[str]:
    return [
        f"class {code}: all {int(n)} mapped units have one outcome, so the standard error "
        "is 0 by construction; it is not certainty (rule of three: "
        f"about {min(1.0, 3 / n):.0%} may differ)"
        for code, n in zip(legend, counts.sum(axis=1), strict=True)
        if n > 0 and users[code].se == 0
    ]


def _few_notes(
    area: Mapping[int, Estimate],
    users: Mapping[int, Estimate],
    producers: Mapping[int, Estimate],
    interval: Interval,
) -> list[str]:
    """Which estimates rest on so few units that a normal interval would not hold."""
    held = {
        Interval.WILSON: "the interval is lopsided for that reason, and wider than a normal one",
        Interval.NORMAL: "the normal interval is too short; use the Wilson one",
    }[Interval(interval)]
    notes = []
    tables = {"area": area, "user's accuracy": users, "producer's accuracy": producers}
    for name, table in tables.items():
        sure = {c: (min(e.value, 1 - e.value) / e.se) ** 2 for c, e in table.items() if e.se > 0}
        few = [f"{code} (about {n:.0f})" for code, n in sure.items() if n < FEW_UNITS]
        if few:
            notes.append(f"{name} rests on few units for class {', '.join(few)}: {held}")
    return notes


def _design_notes(
    sample: ReferenceSample, survey: Survey, collapse: Mapping[int, int]
) -> list[str]:
    notes = []
    if sample.kind is SampleKind.SYSTEMATIC:
        notes.append("systematic sample: variance of a random sample used, usually conservative")
    if survey.clustered:
        notes.append(
            f"{survey.n_primary} primary units: the variance is that of draws with replacement, "
            "slightly too large; intervals use Student's t"
        )
    if survey.merged:
        classes = ", ".join(map(str, survey.merged))
        notes.append(f"classes {classes} are one post-stratum: too few units for one each")
    notes.extend(f"stratum {a}: variance borrowed with stratum {b}" for a, b in collapse.items())
    return notes
