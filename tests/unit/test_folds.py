"""Spatial folds: balanced, reproducible, and no place in two folds."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from shapely import Point, box

from terraloom.errors import FoldError
from terraloom.labels.folds import FoldMap, _score, assign_folds, audit_folds, overlap_groups

# 12 x 12 blocks of 100 m; the upper left corner is (0, 1200).
GEOBOX = GeoBox((120, 120), Affine(10, 0, 0, 0, -10, 1200), "EPSG:32633")
NAMES = ("a", "b", "c")


def labels_of(shapes: list[object], strata: list[int]) -> gpd.GeoDataFrame:
    return gpd.GeoDataFrame({"stratum": strata}, geometry=shapes, crs="EPSG:32633")


def scattered(n: int, seed: int) -> gpd.GeoDataFrame:
    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(n):
        x, y = rng.uniform(0, 1150, 2)
        w, h = rng.uniform(10, 60, 2)
        shapes.append(box(x, y, x + w, y + h))
    return labels_of(shapes, list(rng.integers(0, 3, n)))


def folds_of(
    labels: gpd.GeoDataFrame, count: int = 4, seed: int = 1, block_m: float = 100
) -> tuple[gpd.GeoDataFrame, FoldMap]:
    return assign_folds(labels, geobox=GEOBOX, count=count, block_m=block_m, seed=seed, names=NAMES)


def test_blocks_are_anchored_in_the_upper_left_corner() -> None:
    shapes = [box(10, 1150, 40, 1190), box(110, 1110, 150, 1150), box(10, 1010, 40, 1050),
              box(1150, 10, 1190, 50)]  # fmt: skip
    out, fold_map = folds_of(labels_of(shapes, [0, 0, 0, 0]), count=2)
    assert out["block"].tolist() == [0, 1, 12, 143]
    assert fold_map.shape == (12, 12)
    blocks = fold_map.blocks(GEOBOX)
    assert (blocks[0, 0], blocks[9, 10], blocks[10, 9], blocks[119, 119]) == (0, 1, 12, 143)
    assert np.array_equal(fold_map.blocks(GEOBOX[25:60, 35:90]), blocks[25:60, 35:90])
    for block, fold in zip(out["block"], out["fold"], strict=True):
        assert np.all(fold_map.folds(GEOBOX)[blocks == block] == fold)


def test_a_polygon_goes_whole_to_the_block_of_its_representative_point() -> None:
    wide = box(60, 1110, 190, 1190)  # its point lies at x = 125, in the second block
    out, _ = folds_of(labels_of([wide, box(510, 510, 520, 520)], [0, 0]), count=2)
    assert out["block"].tolist()[0] == 1


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_no_place_is_in_two_folds(seed: int, count: int) -> None:
    labels = scattered(120, seed)
    out, _ = folds_of(labels, count=count, seed=seed)
    audit = audit_folds(out)
    assert audit["overlaps_across_folds"] == 0
    assert sum(audit["labels_per_fold"].values()) == 120
    assert set(out["fold"]) == set(range(count))
    assert (out.groupby("block")["fold"].nunique() == 1).all()
    assert (out.groupby(overlap_groups(labels))["block"].nunique() == 1).all()


def test_overlaps_join_transitively_and_touching_does_not() -> None:
    chain = [box(0, 0, 60, 10), box(50, 0, 160, 10), box(150, 0, 260, 10), Point(255, 5)]
    touching = box(260, 0, 300, 10)
    dust = box(299.995, 0, 340, 10)  # 0.05 m2 of overlap are rounding
    groups = overlap_groups(labels_of([*chain, touching, dust], [0] * 6))
    assert len(set(groups[:4])) == 1
    assert len(set(groups)) == 3


def test_every_stratum_is_in_every_fold_and_shares_are_alike() -> None:
    labels = scattered(300, 5)
    out, _ = folds_of(labels)
    area = np.zeros((4, 3))
    np.add.at(area, (out["fold"], out["stratum"]), labels.area)
    share = area / area.sum(axis=0)
    assert share.min() > 0.2
    assert share.max() < 0.3


def test_a_rare_stratum_in_two_blocks_is_in_two_folds() -> None:
    for seed in range(6):
        labels = scattered(80, seed)
        labels["stratum"] = 0
        rare = labels_of([box(10, 1110, 20, 1120), box(1110, 10, 1120, 20)], [2, 2])
        both = gpd.GeoDataFrame(
            {"stratum": [*labels["stratum"], 2, 2]},
            geometry=[*labels.geometry, *rare.geometry], crs=labels.crs,
        )  # fmt: skip
        out, _ = folds_of(both, seed=seed)
        assert out.loc[out["stratum"] == 2, "fold"].nunique() == 2


def test_same_seed_same_folds_and_another_seed_others() -> None:
    labels = scattered(150, 2)
    (a, map_a), (b, map_b), (_, map_c) = (folds_of(labels, seed=s) for s in (7, 7, 8))
    assert map_a == map_b
    assert a["fold"].tolist() == b["fold"].tolist()
    assert map_a.fold_of_block != map_c.fold_of_block


def test_blocks_without_labels_have_folds_too() -> None:
    shapes = [box(10, 1110, 20, 1120), box(1110, 10, 1120, 20)]
    _, fold_map = folds_of(labels_of(shapes, [0, 0]), count=2)
    assert len(fold_map.fold_of_block) == 144
    assert abs(sum(fold_map.fold_of_block) - 72) <= 2


def test_map_survives_json() -> None:
    _, fold_map = folds_of(scattered(50, 1))
    record = fold_map.record()
    assert record["block_m"] == 100
    assert FoldMap.from_record(record, GEOBOX) == fold_map


def test_points_count_as_one_pixel_and_may_lie_outside() -> None:
    points = [Point(5, 1195), Point(1195, 5), Point(-30, 1230)]
    out, _ = folds_of(labels_of(points, [1, 1, 1]), count=2)
    assert out["block"].tolist() == [0, 143, 0]


def test_too_few_blocks() -> None:
    shapes = [box(10, 1110, 20, 1120), box(1110, 10, 1120, 20)]
    with pytest.raises(FoldError) as caught:
        folds_of(labels_of(shapes, [0, 0]), count=3)
    assert "2 blocks" in caught.value.found
    assert "block_m" in caught.value.fix


def test_a_class_in_one_block_names_class_and_block() -> None:
    shapes = [box(10, 1110, 20, 1120), box(1110, 10, 1120, 20), box(130, 1110, 140, 1120)]
    with pytest.raises(FoldError) as caught:
        folds_of(labels_of(shapes, [0, 0, 2]), count=2)
    assert "'c' (block 1)" in caught.value.found
    assert "'a'" not in caught.value.found
    for word in ("block_m", "more labels", "drop the class"):
        assert word in caught.value.fix


def test_audit_sees_a_leak() -> None:
    shapes = [box(0, 0, 10, 10), box(5, 0, 15, 10), box(15, 0, 20, 10), box(120, 0, 130, 10)]
    labels = labels_of(shapes, [0] * 4).assign(fold=[0, 1, 0, 2])
    audit = audit_folds(labels)
    assert audit["overlaps_across_folds"] == 1
    assert audit["touching_across_folds"] == 1
    assert audit["min_distance_m"] == 0
    apart = audit_folds(labels.iloc[[0, 3]])
    assert apart["min_distance_m"] == apart["median_distance_m"] == 110


def test_a_class_in_one_fold_only_is_worse_than_gaps_elsewhere() -> None:
    alone = np.array([[1, 0.5, 0.5], [0, 0.5, 0.5], [0, 0.0, 0.0]])
    gaps = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0.0, 0.0]])
    scattered_gaps = np.array([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    assert _score(scattered_gaps) < _score(gaps) < _score(alone)
    four = np.array([[1, 0.25], [0, 0.25], [0, 0.25], [0, 0.25]])  # three gaps
    spread = np.array([[0.5, 0.5], [0.5, 0.5], [0, 0], [0.0, 0]])  # two empty folds
    assert _score(four) < _score(spread)


def test_blocks_can_be_dealt_by_distances() -> None:
    """Labels in a corner of a wide area: neighbours in one fold, blocks stay whole, all classes."""
    rng = np.random.default_rng(3)
    grid = GeoBox((960, 960), Affine(10, 0, 500_000, 0, -10, 5_800_000), "EPSG:32633")
    centres = rng.uniform((500_200, 5_796_200), (503_000, 5_799_800), (160, 2))
    labels = gpd.GeoDataFrame(
        {"stratum": rng.integers(0, 2, 160)},
        geometry=[Point(*c).buffer(30) for c in centres],
        crs="EPSG:32633",
    )
    given = {"geobox": grid, "count": 3, "block_m": 400, "seed": 1, "names": ["a", "b"]}
    area = box(500_000, 5_790_400, 509_600, 5_800_000)

    def apart(frame: gpd.GeoDataFrame) -> float:
        """Median distance from a label to the nearest one of another fold."""
        xy, fold = np.column_stack([frame.centroid.x, frame.centroid.y]), frame["fold"].to_numpy()
        far = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
        far[fold[:, None] == fold[None]] = np.inf
        return float(np.median(far.min(axis=1)))

    balanced, _ = assign_folds(labels, **given)
    matched, fold_map = assign_folds(labels, **given, area=area)
    again, _ = assign_folds(labels, **given, area=area)
    assert apart(matched) > 1.3 * apart(balanced)
    assert matched["fold"].equals(again["fold"])
    assert (matched.groupby("block")["fold"].nunique() == 1).all()
    assert all(
        fold_map.fold_of_block[b] == f
        for b, f in zip(matched["block"], matched["fold"], strict=True)
    )
    assert matched.groupby("fold")["stratum"].nunique().eq(2).all()
