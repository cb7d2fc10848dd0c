"""What all networks for maps share: inputs at their own pixel sizes, geometry, prediction.

A network for maps takes groups of bands (modalities) at the pixel sizes they were measured with
and gives predictions at 10 m. Training and prediction use nothing of it but :class:`MapNet`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from terraloom.errors import ModelError
from terraloom.models.heads import Head
from terraloom.preprocess.groups import group_factor, group_order

if TYPE_CHECKING:
    from terraloom.models.fusion import FusionSpec, Normalisation

__all__ = ["EPS", "FEATURES", "MapNet", "PartSpec"]

#: Key of the features beside the tasks in a prediction; no task can have this name.
FEATURES = ".features"

#: Floor of denominators and of local standard deviations.
EPS = 1e-3
#: Floor of linear backscatter before decibels: -50 dB, far below the noise floor of Sentinel-1.
_POWER_FLOOR = 1e-5
#: Values of a modality that are prepared at once (count): about a megabyte.
_STRIP_VALUES = 250_000


class PartSpec(Protocol):
    """What is known of the parts of the features.

    Attributes:
        channels: Channel names (``step/band`` or ``band``) per part.
        roles: Per part, band: the Sentinel-2 band that it is like.
    """

    @property
    def channels(self) -> Mapping[str, Sequence[str]]:
        """Channel names per part."""

    @property
    def roles(self) -> Mapping[str, Mapping[str, str]]:
        """Roles of the bands per part."""

    def pairs(self, group: str) -> list[tuple[int, int]]:
        """Positions of the channels of a part whose normalised differences follow them."""


class MapNet(nn.Module):
    """A network from modalities of several resolutions to one map per task.

    Invalid values are NaN in the inputs. Each part of the features (:meth:`feature_slices`) brings
    a mask feature, the valid share of its channels, and NaN becomes the training mean.

    Args:
        spec: Modalities, tasks and size.
        normalisation: Per modality; without it features pass as they are (mean 0, sd 1).

    Attributes:
        spec: All that is needed to build the network again.
        reduce: Reductions of large modalities, by the name of their features' part.
        heads: One head per task.
    """

    spec: FusionSpec
    reduce: nn.ModuleDict
    heads: nn.ModuleDict

    def __init__(
        self, spec: FusionSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self._groups = group_order(spec.channels)
        self._factor = {g: group_factor(g) for g in self._groups}
        self._pairs = {g: spec.pairs(g) for g in self._groups}
        self._decibel: dict[str, bool] = {}
        for g in self._groups:
            n = len(spec.channels[g]) + len(self._pairs[g])
            norm = normalisation[g] if normalisation else None
            mean, std = (norm.mean, norm.std) if norm else ((0.0,) * n, (1.0,) * n)
            if len(mean) != n or len(std) != n:
                raise ModelError(f"{len(mean)} means for {n} features", where=g)
            self._decibel[g] = norm is not None and norm.decibel
            self.register_buffer(f"mean_{g}", torch.tensor(mean).view(1, -1, 1, 1))
            self.register_buffer(f"std_{g}", torch.tensor(std).view(1, -1, 1, 1))

    # --- what each network says for itself -----------------------------------------------------
    @property
    def stride_px(self) -> int:
        """Tile origins must be multiples of this many 10 m pixels for exact tiled prediction."""
        raise NotImplementedError

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees."""
        raise NotImplementedError

    def forward_prepared(self, x: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs of prepared inputs, (N, c, h, w) with h, w of the padded window."""
        raise NotImplementedError

    def load_pretrained(self, path: Path | str) -> list[nn.Parameter]:
        """Put published weights into a part of the network.

        Returns:
            The parameters that come from the file and are trained.

        Raises:
            ModelError: No weights are published for this network, or the file does not fit.
        """
        raise ModelError(f"weights {path} for a network without published ones",
                         where=type(self).__name__, allowed="networks presto and backbone",
                         fix="leave model.weights out")  # fmt: skip

    def forward_at(self, x: Mapping[int, Tensor], wanted: Tensor) -> dict[str, Tensor]:
        """:meth:`forward_prepared` where only some pixels count, as in training.

        Args:
            x: Prepared inputs.
            wanted: (N, h, w) of bool; what the outputs are elsewhere does not matter.
        """
        return self.forward_prepared(x)

    # --- geometry ------------------------------------------------------------------------------
    def halo_px(self) -> int:
        """Receptive field rounded up to :attr:`stride_px`: read this much around a tile."""
        return math.ceil(self.receptive_field_px() / self.stride_px) * self.stride_px

    def _features(self, group: str) -> int:
        """Features of a modality with its mask, before any reduction."""
        return len(self.spec.channels[group]) + len(self._pairs[group]) + 1

    def _places(self) -> dict[str, tuple[int, slice]]:
        """Per modality: pixel size factor and where its features stand in :meth:`prepare`."""
        out: dict[str, tuple[int, slice]] = {}
        used: dict[int, int] = {}
        for g in self._groups:
            f = self._factor[g]
            start = used.get(f, 0)
            used[f] = start + self._features(g)
            out[g] = (f, slice(start, used[f]))
        return out

    def feature_slices(self) -> dict[str, tuple[int, slice]]:
        """Per part of the features: pixel size factor and its place in :meth:`prepare`, mask last.

        The parts are the modalities; of networks over time ``modality@date``.
        """
        return self._places()

    def part_spec(self) -> PartSpec:
        """What the parts of :meth:`feature_slices` hold."""
        return self.spec

    def set_decibel(self, group: str, decibel: bool) -> None:
        """Say whether a modality is linear power that is turned into decibels."""
        self._decibel[group] = decibel

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
            power, signed = 10 * torch.log10(x.clamp_min(_POWER_FLOOR)), self._signed(group)
            x = torch.where(signed.to(x.device), x, power) if bool(signed.any()) else power
        more = [
            ((x[:, a] - x[:, b]) / (x[:, a] + x[:, b]).clamp_min(EPS)).clamp(-1.5, 1.5)
            for a, b in self._pairs[group]
        ]
        return torch.cat([x, torch.stack(more, 1)], 1) if more else x

    def _signed(self, group: str) -> Tensor:
        names = self.spec.signed.get(group, ())
        return torch.tensor([n in names for n in self.spec.channels[group]]).view(1, -1, 1, 1)

    def prepare(self, inputs: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Normalised features and masks per pixel size, padded to whole strides.

        Args:
            inputs: Per modality (N, C, h, w) at its own pixel size, NaN = invalid. A modality may
                be left out: it then counts as invalid everywhere.

        Returns:
            Pixel size factor (1, 2, 6 ...): (N, features + masks, h, w).
        """
        n, height, width = self._size(inputs)
        s = self.stride_px
        h, w = math.ceil(height / s) * s, math.ceil(width / s) * s
        like = next(iter(inputs.values()))
        totals: dict[int, int] = {}
        for f, at in self._places().values():
            totals[f] = max(totals.get(f, 0), at.stop)
        out = {
            f: torch.empty(
                (n, c, h // f, w // f), dtype=like.dtype, device=like.device,
                memory_format=torch.channels_last,
            ).zero_()
            for f, c in totals.items()
        }  # fmt: skip
        for g, (f, at) in self._places().items():
            if g in inputs:
                self._fill(out[f][:, at], g, inputs[g])
        if not any(f % 2 for f in out):  # something must enter at 10 m
            out[1] = like.new_zeros((n, 1, h, w))
        return out

    def _fill(self, out: Tensor, group: str, raw: Tensor) -> None:
        """Write normalised features and mask of a modality, in strips that stay in cache."""
        mean, std = self.get_buffer(f"mean_{group}"), self.get_buffer(f"std_{group}")
        rows = max(1, _STRIP_VALUES // (raw.shape[0] * out.shape[1] * raw.shape[3]))
        for start in range(0, raw.shape[2], rows):
            part = raw[:, :, start : start + rows]
            if all(math.isfinite(v) for v in (part.amax().item(), part.amin().item())):
                valid = torch.ones_like(part, dtype=torch.bool)
            else:  # an infinity must not become a large, valid number
                valid = torch.isfinite(part)
                part = part.masked_fill(~valid, math.nan)
            x = self.features(group, part).sub(mean).div_(std)
            x = x.nan_to_num_(0.0, 0.0, 0.0).clamp_(-8, 8)
            self._write(out[:, :, start : start + part.shape[2], : raw.shape[3]], group, x, valid)

    def _write(self, out: Tensor, group: str, x: Tensor, valid: Tensor) -> None:
        """Put features (N, features, h, w) and the mask of valid channels (N, C, h, w) in place."""
        out[:, :-1] = x
        out[:, -1] = valid.to(x.dtype).mean(1)

    def _size(self, inputs: Mapping[str, Tensor]) -> tuple[int, int, int]:
        known = [g for g in self._groups if g in inputs]
        if not known:
            raise ModelError(f"inputs {sorted(inputs)}", allowed=", ".join(self._groups))
        f, x = min(((self._factor[g], inputs[g]) for g in known), key=lambda p: p[0])
        height, width = f * x.shape[2], f * x.shape[3]
        for g in known:
            k = self._factor[g]
            want = (math.ceil(height / k), math.ceil(width / k))
            if tuple(inputs[g].shape[2:]) != want:
                raise ModelError(f"window {tuple(inputs[g].shape[2:])}", where=g,
                                 allowed=f"{want} beside {height} x {width} at 10 m")  # fmt: skip
        return x.shape[0], height, width

    # --- use -----------------------------------------------------------------------------------
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
    def predict(
        self, inputs: Mapping[str, Tensor], *, describe: bool = False, logits: bool = False
    ) -> dict[str, Tensor]:
        """Physical predictions per task; the network must be in evaluation mode.

        Args:
            inputs: See :meth:`prepare`; they are moved to where the network is.
            describe: Also give the features that the heads make it all of.
            logits: Give logits of classes, whose softmax over K are the probabilities.

        Returns:
            On the network's device. Segmentation: class probabilities (N, K, h, w). Regression:
            mean and variance in the task's unit (N, 2, h, w), of heads of quantiles also the
            outer two. Boundary: probability (N, 1, h, w). :data:`FEATURES`: (N, D, h, w).
        """
        if self.training:
            raise ModelError("the network is in training mode", fix="call .eval() before predict")
        out: dict[str, Tensor] = {}
        device = next(self.parameters()).device
        moved = {g: x.to(device, non_blocking=True) for g, x in inputs.items()}
        with self._watched(describe) as seen:
            raws = self(moved)
        for name, raw in raws.items():
            head: Any = self.heads[name]
            if isinstance(head, Head):
                raw = raw.float()  # of bf16 they would not sum to 1
                out[name] = raw if logits and head.task.classed else head.physical(raw)
        for features in seen:
            _, h, w = self._size(inputs)
            out[FEATURES] = features[..., :h, :w].float()
        return out

    @contextmanager
    def _watched(self, watch: bool) -> Iterator[list[Tensor]]:
        """What the first head is given in this thread; others may predict at the same time."""
        seen: list[Tensor] = []
        if not watch:
            yield seen
            return
        me = get_ident()

        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if get_ident() == me:
                seen.append(given[0])

        hook = next(iter(self.heads.values())).register_forward_pre_hook(note)
        try:
            yield seen
        finally:
            hook.remove()
