"""Batches of augmented windows around labelled pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from terraloom.errors import FoldError, ModelError
from terraloom.models.losses import IGNORE
from terraloom.models.mapnet import MapNet
from terraloom.train.augment import Augmentation, Augmenter
from terraloom.train.pack import Pack

__all__ = ["Batch", "Prefetch", "Sampler"]

#: Crop origins are multiples of this and of all pixel sizes: pixels are cut on their edges.
_LATTICE_PX = 6

Key = TypeVar("Key", int, str)


@dataclass(frozen=True)
class Batch:
    """Some windows.

    Attributes:
        x: Prepared features per pixel size factor (n, features + masks, h, w).
        y: Labels per task (n, h, w).
        w: Pixel weights per task that has them (n, h, w).
        soft: Shares of the classes per task that has them (n, K, h, w), 0-255.
        where: Chip, row and column of each window's upper left corner.
    """

    x: dict[int, Tensor]
    y: dict[str, Tensor]
    w: dict[str, Tensor]
    soft: dict[str, Tensor]
    where: list[tuple[int, int, int]]

    def labelled(self) -> Tensor:
        """(n, h, w) whether a pixel has a label of any task with a weight above 0."""
        found: Tensor | None = None
        for name, y in self.y.items():
            has = y != IGNORE if y.dtype == torch.uint8 else torch.isfinite(y)
            if name in self.w:
                has = has & (self.w[name] > 0)
            found = has if found is None else found | has
        if found is None:
            raise ModelError("a batch without tasks", where="training")
        return found

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        if device.type == "cpu":
            return self
        return self._each(lambda v: v.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads by itself: nothing waits for the copy."""
        return self._each(lambda v: v.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(part: dict[Key, Tensor]) -> dict[Key, Tensor]:
            return {k: change(v) for k, v in part.items()}

        return Batch(changed(self.x), changed(self.y), changed(self.w), changed(self.soft),
                     self.where)  # fmt: skip


class Sampler:
    """Draws batches of augmented windows around labelled training pixels.

    Args:
        net: The network, for its strides and features.
        pack: Features, and labels with held-out pixels already removed.
        crop_px: Height and width of a window, rounded up to whole strides; at most the chip's.
        class_power: A class is drawn with probability proportional to frequency^power.
        augmentation: Random changes.
        generator: Source of randomness.
    """

    def __init__(
        self,
        net: MapNet,
        pack: Pack,
        *,
        crop_px: int,
        class_power: float,
        augmentation: Augmentation,
        generator: torch.Generator,
    ) -> None:
        self._pack = pack
        self._slices = net.feature_slices()
        # With coarse modalities the stride is up to 48: the usual crop of 72 px becomes 96.
        crop_px = math.ceil(crop_px / net.stride_px) * net.stride_px
        self.crop_px = min(crop_px, pack.shape[1], pack.shape[2])
        if self.crop_px % net.stride_px:
            raise ModelError(f"chips of {self.crop_px} px", where="chips.size_px",
                             allowed=f"multiples of {net.stride_px}")  # fmt: skip
        self._lattice = math.lcm(_LATTICE_PX, *pack.x)
        self._flips, self._gen = augmentation.flips, generator
        self._augment = Augmenter(net, augmentation)
        self._pools: list[tuple[Tensor, list[Tensor]]] = []
        for name, groups in pack.pools.items():
            if groups:
                p = torch.tensor([float(n) ** class_power for n in pack.counts[name]])
                self._pools.append((p / p.sum(), groups))
        if not self._pools:
            raise FoldError("no labelled pixel outside the held-out fold", fix="use more labels")

    @property
    def generator(self) -> torch.Generator:
        """Source of randomness of the batches."""
        return self._gen

    @property
    def crops_per_epoch(self) -> int:
        """Windows that cover all chips with a label once."""
        n, h, w = self._pack.shape
        hit = torch.zeros(n, dtype=torch.bool)
        for _, groups in self._pools:
            for g in groups:
                hit[g // (h * w)] = True
        return max(1, round(int(hit.sum()) * (h * w / self.crop_px**2)))

    def start_reduction(self, net: MapNet, keep: Callable[[int], npt.NDArray[np.bool_]]) -> None:
        """Let the reductions of large modalities start at the principal axes of training pixels.

        Neighbouring bands and dates say nearly the same: random sums of them all show brightness,
        and a short training does not find the rest. The first axes are whitened; each enters with
        both signs, as the activation keeps positive values only.

        Args:
            net: The network, before training; one without reductions is left as it is.
            keep: From the number of a chip to (h, w): pixels at 10 m that may be looked at.
        """
        for group, (f, at) in self._slices.items():
            if group not in net.reduce:
                continue
            c = at.stop - 1 - at.start
            moments = torch.zeros((c, c), dtype=torch.float64)
            for number, chip in enumerate(self._pack.x[f]):
                free = keep(number)
                h, w = free.shape
                ok = torch.from_numpy(free.reshape(h // f, f, w // f, f).all((1, 3)))
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

    def _origin(self) -> tuple[int, int, int]:
        probabilities, groups = self._pools[self._int(len(self._pools))]
        group = groups[int(torch.multinomial(probabilities, 1, generator=self._gen))]
        pixel = int(group[self._int(len(group))])
        _, h, w = self._pack.shape
        chip, row, col = pixel // (h * w), pixel // w % h, pixel % w
        start = []
        for at, size in ((row, h), (col, w)):
            low = max(0, at - self.crop_px + 1)
            high = min(at, size - self.crop_px)
            step = self._lattice
            cells = range(-(-low // step), high // step + 1)
            start.append(cells[self._int(len(cells))] * step if cells else low // step * step)
        return chip, start[0], start[1]

    def batch(self, size: int) -> Batch:
        """``size`` windows."""
        pack = self._pack
        xs: dict[int, list[Tensor]] = {f: [] for f in pack.x}
        planes = {"y": pack.y, "w": pack.w, "soft": pack.soft}
        cut: dict[str, dict[str, list[Tensor]]] = {k: {t: [] for t in v} for k, v in planes.items()}
        where = []
        for _ in range(size):
            chip, row, col = self._origin()
            where.append((chip, row, col))
            turn, flip = (self._int(4), self._int(2)) if self._flips else (0, 0)
            for f, src in pack.x.items():
                r, c, n = row // f, col // f, self.crop_px // f
                xs[f].append(_turned(src[chip, :, r : r + n, c : c + n], turn, flip))
            here = np.s_[chip, ..., row : row + self.crop_px, col : col + self.crop_px]
            for k, arrays in planes.items():
                for t, v in arrays.items():
                    cut[k][t].append(_turned(v[here], turn, flip))
        x = {f: torch.stack(v) for f, v in xs.items()}
        self._augment(x, self._gen)
        x = {f: v.contiguous(memory_format=torch.channels_last) for f, v in x.items()}
        y, w, soft = ({t: torch.stack(v) for t, v in cut[k].items()} for k in planes)
        return Batch(x, y, w, soft, where)


def _turned(x: Tensor, turn: int, flip: int) -> Tensor:
    if turn:
        x = torch.rot90(x, turn, (-2, -1))
    return x.flip(-1) if flip else x


class Prefetch:
    """The next batch is drawn while the network works on this one.

    The stream of random numbers is that of the sampler alone; :meth:`get_state` gives its state
    before the batch that has not been asked for yet.

    Args:
        sampler: Draws the batches.
        size: Windows per batch (count).
        pin: Batches are for a GPU; see :meth:`Batch.pinned`.
    """

    def __init__(self, sampler: Sampler, size: int, *, pin: bool = False) -> None:
        self._sampler, self._size, self._pin = sampler, size, pin
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (threads,))
        self._next: Future[Batch] | None = None
        self._state = sampler.generator.get_state()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> Batch:
        """The next batch; the one after it is begun."""
        batch = self._begun().result()
        self._next = None
        self._state = self._sampler.generator.get_state()
        self._begun()
        return batch

    def _begun(self) -> Future[Batch]:
        if self._next is None:
            self._next = self._pool.submit(self._drawn)
        return self._next

    def _drawn(self) -> Batch:
        batch = self._sampler.batch(self._size)
        return batch.pinned() if self._pin else batch

    def get_state(self) -> Tensor:
        """State of the stream before the next batch."""
        return self._state

    def set_state(self, state: Tensor) -> None:
        """Go on from another state of the stream."""
        if self._next is not None:
            self._next.result()
            self._next = None
        self._sampler.generator.set_state(state)
        self._state = state
