"""Speckle: its statistics, averaging in linear power, and a multitemporal filter.

Backscatter of L looks has a coefficient of variation of ``1 / sqrt(L)`` in power. Its logarithm is
lower than that of the mean on average (.51 dB for the 4.4 looks of Sentinel-1 GRD), and this bias
depends on the number of looks. Therefore everything is averaged in power, and decibels
come last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage, special

from terraloom.preprocess.composites import mean

__all__ = [
    "WINDOW_PX", "bias_db", "expected_looks", "looks_of", "mean_db", "multitemporal", "spread_db",
    "to_db", "to_power",
]  # fmt: skip

Float = npt.NDArray[np.float32]

#: Side of the local window of the multitemporal filter, pixels.
WINDOW_PX = 7
_DB = 10 / math.log(10)


def to_power(db: Float) -> Float:
    """Decibels to linear power."""
    power: Float = np.power(np.float32(10), db / np.float32(10), dtype=np.float32)
    return power


def to_db(power: Float) -> Float:
    """Linear power to decibels; NaN where the power is not positive."""
    known = power > 0
    out: Float = np.full(power.shape, np.nan, np.float32)
    np.log10(power, out=out, where=known)
    out *= np.float32(10)
    return out


def bias_db(looks: float) -> float:
    """Mean of the decibels less the decibels of the mean, for speckle of L looks (below 0)."""
    return float(_DB * (special.digamma(looks) - math.log(looks)))


def spread_db(looks: float) -> float:
    """Standard deviation of the decibels for speckle of L looks."""
    return float(_DB * math.sqrt(special.polygamma(1, looks)))


def looks_of(power: npt.NDArray[np.floating]) -> float:
    """Equivalent number of looks of homogeneous ground: mean squared over variance, of power."""
    known = np.asarray(power, np.float64)[np.isfinite(power)]
    if known.size < 2 or known.var() == 0:
        return math.nan
    return float(known.mean() ** 2 / known.var(ddof=1))


def mean_db(db: Float) -> Float:
    """Mean over the first axis in linear power, as decibels.

    Args:
        db: (T, ...) decibels; NaN is missing.
    """
    return to_db(mean(to_power(db)))


def multitemporal(power: Float | Sequence[Float], window_px: int = WINDOW_PX) -> Float:
    """Multitemporal speckle filter (Quegan and Yu 2001) for images whose speckle is independent.

    Each image becomes its local mean times the average over all images of their ratios to their
    local means: ``J_k = m_k / N * sum_i I_i / m_i``. Local means follow what changes between the
    dates, the ratios keep what does not.

    Args:
        power: (T, H, W) linear power; NaN or not positive is missing. Images without a value in a
            pixel take no part there.
        window_px: Side of the square of the local mean, odd.

    Returns:
        (T, H, W) power; NaN where the input is missing.
    """
    stack = np.asarray(power, np.float32)
    local = np.empty_like(stack)
    ratios = np.zeros(stack.shape[1:], np.float64)
    count = np.zeros(stack.shape[1:], np.int32)
    for k, image in enumerate(stack):
        known = image > 0
        values = np.where(known, image, 0).astype(np.float64)
        total = ndimage.uniform_filter(values, window_px, mode="constant")
        share = ndimage.uniform_filter(known.astype(np.float64), window_px, mode="constant")
        with np.errstate(invalid="ignore", divide="ignore"):
            local[k] = np.where(known, total / share, np.nan)
            np.add(ratios, image / local[k], out=ratios, where=known)
        count += known
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios /= count
    out: Float = local * ratios.astype(np.float32)
    return out


def expected_looks(looks: float, images: int, window_px: int = WINDOW_PX) -> float:
    """Looks after :func:`multitemporal` on homogeneous ground with uncorrelated pixels.

    With M pixels in the window and N images: ``L M N / (M + N - 1)``.
    """
    m = window_px**2
    return looks * m * images / (m + images - 1)
