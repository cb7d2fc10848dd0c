"""Reading label files: every row is kept, repaired or left out by a stated and counted rule.

Rules, in this order:

1. rows without a geometry or without a value are left out (``no_geometry``, ``no_value``), and so
   are the values of ``labels.drop`` (``drop``);
2. invalid geometries are repaired with ``make_valid`` (``repaired``); left-over lines are cut off;
3. labels outside the AOI are left out (``outside_aoi``); those across its edge are clipped
   (``clipped``), except for boundaries, where clipping would invent an edge;
4. slivers are left out (``sliver``): polygons in which no disc of one pixel's width fits hold
   mixed pixels only;
5. of exact duplicates one is kept, the latest (``duplicate``); where the values of the duplicates
   disagree, none is kept (``contradiction``).

Overlaps that disagree are settled pixel by pixel in :mod:`terraloom.labels.rasterise`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyogrio
import shapely
from shapely.geometry.base import BaseGeometry

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.errors import LabelError
from terraloom.grid import CampaignGrid
from terraloom.legend import Legend

__all__ = ["LABEL_COLUMNS", "read_labels"]

#: Columns of aligned labels.
LABEL_COLUMNS = ("label_id", "value", "date", "geometry")

_POLYGON = (3, 6)
_POINT = (0, 4)
_LISTED = 12


def read_labels(
    task: Task, grid: CampaignGrid, legend: Legend | None = None
) -> tuple[gpd.GeoDataFrame, dict[str, Any]]:
    """Labels of one task in the grid's CRS, and a report of what was kept, repaired and left out.

    Args:
        task: The task; its ``labels`` say file, layer, columns, mapping and values to drop.
        grid: Campaign grid with its AOI.
        legend: Classes of a segmentation task.

    Returns:
        Labels and report. Columns of the labels: ``label_id`` (int64, row of the file from 0),
        ``value`` (float64: class index 0 .. K-1, or the value in the task's unit, or NaN for
        boundaries), ``date`` (text ``YYYY-MM-DD`` or None), ``geometry`` (polygons or points in
        the grid's CRS, metres). The report is JSON-able; areas are in the plane of the grid.

    Raises:
        LabelError: Missing file, layer, column or coordinate system; an empty file; unknown
            classes; values out of range; lines; nothing inside the AOI.
    """
    where = f"task {task.name}, {task.labels.file}"
    raw, layer = _read_file(task, where)
    report: dict[str, Any] = {
        "task": task.name,
        "kind": str(task.kind),
        "file": task.labels.file,
        "layer": layer,
        "crs": str(raw.crs),
        "rows": len(raw),
        "dropped": {},
    }
    labels = gpd.GeoDataFrame(
        {"label_id": np.arange(len(raw), dtype=np.int64), "date": _dates(raw, task, where)},
        geometry=raw.geometry.values,
        crs=raw.crs,
    )
    labels["value"], keep = _values(raw, task, legend, where, report)
    labels = labels[keep]
    labels = _repair(labels, task, where, report)
    labels = _clip(labels.to_crs(grid.crs), task, grid, where, report)
    labels = _drop(labels, _slivers(labels, grid.resolution_m), "sliver", report)
    labels = _unique(labels, report)
    if labels.empty:
        raise LabelError(
            f"none of the {len(raw)} rows can be used: {report['dropped']}",
            where=where,
            fix="check the file against the AOI and the campaign's `labels` keys",
        )
    labels = labels[list(LABEL_COLUMNS)].sort_values("label_id").reset_index(drop=True)
    report["kept"] = len(labels)
    report["area_ha"] = round(float(labels.area.sum()) / 1e4, 2)
    if legend is not None and task.kind is TaskKind.SEGMENTATION:
        report["classes"] = _per_class(labels, legend)
    return labels, report


def _read_file(task: Task, where: str) -> tuple[gpd.GeoDataFrame, str]:
    src = task.labels
    if not Path(src.file).exists():
        raise LabelError(
            "there is no such file", where=where, allowed="a vector file GDAL can read",
            fix=f"correct tasks.{task.name}.labels.file (a path from the project folder)",
        )  # fmt: skip
    try:
        layers = [str(name) for name, kind in pyogrio.list_layers(src.file) if kind is not None]
    except pyogrio.errors.DataSourceError as err:
        raise LabelError(
            f"not a readable vector file ({err})", where=where,
            allowed="GeoPackage, FlatGeobuf, GeoJSON, Shapefile and the like",
        ) from err  # fmt: skip
    layer = src.layer or (layers[0] if len(layers) == 1 else None)
    if layer not in layers:
        found = f"no layer {layer!r}" if layer else f"{len(layers)} layers and none chosen"
        raise LabelError(
            found, where=where, allowed=", ".join(layers) or "a file with a layer",
            fix=f"set tasks.{task.name}.labels.layer",
        )  # fmt: skip
    frame = gpd.read_file(src.file, layer=layer)
    _check_frame(frame, task, where)
    return frame, str(layer)


def _check_frame(frame: gpd.GeoDataFrame, task: Task, where: str) -> None:
    if frame.empty:
        raise LabelError("the file has no rows", where=where, fix="give a file with labels")
    columns = [str(c) for c in frame.columns if c != frame.geometry.name]
    for key in ("column", "date_column"):
        name = getattr(task.labels, key)
        if name is not None and name not in columns:
            raise LabelError(
                f"no column {name!r}", where=where, allowed=", ".join(columns) or "no column",
                fix=f"correct tasks.{task.name}.labels.{key}",
            )  # fmt: skip
    if frame.crs is None:
        raise LabelError(
            "the file has no coordinate system", where=where,
            allowed="any coordinate system, written in the file",
            fix="write the coordinate system the coordinates are in, e.g. with `Assign "
            "projection` in QGIS",
        )  # fmt: skip


def _dates(frame: gpd.GeoDataFrame, task: Task, where: str) -> list[str | None]:
    name = task.labels.date_column
    if name is None:
        return [None] * len(frame)
    parsed = pd.to_datetime(frame[name], errors="coerce", format="ISO8601", utc=True)
    bad = parsed.isna() & frame[name].notna()
    if bad.any():
        raise LabelError(
            f"{int(bad.sum())} dates in column {name!r} cannot be read, e.g. "
            f"{frame[name][bad].iloc[0]!r}",
            where=where, allowed="ISO 8601, YYYY-MM-DD",
        )  # fmt: skip
    return [None if pd.isna(d) else d.strftime("%Y-%m-%d") for d in parsed]


def _values(
    frame: gpd.GeoDataFrame,
    task: Task,
    legend: Legend | None,
    where: str,
    report: dict[str, Any],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Value and use of each row; fills ``report`` with the rows left out."""
    if task.kind is TaskKind.BOUNDARY and task.labels.column is None:
        return np.full(len(frame), np.nan), np.ones(len(frame), dtype=bool)
    column = frame[task.labels.column]
    text = np.array([_text(v) for v in column], dtype=object)
    empty = text == ""
    dropped = np.isin(text.astype(str), task.labels.drop) & ~empty
    _count(report, "no_value", int(empty.sum()))
    _count(report, "drop", int(dropped.sum()))
    keep = ~empty & ~dropped
    unused = sorted(set(task.labels.drop) - set(text))
    if unused:
        report["drop_not_found"] = unused
    if task.kind is TaskKind.SEGMENTATION:
        if legend is None:
            raise LabelError("a segmentation task without a legend", where=where,
                             fix=f"set tasks.{task.name}.classes")  # fmt: skip
        return _class_indices(text, keep, task, legend, where), keep
    if task.kind is TaskKind.REGRESSION:
        return _numbers(column, keep, task, where), keep
    return np.full(len(frame), np.nan), keep


def _text(value: object) -> str:
    if value is None or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))  # a column of codes with gaps is read as float
    return str(value).strip()


def _class_indices(
    text: npt.NDArray[Any], keep: npt.NDArray[np.bool_], task: Task, legend: Legend, where: str
) -> npt.NDArray[np.float64]:
    index = {name: float(k) for k, name in enumerate(legend.names)}
    mapping = task.labels.mapping
    wrong = sorted(set(mapping.values()) - set(index))
    if wrong:
        raise LabelError(
            f"`mapping` leads to {', '.join(wrong)}, not in the legend", where=where,
            allowed=", ".join(legend.names), fix=f"correct tasks.{task.name}.labels.mapping",
        )  # fmt: skip
    names = [mapping.get(t, t) for t in text]
    used = zip(text, names, keep, strict=True)
    unknown = pd.Series([t for t, name, k in used if k and name not in index], dtype=object)
    if len(unknown):
        counts = unknown.value_counts().sort_index().sort_values(ascending=False, kind="stable")
        shown = ", ".join(f"{name!r} ({n})" for name, n in counts.head(_LISTED).items())
        more = f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
        raise LabelError(
            f"column {task.labels.column!r} has classes the legend does not know: {shown}{more}",
            where=where,
            allowed=", ".join(legend.names),
            fix=f"translate them in tasks.{task.name}.labels.mapping, leave them out with "
            f"labels.drop, or add them to {task.classes}",
        )
    return np.array([index.get(n, np.nan) for n in names], dtype=np.float64)


def _numbers(
    column: pd.Series, keep: npt.NDArray[np.bool_], task: Task, where: str
) -> npt.NDArray[np.float64]:
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = keep & ~np.isfinite(values)
    if bad.any():
        raise LabelError(
            f"{int(bad.sum())} values of column {task.labels.column!r} are not numbers, e.g. "
            f"{column[bad].iloc[0]!r}",
            where=where, allowed=f"numbers in {task.unit or 'one unit'}",
            fix=f"correct them or leave them out with tasks.{task.name}.labels.drop",
        )  # fmt: skip
    if task.range is not None:
        low, high = task.range
        out = keep & ((values < low) | (values > high))
        if out.any():
            raise LabelError(
                f"{int(out.sum())} values of column {task.labels.column!r} are out of range: "
                f"{values[out].min():g} to {values[out].max():g}",
                where=where, allowed=f"{low:g} to {high:g} {task.unit}".strip(),
                fix=f"correct the values, their unit, or tasks.{task.name}.range",
            )  # fmt: skip
    return values


def _repair(
    labels: gpd.GeoDataFrame, task: Task, where: str, report: dict[str, Any]
) -> gpd.GeoDataFrame:
    labels = _drop(labels, labels.geometry.isna() | labels.is_empty, "no_geometry", report)
    shapes = shapely.force_2d(labels.geometry.values)
    kinds = shapely.get_type_id(shapes)
    allowed = _POLYGON if task.kind is TaskKind.BOUNDARY else _POLYGON + _POINT
    wrong = ~np.isin(kinds, allowed)
    if wrong.any():
        found = sorted({str(s.geom_type) for s in shapes[wrong]})
        raise LabelError(
            f"{int(wrong.sum())} geometries of type {', '.join(found)}", where=where,
            allowed="polygons" if task.kind is TaskKind.BOUNDARY else "polygons or points",
            fix="make polygons of them, e.g. by a buffer, or leave them out",
        )  # fmt: skip
    broken = ~shapely.is_valid(shapes)
    report["repaired"] = int(broken.sum())
    shapes[broken] = [_polygons(g) for g in shapely.make_valid(shapes[broken])]
    labels = labels.set_geometry(gpd.GeoSeries(shapes, index=labels.index, crs=labels.crs))
    return _drop(labels, labels.is_empty, "no_geometry", report)


def _polygons(geometry: BaseGeometry) -> BaseGeometry:
    """Polygon parts of a geometry; points stay as they are."""
    if geometry.geom_type in ("Polygon", "MultiPolygon", "Point", "MultiPoint"):
        return geometry
    parts = [g for g in shapely.get_parts(geometry) if shapely.get_type_id(g) in _POLYGON]
    whole: BaseGeometry = shapely.union_all(parts) if parts else shapely.Polygon()
    return whole


def _clip(
    labels: gpd.GeoDataFrame, task: Task, grid: CampaignGrid, where: str, report: dict[str, Any]
) -> gpd.GeoDataFrame:
    aoi = grid.aoi
    shapely.prepare(aoi)
    shapes = labels.geometry.values
    points = np.isin(shapely.get_type_id(shapes), _POINT)
    outside = ~shapely.intersects(aoi, shapes) | (~points & shapely.touches(aoi, shapes))
    if len(labels) and outside.all():
        raise LabelError(
            f"all {len(labels)} labels lie outside the AOI: they span {_extent(labels)}",
            where=where,
            allowed=f"the AOI, {', '.join(f'{v:.0f}' for v in aoi.bounds)} in {_short(grid)}",
            fix="check the file's coordinate system and the campaign's `aoi`",
        )
    labels = _drop(labels, outside, "outside_aoi", report)
    shapes = labels.geometry.values
    across = ~shapely.covered_by(shapes, aoi)
    report["clipped"] = 0 if task.kind is TaskKind.BOUNDARY else int(across.sum())
    report["across_aoi_edge"] = int(across.sum())
    if task.kind is not TaskKind.BOUNDARY and across.any():
        cut = np.array(shapes, dtype=object)
        cut[across] = [_polygons(g) for g in shapely.intersection(cut[across], aoi)]
        labels = labels.set_geometry(gpd.GeoSeries(cut, index=labels.index, crs=labels.crs))
    return labels


def _extent(labels: gpd.GeoDataFrame) -> str:
    return ", ".join(f"{v:.0f}" for v in labels.total_bounds)


def _short(grid: CampaignGrid) -> str:
    return grid.crs if len(grid.crs) < 20 else "the grid's coordinate system"


def _slivers(labels: gpd.GeoDataFrame, pixel_m: float) -> npt.NDArray[np.bool_]:
    """True for polygons in which no disc of one pixel's width fits."""
    shapes = labels.geometry.values
    polygon = np.isin(shapely.get_type_id(shapes), _POLYGON)
    return np.asarray(polygon & shapely.is_empty(shapely.buffer(shapes, -pixel_m / 2)), dtype=bool)


def _unique(labels: gpd.GeoDataFrame, report: dict[str, Any]) -> gpd.GeoDataFrame:
    """One label per exact geometry: the latest, or none where values disagree."""
    keys = shapely.to_wkb(shapely.normalize(labels.geometry.values))
    group = pd.Series(keys, index=labels.index)
    values = labels["value"].groupby(group).transform("nunique")  # NaN (boundaries) never disagree
    labels = _drop(labels, values > 1, "contradiction", report)
    group = group.loc[labels.index]
    # A label without a date sorts first: any dated one is newer knowledge.
    order = labels.assign(_date=labels["date"].fillna("")).sort_values(["_date", "label_id"])
    last = ~group.loc[order.index].duplicated(keep="last")
    return _drop(labels, ~last.reindex(labels.index).to_numpy(dtype=bool), "duplicate", report)


def _drop(
    labels: gpd.GeoDataFrame, mask: npt.ArrayLike, reason: str, report: dict[str, Any]
) -> gpd.GeoDataFrame:
    left_out = np.asarray(mask, dtype=bool)
    _count(report, reason, int(left_out.sum()))
    return labels[~left_out]


def _count(report: dict[str, Any], reason: str, n: int) -> None:
    report["dropped"][reason] = report["dropped"].get(reason, 0) + n


def _per_class(labels: gpd.GeoDataFrame, legend: Legend) -> dict[str, dict[str, float]]:
    area = labels.area.groupby(labels["value"]).sum()
    count = labels["value"].value_counts()
    return {
        name: {
            "labels": int(count.get(float(k), 0)),
            "area_ha": round(float(area.get(float(k), 0.0)) / 1e4, 2),
        }
        for k, name in enumerate(legend.names)
    }
