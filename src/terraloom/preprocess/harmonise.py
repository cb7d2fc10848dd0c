"""Optical scenes made comparable: one spectral response, one view direction.

Both adjustments are linear in reflectance and constant over a scene and band, so they are one gain
and one offset on top of the decoding.

Band-pass: Sentinel-2 and Landsat 8 see slightly different wavelengths. The coefficients are those
of the Harmonized Landsat and Sentinel-2 product (HLS v1.5 user guide; Claverie et al. 2018):
``OLI = slope * MSI + offset`` per platform. Bands without a counterpart (red edge, the wide
near infrared B08) stay as they are. Platforms without published coefficients are refused.

View direction: the c-factor of Roy et al. (2016, Landsat; 2017, Sentinel-2) with one set of
kernel weights for all land covers: reflectance seen from the nadir over reflectance seen from
where the sensor was, under the sun of the scene. Angles are those of the item, thus of the scene's
middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from terraloom.errors import SceneError

__all__ = [
    "Bandpass", "Brdf", "adjustment", "bandpass", "c_factor", "geometric_kernel", "sensor_of",
    "view_unknown", "volume_kernel",
]  # fmt: skip

Bandpass = Literal["none", "sentinel-2", "landsat-8"]
Brdf = Literal["none", "c-factor"]

#: Role: slope and offset from the platform's reflectance to that of OLI.
_TO_OLI: dict[str, dict[str, tuple[float, float]]] = {
    "S2A": {
        "B01": (0.9959, -0.0002), "B02": (0.9778, -0.0040), "B03": (1.0053, -0.0009),
        "B04": (0.9765, 0.0009), "B8A": (0.9983, -0.0001), "B11": (0.9987, -0.0011),
        "B12": (1.0030, -0.0012),
    },
    "S2B": {
        "B01": (0.9959, -0.0002), "B02": (0.9778, -0.0040), "B03": (1.0075, -0.0008),
        "B04": (0.9761, 0.0010), "B8A": (0.9966, 0.0000), "B11": (1.0000, -0.0003),
        "B12": (0.9867, 0.0004),
    },
    # The two imagers have one design; HLS makes no difference between them.
    "L8": {}, "L9": {},
}  # fmt: skip
_TARGET = {"sentinel-2": "S2A", "landsat-8": "L8"}

#: Role: isotropic, geometric and volumetric weight (Roy et al. 2016, 2017).
_WEIGHTS = {
    "B02": (0.0774, 0.0079, 0.0372), "B03": (0.1306, 0.0178, 0.0580),
    "B04": (0.1690, 0.0227, 0.0574), "B05": (0.2085, 0.0256, 0.0845),
    "B06": (0.2316, 0.0273, 0.1003), "B07": (0.2599, 0.0294, 0.1197),
    "B08": (0.3093, 0.0330, 0.1535),
    "B8A": (0.3093, 0.0330, 0.1535), "B11": (0.3430, 0.0453, 0.1154),
    "B12": (0.2658, 0.0387, 0.0639),
}  # fmt: skip
#: Farther from 1 than this the model is not trusted and cut.
_MOST = 0.2
_ANGLES = ("sun_azimuth_deg", "sun_elevation_deg", "view_azimuth_deg", "view_zenith_deg")


def sensor_of(item: Mapping[str, Any]) -> str:
    """Short name of the platform whose spectral response an item has, such as ``S2A`` or ``L8``.

    HLS has the response of Landsat 8, whatever the platform. Unknown platforms give their own name.
    """
    if Path(str(item["source"])).stem.startswith("hls"):
        return "L8"
    platform = str(item.get("platform") or "")
    hit = re.search(r"(?:sentinel[-_ ]?|^s)(2[a-d])$", platform.lower())
    if hit:
        return "S" + hit[1].upper()
    hit = re.search(r"(?:landsat[-_ ]?|^l[cetm]?0?)([4-9])$", platform.lower())
    return f"L{hit[1]}" if hit else platform


def bandpass(item: Mapping[str, Any], role: str, target: Bandpass) -> tuple[float, float]:
    """Gain and offset from an item's reflectance to that of a sensor.

    Args:
        item: Item of the lock.
        role: Band in terms of Sentinel-2, e.g. ``B04`` for red.
        target: ``sentinel-2`` means Sentinel-2A, ``landsat-8`` the OLI.

    Raises:
        SceneError: There are no coefficients for the item's platform.
    """
    if target == "none":
        return 1.0, 0.0
    sensor, wanted = sensor_of(item), _TARGET[target]
    if sensor not in _TO_OLI:
        raise SceneError(
            f"no published band-pass coefficients for platform {item.get('platform')!r}",
            where=f"item {item['id']}", allowed="Sentinel-2A, Sentinel-2B, Landsat 8, Landsat 9",
            fix="leave the platform's scenes out with sources[].filter, or set cube.bandpass to "
            "none; coefficients of another platform are not used in their place",
        )  # fmt: skip
    if sensor == wanted:
        return 1.0, 0.0
    slope, offset = _TO_OLI[sensor].get(role, (1.0, 0.0))
    back_slope, back_offset = _TO_OLI[wanted].get(role, (1.0, 0.0))
    return slope / back_slope, (offset - back_offset) / back_slope


def _radians(sun_zenith_deg: float, view_zenith_deg: float, azimuth_deg: float) -> list[float]:
    return [math.radians(a) for a in (sun_zenith_deg, view_zenith_deg, azimuth_deg)]


def volume_kernel(sun_zenith_deg: float, view_zenith_deg: float, azimuth_deg: float) -> float:
    """Ross-Thick kernel of volume scattering; 0 with sun and sensor in the zenith.

    Args:
        sun_zenith_deg: Degrees.
        view_zenith_deg: Degrees.
        azimuth_deg: Azimuth between sun and sensor, degrees.
    """
    s, v, a = _radians(sun_zenith_deg, view_zenith_deg, azimuth_deg)
    cos_phase = math.cos(s) * math.cos(v) + math.sin(s) * math.sin(v) * math.cos(a)
    phase = math.acos(min(max(cos_phase, -1), 1))
    top = (math.pi / 2 - phase) * math.cos(phase) + math.sin(phase)
    return top / (math.cos(s) + math.cos(v)) - math.pi / 4


def geometric_kernel(sun_zenith_deg: float, view_zenith_deg: float, azimuth_deg: float) -> float:
    """Reciprocal Li-Sparse kernel of shadows (h/b = 2, b/r = 1); 0 with both in the zenith.

    Args:
        sun_zenith_deg: Degrees.
        view_zenith_deg: Degrees.
        azimuth_deg: Azimuth between sun and sensor, degrees.
    """
    s, v, a = _radians(sun_zenith_deg, view_zenith_deg, azimuth_deg)
    ts, tv = math.tan(s), math.tan(v)
    secants = 1 / math.cos(s) + 1 / math.cos(v)
    distance2 = max(ts * ts + tv * tv - 2 * ts * tv * math.cos(a), 0.0)
    cos_t = 2 * math.sqrt(distance2 + (ts * tv * math.sin(a)) ** 2) / secants
    t = math.acos(min(max(cos_t, -1), 1))
    overlap = (t - math.sin(t) * math.cos(t)) * secants / math.pi
    cos_phase = math.cos(s) * math.cos(v) + math.sin(s) * math.sin(v) * math.cos(a)
    return overlap - secants + (1 + cos_phase) / (2 * math.cos(s) * math.cos(v))


def c_factor(
    role: str, sun_zenith_deg: float, view_zenith_deg: float, azimuth_deg: float,
    target_sun_zenith_deg: float | None = None,
) -> float:  # fmt: skip
    """Factor that turns reflectance as seen into reflectance as seen from the nadir.

    Args:
        role: Band in terms of Sentinel-2; bands without published weights give 1.
        sun_zenith_deg: Degrees.
        view_zenith_deg: Degrees.
        azimuth_deg: Azimuth between sun and sensor, degrees.
        target_sun_zenith_deg: Sun of the result; default: the sun stays where it was.

    Returns:
        The factor, cut to 0.8-1.2.
    """
    if role not in _WEIGHTS:
        return 1.0

    def model(sun: float, view: float, azimuth: float) -> float:
        iso, geo, vol = _WEIGHTS[role]
        return (
            iso
            + geo * geometric_kernel(sun, view, azimuth)
            + vol * volume_kernel(sun, view, azimuth)
        )

    sun = sun_zenith_deg if target_sun_zenith_deg is None else target_sun_zenith_deg
    c = model(sun, 0, 0) / model(sun_zenith_deg, view_zenith_deg, azimuth_deg)
    return min(max(c, 1 - _MOST), 1 + _MOST)


def view_unknown(item: Mapping[str, Any]) -> str | None:
    """Why an item's view direction cannot be adjusted; None if it can."""
    missing = [a.removesuffix("_deg").replace("_", " ") for a in _ANGLES if item.get(a) is None]
    # Straight down has no azimuth, and needs none.
    if missing == ["view azimuth"] and item["view_zenith_deg"] == 0:
        return None
    return f"{', '.join(missing)} not in the item's record" if missing else None


def adjustment(
    item: Mapping[str, Any], role: str | None, *, bandpass_to: Bandpass, brdf: Brdf
) -> tuple[float, float]:
    """Gain and offset of one band of one item: view direction first, then band-pass.

    Args:
        item: Item of the lock.
        role: Band in terms of Sentinel-2; None for a band that plays no spectral part.
        bandpass_to: Sensor whose response is wanted.
        brdf: ``c-factor`` adjusts to nadir view, unless :func:`view_unknown`.

    Raises:
        SceneError: There are no coefficients for the item's platform.
    """
    gain, offset = bandpass(item, role or "", bandpass_to)
    if brdf == "none" or role is None or view_unknown(item) is not None:
        return gain, offset
    azimuth = float(item["sun_azimuth_deg"]) - float(item.get("view_azimuth_deg") or 0)
    sun = 90 - float(item["sun_elevation_deg"])
    return gain * c_factor(role, sun, float(item["view_zenith_deg"]), azimuth), offset
