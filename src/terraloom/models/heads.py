"""Heads: one 1x1 convolution per task and the way from its output to physical values.

What a raw output means depends on the task's loss (:mod:`terraloom.models.losses`); what
``physical`` gives depends on the kind only, so that prediction need not know the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError

__all__ = [
    "KINDS",
    "LOG_VAR_RANGE",
    "LOSSES",
    "QUANTILES",
    "Head",
    "TaskSpec",
    "check_fields",
    "make_head",
    "quantiles_of",
    "scene_of",
]

KINDS = ("segmentation", "regression", "boundary", "scene")
#: Losses of each kind; the first is what ``auto`` means.
LOSSES: dict[str, tuple[str, ...]] = {
    "segmentation": (
        "ce", "gce", "sce", "forward", "soft_bootstrap", "hard_bootstrap", "focal", "ordinal",
    ),
    "regression": ("gaussian", "huber", "quantile"),
    "boundary": ("bce",),
    "scene": ("pooled_ce",),
}  # fmt: skip
#: What a head with loss ``quantile`` predicts.
QUANTILES = (0.05, 0.5, 0.95)
#: Standard deviations of a Gaussian between the outer two of them.
_SPAN_SD = 3.2897072539029444
#: Clamp of the predicted log variance (standardised target): sd between .018 and 20.
LOG_VAR_RANGE = (-8.0, 6.0)


def check_fields(spec: type[Any], card: Mapping[str, Any], where: str) -> None:
    """Refuse a card with a field that a spec does not know: a later version has written it.

    Raises:
        ModelError: Names the fields.
    """
    unknown = sorted(set(card) - {f.name for f in fields(spec)})
    if unknown:
        raise ModelError(
            f"unknown settings {', '.join(unknown)}", where=where,
            fix="use the version of Terraloom that wrote it, or train again",
        )  # fmt: skip


@dataclass(frozen=True)
class TaskSpec:
    """One thing to predict.

    Attributes:
        name: Key of the labels (``y_<name>``) and of the outputs.
        kind: ``segmentation``, ``regression``, ``boundary``, or ``scene``: one class for a whole
            window. Campaigns know the first three.
        classes: Names of classes 0..K-1; segmentation and scene only.
        unit: Unit of the value; regression only.
        weight: Weight of the task's loss beside the others.
        transform: ``standardise`` or ``log1p`` (skewed values >= 0); regression only.
        mean: Mean of the transformed training values; set in training.
        std: Standard deviation of the transformed training values; set in training.
        loss: One of :data:`LOSSES` of the kind, or ``auto`` for the first of them.
        dice: Weight of a soft Dice loss beside it (ratio); segmentation only.
        smoothing: Label smoothing (0-1); segmentation only.
        forget: Share of labelled pixels, those with the largest loss, that training learns to
            leave out (0-1); segmentation only.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    unit: str = ""
    weight: float = 1.0
    transform: str = "standardise"
    mean: float = 0.0
    std: float = 1.0
    loss: str = "auto"
    dice: float = 0.0
    smoothing: float = 0.0
    forget: float = 0.0

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        if self.kind not in KINDS:
            raise ModelError(f"kind {self.kind!r}", where=where, allowed=", ".join(KINDS))
        if self.classed and not 2 <= len(self.classes) <= 255:
            raise ModelError(f"{len(self.classes)} classes", where=where, allowed="2 to 255")
        if self.transform not in ("standardise", "log1p"):
            raise ModelError(f"transform {self.transform!r}", where=where,
                             allowed="standardise, log1p")  # fmt: skip
        if self.loss not in ("auto", *LOSSES[self.kind]):
            raise ModelError(f"loss {self.loss!r} for kind {self.kind}", where=where,
                             allowed="auto, " + ", ".join(LOSSES[self.kind]))  # fmt: skip
        if self.kind != "segmentation" and (self.dice or self.smoothing or self.forget):
            raise ModelError("dice, smoothing or forget", where=where, allowed="segmentation only")

    @property
    def classed(self) -> bool:
        """Whether labels are classes (255 = none), not values (NaN = none)."""
        return self.kind in ("segmentation", "scene")

    @property
    def loss_name(self) -> str:
        """The loss, with ``auto`` resolved."""
        return LOSSES[self.kind][0] if self.loss == "auto" else self.loss

    @property
    def channels(self) -> int:
        """Channels of the prediction: probabilities, mean and variance, or one probability.

        Heads of quantiles add the outer two of them.
        """
        if self.classed:
            return len(self.classes)
        return {"regression": 4 if self.loss_name == "quantile" else 2, "boundary": 1}[self.kind]

    @property
    def raw_channels(self) -> int:
        """Channels of the head's raw output."""
        return len(QUANTILES) if self.loss_name == "quantile" else self.channels

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the member's card."""
        return asdict(self)

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> TaskSpec:
        """The inverse of :meth:`to_json`; cards from before a field existed get its default.

        Raises:
            ModelError: The card has a field that this version does not know.
        """
        check_fields(cls, card, "task of a member's card")
        return cls(**{**card, "classes": tuple(card["classes"])})

    def standardise(self, y: Tensor) -> Tensor:
        """Values in the task's unit to the scale of the head's output; NaN stays NaN."""
        return ((torch.log1p(y) if self.transform == "log1p" else y) - self.mean) / self.std


class Head(nn.Module):
    """A 1x1 convolution; subclass per kind decides the physical meaning."""

    def __init__(self, task: TaskSpec, c_in: int) -> None:
        super().__init__()
        self.task = task
        self.conv = nn.Conv2d(c_in, task.raw_channels, 1)

    def forward(self, f: Tensor) -> Tensor:
        """Raw output (N, c, h, w) of trunk features (N, width, h, w)."""
        out: Tensor = self.conv(f)
        return out

    def physical(self, raw: Tensor) -> Tensor:
        """Raw output to physical values."""
        raise NotImplementedError


class SegmentationHead(Head):
    """Logits of K classes; physical: probabilities that sum to 1."""

    def physical(self, raw: Tensor) -> Tensor:
        """Softmax over classes."""
        return raw.softmax(1)


class SceneHead(SegmentationHead):
    """Evidence of each pixel for the classes of its window; physical: as probabilities.

    The head pools nothing, so that a map of evidence does not depend on tiles; :func:`scene_of`
    pools it over the pixels that count.
    """


def scene_of(p: Tensor, valid: Tensor) -> Tensor:
    """Class probabilities (N, K) of whole windows: the softmax of the mean logits of their pixels.

    Args:
        p: (N, K, h, w) physical output of a :class:`SceneHead`; the logarithm of a softmax differs
            from the logits by a number per pixel, which the second softmax takes out again.
        valid: (N, h, w) of bool: pixels that count.

    Returns:
        NaN for a window without a valid pixel.
    """
    on = valid[:, None]
    # The smallest float32 keeps a probability that has underflown finite.
    logs = torch.where(on, p.clamp_min(torch.finfo(p.dtype).tiny).log(), 0.0)
    return (logs.sum((2, 3)) / on.sum((2, 3))).softmax(1)


class BoundaryHead(Head):
    """One logit; physical: probability (or target intensity 0-1) of a boundary."""

    def physical(self, raw: Tensor) -> Tensor:
        """Logistic function."""
        return raw.sigmoid()


class RegressionHead(Head):
    """Centre and log variance in the standardised scale, of losses ``gaussian`` and ``huber``."""

    def physical(self, raw: Tensor) -> Tensor:
        """Mean and variance in the task's unit, (N, 2, h, w).

        For ``log1p`` these are the moments of the log-normal law: E[1+y] = exp(m + v/2) and
        Var[y] = (exp(v) - 1) exp(2m + v).
        """
        std = self.task.std
        m = raw[:, 0] * std + self.task.mean
        v = raw[:, 1].clamp(*LOG_VAR_RANGE).exp() * std**2
        if self.task.transform == "log1p":
            # Beyond this the variance overflows float32; such a prediction says "unknown".
            v = v.clamp_max(math.log(1e6))
            mean = torch.exp((m + v / 2).clamp_max(40.0))
            return torch.stack([mean - 1, torch.expm1(v) * mean**2], 1)
        return torch.stack([m, v], 1)


def quantiles_of(raw: Tensor) -> Tensor:
    """Quantiles (N, 3, ...) of a raw output (N, 3, ...) in the standardised scale.

    The raw channels are the median and what lies between it and the outer quantiles before a
    softplus: quantiles cannot cross.
    """
    middle, below, above = raw.unbind(1)
    return torch.stack([middle - F.softplus(below), middle, middle + F.softplus(above)], 1)


class QuantileHead(Head):
    """Median and distances to the outer :data:`QUANTILES` in the standardised scale."""

    def physical(self, raw: Tensor) -> Tensor:
        """Median, ((q95 - q05) / 3.29)^2, q05 and q95 in the task's unit, (N, 4, h, w).

        For a Gaussian the first two are mean and variance. A quantile of a monotonic transform is
        the transform of the quantile, so ``log1p`` needs no moments.
        """
        q = quantiles_of(raw) * self.task.std + self.task.mean
        if self.task.transform == "log1p":
            q = torch.expm1(q.clamp_max(40.0))
        spread = ((q[:, 2] - q[:, 0]) / _SPAN_SD) ** 2
        return torch.stack([q[:, 1], spread, q[:, 0], q[:, 2]], 1)


def make_head(task: TaskSpec, c_in: int) -> Head:
    """The head of a task."""
    kinds: dict[str, type[Head]] = {
        "segmentation": SegmentationHead,
        "regression": RegressionHead,
        "boundary": BoundaryHead,
        "scene": SceneHead,
    }
    made = QuantileHead if task.loss_name == "quantile" else kinds[task.kind]
    return made(task, c_in)
