"""Losses of values, and one loss per task by name; heads that fit them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from terraloom.errors import ModelError
from terraloom.models.heads import LOSSES, QUANTILES, TaskSpec, make_head, quantiles_of
from terraloom.models.losses import (
    IGNORE,
    MultiTaskLoss,
    SegmentationLoss,
    gaussian_nll,
    huber_loss,
    loss_floor,
    quantile_loss,
    segmentation_loss,
)

CLASSES = ("a", "b", "c")


def fitted(loss: Callable[..., Tensor], channels: int, y: np.ndarray, steps: int = 600) -> Tensor:
    """Raw output (1, c, 1, 1) that is best for all values."""
    raw = torch.zeros((1, channels, 1, 1), dtype=torch.float64, requires_grad=True)
    target = torch.from_numpy(y)[None, None]
    opt = torch.optim.Adam([raw], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        opt.zero_grad()
        loss(raw.expand(1, channels, 1, len(y)), target).backward()
        opt.step()
        schedule.step()
    return raw.detach()


def draws(kind: str, n: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.normal(0.5, 0.8, n) if kind == "normal" else rng.gamma(2.0, 0.5, n)


# --- values ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_pinball_loss_is_least_at_the_quantiles(kind: str) -> None:
    y = draws(kind)
    found = quantiles_of(fitted(quantile_loss, 3, y)).flatten().numpy()
    assert found == pytest.approx(np.quantile(y, QUANTILES), abs=0.02)


def test_pinball_worked_value() -> None:
    raw = torch.tensor([0.0, -40.0, -40.0]).view(1, 3, 1, 1)  # all quantiles at 0
    over = float(quantile_loss(raw, torch.tensor([[[2.0]]])))
    assert over == pytest.approx((0.05 + 0.5 + 0.95) * 2 / 3)
    assert float(quantile_loss(raw, torch.tensor([[[math.nan]]]))) == 0


def test_quantiles_never_cross() -> None:
    q = quantiles_of(torch.randn((2, 3, 5, 5), generator=torch.Generator().manual_seed(0)) * 20)
    assert (q[:, 0] <= q[:, 1]).all() and (q[:, 1] <= q[:, 2]).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gaussian", "normal"), ("huber", "normal"), ("quantile", "normal"), ("quantile", "skewed")],
)
def test_predicted_mean_and_variance_cover_new_data(name: str, kind: str) -> None:
    """All losses give mean and variance: 90 % intervals cover 90 % of a Gaussian."""
    loss = {"gaussian": gaussian_nll, "huber": huber_loss, "quantile": quantile_loss}[name]
    task = TaskSpec("v", "regression", mean=10.0, std=2.0, loss=name)
    y = draws(kind)
    raw = fitted(loss, task.raw_channels, y)
    out = make_head(task, 4).physical(raw)
    assert out.shape == (1, task.channels, 1, 1) and task.channels == (
        4 if name == "quantile" else 2
    )
    mean, sd = float(out[0, 0]), float(out[0, 1]) ** 0.5
    if kind == "normal":
        assert mean == pytest.approx(11.0, abs=0.08) and sd == pytest.approx(1.6, rel=0.04)
    new = 10 + 2 * draws(kind)[::-1]
    low, high = mean - 1.6449 * sd, mean + 1.6449 * sd
    width = high - low
    if name == "quantile":
        q = 10 + 2 * quantiles_of(raw).flatten()
        low, high = float(q[0]), float(q[2])
        assert high - low == pytest.approx(width, rel=1e-3)
        assert (low, high) == pytest.approx(out[0, 2:].flatten().tolist(), rel=1e-5)
    assert ((new > low) & (new < high)).mean() == pytest.approx(0.9, abs=0.015)


def test_huber_does_not_run_after_outliers() -> None:
    y = draws("normal")
    spoiled = y.copy()
    spoiled[:100] = 40.0
    clean, huber, gauss = (
        fitted(f, 2, v).flatten()
        for f, v in ((huber_loss, y), (huber_loss, spoiled), (gaussian_nll, spoiled))
    )
    assert abs(float(huber[0] - clean[0])) < 0.15 < 1.5 < abs(float(gauss[0] - clean[0]))
    raw = torch.zeros((1, 2, 1, 2), requires_grad=True)
    huber_loss(raw, torch.tensor([[[1.0, 100.0]]])).backward()
    assert raw.grad[0, 0, 0].tolist() == pytest.approx([-0.5, -0.5]), "the same pull"


def test_quantiles_of_logarithms_are_those_of_the_values() -> None:
    task = TaskSpec("v", "regression", transform="log1p", mean=1.0, std=0.5, loss="quantile")
    raw = torch.tensor([0.4, 0.1, 0.3]).view(1, 3, 1, 1)
    low, mid, high = torch.expm1(1.0 + 0.5 * quantiles_of(raw)).flatten().tolist()
    median, variance, *outer = make_head(task, 2).physical(raw).flatten().tolist()
    assert outer == pytest.approx([low, high], rel=1e-5)
    assert median == pytest.approx(mid, rel=1e-5)
    assert variance == pytest.approx(((high - low) / 3.2897) ** 2, rel=1e-3)
    wild = make_head(task, 2).physical(torch.full((1, 3, 1, 1), 500.0))
    assert torch.isfinite(wild).all()


@pytest.mark.parametrize("name", LOSSES["regression"])
def test_losses_stay_above_their_floor_and_nan_or_weightless_pixels_do_not_matter(
    name: str,
) -> None:
    task = TaskSpec("v", "regression", loss=name)
    g = torch.Generator().manual_seed(0)
    raw = 3 * torch.randn((1, task.raw_channels, 40, 40), generator=g)
    y = raw[:, 0] + 0.01 * torch.randn((1, 40, 40), generator=g)
    loss = MultiTaskLoss((task,))
    for w in range(40):  # single pixels
        one = torch.full_like(y, math.nan)
        one[0, w, w] = y[0, w, w]
        assert float(loss.each({"v": raw}, {"v": one})["v"]) >= loss_floor(task)
    weights = torch.ones_like(y)
    weights[:, :20] = 0
    y[:, 30:] = math.nan
    plain = float(loss.each({"v": raw}, {"v": y}, {"v": weights})["v"])
    raw[:, :, :20], raw[:, :, 30:] = 1e6, math.nan
    assert float(loss.each({"v": raw}, {"v": y}, {"v": weights})["v"]) == plain
    assert not loss.each({"v": raw}, {"v": y}, {"v": torch.zeros_like(y)})


# --- one loss per task -------------------------------------------------------------------------
def test_tasks_survive_json_and_old_cards_load() -> None:
    task = TaskSpec("c", "segmentation", CLASSES, loss="focal", dice=0.5, smoothing=0.1, forget=0.2)
    assert TaskSpec.from_json(json.loads(json.dumps(task.to_json()))) == task
    old = {"name": "h", "kind": "regression", "classes": [], "unit": "m", "weight": 1.0,
           "transform": "log1p", "mean": 1.0, "std": 2.0}  # fmt: skip
    read = TaskSpec.from_json(old)
    assert (read.loss, read.loss_name, read.raw_channels) == ("auto", "gaussian", 2)
    with pytest.raises(ModelError, match="unknown settings colour"):
        TaskSpec.from_json({**old, "colour": "red"})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("regression", {"loss": "gce"}), ("segmentation", {"loss": "huber"}),
     ("boundary", {"loss": "ce"}), ("regression", {"dice": 1.0}), ("boundary", {"forget": 0.1})],
)  # fmt: skip
def test_losses_of_another_kind_are_refused(kind: str, settings: dict) -> None:
    with pytest.raises(ModelError, match="allowed"):
        TaskSpec("t", kind, CLASSES if kind == "segmentation" else (), **settings)


@pytest.mark.parametrize("name", LOSSES["segmentation"])
def test_each_task_has_the_loss_it_names(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.randn((2, 3, 6, 6), generator=g)
    y = torch.randint(0, 3, (2, 6, 6), generator=g).to(torch.uint8)
    noise = np.full((3, 3), 0.1) + 0.7 * np.eye(3)
    task = TaskSpec("c", "segmentation", CLASSES, loss=name, dice=0.5)
    loss = MultiTaskLoss((task,), transitions={"c": noise})
    want = segmentation_loss(z, y, settings=SegmentationLoss(name, dice=0.5),  # type: ignore[arg-type]
                             transition=noise if name == "forward" else None)  # fmt: skip
    assert float(loss.each({"c": z}, {"c": y})["c"]) == float(want)
    if name == "forward":
        with pytest.raises(ModelError, match="no transition matrix"):
            MultiTaskLoss((task,))


def test_forgetting_follows_the_training() -> None:
    task = TaskSpec("c", "segmentation", ("a", "b"), forget=0.5)
    z = torch.tensor([[4.0, -4.0]]).repeat(8, 1)[..., None, None]
    y = torch.zeros((8, 1, 1), dtype=torch.uint8)
    z[:4] = -z[:4]  # the network contradicts half of the labels
    loss = MultiTaskLoss((task,), settings=SegmentationLoss(forget_by=0.2))
    at = [float(loss.each({"c": z}, {"c": y}, done=d)["c"]) for d in (0.0, 0.1, 0.2, 1.0)]
    assert at[0] == pytest.approx(4, abs=0.01) and at[0] > at[1] > at[2] == at[3]
    assert at[2] < 0.001


def test_shares_reach_their_task() -> None:
    task, other = (TaskSpec(n, "segmentation", CLASSES) for n in "ab")
    z = torch.zeros((1, 3, 2, 2), requires_grad=True)
    y = torch.zeros((1, 2, 2), dtype=torch.uint8)
    y[0, 0, 0] = IGNORE
    soft = torch.tensor([2, 1, 1], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    each = MultiTaskLoss((task, other)).each({"a": z, "b": z.detach()}, {"a": y, "b": y}, None,
                                             {"a": soft})  # fmt: skip
    each["a"].backward()
    assert (z.grad[0, :, 1, 1] * 3).tolist() == pytest.approx([1 / 3 - 1 / 2, 1 / 3 - 1 / 4,
                                                               1 / 3 - 1 / 4])  # fmt: skip
    assert (z.grad[0, :, 0, 0] == 0).all()
    assert float(each["a"].detach()) == pytest.approx(float(each["b"]))
