"""Leakage audit: what held-out folds know of the training folds.

Every check is a function of finished labels and gives records
``{"check", "item", "ok", "found", "allowed", "fix"}`` as the audit of scenes does. Checked are the
distance between folds, places and parcels in two folds, pixels of the images used in two folds (by
number, and by equal values), and years of labels against years of images. What is at stake is
shown by :func:`terraloom.train.baseline.split_scores`: one forest on random and on given folds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox

from terraloom.errors import FoldError
from terraloom.labels.folds import group_names, label_years, overlap_groups
from terraloom.preprocess.checks import Record, record

__all__ = [
    "audit_leakage", "check_distance", "check_groups", "check_pixels", "check_places",
    "check_twins", "check_years", "degree_blocks",
]  # fmt: skip

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Leaks that are named one by one; the rest are counted.
NAMED = 5
#: Rows with fewer different values than this may be equal by chance.
LEAST_DIFFERENT = 6
#: Stands for values that are not finite: outside of every band, so that trees can split it off.
_INVALID = -9999.0


def audit_leakage(
    labels: gpd.GeoDataFrame,
    *,
    least_m: float = 0.0,
    image_years: Collection[int] = (),
    group: str | None = None,
    geobox: GeoBox | None = None,
    pixels: npt.ArrayLike | None = None,
    pixel_fold: npt.ArrayLike | None = None,
    buffer_m: float = 0.0,
    years: bool = False,
) -> list[Record]:
    """All checks that the labels at hand allow.

    Args:
        labels: Columns ``fold`` (int), ``geometry`` in metres, and, where known, ``label_id``,
            ``date`` (ISO text or timestamp), ``group`` (with ``task``) and ``region``.
        least_m: Smallest allowed distance between labels of different folds, metres.
        image_years: Years of the images the labels are learnt from; none: not checked.
        group: Column that names parcels or tiles; default: ``group``, where any label has one.
        geobox: Pixels of the images; with it, labels whose representative points share a pixel are
            one source pixel.
        pixels: (P,) number of the source pixel of each sample (row x width + column), instead.
        pixel_fold: (P,) fold of each sample.
        buffer_m: Labels closer than this to a held-out one do not train (folds.buffer_m), metres.
        years: Folds hold out years: that a place, parcel or pixel of another year was trained on is
            what they test, and no leak; instead no year may be in two folds.

    Returns:
        Records in the order distance, place, group, region, pixel, year.

    Raises:
        FoldError: A column that is not there.
    """
    fold = _column(labels, "fold").astype(np.int64)
    names = _names(labels)
    if years:
        records = [_wanted(len(labels)), *check_groups(label_years(labels), fold, what="year")]
    else:
        shapes = np.asarray(labels.geometry.values, dtype=object)
        records = check_distance(shapes, fold, least_m=least_m, buffer_m=buffer_m)
        records += check_places(labels, fold)
        if group is not None:
            records += check_groups(_column(labels, group), fold, what=group)
        elif (named := group_names(labels)) is not None:
            own = named.astype(object)
            own[labels["group"].isna().to_numpy()] = None
            records += check_groups(own, fold)
        if "region" in labels:
            records += check_groups(_column(labels, "region"), fold, what="region")
        if geobox is not None and pixels is None:
            records += check_pixels(_pixels_of(labels, geobox), fold)
        elif pixels is not None and pixel_fold is not None:
            records += check_pixels(pixels, pixel_fold)
    if len(image_years) and "date" in labels:
        records += check_years(label_years(labels), image_years, names=names)
    return records


def _wanted(n: int) -> Record:
    return record(
        "same place in two folds", "all labels", ok=True,
        found=f"not checked for {n} labels: folds hold out years, so a place that was trained on "
        "in another year is what they test", allowed="any",
    )  # fmt: skip


def _pixels_of(labels: gpd.GeoDataFrame, geobox: GeoBox) -> npt.NDArray[np.str_]:
    """Name of the pixel in which each label's representative point lies."""
    points = labels.representative_point()
    at = np.floor(~geobox.affine @ (points.x.to_numpy(), points.y.to_numpy())).astype(np.int64)
    return np.array([f"in row {row}, column {col}" for col, row in at.T], dtype=np.str_)


def check_distance(
    shapes: npt.NDArray[np.object_],
    fold: npt.ArrayLike,
    *,
    least_m: float = 0.0,
    buffer_m: float = 0.0,
) -> list[Record]:
    """Labels of a fold lie at least so far from those of all other folds; one record per fold.

    Args:
        shapes: (N,) geometries, metres.
        fold: (N,) fold of each.
        least_m: Smallest allowed distance, metres; 0 allows labels that touch.
        buffer_m: Labels closer than this do not train while the other is held out: no leak.
    """
    folds = _ids(fold, len(shapes), "fold")
    records = []
    for k in np.unique(folds):
        mine, others = shapes[folds == k], shapes[folds != k]
        if not len(others):
            raise FoldError(
                f"all {len(folds)} labels lie in fold {k}", where="folds", allowed="two folds",
                fix="a smaller folds.block_m, or more labels",
            )  # fmt: skip
        tree = shapely.STRtree(others)
        _, distance = tree.query_nearest(mine, return_distance=True, all_matches=False)
        near = int((distance < least_m).sum()) if buffer_m < least_m else 0
        apart = int((distance < buffer_m).sum())
        kept = f"; {apart} within the buffer of {buffer_m:g} m" if buffer_m > 0 else ""
        records.append(
            record(
                "distance between folds", f"fold {k}", ok=near == 0,
                found=f"nearest label of another fold {float(distance.min()):.1f} m away, median "
                f"{float(np.median(distance)):.0f} m; {near} of {len(mine)} labels too near{kept}",
                allowed=f"{least_m:g} m or more",
                fix="larger blocks (folds.block_m), or a buffer of that width (folds.buffer_m)",
            )
        )  # fmt: skip
    return records


def check_places(labels: gpd.GeoDataFrame, fold: npt.ArrayLike) -> list[Record]:
    """Labels that overlap, transitively, are one place and lie in one fold.

    Args:
        labels: Geometries in metres; ``label_id`` names them where it is there.
        fold: (N,) fold of each.
    """
    place = overlap_groups(labels)
    names = _names(labels)
    leaks = _divided(place, _ids(fold, len(labels), "fold"))
    return _listed(
        "same place in two folds",
        [(" + ".join(names[np.flatnonzero(place == g)][:3]), text) for g, text in leaks],
        f"{int(place.max()) + 1} places, each in one fold",
        allowed="labels that overlap in one fold",
        fix="deal folds anew (folds join overlapping labels), or drop one of them (labels.drop)",
    )


def check_groups(
    groups: npt.ArrayLike, fold: npt.ArrayLike, *, what: str = "group"
) -> list[Record]:
    """A parcel, polygon or tile lies in one fold.

    Args:
        groups: (N,) ids, numbers or text; None and NaN are labels without a group.
        fold: (N,) fold of each.
        what: Name of the ids.
    """
    ids = np.asarray(groups)
    known = np.array([v is not None and v == v for v in ids.tolist()], dtype=bool)
    text = np.array([str(v) for v in ids[known].tolist()])
    leaks = _divided(text, _ids(fold, len(ids), "fold")[known])
    return _listed(
        f"same {what} in two folds", [(f"{what} {g}", t) for g, t in leaks],
        f"{len(np.unique(text))} of {what}, each in one fold",
        allowed=f"every {what} in one fold",
        fix=f"deal whole ones to the folds (tasks[].labels.group_column names the {what})",
    )  # fmt: skip


def check_pixels(pixels: npt.ArrayLike, fold: npt.ArrayLike) -> list[Record]:
    """No pixel of the source is used in two folds.

    Samples finer than the source's pixels fall on one pixel: they have one set of values.

    Args:
        pixels: (N,) number of each sample's source pixel, row x width + column; or its name.
        fold: (N,) fold of each.
    """
    ids = np.asarray(pixels)
    leaks = _divided(ids, _ids(fold, len(ids), "fold"))
    return _listed(
        "same source pixel in two folds", [(f"pixel {p}", t) for p, t in leaks],
        f"{len(np.unique(ids))} pixels, each in one fold", allowed="every pixel in one fold",
        fix="blocks that end at edges of the coarsest source's pixels: folds.block_m a multiple "
        "of their size",
    )  # fmt: skip


def check_twins(values: npt.ArrayLike, fold: npt.ArrayLike) -> list[Record]:
    """No two samples of different folds have equal values in all columns: one pixel under two ids.

    Args:
        values: (N, K) values of each sample, such as a series; rows with fewer than six different
            finite values may be equal by chance and are not compared.
        fold: (N,) fold of each.
    """
    table = np.asarray(values, dtype=np.float64)
    folds = _ids(fold, len(table), "fold")
    ordered = np.sort(table, axis=1)
    # NaN sorts last and differs from itself: a difference counts only where it is finite.
    telling = (np.diff(ordered, axis=1) > 0).sum(axis=1) + 1 >= LEAST_DIFFERENT
    rows = np.flatnonzero(telling)
    leaks: list[tuple[Any, str]] = []
    if len(rows):
        filled = np.nan_to_num(table[rows], nan=_INVALID)
        twin = np.unique(filled, axis=0, return_inverse=True)[1].reshape(-1)
        leaks = [
            (" = ".join(f"row {r}" for r in rows[np.flatnonzero(twin == g)][:3]), t)
            for g, t in _divided(twin, folds[rows])
        ]
    return _listed(
        "equal samples in two folds", leaks, f"{len(rows)} samples compared, none equal",
        allowed="values of a sample in one fold", fix="drop one of each, or give them one group",
    )  # fmt: skip


def check_years(
    label_years: npt.ArrayLike,
    image_years: Collection[int],
    *,
    names: npt.NDArray[np.str_] | None = None,
    allowed_gap: int = 0,
) -> list[Record]:
    """Labels are of a year the images are of.

    Args:
        label_years: (N,) year of each label; 0 or less: not known, and said so.
        image_years: Years of the images.
        names: (N,) names of the labels.
        allowed_gap: Years a label may be off the nearest year of the images.

    Returns:
        One record per year of the labels that is off, or one that all is well, and one for labels
        without a year.
    """
    years = np.asarray(label_years, dtype=np.int64)
    images = np.array(sorted(set(image_years)), dtype=np.int64)
    if not len(images):
        raise FoldError("no year of an image", where="leakage audit", allowed="one or more")
    text = ", ".join(str(y) for y in images)
    ids = np.arange(len(years)).astype(str) if names is None else names
    known = years > 0
    records = []
    for year in np.unique(years[known]):
        gap = int(np.abs(images - year).min())
        if gap > allowed_gap:
            mine = ids[years == year]
            more = f" and {len(mine) - 3} more" if len(mine) > 3 else ""
            records.append(
                record(
                    "label year", f"labels of {year}", ok=False,
                    found=f"{len(mine)} labels ({', '.join(mine[:3])}{more}) are {gap} years off "
                    f"the images of {text}",
                    allowed=f"{allowed_gap} years", fix="labels of the images' years, or images of "
                    "the labels' years (cube.periods)",
                )
            )  # fmt: skip
    if not records:
        records.append(
            record(
                "label year", "all labels", ok=True,
                found=f"{int(known.sum())} labels within {allowed_gap} years of the images of "
                f"{text}", allowed=f"{allowed_gap} years",
            )
        )  # fmt: skip
    if not known.all():
        records.append(
            record(
                "label year", "labels without a date", ok=False,
                found=f"{int((~known).sum())} labels have no date", allowed="a date or year each",
                fix="name the column with dates: tasks[].labels.date_column",
            )
        )  # fmt: skip
    return records


def degree_blocks(lon: npt.ArrayLike, lat: npt.ArrayLike, size_deg: float = 1.0) -> Ints:
    """Number of the block of each point in a lattice of whole degrees, (N,).

    Args:
        lon: (N,) longitude, degrees.
        lat: (N,) latitude, degrees.
        size_deg: Width of a block, degrees.
    """
    cells = np.column_stack([np.floor(np.asarray(v) / size_deg) for v in (lon, lat)])
    return np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _column(labels: gpd.GeoDataFrame, name: str) -> npt.NDArray[Any]:
    if name not in labels:
        raise FoldError(
            f"labels have no column {name!r}", where="leakage audit",
            allowed=", ".join(map(str, labels.columns)), fix="name one of these",
        )  # fmt: skip
    return np.asarray(labels[name].to_numpy())


def _names(labels: gpd.GeoDataFrame) -> npt.NDArray[np.str_]:
    ids = labels["label_id"] if "label_id" in labels else np.arange(len(labels))
    return np.array([f"label {v}" for v in ids], dtype=np.str_)


def _ids(values: npt.ArrayLike, n: int, what: str) -> Ints:
    ids = np.asarray(values)
    if ids.shape != (n,) or not n or not np.issubdtype(ids.dtype, np.integer):
        raise FoldError(
            f"{what} has the shape {ids.shape} and type {ids.dtype}", where="leakage audit",
            allowed=f"({n},) whole numbers, one label or more",
        )  # fmt: skip
    return ids.astype(np.int64)


def _divided(groups: npt.NDArray[Any], fold: Ints) -> list[tuple[Any, str]]:
    """Groups in more than one fold, and how many members each fold has."""
    if not len(groups):
        return []
    names, at = np.unique(groups, return_inverse=True)
    pairs, members = np.unique(np.column_stack([at, fold]), axis=0, return_counts=True)
    leaks = []
    for g in np.flatnonzero(np.bincount(pairs[:, 0]) > 1):
        mine = pairs[:, 0] == g
        parts = zip(pairs[mine, 1], members[mine], strict=True)
        leaks.append((names[g], ", ".join(f"{m} in fold {f}" for f, m in parts)))
    return leaks


def _listed(
    check: str, leaks: list[tuple[str, str]], fine: str, *, allowed: str, fix: str
) -> list[Record]:
    """A record per leak, the last one counts those that are not named; or one that all is well."""
    if not leaks:
        return [record(check, "all labels", ok=True, found=fine, allowed=allowed)]
    out = [
        record(check, name, ok=False, found=text, allowed=allowed, fix=fix)
        for name, text in leaks[:NAMED]
    ]
    if len(leaks) > NAMED:
        found = f"{len(leaks) - NAMED} more"
        out.append(record(check, "others", ok=False, found=found, allowed=allowed, fix=fix))
    return out
