"""Wrong labels found by spatially held-out predictions: listed for people, left out of training.

What decides is :func:`terraloom.labels.noise.suspect_labels` on the mean held-out probability of
each label's pixels. The probabilities must come from models that saw neither the label nor its
neighbours (:func:`held_out_probabilities`); where a fold is kept for testing, they must not have
seen that fold either, and none of its labels is judged or taken away.

Reference:
    Northcutt, Jiang, Chuang (2021), Confident Learning: Estimating Uncertainty in Dataset Labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyogrio

from terraloom.errors import FoldError, LabelError
from terraloom.io import atomic
from terraloom.labels.noise import confident_joint, noise_matrix, suspect_labels
from terraloom.legend import IGNORE_INDEX

__all__ = [
    "SUSPECTS_LAYER",
    "Cleaning",
    "LabelReview",
    "held_out_probabilities",
    "label_weights",
    "pixel_weights",
    "review_counts",
    "review_in_rounds",
    "review_labels",
    "transition",
    "write_review",
]

Float = npt.NDArray[np.float64]
Cleaning = Literal["drop", "weigh"]
#: From features (S, D) to class probabilities (S, K).
Predict = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
#: From features (S, D) and classes (S,) to a fitted model.
Fit = Callable[[npt.NDArray[Any], npt.NDArray[Any]], Predict]

#: Layer of the GeoPackage for review.
SUSPECTS_LAYER = "suspects"
#: A fixed time stamp keeps GeoPackages byte-identical.
_GPKG_TIME = "2000-01-01T00:00:00Z"
#: A class keeps at least this many labels: one that the model cannot see is not cleaned away.
_LEAST_LABELS = 3


@dataclass(frozen=True)
class LabelReview:
    """Labels held against the held-out predictions of their pixels, in the order of ``ids``.

    Attributes:
        ids: (L,) label ids, ascending.
        given: (L,) class index of the label.
        likely: (L,) class that counts; the label's own where none speaks against it.
        flags: (L,) ``given`` and ``likely`` differ: the label is probably wrong.
        score: (L,) 0-1, 1 = surely wrong: (1 + p_other - p_given) / 2 with the most probable
            other class; .5 is a tie. Independent of the thresholds that flag.
        mean: (L, K) mean held-out probability over the label's pixels.
        pixels: (L,) pixels of the label.
        noise: (K, K) estimated probability of a label (column) given the true class (row), from
            the calibrated confident joint; for calibration. For training see :func:`transition`.
    """

    ids: npt.NDArray[np.int64]
    given: npt.NDArray[np.intp]
    likely: npt.NDArray[np.intp]
    flags: npt.NDArray[np.bool_]
    score: Float
    mean: Float
    pixels: npt.NDArray[np.int64]
    noise: Float


def held_out_probabilities(
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    fold: npt.NDArray[Any],
    fit: Fit,
    *,
    use: npt.NDArray[np.bool_] | None = None,
) -> Float:
    """Class probabilities of each sample by a model that was fitted on the other folds, (S, K).

    Args:
        x: (S, D) features.
        y: (S,) classes.
        fold: (S,) spatial fold. Samples of a fold kept for testing must not be among them.
        fit: Features and classes to a function from features to probabilities (S, K); it must
            give all K classes even when some are not among its samples.
        use: (S,) samples to fit on; default: all. Probabilities are given for all.

    Raises:
        FoldError: Fewer than two folds.
    """
    folds = np.unique(fold)
    fits = np.ones(len(y), dtype=bool) if use is None else use
    if len(folds) < 2:
        raise FoldError(f"{len(folds)} fold with labels", where="held-out probabilities",
                        allowed="2 or more", fix="use more folds or more labels")  # fmt: skip
    parts = []
    for f in folds:
        rows = fits & (fold != f)
        if not rows.any():
            raise FoldError(f"no sample outside fold {f}", where="held-out probabilities",
                            fix="use more labels")  # fmt: skip
        parts.append(np.asarray(fit(x[rows], y[rows])(x[fold == f])))
    out = np.empty((len(y), parts[0].shape[1]), dtype=np.float64)
    for f, p in zip(folds, parts, strict=True):
        out[fold == f] = p
    return out


def review_in_rounds(
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    fold: npt.NDArray[Any],
    fit: Fit,
    label_of: npt.NDArray[Any] | None = None,
    *,
    rounds: int = 3,
) -> LabelReview:
    """Judge labels with models that are fitted without the suspects of the round before.

    With many wrong labels the models of the first round are poor judges: a quarter of what they
    suspect may be sound. Every round judges all labels again.

    Args:
        x: (S, D) features.
        y: (S,) classes.
        fold: (S,) spatial fold; see :func:`held_out_probabilities`.
        fit: See :func:`held_out_probabilities`.
        label_of: See :func:`review_labels`.
        rounds: Number of rounds (count), at least 1.

    Raises:
        FoldError: Fewer than two folds.
        LabelError: As of :func:`review_labels`, or no round.
    """
    if rounds < 1:
        raise LabelError(f"{rounds} rounds", where="label review", allowed="1 or more")
    ids = np.arange(len(y)) if label_of is None else np.asarray(label_of)
    use = np.ones(len(y), dtype=bool)
    for _ in range(rounds):
        p = held_out_probabilities(x, y, fold, fit, use=use)
        review = review_labels(p, y, ids)
        at = np.minimum(np.searchsorted(review.ids, ids), len(review.ids) - 1)
        use = (label_weights(review) > 0)[at] | (review.ids[at] != ids)  # who is not judged stays
    return review


def review_labels(
    probabilities: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    label_of: npt.NDArray[Any] | None = None,
    *,
    fold: npt.NDArray[Any] | None = None,
    held_out_fold: int | None = None,
) -> LabelReview:
    """Judge labels by the held-out probabilities of their pixels.

    Args:
        probabilities: (S, K) per pixel, from models that saw neither this pixel's fold nor
            ``held_out_fold``.
        labels: (S,) class index of the pixel's label.
        label_of: (S,) id of the label (polygon) a pixel belongs to, negative = none; default:
            each pixel is a label of its own.
        fold: (S,) fold of each pixel; only with ``held_out_fold``.
        held_out_fold: Labels of this fold are left out: they are neither judged nor part of what
            decides.

    Raises:
        LabelError: Shapes do not fit, probabilities are none, no label is left, or a label has two
            classes.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    of = np.arange(len(y)) if label_of is None else np.asarray(label_of)
    use = _judged(p, y, of, fold, held_out_fold)
    p, y = p[use], y[use].astype(np.intp)
    ids, first, where, pixels = np.unique(
        of[use].astype(np.int64), return_index=True, return_inverse=True, return_counts=True
    )
    given = y[first]
    if (y != given[where]).any():
        label = int(ids[where[np.flatnonzero(y != given[where])[0]]])
        raise LabelError("its pixels have different classes", where=f"label {label}",
                         allowed="one class per label")  # fmt: skip
    classes = p.shape[1]
    sums = [np.bincount(where, p[:, k], minlength=len(ids)) for k in range(classes)]
    mean = np.stack(sums, axis=1) / pixels[:, None]
    flags, likely = suspect_labels(mean, given)
    row = np.arange(len(ids))
    noise = noise_matrix(confident_joint(mean, given))
    other = mean.copy()
    other[row, given] = -np.inf
    score = (1 + other.max(axis=1) - mean[row, given]) / 2
    return LabelReview(ids, given, likely, flags, score, mean, pixels, noise)


def _judged(
    p: Float,
    y: npt.NDArray[Any],
    of: npt.NDArray[Any],
    fold: npt.NDArray[Any] | None,
    held_out_fold: int | None,
) -> npt.NDArray[np.bool_]:
    """Pixels that take part, after the checks of :func:`review_labels`."""
    sizes = {len(p), len(y), len(of), len(y) if fold is None else len(fold)}
    if p.ndim != 2 or p.shape[1] < 2 or len(sizes) > 1:
        raise LabelError(f"probabilities {p.shape}, labels {y.shape}, label ids {of.shape}",
                         where="label review", allowed="(S, K), (S,), (S,)")  # fmt: skip
    if (fold is None) != (held_out_fold is None):
        raise LabelError("only one of fold and held_out_fold", where="label review",
                         allowed="both or none")  # fmt: skip
    use = (of >= 0) & (y != IGNORE_INDEX)
    if fold is not None:
        use &= np.asarray(fold) != held_out_fold
    if not use.any():
        raise LabelError("no label to judge", where="label review", allowed="at least one",
                         fix="check folds and label ids")  # fmt: skip
    if not 0 <= y[use].min() <= y[use].max() < p.shape[1]:
        raise LabelError(f"classes {y[use].min()}-{y[use].max()}", where="label review",
                         allowed=f"0-{p.shape[1] - 1}")  # fmt: skip
    if not (np.isfinite(p[use]) & (p[use] >= 0)).all():
        raise LabelError(
            "probabilities that are negative or not finite", where="label review", allowed="0-1",
            fix="give a probability for each labelled pixel",
        )  # fmt: skip
    return np.asarray(use, dtype=bool)


def label_weights(
    review: LabelReview, how: Cleaning = "drop", *, least: int = _LEAST_LABELS
) -> Float:
    """Weight of each label in training, (L,) 0-1; sound labels have 1.

    Args:
        review: The review.
        how: ``drop``: suspects get 0. ``weigh``: p_given / p_likely, below 1.
        least: A class keeps at least this many labels with full weight (all it has where it has
            fewer): its least doubtful suspects stay.

    Raises:
        LabelError: ``how`` is neither.
    """
    if how not in ("drop", "weigh"):
        raise LabelError(f"how = {how!r}", where="label cleaning", allowed="drop, weigh")
    row = np.arange(len(review.ids))
    likely = np.maximum(review.mean[row, review.likely], 1e-12)
    doubt = np.zeros(len(row)) if how == "drop" else review.mean[row, review.given] / likely
    weight = np.where(review.flags, np.minimum(doubt, 1.0), 1.0)
    for k in np.unique(review.given):
        mine = np.flatnonzero(review.given == k)
        missing = least - int((~review.flags[mine]).sum())
        if missing > 0:
            suspects = mine[review.flags[mine]]
            weight[suspects[np.argsort(review.score[suspects], kind="stable")[:missing]]] = 1.0
    return weight


def transition(review: LabelReview, weights: Float | None = None) -> Float:
    """Label noise that training meets, for the loss ``forward``: (K, K), rows sum to 1.

    Args:
        review: The review.
        weights: (L,) weights of the labels in training: what cleaning has taken away is no noise
            any more. Default: all labels count.

    Returns:
        Probability of a label (column) given the true class (row); one right label per class is
        added, so that few labels make no certainty.
    """
    return noise_matrix(confident_joint(review.mean, review.given, weights=weights), prior=1.0)


def pixel_weights(
    review: LabelReview, weights: Float, label_of: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Weights of labels spread to their pixels, float32; 1 where a label was not judged.

    Args:
        review: The review.
        weights: (L,) weights of its labels, of :func:`label_weights`.
        label_of: Label id of each pixel, any shape; ids as in the review.
    """
    of = np.asarray(label_of)
    at = np.minimum(np.searchsorted(review.ids, of), len(review.ids) - 1)
    return np.where(review.ids[at] == of, weights[at], 1.0).astype(np.float32)


def review_counts(review: LabelReview, weights: Float) -> dict[str, Any]:
    """What cleaning did, for records: counts of labels, and the suspects' share (percent)."""
    return {
        "labels": len(weights),
        "suspects": int(review.flags.sum()),
        "suspects_pct": round(100 * float(review.flags.mean()), 3),
        "dropped": int((weights == 0).sum()),
        "down_weighted": int(((weights > 0) & (weights < 1)).sum()),
        "kept_for_their_class": int((review.flags & (weights == 1)).sum()),
    }


def write_review(
    path: Path | str, review: LabelReview, labels: gpd.GeoDataFrame, names: Sequence[str]
) -> int:
    """Write the suspects as a GeoPackage, atomically: what a person should look at, surest first.

    Layer ``suspects``: ``label_id``, ``class``, ``likely``, ``score``, ``p_class``,
    ``p_likely``, ``pixels`` and the label's geometry. Where there are none, the layer is empty.

    Args:
        path: File to write; the same review gives the same bytes.
        review: The review.
        labels: The task's labels, with columns ``label_id`` and ``geometry`` and a CRS.
        names: Name of each class.

    Returns:
        Number of suspects.

    Raises:
        LabelError: A suspect is not among the labels, an id stands twice, or names are missing.
    """
    ids = labels["label_id"].to_numpy()
    order = np.lexsort((review.ids, -review.score))
    order = order[review.flags[order]]
    lost = np.setdiff1d(review.ids[order], ids)
    if len(lost) or len(np.unique(ids)) < len(ids) or len(names) != review.mean.shape[1]:
        raise LabelError(
            f"{len(lost)} suspects without a label, {len(ids) - len(np.unique(ids))} ids twice, "
            f"{len(names)} class names", where=str(path),
            allowed=f"the labels of one task, {review.mean.shape[1]} names",
        )  # fmt: skip
    rows = np.argsort(ids)[np.searchsorted(np.sort(ids), review.ids[order])]
    given, likely = review.given[order], review.likely[order]
    frame = gpd.GeoDataFrame(
        {
            "label_id": review.ids[order],
            "class": np.array([names[k] for k in given], dtype=object),
            "likely": np.array([names[k] for k in likely], dtype=object),
            "score": review.score[order].round(4),
            "p_class": review.mean[order, given].round(4),
            "p_likely": review.mean[order, likely].round(4),
            "pixels": review.pixels[order],
        },
        geometry=labels.geometry.to_numpy()[rows],
        crs=labels.crs,
    )
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _GPKG_TIME})
    try:
        with atomic(path) as tmp:
            tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
            # The type is stated, or a layer without rows would have none.
            frame.to_file(tmp, driver="GPKG", layer=SUSPECTS_LAYER, engine="pyogrio",
                          geometry_type="Unknown")  # fmt: skip
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})
    return len(frame)
