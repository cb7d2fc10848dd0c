"""Stage outputs against simulated truth: the one table that says whether the chain works.

Pure functions of arrays. Each returns NaN where it has nothing to judge, and `build_scoreboard`
writes NaN as null: a missing score is never a zero and never a perfect one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.assess.boundaries import boundary_iou
from terraloom.assess.estimators import AccuracyReport
from terraloom.assess.regional_truth import RegionalScores
from terraloom.assess.reliability import confusion_matrix, skill_from_matrix
from terraloom.errors import StateError
from terraloom.preprocess.reasons import Reason

__all__ = [
    "SCORE_KEYS",
    "areas_inside_ci",
    "build_scoreboard",
    "class_boundary_iou",
    "height_scores",
    "label_noise_scores",
    "map_scores",
    "pooled_mask_f1",
    "shift_rmse_px",
]

#: Width of the bands of the boundary IoU, metres.
BAND_M = 20.0

#: Keys of the scoreboard, in the order of the stages.
SCORE_KEYS = (
    "cloud_f1",
    "shadow_f1",
    "shift_rmse_px",
    "label_noise_recall",
    "label_noise_precision",
    "oa",
    "miou",
    "boundary_iou",
    "height_rmse_m",
    "height_r2",
    "ece",
    "areas_inside_ci",
    "areas_total",
    "region_areas_inside",
    "region_areas_inside_naive",
    "region_heights_inside",
    "region_heights_inside_naive",
)


def pooled_mask_f1(scenes: Iterable[tuple[ArrayLike, ArrayLike]], bit: int) -> float:
    """F1 of one mask reason, pixels pooled over scenes, no boundary tolerance.

    Args:
        scenes: Pairs (reasons, truth) of one shape: uint8 reason bits as the mask stage wrote
            them, and the true mask, boolean or non-zero where true. Consumed one at a time.
        bit: The reason to judge, for example `Reason.CLOUD`; several bits may be combined.

    Returns:
        2 TP / (2 TP + FP + FN) over pixels without the NODATA bit; NaN if no pixel is masked on
        either side.

    Raises:
        StateError: If the shapes of a pair differ.
    """
    hit = claimed = real = 0
    for reasons, truth in scenes:
        mask, true = np.asarray(reasons), np.asarray(truth) != 0
        _same_shape(mask, true, "mask")
        seen = (mask & int(Reason.NODATA)) == 0
        found = ((mask & int(bit)) != 0) & seen
        true = true & seen
        hit += int((found & true).sum())
        claimed += int(found.sum())
        real += int(true.sum())
    return 2 * hit / (claimed + real) if claimed + real else nan


def shift_rmse_px(estimated: ArrayLike, true: ArrayLike) -> float:
    """Radial error of scene shifts in pixels, after removing the offset all scenes share.

    The common offset is where the chosen reference scene happens to lie; it moves the whole stack
    and is not an error of co-registration. A shift (dy, dx) means that the content of the scene
    lies (+dy, +dx) pixels, down and right, from where it should; both inputs follow this sign.

    Args:
        estimated: (N, 2) estimated (dy, dx) in pixels; NaN for a scene that was not estimated,
            which counts as no correction (0, 0).
        true: (N, 2) simulated (dy, dx) in pixels of the same size.

    Returns:
        sqrt(mean(ey^2 + ex^2)), e being the centred difference; NaN for fewer than two scenes.

    Raises:
        StateError: If the shapes differ or are not (N, 2).
    """
    est, ref = np.asarray(estimated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    _same_shape(est, ref, "shifts")
    if est.ndim != 2 or est.shape[1] != 2:
        raise StateError(f"shifts of shape {est.shape}", where="scoreboard", allowed="(N, 2)")
    if len(est) < 2:
        return nan
    # Leaving failures out would reward a method that gives up on hard scenes.
    failed = np.asarray(np.isnan(est).any(axis=1))
    residual = np.where(failed[:, None], 0.0, est) - ref
    if (~failed).any():
        residual = residual - residual[~failed].mean(axis=0)
    return sqrt(float((residual**2).sum(axis=1).mean()))


def label_noise_scores(flagged: ArrayLike, noisy: ArrayLike) -> tuple[float, float]:
    """Recall and precision of the search for wrong labels.

    Args:
        flagged: (N,) labels the stage called wrong.
        noisy: (N,) labels the simulation made wrong.

    Returns:
        (recall, precision), 0-1; NaN where no label is wrong, or none was flagged.

    Raises:
        StateError: If the shapes differ.
    """
    found, wrong = np.asarray(flagged) != 0, np.asarray(noisy) != 0
    _same_shape(found, wrong, "label flags")
    hit = float((found & wrong).sum())
    recall = hit / wrong.sum() if wrong.any() else nan
    precision = hit / found.sum() if found.any() else nan
    return float(recall), float(precision)


def map_scores(
    mapped: ArrayLike, truth: ArrayLike, classes: Sequence[int], *, nodata: int = 0
) -> tuple[float, float]:
    """Overall accuracy and mean IoU of a class map against a wall-to-wall truth.

    Args:
        mapped: (H, W) class codes.
        truth: (H, W) true class codes.
        classes: Legend codes; classes on neither side do not enter the mean.
        nodata: Code without a class on either side: those pixels are left out.

    Returns:
        (oa, miou), 0-1; NaN if no pixel has both.
    """
    matrix = confusion_matrix(truth, mapped, classes, ignore=nodata)
    skill = skill_from_matrix(matrix)
    return float(skill.oa), float(skill.miou)


def class_boundary_iou(
    mapped: ArrayLike, truth: ArrayLike, classes: Sequence[int], *, pixel_m: float,
    width_m: float = BAND_M, nodata: int = 0,
) -> float:  # fmt: skip
    """Mean boundary IoU of the classes: how well outlines lie, whatever the size of patches.

    Args:
        mapped: (H, W) class codes.
        truth: (H, W) true class codes.
        classes: Legend codes; classes on neither side do not enter the mean.
        pixel_m: Pixel size, metres.
        width_m: Width of the bands inside the outlines, metres.
        nodata: Code without a class: where either side has it, neither has a class.

    Returns:
        0-1; NaN if no pixel has both.
    """
    found, true = np.asarray(mapped), np.asarray(truth)
    _same_shape(found, true, "class map")
    both = (found != nodata) & (true != nodata)
    each = [
        boundary_iou(both & (found == c), both & (true == c), width_m=width_m, pixel_m=pixel_m)
        for c in classes
    ]
    known = [v for v in each if isfinite(v)]
    return sum(known) / len(known) if known else nan


def height_scores(predicted: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """Root mean square error in metres and coefficient of determination of heights.

    Args:
        predicted: Heights in metres, any shape; NaN where not predicted.
        truth: True heights in metres, same shape; NaN where undefined.

    Returns:
        (rmse_m, r2), r2 = 1 - SSE / SST (not a squared correlation: bias costs); NaN without
        common pixels, r2 NaN where truth does not vary.

    Raises:
        StateError: If the shapes differ.
    """
    pred, true = np.asarray(predicted, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    _same_shape(pred, true, "heights")
    both = np.isfinite(pred) & np.isfinite(true)
    if not both.any():
        return nan, nan
    error = pred[both] - true[both]
    sst = float(((true[both] - true[both].mean()) ** 2).sum())
    sse = float((error**2).sum())
    return sqrt(sse / error.size), 1.0 - sse / sst if sst > 0 else nan


def areas_inside_ci(report: AccuracyReport, true_ha: Mapping[int, float]) -> tuple[int, int]:
    """How many estimated class areas have the true area inside their interval.

    Args:
        report: Estimates from the probability sample.
        true_ha: True hectares by class code, over the sampled domain (where the map has a class).

    Returns:
        (inside, total) over the classes in `true_ha`. With 95 % intervals about one in twenty may
        lie outside.

    Raises:
        StateError: If the truth names a class that the report does not have.
    """
    unknown = sorted(set(true_ha) - set(report.classes))
    if unknown:
        raise StateError(
            f"true areas of classes {unknown}",
            where="scoreboard",
            allowed=f"classes {list(report.classes)}",
        )
    inside = sum(report.area_ha[code].contains(area) for code, area in true_ha.items())
    return inside, len(true_ha)


def build_scoreboard(
    *,
    cloud_f1: float = nan,
    shadow_f1: float = nan,
    shift_rmse_px: float = nan,
    label_noise_recall: float = nan,
    label_noise_precision: float = nan,
    oa: float = nan,
    miou: float = nan,
    boundary: float = nan,
    height_rmse_m: float = nan,
    height_r2: float = nan,
    ece: float = nan,
    areas_inside_ci: float = nan,
    areas_total: float = nan,
    regional: RegionalScores | None = None,
) -> dict[str, float | int | None]:
    """The scoreboard as a JSON-able table with exactly the keys `SCORE_KEYS`.

    Args:
        cloud_f1: `pooled_mask_f1` of clouds, 0-1.
        shadow_f1: `pooled_mask_f1` of shadows, 0-1.
        shift_rmse_px: `shift_rmse_px`, pixels.
        label_noise_recall: First of `label_noise_scores`, 0-1.
        label_noise_precision: Second of `label_noise_scores`, 0-1.
        oa: First of `map_scores`, 0-1.
        miou: Second of `map_scores`, 0-1.
        boundary: `class_boundary_iou`, 0-1.
        height_rmse_m: First of `height_scores`, metres.
        height_r2: Second of `height_scores`, at most 1.
        ece: Expected calibration error of `train.calibrate`, 0-1.
        areas_inside_ci: First of `areas_inside_ci` (count).
        areas_total: Second of `areas_inside_ci` (count).
        regional: Of `score_regions`, 0-1.

    Returns:
        Scores in the order of the stages; None for every score that was not given or is not
        finite. The two counts are integers.
    """
    regional = regional or RegionalScores()
    given: dict[str, Any] = {
        "cloud_f1": cloud_f1,
        "shadow_f1": shadow_f1,
        "shift_rmse_px": shift_rmse_px,
        "label_noise_recall": label_noise_recall,
        "label_noise_precision": label_noise_precision,
        "oa": oa,
        "miou": miou,
        "boundary_iou": boundary,
        "height_rmse_m": height_rmse_m,
        "height_r2": height_r2,
        "ece": ece,
        "areas_inside_ci": areas_inside_ci,
        "areas_total": areas_total,
        "region_areas_inside": regional.areas,
        "region_areas_inside_naive": regional.areas_naive,
        "region_heights_inside": regional.heights,
        "region_heights_inside_naive": regional.heights_naive,
    }
    counts = {"areas_inside_ci", "areas_total"}
    return {key: _score(given[key], whole=key in counts) for key in SCORE_KEYS}


def _score(value: float, *, whole: bool) -> float | int | None:
    if not isfinite(value):
        return None
    return round(value) if whole else float(value)


def _same_shape(a: NDArray[Any], b: NDArray[Any], what: str) -> None:
    if a.shape != b.shape:
        raise StateError(
            f"{what} of shape {a.shape}, truth of shape {b.shape}",
            where="scoreboard",
            allowed="the same shape",
        )
