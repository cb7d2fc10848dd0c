"""U-TAE for several resolutions: a map from images of many dates, with attention over time.

After Garnot and Landrieu 2021 (arXiv 2107.07933): one spatial encoder for all dates; lightweight
temporal attention at its deepest level; the same attention, brought to the finer levels, weighs
the dates there; then one decoder.

A date has no influence on a pixel of a level where it is invalid: the weights of the other dates
sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from terraloom.models.dated import DatedSpec
from terraloom.models.dateunet import DateUnet, day_rates
from terraloom.models.decoders import ConvBlock
from terraloom.models.fusion import Normalisation

__all__ = ["UTAE"]


class _Queries(nn.Module):
    """Attention scores of dates at each pixel of the deepest level: learnt queries, keys."""

    rate: Tensor

    def __init__(self, spec: DatedSpec) -> None:
        super().__init__()
        w, self.heads, self.key = spec.widths[-1], spec.attention, spec.key
        rate = day_rates(spec)
        self.register_buffer("rate", rate, persistent=False)
        self.embed = nn.Sequential(nn.Linear(w, w), nn.LayerNorm(w))
        self.place = nn.Linear(2 * len(rate), w, bias=False)
        self.keys = nn.Linear(w, spec.attention * spec.key)
        self.query = nn.Parameter(torch.randn(spec.attention, spec.key))

    def forward(self, deep: Tensor, day: Tensor) -> tuple[Tensor, Tensor]:
        """Values (N, T, w, h, w) with the day in them, and scores (N, T, heads, h, w).

        Args:
            deep: (N, T, w, h, w) features of the deepest level.
            day: (T,) days.
        """
        angle = day[:, None] * self.rate
        code = self.place(torch.cat([angle.sin(), angle.cos()], -1))
        e = self.embed(deep.permute(0, 1, 3, 4, 2)) + code[:, None, None]
        n, t, h, w, _ = e.shape
        score = (self.keys(e).view(n, t, h, w, self.heads, self.key) * self.query).sum(-1)
        return e.permute(0, 1, 4, 2, 3), (score * self.key**-0.5).permute(0, 1, 4, 2, 3)


class UTAE(DateUnet):
    """Encoder of each date, attention over dates, decoder, one head per task.

    Args:
        spec: Modalities, steps, tasks and size.
        normalisation: Per modality; without it features pass as they are (mean 0, sd 1).

    Raises:
        ModelError: No modality has a time.
    """

    def __init__(
        self, spec: DatedSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        super().__init__(spec, normalisation)
        self.queries = _Queries(spec)
        self.out = ConvBlock(spec.widths[-1], spec.widths[-1], 1)

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees.

        That of the fusion network of one date: the scores of a deep pixel act within it only, and
        the decoder takes the deep pixel to the same places.
        """
        return self._geometry().receptive_field_px()

    def over_time(self, levels: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`DateUnet.over_time`."""
        values, scores = self.queries(levels[-1], self.day)
        pooled = [_pooled(v, scores, s) for v, s in zip(levels[:-1], seen[:-1], strict=True)]
        deep = self.out(_pooled(values, scores, seen[-1]))
        # Where no date is valid there is nothing to say, not the bias of the last layer.
        return [*pooled, deep * seen[-1].any(1)]


def _pooled(values: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
    """Weighted mean over dates, each head for a part of the channels.

    Args:
        values: (N, T, C, h, w).
        scores: (N, T, heads, h', w') of the deepest level, whose pixels hold whole ones of h, w.
        seen: (N, T, 1, h, w) of bool; others have weight 0.

    Returns:
        (N, C, h, w); 0 where no date is seen.
    """
    k = values.shape[-1] // scores.shape[-1]
    if k > 1:
        scores = scores.repeat_interleave(k, -2).repeat_interleave(k, -1)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(1) * seen
    parts = values.tensor_split(scores.shape[2], 2)
    return torch.cat([(weights[:, :, i, None] * v).sum(1) for i, v in enumerate(parts)], 1)
