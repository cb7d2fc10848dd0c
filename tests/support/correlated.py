"""Gaussian random fields with an exact covariance, by circulant embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from terraloom.uncertainty.covariance import ErrorCovariance

Floats = npt.NDArray[np.float64]


class Fields:
    """Draws fields of unit variance: a correlated part and a nugget.

    Dietrich and Newsam (1997): a covariance on a torus is diagonal after a Fourier transform. The
    torus is made wide enough for its few negative eigenvalues to be negligible.
    """

    def __init__(self, size: int, covariance: ErrorCovariance, pixel_m: float) -> None:
        n = 2 * size
        while True:
            lag = np.minimum(np.arange(n), n - np.arange(n)) * pixel_m
            values = np.fft.fft2(covariance.structured(np.hypot(lag[:, None], lag[None, :]))).real
            if values.min() > -1e-3 * values.max() or n >= 8 * size:
                break
            n *= 2
        self._root = np.sqrt(np.maximum(values, 0) / n**2)
        self._size, self._nugget = size, covariance.nugget

    def draw(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Two independent fields, (H, W) each."""
        shape = self._root.shape
        noise = rng.normal(size=shape) + 1j * rng.normal(size=shape)
        both = np.fft.fft2(self._root * noise)[: self._size, : self._size]
        alone = rng.normal(size=(2, *both.shape))
        share = self._nugget
        one, two = (
            np.sqrt(1 - share) * part + np.sqrt(share) * e
            for part, e in zip((both.real, both.imag), alone, strict=True)
        )
        return one, two
