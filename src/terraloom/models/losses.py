"""Losses with masks: a pixel without a label, or with weight 0, has no influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.models.heads import LOG_VAR_RANGE, TaskSpec

__all__ = [
    "IGNORE",
    "MultiTaskLoss",
    "SegmentationLoss",
    "boundary_loss",
    "class_weights",
    "gaussian_nll",
    "segmentation_loss",
]

#: Label of pixels without a class.
IGNORE = 255


def class_weights(counts: npt.ArrayLike, power: float = 0.5) -> npt.NDArray[np.float64]:
    """Weights proportional to frequency^-power, with mean 1 over the labelled pixels.

    Args:
        counts: (K,) labelled pixels per class; a class without pixels gets weight 0.
        power: 0 leaves frequencies as they are, .5 is the inverse square root, 1 balances fully.
    """
    n = np.asarray(counts, dtype=np.float64)
    if n.sum() <= 0:
        raise ModelError("no labelled pixel", fix="check labels and folds")
    seen = n > 0
    w = np.zeros_like(n)
    w[seen] = n[seen] ** -power
    weights: npt.NDArray[np.float64] = w * n.sum() / (w * n).sum()
    return weights


@dataclass(frozen=True)
class SegmentationLoss:
    """Settings of the segmentation loss.

    Attributes:
        smoothing: Label smoothing (0-1).
        gce_q: q of the generalised cross entropy (1 - p^q) / q for noisy labels (Zhang and
            Sabuncu 2018); 0 is the cross entropy, 1 the mean absolute error.
        dice: Weight of the soft Dice loss (ratio); 0 leaves it out.
    """

    smoothing: float = 0.0
    gce_q: float = 0.0
    dice: float = 0.0


def segmentation_loss(
    logits: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    settings: SegmentationLoss | None = None,
) -> Tensor:
    """Weighted mean over labelled pixels of the (generalised) cross entropy.

    Args:
        logits: (N, K, h, w).
        y: (N, h, w) integer classes, 255 = no label.
        weights: (K,) class weights.
        pixel_weights: (N, h, w) >= 0.
        settings: Smoothing, noise robustness and Dice part.

    Returns:
        Scalar; 0 without a labelled pixel.
    """
    s = settings or SegmentationLoss()
    ok = y != IGNORE
    target = y[ok].long()
    # Only labelled pixels are gathered: most of a window has no label.
    z = logits.permute(0, 2, 3, 1)[ok]
    w = torch.ones(len(target), dtype=z.dtype) if pixel_weights is None else pixel_weights[ok]
    if weights is not None:
        w = w * weights.to(z.dtype)[target]
    logp = z.log_softmax(1)
    true = logp.gather(1, target[:, None])[:, 0]
    loss = -true if s.gce_q <= 0 else (1 - torch.exp(s.gce_q * true)) / s.gce_q
    if s.smoothing > 0:
        loss = (1 - s.smoothing) * loss - s.smoothing * logp.mean(1)
    total = (loss * w).sum() / w.sum().clamp_min(1e-12)
    if s.dice > 0 and len(target):
        total = total + s.dice * _soft_dice(logp.exp(), target, w)
    return total


def _soft_dice(p: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """1 - mean over the classes present of 2 sum(p y) / (sum p + sum y)."""
    y = F.one_hot(target, p.shape[1]).to(p.dtype)
    w = w[:, None]
    both, total = (w * p * y).sum(0), (w * (p + y)).sum(0)
    present = (w * y).sum(0) > 0
    return 1 - (2 * both[present] / total[present].clamp_min(1e-12)).mean()


def _masked_mean(loss: Tensor, ok: Tensor, pixel_weights: Tensor | None) -> Tensor:
    if pixel_weights is None:
        return loss.sum() / max(int(ok.sum()), 1)
    w = pixel_weights[ok]
    return (loss * w).sum() / w.sum().clamp_min(1e-12)


def boundary_loss(
    logit: Tensor, y: Tensor, *, pixel_weights: Tensor | None = None, l1: float = 0.0
) -> Tensor:
    """Binary cross entropy against a soft target, plus ``l1`` times the absolute error.

    Args:
        logit: (N, 1, h, w).
        y: (N, h, w) in 0-1, NaN = no label.
        pixel_weights: (N, h, w) >= 0.
        l1: Weight of the absolute error of the probability (ratio).
    """
    ok = torch.isfinite(y)
    z, t = logit[:, 0][ok], y[ok]
    loss = F.binary_cross_entropy_with_logits(z, t, reduction="none")
    if l1 > 0:
        loss = loss + l1 * (z.sigmoid() - t).abs()
    return _masked_mean(loss, ok, pixel_weights)


def gaussian_nll(
    raw: Tensor, y: Tensor, *, pixel_weights: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """Negative log likelihood of a Gaussian, without the constant ln(2 pi)/2.

    With ``beta`` > 0 each pixel is weighted by its own predicted variance to that power, which is
    taken as given (Seitzer et al. 2022, beta-NLL). At 1 the mean learns as under squared error.
    Without it, pixels that are known almost exactly (no canopy outside the forest) get gradients
    thousands of times those of the rest and push the other tasks out of the shared encoder.

    Args:
        raw: (N, 2, h, w) mean and log variance, the latter clamped to ``LOG_VAR_RANGE``.
        y: (N, h, w) in the same scale, NaN = no label.
        pixel_weights: (N, h, w) >= 0.
        beta: 0 plain likelihood, 1 gradients of squared error.
    """
    ok = torch.isfinite(y)
    mean, log_var = raw[:, 0][ok], raw[:, 1][ok].clamp(*LOG_VAR_RANGE)
    loss = 0.5 * (log_var + (y[ok] - mean) ** 2 * torch.exp(-log_var))
    if beta > 0:
        loss = loss * torch.exp(beta * log_var.detach())
    return _masked_mean(loss, ok, pixel_weights)


#: See :func:`gaussian_nll`.
_BETA = 1.0


class MultiTaskLoss:
    """Weighted sum of the tasks' losses, each divided by its initial value.

    The first finite loss of a task is its unit, so that tasks start level whatever their scale
    (equal initial loss, a strong and simple baseline). A Gaussian log likelihood may be negative
    later; its unit is therefore the loss of the constant prediction (.5), not a running value.

    Args:
        tasks: The tasks, with their weights.
        weights: Class weights per segmentation task, (K,).
        settings: Settings of the segmentation loss.
    """

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        weights: Mapping[str, Tensor] | None = None,
        settings: SegmentationLoss | None = None,
    ) -> None:
        self._tasks = list(tasks)
        self._weights = dict(weights or {})
        self._settings = settings
        self.initial: dict[str, float] = {}

    def each(
        self,
        raw: Mapping[str, Tensor],
        y: Mapping[str, Tensor],
        pixel_weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Loss per task that has a labelled pixel in this batch, in its own unit."""
        out: dict[str, Tensor] = {}
        for task in self._tasks:
            t = y[task.name]
            labelled = t != IGNORE if task.kind == "segmentation" else torch.isfinite(t)
            if not bool(labelled.any()):
                continue
            w = (pixel_weights or {}).get(task.name)
            z = raw[task.name]
            if task.kind == "segmentation":
                out[task.name] = segmentation_loss(
                    z, t, weights=self._weights.get(task.name), pixel_weights=w,
                    settings=self._settings,
                )  # fmt: skip
            elif task.kind == "boundary":
                out[task.name] = boundary_loss(z, t, pixel_weights=w)
            else:
                out[task.name] = gaussian_nll(z, task.standardise(t), pixel_weights=w, beta=_BETA)
        return out

    def __call__(
        self,
        raw: Mapping[str, Tensor],
        y: Mapping[str, Tensor],
        pixel_weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Total loss (None when no task has a label) and the losses per task."""
        each = self.each(raw, y, pixel_weights)
        total: Tensor | None = None
        for task in self._tasks:
            if task.name not in each:
                continue
            loss = each[task.name]
            start = 0.5 if task.kind == "regression" else max(float(loss.detach()), 1e-3)
            unit = self.initial.setdefault(task.name, start)
            part = loss * (task.weight / unit)
            total = part if total is None else total + part
        return total, {k: float(v.detach()) for k, v in each.items()}
