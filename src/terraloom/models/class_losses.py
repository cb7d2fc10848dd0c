"""Losses of class labels, all behind one call.

:func:`segmentation_loss` takes the name of the loss from :class:`SegmentationLoss`. Every loss is
a value per labelled pixel; class and pixel weights, label smoothing, small-loss selection and the
Dice part go with any of them. A label is one class, or the shares of all classes in a pixel; where
the shares are 0 and 1 both are the same.

References:
    Zhang, Sabuncu (2018), Generalized Cross Entropy Loss (``gce``).
    Wang et al. (2019), Symmetric Cross Entropy for Robust Learning with Noisy Labels (``sce``).
    Patrini et al. (2017), Making Deep Neural Networks Robust to Label Noise (``forward``).
    Reed et al. (2015), Training Deep Neural Networks on Noisy Labels with Bootstrapping.
    Lin et al. (2017), Focal Loss for Dense Object Detection (``focal``).
    Hou, Yu, Samaras (2016), Squared Earth Mover's Distance-based Loss (``ordinal``): the ranked
    probability score of Epstein (1969), which is least for the true distribution.
    Wang et al. (2023), Dice Semimetric Losses (Dice of shares).
    Han et al. (2018), Co-teaching (small-loss selection and its schedule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.labels.corrupt import checked_transition
from terraloom.legend import IGNORE_INDEX

__all__ = [
    "LossName",
    "SegmentationLoss",
    "keep_rate",
    "labelled_pixels",
    "pixel_loss",
    "segmentation_loss",
    "select_small",
]

LossName = Literal[
    "ce", "gce", "sce", "forward", "soft_bootstrap", "hard_bootstrap", "focal", "ordinal"
]

#: Labels that a transition matrix calls impossible get this probability: a finite loss.
_LEAST = 1e-12


@dataclass(frozen=True)
class SegmentationLoss:
    """Which loss, and its constants; the defaults are those of the papers.

    Attributes:
        name: ``ce`` cross entropy; ``gce`` generalised cross entropy (1 - p^q) / q; ``sce``
            alpha CE + beta reverse CE; ``forward`` cross entropy of T' p, which needs the
            transition matrix; ``soft_bootstrap`` and ``hard_bootstrap`` mix the label with the
            prediction, or with its most probable class; ``focal`` -(1 - p)^gamma log p;
            ``ordinal``, for classes in their order, the mean over the K - 1 limits between them
            of the squared difference of the cumulative probabilities.
        smoothing: Label smoothing (0-1).
        dice: Weight of the soft Dice loss beside it (ratio); 0 leaves it out.
        q: Of ``gce``, 0-1: 0 is the cross entropy, 1 the mean absolute error 1 - p.
        alpha: Weight of the cross entropy in ``sce`` (ratio).
        beta: Weight of the reverse cross entropy in ``sce`` (ratio).
        log_zero: What stands for log 0 in the reverse cross entropy; negative.
        trust: Share of the label in the bootstrapped target, 0-1; None: .95 soft, .8 hard.
        gamma: Of ``focal``, >= 0: 0 is the cross entropy.
        forget: Share of labelled pixels that small-loss selection leaves out in the end (the
            noise rate), 0-1; 0 selects nothing.
        forget_by: Share of training after which that end is reached, 0-1.
        per_class: Select within each label class. Over all classes together, those that are rare
            or hard would be left out first.
    """

    name: LossName = "ce"
    smoothing: float = 0.0
    dice: float = 0.0
    q: float = 0.7
    alpha: float = 0.1
    beta: float = 1.0
    log_zero: float = -4.0
    trust: float | None = None
    gamma: float = 2.0
    forget: float = 0.0
    forget_by: float = 0.2
    per_class: bool = True

    def __post_init__(self) -> None:
        ranges = {
            "smoothing": 0 <= self.smoothing < 1,
            "dice": 0 <= self.dice < math.inf,
            "q": 0 <= self.q <= 1,
            "alpha": self.alpha >= 0,
            "beta": self.beta >= 0,
            "log_zero": -math.inf < self.log_zero < 0,
            "trust": self.trust is None or 0 <= self.trust <= 1,
            "gamma": 0 <= self.gamma < math.inf,
            "forget": 0 <= self.forget < 1,
            "forget_by": 0 <= self.forget_by <= 1,
        }
        wrong = next((k for k, ok in ranges.items() if not ok), None)
        if self.name not in get_args(LossName):
            raise ModelError(f"loss {self.name!r}", where="loss",
                             allowed=", ".join(get_args(LossName)))  # fmt: skip
        if wrong is not None:
            raise ModelError(
                f"{wrong} = {getattr(self, wrong)}", where=f"loss {self.name}",
                allowed="q, trust, forget_by 0-1; smoothing, forget 0 to below 1; alpha, beta, "
                "gamma, dice >= 0; log_zero < 0",
            )  # fmt: skip

    def keep(self, step: float, steps: float = 1.0) -> float:
        """Share of labelled pixels to learn from at ``step`` (from 0) of ``steps``."""
        return keep_rate(step, self.forget, self.forget_by * steps)


def keep_rate(step: float, forget: float, ramp_steps: float, power: float = 1.0) -> float:
    """Co-teaching's share of samples kept: 1 - forget min((step / ramp_steps)^power, 1).

    Networks learn what is regular before they learn errors by heart, so that nothing is left out
    at first.

    Args:
        step: Step or epoch, from 0.
        forget: Share left out in the end, 0-1.
        ramp_steps: Step from which on it is; 0: from the start.
        power: Shape of the way there.
    """
    done = 1.0 if ramp_steps <= 0 else min((step / ramp_steps) ** power, 1.0)
    return 1.0 - forget * done


def labelled_pixels(
    logits: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, classes and weights of the pixels with a label and a weight above 0.

    Only these are gathered: most of a window has no label, and what stands elsewhere, NaN
    included, has no influence.

    Args:
        logits: (N, K, H, W) or (N, K).
        y: (N, H, W) or (N,) integer classes, 255 = no label.
        weights: (K,) class weights.
        pixel_weights: Shape of ``y``, >= 0.

    Returns:
        Logits (S, K) of at least 32 bits, int64 classes (S,) and weights (S,).

    Raises:
        ModelError: Shapes do not fit, or a class is none of the K.
    """
    shape = (logits.shape[0], *logits.shape[2:])
    if y.shape != shape or (pixel_weights is not None and pixel_weights.shape != shape):
        got = "" if pixel_weights is None else f", weights {tuple(pixel_weights.shape)}"
        raise ModelError(f"labels {tuple(y.shape)}{got} for logits {tuple(logits.shape)}",
                         where="loss", allowed=f"labels of {shape}")  # fmt: skip
    ok = _labelled(y, pixel_weights)
    z, target = logits.movedim(1, -1)[ok], y[ok].long()
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < z.shape[1]:
        raise ModelError(
            f"classes {int(target.min())}-{int(target.max())}", where="loss",
            allowed=f"0-{z.shape[1] - 1}, or {IGNORE_INDEX} for no label",
        )  # fmt: skip
    w = z.new_ones(len(target)) if pixel_weights is None else pixel_weights[ok].to(z.dtype)
    return z, target, w if weights is None else w * weights.to(z)[target]


def _labelled(y: Tensor, pixel_weights: Tensor | None) -> Tensor:
    ok = y != IGNORE_INDEX
    return ok if pixel_weights is None else ok & (pixel_weights > 0)


def _shares(soft: Tensor, y: Tensor, pixel_weights: Tensor | None, like: Tensor) -> Tensor:
    """Shares (S, K) of the labelled pixels, summing to 1; without shares the class counts."""
    if soft.shape != (y.shape[0], like.shape[1], *y.shape[1:]):
        raise ModelError(f"shares {tuple(soft.shape)} for labels {tuple(y.shape)}", where="loss",
                         allowed=f"(N, {like.shape[1]}, ...)")  # fmt: skip
    ok = _labelled(y, pixel_weights)
    t = soft.movedim(1, -1)[ok].to(like)
    total = t.sum(1, keepdim=True)
    one = F.one_hot(y[ok].long(), like.shape[1]).to(like)
    return torch.where(total > 0, t / total.clamp_min(_LEAST), one)


def pixel_loss(
    logp: Tensor,
    target: Tensor,
    settings: SegmentationLoss | None = None,
    transition: npt.ArrayLike | None = None,
) -> Tensor:
    """The loss of each pixel, (S,), without smoothing and Dice.

    Args:
        logp: (S, K) log probabilities.
        target: (S,) int64 classes, or (S, K) shares that sum to 1; the loss of shares is the
            expected loss of a class drawn from them, of ``ordinal`` that of the distribution.
        settings: Which loss.
        transition: (K, K) probability of a label (column) given the true class (row); only for
            ``forward``.

    Raises:
        ModelError: ``forward`` without a matrix, or a matrix without ``forward``.
        LabelError: The matrix is none; see :func:`terraloom.labels.corrupt.checked_transition`.
    """
    s = settings or SegmentationLoss()
    if (s.name == "forward") != (transition is not None):
        raise ModelError(
            "no transition matrix" if transition is None else "a transition matrix",
            where=f"loss {s.name}", allowed="a transition matrix with `forward`, and only with it",
            fix="estimate it with terraloom.labels.clean.review_labels",
        )  # fmt: skip
    if s.name == "ordinal":
        return _ranked(logp, target)
    own = _own(logp, s)
    if transition is not None:
        logp = _seen(logp, transition)
    if target.ndim == 1:
        return _of_label(logp.gather(1, target[:, None])[:, 0], own, s)
    return (target * _of_label(logp, own[:, None], s)).sum(1)


def _of_label(log_true: Tensor, own: Tensor, s: SegmentationLoss) -> Tensor:
    """Loss of labels whose log probabilities are ``log_true``, any shape."""
    if s.name == "gce" and s.q > 0:
        # expm1: (1 - p^q) / q loses all digits in the limit q -> 0.
        return -torch.expm1(s.q * log_true) / s.q
    if s.name == "sce":
        # Reverse CE: -sum_k p_k log t_k with log 0 = log_zero, so only the wrong classes count.
        return -s.alpha * log_true - s.beta * s.log_zero * -torch.expm1(log_true)
    if s.name == "focal" and s.gamma > 0:
        # Where p is 1, the slope of (1 - p)^gamma has no end for gamma < 1.
        return -((-torch.expm1(log_true)).clamp_min(1e-7) ** s.gamma) * log_true
    if s.name in ("soft_bootstrap", "hard_bootstrap"):
        trust = s.trust if s.trust is not None else 0.8 if s.name == "hard_bootstrap" else 0.95
        return -trust * log_true - (1 - trust) * own
    return -log_true


def _own(logp: Tensor, s: SegmentationLoss) -> Tensor:
    """What a bootstrapped target says of the network's own prediction, (S,)."""
    if s.name == "hard_bootstrap":
        return logp.amax(1)
    return (logp.exp() * logp).sum(1) if s.name == "soft_bootstrap" else logp[:, 0]


def _seen(logp: Tensor, transition: npt.ArrayLike) -> Tensor:
    """Log of T' p, (S, K): what the labels should look like."""
    t = torch.from_numpy(checked_transition(transition, logp.shape[1])).to(logp)
    top = logp.detach().amax(1, keepdim=True)
    return ((logp - top).exp() @ t.clamp_min(_LEAST)).log() + top


def _ranked(logp: Tensor, target: Tensor) -> Tensor:
    """Ranked probability score, 0-1: a class d steps away costs d / (K - 1) when sure."""
    k = logp.shape[1]
    t = F.one_hot(target, k).to(logp) if target.ndim == 1 else target
    # As a product: a running sum has no repeatable form on GPUs.
    below = logp.new_ones((k, k - 1)).triu()
    return (((logp.exp() - t) @ below) ** 2).sum(1) / (k - 1)


def select_small(loss: Tensor, keep: float, target: Tensor | None = None) -> Tensor:
    """The pixels with the smallest losses, (S,) flags; at least one (of each class).

    Args:
        loss: (S,) loss per pixel.
        keep: Share to keep, 0-1, rounded up to whole pixels.
        target: (S,) classes; with them the share is taken within each class.
    """
    chosen = torch.ones_like(loss, dtype=torch.bool)
    if keep >= 1 or not len(loss):
        return chosen
    order = torch.argsort(loss.detach(), stable=True)
    groups = torch.zeros_like(order) if target is None else target[order]
    for k in torch.unique(groups):
        mine = order[groups == k]
        # 1e-9: .2 x 5 must not become 2.
        chosen[mine[max(1, math.ceil(keep * len(mine) - 1e-9)) :]] = False
    return chosen


def segmentation_loss(
    logits: Tensor,
    y: Tensor,
    *,
    settings: SegmentationLoss | None = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    soft: Tensor | None = None,
    transition: npt.ArrayLike | None = None,
    keep: float = 1.0,
    judge: Tensor | None = None,
) -> Tensor:
    """Weighted mean over the labelled pixels of the loss that ``settings`` name.

    Args:
        logits: (N, K, H, W) or (N, K).
        y: (N, H, W) or (N,) integer classes, 255 = no label.
        settings: Which loss; default: cross entropy.
        weights: (K,) class weights; a pixel with shares has their weighted mean.
        pixel_weights: Shape of ``y``, >= 0; 0 is as good as no label.
        soft: (N, K, H, W) or (N, K) shares >= 0 of the classes, of any sum. Where all are 0 the
            class counts; where ``y`` has no label they have no influence.
        transition: (K, K) for ``forward``; row = true class, column = label.
        keep: Share of labelled pixels to learn from, the ones with the smallest loss (before
            weights and smoothing); see :meth:`SegmentationLoss.keep`.
        judge: Logits in the shape of ``logits`` whose loss says which these are, such as those of
            another network; None: ``logits``.

    Returns:
        Scalar; 0 without a labelled pixel.

    Raises:
        ModelError: Shapes, classes, settings or matrix do not fit together.
    """
    s = settings or SegmentationLoss()
    z, label, w = labelled_pixels(
        logits, y, weights=None if soft is not None else weights, pixel_weights=pixel_weights
    )
    target = label
    if soft is not None:
        target = _shares(soft, y, pixel_weights, z)
        w = w if weights is None else w * (target @ weights.to(z))
    logp = F.log_softmax(z, 1)
    loss = pixel_loss(logp, target, s, transition)
    if keep < 1:
        judged = loss.detach()
        if judge is not None:
            z = labelled_pixels(judge.detach(), y, pixel_weights=pixel_weights)[0]
            judged = pixel_loss(F.log_softmax(z, 1), target, s, transition)
        w = w * select_small(judged, keep, label if s.per_class else None)
    if s.smoothing > 0:
        loss = (1 - s.smoothing) * loss - s.smoothing * logp.mean(1)
    total = (loss * w).sum() / w.sum().clamp_min(_LEAST)
    if s.dice > 0 and len(target):
        total = total + s.dice * _soft_dice(logp.exp(), target, w)
    return total


def _soft_dice(p: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """1 - mean over the classes present of 2 sum min(p, t) / (sum p + sum t).

    For labels of one class min(p, t) is p t, the usual Dice; for shares, p t would be least for
    predictions that exaggerate them.
    """
    t = F.one_hot(target, p.shape[1]).to(p.dtype) if target.ndim == 1 else target
    w = w[:, None]
    both, total = (w * torch.minimum(p, t)).sum(0), (w * (p + t)).sum(0)
    present = (w * t).sum(0) > 0
    if not bool(present.any()):
        return p.sum() * 0.0
    return 1 - (2 * both[present] / total[present].clamp_min(_LEAST)).mean()
