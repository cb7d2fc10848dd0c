"""Labels on pixels by a stated policy; a pixel whose labels disagree has no label.

Policies: ``centre`` is unbiased in area; ``all_touched`` grows every polygon by about half a pixel;
``fractions`` is the exact share of each pixel that each class covers (exactextract: D. Baston,
Apache-2.0), so that classes smaller than a pixel keep their area.

All functions give the same pixels whatever window they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyproj
import shapely
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from shapely.geometry.base import BaseGeometry

from terraloom.config.base import TaskKind
from terraloom.errors import LabelError
from terraloom.grid import pad
from terraloom.legend import IGNORE_INDEX

__all__ = ["EDGE_WIDTH_PX", "NO_LABEL", "Burned", "Policy", "burn", "coverage", "eroded"]

#: Index of a pixel without a label.
NO_LABEL = -1
#: The boundary target falls from 1 on the outline to 0 at this distance, pixels.
EDGE_WIDTH_PX = 3
#: Shares are rounded to this, so that the last bits of a float do not depend on the window.
_SHARE_STEP = 2.0**-16
#: Overlaps up to this area are rounding of coordinates along a shared edge, square metres.
_CONTESTED_M2 = 1e-3

Policy = Literal["centre", "all_touched", "fractions"]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Shapes = npt.NDArray[np.object_]
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
        shares: With the policy ``fractions`` (K, H, W) float32: share of the pixel that each class
            covers, 0-1; their sum is below 1 where part of the pixel has no label. Else None.
    """

    value: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    label: Index
    conflict: npt.NDArray[np.bool_]
    shares: npt.NDArray[np.float32] | None = None


def burn(
    labels: gpd.GeoDataFrame,
    geobox: GeoBox,
    *,
    kind: TaskKind,
    erode_m: float = 0,
    policy: Policy = "centre",
    min_purity: float = 0.5,
    soft: bool = False,
    classes: int = 0,
    children: Sequence[Sequence[int]] = (),
) -> Burned:
    """Burn labels into pixels.

    With ``centre`` a pixel takes the polygon its centre lies in, with ``all_touched`` any polygon
    that touches it; a point goes to the pixel it lies in. Where
    several polygons of one value overlap, the smallest one is the pixel's label. Where values
    disagree the pixel has no label; disagreement is judged before erosion, because an overlap is
    evidence of an error wherever it lies. Regression points in one pixel are averaged, and a point
    goes before a polygon, whose value is a mean over more than this pixel.

    With ``fractions`` (classes only) ground on which labels of different classes overlap belongs
    to none; a class is the pixel's if it covers the greatest share of it, alone and at least
    ``min_purity``. A point is its whole pixel, unless polygons say more of it. A pixel's label is
    the one of its class that covers most of it.

    Args:
        labels: Columns ``value`` and ``geometry`` in the CRS of ``geobox``. A value -1 - i is the
            i-th broader class of ``children``; only shares can hold it, other policies leave it
            out.
        geobox: Pixels wanted, (H, W).
        kind: Kind of the task; outlines of boundaries know no policy.
        erode_m: Polygons are shrunk by this, metres (see :func:`eroded`); not for boundaries.
        policy: Which pixels a polygon labels.
        min_purity: Least share of a class in a pixel with a label, 0-1; with ``soft``, of all
            classes together.
        soft: The pixel is learnt by its shares: its value is the class of the greatest share,
            whatever that is.
        classes: Number of classes K; with ``fractions``.
        children: Classes of each broader class; its share is spread evenly over them.

    Returns:
        Value, label and conflict, see :class:`Burned`.
    """
    box = pad(geobox, EDGE_WIDTH_PX + 1) if kind is TaskKind.BOUNDARY else geobox
    near = _touching(labels, box)
    shapes = np.asarray(labels.geometry.values[near], dtype=object)
    if kind is TaskKind.BOUNDARY:
        return _edges(shapes, near, box)
    values = labels["value"].to_numpy(dtype=np.float64)[near]
    if policy == "fractions":
        if classes < 1 or kind is not TaskKind.SEGMENTATION:
            raise LabelError(
                f"shares of {classes} classes of a task of kind {kind}", where="burn",
                allowed="segmentation, and its number of classes",
            )  # fmt: skip
        below = [np.asarray(c, dtype=np.int64) for c in children]
        found = _Labels(shapes, values.astype(np.int64), near.astype(np.int64), below)
        return _fractions(found, geobox, classes, erode_m, min_purity, soft=soft)
    if kind is TaskKind.SEGMENTATION:
        shapes, near, values = (a[values >= 0] for a in (shapes, near, values))
    touched = policy == "all_touched"
    point = np.isin(shapely.get_type_id(shapes), (0, 4))
    averaged = point & (kind is TaskKind.REGRESSION)
    whole, value = _agreed(shapes[~averaged], values[~averaged], geobox, touched)
    conflict = whole & np.isnan(value)
    cores = shapes.copy()
    if erode_m > 0:
        cores[~point] = eroded(shapes[~point], erode_m)[0]
    index = _index(cores[~averaged], near[~averaged], geobox, touched)
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
    shapes: Shapes, values: Floats, geobox: GeoBox, touched: bool
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Labelled pixels, and their value where all labels of the pixel agree, else NaN."""
    # Later shapes overwrite earlier ones, so two passes give the largest and the least value.
    order = np.argsort(values, kind="stable")
    top = _rasterise(
        zip(shapes[order], values[order], strict=True), geobox, np.nan, touched=touched
    )
    back = order[::-1]
    low = _rasterise(zip(shapes[back], values[back], strict=True), geobox, np.nan, touched=touched)
    return ~np.isnan(top), np.where(top == low, top, np.nan)


def _index(
    shapes: Shapes, rows: npt.NDArray[np.intp], geobox: GeoBox, touched: bool = False
) -> Index:
    order = np.lexsort((-rows, -shapely.area(shapes)))  # the smallest last, so that it stays on top
    pairs = zip(shapes[order], rows[order].astype(np.float64), strict=True)
    return _rasterise(pairs, geobox, NO_LABEL, touched=touched).astype(np.int32)


def _average_points(
    shapes: npt.NDArray[np.object_],
    values: npt.NDArray[np.float64],
    rows: npt.NDArray[np.intp],
    geobox: GeoBox,
    value: npt.NDArray[np.float64],
    index: Index,
) -> None:
    """Write the mean of the points of each pixel into ``value`` and the first one's row."""
    r, c, of = _pixels_of(shapes, geobox)
    h, w = geobox.shape
    total, count = np.zeros((h, w)), np.zeros((h, w))
    np.add.at(total, (r, c), values[of])
    np.add.at(count, (r, c), 1)
    value[count > 0] = total[count > 0] / count[count > 0]
    first = np.full((h, w), np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(first, (r, c), rows[of].astype(np.int32))
    index[count > 0] = first[count > 0]


def _pixels_of(points: Shapes, geobox: GeoBox) -> tuple[Ints, Ints, Ints]:
    """Row, column and number of each point (each part of a multipoint) inside the geobox."""
    parts, of = shapely.get_parts(points, return_index=True)
    col, row = ~geobox.affine @ (shapely.get_x(parts), shapely.get_y(parts))
    r, c = np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)
    h, w = geobox.shape
    inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)
    return r[inside], c[inside], of[inside].astype(np.int64)


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


# --- exact shares --------------------------------------------------------------------------------


class _Labels(NamedTuple):
    """Labels near a geobox: shape, class, row in the frame; and the classes of broader classes."""

    shapes: Shapes
    values: Ints
    rows: Ints
    children: list[Ints]

    def take(self, where: npt.NDArray[np.bool_]) -> _Labels:
        return _Labels(self.shapes[where], self.values[where], self.rows[where], self.children)

    def weights(self, classes: int) -> Floats:
        """(N, K) share of each class in each label: 1, or an even part of a broader class."""
        out = np.zeros((len(self.values), classes))
        for i, v in enumerate(self.values):
            if v >= 0:
                out[i, v] = 1
            else:
                below = self.children[-1 - v]
                out[i, below] = 1 / len(below)
        return out


def coverage(polygons: Shapes, geobox: GeoBox) -> tuple[Ints, Ints, Floats]:
    """Exact share of pixels that polygons cover.

    Args:
        polygons: (N,) polygons in the CRS of ``geobox``; empty ones cover nothing.
        geobox: Pixels, (H, W).

    Returns:
        For each pair of polygon and pixel that share ground: position of the polygon, pixel
        (row x W + column) and share of the pixel, 0-1.
    """
    full = np.flatnonzero(~shapely.is_empty(polygons))
    if not len(full):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    b, wkt = geobox.boundingbox, pyproj.CRS.from_user_input(str(geobox.crs)).to_wkt()
    # One value stands for all pixels: only the coverage is wanted.
    pixels = np.broadcast_to(np.float32(0), tuple(geobox.shape))
    raster = NumPyRasterSource(pixels, b.left, b.bottom, b.right, b.top, srs_wkt=wkt)
    frame = gpd.GeoDataFrame(geometry=polygons[full], crs=wkt)
    found = exact_extract(raster, frame, ["cell_id", "coverage"], output="pandas")
    sizes = [len(c) for c in found["cell_id"]]
    pixel = np.concatenate(found["cell_id"].to_list()).astype(np.int64)
    share = np.concatenate(found["coverage"].to_list()).astype(np.float64)
    return np.repeat(full, sizes).astype(np.int64), pixel, share


def _fractions(
    labels: _Labels, geobox: GeoBox, classes: int, erode_m: float, min_purity: float, *, soft: bool
) -> Burned:
    point = np.isin(shapely.get_type_id(labels.shapes), (0, 4))
    polygons, points = labels.take(~point), labels.take(point)
    n = geobox.shape[0] * geobox.shape[1]
    parts, contested = _uncontested(polygons, erode_m)
    of, pixel, cover = coverage(parts, geobox)
    shares = _shares(polygons, parts, (of, pixel, cover), geobox, classes)
    _, at, disputed = coverage(contested, geobox)
    lost = np.minimum(np.bincount(at, disputed, n), 1)
    quarrel, owner = _add_points(points, geobox, shares)
    shares = np.rint(np.minimum(shares, 1) / _SHARE_STEP) * _SHARE_STEP
    top = shares.max(axis=0)
    basis = shares.sum(axis=0) if soft else top
    # Of two classes that cover the same share, none is the pixel's.
    alone = (shares == top).sum(axis=0) == 1
    least = min_purity - classes * _SHARE_STEP  # shares are rounded
    has = (basis >= least) & (basis > 0) & (alone | soft)
    value = np.where(has, shares.argmax(axis=0), IGNORE_INDEX)
    index = np.full(n, NO_LABEL, dtype=np.int32)
    fits = polygons.weights(classes + 1)[of, np.minimum(value[pixel], classes)] > 0
    order = np.lexsort((-polygons.rows[of[fits]], cover[fits]))  # the greatest share last
    index[pixel[fits][order]] = polygons.rows[of[fits]][order]
    index = np.where(has & (owner != NO_LABEL), owner, index)
    conflict = (quarrel | ((lost > 0) & (basis + lost >= least))) & ~has
    h, w = geobox.shape
    return Burned(
        value.astype(np.uint8).reshape(h, w),
        np.where(has, index, NO_LABEL).astype(np.int32).reshape(h, w),
        conflict.reshape(h, w),
        shares.astype(np.float32).reshape(classes, h, w),
    )


def _uncontested(labels: _Labels, erode_m: float) -> tuple[Shapes, Shapes]:
    """Ground of each polygon that no other class claims, shrunk; and the ground in dispute.

    A label of one of its own classes takes its ground from a broader class.
    """
    shapes, values = labels.shapes, labels.values
    parts = eroded(shapes, erode_m)[0].copy() if erode_m > 0 else shapes.copy()
    i, j = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    differ = (i < j) & (values[i] != values[j])
    i, j = i[differ], j[differ]
    shared = shapely.intersection(shapes[i], shapes[j])
    real = shapely.area(shared) > _CONTESTED_M2
    taken: dict[int, list[BaseGeometry]] = {}
    disputed = []
    for a, b, piece in zip(i[real], j[real], shared[real], strict=True):
        broader = {
            x for x, y in ((a, b), (b, a))
            if values[x] < 0 and values[y] in labels.children[-1 - values[x]]
        }  # fmt: skip
        for x in broader or (a, b):
            taken.setdefault(int(x), []).append(piece)
        if not broader:
            disputed.append(piece)
    for x, pieces in taken.items():
        parts[x] = shapely.difference(parts[x], shapely.union_all(pieces))
    whole = shapely.union_all(disputed) if disputed else shapely.Polygon()
    # Polygons that also touch leave lines in their intersection.
    ground = [g for g in shapely.get_parts(whole) if shapely.get_dimensions(g) == 2]
    return parts, np.array(ground, dtype=object)


def _shares(
    labels: _Labels,
    parts: Shapes,
    covered: tuple[Ints, Ints, Floats],
    geobox: GeoBox,
    classes: int,
) -> Floats:
    """(K, H x W) share of each class; ground that two labels of a class cover counts once."""
    n = geobox.shape[0] * geobox.shape[1]
    i, j = shapely.STRtree(parts).query(parts, predicate="intersects")
    same = (i < j) & (labels.values[i] == labels.values[j])
    i, j = i[same], j[same]
    real = shapely.area(shapely.intersection(parts[i], parts[j])) > 0
    i, j = i[real], j[real]
    links = coo_matrix((np.ones(len(i)), (i, j)), shape=(len(parts), len(parts)))
    group = connected_components(links, directed=False)[1] if len(parts) else np.zeros(0, int)
    shared = np.isin(np.arange(len(parts)), np.union1d(i, j))
    joined = np.unique(group[shared])
    unions = [shapely.union_all(parts[shared & (group == g)]) for g in joined]
    first = np.array([np.flatnonzero(group == g)[0] for g in joined], dtype=np.int64)
    of, pixel, cover = covered
    single = ~shared[of]
    of2, pixel2, cover2 = coverage(np.array(unions, dtype=object), geobox)
    of = np.concatenate([of[single], first[of2]])
    pixel = np.concatenate([pixel[single], pixel2])
    cover = np.concatenate([cover[single], cover2])
    weights = labels.weights(classes)
    shares = np.zeros((classes, n))
    for k in np.flatnonzero(weights.any(axis=0)):
        shares[k] = np.bincount(pixel, cover * weights[of, k], n)
    return shares


def _add_points(
    points: _Labels, geobox: GeoBox, shares: Floats
) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Write points into the shares; pixels where they disagree, and each pixel's first point."""
    n = shares.shape[1]
    quarrel, owner = np.zeros(n, dtype=bool), np.full(n, NO_LABEL, dtype=np.int64)
    if not len(points.shapes):
        return quarrel, owner
    r, c, of = _pixels_of(points.shapes, geobox)
    pixel = r * geobox.shape[1] + c
    order = np.argsort(-points.rows[of], kind="stable")  # the first row last, so that it stays
    owner[pixel[order]] = points.rows[of][order]
    weights = points.weights(len(shares))
    said = np.zeros_like(shares)
    said[:, pixel[order]] = weights[of[order]].T
    other = np.any(weights[of] != said[:, pixel].T, axis=1)
    quarrel[pixel[other]] = True
    ground = shares.sum(axis=0)
    # Polygons agree with a point if most of what they cover of its pixel is of its class.
    quarrel |= (owner != NO_LABEL) & (np.sum(shares * (said > 0), axis=0) < ground / 2)
    empty = (owner != NO_LABEL) & (ground == 0)
    shares[:, empty] = said[:, empty]
    shares[:, quarrel] = 0
    return quarrel, owner
