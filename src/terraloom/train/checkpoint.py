"""Where a training stands, so that a killed one goes on as if nothing had happened.

One safetensors file holds weights, their moving average, the optimiser's moments and the states of
both random streams; its header holds, as JSON, the step, the schedule and the history. Nothing in
it is executable. It is written atomically, so there is always a whole one or none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from terraloom.io import atomic
from terraloom.log import get_logger
from terraloom.models.balance import Balance

__all__ = ["Checkpoint", "Progress", "random_states", "set_random_states"]

log = get_logger(__name__)


class Stream(Protocol):
    """A stream of random numbers whose state can be taken and set."""

    def get_state(self) -> Tensor:
        """Where it stands."""

    def set_state(self, state: Tensor) -> object:
        """Go on from there."""


def random_states(net: torch.nn.Module) -> dict[str, Tensor]:
    """States of torch's own random streams that a network draws from, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    device = next(net.parameters()).device
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(net: torch.nn.Module, states: Mapping[str, Tensor]) -> None:
    """Let a network draw on from :func:`random_states`; of another kind of device, anew."""
    torch.set_rng_state(states["cpu"])
    device = next(net.parameters()).device
    if device.type in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@dataclass
class Progress:
    """All that a training changes from step to step.

    Attributes:
        net: The network.
        average: Moving average of its state.
        optimiser: The optimiser.
        schedule: The schedule of the learning rate.
        draws: Random stream of the batches; dropout draws from torch's own stream.
        history: Loss per task and step.
        balance: How the losses are weighed; holds the first loss of each task.
        scaler: Factor of the gradients in fp16.
        step: Steps that are done.
        scores: Score of the validation fold per epoch.
        best: Averaged state of the best epoch; empty without early stopping.
        chosen: That epoch, from 1.
        ended: Early stopping has ended it.
    """

    net: torch.nn.Module
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    draws: Stream
    history: dict[str, list[float]]
    balance: Balance
    scaler: torch.amp.GradScaler  # type: ignore[name-defined]
    step: int = 0
    scores: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    chosen: int = 0
    ended: bool = False


@dataclass
class Checkpoint:
    """The file of one training.

    Attributes:
        path: The file.
        origin: Digest of data, settings and code; a file of another origin is not used.
        every_s: Least time between two writes, seconds.
    """

    path: Path
    origin: str
    every_s: float = 30.0
    _last: float = field(default_factory=time.monotonic)

    def keep(self, now: Progress, *, always: bool = False) -> None:
        """Write the state when the last write is long enough ago, or always."""
        if not always and time.monotonic() - self._last < self.every_s:
            return
        tensors = {f"net.{k}": v for k, v in now.net.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in now.average.items()}
        tensors |= {f"best.{k}": v for k, v in now.best.items()}
        tensors |= {f"balance.{k}": v for k, v in now.balance.state().items()}
        moments = now.optimiser.state_dict()
        for i, values in moments["state"].items():
            tensors |= {f"moment.{i}.{k}": v for k, v in values.items()}
        tensors |= {f"random.{k}": v for k, v in random_states(now.net).items()}
        tensors["draws"] = now.draws.get_state()
        header = {
            "origin": self.origin, "step": now.step, "history": now.history,
            "groups": moments["param_groups"], "schedule": now.schedule.state_dict(),
            "scores": now.scores, "chosen": now.chosen, "ended": now.ended,
            "scaler": now.scaler.state_dict(),
        }  # fmt: skip
        with atomic(self.path) as tmp:
            save_file(
                {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, tmp,
                metadata={"state": json.dumps(header)},
            )  # fmt: skip
        self._last = time.monotonic()

    def restore(self, now: Progress) -> None:
        """Bring a training to where its file stands; without a fitting file it starts anew."""
        found = self._read()
        if found is None:
            return
        header, tensors = found

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        now.net.load_state_dict(part("net."))
        for key, value in part("average.").items():
            now.average[key].copy_(value)
        like = next(iter(now.average.values()))
        now.best = {k: v.to(like.device) for k, v in part("best.").items()}
        now.scores, now.chosen = header["scores"], int(header["chosen"])
        now.ended = bool(header["ended"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("moment.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        now.optimiser.load_state_dict({"state": state, "param_groups": header["groups"]})
        # Moments lie in memory as their weights do: another layout rounds differently.
        for weight, values in now.optimiser.state.items():
            for name, value in values.items():
                if value.shape == weight.shape:
                    values[name] = torch.empty_like(weight).copy_(value).detach()
        now.schedule.load_state_dict(header["schedule"])
        if header["scaler"] and now.scaler.is_enabled():
            now.scaler.load_state_dict(header["scaler"])
        set_random_states(now.net, part("random."))
        now.draws.set_state(tensors["draws"])
        now.history.update(header["history"])
        now.balance.load(part("balance."))
        now.step = int(header["step"])
        log.info("%s: training goes on at step %d", self.path, now.step)

    def remove(self) -> None:
        """Take the file away; the training is finished."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:  # type: ignore[no-untyped-call]
                header = json.loads(file.metadata()["state"])
                if header["origin"] != self.origin:
                    log.info("%s: of other data or settings, not used", self.path)
                    return None
                return header, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as err:
            log.warning("%s cannot be read (%s); training starts anew", self.path, err)
            return None
