"""Label files of any kind in one form: vector files, rasters of classes or values, tables.

Every file becomes a frame with the columns of :data:`SOURCE_COLUMNS`; what then happens to its
rows is said in :mod:`terraloom.labels.read`.

A class raster is divided into connected regions of one code. They are cut by the lattice of the
spatial folds: a region that spans the map would otherwise be one label, and a label is never
divided between folds. Pixels stay whole; each goes to the block in which its centre lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyogrio
import pyproj
import rasterio
import shapely
from affine import Affine
from rasterio.features import shapes as regions_of
from rasterio.windows import Window
from shapely.geometry import shape

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.errors import LabelError
from terraloom.grid import CampaignGrid

__all__ = ["BLOCK_M", "SOURCE_COLUMNS", "Source", "read_source", "text_of"]

#: Columns of a source's frame. ``raw`` is the class or value as the file has it, ``date`` and
#: ``date_end`` are ``YYYY-MM-DD`` or None, ``group`` is text or None.
SOURCE_COLUMNS = ("label_id", "raw", "date", "date_end", "group", "geometry")

#: Cells that class rasters are cut into where the folds do not say, metres.
BLOCK_M = 1280.0

#: Most pixels of a raster's window that are read at once: a square of 50 km at 10 m.
_WINDOW_PX = 25_000_000
#: Most regions of a class raster, and most pixels of a raster of values: a label each.
_REGIONS = 300_000
_VALUES = 200_000
_CLASSES = 254

_RASTER = (".tif", ".tiff", ".vrt")
_TABLE = (".csv",)


class Source(NamedTuple):
    """Labels as a file has them.

    Attributes:
        frame: The columns of :data:`SOURCE_COLUMNS`, in the file's CRS or that of the grid.
        crs: The file's CRS, as text.
        whole: Geometries are pixels: none of them is a sliver.
        codes: Classes may be given by the code they have in the legend.
        facts: What else the report says of the file.
    """

    frame: gpd.GeoDataFrame
    crs: str
    whole: bool = False
    codes: bool = False
    facts: Mapping[str, Any] = MappingProxyType({})


def read_source(task: Task, grid: CampaignGrid, where: str, block_m: float = BLOCK_M) -> Source:
    """Read a task's label file.

    Args:
        task: The task.
        grid: Campaign grid with its AOI; rasters are read where it lies.
        where: Task and file, for messages.
        block_m: Width of the cells that class rasters are cut into, metres.

    Raises:
        LabelError: Missing or unreadable file, missing layer, column or coordinate system, an
            empty file, dates or coordinates that cannot be read, a raster that is too large.
    """
    if not Path(task.labels.file).exists():
        raise LabelError(
            "there is no such file", where=where, allowed="a vector file, raster or table",
            fix=f"correct tasks.{task.name}.labels.file (a path from the project folder)",
        )  # fmt: skip
    name = task.labels.file.lower()
    if name.endswith(_RASTER):
        return _read_raster(task, grid, where, block_m)
    return _read_table(task, where) if name.endswith(_TABLE) else _read_vector(task, where)


def text_of(value: object) -> str:
    """A value of a column as text; empty where it is missing."""
    if value is None or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))  # a column of codes with gaps is read as float
    return str(value).strip()


# --- vector files --------------------------------------------------------------------------------


def _read_vector(task: Task, where: str) -> Source:
    src = task.labels
    try:
        layers = [str(name) for name, kind in pyogrio.list_layers(src.file) if kind is not None]
    except pyogrio.errors.DataSourceError as err:
        raise LabelError(
            f"not a readable vector file ({err})", where=where,
            allowed="GeoPackage, FlatGeobuf, GeoJSON, Shapefile and the like; rasters end in "
            ".tif or .vrt, tables in .csv",
        ) from err  # fmt: skip
    layer = src.layer or (layers[0] if len(layers) == 1 else None)
    if layer not in layers:
        found = f"no layer {layer!r}" if layer else f"{len(layers)} layers and none chosen"
        raise LabelError(
            found, where=where, allowed=", ".join(layers) or "a file with a layer",
            fix=f"set tasks.{task.name}.labels.layer",
        )  # fmt: skip
    frame = gpd.read_file(src.file, layer=layer)
    columns = [str(c) for c in frame.columns if c != frame.geometry.name]
    _check_columns(columns, len(frame), task, where)
    crs = _crs(None if frame.crs is None else frame.crs.to_wkt(), task, where)
    rows = _rows(frame, task, where)
    out = gpd.GeoDataFrame(rows, geometry=frame.geometry.values, crs=crs)
    stated = frame.crs or crs
    return Source(out, _short(pyproj.CRS(stated)), facts={"layer": str(layer)})


def _check_columns(
    columns: list[str], rows: int, task: Task, where: str, more: tuple[str, ...] = ()
) -> None:
    if rows == 0:
        raise LabelError("the file has no rows", where=where, fix="give a file with labels")
    for key in ("column", "date_column", "date_end_column", "group_column", *more):
        name = getattr(task.labels, key)
        if name is not None and name not in columns:
            raise LabelError(
                f"no column {name!r}", where=where, allowed=", ".join(columns) or "no column",
                fix=f"correct tasks.{task.name}.labels.{key}",
            )  # fmt: skip


def _crs(stated: str | None, task: Task, where: str) -> pyproj.CRS:
    """CRS of a file: what it states, else ``labels.crs``; both must say the same."""
    given = task.labels.crs
    try:
        wanted = None if given is None else pyproj.CRS.from_user_input(given)
    except pyproj.exceptions.CRSError as err:
        raise LabelError(
            f"{given!r} is no coordinate system", where=where, allowed="such as EPSG:4326",
            fix=f"correct tasks.{task.name}.labels.crs",
        ) from err  # fmt: skip
    if stated is None:
        if wanted is None:
            raise LabelError(
                "the file has no coordinate system", where=where,
                allowed="any coordinate system, written in the file or in the campaign",
                fix=f"set tasks.{task.name}.labels.crs to the one the coordinates are in, such "
                "as EPSG:4326",
            )  # fmt: skip
        return wanted
    own = pyproj.CRS.from_user_input(stated)
    if wanted is not None and not own.equals(wanted, ignore_axis_order=True):
        raise LabelError(
            f"the file states {_short(own)}, the campaign {given}", where=where,
            allowed="one coordinate system",
            fix=f"remove tasks.{task.name}.labels.crs, or correct the file",
        )  # fmt: skip
    return own


def _short(crs: pyproj.CRS) -> str:
    authority = crs.to_authority()
    return ":".join(authority) if authority else crs.to_string()


def _rows(frame: pd.DataFrame, task: Task, where: str) -> dict[str, Any]:
    """All columns of a source but the geometry."""
    src = task.labels
    start, end = _dates(frame, task, where)
    none: Dates = [None] * len(frame)
    raw = none if src.column is None else frame[src.column].to_numpy()
    groups = none
    if src.group_column is not None:
        groups = [text_of(v) or None for v in frame[src.group_column]]
    return {
        "label_id": np.arange(len(frame), dtype=np.int64),
        "raw": raw,
        "date": pd.Series(start, dtype=object).to_numpy(),
        "date_end": pd.Series(end, dtype=object).to_numpy(),
        "group": pd.Series(groups, dtype=object).to_numpy(),
    }


# --- dates ---------------------------------------------------------------------------------------

Dates = list[str | None]


def _dates(frame: pd.DataFrame, task: Task, where: str) -> tuple[Dates, Dates]:
    """First and last day of each label, ``YYYY-MM-DD`` or None.

    A year or a month alone, as ISO 8601 allows, is all of its days.
    """
    src = task.labels
    if src.date is not None:
        return [src.date.isoformat()] * len(frame), [None] * len(frame)
    if src.date_column is None:
        return [None] * len(frame), [None] * len(frame)
    start = _days(frame[src.date_column], src.date_column, where)
    if src.date_end_column is None:
        last = _days(frame[src.date_column], src.date_column, where, last=True)
        return start, [b if a != b else None for a, b in zip(start, last, strict=True)]
    end = _days(frame[src.date_end_column], src.date_end_column, where, last=True)
    wrong = [i for i, (a, b) in enumerate(zip(start, end, strict=True)) if a and b and b < a]
    if wrong:
        raise LabelError(
            f"{len(wrong)} labels end before they begin, e.g. row {wrong[0]}: "
            f"{start[wrong[0]]} to {end[wrong[0]]}",
            where=where, allowed=f"{src.date_column} up to {src.date_end_column}",
            fix="correct the dates, or exchange the two columns",
        )  # fmt: skip
    return start, end


def _days(column: pd.Series, name: str, where: str, *, last: bool = False) -> Dates:
    text = pd.Series([text_of(v) for v in column], dtype=object)
    parsed = pd.to_datetime(text.where(text != ""), errors="coerce", format="ISO8601", utc=True)
    bad = parsed.isna() & (text != "")
    if bad.any():
        raise LabelError(
            f"{int(bad.sum())} dates in column {name!r} cannot be read, e.g. "
            f"{text[bad].iloc[0]!r}",
            where=where, allowed="ISO 8601, YYYY-MM-DD",
            fix="rewrite the column as year, month and day",
        )  # fmt: skip
    days: Dates = [None if pd.isna(d) else d.strftime("%Y-%m-%d") for d in parsed]
    if not last:
        return days
    span = {4: "Y", 7: "M"}
    return [
        d if d is None or not re.fullmatch(r"\d{4}(-\d\d)?", t)
        else pd.Period(d, freq=span[len(t)]).end_time.strftime("%Y-%m-%d")
        for d, t in zip(days, text, strict=True)
    ]  # fmt: skip


# --- tables --------------------------------------------------------------------------------------


def _read_table(task: Task, where: str) -> Source:
    """Points of a table; rows of one place and one class are one label, from first to last."""
    src = task.labels
    try:
        # Nothing but an empty cell is missing: NA is a country, None a class.
        table = pd.read_csv(
            src.file, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig"
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as err:
        raise LabelError(
            f"not a readable table ({err})", where=where,
            allowed="CSV in UTF-8: a row of column names, commas between the cells",
        ) from err  # fmt: skip
    columns = [str(c) for c in table.columns]
    _check_columns(columns, len(table), task, where, ("x_column", "y_column"))
    crs = _crs(None if src.crs else "EPSG:4326", task, where)
    x, y = (_coordinates(table, getattr(src, k), task, where) for k in ("x_column", "y_column"))
    if crs.is_geographic and np.nanmax(np.abs(y), initial=0) > 90:
        raise LabelError(
            f"column {src.y_column!r} reaches {y[np.nanargmax(np.abs(y))]:g}, which is no latitude",
            where=where, allowed="-90 to 90 degrees",
            fix=f"exchange tasks.{task.name}.labels.x_column and y_column, or set labels.crs",
        )  # fmt: skip
    rows = pd.DataFrame(_rows(table, task, where))
    rows["x"], rows["y"] = x, y
    places = _places(rows)
    nowhere = places["x"].isna() | places["y"].isna()
    points = np.asarray(shapely.points(places[["x", "y"]].to_numpy()), dtype=object)
    points[nowhere.to_numpy()] = None
    out = gpd.GeoDataFrame(places.drop(columns=["x", "y"]), geometry=points, crs=crs)
    return Source(out, _short(crs), facts={"table_rows": len(table)})


def _coordinates(table: pd.DataFrame, name: str, task: Task, where: str) -> npt.NDArray[np.float64]:
    values = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(values) & table[name].notna().to_numpy()
    if bad.any():
        raise LabelError(
            f"{int(bad.sum())} coordinates in column {name!r} are not numbers, e.g. "
            f"{table[name][bad].iloc[0]!r}",
            where=where, allowed="numbers with a decimal point",
            fix=f"correct them, or tasks.{task.name}.labels.x_column and y_column",
        )  # fmt: skip
    return np.asarray(values, dtype=np.float64)


def _places(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per place and class, at the first of its rows."""
    key = [rows["x"], rows["y"], rows["raw"].map(text_of)]
    first = rows.groupby(key, sort=False, dropna=False)["label_id"].transform("min")
    end = rows["date_end"].where(rows["date_end"].notna(), rows["date"])
    texts = pd.DataFrame({"begin": rows["date"].fillna(""), "last": end.fillna("")})
    texts["begin"] = texts["begin"].where(texts["begin"] != "", "~")  # sorts after every date
    begin = texts["begin"].groupby(first).min().replace("~", None)
    last = texts["last"].groupby(first).max().replace("", None)
    out = rows[rows["label_id"] == first].set_index("label_id")
    out["date"] = begin
    out["date_end"] = last.where(last != begin, None)
    out = out.reset_index().astype({"date": object, "date_end": object})
    return out.where(out.notna(), None).astype({"x": np.float64, "y": np.float64})


# --- rasters -------------------------------------------------------------------------------------


class _Pixels(NamedTuple):
    """Part of a raster over the AOI: values and use (H, W), its transform and CRS."""

    values: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    affine: Any  # the types of affine know no arrays
    crs: pyproj.CRS


def _read_raster(task: Task, grid: CampaignGrid, where: str, block_m: float) -> Source:
    src = task.labels
    for key in ("layer", "column", "date_column", "group_column"):
        if getattr(src, key) is not None:
            raise LabelError(
                f"a raster has no {key.replace('_', ' ')}", where=where,
                allowed="one band of class codes or values",
                fix=f"remove tasks.{task.name}.labels.{key}",
            )  # fmt: skip
    pixels = _read_pixels(task, grid, where)
    if task.kind is TaskKind.REGRESSION:
        raw, polygons = _boxes(pixels, task, where)
    else:
        raw, polygons = _regions(pixels, task, grid, where, block_m)
    placed = _placed(polygons, pixels, grid)
    rows = _rows(pd.DataFrame(index=range(len(raw))), task, where) | {"raw": raw}
    facts = {
        "pixels": int(pixels.valid.sum()),
        "pixels_without_value": int((~pixels.valid).sum()),
    }
    out = gpd.GeoDataFrame(rows, geometry=placed, crs=grid.crs)
    return Source(out, _short(pixels.crs), whole=True, codes=True, facts=facts)


def _read_pixels(task: Task, grid: CampaignGrid, where: str) -> _Pixels:
    try:
        dataset = rasterio.open(task.labels.file)
    except rasterio.errors.RasterioIOError as err:
        raise LabelError(
            f"not a readable raster ({err})", where=where, allowed="GeoTIFF or VRT of one band"
        ) from err
    with dataset as src:
        if src.count != 1:
            raise LabelError(
                f"the raster has {src.count} bands", where=where,
                allowed="one band of class codes or values", fix="write the band to its own file",
            )  # fmt: skip
        crs = _crs(None if src.crs is None else src.crs.to_wkt(), task, where)
        window = _window(src.transform, src.shape, crs, grid)
        if window.width <= 0 or window.height <= 0:
            raise LabelError(
                "the raster lies outside the AOI", where=where,
                allowed=f"the AOI, {', '.join(f'{v:.0f}' for v in grid.aoi.bounds)} in its grid",
                fix="check the raster's coordinate system and the campaign's `aoi`",
            )  # fmt: skip
        if window.width * window.height > _WINDOW_PX:
            raise _too_large(window.width * window.height, _WINDOW_PX, "pixels over the AOI", where)
        band = src.read(1, window=window, masked=True)
        affine = src.window_transform(window)
    valid = ~np.ma.getmaskarray(band)
    if band.dtype.kind == "f":
        valid &= np.isfinite(band.data)
    if not valid.any():
        raise LabelError(
            f"none of the raster's {valid.size} pixels over the AOI has a value", where=where,
            allowed="a pixel that is not nodata", fix="check the raster's nodata value",
        )  # fmt: skip
    return _Pixels(band.data, valid, affine, crs)


def _too_large(found: int, limit: int, what: str, where: str) -> LabelError:
    return LabelError(
        f"the raster has {found:,} {what}",
        where=where,
        allowed=f"{limit:,} or fewer",
        fix="a smaller AOI, a raster of larger pixels or with small regions removed (sieve), or "
        "sampled points of it",
    )


def _window(
    affine: Affine, shape_px: tuple[int, int], crs: pyproj.CRS, grid: CampaignGrid
) -> Window:
    """Pixels over the AOI's frame, and one more on every side."""
    frame = shapely.segmentize(shapely.box(*grid.aoi.bounds), grid.resolution_m * 50)
    x, y = shapely.get_coordinates(frame).T
    to_file = pyproj.Transformer.from_crs(grid.crs, crs, always_xy=True)
    col, row = ~affine @ to_file.transform(x, y)
    # Where a projection has no coordinates nothing is cut off.
    col = np.where(np.isfinite(col), col, 0)
    row = np.where(np.isfinite(row), row, 0)
    h, w = shape_px
    r0, c0 = max(0, int(np.floor(row.min())) - 1), max(0, int(np.floor(col.min())) - 1)
    r1, c1 = min(h, int(np.ceil(row.max())) + 1), min(w, int(np.ceil(col.max())) + 1)
    return Window(c0, r0, max(0, c1 - c0), max(0, r1 - r0))


def _boxes(
    pixels: _Pixels, task: Task, where: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.object_]]:
    """Value and outline of each pixel, in pixel coordinates."""
    n = int(pixels.valid.sum())
    if n > _VALUES:
        raise _too_large(n, _VALUES, f"{task.unit or 'value'} pixels over the AOI", where)
    row, col = np.nonzero(pixels.valid)
    return pixels.values[row, col], shapely.box(col, row, col + 1, row + 1)


def _regions(
    pixels: _Pixels, task: Task, grid: CampaignGrid, where: str, block_m: float
) -> tuple[npt.NDArray[Any], npt.NDArray[np.object_]]:
    """Code and outline of each connected region, cut by the lattice, in pixel coordinates."""
    codes, code = np.unique(pixels.values[pixels.valid], return_inverse=True)
    is_map = task.kind is TaskKind.SEGMENTATION
    if is_map and len(codes) > _CLASSES:
        raise LabelError(
            f"the raster has {len(codes)} different values, {codes[0]:g} to {codes[-1]:g}",
            where=where, allowed=f"at most {_CLASSES} class codes",
            fix="give a raster of classes, or make the task a regression",
        )  # fmt: skip
    # Parcels are not cut: that would invent edges.
    cell = _cells(pixels, grid, block_m) if is_map else np.zeros(len(code), dtype=np.int64)
    parts, part = np.unique(cell * len(codes) + code, return_inverse=True)
    image = np.zeros(pixels.valid.shape, dtype=np.int32)
    image[pixels.valid] = part
    found: list[tuple[int, Any]] = []
    for outline, number in regions_of(image, mask=pixels.valid, connectivity=4):
        found.append((int(number), shape(outline)))
        if len(found) > _REGIONS:
            raise _too_large(len(found), _REGIONS, "regions or more over the AOI", where)
    raw = codes[parts[[n for n, _ in found]] % len(codes)]
    return raw, np.array([s for _, s in found], dtype=object)


def _cells(pixels: _Pixels, grid: CampaignGrid, block_m: float) -> npt.NDArray[np.int64]:
    """Cell of the lattice of each valid pixel's centre; cells start in the grid's corner."""
    row, col = np.nonzero(pixels.valid)
    x, y = pixels.affine @ (col + 0.5, row + 0.5)
    to_grid = pyproj.Transformer.from_crs(pixels.crs, grid.crs, always_xy=True)
    px, py = ~grid.geobox.affine @ to_grid.transform(x, y)
    size = max(1, round(block_m / grid.resolution_m))
    # Pixels just outside the grid get cells of their own, never the number of an inner one.
    i = np.floor(np.clip(py, -1e9, 1e9) / size).astype(np.int64)
    j = np.floor(np.clip(px, -1e9, 1e9) / size).astype(np.int64)
    i, j = i - i.min(), j - j.min()
    return np.asarray(i * (j.max() + 1) + j, dtype=np.int64)


def _placed(
    polygons: npt.NDArray[np.object_], pixels: _Pixels, grid: CampaignGrid
) -> npt.NDArray[np.object_]:
    """Polygons in pixel coordinates brought to the grid's CRS.

    All pixel corners along an outline are kept, so that neighbours share theirs exactly: a long
    straight edge is a curve in another projection, and two neighbours with other vertices on it
    would overlap.
    """
    to_grid = pyproj.Transformer.from_crs(pixels.crs, grid.crs, always_xy=True)
    same = pixels.crs.equals(pyproj.CRS.from_user_input(grid.crs), ignore_axis_order=True)

    def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        x, y = pixels.affine @ (np.rint(xy[:, 0]), np.rint(xy[:, 1]))
        return np.column_stack([x, y] if same else to_grid.transform(x, y))

    corners = polygons if same else shapely.segmentize(polygons, 1 + 1e-9)
    return np.asarray(shapely.transform(corners, place), dtype=object)
