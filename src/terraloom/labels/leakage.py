"""Leakage audit: what held-out folds know of the training folds, and what that does to a score.

Every check is a function of finished labels and gives records
``{"check", "item", "ok", "found", "allowed", "fix"}`` as the audit of scenes does. Checked are the
distance between folds, places and parcels in two folds, pixels of the images used in two folds (by
number, and by equal values), and years of labels against years of images. :func:`split_scores`
shows what is at stake: the score of one forest on random and on spatial folds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score

from terraloom.errors import FoldError
from terraloom.labels.folds import overlap_groups
from terraloom.preprocess.checks import Record, record

__all__ = [
    "SplitScores", "audit_leakage", "check_distance", "check_groups", "check_pixels",
    "check_places", "check_twins", "check_years", "degree_blocks", "split_scores",
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
    pixels: npt.ArrayLike | None = None,
    pixel_fold: npt.ArrayLike | None = None,
) -> list[Record]:
    """All checks that the labels at hand allow.

    Args:
        labels: Columns ``fold`` (int), ``geometry`` in metres, and, where known, ``label_id`` and
            ``date`` (ISO text or timestamp).
        least_m: Smallest allowed distance between labels of different folds, metres.
        image_years: Years of the images the labels are learnt from; none: not checked.
        group: Column that names parcels or tiles; None: not checked.
        pixels: (P,) number of the source pixel of each sample (row x width + column).
        pixel_fold: (P,) fold of each sample.

    Returns:
        Records in the order distance, place, group, pixel, year.

    Raises:
        FoldError: A column that is not there.
    """
    fold = _column(labels, "fold").astype(np.int64)
    names = _names(labels)
    shapes = np.asarray(labels.geometry.values, dtype=object)
    records = check_distance(shapes, fold, least_m=least_m)
    records += check_places(labels, fold)
    if group is not None:
        records += check_groups(_column(labels, group), fold, what=group)
    if pixels is not None and pixel_fold is not None:
        records += check_pixels(pixels, pixel_fold)
    if len(image_years) and "date" in labels:
        years = np.array([_year(v) for v in labels["date"]], dtype=np.int64)
        records += check_years(years, image_years, names=names)
    return records


def check_distance(
    shapes: npt.NDArray[np.object_], fold: npt.ArrayLike, *, least_m: float = 0.0
) -> list[Record]:
    """Labels of a fold lie at least so far from those of all other folds; one record per fold.

    Args:
        shapes: (N,) geometries, metres.
        fold: (N,) fold of each.
        least_m: Smallest allowed distance, metres; 0 allows labels that touch.
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
        near = int((distance < least_m).sum())
        records.append(
            record(
                "distance between folds", f"fold {k}", ok=near == 0,
                found=f"nearest label of another fold {float(distance.min()):.1f} m away, median "
                f"{float(np.median(distance)):.0f} m; {near} of {len(mine)} labels too near",
                allowed=f"{least_m:g} m or more",
                fix="larger blocks (folds.block_m), or train without the labels that are too near",
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
        fix=f"deal whole ones to the folds (folds.method: group, by {what})",
    )  # fmt: skip


def check_pixels(pixels: npt.ArrayLike, fold: npt.ArrayLike) -> list[Record]:
    """No pixel of the source is used in two folds.

    Samples finer than the source's pixels fall on one pixel: they have one set of values.

    Args:
        pixels: (N,) number of each sample's source pixel, row x width + column.
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


@dataclass(frozen=True)
class SplitScores:
    """Scores of one forest under random and under spatial folds of equal sizes.

    Attributes:
        random_accuracy: Overall accuracy of out-of-fold predictions, random folds, 0 .. 1.
        blocked_accuracy: The same, spatial folds.
        random_f1: Macro-F1, random folds.
        blocked_f1: The same, spatial folds.
        samples: Number of samples.
    """

    random_accuracy: float
    blocked_accuracy: float
    random_f1: float
    blocked_f1: float
    samples: int

    def record(self) -> dict[str, Any]:
        """JSON form, for the report."""
        return {
            "random": {"accuracy": round(self.random_accuracy, 4), "f1": round(self.random_f1, 4)},
            "blocked": {
                "accuracy": round(self.blocked_accuracy, 4), "f1": round(self.blocked_f1, 4),
            },
            "samples": self.samples,
        }  # fmt: skip

    def line(self) -> str:
        """One sentence for the report."""
        return (
            f"A random forest scores {self.random_accuracy:.3f} on random folds and "
            f"{self.blocked_accuracy:.3f} on spatial folds (overall accuracy, {self.samples} "
            f"samples; macro-F1 {self.random_f1:.3f} and {self.blocked_f1:.3f}): random folds "
            f"would claim {100 * (self.random_accuracy - self.blocked_accuracy):+.1f} points."
        )


def split_scores(
    table: npt.ArrayLike,
    target: npt.ArrayLike,
    fold: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    trees: int = 200,
    jobs: int = 1,
) -> SplitScores:
    """Out-of-fold scores of a random forest on given folds and on the same folds shuffled.

    Args:
        table: (N, K) features of single pixels; values that are not finite become -9999.
        target: (N,) class of each, numbers or text.
        fold: (N,) spatial fold of each, two folds or more.
        rng: Seeds the forests and shuffles the folds.
        trees: Trees of a forest (count).
        jobs: Threads (count); without influence on the result.

    Returns:
        Scores; samples of a class that no other fold has count as wrong.

    Raises:
        FoldError: One fold only, or one class only.
    """
    x = np.nan_to_num(
        np.asarray(table, dtype=np.float32), nan=_INVALID, posinf=_INVALID, neginf=_INVALID
    )
    y = np.unique(np.asarray(target), return_inverse=True)[1]
    spatial = _ids(fold, len(x), "fold")
    for what, values in (("fold", spatial), ("class", y)):
        if len(np.unique(values)) < 2:
            raise FoldError(
                f"the pixel table has one {what} only", where="random against spatial folds",
                allowed="two or more", fix="more labels, or smaller blocks",
            )  # fmt: skip
    shuffled = rng.permutation(spatial)
    seed = int(rng.integers(2**31))
    scores = []
    for folds in (shuffled, spatial):
        out = np.empty(len(y), dtype=np.int64)
        for k in np.unique(folds):
            forest = RandomForestClassifier(trees, random_state=seed, n_jobs=jobs)
            forest.fit(x[folds != k], y[folds != k])
            out[folds == k] = forest.predict(x[folds == k])
        f1 = f1_score(y, out, average="macro", labels=np.unique(y), zero_division=0)
        scores.append((float(accuracy_score(y, out)), float(f1)))
    (a, f), (b, g) = scores
    return SplitScores(a, b, f, g, len(y))


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


def _year(value: Any) -> int:
    """Year of an ISO date, of a timestamp or of a number; 0 where there is none."""
    text = str(value)[:4]
    return int(text) if text.isdigit() else 0


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
