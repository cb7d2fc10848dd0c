"""Reading labels and burning them: every rule is counted, every error names its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
from shapely import LineString, MultiPolygon, Point, Polygon, box

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.errors import LabelError
from terraloom.grid import CampaignGrid, window_of
from terraloom.labels.rasterise import EDGE_WIDTH_PX, NO_LABEL, burn, eroded
from terraloom.labels.read import read_labels
from terraloom.legend import Legend

LEGEND = Legend((1, 2, 3), ("forest", "water", "farm"), ("#000000", "#000001", "#000002"))
X, Y = 360_000.0, 5_700_000.0  # lower left corner of the grid, on the 60 m lattice


def at(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """A box in metres from the grid's lower left corner."""
    return box(X + x0, Y + y0, X + x1, Y + y1)


@pytest.fixture
def grid() -> CampaignGrid:
    return CampaignGrid.from_aoi(at(0, 0, 960, 960), "EPSG:32633", tile_px=48)


def frame(rows: list[tuple[Any, Any]], **columns: Any) -> gpd.GeoDataFrame:
    data = {"class": [r[0] for r in rows], **columns}
    return gpd.GeoDataFrame(data, geometry=[r[1] for r in rows], crs="EPSG:32633")


def save(tmp_path: Path, data: gpd.GeoDataFrame, layer: str = "a") -> str:
    path = tmp_path / "labels.gpkg"
    data.to_file(path, layer=layer)
    return str(path)


def class_task(file: str, **labels: Any) -> Task:
    source = {"file": file, "column": "class", **labels}
    return Task.model_validate(
        {"name": "cover", "kind": "segmentation", "labels": source, "classes": "legend.csv"}
    )


def value_task(file: str, **keys: Any) -> Task:
    return Task.model_validate(
        {"name": "height", "kind": "regression", "labels": {"file": file, "column": "class"},
         "unit": "m", **keys}
    )  # fmt: skip


def edge_task(file: str) -> Task:
    return Task.model_validate({"name": "edges", "kind": "boundary", "labels": {"file": file}})


def burnable(values: list[float], shapes: list[Any]) -> gpd.GeoDataFrame:
    return gpd.GeoDataFrame({"value": values}, geometry=shapes, crs="EPSG:32633")


# ---------------------------------------------------------------------------------- reading


def test_reads_classes_of_any_crs(tmp_path: Path, grid: CampaignGrid) -> None:
    data = frame([("water", at(100, 100, 300, 300)), ("forest", at(500, 500, 600, 600))])
    labels, report = read_labels(class_task(save(tmp_path, data.to_crs(4326))), grid, LEGEND)
    assert labels["value"].tolist() == [1, 0]
    assert labels["label_id"].tolist() == [0, 1]
    assert labels.crs == grid.crs
    assert labels.area.to_numpy() == pytest.approx([40_000, 10_000], rel=1e-6)
    assert report["kept"] == report["rows"] == 2
    assert report["classes"]["water"] == {"labels": 1, "area_ha": 4.0}
    assert report["classes"]["farm"] == {"labels": 0, "area_ha": 0.0}


def test_every_rule_is_counted(tmp_path: Path, grid: CampaignGrid) -> None:
    twin, quarrel = at(0, 0, 100, 100), at(200, 0, 300, 100)
    bow_tie = Polygon([(X, Y + 400), (X + 80, Y + 480), (X + 80, Y + 400), (X, Y + 480)])
    data = frame(
        [
            ("forest", twin), ("forest", twin),  # a duplicate
            ("forest", quarrel), ("water", quarrel),  # a contradiction
            ("farm", at(400, 0, 600, 8)),  # a sliver, 8 m wide
            ("farm", at(900, 900, 1100, 1100)),  # across the AOI's edge
            ("farm", at(2000, 2000, 2100, 2100)),  # outside
            (None, at(600, 600, 700, 700)),  # no value
            ("airport", at(600, 600, 700, 700)),  # dropped on purpose
            ("wood", at(700, 700, 800, 800)),  # mapped
            ("water", bow_tie),  # repaired
            ("water", None),  # no geometry
        ]
    )  # fmt: skip
    task = class_task(save(tmp_path, data), mapping={"wood": "forest"}, drop=["airport", "sea"])
    labels, report = read_labels(task, grid, LEGEND)
    assert report["dropped"] == {
        "no_value": 1, "drop": 1, "no_geometry": 1, "outside_aoi": 1, "sliver": 1,
        "contradiction": 2, "duplicate": 1,
    }  # fmt: skip
    assert (report["repaired"], report["clipped"], report["kept"]) == (1, 1, 4)
    assert report["rows"] == report["kept"] + sum(report["dropped"].values())
    assert report["drop_not_found"] == ["sea"]
    by_id = labels.set_index("label_id")
    assert by_id.area[5] == pytest.approx(60 * 60)
    assert by_id.value[9] == 0
    assert by_id.area[10] == pytest.approx(2 * 80 * 40 / 2)
    assert labels.is_valid.all()


def test_duplicates_are_found_whatever_vertex_they_start_with(
    tmp_path: Path, grid: CampaignGrid
) -> None:
    ring = [(X, Y), (X + 100, Y), (X + 100, Y + 100), (X, Y + 100)]
    data = frame([("farm", Polygon(ring)), ("farm", Polygon(ring[2:] + ring[:2]))])
    _, report = read_labels(class_task(save(tmp_path, data)), grid, LEGEND)
    assert report["dropped"]["duplicate"] == 1


def test_of_dated_duplicates_the_latest_is_kept(tmp_path: Path, grid: CampaignGrid) -> None:
    same = at(0, 0, 100, 100)
    days = ["2021-03-01", "2023-05-06", "2022-01-01", None]
    data = frame([("farm", same)] * 4, day=days)
    labels, _ = read_labels(class_task(save(tmp_path, data), date_column="day"), grid, LEGEND)
    assert labels["date"].tolist() == ["2023-05-06"]
    assert labels["label_id"].tolist() == [1]


def test_boundaries_are_not_clipped_and_never_contradict(
    tmp_path: Path, grid: CampaignGrid
) -> None:
    across = at(900, 100, 1200, 300)
    data = frame([("x", across), ("y", across), ("z", at(0, 0, 100, 100))])
    labels, report = read_labels(edge_task(save(tmp_path, data)), grid)
    assert labels["value"].isna().all()
    assert (len(labels), report["clipped"], report["across_aoi_edge"]) == (2, 0, 2)
    assert labels.area.max() == pytest.approx(300 * 200)


def test_codes_read_as_floats_can_be_mapped(tmp_path: Path, grid: CampaignGrid) -> None:
    data = frame([(1.0, at(0, 0, 100, 100)), (None, at(200, 0, 300, 100))])
    task = class_task(save(tmp_path, data), mapping={"1": "farm"})
    labels, report = read_labels(task, grid, LEGEND)
    assert labels["value"].tolist() == [2]
    assert report["dropped"]["no_value"] == 1


def test_regression_points(tmp_path: Path, grid: CampaignGrid) -> None:
    data = frame([(12.5, Point(X + 55, Y + 55)), (3.0, Point(X + 2000, Y))])
    labels, report = read_labels(value_task(save(tmp_path, data), range=(0, 60)), grid)
    assert labels["value"].tolist() == [12.5]
    assert report["dropped"]["outside_aoi"] == 1


def failing(task: Task, grid: CampaignGrid, legend: Legend | None = LEGEND) -> LabelError:
    with pytest.raises(LabelError) as caught:
        read_labels(task, grid, legend)
    assert caught.value.where.startswith(f"task {task.name}")
    return caught.value


def test_unknown_classes_are_listed_with_counts(tmp_path: Path, grid: CampaignGrid) -> None:
    here = at(0, 0, 100, 100)
    names = ["lake", "lake", "heath", "farm"]
    error = failing(class_task(save(tmp_path, frame([(n, here) for n in names]))), grid)
    assert "'lake' (2), 'heath' (1)" in error.found
    assert "farm" not in error.found
    assert error.allowed == "forest, water, farm"
    assert "mapping" in error.fix
    assert "drop" in error.fix


def test_mapping_must_lead_into_the_legend(tmp_path: Path, grid: CampaignGrid) -> None:
    file = save(tmp_path, frame([("a", at(0, 0, 100, 100))]))
    assert "wood" in failing(class_task(file, mapping={"a": "wood"}), grid).found


def test_files_that_cannot_be_used(tmp_path: Path, grid: CampaignGrid) -> None:
    good = frame([("farm", at(0, 0, 100, 100))])
    assert "no such file" in failing(class_task(str(tmp_path / "no.gpkg")), grid).found
    file = save(tmp_path, good)
    no_layer = failing(class_task(file, layer="b"), grid)
    assert ("'b'" in no_layer.found) and no_layer.allowed == "a"
    no_column = failing(class_task(file, column="klass"), grid)
    assert "klass" in no_column.found
    assert no_column.allowed == "class"
    save(tmp_path, good, layer="b")
    assert "2 layers" in failing(class_task(file), grid).found
    assert read_labels(class_task(file, layer="b"), grid, LEGEND)[1]["layer"] == "b"
    text = tmp_path / "text.gpkg"
    text.write_text("nothing")
    assert "not a readable" in failing(class_task(str(text)), grid).found


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_no_crs_no_rows(tmp_path: Path, grid: CampaignGrid) -> None:
    shp = tmp_path / "plain.shp"
    frame([("farm", at(0, 0, 100, 100))]).set_crs(None, allow_override=True).to_file(shp)
    assert "no coordinate system" in failing(class_task(str(shp)), grid).found
    assert "no rows" in failing(class_task(save(tmp_path, frame([]))), grid).found


def test_all_outside_says_where_labels_and_aoi_are(tmp_path: Path, grid: CampaignGrid) -> None:
    file = save(tmp_path, frame([("farm", at(5000, 5000, 5100, 5100))]))
    error = failing(class_task(file), grid)
    assert "365000" in error.found
    assert "360000" in error.allowed


def test_wrong_values_and_types(tmp_path: Path, grid: CampaignGrid) -> None:
    here = at(0, 0, 100, 100)
    file = save(tmp_path, frame([(5.0, here), (70.0, here), (90.0, here)]))
    error = failing(value_task(file, range=(0, 60)), grid, None)
    assert error.found.startswith("2 values")
    assert "70 to 90" in error.found
    assert error.allowed == "0 to 60 m"
    file = save(tmp_path, frame([("tall", here)]))
    assert "'tall'" in failing(value_task(file), grid, None).found
    file = save(tmp_path, frame([("farm", LineString([(X, Y), (X + 9, Y)]))]))
    assert "LineString" in failing(class_task(file), grid).found
    file = save(tmp_path, frame([("farm", Point(X + 5, Y + 5))]))
    assert failing(edge_task(file), grid, None).allowed == "polygons"
    file = save(tmp_path, frame([("farm", here)], day=["soon"]))
    assert "'soon'" in failing(class_task(file, date_column="day"), grid).found


# ---------------------------------------------------------------------------------- burning


def test_pixel_centre_rule(grid: CampaignGrid) -> None:
    # Centres lie at 5, 15, 25 ... m: columns 0-1 are inside, column 2 (25 m) is not.
    burned = burn(burnable([2], [at(0, 0, 24, 16)]), grid.geobox, kind=TaskKind.SEGMENTATION)
    rows, cols = np.nonzero(burned.value != 255)
    assert sorted(set(cols)) == [0, 1]
    assert sorted(set(rows)) == [94, 95]
    assert burned.value.dtype == np.uint8
    assert burned.label[95, 0] == 0
    assert burned.label[0, 0] == NO_LABEL


def test_overlaps_that_disagree_are_ignored_and_agreeing_ones_go_to_the_smallest(
    grid: CampaignGrid,
) -> None:
    labels = burnable([0, 1, 0], [at(0, 0, 200, 200), at(100, 0, 300, 200), at(0, 0, 50, 50)])
    for order in ([0, 1, 2], [2, 1, 0]):
        mixed = labels.iloc[order].reset_index(drop=True)
        burned = burn(mixed, grid.geobox, kind=TaskKind.SEGMENTATION)
        assert burned.conflict.sum() == 10 * 20
        assert (burned.value == 0).sum() == 10 * 20
        assert (burned.value == 1).sum() == 10 * 20
        assert np.all(burned.label[burned.conflict] == NO_LABEL)
        assert (burned.label == order.index(2)).sum() == 25
        assert np.array_equal(burned.value != 255, burned.label != NO_LABEL)


def test_erosion_leaves_a_ring_and_keeps_what_would_vanish(grid: CampaignGrid) -> None:
    shapes = [at(0, 0, 200, 200), at(400, 0, 440, 40)]
    burned = burn(burnable([0, 1], shapes), grid.geobox, kind=TaskKind.SEGMENTATION, erode_m=20)
    assert (burned.value == 0).sum() == 16 * 16
    assert (burned.value == 1).sum() == 4 * 4
    assert burned.conflict.sum() == 0
    cores, whole = eroded(np.array(shapes, dtype=object), 20)
    assert whole.tolist() == [False, True]
    assert cores[0].area == pytest.approx(160 * 160)


def test_erosion_does_not_hide_a_contradiction(grid: CampaignGrid) -> None:
    shapes = [at(0, 0, 200, 200), at(150, 0, 400, 200)]
    burned = burn(burnable([0, 1], shapes), grid.geobox, kind=TaskKind.SEGMENTATION, erode_m=60)
    assert burned.conflict.sum() == 5 * 20
    assert not np.any(burned.conflict & (burned.value != 255))


def test_regression_values(grid: CampaignGrid) -> None:
    shapes = [at(0, 0, 100, 100), at(50, 0, 150, 100), Point(X + 5, Y + 5), Point(X + 6, Y + 6)]
    burned = burn(burnable([3, 4, 10, 20], shapes), grid.geobox, kind=TaskKind.REGRESSION)
    assert burned.value.dtype == np.float32
    assert burned.value[95, 0] == 15  # the mean of the points goes before the polygon
    assert burned.label[95, 0] == 2
    assert burned.value[95, 1] == 3
    assert burned.value[95, 14] == 4
    assert np.isnan(burned.value[95, 7])
    assert burned.conflict.sum() == 50


def test_edge_target(grid: CampaignGrid) -> None:
    # Outline at x = 205 m and x = 505 m: pixel centres, so columns 20 and 50 are the outline.
    labels = burnable([np.nan], [at(205, 205, 505, 505)])
    burned = burn(labels, grid.geobox, kind=TaskKind.BOUNDARY)
    row = burned.value[60]
    ramp = [np.nan, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]
    assert row[17:24].tolist() == pytest.approx(ramp, nan_ok=True)
    assert np.all(row[23:48] == 0)
    assert np.all(np.isnan(row[:18]))
    assert np.all(np.isnan(row[54:]))
    assert np.array_equal(np.isfinite(burned.value), burned.label == 0)
    reach = np.flatnonzero(np.isfinite(row))
    assert reach[0] > 20 - EDGE_WIDTH_PX
    assert reach[-1] < 50 + EDGE_WIDTH_PX


def test_interior_far_from_every_edge_is_known(grid: CampaignGrid) -> None:
    labels = burnable([np.nan], [at(-5000, -5000, 5000, 5000)])
    burned = burn(labels, grid.geobox, kind=TaskKind.BOUNDARY)
    assert np.all(burned.value == 0)
    assert np.all(burned.label == 0)


@pytest.mark.parametrize("kind", list(TaskKind))
def test_tiles_give_the_pixels_of_the_whole(kind: TaskKind, grid: CampaignGrid) -> None:
    rng = np.random.default_rng(3)
    shapes: list[Any] = []
    for _ in range(60):
        x, y = rng.uniform(-50, 960, 2)
        shapes.append(Point(X + x, Y + y).buffer(rng.uniform(10, 120), quad_segs=3))
    if kind is not TaskKind.BOUNDARY:
        shapes += [Point(X + x, Y + y) for x, y in rng.uniform(0, 960, (30, 2))]
    labels = burnable(list(rng.integers(0, 3, len(shapes)).astype(float)), shapes)
    whole = burn(labels, grid.geobox, kind=kind, erode_m=15)
    assert len(grid.tiles()) == 4
    for tile in grid.tiles():
        part = burn(labels, tile.geobox, kind=kind, erode_m=15)
        here = window_of(tile.geobox, grid.geobox)
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[here])


@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_window_without_labels_is_empty(kind: TaskKind, grid: CampaignGrid) -> None:
    labels = burnable([1], [MultiPolygon([at(5000, 5000, 5100, 5100)])])
    burned = burn(labels, grid.geobox, kind=kind)
    assert np.all(burned.label == NO_LABEL)
    assert (
        np.all(burned.value == 255)
        if kind is TaskKind.SEGMENTATION
        else np.all(np.isnan(burned.value))
    )
