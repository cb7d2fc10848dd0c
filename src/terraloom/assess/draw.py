"""Drawing probability samples of pixels from a class raster: four designs, one kind of result.

The map is read in full-width row strips, so memory is bounded by one strip, and no draw depends on
the strip height.

- simple random: n pixels of the domain, all sets equally likely;
- stratified random: the same in each stratum, units divided as an `Allocation` says;
- systematic: a square grid of points with a random start. The spacing s is a real number, so that
  a pixel holds a point with probability exactly 1 / s^2;
- two-stage cluster: square blocks drawn without replacement with probability proportional to
  their area (systematic draw from the blocks in random order: Hartley and Rao 1962), then
  pixels at random inside each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path

import geopandas as gpd
import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from terraloom.assess.allocation import DEFAULT_EXPECTED_UA, Allocation, allocate
from terraloom.assess.areas import PixelAreas
from terraloom.assess.design import (
    ClusterFacts,
    DrawnSample,
    SampleDesign,
    StratumDesign,
    unit_text,
)
from terraloom.assess.samples import SampleKind
from terraloom.assess.strips import (
    STRIP_PX,
    WHOLE,
    Census,
    Polygons,
    Strip,
    StripReader,
    locate,
    survey,
)
from terraloom.errors import DesignError
from terraloom.io import geobox_of
from terraloom.legend import NODATA_CODE

__all__ = [
    "Domain",
    "cluster_sample",
    "expected",
    "simple_sample",
    "stratified_sample",
    "survey_map",
    "systematic_sample",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Domain:
    """A map that was read once: where its pixels are and how many of each stratum there are.

    Attributes:
        reader: Strips of the map.
        areas: True pixel areas.
        census: Counts and areas.
        codes: Strata, in order; the whole legend where strata are map classes.
        classes: Map classes, in order.
    """

    reader: StripReader
    areas: PixelAreas
    census: Census
    codes: tuple[int, ...]
    classes: tuple[int, ...]

    @property
    def n_pixels(self) -> list[int]:
        """Pixels of each stratum."""
        return [self.census.pixels.get(code, 0) for code in self.codes]

    @property
    def area_m2(self) -> list[float]:
        """True area of each stratum."""
        return [self.census.area_m2.get(code, 0.0) for code in self.codes]

    def names(self) -> Mapping[int, str]:
        """Names of strata that are polygons."""
        strata = self.reader.strata
        return strata.names if isinstance(strata, Polygons) else {}


def survey_map(
    map_path: Path,
    *,
    classes: Sequence[int] | None = None,
    strata: Path | Polygons | int | None = None,
    invalid_codes: Sequence[int] = (NODATA_CODE,),
    strip_px: int = STRIP_PX,
) -> Domain:
    """Read a class map once.

    Args:
        map_path: One-band integer raster of class codes, (H, W).
        classes: Legend codes, kept as classes and strata even where the map has none; None takes
            the codes found.
        strata: Raster of stratum codes on the same pixels, polygons, or `WHOLE`; None takes the
            map classes.
        invalid_codes: Map codes that mean no class, besides the nodata value of the file.
        strip_px: Most pixels held at once.

    Raises:
        DesignError: If the map is empty or holds codes outside `classes`.
        GridError: If the two rasters differ in pixels.
    """
    path = Path(map_path)
    geobox = geobox_of(path)
    reader = StripReader(path, geobox, tuple(invalid_codes), strata, strip_px)
    areas = PixelAreas(geobox)
    census = survey(reader, areas)
    found = tuple(sorted(census.class_pixels))
    if not found:
        raise DesignError("no pixel with a class", where=str(path), fix="check the map")
    legend = None if classes is None else tuple(int(c) for c in classes)
    unknown = sorted(set(found) - set(legend or found))
    if unknown:
        raise DesignError(
            f"map codes {unknown}",
            where=str(path),
            allowed=f"the legend {list(legend or ())} and the nodata value",
            fix="add the classes to the legend or name the codes in `invalid_codes`",
        )
    codes = (legend or found) if strata is None else tuple(sorted(census.pixels))
    return Domain(reader, areas, census, codes, legend or found)


def stratified_sample(
    domain: Domain,
    n: int,
    *,
    seed: int,
    allocation: Allocation = Allocation.RARE,
    min_per_stratum: int = 30,
    expected_ua: float | Mapping[int, float] = DEFAULT_EXPECTED_UA,
    overhead: float = 1.0,
) -> DrawnSample:
    """Draw a stratified random sample of pixels.

    Args:
        domain: The map and its strata.
        n: Units in all, without the reserve.
        seed: Seed of the draw, kept in the record.
        allocation: How units are divided over strata, by their true area.
        min_per_stratum: Least units per stratum, at least 2.
        expected_ua: Conjectured user's accuracy, one value or by stratum, for `neyman`.
        overhead: Units drawn per unit wanted, 1 or more; what is above 1 is the reserve.

    Returns:
        The points and the design record; the same file, seed and options give the same points.

    Raises:
        DesignError: If n does not fit the strata.
    """
    n_units = allocate(
        domain.n_pixels,
        n,
        allocation,
        min_per_stratum=min_per_stratum,
        expected_ua=expected(expected_ua, domain.codes),
        areas=domain.area_m2,
    )
    return _by_rank(
        domain, n_units, SampleKind.STRATIFIED_RANDOM, seed, Allocation(allocation), overhead
    )


def simple_sample(domain: Domain, n: int, *, seed: int, overhead: float = 1.0) -> DrawnSample:
    """Draw n pixels of the domain at random; the domain must be surveyed as one stratum.

    Raises:
        DesignError: If the domain has strata, or fewer than n pixels.
    """
    _require_whole(domain)
    (size,) = domain.n_pixels
    if not 2 <= n <= size:
        raise DesignError(f"{n} units", where="simple random sample", allowed=f"2 to {size}")
    return _by_rank(domain, [n], SampleKind.SIMPLE_RANDOM, seed, None, overhead)


def systematic_sample(domain: Domain, n: int, *, seed: int) -> DrawnSample:
    """Draw the pixels under a square grid of points with a random start, about n of them.

    The number that falls on the domain is random; it is n on average.

    Raises:
        DesignError: If the domain has strata, or n is not between 2 and its pixels.
    """
    _require_whole(domain)
    (size,) = domain.n_pixels
    if not 2 <= n <= size:
        raise DesignError(f"{n} units", where="systematic sample", allowed=f"2 to {size}")
    rng = np.random.default_rng(seed)
    spacing = sqrt(size / n)
    h, w = domain.reader.geobox.shape
    rows, cols = (
        np.floor(np.arange(start, length, spacing)).astype(np.int64)
        for start, length in zip(rng.uniform(0, spacing, 2), (h, w), strict=True)
    )
    parts = []
    for _, strip in domain.reader.strips():
        local = rows[(rows >= strip.first_row) & (rows < strip.first_row + len(strip.codes))]
        r, c = (v.ravel() for v in np.meshgrid(local - strip.first_row, cols, indexing="ij"))
        parts.append(_units(strip, r[strip.valid[r, c]], c[strip.valid[r, c]]))
    units = np.concatenate(parts)
    if len(units) < 2:
        raise DesignError(
            f"{len(units)} points of the grid fall on the map", where="systematic sample",
            fix="raise the sample size or take another seed",
        )  # fmt: skip
    prob = np.full(len(units), 1 / spacing**2)
    strata = [StratumDesign(WHOLE, size, domain.area_m2[0], len(units))]
    return _finish(
        domain, units, prob, rng, SampleKind.SYSTEMATIC, seed, strata, spacing_px=spacing
    )


def cluster_sample(
    domain: Domain, n: int, *, seed: int, block_px: int, per_block: int
) -> DrawnSample:
    """Draw blocks of pixels by their area, then pixels inside each: n in all.

    A pixel's inclusion probability is that of its block, (blocks drawn) x (area of the block) /
    (area of the domain), times (pixels drawn) / (pixels in the block).

    Args:
        domain: The map as one stratum.
        n: Pixels in all; n / per_block blocks are drawn.
        seed: Seed of the draw.
        block_px: Side of a block in pixels; blocks start at the corner of the map.
        per_block: Pixels per block.

    Raises:
        DesignError: If fewer than two blocks are to be drawn or there are not enough of them.

    References:
        Hartley and Rao (1962); Cochran (1977), section 9A.
    """
    _require_whole(domain)
    counts, area = _blocks(domain, block_px)
    live = np.argwhere(counts > 0)
    sizes, areas = counts[tuple(live.T)], area[tuple(live.T)]
    m = ceil(n / per_block)
    if not 2 <= m <= len(live) // 2:
        raise DesignError(
            f"{m} blocks of {block_px} px to draw from {len(live)}", where="sample.cluster",
            allowed=f"2 to {len(live) // 2}: half of the blocks",
            fix="make the blocks smaller, or change the sample size or the pixels per block",
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    chosen, chance = _proportional(areas, m, rng)
    parts, probs, clusters = [], [], []
    corners = live[chosen] * block_px
    h = domain.reader.geobox.shape[0]
    rows = domain.reader.rows((top, min(block_px, h - top)) for top in corners[:, 0].tolist())
    for k, left, whole in zip(chosen.tolist(), corners[:, 1].tolist(), rows, strict=True):
        strip = _cut(whole, slice(left, left + block_px))
        flat = np.flatnonzero(strip.valid)
        take = min(per_block, flat.size)
        picked = np.sort(rng.choice(flat, take, replace=False, shuffle=False))
        r, c = np.divmod(picked, strip.codes.shape[1])
        unit = _units(strip, r, c)
        unit[:, 1] += left
        parts.append(unit)
        probs.append(np.full(take, chance[k] * take / sizes[k]))
        clusters.append(np.full(take, k + 1))
    units = np.concatenate(parts)
    strata = [StratumDesign(WHOLE, domain.n_pixels[0], domain.area_m2[0], len(units))]
    facts = ClusterFacts(block_px, len(live), len(chosen), per_block)
    return _finish(
        domain, units, np.concatenate(probs), rng, SampleKind.CLUSTER, seed, strata,
        cluster=np.concatenate(clusters), cluster_facts=facts,
    )  # fmt: skip


def expected(expected_ua: float | Mapping[int, float], codes: Sequence[int]) -> F64:
    """Conjectured user's accuracy of each stratum, (H,), 0-1."""
    if isinstance(expected_ua, Mapping):
        return np.array([expected_ua.get(code, DEFAULT_EXPECTED_UA) for code in codes])
    return np.full(len(codes), float(expected_ua))


def _require_whole(domain: Domain) -> None:
    if domain.codes != (WHOLE,):
        raise DesignError(
            f"strata {list(domain.codes)}", where="sample design",
            allowed="strata only with the stratified design",
        )  # fmt: skip


def _by_rank(
    domain: Domain, n_units: Sequence[int], kind: SampleKind, seed: int,
    allocation: Allocation | None, overhead: float,
) -> DrawnSample:  # fmt: skip
    """Pixels of each stratum by rank, the reserve after them."""
    rng = np.random.default_rng(seed)
    reserve = [
        min(ceil(take * (overhead - 1) - 1e-9), size - take)
        for take, size in zip(n_units, domain.n_pixels, strict=True)
    ]
    ranks = {
        code: np.sort(rng.choice(size, take + more, replace=False, shuffle=False))
        for code, size, take, more in zip(
            domain.codes, domain.n_pixels, n_units, reserve, strict=True
        )
        if take
    }
    names = domain.names()
    strata = [
        StratumDesign(code, size, area, take, more, names.get(code, ""))
        for code, size, area, take, more in zip(
            domain.codes, domain.n_pixels, domain.area_m2, n_units, reserve, strict=True
        )
    ]
    units = locate(domain.reader, domain.census, ranks)
    chance = {s.code: s.inclusion_prob for s in strata}
    prob = np.array([chance[code] for code in units[:, 2].tolist()])
    return _finish(domain, units, prob, rng, kind, seed, strata, allocation=allocation)


def _units(strip: Strip, r: I64, c: I64) -> I64:
    """Row, column, stratum and map code of pixels of a strip, (n, 4)."""
    columns = (r + strip.first_row, c, strip.strata[r, c], strip.codes[r, c])
    return np.column_stack([np.asarray(v, dtype=np.int64) for v in columns])


def _cut(strip: Strip, cols: slice) -> Strip:
    parts = (strip.codes[:, cols], strip.strata[:, cols], strip.valid[:, cols])
    return Strip(strip.first_row, *parts)


def _blocks(domain: Domain, block_px: int) -> tuple[I64, F64]:
    """Pixels of the domain in each block and their true area, (blocks down, blocks across)."""
    h, w = domain.reader.geobox.shape
    shape = (ceil(h / block_px), ceil(w / block_px))
    counts, area = np.zeros(shape, np.int64), np.zeros(shape)
    edges = np.arange(0, w, block_px)
    for _, strip in domain.reader.strips():
        for r, valid in enumerate(strip.valid, strip.first_row):
            metres = domain.areas.window(slice(r, r + 1), slice(0, w))[0]
            counts[r // block_px] += np.add.reduceat(valid.astype(np.int64), edges)
            area[r // block_px] += np.add.reduceat(np.where(valid, metres, 0.0), edges)
    return counts, area


def _proportional(sizes: F64, m: int, rng: np.random.Generator) -> tuple[I64, F64]:
    """Systematic draw from units in random order: indices (sorted) and every unit's chance.

    A unit so large that m x size / total is 1 or more is taken for certain, and the others
    share what is left.
    """
    chance = np.zeros(sizes.size)
    certain = np.zeros(sizes.size, dtype=np.bool_)
    while True:
        rest = ~certain
        chance[certain] = 1.0
        chance[rest] = (m - certain.sum()) * sizes[rest] / sizes[rest].sum()
        over = rest & (chance >= 1.0)
        if not over.any():
            break
        certain |= over
    order = rng.permutation(sizes.size)
    reach = np.cumsum(chance[order])
    ticks = rng.uniform() + np.arange(m)
    hit = np.searchsorted(reach, ticks[ticks < reach[-1]], side="right")
    return np.sort(order[hit]), chance


def _finish(
    domain: Domain, units: I64, prob: F64, rng: np.random.Generator, kind: SampleKind, seed: int,
    strata: Sequence[StratumDesign], *, allocation: Allocation | None = None,
    cluster: I64 | None = None, cluster_facts: ClusterFacts | None = None,
    spacing_px: float | None = None,
) -> DrawnSample:  # fmt: skip
    """Random order, the reserve of each stratum last; points and record."""
    order = rng.permutation(len(units))
    late = np.zeros(len(units), np.int64)
    for s in strata:
        late[order[units[order, 2] == s.code][s.n_units :]] = 1
    order = order[np.argsort(late[order], kind="stable")]
    geobox = domain.reader.geobox
    points = _points(units[order], prob[order], late[order], domain.areas, geobox)
    if cluster is not None:
        points.insert(len(points.columns) - 1, "cluster", cluster[order])
    first = points[points["reserve"] == 0]
    drawn = first["map_code"].value_counts().to_dict()
    census = domain.census
    design = SampleDesign(
        kind=kind,
        seed=seed,
        allocation=allocation,
        strata=tuple(strata),
        classes=tuple(
            StratumDesign(
                code, census.class_pixels.get(code, 0), census.class_area_m2.get(code, 0.0),
                int(drawn.get(code, 0)),
            )
            for code in domain.classes
        ),
        not_covered_pixels=census.invalid_pixels,
        not_covered_m2=census.invalid_m2,
        map_name=domain.reader.map_path.name,
        crs=str(geobox.crs),
        transform=tuple(float(v) for v in geobox.affine[:6]),
        shape=(int(geobox.shape[0]), int(geobox.shape[1])),
        units=tuple(unit_text(points)),
        cluster=cluster_facts,
        spacing_px=spacing_px,
    )  # fmt: skip
    return DrawnSample(points, design)


def _points(
    units: I64, prob: F64, reserve: I64, areas: PixelAreas, geobox: GeoBox
) -> gpd.GeoDataFrame:
    row, col, stratum, mapped = units.T
    a, right, down = geobox.affine, col + 0.5, row + 0.5
    x, y = a.a * right + a.b * down + a.c, a.d * right + a.e * down + a.f
    width = max(5, len(str(len(units))))
    return gpd.GeoDataFrame(
        {
            "id": [f"s{i:0{width}d}" for i in range(1, len(units) + 1)],
            "stratum": stratum,
            "map_code": mapped,
            "inclusion_prob": prob,
            "row": row,
            "col": col,
            "area_m2": areas.at(row, col),
            "reserve": reserve,
        },
        geometry=gpd.points_from_xy(x, y),
        crs=str(geobox.crs),
    )
