"""Why a pixel is not usable: one bitmask for every mask and every product."""

from __future__ import annotations

from enum import IntFlag

import numpy as np
import numpy.typing as npt

__all__ = ["INVALID", "Reason", "describe", "invalid_mask", "reason_pct"]


class Reason(IntFlag):
    """Bits of a uint8 reason mask; 0 is a clear pixel without remarks."""

    NODATA = 1
    CLOUD = 2
    CLOUD_EDGE = 4
    SHADOW = 8
    SNOW = 16
    SATURATED = 32
    #: Remark, not a defect: open water.
    WATER = 64
    #: Remark, not a defect: the value was filled from another period.
    FILLED = 128


#: Bits that take a pixel out of every mean, loss and statistic.
INVALID = (
    Reason.NODATA
    | Reason.CLOUD
    | Reason.CLOUD_EDGE
    | Reason.SHADOW
    | Reason.SNOW
    | Reason.SATURATED
)

_TEXT = {
    Reason.NODATA: "no data",
    Reason.CLOUD: "cloud",
    Reason.CLOUD_EDGE: "edge of a cloud",
    Reason.SHADOW: "cloud shadow",
    Reason.SNOW: "snow or ice",
    Reason.SATURATED: "saturated or defective",
    Reason.WATER: "water",
    Reason.FILLED: "filled from another period",
}


def describe(value: int) -> str:
    """Text of one pixel's reasons, e.g. ``"cloud, water"``; ``"clear"`` for 0.

    Raises:
        ValueError: ``value`` is not in 0..255.
    """
    if not 0 <= value <= 255:
        raise ValueError(f"a reason is one byte, got {value}")
    return ", ".join(text for bit, text in _TEXT.items() if value & bit) or "clear"


def invalid_mask(
    reasons: npt.NDArray[np.uint8], invalid: int = int(INVALID)
) -> npt.NDArray[np.bool_]:
    """True where any bit of ``invalid`` is set; same shape as ``reasons``."""
    mask: npt.NDArray[np.bool_] = (reasons & np.uint8(invalid)) != 0
    return mask


def reason_pct(reasons: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Share of pixels (per cent) with each bit, by lower-case name, and ``clear``.

    Shares overlap (a cloud edge may lie on water); ``clear`` counts pixels without an
    :data:`INVALID` bit. An empty array gives NaN.
    """
    n = reasons.size
    if n == 0:
        return {**{str(b.name).lower(): float("nan") for b in Reason}, "clear": float("nan")}
    shares = {
        str(bit.name).lower(): 100.0 * float(np.count_nonzero(reasons & np.uint8(bit))) / n
        for bit in Reason
    }
    shares["clear"] = 100.0 * float(np.count_nonzero(~invalid_mask(reasons))) / n
    return shares
