"""Folds by k-fold nearest neighbour distance matching (kNNDM), and folds of whole groups.

A map is predicted at a certain distance from its labels. Random folds of clustered labels test a
model much nearer than that, folds of large blocks often farther. kNNDM (Linnenbrink et al. 2024,
Geoscientific Model Development 17, 5897-5912) looks for the folds in between: the distances from
held-out labels to the nearest training label (G*, one per label) are to be distributed like those
from places of the map to the nearest label (G_ij). The misfit is the Wasserstein distance

    W = integral of |F_G*(d) - F_G_ij(d)| dd, metres.

Labels no more clustered than the places of the map (one-sided Kolmogorov-Smirnov test of the
distances among labels against G_ij) get random folds. Else units are clustered (Ward) into q
clusters for a range of q, clusters are dealt to the folds, and the folds with the least W win.
Clusters are dealt in two ways: in turns along the first principal axis, and the largest first to
the smallest fold. Units are groups (parcels, tiles) or, without these, places: labels of equal
coordinates. Units are never divided.

Matching distances tells the skill of a model at the distances of the map. It is no accuracy of
the map: that needs a probability sample (Wadoux et al. 2021, Ecological Modelling 457, 109692).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy.cluster.hierarchy import cut_tree, ward
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.stats import ks_2samp, wasserstein_distance
from shapely.geometry.base import BaseGeometry
from sklearn.cluster import MiniBatchKMeans

from terraloom.errors import FoldError

__all__ = ["Knndm", "fold_distances", "group_folds", "join_groups", "knndm", "regular_points"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Labels are clustered when the test's p-value is below this (as in the R package CAST).
SIGNIFICANCE = 0.05
#: Numbers of clusters that are tried, spaced evenly in their logarithm.
COUNTS = 100
#: More units than this are first joined to so many small clusters: Ward needs memory ~ units^2.
MOST_UNITS = 3000
#: Nearest labels looked up once per label; where all are of its own fold, a tree is asked.
NEAR = 32
#: Random deals that are tried for one in which every stratum is in two folds.
DEALS = 200


@dataclass(frozen=True)
class Knndm:
    """Folds by distance matching, and how well they match.

    Attributes:
        fold: Fold 0 .. count-1 of each label, (N,).
        w_m: Wasserstein distance between the distances of these folds and those of the map, metres.
        w_random_m: The same for random folds of the same units, metres.
        clusters: Number of clusters the folds were made of; 0 where the folds are random.
        p_value: Of the test whether labels are more clustered than the map's places.
    """

    fold: Ints
    w_m: float
    w_random_m: float
    clusters: int
    p_value: float

    @property
    def random(self) -> bool:
        """Whether folds are random: labels are not clustered, or no clusters match better."""
        return self.clusters == 0

    def record(self) -> dict[str, Any]:
        """JSON form, for the report of the labels."""
        return {
            "method": "knndm", "count": int(self.fold.max()) + 1, "random": self.random,
            "clusters": self.clusters, "w_m": round(self.w_m, 1),
            "w_random_m": round(self.w_random_m, 1), "p_value": round(self.p_value, 4),
            "labels_per_fold": [int(c) for c in np.bincount(self.fold)],
        }  # fmt: skip


def knndm(
    xy: npt.ArrayLike,
    places: npt.ArrayLike,
    *,
    count: int,
    rng: np.random.Generator,
    groups: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    largest: float = 0.5,
) -> Knndm:
    """Folds whose nearest neighbour distances match those of the places to be predicted.

    Args:
        xy: Labels, (N, 2), coordinates in metres (no degrees).
        places: Places of the map, (M, 2), same CRS; some 1,000 on a regular lattice
            (:func:`regular_points`).
        count: Number of folds, k.
        rng: Source of all randomness: equal state, equal folds.
        groups: (N,) ids of what must stay whole (parcel, polygon, tile); None: equal coordinates.
        strata: (N,) class of each label; with it, every class is in two folds or more.
        largest: Largest share of the labels in one fold, above 1 / count.

    Returns:
        The folds; random ones where labels are not clustered or no clusters match better.

    Raises:
        FoldError: Coordinates that are not finite, fewer units than folds, a class that cannot be
            in two folds, or units so large that no deal keeps to ``largest``.

    Source: Linnenbrink et al. 2024, doi:10.5194/gmd-17-5897-2024; the R package CAST.
    """
    labels, targets = _points(xy, "labels"), _points(places, "places of the map")
    unit = _units(labels, groups)
    kinds = None if strata is None else _codes(strata, len(labels), "strata")
    _check(unit, kinds, count, largest, strata)
    tree = cKDTree(labels)
    g_map = np.asarray(tree.query(targets)[0], dtype=np.float64)
    near = _Near(labels, tree)
    dealt = _random_deal(unit, kinds, count, largest, rng)
    w_random = float(wasserstein_distance(near.distances(dealt), g_map))
    test = ks_2samp(near.distances(unit), g_map, alternative="greater", method="asymp")
    p = float(test.pvalue)
    best = Knndm(dealt, w_random, w_random, 0, p)
    if p >= SIGNIFICANCE:
        return best
    for clusters, fold in _candidates(labels, unit, count, rng):
        if not _fits(fold, kinds, count, largest):
            continue
        w = float(wasserstein_distance(near.distances(fold), g_map))
        if w < best.w_m:
            best = Knndm(fold, w, w_random, clusters, p)
    return best


def group_folds(
    groups: npt.ArrayLike,
    *,
    count: int,
    rng: np.random.Generator,
    strata: npt.ArrayLike | None = None,
    largest: float = 1.0,
) -> Ints:
    """Random folds of like size that divide no group; one fold a group when there are ``count``.

    With regions as groups this is leave-region-out, with years leave-year-out, with blocks
    blocked cross-validation.

    Args:
        groups: (N,) ids of what must stay whole, numbers or text.
        count: Number of folds.
        rng: Source of randomness.
        strata: (N,) class of each label; with it, every class is in two folds or more.
        largest: Largest share of the labels in one fold.

    Returns:
        Fold 0 .. count-1 of each label, (N,).

    Raises:
        FoldError: Fewer groups than folds, or no deal that keeps the rules.
    """
    unit = _codes(groups, None, "groups")
    kinds = None if strata is None else _codes(strata, len(unit), "strata")
    _check(unit, kinds, count, largest, strata)
    return _random_deal(unit, kinds, count, largest, rng)


def join_groups(*groups: npt.ArrayLike) -> Ints:
    """Groups that share a label become one, transitively: blocks of one parcel stay together.

    Args:
        groups: One or more (N,) ids of the same labels, numbers or text.

    Returns:
        Number of the joined group of each label, (N,).
    """
    first = _codes(groups[0], None, "groups")
    for other in groups[1:]:
        more = _codes(other, len(first), "groups")
        n, m = int(first.max()) + 1, int(more.max()) + 1
        graph = coo_matrix((np.ones(len(first)), (first, n + more)), shape=(n + m, n + m))
        first = connected_components(graph, directed=False)[1][first].astype(np.int64)
    return first


def regular_points(area: BaseGeometry, count: int = 1000) -> Floats:
    """About ``count`` points on a square lattice inside an area, row by row.

    Args:
        area: Polygon(s) of the map, metres.
        count: Wanted number of points.

    Returns:
        (M, 2) coordinates, M about ``count``; the representative point where no lattice point falls
        inside.

    Raises:
        FoldError: The area is empty.
    """
    if area.is_empty or not area.area > 0:
        raise FoldError(
            "the area of the map is empty", where="folds", allowed="a polygon",
            fix="check the file of aoi",
        )  # fmt: skip
    step = float(np.sqrt(area.area / count))
    x0, y0, x1, y1 = area.bounds
    xs, ys = (np.arange(a + step / 2, b, step) for a, b in ((x0, x1), (y0, y1)))
    x, y = (v.ravel() for v in np.meshgrid(xs, ys))
    shapely.prepare(area)
    inside = shapely.contains_xy(area, x, y)
    if not inside.any():
        point = area.representative_point()
        return np.array([[point.x, point.y]])
    return np.column_stack([x[inside], y[inside]])


def fold_distances(xy: npt.ArrayLike, fold: npt.ArrayLike) -> Floats:
    """Distance of each label to the nearest one of another fold, (N,), metres; G* of kNNDM.

    Args:
        xy: Labels, (N, 2), metres.
        fold: Fold of each label, (N,).

    Returns:
        Infinity where there is no other fold.
    """
    labels = _points(xy, "labels")
    return _Near(labels, cKDTree(labels)).distances(_codes(fold, len(labels), "folds"))


class _Near:
    """Nearest labels of all labels, looked up once for many ways to fold them."""

    def __init__(self, labels: Floats, tree: cKDTree) -> None:
        self.labels = labels
        far, at = tree.query(labels, k=min(NEAR, len(labels)))
        self.far, self.at = far.reshape(len(labels), -1), at.reshape(len(labels), -1)

    def distances(self, fold: Ints) -> Floats:
        """Distance of each label to the nearest one of another fold, (N,)."""
        other = fold[self.at] != fold[:, None]
        first = other.argmax(axis=1)
        out = np.where(other.any(axis=1), self.far[np.arange(len(fold)), first], np.inf)
        open_ = np.flatnonzero(~other.any(axis=1))
        for k in np.unique(fold[open_]):
            mine, others = open_[fold[open_] == k], fold != k
            if others.any():
                out[mine] = cKDTree(self.labels[others]).query(self.labels[mine])[0]
        return np.asarray(out, dtype=np.float64)


def _points(values: npt.ArrayLike, what: str) -> Floats:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise FoldError(
            f"{what} have the shape {points.shape}", where="folds", allowed="(N, 2), N > 0"
        )
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise FoldError(
            f"coordinates of {what} are not finite, first in row {row}", where="folds",
            allowed="metres", fix="drop labels without geometry or outside of their CRS",
        )  # fmt: skip
    return points


def _codes(values: npt.ArrayLike, n: int | None, what: str) -> Ints:
    """Ids as numbers 0 .. G-1 in the order of their values, (N,)."""
    ids = np.asarray(values)
    if ids.ndim != 1 or (n is not None and len(ids) != n) or not len(ids):
        raise FoldError(
            f"{what} have the shape {ids.shape}", where="folds", allowed=f"({n or 'N'},)",
            fix="one value per label",
        )  # fmt: skip
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


def _units(labels: Floats, groups: npt.ArrayLike | None) -> Ints:
    if groups is not None:
        return _codes(groups, len(labels), "groups")
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _check(
    unit: Ints, kinds: Ints | None, count: int, largest: float, strata: npt.ArrayLike | None
) -> None:
    units = int(unit.max()) + 1
    if count < 2 or units < count:
        raise FoldError(
            f"{units} places or groups for {count} folds", where=f"folds: count {count}",
            allowed="two folds or more, and as many places or groups as folds",
            fix="a smaller folds.count, other groups, or more labels",
        )  # fmt: skip
    if not 1 / count <= largest <= 1:
        raise FoldError(
            f"largest share of a fold {largest:g}",
            where=f"folds: count {count}",
            allowed=f"{1 / count:g} to 1",
        )
    if kinds is None:
        return
    for kind, name in enumerate(np.unique(np.asarray(strata))):
        if len(np.unique(unit[kinds == kind])) < 2:
            raise FoldError(
                f"stratum {name} lies in one place or group only: while that is held out, nothing "
                "of it is left to train with", where="folds", allowed="two places or more",
                fix="more labels, other groups, or drop the class",
            )  # fmt: skip


def _fits(fold: Ints, kinds: Ints | None, count: int, largest: float) -> bool:
    """No fold empty or too large, every stratum in two folds."""
    size = np.bincount(fold, minlength=count)
    # One label more than the share, so that a share of 1 / count can be kept with any N.
    if size.min() == 0 or size.max() > np.ceil(largest * len(fold)):
        return False
    if kinds is None:
        return True
    present = np.zeros((int(kinds.max()) + 1, count), dtype=bool)
    present[kinds, fold] = True
    return bool((present.sum(axis=1) >= 2).all())


def _deal(size: Ints, order: Ints, count: int) -> Ints:
    """Fold of each part: parts in the given order, each to the fold with the fewest labels."""
    sums = np.zeros(count, dtype=np.int64)
    fold = np.zeros(len(size), dtype=np.int64)
    for part in order:
        fold[part] = int(np.argmin(sums))
        sums[fold[part]] += size[part]
    return fold


def _random_deal(
    unit: Ints, kinds: Ints | None, count: int, largest: float, rng: np.random.Generator
) -> Ints:
    size = np.bincount(unit)
    for _ in range(DEALS):
        order = rng.permutation(len(size))
        # The largest first (ties stay random): folds come out of like size.
        order = order[np.argsort(-size[order], kind="stable")]
        fold = _deal(size, order, count)[unit]
        if _fits(fold, kinds, count, largest):
            return fold
    raise FoldError(
        f"no deal of {len(size)} places or groups to {count} folds keeps the rules",
        where=f"folds: count {count}",
        allowed=f"at most {100 * largest:.0f} % of the labels in a fold, every class in two folds",
        fix="a smaller folds.count, smaller groups, or more labels",
    )


def _candidates(
    labels: Floats, unit: Ints, count: int, rng: np.random.Generator
) -> Iterator[tuple[int, Ints]]:
    """Number of clusters and fold of each label, (N,), for clusters from few to many."""
    size = np.bincount(unit)
    centre = np.column_stack([np.bincount(unit, labels[:, k]) / size for k in (0, 1)])
    small, units = _small_clusters(centre, rng), len(size)
    parts = int(small.max()) + 1
    weight = np.bincount(small)
    middle = np.column_stack([np.bincount(small, centre[:, k]) / weight for k in (0, 1)])
    steps = np.geomspace(count, max(count, parts - 1), COUNTS)
    counts = np.unique(np.round(steps).astype(np.int64))
    # cut_tree numbers clusters by their first member; the tree is built once for all counts.
    cuts = cut_tree(ward(middle), n_clusters=counts) if parts > count else np.empty((parts, 0), int)
    axis = _first_axis(labels)
    for clusters, cut in zip(counts, cuts.T, strict=True):
        of_label = cut[small][unit]
        many = np.bincount(of_label)
        along = np.bincount(of_label, labels @ axis) / many
        turns = np.empty(len(many), dtype=np.int64)
        turns[np.argsort(along, kind="stable")] = np.arange(len(many)) % count
        yield int(clusters), turns[of_label]
        order = rng.permutation(len(many))
        order = order[np.argsort(-many[order], kind="stable")]
        yield int(clusters), _deal(many, order, count)[of_label]
    if parts == count == units:
        yield units, unit


def _small_clusters(centre: Floats, rng: np.random.Generator) -> Ints:
    """Number of the small cluster of each unit; each unit its own one where they are few."""
    if len(centre) <= MOST_UNITS:
        return np.arange(len(centre))
    means = MiniBatchKMeans(
        MOST_UNITS, random_state=int(rng.integers(2**31)), n_init=1, batch_size=4096,
        init="random", max_iter=5, reassignment_ratio=0,
    ).fit(centre)  # fmt: skip
    return np.unique(means.labels_, return_inverse=True)[1].astype(np.int64)


def _first_axis(labels: Floats) -> Floats:
    """Direction along which labels vary most, (2,)."""
    vectors = np.linalg.eigh(np.cov((labels - labels.mean(axis=0)).T))[1]
    axis: Floats = vectors[:, -1]
    # The sign of an eigenvector is free: fixed here, so that folds are the same on every machine.
    return axis if axis[np.argmax(np.abs(axis))] > 0 else -axis
