"""Reflectance checked against the pixels: is the offset taken off once, and does the scale fit?

reflectance = DN * scale + offset. Sentinel-2 products of processing baseline 04.00 and later carry
+1000 in their DN (offset -0.1 in reflectance, taken off by the reader); some archives have taken
it off already, and some records forget to say so. Landsat Collection 2 surface reflectance is
DN * 0.0000275 - 0.2; HLS is DN * 0.0001 without offset. A mistake with an offset is larger than a
forest is bright in the visible, and cancels in no index. Which pair an item gets is decided where
its record is made (:mod:`terraloom.acquire.records`); here the item's own pixels judge it.
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

#: Share of the usual offset below zero at which a pixel is wrong beyond noise and over-correction;
#: an offset taken off twice puts dark ground near -0.8 of it.
_NEGATIVE_SHARE = 0.2
#: Share of the usual offset that the darkest percent stays below in some band of any scene with
#: water, shade or forest; an offset left in puts it near 1.
_DARK_SHARE = 0.85
#: Offset that is looked for where a source has none.
_USUAL_OFFSET = 0.1
#: No ground's median is brighter in all bands, and none darker: the scale does not fit.
_TOO_BRIGHT, _TOO_DARK = 1.6, 5e-4
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


#: Sentinel-2 after baseline 04.00.
_SENTINEL_2 = ScaleOffset(1e-4, -0.1)
_VISIBLE, _INFRARED = ("B02", "B03", "B04"), ("B08", "B8A", "B11", "B12")


def check_offset(
    statistics: Mapping[str, DnStatistics],
    decoding: Mapping[str, ScaleOffset],
    item_id: str,
    *,
    roles: Mapping[str, str] | None = None,
    usual: ScaleOffset = _SENTINEL_2,
    dark_floor: float | None = None,
) -> None:
    """Refuse an item whose offset was taken off twice, or not at all, or whose scale is wrong.

    Twice: 5 per cent of a band lie clearly below zero. Not at all: the offset is 0, the source
    usually has one, and even the darkest percent of EVERY band is brighter than ``dark_floor``. The
    second test needs the near or short-wave infrared (water and shade are darkest there), and some
    dark ground: a bright desert without any may need a higher ``dark_floor``. An overcast or
    snowed-in scene (median visible reflectance above 0.35) is not judged by it. The scale is wrong
    when the medians of all bands are brighter than any ground, or darker.

    Args:
        statistics: Per band key; bands with under 100 valid pixels are ignored.
        decoding: Per band key.
        item_id: Names the item in the error.
        roles: Role by Sentinel-2 name: band key, see
            :meth:`terraloom.acquire.sources.SourceTable.roles`; default: bands are named so.
        usual: Scale and offset that products of the source usually have.
        dark_floor: Reflectance; default: 0.85 of the usual offset (0.085 for Sentinel-2, 0.17 for
            Landsat).

    Raises:
        SceneError: The offset or the scale does not fit the pixels.
    """
    known = abs(usual.offset) or _USUAL_OFFSET
    seen = {b: s for b, s in statistics.items() if s.count >= _LEAST_PIXELS and b in decoding}
    for band, stats in seen.items():
        _check_twice(band, stats, decoding[band], item_id, -_NEGATIVE_SHARE * known)
    _check_scale({b: decoding[b].reflectance(s.p50) for b, s in seen.items()}, item_id, usual)
    low = {b: decoding[b].reflectance(s.p1) for b, s in seen.items()}
    names = {r: r for r in (*_VISIBLE, *_INFRARED)} if roles is None else roles
    overcast = any(
        decoding[b].reflectance(seen[b].p50) > _OVERCAST
        for b in (names.get(r, "") for r in _VISIBLE)
        if b in seen
    )
    infrared = {names.get(r, "") for r in _INFRARED} & set(low)
    left_in = usual.offset != 0.0 and not any(decoding[b].offset != 0.0 for b in low)
    if overcast or not infrared or not left_in:
        return
    if min(low.values()) >= (_DARK_SHARE * known if dark_floor is None else dark_floor):
        raise SceneError(
            f"the darkest 1 % of every band are brighter than reflectance "
            f"{min(low.values()):.3f} with offset 0: the offset was not taken off",
            where=f"item {item_id}",
            allowed="an offset that is taken off once",
            fix=f"set the offset of the item's raster:bands to {usual.offset:g} (Sentinel-2: "
            "processing baseline 04.00 and later), or drop the item",
        )


def _check_twice(
    band: str, stats: DnStatistics, pair: ScaleOffset, item_id: str, floor: float
) -> None:
    fifth = pair.reflectance(stats.p5)
    if fifth >= floor:
        return
    if abs(stats.p5) < 0.5 and pair.offset < 0:
        raise SceneError(
            f"5 % of band {band} have the stored value 0, which no ground has with offset "
            f"{pair.offset:g}",
            where=f"item {item_id}",
            allowed="missing pixels that the nodata value tells",
            fix="set the nodata value of the item's raster:bands to 0, or drop the item",
        )
    raise SceneError(
        f"5 % of band {band} lie below reflectance {fifth:.3f} "
        f"(scale {pair.scale:g}, offset {pair.offset:g}): "
        "the offset was taken off twice",
        where=f"item {item_id}",
        allowed="an offset that is taken off once",
        fix="set the offset of the item's raster:bands to 0, or drop the item",
    )


def _check_scale(medians: Mapping[str, float], item_id: str, usual: ScaleOffset) -> None:
    if not medians:
        return
    low, high = min(medians.values()), max(medians.values())
    # A black band alone may be ground under a deep shadow, or water: all of them never are.
    if low > _TOO_BRIGHT or abs(high) < _TOO_DARK:
        raise SceneError(
            f"medians of all bands lie between reflectance {low:.4g} and {high:.4g}: the scale "
            "does not fit",
            where=f"item {item_id}",
            allowed=f"reflectance 0-1 (this source usually has scale {usual.scale:g})",
            fix="correct the scale of the item's raster:bands or of the source table",
        )
