"""Losses of all tasks: a pixel without a label, or with weight 0, has no influence.

Each task has one loss, named by ``TaskSpec.loss``; :class:`MultiTaskLoss` computes them. How they
are weighed against each other is told in :mod:`terraloom.models.balance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.legend import IGNORE_INDEX
from terraloom.models.class_losses import LossName, SegmentationLoss, segmentation_loss
from terraloom.models.heads import LOG_VAR_RANGE, QUANTILES, TaskSpec, quantiles_of

__all__ = [
    "IGNORE",
    "MultiTaskLoss",
    "SegmentationLoss",
    "boundary_loss",
    "class_weights",
    "gaussian_nll",
    "huber_loss",
    "loss_floor",
    "quantile_loss",
    "scene_loss",
    "segmentation_loss",
]

#: Label of pixels without a class.
IGNORE = IGNORE_INDEX


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


def _masked_mean(loss: Tensor, ok: Tensor, pixel_weights: Tensor | None) -> Tensor:
    if pixel_weights is None:
        return loss.sum() / max(int(ok.sum()), 1)
    w = pixel_weights[ok]
    return (loss * w).sum() / w.sum().clamp_min(1e-12)


def _valued(y: Tensor, pixel_weights: Tensor | None) -> Tensor:
    """Pixels with a value and a weight above 0."""
    ok = torch.isfinite(y)
    return ok if pixel_weights is None else ok & (pixel_weights > 0)


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
    ok = _valued(y, pixel_weights)
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
    ok = _valued(y, pixel_weights)
    mean, log_var = raw[:, 0][ok], raw[:, 1][ok].clamp(*LOG_VAR_RANGE)
    loss = 0.5 * (log_var + (y[ok] - mean) ** 2 * torch.exp(-log_var))
    if beta > 0:
        loss = loss * torch.exp(beta * log_var.detach())
    return _masked_mean(loss, ok, pixel_weights)


def huber_loss(
    raw: Tensor, y: Tensor, *, pixel_weights: Tensor | None = None, delta: float = 1.0
) -> Tensor:
    """Huber loss of the centre (Huber 1964), and the scale of what it leaves.

    The log variance learns from the absolute residual, which is taken as given: the Laplace
    likelihood of |r|, in units such that the variance is that of a Gaussian with this mean
    absolute residual, times the predicted sd, which is taken as given too (see
    :func:`gaussian_nll` for why). So outliers pull neither the centre nor the scale by more than
    their distance.

    Args:
        raw: (N, 2, h, w) centre and log variance, the latter clamped to ``LOG_VAR_RANGE``.
        y: (N, h, w) in the same scale, NaN = no label.
        pixel_weights: (N, h, w) >= 0.
        delta: Residual from which on the loss is linear (training sds).
    """
    ok = _valued(y, pixel_weights)
    centre, log_var = raw[:, 0][ok], raw[:, 1][ok].clamp(*LOG_VAR_RANGE)
    loss = F.huber_loss(centre, y[ok], reduction="none", delta=delta)
    size = (y[ok] - centre).detach().abs() * math.sqrt(math.pi / 2)
    scale = log_var / 2 + size * torch.exp(-log_var / 2)
    return _masked_mean(loss + scale * torch.exp(log_var.detach() / 2), ok, pixel_weights)


def quantile_loss(raw: Tensor, y: Tensor, *, pixel_weights: Tensor | None = None) -> Tensor:
    """Mean pinball loss (Koenker and Bassett 1978) of the three quantiles ``QUANTILES``.

    Args:
        raw: (N, 3, h, w) as :func:`terraloom.models.heads.quantiles_of` takes it.
        y: (N, h, w) in the same scale, NaN = no label.
        pixel_weights: (N, h, w) >= 0.
    """
    ok = _valued(y, pixel_weights)
    q = quantiles_of(raw).movedim(1, -1)[ok]
    over = y[ok][:, None] - q
    level = torch.tensor(QUANTILES, dtype=q.dtype, device=q.device)
    return _masked_mean(torch.maximum(level * over, (level - 1) * over).mean(1), ok, pixel_weights)


def scene_loss(
    z: Tensor, y: Tensor, *, weights: Tensor | None = None, pixel_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy of windows: the mean logits of their labelled pixels against their label.

    A window with several labels counts as each of them by its share of the labelled pixels.

    Args:
        z: (N, K, h, w) logits.
        y: (N, h, w) class of the window where its image is valid, 255 elsewhere.
        weights: (K,) weights of the classes.
        pixel_weights: (N, h, w) >= 0; 0 is as good as no label.
    """
    k = z.shape[1]
    w = (y != IGNORE).to(z.dtype)
    if pixel_weights is not None:
        w = w * pixel_weights
    total = w.sum((1, 2))
    some = total > 0
    share = w[some] / total[some, None, None]
    logits = (z[some] * share[:, None]).sum((2, 3))
    classes = F.one_hot(torch.where(y == IGNORE, 0, y)[some].long(), k).movedim(-1, 1)
    target = (classes * share[:, None]).sum((2, 3))
    if weights is not None:
        target = target * weights.to(z.device)
    return -(target * logits.log_softmax(1)).sum() / target.sum().clamp_min(1e-12)


#: See :func:`gaussian_nll`.
_BETA = 1.0
#: What these losses of a pixel never fall below, in the standardised scale: v ln(v) / 2 and
#: s ln(s), each least at 1/e. The others are never negative.
_FLOORS = {"gaussian": -0.5 / math.e, "huber": -1.0 / math.e}


def loss_floor(task: TaskSpec) -> float:
    """What the task's loss never falls below; 0 where it cannot be negative."""
    return _FLOORS.get(task.loss_name, 0.0)


class MultiTaskLoss:
    """The loss of each task, over the pixels of a batch that have a label of it.

    Args:
        tasks: The tasks, with the names of their losses.
        weights: Class weights per segmentation task, (K,).
        settings: Constants of the segmentation losses; a task's own name, smoothing, Dice weight
            and share to forget come before them.
        transitions: (K, K) per task with loss ``forward``; row = true class, column = label.

    Raises:
        ModelError: A task with loss ``forward`` has no matrix.
    """

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        weights: Mapping[str, Tensor] | None = None,
        settings: SegmentationLoss | None = None,
        *,
        transitions: Mapping[str, npt.ArrayLike] | None = None,
    ) -> None:
        self._tasks = list(tasks)
        self._weights = dict(weights or {})
        self._transitions = dict(transitions or {})
        self._settings = {
            t.name: _settings_of(t, settings or SegmentationLoss())
            for t in tasks if t.kind == "segmentation"
        }  # fmt: skip
        for name, s in self._settings.items():
            if s.name == "forward" and name not in self._transitions:
                raise ModelError(
                    "no transition matrix", where=f"task {name}, loss forward",
                    allowed="(K, K), row = true class, column = label",
                    fix="set labels.clean, which estimates it, or choose another loss",
                )  # fmt: skip

    def each(
        self,
        raw: Mapping[str, Tensor],
        y: Mapping[str, Tensor],
        pixel_weights: Mapping[str, Tensor] | None = None,
        soft: Mapping[str, Tensor] | None = None,
        *,
        done: float = 1.0,
        judge: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Loss per task that has a labelled pixel in this batch, in its own unit.

        Args:
            raw: Raw outputs per task, (N, c, h, w).
            y: Labels per task, (N, h, w): classes, 255 = none, or values, NaN = none.
            pixel_weights: (N, h, w) >= 0 per task that has them; 0 is as good as no label.
            soft: Shares of the classes per task that has them, (N, K, h, w), of any sum.
            done: Share of the training that is over (0-1), for small-loss selection.
            judge: Raw outputs whose losses choose the pixels; None: ``raw``.
        """
        out: dict[str, Tensor] = {}
        for task in self._tasks:
            t, w = y[task.name], (pixel_weights or {}).get(task.name)
            labelled = t != IGNORE if task.classed else torch.isfinite(t)
            if not bool((labelled if w is None else labelled & (w > 0)).any()):
                continue
            out[task.name] = self._loss(
                task, raw[task.name], t, w, (soft or {}).get(task.name), done,
                None if judge is None else judge[task.name],
            )  # fmt: skip
        return out

    def _loss(
        self, task: TaskSpec, z: Tensor, y: Tensor, w: Tensor | None, soft: Tensor | None,
        done: float, judge: Tensor | None,
    ) -> Tensor:  # fmt: skip
        name = task.loss_name
        if task.kind == "segmentation":
            s = self._settings[task.name]
            matrix = self._transitions.get(task.name) if s.name == "forward" else None
            return segmentation_loss(
                z, y, settings=s, weights=self._weights.get(task.name), pixel_weights=w,
                soft=soft, transition=matrix, keep=s.keep(done), judge=judge,
            )  # fmt: skip
        if task.kind == "scene":
            return scene_loss(z, y, weights=self._weights.get(task.name), pixel_weights=w)
        if task.kind == "boundary":
            return boundary_loss(z, y, pixel_weights=w)
        if name == "gaussian":
            return gaussian_nll(z, task.standardise(y), pixel_weights=w, beta=_BETA)
        kinds: dict[str, Callable[..., Tensor]] = {"huber": huber_loss, "quantile": quantile_loss}
        return kinds[name](z, task.standardise(y), pixel_weights=w)


def _settings_of(task: TaskSpec, base: SegmentationLoss) -> SegmentationLoss:
    """Settings of a task's segmentation loss: its own, else those of all tasks."""
    return replace(
        base,
        name=base.name if task.loss == "auto" else cast(LossName, task.loss),
        smoothing=task.smoothing or base.smoothing,
        dice=task.dice or base.dice,
        forget=task.forget or base.forget,
    )
