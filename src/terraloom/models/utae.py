"""U-TAE for several resolutions: a map from images of many dates, with attention over time.

After Garnot and Landrieu 2021 (arXiv 2107.07933): one spatial encoder for all dates; lightweight
temporal attention at its deepest level; the same attention, brought to the finer levels, weighs
the dates there; then one decoder. The encoder and the decoder are those of the fusion network, so
modalities join at their own pixel sizes. Static modalities have an encoder of their own.

A date has no influence on a pixel of a level where it is invalid: the weights of the other dates
sum to 1. There is no statistic of the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.models.dated import YEAR_DAYS, DatedNet, DatedSpec
from terraloom.models.decoders import ConvBlock
from terraloom.models.fusion import FusionNet, Normalisation

__all__ = ["UTAE"]


class _Queries(nn.Module):
    """Attention scores of dates at each pixel of the deepest level: learnt queries, keys."""

    rate: Tensor

    def __init__(self, spec: DatedSpec) -> None:
        super().__init__()
        w, self.heads, self.key = spec.widths[-1], spec.attention, spec.key
        # The slowest code turns once over all years; those of one year tell the season.
        rate = torch.arange(1, spec.harmonics + 1) * 2 * math.pi / YEAR_DAYS
        if spec.years > 1:
            rate = torch.cat([rate.new_tensor([2 * math.pi / (spec.years * YEAR_DAYS)]), rate])
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


class UTAE(DatedNet):
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
        #: Encoder of one date, and the decoder and heads of all.
        self.one = FusionNet(spec.one_step(spec.dated))
        self.heads = self.one.heads
        self.one.heads = nn.ModuleDict()
        self.beside: FusionNet | None = None
        if spec.static:
            self.beside = FusionNet(spec.one_step(spec.static))
            for name in [n for n, _ in self.beside.named_children()]:
                if name not in ("reduce", "stem10", "down", "encode"):  # only its encoder is used
                    delattr(self.beside, name)
        self.queries = _Queries(spec)
        self.out = ConvBlock(spec.widths[-1], spec.widths[-1], 1)

    # --- geometry ------------------------------------------------------------------------------
    def _geometry(self) -> FusionNet:
        """A network without memory that joins all modalities as this one does."""
        spec = self.spec.one_step(self.spec.channels)
        with torch.device("meta"):
            return FusionNet(replace(spec, widths=(1,) * spec.depth))

    @property
    def stride_px(self) -> int:
        """Tile origins must be multiples of this many 10 m pixels for exact tiled prediction."""
        return math.lcm(*self._factor.values(), 2 ** (self.spec.depth - 1))

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees.

        That of the fusion network of one date: the scores of a deep pixel act within it only, and
        the decoder takes the deep pixel to the same places.
        """
        return self._geometry().receptive_field_px()

    # --- network -------------------------------------------------------------------------------
    def _seen(self, steps: Mapping[int, Tensor]) -> list[Tensor]:
        """Where a date is valid, (N, T, 1, h / 2^l, w / 2^l) of bool per level."""
        masks: dict[int, Tensor] = {}
        slices = self.one.feature_slices().values()
        for f, at in slices:
            mask = steps[f][:, :, at.stop - 1] > 0
            masks[f] = masks[f] | mask if f in masks else mask
        finest = None
        for f, mask in masks.items():
            part = mask.repeat_interleave(f, -2).repeat_interleave(f, -1)
            finest = part if finest is None else finest | part
        if finest is None:
            raise ModelError("no modality over time", where="UTAE")
        out = [finest.float()]
        for _ in range(1, self.spec.depth):
            out.append(F.max_pool2d(out[-1], 2))
        return [v[:, :, None] > 0 for v in out]

    def _levels(self, steps: Mapping[int, Tensor], seen: Tensor) -> list[Tensor]:
        """Features of each date, (N, T, widths[l], h / 2^l, w / 2^l) per level.

        Dates without a valid pixel in a window are not encoded: they cost nothing, and do not
        enter the statistics of batch norm in training.
        """
        n, t = seen.shape[:2]
        some = torch.nonzero(seen.flatten(2).any(2).flatten())[:, 0]
        h, w = seen.shape[-2:]
        if not len(some):
            return [seen.new_zeros((n, t, c, h >> k, w >> k), dtype=torch.float32)
                    for k, c in enumerate(self.spec.widths)]  # fmt: skip
        x = {f: v.flatten(0, 1)[some] for f, v in steps.items()}
        if not any(f % 2 for f in x):
            x[1] = next(iter(x.values())).new_zeros((len(some), 1, h, w))
        layout = torch.channels_last
        encoded = self.one.levels({f: v.contiguous(memory_format=layout) for f, v in x.items()})
        out = []
        for e in encoded:
            if len(some) < n * t:
                e = e.new_zeros((n * t, *e.shape[1:])).index_copy(0, some, e)
            out.append(e.view(n, t, *e.shape[1:]))
        return out

    def _beside(self, x: Mapping[int, Tensor]) -> list[Tensor]:
        """Levels of the static modalities."""
        if self.beside is None:
            return []
        still = self.still(x)
        if not any(f % 2 for f in still):
            f, v = next(iter(still.items()))
            still[1] = v.new_zeros((v.shape[0], 1, v.shape[2] * f, v.shape[3] * f))
        return self.beside.levels(still)

    def forward_prepared(self, x: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs of prepared inputs, (N, c, h, w) with h, w of the padded window."""
        steps = self.by_step(x)
        seen = self._seen(steps)
        levels = self._levels(steps, seen[0])
        values, scores = self.queries(levels[-1], self.day)
        pooled = [_pooled(v, scores, s) for v, s in zip(levels[:-1], seen[:-1], strict=True)]
        deep = self.out(_pooled(values, scores, seen[-1]))
        # Where no date is valid there is nothing to say, not the bias of the last layer.
        pooled.append(deep * seen[-1].any(1))
        for i, static in enumerate(self._beside(x)):
            pooled[i] = pooled[i] + static
        layout = torch.channels_last
        f = self.one.drop(self.one.merge([p.contiguous(memory_format=layout) for p in pooled]))
        return {name: head(f) for name, head in self.heads.items()}


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
