"""Chips: windows, folds of pixels, labels under cloud, and files that are the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
import xarray as xr
from shapely import Point, Polygon, box

from terraloom.aoi import campaign_grid
from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.errors import CoverageError, StateError
from terraloom.grid import CampaignGrid, window_of
from terraloom.io import read_json, read_store, sha256, write_store
from terraloom.labels.align import align_labels
from terraloom.labels.chips import (
    NO_FOLD,
    _burn_tile,
    _Tally,
    chip_windows,
    cut_chips,
)
from terraloom.labels.folds import FoldMap
from terraloom.legend import IGNORE_INDEX, Legend
from terraloom.preprocess.reasons import Reason

# The names are not in alphabetical order: their order must survive the files.
LEGEND = Legend((1, 2, 3), ("water", "farm", "bog"), ("#000000", "#000001", "#000002"))
Clear = tuple[xr.Dataset, dict[str, Any], Path]
FACTS = {"kind": "optical", "unit": "reflectance", "roles": '{"SR_B4": "B04"}'}
X, Y = 360_000.0, 5_700_000.0  # lower left corner
W, H = 2880, 1920  # metres: tiles of 1920 m, so that the right ones are 96 px wide


def at(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return box(X + x0, Y + y0, X + x1, Y + y1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels")


@pytest.fixture(scope="module")
def campaign(folder: Path) -> Campaign:
    rng = np.random.default_rng(4)
    shapes, names = [], []
    for k, (x, y) in enumerate((x, y) for x in range(0, W, 240) for y in range(0, H, 240)):
        shapes.append(at(x + 40, y + 40, x + 200, y + 200))
        names.append(LEGEND.names[k % 3])
    cover = gpd.GeoDataFrame({"name": names}, geometry=shapes, crs="EPSG:32633")
    cover.to_file(folder / "cover.gpkg")
    cover.iloc[::2].to_file(folder / "parcels.gpkg")
    points = [Point(X + x, Y + y) for x, y in zip(*rng.uniform(0, 1900, (2, 40)), strict=True)]
    heights = gpd.GeoDataFrame({"m": rng.uniform(0, 30, 40)}, geometry=points, crs="EPSG:32633")
    heights.to_file(folder / "heights.gpkg")
    return parse_campaign(
        {
            "name": "test", "title": "Test",
            "aoi": {"bbox": [X, Y, X + W, Y + H], "crs": "EPSG:32633"},
            "grid": {"crs": "EPSG:32633", "tile_px": 192},
            "sources": [{"source": "s2_l1c"}],
            "cube": {"periods": [{"name": "one", "start": "2023-01-01", "end": "2023-12-31"}]},
            "tasks": [
                {"name": "edges", "kind": "boundary",
                 "labels": {"file": str(folder / "parcels.gpkg")}},
                {"name": "cover", "kind": "segmentation", "classes": "legend.csv",
                 "labels": {"file": str(folder / "cover.gpkg"), "column": "name"}},
                {"name": "height", "kind": "regression", "unit": "m",
                 "labels": {"file": str(folder / "heights.gpkg"), "column": "m"}},
            ],
            "folds": {"count": 3, "block_m": 480},
            "chips": {"size_px": 144},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def grid(campaign: Campaign) -> CampaignGrid:
    return campaign_grid(campaign)


def pixel_number(grid: CampaignGrid, geobox: Any) -> np.ndarray[Any, Any]:
    """Number of each pixel of the grid: an input that is its own coordinate."""
    rows, cols = window_of(geobox, grid.geobox)
    number = np.arange(rows.start, rows.stop)[:, None] * 1000.0
    return (number + np.arange(cols.start, cols.stop)).astype(np.float32)


def write_cubes(grid: CampaignGrid, folder: Path, cloud: Polygon | None = None) -> None:
    for tile in grid.tiles():
        x = pixel_number(grid, tile.geobox)
        reasons = np.zeros(x.shape, np.uint8)
        if cloud is not None:
            b = tile.geobox.boundingbox
            h, w = x.shape
            px = b.left + 5 + 10 * np.arange(w)
            py = b.top - 5 - 10 * np.arange(h)
            x0, y0, x1, y1 = cloud.bounds
            hit = ((px > x0) & (px < x1))[None] & ((py > y0) & (py < y1))[:, None]
            reasons[hit] = Reason.CLOUD | Reason.WATER
        data = {
            "s2_10": (("period", "band_s2_10", "y_10", "x_10"), np.stack([x, -x])[None]),
            "s2_20": (("period", "band_s2_20", "y_20", "x_20"), x[None, None, ::2, ::2]),
            "s2_60": (("period", "band_s2_60", "y_60", "x_60"), x[None, None, ::6, ::6]),
            # A series of two dates at 30 m, and one static layer at 240 m.
            "l8_30": (("time_l8_30", "band_l8_30", "y_30", "x_30"),
                      np.stack([x[::3, ::3], x[::3, ::3] + 0.5])[:, None], FACTS),
            "soil_240": (("band_soil_240", "y_240", "x_240"), x[None, ::24, ::24]),
            "reasons": (("y_10", "x_10"), reasons),
        }  # fmt: skip
        names = {"period": ["one"], "band_s2_10": ["B02", "B03"], "band_s2_20": ["B05"],
                 "band_s2_60": ["B01"], "band_l8_30": ["SR_B4"],
                 "band_soil_240": ["clay"]}  # fmt: skip
        coords = {k: np.array(v, dtype=object) for k, v in names.items()}
        coords["time_l8_30"] = np.array(["2023-05-01", "2023-06-02"], "datetime64[ns]")
        write_store(folder / f"{tile.name}.zip", xr.Dataset(data, coords))


def run(
    campaign: Campaign, grid: CampaignGrid, out: Path, cloud: Polygon | None = None
) -> tuple[xr.Dataset, dict[str, Any]]:
    align_labels(campaign, grid, LEGEND, out)
    write_cubes(grid, out / "cube", cloud)
    metrics = cut_chips(campaign, grid, out / "cube", out)
    return read_store(out / "chips.zip").load(), metrics


@pytest.fixture(scope="module")
def clear(campaign: Campaign, grid: CampaignGrid, folder: Path) -> Clear:
    """Chips, metrics and folder of a run without clouds."""
    return *run(campaign, grid, folder / "clear"), folder / "clear"


def test_windows_cover_the_tile_once() -> None:
    seen = np.zeros((288, 192), dtype=int)
    for window in chip_windows((288, 192), 144):
        seen[window] += 1
    assert np.all(seen == 1)


def test_shapes_and_inputs_lie_where_the_chip_says(clear: Clear, grid: CampaignGrid) -> None:
    chips, metrics, _ = clear
    n = chips.sizes["n"]
    assert metrics["chips"] == n
    assert chips["x_s2_10"].shape == (n, 2, 144, 144)
    assert chips["x_s2_20"].shape == (n, 1, 72, 72)
    assert chips["x_s2_60"].shape == (n, 1, 24, 24)
    assert chips["x_l8_30"].dims == ("n", "channel_l8_30", "y_30", "x_30")
    assert chips["channel_l8_30"].values.tolist() == ["2023-05-01/SR_B4", "2023-06-02/SR_B4"]
    assert chips["channel_soil_240"].values.tolist() == ["clay"]
    assert chips["x_l8_30"].attrs == FACTS, "what the bands are goes on to the networks"
    assert chips["channel_s2_10"].values.tolist() == ["one/B02", "one/B03"]
    assert chips.attrs["classes"] == list(LEGEND.names)
    whole = pixel_number(grid, grid.geobox)
    for i in range(n):
        r, c = int(chips["row"][i]), int(chips["col"][i])
        tile_r, tile_c = r % 192, c % 192
        h, w = min(144, 192 - tile_r), min(144, 192 - tile_c, 288 - c)
        got = chips["x_s2_10"].values[i, 0]
        assert np.array_equal(got[:h, :w], whole[r : r + h, c : c + w])
        assert np.all(np.isnan(got[h:])) and np.all(np.isnan(got[:, w:]))
        sixty = chips["x_s2_60"].values[i, 0][: h // 6, : w // 6]
        assert np.array_equal(sixty, whole[r : r + h : 6, c : c + w : 6])
        thirty = chips["x_l8_30"].values[i, :, : h // 3, : w // 3]
        assert np.array_equal(thirty[1], whole[r : r + h : 3, c : c + w : 3] + 0.5)
        soil = chips["x_soil_240"].values[i, 0]
        assert np.array_equal(soil[: h // 24, : w // 24], whole[r : r + h : 24, c : c + w : 24])
        assert np.all(chips["fold"].values[i][h:] == NO_FOLD)
        assert np.all(chips["block"].values[i][:, w:] == -1)
        assert np.all(chips["y_cover"].values[i][h:] == IGNORE_INDEX)
        assert np.all(np.isnan(chips["y_edges"].values[i][:, w:]))


def test_no_label_is_lost_and_each_has_the_fold_of_its_polygon(
    clear: Clear, grid: CampaignGrid
) -> None:
    chips, metrics, out = clear
    labels = gpd.read_file(out / "folds.gpkg")
    cover = labels[labels["task"] == "cover"]
    assert metrics["tasks"]["cover"]["kept_px"] == 96 * 16 * 16
    assert metrics["class_px"] == {"water": 8192, "farm": 8192, "bog": 8192}
    y, fold, block = (chips[v].values for v in ("y_cover", "fold", "block"))
    for _, label in cover.iterrows():
        x0, _, _, y1 = label.geometry.bounds
        col, row = round((x0 - X) / 10), round((Y + H - y1) / 10)
        pixels = 0
        for i in range(len(y)):
            dr, dc = row - int(chips["row"][i]), col - int(chips["col"][i])
            part = np.s_[i, max(dr, 0) : max(dr + 16, 0), max(dc, 0) : max(dc + 16, 0)]
            inside = fold[part] != NO_FOLD
            pixels += int(inside.sum())
            assert np.all(y[part][inside] == LEGEND.index_of(label["class"]))
            assert np.all(fold[part][inside] == label["fold"])
            assert np.all(block[part][inside] == label["block"])
        assert pixels == 256


def test_tasks_share_the_folds(clear: Clear) -> None:
    chips, metrics, out = clear
    labels = gpd.read_file(out / "folds.gpkg")
    both = labels[labels["task"] == "edges"].merge(
        labels[labels["task"] == "cover"].assign(wkb=lambda d: d.geometry.to_wkb()),
        left_on=labels[labels["task"] == "edges"].geometry.to_wkb(), right_on="wkb",
    )  # fmt: skip
    assert len(both) == 48
    assert (both["fold_x"] == both["fold_y"]).all()
    assert (both["block_x"] == both["block_y"]).all()
    assert metrics["overlaps_across_folds"] == 0
    heights = np.isfinite(chips["y_height"].values)
    assert heights.sum() > 30
    assert np.all(chips["fold"].values[heights] < 3)
    assert np.nanmax(chips["y_edges"].values) == 1


def test_no_pixel_serves_two_folds(campaign: Campaign, grid: CampaignGrid) -> None:
    def one(value: float, shape: Any, fold: int) -> gpd.GeoDataFrame:
        data = {"label_id": [fold + 7], "value": [value], "fold": [fold], "block": [10 + fold]}
        return gpd.GeoDataFrame(data, geometry=[shape], crs=grid.crs)

    # A parcel of fold 0 beside a labelled field of fold 1: its outer edge lies in that field.
    by_task = {
        "edges": one(np.nan, at(0, 1000, 300, 1300), 0),
        "cover": one(1, at(310, 1000, 600, 1300), 1),
        "height": one(5, at(2000, 200, 2100, 300), 2),
    }
    folds = FoldMap(grid.geobox, 48, 3, (2,) * 24)
    tallies = {t.name: _Tally() for t in campaign.tasks}
    read = {"classes": ["a", "b"], "tasks": {name: {} for name in by_task}}
    burnt = _burn_tile(campaign, by_task, read, folds, grid.geobox, tallies)
    row = 192 - 115
    assert set(burnt.fold[row, 31:60]) == {1}
    assert set(burnt.fold[row, :30]) == {0}
    assert burnt.fold[0, 0] == 2
    assert burnt.block[row, 40] == 11
    assert np.all(np.isnan(burnt.y["edges"][row, 31:]))
    assert np.all(np.isfinite(burnt.y["edges"][row, :31]))
    assert np.all(burnt.y["cover"][row, 31:60] == 1)
    assert set(burnt.label["cover"][row, 31:60]) == {8} and burnt.label["cover"][0, 0] == -1
    assert tallies["edges"].between_folds > 0
    assert tallies["cover"].between_folds == 0


def test_labels_under_cloud_are_taken_away_and_counted(
    campaign: Campaign, grid: CampaignGrid, tmp_path: Path
) -> None:
    cloud = at(0, 1440, 960, 1920)  # eight polygons of the class map
    chips, metrics = run(campaign, grid, tmp_path / "out", cloud)
    tally = metrics["tasks"]["cover"]
    assert tally["labelled_px"] - tally["kept_px"] == 8 * 256
    assert tally["lost_invalid_pct"] == pytest.approx(100 * 8 / 96, abs=1e-3)
    assert tally["lost_by_reason_pct"]["cloud"] == tally["lost_invalid_pct"]
    assert tally["lost_by_reason_pct"]["snow"] == 0
    assert "water" not in tally["lost_by_reason_pct"]
    first = chips.isel(n=(chips["row"] == 0).values & (chips["col"] == 0).values)
    assert np.all(first["y_cover"].values[0, :48, :96] == IGNORE_INDEX)
    assert np.all(np.isnan(first["y_edges"].values[0, :48, :96]))
    assert np.all(np.isfinite(first["x_s2_10"].values))


def test_remarks_are_no_reason_to_lose_a_label(
    campaign: Campaign, grid: CampaignGrid, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    align_labels(campaign, grid, LEGEND, out)
    write_cubes(grid, out / "cube")
    for path in (out / "cube").glob("*.zip"):
        cube = read_store(path).load()
        cube["reasons"][:] = Reason.WATER | Reason.FILLED
        write_store(path, cube)
    assert cut_chips(campaign, grid, out / "cube", out)["tasks"]["cover"]["kept_px"] == 24576


def test_only_chips_with_labels_are_kept(
    clear: Clear, campaign: Campaign, grid: CampaignGrid, tmp_path: Path
) -> None:
    chips, _ = run(campaign, grid, tmp_path / "b", at(0, 0, 1440, 1920))
    assert 0 < chips.sizes["n"] < clear[0].sizes["n"]
    labelled = (chips["y_cover"].values != IGNORE_INDEX) | np.isfinite(chips["y_edges"].values)
    assert np.all((labelled | np.isfinite(chips["y_height"].values)).any(axis=(1, 2)))
    with pytest.raises(CoverageError, match="clear"):
        run(campaign, grid, tmp_path / "c", at(-10, -10, W + 10, H + 10))
    assert not (tmp_path / "c" / "chips.zip").exists()


def test_files_are_the_same_every_time(
    clear: Clear, campaign: Campaign, grid: CampaignGrid, tmp_path: Path
) -> None:
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    run(campaign, grid, tmp_path / "a")
    for file in ("labels.json", "folds.gpkg", "chips.zip", "metrics.json"):
        assert sha256(tmp_path / "a" / file) == sha256(clear[2] / file), file
    assert pyogrio.get_gdal_config_option("OGR_CURRENT_DATE") == before
    assert not list((tmp_path / "a").glob(".tmp-*"))


def test_report_says_what_was_read(clear: Clear) -> None:
    report = read_json(clear[2] / "labels.json")
    assert report["classes"] == list(LEGEND.names)
    assert report["tasks"]["cover"]["kept"] == 96
    assert report["folds"]["block_m"] == 480
    assert report["folds"]["labelled_blocks"] == 24
    assert report["audit"]["overlaps_across_folds"] == 0


def test_missing_or_foreign_files(campaign: Campaign, grid: CampaignGrid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StateError, match=r"labels\.json"):
        cut_chips(campaign, grid, out / "cube", out)
    align_labels(campaign, grid, LEGEND, out)
    with pytest.raises(StateError, match="x000y000"):
        cut_chips(campaign, grid, out / "cube", out)
    write_cubes(CampaignGrid(grid.geobox, 96, grid.aoi), out / "cube")
    with pytest.raises(StateError, match="tile of"):
        cut_chips(campaign, grid, out / "cube", out)
