"""Real labels through the workflow: another coordinate system and year, polygons and points.

The data are not part of the repository; without them everything here is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import yaml

from support.road import ROOT, snakemake
from terraloom.io import read_json, read_store

DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
FOLDER = DATA / "nc_landsat"
pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the data folder (TERRALOOM_TEST_DATA)"),
    pytest.mark.slow,
]

NAMES = ("developed", "agriculture", "herbaceous", "shrubland", "forest", "water", "sediment")
#: Landsat 7 of 2000 as files; digital numbers are brought to the scale of reflectance.
SOURCE = {
    "title": "Landsat 7 ETM+", "kind": "optical", "unit": "1", "scale": 0.004, "sensor": "l7",
    "bands": {"green": {"common_name": "green"}, "red": {"common_name": "red"},
              "nir": {"common_name": "nir08"}},
    "files": [{"path": f"{FOLDER}/lsat7_2000_[234]0.tif", "pattern": r"lsat7_2000_(?P<band>\d0)",
               "date": "2000-03-31", "bands": {"green": "20", "red": "30", "nir": "40"}}],
}  # fmt: skip


def campaign(folder: Path, labels: dict[str, Any], classes: tuple[str, ...]) -> str:
    """Write a campaign with its legend and source; gives its path."""
    rows = [f"{i},{name},#00{i:02}00" for i, name in enumerate(classes, 1)]
    (folder / "classes.csv").write_text("\n".join(["code,name,color", *rows, ""]))
    (folder / "landsat.yaml").write_text(yaml.safe_dump(SOURCE, sort_keys=False))
    text = yaml.safe_dump({
        "name": "raleigh", "title": "Labels of 1996 on an image of 2000", "seed": 3,
        # A little larger than the image: one polygon lies beyond its edge.
        "aoi": {"bbox": [630534, 215000, 644470, 228600], "crs": "EPSG:32119"},
        "grid": {"crs": "EPSG:32119", "tile_px": 768, "tiles_per_job": 4},
        "archive": {"kind": "files", "files": {"landsat": str(folder / "landsat.yaml")}},
        "sources": [{"source": "resources/files/landsat/source.yaml",
                     "catalogue": "resources/files/landsat/catalog.json", "max_cloud_pct": 100}],
        "scenes": {"jobs": 1, "min_clear_pct": 0}, "masks": {"methods": ["auto"]},
        "cube": {"periods": [{"name": "y2000", "start": "2000-03-01", "end": "2000-04-30"}]},
        "tasks": [{"name": "land_cover", "kind": "segmentation",
                   "classes": str(folder / "classes.csv"),
                   "labels": {"column": "label", "date": "1996-06-30"} | labels}],
        "folds": {"count": 3, "block_m": 1500}, "chips": {"size_px": 192},
        "model": {"members": 1, "epochs": 1, "width": 6},
    })  # fmt: skip
    path = folder / "campaign.yaml"
    path.write_text(text)
    return str(path)


def test_polygons_of_another_crs_and_year_train_a_model(tmp_path: Path) -> None:
    labels = {
        "file": str(FOLDER / "landsat96_polygons.shp"),
        # Its only polygon could not be held out.
        "mapping": {"agriculture": "herbaceous"},
    }
    file = campaign(tmp_path, labels, tuple(n for n in NAMES if n != "agriculture"))
    snakemake(tmp_path, "model", "--cores", "2", campaign=file)
    report = read_json(tmp_path / "results/chips/labels.json")
    task = report["tasks"]["land_cover"]
    assert task["crs"] == "EPSG:3358" and task["rows"] == task["kept"] == 34
    assert task["classes"]["herbaceous"]["labels"] == 5
    years = [r for r in report["leakage"] if r["check"] == "label year"]
    assert [r["ok"] for r in years] == [False] and "2000" in years[0]["found"]
    assert report["audit"]["overlaps_across_folds"] == 0

    chips = read_store(tmp_path / "results/chips/chips.zip").load()
    y, fold = chips["y_land_cover"].values, chips["fold"].values
    has = y != 255
    # 189 ha of polygons, less those without an image; each class can be held out.
    assert 0.85 * 18_869 < has.sum() < 18_869
    assert all(len(np.unique(fold[y == k])) >= 2 for k in range(6))

    members = list((tmp_path / "results/model").glob("fold-*/member-*.safetensors"))
    assert len(members) == 3
    scores = read_json(tmp_path / "results/model/metrics.json")["baseline"]
    # One polygon's pixels on both sides of a split look alike: blocks tell the truth.
    assert scores["random_split"]["oa"] > 0.95 > 0.85 > scores["same_pixels"]["oa"] > 0.55


def test_points_are_dealt_in_blocks(tmp_path: Path) -> None:
    file = campaign(tmp_path, {"file": str(FOLDER / "landsat96_points.shp")}, NAMES)
    snakemake(tmp_path, "results/chips/labels.json", "--cores", "1", campaign=file)
    task = read_json(tmp_path / "results/chips/labels.json")["tasks"]["land_cover"]
    assert task["crs"] == "EPSG:3358" and task["rows"] == 1000
    assert 880 < task["kept"] <= 1000
    points = gpd.read_file(tmp_path / "results/chips/folds.gpkg")
    assert len(points) == task["kept"] and set(points["fold"]) == {0, 1, 2}
    assert (points.groupby("block")["fold"].nunique() == 1).all()
    assert (points.groupby("class")["fold"].nunique() >= 2).all()
    share = points["fold"].value_counts(normalize=True)
    assert share.min() > 0.25
    # Every block is a square of 1.5 km from the upper left corner of the grid.
    column = np.floor((points.geometry.x - 630_480) / 1500)
    row = np.floor((228_600 - points.geometry.y) / 1500)
    assert (column + 10 * row == points["block"]).all()
