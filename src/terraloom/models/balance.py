"""How the losses of several tasks make one step.

A :class:`Balance` takes the losses of a batch and leaves gradients in the parameters, so that the
training loop need not know which one it is:

- ``equal``: the sum of the losses, each divided by its first value (its unit). Tasks start level
  whatever their scale; a simple baseline that is hard to beat.
- ``uncertainty``: learnt weights exp(-s) with a price of s / 2 each.
- ``famo``: losses that fall slowly gain weight, so that all fall at the same rate.
- ``pcgrad``, ``upgrad``: gradients of tasks that pull the shared layers against each other are
  projected until they do not. Heads keep the gradient of their own task.

References:
    Kendall, Gal, Cipolla (2018), Multi-Task Learning Using Uncertainty to Weigh Losses.
    Liu, Feng, Stone, Liu (2023), FAMO: Fast Adaptive Multitask Optimization.
    Yu et al. (2020), Gradient Surgery for Multi-Task Learning (PCGrad).
    Quinton, Rey (2024), Jacobian Descent for Multi-Objective Optimization (UPGrad).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchjd.aggregation import PCGradWeighting, UPGradWeighting
from torchjd.linalg import DualConeProjector, PSDMatrix

from terraloom.errors import ModelError
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import loss_floor

__all__ = [
    "BALANCES",
    "Balance",
    "Famo",
    "GradientSurgery",
    "NonNegativeProjector",
    "Uncertainty",
    "make_balance",
]

#: Log variances of ``uncertainty`` stay within: weights between 1/55 and 55.
_LOG_VARIANCE = (-4.0, 4.0)
#: A first loss below this is no unit.
_LEAST_UNIT = 1e-3
_EPS = 1e-8

Join = Callable[[Tensor], Tensor]


class Balance:
    """Equal initial losses: the sum of weight x loss / unit. Base of the others.

    The unit of a task is its first loss. A Gaussian log likelihood may start anywhere and become
    negative; its unit is therefore the loss of the constant prediction (.5).

    Args:
        tasks: The tasks, with their weights.

    Attributes:
        units: Unit per task; the first losses fill it.
    """

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        self.tasks = list(tasks)
        self.units: dict[str, float] = {}

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser must learn beside the network, without weight decay."""
        return []

    def backward(
        self,
        losses: Mapping[str, Tensor],
        net: nn.Module,
        *,
        scale: float = 1.0,
        join: Join | None = None,
    ) -> None:
        """Add the gradients of a batch to those of the parameters.

        Args:
            losses: Scalar per task that has a label in the batch; without any nothing happens.
            net: The network; its ``heads`` hold one module per task.
            scale: Factor of all gradients: 1 / batches of a step, times that of mixed precision.
            join: Mean over the processes that train together, of a tensor of gradients; used
                where weights depend on gradients.
        """
        total: Tensor | None = None
        for task, loss in self._present(losses):
            part = loss * (task.weight / self._unit(task, loss))
            total = part if total is None else total + part
        self._descend(total, scale)

    def after_step(self, net: nn.Module, evaluate: Callable[[], Mapping[str, Tensor]]) -> None:
        """Called after a step of the optimiser.

        Args:
            net: The network, changed by the step.
            evaluate: Losses of the batch of the last :meth:`backward` with the changed network;
                called only where they are needed.
        """

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, for a checkpoint."""
        return {f"unit.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.units.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.units.clear()
        for key, value in state.items():
            if key.startswith("unit."):
                self.units[key.removeprefix("unit.")] = float(value)

    def _present(self, losses: Mapping[str, Tensor]) -> list[tuple[TaskSpec, Tensor]]:
        return [(t, losses[t.name]) for t in self.tasks if t.name in losses]

    def _unit(self, task: TaskSpec, loss: Tensor) -> float:
        first = 0.5 if task.loss_name == "gaussian" else max(float(loss.detach()), _LEAST_UNIT)
        return self.units.setdefault(task.name, first)

    def _level(self, losses: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Losses above their floor in their units, by position of the task; all >= 0.

        A Gaussian log likelihood may be negative, where neither a logarithm nor a learnt weight
        makes sense; the shift by its lower bound changes no gradient.
        """
        return {
            i: (losses[t.name] - loss_floor(t)) / self._unit(t, losses[t.name])
            for i, t in enumerate(self.tasks) if t.name in losses
        }  # fmt: skip

    @staticmethod
    def _descend(total: Tensor | None, scale: float) -> None:
        if total is not None:
            (total if scale == 1 else total * scale).backward()  # type: ignore[no-untyped-call]


class Uncertainty(Balance):
    """Learnt log variances s: the sum of weight x (c exp(-s) loss + s / 2).

    c is 1/2 for values and 1 for classes and boundaries; for a loss L that stays as it is the best
    s is ln L or ln 2L. The total may become negative: it says nothing about the fit.

    Args:
        tasks: The tasks.

    Attributes:
        log_variance: (T,) s per task, from 0.
    """

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        super().__init__(tasks)
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks)))

    def parameters(self) -> list[nn.Parameter]:
        """The log variances."""
        return [self.log_variance]

    def backward(
        self,
        losses: Mapping[str, Tensor],
        net: nn.Module,
        *,
        scale: float = 1.0,
        join: Join | None = None,
    ) -> None:
        """See :meth:`Balance.backward`."""
        with torch.no_grad():
            self.log_variance.clamp_(*_LOG_VARIANCE)
        total: Tensor | None = None
        for i, level in self._level(losses).items():
            task, s = self.tasks[i], self.log_variance[i].to(level.device)
            c = 0.5 if task.kind == "regression" else 1.0
            part = task.weight * (c * torch.exp(-s) * level + s / 2)
            total = part if total is None else total + part
        self._descend(total, scale)

    def state(self) -> dict[str, Tensor]:
        """Units and log variances."""
        return super().state() | {"log_variance": self.log_variance.detach().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        super().load(state)
        with torch.no_grad():
            self.log_variance.copy_(state["log_variance"])


class Famo(Balance):
    """Fast adaptive multitask optimisation: one backward pass, log losses weighted by softmax(w).

    After each step w moves towards the tasks whose log loss fell least, by Adam. A task without
    labels in a batch has no part in either. Losses are taken above their lower bound.

    Args:
        tasks: The tasks; their weights enter as log weight + w.
        learning_rate: Of w.
        weight_decay: Of w.

    Attributes:
        logits: (T,) w, from 0.
    """

    def __init__(
        self, tasks: Sequence[TaskSpec], *, learning_rate: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(tasks)
        self.logits = nn.Parameter(torch.zeros(len(self.tasks)))
        self._prior = torch.tensor([t.weight for t in self.tasks]).log()
        self._adam = torch.optim.Adam([self.logits], learning_rate, weight_decay=weight_decay)
        self._before: dict[int, Tensor] = {}

    def backward(
        self,
        losses: Mapping[str, Tensor],
        net: nn.Module,
        *,
        scale: float = 1.0,
        join: Join | None = None,
    ) -> None:
        """See :meth:`Balance.backward`."""
        level = self._level(losses)
        if not level:
            return
        at = list(level)
        log = torch.stack([(v + _EPS).log() for v in level.values()])
        z = (self.logits + self._prior).detach()[at].softmax(0).to(log.device)
        # The sum of the gradients is then a convex combination of those of the losses.
        c = 1 / (z / log.detach().exp()).sum()
        self._before = dict(zip(at, log.detach(), strict=True))
        # Times the number of tasks: steps like those of the sum of the losses.
        self._descend((z * log).sum() * c * len(at), scale)

    def after_step(self, net: nn.Module, evaluate: Callable[[], Mapping[str, Tensor]]) -> None:
        """Evaluate the batch again and move the weights."""
        if not self._before:
            return
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _frozen_statistics(net):
            level = self._level(evaluate())
        at = [i for i in self._before if i in level]
        fell = torch.stack([self._before[i] - (level[i] + _EPS).log() for i in at])
        z = (self.logits + self._prior).detach()[at].softmax(0)
        fell = fell.to(z)
        slope = torch.zeros_like(self.logits)
        slope[at] = z * (fell - (z * fell).sum())
        self.logits.grad = slope
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._before = {}

    def state(self) -> dict[str, Tensor]:
        """Units, w and the moments of its Adam."""
        moments = self._adam.state_dict()["state"].get(0, {})
        own = {f"adam.{k}": v.detach().clone() for k, v in moments.items()}
        return super().state() | own | {"logits": self.logits.detach().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        super().load(state)
        moments = {k[5:]: v.clone() for k, v in state.items() if k.startswith("adam.")}
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict(
            {"state": {0: moments} if moments else {}, "param_groups": groups}
        )
        with torch.no_grad():
            self.logits.copy_(state["logits"])


@contextmanager
def _frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Batch normalisation by the batch, without a trace of it in the running statistics."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
            if m.num_batches_tracked is not None:
                m.num_batches_tracked = m.num_batches_tracked.clone()
        yield
    finally:
        for m, (momentum, tracked) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, tracked


class NonNegativeProjector(DualConeProjector):
    """Projection onto the dual cone of gradients by non-negative least squares.

    The weights of the projection of J'u are the least of v' G v over v >= u (G = J J'); with
    v = u + d and G = A'A that is the least of |A u + A d| over d >= 0.

    Args:
        regularisation: Added to the diagonal of G after division by its trace; with 1e-4 these
            are the values of a quadratic program that needs a definite matrix.
    """

    def __init__(self, regularisation: float = 0.0) -> None:
        self.regularisation = regularisation

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        """Weights of the projections, in the shape of ``U`` (..., m); ``G`` is (m, m)."""
        g = G.detach().cpu().double().numpy()
        trace = float(np.trace(g))
        if not trace > 0:
            return U.clone()
        g = g / trace + self.regularisation * np.eye(len(g))
        # Gradients of length 1: losses of very different slopes would spoil the precision.
        size = np.sqrt(np.diag(g))
        size[size == 0] = 1.0
        values, axes = np.linalg.eigh(g / size / size[:, None])
        a = np.sqrt(np.clip(values, 0, None))[:, None] * axes.T
        u = U.detach().cpu().double().numpy()
        rows = [(v + nnls(a, -a @ v)[0]) / size for v in u.reshape(-1, len(g)) * size]
        return torch.as_tensor(np.stack(rows).reshape(u.shape), dtype=U.dtype, device=U.device)


class GradientSurgery(Balance):
    """Shared parameters get an aggregate of the tasks' gradients, heads the one of their task.

    Where no two tasks pull against each other the step is that of :class:`Balance`. Costs one
    backward pass per task.

    Args:
        tasks: The tasks.
        weighting: Gramian (T, T) of the gradients to weights (T,).
    """

    def __init__(self, tasks: Sequence[TaskSpec], weighting: Callable[[PSDMatrix], Tensor]) -> None:
        super().__init__(tasks)
        self._weighting = weighting

    def backward(
        self,
        losses: Mapping[str, Tensor],
        net: nn.Module,
        *,
        scale: float = 1.0,
        join: Join | None = None,
    ) -> None:
        """See :meth:`Balance.backward`."""
        parts = [
            loss * (task.weight / self._unit(task, loss) * scale)
            for task, loss in self._present(losses)
        ]
        if not parts:
            return
        heads = {id(p) for p in net.get_submodule("heads").parameters()}
        every = [p for p in net.parameters() if p.requires_grad]
        shared = [p for p in every if id(p) not in heads]
        rows: list[Tensor] = []
        for i, part in enumerate(parts):
            slopes = torch.autograd.grad(
                part, every, retain_graph=i + 1 < len(parts), allow_unused=True
            )
            rows.append(torch.cat([
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(every, slopes, strict=True) if id(p) not in heads
            ]))  # fmt: skip
            for p, g in zip(every, slopes, strict=True):
                if id(p) in heads and g is not None:
                    _add(p, g)
        jacobian = torch.stack(rows)
        jacobian = jacobian if join is None else join(jacobian)
        flat = self._weights(jacobian) @ jacobian
        start = 0
        for p in shared:
            _add(p, flat[start : start + p.numel()].view(p.shape))
            start += p.numel()

    def _weights(self, jacobian: Tensor) -> Tensor:
        """Weights (T,) of the rows, in double precision: conflicts are small differences."""
        wide = jacobian.double()
        gramian = wide @ wide.T
        if not bool(torch.isfinite(gramian).all()):
            return torch.ones_like(jacobian[:, 0])  # the loop refuses the step
        weighted: Tensor = self._weighting(gramian)  # type: ignore[arg-type]
        return weighted.to(jacobian)


def _add(p: nn.Parameter, gradient: Tensor) -> None:
    """Add to a parameter's gradient, which lies in memory as the parameter does."""
    g = torch.empty_like(p).copy_(gradient)
    p.grad = g if p.grad is None else p.grad.add_(g)


def _upgrad(gramian: PSDMatrix) -> Tensor:
    """UPGrad of the sum, not the mean: without a conflict all weights are 1."""
    prefer = torch.ones(gramian.shape[0], dtype=gramian.dtype, device=gramian.device)
    weights: Tensor = UPGradWeighting(prefer, projector=NonNegativeProjector())(gramian)
    return weights


def _pcgrad(gramian: PSDMatrix) -> Tensor:
    weights: Tensor = PCGradWeighting()(gramian)
    return weights


BALANCES: dict[str, Callable[[Sequence[TaskSpec]], Balance]] = {
    "equal": Balance,
    "uncertainty": Uncertainty,
    "famo": Famo,
    "pcgrad": lambda tasks: GradientSurgery(tasks, _pcgrad),
    "upgrad": lambda tasks: GradientSurgery(tasks, _upgrad),
}


def make_balance(name: str, tasks: Sequence[TaskSpec]) -> Balance:
    """The balance of a name.

    Args:
        name: A key of :data:`BALANCES`.
        tasks: The tasks; for a single one there is nothing to weigh, and it is always ``equal``.

    Raises:
        ModelError: There is no such balance.
    """
    if name not in BALANCES:
        raise ModelError(f"balance {name!r}", where="model.balance", allowed=", ".join(BALANCES))
    return (BALANCES[name] if len(tasks) > 1 else Balance)(tasks)
