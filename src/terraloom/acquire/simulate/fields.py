"""Random fields, random streams and the sub-pixel shift shared by the simulator's parts."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

__all__ = ["F32", "Shift", "block_mean", "fractal", "grain", "move", "stream"]

F32 = npt.NDArray[np.float32]
#: Movement of a scene's content: (pixels down, pixels right), 10 m pixels.
Shift = tuple[float, float]

#: Support of the Lanczos interpolator, pixels: flat to 0.8 of the Nyquist frequency.
_LANCZOS = 4
#: Standard deviation of the sensor's point spread function, 10 m pixels.
_PSF_SD_PX = 0.45


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """Independent random stream of a named part; does not depend on what was drawn before it."""
    key = (zlib.crc32(name.encode()), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def fractal(
    rng: np.random.Generator, shape: tuple[int, int], *, scale_px: float, power: float
) -> F32:
    """Random field (H, W) with spectral amplitude ``(1 + (f scale)^2)^(-power/2)``.

    Args:
        rng: Source of randomness.
        shape: Rows and columns.
        scale_px: Size of the largest features, pixels.
        power: Fall of the amplitude with frequency; 1.5 is rough, 4 is smooth.

    Returns:
        Field with mean 0 and standard deviation 1.
    """
    h, w = (fft.next_fast_len(n, real=True) for n in shape)
    white = rng.standard_normal((h, w), dtype=np.float32)
    spectrum = fft.rfft2(white)
    fy = fft.fftfreq(h).astype(np.float32)[:, None]
    fx = fft.rfftfreq(w).astype(np.float32)[None, :]
    spectrum *= (1 + (fy**2 + fx**2) * np.float32(scale_px**2)) ** np.float32(-power / 2)
    spectrum[0, 0] = 0
    out = fft.irfft2(spectrum, s=(h, w))[: shape[0], : shape[1]]
    return np.asarray((out - out.mean()) / out.std(), dtype=np.float32)


def grain(rng: np.random.Generator, shape: tuple[int, int]) -> F32:
    """Fine texture (H, W): white noise blurred to about 1.5 pixels, mean 0 and sd 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.6)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def _kernel(shift: float) -> npt.NDArray[np.float64]:
    reach = _LANCZOS + 2
    x = np.arange(-reach, reach + 1) + shift
    lanczos = np.where(np.abs(x) < _LANCZOS, np.sinc(x) * np.sinc(x / _LANCZOS), 0.0)
    psf = np.exp(-0.5 * (np.arange(-2, 3) / _PSF_SD_PX) ** 2)
    weights = np.convolve(lanczos / lanczos.sum(), psf / psf.sum())
    return np.asarray(weights / weights.sum())


def move(field: F32, shift: Shift) -> F32:
    """See a field through the sensor: blur by the point spread function, move the content.

    Args:
        field: (H, W) content on the true grid.
        shift: (down, right) movement in pixels; the output at row r shows the content of row
            r - down.

    Returns:
        (H, W) field; pixels nearer than 8 px to the border repeat the border.
    """
    rows = ndimage.correlate1d(field, _kernel(shift[0]), axis=0, mode="nearest")
    return np.asarray(
        ndimage.correlate1d(rows, _kernel(shift[1]), axis=1, mode="nearest"), dtype=np.float32
    )


def block_mean(field: F32, factor: int) -> F32:
    """Mean of blocks of ``factor`` x ``factor`` pixels, (H / factor, W / factor)."""
    h, w = field.shape
    blocks = field.reshape(h // factor, factor, w // factor, factor)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)
