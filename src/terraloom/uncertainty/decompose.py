"""Split predictive uncertainty of an ensemble into what data and what the model leave open.

Classification: total entropy H(mean p) = aleatoric mean H(p) + epistemic mutual information
(BALD), in nats, with 0 log 0 = 0. Regression: the variance of a mixture of Gaussians.

References:
    Houlsby et al. (2011), Bayesian active learning by disagreement; Depeweg et al. (2018);
    Lakshminarayanan et al. (2017) for the regression mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terraloom.errors import ModelError

__all__ = [
    "ENTROPY_NODATA",
    "ENTROPY_STEPS",
    "EntropyParts",
    "RegressionParts",
    "decode_entropy",
    "decompose_entropy",
    "decompose_regression",
    "encode_entropy",
    "variation_ratio",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

#: Product encoding: uint8 0..200 stands for 0..ln K, so that one step is half a percent.
ENTROPY_STEPS = 200

#: Product value of a pixel without a prediction.
ENTROPY_NODATA = 255

#: Pixels decomposed at once: float64 working copies stay in cache and memory stays bounded.
_CHUNK_PX = 1 << 16

#: Largest departure of a probability sum from 1 (float16 softmax over 20 classes stays below).
_SUM_TOLERANCE = 5e-3


@dataclass(frozen=True, slots=True, eq=False)
class EntropyParts:
    """Entropy of class predictions and its parts; NaN where the prediction is invalid.

    Attributes:
        mean: (K, H, W) or (K, N) float32, mean of the member probabilities.
        total: (H, W) or (N,) float32 nats, 0..ln K, entropy of `mean`.
        aleatoric: Same shape, mean entropy of the members: classes that overlap in the data.
        epistemic: Same shape, total - aleatoric, 0..min(ln K, ln M): disagreement of members.
    """

    mean: F32
    total: F32
    aleatoric: F32
    epistemic: F32


@dataclass(frozen=True, slots=True, eq=False)
class RegressionParts:
    """Mean and standard deviation of an ensemble regression, in the unit of the target.

    Attributes:
        mean: Mixture mean, float32, shape of one member.
        sd: Mixture standard deviation; sd^2 = aleatoric_sd^2 + epistemic_sd^2.
        aleatoric_sd: Root mean of the member variances.
        epistemic_sd: Standard deviation of the member means (population form, over M).
    """

    mean: F32
    sd: F32
    aleatoric_sd: F32
    epistemic_sd: F32


def decompose_entropy(probs: NDArray[Any]) -> EntropyParts:
    """Total, aleatoric and epistemic entropy of member class probabilities.

    Args:
        probs: (M, K, H, W) or (M, K, N) class probabilities of M members. A pixel with a NaN in
            any member is invalid: all its results are NaN.

    Returns:
        Parts in nats. One member gives epistemic 0: no ensemble, no evidence of disagreement.

    Raises:
        ModelError: If the shape is wrong, or valid values are negative or do not sum to 1.

    Example:
        >>> p = np.array([[[0.9], [0.1]], [[0.5], [0.5]], [[0.2], [0.8]]])
        >>> round(float(decompose_entropy(p).epistemic[0]), 7)
        0.1847125
    """
    from scipy.special import entr

    flat, shape = _flatten(probs)
    _, k, n = flat.shape
    mean = np.empty((k, n), dtype=np.float32)
    parts = np.empty((3, n), dtype=np.float32)
    for start in range(0, n, _CHUNK_PX):
        here = slice(start, start + _CHUNK_PX)
        p = flat[:, :, here].astype(np.float64)
        _require_probabilities(p)
        average = p.mean(axis=0)
        total = entr(average).sum(axis=0)
        # Jensen: mean entropy cannot exceed the entropy of the mean; rounding can by 1e-16.
        aleatoric = np.minimum(entr(p).sum(axis=1).mean(axis=0), total)
        average[:, np.isnan(total)] = np.nan
        mean[:, here] = average
        parts[:, here] = total, aleatoric, total - aleatoric
    total32, aleatoric32, epistemic32 = parts.reshape(3, *shape)
    return EntropyParts(mean.reshape(k, *shape), total32, aleatoric32, epistemic32)


def variation_ratio(probs: NDArray[Any]) -> F32:
    """Share of members that do not vote for the most voted class, 0..1 - 1/M.

    Args:
        probs: (M, K, H, W) or (M, K, N) class probabilities; NaN marks invalid pixels.

    Returns:
        (H, W) or (N,) float32; NaN where invalid. A member's ties go to the first class.
    """
    flat, shape = _flatten(probs)
    m, k, n = flat.shape
    out = np.empty(n, dtype=np.float32)
    for start in range(0, n, _CHUNK_PX):
        here = slice(start, start + _CHUNK_PX)
        p = flat[:, :, here]
        invalid = np.isnan(p).any(axis=(0, 1))
        votes = np.where(invalid, 0, p).argmax(axis=1)
        most = np.stack([(votes == j).sum(axis=0) for j in range(k)]).max(axis=0)
        out[here] = np.where(invalid, np.nan, 1.0 - most / m)
    return out.reshape(shape)


def decompose_regression(mean: NDArray[Any], variance: NDArray[Any]) -> RegressionParts:
    """Mixture mean and standard deviation of M Gaussian predictions.

    Args:
        mean: (M, ...) member means in the target's unit; NaN marks invalid pixels.
        variance: (M, ...) member variances in the unit squared, non-negative; zeros for members
            that predict a mean only.

    Returns:
        Parts of shape (...), float32, NaN where any member is NaN.

    Raises:
        ModelError: If shapes differ or a variance is negative.
    """
    mu, var = np.asarray(mean), np.asarray(variance)
    if mu.shape != var.shape or mu.ndim < 1 or mu.shape[0] == 0:
        raise ModelError(
            f"means of shape {mu.shape}, variances of shape {var.shape}",
            where="regression ensemble",
            allowed="the same shape, members first",
        )
    if (var < 0).any():
        raise ModelError("negative variances", where="regression ensemble", allowed="0 or more")
    # Two-pass variance of the means: mean(mu^2) - mean(mu)^2 cancels for large heights.
    centre = mu.mean(axis=0, dtype=np.float64)
    aleatoric = var.mean(axis=0, dtype=np.float64) + 0.0 * centre
    epistemic = ((mu - centre) ** 2).mean(axis=0) + 0.0 * aleatoric
    return RegressionParts(
        mean=np.asarray(centre + 0.0 * aleatoric, dtype=np.float32),
        sd=np.sqrt(aleatoric + epistemic).astype(np.float32),
        aleatoric_sd=np.sqrt(aleatoric).astype(np.float32),
        epistemic_sd=np.sqrt(epistemic).astype(np.float32),
    )


def encode_entropy(
    entropy: NDArray[Any], n_classes: int, valid: NDArray[np.bool_] | None = None
) -> U8:
    """Entropy in nats as a product band: uint8 0..200 for 0..ln K, 255 nodata.

    Total, aleatoric and epistemic entropy share the scale ln K, so that total = aleatoric +
    epistemic still holds within rounding, and maps with different legends can be compared.

    Args:
        entropy: Entropy in nats; NaN becomes nodata.
        n_classes: K of the legend, at least 2.
        valid: Same shape; False becomes nodata.

    Raises:
        ModelError: If K < 2 or a value lies outside 0..ln K (in bits, or of another legend).
    """
    scale = _scale(n_classes)
    values = np.asarray(entropy)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    missing = np.isnan(values) if valid is None else np.isnan(values) | ~valid
    share = values / values.dtype.type(scale)
    share[missing] = 0
    # 1e-5: float32 rounding of ln K and of probabilities.
    if share.size and not -1e-5 <= share.min() <= share.max() <= 1 + 1e-5:
        raise ModelError(
            f"entropy {float(share.min() * scale):.4f} to {float(share.max() * scale):.4f}",
            where="entropy encoding",
            allowed=f"0 to ln {n_classes} = {scale:.4f} nats",
        )
    steps = np.rint(np.clip(share, 0.0, 1.0) * share.dtype.type(ENTROPY_STEPS))
    code: U8 = steps.astype(np.uint8)
    code[missing] = ENTROPY_NODATA
    return code


def decode_entropy(encoded: U8, n_classes: int) -> F32:
    """Entropy in nats of a product band, float32; nodata as NaN; error at most ln K / 400."""
    code = np.asarray(encoded)
    nats = code.astype(np.float64) * (_scale(n_classes) / ENTROPY_STEPS)
    return np.where(code == ENTROPY_NODATA, np.nan, nats).astype(np.float32)


def _flatten(probs: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    p = np.asarray(probs)
    if p.ndim not in (3, 4) or 0 in p.shape[:2]:
        raise ModelError(
            f"probabilities of shape {p.shape}",
            where="ensemble prediction",
            allowed="(M, K, N) or (M, K, H, W)",
        )
    shape = p.shape[2:]
    return p.reshape(p.shape[0], p.shape[1], prod(shape)), shape


def _require_probabilities(p: F64) -> None:
    """Refuse logits and percentages: they would give an entropy that looks plausible."""
    off = np.abs(p.sum(axis=1) - 1.0) > _SUM_TOLERANCE  # NaN compares False: invalid is allowed
    if off.any() or (p < 0).any():
        raise ModelError(
            f"{int(off.sum())} class vectors that do not sum to 1, smallest value "
            f"{float(np.nanmin(p)):.3g}",
            where="ensemble prediction",
            allowed="probabilities over classes; NaN where invalid",
            fix="apply softmax before decomposing",
        )


def _scale(n_classes: int) -> float:
    if n_classes < 2:
        raise ModelError(f"{n_classes} class(es)", where="entropy encoding", allowed="2 or more")
    return log(n_classes)
