"""Where clouds, snow and water are, one scene or many dates at a time.

Two ways to a probability: ``s2cloudless`` (a trained model for Sentinel-2 L1C) and ``spectral`` (no
model; a haze index and the darkest visible band). Where clear-sky values of other dates are at
hand, a pixel's departure from them is the stronger evidence and is used with ``spectral``. Bands
are named by the part they play, as Sentinel-2 names them, whatever the sensor. Reflectance is 0-1,
NaN is missing. Lengths are metres: nothing depends on the pixel size of the source.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import SceneError
from terraloom.preprocess.trees import BoostedTrees, read_trees

__all__ = [
    "MIN_DATES",
    "S2CLOUDLESS_BANDS",
    "SPECTRAL_BANDS",
    "MaskMethod",
    "clear_background",
    "cloud_probability",
    "haze_index",
    "haze_lift",
    "snow_mask",
    "temporal_cloud",
    "temporal_shadow",
    "water_mask",
]

BoolArray = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
Bands = Mapping[str, npt.NDArray[Any]]

#: Features of the s2cloudless model, in its order.
S2CLOUDLESS_BANDS = ("B01", "B02", "B04", "B05", "B08", "B8A", "B09", "B10", "B11", "B12")
#: Bands the spectral tests cannot do without.
SPECTRAL_BANDS = ("B02", "B03", "B04", "B08", "B11")
#: Rise of the haze index that a whole scene may have and still be clear.
_MOST_HAZE = 0.014
#: Dates needed before other dates may say what clear sky looks like.
MIN_DATES = 4


class MaskMethod(StrEnum):
    """How a scene is masked; ``none`` marks missing pixels only."""

    LAYER = "layer"
    SPECTRAL = "spectral"
    S2CLOUDLESS = "s2cloudless"
    CSMASK = "csmask"
    OMNICLOUDMASK = "omnicloudmask"
    NONE = "none"


def cloud_probability(bands: Bands, method: MaskMethod | str) -> F32:
    """Probability of cloud per pixel.

    Args:
        bands: (H, W) reflectance 0-1 by band, NaN invalid, all on one grid. ``s2cloudless`` needs
            L1C (top of atmosphere) and all of :data:`S2CLOUDLESS_BANDS`; ``spectral`` needs B02
            B03 B04 B08 B11 of any level and uses B10 (cirrus) where it is given.
        method: ``s2cloudless`` or ``spectral``.

    Returns:
        (H, W) float32, 0-1, NaN where a band is missing.

    Raises:
        SceneError: A band is absent, or shapes differ, or the model is not installed, or the
            method gives no probability.
    """
    method = MaskMethod(method)
    if method is MaskMethod.S2CLOUDLESS:
        return _s2cloudless(bands)
    if method is MaskMethod.SPECTRAL:
        return _spectral(bands)
    raise SceneError(f"method {method} gives no probability", allowed="s2cloudless, spectral")


def _need(bands: Bands, names: Sequence[str], method: str) -> None:
    absent = [b for b in names if b not in bands]
    if absent:
        raise SceneError(
            f"no band {', '.join(absent)}",
            where=f"masks.methods {method}",
            allowed=f"all of {', '.join(names)}",
            fix="choose another of masks.methods, or a source that has these bands "
            "(Sentinel-2 L2A lacks B10)",
        )
    shapes = {np.shape(bands[b]) for b in names}
    if len(shapes) > 1:
        raise SceneError(
            f"bands of different shapes {sorted(shapes)}",
            where=f"masks.methods {method}",
            fix="read all bands onto one geobox",
        )


# --- trained model ---------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _model() -> BoostedTrees:
    """Gradient-boosted trees of the PyPI wheel ``s2cloudless`` 1.7.3 (Sinergise).

    Only the text file of the model is read: the package itself would import an archive client and
    OpenCV. The model's licence is CC BY-SA 4.0, which is why it is an extra and is not shipped.
    """
    spec = importlib.util.find_spec("s2cloudless")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("models/*lightGBM*.txt")):
            return read_trees(file)
    raise SceneError(
        "the model file of s2cloudless is not installed",
        where="masks.methods s2cloudless",
        fix="pip install --no-deps s2cloudless==1.7.3, or choose masks.methods spectral",
    )


def _s2cloudless(bands: Bands) -> F32:
    _need(bands, S2CLOUDLESS_BANDS, MaskMethod.S2CLOUDLESS)
    features = np.stack(
        [np.asarray(bands[b], dtype=np.float32).ravel() for b in S2CLOUDLESS_BANDS], axis=1
    )
    valid = np.isfinite(features).all(axis=1)
    out = np.full(features.shape[0], np.nan, dtype=np.float32)
    out[valid] = _model().probability(features[valid])
    return out.reshape(np.shape(bands["B02"]))


# --- spectral --------------------------------------------------------------------------------


def haze_index(blue: npt.NDArray[Any], red: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Haze optimised transform, blue - 0.5 red: flat over clear land, raised by haze and cloud.

    Zhang, Guindon and Cihlar (2002), Remote Sensing of Environment 82, 173-187, in the fixed form
    used by Fmask (Zhu and Woodcock 2012).
    """
    out: npt.NDArray[Any] = blue - 0.5 * red
    return out


def _sigmoid(x: npt.NDArray[Any]) -> F32:
    out: F32 = (1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))).astype(np.float32)
    return out


def _low(values: npt.NDArray[Any], pct: float, most: float) -> float:
    """Low percentile as the scene's clear level; not above ``most``: a scene may be all cloud."""
    finite = values[np.isfinite(values)]
    return min(float(np.percentile(finite, pct)), most) if finite.size else most


def _spectral(bands: Bands) -> F32:
    """Cloud from the lift of haze index and darkest visible band over the scene's clear level.

    The two weights come from a logistic fit to the reference masks of a Sentinel-2 and a Landsat 5
    scene and to s2cloudless on a third; the lift makes them independent of the path radiance,
    that is of L1C or L2A.
    """
    _need(bands, SPECTRAL_BANDS, MaskMethod.SPECTRAL)
    blue, green, red = bands["B02"], bands["B03"], bands["B04"]
    swir = bands["B11"]
    haze = haze_index(blue, red)
    floor = np.minimum(np.minimum(blue, green), red)
    # Clear levels: at most those of top-of-atmosphere reflectance under a clear sky.
    rise = haze - _low(haze, 10.0, 0.10)
    floor_lift = floor - _low(floor, 10.0, 0.10)
    # Bright soil raises the darkest band as well, but not the haze index; where the blue band
    # saturates the index fails, and brightness must do.
    hazy = np.where(floor > 0.25, 1.0, np.clip((rise - 0.006) / 0.01, 0.0, 1.0))
    logit = 60.0 * rise + 30.0 * np.clip(floor_lift, 0.0, 0.4) * hazy - 3.3
    if "B10" in bands:
        # Only high clouds return light at 1.375 um; dry air lets some ground through.
        cirrus = np.asarray(bands["B10"])
        logit = np.maximum(logit, 400.0 * (cirrus - max(_low(cirrus, 10.0, 0.01) + 0.006, 0.012)))
    # Water raises the haze index without raising the infrared; clouds raise both.
    infrared = np.maximum(np.asarray(bands["B08"]), swir)
    logit = np.where(infrared < 0.08, logit - 2.0, logit)
    probability = _sigmoid(logit)
    probability = np.where(snow_mask(bands), np.float32(0.05), probability)
    valid = np.isfinite(haze) & np.isfinite(green) & np.isfinite(infrared)
    return np.where(valid, probability, np.float32(np.nan))


def snow_mask(bands: Bands) -> BoolArray:
    """Snow and ice: bright in the visible, dark in the short-wave infrared.

    NDSI = (B03 - B11)/(B03 + B11) > 0.4 with B03 > 0.15 and B08 > 0.11 (Hall et al. 1995; the
    infrared limit keeps water out). B11 < 0.25 and, where it is given, B12 < 0.95 B11 keep out
    clouds of ice, whose reflectance does not fall from 1.6 to 2.2 um as that of snow does.

    Returns:
        (H, W) bool; False where a band is absent or invalid.
    """
    if any(b not in bands for b in ("B03", "B08", "B11")):
        return np.zeros(np.shape(next(iter(bands.values()))), dtype=bool)
    green, nir, swir = bands["B03"], bands["B08"], bands["B11"]
    with np.errstate(invalid="ignore", divide="ignore"):
        ndsi = (green - swir) / (green + swir)
        mask: BoolArray = (ndsi > 0.4) & (green > 0.15) & (nir > 0.11) & (swir < 0.25)
        if "B12" in bands:
            mask &= bands["B12"] < 0.95 * swir
    return mask


def water_mask(bands: Bands) -> BoolArray:
    """Open water: NDWI (B03 - B08)/(B03 + B08) > 0.05 (McFeeters 1996) and a dark infrared.

    Returns:
        (H, W) bool; False where a band is absent or invalid.
    """
    if any(b not in bands for b in ("B03", "B08")):
        return np.zeros(np.shape(next(iter(bands.values()))), dtype=bool)
    green, nir = bands["B03"], bands["B08"]
    with np.errstate(invalid="ignore", divide="ignore"):
        mask: BoolArray = ((green - nir) / (green + nir) > 0.05) & (nir < 0.15)
        if "B11" in bands:
            mask &= bands["B11"] < 0.08
    return mask


# --- other dates -----------------------------------------------------------------------------


def clear_background(
    stack: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
    invalid: BoolArray,
    *,
    exclude: int | None = None,
    days: npt.NDArray[Any] | None = None,
    nearest: int = 7,
    min_dates: int = 2,
) -> F32:
    """Clear-sky value of each pixel: the median of its valid dates.

    Args:
        stack: T arrays (H, W) of reflectance of one band; they are not copied as a whole.
        invalid: (T, H, W) bool, pixels not to use.
        exclude: Index of the date that will be compared with the result.
        days: (T,) day numbers; with ``exclude`` only the ``nearest`` dates are used, because
            vegetation changes over the year.
        nearest: Number of dates then used.
        min_dates: With fewer valid dates the 30th percentile of all dates with data stands in:
            a spot that looks cloudy on most dates is more likely a bright roof.

    Returns:
        (H, W) float32, NaN where no date has data.
    """
    index = np.arange(len(stack))
    if exclude is not None:
        index = index[index != exclude]
        if days is not None:
            order = np.argsort(np.abs(np.asarray(days)[index] - days[exclude]), kind="stable")
            index = np.sort(index[order[:nearest]])
    picked = np.stack([np.asarray(stack[i], dtype=np.float32) for i in index.tolist()])
    values = np.where(invalid[index], np.float32(np.nan), picked)
    median = _nanmedian(values, min_dates)
    lacking = ~np.isfinite(median)
    if lacking.any():
        every = np.stack([np.asarray(s[lacking], dtype=np.float32) for s in stack])
        median[lacking] = _low_rank(every)
    return median


def _low_rank(values: F32) -> F32:
    """30th percentile over the first axis without NaN: clear where up to 70 % are cloudy."""
    ordered = np.sort(values, axis=0)  # NaN last
    n = np.isfinite(ordered).sum(axis=0)
    rank = np.floor(0.3 * np.maximum(n - 1, 0)).astype(np.intp)
    out: F32 = np.take_along_axis(ordered, rank[None], 0)[0]
    return out


def _nanmedian(values: F32, min_dates: int) -> F32:
    """Median over the first axis without NaN, by sorting: no warnings for empty pixels."""
    ordered = np.sort(values, axis=0)  # NaN last
    n = np.isfinite(ordered).sum(axis=0)
    low, high = np.maximum(n - 1, 0) // 2, n // 2
    high = np.minimum(high, values.shape[0] - 1)
    pick = 0.5 * (
        np.take_along_axis(ordered, low[None], 0)[0] + np.take_along_axis(ordered, high[None], 0)[0]
    )
    return np.where(n >= max(min_dates, 1), pick, np.nan).astype(np.float32)


def _uniform_haze(lift: npt.NDArray[Any]) -> float:
    """Haze of the whole scene: what even its least raised tenth has, up to a limit.

    More than the limit everywhere is thin cloud, not haze.
    """
    return float(np.clip(_low(lift, 10.0, _MOST_HAZE), -0.03, _MOST_HAZE))


def haze_lift(bands: Bands, background: Bands) -> npt.NDArray[Any]:
    """Rise of the haze index over the pixel's clear-sky value, less the scene's own haze."""
    lift = haze_index(bands["B02"], bands["B04"]) - haze_index(background["B02"], background["B04"])
    out: npt.NDArray[Any] = lift - _uniform_haze(lift)
    return out


def temporal_cloud(
    blue: npt.NDArray[Any],
    red: npt.NDArray[Any] | None = None,
    *,
    invalid: BoolArray | None = None,
    threshold: float = 0.022,
) -> BoolArray:
    """Cloud as a departure from each pixel's own clear sky, for a stack of dates.

    The clear sky is the 30th percentile over the dates (at most 70 % of them cloudy), the
    deviation is freed of each scene's uniform haze. With the red band the haze index is compared,
    which hardly moves when a field turns green; with blue alone the threshold should be doubled.

    Args:
        blue: (T, H, W) reflectance, T >= 4.
        red: (T, H, W) reflectance.
        invalid: (T, H, W) bool, e.g. snow; NaN is invalid anyway.
        threshold: Least rise that is cloud (reflectance).

    Returns:
        (T, H, W) bool.

    Raises:
        SceneError: Fewer than 4 dates.
    """
    _enough(blue.shape[0])
    index = blue if red is None else haze_index(blue, red)
    usable = np.isfinite(index) if invalid is None else np.isfinite(index) & ~invalid
    values = np.where(usable, index, np.nan).astype(np.float32)
    n = usable.sum(axis=0)
    lift = values - _low_rank(values)
    offset = np.array([_uniform_haze(x) for x in lift])
    with np.errstate(invalid="ignore"):
        cloud: BoolArray = (lift - offset[:, None, None] > threshold) & (n >= MIN_DATES)
    return cloud


def temporal_shadow(
    nir: npt.NDArray[Any], swir: npt.NDArray[Any], *, invalid: BoolArray, drop: float = 0.25
) -> BoolArray:
    """Ground that is darker than its own clear-sky median in both infrared bands.

    A harvest darkens the near infrared and brightens the short-wave one, rain does the reverse; a
    shadow darkens both.

    Args:
        nir: (T, H, W) reflectance.
        swir: (T, H, W) reflectance.
        invalid: (T, H, W) bool, cloud, snow and nodata.
        drop: Least relative darkening.

    Returns:
        (T, H, W) bool.

    Raises:
        SceneError: Fewer than 4 dates.
    """
    _enough(nir.shape[0])
    out = ~invalid
    for band in (nir, swir):
        reference = _nanmedian(np.where(invalid, np.nan, band).astype(np.float32), MIN_DATES)
        with np.errstate(invalid="ignore"):
            out = out & (band < (1.0 - drop) * reference)
    return out


def _enough(dates: int) -> None:
    if dates < MIN_DATES:
        raise SceneError(
            f"{dates} dates",
            where="temporal mask",
            allowed=f"at least {MIN_DATES} dates",
            fix="mask the scenes one by one",
        )
