"""Reasons per pixel: clouds, their edges and shadows, snow, water, saturation, no data.

Clouds come from :mod:`terraloom.preprocess.clouds`, shadows from
:mod:`terraloom.preprocess.shadows`; here they become one mask per scene (:func:`mask_scene`) or
per series of scenes on one grid (:func:`mask_series`), where the other dates tell what clear sky
looks like. Reflectance is 0-1, NaN is missing. Lengths are metres: nothing depends on the pixel
size of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from terraloom.errors import SceneError
from terraloom.preprocess.clouds import (
    MIN_DATES,
    S2CLOUDLESS_BANDS,
    MaskMethod,
    clear_background,
    cloud_probability,
    haze_index,
    haze_lift,
    snow_mask,
    temporal_cloud,
    temporal_shadow,
    water_mask,
)
from terraloom.preprocess.reasons import INVALID, Reason
from terraloom.preprocess.shadows import cast_shadow, darkness, local_median

__all__ = [
    "BACKGROUND_BANDS",
    "S2CLOUDLESS_BANDS",
    "MaskMethod",
    "clear_background",
    "cloud_probability",
    "dilate",
    "mask_scene",
    "mask_series",
    "scl_reasons",
    "snow_mask",
    "temporal_cloud",
    "temporal_shadow",
    "water_mask",
]

BoolArray = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
Bands = Mapping[str, npt.NDArray[Any]]

#: Bands whose clear-sky values serve the temporal tests.
BACKGROUND_BANDS = ("B02", "B04", "B08", "B11")
#: Scene classes of Sentinel-2 L2A (SCL): class to reason; absent classes are clear.
_SCL_REASONS = {
    0: Reason.NODATA,
    1: Reason.SATURATED,
    3: Reason.SHADOW,
    6: Reason.WATER,
    8: Reason.CLOUD,
    9: Reason.CLOUD,
    10: Reason.CLOUD,
    11: Reason.SNOW,
}
#: A reflectance no natural surface reaches outside glint and saturation.
_SATURATED = 1.5
#: Averaging window of probabilities: a bright roof is no cloud.
_AVERAGE_M = 100.0
#: With other dates a roof does not stand out; only noise is averaged.
_AVERAGE_TEMPORAL_M = 60.0
#: Pixel size the trained model works at; 20 m costs nine times more and gains nothing.
_MODEL_RESOLUTION_M = 60.0
#: Rise of the haze index from which patchy snow counts as snow: about half of the ground white.
_SNOW_LIFT = 0.18
#: Least rise of the haze index over clear ground nearby, for the trained model's doubtful pixels.
_LEAST_LIFT = 0.003
#: Darkness (0-1) of ground in shadow: against the surroundings, and against its own clear sky.
_DARK, _DARK_TEMPORAL = 0.35, 0.30
#: Darkness of ground whose cloud would lie beyond the picture's border.
_DARK_BORDER = 0.55
#: Darkness against its own clear sky of ground whose cloud may be anywhere towards the sun.
_DARK_SWATH_TEMPORAL = 0.45


def dilate(mask: BoolArray, distance_m: float, resolution_m: float) -> BoolArray:
    """Grow a mask by a disk, by distance between pixel centres in metres."""
    if distance_m <= 0.0 or not mask.any():
        return mask.copy()
    reach: BoolArray = ndimage.distance_transform_edt(~mask) * resolution_m <= distance_m + 1e-6
    return reach


def scl_reasons(scl: npt.NDArray[Any], *, drop_dark: bool = False) -> npt.NDArray[np.uint8]:
    """Reasons of the scene classification layer of Sentinel-2 L2A.

    Args:
        scl: (H, W) integer classes 0-11.
        drop_dark: Take class 2 (dark area or cast shadow) as shadow; class 7 (unclassified)
            stays clear.

    Raises:
        SceneError: A class outside 0-11.
    """
    codes = np.asarray(scl)
    if codes.size and (codes.min() < 0 or codes.max() > 11):
        raise SceneError(
            f"classes {int(codes.min())}..{int(codes.max())}", where="SCL", allowed="0 to 11"
        )
    table = np.zeros(12, dtype=np.uint8)
    for code, reason in _SCL_REASONS.items():
        table[code] = int(reason)
    if drop_dark:
        table[2] = int(Reason.SHADOW)
    out: npt.NDArray[np.uint8] = table[codes.astype(np.intp)]
    return out


def mask_scene(
    bands: Bands,
    *,
    method: MaskMethod | str,
    resolution_m: float,
    cloud_threshold: float = 0.4,
    dilation_m: float = 40.0,
    sun_azimuth_deg: float | None = None,
    sun_elevation_deg: float | None = None,
    background: Bands | None = None,
    shadow: bool = True,
) -> npt.NDArray[np.uint8]:
    """Reasons of one scene.

    Args:
        bands: (H, W) reflectance 0-1 by band key on one grid, NaN missing; ``"SCL"`` for method
            ``scl``. Rows run south, columns east.
        method: How clouds are found.
        resolution_m: Pixel size of the grid.
        cloud_threshold: Probability above which a pixel is cloud.
        dilation_m: Width of the edge around clouds.
        sun_azimuth_deg: Sun azimuth, clockwise from north; None: no shadows are searched.
        sun_elevation_deg: Sun elevation above the horizon.
        background: (H, W) clear-sky reflectance of :data:`BACKGROUND_BANDS` from other dates
            (:func:`clear_background`), NaN unknown.
        shadow: Search shadows.

    Returns:
        (H, W) uint8 of :class:`~terraloom.preprocess.reasons.Reason` bits; 0 is clear.

    Raises:
        SceneError: Bands are absent or differ in shape, or the sun is below the horizon.
    """
    method = MaskMethod(method)
    if method is MaskMethod.SCL:
        out = scl_reasons(np.asarray(bands["SCL"])) if "SCL" in bands else _no_scl(bands)
        return _add_edge(out, dilation_m, resolution_m)
    reflectance = {b: np.asarray(v, dtype=np.float32) for b, v in bands.items() if b != "SCL"}
    valid = np.logical_and.reduce([np.isfinite(v) for v in reflectance.values()])
    cloud, snow = _cloud_and_snow(reflectance, method, cloud_threshold, resolution_m, background)
    cloud &= valid
    water = water_mask(reflectance) & ~cloud
    snow &= valid & ~cloud
    out = np.zeros(valid.shape, dtype=np.uint8)
    out[~valid] |= int(Reason.NODATA)
    out[cloud] |= int(Reason.CLOUD)
    out[snow] |= int(Reason.SNOW)
    out[water] |= int(Reason.WATER)
    bright = np.logical_or.reduce([v > _SATURATED for v in reflectance.values()])
    out[bright & ~cloud] |= int(Reason.SATURATED)
    if shadow and sun_azimuth_deg is not None and sun_elevation_deg is not None and cloud.any():
        shade = _shade(
            reflectance, cloud, snow, water, valid,
            (sun_azimuth_deg, sun_elevation_deg), resolution_m, background,
        )  # fmt: skip
        out[shade] |= int(Reason.SHADOW)
    return _add_edge(out, dilation_m, resolution_m)


def _no_scl(bands: Bands) -> npt.NDArray[np.uint8]:
    raise SceneError(
        f"no layer SCL among {', '.join(sorted(bands))}",
        where="masks.method scl",
        fix="choose masks.method spectral, or a source with the scene classification layer",
    )


def _add_edge(
    out: npt.NDArray[np.uint8], dilation_m: float, resolution_m: float
) -> npt.NDArray[np.uint8]:
    cloud = (out & int(Reason.CLOUD)) != 0
    edge = dilate(cloud, dilation_m, resolution_m) & ~cloud & ((out & int(Reason.NODATA)) == 0)
    out[edge] |= int(Reason.CLOUD_EDGE)
    return out


# --- clouds ----------------------------------------------------------------------------------


def _cloud_and_snow(
    bands: Bands,
    method: MaskMethod,
    threshold: float,
    resolution_m: float,
    background: Bands | None,
) -> tuple[BoolArray, BoolArray]:
    snow = snow_mask(bands)
    sure = 0.5 * (1.0 + threshold)
    if method is MaskMethod.S2CLOUDLESS:
        probability = _average(_model_probability(bands, resolution_m), _AVERAGE_M, resolution_m)
        cloud = _hysteresis(probability, threshold, sure)
        cloud &= _hazy(bands, probability, resolution_m) & ~snow
        return _no_specks(cloud, resolution_m), snow
    spectral = cloud_probability(bands, method)
    if background is None or not {"B02", "B04"} <= set(background):
        cloud = _hysteresis(_average(spectral, _AVERAGE_M, resolution_m), threshold, sure)
        return _no_specks(cloud & ~snow, resolution_m), snow
    raised = haze_lift(bands, background).astype(np.float32)
    patchy = _part_snow(bands, background)
    with np.errstate(invalid="ignore"):
        snow |= patchy & (raised > _SNOW_LIFT)
    snowy = snow | patchy
    lift = _average(np.where(snowy, np.float32(np.nan), raised), _AVERAGE_TEMPORAL_M, resolution_m)
    single = _average(spectral, _AVERAGE_M, resolution_m)
    temporal = _with_background(lift, _average(spectral, _AVERAGE_TEMPORAL_M, resolution_m))
    probability = np.where(np.isfinite(lift), temporal, single)
    probability = np.where(snowy, 0.0, probability).astype(np.float32)
    cloud = _hysteresis(probability, threshold, sure)
    return _no_specks(cloud, resolution_m), snow


def _with_background(lift: F32, spectral: F32) -> F32:
    """Probability of cloud from the rise over the pixel's own clear sky and the single date.

    A rise of the haze index by 0.035 alone, or by less where the spectrum looks cloudy too.
    """
    # Bounded: a white roof must not become cloud without standing out in time.
    odds = np.clip(spectral, 0.05, 0.8)
    logit = 80.0 * (lift - 0.032) + 0.7 * np.log(odds / (1.0 - odds))
    out: F32 = (1.0 / (1.0 + np.exp(-np.clip(logit, -30.0, 30.0)))).astype(np.float32)
    return out


def _part_snow(bands: Bands, background: Bands) -> BoolArray:
    """Patchy snow and snow under trees: brighter than usual, but not in the short-wave infrared."""
    if "B11" not in background or "B11" not in bands or "B03" not in bands:
        return np.zeros(np.shape(bands["B02"]), dtype=bool)
    green, swir = bands["B03"], bands["B11"]
    with np.errstate(invalid="ignore", divide="ignore"):
        ndsi = (green - swir) / (green + swir)
        out: BoolArray = (ndsi > 0.15) & (swir < 0.2) & (swir < background["B11"] + 0.02)
        if "B12" in bands:
            out &= bands["B12"] < 0.95 * swir  # not a cloud of ice
        return out & ~water_mask(bands)


def _hazy(bands: Bands, probability: F32, resolution_m: float) -> BoolArray:
    """Haze index or brightness above the clear ground nearby: doubtful fields are not."""
    haze = _average(haze_index(bands["B02"], bands["B04"]), _AVERAGE_M, resolution_m)
    with np.errstate(invalid="ignore"):
        clear = (probability < 0.3) & ~water_mask(bands)
        nearby = local_median(haze, clear, 3000.0 / resolution_m)
        return (haze > nearby + _LEAST_LIFT) | (np.asarray(bands["B02"]) > 0.3)


def _no_specks(mask: BoolArray, resolution_m: float, least_m2: float = 5000.0) -> BoolArray:
    """Fill holes and drop patches under half a hectare."""
    filled = mask | (ndimage.binary_closing(np.pad(mask, 2), np.ones((3, 3)))[2:-2, 2:-2])
    labels, count = ndimage.label(filled)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes * resolution_m**2 >= least_m2
    keep[0] = False
    out: BoolArray = keep[labels]
    return out


def _average(values: F32, window_m: float, resolution_m: float) -> F32:
    """Mean of valid pixels in a square window; NaN stays NaN."""
    size = max(1, round(window_m / resolution_m))
    valid = np.isfinite(values)
    if size == 1:
        return values
    total = ndimage.uniform_filter(np.where(valid, values, 0.0).astype(np.float32), size)
    weight = ndimage.uniform_filter(valid.astype(np.float32), size)
    mean = total / np.maximum(weight, 1e-6)
    return np.where(valid, mean, np.float32(np.nan)).astype(np.float32)


def _model_probability(bands: Bands, resolution_m: float) -> F32:
    """s2cloudless on blocks of about 60 m, spread back to the grid."""
    shape = np.shape(bands["B02"])
    factor = max(1, round(_MODEL_RESOLUTION_M / resolution_m))
    if factor == 1:
        return cloud_probability(bands, MaskMethod.S2CLOUDLESS)
    coarse = {b: _block_mean(np.asarray(bands[b]), factor) for b in S2CLOUDLESS_BANDS}
    small = cloud_probability(coarse, MaskMethod.S2CLOUDLESS)
    filled = np.where(np.isfinite(small), small, 0.0)
    y = (np.arange(shape[0]) + 0.5) / factor - 0.5
    x = (np.arange(shape[1]) + 0.5) / factor - 0.5
    grid = np.meshgrid(y, x, indexing="ij")
    out: F32 = ndimage.map_coordinates(filled, grid, order=1, mode="nearest").astype(np.float32)
    return out


def _block_mean(band: npt.NDArray[Any], factor: int) -> F32:
    """Mean of valid pixels per block of factor x factor; the last blocks may be partial."""
    rows, cols = (-(-n // factor) for n in band.shape)
    padded = np.full((rows * factor, cols * factor), np.nan, dtype=np.float32)
    padded[: band.shape[0], : band.shape[1]] = band
    blocks = padded.reshape(rows, factor, cols, factor)
    n = np.isfinite(blocks).sum(axis=(1, 3))
    total = np.nansum(blocks, axis=(1, 3))
    return np.where(n > 0, total / np.maximum(n, 1), np.nan).astype(np.float32)


def _hysteresis(probability: F32, low: float, high: float) -> BoolArray:
    """Pixels above ``low`` in patches that somewhere reach ``high``."""
    with np.errstate(invalid="ignore"):
        weak, strong = probability > low, probability > high
    labels, count = ndimage.label(weak, structure=np.ones((3, 3)))
    keep = np.zeros(count + 1, dtype=bool)
    keep[np.unique(labels[strong])] = True
    keep[0] = False
    out: BoolArray = keep[labels]
    return out


# --- shadows ---------------------------------------------------------------------------------


def _shade(
    bands: Bands,
    cloud: BoolArray,
    snow: BoolArray,
    water: BoolArray,
    valid: BoolArray,
    sun: tuple[float, float],
    resolution_m: float,
    background: Bands | None,
) -> BoolArray:
    """Shadow: dark in the near and short-wave infrared where a cloud's shadow can fall."""
    clear = valid & ~cloud & ~water & ~snow
    known = np.zeros(valid.shape, dtype=bool)
    parts = []
    for band in ("B08", "B11"):
        if band not in bands:
            continue
        usual = None if background is None else background.get(band)
        if usual is not None:
            usual = usual * _season(np.asarray(bands[band]), usual, clear)
            known |= np.isfinite(usual)
        parts.append(
            darkness(bands[band], clear, resolution_m=resolution_m, background=usual, full_drop=0.5)
        )
    if not parts:
        return np.zeros(valid.shape, dtype=bool)
    dark = np.minimum.reduce(parts)
    temporal = bool(known.mean() > 0.5)
    result = cast_shadow(
        cloud, dark, valid=valid, water=water, sun_azimuth_deg=sun[0], sun_elevation_deg=sun[1],
        resolution_m=resolution_m,
        dark_threshold=_DARK_TEMPORAL if temporal else _DARK,
        border_threshold=None if temporal else _DARK_BORDER,
        swath_threshold=_DARK_SWATH_TEMPORAL if temporal else None,
    )  # fmt: skip
    return result.mask & ~snow


def _season(band: npt.NDArray[Any], usual: npt.NDArray[Any], clear: BoolArray) -> float:
    """Ratio of today's clear ground to the usual: season and light, not shadow.

    The upper quartile, because under broken clouds half of the clear ground may lie in shadow.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (band / usual)[clear & np.isfinite(usual) & (usual > 0.02)]
    return float(np.clip(np.percentile(ratio, 75), 0.8, 1.1)) if ratio.size > 100 else 1.0


# --- many dates ------------------------------------------------------------------------------


def mask_series(
    scenes: Sequence[Bands],
    *,
    method: MaskMethod | str,
    resolution_m: float,
    sun: Sequence[tuple[float, float] | None],
    days: Sequence[float] | None = None,
    cloud_threshold: float = 0.4,
    dilation_m: float = 40.0,
    shadow: bool = True,
    passes: int = 2,
) -> list[npt.NDArray[np.uint8]]:
    """Reasons of all scenes of one source on one grid, each told by the others.

    A first pass masks the scenes one by one; the clear-sky medians of the rest then serve as
    background. With fewer than 4 scenes, or methods that need no background, one pass is made.

    Args:
        scenes: T mappings of band to (H, W) reflectance, NaN missing.
        method: How clouds are found.
        resolution_m: Pixel size.
        sun: Per scene (azimuth, elevation) in degrees; None: no shadow search.
        days: (T,) day numbers: the nearest dates serve as background.
        cloud_threshold: Probability above which a pixel is cloud.
        dilation_m: Width of the edge around clouds.
        shadow: Search shadows.
        passes: Rounds with background.

    Returns:
        T arrays (H, W) uint8.
    """

    def one(i: int, background: Bands | None) -> npt.NDArray[np.uint8]:
        angles = sun[i] or (None, None)
        return mask_scene(
            scenes[i], method=method, resolution_m=resolution_m, background=background,
            cloud_threshold=cloud_threshold, dilation_m=dilation_m, shadow=shadow,
            sun_azimuth_deg=angles[0], sun_elevation_deg=angles[1],
        )  # fmt: skip

    masks = [one(i, None) for i in range(len(scenes))]
    names = [b for b in BACKGROUND_BANDS if all(b in s for s in scenes)]
    if len(scenes) < MIN_DATES or MaskMethod(method) is not MaskMethod.SPECTRAL or not names:
        return masks
    stacks = {b: np.stack([np.asarray(s[b], dtype=np.float32) for s in scenes]) for b in names}
    when = None if days is None else np.asarray(days, dtype=float)
    invalid = np.stack(masks) & np.uint8(int(INVALID)) != 0
    if {"B02", "B04"} <= set(names):
        # Bright roofs and sand look like cloud on every single date, but never stand out.
        changed = temporal_cloud(stacks["B02"], stacks["B04"], threshold=0.015)
        others = INVALID & ~(Reason.CLOUD | Reason.CLOUD_EDGE)
        steady = np.stack(masks) & np.uint8(int(others)) == 0
        invalid &= changed | ~steady
    for _ in range(passes):
        masks = [
            one(
                i,
                {b: clear_background(s, invalid, exclude=i, days=when) for b, s in stacks.items()},
            )
            for i in range(len(scenes))
        ]
        invalid = np.stack(masks) & np.uint8(int(INVALID)) != 0
    return masks
