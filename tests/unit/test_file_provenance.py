"""What a file of a map says of itself, beside its run and far from it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.products import SCENES, campaign, region
from terraloom.cli import app
from terraloom.errors import StateError
from terraloom.io import read_json, write_json, write_raster
from terraloom.predict.polygons import polygonise_map
from terraloom.predict.products import MAP, mosaic_products
from terraloom.predict.tile_products import write_tiles
from terraloom.report.file_provenance import origin_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    grid = region(folder, per_job=8)
    c = campaign(products={"layout": "tiles", "vector": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiles(c, grid, "b0000")
        mosaic_products(c, grid)
        polygonise_map(c, grid)
    sample = {"kind": "stratified_random", "size": 400, "allocation": "rare"}
    write_json(
        folder / MAP / "accuracy.json", {"status": "design-based estimate", "sample": sample}
    )
    return folder


def told(run: Path, *args: str) -> str:
    result = CliRunner().invoke(app, ["provenance", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_product_says_all_beside_its_run(run: Path) -> None:
    text = told(run, str(run / MAP / "probabilities.vrt"))
    parts = ("product probabilities", "campaign   t (config ", "3 networks", "4 (", SCENES[0])
    design = (
        "design-based estimate: allocation rare, kind stratified_random",
        "bytes      as recorded",
    )
    for part in parts + design:
        assert part in text, part
    record = json.loads(told(run, "--json", str(run / MAP / "probabilities.vrt")))
    assert record["scenes"]["ids"] == SCENES and record["estimator"]["size"] == 400
    assert [u for u in record["unknown"] if not u.startswith("when")] == []


def test_a_tile_and_the_polygons_say_it_too(run: Path) -> None:
    tile = origin_of(run / MAP / "tiles/edge/x001y001.tif")
    assert tile["tile"] == "x001y001" and tile["bytes"]["status"] == "as recorded"
    polygons = origin_of(run / MAP / "class_map.gpkg")
    assert polygons["product"] == "class_map" and polygons["weights"] == tile["weights"]


def test_a_file_far_away_tells_its_tags_and_what_it_cannot_know(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(run / MAP / "tiles/edge/x001y001.tif", tmp_path / "renamed.tif"))
    record = origin_of(copy)
    here = origin_of(run / MAP / "tiles/edge/x001y001.tif")
    for key in ("campaign", "config", "code", "labels", "weights", "scenes", "period", "tile"):
        assert record[key] == here[key], key
    assert record["estimator"] is None and record["bytes"]["status"] == "not recorded"
    assert any("map.json" in u for u in record["unknown"])
    assert any(u.startswith("estimator") for u in record["unknown"])


def test_changed_bytes_are_told(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "results", tmp_path / "results")) / "map"
    path = folder / "class_map.vrt"
    path.write_text(path.read_text().replace("Acker", "Brache"))
    assert origin_of(path)["bytes"]["status"] == "differ from the record"


def test_a_changed_lock_is_not_taken_for_the_old_one(run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run / "results", tmp_path / "results"))
    path = root / "map/class_map.vrt"
    ids = " ".join(SCENES)
    path.write_text(path.read_text().replace(f'<MDI key="TERRALOOM_SCENE_IDS">{ids}</MDI>', ""))
    assert origin_of(path)["scenes"]["ids"] == SCENES
    items = read_json(root / "scenes/items.json")
    write_json(root / "scenes/items.json", {"items": items["items"][1:]})
    record = origin_of(path)
    assert record["scenes"]["ids"] is None and record["scenes"]["count"] == 4
    assert any("has changed since" in u for u in record["unknown"])


def test_other_files_are_refused_with_help(tmp_path: Path) -> None:
    grid = GeoBox((8, 8), Affine(10, 0, 0, 0, -10, 0), "EPSG:32633")
    write_raster(tmp_path / "other.tif", np.zeros((8, 8), np.uint8), grid)
    (tmp_path / "text.tif").write_text("no raster")
    (tmp_path / "text.gpkg").write_text("no polygons")
    for name in ("other.tif", "text.tif", "text.gpkg"):
        with pytest.raises(StateError, match=r"not a product of Terraloom[\s\S]*TERRALOOM_"):
            origin_of(tmp_path / name)
    with pytest.raises(StateError, match="no such file"):
        origin_of(tmp_path / "nothing.tif")
