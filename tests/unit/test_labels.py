"""Reading labels and burning them: every rule is counted, every error names its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import GeometryCollection, LineString, MultiPolygon, Point, Polygon, box

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.config.load import parse_campaign
from terraloom.errors import ConfigError, LabelError
from terraloom.grid import CampaignGrid, window_of
from terraloom.labels.align import align_labels, read_aligned
from terraloom.labels.folds import overlap_groups
from terraloom.labels.rasterise import EDGE_WIDTH_PX, NO_LABEL, Burned, burn, coverage, eroded
from terraloom.labels.read import read_labels
from terraloom.legend import Legend, read_legend

LEGEND = Legend((1, 2, 3), ("forest", "water", "farm"), ("#000000", "#000001", "#000002"))
X, Y = 360_000.0, 5_700_000.0  # lower left corner of the grid, on the 60 m lattice


def at(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """A box in metres from the grid's lower left corner."""
    return box(X + x0, Y + y0, X + x1, Y + y1)


#: A label of a second class, far from the others.
OTHER = ("water", at(800, 800, 900, 900))


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
        "contradiction": 2, "superseded": 0, "duplicate": 1,
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
    data = frame([("farm", Polygon(ring)), ("farm", Polygon(ring[2:] + ring[:2])), OTHER])
    _, report = read_labels(class_task(save(tmp_path, data)), grid, LEGEND)
    assert report["dropped"]["duplicate"] == 1


def test_of_dated_duplicates_the_latest_is_kept(tmp_path: Path, grid: CampaignGrid) -> None:
    same = at(0, 0, 100, 100)
    days = ["2021-03-01", "2023-05-06", "2022-01-01", None]
    data = frame([*[("farm", same)] * 4, OTHER], day=[*days, None])
    labels, _ = read_labels(class_task(save(tmp_path, data), date_column="day"), grid, LEGEND)
    assert labels["date"].tolist() == ["2023-05-06", None]
    assert labels["label_id"].tolist() == [1, 4]


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
    data = frame(
        [(1.0, at(0, 0, 100, 100)), (None, at(200, 0, 300, 100)), (2.0, at(400, 0, 500, 90))]
    )
    task = class_task(save(tmp_path, data), mapping={"1": "farm", "2": "water"})
    labels, report = read_labels(task, grid, LEGEND)
    assert labels["value"].tolist() == [2, 1]
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
    good = frame([("farm", at(0, 0, 100, 100)), OTHER])
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
    file = save(tmp_path, frame([("farm", GeometryCollection([here]))]))
    assert "GeometryCollection" in failing(class_task(file), grid).found
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
        for a, b in zip(part[:3], whole[:3], strict=True):
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


# ---------------------------------------------------------------------------------- other sources


def save_raster(tmp_path: Path, values: Any, left: float, top: float, res: float, **kw: Any) -> str:
    path = tmp_path / "labels.tif"
    profile = {"crs": "EPSG:32633", "nodata": 0, **kw}
    bands = np.atleast_3d(np.asarray(values).T).T
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2],
        dtype=bands.dtype, transform=Affine(res, 0, left, 0, -res, top), **profile,
    ) as dst:  # fmt: skip
        dst.write(bands)
    return str(path)


def raster_task(file: str, **labels: Any) -> Task:
    return class_task(file, column=None, **labels)


def save_table(tmp_path: Path, text: str) -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_lines_are_strips_of_the_stated_width(tmp_path: Path, grid: CampaignGrid) -> None:
    road = LineString([(X + 100, Y + 100), (X + 500, Y + 400)])
    data = frame([("farm", road), OTHER])
    labels, report = read_labels(
        class_task(save(tmp_path, data), line_width_m=8), grid, LEGEND
    )  # fmt: skip
    assert report["lines"] == 1
    assert report["dropped"]["sliver"] == 0, "a strip is as narrow as it was asked for"
    assert labels.area[0] == pytest.approx(500 * 8)
    shares = burn(
        labels, grid.geobox, kind=TaskKind.SEGMENTATION, policy="fractions", classes=3
    ).shares  # fmt: skip
    assert shares is not None
    assert shares[2].sum() * 100 == pytest.approx(500 * 8, rel=1e-4)


def test_raster_codes_become_the_same_pixels_again(tmp_path: Path, grid: CampaignGrid) -> None:
    codes = np.random.default_rng(2).integers(0, 4, (96, 96)).astype(np.uint8)
    codes[20:70, 30:90] = 3
    task = raster_task(save_raster(tmp_path, codes, X, Y + 960, 10))
    labels, report = read_labels(task, grid, LEGEND, block_m=320)
    burned = burn(labels, grid.geobox, kind=TaskKind.SEGMENTATION)
    assert np.array_equal(np.where(burned.value == 255, 0, burned.value + 1), codes)
    assert report["pixels"] == (codes > 0).sum()
    assert burned.conflict.sum() == 0
    # The large region is cut where the blocks of the folds meet, never inside a pixel.
    assert labels.bounds.eval("maxx - minx").max() <= 320 + 1e-6
    assert sum(overlap_groups(labels) == np.arange(len(labels))) == len(labels)


def test_raster_edges_on_pixel_centres_neither_grow_nor_quarrel(
    tmp_path: Path, grid: CampaignGrid
) -> None:
    codes = np.random.default_rng(4).integers(1, 4, (20, 20)).astype(np.uint8)
    task = raster_task(save_raster(tmp_path, codes, X + 105, Y + 855, 30))
    labels, _ = read_labels(task, grid, LEGEND)
    burned = burn(labels, grid.geobox, kind=TaskKind.SEGMENTATION)
    assert burned.conflict.sum() == 0
    assert [(burned.value == k).sum() for k in range(3)] == [9 * (codes == k + 1).sum()
                                                             for k in range(3)]  # fmt: skip


def test_raster_of_another_crs_has_no_overlaps(tmp_path: Path, grid: CampaignGrid) -> None:
    codes = np.ones((40, 60), dtype=np.int16)
    codes[10:30, 20:40] = 7
    w, s, _, n = gpd.GeoSeries([at(0, 0, 960, 960)], crs=32633).to_crs(4326).total_bounds
    file = save_raster(tmp_path, codes, w - 0.002, n + 0.002, (n - s) / 30, crs="EPSG:4326")
    task = raster_task(file, mapping={"7": "farm"})
    labels, _ = read_labels(task, grid, LEGEND, block_m=240)
    assert set(labels["value"]) == {0, 2}
    assert len(labels) > 16
    assert len(set(overlap_groups(labels))) == len(labels), "blocks would chain into one fold"
    assert labels.union_all().area == pytest.approx(labels.area.sum(), rel=1e-9)


def test_values_of_a_raster(tmp_path: Path, grid: CampaignGrid) -> None:
    values = np.array([[1.5, np.nan], [-9.0, 4.0]], dtype=np.float32)
    file = save_raster(tmp_path, values, X, Y + 960, 20, nodata=-9)
    keys = {"labels": {"file": file, "date": "2020-07-01"}}
    labels, report = read_labels(value_task(file, **keys), grid)
    burned = burn(labels, grid.geobox, kind=TaskKind.REGRESSION)
    assert np.all(burned.value[:2, :2] == 1.5) and np.all(burned.value[2:4, 2:4] == 4)
    assert np.isfinite(burned.value).sum() == 8
    assert set(labels["date"]) == {"2020-07-01"}
    assert (report["pixels"], report["pixels_without_value"]) == (2, 2)
    error = failing(value_task(file, range=(0, 3), **keys), grid, None)
    assert error.found == "1 values of the raster are out of range: 4 to 4"
    assert error.allowed == "0 to 3 m"
    assert "range" in error.fix


def test_rasters_that_cannot_be_used(
    tmp_path: Path, grid: CampaignGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = np.ones((10, 10), dtype=np.uint8)
    good[0, 0] = 2
    two = failing(raster_task(save_raster(tmp_path, [good, good], X, Y + 960, 10)), grid)
    assert "2 bands" in two.found
    far = failing(raster_task(save_raster(tmp_path, good, X + 9000, Y, 10)), grid)
    assert "outside the AOI" in far.found and "360000" in far.allowed
    empty = failing(raster_task(save_raster(tmp_path, good * 0, X, Y + 960, 10)), grid)
    assert "none of the raster's 100 pixels" in empty.found and "nodata" in empty.fix
    file = save_raster(tmp_path, good, X, Y + 960, 10)
    assert "no date column" in failing(raster_task(file, date_column="d"), grid).found
    unknown = failing(raster_task(save_raster(tmp_path, good + 5, X, Y + 960, 10)), grid)
    assert "the raster has classes the legend does not know: '6' (1), '7' (1)" in unknown.found
    assert unknown.allowed == "forest, water, farm, 1, 2, 3"
    monkeypatch.setattr("terraloom.labels.sources._VALUES", 50)
    file = save_raster(tmp_path, good.astype(np.float32), X, Y + 960, 10)
    many = failing(value_task(file, labels={"file": file}), grid, None)
    assert "100 m pixels" in many.found and many.allowed == "50 or fewer" and "AOI" in many.fix


def test_a_table_of_series_has_one_label_per_place(tmp_path: Path, grid: CampaignGrid) -> None:
    text = (
        "x,y,klass,day,ndvi,plot\n"
        f"{X + 105},{Y + 105},farm,2020-03-01,.2,a\n"
        f"{X + 105},{Y + 105},farm,2020-09-01,.8,a\n"
        f"{X + 105},{Y + 105},farm,2020-06-01,.7,a\n"
        f"{X + 505},{Y + 505},water,2020-06-01,.1,\n"
        f"{X + 505},,water,2020-06-01,.1,\n"
        f"{X + 705},{Y + 505},farm,2020,.1,NA\n"
    )
    source = {
        "column": "klass", "x_column": "x", "y_column": "y", "crs": "EPSG:32633",
        "date_column": "day", "group_column": "plot",
    }  # fmt: skip
    labels, report = read_labels(class_task(save_table(tmp_path, text), **source), grid, LEGEND)
    assert labels["label_id"].tolist() == [0, 3, 5]
    assert labels["value"].tolist() == [2, 1, 2]
    assert labels["date"].tolist() == ["2020-03-01", "2020-06-01", "2020-01-01"]
    assert labels["date_end"].tolist() == ["2020-09-01", None, "2020-12-31"]
    assert labels["group"].tolist() == ["a", None, "NA"], "NA is a name as any other"
    assert (report["table_rows"], report["rows"], report["dropped"]["no_geometry"]) == (6, 4, 1)
    assert labels.geometry[0].coords[0] == (X + 105, Y + 105)


def test_tables_that_cannot_be_used(tmp_path: Path, grid: CampaignGrid) -> None:
    file = save_table(tmp_path, "lon;lat;class\n1;2;farm\n")
    error = failing(class_task(file), grid)
    assert error.allowed == "lon;lat;class", "the separator is seen"
    file = save_table(tmp_path, "longitude,latitude,class\n52.5,113.1,farm\n")
    swapped = failing(class_task(file), grid)
    assert "no latitude" in swapped.found and "exchange" in swapped.fix
    file = save_table(tmp_path, 'longitude,latitude,class\n"13,1",52.5,farm\n')
    assert "'13,1'" in failing(class_task(file), grid).found
    assert "not a readable table" in failing(class_task(save_table(tmp_path, "")), grid).found


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_the_crs_of_a_file_without_one(tmp_path: Path, grid: CampaignGrid) -> None:
    shp = tmp_path / "plain.shp"
    data = frame([("farm", at(0, 0, 100, 100)), OTHER])
    data.set_crs(None, allow_override=True).to_file(shp)
    labels, report = read_labels(class_task(str(shp), crs="EPSG:32633"), grid, LEGEND)
    assert (len(labels), report["crs"]) == (2, "EPSG:32633")
    assert "no coordinate system" in failing(class_task(str(shp), crs="EPSG:0"), grid).found
    error = failing(class_task(save(tmp_path, data), crs="EPSG:25833"), grid)
    assert error.found == "the file states EPSG:32633, the campaign EPSG:25833"


# ---------------------------------------------------------------------------------- dates


def test_dates_ranges_years(tmp_path: Path, grid: CampaignGrid) -> None:
    shapes = [("farm", at(0, 0, 100, 100)), ("farm", at(200, 0, 300, 100)), OTHER]
    file = save(tmp_path, frame(shapes, a=[2019, 2020, 2021], b=["2019-02", None, "2021-06-05"]))
    labels, _ = read_labels(class_task(file, date_column="a", date_end_column="b"), grid, LEGEND)
    assert labels["date"].tolist() == ["2019-01-01", "2020-01-01", "2021-01-01"]
    assert labels["date_end"].tolist() == ["2019-02-28", None, "2021-06-05"]
    labels, _ = read_labels(class_task(file, date="1999-11-18"), grid, LEGEND)
    assert set(labels["date"]) == {"1999-11-18"} and set(labels["date_end"]) == {None}
    file = save(tmp_path, frame(shapes, a=["2020-05-01"] * 3, b=["2021-01-01", "2019-01-01", None]))
    error = failing(class_task(file, date_column="a", date_end_column="b"), grid)
    assert error.found.startswith("1 labels end before they begin, e.g. row 1")


@pytest.mark.parametrize(
    ("days", "dropped"),
    [
        (["2015", "2019"], {"superseded": 1, "contradiction": 0}),
        (["2015", None], {"superseded": 0, "contradiction": 2}),
        (["2019", "2019-05-01"], {"superseded": 0, "contradiction": 2}),
    ],
)
def test_a_later_label_that_disagrees_is_a_change(
    days: list[str | None], dropped: dict[str, int], tmp_path: Path, grid: CampaignGrid
) -> None:
    same = at(0, 0, 100, 100)
    more = ("forest", at(400, 400, 500, 500))
    data = frame([("farm", same), ("water", same), OTHER, more], d=[*days, None, None])
    labels, report = read_labels(class_task(save(tmp_path, data), date_column="d"), grid, LEGEND)
    assert {k: report["dropped"][k] for k in dropped} == dropped
    if dropped["superseded"]:
        assert labels["value"].tolist()[0] == 1


# ---------------------------------------------------------------------------------- hierarchy


def legend_file(tmp_path: Path, *rows: str, head: str = "code,name,color,parent") -> Path:
    path = tmp_path / "legend.csv"
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_legend_with_broader_classes(tmp_path: Path) -> None:
    path = legend_file(
        tmp_path, "1,pine,#000001,trees", "2,oak,#000002,trees", "3,trees wet,#000003,",
        "4,wheat,#000004,cereals", "5,cereals,#000005,crops", "6,lake,#000006,water",
    )  # fmt: skip
    legend = read_legend(path)
    # `cereals` is a class itself; `crops` stands for it and for what is below it.
    assert legend.broader == {"trees": (0, 1), "crops": (3, 4), "water": (5,)}
    assert read_legend(legend_file(tmp_path, "1,a,#000001", "2,b,#000002",
                                   head="code,name,color")).broader == {}  # fmt: skip
    loop = legend_file(tmp_path, "1,a,#000001,b", "2,b,#000002,a")
    with pytest.raises(ConfigError, match="a < b < a"):
        read_legend(loop)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (["1,a,#000001,", "1,b,#000002,"], "code 1 of a, b"),
        (["1,a,#000001,", "2,a,#000002,"], "name a of a, a"),
        (["1,a,#0000AA,", "2,b,#0000aa,", "3,c,#00000c,"], "color #0000aa of a, b"),
    ],
)
def test_a_legend_with_doubles_names_them(rows: list[str], found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_legend(legend_file(tmp_path, *rows))
    assert found in caught.value.found
    assert caught.value.where.endswith("legend.csv")
    assert "another" in caught.value.allowed and "join" in caught.value.fix


BROAD = Legend(
    (1, 2, 3), ("forest", "water", "farm"), ("#000000", "#000001", "#000002"),
    {"green": (0, 2), "wet": (1,)},
)  # fmt: skip


def test_broader_labels(tmp_path: Path, grid: CampaignGrid) -> None:
    data = frame(
        [("green", at(0, 0, 200, 200)), ("wet", at(300, 0, 400, 100)),
         ("farm", at(0, 0, 100, 200)), ("soft green", at(500, 500, 600, 600))]
    )  # fmt: skip
    file, mapping = save(tmp_path, data), {"soft green": "green"}
    labels, report = read_labels(class_task(file, mapping=mapping), grid, BROAD)
    assert report["dropped"]["coarse"] == 2
    assert labels["value"].tolist() == [1, 2], "a broader class of one class is that class"
    task = class_task(file, mapping=mapping, policy="fractions", soft=True)
    labels, report = read_labels(task, grid, BROAD)
    assert labels["value"].tolist() == [-1, 1, 2, -1]
    assert report["classes"]["green"] == {"labels": 2, "area_ha": 5.0}
    children = [b["classes"] for b in report["broader"]]
    assert children == [[0, 2], [1]]
    burned = burn(
        labels, grid.geobox, kind=TaskKind.SEGMENTATION, policy="fractions", soft=True,
        classes=3, children=children,
    )  # fmt: skip
    assert burned.shares is not None
    # The finer label takes its ground; what is left of the broader one is spread evenly.
    assert burned.shares[:, 95, 0].tolist() == [0, 0, 1]
    assert burned.shares[:, 95, 15].tolist() == [0.5, 0, 0.5]
    assert burned.label[95, 0] == 2 and burned.label[95, 15] == 0
    assert burned.conflict.sum() == 0
    hard = burn(labels, grid.geobox, kind=TaskKind.SEGMENTATION)
    assert np.array_equal(np.unique(hard.value), [1, 2, 255]), "no broader class as a class"


# ---------------------------------------------------------------------------------- policies


def fractions(labels: gpd.GeoDataFrame, geobox: GeoBox, **keys: Any) -> Burned:
    kind = TaskKind.SEGMENTATION
    burned = burn(labels, geobox, kind=kind, policy="fractions", classes=3, **keys)
    assert burned.shares is not None and burned.shares.dtype == np.float32
    return burned


def test_coverage_is_exact() -> None:
    # The published example of exactextract: 3 x 3 cells, a square from .5 to 2.5.
    box3 = GeoBox((3, 3), Affine(1, 0, 0, 0, -1, 3), "EPSG:32633")
    of, pixel, share = coverage(np.array([box(0.5, 0.5, 2.5, 2.5)], dtype=object), box3)
    assert of.tolist() == [0] * 9 and pixel.tolist() == list(range(9))
    assert share.tolist() == [0.25, 0.5, 0.25, 0.5, 1, 0.5, 0.25, 0.5, 0.25]
    assert share.sum() == 4


def test_area_by_policy(grid: CampaignGrid) -> None:
    rng = np.random.default_rng(11)
    # Disjoint polygons, each in its own cell of 60 m.
    shapes = [
        Point(X + 60 * i + 30 + dx, Y + 60 * j + 30 + dy).buffer(r, quad_segs=int(q))
        for i in range(16) for j in range(16)
        for dx, dy, r, q in [(*rng.uniform(-4, 4, 2), rng.uniform(6, 24), rng.integers(1, 5))]
    ]  # fmt: skip
    labels = burnable([1.0] * len(shapes), shapes)
    area = labels.area.sum() / 100
    seg = TaskKind.SEGMENTATION
    centre = (burn(labels, grid.geobox, kind=seg).value == 1).sum()
    touched = (burn(labels, grid.geobox, kind=seg, policy="all_touched").value == 1).sum()
    exact = fractions(labels, grid.geobox).shares[1].sum()
    assert centre == pytest.approx(area, rel=0.02)
    assert touched > 1.4 * area
    assert exact == pytest.approx(area, rel=1e-4)


def test_rare_classes_survive_coarsening() -> None:
    """A class of 20 % in random dots: gone by majority at 5 x, kept by shares."""
    rng = np.random.default_rng(5)
    dots = rng.uniform(size=(100, 100)) < 0.2
    cells = [at(10 * c, 1000 - 10 * r - 10, 10 * c + 10, 1000 - 10 * r)
             for r in range(100) for c in range(100)]  # fmt: skip
    labels = burnable(list(dots.ravel().astype(float)), cells)
    coarse = GeoBox((20, 20), Affine(50, 0, X, 0, -50, Y + 1000), "EPSG:32633")
    burned = fractions(labels, coarse)
    assert (burned.value == 1).mean() < 0.01
    assert burned.shares[1].mean() == pytest.approx(dots.mean(), abs=1e-5)
    blocks = dots.reshape(20, 5, 20, 5).mean(axis=(1, 3))
    assert burned.shares[1] == pytest.approx(blocks, abs=2e-5)


def test_purity_and_soft(grid: CampaignGrid) -> None:
    # Pixels of the column 0: 40 % forest and 35 % water.
    labels = burnable([0, 1], [at(0, 0, 4, 100), at(4, 0, 7.5, 100)])
    assert np.all(fractions(labels, grid.geobox).value == 255)
    assert (fractions(labels, grid.geobox, min_purity=0.4).value == 0).sum() == 10
    soft = fractions(labels, grid.geobox, soft=True)
    assert (soft.value == 0).sum() == 10 and soft.label[90, 0] == 0
    assert soft.shares[:, 90, 0] == pytest.approx([0.4, 0.35, 0], abs=1e-4)
    assert np.all(fractions(labels, grid.geobox, soft=True, min_purity=0.8).value == 255)
    tie = burnable([0, 1], [at(0, 0, 5, 100), at(5, 0, 10, 100)])
    assert np.all(fractions(tie, grid.geobox).value == 255), "half and half is no class"


def test_shares_where_labels_overlap(grid: CampaignGrid) -> None:
    labels = burnable(
        [0, 0, 0, 1], [at(0, 0, 100, 100), at(0, 0, 100, 100), at(50, 0, 150, 100),
                       at(140, 0, 300, 100)],
    )  # fmt: skip
    burned = fractions(labels, grid.geobox)
    assert burned.shares[0, 90, :14].tolist() == [1] * 14, "twice one class counts once"
    assert burned.shares[:, 90, 14].tolist() == [0, 0, 0], "ground in dispute is of no class"
    assert burned.conflict.sum() == 10 and burned.conflict[90, 14]
    assert burned.value[90, 15] == 1
    with_points = burnable(
        [0, 1, 2, 2, 1],
        [at(0, 0, 100, 100), Point(X + 5, Y + 5), Point(X + 505, Y + 505),
         Point(X + 506, Y + 506), Point(X + 506, Y + 605)],
    )  # fmt: skip
    burned = fractions(with_points, grid.geobox)
    assert burned.conflict[95, 0] and burned.value[95, 0] == 255
    assert burned.value[45, 50] == 2 and burned.label[45, 50] == 2
    assert burned.value[35, 50] == 1
    assert burned.conflict.sum() == 1


@pytest.mark.parametrize("policy", ["all_touched", "fractions"])
def test_policies_give_the_pixels_of_the_whole(policy: Any, grid: CampaignGrid) -> None:
    rng = np.random.default_rng(9)
    shapes: list[Any] = [
        Point(X + x, Y + y).buffer(r, quad_segs=3)
        for x, y, r in zip(*rng.uniform(-50, 960, (2, 80)), rng.uniform(5, 90, 80), strict=True)
    ]
    shapes += [Point(X + x, Y + y) for x, y in rng.uniform(0, 960, (40, 2))]
    labels = burnable(list(rng.integers(0, 3, len(shapes)).astype(float)), shapes)
    keys = {"kind": TaskKind.SEGMENTATION, "policy": policy, "classes": 3, "erode_m": 4}
    whole = burn(labels, grid.geobox, **keys)
    assert (whole.value < 3).any() and whole.conflict.any()
    for tile in grid.tiles():
        part, here = burn(labels, tile.geobox, **keys), window_of(tile.geobox, grid.geobox)
        for a, b in zip(part[:3], whole[:3], strict=True):
            np.testing.assert_array_equal(a, b[here])
        if part.shares is not None and whole.shares is not None:
            np.testing.assert_array_equal(part.shares, whole.shares[(slice(None), *here)])


def test_shares_need_classes(grid: CampaignGrid) -> None:
    labels = burnable([1], [at(0, 0, 50, 50)])
    with pytest.raises(LabelError, match="segmentation"):
        burn(labels, grid.geobox, kind=TaskKind.REGRESSION, policy="fractions", classes=3)


# ---------------------------------------------------------------------------------- bad labels


def test_one_class_only_is_named(tmp_path: Path, grid: CampaignGrid) -> None:
    file = save(tmp_path, frame([("farm", at(0, 0, 99, 99)), ("farm", at(200, 0, 300, 99))]))
    error = failing(class_task(file), grid)
    assert error.found == "all 2 labels are of one class, 'farm'"
    assert error.allowed == "labels of two classes or more"
    assert "tasks.cover.labels.mapping" in error.fix


def test_no_label_left_says_why(tmp_path: Path, grid: CampaignGrid) -> None:
    data = frame([("farm", at(0, 0, 99, 5)), (None, at(200, 0, 300, 99))])
    error = failing(class_task(save(tmp_path, data)), grid)
    assert error.found == "no label is left of 2: 1 no_value, 1 sliver"
    assert error.allowed and error.fix


# ---------------------------------------------------------------------------------- alignment


def campaign_of(file: str, **labels: Any) -> Campaign:
    source = {"file": file, "column": "class", **labels}
    return parse_campaign(
        {
            "name": "test", "title": "Test",
            "aoi": {"bbox": [X, Y, X + 960, Y + 960], "crs": "EPSG:32633"},
            "grid": {"crs": "EPSG:32633", "tile_px": 96},
            "sources": [{"source": "s2_l1c"}],
            "cube": {"periods": [{"name": "one", "start": "2023-01-01", "end": "2023-12-31"}]},
            "tasks": [{"name": "cover", "kind": "segmentation", "classes": "legend.csv",
                       "labels": source}],
            "folds": {"count": 2, "block_m": 240},
        }
    )  # fmt: skip


def test_aligned_labels_and_what_the_grid_makes_of_them(tmp_path: Path, grid: CampaignGrid) -> None:
    rows = [
        (BROAD.names[(i + j) % 3], at(240 * i + 20, 240 * j + 20, 240 * i + 94, 240 * j + 94))
        for i in range(4) for j in range(4)
    ]  # fmt: skip
    rows.append(("green", at(150, 150, 200, 200)))
    groups = [f"farm {i}" for i in range(16)] + [None]
    file = save(tmp_path, frame(rows, owner=groups))
    keys = {
        "policy": "fractions", "soft": True, "date": "2021-05-01", "group_column": "owner"
    }  # fmt: skip
    report = align_labels(campaign_of(file, **keys), grid, BROAD, tmp_path / "out")
    cover = report["tasks"]["cover"]
    # 74 m are 7.4 pixels: rows and columns of 40 % are below the half that a label needs.
    assert cover["grid"]["labelled_px"] == 16 * 49 + 25
    assert cover["grid"]["lost_pct"] == pytest.approx(
        100 * (1 - (16 * 49 + 25) / (16 * 54.76 + 25)), abs=0.01
    )
    assert set(cover["grid"]["lost_pct_by_class"]) == {"forest", "water", "farm"}
    assert cover["grid"]["conflict_px"] == 0
    labels, again = read_aligned(tmp_path / "out", grid)
    assert again["tasks"]["cover"]["broader"][0] == {"name": "green", "classes": [0, 2]}
    assert labels["class"].tolist()[-1] == "green"
    assert labels["stratum"].tolist()[-1] == 0
    assert labels["group"].tolist()[0] == "farm 0" and pd.isna(labels["group"].iloc[-1])
    assert set(labels["date"]) == {"2021-05-01"}
    assert labels["date_end"].isna().all()


def test_labels_that_no_pixel_can_show(tmp_path: Path, grid: CampaignGrid) -> None:
    # Wider than a pixel, but across pixel edges: no class covers 95 % of any pixel.
    rows = [("farm", at(6, 6, 19, 19)), ("water", at(506, 506, 519, 519))]
    file = save(tmp_path, frame(rows))
    with pytest.raises(LabelError) as caught:
        align_labels(
            campaign_of(file, policy="fractions", min_purity=0.95), grid, LEGEND, tmp_path / "out"
        )  # fmt: skip
    assert "none of the 2 labels labels a pixel of 10 m" in caught.value.found
    assert caught.value.where.startswith("task cover")
    assert "min_purity" in caught.value.fix
