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
from terraloom.labels.dealing import score
from terraloom.labels.folds import (
    FoldMap,
    assign_folds,
    audit_folds,
    label_years,
    overlap_groups,
    place_groups,
)

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
    assert score(scattered_gaps) < score(gaps) < score(alone)
    four = np.array([[1, 0.25], [0, 0.25], [0, 0.25], [0, 0.25]])  # three gaps
    spread = np.array([[0.5, 0.5], [0.5, 0.5], [0, 0], [0.0, 0]])  # two empty folds
    assert score(four) < score(spread)


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


# --- groups, regions, years ----------------------------------------------------------------------


def test_a_group_across_blocks_goes_whole_to_the_block_with_most_of_its_area() -> None:
    shapes = [box(10, 1150, 20, 1160), box(510, 510, 560, 560), box(1110, 10, 1120, 20),
              box(710, 710, 720, 720), box(120, 1150, 130, 1160)]  # fmt: skip
    labels = labels_of(shapes, [0] * 5).assign(group=["p", "p", "p", None, None])
    out, _ = folds_of(labels, count=2)
    assert out["block"].tolist()[:3] == [6 * 12 + 5] * 3
    assert out["fold"].nunique() == 2
    assert out["fold"].iloc[:3].nunique() == 1
    # Labels without a group stay where they are; NaN is no group either.
    assert out["block"].tolist()[3:] == [4 * 12 + 7, 1]
    again, _ = folds_of(labels.assign(group=["p", "p", "p", np.nan, np.nan]), count=2)
    assert again["block"].tolist() == out["block"].tolist()


def test_groups_and_overlaps_chain() -> None:
    """a and b are one parcel, c overlaps b, d is of c's survey: all four are one place."""
    shapes = [box(0, 0, 10, 10), box(500, 0, 510, 10), box(505, 0, 520, 10), box(900, 0, 910, 10),
              box(700, 0, 710, 10)]  # fmt: skip
    labels = labels_of(shapes, [0] * 5).assign(group=["p1", "p1", "s7", "s7", "q"])
    assert place_groups(labels).tolist()[:4] == [place_groups(labels)[0]] * 4
    assert len(set(place_groups(labels))) == 2
    # One id in the files of two tasks need not be one thing.
    tasks = labels.assign(task=["x", "x", "x", "y", "x"])
    assert len(set(place_groups(tasks))) == 3


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 4))
def test_no_group_is_in_two_folds(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    group = np.array([f"g{k}" for k in rng.integers(0, 60, 150)], object)
    group[rng.random(150) < 0.3] = None
    labels = scattered(150, seed).assign(group=group)
    out, _ = folds_of(labels, count=count, seed=seed)
    assert (out.dropna(subset="group").groupby("group")["fold"].nunique() == 1).all()
    assert audit_folds(out)["overlaps_across_folds"] == 0


def test_fewer_groups_than_folds() -> None:
    shapes = [box(x, 510, x + 10, 520) for x in range(10, 1200, 100)]
    labels = labels_of(shapes, [0] * 12).assign(group=["west"] * 6 + ["east"] * 6)
    with pytest.raises(FoldError, match="form 2 groups, too few for 4 folds") as caught:
        folds_of(labels)
    assert "group_column" in caught.value.fix
    assert folds_of(labels, count=2)[0]["fold"].nunique() == 2


def quarters() -> gpd.GeoDataFrame:
    """Four regions of 600 m."""
    shapes = [box(x, y, x + 600, y + 600) for x in (0, 600) for y in (0, 600)]
    return gpd.GeoDataFrame(geometry=shapes, crs="EPSG:32633")


def test_whole_regions_are_held_out() -> None:
    labels = scattered(200, 3)
    how = {"geobox": GEOBOX, "block_m": 100, "seed": 1, "names": NAMES}
    out, fold_map = assign_folds(labels, count=4, regions=quarters(), **how)
    assert out["region"].nunique() == out["fold"].nunique() == 4
    assert (out.groupby("region")["fold"].nunique() == 1).all()
    # Pixels without a label have the fold of their region.
    of_region = out.groupby("region")["fold"].first()
    folds = fold_map.folds(GEOBOX)
    for region, (rows, cols) in enumerate([(60, 0), (0, 0), (60, 60), (0, 60)]):
        assert np.all(folds[rows : rows + 60, cols : cols + 60] == of_region[region])
    two, _ = assign_folds(labels, count=2, regions=quarters(), **how)
    assert two.groupby("fold")["region"].nunique().tolist() == [2, 2]
    assert two.groupby("fold")["stratum"].nunique().eq(3).all()


def test_overlaps_across_the_border_of_regions_stay_together() -> None:
    labels = labels_of([box(500, 100, 590, 190), box(580, 100, 640, 190), box(700, 700, 710, 710),
                        box(100, 100, 110, 110)], [0] * 4)  # fmt: skip
    out, _ = assign_folds(
        labels, geobox=GEOBOX, block_m=100, seed=1, names=NAMES, count=2, regions=quarters()
    )
    assert out["region"].tolist() == [0, 0, 3, 0]


def test_labels_in_no_region_are_counted() -> None:
    labels = scattered(100, 2).assign(label_id=np.arange(100))
    outside = int((labels.representative_point().x > 600).sum())
    with pytest.raises(FoldError, match=f"{outside} of 100 labels lie in no region") as caught:
        assign_folds(labels, geobox=GEOBOX, block_m=100, seed=1, names=NAMES, count=2,
                     regions=quarters().iloc[:2])  # fmt: skip
    assert "label_id" in caught.value.found
    with pytest.raises(FoldError, match="4 regions, too few for 5 folds"):
        assign_folds(labels, geobox=GEOBOX, block_m=100, seed=1, names=NAMES, count=5,
                     regions=quarters())  # fmt: skip


def test_whole_years_are_held_out() -> None:
    n = 120
    labels = scattered(n, 4).assign(date=[f"{2015 + k % 4}-06-01" for k in range(n)])
    labels["group"] = "all one parcel"  # seen in every year: that is what is tested
    how = {"geobox": GEOBOX, "block_m": 100, "seed": 1, "names": NAMES, "years": True}
    out, fold_map = assign_folds(labels, count=4, **how)
    assert (out.groupby("date")["fold"].nunique() == 1).all()
    assert out["fold"].nunique() == 4
    assert set(fold_map.fold_of_block) == {255}
    assert FoldMap.from_record(fold_map.record(), GEOBOX).folds(GEOBOX).max() == 255
    with pytest.raises(FoldError, match="4 years, too few for 5 folds"):
        assign_folds(labels, count=5, **how)
    labels.loc[[3, 7], "date"] = None
    with pytest.raises(FoldError, match="2 of 120 labels have no date") as caught:
        assign_folds(labels, count=4, **how)
    assert "date_column" in caught.value.fix


def test_a_class_of_one_year_is_named() -> None:
    labels = scattered(40, 5).assign(date=[f"{2015 + k % 2}-06-01" for k in range(40)])
    labels["stratum"] = np.where(labels["date"] == "2016-06-01", 0, [0, 0, 1, 0] * 10)
    with pytest.raises(FoldError, match="'b' \\(year 2015\\) lie in one year only"):
        assign_folds(labels, geobox=GEOBOX, block_m=100, seed=1, names=NAMES, count=2, years=True)


def test_the_year_of_a_label_is_that_of_the_middle_of_its_dates() -> None:
    labels = scattered(5, 1).assign(
        date=["2018-10-01", "2018-01-01", "2019", None, "2020-02-29 10:00:00"],
        date_end=["2019-07-31", "2018-12-31", None, None, None],
    )
    assert label_years(labels).tolist() == [2019, 2018, 2019, 0, 2020]
    assert label_years(labels.drop(columns="date_end")).tolist() == [2018, 2018, 2019, 0, 2020]
    assert label_years(labels.drop(columns=["date", "date_end"])).tolist() == [0] * 5


def test_one_way_of_dealing_at_a_time() -> None:
    with pytest.raises(FoldError, match="more than one"):
        assign_folds(scattered(20, 1), geobox=GEOBOX, block_m=100, seed=1, names=NAMES, count=2,
                     years=True, regions=quarters())  # fmt: skip


def test_audit_lists_folds() -> None:
    labels = labels_of([box(0, 0, 10, 10), box(40, 0, 50, 10), box(120, 0, 130, 10)], [0, 1, 1])
    audit = audit_folds(labels.assign(fold=[0, 1, 1], **{"class": ["a", "b", None]}))
    assert audit["per_fold"] == [
        {"fold": 0, "labels": 1, "classes": 1, "nearest_m": 30.0, "median_m": 30.0},
        {"fold": 1, "labels": 2, "classes": 1, "nearest_m": 30.0, "median_m": 70.0},
    ]
