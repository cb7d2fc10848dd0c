"""Errors of a map that go together over distance, and what that does to the error of a sum.

A total over pixels, T = sum_i w_i x_i, has the variance sum_i sum_j C(h_ij) s_i s_j w_i w_j: s_i is
the standard deviation of pixel i, C(h) the covariance of *standardised* errors (error / s) at
distance h. With independent pixels only the diagonal is left, and the error of a total over many
pixels is far too small.

C comes from the residuals of labelled pixels that no network trained on: its level from their
mean square, its shape from that less their variogram. The double sum is a convolution: on the grid
it is computed exactly by FFT, or on blocks of pixels with the mean covariance between two blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft

from terraloom.errors import FoldError, ModelError
from terraloom.labels.variogram import SHAPES, empirical_variogram

__all__ = ["ErrorCovariance", "fit_covariance", "total_variance"]

Floats = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]

#: Pixels whose pairs are looked at (count): neighbours repeat each other.
MOST_PX = 20_000
#: Fewer residuals than this show no covariance (count).
LEAST_PX = 200
#: An exponential covariance counts as 0 beyond this many ranges: 1e-8 of that at distance 0.
_REACH = 6.0
#: A block is divided into at most so many parts per side for its mean covariance with another:
#: with itself and the nearest, lags below ``_NEAR``, finer than with others.
_PARTS, _NEAR_PARTS, _NEAR = 8, 128, 3
#: Ranges that are tried, from the shortest distance to twice the longest (count).
_RANGES = 120
#: Sides of transforms: these times a power of two, so that few kernels serve many regions.
_SIDES = (8, 9, 10, 12, 15)


@dataclass(frozen=True)
class ErrorCovariance:
    """Covariance of standardised errors by distance.

    Attributes:
        dispersion: Mean square of the errors over their predicted variance: 1 where the map
            knows how wrong it is, more where it is too sure.
        nugget: Share of it that is independent from pixel to pixel, 0-1.
        model: ``spherical`` or ``exponential``.
        range_m: Distance at which nothing is left of the rest (exponential: 5 %), metres.
        pixels: Held-out labelled pixels that it was measured at (count).
    """

    dispersion: float
    nugget: float
    model: str
    range_m: float
    pixels: int = 0

    def structured(self, distance_m: npt.ArrayLike) -> Floats:
        """Correlation of the part that depends on distance: 1 at 0, falling to 0."""
        u = np.asarray(distance_m, dtype=np.float64) / self.range_m
        return np.where(u > self._reach, 0.0, 1 - SHAPES[self.model](u))

    @property
    def reach_m(self) -> float:
        """Distance beyond which errors count as independent, metres."""
        return self.range_m * self._reach

    @property
    def _reach(self) -> float:
        return 1.0 if self.model == "spherical" else _REACH

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> ErrorCovariance:
        """Inverse of :meth:`record`.

        Raises:
            ModelError: It is no such record.
        """
        try:
            out = cls(
                float(record["dispersion"]), float(record["nugget"]), str(record["model"]),
                float(record["range_m"]), int(record["pixels"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as err:
            raise ModelError(f"a covariance that cannot be read ({err!r})", where=where,
                             fix="run target `model` again") from err  # fmt: skip
        ok = out.dispersion >= 0 and 0 <= out.nugget <= 1 and 0 < out.range_m < math.inf
        if not ok or out.model not in SHAPES:
            raise ModelError(
                f"covariance {dict(record)}", where=where, allowed="dispersion 0 or more, nugget "
                f"0-1, range_m above 0, model {', '.join(SHAPES)}", fix="run target `model` again",
            )  # fmt: skip
        return out


def fit_covariance(
    xy: npt.ArrayLike,
    error: npt.ArrayLike,
    sd: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    least_sd: float = 0.0,
) -> ErrorCovariance | None:
    """Covariance of standardised errors at pixels whose truth is known.

    Args:
        xy: (N, 2) places, metres.
        error: (N,) truth - prediction.
        sd: (N,) predicted standard deviation; of a class sqrt(p (1 - p)).
        rng: Chooses among more than ``MOST_PX`` pixels.
        least_sd: Pixels that are surer than this take part in the level, not in the shape: of
            a nearly certain pixel the standardised error is 0, or rarely enormous, and such
            pixels say little of a total, to which they add next to no variance.

    Returns:
        The covariance; None where fewer than ``LEAST_PX`` pixels can show it.
    """
    at = np.asarray(xy, dtype=np.float64)
    e, s = (np.asarray(v, dtype=np.float64) for v in (error, sd))
    rows = np.flatnonzero((s > 0) & (s >= least_sd) & np.isfinite(e))
    if len(rows) < LEAST_PX:
        return None
    every = np.isfinite(e) & np.isfinite(s)
    dispersion = float((e[every] ** 2).sum() / (s[every] ** 2).sum())
    if len(rows) > MOST_PX:
        rows = np.sort(rng.choice(rows, MOST_PX, replace=False))
    z = e[rows] / s[rows]
    try:
        lag, gamma, pairs = empirical_variogram(at[rows], z, rng=rng)
    except FoldError:  # all at one place
        return None
    model, range_m, part = _fit(lag, 1 - gamma / float((z**2).mean()), pairs / lag)
    return ErrorCovariance(dispersion, 1 - part, model, range_m, int(every.sum()))


def _fit(lag: Floats, correlation: Floats, weight: Floats) -> tuple[str, float, float]:
    """Model, range and structured part that fit best, by weighted least squares.

    Unlike for a variogram of labels the level is known: errors have mean 0 if the map is right, so
    the correlation follows from the mean square, and a bias of a whole neighbourhood counts as
    correlation. Weights are pairs / distance: between those of kriging, for which only the nearest
    matter, and the number of pairs in a region, of which most are far apart.
    """
    best = math.inf, "spherical", float(lag.min()), 0.0
    for model, curve in SHAPES.items():
        for range_m in np.geomspace(lag.min(), 2 * lag.max(), _RANGES):
            shape = 1 - curve(lag / range_m)
            norm = float((weight * shape**2).sum())
            part = float((weight * shape * correlation).sum()) / norm if norm > 0 else 0.0
            part = min(max(part, 0.0), 1.0)
            error = float((weight * (correlation - part * shape) ** 2).sum())
            best = min(best, (error, model, float(range_m), part))
    return best[1:]


def total_variance(
    weight: npt.NDArray[Any],
    squares: float,
    covariance: ErrorCovariance,
    pixel_m: float,
    *,
    block: int = 1,
) -> float:
    """Variance of a total, sum_i sum_j C(h_ij) w_i w_j with w = weight x standard deviation.

    Args:
        weight: (H, W) w of each pixel, or its sum over blocks of ``block`` x ``block`` pixels.
        squares: Sum of w^2 over *pixels*; on its own the variance of independent pixels.
        covariance: Covariance of the standardised errors.
        pixel_m: Pixel size, metres.
        block: Pixels per side of a block (count). 1 is exact. With blocks w is taken as even
            inside a block; what differs there is added as if it were independent.

    Returns:
        The variance, in squared units of w.
    """
    w = np.asarray(weight, dtype=np.float32)
    inner = 0.0
    if block > 1:
        inner = max(squares - float((w.astype(np.float64) ** 2).sum()) / block**2, 0.0)
    together = 0.0
    if covariance.nugget < 1:
        reach = math.ceil(covariance.reach_m / (pixel_m * block)) + 1
        sides = tuple(_side(n + min(n - 1, reach)) for n in w.shape)
        kernel = _kernel(sides, block, pixel_m, covariance.model, covariance.range_m)
        power = np.abs(fft.rfft2(w, s=sides)) ** 2
        power[:, 1 : (sides[1] + 1) // 2] *= 2  # the half of the transform that rfft2 leaves out
        together = float(np.einsum("ij,ij->", power, kernel, dtype=np.float64)) / math.prod(sides)
    share = covariance.nugget
    return covariance.dispersion * (share * squares + (1 - share) * (max(together, 0) + inner))


def _side(n: int) -> int:
    """The next side of a transform; of few sizes, so that kernels are used again."""
    power = max(0, (n - 1).bit_length() - 4)
    while True:
        for k in _SIDES:
            if k << power >= n:
                return k << power
        power += 1


@lru_cache(maxsize=48)
def _kernel(sides: tuple[int, int], block: int, pixel_m: float, model: str, range_m: float) -> F32:
    """Transform of the correlation between blocks on a torus of ``sides`` blocks, real.

    A torus is wide enough when no lag that matters comes round: distances are those of the
    shorter way, and the correlation is 0 beyond its reach.
    """
    shape = ErrorCovariance(1.0, 0.0, model, range_m)
    half = (sides[0] // 2 + 1, sides[1] // 2 + 1)
    quarter = _between(shape, half, block * pixel_m, min(block, _PARTS))
    near = (min(half[0], _NEAR), min(half[1], _NEAR))
    quarter[: near[0], : near[1]] = _between(shape, near, block * pixel_m, min(block, _NEAR_PARTS))
    rows, cols = (np.minimum(np.arange(n), n - np.arange(n)) for n in sides)
    kernel: F32 = fft.rfft2(quarter[np.ix_(rows, cols)]).real.astype(np.float32)
    return kernel


def _between(shape: ErrorCovariance, lags: tuple[int, int], side_m: float, parts: int) -> Floats:
    """Mean correlation of two blocks at lags 0, 1, ... blocks, each of ``parts``^2 points."""
    dy, dx = (np.arange(n * parts) * (side_m / parts) for n in (lags[0] + 1, lags[1] + 1))
    points = shape.structured(np.hypot(dy[:, None], dx[None, :]))
    return np.asarray(_often(lags[0], parts) @ points @ _often(lags[1], parts).T)


def _often(lags: int, parts: int) -> Floats:
    """(L, F) how often parts of two blocks l apart are f parts apart, as a share."""
    u = np.arange(1 - parts, parts)
    at = np.abs(np.arange(lags)[:, None] * parts + u)
    table = np.zeros((lags, (lags + 1) * parts))
    np.add.at(table, (np.arange(lags)[:, None], at), (parts - np.abs(u)) / parts**2)
    return table
