"""Predicted tiles of a made-up region, and the records that products are made beside."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy.ndimage import gaussian_filter
from shapely import box

from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import write_json, write_store
from terraloom.predict.encoding import PROBABILITY_CODES, encode_sets

CODES = (3, 5, 9)
NAMES = ("Wald & Busch", "Acker", "Wasser")
COLORS = ("#2f6b3c", "#d9b44a", "#3b78b5")
SCENES = [f"S2A_33UUU_2023{m:02d}01_0_L2A" for m in range(4, 8)]


def campaign(**changes: Any) -> Campaign:
    """A campaign with classes, a boundary and a height."""
    data = {
        "name": "t", "title": "T", "aoi": {"bbox": [0, 0, 1, 1]}, "grid": {"tile_px": 96},
        "sources": [{"source": "copernicus-dem"}],
        "cube": {"periods": [{"name": "a", "start": "2023-01-01", "end": "2023-12-31"}]},
        "tasks": [
            {"name": "lc", "kind": "segmentation", "classes": "classes.csv",
             "labels": {"file": "l.gpkg", "column": "c"}},
            {"name": "edge", "kind": "boundary", "labels": {"file": "l.gpkg"}},
            {"name": "height", "kind": "regression", "unit": "m",
             "labels": {"file": "l.gpkg", "column": "h"}},
        ],
    }  # fmt: skip
    return parse_campaign(data | changes)


def region(
    folder: Path, *, shape: tuple[int, int] = (108, 204), hole: bool = True, bits: int = 8,
    smooth: float = 2.0, per_job: int = 2, seed: int = 0,
) -> CampaignGrid:  # fmt: skip
    """Write legend, cubes, predicted tiles and manifests below a run folder.

    Args:
        folder: The run folder.
        shape: Pixels of the region, (H, W); edge tiles of 96 px are cut.
        hole: The tile in the second column of the first row lies outside the AOI.
        bits: Of the stored probabilities.
        smooth: Width of the landscape's patches, pixels.
        per_job: Tiles per job in the manifests.
        seed: Of the landscape.
    """
    geobox = GeoBox(shape, Affine(10, 0, 399840, 0, -10, 5800320), "EPSG:32633")
    b = geobox.boundingbox
    aoi = box(b.left, b.bottom, b.right, b.top)
    if hole:
        aoi = aoi - box(b.left + 960, b.top - 960, b.left + 1920, b.top)
    grid = CampaignGrid(geobox, 96, aoi)
    rows = "".join(f"{c},{n},{v}\n" for c, n, v in zip(CODES, NAMES, COLORS, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.csv").write_text("code,name,color\n" + rows)
    made = _tiles(shape, bits, smooth, seed)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    for stage in ("predict", "cube"):
        (folder / "work" / stage).mkdir(exist_ok=True)
        for tile in grid.tiles():
            name = f"work/{stage}/{tile.name}.zip"
            shutil.copyfile(Path(made.name) / name, folder / name)
    for name, tiles in grid.batches(per_job).items():
        listed = {t.name: {"path": "", "digest": f"digest-{t.name}"} for t in tiles}
        write_json(folder / f"work/predict/{name}.json", {"tiles": listed})
    items = [{"id": i, "decision": "use"} for i in SCENES] + [{"id": "bad", "decision": "drop"}]
    write_json(folder / "results/scenes/items.json", {"items": items})
    for k in range(3):
        card = {"sha256": f"{k}" * 64}
        write_json(folder / f"results/model/fold-{k}/member-0.json", card)
    (folder / "results/chips").mkdir(parents=True, exist_ok=True)
    (folder / "results/chips/folds.gpkg").write_bytes(b"labels")
    return grid


@cache
def _tiles(
    shape: tuple[int, int], bits: int, smooth: float, seed: int
) -> tempfile.TemporaryDirectory[str]:
    """Stores of all tiles; written once, since zarr takes its time."""
    made = tempfile.TemporaryDirectory(prefix="terraloom-test-")
    folder = Path(made.name)
    layers = _landscape(shape, bits, smooth, seed)
    for row in range(-(-shape[0] // 96)):
        for column in range(-(-shape[1] // 96)):
            name = f"x{column:03d}y{row:03d}"
            part = layers.isel(
                y=slice(row * 96, row * 96 + 96), x=slice(column * 96, column * 96 + 96)
            )
            part.attrs["digest"] = f"digest-{name}"
            write_store(folder / f"work/predict/{name}.zip", part)
            height = part["height"].isel(part=[0]).to_numpy()
            dims = ("band_dem_10", "y_10", "x_10")
            cube = xr.Dataset({"dem_10": (dims, height, {"kind": "dem"})}, {"band_dem_10": ["DEM"]})
            write_store(folder / f"work/cube/{name}.zip", cube)
    return made


def _landscape(shape: tuple[int, int], bits: int, smooth: float, seed: int) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    code = PROBABILITY_CODES[bits]
    noise = np.stack([gaussian_filter(rng.normal(size=shape), smooth) for _ in CODES])
    p = np.exp(3 * noise / noise.std())
    p /= p.sum(axis=0)
    valid = np.ones(shape, bool)
    valid[40:60, 85:110] = False
    index = np.where(valid, p.argmax(axis=0), 255).astype(np.uint8)
    entropy = -(p * np.log(p)).sum(axis=0) / np.log(len(CODES))
    three = np.where(valid, np.rint(200 * np.stack([entropy, entropy, 0 * entropy])), 255)
    parts = np.stack([30 * p[0], p[1], p[2], 30 * p[0] - 2, 30 * p[0] + 2])
    height = np.where(valid, parts, -9999).astype(np.float32)
    di = 1000 * entropy
    known = np.where(valid, np.stack([di, 800 - 800 * entropy, di < 700]), 65535)
    yx = ("y", "x")
    return xr.Dataset({
        "class_index": (yx, index),
        "probabilities": (("class", *yx), np.stack([code.encode(q, valid) for q in p])),
        "uncertainty": (("kind", *yx), three.astype(np.uint8)),
        "edge": (yx, code.encode(p[2], valid)),
        "height": (("part", *yx), height),
        "conformal_set": (("set", *yx), encode_sets(p > np.minimum(0.2, p.max(axis=0) - 1e-9),
                                                    valid)),
        "applicability": (("domain", *yx), known.astype(np.uint16)),
        "reasons": (yx, np.where(valid, 0, 2).astype(np.uint8)),
    })  # fmt: skip
