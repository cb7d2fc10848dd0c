"""The training loop: AdamW, one cycle with cosine, a moving average of the weights.

One loop serves one process and several, processors and GPUs, plain and mixed precision, with and
without early stopping. On a processor with plain precision, equal seeds and threads give equal
bytes, also when the training was killed and went on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from terraloom.errors import ModelError
from terraloom.log import get_logger
from terraloom.models.balance import Balance, make_balance
from terraloom.models.devices import choose_device, number_of
from terraloom.models.losses import MultiTaskLoss
from terraloom.models.mapnet import MapNet
from terraloom.train.checkpoint import Checkpoint, Progress, random_states, set_random_states
from terraloom.train.distributed import World, gathered, mean_of, share_gradients, synchronise
from terraloom.train.live import Live
from terraloom.train.sampler import Batch, Prefetch, Sampler

__all__ = ["LoopSettings", "Trained", "follow", "train"]

log = get_logger(__name__)

#: Factor of the gradients in fp16 at first, and steps after which it doubles: trainings are short.
_SCALE, _DOUBLE_AFTER = 1024.0, 100


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop.

    Attributes:
        epochs: Passes over the chips that have labels (count, may be a fraction).
        batch: Windows per forward pass, over all processes (count).
        accumulate: Batches whose gradients make one step (count).
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW, on convolution weights only.
        ema: Decay of the moving average of the weights per step (0-1).
        patience: Epochs without a better score before training ends; 0: never (count).
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        balance: How the losses of several tasks are weighed; see
            :data:`terraloom.models.balance.BALANCES`.
    """

    epochs: float = 12
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    ema: float = 0.97
    patience: int = 0
    precision: str = "auto"
    device: str = "auto"
    balance: str = "equal"


@dataclass(frozen=True)
class Trained:
    """What the loop hands back.

    Attributes:
        state: Averaged weights and statistics.
        history: Loss per task and step (NaN where a batch had no label of the task).
        scores: Score of the validation fold per epoch; empty without early stopping.
        epoch: Epoch whose weights these are, from 1.
    """

    state: dict[str, Tensor]
    history: dict[str, list[float]]
    scores: list[float]
    epoch: int


class _Step:
    """One optimiser step: forward and backward of its batches."""

    def __init__(
        self, net: MapNet, loss: MultiTaskLoss, s: LoopSettings, device: torch.device,
        world: World, balance: Balance,
    ) -> None:  # fmt: skip
        self.net, self.loss, self.world, self.device = net, loss, world, device
        self.balance = balance
        self.share, self.accumulate = world.share(s.batch), s.accumulate
        self.number = number_of(s.precision, device)
        self.scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            device.type, _SCALE, growth_interval=_DOUBLE_AFTER,
            enabled=self.number is torch.float16,
        )  # fmt: skip

    def scale(self) -> float:
        """Factor of the gradients in mixed precision."""
        if not self.scaler.is_enabled():
            return 1.0
        # The scaler sets itself up when it first scales something.
        return float(self.scaler.scale(torch.ones((), device=self.device)))

    def forward(self, batch: Batch, done: float) -> dict[str, Tensor]:
        """Loss of each task over the whole batch."""
        here = batch.to(self.device)
        mixed: AbstractContextManager[object] = nullcontext()
        if self.number is not None:
            mixed = torch.autocast(self.device.type, self.number)
        with mixed:
            raw = self.net.forward_at(
                {f: v[self.share] for f, v in here.x.items()}, here.labelled()[self.share]
            )
        if self.number is not None:
            raw = {k: v.float() for k, v in raw.items()}
        return self.loss.each(gathered(raw, self.world), here.y, here.w, here.soft, done=done)

    def run(
        self, take: Callable[[], Batch], optimiser: torch.optim.Optimizer, done: float
    ) -> tuple[dict[str, float], list[tuple[int, int, int]], bool]:
        """Losses per task, the windows, and whether everything stayed finite."""
        losses: dict[str, list[float]] = {}
        where: list[tuple[int, int, int]] = []
        some, scale = False, self.scale()
        optimiser.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            batch = take()
            where += batch.where
            each = self.forward(batch, done)
            for k, v in each.items():
                losses.setdefault(k, []).append(float(v.detach()))
            if not all(math.isfinite(losses[k][-1]) for k in each):
                return _means(losses), where, False
            some = some or bool(each)
            self.balance.backward(
                each, self.net, scale=scale / self.accumulate,
                join=lambda j: mean_of(j, self.world),
            )  # fmt: skip
        if some:
            share_gradients(self.net.parameters(), self.world)
            self.scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
            # In fp16 a factor that is too large shows so: the step is left out, the factor halved.
            if scale <= 1 and not bool(torch.isfinite(norm)):
                return _means(losses), where, False
            self.scaler.step(optimiser)
            self.scaler.update()
            self.balance.after_step(self.net, lambda: self.forward(batch, done))
        return _means(losses), where, True


def _means(losses: Mapping[str, list[float]]) -> dict[str, float]:
    return {k: sum(v) / len(v) for k, v in losses.items()}


def train(
    net: MapNet,
    sampler: Sampler,
    loss: MultiTaskLoss,
    s: LoopSettings,
    *,
    checkpoint: Checkpoint | None = None,
    score: Callable[[MapNet], float] | None = None,
    world: World | None = None,
    live: Live | None = None,
) -> Trained:
    """Train a network.

    Args:
        net: The network; left with its last weights.
        sampler: Draws the batches.
        loss: The tasks' losses.
        s: Settings.
        checkpoint: Where a killed training goes on.
        score: Score of the averaged network, for early stopping; larger is better.
        world: Processes that train together; default: this one alone.
        live: Shows how far it is.

    Raises:
        ModelError: The loss is no longer finite: names the windows of the batch; the state before
            it is kept in the checkpoint. Or there is no such device.
    """
    device, alone = choose_device(s.device), world or World()
    net.to(device)
    synchronise(net, alone)
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    per_epoch = sampler.crops_per_epoch / (s.batch * s.accumulate)
    steps = max(4, math.ceil(s.epochs * per_epoch))
    # OneCycleLR divides by zero where its rise takes exactly one step.
    rise = 0.2 if steps != 5 else 0.3
    balance = make_balance(s.balance, net.spec.tasks)
    for p in balance.parameters():
        p.data = p.data.to(device)
        rest.append(p)
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=s.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, s.learning_rate, total_steps=steps, pct_start=rise
    )
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    history: dict[str, list[float]] = {t.name: [] for t in net.spec.tasks}
    step_of = _Step(net, loss, s, device, alone, balance)
    probe = copy.deepcopy(net).eval() if score is not None else None
    with Prefetch(sampler, s.batch, pin=device.type == "cuda") as batches:
        now = Progress(net, average, optimiser, schedule, batches, history, balance,
                       step_of.scaler)  # fmt: skip
        if checkpoint is not None:
            checkpoint.restore(now)
        net.train()
        while now.step < steps and not now.ended:
            before = _Before.of(net, batches)
            each, where, finite = step_of.run(batches.take, optimiser, now.step / steps)
            if not finite:
                before.back(net, batches)
                _diverged(now, each, where, checkpoint if alone.rank == 0 else None)
            for name, values in history.items():
                values.append(each.get(name, math.nan))
            schedule.step()
            follow(average, net.state_dict(), min(s.ema, (1 + now.step) / (10 + now.step)))
            now.step += 1
            if score is not None and probe is not None:
                _judge(now, score, probe, per_epoch, steps, s.patience)
            if checkpoint is not None and alone.rank == 0:
                checkpoint.keep(now)
            if live is not None and alone.rank == 0:
                live.tell(now, per_epoch, steps)
    state = now.best if now.best else average
    if not all(bool(torch.isfinite(v).all()) for v in state.values()):
        raise ModelError("training diverged", fix="lower model.learning_rate")
    epoch = now.chosen if now.best else max(1, round(steps / per_epoch))
    return Trained({k: v.cpu() for k, v in state.items()}, history, now.scores, epoch)


@dataclass(frozen=True)
class _Before:
    """What a step changes before it is known to be finite: statistics and random streams."""

    statistics: list[Tensor]
    draws: Tensor
    own: dict[str, Tensor]

    @classmethod
    def of(cls, net: MapNet, batches: Prefetch) -> _Before:
        kept = [b.clone() for b in net.buffers()]
        return cls(kept, batches.get_state(), random_states(net))

    def back(self, net: MapNet, batches: Prefetch) -> None:
        for now, then in zip(net.buffers(), self.statistics, strict=True):
            now.copy_(then)
        batches.set_state(self.draws)
        set_random_states(net, self.own)


def _judge(
    now: Progress,
    score: Callable[[MapNet], float],
    probe: MapNet,
    per_epoch: float,
    steps: int,
    patience: int,
) -> None:
    """At the end of an epoch: score the averaged weights, keep the best, end in time."""
    epoch = now.step / per_epoch
    if int(epoch) <= len(now.scores) and now.step < steps:
        return
    probe.load_state_dict(now.average)
    now.scores.append(score(probe))
    best = max((v for v in now.scores if math.isfinite(v)), default=math.nan)
    if not now.best or now.scores[-1] == best:
        now.best = {k: v.clone() for k, v in now.average.items()}
        now.chosen = len(now.scores)
    now.ended = len(now.scores) - now.chosen >= patience


def _diverged(
    now: Progress,
    each: Mapping[str, float],
    where: list[tuple[int, int, int]],
    checkpoint: Checkpoint | None,
) -> None:
    """Stop: name the windows, keep the state before them."""
    kept = ""
    if checkpoint is not None:
        checkpoint.keep(now, always=True)
        kept = f"; the state before it is kept in {checkpoint.path}"
    text = ", ".join(f"{c} (row {r}, column {k})" for c, r, k in dict.fromkeys(where))
    losses = ", ".join(f"{k} {v:g}" for k, v in each.items())
    raise ModelError(
        f"training diverged at step {now.step + 1}: loss {losses or 'without a gradient'}{kept}",
        where=f"windows of chips {text}", allowed="finite losses and gradients",
        fix="lower model.learning_rate, or look at these chips for extreme values",
    )  # fmt: skip


def follow(average: dict[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    """Move an average of weights and statistics towards a state, in place; counts are copied."""
    for k, v in state.items():
        if v.is_floating_point():
            average[k].lerp_(v.detach(), 1 - decay)
        else:
            average[k].copy_(v)
