"""The record of a sample design: what estimates from the sample need, and what proves it unedited.

Drawing is in :mod:`terraloom.assess.draw`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import geopandas as gpd
import numpy as np
from numpy.typing import NDArray

from terraloom.assess.allocation import Allocation
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.errors import DesignError
from terraloom.io import digest_json

__all__ = [
    "ClusterFacts", "DrawnSample", "SampleDesign", "StratumDesign", "reference_sample", "unit_text",
]  # fmt: skip

I64 = NDArray[np.int64]

#: Columns of the text of a unit, see `unit_text`.
UNIT_COLUMNS = ("id", "row", "col", "stratum", "cluster", "reserve", "inclusion_prob")


@dataclass(frozen=True, slots=True)
class StratumDesign:
    """One stratum as it was sampled.

    Attributes:
        code: Stratum code (the map class unless other strata were given).
        n_pixels: Pixels in the sampled domain (N_h).
        area_m2: Their true ellipsoidal area in square metres.
        n_units: Units drawn (n_h), without the reserve.
        n_reserve: Further units, drawn in the same way, that stand in for units without an answer.
        name: Name of the stratum, where it has one.
    """

    code: int
    n_pixels: int
    area_m2: float
    n_units: int
    n_reserve: int = 0
    name: str = ""

    @property
    def inclusion_prob(self) -> float:
        """Chance of each pixel of the stratum to be drawn, n_h / N_h; 0 for an empty stratum."""
        return self.n_units / self.n_pixels if self.n_pixels else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "code": self.code, "name": self.name, "n_pixels": self.n_pixels,
            "area_m2": self.area_m2, "n_units": self.n_units, "n_reserve": self.n_reserve,
            "inclusion_prob": self.inclusion_prob,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, s: Mapping[str, Any]) -> StratumDesign:
        """Inverse of `to_dict`."""
        return cls(
            int(s["code"]), int(s["n_pixels"]), float(s["area_m2"]), int(s["n_units"]),
            int(s.get("n_reserve", 0)), str(s.get("name", "")),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """How a two-stage sample was drawn.

    Attributes:
        block_px: Side of a primary unit, a square of pixels that starts at the map's corner.
        n_blocks: Blocks with at least one pixel of the domain.
        n_drawn: Blocks drawn, with probability proportional to their area in the domain.
        per_block: Pixels drawn in each (all, where a block has fewer).
    """

    block_px: int
    n_blocks: int
    n_drawn: int
    per_block: int


@dataclass(frozen=True, slots=True)
class SampleDesign:
    """Everything needed to estimate from the sample later: the design record.

    Attributes:
        kind: Always a probability kind.
        seed: Seed of the draw.
        allocation: How units were divided over strata; None where the sample is not stratified.
        strata: Sizes and units per stratum; one stratum where the sample is not stratified.
        classes: Sizes and units per map class, for post-stratification.
        not_covered_pixels: Pixels without a class or stratum: their own domain, never sampled.
        not_covered_m2: True area of those pixels in square metres.
        map_name: File name of the sampled map.
        map_digest: Digest of the codes of the map in `map_code`; empty where it was not taken.
        crs: Coordinate system of the map.
        transform: Six numbers from column and row to x and y.
        shape: Rows and columns of the map.
        units: One text per unit in the order of the points, see `unit_text`.
        cluster: Facts of a two-stage sample.
        spacing_px: Distance of the points of a systematic sample.
        planned: What was asked for: size or target standard error and what follows from it.
    """

    kind: SampleKind
    seed: int
    allocation: Allocation | None
    strata: tuple[StratumDesign, ...]
    classes: tuple[StratumDesign, ...]
    not_covered_pixels: int
    not_covered_m2: float
    map_name: str
    crs: str
    transform: tuple[float, ...]
    shape: tuple[int, int]
    units: tuple[str, ...]
    cluster: ClusterFacts | None = None
    spacing_px: float | None = None
    map_digest: str = ""
    planned: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def digest(self) -> str:
        """What the sample is known by in answers: the same for the same units of one design."""
        return digest_json(
            [self.kind, self.seed, [s.to_dict() for s in self.strata], self.crs,
             list(self.transform), list(self.shape), list(self.units)]
        )  # fmt: skip

    @property
    def n_units(self) -> int:
        """Units without the reserve."""
        return sum(s.n_units for s in self.strata)

    @property
    def covered_m2(self) -> float:
        """True area of the sampled domain in square metres."""
        return float(sum(s.area_m2 for s in self.strata))

    @property
    def not_covered_share(self) -> float:
        """Share of the raster's area about which the estimates say nothing, 0-1."""
        return self.not_covered_m2 / (self.covered_m2 + self.not_covered_m2)

    def sizes(self) -> Strata:
        """Stratum sizes in the form the estimators take."""
        return _sizes(self.strata)

    def class_sizes(self) -> Strata:
        """Sizes of the map classes, the post-strata of a sample that is not stratified by them."""
        return _sizes(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able design record; inverse of `from_dict`."""
        cluster = self.cluster
        return {
            "kind": str(self.kind),
            "seed": self.seed,
            "allocation": None if self.allocation is None else str(self.allocation),
            "n_units": self.n_units,
            "strata": [s.to_dict() for s in self.strata],
            "classes": [s.to_dict() for s in self.classes],
            "not_covered": {
                "n_pixels": self.not_covered_pixels,
                "area_m2": self.not_covered_m2,
                "share": self.not_covered_share,
            },
            "map": self.map_name,
            "map_digest": self.map_digest,
            "crs": self.crs,
            "transform": list(self.transform),
            "shape": list(self.shape),
            "cluster": None if cluster is None else {
                "block_px": cluster.block_px, "n_blocks": cluster.n_blocks,
                "n_drawn": cluster.n_drawn, "per_block": cluster.per_block,
            },
            "spacing_px": self.spacing_px,
            "planned": dict(self.planned),
            "units_columns": ",".join(UNIT_COLUMNS),
            "units": list(self.units),
            "digest": self.digest,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SampleDesign:
        """Read a record written by `to_dict`.

        Raises:
            DesignError: If a key is missing, a value has the wrong form, or the record was edited.
        """
        try:
            cluster = record["cluster"]
            design = cls(
                kind=SampleKind(record["kind"]),
                seed=int(record["seed"]),
                allocation=None if record["allocation"] is None
                else Allocation(record["allocation"]),
                strata=tuple(StratumDesign.from_dict(s) for s in record["strata"]),
                classes=tuple(StratumDesign.from_dict(s) for s in record["classes"]),
                not_covered_pixels=int(record["not_covered"]["n_pixels"]),
                not_covered_m2=float(record["not_covered"]["area_m2"]),
                map_name=str(record["map"]),
                map_digest=str(record["map_digest"]),
                crs=str(record["crs"]),
                transform=tuple(float(v) for v in record["transform"]),
                shape=(int(record["shape"][0]), int(record["shape"][1])),
                units=tuple(str(u) for u in record["units"]),
                cluster=None if cluster is None else ClusterFacts(**cluster),
                spacing_px=record["spacing_px"],
                planned=record["planned"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as err:
            raise DesignError(
                f"not a design record ({err!r})",
                where="sample design",
                fix="use the record written beside the sample",
            ) from err
        if design.digest != record.get("digest"):
            raise DesignError(
                "the record was edited after the draw: it no longer has its digest",
                where="sample design",
                allowed="the record as it was written beside the sample",
                fix="bring back design.json (git, DVC or a copy), or draw the sample anew",
            )
        return design


def _sizes(parts: Sequence[StratumDesign]) -> Strata:
    return Strata(
        tuple(s.code for s in parts),
        tuple(s.n_pixels for s in parts),
        tuple(s.area_m2 for s in parts),
    )


def unit_text(points: gpd.GeoDataFrame) -> list[str]:
    """One text per unit with all that the design fixed about it; columns `UNIT_COLUMNS`."""
    cluster = points["cluster"] if "cluster" in points else np.zeros(len(points), np.int64)
    columns = [points[c] if c != "cluster" else cluster for c in UNIT_COLUMNS[:-1]]
    return [
        ",".join([*(str(v) for v in row[:-1]), format(row[-1], ".9g")])
        for row in zip(*columns, points["inclusion_prob"], strict=True)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class DrawnSample:
    """Points to interpret and the design that makes estimates from them possible.

    Attributes:
        points: One row per unit, pixel centres in the CRS of the map. Columns id, stratum,
            map_code, inclusion_prob, row, col, area_m2 (true area of the pixel), reserve (1: stands
            in for a unit of its stratum without an answer), cluster (two-stage samples only),
            geometry. Rows are in random order, the reserve last, so any first part of each stratum
            is itself a random sample.
        design: The design record.
    """

    points: gpd.GeoDataFrame
    design: SampleDesign


def reference_sample(
    points: gpd.GeoDataFrame, answers: Mapping[str, int], design: SampleDesign
) -> ReferenceSample:
    """Join interpreted classes to the drawn points, in the form the estimators take.

    Args:
        points: As drawn; rows that are left out (reserve, no answer possible) are dropped before.
        answers: Reference class code by point id, for every point.
        design: The record of the same draw.

    Raises:
        DesignError: If points lack an answer, or answers name points that were never drawn: both
            would break the known inclusion probabilities.
    """
    ids = [str(i) for i in points["id"]]
    missing, extra = sorted(set(ids) - set(answers)), sorted(set(answers) - set(ids))
    if missing or extra:
        raise DesignError(
            f"{len(missing)} points without an answer {missing[:5]}, "
            f"{len(extra)} answers without a point {extra[:5]}",
            where="reference answers",
            allowed="exactly one class for every drawn point",
            fix="interpret the missing points and remove those that the design did not draw",
        )
    return ReferenceSample(
        points["stratum"].to_numpy(),
        points["map_code"].to_numpy(),
        np.array([answers[i] for i in ids]),
        design.kind,
        points["area_m2"].to_numpy(),
        cluster=points["cluster"].to_numpy() if design.kind is SampleKind.CLUSTER else None,
        inclusion_prob=points["inclusion_prob"].to_numpy()
        if design.kind in (SampleKind.CLUSTER, SampleKind.UNEQUAL)
        else None,
    )
