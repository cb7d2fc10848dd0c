"""Area of applicability: where the networks see what they have seen in training.

Meyer and Pebesma (2021) on deep features. Each held-out fold has one network and, as its
reference, training pixels that this network has seen. The dissimilarity index (DI) of a pixel is
the distance of its features to the nearest reference, relative to the mean distance between
references. The DI of training pixels, from which the threshold follows, is that of the pixels of
the held-out fold: none is compared with its own fold, and none was seen by the network that
describes it. On the map the DI is the mean over the networks.

Distances are those of a matrix product in blocks: at 12 to 16 dimensions and a few hundred points
that is 30 times faster than a k-d tree, which then visits nearly all points anyway.

References:
    Meyer and Pebesma (2021), Predicting into unknown space? Estimating the area of applicability
    of spatial prediction models. Schumacher et al. (2025) for the local point density (LPD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import ModelError

__all__ = [
    "CELL_PX", "MOST_DIMS", "Applicability", "Space", "Verdict", "cell_means", "dissimilarity",
    "fit_space", "threshold_of",
]  # fmt: skip

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Pixels along the side of a cell that has one DI (count).
CELL_PX = 2
#: Dimensions that are kept of wide features (count).
MOST_DIMS = 16
#: Pixels compared at once: with some hundred points the block, about a megabyte, stays in cache.
_ROWS = 1024


@dataclass(frozen=True)
class Space:
    """Feature space of one network; distances in it are dissimilarities.

    Attributes:
        centre: (D,) mean of the reference features.
        turn: (D, E) from centred features to E <= D dimensions: standardised, weighted, turned,
            divided by the mean distance.
        points: (n, E) reference points.
    """

    centre: F32
    turn: F32
    points: F32

    def check(self, features: npt.NDArray[Any]) -> None:
        """Refuse features that are not (N, D)."""
        if features.ndim != 2 or features.shape[1] != len(self.centre):
            raise ModelError(f"features of shape {features.shape}", where="applicability",
                             allowed=f"(N, {len(self.centre)})",
                             fix="run target `model` again")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Where a model can be trusted; arrays of one shape.

    Attributes:
        dissimilarity: Mean DI over the networks, 0 = as in training.
        density: Mean number of reference points nearer than the threshold (count).
        inside: DI not above the threshold.
    """

    dissimilarity: F32
    density: F32
    inside: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Applicability:
    """Feature spaces of some networks and the threshold of their mean DI.

    Attributes:
        spaces: One per network, in the order in which features are given.
        threshold: Largest DI that is inside.
    """

    spaces: tuple[Space, ...]
    threshold: float

    def judge(self, features: Sequence[npt.NDArray[Any]]) -> Verdict:
        """Judge pixels.

        Args:
            features: Per network (N, D); NaN gives NaN and outside.

        Returns:
            Arrays (N,).
        """
        if len(features) != len(self.spaces):
            raise ModelError(f"features of {len(features)} networks", where="applicability",
                             allowed=str(len(self.spaces)))  # fmt: skip
        each = [dissimilarity(f, s, self.threshold)
                for f, s in zip(features, self.spaces, strict=True)]  # fmt: skip
        di = np.asarray(sum(d for d, _ in each) / len(each), dtype=np.float32)
        density = np.asarray(sum(n for _, n in each) / len(each), dtype=np.float32)
        return Verdict(di, density, di <= self.threshold)


def fit_space(
    features: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    *,
    most_dims: int = MOST_DIMS,
) -> Space:
    """The feature space of reference pixels.

    Args:
        features: (n, D) features of the reference pixels, finite, n > 1.
        weight: (D,) importance of each standardised feature, >= 0; None: all alike.
        most_dims: Of more features the leading principal components of the weighted ones.

    Raises:
        ModelError: Too few or equal points, or weights that do not fit.
    """
    f = np.asarray(features, dtype=np.float64)
    if f.ndim != 2 or len(f) < 2 or not np.isfinite(f).all():
        raise ModelError(f"reference features of shape {f.shape}", where="applicability",
                         allowed="(n, D), finite, n > 1", fix="use more labels")  # fmt: skip
    w = np.ones(f.shape[1]) if weight is None else np.asarray(weight, dtype=np.float64)
    if w.shape != f.shape[1:] or not np.isfinite(w).all() or (w < 0).any():
        raise ModelError(f"weights {w.shape}", where="applicability",
                         allowed=f"({f.shape[1]},), 0 or more")  # fmt: skip
    centre, sd = f.mean(axis=0), f.std(axis=0, ddof=1)
    # A feature that never changes has no scale to measure a change with.
    turn = np.diag(np.where(sd > 0, w / np.where(sd > 0, sd, 1), 0))
    if f.shape[1] > most_dims:
        _, _, axes = np.linalg.svd((f - centre) @ turn, full_matrices=False)
        turn = turn @ axes[:most_dims].T
    points = (f - centre) @ turn
    mean = _mean_distance(points)
    if mean <= 0:
        raise ModelError("reference features that are all equal", where="applicability",
                         fix="train longer, or set uncertainty.applicability: no")  # fmt: skip
    turn /= mean
    return Space(
        centre.astype(np.float32), turn.astype(np.float32), (points / mean).astype(np.float32)
    )


def _mean_distance(points: F64) -> float:
    """Mean distance of each point to all others, averaged over points."""
    total = 0.0
    for start in range(0, len(points), _ROWS):
        part = points[start : start + _ROWS]
        square = ((part[:, None] - points[None]) ** 2).sum(axis=2)
        total += float(np.sqrt(square).sum())
    return total / (len(points) * (len(points) - 1))


def dissimilarity(
    features: npt.NDArray[Any], space: Space, threshold: float = 0.0
) -> tuple[F32, F32]:
    """DI of pixels, and how many reference points are nearer than the threshold.

    Args:
        features: (N, D); NaN gives NaN.
        space: Of the network that the features come from.
        threshold: In units of DI.

    Returns:
        (N,) DI and (N,) counts, as floats.
    """
    space.check(features)
    # Points in rows, pixels in columns: the maximum and the count then go along the columns.
    f, n = features.T, len(features)
    turn, centre = np.ascontiguousarray(space.turn.T), space.centre[:, None]
    # p.z - p.p/2 is largest where the distance is smallest, and one matrix product.
    points = space.points
    table = np.concatenate([points, -(points**2).sum(axis=1, keepdims=True) / 2], axis=1)
    z = np.ones((table.shape[1], _ROWS), np.float32)
    near = np.empty((len(table), _ROWS), np.float32)
    inside = np.empty((len(table), _ROWS), np.bool_)
    di, count = np.empty(n, np.float32), np.empty(n, np.float32)
    for start in range(0, n, _ROWS):
        at = slice(start, min(start + _ROWS, n))
        here = slice(0, at.stop - at.start)
        x, reach, close = z[:, here], near[:, here], inside[:, here]
        np.matmul(turn, f[:, at] - centre, out=x[:-1])
        half = np.einsum("ij,ij->j", x[:-1], x[:-1]) / 2
        np.matmul(table, x, out=reach)
        np.greater(reach, half - np.float32(threshold**2 / 2), out=close)
        di[at] = np.sqrt(np.maximum(2 * (half - reach.max(axis=0)), 0))
        count[at] = _counts(close)
    return di, count


def _counts(inside: npt.NDArray[np.bool_]) -> F32:
    """How many of each column (n, N) are true: in bytes, of which 255 rows fill one."""
    bytes_of = inside.view(np.uint8)
    total = np.zeros(inside.shape[1], np.float32)
    for start in range(0, len(bytes_of), 255):
        total += bytes_of[start : start + 255].sum(axis=0, dtype=np.uint8)
    return total


def threshold_of(training: npt.NDArray[Any]) -> float:
    """min(Q75 + 1.5 IQR, max) of the training DI, each against points of other folds only."""
    di = np.asarray(training, dtype=np.float64)
    if not di.size or not np.isfinite(di).all():
        raise ModelError(f"{di.size} dissimilarities of training pixels", where="applicability",
                         allowed="1 or more, finite")  # fmt: skip
    low, high = np.percentile(di, (25, 75))
    return float(min(high + 1.5 * (high - low), di.max()))


def cell_means(features: npt.NDArray[Any]) -> F32:
    """Mean features of the cells of a window, (H / 2 * W / 2, D).

    Args:
        features: (D, H, W) with H and W whole numbers of :data:`CELL_PX`.
    """
    d, h, w = features.shape
    cells = features.reshape(d, h // CELL_PX, CELL_PX, w // CELL_PX, CELL_PX).mean(axis=(2, 4))
    return np.ascontiguousarray(cells.reshape(d, -1).T, dtype=np.float32)
