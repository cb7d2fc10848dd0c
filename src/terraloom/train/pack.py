"""Training data in packed arrays: prepared features, labels and weights of all chips.

The arrays lie in memory, or in files that are mapped into it: then 100,000 chips need no more
memory than 1,000. The system keeps of the files what fits beside everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.models.mapnet import MapNet
from terraloom.train.windows import inputs_of, labels_of

__all__ = ["Pack", "Positions", "array_in", "blocks_of", "pack_chips", "pack_labels"]

#: Chips that are read and prepared at once (count).
_BLOCK = 16
#: Positions of labelled pixels that are kept per class (count); beyond, a random part of them.
_MOST = 500_000

Keep = Callable[[slice, xr.Dataset], npt.NDArray[np.bool_]]


@dataclass
class Positions:
    """Positions of pixels, all of them or, beyond ``most``, a random part without bias.

    Attributes:
        most: How many are kept at most (count).
        seed: Of the choice.
        count: How many there were.
    """

    most: int = _MOST
    seed: int = 0
    count: int = 0
    _parts: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _kept: int = 0
    _share: float = 1.0

    def add(self, at: npt.NDArray[np.int64]) -> None:
        """More positions, ascending."""
        rng = np.random.default_rng([self.seed, self.count])
        self.count += len(at)
        if self._share < 1:
            at = at[rng.random(len(at)) < self._share]
        self._parts.append(at)
        self._kept += len(at)
        while self._kept > 2 * self.most:
            # Each position stays with the same probability, whenever it came.
            self._share /= 2
            self._parts = [p[rng.random(len(p)) < 0.5] for p in self._parts]
            self._kept = sum(len(p) for p in self._parts)

    def array(self) -> npt.NDArray[np.int64]:
        """The positions, ascending."""
        whole = np.concatenate(self._parts) if self._parts else np.zeros(0, np.int64)
        if len(whole) > self.most:
            rng = np.random.default_rng([self.seed, self.count, 1])
            whole = np.sort(rng.choice(whole, self.most, replace=False))
        return whole


@dataclass(frozen=True)
class Pack:
    """What training draws windows from.

    Attributes:
        x: Per pixel size factor (N, features + masks, h, w) float32, as ``prepare`` gives them.
        y: Per task (N, h, w): class, 255 none; or value, NaN none. Held-out labels are none.
        w: Per task with weights (N, h, w) float32.
        soft: Per task with shares (N, K, h, w) uint8, share of each class in 1/255.
        pools: Per task and class (one pool for values): flat positions of labelled pixels.
        counts: Per task, labelled pixels of each pool (count).
        classes: Per task, the class of each pool; -1 for values.
    """

    x: dict[int, Tensor]
    y: dict[str, Tensor]
    w: dict[str, Tensor]
    soft: dict[str, Tensor]
    pools: dict[str, list[Tensor]]
    counts: dict[str, list[int]]
    classes: dict[str, list[int]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Chips, height and width at 10 m."""
        n, h, w = next(iter(self.y.values())).shape
        return int(n), int(h), int(w)

    def class_counts(self, task: TaskSpec) -> npt.NDArray[np.int64]:
        """(K,) labelled pixels of each class of a segmentation task."""
        out = np.zeros(len(task.classes), np.int64)
        out[self.classes[task.name]] = self.counts[task.name]
        return out

    def values(self, task: TaskSpec) -> Tensor:
        """(S,) labelled values of a task, weight above 0; of very many a random part."""
        at = torch.cat([*self.pools[task.name], torch.zeros(0, dtype=torch.int64)])
        values = self.y[task.name].reshape(-1)[at]
        if task.name in self.w:
            values = values[self.w[task.name].reshape(-1)[at] > 0]
        return values


def blocks_of(chips: xr.Dataset) -> Iterator[tuple[slice, xr.Dataset]]:
    """Chips a few at a time, read into memory."""
    for start in range(0, chips.sizes["n"], _BLOCK):
        at = slice(start, start + _BLOCK)
        yield at, chips.isel(n=at).load()


def pack_labels(
    chips: xr.Dataset,
    tasks: Sequence[TaskSpec],
    keep: Keep,
    *,
    erode_px: int = 0,
    weights: Mapping[str, npt.NDArray[np.float32]] | None = None,
    folder: Path | None = None,
) -> Pack:
    """Labels and weights of the pixels that may be trained on; no features yet.

    Args:
        chips: ``y_<task>``, ``fold``, optional ``w_<task>``.
        tasks: Tasks whose labels are wanted.
        keep: From rows and their chips to (n, h, w): pixels whose label may be used.
        erode_px: See :func:`terraloom.train.windows.labels_of`.
        weights: Pixel weights (N, h, w) per task in place of those of the chips.
        folder: Where the arrays lie; None: in memory.

    Returns:
        A pack whose ``x`` is empty.
    """
    y: dict[str, npt.NDArray[Any]] = {}
    w: dict[str, npt.NDArray[Any]] = {}
    soft: dict[str, npt.NDArray[Any]] = {}
    pools: dict[str, dict[int, Positions]] = {t.name: {} for t in tasks}
    given = weights or {}
    size = chips["fold"].shape
    names = [str(v) for v in chips.variables if not str(v).startswith("x_")]
    for at, part in blocks_of(chips[names]):
        part = part.assign({
            f"w_{name}": (("n", "y_10", "x_10"), v[at]) for name, v in given.items()
        })  # fmt: skip
        labels, each = labels_of(part, tasks, keep(at, part), erode_px=erode_px)
        start = at.start * size[1] * size[2]
        for name, v in labels.items():
            if name not in y:
                y[name] = array_in(size, v.numpy().dtype, folder, f"y-{name}")
            y[name][at] = v.numpy()
            _note(pools[name], v.numpy().ravel(), start)
        for name, v in each.items():
            if name not in w:
                w[name] = array_in(size, v.numpy().dtype, folder, f"w-{name}")
            w[name][at] = v.numpy()
        for name in (t.name for t in tasks if f"s_{t.name}" in part):
            share = part[f"s_{name}"].values
            if name not in soft:
                soft[name] = array_in((size[0], *share.shape[1:]), share.dtype, folder, f"s-{name}")
            soft[name][at] = share
    order = {name: sorted(each) for name, each in pools.items()}
    return Pack(
        {}, {k: torch.from_numpy(v) for k, v in y.items()},
        {k: torch.from_numpy(v) for k, v in w.items()},
        {k: torch.from_numpy(v) for k, v in soft.items()},
        {n: [torch.from_numpy(pools[n][k].array()) for k in order[n]] for n in order},
        {n: [pools[n][k].count for k in order[n]] for n in order}, order,
    )  # fmt: skip


def _note(pools: dict[int, Positions], flat: npt.NDArray[Any], start: int) -> None:
    if flat.dtype == np.uint8:
        for k in np.unique(flat):
            if k != IGNORE:
                pools.setdefault(int(k), Positions(seed=int(k))).add(
                    np.flatnonzero(flat == k) + start
                )
    elif np.isfinite(flat).any():
        pools.setdefault(-1, Positions()).add(np.flatnonzero(np.isfinite(flat)) + start)


def pack_chips(net: MapNet, chips: xr.Dataset, labels: Pack, *, folder: Path | None = None) -> Pack:
    """A pack with the prepared features of all chips beside its labels.

    Args:
        net: The network, for its normalisation and pixel sizes.
        chips: ``x_<group>`` (N, C, h, w).
        labels: Labels of the same chips.
        folder: Where the arrays lie; None: in memory.
    """
    x: dict[int, npt.NDArray[Any]] = {}
    names = [str(v) for v in chips.variables if str(v).startswith("x_")]
    for at, part in blocks_of(chips[names]):
        with torch.inference_mode():
            ready = {f: v.numpy() for f, v in net.prepare(inputs_of(part)).items()}
        for f, v in ready.items():
            if f not in x:
                # Channels last: a window then is a few long runs of bytes.
                _, c, h, w = v.shape
                x[f] = array_in((chips.sizes["n"], h, w, c), v.dtype, folder, f"x-{f}")
            x[f][at] = v.transpose(0, 2, 3, 1)
    features = {f: torch.from_numpy(v).permute(0, 3, 1, 2) for f, v in x.items()}
    return replace(labels, x=features)


def array_in(
    shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path | None, name: str
) -> npt.NDArray[Any]:
    """An array without values yet, in memory or, with a folder, in a file mapped into it."""
    if folder is None:
        return np.empty(shape, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return np.memmap(folder / f"{name}.bin", dtype, "w+", shape=shape)
