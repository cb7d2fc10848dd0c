"""Reasons per pixel: clouds, their edges and shadows, snow, water, saturation, no data.

Clouds come from the product's own layer (:mod:`terraloom.preprocess.layers`), from
:mod:`terraloom.preprocess.clouds` or from a network; shadows from those or from
:mod:`terraloom.preprocess.shadows`. Here they become one mask per scene (:func:`mask_scene`) or per
series of scenes on one grid (:func:`mask_series`), where the other dates tell what clear sky looks
like. Bands are named by the part they play, as Sentinel-2 names them. Reflectance is 0-1, NaN is
missing. Lengths are metres: nothing depends on the pixel size of the source.
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
    SPECTRAL_BANDS,
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
from terraloom.preprocess.csmask import CSMASK_BANDS, Level, csmask_classes
from terraloom.preprocess.omnicloud import OMNICLOUD_BANDS, omnicloud_classes
from terraloom.preprocess.reasons import INVALID, Reason
from terraloom.preprocess.shadows import cast_shadow, darkness, local_median

__all__ = [
    "BACKGROUND_BANDS",
    "METHOD_BANDS",
    "S2CLOUDLESS_BANDS",
    "MaskMethod",
    "add_edge",
    "clear_background",
    "cloud_probability",
    "dilate",
    "mask_scene",
    "mask_series",
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
#: Bands of each method: those it cannot do without, and those it uses where they are there.
METHOD_BANDS: dict[MaskMethod, tuple[tuple[str, ...], tuple[str, ...]]] = {
    MaskMethod.LAYER: ((), ("B03", "B08", "B11")),
    MaskMethod.SPECTRAL: (SPECTRAL_BANDS, ("B10", "B12")),
    MaskMethod.S2CLOUDLESS: (S2CLOUDLESS_BANDS, ("B03",)),
    MaskMethod.CSMASK: (CSMASK_BANDS, ()),
    MaskMethod.OMNICLOUDMASK: (OMNICLOUD_BANDS, ("B11", "B12")),
    MaskMethod.NONE: ((), ("B02", "B03", "B04", "B08", "B11", "B12")),
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
    layer: npt.NDArray[np.uint8] | None = None,
    layer_has_shadow: bool = True,
    level: Level = "l2a",
) -> npt.NDArray[np.uint8]:
    """Reasons of one scene.

    Args:
        bands: (H, W) reflectance 0-1 by band on one grid, NaN missing; see :data:`METHOD_BANDS`.
            Rows run south, columns east.
        method: How clouds are found.
        resolution_m: Pixel size of the grid.
        cloud_threshold: Probability above which a pixel is cloud.
        dilation_m: Width of the edge around clouds.
        sun_azimuth_deg: Sun azimuth, clockwise from north; None: no shadows are searched.
        sun_elevation_deg: Sun elevation above the horizon.
        background: (H, W) clear-sky reflectance of :data:`BACKGROUND_BANDS` from other dates
            (:func:`clear_background`), NaN unknown.
        shadow: Find shadows; False also leaves out those that a layer or a network knows.
        layer: (H, W) reasons of the product's layers, for method ``layer``.
        layer_has_shadow: The layer tells shadows; False: they are searched from the sun.
        level: Processing level of the reflectance, for method ``csmask``.

    Returns:
        (H, W) uint8 of :class:`~terraloom.preprocess.reasons.Reason` bits; 0 is clear.

    Raises:
        SceneError: Bands or the layer are absent or differ in shape, or the sun is below the
            horizon.
    """
    method = MaskMethod(method)
    if method is MaskMethod.LAYER:
        out, shaded = _need_layer(layer), layer_has_shadow
    else:
        out, shaded = _from_bands(
            bands, method, resolution_m, cloud_threshold, background, level
        )  # fmt: skip
    if not shadow:
        out &= np.uint8(255 - int(Reason.SHADOW))
    elif not shaded and sun_azimuth_deg is not None and sun_elevation_deg is not None:
        sun = (sun_azimuth_deg, sun_elevation_deg)
        out[_shade(bands, out, sun, resolution_m, background)] |= int(Reason.SHADOW)
    return add_edge(out, dilation_m, resolution_m)


def _need_layer(layer: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    if layer is None:
        raise SceneError(
            "the product has no layer of clouds",
            where="masks.methods layer",
            fix="choose masks.methods auto or spectral, or name the layer in the source table",
        )
    return layer.copy()


def _from_bands(
    bands: Bands,
    method: MaskMethod,
    resolution_m: float,
    threshold: float,
    background: Bands | None,
    level: Level,
) -> tuple[npt.NDArray[np.uint8], bool]:
    """Reasons without the edge, and whether shadows are among them."""
    reflectance = {b: np.asarray(v, dtype=np.float32) for b, v in bands.items()}
    valid = np.logical_and.reduce([np.isfinite(v) for v in reflectance.values()])
    shade = np.zeros(valid.shape, dtype=bool)
    snow = np.zeros(valid.shape, dtype=bool)
    if method is MaskMethod.NONE:
        cloud = shade
    elif method is MaskMethod.CSMASK:
        classes = csmask_classes(reflectance, level=level)
        cloud, shade = classes == 1, classes == 2
    elif method is MaskMethod.OMNICLOUDMASK:
        classes = omnicloud_classes(reflectance)
        cloud, shade = (classes == 1) | (classes == 2), classes == 3
    else:
        cloud, snow = _cloud_and_snow(reflectance, method, threshold, resolution_m, background)
    if method in (MaskMethod.CSMASK, MaskMethod.OMNICLOUDMASK):
        snow = snow_mask(reflectance)
    cloud = cloud & valid
    out = np.zeros(valid.shape, dtype=np.uint8)
    out[~valid] |= int(Reason.NODATA)
    out[cloud] |= int(Reason.CLOUD)
    out[snow & valid & ~cloud] |= int(Reason.SNOW)
    out[water_mask(reflectance) & ~cloud] |= int(Reason.WATER)
    bright = np.logical_or.reduce([v > _SATURATED for v in reflectance.values()])
    out[bright & ~cloud] |= int(Reason.SATURATED)
    out[shade & valid & ~cloud] |= int(Reason.SHADOW)
    return out, method not in (MaskMethod.SPECTRAL, MaskMethod.S2CLOUDLESS)


def add_edge(
    reasons: npt.NDArray[np.uint8], dilation_m: float, resolution_m: float
) -> npt.NDArray[np.uint8]:
    """The same reasons with an edge of ``dilation_m`` around clouds; not on missing pixels."""
    out = reasons.copy()
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
    found: npt.NDArray[np.uint8],
    sun: tuple[float, float],
    resolution_m: float,
    background: Bands | None,
) -> BoolArray:
    """Shadow: dark in the near and short-wave infrared where a cloud's shadow can fall."""
    cloud, snow, water, missing = (
        (found & int(bit)) != 0 for bit in (Reason.CLOUD, Reason.SNOW, Reason.WATER, Reason.NODATA)
    )
    valid = ~missing
    if not cloud.any():
        return np.zeros(valid.shape, dtype=bool)
    clear = valid & ~cloud & ~water & ~snow
    known = np.zeros(valid.shape, dtype=bool)
    parts = []
    for band in ("B08", "B11"):
        if band not in bands:
            continue
        valid = valid & np.isfinite(bands[band])
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
    mask: BoolArray = result.mask & ~snow
    return mask


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
    wanted: Sequence[int] | None = None,
    level: Level = "l2a",
) -> list[npt.NDArray[np.uint8]]:
    """Reasons of scenes of one source on one grid, each told by the others.

    A first pass masks the scenes one by one; the clear-sky medians of the rest then serve as
    background. With fewer than 4 scenes, or methods that need no background, one pass is made.

    Args:
        scenes: T mappings of band to (H, W) reflectance, NaN missing.
        method: How clouds are found, not ``layer``.
        resolution_m: Pixel size.
        sun: Per scene (azimuth, elevation) in degrees; None: no shadow search.
        days: (T,) day numbers: the nearest dates serve as background.
        cloud_threshold: Probability above which a pixel is cloud.
        dilation_m: Width of the edge around clouds.
        shadow: Search shadows.
        passes: Rounds with background.
        wanted: Scenes whose masks are asked for; the others only help. Default: all.
        level: Processing level of the reflectance.

    Returns:
        Arrays (H, W) uint8 of the wanted scenes, in their order.
    """
    method, own = MaskMethod(method), list(range(len(scenes)) if wanted is None else wanted)

    def one(i: int, background: Bands | None) -> npt.NDArray[np.uint8]:
        angles = sun[i] or (None, None)
        return mask_scene(
            scenes[i], method=method, resolution_m=resolution_m, background=background,
            cloud_threshold=cloud_threshold, dilation_m=dilation_m, shadow=shadow, level=level,
            sun_azimuth_deg=angles[0], sun_elevation_deg=angles[1],
        )  # fmt: skip

    names = [b for b in BACKGROUND_BANDS if all(b in s for s in scenes)]
    if len(scenes) < MIN_DATES or method is not MaskMethod.SPECTRAL or not names:
        return [one(i, None) for i in own]
    stacks = {b: [np.asarray(s[b]) for s in scenes] for b in names}
    when = None if days is None else np.asarray(days, dtype=float)
    masks = np.stack([one(i, None) for i in range(len(scenes))])
    invalid = (masks & np.uint8(int(INVALID))) != 0
    if {"B02", "B04"} <= set(names):
        # Bright roofs and sand look like cloud on every single date, but never stand out.
        invalid &= _unsteady(stacks["B02"], stacks["B04"], masks)
    found = [masks[i] for i in own]
    for left in reversed(range(passes)):
        which = range(len(scenes)) if left else own
        found = [
            one(
                i,
                {b: clear_background(s, invalid, exclude=i, days=when) for b, s in stacks.items()},
            )
            for i in which
        ]
        if left:
            invalid = (np.stack(found) & np.uint8(int(INVALID))) != 0
    return found


def _unsteady(
    blue: Sequence[npt.NDArray[Any]],
    red: Sequence[npt.NDArray[Any]],
    masks: npt.NDArray[np.uint8],
) -> BoolArray:
    """(T, H, W) bool: pixels that stand out in time, or that are bad for another reason."""
    changed = temporal_cloud(np.stack(blue), np.stack(red), threshold=0.015)
    others = INVALID & ~(Reason.CLOUD | Reason.CLOUD_EDGE)
    out: BoolArray = changed | ((masks & np.uint8(int(others))) != 0)
    return out
