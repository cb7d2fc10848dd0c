"""Folds: square blocks, regions or years; one map for all tasks, no polygon divided.

Random folds let a network be tested a few metres from where it was trained; block folds do not
(methods: Roberts et al. 2017, Ecography 40, 913-929; Ploton et al. 2020, Nature Communications 11,
4540). The score of such folds is the skill of the model in places without labels of its own. It
is no accuracy of the map: that needs a probability sample.

A label goes whole to the block of its representative point. Labels that overlap, of one task or
of several, are one place: they are joined, transitively, and go to one block together. Labels
that only touch are not joined: in a closed landscape touching neighbours would chain into groups
that span the region. Labels of one group (parcel, survey, tile) go together in the same way: to
the block that holds most of their area, wherever the others lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from shapely.geometry.base import BaseGeometry

from terraloom.errors import FoldError
from terraloom.grid import window_of
from terraloom.labels.dealing import deal, shares
from terraloom.labels.knndm import join_groups, knndm, regular_points

__all__ = [
    "NO_FOLD", "FoldMap", "assign_folds", "audit_folds", "group_names", "label_years",
    "overlap_groups", "place_groups",
]  # fmt: skip

#: Fold of pixels that belong to none.
NO_FOLD = 255
#: Overlaps up to this area are rounding of coordinates along a shared edge, square metres.
OVERLAP_TOLERANCE_M2 = 1.0

Counts = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FoldMap:
    """Spatial blocks and their folds; blocks are numbered row by row from the upper left.

    Attributes:
        geobox: The campaign's pixels; blocks start in its upper left corner.
        block_px: Height and width of a block, pixels.
        count: Number of folds.
        fold_of_block: Fold 0 .. count-1 of each block, all blocks of the grid; 255: no fold.
    """

    geobox: GeoBox
    block_px: int
    count: int
    fold_of_block: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return _block_shape(self.geobox, self.block_px)

    def blocks(self, geobox: GeoBox) -> npt.NDArray[np.int32]:
        """Block of each pixel of a geobox on the campaign's lattice, (H, W)."""
        rows, cols = window_of(geobox, self.geobox)
        r = np.arange(rows.start, rows.stop) // self.block_px
        c = np.arange(cols.start, cols.stop) // self.block_px
        return np.asarray(r[:, None] * self.shape[1] + c, dtype=np.int32)

    def folds(self, geobox: GeoBox) -> npt.NDArray[np.uint8]:
        """Fold of the block of each pixel, (H, W)."""
        table = np.asarray(self.fold_of_block, dtype=np.uint8)
        return np.asarray(table[self.blocks(geobox)], dtype=np.uint8)

    def record(self) -> dict[str, Any]:
        """JSON form, without the geobox."""
        return {
            "block_px": self.block_px,
            "block_m": self.block_px * abs(float(self.geobox.resolution.x)),
            "count": self.count,
            "rows": self.shape[0],
            "columns": self.shape[1],
            "fold_of_block": list(self.fold_of_block),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], geobox: GeoBox) -> FoldMap:
        """Inverse of :meth:`record`."""
        folds = tuple(int(f) for f in record["fold_of_block"])
        return cls(geobox, int(record["block_px"]), int(record["count"]), folds)


def _block_shape(geobox: GeoBox, block_px: int) -> tuple[int, int]:
    h, w = geobox.shape
    return math.ceil(h / block_px), math.ceil(w / block_px)


def assign_folds(
    labels: gpd.GeoDataFrame,
    *,
    geobox: GeoBox,
    count: int,
    block_m: float,
    seed: int,
    names: Sequence[str],
    area: BaseGeometry | None = None,
    regions: gpd.GeoDataFrame | None = None,
    years: bool = False,
) -> tuple[gpd.GeoDataFrame, FoldMap]:
    """Give every label a block and a fold, and every block of the grid a fold.

    Blocks are dealt to the folds so that first every stratum is present in as many folds as
    possible, then each fold holds a like share of each stratum's area. Instead of blocks, whole
    regions or whole years can be dealt in the same way. At most one of ``area``, ``regions`` and
    ``years`` may be given.

    Args:
        labels: All labels of all tasks, in the CRS of ``geobox``; column ``stratum`` (int) is the
            row's index into ``names``; optional ``group`` (text or None) and ``task``: labels of
            one task and group stay together; with ``years``, ``date`` and optional ``date_end``
            (ISO text or None).
        geobox: The campaign's pixels; blocks are anchored in its upper left corner.
        count: Number of folds.
        block_m: Width of a block, metres; rounded to whole pixels.
        seed: Seed of the search and of the folds of blocks without labels.
        names: Names of the strata: classes, and tasks that have no classes.
        area: With it, blocks are dealt by :func:`terraloom.labels.knndm.knndm` instead: so that
            held-out labels lie as far from the others as places of this area do.
        regions: With it, whole regions are dealt: polygons in the CRS of ``geobox``. A label
            belongs to the region of its representative point. A block without label has the fold
            of the region next to its centre.
        years: Whole years are dealt: a label belongs to the year in the middle of its dates. Places
            and groups are not kept together: a place that was trained on in another year is what
            such folds test. Pixels without label have no fold (255).

    Returns:
        A copy of ``labels`` with the columns ``block`` and ``fold`` (int64), with regions also
        ``region`` (row of the region), and the map of all blocks.

    Raises:
        FoldError: Fewer labelled blocks, regions or years than folds; a stratum that is in one of
            them only; labels in no region or without a date.
    """
    if (area is not None) + (regions is not None) + years > 1:
        raise FoldError("more than one of area, regions and years", where="folds", allowed="one")
    block_px = max(1, round(block_m / abs(float(geobox.resolution.x))))
    out = labels.copy()
    place = place_groups(labels)
    own = _blocks_of(labels, geobox, block_px)
    out["block"] = _largest(own, labels, place)
    if regions is not None:
        out["region"] = _largest(_regions_of(labels, regions), labels, place)
        units = _Units.of(out["region"].to_numpy(), "region", "other regions")
    elif years:
        units = _Units.of(_years_of(labels), "year", "labels of other years")
    else:
        units = _Units.of(out["block"].to_numpy(), "block", "a smaller folds.block_m")
    where = f"folds: count {count}"
    if units.word == "block":
        where += f", block_m {block_m:g}"
    if not years:
        _check_places(place, own, count, where)
    weight = _weights(out, units, len(names), geobox)
    _check_units(weight > 0, units, count, names, where)
    rng = np.random.default_rng(seed)
    rows, columns = _block_shape(geobox, block_px)
    folds = rng.permutation(np.arange(rows * columns) % count)
    dealt = deal(weight, count, rng) if area is None else _matched(out, area, count, rng)
    _check_strata_in_folds(weight, dealt, count, names, where, units)
    if regions is not None:
        folds = dealt[_nearest_region(regions, units.ids, geobox, block_px)]
    elif years:
        folds = np.full(rows * columns, NO_FOLD)
    else:
        folds[units.ids] = dealt
    out["fold"] = dealt[units.at].astype(np.int64)
    return out, FoldMap(geobox, block_px, count, tuple(int(f) for f in folds))


@dataclass(frozen=True)
class _Units:
    """What is dealt to the folds: the blocks, regions or years that have labels.

    Attributes:
        ids: (U,) number of each.
        at: (N,) unit of each label, 0 .. U-1.
        word: What a unit is.
        fix: What helps where there are too few.
    """

    ids: Ints
    at: Ints
    word: str
    fix: str

    @classmethod
    def of(cls, own: Ints, word: str, fix: str) -> _Units:
        ids, at = np.unique(own, return_inverse=True)
        return cls(ids.astype(np.int64), at.reshape(-1).astype(np.int64), word, fix)


def _weights(labels: gpd.GeoDataFrame, units: _Units, strata: int, geobox: GeoBox) -> Counts:
    """Area of each stratum in each unit, square metres; a point counts one pixel, (U, strata)."""
    weight = np.zeros((len(units.ids), strata))
    pixel = abs(float(geobox.resolution.x * geobox.resolution.y))
    stratum = labels["stratum"].to_numpy(dtype=np.int64)
    np.add.at(weight, (units.at, stratum), np.maximum(labels.area.to_numpy(), pixel))
    return weight


def _matched(
    labels: gpd.GeoDataFrame, area: BaseGeometry, count: int, rng: np.random.Generator
) -> Ints:
    """Fold of each labelled block, in the order of its number, by distances."""
    points = labels.representative_point()
    blocks = labels["block"].to_numpy()
    found = knndm(
        np.column_stack([points.x, points.y]), regular_points(area), count=count, rng=rng,
        groups=blocks, strata=labels["stratum"].to_numpy(dtype=np.int64),
    )  # fmt: skip
    first = np.unique(blocks, return_index=True)[1]
    out: Ints = np.asarray(found.fold, dtype=np.int64)[first]
    return out


def _blocks_of(labels: gpd.GeoDataFrame, geobox: GeoBox, block_px: int) -> Ints:
    """Block of each label's representative point."""
    points = labels.representative_point()
    col, row = ~geobox.affine @ (points.x.to_numpy(), points.y.to_numpy())
    h, w = geobox.shape
    # Parcels across the AOI's edge are not clipped; their point may lie just outside the grid.
    r = np.clip(np.floor(row), 0, h - 1).astype(np.int64) // block_px
    c = np.clip(np.floor(col), 0, w - 1).astype(np.int64) // block_px
    blocks: Ints = r * _block_shape(geobox, block_px)[1] + c
    return blocks


def _regions_of(labels: gpd.GeoDataFrame, regions: gpd.GeoDataFrame) -> Ints:
    """Row of the region that each label's representative point lies in; the first of several."""
    points = np.asarray(labels.representative_point().values, dtype=object)
    at, region = shapely.STRtree(np.asarray(regions.geometry.values, dtype=object)).query(
        points, predicate="intersects"
    )
    own = np.full(len(points), len(regions), dtype=np.int64)
    np.minimum.at(own, at, region)
    outside = np.flatnonzero(own == len(regions))
    if len(outside):
        ids = labels["label_id"].to_numpy() if "label_id" in labels else np.arange(len(labels))
        more = ", ..." if len(outside) > 5 else ""
        raise FoldError(
            f"{len(outside)} of {len(labels)} labels lie in no region (label_id "
            f"{', '.join(str(ids[i]) for i in outside[:5])}{more})",
            where="folds.regions", allowed="every label in a region",
            fix="regions that cover all labels, labels without those outside, or folds.method: "
            "blocks",
        )  # fmt: skip
    return own


def label_years(labels: gpd.GeoDataFrame) -> Ints:
    """Year in the middle of each label's ``date`` and ``date_end`` (ISO text); 0: no date, (N,)."""
    middle = None
    for column in ("date_end", "date"):
        values = labels[column] if column in labels else pd.Series([None] * len(labels))
        text = [None if v is None or v != v else str(v) for v in values.to_numpy(dtype=object)]
        day = pd.to_datetime(pd.Series(text, dtype=object), errors="coerce", format="ISO8601")
        middle = day if middle is None else day + (middle.fillna(day) - day) / 2
    years = middle.dt.year if middle is not None else pd.Series([])
    return np.asarray(years.fillna(0).to_numpy(), dtype=np.int64)


def _years_of(labels: gpd.GeoDataFrame) -> Ints:
    years = label_years(labels)
    missing = int((years == 0).sum())
    if missing:
        raise FoldError(
            f"{missing} of {len(labels)} labels have no date", where="folds.method: years",
            allowed="a date for every label",
            fix="name dates in tasks[].labels.date_column or tasks[].labels.date, or take "
            "folds.method: blocks",
        )  # fmt: skip
    return years


def _nearest_region(
    regions: gpd.GeoDataFrame, labelled: Ints, geobox: GeoBox, block_px: int
) -> Ints:
    """Position in ``labelled`` of the region next to the centre of each block of the grid."""
    rows, columns = _block_shape(geobox, block_px)
    r, c = np.divmod(np.arange(rows * columns), columns)
    to_m = geobox.affine  # no rotation
    x = to_m.c + to_m.a * (c + 0.5) * block_px
    y = to_m.f + to_m.e * (r + 0.5) * block_px
    tree = shapely.STRtree(np.asarray(regions.geometry.values, dtype=object)[labelled])
    return np.asarray(tree.nearest(shapely.points(x, y)), dtype=np.int64)


def _largest(own: Ints, labels: gpd.GeoDataFrame, place: Ints) -> Ints:
    """Unit of each label: the one that holds most area of the labels of its place.

    Args:
        own: (N,) unit that each label's point lies in.
        labels: Their areas count; points count next to nothing.
        place: (N,) see :func:`place_groups`.
    """
    area = np.maximum(labels.area.to_numpy(), 1e-9)
    pairs, at = np.unique(np.column_stack([place, own]), axis=0, return_inverse=True)
    total = np.bincount(at.reshape(-1), area)
    # Of equally large ones the first: sorted by place, falling area and number of the unit.
    order = np.lexsort([pairs[:, 1], -total, pairs[:, 0]])
    first = order[np.unique(pairs[order, 0], return_index=True)[1]]
    main: Ints = pairs[first, 1]
    return main[np.unique(place, return_inverse=True)[1].reshape(-1)]


def place_groups(labels: gpd.GeoDataFrame) -> Ints:
    """Number of the place of each label, (N,): what overlaps or has one group stays together.

    Args:
        labels: Geometries in metres; optional ``group`` (text; None and NaN are no group) and
            ``task``: a group is named within its task, because ids of several files may coincide.
    """
    place = overlap_groups(labels)
    names = group_names(labels)
    return place if names is None else join_groups(place, names)


def group_names(labels: gpd.GeoDataFrame) -> npt.NDArray[np.str_] | None:
    """Task and group of each label, (N,), one of its own for labels without; None if none has."""
    if "group" not in labels or labels["group"].isna().all():
        return None
    tasks = labels["task"] if "task" in labels else [""] * len(labels)
    rows = enumerate(zip(tasks, labels["group"], labels["group"].isna(), strict=True))
    return np.array([f"#{i}" if none else f"{t} {g}".strip() for i, (t, g, none) in rows])


def _overlaps(shapes: npt.NDArray[np.object_]) -> tuple[Ints, Ints]:
    """Pairs i < j of labels that cover common ground; a point covers what it lies in."""
    i, j = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    i, j = i[i < j], j[i < j]
    shared = shapely.area(shapely.intersection(shapes[i], shapes[j]))
    flat = shapely.get_dimensions(shapes) == 0
    ok = (shared > OVERLAP_TOLERANCE_M2) | flat[i] | flat[j]
    return i[ok].astype(np.int64), j[ok].astype(np.int64)


def overlap_groups(labels: gpd.GeoDataFrame) -> Ints:
    """Number of the group of each label; labels that overlap are in one group, transitively."""
    i, j = _overlaps(np.asarray(labels.geometry.values, dtype=object))
    n = len(labels)
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _check_places(place: Ints, own: Ints, count: int, where: str) -> None:
    """Groups are not what keeps labels of enough blocks from enough folds."""
    places = len(np.unique(place))
    if places < count <= len(np.unique(own)):
        raise FoldError(
            f"the {len(place)} labels form {places} groups, too few for {count} folds",
            where=where, allowed=f"at least {count} groups of labels that overlap or have one name",
            fix="finer groups (tasks[].labels.group_column), a smaller folds.count, or more labels",
        )  # fmt: skip


def _check_units(
    present: npt.NDArray[np.bool_], units: _Units, count: int, names: Sequence[str], where: str
) -> None:
    """Enough units for the folds, and every stratum in two units or more."""
    word = units.word
    if len(units.ids) < count:
        raise FoldError(
            f"labels lie in {len(units.ids)} {word}s, too few for {count} folds", where=where,
            allowed=f"at least {count} labelled {word}s",
            fix=f"{units.fix}, a smaller folds.count, or more labels",
        )  # fmt: skip
    alone = [int(s) for s in np.flatnonzero(present.sum(axis=0) == 1)]
    if alone:
        ids = [units.ids[np.argmax(present[:, s])] for s in alone]
        text = ", ".join(f"{names[s]!r} ({word} {i})" for s, i in zip(alone, ids, strict=True))
        raise FoldError(
            f"labels of {text} lie in one {word} only: while that {word} is held out, nothing "
            "of it is left to train with",
            where=where, allowed=f"two {word}s or more per class",
            fix=f"{units.fix}, more labels, or drop the class "
            "(labels.drop and a legend without it)",
        )  # fmt: skip


def _check_strata_in_folds(
    weight: Counts, folds: Ints, count: int, names: Sequence[str], where: str, units: _Units
) -> None:
    share = shares(weight, folds, count)
    alone = [names[int(s)] for s in np.flatnonzero((share > 0).sum(axis=0) == 1)]
    if alone or np.any(share.sum(axis=1) == 0):
        raise FoldError(
            f"the {units.word}s cannot be dealt so that every class is in two folds"
            + (f" ({', '.join(alone)})" if alone else " and no fold is empty"),
            where=where, allowed="two folds or more per class",
            fix=f"{units.fix}, a smaller folds.count, or more labels",
        )  # fmt: skip


def audit_folds(labels: gpd.GeoDataFrame) -> dict[str, Any]:
    """Look for leaks between folds in finished labels.

    Args:
        labels: Columns ``fold`` and ``geometry``, metres; optional ``class`` (text or None).

    Returns:
        ``overlaps_across_folds``: pairs of overlapping labels in different folds, 0 if the folds
        are sound; ``touching_across_folds``: pairs in different folds that share an edge or a
        corner; ``min_distance_m``: smallest distance between labels of different folds;
        ``median_distance_m``: median distance of a label to the nearest one of another fold;
        ``labels_per_fold``; ``per_fold``: of each fold labels, classes, and smallest and median
        distance of its labels to the nearest one of another fold.
    """
    shapes = np.asarray(labels.geometry.values, dtype=object)
    fold = labels["fold"].to_numpy(dtype=np.int64)
    i, j = _overlaps(shapes)
    overlapping = int((fold[i] != fold[j]).sum())
    a, b = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    meeting = int(((a < b) & (fold[a] != fold[b])).sum())
    nearest = np.full(len(labels), np.inf)
    for k in np.unique(fold):
        mine, others = np.flatnonzero(fold == k), shapes[fold != k]
        if len(others):
            found, distance = shapely.STRtree(others).query_nearest(
                shapes[mine], return_distance=True, all_matches=False
            )
            nearest[mine[found[0]]] = distance
    classes = labels["class"].to_numpy() if "class" in labels else np.full(len(labels), None)
    return {
        "overlaps_across_folds": overlapping,
        "touching_across_folds": meeting - overlapping,
        "min_distance_m": round(float(nearest.min()), 3),
        "median_distance_m": round(float(np.median(nearest)), 1),
        "labels_per_fold": {str(k): int((fold == k).sum()) for k in np.unique(fold)},
        "per_fold": [
            {
                "fold": int(k), "labels": int((fold == k).sum()),
                "classes": len({c for c in classes[fold == k] if c is not None and c == c}),
                "nearest_m": round(float(nearest[fold == k].min()), 1),
                "median_m": round(float(np.median(nearest[fold == k])), 1),
            }
            for k in np.unique(fold)
        ],
    }  # fmt: skip
