"""Landsat 7 of North Carolina, 2000: labels of 1996 in another coordinate system.

Polygons to a full map: 32 training polygons, held-out folds of them, and the map against 135,000
pixels of a reference map. Points: the 562 with all bands, in spatial blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from real_data import (
    DATA,
    Rows,
    Scene,
    burnt,
    chips_of,
    forest_map,
    forest_scores,
    held_scores,
    legend_of,
    mapped,
    scores,
    train,
)

from terraloom.config.base import TaskKind
from terraloom.config.labels import LabelSource, Task
from terraloom.models.heads import TaskSpec
from terraloom.train.fit import FitSettings

FOLDER = DATA / "nc_landsat"
#: File of a band, and the Sentinel-2 band it is like.
BANDS = {"10": "B02", "20": "B03", "30": "B04", "40": "B08", "50": "B11", "70": "B12"}
GROUP = "l7_30"
#: Codes 1 to 7 of the reference map.
REFERENCE = ("developed", "agriculture", "herbaceous", "shrubland", "forest", "water", "sediment")
#: Agriculture has one polygon, which can never be held out, and .4 % of the map.
POLYGON_CLASSES = tuple(c for c in REFERENCE if c != "agriculture")
NEVER = ["agriculture"]
CHIP_PX, MAP_PX = 192, 384


@lru_cache(maxsize=1)
def scene() -> Scene:
    """The image at its own 28.5 m pixels; labels on pixels a third as wide, as on 10 m."""
    planes = []
    for number in BANDS:
        with rasterio.open(FOLDER / f"lsat7_2000_{number}.tif") as src:
            values = src.read(1).astype(np.float32)
            values[values == src.nodata] = np.nan
            planes.append(values)
            affine, crs, (h, w) = src.transform, str(src.crs), src.shape
    box = GeoBox((3 * h, 3 * w), affine @ Affine.scale(1 / 3), crs)
    return Scene(box, {GROUP: np.stack(planes)}, {GROUP: [f"y2000/{b}" for b in BANDS]},
                 {GROUP: {"kind": "optical", "unit": "1", "roles": {b: b for b in BANDS.values()}}},
                 )  # fmt: skip


def reference() -> tuple[np.ndarray, np.ndarray]:
    """Class index of the reference map (H, W), and where it and all six bands are there."""
    with rasterio.open(FOLDER / "strata.tif") as src:
        code = src.read(1)
    there = np.isfinite(scene().planes[GROUP]).all(0) & (code > 0)
    return np.where(there, code - 1, 255).astype(np.uint8), there


def _chips(
    file: str, classes: Sequence[str], drop: list[str], *, folds: int, block_m: float, seed: int
) -> xr.Dataset:
    task = Task(name="lc", kind=TaskKind.SEGMENTATION, classes="-",
                labels=LabelSource(file=str(FOLDER / file), column="label", drop=drop))  # fmt: skip
    made, _, _ = burnt(scene(), task, legend_of(classes), folds=folds, block_m=block_m, seed=seed)
    y = made["y"].copy()
    some = ~np.isfinite(scene().planes[GROUP]).all(0)
    if not drop:  # the points that a forest can use, too
        y[some.repeat(3, 0).repeat(3, 1)] = 255
    return chips_of(scene(), {"y_lc": y, "fold": made["fold"], "block": made["block"]},
                    size_px=CHIP_PX)  # fmt: skip


#: Few labels, each one pixel: small windows hold about as many of them as large ones, at a ninth
#: of the cost, so that a step sees more.
POINTS = replace(FitSettings(), epochs=3, crop_px=24, batch=32)


def report_polygons(seeds: Sequence[int], *, epochs: float) -> None:
    """Print scores of held-out polygons and of the map they make."""
    rows, start = Rows(), time.process_time()
    settings = replace(FitSettings(), epochs=epochs)
    spec = TaskSpec("lc", "segmentation", POLYGON_CLASSES)
    code = np.array([REFERENCE.index(c) for c in POLYGON_CLASSES])
    truth, there = reference()
    whole = chips_of(scene(), {}, size_px=MAP_PX, everywhere=True)
    for seed in seeds:
        chips = _chips("landsat96_polygons.shp", POLYGON_CLASSES, NEVER,
                       folds=3, block_m=1500, seed=seed)  # fmt: skip
        rows.add("forest: held-out polygons", forest_scores(chips, spec, seed))
        guess = forest_map(chips, scene().planes[GROUP], spec, seed)
        rows.add("forest: map", scores(truth[there], code[guess][there]))
        nets, held = train(chips, [spec], settings, folds=range(3), seed=seed)
        rows.add("networks: held-out polygons", held_scores(held["lc"]))
        p = mapped(nets, whole, tuple(scene().geobox.shape), "lc")[:, 1::3, 1::3]
        rows.add("networks: map", scores(truth[there], code[p.argmax(0)][there]))
    print(f"nc_landsat: 32 polygons of 1996 -> map of 2000; {len(seeds)} seeds of folds, networks, "
          f"forest; the map is that of all 3 networks; {there.sum()} px; "
          f"{time.process_time() - start:.0f} CPU s")  # fmt: skip
    print(rows.text())


def report_points(seeds: Sequence[int]) -> None:
    """Print scores of the points in blocks that were held out."""
    rows, start = Rows(), time.process_time()
    spec = TaskSpec("lc", "segmentation", REFERENCE)
    for seed in seeds:
        chips = _chips("landsat96_points.shp", REFERENCE, [], folds=4, block_m=1500, seed=seed)
        rows.add("forest", forest_scores(chips, spec, seed))
        _, held = train(chips, [spec], POINTS, folds=range(4), seed=seed)
        rows.add("network", held_scores(held["lc"]))
    n = int((chips["y_lc"].values != 255).sum())
    print(f"nc_landsat: {n} points in 4 folds of 1.5 km blocks; {len(seeds)} seeds of folds, "
          f"network, forest; {time.process_time() - start:.0f} CPU s")  # fmt: skip
    print(rows.text())
