"""Products: one raster each of all tiles, with a picture whatever the sensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import box

from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_store
from terraloom.predict.products import MAP, mosaic_products
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
