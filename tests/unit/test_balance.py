"""Balance of several losses: published fixtures, closed forms, exact resume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGradWeighting, UPGradWeighting
from torchjd.scalarization import FAMO

from terraloom.errors import ModelError
from terraloom.models.balance import (
    BALANCES,
    Balance,
    Famo,
    NonNegativeProjector,
    Uncertainty,
    make_balance,
)
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import MultiTaskLoss

COVER = TaskSpec("cover", "segmentation", ("a", "b", "c"))
HEIGHT = TaskSpec("height", "regression", weight=0.5)
EDGE = TaskSpec("edge", "boundary", weight=2.0)
TASKS = (COVER, HEIGHT, EDGE)
E8 = (
    ([[-4.0, 1, 1], [6, 1, 1]], [0.292902, 1.900352, 1.900352], [0.584795, 3.801170, 3.801170]),
    ([[1.0, 0], [-0.5, 1]], [0.399962, 0.699964], [0.8, 1.4]),
)


class Net(nn.Module):
    """A trunk with batch norm and dropout, and heads."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.trunk = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                       nn.Dropout(0.2))  # fmt: skip
            self.unused = nn.Parameter(torch.ones(2))
            self.heads = nn.ModuleDict({t.name: nn.Conv2d(4, t.raw_channels, 1) for t in TASKS})
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = self.trunk(x)
        return {k: h(f) for k, h in self.heads.items()}


def batch(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 2, 6, 6), generator=g)
    y = {"cover": (x[:, 0] > 0).to(torch.uint8), "height": x[:, 1] - x[:, 0],
         "edge": (x[:, 1] > 0.3).float()}  # fmt: skip
    return x, y


def gradients(name: str, net: Net, losses: dict[str, Tensor], **kw: object) -> dict[str, Tensor]:
    net.zero_grad(set_to_none=True)
    make_balance(name, TASKS).backward(losses, net, **kw)  # type: ignore[arg-type]
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def losses_of(net: Net, seed: int = 0) -> dict[str, Tensor]:
    x, y = batch(seed)
    torch.manual_seed(3)
    return MultiTaskLoss(TASKS).each(net(x), y)


# --- gradient surgery --------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "upgrad", "pcgrad"), E8)
def test_published_aggregates(rows: list[list[float]], upgrad: list[float],
                              pcgrad: list[float]) -> None:  # fmt: skip
    """Values of torchjd with its own projector, which regularises by 1e-4."""
    j = torch.tensor(rows, dtype=torch.float64)
    up = UPGradWeighting(projector=NonNegativeProjector(1e-4))(j @ j.T) @ j
    assert up.tolist() == pytest.approx(upgrad, abs=2e-6)
    assert (PCGradWeighting()(j @ j.T) @ j).tolist() == pytest.approx(pcgrad, abs=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_upgrad_descends_every_task(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t = int(rng.integers(2, 6))
    rows = rng.normal(size=(t, 7)) * np.exp(rng.normal(size=(t, 1)) * 3)
    if seed % 3 == 0:
        rows[-1] = -rows[0]  # a Gramian without inverse, and a direct conflict
    j = torch.from_numpy(rows)
    w = UPGradWeighting(projector=NonNegativeProjector())(j @ j.T)
    step = (j @ (w @ j)) / j.norm(dim=1)
    assert float(step.min()) >= -1e-9 * float(j.norm())
    projected = NonNegativeProjector()(torch.eye(t, dtype=j.dtype), j @ j.T)
    assert (projected >= torch.eye(t) - 1e-12).all()


def test_without_a_conflict_a_projection_changes_nothing() -> None:
    j = torch.tensor([[1.0, 0.2], [0.1, 3.0]], dtype=torch.float64)
    assert torch.allclose(NonNegativeProjector()(torch.eye(2).double(), j @ j.T),
                          torch.eye(2).double(), atol=1e-12)  # fmt: skip
    zero = torch.zeros((2, 2), dtype=torch.float64)
    assert torch.equal(NonNegativeProjector()(torch.eye(2).double(), zero), torch.eye(2).double())


class Two(nn.Module):
    """Two tasks on one shared weight vector, with a head each."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.heads = nn.ModuleDict({"a": nn.Linear(1, 1).double(), "b": nn.Linear(1, 1).double()})


@pytest.mark.parametrize("name", ["pcgrad", "upgrad"])
def test_surgery_is_on_shared_parameters_only(name: str) -> None:
    tasks = (TaskSpec("a", "boundary"), TaskSpec("b", "boundary"))
    rows, net, balance = torch.tensor(E8[0][0]).double(), Two(), make_balance(name, tasks)
    heads = [net.heads[k].bias for k in "ab"]
    # Both losses are 1 at the start, so that the rows are the gradients of the units.
    losses = {k: 1 + rows[i] @ net.w + (i + 2) * (heads[i] - heads[i].detach()).sum()
              for i, k in enumerate("ab")}  # fmt: skip
    balance.backward(losses, net)
    want = E8[0][2] if name == "pcgrad" else 2 * np.array(E8[0][1])
    assert net.w.grad.tolist() == pytest.approx(list(want), abs=2e-3)
    assert [float(h.grad) for h in heads] == pytest.approx([2, 3])
    assert (rows @ net.w.grad).min() > -1e-9


@pytest.mark.parametrize("name", ["pcgrad", "upgrad"])
def test_aligned_tasks_give_the_step_of_the_sum(name: str) -> None:
    net = Net()
    one = losses_of(net)["cover"]
    losses = {"cover": one, "height": 3 * one, "edge": one * 1}
    equal = gradients("equal", net, {k: v * 1 for k, v in losses.items()} | {})
    one = losses_of(net)["cover"]
    found = gradients(name, net, {"cover": one, "height": 3 * one, "edge": one * 1})
    for k, g in equal.items():
        assert torch.allclose(found[k], g, rtol=1e-4, atol=1e-6), k
    assert found["trunk.0.weight"].stride() == net.trunk[0].weight.stride()


@pytest.mark.parametrize("name", ["pcgrad", "upgrad"])
def test_what_processes_join_is_weighed(name: str) -> None:
    net, seen = Net(), []

    def join(j: Tensor) -> Tensor:
        seen.append(j.shape)
        return 2 * j

    plain = gradients(name, net, losses_of(net))
    joined = gradients(name, net, losses_of(net), join=join)
    shared = sum(p.numel() for k, p in net.named_parameters() if not k.startswith("heads"))
    assert seen == [(3, shared)]
    assert torch.allclose(joined["trunk.0.weight"], 2 * plain["trunk.0.weight"], rtol=1e-4)
    assert torch.equal(joined["heads.edge.weight"], plain["heads.edge.weight"])


# --- all ---------------------------------------------------------------------------------------
def test_equal_is_the_weighted_sum_of_losses_in_units_of_their_first() -> None:
    net, balance = Net(), make_balance("equal", TASKS)
    first = {k: float(v.detach()) for k, v in losses_of(net).items()}
    balance.backward(losses_of(net), net)
    assert balance.units == pytest.approx({**first, "height": 0.5})
    net.zero_grad()
    balance.backward(losses_of(net, 5), net)
    got = net.trunk[0].weight.grad.clone()
    net.zero_grad()
    each = losses_of(net, 5)
    total = sum(each[t.name] * (t.weight / balance.units[t.name]) for t in TASKS)
    total.backward()
    assert torch.equal(net.trunk[0].weight.grad, got)


@pytest.mark.parametrize("name", BALANCES)
def test_scale_and_missing_tasks(name: str) -> None:
    net = Net()
    one = gradients(name, net, losses_of(net))
    half = gradients(name, net, losses_of(net), scale=0.5)
    for k, g in one.items():
        assert torch.allclose(0.5 * g, half[k], rtol=1e-4, atol=1e-7), k
    only = gradients(name, net, {k: v for k, v in losses_of(net).items() if k != "edge"})
    assert "heads.edge.weight" not in only and "heads.cover.weight" in only
    assert not gradients(name, net, {})


@pytest.mark.parametrize("name", BALANCES)
def test_gradients_of_batches_add_up(name: str) -> None:
    net = Net()
    balance = make_balance(name, TASKS)
    balance.backward(losses_of(net), net)
    a = net.trunk[0].weight.grad.clone()
    net.zero_grad()
    balance.backward(losses_of(net, 1), net)
    b = net.trunk[0].weight.grad.clone()
    net.zero_grad()
    balance.backward(losses_of(net), net)
    balance.backward(losses_of(net, 1), net)
    assert torch.allclose(net.trunk[0].weight.grad, a + b, rtol=1e-4, atol=1e-6)


def run(name: str, steps: int, stop: int | None = None) -> tuple[dict[str, Tensor], Balance]:
    """Train; with ``stop`` everything is taken to a fresh net, balance and optimiser there."""
    net, balance = Net(), make_balance(name, TASKS)

    def optimiser() -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [{"params": list(net.parameters())},
             {"params": balance.parameters(), "weight_decay": 0.0}], lr=0.01)  # fmt: skip

    opt, loss = optimiser(), MultiTaskLoss(TASKS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        for step in range(steps):
            if step == stop:
                kept = {k: v.clone() for k, v in balance.state().items()}
                weights, moments = {k: v.clone() for k, v in net.state_dict().items()}, opt
                net, balance = Net(), make_balance(name, TASKS)
                net.load_state_dict(weights)
                balance.load(kept)
                opt = optimiser()
                opt.load_state_dict(moments.state_dict())
            x, y = batch(step)
            opt.zero_grad(set_to_none=True)
            losses = loss.each(net(x), y)
            if step % 3 == 1:
                del losses["edge"]
            balance.backward(losses, net)
            opt.step()
            balance.after_step(net, lambda: loss.each(net(x), y))  # noqa: B023
    return net.state_dict(), balance


@pytest.mark.parametrize("name", BALANCES)
def test_resume_is_exact(name: str) -> None:
    """The state goes through bytes of tensors only; the same run twice is the same."""
    (whole, a), (again, _), (cut, b) = run(name, 7), run(name, 7), run(name, 7, stop=4)
    for k, v in whole.items():
        assert torch.equal(v, again[k]) and torch.equal(v, cut[k]), k
    assert a.state().keys() == b.state().keys()
    assert all(torch.equal(v, b.state()[k]) for k, v in a.state().items())


@pytest.mark.parametrize("name", BALANCES)
def test_it_learns(name: str) -> None:
    net, balance, loss = Net(), make_balance(name, TASKS), MultiTaskLoss(TASKS)
    opt = torch.optim.Adam([*net.parameters(), *balance.parameters()], lr=0.02)
    x, y = batch(0)
    net.train()
    first = {k: float(v.detach()) for k, v in loss.each(net(x), y).items()}
    for _ in range(60):
        opt.zero_grad(set_to_none=True)
        balance.backward(loss.each(net(x), y), net)
        opt.step()
        balance.after_step(net, lambda: loss.each(net(x), y))
    last = {k: float(v.detach()) for k, v in loss.each(net(x), y).items()}
    assert all(last[k] < first[k] for k in first)


def test_a_single_task_needs_no_balance_and_names_are_checked() -> None:
    assert all(type(make_balance(n, TASKS[:1])) is Balance for n in BALANCES)
    with pytest.raises(ModelError, match="upgrad"):
        make_balance("gradnorm", TASKS)


# --- uncertainty -------------------------------------------------------------------------------
def test_uncertainty_has_kendalls_optimum() -> None:
    """For constant losses s is ln L where c = 1/2, and ln 2L where c = 1."""
    tasks = (COVER, TaskSpec("height", "regression", loss="quantile", weight=3.0))
    balance, net = Uncertainty(tasks), Net()
    balance.units.update(cover=1.0, height=1.0)
    opt = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(600):
        opt.zero_grad()
        balance.backward({"cover": torch.tensor(0.4), "height": torch.tensor(2.5)}, net)
        opt.step()
    assert balance.log_variance.tolist() == pytest.approx([math.log(0.8), math.log(2.5)], abs=1e-3)


def test_uncertainty_is_bounded_and_negative_likelihoods_are_shifted() -> None:
    tasks = (HEIGHT, COVER)
    balance, net = Uncertainty(tasks), Net()
    opt = torch.optim.Adam(balance.parameters(), lr=1.0)
    lowest = torch.tensor(-0.5 / math.e)  # the least a Gaussian likelihood can be
    for _ in range(50):
        opt.zero_grad()
        balance.backward({"height": lowest, "cover": torch.tensor(1.0)}, net)
        opt.step()
    balance.backward({"height": lowest, "cover": torch.tensor(1.0)}, net)
    assert float(balance.log_variance[0].detach()) == -4.0
    assert torch.isfinite(balance.log_variance).all()


# --- famo --------------------------------------------------------------------------------------
def test_famo_is_torchjds() -> None:
    tasks = tuple(TaskSpec(k, "boundary") for k in "abc")
    ours, theirs = Famo(tasks), FAMO(3)
    ours.units.update(a=1.0, b=1.0, c=1.0)
    g = torch.Generator().manual_seed(0)
    net = nn.Module()
    for _ in range(5):
        values = torch.rand(3, generator=g).add_(0.1).requires_grad_()
        after = torch.rand(3, generator=g).add_(0.1)
        theirs(values).backward()
        want = values.grad.clone()
        values.grad = None
        ours.backward(dict(zip("abc", values, strict=True)), net)
        assert torch.allclose(values.grad / 3, want, rtol=1e-5)
        theirs.update(after)
        ours.after_step(net, lambda: dict(zip("abc", after, strict=True)))  # noqa: B023
        assert torch.allclose(ours.logits, theirs._w, atol=1e-6)


def test_famo_turns_to_the_task_that_falls_slowly_and_spares_absent_ones() -> None:
    balance, net = Famo(TASKS, weight_decay=0.0), nn.Module()
    balance.backward({"cover": torch.tensor(1.0, requires_grad=True),
                      "height": torch.tensor(1.0, requires_grad=True)}, net)  # fmt: skip
    balance.after_step(net, lambda: {"cover": torch.tensor(0.5), "height": torch.tensor(0.99)})
    w = balance.logits.tolist()
    assert w[1] > 0 > w[0] and w[2] == 0


def test_famos_second_look_leaves_no_trace() -> None:
    net, balance, loss = Net(), Famo(TASKS), MultiTaskLoss(TASKS)
    x, y = batch(0)
    balance.backward(loss.each(net(x), y), net)
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    called = []

    def evaluate() -> dict[str, Tensor]:
        called.append(net.training)
        return loss.each(net(x), y)

    balance.after_step(net, evaluate)
    assert called == [True] and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.trunk[1].momentum == 0.1
