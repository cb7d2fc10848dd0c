"""Fusion network: one encoder-decoder over modalities at their native resolutions.

Inputs keep the pixel size they were measured with (10 m to 480 m); nothing is resampled before
the network. A modality joins at the deepest level of the encoder whose pixels divide its own: 20
and 60 m inputs at 20 m, 240 m inputs at 80 m. Odd multiples of 10 m (30 m) are repeated to 10 m.
There is no pooling over the whole window and no statistic of the window: the output of a pixel
depends only on inputs within :meth:`FusionNet.receptive_field_px`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ConfigError, ModelError
from terraloom.models.decoders import DECODERS, ConvBlock, Span, union, wider
from terraloom.models.heads import TaskSpec, check_fields, make_head
from terraloom.models.mapnet import EPS, MapNet
from terraloom.preprocess.groups import group_factor, group_facts

__all__ = ["FusionNet", "FusionSpec", "Normalisation", "index_pairs"]

#: Normalised differences (a - b) / (a + b) by spectral role, the first present of each side:
#: NDVI, NDWI, NDRE, NDMI, NDTI. Roles are named as the Sentinel-2 bands that play them.
_INDICES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("B08", "B8A"), ("B04",)),
    (("B03",), ("B08", "B8A")),
    (("B8A", "B08"), ("B05",)),
    (("B8A", "B08"), ("B11",)),
    (("B11",), ("B12",)),
)


@dataclass(frozen=True)
class Normalisation:
    """Statistics of the training pixels of one modality, in the order of its features.

    Attributes:
        mean: One per feature (channels, then indices).
        std: One per feature, > 0.
        decibel: Linear power is turned into decibels first (radar), except signed channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    decibel: bool = False


@dataclass(frozen=True)
class FusionSpec:
    """All that is needed to build the network again.

    Attributes:
        channels: Channel names per modality, in the order of the input arrays.
        tasks: What the heads predict.
        width: Channels of the 10 m level (count).
        depth: Levels of the encoder, 10 m included (count); level l has pixels of 10 * 2^l m.
        convs: 3x3 convolutions per encoder level below the first (count).
        indices: Add normalised differences of the channels as features.
        dropout: Share of feature maps dropped before the heads in training (0-1).
        widths: Channels per level; overrides ``width`` (counts).
        roles: Per modality, band: the Sentinel-2 band that it is like. Without an entry a
            Sentinel-2 modality plays its own roles, another has none.
        signed: Per modality, channels that may be negative: never turned into decibels.
        reduce_to: A modality with more than twice as many features is reduced to this many by a
            1x1 convolution at its own pixel size (count); 0 never reduces.
        decoder: ``unet``, ``fpn`` or ``context``; see :mod:`terraloom.models.decoders`.
    """

    channels: dict[str, tuple[str, ...]]
    tasks: tuple[TaskSpec, ...]
    width: int = 12
    depth: int = 4
    convs: int = 1
    indices: bool = True
    dropout: float = 0.05
    widths: tuple[int, ...] = field(default=())
    roles: dict[str, dict[str, str]] = field(default_factory=dict)
    signed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reduce_to: int = 32
    decoder: str = "unet"

    def __post_init__(self) -> None:
        if not self.channels:
            raise ModelError("no modality", where="FusionSpec.channels", fix="give one or more")
        for group in self.channels:
            try:
                group_factor(group)
            except ConfigError as err:
                raise ModelError(
                    f"modality {group}", where="FusionSpec.channels", allowed=err.allowed
                ) from err
        if not self.tasks:
            raise ModelError("no task", where="FusionSpec.tasks", fix="declare one task")
        if self.depth < 2 or self.depth > 7:
            raise ModelError(f"depth {self.depth}", where="FusionSpec.depth", allowed="2 to 7")
        if self.decoder not in DECODERS:
            raise ModelError(f"decoder {self.decoder!r}", where="FusionSpec.decoder",
                             allowed=", ".join(DECODERS))  # fmt: skip
        if not self.widths:
            # 12 gives 12, 32, 48, 64: little at 10 m, where a channel costs 4x that at 20 m.
            deeper = [4 * self.width * (level + 1) // 3 for level in range(1, self.depth)]
            grow = [self.width, *deeper]
            object.__setattr__(self, "widths", tuple(grow))
        if len(self.widths) != self.depth:
            raise ModelError(f"{len(self.widths)} widths for {self.depth} levels",
                             where="FusionSpec.widths")  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the member's card."""
        return asdict(self)

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> FusionSpec:
        """The inverse of :meth:`to_json`; cards from before a field existed keep their network.

        Raises:
            ModelError: The card has a field that this version does not know.
        """
        check_fields(cls, card, "spec of a member's card")
        values = {"reduce_to": 0, **card}
        values["channels"] = {g: tuple(c) for g, c in values["channels"].items()}
        values["tasks"] = tuple(TaskSpec.from_json(t) for t in values["tasks"])
        values["widths"] = tuple(values["widths"])
        values["signed"] = {g: tuple(c) for g, c in values.get("signed", {}).items()}
        return cls(**values)

    def pairs(self, group: str) -> list[tuple[int, int]]:
        """Positions of the channels of a modality whose normalised differences are features."""
        names = self.channels[group]
        return index_pairs(group, names, self.roles.get(group)) if self.indices else []

    def reduced(self, group: str) -> bool:
        """Whether a modality has so many features that it is reduced first."""
        n = len(self.channels[group]) + len(self.pairs(group))
        return bool(self.reduce_to) and n > 2 * self.reduce_to


def index_pairs(
    group: str, names: Sequence[str], roles: Mapping[str, str] | None = None
) -> list[tuple[int, int]]:
    """Positions (a, b) of the channels whose normalised difference is a feature.

    Args:
        group: Modality.
        names: Its channels, ``period/band`` (or ``band``); only bands of one period are paired.
        roles: Band: the Sentinel-2 band it is like. None: Sentinel-2 modalities play their own.
    """
    known = group_facts(group, {} if roles is None else {"roles": roles}).roles
    periods: dict[str, dict[str, int]] = {}
    for i, name in enumerate(names):
        period, _, band = name.rpartition("/")
        if band in known:
            periods.setdefault(period, {}).setdefault(known[band], i)
    out = []
    for where in periods.values():
        for side_a, side_b in _INDICES:
            a = next((where[r] for r in side_a if r in where), None)
            b = next((where[r] for r in side_b if r in where), None)
            if a is not None and b is not None:
                out.append((a, b))
    return out


class FusionNet(MapNet):
    """Encoder-decoder over modalities of several resolutions, one head per task.

    Args:
        spec: Modalities, tasks and size.
        normalisation: Per modality; without it features pass as they are (mean 0, sd 1).

    Invalid values are NaN in the inputs; each modality brings a mask feature, the valid share of
    its channels, and NaN becomes the training mean.
    """

    def __init__(
        self, spec: FusionSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        super().__init__(spec, normalisation)
        w = spec.widths
        self._joins = {f: _join_level(f, spec.depth) for f in set(self._factor.values())}
        joined = np.cumsum([self._joined(level) for level in range(spec.depth)]).tolist()
        c10 = joined[0] = max(self._joined(0), 1)
        self.reduce = nn.ModuleDict({
            g: ConvBlock(self._features(g), spec.reduce_to, 1)
            for g in self._groups if spec.reduced(g)
        })  # fmt: skip
        self.stem10 = ConvBlock(c10, w[0], 3)
        self.down = nn.ModuleList()
        self.encode = nn.ModuleList()
        for level in range(1, spec.depth):
            self.down.append(ConvBlock(w[level - 1], w[level], 2, stride=2))
            c_in = w[level] + 2 * c10 + joined[level] - self._joined(0)
            blocks = [
                ConvBlock(c_in if i == 0 else w[level], w[level], 3) for i in range(spec.convs)
            ]
            self.encode.append(nn.Sequential(*blocks))
        decoder = DECODERS[spec.decoder](w)
        # Its parts stand beside those of the encoder: the names of a U-Net's weights stay those
        # of member files from before there was a choice.
        for name, part in decoder.named_children():
            self.add_module(name, part)
        self._decode, self._reach = decoder.forward, decoder.reach
        self.drop = nn.Dropout2d(spec.dropout)
        self.heads = nn.ModuleDict({t.name: make_head(t, w[0]) for t in spec.tasks})

    # --- geometry ------------------------------------------------------------------------------
    def _joined(self, level: int) -> int:
        """Channels of the modalities that join at a level, reduced ones with their mask."""
        mine = [g for g in self._groups if self._joins[self._factor[g]] == level]
        short = self.spec.reduce_to + 1
        return sum(short if self.spec.reduced(g) else self._features(g) for g in mine)

    @property
    def stride_px(self) -> int:
        """Tile origins must be multiples of this many 10 m pixels for exact tiled prediction."""
        return math.lcm(*self._joins, 2 ** (self.spec.depth - 1))

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees.

        Where nothing enters at 10 m, the border of the window counts as such an input. Found by
        following the interval of inputs behind each pixel through all layers; exact, as the
        intervals are unions over all positions within one stride.
        """
        return self.reach_px(lambda spans: spans)

    def reach_px(self, between: Callable[[list[Span]], list[Span]]) -> int:
        """The receptive field where more layers stand between encoder and decoder.

        Args:
            between: From the inputs behind each pixel of the levels to those after these layers.
        """
        n = self.stride_px * (28 + 16 * self.spec.convs)
        at = np.arange(n)
        skips: list[Span] = []
        for level in range(self.spec.depth):
            start = at[:: 2**level]
            spans = [(start // f * f, start // f * f + f - 1)
                     for f, join in self._joins.items() if join == level]  # fmt: skip
            if level:
                lo, hi = skips[-1]
                spans.append((lo[0::2], hi[1::2]))
            skips.append(wider(union(spans or [(at, at)]), self.spec.convs if level else 1))
        span = self._reach(between(skips))
        middle = slice(n // 2 - self.stride_px, n // 2 + self.stride_px)
        return int(max((at - span[0])[middle].max(), (span[1] - at)[middle].max()))

    # --- network -------------------------------------------------------------------------------
    def _coarse(self, x: Mapping[int, Tensor]) -> list[list[Tensor]]:
        """Inputs that join at each level, at the pixel size of the level."""
        out: list[list[Tensor]] = [[] for _ in range(self.spec.depth)]
        for f in sorted(x):
            level = _join_level(f, self.spec.depth)
            part, repeat = self._reduced(x[f], f), f // 2**level
            if repeat > 1:
                part = F.interpolate(part, scale_factor=repeat, mode="nearest-exact")
            out[level].append(part)
        return out

    def _reduced(self, x: Tensor, factor: int) -> Tensor:
        """Features of one pixel size, those of large modalities reduced; masks stay."""
        mine = {g: at for g, (f, at) in self.feature_slices().items() if f == factor}
        if not any(g in self.reduce for g in mine):
            return x
        parts = []
        for g, at in mine.items():
            part = x[:, at]
            parts += [self.reduce[g](part), part[:, -1:]] if g in self.reduce else [part]
        return torch.cat(parts, 1)

    def levels(self, x: Mapping[int, Tensor]) -> list[Tensor]:
        """Encoder: features (N, widths[l], h / 2^l, w / 2^l) per level, finest first."""
        coarse = self._coarse(x)
        fine = _cat(coarse[0])
        skips: list[Tensor] = [self.stem10(fine)]
        mean, square, rest = fine, fine**2, None
        for level, (down, encode) in enumerate(zip(self.down, self.encode, strict=True), start=1):
            # Local mean and spread of the inputs enter every level: a short training need not
            # first learn to average noise away or to measure texture.
            mean, square = F.avg_pool2d(mean, 2), F.avg_pool2d(square, 2)
            spread = (square - mean**2).clamp_min(EPS**2).sqrt()
            if rest is not None:
                rest = F.avg_pool2d(rest, 2)
            if coarse[level]:
                rest = _cat([*([] if rest is None else [rest]), *coarse[level]])
            parts = [down(skips[-1]), mean, spread]
            skips.append(encode(torch.cat(parts if rest is None else [*parts, rest], 1)))
        return skips

    def merge(self, levels: Sequence[Tensor]) -> Tensor:
        """Decoder: features (N, width, h, w) at 10 m of the levels."""
        return self._decode(levels)

    def trunk(self, x: Mapping[int, Tensor]) -> Tensor:
        """Shared features (N, width, h, w) at 10 m of prepared inputs."""
        return self.merge(self.levels(x))

    def forward_prepared(self, x: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs of prepared inputs, (N, c, h, w) with h, w of the padded window."""
        f = self.drop(self.trunk(x))
        return {name: head(f) for name, head in self.heads.items()}


def _join_level(factor: int, depth: int) -> int:
    """Deepest level of the encoder whose pixels, 2^level of 10 m, divide those of a modality."""
    return min((factor & -factor).bit_length() - 1, depth - 1)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
