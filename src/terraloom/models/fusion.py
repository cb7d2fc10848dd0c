"""Fusion network: one encoder-decoder over modalities at their native resolutions.

Inputs keep the pixel size they were measured with (10, 20 and 60 m); nothing is resampled before
the network. The 20 m and 60 m inputs join the 10 m features where the encoder has reached 20 m.
There is no pooling over the whole window and no statistic of the window: the output of a pixel
depends only on inputs within :meth:`FusionNet.receptive_field_px`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.models.heads import Head, TaskSpec, make_head

__all__ = ["MODALITY_FACTOR", "FusionNet", "FusionSpec", "Normalisation", "index_pairs"]

#: Pixel size of a modality in units of the 10 m pixel.
MODALITY_FACTOR: dict[str, int] = {"s2_10": 1, "s1_10": 1, "dem_10": 1, "s2_20": 2, "s2_60": 6}

#: Normalised differences (a - b) / (a + b) per modality: NDVI, NDWI; NDRE, NDMI, NDTI.
_INDICES: dict[str, tuple[tuple[str, str], ...]] = {
    "s2_10": (("B08", "B04"), ("B03", "B08")),
    "s2_20": (("B8A", "B05"), ("B8A", "B11"), ("B11", "B12")),
}
_BAND = re.compile(r"(?:^|(?<=[^A-Za-z0-9]))(B\d\d|B8A)(?=$|[^A-Za-z0-9])")
_EPS = 1e-3
#: Floor of linear backscatter before decibels: -50 dB, far below the noise floor of Sentinel-1.
_POWER_FLOOR = 1e-5


@dataclass(frozen=True)
class Normalisation:
    """Statistics of the training pixels of one modality, in the order of its features.

    Attributes:
        mean: One per feature (channels, then indices).
        std: One per feature, > 0.
        decibel: Linear power is turned into decibels first (Sentinel-1).
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
    """

    channels: dict[str, tuple[str, ...]]
    tasks: tuple[TaskSpec, ...]
    width: int = 12
    depth: int = 4
    convs: int = 1
    indices: bool = True
    dropout: float = 0.05
    widths: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        unknown = sorted(set(self.channels) - set(MODALITY_FACTOR))
        if unknown or not self.channels:
            raise ModelError(
                f"modalities {unknown or 'none'}",
                where="FusionSpec.channels",
                allowed=", ".join(MODALITY_FACTOR),
            )
        if not self.tasks:
            raise ModelError("no task", where="FusionSpec.tasks", fix="declare one task")
        if self.depth < 2 or self.depth > 7:
            raise ModelError(f"depth {self.depth}", where="FusionSpec.depth", allowed="2 to 7")
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
        """The inverse of :meth:`to_json`."""
        values = dict(card)
        values["channels"] = {g: tuple(c) for g, c in values["channels"].items()}
        values["tasks"] = tuple(TaskSpec.from_json(t) for t in values["tasks"])
        values["widths"] = tuple(values["widths"])
        return cls(**values)


def index_pairs(group: str, names: tuple[str, ...]) -> list[tuple[int, int]]:
    """Positions (a, b) of the channels whose normalised difference is a feature.

    Channel names hold a Sentinel-2 band key and, around it, the period (``2018-05_B08``); only
    bands of one period are paired.
    """
    where: dict[tuple[str, str], int] = {}
    periods: list[str] = []
    for i, name in enumerate(names):
        hit = _BAND.search(name)
        if hit:
            period = name[: hit.start()] + name[hit.end() :]
            where[period, hit.group(1)] = i
            if period not in periods:
                periods.append(period)
    wanted = [(p, a, b) for p in periods for a, b in _INDICES.get(group, ())]
    return [(where[p, a], where[p, b]) for p, a, b in wanted if {(p, a), (p, b)} <= set(where)]


class _Block(nn.Sequential):
    """Convolution, batch norm (in evaluation a fixed affine map, so tiles do not matter), ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1) -> None:
        pad = kernel // 2 if stride == 1 else 0
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=pad, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )


class FusionNet(nn.Module):
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
        super().__init__()
        self.spec = spec
        self._groups = [g for g in MODALITY_FACTOR if g in spec.channels]
        self._pairs = {
            g: index_pairs(g, spec.channels[g]) if spec.indices else [] for g in self._groups
        }
        self._decibel: dict[str, bool] = {}
        for g in self._groups:
            n = len(spec.channels[g]) + len(self._pairs[g])
            norm = normalisation[g] if normalisation else Normalisation((0.0,) * n, (1.0,) * n)
            if len(norm.mean) != n or len(norm.std) != n:
                raise ModelError(f"{len(norm.mean)} means for {n} features", where=g)
            self._decibel[g] = norm.decibel
            self.register_buffer(f"mean_{g}", torch.tensor(norm.mean).view(1, -1, 1, 1))
            self.register_buffer(f"std_{g}", torch.tensor(norm.std).view(1, -1, 1, 1))
        w = spec.widths
        c10, c20, c60 = (self._features(f) for f in (1, 2, 6))
        c10 = max(c10, 1)
        self.stem10 = _Block(c10, w[0], 3)
        self.down = nn.ModuleList()
        self.encode = nn.ModuleList()
        for level in range(1, spec.depth):
            self.down.append(_Block(w[level - 1], w[level], 2, stride=2))
            c_in = w[level] + 2 * c10 + c20 + c60
            blocks = [_Block(c_in if i == 0 else w[level], w[level], 3) for i in range(spec.convs)]
            self.encode.append(nn.Sequential(*blocks))
        self.lift = nn.ModuleList(_Block(w[i + 1], w[i], 1) for i in range(spec.depth - 1))
        self.decode = nn.ModuleList(_Block(w[i], w[i], 3) for i in range(spec.depth - 1))
        self.drop = nn.Dropout2d(spec.dropout)
        self.heads = nn.ModuleDict({t.name: make_head(t, w[0]) for t in spec.tasks})

    # --- geometry ------------------------------------------------------------------------------
    def _features(self, factor: int) -> int:
        groups = [g for g in self._groups if MODALITY_FACTOR[g] == factor]
        return sum(len(self.spec.channels[g]) + len(self._pairs[g]) + 1 for g in groups)

    def feature_slices(self) -> dict[str, tuple[int, slice]]:
        """Per modality: pixel size factor and its features in :meth:`prepare`, mask last."""
        out: dict[str, tuple[int, slice]] = {}
        used: dict[int, int] = {}
        for g in self._groups:
            f = MODALITY_FACTOR[g]
            start = used.get(f, 0)
            used[f] = start + len(self.spec.channels[g]) + len(self._pairs[g]) + 1
            out[g] = (f, slice(start, used[f]))
        return out

    def set_decibel(self, group: str, decibel: bool) -> None:
        """Say whether a modality is linear power that is turned into decibels."""
        self._decibel[group] = decibel

    @property
    def stride_px(self) -> int:
        """Tile origins must be multiples of this many 10 m pixels for exact tiled prediction."""
        coarsest = max([2] + [MODALITY_FACTOR[g] for g in self._groups])
        return math.lcm(coarsest, 2 ** (self.spec.depth - 1))

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees.

        Found by following the interval of inputs behind each pixel through all layers; exact, as
        the intervals are unions over all positions within one stride.
        """
        n = self.stride_px * (4 + 16 * self.spec.convs)
        at = np.arange(n)
        skips = [_wider((at, at), 1)]
        for level in range(1, self.spec.depth):
            lo, hi = skips[-1]
            spans = [(lo[0::2], hi[1::2])]
            if level == 1:
                coarse = [2 * bool(self._features(2)), 6 * bool(self._features(6))]
                i20 = 2 * np.arange(n // 2)
                spans += [(i20 // f * f, i20 // f * f + f - 1) for f in coarse if f]
            skips.append(_wider(_union(spans), self.spec.convs))
        span = skips[-1]
        for level in reversed(range(self.spec.depth - 1)):
            up = (np.repeat(span[0], 2), np.repeat(span[1], 2))
            span = _wider(_union([up, skips[level]]), 1)
        middle = slice(n // 2 - self.stride_px, n // 2 + self.stride_px)
        return int(max((at - span[0])[middle].max(), (span[1] - at)[middle].max()))

    def halo_px(self) -> int:
        """Receptive field rounded up to :attr:`stride_px`: read this much around a tile."""
        return math.ceil(self.receptive_field_px() / self.stride_px) * self.stride_px

    # --- inputs --------------------------------------------------------------------------------
    def features(self, group: str, x: Tensor) -> Tensor:
        """Features of one modality before normalisation: channels (in dB for power), indices.

        Args:
            group: Modality, e.g. ``s2_10``.
            x: (N, C, h, w) values; NaN is invalid.

        Returns:
            (N, C + indices, h, w), NaN where an input is NaN.
        """
        want = len(self.spec.channels[group])
        if x.ndim != 4 or x.shape[1] != want:
            raise ModelError(f"input of shape {tuple(x.shape)}", where=group,
                             allowed=f"(N, {want}, h, w)")  # fmt: skip
        if self._decibel[group]:
            x = 10 * torch.log10(x.clamp_min(_POWER_FLOOR))
        more = [
            ((x[:, a] - x[:, b]) / (x[:, a] + x[:, b]).clamp_min(_EPS)).clamp(-1.5, 1.5)
            for a, b in self._pairs[group]
        ]
        return torch.cat([x, torch.stack(more, 1)], 1) if more else x

    def prepare(self, inputs: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Normalised features and masks per pixel size, padded to whole strides.

        Args:
            inputs: Per modality (N, C, h, w) at its own pixel size, NaN = invalid. A modality may
                be left out: it then counts as invalid everywhere.

        Returns:
            Pixel size factor (1, 2, 6): (N, features + masks, h, w).
        """
        n, height, width = self._size(inputs)
        s = self.stride_px
        h, w = math.ceil(height / s) * s, math.ceil(width / s) * s
        like = next(iter(inputs.values()))
        parts: dict[int, list[Tensor]] = {}
        for g in self._groups:
            f = MODALITY_FACTOR[g]
            mean, std = self.get_buffer(f"mean_{g}"), self.get_buffer(f"std_{g}")
            if g not in inputs:
                x = like.new_zeros((n, mean.shape[1] + 1, h // f, w // f))
            else:
                raw = inputs[g]
                valid = torch.isfinite(raw).to(raw.dtype).mean(1, keepdim=True)
                x = torch.nan_to_num((self.features(g, raw) - mean) / std, 0.0, 0.0, 0.0)
                x = torch.cat([x.clamp(-8, 8), valid], 1)
                x = F.pad(x, (0, w // f - x.shape[3], 0, h // f - x.shape[2]))
            parts.setdefault(f, []).append(x)
        out = {f: torch.cat(p, 1).contiguous(memory_format=torch.channels_last)
               for f, p in parts.items()}  # fmt: skip
        if 1 not in out:
            out[1] = like.new_zeros((n, 1, h, w))
        return out

    def _size(self, inputs: Mapping[str, Tensor]) -> tuple[int, int, int]:
        known = [g for g in self._groups if g in inputs]
        if not known:
            raise ModelError(f"inputs {sorted(inputs)}", allowed=", ".join(self._groups))
        f, x = min(((MODALITY_FACTOR[g], inputs[g]) for g in known), key=lambda p: p[0])
        height, width = f * x.shape[2], f * x.shape[3]
        for g in known:
            k = MODALITY_FACTOR[g]
            want = (math.ceil(height / k), math.ceil(width / k))
            if tuple(inputs[g].shape[2:]) != want:
                raise ModelError(f"window {tuple(inputs[g].shape[2:])}", where=g,
                                 allowed=f"{want} beside {height} x {width} at 10 m")  # fmt: skip
        return x.shape[0], height, width

    # --- network -------------------------------------------------------------------------------
    def trunk(self, x: Mapping[int, Tensor]) -> Tensor:
        """Shared features (N, width, h, w) at 10 m of prepared inputs."""
        skips: list[Tensor] = [self.stem10(x[1])]
        mean, square, rest = x[1], x[1] ** 2, None
        coarse = [x[2]] if 2 in x else []
        if 6 in x:
            coarse.append(F.interpolate(x[6], scale_factor=3, mode="nearest-exact"))
        for down, encode in zip(self.down, self.encode, strict=True):
            # Local mean and spread of the inputs enter every level: a short training need not
            # first learn to average noise away or to measure texture.
            mean, square = F.avg_pool2d(mean, 2), F.avg_pool2d(square, 2)
            spread = (square - mean**2).clamp_min(_EPS**2).sqrt()
            if rest is not None:
                rest = F.avg_pool2d(rest, 2)
            elif coarse:
                rest = torch.cat(coarse, 1)
            parts = [down(skips[-1]), mean, spread]
            skips.append(encode(torch.cat(parts if rest is None else [*parts, rest], 1)))
        f: Tensor = skips[-1]
        for level in reversed(range(self.spec.depth - 1)):
            up = F.interpolate(self.lift[level](f), scale_factor=2, mode="nearest-exact")
            f = self.decode[level](up + skips[level])
        return f

    def forward_prepared(self, x: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs of prepared inputs, (N, c, h, w) with h, w of the padded window."""
        f = self.drop(self.trunk(x))
        return {name: head(f) for name, head in self.heads.items()}

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs per task: logits, or mean and log variance (standardised).

        Args:
            inputs: See :meth:`prepare`; any window size.

        Returns:
            Task name: (N, c, h, w) at 10 m, same window as the inputs.
        """
        _, h, w = self._size(inputs)
        return {k: v[..., :h, :w] for k, v in self.forward_prepared(self.prepare(inputs)).items()}

    @torch.inference_mode()
    def predict(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Physical predictions per task; the network must be in evaluation mode.

        Returns:
            Segmentation: class probabilities (N, K, h, w). Regression: mean and variance in the
            task's unit (N, 2, h, w). Boundary: probability (N, 1, h, w).
        """
        if self.training:
            raise ModelError("the network is in training mode", fix="call .eval() before predict")
        out: dict[str, Tensor] = {}
        for name, raw in self(inputs).items():
            head = self.heads[name]
            if isinstance(head, Head):
                out[name] = head.physical(raw)
        return out


_Span = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _wider(span: _Span, convs: int) -> _Span:
    """Interval of inputs after ``convs`` 3x3 convolutions."""
    lo, hi = span
    for _ in range(convs):
        lo = np.minimum.reduce([lo, np.r_[lo[:1], lo[:-1]]])
        hi = np.maximum.reduce([hi, np.r_[hi[1:], hi[-1:]]])
    return lo, hi


def _union(spans: list[_Span]) -> _Span:
    return np.minimum.reduce([s[0] for s in spans]), np.maximum.reduce([s[1] for s in spans])
