"""From predicted tiles to products: one cloud-optimised raster each, and the facts about the map.

Rasters are written tile by tile: memory is bounded by the tile, not by the region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.grid import CampaignGrid, Tile, geobox_record, row_areas_m2, window_of
from terraloom.io import cog_from_windows, read_store, sha256, write_json, write_text
from terraloom.legend import IGNORE_INDEX, NODATA_CODE, Legend, read_legend
from terraloom.log import get_logger
from terraloom.plan import product_names
from terraloom.predict.engine import CUBES, TILES
from terraloom.predict.layers import (
    ENTROPY_NODATA,
    PROBABILITY_NODATA,
    PROBABILITY_STEPS,
    REGRESSION_NODATA,
)
from terraloom.predict.picture import Picture, paint, plan_picture
from terraloom.predict.qgis import class_map_qml
from terraloom.preprocess.reasons import Reason

__all__ = ["MAP", "mosaic_products"]

MAP = Path("results/map")
#: Product value of pixels outside the AOI's tiles in the reasons raster.
_OUTSIDE = np.uint8(Reason.NODATA)

Windows = Iterator[tuple[slice, slice, npt.NDArray[Any]]]
log = get_logger(__name__)


def mosaic_products(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write all rasters of the map and ``map.json``."""
    legend = read_legend(str(campaign.land_cover.classes))
    tags = {"terraloom:campaign": campaign.name}
    picture = plan_picture(_cube(tile) for tile in grid.tiles())
    for name in product_names(campaign):
        path = MAP / f"{name}.tif"
        task = next((t for t in campaign.tasks if t.name == name), None)
        options = _options(name, task, legend)
        read = _reader(name, legend, picture)
        windows = _windows(grid, read, int(options["count"]), options["dtype"], options["nodata"])
        cog_from_windows(path, grid.geobox, windows, tags=tags, **options)
        log.info("wrote %s", path)
    write_text(MAP / "class_map.qml", class_map_qml(legend))
    write_json(MAP / "map.json", _facts(campaign, grid, legend, picture))


def _options(name: str, task: Task | None, legend: Legend) -> dict[str, Any]:
    if name == "class_map":
        return {
            "count": 1, "dtype": "uint8", "nodata": NODATA_CODE, "band_names": ["class"],
            "colormap": legend.colormap(), "category_names": legend.category_names(),
            "overviews": "mode",
        }  # fmt: skip
    if name == "probabilities":
        return {
            "count": len(legend), "dtype": "uint8", "nodata": PROBABILITY_NODATA,
            "band_names": list(legend.names), "scales": [1 / PROBABILITY_STEPS] * len(legend),
            "overviews": "average",
        }  # fmt: skip
    if name == "uncertainty":
        step = float(np.log(len(legend)) / PROBABILITY_STEPS)
        return {
            "count": 3, "dtype": "uint8", "nodata": ENTROPY_NODATA, "scales": [step] * 3,
            "band_names": ["total", "aleatoric", "epistemic"], "units": "nat",
            "overviews": "average",
        }  # fmt: skip
    if name == "reasons":
        return {"count": 1, "dtype": "uint8", "nodata": None, "band_names": ["reasons"],
                "overviews": "nearest"}  # fmt: skip
    if name == "image":
        return {"count": 3, "dtype": "uint8", "nodata": 0, "band_names": ["red", "green", "blue"],
                "overviews": "average"}  # fmt: skip
    if task is not None and task.kind is TaskKind.REGRESSION:
        return {
            "count": 3, "dtype": "float32", "nodata": REGRESSION_NODATA, "units": task.unit or None,
            "band_names": ["mean", "sd_aleatoric", "sd_epistemic"], "overviews": "average",
        }  # fmt: skip
    return {"count": 1, "dtype": "uint8", "nodata": PROBABILITY_NODATA, "overviews": "average",
            "scales": [1 / PROBABILITY_STEPS], "band_names": ["boundary probability"]}  # fmt: skip


def _cube(tile: Tile) -> Any:
    return read_store(CUBES / f"{tile.name}.zip")


def _reader(name: str, legend: Legend, picture: Picture) -> Callable[[Tile], npt.NDArray[Any]]:
    codes = np.full(256, NODATA_CODE, np.uint8)
    codes[: len(legend)] = legend.codes
    codes[IGNORE_INDEX] = NODATA_CODE

    def read(tile: Tile) -> npt.NDArray[Any]:
        if name == "image":
            return paint(picture, _cube(tile), tile.geobox.shape)
        store = read_store(TILES / f"{tile.name}.zip")
        if name == "class_map":
            mapped: npt.NDArray[Any] = codes[store["class_index"].to_numpy()][None]
            return mapped
        values: npt.NDArray[Any] = store[name].to_numpy()
        return values if values.ndim == 3 else values[None]

    return read


def _windows(
    grid: CampaignGrid, read: Callable[[Tile], npt.NDArray[Any]], count: int, dtype: str,
    nodata: float | None,
) -> Windows:  # fmt: skip
    """Tiles of the AOI with their data; cells outside the AOI with nodata."""
    fill = _OUTSIDE if nodata is None else nodata
    h, w = grid.geobox.shape
    inside = {(t.column, t.row) for t in grid.tiles()}
    for row in range(-(-h // grid.tile_px)):
        for column in range(-(-w // grid.tile_px)):
            tile = grid.tile(column, row)
            rows, cols = window_of(tile.geobox, grid.geobox)
            if (column, row) in inside:
                yield rows, cols, read(tile)
            else:
                yield rows, cols, np.full((count, *tile.geobox.shape), fill, dtype)


def _facts(
    campaign: Campaign, grid: CampaignGrid, legend: Legend, picture: Picture
) -> dict[str, Any]:
    area = dict.fromkeys(legend.codes, 0.0)
    reasons = dict.fromkeys(Reason, 0)
    total = valid = 0
    codes = np.array([NODATA_CODE, *legend.codes])
    for tile in grid.tiles():
        store = read_store(TILES / f"{tile.name}.zip")
        index = store["class_index"].to_numpy()
        row_area = row_areas_m2(tile.geobox)
        for k, code in enumerate(legend.codes):
            area[code] += float(((index == k).sum(axis=1) * row_area).sum()) / 1e4
        bits = store["reasons"].to_numpy()
        for reason in Reason:
            reasons[reason] += int(((bits & reason) > 0).sum())
        total += bits.size
        valid += int((index != IGNORE_INDEX).sum())
    whole = sum(area.values())
    log.info("%.1f %% of the pixels are mapped (%d codes)", 100 * valid / total, len(codes) - 1)
    return {
        "campaign": campaign.name,
        "geobox": geobox_record(grid.geobox),
        "tiles": len(grid.tiles()),
        "valid_pct": 100 * valid / total,
        "reason_pct": {r.name.lower(): 100 * n / total for r, n in reasons.items() if r.name},
        "image": picture.record(),
        "image_period": campaign.cube.periods[-1].name,
        "legend": [
            {
                "code": code, "name": name, "color": color, "map_area_ha": area[code],
                "share_pct": 100 * area[code] / whole if whole else None,
            }
            for code, name, color in zip(legend.codes, legend.names, legend.colors, strict=True)
        ],
        "products": {
            n: {"file": f"{n}.tif", "sha256": sha256(MAP / f"{n}.tif")}
            for n in product_names(campaign)
        },
    }  # fmt: skip
