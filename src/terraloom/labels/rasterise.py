"""Labels on pixels: the pixel-centre rule, and a pixel whose labels disagree has no label.

All functions give the same pixels whatever window they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize
from scipy import ndimage

from terraloom.config.base import TaskKind
from terraloom.grid import pad
from terraloom.legend import IGNORE_INDEX

__all__ = ["EDGE_WIDTH_PX", "NO_LABEL", "Burned", "burn", "eroded"]

#: Index of a pixel without a label.
NO_LABEL = -1
#: The boundary target falls from 1 on the outline to 0 at this distance, pixels.
EDGE_WIDTH_PX = 3

Index = npt.NDArray[np.int32]


class Burned(NamedTuple):
    """Labels of one task on the pixels of a geobox, all (H, W).

    Attributes:
        value: Segmentation uint8 class index, 255 where there is no label; regression float32 in
            the task's unit, NaN where there is no label; boundary float32 edge target, 0-1, NaN
            where nothing is known.
        label: int32 position of the label (row of ``labels``) that a pixel's value comes from;
            -1 where there is no label.
        conflict: Pixels that lost their label because overlapping labels disagree.
    """

    value: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    label: Index
    conflict: npt.NDArray[np.bool_]


def burn(labels: gpd.GeoDataFrame, geobox: GeoBox, *, kind: TaskKind, erode_m: float = 0) -> Burned:
    """Burn labels into pixels.

    A pixel takes the polygon its centre lies in; a point goes to the pixel it lies in. Where
    several polygons of one value overlap, the smallest one is the pixel's label. Where values
    disagree the pixel has no label; disagreement is judged before erosion, because an overlap is
    evidence of an error wherever it lies. Regression points in one pixel are averaged, and a point
    goes before a polygon, whose value is a mean over more than this pixel.

    Args:
        labels: Columns ``value`` and ``geometry`` in the CRS of ``geobox``.
        geobox: Pixels wanted, (H, W).
        kind: Kind of the task.
        erode_m: Polygons are shrunk by this, metres (see :func:`eroded`); not for boundaries.

    Returns:
        Value, label and conflict, see :class:`Burned`.
    """
    box = pad(geobox, EDGE_WIDTH_PX + 1) if kind is TaskKind.BOUNDARY else geobox
    near = _touching(labels, box)
    shapes = np.asarray(labels.geometry.values[near], dtype=object)
    if kind is TaskKind.BOUNDARY:
        return _edges(shapes, near, box)
    values = labels["value"].to_numpy(dtype=np.float64)[near]
    point = np.isin(shapely.get_type_id(shapes), (0, 4))
    averaged = point & (kind is TaskKind.REGRESSION)
    whole, value = _agreed(shapes[~averaged], values[~averaged], geobox)
    conflict = whole & np.isnan(value)
    cores = shapes.copy()
    if erode_m > 0:
        cores[~point] = eroded(shapes[~point], erode_m)[0]
    index = _index(cores[~averaged], near[~averaged], geobox)
    index[conflict] = NO_LABEL
    value[index == NO_LABEL] = np.nan
    if averaged.any():
        _average_points(shapes[averaged], values[averaged], near[averaged], geobox, value, index)
        conflict &= np.isnan(value)
    if kind is TaskKind.REGRESSION:
        return Burned(value.astype(np.float32), index, conflict)
    return Burned(np.where(np.isnan(value), IGNORE_INDEX, value).astype(np.uint8), index, conflict)


def eroded(
    polygons: npt.NDArray[np.object_], erode_m: float
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.bool_]]:
    """Polygons shrunk by ``erode_m`` metres, and which ones stayed whole.

    A polygon that would vanish stays as it is: rare classes often come in small or narrow
    polygons, and a label with mixed edge pixels teaches more than none.
    """
    cores = shapely.buffer(polygons, -erode_m)
    gone = shapely.is_empty(cores)
    return np.where(gone, polygons, cores), gone


def _touching(labels: gpd.GeoDataFrame, geobox: GeoBox) -> npt.NDArray[np.intp]:
    """Rows of the labels that touch a geobox; the frame keeps its spatial index."""
    b = geobox.boundingbox
    frame = shapely.box(b.left, b.bottom, b.right, b.top)
    return np.sort(labels.sindex.query(frame, predicate="intersects"))


def _rasterise(
    pairs: Iterable[tuple[object, float]], geobox: GeoBox, fill: float, *, touched: bool = False
) -> npt.NDArray[np.float64]:
    pairs = list(pairs)
    if not pairs:
        return np.full(geobox.shape, fill, dtype=np.float64)
    out: npt.NDArray[np.float64] = rasterize(
        pairs,
        out_shape=geobox.shape,
        transform=geobox.affine,
        fill=fill,
        all_touched=touched,
        dtype="float64",
    )
    return out


def _agreed(
    shapes: npt.NDArray[np.object_], values: npt.NDArray[np.float64], geobox: GeoBox
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Labelled pixels, and their value where all labels of the pixel agree, else NaN."""
    # Later shapes overwrite earlier ones, so two passes give the largest and the least value.
    order = np.argsort(values, kind="stable")
    top = _rasterise(zip(shapes[order], values[order], strict=True), geobox, np.nan)
    back = order[::-1]
    low = _rasterise(zip(shapes[back], values[back], strict=True), geobox, np.nan)
    return ~np.isnan(top), np.where(top == low, top, np.nan)


def _index(shapes: npt.NDArray[np.object_], rows: npt.NDArray[np.intp], geobox: GeoBox) -> Index:
    order = np.lexsort((-rows, -shapely.area(shapes)))  # the smallest last, so that it stays on top
    pairs = zip(shapes[order], rows[order].astype(np.float64), strict=True)
    return _rasterise(pairs, geobox, NO_LABEL).astype(np.int32)


def _average_points(
    shapes: npt.NDArray[np.object_],
    values: npt.NDArray[np.float64],
    rows: npt.NDArray[np.intp],
    geobox: GeoBox,
    value: npt.NDArray[np.float64],
    index: Index,
) -> None:
    """Write the mean of the points of each pixel into ``value`` and the first one's row."""
    parts, of = shapely.get_parts(shapes, return_index=True)
    col, row = ~geobox.affine @ (shapely.get_x(parts), shapely.get_y(parts))
    r, c = np.floor(row).astype(int), np.floor(col).astype(int)
    h, w = geobox.shape
    inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)
    r, c, of = r[inside], c[inside], of[inside]
    total, count = np.zeros((h, w)), np.zeros((h, w))
    np.add.at(total, (r, c), values[of])
    np.add.at(count, (r, c), 1)
    value[count > 0] = total[count > 0] / count[count > 0]
    first = np.full((h, w), np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(first, (r, c), rows[of].astype(np.int32))
    index[count > 0] = first[count > 0]


def _edges(shapes: npt.NDArray[np.object_], rows: npt.NDArray[np.intp], padded: GeoBox) -> Burned:
    """Edge target of parcels on a geobox padded by ``EDGE_WIDTH_PX`` + 1, cropped to the inside."""
    index = _index(shapes, rows, padded)
    lines = _rasterise(((s, 1.0) for s in shapely.boundary(shapes)), padded, 0, touched=True) > 0
    m = EDGE_WIDTH_PX + 1
    inner = np.s_[m : padded.shape[0] - m, m : padded.shape[1] - m]
    conflict = np.zeros(padded.shape, dtype=bool)[inner]
    if not lines.any():
        # Far from every outline a pixel lies inside a parcel or nothing is known about it.
        value = np.where(index == NO_LABEL, np.nan, 0).astype(np.float32)
        return Burned(value[inner], index[inner], conflict)
    target = np.clip(1 - ndimage.distance_transform_edt(~lines) / EDGE_WIDTH_PX, 0, 1)
    far, nearest = ndimage.distance_transform_edt(index == NO_LABEL, return_indices=True)
    known = (index != NO_LABEL) | (target > 0)
    # A pixel of the outer ring belongs to the parcel whose edge it describes.
    reach = far <= EDGE_WIDTH_PX + 1
    owner = np.where(known & reach, index[tuple(nearest)], NO_LABEL).astype(np.int32)
    value = np.where(owner == NO_LABEL, np.nan, target).astype(np.float32)
    return Burned(value[inner], owner[inner], conflict)
