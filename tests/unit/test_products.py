"""Products: one raster each of all tiles, with a picture whatever the sensor."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.features import shapes
from shapely import MultiPolygon, box
from shapely.geometry import shape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.products import CODES, NAMES, SCENES, region
from support.products import campaign as full_campaign
from terraloom.config.load import parse_campaign
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, sha256, write_store
from terraloom.plan import product_path
from terraloom.predict.polygons import polygonise_map
from terraloom.predict.products import MAP, mosaic_products
from terraloom.predict.tile_products import write_tiles
from terraloom.preprocess.groups import group_factor

GEOBOX = GeoBox((96, 144), Affine(10, 0, 399840, 0, -10, 5800320), "EPSG:32633")
ROLES = {"SR_B2": "B02", "SR_B3": "B03", "SR_B4": "B04"}


def campaign() -> Any:
    return parse_campaign(
        {
            "name": "t", "title": "T", "aoi": {"bbox": [0, 0, 1, 1]},
            "grid": {"tile_px": 96}, "sources": [{"source": "copernicus-dem"}],
            "cube": {"periods": [{"name": "a", "start": "2023-01-01", "end": "2023-12-31"}]},
            "tasks": [{"name": "lc", "kind": "segmentation", "classes": "classes.csv",
                       "labels": {"file": "l.gpkg", "column": "c"}}],
            "uncertainty": {"sets": False, "applicability": False},
        }
    )  # fmt: skip


def products(
    folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, bands: list[str],
    values: np.ndarray, attrs: dict[str, Any],
) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
    """``map.json`` and the picture of a region whose cube has one static group (B, h, w)."""
    monkeypatch.chdir(folder)
    b = GEOBOX.boundingbox
    grid = CampaignGrid(GEOBOX, 96, box(b.left, b.bottom, b.right, b.top))
    Path("classes.csv").write_text("code,name,color\n3,a,#000000\n5,b,#111111\n")
    f = group_factor(group)
    dims = (f"band_{group}", f"y_{10 * f}", f"x_{10 * f}")
    for tile in grid.tiles():
        h, w = tile.geobox.shape
        left = tile.column * 96 // f
        cut = values[:, :, left : left + w // f].astype(np.float32)
        cube = xr.Dataset({group: (dims, cut, attrs)}, coords={f"band_{group}": bands})
        write_store(Path(f"work/cube/{tile.name}.zip"), cube)
        index = np.full((h, w), tile.column, np.uint8)
        index[:4] = 255
        three = np.zeros((3, h, w), np.uint8)
        data = {
            "class_index": (("y", "x"), index), "reasons": (("y", "x"), (index == 255) * 2),
            "probabilities": (("class", "y", "x"), three[:2]),
            "uncertainty": (("kind", "y", "x"), three),
        }  # fmt: skip
        predicted = xr.Dataset(data).astype(np.uint8)
        write_store(Path(f"work/predict/{tile.name}.zip"), predicted)
    mosaic_products(campaign(), grid)
    with rasterio.open(MAP / "image.tif") as src:
        assert src.nodata == 0 and src.descriptions == ("red", "green", "blue")
        return read_json(MAP / "map.json"), src.read()


def test_a_map_from_landsat_alone_has_natural_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).uniform(0.02, 0.3, (3, 32, 48))
    attrs = {"kind": "optical", "unit": "reflectance", "roles": ROLES}
    facts, image = products(tmp_path, monkeypatch, "l8_30", list(ROLES), x, attrs)
    assert facts["image"]["kind"] == "natural" and facts["image"]["group"] == "l8_30"
    red = 1 + 254 * ((x[2] - 0.02) / 0.28) ** 0.6
    assert np.abs(image[0, 1::3, 1::3] - red).max() <= 1
    assert sorted(facts["products"]) == ["class_map", "image", "probabilities", "reasons",
                                         "uncertainty"]  # fmt: skip
    with rasterio.open(MAP / "class_map.tif") as src:
        codes = src.read(1)
    assert (codes[4:, :96] == 3).all() and (codes[4:, 96:] == 5).all() and not codes[:4].any()


def test_a_map_without_colours_has_one_grey_scale_over_all_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = np.broadcast_to(np.arange(144.0), (1, 96, 144))
    facts, image = products(tmp_path, monkeypatch, "dem_10", ["DEM"], ramp, {"kind": "dem"})
    assert facts["image"]["kind"] == "grey"
    assert (image[0] == image[1]).all()
    steps = np.diff(image[0, 10].astype(int))
    assert steps.min() >= 0 and steps.max() <= 3, "no step between the tiles"
    assert image[0, 0, 0] == 1 and image[0, 0, -1] == 255


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CampaignGrid:
    """A run folder with predicted tiles, entered."""
    grid = region(tmp_path)
    monkeypatch.chdir(tmp_path)
    return grid


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished map."""
    folder = tmp_path_factory.mktemp("finished")
    grid = region(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mosaic_products(full_campaign(), grid)
    return folder / MAP


def files() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(MAP.iterdir())}


def test_every_file_says_what_it_was_made_from(finished: Path) -> None:
    for name in ("class_map", "probabilities", "edge", "image"):
        with rasterio.open(finished / f"{name}.tif") as src:
            tags = src.tags()
        assert tags["TERRALOOM_CAMPAIGN"] == "t" and tags["TERRALOOM_PRODUCT"] == name
        assert tags["TERRALOOM_SCENES"] == "4" and tags["TERRALOOM_SCENE_IDS"].split() == SCENES
        assert tags["TERRALOOM_NETWORKS"] == "3" and len(tags["TERRALOOM_LABELS"]) == 16
        assert tags["TERRALOOM_PERIOD"] == "2023-01-01/2023-12-31"


def test_bands_carry_exact_statistics_of_what_is_stored(finished: Path) -> None:
    for name in ("probabilities", "height", "class_map", "reasons"):
        with rasterio.open(finished / f"{name}.tif") as src:
            for i in src.indexes:
                band = src.read(i, masked=True).astype(np.float64)
                tags = src.tags(i)
                assert float(tags["STATISTICS_MEAN"]) == pytest.approx(band.mean(), rel=1e-9)
                assert float(tags["STATISTICS_STDDEV"]) == pytest.approx(band.std(), rel=1e-6)
                assert float(tags["STATISTICS_MAXIMUM"]) == pytest.approx(band.max(), rel=1e-9)


def test_sixteen_bits_store_finer_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = [region(tmp_path / n, bits=b) for n, b in (("a", 8), ("b", 16))]
    read = []
    for folder, bits, grid in zip(("a", "b"), (8, 16), grids, strict=True):
        monkeypatch.chdir(tmp_path / folder)
        mosaic_products(full_campaign(products={"probability_bits": bits}), grid)
        for name in ("probabilities", "edge"):
            with rasterio.open(MAP / f"{name}.tif") as src:
                assert src.scales[0] == pytest.approx({8: 1 / 200, 16: 1 / 10_000}[bits])
                assert src.nodata == {8: 255, 16: 65_535}[bits]
                values = src.read(1, masked=True) * src.scales[0]
        read.append(values)
    assert (read[0].mask == read[1].mask).all()
    assert abs(read[0] - read[1]).max() <= 0.5 / 200 + 0.5 / 10_000 + 1e-9
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(StateError, match="probabilities is uint8, not uint16"):
        mosaic_products(full_campaign(products={"probability_bits": 16}), grids[0])


@pytest.mark.parametrize("how", ["bytes", "missing", "other run", "no band", "not a zip"])
def test_a_bad_tile_is_named_and_the_map_stays_as_it_was(run: CampaignGrid, how: str) -> None:
    MAP.mkdir(parents=True)
    (MAP / "class_map.tif").write_bytes(b"earlier")
    before = files()
    path = Path("work/predict/x001y001.zip")
    data = path.read_bytes()
    if how == "bytes":  # inside the pixels of one of the last variables
        with zipfile.ZipFile(path) as archive:
            info = max(archive.infolist(), key=lambda i: i.file_size)
        at = info.header_offset + 200 + info.file_size // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    elif how == "missing":
        path.unlink()
    elif how == "not a zip":
        path.write_bytes(b"<html>quota exceeded</html>")
    else:
        store = xr.open_zarr(zip_store(path), consolidated=False).load()
        if how == "no band":
            store = store.drop_vars("uncertainty")
        else:
            store.attrs["digest"] = "older"
        write_store(path, store)
    with pytest.raises(StateError) as caught:
        mosaic_products(full_campaign(grid={"tile_px": 96, "tiles_per_job": 2}), run)
    told = str(caught.value)
    assert "1 of 5 predicted tiles" in told and "x001y001: " in told
    assert "rm work/predict/x001y001.zip work/predict/b0001.json" in told
    assert files() == before, "no product is touched"
    assert not list(MAP.glob(".tmp-*"))


def zip_store(path: Path) -> Any:
    import zarr

    return zarr.storage.ZipStore(path, mode="r")


def test_a_damaged_cube_under_the_picture_is_named(run: CampaignGrid) -> None:
    path = Path("work/cube/x001y001.zip")
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    data = path.read_bytes()
    at = info.header_offset + 200 + info.file_size // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    with pytest.raises(StateError, match=r"work/cube/x001y001.zip: the file is damaged"):
        mosaic_products(full_campaign(), run)
    assert not MAP.exists() or not list(MAP.iterdir())


def test_how_a_map_is_divided_into_jobs_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name, jobs in (("a", 1), ("b", 5)):
        grid = region(tmp_path / name, per_job=jobs)
        monkeypatch.chdir(tmp_path / name)
        settings = {"grid": {"tile_px": 96, "tiles_per_job": jobs}, "predict": {"threads": jobs}}
        mosaic_products(full_campaign(**settings), grid)
        made.append(files())
    assert made[0] == made[1]


def test_facts_of_sets_and_applicability(finished: Path) -> None:
    facts = read_json(finished / "map.json")
    with rasterio.open(finished / "conformal_set.tif") as src:
        size, members = src.read()
        assert src.descriptions == ("size", "classes") and src.nodata == 0
    with rasterio.open(finished / "class_map.tif") as src:
        code = src.read(1)
    share = facts["conformal_set"]["size_pct"]
    mapped = size > 0
    assert np.array_equal(mapped, code > 0)
    assert share == pytest.approx({str(i): 100 * (size[mapped] == i).mean() for i in (1, 2, 3)})
    assert facts["conformal_set"]["mean_size"] == pytest.approx(size[mapped].mean())
    for k, c in enumerate(CODES):
        assert ((members[code == c] >> k) & 1).all(), "the mapped class is in its set"
    with rasterio.open(finished / "applicability.tif") as src:
        inside = src.read(3) == 1
        assert src.scales == (0.001, 0.1, 1.0)
    known = facts["applicability"]
    assert known["inside_pct"] == pytest.approx(100 * inside.sum() / mapped.sum())
    assert 0 < known["inside_pct"] < 100
    for entry in facts["legend"]:
        part = (inside & (code == entry["code"])).sum() / (code == entry["code"]).sum()
        found = known["inside_ha"][str(entry["code"])]
        assert found == pytest.approx(entry["map_area_ha"] * part, rel=1e-3)
    assert len(known["tiles_inside_pct"]) == facts["tiles"]


def test_facts_hold_the_digest_of_every_product(finished: Path) -> None:
    facts = read_json(finished / "map.json")
    assert list(facts["products"]) == sorted(
        ["class_map", "probabilities", "uncertainty", "edge", "height", "reasons", "image",
         "conformal_set", "applicability"]
    )  # fmt: skip
    for entry in facts["products"].values():
        assert sha256(finished / entry["file"]) == entry["sha256"]
    with rasterio.open(finished / "class_map.tif") as src:
        assert set(np.unique(src.read(1))) == {0, *CODES}
        assert src.colormap(1)[5] == (217, 180, 74, 255)
    names = (finished / "class_map.tif.aux.xml").read_text()
    assert "Wald &amp; Busch" in names and NAMES[2] in names


def test_a_minimum_mapping_unit_makes_one_product_more_and_polygons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both layouts the same; the class map itself stays as it is."""
    made = []
    keys = {"minimum_mapping_unit_ha": 0.2, "vector": True}
    for layout in ("mosaic", "tiles"):
        folder = tmp_path / layout
        grid = region(folder, smooth=1.0, per_job=8)
        monkeypatch.chdir(folder)
        c = full_campaign(products=keys | {"layout": layout})
        if layout == "tiles":
            write_tiles(c, grid, "b0000")
        mosaic_products(c, grid)
        polygonise_map(c, grid)
        facts = read_json(MAP / "map.json")
        with rasterio.open(MAP / "class_map_mmu.tif") as src:
            sieved = src.read(1)
        with rasterio.open(product_path("class_map", MAP)) as src:
            plain = src.read(1)
        made.append((sieved, gpd.read_file(MAP / "class_map.gpkg"), facts))
    (sieved, polygons, facts), (other, others, _) = made
    assert (sieved == other).all() and polygons.drop(columns="geometry").equals(
        others.drop(columns="geometry")
    )
    unit = facts["minimum_mapping_unit"]
    assert unit["pixels"] == 20 and unit["connectivity"] == 4
    assert unit["changed_px"] == (sieved != plain).sum() > 100
    assert ((sieved == 0) == (plain == 0)).all()
    assert sum(unit["area_ha"].values()) == pytest.approx(
        sum(e["map_area_ha"] for e in facts["legend"])
    )
    by_class = polygons.groupby("code")["area_ha"].sum()
    assert {str(k): v for k, v in by_class.items()} == pytest.approx(unit["area_ha"])
    assert polygons["pixels"].sum() == (sieved > 0).sum() and polygons["pixels"].min() >= 20
    assert polygons["mean_probability"].between(0, 1).all()
    assert set(polygons["class"]) == set(NAMES) and polygons.is_valid.all()
    whole = {g.normalize().wkb for g in polygons.geometry}
    gdal = shapes(sieved, mask=sieved > 0, transform=grid.geobox.affine)
    assert {MultiPolygon([shape(g)]).normalize().wkb for g, _ in gdal} == whole
