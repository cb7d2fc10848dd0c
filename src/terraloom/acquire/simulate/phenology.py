"""Spectra of surfaces and the course of vegetation over the year.

A class is a mixture: ``f(t) x vegetation + (1 - f(t)) x background``. The spectra are rounded
from the shapes that every text on remote sensing shows (red edge, water absorption in the
short-wave infrared); they are plausible, not measured.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from terraloom.acquire.simulate.fields import F32
from terraloom.acquire.simulate.landscape import (
    BROADLEAF,
    BUILT,
    CONIFER,
    GRASS,
    SUMMER,
    WATER,
    WINTER,
    Parcels,
)

__all__ = ["BANDS", "BANDS_10M", "BANDS_20M", "SPECTRA", "end_members", "vegetation"]

BANDS_10M = ("B02", "B03", "B04", "B08")
BANDS_20M = ("B05", "B06", "B07", "B8A", "B11", "B12")
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")

#: Surface reflectance (0-1) in the order of ``BANDS``.
SPECTRA: dict[str, tuple[float, ...]] = {
    "green": (0.028, 0.065, 0.028, 0.085, 0.300, 0.420, 0.460, 0.480, 0.200, 0.095),
    "leaf": (0.022, 0.048, 0.022, 0.070, 0.260, 0.360, 0.400, 0.420, 0.170, 0.075),
    "needle": (0.016, 0.032, 0.017, 0.042, 0.140, 0.190, 0.220, 0.230, 0.095, 0.042),
    "soil": (0.070, 0.098, 0.130, 0.155, 0.175, 0.195, 0.215, 0.235, 0.320, 0.280),
    "stubble": (0.070, 0.110, 0.155, 0.190, 0.225, 0.255, 0.285, 0.305, 0.350, 0.265),
    "litter": (0.035, 0.050, 0.065, 0.085, 0.110, 0.130, 0.150, 0.165, 0.200, 0.140),
    "straw": (0.050, 0.075, 0.085, 0.125, 0.190, 0.220, 0.250, 0.270, 0.280, 0.190),
    "roof": (0.110, 0.122, 0.132, 0.140, 0.150, 0.160, 0.175, 0.185, 0.215, 0.195),
    "water": (0.045, 0.045, 0.028, 0.022, 0.016, 0.015, 0.012, 0.011, 0.006, 0.004),
    "snow": (0.880, 0.870, 0.860, 0.850, 0.830, 0.810, 0.790, 0.770, 0.140, 0.100),
    "cloud": (0.660, 0.640, 0.630, 0.640, 0.650, 0.660, 0.660, 0.660, 0.420, 0.300),
}

#: Vegetation and background spectrum of each class, by class index.
_MIXTURE = {
    WATER: ("water", "water"),
    BROADLEAF: ("leaf", "litter"),
    CONIFER: ("needle", "litter"),
    WINTER: ("green", "stubble"),
    SUMMER: ("green", "soil"),
    GRASS: ("green", "straw"),
    BUILT: ("green", "roof"),
}

Days = npt.NDArray[np.float64]


def _up(day: Days, middle: float, width: float) -> Days:
    """Logistic step from 0 to 1; ``width`` is a quarter of the rise time, days."""
    return np.asarray(1 / (1 + np.exp(-(day - middle) / width)))


def vegetation(parcels: Parcels, classes: npt.NDArray[np.int8], day_of_year: int) -> F32:
    """Share of the ground that green vegetation covers in each parcel, (N,), 0-1.

    Args:
        parcels: Parcel properties (delay and vigour of growth, days of mowing).
        classes: (N,) class index on that day.
        day_of_year: 1-366.
    """
    own = _green_share(parcels, classes, day_of_year)
    other = _green_share(parcels, parcels.partner, day_of_year)
    share = (own + parcels.mix * (other - own)) * parcels.vigour
    return np.asarray(share.clip(0, 1), dtype=np.float32)


def _green_share(parcels: Parcels, classes: npt.NDArray[np.int8], day_of_year: int) -> Days:
    d = day_of_year - parcels.delay_days.astype(np.float64)
    since = day_of_year - parcels.mowing_day.astype(np.float64)
    cut = (0.3 * np.exp(-np.maximum(since, 0) / 18) * (since >= 0)).sum(axis=1)
    autumn_green = 0.16 * (_up(d, 285, 8) + 1 - _up(d, 98, 9))
    by_class = {
        WATER: np.zeros_like(d),
        BROADLEAF: 0.10 + 0.82 * (_up(d, 118, 5) - _up(d, 300, 7)),
        CONIFER: 0.84 + 0.06 * np.sin((d - 100) / 365 * 2 * np.pi),
        WINTER: 0.06 + 0.86 * (_up(d, 98, 9) - _up(d, 182, 5)) + autumn_green,
        SUMMER: 0.05 + 0.87 * (_up(d, 158, 7) - _up(d, 262, 6)),
        GRASS: 0.46 + 0.42 * (_up(d, 100, 13) - _up(d, 292, 16)) - cut,
        BUILT: 0.12 + 0.12 * (_up(d, 110, 10) - _up(d, 295, 12)),
    }
    share = np.zeros_like(d)
    for k, values in by_class.items():
        share = np.where(classes == k, values, share)
    return share


def end_members(parcels: Parcels, classes: npt.NDArray[np.int8], band: int) -> tuple[F32, F32]:
    """Reflectance of full vegetation and of bare background in each parcel, (N,) each."""
    veg = np.array([SPECTRA[_MIXTURE[k][0]][band] for k in range(len(_MIXTURE))])
    bare = np.array([SPECTRA[_MIXTURE[k][1]][band] for k in range(len(_MIXTURE))])
    tint, mix, partner = parcels.tint[:, band], parcels.mix, parcels.partner
    veg = veg[classes] + mix * (veg[partner] - veg[classes])
    bare = bare[classes] + mix * (bare[partner] - bare[classes])
    return (
        np.asarray(veg * tint, dtype=np.float32),
        np.asarray(bare * tint * parcels.soil, dtype=np.float32),
    )
