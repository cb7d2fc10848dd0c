"""Folds by nearest neighbour distance matching: published properties and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance
from shapely import Point, Polygon, box

import terraloom.labels.knndm as module
from terraloom.errors import FoldError
from terraloom.labels.knndm import fold_distances, group_folds, join_groups, knndm, regular_points

AREA = box(0, 0, 100_000, 100_000)
PLACES = regular_points(AREA, 1000)


def clustered(seed: int, n: int = 400, centres: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = rng.uniform(5_000, 95_000, (centres, 2))
    return middle[rng.integers(0, centres, n)] + rng.normal(0, 800, (n, 2))


def uniform(seed: int, n: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 100_000, (n, 2))


def nearest(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.sqrt(((targets[:, None] - points[None]) ** 2).sum(-1)).min(1)


@pytest.mark.parametrize("seed", range(5))
def test_clustered_labels_get_folds_that_match_far_better_than_random_ones(seed: int) -> None:
    xy = clustered(seed)
    out = knndm(xy, PLACES, count=10, rng=np.random.default_rng(seed))
    assert not out.random and out.p_value < 0.001
    assert out.w_m < 0.5 * out.w_random_m
    assert np.bincount(out.fold, minlength=10).min() > 0
    assert np.bincount(out.fold).max() <= 200


@pytest.mark.parametrize("seed", range(5))
def test_labels_on_a_far_corner_are_folded_as_far_apart_as_they_can_be(seed: int) -> None:
    xy = clustered(seed, centres=6) * 0.2  # the map reaches five times as far as the labels
    out = knndm(xy, PLACES, count=5, rng=np.random.default_rng(seed))
    assert out.w_m < out.w_random_m - 1_000
    assert np.median(fold_distances(xy, out.fold)) > 1_000


@pytest.mark.parametrize("seed", range(6))
def test_random_labels_get_random_folds(seed: int) -> None:
    out = knndm(uniform(seed), PLACES, count=10, rng=np.random.default_rng(seed))
    # The test errs in one of twenty; even then folds are about as good as random ones.
    assert out.random or out.w_m <= out.w_random_m
    assert out.w_m < 1_500  # spacing of the labels: 5 km
    if out.random:
        assert out.w_m == out.w_random_m
        assert np.ptp(np.bincount(out.fold)) <= 1


def test_most_random_labels_are_told_from_clustered_ones() -> None:
    rng = np.random.default_rng(0)
    found = [knndm(uniform(s, 150), PLACES, count=4, rng=rng).random for s in range(20)]
    assert sum(found) >= 17
    found = [knndm(clustered(s, 150), PLACES, count=4, rng=rng).random for s in range(10)]
    assert sum(found) == 0


def test_w_is_that_of_the_distances_and_vanishes_where_these_are_equal() -> None:
    xy = clustered(3)
    out = knndm(xy, PLACES, count=5, rng=np.random.default_rng(1))
    own = fold_distances(xy, out.fold)
    for k in range(5):
        expected = nearest(xy[out.fold != k], xy[out.fold == k])
        assert np.allclose(own[out.fold == k], expected)
    assert out.w_m == pytest.approx(wasserstein_distance(own, nearest(xy, PLACES)))
    # Two lattices: labels 1 km apart, and places 1 km beside one label each.
    line = np.column_stack([np.arange(40) * 1000.0, np.zeros(40)])
    out = knndm(line, line + np.array([0, 1000]), count=40, rng=np.random.default_rng(1))
    assert out.w_m == pytest.approx(0, abs=1e-9)


def test_groups_stay_whole() -> None:
    xy = clustered(1)
    rng = np.random.default_rng(5)
    groups = np.array([f"parcel {g}" for g in rng.integers(0, 60, len(xy))])
    for points in (xy, uniform(1)):
        out = knndm(points, PLACES, count=5, rng=np.random.default_rng(2), groups=groups)
        for g in np.unique(groups):
            assert len(np.unique(out.fold[groups == g])) == 1


def test_labels_of_one_place_stay_together_without_groups() -> None:
    xy = np.repeat(clustered(2, 150), 3, axis=0)
    out = knndm(xy, PLACES, count=5, rng=np.random.default_rng(2))
    assert np.array_equal(out.fold[::3], out.fold[1::3])
    assert np.array_equal(out.fold[::3], out.fold[2::3])
    assert fold_distances(xy, out.fold).min() > 0


def test_every_stratum_is_in_two_folds() -> None:
    xy = clustered(4)
    strata = np.zeros(len(xy), int)
    strata[[0, 1, 2]] = 1
    strata[[5, 9]] = 2
    out = knndm(xy, PLACES, count=4, rng=np.random.default_rng(2), strata=strata)
    assert all(len(np.unique(out.fold[strata == s])) >= 2 for s in (0, 1, 2))


@pytest.mark.parametrize("make", [clustered, uniform])
def test_equal_generators_give_equal_folds_wherever_the_map_lies(make) -> None:
    xy = make(7)
    a, b = (knndm(xy, PLACES, count=6, rng=np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(a.fold, b.fold) and a.record() == b.record()
    far = np.array([500_000, 4e6])
    moved = knndm(xy + far, PLACES + far, count=6, rng=np.random.default_rng(3))
    assert moved.w_m == pytest.approx(a.w_m, rel=0.05)


def test_many_labels_are_clustered_in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    xy = clustered(8, 1200)
    whole = knndm(xy, PLACES, count=5, rng=np.random.default_rng(3))
    monkeypatch.setattr(module, "MOST_UNITS", 200)
    steps = knndm(xy, PLACES, count=5, rng=np.random.default_rng(3))
    assert not steps.random and steps.w_m < 0.6 * steps.w_random_m
    assert steps.w_m < 1.5 * whole.w_m + 200


def test_group_folds_are_of_like_size_and_leave_one_region_out() -> None:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 40, 1000)
    fold = group_folds(groups, count=4, rng=rng)
    assert np.ptp(np.bincount(fold)) < 60
    assert all(len(np.unique(fold[groups == g])) == 1 for g in range(40))
    years = np.repeat(["2019", "2020", "2021"], [50, 10, 5])
    fold = group_folds(years, count=3, rng=rng)
    assert len({(y, f) for y, f in zip(years, fold.tolist(), strict=True)}) == 3
    assert len(np.unique(fold)) == 3


def test_groups_that_share_a_label_are_joined() -> None:
    blocks = [0, 0, 1, 1, 2, 3, 3, 4]
    parcels = ["a", "b", "b", "c", "d", "e", "f", "d"]
    joined = join_groups(blocks, parcels)
    assert [joined.tolist().index(g) for g in joined] == [0, 0, 0, 0, 4, 5, 5, 4]
    assert len(np.unique(join_groups(blocks))) == 5
    fold = group_folds(joined, count=3, rng=np.random.default_rng(0))
    assert all(len({f for f, g in zip(fold, ids, strict=True) if g == one}) == 1
               for ids in (blocks, parcels) for one in ids)  # fmt: skip


def test_blocks_as_groups_give_a_fold_a_block() -> None:
    """As square blocks are dealt by distance: the way campaigns use it."""
    xy = clustered(6)
    block = (xy[:, 1] // 2000).astype(int) * 50 + (xy[:, 0] // 2000).astype(int)
    out = knndm(xy, PLACES, count=4, rng=np.random.default_rng(1), groups=block)
    assert all(len(np.unique(out.fold[block == b])) == 1 for b in np.unique(block))
    assert out.w_m < 0.7 * out.w_random_m


def test_regular_points_fill_the_area_and_only_it() -> None:
    ring = Point(0, 0).buffer(1000).difference(Point(0, 0).buffer(400))
    points = regular_points(ring, 500)
    assert abs(len(points) - 500) < 30
    radius = np.hypot(*points.T)
    assert radius.min() > 390 and radius.max() < 1000
    sliver = Polygon([(0, 0), (1000, 1001), (1000, 1000)])
    assert len(regular_points(sliver, 1)) == 1
    with pytest.raises(FoldError, match="empty"):
        regular_points(Polygon())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"xy": np.array([[0.0, np.nan], [1, 1], [2, 2]])}, "not finite, first in row 0"),
        ({"xy": np.zeros((0, 2))}, "shape"),
        ({"groups": [1, 1, 1]}, "1 places or groups for 2 folds"),
        ({"groups": [1, 1]}, "groups have the shape"),
        ({"xy": np.zeros((3, 2))}, "1 places or groups"),
        ({"strata": [2, 2, 7]}, "stratum 7 lies in one place"),
        ({"count": 1}, "for 1 folds"),
        ({"largest": 0.2}, "largest share"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], text: str) -> None:
    given = {"xy": np.array([[0.0, 0], [1, 1], [2, 2]]), "places": PLACES, "count": 2} | change
    with pytest.raises(FoldError, match=text):
        knndm(given.pop("xy"), given.pop("places"), rng=np.random.default_rng(0), **given)


def test_groups_that_are_too_large_are_refused() -> None:
    xy = uniform(1, 100)
    groups = np.r_[np.zeros(80, int), np.arange(1, 21)]
    with pytest.raises(FoldError, match="no deal"):
        knndm(xy, PLACES, count=4, rng=np.random.default_rng(0), groups=groups)
