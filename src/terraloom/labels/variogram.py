"""How far labels resemble each other: variogram of what a simple model leaves, and block size.

The semivariance of a value z at distance h is gamma(h) = mean of (z_i - z_j)^2 / 2 over pairs of
labels about h apart (Matheron 1962). It rises from the nugget to the sill; the distance at which
it gets there is the range: labels farther apart say nothing of each other. Blocks as wide as the
range of the residuals keep most held-out labels from being known by their neighbours (Roberts et
al. 2017, Ecography 40, 913-929; Valavi et al. 2019, Methods in Ecology and Evolution 10, 225-232).

The simple model is the frequency of each class, or the mean of a value, with a linear trend over
the region: it needs no images, so that folds are known before any is read. With classes the
squared differences are summed over the class indicators: gamma(h) is the chance that two labels h
apart differ (trend aside). Residuals of a model can be given to :func:`empirical_variogram` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar, nnls
from scipy.spatial import cKDTree

from terraloom.errors import FoldError

__all__ = ["SHAPES", "Variogram", "empirical_variogram", "fit_variogram", "residuals"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Pairs that are looked at; where there are more, a random subset of labels is held against all.
MOST_PAIRS = 4_000_000
#: Classes of distance, of equal width in the logarithm.
CLASSES = 24
#: A class of distance with fewer pairs than this is left out.
LEAST_PAIRS = 30
#: Of the sill, the share that must depend on distance for a range to mean something.
LEAST_STRUCTURE = 0.1
#: Largest distance as share of the diagonal of all labels: beyond, few labels make all pairs.
REACH = 0.5
#: Exponential models reach 95 % of the sill at this many times their parameter.
PRACTICAL = 3.0


@dataclass(frozen=True)
class Variogram:
    """Semivariance by distance, and the model that fits it best.

    Attributes:
        lag_m: (L,) mean distance of the pairs of a class of distance, metres.
        gamma: (L,) their semivariance, squared units of the value.
        pairs: (L,) number of pairs.
        model: ``spherical`` or ``exponential``.
        nugget: Semivariance at distance 0.
        sill: Semivariance at large distances, nugget included.
        range_m: Distance at which the sill is reached (exponential: 95 % of it), metres.
    """

    lag_m: Floats
    gamma: Floats
    pairs: Ints
    model: str
    nugget: float
    sill: float
    range_m: float

    @property
    def structured(self) -> bool:
        """Whether near labels are more alike than far ones."""
        return self.sill > 0 and (self.sill - self.nugget) >= LEAST_STRUCTURE * self.sill

    def at(self, distance_m: npt.ArrayLike) -> Floats:
        """Semivariance of the model at distances, metres."""
        shape = SHAPES[self.model](np.asarray(distance_m, dtype=np.float64) / self.range_m)
        return np.asarray(self.nugget + (self.sill - self.nugget) * shape, dtype=np.float64)

    def record(self) -> dict[str, Any]:
        """JSON form, for the report of the labels."""
        return {
            "model": self.model, "range_m": round(self.range_m, 1),
            "nugget": round(self.nugget, 5), "sill": round(self.sill, 5),
            "lag_m": [round(float(v), 1) for v in self.lag_m],
            "gamma": [round(float(v), 5) for v in self.gamma],
            "pairs": [int(v) for v in self.pairs],
        }  # fmt: skip


def _spherical(u: Floats) -> Floats:
    v = np.minimum(u, 1.0)
    return np.asarray(1.5 * v - 0.5 * v**3, dtype=np.float64)


def _exponential(u: Floats) -> Floats:
    return np.asarray(1 - np.exp(-PRACTICAL * u), dtype=np.float64)


#: Rise from 0 to 1 of each model, by distance over range.
SHAPES = {"spherical": _spherical, "exponential": _exponential}


def residuals(xy: npt.ArrayLike, value: npt.ArrayLike, *, classes: bool) -> Floats:
    """What a linear trend over the region leaves of class indicators or of a value.

    Args:
        xy: (N, 2) coordinates, metres.
        value: (N,) class of each (any ids), or a number; NaN is no value.
        classes: Whether ``value`` names classes.

    Returns:
        (N, C): C class indicators less their trend; of a value C is 1, in units of its standard
        deviation. Rows without a value are NaN.
    """
    points = _points(xy)
    if classes:
        names, at = np.unique(np.asarray(value), return_inverse=True)
        z = np.eye(len(names))[at.reshape(-1)]
    else:
        z = np.asarray(value, dtype=np.float64)[:, None]
    known = np.isfinite(z).all(axis=1)
    out = np.full(z.shape, np.nan)
    if known.sum() < 4:
        return out
    inside = points[known]
    scale = np.maximum(inside.std(axis=0), 1e-9)
    design = np.column_stack([np.ones(len(inside)), (inside - inside.mean(axis=0)) / scale])
    rest = z[known] - design @ np.linalg.lstsq(design, z[known], rcond=None)[0]
    if not classes:
        rest /= max(float(z[known].std()), 1e-12)
    out[known] = rest
    return out


def empirical_variogram(
    xy: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    least_m: float = 0.0,
    most_m: float | None = None,
) -> tuple[Floats, Floats, Ints]:
    """Mean distance, semivariance and pairs of each class of distance.

    Args:
        xy: (N, 2) coordinates, metres.
        values: (N,) or (N, C) values; squared differences are summed over columns; rows with NaN
            are left out.
        rng: Chooses the labels whose pairs are looked at where N is large.
        least_m: Lower end of the first class, metres; default: the median distance of a label to
            the nearest one, halved.
        most_m: Upper end of the last class; default: half the diagonal of all labels.

    Returns:
        Distances (L,) metres, semivariances (L,), numbers of pairs (L,).

    Raises:
        FoldError: Too few labels.
    """
    points = _points(xy)
    z = np.asarray(values, dtype=np.float64).reshape(len(points), -1)
    known = np.isfinite(z).all(axis=1)
    points, z = points[known], z[known]
    n = len(points)
    if n < 2:
        raise FoldError(f"{n} labels with a value", where="variogram", allowed="2 or more")
    reach = REACH * float(np.hypot(*np.ptp(points, axis=0))) if most_m is None else most_m
    first = n if n * n <= MOST_PAIRS else max(50, MOST_PAIRS // n)
    chosen = np.arange(n) if first == n else np.sort(rng.choice(n, first, replace=False))
    edges = _edges(points, chosen, least_m, reach)
    total, distance = np.zeros(CLASSES), np.zeros(CLASSES)
    pairs = np.zeros(CLASSES, dtype=np.int64)
    for i in chosen:
        # Where all labels are chosen, each pair is met once.
        rest = slice(int(i) + 1, None) if first == n else slice(None)
        d = np.hypot(*(points[rest] - points[i]).T)
        k = np.searchsorted(edges, d, side="right") - 1
        ok = (k >= 0) & (k < CLASSES) & (d > 0)
        half = 0.5 * ((z[rest][ok] - z[i]) ** 2).sum(axis=1)
        pairs += np.bincount(k[ok], minlength=CLASSES)
        total += np.bincount(k[ok], half, minlength=CLASSES)
        distance += np.bincount(k[ok], d[ok], minlength=CLASSES)
    full = pairs >= LEAST_PAIRS
    return distance[full] / pairs[full], total[full] / pairs[full], pairs[full]


def fit_variogram(lag_m: npt.ArrayLike, gamma: npt.ArrayLike, pairs: npt.ArrayLike) -> Variogram:
    """The spherical or exponential model, with nugget, that fits best by weighted least squares.

    Weights are pairs / distance^2: near classes decide, as for kriging (Pebesma 2004, Computers
    and Geosciences 30, 683-691). For each range the best nugget and sill >= 0 follow by linear
    least squares, so that the search is over the range alone.

    Args:
        lag_m: (L,) distances, metres, above 0.
        gamma: (L,) semivariances.
        pairs: (L,) numbers of pairs.

    Raises:
        FoldError: Fewer than four classes of distance.
    """
    lag, g, n = (np.asarray(v, dtype=np.float64) for v in (lag_m, gamma, pairs))
    if len(lag) < 4:
        raise FoldError(
            f"{len(lag)} classes of distance with {LEAST_PAIRS} pairs of labels or more",
            where="variogram", allowed="4 or more",
            fix="a width in metres for folds.block_m, or more labels",
        )  # fmt: skip
    weight = np.sqrt(n) / lag
    best: tuple[float, str, float] | None = None
    ranges = np.geomspace(lag.min(), lag.max(), 60)
    for model in SHAPES:
        errors = [_best_sill(lag, g, weight, model, r)[0] for r in ranges]
        k = int(np.argmin(errors))
        bounds = (float(ranges[max(k - 1, 0)]), float(ranges[min(k + 1, len(ranges) - 1)]))
        fine = minimize_scalar(
            lambda r, m=model: _best_sill(lag, g, weight, m, r)[0], bounds=bounds, method="bounded"
        )
        if best is None or fine.fun < best[0]:
            best = float(fine.fun), model, float(fine.x)
    if best is None:  # pragma: no cover - there are two models
        raise FoldError("no model", where="variogram")
    _, model, reach = best
    nugget, part = _best_sill(lag, g, weight, model, reach)[1]
    return Variogram(lag, g, n.astype(np.int64), model, nugget, nugget + part, reach)


def _best_sill(
    lag: Floats, gamma: Floats, weight: Floats, model: str, range_m: float
) -> tuple[float, tuple[float, float]]:
    """Residual norm, and nugget and partial sill >= 0, for a given range."""
    shape = SHAPES[model](lag / range_m)
    found, norm = nnls(np.column_stack([weight, weight * shape]), weight * gamma)
    return float(norm), (float(found[0]), float(found[1]))


def _edges(points: Floats, chosen: Ints, least_m: float, reach: float) -> Floats:
    """Edges of the classes of distance, (CLASSES + 1,)."""
    if least_m <= 0:
        unique = np.unique(points, axis=0)
        if len(unique) < 2:
            raise FoldError("all labels lie at one place", where="variogram",
                            allowed="two places or more")  # fmt: skip
        nearest = cKDTree(unique).query(points[chosen], k=2)[0][:, 1]
        least_m = 0.5 * float(np.median(nearest))
    if reach <= least_m:
        raise FoldError(
            f"distances from {least_m:g} to {reach:g} m", where="variogram",
            allowed="an upper end above the lower one",
        )  # fmt: skip
    return np.geomspace(least_m, reach, CLASSES + 1)


def _points(xy: npt.ArrayLike) -> Floats:
    points = np.asarray(xy, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise FoldError(f"coordinates of shape {points.shape}, or not finite", where="variogram",
                        allowed="(N, 2), metres")  # fmt: skip
    return points
