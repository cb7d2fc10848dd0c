"""Reading label files: every row is kept, repaired or left out by a stated and counted rule.

Rules, in this order:

1. rows without a geometry or without a value are left out (``no_geometry``, ``no_value``), and so
   are the values of ``labels.drop`` (``drop``);
2. a label that names a broader class of one class is that class; of several, its share is spread
   over them where shares are trained on (``labels.soft``), else it is left out (``coarse``);
3. invalid geometries are repaired with ``make_valid`` (``repaired``); left-over lines are cut off;
4. lines become strips of ``labels.line_width_m`` (``lines``);
5. labels outside the AOI are left out (``outside_aoi``); those across its edge are clipped
   (``clipped``), except for boundaries, where clipping would invent an edge;
6. slivers are left out (``sliver``): polygons of vector files in which no disc of one pixel's
   width fits hold mixed pixels only;
7. of exact duplicates one is kept, the latest (``duplicate``); where the values of the duplicates
   disagree, none is kept (``contradiction``), unless the last one is dated later than all others:
   the ground has changed, and it stays (``superseded``).

Overlaps that disagree are settled pixel by pixel in :mod:`terraloom.labels.rasterise`.
"""

from __future__ import annotations

from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.errors import LabelError
from terraloom.grid import CampaignGrid
from terraloom.labels.sources import BLOCK_M, Source, read_source, text_of
from terraloom.legend import Legend

__all__ = ["LABEL_COLUMNS", "read_labels"]

#: Columns of aligned labels.
LABEL_COLUMNS = ("label_id", "value", "date", "date_end", "group", "geometry")

_POLYGON = (3, 6)
_LINE = (1, 2, 5)
_POINT = (0, 4)
_LISTED = 12
#: Raster labels are moved by this, metres; far below what shares are rounded to.
_NUDGE_M = 1e-6


def read_labels(
    task: Task, grid: CampaignGrid, legend: Legend | None = None, *, block_m: float = BLOCK_M
) -> tuple[gpd.GeoDataFrame, dict[str, Any]]:
    """Labels of one task in the grid's CRS, and a report of what was kept, repaired and left out.

    Args:
        task: The task; its ``labels`` say file, layer, columns, mapping and values to drop.
        grid: Campaign grid with its AOI.
        legend: Classes of a segmentation task.
        block_m: Width of the cells that class rasters are cut into, metres: that of the folds.

    Returns:
        Labels and report. Columns of the labels: ``label_id`` (int64, row of the file from 0; of a
        raster, a running number), ``value`` (float64: class index 0 .. K-1, or -1 - i for the i-th
        of the report's ``broader`` classes, or the value in the task's unit, or NaN for
        boundaries), ``date`` and ``date_end`` (text ``YYYY-MM-DD`` or None: first and last day on
        which the label is true), ``group`` (text or None), ``geometry`` (polygons or points in the
        grid's CRS, metres). The report is JSON-able; areas are in the plane of the grid.

    Raises:
        LabelError: A file that cannot be read (see :func:`terraloom.labels.sources.read_source`);
            unknown classes; values out of range; nothing inside the AOI; one class only.
    """
    where = f"task {task.name}, {task.labels.file}"
    source = read_source(task, grid, where, block_m)
    raw = source.frame
    report: dict[str, Any] = {
        "task": task.name,
        "kind": str(task.kind),
        "file": task.labels.file,
        "layer": None,
        "crs": source.crs,
        "rows": len(raw),
        "dropped": {},
        **source.facts,
    }
    labels = raw.drop(columns="raw")
    labels["value"], keep = _values(source, task, legend, where, report)
    labels = labels[keep]
    labels = _repair(labels, task, where, report)
    labels = _strips(labels.to_crs(grid.crs), task.labels.line_width_m, report)
    labels = _clip(labels, task, grid, where, report)
    if source.whole:
        # A centre that lies exactly on the edge of two regions would belong to both.
        labels = labels.set_geometry(labels.translate(_NUDGE_M, _NUDGE_M))
    else:
        slivers = _slivers(labels, grid.resolution_m) & ~labels["strip"].to_numpy()
        labels = _drop(labels, slivers, "sliver", report)
    labels = _unique(labels, legend, report)
    if labels.empty:
        raise LabelError(
            f"no label is left of {len(raw)}: {_listed(report['dropped'])}",
            where=where, allowed="at least one label that can be used",
            fix="check the file against the AOI and the campaign's `labels` keys",
        )  # fmt: skip
    labels = labels[list(LABEL_COLUMNS)].sort_values("label_id").reset_index(drop=True)
    for name in ("date", "date_end", "group"):
        # Columns of text alone would get a type whose missing value is NaN.
        texts = [v if isinstance(v, str) else None for v in labels[name]]
        labels[name] = pd.Series(texts, index=labels.index, dtype=object)
    report["kept"] = len(labels)
    report["area_ha"] = round(float(labels.area.sum()) / 1e4, 2)
    if legend is not None and task.kind is TaskKind.SEGMENTATION:
        report["classes"] = _per_class(labels, legend)
        _check_classes(labels, task, legend, where)
    return labels, report


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "nothing to use"


def _check_classes(labels: gpd.GeoDataFrame, task: Task, legend: Legend, where: str) -> None:
    """A network cannot learn to tell one class from nothing."""
    present = set()
    for value in labels["value"].unique().astype(int):
        present |= {value} if value >= 0 else set(list(legend.broader.values())[-1 - value])
    if len(present) < 2:
        name = legend.names[present.pop()]
        raise LabelError(
            f"all {len(labels)} labels are of one class, {name!r}", where=where,
            allowed="labels of two classes or more",
            fix=f"add labels of other classes, or correct tasks.{task.name}.labels.mapping "
            "and labels.drop",
        )  # fmt: skip


def _values(
    source: Source,
    task: Task,
    legend: Legend | None,
    where: str,
    report: dict[str, Any],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Value and use of each row; fills ``report`` with the rows left out."""
    column = source.frame["raw"]
    no_values = task.labels.column is None and not source.codes
    if task.kind is TaskKind.BOUNDARY and no_values:
        return np.full(len(column), np.nan), np.ones(len(column), dtype=bool)
    text = np.array([text_of(v) for v in column], dtype=object)
    empty = text == ""
    dropped = np.isin(text.astype(str), task.labels.drop) & ~empty
    _count(report, "no_value", int(empty.sum()))
    _count(report, "drop", int(dropped.sum()))
    keep = ~empty & ~dropped
    unused = sorted(set(task.labels.drop) - set(text))
    if unused:
        report["drop_not_found"] = unused
    if task.kind is TaskKind.REGRESSION:
        return _numbers(column, keep, task, where), keep
    if task.kind is TaskKind.BOUNDARY:
        return np.full(len(column), np.nan), keep
    if legend is None:
        raise LabelError("a segmentation task without a legend", where=where,
                         fix=f"set tasks.{task.name}.classes")  # fmt: skip
    values = _class_indices(text, keep, task, legend, where, codes=source.codes)
    if task.labels.soft and legend.broader:
        report["broader"] = [
            {"name": name, "classes": list(below)} for name, below in legend.broader.items()
        ]
        return values, keep
    coarse = keep & (values < 0)
    if coarse.any():
        _count(report, "coarse", int(coarse.sum()))
    return values, keep & ~coarse


def _class_indices(
    text: npt.NDArray[Any],
    keep: npt.NDArray[np.bool_],
    task: Task,
    legend: Legend,
    where: str,
    *,
    codes: bool,
) -> npt.NDArray[np.float64]:
    """Class of each row; -1 - i for the i-th broader class of several classes, NaN if unused."""
    index = {name: float(k) for k, name in enumerate(legend.names)}
    for i, (name, below) in enumerate(legend.broader.items()):
        index[name] = float(below[0]) if len(below) == 1 else -1.0 - i
    known = dict(index)
    if codes:
        by_code = zip(legend.codes, legend.names, strict=True)
        known |= {str(c): index[n] for c, n in by_code if str(c) not in index}
    mapping = task.labels.mapping
    wrong = sorted(set(mapping.values()) - set(index))
    if wrong:
        raise LabelError(
            f"`mapping` leads to {', '.join(wrong)}, not in the legend", where=where,
            allowed=", ".join(index), fix=f"correct tasks.{task.name}.labels.mapping",
        )  # fmt: skip
    names = [mapping.get(t, t) for t in text]
    used = zip(text, names, keep, strict=True)
    unknown = pd.Series([t for t, name, k in used if k and name not in known], dtype=object)
    if len(unknown):
        counts = unknown.value_counts().sort_index().sort_values(ascending=False, kind="stable")
        shown = ", ".join(f"{name!r} ({n})" for name, n in counts.head(_LISTED).items())
        more = f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
        raise LabelError(
            f"{_what(task)} has classes the legend does not know: {shown}{more}",
            where=where,
            allowed=", ".join(known),
            fix=f"translate them in tasks.{task.name}.labels.mapping, leave them out with "
            f"labels.drop, or add them to {task.classes}",
        )
    return np.array([known.get(n, np.nan) for n in names], dtype=np.float64)


def _what(task: Task) -> str:
    return f"column {task.labels.column!r}" if task.labels.column else "the raster"


def _numbers(
    column: pd.Series, keep: npt.NDArray[np.bool_], task: Task, where: str
) -> npt.NDArray[np.float64]:
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = keep & ~np.isfinite(values)
    if bad.any():
        raise LabelError(
            f"{int(bad.sum())} values of {_what(task)} are not numbers, e.g. "
            f"{column[bad].iloc[0]!r}",
            where=where, allowed=f"numbers in {task.unit or 'one unit'}",
            fix=f"correct them or leave them out with tasks.{task.name}.labels.drop",
        )  # fmt: skip
    if task.range is not None:
        low, high = task.range
        out = keep & ((values < low) | (values > high))
        if out.any():
            raise LabelError(
                f"{int(out.sum())} values of {_what(task)} are out of range: "
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
    edges = task.kind is TaskKind.BOUNDARY
    wrong = ~np.isin(kinds, _POLYGON if edges else _POLYGON + _POINT + _LINE)
    if wrong.any():
        found = sorted({str(s.geom_type) for s in shapes[wrong]})
        raise LabelError(
            f"{int(wrong.sum())} geometries of type {', '.join(found)}", where=where,
            allowed="polygons" if edges else "polygons, lines or points",
            fix="make polygons of them, or leave them out",
        )  # fmt: skip
    broken = ~shapely.is_valid(shapes) & np.isin(kinds, _POLYGON)
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


def _strips(labels: gpd.GeoDataFrame, width_m: float, report: dict[str, Any]) -> gpd.GeoDataFrame:
    """Lines as strips that end where the line ends; column ``strip`` says which ones are."""
    shapes = np.array(labels.geometry.values, dtype=object)
    line = np.isin(shapely.get_type_id(shapes), _LINE)
    report["lines"] = int(line.sum())
    shapes[line] = shapely.buffer(shapes[line], width_m / 2, cap_style="flat")
    labels = labels.set_geometry(gpd.GeoSeries(shapes, index=labels.index, crs=labels.crs))
    labels["strip"] = line
    return _drop(labels, labels.is_empty, "no_geometry", report)


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


def _unique(
    labels: gpd.GeoDataFrame, legend: Legend | None, report: dict[str, Any]
) -> gpd.GeoDataFrame:
    """One label per exact geometry: the latest, or none where values disagree."""
    keys = shapely.to_wkb(shapely.normalize(labels.geometry.values))
    group = pd.Series(keys, index=labels.index)
    below = [] if legend is None else list(legend.broader.values())
    values = labels["value"].groupby(group).transform("nunique")  # NaN (boundaries) never disagree
    fate = pd.Series("", index=labels.index)
    for _, rows in labels[values > 1].groupby(group):
        fate.loc[rows.index] = np.array(_settled(rows, below), dtype=object)
    for reason in ("contradiction", "superseded"):
        labels = _drop(labels, fate.loc[labels.index] == reason, reason, report)
    coarser = fate.loc[labels.index] == "duplicate"
    finer = labels[~coarser]
    # A label without a date sorts first: any dated one is newer knowledge.
    order = finer.assign(_date=_last(finer).fillna("")).sort_values(["_date", "label_id"])
    kept = order.index[~group.loc[order.index].duplicated(keep="last")]
    return _drop(labels, ~labels.index.isin(kept), "duplicate", report)


def _last(labels: pd.DataFrame) -> pd.Series:
    """Last day on which each label is known to be true."""
    return labels["date_end"].where(labels["date_end"].notna(), labels["date"])


def _settled(rows: pd.DataFrame, below: list[tuple[int, ...]]) -> list[str]:
    """What becomes of labels of one place that disagree: reason to leave it out, or empty."""
    value = rows["value"].to_numpy()
    coarse = np.array([bool(v < 0 and below) for v in value])
    fine = set(value[~coarse].astype(int)) if coarse.any() else set()
    # A broader class does not contradict one of its own classes, it only says less.
    if fine and all(fine <= set(below[int(-1 - v)]) for v in value[coarse]):
        if len(fine) == 1:
            return ["duplicate" if c else "" for c in coarse]
        coarse_free = _settled(rows[~coarse], [])
        rest = iter(coarse_free)
        return ["duplicate" if c else next(rest) for c in coarse]
    last = _last(rows)
    if last.isna().any():
        return ["contradiction"] * len(rows)
    newest = (last == last.max()).to_numpy()
    since = rows["date"][newest].fillna(last[newest]).min()
    if len(set(value[newest])) > 1 or (last[value != value[newest][0]] >= since).any():
        return ["contradiction"] * len(rows)
    return ["superseded" if v != value[newest][0] else "" for v in value]


def _drop(
    labels: gpd.GeoDataFrame, mask: npt.ArrayLike, reason: str, report: dict[str, Any]
) -> gpd.GeoDataFrame:
    left_out = np.asarray(mask, dtype=bool)
    _count(report, reason, int(left_out.sum()))
    return labels[~left_out]


def _count(report: dict[str, Any], reason: str, n: int) -> None:
    report["dropped"][reason] = report["dropped"].get(reason, 0) + n


def _per_class(labels: gpd.GeoDataFrame, legend: Legend) -> dict[str, dict[str, float]]:
    """Labels and area of each class, and of the broader classes that labels name."""
    area = labels.area.groupby(labels["value"]).sum()
    count = labels["value"].value_counts()
    named = [(float(k), name) for k, name in enumerate(legend.names)]
    named += [(-1.0 - i, n) for i, n in enumerate(legend.broader) if -1.0 - i in count.index]
    return {
        name: {
            "labels": int(count.get(value, 0)),
            "area_ha": round(float(area.get(value, 0.0)) / 1e4, 2),
        }
        for value, name in named
    }
