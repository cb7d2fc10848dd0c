"""Co-teaching: two networks that choose for each other which labels to learn from.

Networks learn what is regular before they learn wrong labels by heart, so labels with a small loss
are likely right (:func:`terraloom.models.class_losses.select_small`). A network that chooses by
its own loss confirms its own errors; two that began differently make different ones, and each
leaves out what the other finds hard (Han et al. 2018, Co-teaching, arXiv 1804.06872).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from terraloom.models.losses import MultiTaskLoss
from terraloom.models.mapnet import MapNet

__all__ = ["CoTeachingLoss", "Pair"]


class Pair(MapNet):
    """Two networks with equal specs that train together as one; the first is the result.

    Raw outputs hold those of both, one after the other along the channels.

    Args:
        one: The network that predicts.
        other: The one that helps to train it.
    """

    def __init__(self, one: MapNet, other: MapNet) -> None:
        nn.Module.__init__(self)
        self.spec, self.one, self.other = one.spec, one, other

    @property
    def heads(self) -> nn.ModuleDict:  # type: ignore[override]
        """Heads of both."""
        return nn.ModuleDict({"one": self.one.heads, "other": self.other.heads})

    def forward_at(self, x: Mapping[int, Tensor], wanted: Tensor) -> dict[str, Tensor]:
        """Raw outputs of both, (N, 2 c, h, w); see :meth:`MapNet.forward_at`."""
        a, b = self.one.forward_at(x, wanted), self.other.forward_at(x, wanted)
        return {k: torch.cat([v, b[k]], 1) for k, v in a.items()}

    def predict(
        self, inputs: Mapping[str, Tensor], *, describe: bool = False, logits: bool = False
    ) -> dict[str, Tensor]:
        """Prediction of the first; see :meth:`MapNet.predict`."""
        return self.one.predict(inputs, describe=describe, logits=logits)

    @staticmethod
    def of_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a pair's state that is the first network's."""
        return {k.removeprefix("one."): v for k, v in state.items() if k.startswith("one.")}


class CoTeachingLoss(MultiTaskLoss):
    """Mean loss of the two networks of a :class:`Pair`, each on the pixels that the other chose.

    Takes what :class:`MultiTaskLoss` takes. Tasks without small-loss selection are learnt by both
    alike.
    """

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
        """See :meth:`MultiTaskLoss.each`; ``raw`` is that of a pair."""
        one, other = ({k: v.chunk(2, 1)[i] for k, v in raw.items()} for i in (0, 1))
        a = super().each(one, y, pixel_weights, soft, done=done, judge=other)
        b = super().each(other, y, pixel_weights, soft, done=done, judge=one)
        return {k: (v + b[k]) / 2 for k, v in a.items()}
