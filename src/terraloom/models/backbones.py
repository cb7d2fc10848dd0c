"""Encoders of other libraries in a network for maps: timm and segmentation-models-pytorch.

Of such an encoder the stages of 20 m, 40 m ... are used; a level at 10 m, the decoder and the heads
are ours. All modalities enter its first convolution at 10 m, coarser ones repeated, each with its
mask: any number of bands, and a missing sensor is masked as everywhere.

Prediction stays independent of tiles: what each stage sees is found by following one missing pixel
through the encoder (:func:`encoder_reach`), and the tile is read with a margin that holds it all.
Encoders that look at the window as a whole (squeeze and excitation, attention, norms over the
window) or further than :data:`FARTHEST_PX` are refused.

The libraries are an extra and imported when a network is built. Weights come from a file.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.models.decoders import DECODERS, ConvBlock, Span, union, wider
from terraloom.models.fusion import FusionSpec, Normalisation
from terraloom.models.heads import make_head
from terraloom.models.mapnet import MapNet
from terraloom.models.weights import read_weights
from terraloom.preprocess.groups import group_facts

__all__ = ["FARTHEST_PX", "BackboneNet", "BackboneSpec", "Encoder", "encoder_reach"]

#: Farthest that an encoder may look (10 m pixels): tiles are read with a margin as wide.
FARTHEST_PX = 512
#: Positions within a stride at which :func:`encoder_reach` looks, at most (count).
_PROBES = 8
#: Bands of published first convolutions, by their number: radar, colours, Sentinel-2 L2A and L1C.
_S2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
_ORDERS: dict[int, tuple[str, ...]] = {
    2: ("VV", "VH"),
    3: ("B04", "B03", "B02"),
    12: tuple(b for b in _S2 if b != "B10"),
    13: _S2,
}


@dataclass(frozen=True)
class BackboneSpec(FusionSpec):
    """All that is needed to build the network again.

    Attributes:
        backbone: Name of an encoder of timm or, where timm has none of this name, of
            segmentation-models-pytorch.
    """

    backbone: str = "resnet18"


class Encoder(nn.Module):
    """The stages of an encoder that have pixels of 2, 4, 8 ... times the input's.

    Args:
        name: See :class:`BackboneSpec`.
        c_in: Channels of the input (count).
        depth: Levels, that of the input included; stages beyond are left out (count).

    Attributes:
        channels: Channels of each level that the encoder has, by level; 1 has pixels of twice the
            input's (counts).

    Raises:
        ModelError: The libraries are not installed, or have no such encoder.
    """

    def __init__(self, name: str, c_in: int, depth: int) -> None:
        super().__init__()
        self.c_in = c_in
        timm, where = _library("timm", name), f"backbone {name}"
        #: Level of each output of the body; None is not used.
        self._levels: list[int | None]
        self.body: nn.Module
        if timm.is_model(name):
            self.body, self._levels, counts = _of_timm(timm, name, c_in, depth)
        else:
            smp = _library("segmentation_models_pytorch", name)
            if name not in smp.encoders.encoders and not name.startswith("tu-"):
                raise ModelError(
                    "no such encoder", where=where,
                    allowed="names that timm.list_models() or "
                    "segmentation_models_pytorch.encoders.get_encoder_names() give",
                )  # fmt: skip
            made = smp.encoders.get_encoder(name, in_channels=c_in, depth=depth - 1, weights=None)
            self.body, counts = made, list(made.out_channels)
            # A level without channels is one that the encoder skips.
            self._levels = [i if i and c else None for i, c in enumerate(counts)]
        self.channels = {
            level: c for level, c in zip(self._levels, counts, strict=True) if level is not None
        }
        if not self.channels:
            raise ModelError(f"no stage with pixels of 20 m to {10 * 2 ** (depth - 1)} m",
                             where=where, allowed="encoders with stages of 2, 4, 8 ... pixels",
                             fix="raise model.depth, or take another backbone")  # fmt: skip

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Features (N, channels[l], h / 2^l, w / 2^l) by level of (N, c_in, h, w)."""
        return {
            level: f for level, f in zip(self._levels, self.body(x), strict=True)
            if level is not None
        }  # fmt: skip

    def first(self) -> nn.Conv2d:
        """The convolution that sees the input."""
        return next(m for m in self.body.modules()
                    if isinstance(m, nn.Conv2d) and m.in_channels == self.c_in)  # fmt: skip


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as err:  # torchvision of another torch: RuntimeError
        raise ModelError(
            f"{module.replace('_', '-')} cannot be imported ({err})", where=f"backbone {name}",
            fix="pip install 'terraloom[backbones]', or choose another model.network",
        ) from err  # fmt: skip


def _of_timm(
    timm: Any, name: str, c_in: int, depth: int
) -> tuple[nn.Module, list[int | None], list[int]]:
    """A pyramid without the stages that are too coarse; the level and channels of each stage."""
    try:
        with torch.device("meta"):
            shape = timm.create_model(name, pretrained=False, features_only=True).feature_info
        at = {
            int(math.log2(r)): i for i, r in enumerate(shape.reduction())
            if r in [2**level for level in range(1, depth)]
        }  # fmt: skip
        given: list[int] = sorted(at.values())
        body = timm.create_model(
            name, pretrained=False, features_only=True, in_chans=c_in,
            out_indices=given or [0],
        )  # fmt: skip
    except (RuntimeError, AttributeError, AssertionError, TypeError) as err:
        raise ModelError(f"timm gives no pyramid of it ({err})", where=f"backbone {name}",
                         fix="take a convolutional encoder") from err  # fmt: skip
    levels: list[int | None] = [k for k, i in sorted(at.items(), key=lambda p: p[1])]
    return body, levels or [None], list(body.feature_info.channels())


@lru_cache(maxsize=64)
def encoder_reach(name: str, depth: int) -> dict[int, tuple[int, int]]:
    """How far each level of an encoder looks to both sides of the first pixel of its own.

    One pixel of the input is missing (NaN), and what it touches is missing thereafter: no weight
    can hide a path, as it can from a gradient. In double precision, as fast algorithms of single
    precision compute neighbours together.

    Args:
        name: See :class:`BackboneSpec`.
        depth: See :class:`Encoder`.

    Returns:
        Level: pixels before and after (10 m). Exact up to level 3, less than 2^level / 8 too many
        beyond.

    Raises:
        ModelError: It looks further than :data:`FARTHEST_PX`, or at the window as a whole.
    """
    with torch.random.fork_rng(devices=[]):
        net = Encoder(name, 1, depth).double().eval()
    stride = 2 ** (depth - 1)
    step = max(1, stride // _PROBES)
    far = 64
    while far < FARTHEST_PX:
        far *= 2
        half = math.ceil(far / stride) * stride
        at = [half + k for k in range(0, stride, step)]
        x = torch.zeros((len(at), 1, 2 * half + stride, stride), dtype=torch.float64)
        x[range(len(at)), 0, at, 0] = math.nan
        try:
            with torch.inference_mode():
                found = net(x)
        except (RuntimeError, AssertionError, ValueError) as err:
            raise ModelError(f"it takes no window of any size ({err})", where=f"backbone {name}",
                             fix="take a convolutional encoder") from err  # fmt: skip
        sides = {level: _sides(f, level, at) for level, f in found.items()}
        if all(s is not None for s in sides.values()):
            return {level: s for level, s in sides.items() if s is not None}
    raise ModelError(
        f"it looks further than {FARTHEST_PX} pixels, or at the window as a whole (squeeze and "
        "excitation, attention): the map would depend on its tiles",
        where=f"backbone {name}, depth {depth}",
        allowed="convolutional encoders, such as resnet18, resnet50, mobilenetv2_100, vgg11_bn",
        fix="lower model.depth, or take another backbone",
    )


def _sides(f: Tensor, level: int, at: Sequence[int]) -> tuple[int, int] | None:
    """Pixels before and after, as small as the probes can tell; None: up to the border."""
    size, last = 2**level, f.shape[2] - 1
    before, after = [], []
    for part, p in zip(f, at, strict=True):
        touched = torch.nonzero(part.isnan().any(0).any(1))[:, 0]
        if not len(touched) or int(touched.min()) == 0 or int(touched.max()) == last:
            return None
        before.append(size * (int(touched.max()) + 1) - 1 - p)
        after.append(p - size * (int(touched.min()) - 1) - 1)
    return min(before), min(after)


class BackboneNet(MapNet):
    """An encoder of another library, our level at 10 m, decoder and heads.

    Args:
        spec: Modalities, tasks, encoder and size; ``widths`` are those of the decoder.
        normalisation: Per modality; without it features pass as they are (mean 0, sd 1).

    Raises:
        ModelError: The encoder cannot be had, or looks too far.
    """

    spec: BackboneSpec

    def __init__(
        self, spec: BackboneSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        super().__init__(spec, normalisation)
        w = spec.widths
        self.reduce = nn.ModuleDict()
        c_in = sum(self._features(g) for g in self._groups)
        self._sides = encoder_reach(spec.backbone, spec.depth)
        self.encoder = Encoder(spec.backbone, c_in, spec.depth)
        self.stem10 = ConvBlock(c_in, w[0], 3)
        found = self.encoder.channels
        self.join = nn.ModuleList(
            ConvBlock(found[level], w[level], 1) if level in found
            # Some encoders begin with pixels four times as large.
            else ConvBlock(w[level - 1], w[level], 2, stride=2)
            for level in range(1, spec.depth)
        )  # fmt: skip
        self.decoder = DECODERS[spec.decoder](w)
        self.drop = nn.Dropout2d(spec.dropout)
        self.heads = nn.ModuleDict({t.name: make_head(t, w[0]) for t in spec.tasks})

    # --- weights -------------------------------------------------------------------------------
    def load_pretrained(self, path: Path | str) -> list[nn.Parameter]:
        """Put published weights of the encoder into it.

        The first convolution is made for our channels: each takes the kernel of its own band where
        the file has it, else the mean of all kernels, times bands in the file by bands here, so
        that sums stay as large. Masks start at 0.

        Args:
            path: State dict of the encoder in safetensors or torch format; heads and prefixes of
                names do not matter. Files of timm, torchvision and torchgeo fit where the encoder
                has the same name.

        Returns:
            The parameters that come from the file.

        Raises:
            ModelError: No such file, or it is not of this encoder.
        """
        fix = f"give a file with the weights of {self.spec.backbone}"
        given = {_plain(k): v for k, v in _inner(read_weights(path, fix)).items()}
        first = self.encoder.first()
        own = self.encoder.body.state_dict()
        name = next(k for k, p in self.encoder.body.named_parameters() if p is first.weight)
        prefix = _prefix(given, [_plain(k) for k in own])
        state: dict[str, Tensor] = {}
        wrong = []
        for k, v in own.items():
            new = given.get(prefix + _plain(k))
            if k == name and isinstance(new, Tensor) and new.ndim == 4:
                new = self._adapted(new)
            if isinstance(new, Tensor) and new.shape == v.shape:
                state[k] = new
            elif not k.endswith("num_batches_tracked"):
                wrong.append(k)
        if wrong:
            raise ModelError(
                f"{len(wrong)} of {len(own)} weights are missing or do not fit, the first is "
                f"{wrong[0]}", where=str(path), allowed=f"weights of {self.spec.backbone}", fix=fix,
            )  # fmt: skip
        self.encoder.body.load_state_dict(state, strict=False)
        return list(self.encoder.body.parameters())

    def _adapted(self, kernels: Tensor) -> Tensor:
        """Kernels (out, bands, k, k) of a file for our channels (out, c_in, k, k)."""
        order = _ORDERS.get(kernels.shape[1], ())
        mean, parts, values = kernels.mean(1), [], 0
        for f in sorted(set(self._factor.values())):
            for g in (g for g in self._groups if self._factor[g] == f):
                roles = self.spec.roles.get(g, group_facts(g, {}).roles)
                bands = [n.rpartition("/")[2] for n in self.spec.channels[g]]
                for band in bands:
                    band = roles.get(band, band)
                    parts.append(kernels[:, order.index(band)] if band in order else mean)
                parts += [mean] * len(self._pairs[g])
                values += len(bands) + len(self._pairs[g])
                parts.append(torch.zeros_like(mean))
        return torch.stack(parts, 1) * (kernels.shape[1] / values)

    # --- geometry ------------------------------------------------------------------------------
    @property
    def stride_px(self) -> int:
        """Tile origins must be multiples of this many 10 m pixels for exact tiled prediction."""
        return math.lcm(*self._factor.values(), 2 ** (self.spec.depth - 1))

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees.

        Exact as far as :func:`encoder_reach` is.
        """
        n = self.stride_px * 64
        at = np.arange(n)
        spans: list[Span] = [wider((at, at))]
        for level in range(1, self.spec.depth):
            if level in self._sides:
                before, after = self._sides[level]
                spans.append((at[:: 2**level] - before, at[:: 2**level] + after))
            else:
                lo, hi = spans[-1]
                spans.append((lo[0::2], hi[1::2]))
        lo, hi = self.decoder.reach(spans)
        lo, hi = union([(lo // f * f, hi // f * f + f - 1) for f in self._factor.values()])
        middle = slice(n // 2 - self.stride_px, n // 2 + self.stride_px)
        return int(max((at - lo)[middle].max(), (hi - at)[middle].max()))

    # --- network -------------------------------------------------------------------------------
    def forward_prepared(self, x: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs of prepared inputs, (N, c, h, w) with h, w of the padded window."""
        fine = torch.cat([
            x[f] if f == 1 else F.interpolate(x[f], scale_factor=f, mode="nearest-exact")
            for f in sorted(set(self._factor.values()))
        ], 1)  # fmt: skip
        levels = [self.stem10(fine)]
        found = self.encoder(fine)
        for level, join in enumerate(self.join, start=1):
            levels.append(join(found.get(level, levels[-1])))
        f = self.drop(self.decoder(levels))
        return {name: head(f) for name, head in self.heads.items()}


def _plain(key: str) -> str:
    """Timm joins the names of nested modules by an underscore where it makes a pyramid of them."""
    return key.replace("_", ".")


def _inner(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a checkpoint that holds other things beside them."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), Mapping):
            return {str(k): v for k, v in state[key].items()}
    return state


def _prefix(given: Mapping[str, Any], own: Sequence[str]) -> str:
    """What stands before the encoder's names in a file: the prefix that finds most of them."""
    ends = [k for k in given if k.endswith(own[0])]
    prefixes = [k[: len(k) - len(own[0])] for k in ends]
    return max(["", *prefixes], key=lambda p: sum(p + k in given for k in own))
