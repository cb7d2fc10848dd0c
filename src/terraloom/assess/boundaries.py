"""Scores of outlines, with tolerances in metres.

References:
    Cheng et al. (2021), CVPR: boundary IoU.
    Csurka et al. (2013), BMVC: boundary F1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from terraloom.errors import DesignError

__all__ = ["BoundaryScores", "boundary_f1", "boundary_iou"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BoundaryScores:
    """Agreement of outline pixels within a tolerance.

    Attributes:
        precision: Share of predicted outline pixels near a true one; NaN without any.
        recall: Share of true outline pixels near a predicted one; NaN without any.
        f1: Their harmonic mean; NaN where neither side has any.
        tolerance_m: What counts as near, metres.
    """

    precision: float
    recall: float
    f1: float
    tolerance_m: float

    @classmethod
    def of_counts(
        cls, near_predicted: int, predicted: int, near_true: int, true: int, tolerance_m: float
    ) -> BoundaryScores:
        """Scores of counts, which may be summed over chips first."""
        p = near_predicted / predicted if predicted else nan
        r = near_true / true if true else nan
        if not predicted or not true:
            f1 = 0.0 if predicted or true else nan
        else:
            f1 = 2 * p * r / (p + r) if p + r > 0 else 0.0
        return cls(p, r, f1, tolerance_m)


def boundary_f1(
    predicted: Mask, true: Mask, *, tolerance_m: float, pixel_m: float, valid: Mask | None = None
) -> tuple[int, int, int, int]:
    """Counts behind precision and recall of outlines, for `BoundaryScores.of_counts`.

    Args:
        predicted: (H, W) outline pixels of the map.
        true: (H, W) outline pixels of the reference.
        tolerance_m: Greatest distance between centres that counts as near, metres.
        pixel_m: Pixel size, metres.
        valid: (H, W) pixels that were labelled; outlines elsewhere do not count, but are near.

    Returns:
        (predicted pixels near a true one, predicted, true near a predicted one, true).
    """
    if predicted.shape != true.shape:
        raise DesignError(f"outlines of {predicted.shape} and {true.shape} px",
                          allowed="the same shape")  # fmt: skip
    inside = np.ones(true.shape, dtype=np.bool_) if valid is None else valid
    a, b = predicted & inside, true & inside
    reach = tolerance_m / pixel_m + 1e-9

    def near(some: Mask, others: Mask) -> int:
        if not others.any():
            return 0
        return int((ndimage.distance_transform_edt(~others)[some] <= reach).sum())

    return near(a, b), int(a.sum()), near(b, a), int(b.sum())


def boundary_iou(predicted: Mask, true: Mask, *, width_m: float, pixel_m: float) -> float:
    """Intersection over union of the inner bands of two masks.

    Args:
        predicted: (H, W) mask of a class in the map.
        true: (H, W) the same in the reference.
        width_m: Width of the band, metres; at least one pixel.
        pixel_m: Pixel size, metres.

    Returns:
        0-1; NaN where neither mask has a pixel. The image border counts as an outline.
    """
    if predicted.shape != true.shape:
        raise DesignError(f"masks of {predicted.shape} and {true.shape} px",
                          allowed="the same shape")  # fmt: skip
    steps = max(1, round(width_m / pixel_m))
    square = np.ones((3, 3), dtype=np.bool_)

    def band(mask: Mask) -> Mask:
        inner = ndimage.binary_erosion(mask, square, iterations=steps, border_value=0)
        return np.asarray(mask & ~inner)

    a, b = band(predicted), band(true)
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else nan
