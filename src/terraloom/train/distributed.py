"""Several processes that train one network: the same steps as one process with the whole batch.

Every process draws the same batch, sends its share of it through the network, and gets the outputs
of all the others. So each of them computes the loss of the whole batch: a loss that is normalised
by valid pixels, picks pixels or looks at the whole batch needs no special case. Batch
normalisation uses the statistics of the whole batch too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from terraloom.errors import ModelError

__all__ = [
    "World",
    "gathered",
    "join_world",
    "leave_world",
    "mean_of",
    "share_gradients",
    "synchronise",
]


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: Number of this one, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, batch: int) -> slice:
        """Rows of a batch that this process sends through the network."""
        if batch % self.size:
            raise ModelError(
                f"a batch of {batch} windows for {self.size} processes", where="model.batch",
                allowed="a multiple of model.processes",
            )  # fmt: skip
        each = batch // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def join_world(device: torch.device) -> World:
    """The processes that ``torchrun`` has started; one alone without it.

    Each takes a GPU of its own.

    Raises:
        ModelError: Fewer GPUs than processes on this machine.
    """
    if "WORLD_SIZE" not in os.environ:
        return World()
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= gpus:
            raise ModelError(
                f"process {here + 1} on a machine with {gpus} GPUs", where="model.processes",
                allowed=f"1 to {gpus} with model.device: cuda", fix="set model.device to cpu",
            )  # fmt: skip
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def leave_world() -> None:
    """Wait for the others and part from them."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gathered(outputs: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Outputs (n, ...) of all processes, in the order of the batch, with their gradients."""
    if world.size == 1:
        return outputs
    return {k: _all_gather(v.contiguous()) for k, v in outputs.items()}


class _Gather(torch.autograd.Function):
    """Outputs of all processes; backwards the sum of what each of them found for ours.

    torch's own version mixes up the pixels of gradients that are not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


class _Sum(torch.autograd.Function):
    """Sum over the processes, whose losses all count; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


def _sum(x: Tensor) -> Tensor:
    out: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return out


def _all_gather(x: Tensor) -> Tensor:
    out: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return out


def mean_of(x: Tensor, world: World) -> Tensor:
    """Mean of a tensor over the processes."""
    if world.size > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= world.size
    return x


def share_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Mean over the processes of the gradients of the whole batch's loss, in place.

    Each process has the loss of the whole batch, so the backward pass of :func:`gathered` has
    counted each window once per process.
    """
    if world.size == 1:
        return
    mine = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in mine])
    dist.all_reduce(flat)
    flat /= world.size
    start = 0
    for g in mine:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


def synchronise(net: nn.Module, world: World) -> None:
    """Let batch normalisation see the whole batch; torch's own does so on GPUs only."""
    if world.size == 1:
        return
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _SharedNorm


class _SharedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        z = x.double()
        n = torch.full((1,), x.numel() / x.shape[1], dtype=z.dtype, device=x.device)
        sums = torch.cat([z.sum((0, 2, 3)), (z * z).sum((0, 2, 3)), n])
        sums = _sum(sums)
        c, n = x.shape[1], sums[-1]
        mean = sums[:c] / n
        var = (sums[c : 2 * c] / n - mean**2).clamp_min(0)
        with torch.no_grad():
            rate = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), rate)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = (var + self.eps).rsqrt().to(x)
        out: Tensor = (x - mean.to(x)[:, None, None]) * scale[:, None, None]
        out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out
