"""A small world of several resolutions with gaps, as cubes that can be predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import box

from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import read_store, write_json, write_store
from terraloom.preprocess.groups import group_factor
from terraloom.preprocess.reasons import Reason

H, W = 240, 240
GEOBOX = GeoBox((H, W), Affine(10, 0, 399960, 0, -10, 5800020), "EPSG:32633")
GROUPS = {
    "s2_10": ["B04", "B08"], "s2_20": ["B05", "B11"], "hls_30": ["B1", "B2"], "s2_60": ["B09"],
    "modis_240": ["NDVI"],
}  # fmt: skip


def campaign(tile_px: int, **predict: Any) -> Campaign:
    """A campaign of three tasks, with settings of its prediction."""
    return parse_campaign(
        {
            "name": "t", "title": "T", "aoi": {"bbox": [0, 0, 1, 1]},
            "grid": {"tile_px": tile_px, "tiles_per_job": 100},
            "sources": [{"source": "sentinel-2-l1c"}], "predict": predict,
            "cube": {"periods": [{"name": "a", "start": "2023-01-01", "end": "2023-12-31"}]},
            "tasks": [
                {"name": "lc", "kind": "segmentation", "classes": "classes.csv",
                 "labels": {"file": "l.gpkg", "column": "c"}},
                {"name": "height", "kind": "regression", "range": [0, 40],
                 "labels": {"file": "l.gpkg", "column": "h"}},
                {"name": "edge", "kind": "boundary", "labels": {"file": "l.gpkg"}},
            ],
        }
    )  # fmt: skip


def world() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Smooth values with noise and gaps at native resolutions, and reasons (H, W)."""
    rng = np.random.default_rng(3)
    data: dict[str, np.ndarray] = {}
    for group, bands in GROUPS.items():
        f = group_factor(group)
        x = rng.uniform(0.02, 0.5, (1, len(bands), H // f, W // f)).astype(np.float32)
        x[:, :, : 60 // f, 120 // f : 180 // f] = np.nan
        data[group] = x
    reasons = np.zeros((H, W), np.uint8)
    reasons[:60, 120:180] = Reason.CLOUD
    reasons[-30:, :48] = Reason.NODATA
    reasons[100:110] = Reason.WATER
    return data, reasons


def cut(folder: Path, tile_px: int, **predict: Any) -> tuple[Campaign, CampaignGrid]:
    """The same world as cubes of a tile size, and the campaign; settings of its prediction."""
    data, reasons = world()
    b = GEOBOX.boundingbox
    grid = CampaignGrid(GEOBOX, tile_px, box(b.left, b.bottom, b.right, b.top))
    manifest = {}
    for tile in grid.tiles():
        r, c = tile.row * tile_px, tile.column * tile_px
        h, w = tile.geobox.shape
        parts: dict[str, Any] = {"reasons": (("y_10", "x_10"), reasons[r : r + h, c : c + w])}
        coords: dict[str, Any] = {"period": ["a"]}
        for group, bands in GROUPS.items():
            f = group_factor(group)
            res = 10 * f
            window = data[group][..., r // f : (r + h) // f, c // f : (c + w) // f]
            parts[group] = (("period", f"band_{group}", f"y_{res}", f"x_{res}"), window)
            coords[f"band_{group}"] = bands
        write_store(folder / f"work/cube/{tile.name}.zip", xr.Dataset(parts, coords=coords))
        manifest[tile.name] = {"digest": tile.name}
    write_json(folder / "work/cube/b0000.json", {"tiles": manifest})
    (folder / "classes.csv").write_text("code,name,color\n1,a,#000000\n4,b,#111111\n9,c,#222222\n")
    return campaign(tile_px, **predict), grid


def whole(grid: CampaignGrid) -> dict[str, np.ndarray]:
    """Predicted tiles joined to the region."""
    out: dict[str, np.ndarray] = {}
    for tile in grid.tiles():
        store = read_store(f"work/predict/{tile.name}.zip")
        r, c = tile.row * grid.tile_px, tile.column * grid.tile_px
        for name, values in store.data_vars.items():
            x = values.to_numpy()
            full = out.setdefault(str(name), np.zeros((*x.shape[:-2], H, W), x.dtype))
            full[..., r : r + x.shape[-2], c : c + x.shape[-1]] = x
    return out


def large(folder: Path, size_px: int) -> tuple[Campaign, CampaignGrid]:
    """One tile of 10 m and 20 m bands, and a campaign with one task."""
    rng = np.random.default_rng(5)
    geobox = GeoBox((size_px, size_px), GEOBOX.affine, GEOBOX.crs)
    b = geobox.boundingbox
    grid = CampaignGrid(geobox, size_px, box(b.left, b.bottom, b.right, b.top))
    parts: dict[str, Any] = {"reasons": (("y_10", "x_10"), np.zeros((size_px, size_px), np.uint8))}
    coords: dict[str, Any] = {"period": ["a"]}
    for group in ("s2_10", "s2_20"):
        f = group_factor(group)
        n = size_px // f
        values = rng.uniform(0.02, 0.5, (1, 2, n, n)).astype(np.float32)
        parts[group] = (("period", f"band_{group}", f"y_{10 * f}", f"x_{10 * f}"), values)
        coords[f"band_{group}"] = GROUPS[group]
    write_store(folder / "work/cube/x000y000.zip", xr.Dataset(parts, coords=coords))
    write_json(folder / "work/cube/b0000.json", {"tiles": {"x000y000": {"digest": "large"}}})
    (folder / "classes.csv").write_text("code,name,color\n1,a,#000000\n4,b,#111111\n9,c,#222222\n")
    c = campaign(384)
    return c.model_copy(update={"tasks": c.tasks[:1]}), grid
