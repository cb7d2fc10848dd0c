"""From label files to aligned labels in folds: the first half of the stage ``chips``.

:func:`align_labels` reads all tasks' labels and deals them to folds; it needs no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyogrio
import shapely
from odc.geo.geobox import GeoBox

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.errors import LabelError, StateError
from terraloom.grid import CampaignGrid
from terraloom.io import atomic, read_json, write_json
from terraloom.labels.divide import divide_labels
from terraloom.labels.folds import audit_folds
from terraloom.labels.leakage import audit_leakage
from terraloom.labels.rasterise import NO_LABEL, Burned, burn, eroded
from terraloom.labels.read import read_labels
from terraloom.labels.sources import BLOCK_M
from terraloom.legend import Legend
from terraloom.log import get_logger

__all__ = ["align_labels", "burn_task", "read_aligned"]

#: A fixed time stamp keeps GeoPackages byte-identical.
_GPKG_TIME = "2000-01-01T00:00:00Z"
_LAYER = "labels"
#: A pixel of which one class covers this share is pure, for the report.
_PURE = 0.999

log = get_logger(__name__)


def align_labels(
    campaign: Campaign, grid: CampaignGrid, legend: Legend, out_dir: Path | str
) -> dict[str, Any]:
    """Read the labels of all tasks, deal them to folds and write both.

    Writes ``labels.json`` (what was kept, repaired, left out and why; the fold map; the leakage
    audit) and ``folds.gpkg`` (all labels in the grid's CRS with task, class, value, dates, group,
    block and fold).

    Args:
        campaign: The campaign.
        grid: Its grid.
        legend: Classes of its segmentation task.
        out_dir: Folder to write to.

    Returns:
        The report that stands in ``labels.json``.

    Raises:
        LabelError: A label file cannot be used, or none of its labels labels a pixel.
        FoldError: The labels cannot be divided into the folds asked for.
    """
    out = Path(out_dir)
    parts, reports = [], {}
    block_m = campaign.folds.block_m
    cell_m = BLOCK_M if block_m == "auto" else float(block_m)
    for s, task in enumerate(campaign.tasks):
        is_map = task.kind is TaskKind.SEGMENTATION
        labels, report = read_labels(task, grid, legend if is_map else None, block_m=cell_m)
        for name, kept in report.get("classes", {}).items():
            if kept["labels"] == 0:
                log.warning("task %s: no label of %s is left", task.name, name)
        report["erosion"] = _erosion_report(labels, task)
        report["grid"] = _grid_report(labels, task, grid, legend, report)
        value = labels["value"].to_numpy()
        labels["task"] = task.name
        labels["class"] = _names(value, legend) if is_map else None
        labels["stratum"] = _strata(value, legend) if is_map else len(legend) + s
        parts.append(labels)
        reports[task.name] = report
        log.info("task %s: %d of %d labels kept", task.name, len(labels), report["rows"])
    union = gpd.GeoDataFrame(pd.concat(parts, ignore_index=True), crs=parts[0].crs)
    union, _, folds = divide_labels(
        union,
        campaign.folds,
        grid,
        seed=campaign.seed,
        names=[*legend.names, *(t.name for t in campaign.tasks)],
    )
    if "block_m_reason" in folds:
        log.info("blocks of %g m: %s", folds["block_m"], folds["block_m_reason"])
    leaks = audit_leakage(
        union,
        image_years=_image_years(campaign),
        geobox=grid.geobox,
        buffer_m=campaign.folds.buffer_m,
        years=campaign.folds.method == "years",
    )
    for r in leaks:
        if not r["ok"]:
            log.warning("%s of %s: %s; to do: %s", r["check"], r["item"], r["found"], r["fix"])
    result = {
        "campaign": campaign.name,
        "classes": list(legend.names),
        "tasks": reports,
        "folds": folds,
        "audit": audit_folds(union),
        "leakage": leaks,
    }
    _write_labels(out / "folds.gpkg", union)
    write_json(out / "labels.json", result)
    return result


def burn_task(
    labels: gpd.GeoDataFrame, geobox: GeoBox, task: Task, report: Mapping[str, Any], classes: int
) -> Burned:
    """Burn aligned labels of one task as its ``labels`` keys say.

    Args:
        labels: Aligned labels of this task only, index 0 .. N-1.
        geobox: Pixels wanted.
        task: The task.
        report: Its entry in ``tasks`` of ``labels.json``; names the broader classes.
        classes: Number of classes of the legend.
    """
    source = task.labels
    keys: dict[str, Any] = {"kind": task.kind, "erode_m": source.erode_m, "policy": source.policy}
    if source.policy == "fractions":
        below = [b["classes"] for b in report.get("broader", [])]
        keys |= {"min_purity": source.min_purity, "soft": source.soft}
        keys |= {"classes": classes, "children": below}
    return burn(labels, geobox, **keys)


def _names(value: npt.NDArray[np.float64], legend: Legend) -> list[str]:
    """Class, or broader class, of each label."""
    broader = list(legend.broader)
    return [legend.names[int(v)] if v >= 0 else broader[int(-1 - v)] for v in value]


def _strata(value: npt.NDArray[np.float64], legend: Legend) -> npt.NDArray[np.int64]:
    """Class by which the folds are balanced: of a broader class, the first of its classes."""
    first = np.array([below[0] for below in legend.broader.values()] or [0], dtype=np.int64)
    index = value.astype(np.int64)
    return np.where(index >= 0, index, first[np.clip(-1 - index, 0, len(first) - 1)])


def _image_years(campaign: Campaign) -> list[int]:
    """Years of the images; none where no label says its date."""
    if not any(t.labels.dated for t in campaign.tasks):
        return []
    return sorted({day.year for p in campaign.cube.periods for day in (p.start, p.end)})


def _erosion_report(labels: gpd.GeoDataFrame, task: Task) -> dict[str, Any]:
    erode_m = 0.0 if task.kind is TaskKind.BOUNDARY else task.labels.erode_m
    polygons = np.asarray(labels.geometry.values[labels.area.to_numpy() > 0], dtype=object)
    if erode_m == 0 or not len(polygons):
        return {"erode_m": erode_m, "lost_area_pct": 0.0, "kept_whole": 0}
    cores, whole = eroded(polygons, erode_m)
    left = gpd.GeoSeries(cores).area.sum() / gpd.GeoSeries(polygons).area.sum()
    lost = round(100 * (1 - float(left)), 2)
    return {"erode_m": erode_m, "lost_area_pct": lost, "kept_whole": int(whole.sum())}


def _grid_report(
    labels: gpd.GeoDataFrame,
    task: Task,
    grid: CampaignGrid,
    legend: Legend,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """What the grid makes of the labels: area of labels against area of labelled pixels.

    A point counts as one pixel. Lost in percent of the labels' area; negative where pixels cover
    more than the labels do, as with ``all_touched``.
    """
    source = task.labels
    if task.kind is TaskKind.BOUNDARY:
        return {"policy": "outline"}
    is_map = task.kind is TaskKind.SEGMENTATION
    broader = [b["classes"] for b in report.get("broader", [])]
    names = list(legend.names) if is_map else [task.name]
    pixel_m2 = grid.resolution_m**2
    gained, conflict, pure = np.zeros(len(names)), 0, 0
    for tile in grid.tiles():
        b = tile.geobox.boundingbox
        if not len(labels.sindex.query(shapely.box(b.left, b.bottom, b.right, b.top))):
            continue
        burned = burn_task(labels, tile.geobox, task, report, len(names))
        has = burned.label != NO_LABEL
        conflict += int(burned.conflict.sum())
        if burned.shares is not None:
            pure += int((has & (burned.shares.max(axis=0) >= _PURE)).sum())
        if burned.shares is not None and source.soft:
            gained += burned.shares[:, has].sum(axis=1)
        else:
            at = burned.value[has].astype(np.int64) if is_map else np.zeros(has.sum(), np.int64)
            gained += np.bincount(at, minlength=len(names))
    if not gained.any():
        raise LabelError(
            f"none of the {len(labels)} labels labels a pixel of {grid.resolution_m:g} m "
            f"({conflict} pixels have labels that disagree)",
            where=f"task {task.name}, {source.file}", allowed="at least one pixel with a label",
            fix="larger labels, labels.policy all_touched, or a smaller labels.min_purity",
        )  # fmt: skip
    had = _areas(labels, is_map, len(names), broader, pixel_m2)
    lost = {
        name: _lost_pct(g * pixel_m2, a)
        for name, g, a in zip(names, gained, had, strict=True) if a > 0
    }  # fmt: skip
    for name, pct in lost.items():
        if pct == 100:
            log.warning("task %s: no pixel has a label of %s", task.name, name)
    found: dict[str, Any] = {
        "policy": source.policy,
        "labelled_px": round(float(gained.sum())),
        "conflict_px": conflict,
        "lost_pct": _lost_pct(gained.sum() * pixel_m2, had.sum()),
        "lost_pct_by_class": lost if is_map else {},
    }
    if source.policy == "fractions":
        found["pure_px"] = pure
    return found


def _lost_pct(left: float, had: float) -> float:
    return round(100 * (1 - float(left / had)), 2) + 0.0  # no negative zero


def _areas(
    labels: gpd.GeoDataFrame, is_map: bool, count: int, broader: list[list[int]], pixel_m2: float
) -> npt.NDArray[np.float64]:
    """Area of the labels of each class, square metres."""
    shapes = labels.geometry.values
    points = np.where(shapely.get_dimensions(shapes) == 0, shapely.get_num_geometries(shapes), 0)
    area = shapely.area(shapes) + points * pixel_m2
    out = np.zeros(count)
    if not is_map:
        out[0] = area.sum()
        return out
    value = labels["value"].to_numpy().astype(np.int64)
    np.add.at(out, value[value >= 0], area[value >= 0])
    for i, below in enumerate(broader):
        out[below] += area[value == -1 - i].sum() / len(below)
    return out


def _write_labels(path: Path, labels: gpd.GeoDataFrame) -> None:
    columns = [
        "task", "label_id", "class", "value", "date", "date_end", "group", "stratum", "block",
        "fold",
    ]  # fmt: skip
    if "region" in labels:
        columns.append("region")
    frame = labels[[*columns, "geometry"]]
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _GPKG_TIME})
    try:
        with atomic(path) as tmp:
            tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
            frame.to_file(tmp, driver="GPKG", layer=_LAYER, engine="pyogrio")
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


def read_aligned(folder: Path | str, grid: CampaignGrid) -> tuple[gpd.GeoDataFrame, dict[str, Any]]:
    """The labels and the report that :func:`align_labels` wrote to ``folder``.

    Raises:
        StateError: One of the two files is missing.
    """
    out = Path(folder)
    report = read_json(out / "labels.json")
    path = out / "folds.gpkg"
    if not path.is_file():
        raise StateError("the aligned labels are missing", where=str(path),
                         fix="run the stage before")  # fmt: skip
    # Written in this CRS; a WKT round trip may spell it differently.
    labels = gpd.read_file(path, layer=_LAYER).set_crs(grid.crs, allow_override=True)
    return labels, report
