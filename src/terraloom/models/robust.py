"""Classification losses that wrong labels mislead less, all behind one call.

:func:`robust_loss` takes the name of the loss from :class:`RobustLoss`. Every loss is a value per
labelled pixel; small-loss selection is a choice of pixels and goes with any of them.

References:
    Zhang, Sabuncu (2018), Generalized Cross Entropy Loss (``gce``).
    Wang et al. (2019), Symmetric Cross Entropy for Robust Learning with Noisy Labels (``sce``).
    Patrini et al. (2017), Making Deep Neural Networks Robust to Label Noise (``forward``).
    Reed et al. (2015), Training Deep Neural Networks on Noisy Labels with Bootstrapping.
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
    "RobustLoss",
    "co_teaching_loss",
    "keep_rate",
    "labelled_pixels",
    "pixel_loss",
    "robust_loss",
    "select_small",
]

LossName = Literal["ce", "gce", "sce", "forward", "soft_bootstrap", "hard_bootstrap"]

#: Labels that a transition matrix calls impossible get this probability: a finite loss.
_LEAST = 1e-12


@dataclass(frozen=True)
class RobustLoss:
    """Which loss, and its constants; the defaults are those of the papers.

    Attributes:
        name: ``ce`` cross entropy; ``gce`` generalised cross entropy (1 - p^q) / q; ``sce``
            alpha CE + beta reverse CE; ``forward`` cross entropy of T' p, which needs the
            transition matrix; ``soft_bootstrap`` and ``hard_bootstrap`` mix the label with the
            prediction, or with its most probable class.
        q: Of ``gce``, 0-1: 0 is the cross entropy, 1 the mean absolute error 1 - p.
        alpha: Weight of the cross entropy in ``sce`` (ratio).
        beta: Weight of the reverse cross entropy in ``sce`` (ratio).
        log_zero: What stands for log 0 in the reverse cross entropy; negative.
        trust: Share of the label in the bootstrapped target, 0-1; None: .95 soft, .8 hard.
        forget: Share of labelled pixels that small-loss selection leaves out in the end (the
            noise rate), 0-1; 0 selects nothing.
        forget_by: Share of training after which that end is reached, 0-1.
        per_class: Select within each label class. Over all classes together, those that are rare
            or hard would be left out first.
    """

    name: LossName = "ce"
    q: float = 0.7
    alpha: float = 0.1
    beta: float = 1.0
    log_zero: float = -4.0
    trust: float | None = None
    forget: float = 0.0
    forget_by: float = 0.2
    per_class: bool = True

    def __post_init__(self) -> None:
        ranges = {
            "q": 0 <= self.q <= 1,
            "alpha": self.alpha >= 0,
            "beta": self.beta >= 0,
            "log_zero": -math.inf < self.log_zero < 0,
            "trust": self.trust is None or 0 <= self.trust <= 1,
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
                allowed="q, trust, forget_by 0-1; forget 0 to below 1; alpha, beta >= 0; "
                "log_zero < 0",
            )  # fmt: skip

    def keep(self, step: int, steps: int) -> float:
        """Share of labelled pixels to learn from at ``step`` (from 0) of ``steps``."""
        return keep_rate(step, self.forget, self.forget_by * steps)


def keep_rate(step: int, forget: float, ramp_steps: float, power: float = 1.0) -> float:
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
    ok = y != IGNORE_INDEX
    if pixel_weights is not None:
        ok = ok & (pixel_weights > 0)
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


def pixel_loss(
    logp: Tensor,
    target: Tensor,
    settings: RobustLoss | None = None,
    transition: npt.ArrayLike | None = None,
) -> Tensor:
    """The loss of each pixel, (S,).

    Args:
        logp: (S, K) log probabilities.
        target: (S,) int64 classes.
        settings: Which loss.
        transition: (K, K) probability of a label (column) given the true class (row); only for
            ``forward``.

    Raises:
        ModelError: ``forward`` without a matrix, or a matrix without ``forward``.
        LabelError: The matrix is none; see :func:`terraloom.labels.corrupt.checked_transition`.
    """
    s = settings or RobustLoss()
    if (s.name == "forward") != (transition is not None):
        raise ModelError(
            "no transition matrix" if transition is None else "a transition matrix",
            where=f"loss {s.name}", allowed="a transition matrix with `forward`, and only with it",
            fix="estimate it with terraloom.labels.clean.review_labels",
        )  # fmt: skip
    if transition is not None:
        return _forward(logp, target, transition)
    log_true = logp.gather(1, target[:, None])[:, 0]
    if s.name == "gce" and s.q > 0:
        # expm1: (1 - p^q) / q loses all digits in the limit q -> 0.
        return -torch.expm1(s.q * log_true) / s.q
    if s.name == "sce":
        # Reverse CE: -sum_k p_k log t_k with log 0 = log_zero, so only the wrong classes count.
        return -s.alpha * log_true - s.beta * s.log_zero * -torch.expm1(log_true)
    if s.name in ("soft_bootstrap", "hard_bootstrap"):
        return _bootstrap(logp, log_true, s)
    return -log_true


def _forward(logp: Tensor, target: Tensor, transition: npt.ArrayLike) -> Tensor:
    """-log of (T' p) at the label: what the labels should look like is compared with them."""
    t = torch.from_numpy(checked_transition(transition, logp.shape[1])).to(logp)
    return -torch.logsumexp(logp + t.clamp_min(_LEAST).log().T[target], 1)


def _bootstrap(logp: Tensor, log_true: Tensor, s: RobustLoss) -> Tensor:
    hard = s.name == "hard_bootstrap"
    trust = s.trust if s.trust is not None else 0.8 if hard else 0.95
    own = logp.amax(1) if hard else (logp.exp() * logp).sum(1)
    return -trust * log_true - (1 - trust) * own


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


def robust_loss(
    logits: Tensor,
    y: Tensor,
    *,
    settings: RobustLoss | None = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    transition: npt.ArrayLike | None = None,
    keep: float = 1.0,
    chosen_by: Tensor | None = None,
) -> Tensor:
    """Weighted mean over the labelled pixels of the loss that ``settings`` name.

    Args:
        logits: (N, K, H, W) or (N, K).
        y: (N, H, W) or (N,) integer classes, 255 = no label.
        settings: Which loss; default: cross entropy.
        weights: (K,) class weights.
        pixel_weights: Shape of ``y``, >= 0; 0 is as good as no label.
        transition: (K, K) for ``forward``; row = true class, column = label.
        keep: Share of labelled pixels to learn from, the ones with the smallest loss (before
            weights); see :meth:`RobustLoss.keep`.
        chosen_by: Logits of another network, whose losses choose the pixels (co-teaching).

    Returns:
        Scalar; 0 without a labelled pixel.

    Raises:
        ModelError: Shapes, classes, settings or matrix do not fit together.
    """
    s = settings or RobustLoss()
    z, target, w = labelled_pixels(logits, y, weights=weights, pixel_weights=pixel_weights)
    loss = pixel_loss(F.log_softmax(z, 1), target, s, transition)
    if keep < 1:
        judge = loss
        if chosen_by is not None:
            other = labelled_pixels(chosen_by.detach(), y, pixel_weights=pixel_weights)[0]
            judge = pixel_loss(F.log_softmax(other, 1), target, s, transition)
        w = w * select_small(judge, keep, target if s.per_class else None)
    return (loss * w).sum() / w.sum().clamp_min(_LEAST)


def co_teaching_loss(
    logits: tuple[Tensor, Tensor],
    y: Tensor,
    keep: float,
    *,
    settings: RobustLoss | None = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    transition: npt.ArrayLike | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses of two networks, each over the pixels that the other one finds easy.

    Errors that one network has learned are so not confirmed by itself. Arguments as in
    :func:`robust_loss`.
    """
    a, b = logits
    first, second = (
        robust_loss(
            mine, y, settings=settings, weights=weights, pixel_weights=pixel_weights,
            transition=transition, keep=keep, chosen_by=other,
        )
        for mine, other in ((a, b), (b, a))
    )  # fmt: skip
    return first, second
