"""What a sample-based estimate starts from: how units were chosen, strata, interpreted units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, nan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.errors import DesignError

__all__ = ["ReferenceSample", "SampleKind", "Strata", "square_counts"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class SampleKind(StrEnum):
    """How sample units were chosen; only probability samples may enter an estimator."""

    SIMPLE_RANDOM = "simple_random"
    STRATIFIED_RANDOM = "stratified_random"
    SYSTEMATIC = "systematic"
    CLUSTER = "two_stage_cluster"
    UNEQUAL = "unequal_probability"
    CONVENIENCE = "convenience"
    ACTIVE = "active"

    @property
    def is_probability(self) -> bool:
        """True when every pixel had a known, non-zero chance of being chosen.

        A systematic sample is treated as simple random (or post-stratified), which is
        usually conservative: its variance has no unbiased estimator.
        """
        return self not in (SampleKind.CONVENIENCE, SampleKind.ACTIVE)

    @property
    def is_clustered(self) -> bool:
        """True where the variance is that of weighted totals: clusters, unequal chances."""
        return self in (SampleKind.CLUSTER, SampleKind.UNEQUAL)


@dataclass(frozen=True, slots=True)
class Strata:
    """Known sizes of the sampled strata.

    Attributes:
        codes: Stratum codes, unique.
        n_pixels: Pixels of each stratum in the sampled domain (N_h).
        area_m2: True ellipsoidal area of each stratum in square metres.
    """

    codes: tuple[int, ...]
    n_pixels: tuple[int, ...]
    area_m2: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check lengths, uniqueness and signs.

        Raises:
            DesignError: If the three tuples disagree or describe impossible strata.
        """
        if not len(self.codes) == len(self.n_pixels) == len(self.area_m2) > 0:
            raise DesignError(
                f"{len(self.codes)} codes, {len(self.n_pixels)} pixel counts, "
                f"{len(self.area_m2)} areas",
                where="strata",
                allowed="the same number of each, at least one",
            )
        if len(set(self.codes)) != len(self.codes):
            raise DesignError("repeated stratum codes", where="strata", allowed="unique codes")
        for code, n, area in zip(self.codes, self.n_pixels, self.area_m2, strict=True):
            if n < 0 or not isfinite(area) or area < 0 or (n > 0) != (area > 0):
                raise DesignError(
                    f"stratum {code}: {n} pixels, {area} m2",
                    where="strata",
                    allowed="both zero or both positive",
                )

    @classmethod
    def from_pixels(cls, n_pixels: Mapping[int, int], pixel_area_m2: float) -> Strata:
        """Strata of an equal-area raster, from pixel counts.

        Args:
            n_pixels: Pixels per stratum code.
            pixel_area_m2: True area of one pixel in square metres.
        """
        counts = tuple(int(n) for n in n_pixels.values())
        return cls(tuple(n_pixels), counts, tuple(n * pixel_area_m2 for n in counts))

    @property
    def total_area_m2(self) -> float:
        """Area of the whole sampled domain in square metres."""
        return float(sum(self.area_m2))


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSample:
    """Sample units with map and reference class; N units.

    Attributes:
        stratum: (N,) int64, stratum code in force when the unit was drawn.
        map_class: (N,) int64, class code in the map under assessment.
        reference_class: (N,) int64, class code found by the interpreter.
        kind: How the units were chosen.
        unit_area_m2: (N,) float64 true pixel areas, or None where pixels of a stratum share one
            area. With it, each stratum mean is area-weighted (a ratio to the known stratum area).
        cluster: (N,) int64, primary unit each pixel was drawn from; needed for a two-stage cluster
            sample, None for the others.
        inclusion_prob: (N,) float64, chance of each pixel to be in the sample, above 0 and at
            most 1; needed where it differs within a stratum (cluster, unequal probability), None
            where it is n_h / N_h.
    """

    stratum: I64
    map_class: I64
    reference_class: I64
    kind: SampleKind
    unit_area_m2: F64 | None = None
    cluster: I64 | None = None
    inclusion_prob: F64 | None = None

    def __post_init__(self) -> None:
        """Normalise the columns to int64 and check them.

        Raises:
            DesignError: If lengths differ, codes are missing or not integer, an area is not
                positive, a probability is not in (0, 1], or what the kind needs is not given.
        """
        for name in ("stratum", "map_class", "reference_class"):
            object.__setattr__(self, name, _codes(getattr(self, name), name))
        object.__setattr__(self, "kind", SampleKind(self.kind))
        n = self.stratum.size
        lengths = {"map_class": self.map_class.size, "reference_class": self.reference_class.size}
        if self.unit_area_m2 is not None:
            area = np.asarray(self.unit_area_m2, dtype=np.float64).ravel()
            if not (np.isfinite(area) & (area > 0)).all():
                raise DesignError("unit areas that are not positive", where="reference sample")
            object.__setattr__(self, "unit_area_m2", area)
            lengths["unit_area_m2"] = area.size
        if self.cluster is not None:
            object.__setattr__(self, "cluster", _codes(self.cluster, "cluster"))
            lengths["cluster"] = np.size(self.cluster)
        if self.inclusion_prob is not None:
            prob = np.asarray(self.inclusion_prob, dtype=np.float64).ravel()
            if not ((prob > 0) & (prob <= 1)).all():
                raise DesignError(
                    "inclusion probabilities out of range", where="reference sample",
                    allowed="above 0 and at most 1, for every unit",
                    fix="take them from the design; labels without them are no probability sample",
                )  # fmt: skip
            object.__setattr__(self, "inclusion_prob", prob)
            lengths["inclusion_prob"] = prob.size
        self._require_what_the_kind_needs()
        wrong = {name: size for name, size in lengths.items() if size != n}
        if wrong or n == 0:
            raise DesignError(
                f"{n} strata against {wrong or lengths}",
                where="reference sample",
                allowed="columns of one length, at least one unit",
            )

    def _require_what_the_kind_needs(self) -> None:
        needs = {
            SampleKind.CLUSTER: ("cluster", "inclusion_prob"),
            SampleKind.UNEQUAL: ("inclusion_prob",),
        }.get(self.kind, ())
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise DesignError(
                f"a {self.kind} sample without {' and '.join(missing)}", where="reference sample",
                fix="take them from the sample file, or the units are no probability sample",
            )  # fmt: skip

    @classmethod
    def from_matrix(
        cls, matrix: ArrayLike, classes: Sequence[int], kind: SampleKind
    ) -> ReferenceSample:
        """Expand a published count matrix whose strata are the map classes.

        Args:
            matrix: (K, K) counts, rows = map class = stratum, columns = reference class.
            classes: K class codes in row order.
            kind: How the units were chosen.
        """
        counts = square_counts(matrix)
        codes = np.asarray(classes, dtype=np.int64)
        rows, cols = np.indices(counts.shape)
        mapped = np.repeat(codes[rows.ravel()], counts.ravel())
        reference = np.repeat(codes[cols.ravel()], counts.ravel())
        return cls(mapped, mapped, reference, kind)


def square_counts(matrix: ArrayLike) -> I64:
    """A (K, K) int64 count matrix, rows = map, columns = reference.

    Raises:
        DesignError: If it is not square or holds negative counts.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or (counts < 0).any():
        raise DesignError(
            f"an array of shape {counts.shape}",
            where="error matrix",
            allowed="a square matrix of counts, rows = map, columns = reference",
        )
    return counts.astype(np.int64)


def _codes(values: ArrayLike, name: str) -> I64:
    raw = np.asarray(values).ravel()
    numeric = raw.astype(np.float64) if raw.dtype != object else _object_to_float(raw, name)
    bad = ~np.isfinite(numeric) | (numeric != np.rint(numeric))
    if bad.any():
        raise DesignError(
            f"{int(bad.sum())} of {raw.size} {name} values are missing or not whole numbers",
            where="reference sample",
            allowed="integer codes for every unit",
            fix="interpret the missing units; leaving them out changes the estimate",
        )
    return numeric.astype(np.int64)


def _object_to_float(raw: NDArray[Any], name: str) -> F64:
    try:
        return np.array([nan if v is None else float(v) for v in raw])
    except (TypeError, ValueError) as err:
        raise DesignError(
            f"{name} values that are not codes", where="reference sample", allowed="integer codes"
        ) from err
