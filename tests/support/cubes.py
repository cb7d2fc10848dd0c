"""Scenes of constant or given pixels, and the cube of one tile built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import box

from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid, coarsen
from terraloom.io import read_store, write_raster
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.cube import MASK_OUTSIDE, Scene, build_tile
from terraloom.preprocess.reasons import Reason

LEFT, TOP, SIDE = 399960, 5800020, 192
GEOBOX = GeoBox((SIDE, SIDE), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")
PERIODS = [
    {"name": "spring", "start": "2023-03-01", "end": "2023-05-31"},
    {"name": "summer", "start": "2023-06-01", "end": "2023-08-31"},
]
BANDS = {"B04": 10, "B11": 20, "B09": 60}


def campaign(*sources: dict[str, Any], **cube: Any) -> Campaign:
    return parse_campaign(
        {
            "name": "t", "title": "T",
            "aoi": {"bbox": [LEFT, TOP - 10 * SIDE, LEFT + 10 * SIDE, TOP], "crs": "EPSG:32633"},
            "sources": list(sources) or [{"source": "sentinel-2-l2a", "bands": list(BANDS)}],
            "cube": {"periods": PERIODS} | cube,
            "tasks": [{"name": "lc", "kind": "segmentation", "classes": "c.csv",
                       "labels": {"file": "l.gpkg", "column": "c"}}],
        }
    )  # fmt: skip


def grid(aoi: Any = None) -> CampaignGrid:
    b = GEOBOX.boundingbox
    whole = box(b.left, b.bottom, b.right, b.top)
    return CampaignGrid(GEOBOX, SIDE, whole if aoi is None else aoi)


def asset(path: Path, data: np.ndarray, geobox: GeoBox, **record: Any) -> dict[str, Any]:
    write_raster(path, data, geobox, nodata=0)
    return {
        "href": str(path), "size": None, "checksum": None, "scale": 1e-4, "offset": 0.0,
        "nodata": 0, "resolution_m": float(geobox.resolution.x), "shape": list(geobox.shape),
    } | record  # fmt: skip


def optical(
    folder: Path, day: str, values: dict[str, int | np.ndarray], mask: np.ndarray | None = None,
    shift: Shift | None = None,
) -> Scene:  # fmt: skip
    """A scene of constant bands (or given ones) with a 20 m mask of the AOI."""
    assets = {}
    for band, value in values.items():
        geobox = coarsen(GEOBOX, BANDS[band] // 10)
        data = np.broadcast_to(np.uint16(value), geobox.shape).astype(np.uint16)
        assets[band] = asset(folder / f"{day}-{band}.tif", data, geobox)
    path = folder / f"{day}-mask.tif"
    geobox = coarsen(GEOBOX, 2)
    bits = np.zeros(geobox.shape, np.uint8) if mask is None else mask
    write_raster(path, bits, geobox, nodata=MASK_OUTSIDE)
    item = {"id": f"S2-{day}", "source": "sentinel-2-l2a", "datetime": f"{day}T10:00:00Z",
            "crs": "EPSG:32633", "assets": assets}  # fmt: skip
    return Scene(item, ((path, 1),), shift)


def build(folder: Path, scenes: list[Scene], c: Campaign | None = None, g: Any = None) -> Any:
    g = g or grid()
    path = folder / "cube.zip"
    build_tile(g.tiles()[0], g, c or campaign(), scenes, path, "code")
    return read_store(path)


def cloud(rows: slice, cols: slice, reason: Reason = Reason.CLOUD) -> np.ndarray:
    mask = np.zeros((SIDE // 2, SIDE // 2), np.uint8)
    mask[rows, cols] = reason
    return mask


def table(folder: Path, name: str, bands: dict[str, int], **keys: Any) -> str:
    """A source table of one's own; bands are kept at their pixel size."""
    given = {"title": "T", "kind": "optical", "collection": "c", "unit": "reflectance",
             "scale": 1e-4, "nodata": 0} | keys  # fmt: skip
    given["bands"] = {
        b: {"assets": [b], "resolution_m": r, "group": f"{name}_{r}"} for b, r in bands.items()
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(given), encoding="utf-8")
    return str(path)


def scene_of(
    folder: Path, source: str, day: str, values: dict[str, tuple[int, Any]],
    mask: tuple[int, np.ndarray] | None = None, **asset_keys: Any,
) -> Scene:  # fmt: skip
    """A scene of any source: values and mask with their pixel sizes."""
    name = f"{Path(source).stem}-{day}"
    assets = {}
    for band, (res, value) in values.items():
        box_ = coarsen(GEOBOX, res // 10)
        dtype = asset_keys.get("dtype", np.uint16)
        data = np.broadcast_to(np.asarray(value, dtype), box_.shape)
        keys = {k: v for k, v in asset_keys.items() if k != "dtype"}
        assets[band] = asset(
            folder / f"{name}-{band}.tif", np.ascontiguousarray(data), box_, **keys
        )
    masks: tuple[tuple[Path, int], ...] = ()
    if mask is not None:
        res, bits = mask
        path = folder / f"{name}-mask.tif"
        write_raster(path, bits.astype(np.uint8), coarsen(GEOBOX, res // 10), nodata=MASK_OUTSIDE)
        masks = ((path, 1),)
    item = {"id": name, "source": source, "datetime": f"{day}T10:00:00Z", "crs": "EPSG:32633",
            "platform": "", "assets": assets}  # fmt: skip
    return Scene(item, masks, None)
