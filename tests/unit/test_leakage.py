"""Leakage audit: injected leaks are found, clean folds raise no alarm, and the real price."""

from __future__ import annotations

import os
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import MultiPoint, Point, box

from support.parquet import read_parquet
from terraloom.errors import FoldError
from terraloom.labels.folds import assign_folds
from terraloom.labels.knndm import group_folds, knndm, regular_points
from terraloom.labels.leakage import (
    audit_leakage,
    check_distance,
    check_groups,
    check_pixels,
    check_places,
    check_twins,
    check_years,
    degree_blocks,
)
from terraloom.train.baseline import split_scores

DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
KEYS = {"check", "item", "ok", "found", "allowed", "fix"}


def clean(seed: int = 0, n: int = 200) -> gpd.GeoDataFrame:
    """Parcels of 40 m that do not meet, in blocks of 1 km, a fold a block."""
    rng = np.random.default_rng(seed)
    cells = rng.choice(80 * 80, n, replace=False)
    x, y = (cells % 80) * 100.0 + 30, (cells // 80) * 100.0 + 30
    block = (x // 1000 + 8 * (y // 1000)).astype(int)
    return gpd.GeoDataFrame(
        {
            "label_id": np.arange(n), "parcel": [f"p{k}" for k in range(n)],
            "date": "2021-07-01", "block": block,
            "fold": group_folds(block, count=4, rng=rng),
        },
        geometry=[box(a, b, a + 40, b + 40) for a, b in zip(x, y, strict=True)],
        crs="EPSG:32633",
    )  # fmt: skip


def pixels_of(labels: gpd.GeoDataFrame) -> np.ndarray:
    c = labels.geometry.centroid
    return (c.y // 10).to_numpy(int) * 800 + (c.x // 10).to_numpy(int)


def failed(records: list[dict[str, object]]) -> list[str]:
    assert all(set(r) == KEYS for r in records)
    assert all(bool(r["fix"]) != r["ok"] for r in records)
    return [str(r["check"]) for r in records if not r["ok"]]


def audit(labels: gpd.GeoDataFrame, **kwargs: object) -> list[dict[str, object]]:
    given = {"least_m": 10, "image_years": [2021], "group": "parcel"} | kwargs
    return audit_leakage(
        labels, pixels=pixels_of(labels), pixel_fold=labels["fold"].to_numpy(), **given
    )


def moved(labels: gpd.GeoDataFrame, row: int) -> int:
    return int((labels["fold"].iloc[row] + 1) % 4)


def with_row(labels: gpd.GeoDataFrame, row: int, **changes: object) -> gpd.GeoDataFrame:
    new = labels.iloc[[row]].assign(**changes)
    return pd.concat([labels, new], ignore_index=True)


@pytest.mark.parametrize("seed", range(10))
def test_clean_folds_raise_no_alarm(seed: int) -> None:
    records = audit(clean(seed))
    assert failed(records) == []
    assert len(records) == 4 + 4


@pytest.mark.parametrize("seed", range(3))
def test_folds_of_knndm_raise_no_alarm(seed: int) -> None:
    labels = clean(seed)
    points = labels.representative_point()
    out = knndm(
        np.column_stack([points.x, points.y]), regular_points(box(0, 0, 40_000, 40_000)),
        count=4, rng=np.random.default_rng(seed), groups=labels["parcel"].to_numpy(),
    )  # fmt: skip
    assert failed(audit(labels.assign(fold=out.fold))) == []


@pytest.mark.parametrize("row", [0, 17, 199])
def test_a_label_that_stands_in_two_folds_is_found(row: int) -> None:
    labels = clean()
    twin = with_row(labels, row, label_id=999, parcel="other", fold=moved(labels, row))
    records = audit(twin)
    assert set(failed(records)) == {
        "distance between folds", "same place in two folds", "same source pixel in two folds",
    }  # fmt: skip
    place = next(r for r in records if r["check"] == "same place in two folds")
    assert place["item"] == f"label {row} + label 999"


def test_a_point_inside_a_parcel_of_another_fold_is_found() -> None:
    labels = clean()
    inside = labels.geometry.iloc[5].centroid
    twin = with_row(labels, 5, parcel="other", fold=moved(labels, 5), geometry=inside)
    assert "same place in two folds" in failed(check_places(twin, twin["fold"].to_numpy()))
    points = labels.set_geometry(labels.centroid)
    again = with_row(points, 5, fold=moved(labels, 5))
    assert failed(check_places(again, again["fold"].to_numpy())) == ["same place in two folds"]


def test_a_parcel_in_two_folds_is_found_and_named() -> None:
    labels = clean()
    k = int(np.flatnonzero(labels["fold"] != labels["fold"].iloc[0])[0])
    labels.loc[k, "parcel"] = "p0"
    records = audit(labels)
    assert failed(records) == ["same parcel in two folds"]
    leak = next(r for r in records if not r["ok"])
    assert leak["item"] == "parcel p0" and "1 in fold" in str(leak["found"])


def test_labels_without_a_group_are_no_group() -> None:
    fold = np.array([0, 1, 2, 3])
    assert failed(check_groups(np.array([None, None, "a", "b"], object), fold)) == []
    assert failed(check_groups(np.array([np.nan, np.nan, 1.0, 2.0]), fold)) == []
    assert failed(check_groups([1, 1, 2, 3], fold)) == ["same group in two folds"]


def test_folds_that_are_too_near_are_found() -> None:
    shapes = np.array([Point(0, 0), Point(100, 0), Point(1000, 0)], object)
    fold = np.array([0, 1, 1])
    assert failed(check_distance(shapes, fold, least_m=100)) == []
    records = check_distance(shapes, fold, least_m=101)
    assert failed(records) == ["distance between folds"] * 2
    assert "100.0 m away" in str(records[0]["found"])
    assert "1 of 2 labels too near" in str(records[1]["found"])


def test_random_folds_of_pixels_of_a_coarse_source_are_found() -> None:
    rng = np.random.default_rng(2)
    row, column = np.divmod(np.arange(60 * 60), 60)
    coarse = (row // 6) * 10 + column // 6  # 10 m samples on 60 m pixels
    records = check_pixels(coarse, rng.integers(0, 4, 3600))
    assert len(failed(records)) == 6 and records[-1]["found"] == "95 more"
    assert failed(check_pixels(coarse, (row // 12) % 4)) == []
    assert failed(check_pixels(coarse, (row // 10) % 4)) != []


def test_equal_series_under_two_ids_are_found() -> None:
    rng = np.random.default_rng(3)
    table = rng.normal(size=(50, 23)).round(3)
    table[:, 4] = np.nan
    fold = np.arange(50) % 5
    assert failed(check_twins(table, fold)) == []
    table[31] = table[7]
    records = check_twins(table, fold)
    assert failed(records) == ["equal samples in two folds"]
    assert records[0]["item"] == "row 7 = row 31"
    fold[31] = fold[7]
    assert failed(check_twins(table, fold)) == []


GEOBOX = GeoBox((800, 800), Affine(10, 0, 0, 0, -10, 8000), "EPSG:32633")


def dealt(**keys: object) -> gpd.GeoDataFrame:
    """Labels as the pipeline deals them: parcels as groups, two classes, three years."""
    labels = clean().drop(columns=["block", "fold", "parcel"])
    n = len(labels)
    labels = labels.assign(
        task="cover", stratum=np.arange(n) % 2, group=[f"farm {k // 4}" for k in range(n)],
        date=[f"{2019 + k % 3}-07-01" for k in range(n)], date_end=None,
    )  # fmt: skip
    return assign_folds(
        labels, geobox=GEOBOX, count=3, block_m=400, seed=1, names=["a", "b"], **keys
    )[0]


def stage_audit(labels: gpd.GeoDataFrame, **keys: object) -> list[dict[str, object]]:
    years = {"image_years": [2019, 2020, 2021], "geobox": GEOBOX}
    return audit_leakage(labels, **(years | keys))


def test_dealt_labels_are_clean_and_each_injected_leak_is_found() -> None:
    labels = dealt()
    assert failed(stage_audit(labels)) == []
    other = int((labels["fold"].iloc[9] + 1) % 3)

    near = labels.copy()
    at = labels.geometry.iloc[9].centroid
    near = with_row(near, 9, fold=other, group=None, geometry=box(at.x + 30, at.y, at.x + 60, at.y))
    assert failed(stage_audit(near, least_m=50)).count("distance between folds") >= 1

    twice = with_row(labels, 9, fold=other, group=None)
    assert "same place in two folds" in failed(stage_audit(twice))

    farm = labels.copy()
    farm.loc[9, "fold"] = other
    leak = next(r for r in stage_audit(farm) if not r["ok"])
    assert leak["check"] == "same group in two folds"
    assert leak["item"] == f"group cover {labels['group'].iloc[9]}"

    points = labels.set_geometry(labels.centroid)
    beside = Point(points.geometry.iloc[9].x // 10 * 10 + 1, points.geometry.iloc[9].y)
    pixel = with_row(points, 9, fold=other, group=None, geometry=beside)
    assert failed(stage_audit(pixel)) == ["same source pixel in two folds"]
    leak = next(r for r in stage_audit(pixel) if not r["ok"])
    row, column = int((8000 - beside.y) // 10), int(beside.x // 10)
    assert leak["item"] == f"pixel in row {row}, column {column}"

    assert set(failed(stage_audit(labels, image_years=[2020]))) == {"label year"}


def test_a_buffer_makes_near_labels_harmless_and_says_how_many() -> None:
    shapes = np.array([Point(0, 0), Point(30, 0), Point(1000, 0)], object)
    fold = np.array([0, 1, 1])
    assert failed(check_distance(shapes, fold, least_m=50)) == ["distance between folds"] * 2
    records = check_distance(shapes, fold, least_m=50, buffer_m=50)
    assert failed(records) == []
    assert "1 within the buffer of 50 m" in str(records[1]["found"])


def test_one_id_in_two_tasks_is_two_groups() -> None:
    labels = dealt()
    labels.loc[9, "group"], labels.loc[9, "task"] = labels["group"].iloc[0], "height"
    labels.loc[9, "fold"] = int((labels["fold"].iloc[0] + 1) % 3)
    assert "same group in two folds" not in failed(stage_audit(labels))


def test_with_years_places_repeat_but_no_year_is_in_two_folds() -> None:
    labels = dealt(years=True)
    of_2020 = int(labels.loc[labels["date"] == "2020-07-01", "fold"].iloc[0])
    again = with_row(labels, 9, date="2020-05-01", fold=of_2020)
    records = stage_audit(again, years=True)
    assert failed(records) == []
    assert "folds hold out years" in str(records[0]["found"])
    again.loc[3, "fold"] = int((again["fold"].iloc[3] + 1) % 3)
    assert failed(stage_audit(again, years=True)) == ["same year in two folds"]


def test_with_regions_no_region_is_in_two_folds() -> None:
    regions = gpd.GeoDataFrame(
        geometry=[box(x, 0, x + 2000, 8000) for x in range(0, 8000, 2000)], crs="EPSG:32633"
    )
    labels = dealt(regions=regions)
    assert failed(stage_audit(labels)) == []
    assert "same region in two folds" in [r["check"] for r in stage_audit(labels)]
    labels.loc[3, ["fold", "group"]] = int((labels["fold"].iloc[3] + 1) % 3), None
    assert failed(stage_audit(labels)) == ["same region in two folds"]


def test_few_and_constant_values_may_be_equal_by_chance() -> None:
    fold = np.array([0, 1, 0, 1])
    assert failed(check_twins(np.zeros((4, 23)), fold)) == []
    assert failed(check_twins(np.ones((4, 3)) * [1, 2, 3], fold)) == []
    assert failed(check_twins(np.full((4, 23), np.nan), fold)) == []


def test_years_of_labels_and_images_that_differ_are_found() -> None:
    labels = clean()
    labels.loc[[3, 4, 8, 9], "date"] = ["2019-05-01", "2019-05-02", "2019", "2020-01-01"]
    records = [r for r in audit(labels) if r["check"] == "label year"]
    assert [r["item"] for r in records] == ["labels of 2019", "labels of 2020"]
    assert "3 labels (label 3, label 4, label 8) are 2 years off" in str(records[0]["found"])
    assert len(failed(check_years([2019, 2020, 2021], [2021], allowed_gap=1))) == 1
    assert failed(check_years([2019, 2021], [2018, 2019, 2021])) == []


def test_labels_without_a_date_are_said() -> None:
    labels = clean()
    labels.loc[[3, 4], "date"] = None
    records = [r for r in audit(labels) if not r["ok"]]
    assert [r["item"] for r in records] == ["labels without a date"]
    assert str(records[0]["found"]).startswith("2 labels")


def test_bad_input_is_named() -> None:
    labels = clean()
    with pytest.raises(FoldError, match="no column 'farm'"):
        audit(labels, group="farm")
    with pytest.raises(FoldError, match="all 200 labels lie in fold 0"):
        audit(labels.assign(fold=0))
    with pytest.raises(FoldError, match="whole numbers"):
        check_pixels([1, 2], [0.5, 1])
    with pytest.raises(FoldError, match="one class only"):
        split_scores(np.zeros((4, 2)), [1] * 4, [0, 0, 1, 1], seed=0)
    with pytest.raises(FoldError, match="one fold only"):
        split_scores(np.zeros((4, 2)), [1, 2, 1, 2], [0] * 4, seed=0)
    with pytest.raises(FoldError, match="no year"):
        check_years([2020], [])


def test_random_folds_flatter_where_neighbours_are_alike_and_only_there() -> None:
    rng = np.random.default_rng(4)
    block = np.repeat(np.arange(40), 15)
    # Features say which block it is; the class is the block's own and cannot be learnt elsewhere.
    alike = rng.normal(size=(40, 5))[block] + rng.normal(0, 0.05, (600, 5))
    own = rng.integers(0, 2, 40)[block]
    fold = group_folds(block, count=5, rng=rng)
    scores = split_scores(alike, own, fold, seed=1, trees=30)
    assert scores.random_accuracy > 0.97 and scores.blocked_accuracy < 0.75
    assert scores.samples == 600
    signal = rng.normal(size=(600, 3))
    scores = split_scores(signal, signal[:, 0] > 0, fold, seed=1, trees=30)
    assert abs(scores.random_accuracy - scores.blocked_accuracy) < 0.03
    again = split_scores(signal, signal[:, 0] > 0, fold, seed=1, trees=30)
    assert again == scores


def test_blocks_of_degrees() -> None:
    lon, lat = [-55.2, -55.9, -54.9, -0.1, 0.1], [-12.1, -12.9, -12.1, 0.2, 0.2]
    assert degree_blocks(lon, lat).tolist() == [0, 0, 1, 2, 3]
    assert len(set(degree_blocks(lon, lat, 0.5).tolist())) == 5


@pytest.fixture(scope="module")
def modis() -> tuple[pd.DataFrame, np.ndarray]:
    """1,218 MODIS series of Mato Grosso: place and class of each, and its values (N, dates x B)."""
    path = DATA / "sits/data/samples_modis_4bands.parquet"
    if not path.is_file():
        pytest.skip("needs the data folder (TERRALOOM_TEST_DATA)")
    rows = read_parquet(path).sort_values(["sample", "date"], kind="stable")
    series = rows.groupby("sample").first()
    table = rows[["NDVI", "EVI", "NIR", "MIR"]].to_numpy(np.float32).reshape(len(series), -1)
    assert table.shape == (1218, 23 * 4)
    return series, table


@pytest.mark.slow
def test_the_price_of_random_folds_on_real_series(modis) -> None:
    """Known figures: .988 on random folds; .878 and macro-F1 .70 in blocks of one degree."""
    series, table = modis
    block = degree_blocks(series["longitude"], series["latitude"])
    fold = group_folds(block, count=10, rng=np.random.default_rng(0))
    scores = split_scores(table, series["label"], fold, seed=0, trees=60)
    assert scores.random_accuracy == pytest.approx(0.988, abs=0.01)
    # Which blocks are held out together is chance: .84 to .88 over deals to 5 folds.
    assert scores.blocked_accuracy == pytest.approx(0.878, abs=0.04)
    assert scores.blocked_f1 == pytest.approx(0.70, abs=0.04)


def test_distance_matching_on_real_series(modis) -> None:
    series, _ = modis
    # Metres, good to a few per cent over the region; projections are no part of this.
    east = series["longitude"] * 111_320 * np.cos(np.deg2rad(series["latitude"].mean()))
    xy = np.column_stack([east, series["latitude"] * 110_574])
    places = regular_points(MultiPoint(xy).convex_hull)
    out = knndm(xy, places, count=5, rng=np.random.default_rng(0))
    assert not out.random and out.w_m < 0.3 * out.w_random_m
    points = gpd.GeoDataFrame(geometry=gpd.points_from_xy(*xy.T), crs="EPSG:32721")
    assert failed(check_places(points, out.fold)) == []
    # 1,218 series lie at 732 places: random folds hold out places that they have trained on.
    random = np.random.default_rng(0).permutation(out.fold)
    assert len(failed(check_places(points, random))) > 5
