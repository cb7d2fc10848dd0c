"""What chips hold for a network: inputs, labels, normalisation, and the network that fits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy import ndimage
from torch import Tensor

from terraloom.errors import ModelError
from terraloom.models.fusion import FusionNet, FusionSpec, Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.models.registry import make_spec
from terraloom.preprocess.groups import GroupFacts, group_factor, group_facts, group_order

__all__ = ["inputs_of", "labels_of", "modalities_of", "normalisation_of", "spec_of", "units_of"]

#: Normalisation looks at this many chips at most (count): the memory it needs is bounded.
_NORMAL_CHIPS = 512


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


def spec_of(
    chips: xr.Dataset, tasks: Sequence[TaskSpec], network: str = "fusion", **settings: Any
) -> FusionSpec:
    """The network that fits chips: channels, spectral roles and signs of their modalities.

    Args:
        chips: The chips; attributes of ``x_<group>`` as in
            :func:`terraloom.preprocess.groups.group_facts`; attribute ``days`` of the chips, the
            day of each period since 1970-01-01.
        tasks: What the heads predict.
        network: One of :data:`terraloom.models.registry.ARCHITECTURES`.
        settings: Further fields of :class:`FusionSpec`, such as ``width``.
    """
    channels = modalities_of(chips)
    facts = {g: _facts(chips, g) for g in channels}
    signed = {g: _signed(chips, g, channels[g]) for g in channels if facts[g].unit == "power"}
    return make_spec(
        network, channels, tasks, days=chips.attrs.get("days"),
        roles={g: f.roles for g, f in facts.items() if f.roles},
        signed={g: names for g, names in signed.items() if names}, **settings,
    )  # fmt: skip


def units_of(chips: xr.Dataset) -> dict[str, str]:
    """Unit of each modality, such as ``reflectance`` or ``power``."""
    return {g: _facts(chips, g).unit for g in modalities_of(chips)}


def _facts(chips: xr.Dataset, group: str) -> GroupFacts:
    return group_facts(group, chips[f"x_{group}"].attrs)


def _signed(chips: xr.Dataset, group: str, names: Sequence[str]) -> tuple[str, ...]:
    """Channels with negative values: no power, like the off-diagonal elements of PolSAR."""
    values = _some(chips)[f"x_{group}"].values
    return tuple(n for i, n in enumerate(names) if bool((values[:, i] < 0).any()))


def inputs_of(chips: xr.Dataset, at: slice | Sequence[int] | None = None) -> dict[str, Tensor]:
    """Inputs of chips as tensors, per modality (N, C, h, w)."""
    part = chips if at is None else chips.isel(n=at)
    return {
        g: torch.from_numpy(np.ascontiguousarray(part[f"x_{g}"].values, dtype=np.float32))
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
    value gets centre 0 and spread 1; a constant one spread 1. Of very many chips a random part is
    looked at.
    """
    chips = _some(chips)
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


def _some(chips: xr.Dataset) -> xr.Dataset:
    """The chips, or a random part of very many."""
    n = chips.sizes["n"]
    if n <= _NORMAL_CHIPS:
        return chips
    rows = np.random.default_rng(n).choice(n, _NORMAL_CHIPS, replace=False)
    return chips.isel(n=np.sort(rows))


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
        here = keep
        if f"w_{task.name}" in chips:
            weight = np.nan_to_num(np.array(chips[f"w_{task.name}"].values, dtype=np.float32))
            w[task.name] = torch.from_numpy(weight)
            here = keep & (weight > 0)  # no weight is no label
        if task.classed:
            values[~here | (values >= len(task.classes))] = IGNORE
            if erode_px > 0 and task.kind == "segmentation":
                values = _erode(values, erode_px)
        else:
            values = values.astype(np.float32)
            values[~here] = np.nan
        y[task.name] = torch.from_numpy(values)
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
