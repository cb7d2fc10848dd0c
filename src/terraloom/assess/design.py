"""Stratified random samples of a class raster: drawing, inclusion probabilities, true areas.

The map is read twice in full-width row strips, so memory is bounded by one strip. Units are drawn
by rank: the r-th pixel of a stratum in row-major order, r uniform without replacement, which is
exactly simple random sampling within the stratum and does not depend on the strip height.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.io import DatasetReader
from rasterio.windows import Window

from terraloom.assess.allocation import DEFAULT_EXPECTED_UA, Allocation, allocate
from terraloom.assess.areas import AREA_KNOT_PX, PixelAreas
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.errors import DesignError, GridError
from terraloom.io import geobox_of
from terraloom.legend import NODATA_CODE

__all__ = [
    "SampleDesign",
    "StratifiedSample",
    "StratumDesign",
    "reference_sample",
    "stratified_sample",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Pixels read at once: positions of one stratum then take at most 128 MiB. Strips are full-width.
STRIP_PX = 1 << 24


@dataclass(frozen=True, slots=True)
class StratumDesign:
    """One stratum as it was sampled.

    Attributes:
        code: Stratum code (the map class unless a stratum raster was given).
        n_pixels: Pixels in the sampled domain (N_h).
        area_m2: Their true ellipsoidal area in square metres.
        n_units: Units drawn (n_h).
    """

    code: int
    n_pixels: int
    area_m2: float
    n_units: int

    @property
    def inclusion_prob(self) -> float:
        """Chance of each pixel of the stratum to be drawn, n_h / N_h; 0 for an empty stratum."""
        return self.n_units / self.n_pixels if self.n_pixels else 0.0


@dataclass(frozen=True, slots=True)
class SampleDesign:
    """Everything needed to estimate from the sample later: the design record.

    Attributes:
        kind: Always a probability kind.
        seed: Seed of the draw.
        allocation: How units were divided over strata.
        strata: Sizes and units per stratum.
        not_covered_pixels: Pixels without a class: their own domain, never sampled.
        not_covered_m2: True area of those pixels in square metres.
        map_name: File name of the sampled map.
        crs: Coordinate system of the map.
        shape: Rows and columns of the map.
    """

    kind: SampleKind
    seed: int
    allocation: Allocation
    strata: tuple[StratumDesign, ...]
    not_covered_pixels: int
    not_covered_m2: float
    map_name: str
    crs: str
    shape: tuple[int, int]

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
        return Strata(
            tuple(s.code for s in self.strata),
            tuple(s.n_pixels for s in self.strata),
            tuple(s.area_m2 for s in self.strata),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able design record; inverse of `from_dict`."""
        return {
            "kind": str(self.kind),
            "seed": self.seed,
            "allocation": str(self.allocation),
            "n_units": sum(s.n_units for s in self.strata),
            "strata": [
                {
                    "code": s.code,
                    "n_pixels": s.n_pixels,
                    "area_m2": s.area_m2,
                    "n_units": s.n_units,
                    "inclusion_prob": s.inclusion_prob,
                }
                for s in self.strata
            ],
            "not_covered": {
                "n_pixels": self.not_covered_pixels,
                "area_m2": self.not_covered_m2,
                "share": self.not_covered_share,
            },
            "map": self.map_name,
            "crs": self.crs,
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SampleDesign:
        """Read a record written by `to_dict`.

        Raises:
            DesignError: If a key is missing or a value has the wrong form.
        """
        try:
            return cls(
                kind=SampleKind(record["kind"]),
                seed=int(record["seed"]),
                allocation=Allocation(record["allocation"]),
                strata=tuple(
                    StratumDesign(
                        int(s["code"]), int(s["n_pixels"]), float(s["area_m2"]), int(s["n_units"])
                    )
                    for s in record["strata"]
                ),
                not_covered_pixels=int(record["not_covered"]["n_pixels"]),
                not_covered_m2=float(record["not_covered"]["area_m2"]),
                map_name=str(record["map"]),
                crs=str(record["crs"]),
                shape=(int(record["shape"][0]), int(record["shape"][1])),
            )
        except (KeyError, TypeError, ValueError, IndexError) as err:
            raise DesignError(
                f"not a design record ({err!r})",
                where="sample design",
                fix="use the record written beside the sample",
            ) from err


@dataclass(frozen=True, slots=True, eq=False)
class StratifiedSample:
    """Points to interpret and the design that makes estimates from them possible.

    Attributes:
        points: One row per unit, pixel centres in the CRS of the map. Columns id, stratum,
            map_code, inclusion_prob, row, col, area_m2 (true area of the pixel), geometry. Rows
            are in random order, so any first part of each stratum is itself a random sample.
        design: The design record.
    """

    points: gpd.GeoDataFrame
    design: SampleDesign


def stratified_sample(
    map_path: Path,
    n: int,
    *,
    seed: int,
    classes: Sequence[int] | None = None,
    allocation: Allocation = Allocation.RARE,
    min_per_stratum: int = 30,
    expected_ua: float | Mapping[int, float] = DEFAULT_EXPECTED_UA,
    invalid_codes: Sequence[int] = (NODATA_CODE,),
    strata_path: Path | None = None,
    strip_px: int = STRIP_PX,
) -> StratifiedSample:
    """Draw a stratified random sample of pixels from a class raster on disk.

    Args:
        map_path: One-band integer raster of class codes, (H, W).
        n: Units in all.
        seed: Seed of the draw, kept in the record.
        classes: Legend codes, kept as strata even where the map has none; None takes the codes
            found. Ignored as stratum list where `strata_path` is given.
        allocation: How units are divided over strata.
        min_per_stratum: Least units per stratum, at least 2.
        expected_ua: Conjectured user's accuracy, one value or by stratum, for `neyman`.
        invalid_codes: Map codes that mean no class, besides the nodata value of the file.
        strata_path: Raster of stratum codes on the same pixels, where strata are not map classes.
        strip_px: Most pixels held at once.

    Returns:
        The points and the design record; the same file, seed and options give the same points.

    Raises:
        DesignError: If the map is empty, holds codes outside `classes`, or n does not fit.
        GridError: If the two rasters differ in pixels.
    """
    geobox = geobox_of(map_path)
    areas = PixelAreas(geobox)
    reader = _StripReader(Path(map_path), strata_path, geobox, tuple(invalid_codes), strip_px)
    legend = None if classes is None or strata_path is not None else tuple(map(int, classes))
    census = _census(reader, areas)
    codes = _stratum_codes(census, legend, map_path)
    n_pixels = [census.pixels.get(code, 0) for code in codes]
    n_units = allocate(
        n_pixels,
        n,
        allocation,
        min_per_stratum=min_per_stratum,
        expected_ua=_expected(expected_ua, codes),
    )
    rng = np.random.default_rng(seed)
    ranks = {
        code: np.sort(rng.choice(size, take, replace=False, shuffle=False))
        for code, size, take in zip(codes, n_pixels, n_units, strict=True)
        if take
    }
    design = SampleDesign(
        kind=SampleKind.STRATIFIED_RANDOM,
        seed=seed,
        allocation=Allocation(allocation),
        strata=tuple(
            StratumDesign(code, size, census.area_m2.get(code, 0.0), take)
            for code, size, take in zip(codes, n_pixels, n_units, strict=True)
        ),
        not_covered_pixels=census.invalid_pixels,
        not_covered_m2=census.invalid_m2,
        map_name=Path(map_path).name,
        crs=str(geobox.crs),
        shape=(int(geobox.shape[0]), int(geobox.shape[1])),
    )
    units = _locate(reader, census, ranks)
    order = rng.permutation(len(units))
    return StratifiedSample(_points(units[order], design, areas, geobox), design)


def reference_sample(
    points: gpd.GeoDataFrame, answers: Mapping[str, int], design: SampleDesign
) -> ReferenceSample:
    """Join interpreted classes to the drawn points, in the form the estimators take.

    Args:
        points: As drawn by `stratified_sample`.
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
    )


@dataclass(frozen=True, slots=True)
class _Strip:
    """Rows of the raster: map codes, stratum codes and validity, each (h, W)."""

    first_row: int
    codes: NDArray[Any]
    strata: NDArray[Any]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _StripReader:
    """Full-width strips of the map and, where given, the stratum raster."""

    map_path: Path
    strata_path: Path | None
    geobox: GeoBox
    invalid_codes: tuple[int, ...]
    strip_px: int

    def starts(self) -> list[tuple[int, int]]:
        """First row and height of every strip."""
        h, w = self.geobox.shape
        rows = max(1, self.strip_px // w)
        return [(r, min(rows, h - r)) for r in range(0, h, rows)]

    def strips(self, chosen: Sequence[int] | None = None) -> Iterator[tuple[int, _Strip]]:
        """Number and content of the chosen strips (all by default)."""
        starts = self.starts()
        with rasterio.open(self.map_path) as src:
            _require_codes(src, self.map_path)
            for k in range(len(starts)) if chosen is None else chosen:
                first, height = starts[k]
                codes, valid = _read_codes(src, first, height)
                valid &= ~np.isin(codes, self.invalid_codes)
                strata = codes
                if self.strata_path is not None:
                    strata, inside = self._read_strata(self.strata_path, first, height)
                    valid &= inside
                yield k, _Strip(first, codes, strata, valid)

    def _read_strata(
        self, path: Path, first: int, height: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        other = geobox_of(path)
        if other != self.geobox:
            raise GridError(
                f"strata on {other.shape} px, map on {self.geobox.shape} px",
                where=str(path),
                allowed="the same pixels as the map",
            )
        with rasterio.open(path) as src:
            _require_codes(src, path)
            return _read_codes(src, first, height)


@dataclass(frozen=True, slots=True)
class _Census:
    """Counts of one pass over the raster."""

    pixels: dict[int, int]
    area_m2: dict[int, float]
    per_strip: list[dict[int, int]]
    invalid_pixels: int
    invalid_m2: float


def _census(reader: _StripReader, areas: PixelAreas) -> _Census:
    """Pixels and true area of every stratum, and pixels per strip."""
    pixels: dict[int, int] = {}
    area_m2: dict[int, float] = {}
    per_strip: list[dict[int, int]] = []
    invalid_pixels, invalid_m2 = 0, 0.0
    for _, strip in reader.strips():
        here: dict[int, int] = {}
        h, w = strip.codes.shape
        # Blocks bound the float64 area array to 2 MiB, whatever the strip.
        for r in range(0, h, AREA_KNOT_PX):
            for c in range(0, w, AREA_KNOT_PX):
                rows, cols = slice(r, min(r + AREA_KNOT_PX, h)), slice(c, min(c + AREA_KNOT_PX, w))
                top = strip.first_row
                area = areas.window(slice(top + rows.start, top + rows.stop), cols)
                valid = strip.valid[rows, cols]
                invalid_pixels += int(valid.size - valid.sum())
                invalid_m2 += float(area[~valid].sum())
                found, index, count = np.unique(
                    strip.strata[rows, cols][valid], return_inverse=True, return_counts=True
                )
                sums = np.bincount(index, weights=area[valid], minlength=found.size)
                for code, k, a in zip(found.tolist(), count.tolist(), sums.tolist(), strict=True):
                    here[int(code)] = here.get(int(code), 0) + k
                    area_m2[int(code)] = area_m2.get(int(code), 0.0) + a
        per_strip.append(here)
        for code, k in here.items():
            pixels[code] = pixels.get(code, 0) + k
    return _Census(pixels, area_m2, per_strip, invalid_pixels, invalid_m2)


def _stratum_codes(
    census: _Census, legend: tuple[int, ...] | None, map_path: Path
) -> tuple[int, ...]:
    found = tuple(sorted(census.pixels))
    if not found:
        raise DesignError("no pixel with a class", where=str(map_path), fix="check the map")
    unknown = sorted(set(found) - set(legend or found))
    if unknown:
        raise DesignError(
            f"map codes {unknown}",
            where=str(map_path),
            allowed=f"the legend {list(legend or ())} and the nodata value",
            fix="add the classes to the legend or name the codes in `invalid_codes`",
        )
    return legend or found


def _expected(expected_ua: float | Mapping[int, float], codes: tuple[int, ...]) -> F64:
    if isinstance(expected_ua, Mapping):
        return np.array([expected_ua.get(code, DEFAULT_EXPECTED_UA) for code in codes])
    return np.full(len(codes), float(expected_ua))


def _locate(reader: _StripReader, census: _Census, ranks: Mapping[int, I64]) -> I64:
    """Row, column, stratum and map code (n, 4) of the drawn ranks; reads only strips with units."""
    wanted: dict[int, list[tuple[int, I64]]] = {}
    before = dict.fromkeys(ranks, 0)
    for k, here in enumerate(census.per_strip):
        for code, rank in ranks.items():
            count = here.get(code, 0)
            lo, hi = np.searchsorted(rank, [before[code], before[code] + count])
            if hi > lo:
                wanted.setdefault(k, []).append((code, rank[lo:hi] - before[code]))
            before[code] += count
    parts = []
    for k, strip in reader.strips(sorted(wanted)):
        for code, local in wanted[k]:
            flat = np.flatnonzero((strip.strata == code) & strip.valid)[local]
            row, col = np.divmod(flat, strip.codes.shape[1])
            mapped = strip.codes.ravel()[flat].astype(np.int64)
            parts.append(
                np.column_stack([row + strip.first_row, col, np.full(row.size, code), mapped])
            )
    units: I64 = np.concatenate(parts).astype(np.int64)
    # By stratum, then row-major: the order must not depend on the strips.
    return units[np.lexsort((units[:, 1], units[:, 0], units[:, 2]))]


def _points(
    units: I64, design: SampleDesign, areas: PixelAreas, geobox: GeoBox
) -> gpd.GeoDataFrame:
    row, col, stratum, mapped = units.T
    a, right, down = geobox.affine, col + 0.5, row + 0.5
    x, y = a.a * right + a.b * down + a.c, a.d * right + a.e * down + a.f
    prob = {s.code: s.inclusion_prob for s in design.strata}
    width = max(5, len(str(len(units))))
    return gpd.GeoDataFrame(
        {
            "id": [f"s{i:0{width}d}" for i in range(1, len(units) + 1)],
            "stratum": stratum,
            "map_code": mapped,
            "inclusion_prob": [prob[code] for code in stratum.tolist()],
            "row": row,
            "col": col,
            "area_m2": areas.at(row, col),
        },
        geometry=gpd.points_from_xy(x, y),
        crs=str(geobox.crs),
    )


def _require_codes(src: DatasetReader, path: Path) -> None:
    if src.count != 1 or np.dtype(src.dtypes[0]).kind not in "iu":
        raise DesignError(
            f"{src.count} band(s) of {src.dtypes[0]}",
            where=str(path),
            allowed="one band of integer codes",
        )


def _read_codes(
    src: DatasetReader, first: int, height: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    window = Window(0, first, src.width, height)
    codes: NDArray[Any] = src.read(1, window=window)
    valid = np.ones(codes.shape, dtype=np.bool_)
    if src.nodata is not None:
        valid = codes != src.nodata
    return codes, valid
