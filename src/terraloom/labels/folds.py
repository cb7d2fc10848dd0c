"""Spatial folds: square blocks, one block-to-fold map for all tasks, no polygon divided.

Random folds let a network be tested a few metres from where it was trained; block folds do not
(methods: Roberts et al. 2017, Ecography 40, 913-929; Ploton et al. 2020, Nature Communications 11,
4540). The score of such folds is the skill of the model in places without labels of its own. It
is no accuracy of the map: that needs a probability sample.

A label goes whole to the block of its representative point. Labels that overlap, of one task or
of several, are one place: they are joined, transitively, and go to one block together. Labels
that only touch are not joined: in a closed landscape touching neighbours would chain into groups
that span the region.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from shapely.geometry.base import BaseGeometry

from terraloom.errors import FoldError
from terraloom.grid import window_of
from terraloom.labels.knndm import knndm, regular_points

__all__ = ["FoldMap", "assign_folds", "audit_folds", "overlap_groups"]

#: Overlaps up to this area are rounding of coordinates along a shared edge, square metres.
OVERLAP_TOLERANCE_M2 = 1.0
#: Work of the search for balanced folds: blocks x restarts.
_SEARCH_STEPS = 8_000

Counts = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FoldMap:
    """Spatial blocks and their folds; blocks are numbered row by row from the upper left.

    Attributes:
        geobox: The campaign's pixels; blocks start in its upper left corner.
        block_px: Height and width of a block, pixels.
        count: Number of folds.
        fold_of_block: Fold 0 .. count-1 of each block, all blocks of the grid.
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
) -> tuple[gpd.GeoDataFrame, FoldMap]:
    """Give every label a block and a fold, and every block of the grid a fold.

    Blocks are dealt to the folds so that first every stratum is present in as many folds as
    possible, then each fold holds a like share of each stratum's area.

    Args:
        labels: All labels of all tasks, in the CRS of ``geobox``; column ``stratum`` (int) is the
            row's index into ``names``.
        geobox: The campaign's pixels; blocks are anchored in its upper left corner.
        count: Number of folds.
        block_m: Width of a block, metres; rounded to whole pixels.
        seed: Seed of the search and of the folds of blocks without labels.
        names: Names of the strata: classes, and tasks that have no classes.
        area: With it, blocks are dealt by :func:`terraloom.labels.knndm.knndm` instead: so that
            held-out labels lie as far from the others as places of this area do.

    Returns:
        A copy of ``labels`` with the columns ``block`` and ``fold`` (int64), and the map of all
        blocks.

    Raises:
        FoldError: Fewer labelled blocks than folds, or a stratum that is in one block only.
    """
    block_px = max(1, round(block_m / abs(float(geobox.resolution.x))))
    out = labels.copy()
    out["block"] = _blocks_of(labels, geobox, block_px)
    blocks, at = np.unique(out["block"].to_numpy(), return_inverse=True)
    where = f"folds: count {count}, block_m {block_m:g}"
    if len(blocks) < count:
        raise FoldError(
            f"labels lie in {len(blocks)} blocks, too few for {count} folds", where=where,
            allowed=f"at least {count} labelled blocks",
            fix="a smaller folds.block_m, a smaller folds.count, or more labels",
        )  # fmt: skip
    weight = np.zeros((len(blocks), len(names)))
    stratum = labels["stratum"].to_numpy(dtype=np.int64)
    pixel = abs(float(geobox.resolution.x * geobox.resolution.y))
    np.add.at(weight, (at, stratum), np.maximum(labels.area.to_numpy(), pixel))
    _check_strata(weight > 0, names, blocks, where)
    rng = np.random.default_rng(seed)
    rows, columns = _block_shape(geobox, block_px)
    folds = rng.permutation(np.arange(rows * columns) % count)
    if area is None:
        folds[blocks] = _deal(weight, count, rng)
    else:
        folds[blocks] = _matched(out, area, count, rng)
    _check_strata_in_folds(weight, folds[blocks], count, names, where)
    out["fold"] = folds[out["block"].to_numpy()].astype(np.int64)
    return out, FoldMap(geobox, block_px, count, tuple(int(f) for f in folds))


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
    """Block of each label: of its own representative point, or of its group's largest block."""
    points = labels.representative_point()
    col, row = ~geobox.affine @ (points.x.to_numpy(), points.y.to_numpy())
    h, w = geobox.shape
    # Parcels across the AOI's edge are not clipped; their point may lie just outside the grid.
    r = np.clip(np.floor(row), 0, h - 1).astype(np.int64) // block_px
    c = np.clip(np.floor(col), 0, w - 1).astype(np.int64) // block_px
    own = r * _block_shape(geobox, block_px)[1] + c
    group = overlap_groups(labels)
    area = np.maximum(labels.area.to_numpy(), 1e-9)
    best: dict[int, int] = {}
    for g in np.flatnonzero(np.bincount(group) > 1):
        mine = group == g
        ids, at = np.unique(own[mine], return_inverse=True)
        best[int(g)] = int(ids[np.argmax(np.bincount(at, area[mine]))])
    return np.array([best.get(int(g), int(b)) for g, b in zip(group, own, strict=True)], np.int64)


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


def _check_strata(
    present: npt.NDArray[np.bool_], names: Sequence[str], blocks: Ints, where: str
) -> None:
    alone = [int(s) for s in np.flatnonzero(present.sum(axis=0) == 1)]
    if alone:
        text = ", ".join(f"{names[s]!r} (block {blocks[np.argmax(present[:, s])]})" for s in alone)
        raise FoldError(
            f"labels of {text} lie in one block only: while that block is held out, nothing "
            "of it is left to train with",
            where=where, allowed="two blocks or more per class",
            fix="a smaller folds.block_m, more labels, or drop the class "
            "(labels.drop and a legend without it)",
        )  # fmt: skip


def _check_strata_in_folds(
    weight: Counts, folds: Ints, count: int, names: Sequence[str], where: str
) -> None:
    share = _shares(weight, folds, count)
    alone = [names[int(s)] for s in np.flatnonzero((share > 0).sum(axis=0) == 1)]
    if alone or np.any(share.sum(axis=1) == 0):
        raise FoldError(
            "the blocks cannot be dealt so that every class is in two folds"
            + (f" ({', '.join(alone)})" if alone else " and no fold is empty"),
            where=where, allowed="two folds or more per class",
            fix="a smaller folds.block_m, a smaller folds.count, or more labels",
        )  # fmt: skip


def _shares(weight: Counts, folds: Ints, count: int) -> Counts:
    """Share of each stratum's total that lies in each fold, (count, strata)."""
    share = np.zeros((count, weight.shape[1]))
    np.add.at(share, folds, weight)
    total: Counts = share / np.maximum(weight.sum(axis=0), 1e-12)
    return total


def _deal(weight: Counts, count: int, rng: np.random.Generator) -> Ints:
    """Fold of each labelled block: greedy from random orders, the best one improved by moves."""
    share = weight / np.maximum(weight.sum(axis=0), 1e-12)
    n = len(share)
    best: tuple[tuple[int, float], Ints] | None = None
    for _ in range(int(np.clip(_SEARCH_STEPS // n, 2, 200))):
        folds = _greedy(share, rng.permutation(n), count)
        score = _score(_shares(share, folds, count))
        if best is None or score < best[0]:
            best = score, folds
    if best is None:  # pragma: no cover - the loop runs at least twice
        raise FoldError("no block to deal", where="folds")
    return _improve(share, best[1], count, rng)


def _greedy(share: Counts, order: Ints, count: int) -> Ints:
    sums = np.zeros((count, share.shape[1]))
    folds = np.zeros(len(share), dtype=np.int64)
    for b in order:
        # Growth of the sum of squares: small where the fold still lacks the block's classes.
        k = int(np.argmin((2 * sums * share[b]).sum(axis=1)))
        folds[b] = k
        sums[k] += share[b]
    return folds


def _score(sums: Counts) -> tuple[int, float]:
    """Pairs of fold and stratum without a label (an empty fold counts more), and imbalance."""
    present = sums.sum(axis=0) > 0
    missing = (sums[:, present] <= 0).sum() + 1000 * (sums.sum(axis=1) <= 0).sum()
    # A stratum in one fold only cannot be learnt while that fold is held out.
    alone = ((sums[:, present] > 0).sum(axis=0) == 1).sum()
    imbalance = ((sums[:, present] - 1 / len(sums)) ** 2).sum()
    return int(missing + 100 * alone), float(imbalance)


def _improve(share: Counts, folds: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Move single blocks between folds while that improves the score."""
    folds = folds.copy()
    sums = _shares(share, folds, count)
    score = _score(sums)
    for _ in range(int(np.clip(_SEARCH_STEPS // (len(folds) * count), 1, 20))):
        moved = False
        for b in rng.permutation(len(folds)):
            for k in range(count):
                trial = sums.copy()
                trial[folds[b]] -= share[b]
                trial[k] += share[b]
                # Differences of floats leave dust where a fold has lost its last block.
                trial[np.abs(trial) < 1e-12] = 0
                new = _score(trial)
                if k != folds[b] and new < score:
                    folds[b], sums, score, moved = k, trial, new, True
        if not moved:
            break
    return folds


def audit_folds(labels: gpd.GeoDataFrame) -> dict[str, Any]:
    """Look for leaks between folds in finished labels.

    Args:
        labels: Columns ``fold`` and ``geometry``, metres.

    Returns:
        ``overlaps_across_folds``: pairs of overlapping labels in different folds, 0 if the folds
        are sound; ``touching_across_folds``: pairs in different folds that share an edge or a
        corner; ``min_distance_m``: smallest distance between labels of different folds;
        ``median_distance_m``: median distance of a label to the nearest one of another fold;
        ``labels_per_fold``.
    """
    shapes = np.asarray(labels.geometry.values, dtype=object)
    fold = labels["fold"].to_numpy(dtype=np.int64)
    i, j = _overlaps(shapes)
    overlapping = int((fold[i] != fold[j]).sum())
    a, b = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    meeting = int(((a < b) & (fold[a] != fold[b])).sum())
    nearest = np.full(len(labels), np.inf)
    for k, other in combinations(np.unique(fold), 2):
        for this, that in ((k, other), (other, k)):
            mine = np.flatnonzero(fold == this)
            tree = shapely.STRtree(shapes[fold == that])
            (at, _), distance = tree.query_nearest(
                shapes[mine], return_distance=True, all_matches=False
            )
            nearest[mine[at]] = np.minimum(nearest[mine[at]], distance)
    return {
        "overlaps_across_folds": overlapping,
        "touching_across_folds": meeting - overlapping,
        "min_distance_m": round(float(nearest.min()), 3),
        "median_distance_m": round(float(np.median(nearest)), 1),
        "labels_per_fold": {str(k): int((fold == k).sum()) for k in np.unique(fold)},
    }
