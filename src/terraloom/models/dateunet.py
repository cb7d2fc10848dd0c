"""Networks over time for windows: one U-Net, its levels pooled over the dates in between.

One spatial encoder sees every date by itself, a network of its own kind makes one set of features
of those of all dates, level by level, and one decoder follows. Encoder and decoder are those of the
fusion network, so modalities join at their own pixel sizes. Static modalities have an encoder of
their own. There is no statistic of the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.models.dated import YEAR_DAYS, DatedNet, DatedSpec
from terraloom.models.fusion import FusionNet, Normalisation

__all__ = ["DateUnet", "day_rates"]


def day_rates(spec: DatedSpec) -> Tensor:
    """Angles per day (radians) of the sine and cosine pairs that encode a date.

    Those of one year tell the season; where the steps lie in several, a slowest one turns once over
    all of them.
    """
    rate = torch.arange(1, spec.harmonics + 1) * 2 * math.pi / YEAR_DAYS
    if spec.years > 1:
        rate = torch.cat([rate.new_tensor([2 * math.pi / (spec.years * YEAR_DAYS)]), rate])
    return rate


class DateUnet(DatedNet):
    """Encoder of each date, :meth:`over_time`, decoder, one head per task.

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

    def over_time(self, levels: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """Features of all dates together.

        Args:
            levels: (N, T, widths[l], h / 2^l, w / 2^l) per level, of any value where not seen.
            seen: (N, T, 1, h / 2^l, w / 2^l) of bool per level: where a date is valid.

        Returns:
            (N, widths[l], h / 2^l, w / 2^l) per level; 0 where no date is seen.
        """
        raise NotImplementedError

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
            raise ModelError("no modality over time", where=self.spec.network)
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
        pooled = self.over_time(self._levels(steps, seen[0]), seen)
        for i, static in enumerate(self._beside(x)):
            pooled[i] = pooled[i] + static
        layout = torch.channels_last
        f = self.one.drop(self.one.merge([p.contiguous(memory_format=layout) for p in pooled]))
        return {name: head(f) for name, head in self.heads.items()}
