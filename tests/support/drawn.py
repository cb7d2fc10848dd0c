"""A run folder with a small map, its cubes and a drawn sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import box

from terraloom.assess.sampling import draw_sample
from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import write_raster, write_store

GEOBOX = GeoBox((96, 144), Affine(10, 0, 399840, 0, -10, 5800320), "EPSG:32633")
BANDS = ["B02", "B03", "B04", "B08"]
PERIODS = [
    {"name": "spring", "start": "2023-03-01", "end": "2023-05-31"},
    {"name": "summer", "start": "2023-06-01", "end": "2023-08-31"},
]
CLASSES = "code,name,color\n1,water,#2b6cb0\n2,trees <b>& shrubs</b>,#2f855a\n4,open land,#d6b656\n"
NAMES = ["water", "trees <b>& shrubs</b>", "open land"]


HEIGHT = {"name": "tree_height", "kind": "regression", "unit": "m", "range": [0, 50],
          "labels": {"file": "h.gpkg", "column": "h"}}  # fmt: skip


def campaign(*, height: bool = False, **sample: Any) -> Campaign:
    return parse_campaign(
        {
            "name": "small", "title": "A small <i>map</i>", "aoi": {"bbox": [0, 0, 1, 1]},
            "grid": {"tile_px": 96}, "sources": [{"source": "copernicus-dem"}],
            "cube": {"periods": PERIODS},
            "tasks": [{"name": "lc", "kind": "segmentation", "classes": "classes.csv",
                       "labels": {"file": "l.gpkg", "column": "c"}}, *([HEIGHT] if height else [])],
            "sample": {"size": 24, "min_per_stratum": 8, "allocation": "equal"} | sample,
        }
    )  # fmt: skip


def grid() -> CampaignGrid:
    b = GEOBOX.boundingbox
    return CampaignGrid(GEOBOX, 96, box(b.left, b.bottom, b.right, b.top))


def codes() -> np.ndarray:
    """Class map of water in the west, trees in the east, and open land."""
    row, col = np.mgrid[:96, :144]
    found = np.where(col < 50 + row // 6, 1, np.where((row // 12 + col // 9) % 3 == 0, 4, 2))
    return found.astype(np.uint8)


def reflectance() -> np.ndarray:
    """(T, B, H, W) reflectance that follows the classes, with a cloud gap in spring."""
    levels = {1: (0.06, 0.05, 0.04, 0.03), 2: (0.03, 0.05, 0.04, 0.35), 4: (0.09, 0.13, 0.17, 0.28)}
    mean = np.zeros((4, 96, 144))
    for code, values in levels.items():
        mean[:, codes() == code] = np.array(values)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.006, (2, 4, 96, 144))
    x = np.clip(mean * np.array([0.9, 1.1])[:, None, None, None] + noise, 0.021, 0.6)
    x[0, :, 60:80, 85:110] = np.nan
    return x.astype(np.float32)


def write_run(*, height: bool = False, **sample: Any) -> Campaign:
    """Write map, cubes and sample into the current folder."""
    Path("classes.csv").write_text(CLASSES, encoding="utf-8")
    write_raster("results/map/class_map.tif", codes(), GEOBOX, nodata=0)
    x = reflectance()
    rgb = np.nan_to_num(np.clip(x[1, [2, 1, 0]] / 0.3 * 254 + 1, 1, 255)).astype(np.uint8)
    write_raster("results/map/image.tif", rgb, GEOBOX, nodata=0)
    attrs = {"kind": "optical", "unit": "reflectance", "roles": json.dumps({b: b for b in BANDS})}
    for tile in grid().tiles():
        left, w = tile.column * 96, tile.geobox.shape[1]
        dims = ("period", "band_s2_10", "y_10", "x_10")
        cube = xr.Dataset(
            {"s2_10": (dims, x[..., left : left + w], attrs)},
            coords={"period": [p["name"] for p in PERIODS], "band_s2_10": BANDS},
        )
        write_store(Path(f"work/cube/{tile.name}.zip"), cube)
    made = campaign(height=height, **sample)
    draw_sample(made)
    return made
