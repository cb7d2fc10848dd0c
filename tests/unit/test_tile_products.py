"""Products as one raster per tile with an index: read as the one raster is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.products import campaign, region
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid
from terraloom.io import geobox_of, read_json
from terraloom.operate.difference import map_difference
from terraloom.plan import product_path
from terraloom.predict.products import MAP, mosaic_products
from terraloom.predict.tile_products import TILED, write_tiles

NAMES = ("class_map", "probabilities", "uncertainty", "edge", "height", "reasons", "image")


def tiled(grid: CampaignGrid, index: str = "auto", per_job: int = 8) -> Any:
    c = campaign(
        products={"layout": "tiles", "index": index},
        grid={"tile_px": 96, "tiles_per_job": per_job},
    )
    for batch in grid.batches(per_job):
        write_tiles(c, grid, batch)
    mosaic_products(c, grid)
    return c


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same region as a mosaic, and as tiles under both kinds of index."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for layout in ("mosaic", "vrt", "gti"):
            folder = tmp_path_factory.mktemp(layout)
            grid = region(folder)
            patch.chdir(folder)
            if layout == "mosaic":
                mosaic_products(campaign(), grid)
            else:
                tiled(grid, layout)
            made[layout] = folder
    return made


@pytest.mark.parametrize("index", ["vrt", "gti"])
@pytest.mark.parametrize("name", NAMES)
def test_an_index_reads_as_the_mosaic(runs: dict[str, Path], index: str, name: str) -> None:
    one, many = (product_path(name, runs[k] / MAP) for k in ("mosaic", index))
    assert many.name.endswith({"vrt": ".vrt", "gti": ".gti.gpkg"}[index])
    with rasterio.open(one) as a, rasterio.open(many) as b:
        assert (a.read() == b.read()).all()
        assert a.descriptions == b.descriptions and a.scales == b.scales
        assert a.dtypes == b.dtypes and a.crs == b.crs and a.transform == b.transform
        # GTI has no way to fill with a value that is not called no data.
        assert a.nodata == b.nodata or (index, name) == ("gti", "reasons")
        assert [u or None for u in a.units] == [u or None for u in b.units]
        if name == "class_map":
            assert a.colormap(1)[5] == b.colormap(1)[5] == (217, 180, 74, 255)
        window = ((60, 108), (80, 130))  # over seams and the hole
        assert (a.read(window=window) == b.read(window=window)).all()
        for i in a.indexes:
            x, y = a.tags(i), b.tags(i)
            for key in ("STATISTICS_MINIMUM", "STATISTICS_MAXIMUM", "STATISTICS_MEAN"):
                # The mosaic's statistics have the hole, where no data is a value, as well.
                if name != "reasons":
                    assert float(x[key]) == pytest.approx(float(y[key]), rel=1e-7), key
        told = {k: v for k, v in b.tags().items() if k != "TERRALOOM_TILES"}
        told["TERRALOOM_CONFIG"] = a.tags()["TERRALOOM_CONFIG"]
        assert {k: v for k, v in a.tags().items() if k.startswith("TERRALOOM")} == {
            k: v for k, v in told.items() if k.startswith("TERRALOOM")
        }
    assert geobox_of(one) == geobox_of(many)


@pytest.mark.parametrize("index", ["vrt", "gti"])
def test_an_index_differs_from_no_mosaic_of_the_same_map(runs: dict[str, Path], index: str) -> None:
    one, many = (product_path("class_map", runs[k] / MAP) for k in ("mosaic", index))
    with rasterio.open(one) as src:
        names = {int(code): f"class {code}" for code in np.unique(src.read(1)) if code}
    found = map_difference(one, many, names=(names, names))
    assert found.aligned and found.changed_ha == 0 and found.compared_ha > 0
    other = names | {min(names): "another"}
    assert map_difference(many, one, names=(names, other)).changed_ha > 0


@pytest.mark.parametrize("index", ["vrt", "gti"])
def test_overviews_are_read_without_the_tiles(runs: dict[str, Path], index: str) -> None:
    path = product_path("class_map", runs[index] / MAP)
    with rasterio.open(path) as src:
        assert src.overviews(1)[0] in (7, 8)
        full = src.read(1)
        coarse = src.read(1, out_shape=(14, 26))
    assert path.with_name(path.name + ".ovr").is_file()
    inside = full[8:16, 8:16]
    values, counts = np.unique(inside[inside > 0], return_counts=True)
    assert coarse[1, 1] in values[counts == counts.max()]
    assert not coarse[1, 14:20].any(), "outside the AOI there is nothing"


def test_a_layout_leaves_nothing_of_the_other(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs["mosaic"], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    tiled(region(Path(), per_job=8))
    assert not list(MAP.glob("*.tif")) and product_path("class_map").suffix == ".vrt"
    assert read_json(MAP / "map.json")["products"]["class_map"]["file"] == "class_map.vrt"


def test_finished_tiles_are_kept_and_jobs_change_no_byte(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs["vrt"], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    grid = region(Path(), per_job=2)
    before = {p: (p.stat().st_ino, p.read_bytes()) for p in TILED.rglob("*.tif")}
    index = (MAP / "class_map.vrt").read_bytes()
    lost = TILED / "edge/x001y001.tif"
    lost.write_bytes(b"damaged")
    tiled(grid, "vrt", per_job=2)
    after = {p: (p.stat().st_ino, p.read_bytes()) for p in TILED.rglob("*.tif")}
    assert {p: v[1] for p, v in after.items()} == {p: v[1] for p, v in before.items()}
    assert [p for p in after if after[p][0] != before[p][0]] == [lost]
    assert len(list(TILED.glob("b*.json"))) > 1
    tiled(grid, "vrt", per_job=8)
    assert [p.name for p in TILED.glob("b*.json")] == ["b0000.json"], "jobs that were before"
    assert (MAP / "class_map.vrt").read_bytes() == index


@pytest.mark.parametrize("how", ["bytes", "missing"])
def test_a_corrupt_tile_is_named_before_the_index_is_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    shutil.copytree(runs["vrt"], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    grid = region(Path(), per_job=8)
    path = TILED / "probabilities/x002y000.tif"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data)) if how == "bytes" else path.unlink()
    before = {p.name: p.read_bytes() for p in MAP.iterdir() if p.is_file()}
    c = campaign(products={"layout": "tiles"}, grid={"tile_px": 96, "tiles_per_job": 8})
    with pytest.raises(StateError) as caught:
        mosaic_products(c, grid)
    told = str(caught.value)
    assert "probabilities/x002y000.tif" in told and "results/map/tiles/b0000.json" in told
    assert before == {p.name: p.read_bytes() for p in MAP.iterdir() if p.is_file()}


def test_a_map_moved_elsewhere_still_finds_its_tiles(runs: dict[str, Path], tmp_path: Path) -> None:
    for index in ("vrt", "gti"):
        moved = tmp_path / index
        shutil.copytree(runs[index] / MAP, moved)
        with rasterio.open(product_path("class_map", moved)) as src:
            assert set(np.unique(src.read(1))) == {0, 3, 5, 9}
