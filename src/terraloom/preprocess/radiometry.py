"""Reflectance checked against the pixels: is the offset taken off once?

reflectance = DN * scale + offset. Sentinel-2 products of processing baseline 04.00 and later carry
+1000 in their DN (offset -0.1 in reflectance, taken off by the reader); some archives have taken
it off already, and some records forget to say so. Both mistakes are 0.1 in reflectance, larger
than a forest is bright in the visible, and cancel in no index. Which pair an item gets is decided
where its record is made (:mod:`terraloom.acquire.records`); here the item's own pixels judge it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import SceneError

__all__ = ["DnStatistics", "ScaleOffset", "check_offset", "dn_statistics"]

#: Reflectance below which a pixel is wrong beyond noise and over-correction; twice-removed offsets
#: put dark ground near -0.08.
_NEGATIVE = -0.02
#: Reflectance that the darkest percent stays below in some band of any scene with water, shade or
#: forest; an offset left in puts it near 0.1.
_DARK_FLOOR = 0.085
#: Median visible reflectance from which a scene is overcast or snowed in.
_OVERCAST = 0.35
#: Fewer valid pixels than this say nothing.
_LEAST_PIXELS = 100


@dataclass(frozen=True, slots=True)
class ScaleOffset:
    """How to decode one asset.

    Attributes:
        scale: Reflectance per DN, positive.
        offset: Reflectance added after scaling.
    """

    scale: float
    offset: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.offset) and self.scale > 0):
            raise SceneError(
                f"scale {self.scale} and offset {self.offset}",
                where="radiometry",
                allowed="finite numbers and a positive scale",
                fix="correct raster:bands in the item's record",
            )

    def reflectance(self, dn: float) -> float:
        """Reflectance of one digital number."""
        return dn * self.scale + self.offset


@dataclass(frozen=True, slots=True)
class DnStatistics:
    """Percentiles of the valid digital numbers of one asset, or of an overview of it.

    Attributes:
        p1: 1 per cent point; NaN without valid pixels, like the others.
        p5: 5 per cent point.
        p50: Median.
        count: Valid pixels.
    """

    p1: float
    p5: float
    p50: float
    count: int


def dn_statistics(dn: npt.NDArray[Any], nodata: float | None = 0) -> DnStatistics:
    """Statistics of digital numbers.

    Args:
        dn: Digital numbers, any shape; NaN is missing.
        nodata: Value that means missing; None: none does.
    """
    values = np.asarray(dn).ravel()
    if nodata is not None:
        values = values[values != nodata]
    if np.issubdtype(values.dtype, np.floating):
        values = values[np.isfinite(values)]
    if values.size == 0:
        return DnStatistics(math.nan, math.nan, math.nan, 0)
    p1, p5, p50 = np.percentile(values, [1, 5, 50])
    return DnStatistics(float(p1), float(p5), float(p50), int(values.size))


def check_offset(
    statistics: Mapping[str, DnStatistics],
    decoding: Mapping[str, ScaleOffset],
    item_id: str,
    *,
    dark_floor: float = _DARK_FLOOR,
) -> None:
    """Refuse an item whose offset was taken off twice, or not at all.

    Twice: 5 per cent of a band lie clearly below zero. Not at all: the offset is 0 and even the
    darkest percent of EVERY band is brighter than ``dark_floor``. The second test needs the
    near or short-wave infrared (water and shade are darkest there), and some dark ground: a bright
    desert without any may need a higher ``dark_floor``. An overcast or snowed-in scene (median
    visible reflectance above 0.35) is not judged by it.

    Args:
        statistics: Per band key; bands with under 100 valid pixels are ignored.
        decoding: Per band key.
        item_id: Names the item in the error.
        dark_floor: Reflectance.

    Raises:
        SceneError: The offset does not fit the pixels.
    """
    low: dict[str, float] = {}
    overcast = False
    for band, stats in statistics.items():
        if stats.count < _LEAST_PIXELS or band not in decoding:
            continue
        pair = decoding[band]
        fifth = pair.reflectance(stats.p5)
        if fifth < _NEGATIVE:
            raise SceneError(
                f"5 % of band {band} lie below reflectance {fifth:.3f} "
                f"(scale {pair.scale:g}, offset {pair.offset:g}): "
                "the offset was taken off twice",
                where=f"item {item_id}",
                allowed="an offset that is taken off once",
                fix="set the offset of the item's raster:bands to 0, or drop the item",
            )
        low[band] = pair.reflectance(stats.p1)
        if band in {"B02", "B03", "B04"}:
            overcast |= pair.reflectance(stats.p50) > _OVERCAST
    infrared = {"B08", "B8A", "B11", "B12"} & set(low)
    if overcast or not infrared or any(decoding[b].offset != 0.0 for b in low):
        return
    if min(low.values()) >= dark_floor:
        raise SceneError(
            f"the darkest 1 % of every band are brighter than reflectance "
            f"{min(low.values()):.3f} with offset 0: the offset was not taken off",
            where=f"item {item_id}",
            allowed="an offset that is taken off once",
            fix="set the offset of the item's raster:bands to -0.1 (processing baseline 04.00 "
            "and later), or drop the item",
        )
