"""Noise-robust losses: their limits, gradients, published examples, and a world with noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from terraloom.errors import LabelError, ModelError
from terraloom.labels.corrupt import flip, noise_rate
from terraloom.models.losses import IGNORE, segmentation_loss
from terraloom.models.robust import (
    RobustLoss,
    co_teaching_loss,
    keep_rate,
    labelled_pixels,
    pixel_loss,
    robust_loss,
    select_small,
)

#: Row = true class, column = label.
NOISE = np.array([[0.8, 0.1, 0.1], [0.15, 0.8, 0.05], [0.05, 0.15, 0.8]])
SETTINGS = {
    "ce": RobustLoss(),
    "gce": RobustLoss("gce"),
    "sce": RobustLoss("sce"),
    "forward": RobustLoss("forward"),
    "soft_bootstrap": RobustLoss("soft_bootstrap"),
    "hard_bootstrap": RobustLoss("hard_bootstrap"),
}


def matrix(name: str) -> np.ndarray | None:
    return NOISE if name == "forward" else None


def value(*args, **settings) -> float:
    return float(robust_loss(*args, **settings).detach())


def pixel(*args) -> float:
    """The loss of a single pixel."""
    return float(pixel_loss(*args)[0])


def window(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, 5, 4) and labels with some 255."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (2, 5, 4), generator=g, dtype=torch.uint8)
    y[torch.rand((2, 5, 4), generator=g) < 0.3] = IGNORE
    return torch.randn((2, 3, 5, 4), generator=g, dtype=dtype), y


def test_the_default_is_the_cross_entropy_that_the_networks_use() -> None:
    z, y = window()
    weights, pixels = torch.tensor([0.5, 1.0, 2.0]), torch.rand(y.shape).double()
    ours = value(z, y, weights=weights, pixel_weights=pixels)
    assert ours == pytest.approx(
        float(segmentation_loss(z, y, weights=weights, pixel_weights=pixels))
    )
    torch_s = F.cross_entropy(z, y.long(), weight=weights.double(), ignore_index=IGNORE)
    assert value(z, y, weights=weights) == pytest.approx(float(torch_s))


def test_gce_has_its_two_limits() -> None:
    """Zhang and Sabuncu 2018: q -> 0 is the cross entropy, q = 1 the mean absolute error."""
    z, y = window()
    ce = value(z, y)
    assert value(z, y, settings=RobustLoss("gce", q=0)) == ce
    assert value(z, y, settings=RobustLoss("gce", q=1e-9)) == pytest.approx(ce, rel=1e-7)
    logits, target, _ = labelled_pixels(z, y)
    p = logits.softmax(1)
    mae = (p - F.one_hot(target, 3)).abs().sum(1).mean() / 2
    assert value(z, y, settings=RobustLoss("gce", q=1)) == pytest.approx(float(mae))
    # In single precision the plain formula has lost the loss: 1 - p^q is a few ulp.
    single = value(z.float(), y, settings=RobustLoss("gce", q=1e-6))
    assert single == pytest.approx(ce, rel=1e-4)


def test_gce_worked_value() -> None:
    logp = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert pixel(logp, torch.tensor([0]), RobustLoss("gce", q=0.5)) == pytest.approx(1.0)


def test_sce_worked_value() -> None:
    """Wang et al. 2019: .1 CE + 1 RCE, RCE = -A (1 - p) with A = -4."""
    logp = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    found = pixel(logp, torch.tensor([0]), RobustLoss("sce"))
    assert found == pytest.approx(0.1 * np.log(4) + 4 * 0.75)


def test_sce_without_its_second_part_is_the_cross_entropy() -> None:
    z, y = window()
    only_ce = RobustLoss("sce", alpha=1, beta=0)
    assert value(z, y, settings=only_ce) == pytest.approx(value(z, y))


def test_forward_is_the_cross_entropy_of_what_labels_should_look_like() -> None:
    z, y = window()
    logits, target, _ = labelled_pixels(z, y)
    seen = logits.softmax(1) @ torch.from_numpy(NOISE)  # (T' p) per pixel
    expected = F.nll_loss(seen.log(), target)
    forward = RobustLoss("forward")
    assert value(z, y, settings=forward, transition=NOISE) == pytest.approx(float(expected))
    plain = value(z, y, settings=forward, transition=np.eye(3))
    assert plain == pytest.approx(value(z, y), rel=1e-6)


def test_bootstrap_targets() -> None:
    """Reed et al. 2015, eq. 6 and 8."""
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    label = torch.tensor([0])
    soft = -(0.95 * p.log()[0, 0] + 0.05 * (p * p.log()).sum())
    hard = -(0.8 * p.log()[0, 0] + 0.2 * p.log()[0, 1])
    assert pixel(p.log(), label, RobustLoss("soft_bootstrap")) == pytest.approx(float(soft))
    assert pixel(p.log(), label, RobustLoss("hard_bootstrap")) == pytest.approx(float(hard))
    for name in ("soft_bootstrap", "hard_bootstrap"):
        trusting = RobustLoss(name, trust=1.0)  # type: ignore[arg-type]
        assert pixel(p.log(), label, trusting) == pytest.approx(-np.log(0.2))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_values(name: str) -> None:
    z, y = window()
    z.requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return robust_loss(logits, y, settings=SETTINGS[name], transition=matrix(name))

    assert torch.autograd.gradcheck(loss, (z,))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_errors_give_finite_gradients(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([1, 1], dtype=torch.uint8)
    loss = robust_loss(z, y, settings=SETTINGS[name], transition=matrix(name))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_gce_and_mae_do_not_run_after_outliers() -> None:
    """The gradient of a label that the network contradicts is damped by p^q."""
    z = torch.tensor([[6.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1], dtype=torch.uint8)
    size = {}
    for name in ("ce", "gce", "sce"):
        at = z.clone().requires_grad_()
        robust_loss(at, y, settings=SETTINGS[name]).backward()
        size[name] = float(at.grad.abs().max())
    p = float(z.softmax(1)[0, 1])
    assert size["gce"] == pytest.approx(size["ce"] * p**0.7)
    assert size["sce"] < 0.2 * size["ce"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_ignored_pixels_do_not_matter(name: str, keep: float) -> None:
    z, y = window()
    weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).double()
    weights[0, 0] = 0  # a weight of 0 is as good as no label

    def grad(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        at = logits.clone().requires_grad_()
        loss = robust_loss(at, labels, settings=SETTINGS[name], transition=matrix(name),
                           pixel_weights=weights, keep=keep)  # fmt: skip
        loss.backward()
        return float(loss.detach()), at.grad

    plain, slope = grad(z, y)
    none = (y == IGNORE) | (weights == 0)
    spoiled, relabelled = z.clone(), y.clone()
    spoiled.movedim(1, -1)[none] = torch.nan
    relabelled[0, 0] = 2
    again, slope_again = grad(spoiled, relabelled)
    assert again == plain and torch.equal(slope, slope_again)
    assert (slope.movedim(1, -1)[none] == 0).all() and slope.abs().sum() > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_windows_and_lists_of_pixels_give_one_value(name: str) -> None:
    z, y = window()
    flat = value(z.movedim(1, -1).reshape(-1, 3), y.reshape(-1), settings=SETTINGS[name],
                       transition=matrix(name))  # fmt: skip
    whole = value(z, y, settings=SETTINGS[name], transition=matrix(name))
    assert flat == pytest.approx(whole)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_a_mean_over_labelled_pixels(name: str) -> None:
    """Twice the window, or more pixels without a label, is the same loss; weights are relative."""
    z, y = window()
    s, t = SETTINGS[name], matrix(name)
    one = value(z, y, settings=s, transition=t)
    two = value(z.repeat(2, 1, 1, 1), torch.cat([y, y]), settings=s, transition=t)
    padded = value(F.pad(z, (0, 3)), F.pad(y, (0, 3), value=IGNORE), settings=s, transition=t)
    scaled = value(z, y, settings=s, transition=t, pixel_weights=torch.full(y.shape, 7.0))
    assert [two, padded, scaled] == [pytest.approx(one)] * 3


def test_a_window_without_a_label_has_loss_zero() -> None:
    z, y = window()
    z.requires_grad_()
    for name, s in SETTINGS.items():
        loss = robust_loss(z, torch.full_like(y, IGNORE), settings=s, transition=matrix(name),
                           keep=0.5)  # fmt: skip
        loss.backward()
        assert float(loss.detach()) == 0
    assert (z.grad == 0).all()


def test_keep_rate_is_co_teachings_schedule() -> None:
    """Han et al. 2018: R(t) = 1 - min(t / T_k tau, tau)."""
    rates = [keep_rate(t, 0.4, 10) for t in (0, 5, 10, 50)]
    assert rates == pytest.approx([1, 0.8, 0.6, 0.6])
    assert RobustLoss(forget=0.4, forget_by=0.1).keep(5, 100) == pytest.approx(0.8)
    assert RobustLoss(forget=0.4, forget_by=0).keep(0, 100) == pytest.approx(0.6)
    assert RobustLoss().keep(99, 100) == 1


def test_small_losses_are_selected() -> None:
    loss = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert select_small(loss, 0.4).tolist() == [False, True, False, True, False]
    assert select_small(loss, 0.2).sum() == 1 and select_small(loss, 0).sum() == 1
    assert select_small(loss, 1).all() and not len(select_small(loss[:0], 0.5))
    # Within classes, the class that is hard as a whole keeps its share.
    target = torch.tensor([0, 1, 0, 1, 1])
    assert select_small(loss, 0.5, target).tolist() == [False, True, True, True, False]


def test_a_class_that_is_hard_is_not_left_out() -> None:
    z = torch.tensor([[3.0, 0.0]] * 8 + [[2.0, 0.0]] * 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0] * 8 + [1] * 2, dtype=torch.uint8)
    for per_class in (True, False):
        z.grad = None
        robust_loss(z, y, settings=RobustLoss(per_class=per_class), keep=0.5).backward()
        assert bool((z.grad[8:] != 0).any()) == per_class


def test_co_teaching_lets_each_network_choose_for_the_other() -> None:
    sure, wrong = [4.0, 0.0], [0.0, 4.0]
    a = torch.tensor([sure, wrong], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([wrong, sure], dtype=torch.float64, requires_grad=True)
    y = torch.zeros(2, dtype=torch.uint8)
    first, second = co_teaching_loss((a, b), y, keep=0.5)
    (first + second).backward()
    # a finds pixel 0 easy, so b learns from it; a learns from pixel 1, which b finds easy.
    assert (a.grad != 0).any(1).tolist() == [False, True]
    assert (b.grad != 0).any(1).tolist() == [True, False]


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    centre = np.array([[0.0, 0.0], [2.2, 0.0], [1.1, 1.9]])
    return (centre[y] + rng.normal(0, 0.6, (n, 2))).astype(np.float32), y.astype(np.uint8)


def train(x: np.ndarray, y: np.ndarray, s: RobustLoss, t: np.ndarray | None = None) -> Tensor:
    """Logistic regression by LBFGS, (3, 3): weights and bias."""
    z = torch.from_numpy(np.column_stack([x, np.ones(len(x))])).double()
    target = torch.from_numpy(y)
    w = torch.zeros((3, 3), dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = robust_loss(z @ w, target, settings=s, transition=t) + 1e-5 * (w**2).sum()
        loss.backward()
        return loss

    opt.step(closure)
    return w.detach()


def probabilities(w: Tensor, x: np.ndarray) -> np.ndarray:
    z = np.column_stack([x, np.ones(len(x))])
    return (torch.from_numpy(z).double() @ w).softmax(1).numpy()


def test_forward_correction_recovers_the_clean_classifier() -> None:
    """3 blobs, labels wrong by one class: with T the network learns what it would from the truth.

    Class 1 is taken for class 0 in 45 % of the cases, so that plain training moves the boundary.
    """
    noise = np.array([[1, 0, 0], [0.45, 0.55, 0], [0.1, 0, 0.9]])
    x, true = blobs(6000, 1)
    label = flip(true, noise, np.random.default_rng(2))
    assert noise_rate(true, label) > 0.15
    clean = train(x, true, RobustLoss())
    plain = train(x, label, RobustLoss())
    forward = train(x, label, RobustLoss("forward"), noise)
    test_x, test_y = blobs(6000, 3)
    off = {
        name: np.abs(probabilities(w, test_x) - probabilities(clean, test_x)).mean()
        for name, w in (("plain", plain), ("forward", forward))
    }
    assert off["forward"] < 0.01 and off["plain"] > 0.1
    hit = {
        name: (probabilities(w, test_x).argmax(1) == test_y).mean()
        for name, w in (("clean", clean), ("plain", plain), ("forward", forward))
    }
    assert hit["clean"] - hit["forward"] < 0.005 < hit["clean"] - hit["plain"]


@pytest.mark.parametrize(
    "settings",
    [{"name": "mse"}, {"q": 1.2}, {"alpha": -1}, {"log_zero": 0}, {"trust": 2}, {"forget": 1},
     {"forget_by": -0.1}, {"q": float("nan")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ModelError, match="allowed"):
        RobustLoss(**settings)


def test_what_does_not_fit_is_refused() -> None:
    z, y = window()
    with pytest.raises(ModelError, match="no transition matrix"):
        robust_loss(z, y, settings=RobustLoss("forward"))
    with pytest.raises(ModelError, match="only with it"):
        robust_loss(z, y, transition=NOISE)
    with pytest.raises(LabelError, match="row 0"):
        robust_loss(z, y, settings=RobustLoss("forward"), transition=NOISE * 2)
    with pytest.raises(LabelError, match=r"\(2, 2\)"):
        robust_loss(z, y, settings=RobustLoss("forward"), transition=np.eye(2))
    with pytest.raises(ModelError, match="for logits"):
        robust_loss(z, y[:1])
    with pytest.raises(ModelError, match="classes 0-7"):
        robust_loss(z, torch.where(y == 1, torch.tensor(7, dtype=torch.uint8), y))
