"""Training data in memory: prepared features, labels of the training folds, augmented crops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy import ndimage
from torch import Tensor

from terraloom.errors import FoldError, ModelError
from terraloom.models.fusion import FusionNet, FusionSpec, Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.preprocess.groups import GroupFacts, group_factor, group_facts, group_order

__all__ = [
    "Augmentation",
    "Sampler",
    "inputs_of",
    "labels_of",
    "modalities_of",
    "normalisation_of",
    "spec_of",
]

#: Crop origins are multiples of this and of all pixel sizes: pixels are cut on their edges.
_LATTICE_PX = 6


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training windows, in the normalised feature scale (1 = training sd).

    Attributes:
        gain: Half-width of a common gain per window and modality (ratio).
        bias: Standard deviation of a shift per window and feature (sd).
        drop_feature: Probability that a feature becomes its mean.
        drop_modality: Probability that a modality becomes invalid, mask included. One modality is
            always kept.
        flips: Flips and rotations by 90 degrees.
    """

    gain: float = 0.05
    bias: float = 0.03
    drop_feature: float = 0.01
    drop_modality: float = 0.02
    flips: bool = True


def _groups_of(chips: xr.Dataset) -> list[str]:
    return group_order(
        str(v)[2:] for v in chips.variables if str(v).startswith("x_") and chips[v].ndim == 4
    )


def modalities_of(chips: xr.Dataset) -> dict[str, tuple[str, ...]]:
    """Channel names per modality of a chips dataset."""
    groups = _groups_of(chips)
    if not groups:
        raise ModelError(
            "chips without inputs", allowed="variables x_<group>, (N, C, h, w)",
            fix="cut the chips again",
        )  # fmt: skip
    out: dict[str, tuple[str, ...]] = {}
    for g in groups:
        names = chips.coords.get(f"channel_{g}")
        out[g] = (
            tuple(f"c{i}" for i in range(chips[f"x_{g}"].shape[1]))
            if names is None
            else tuple(str(n) for n in names.values)
        )
    return out


def spec_of(chips: xr.Dataset, tasks: Sequence[TaskSpec], **settings: Any) -> FusionSpec:
    """The network that fits chips: channels, spectral roles and signs of their modalities.

    Args:
        chips: The chips; attributes of ``x_<group>`` as in
            :func:`terraloom.preprocess.groups.group_facts`.
        tasks: What the heads predict.
        settings: Further fields of :class:`FusionSpec`, such as ``width``.
    """
    channels = modalities_of(chips)
    facts = {g: _facts(chips, g) for g in channels}
    signed = {g: _signed(chips, g, channels[g]) for g in channels if facts[g].unit == "power"}
    return FusionSpec(
        channels, tuple(tasks), roles={g: f.roles for g, f in facts.items() if f.roles},
        signed={g: names for g, names in signed.items() if names}, **settings,
    )  # fmt: skip


def _facts(chips: xr.Dataset, group: str) -> GroupFacts:
    return group_facts(group, chips[f"x_{group}"].attrs)


def _signed(chips: xr.Dataset, group: str, names: Sequence[str]) -> tuple[str, ...]:
    """Channels with negative values: no power, like the off-diagonal elements of PolSAR."""
    values = chips[f"x_{group}"].values
    return tuple(n for i, n in enumerate(names) if bool((values[:, i] < 0).any()))


def inputs_of(chips: xr.Dataset, at: slice | Sequence[int] | None = None) -> dict[str, Tensor]:
    """Inputs of chips as tensors, per modality (N, C, h, w)."""
    rows = slice(None) if at is None else at
    return {
        g: torch.from_numpy(np.ascontiguousarray(chips[f"x_{g}"].values[rows], dtype=np.float32))
        for g in _groups_of(chips)
    }


def _held_out(
    fold: npt.NDArray[np.uint8], held_out_fold: int, factor: int
) -> npt.NDArray[np.bool_]:
    """Cells of a pixel size that contain a pixel of the held-out fold, (N, h/f, w/f)."""
    n, h, w = fold.shape
    out: npt.NDArray[np.bool_] = (
        (fold == held_out_fold).reshape(n, h // factor, factor, w // factor, factor).any((2, 4))
    )
    return out


def normalisation_of(
    chips: xr.Dataset, spec: FusionSpec, held_out_fold: int
) -> dict[str, Normalisation]:
    """Centre and spread of each feature over valid pixels outside the held-out fold.

    Modalities whose unit is linear ``power`` are turned into decibels. A feature without a valid
    value gets centre 0 and spread 1; a constant one spread 1.
    """
    fold = np.asarray(chips["fold"].values, dtype=np.uint8)
    plain = FusionNet(replace(spec, width=4, depth=2, widths=()))
    out: dict[str, Normalisation] = {}
    for g, x in inputs_of(chips).items():
        keep = torch.from_numpy(~_held_out(fold, held_out_fold, group_factor(g)))
        decibel = _facts(chips, g).unit == "power"
        plain.set_decibel(g, decibel)
        mean, std = [], []
        for f in plain.features(g, x).unbind(1):
            centre, spread = _robust(f[keep & torch.isfinite(f)].numpy())
            mean.append(centre)
            std.append(spread)
        out[g] = Normalisation(tuple(mean), tuple(std), decibel)
    return out


def _robust(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Median and half the 16-84 % range: for a Gaussian its mean and standard deviation.

    Clouds and haze that a mask missed would stretch moments until land differences vanish.
    """
    if not len(values):
        return 0.0, 1.0
    low, mid, high = (float(q) for q in np.percentile(values, (15.87, 50.0, 84.13)))
    return mid, (high - low) / 2 if high - low > 2e-6 else 1.0


def labels_of(
    chips: xr.Dataset,
    tasks: Sequence[TaskSpec],
    keep: npt.NDArray[np.bool_],
    *,
    erode_px: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Labels (N, h, w) per task where ``keep`` is true, unlabelled elsewhere, and pixel weights.

    Args:
        chips: The chips.
        tasks: Tasks whose labels are wanted.
        keep: (N, h, w) pixels whose label may be used.
        erode_px: Class labels closer than this to another class are left out (pixels).
    """
    y: dict[str, Tensor] = {}
    w: dict[str, Tensor] = {}
    for task in tasks:
        name = f"y_{task.name}"
        if name not in chips:
            raise ModelError(f"chips without labels {name}", where=f"task {task.name}")
        values = np.array(chips[name].values)
        if task.kind == "segmentation":
            values[~keep | (values >= len(task.classes))] = IGNORE
            if erode_px > 0:
                values = _erode(values, erode_px)
        else:
            values = values.astype(np.float32)
            values[~keep] = np.nan
        y[task.name] = torch.from_numpy(values)
        if f"w_{task.name}" in chips:
            weight = np.nan_to_num(np.array(chips[f"w_{task.name}"].values, dtype=np.float32))
            w[task.name] = torch.from_numpy(weight)
    return y, w


def _erode(values: npt.NDArray[Any], px: int) -> npt.NDArray[Any]:
    """Labels without the pixels within ``px`` of a different label (no label is no difference)."""
    out = values.copy()
    size = (1, 2 * px + 1, 2 * px + 1)
    low = np.where(values == IGNORE, 255, values)
    high = np.where(values == IGNORE, 0, values)
    mixed = ndimage.minimum_filter(low, size) != ndimage.maximum_filter(high, size)
    out[mixed & (values != IGNORE)] = IGNORE
    return out


class Sampler:
    """Draws batches of augmented crops around labelled training pixels.

    Args:
        net: The network, for its normalisation and strides.
        chips: The chips.
        y: Labels per task with held-out pixels already removed.
        w: Pixel weights per task, where given.
        crop_px: Height and width of a crop, rounded up to whole strides; at most the chip's.
        class_power: A class is drawn with probability proportional to frequency^power.
        augmentation: Random changes.
        generator: Source of randomness.
    """

    def __init__(
        self,
        net: FusionNet,
        chips: xr.Dataset,
        y: Mapping[str, Tensor],
        w: Mapping[str, Tensor],
        *,
        crop_px: int,
        class_power: float,
        augmentation: Augmentation,
        generator: torch.Generator,
    ) -> None:
        with torch.inference_mode():
            # Prepared once: normalisation of the same pixels in every step would double the cost.
            self._x = {f: x.clone() for f, x in net.prepare(inputs_of(chips)).items()}
        self._x = {f: torch.from_numpy(x.numpy()) for f, x in self._x.items()}
        self._slices = net.feature_slices()
        self._y, self._w = dict(y), dict(w)
        first = next(iter(self._y.values()))
        self._shape = tuple(first.shape)
        # With coarse modalities the stride is up to 48: the usual crop of 72 px becomes 96.
        crop_px = math.ceil(crop_px / net.stride_px) * net.stride_px
        self.crop_px = min(crop_px, self._shape[1], self._shape[2])
        if self.crop_px % net.stride_px:
            raise ModelError(f"chips of {self.crop_px} px", where="chips.size_px",
                             allowed=f"multiples of {net.stride_px}")  # fmt: skip
        self._lattice = math.lcm(_LATTICE_PX, *self._x)
        self._aug, self._gen = augmentation, generator
        self._pools = self._pools_of(class_power)
        if not self._pools:
            raise FoldError("no labelled pixel outside the held-out fold", fix="use more labels")

    def _pools_of(self, power: float) -> list[tuple[Tensor, list[Tensor]]]:
        """Per task: probabilities of its groups and the flat pixel positions of each group."""
        pools = []
        for y in self._y.values():
            flat = y.reshape(-1)
            if flat.dtype == torch.uint8:
                groups = [
                    torch.nonzero(flat == int(k))[:, 0]
                    for k in np.unique(flat.numpy())
                    if k != IGNORE
                ]
            else:
                groups = [g for g in [torch.nonzero(torch.isfinite(flat))[:, 0]] if len(g)]
            if groups:
                p = torch.tensor([float(len(g)) ** power for g in groups])
                pools.append((p / p.sum(), groups))
        return pools

    @property
    def generator(self) -> torch.Generator:
        """Source of randomness of the batches."""
        return self._gen

    @property
    def crops_per_epoch(self) -> int:
        """Crops that cover all chips with a label once."""
        hit = torch.zeros(self._shape[0], dtype=torch.bool)
        for _, groups in self._pools:
            for g in groups:
                hit[g // (self._shape[1] * self._shape[2])] = True
        area = self._shape[1] * self._shape[2] / self.crop_px**2
        return max(1, round(int(hit.sum()) * area))

    def start_reduction(self, net: FusionNet, keep: npt.NDArray[np.bool_]) -> None:
        """Let the reductions of large modalities start at the principal axes of training pixels.

        Neighbouring bands and dates say nearly the same: random sums of them all show brightness,
        and a short training does not find the rest. The first axes are whitened; each enters with
        both signs, as the activation keeps positive values only.

        Args:
            net: The network, before training; one without reductions is left as it is.
            keep: (N, h, w) pixels at 10 m that may be looked at.
        """
        for group, (f, at) in self._slices.items():
            if group not in net.reduce:
                continue
            n, h, w = keep.shape
            free = torch.from_numpy(keep.reshape(n, h // f, f, w // f, f).all((2, 4)))
            c = at.stop - 1 - at.start
            moments = torch.zeros((c, c), dtype=torch.float64)
            for chip, ok in zip(self._x[f], free, strict=True):
                seen = chip[at, : ok.shape[0], : ok.shape[1]]
                pixels = seen[:-1, ok & (seen[-1] > 0)].double()
                moments += pixels @ pixels.T
            conv = net.get_submodule(f"reduce.{group}.0")
            weight = conv.get_parameter("weight")
            half = weight.shape[0] // 2
            values, axes = torch.linalg.eigh(moments)
            values, axes = values[-half:].flip(0), axes[:, -half:].flip(1)
            values = (values / moments.trace().clamp_min(1e-12) * c).clamp_min(1e-6)
            # The sign of an axis is arbitrary: settled, so that machines agree.
            axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
            start = (axes / values.sqrt()).T.to(weight.dtype)
            with torch.no_grad():
                weight[: 2 * half] = 0.0
                weight[: 2 * half, :-1, 0, 0] = torch.cat([start, -start])

    def _int(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self._gen))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._gen)

    def _origin(self) -> tuple[int, int, int]:
        probabilities, groups = self._pools[self._int(len(self._pools))]
        group = groups[int(torch.multinomial(probabilities, 1, generator=self._gen))]
        pixel = int(group[self._int(len(group))])
        _, h, w = self._shape
        chip, row, col = pixel // (h * w), pixel // w % h, pixel % w
        start = []
        for at, size in ((row, h), (col, w)):
            low = max(0, at - self.crop_px + 1)
            high = min(at, size - self.crop_px)
            step = self._lattice
            cells = range(-(-low // step), high // step + 1)
            start.append(cells[self._int(len(cells))] * step if cells else low // step * step)
        return chip, start[0], start[1]

    def batch(self, size: int) -> tuple[dict[int, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Prepared inputs, labels and pixel weights of ``size`` crops."""
        xs: dict[int, list[Tensor]] = {f: [] for f in self._x}
        ys: dict[str, list[Tensor]] = {t: [] for t in self._y}
        ws: dict[str, list[Tensor]] = {t: [] for t in self._w}
        for _ in range(size):
            chip, row, col = self._origin()
            turn, flip = (self._int(4), self._int(2)) if self._aug.flips else (0, 0)
            for f, src in self._x.items():
                r, c, n = row // f, col // f, self.crop_px // f
                xs[f].append(_turned(src[chip, :, r : r + n, c : c + n], turn, flip))
            here = np.s_[chip, row : row + self.crop_px, col : col + self.crop_px]
            for t, y in self._y.items():
                ys[t].append(_turned(y[here], turn, flip))
            for t, w in self._w.items():
                ws[t].append(_turned(w[here], turn, flip))
        x = {f: torch.stack(v) for f, v in xs.items()}
        self._jitter(x)
        x = {f: v.contiguous(memory_format=torch.channels_last) for f, v in x.items()}
        labels = {t: torch.stack(v) for t, v in ys.items()}
        return x, labels, {t: torch.stack(v) for t, v in ws.items()}

    def _jitter(self, x: dict[int, Tensor]) -> None:
        """Gain, bias and dropout of features and modalities, in place."""
        a = self._aug
        n = next(iter(x.values())).shape[0]
        lost = self._uniform(n, len(self._slices)) < a.drop_modality
        lost[lost.all(1)] = False
        for i, (f, at) in enumerate(self._slices.values()):
            values = x[f][:, at.start : at.stop - 1]
            mask = x[f][:, at.stop - 1 : at.stop]
            c = values.shape[1]
            gain = 1 + a.gain * (2 * self._uniform(n, 1, 1, 1) - 1)
            bias = a.bias * torch.randn((n, c, 1, 1), generator=self._gen)
            kept = (self._uniform(n, c, 1, 1) >= a.drop_feature).to(values.dtype)
            here = (~lost[:, i]).to(values.dtype)[:, None, None, None]
            # The bias must not fill invalid pixels: there the value stays the training mean.
            values.mul_(gain).add_(bias * (mask > 0)).mul_(kept * here)
            mask.mul_(here)


def _turned(x: Tensor, turn: int, flip: int) -> Tensor:
    if turn:
        x = torch.rot90(x, turn, (-2, -1))
    return x.flip(-1) if flip else x
