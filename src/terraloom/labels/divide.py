"""From the campaign's keys on folds to labels in folds: regions are read, ``auto`` gets a width."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyogrio
import shapely
from odc.geo.geobox import GeoBox

from terraloom.config.labels import Folds
from terraloom.errors import FoldError
from terraloom.grid import CampaignGrid
from terraloom.labels.folds import FoldMap, assign_folds
from terraloom.labels.variogram import Variogram, empirical_variogram, fit_variogram, residuals

__all__ = ["BlockSize", "block_size", "divide_labels", "read_regions"]

#: Widths found by themselves are multiples of this: no pixel of a six times coarser band (60 m
#: beside 10 m) then lies in two blocks.
STEP_PX = 6
#: The smallest width found by itself, pixels.
LEAST_PX = 12
#: A width found by itself leaves at least so many labelled blocks per fold.
BLOCKS_PER_FOLD = 3
#: A task with fewer labels says nothing of the range.
LEAST_LABELS = 30


def divide_labels(
    labels: gpd.GeoDataFrame,
    folds: Folds,
    grid: CampaignGrid,
    *,
    seed: int,
    names: list[str],
) -> tuple[gpd.GeoDataFrame, FoldMap, dict[str, Any]]:
    """Deal labels to folds as the campaign says.

    Args:
        labels: As for :func:`terraloom.labels.folds.assign_folds`; ``class`` (text or None),
            ``value`` and ``task`` are used for ``block_m: auto``.
        folds: The campaign's keys.
        grid: Its grid.
        seed: Its seed.
        names: Names of the strata.

    Returns:
        Labels with ``block`` and ``fold``, the map of blocks, and the record of both for
        ``labels.json`` (with ``auto``: the variogram and the reason for the width).

    Raises:
        FoldError: Labels that cannot be divided so, or regions that cannot be read.
    """
    record: dict[str, Any] = {"method": folds.method, "buffer_m": folds.buffer_m}
    how: dict[str, Any] = {
        "geobox": grid.geobox, "count": folds.count, "seed": seed, "names": names,
        "area": grid.aoi if folds.method == "knndm" else None,
        "regions": read_regions(str(folds.regions), grid) if folds.method == "regions" else None,
        "years": folds.method == "years",
    }  # fmt: skip
    if folds.block_m == "auto":
        size = block_size(labels, grid.geobox, seed=seed)
        out, fold_map, why = _largest_that_fits(labels, size, folds, how)
        record |= size.record() | {"block_m_reason": why}
    else:
        out, fold_map = assign_folds(labels, block_m=float(folds.block_m), **how)
    record |= fold_map.record() | {"labelled_blocks": int(out["block"].nunique())}
    if folds.method == "regions":
        record["labelled_regions"] = int(out["region"].nunique())
    return out, fold_map, record


def read_regions(file: str, grid: CampaignGrid) -> gpd.GeoDataFrame:
    """Polygons of the regions in the grid's CRS; each row of the file is a region.

    Raises:
        FoldError: No such file, one without coordinate system, or one without polygons.
    """
    where = f"folds.regions: {file}"
    if not Path(file).exists():
        raise FoldError(
            "there is no such file",
            where=where,
            allowed="a vector file GDAL can read, path from the project folder",
        )
    try:
        raw = gpd.read_file(file, engine="pyogrio")
    except pyogrio.errors.DataSourceError as err:
        raise FoldError(f"not a readable vector file ({err})", where=where,
                        allowed="GeoPackage, GeoJSON, Shapefile and the like") from err  # fmt: skip
    if not isinstance(raw, gpd.GeoDataFrame) or raw.crs is None:
        raise FoldError("no shapes, or no coordinate system", where=where,
                        allowed="polygons in any stated coordinate system")  # fmt: skip
    shapes = gpd.GeoSeries(shapely.make_valid(raw.geometry.values), crs=raw.crs).to_crs(grid.crs)
    polygon = shapes.notna() & (shapes.area > 0)
    if not polygon.any():
        raise FoldError(f"{len(raw)} rows and no polygon", where=where, allowed="polygons")
    return gpd.GeoDataFrame(geometry=shapes[polygon].reset_index(drop=True))


@dataclass(frozen=True)
class BlockSize:
    """Width of blocks from the range of what a simple model gets wrong.

    Attributes:
        block_px: Width, pixels: the range, rounded up to a multiple of 6.
        range_m: Range of the task with the largest one, metres; None where none was found.
        reason: How the width came about.
        variogram: Of the task with the largest range, or None.
    """

    block_px: int
    range_m: float | None
    reason: str
    variogram: Variogram | None = None

    def record(self) -> dict[str, Any]:
        """JSON form; the width is that of the fold map."""
        found = None if self.variogram is None else self.variogram.record()
        return {"range_m": self.range_m and round(self.range_m, 1), "variogram": found}


def block_size(labels: gpd.GeoDataFrame, geobox: GeoBox, *, seed: int) -> BlockSize:
    """Width of blocks from the largest range of the residual variograms of all tasks.

    Args:
        labels: Columns ``class`` (text or None), ``value``, ``task``, ``geometry`` in metres;
            tasks whose labels have neither class nor value are left out.
        geobox: The campaign's pixels.
        seed: Chooses pairs where labels are many.
    """
    found: dict[str, Variogram] = {}
    tasks = labels["task"] if "task" in labels else np.full(len(labels), "labels")
    for task, mine in labels.groupby(np.asarray(tasks), sort=True):
        fit = _variogram_of(mine, np.random.default_rng(seed))
        if fit is not None:
            found[str(task)] = fit
    pixel = abs(float(geobox.resolution.x))
    if not found:
        return BlockSize(
            LEAST_PX, None, "no task has labels that are more alike when near: smallest width"
        )
    task, widest = max(found.items(), key=lambda item: item[1].range_m)
    px = max(LEAST_PX, STEP_PX * int(np.ceil(widest.range_m / pixel / STEP_PX)))
    reason = f"what a simple model leaves of task {task} is correlated over {widest.range_m:.0f} m"
    if px == LEAST_PX:
        reason += f", less than the smallest width of {LEAST_PX} pixels"
    return BlockSize(px, widest.range_m, reason, widest)


def _variogram_of(labels: gpd.GeoDataFrame, rng: np.random.Generator) -> Variogram | None:
    """Residual variogram of a task's labels; None without values, with few labels or no range."""
    classes = "class" in labels and bool(labels["class"].notna().all())
    value = labels["class"].astype(str) if classes else labels["value"].astype(float)
    if len(labels) < LEAST_LABELS or (not classes and value.notna().sum() < LEAST_LABELS):
        return None
    points = labels.representative_point()
    xy = np.column_stack([points.x, points.y])
    try:
        fit = fit_variogram(
            *empirical_variogram(
                xy, residuals(xy, value.to_numpy(), classes=classes), rng=rng
            )
        )  # fmt: skip
    except FoldError:  # too few places: no range to be had
        return None
    return fit if fit.structured else None


def _largest_that_fits(
    labels: gpd.GeoDataFrame, size: BlockSize, folds: Folds, how: dict[str, Any]
) -> tuple[gpd.GeoDataFrame, FoldMap, str]:
    """Folds with the largest blocks up to the wanted width that can be dealt, and why these."""
    pixel = abs(float(how["geobox"].resolution.x))
    least = BLOCKS_PER_FOLD * folds.count if folds.method in ("blocks", "knndm") else 1
    px, failed = size.block_px, ""
    while True:
        last = px <= LEAST_PX
        try:
            out, fold_map = assign_folds(labels, block_m=px * pixel, **how)
        except FoldError as err:
            if last or folds.method not in ("blocks", "knndm"):
                raise
            failed = err.found
        else:
            blocks = int(out["block"].nunique())
            if blocks >= least or last:
                break
            failed = f"labels lie in {blocks} blocks, fewer than {least} for {folds.count} folds"
        px = max(LEAST_PX, STEP_PX * int(0.9 * px / STEP_PX))
    if not failed:
        return out, fold_map, size.reason
    return out, fold_map, (
        f"{size.reason}, but blocks of {size.block_px * pixel:g} m are too large ({failed}); "
        "nearby labels of two folds may be alike"
    )  # fmt: skip
