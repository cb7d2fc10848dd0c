"""Losses of class labels: limits, gradients, published examples, shares, a world with noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from terraloom.errors import LabelError, ModelError
from terraloom.labels.corrupt import flip, noise_rate
from terraloom.models.class_losses import (
    SegmentationLoss,
    keep_rate,
    labelled_pixels,
    pixel_loss,
    segmentation_loss,
    select_small,
)
from terraloom.models.losses import IGNORE

#: Row = true class, column = label.
NOISE = np.array([[0.8, 0.1, 0.1], [0.15, 0.8, 0.05], [0.05, 0.15, 0.8]])
SETTINGS = {
    "ce": SegmentationLoss(),
    "gce": SegmentationLoss("gce"),
    "sce": SegmentationLoss("sce"),
    "forward": SegmentationLoss("forward"),
    "soft_bootstrap": SegmentationLoss("soft_bootstrap"),
    "hard_bootstrap": SegmentationLoss("hard_bootstrap"),
    "focal": SegmentationLoss("focal"),
    "ordinal": SegmentationLoss("ordinal"),
}


def matrix(name: str) -> np.ndarray | None:
    return NOISE if name == "forward" else None


def value(*args, **settings) -> float:
    return float(segmentation_loss(*args, **settings).detach())


def pixel(*args) -> float:
    """The loss of a single pixel."""
    return float(pixel_loss(*args)[0])


def window(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, 5, 4) and labels with some 255."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (2, 5, 4), generator=g, dtype=torch.uint8)
    y[torch.rand((2, 5, 4), generator=g) < 0.3] = IGNORE
    return torch.randn((2, 3, 5, 4), generator=g, dtype=dtype), y


def test_the_default_is_torchs_cross_entropy() -> None:
    z, y = window()
    weights = torch.tensor([0.5, 1.0, 2.0])
    torch_s = F.cross_entropy(z, y.long(), weight=weights.double(), ignore_index=IGNORE)
    assert value(z, y, weights=weights) == pytest.approx(float(torch_s))
    smooth = F.cross_entropy(z, y.long(), ignore_index=IGNORE, label_smoothing=0.1)
    found = value(z, y, settings=SegmentationLoss(smoothing=0.1))
    assert found == pytest.approx(float(smooth))


def test_focal_worked_value_and_limit() -> None:
    """Lin et al. 2017: gamma 2 and p = .9 is 100 times below the cross entropy."""
    z, y = window()
    assert value(z, y, settings=SegmentationLoss("focal", gamma=0)) == value(z, y)
    logp = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    easy = pixel(logp, torch.tensor([0]), SegmentationLoss("focal"))
    assert easy == pytest.approx(-np.log(0.9) / 100)
    sure = torch.tensor([[60.0, -60.0]], requires_grad=True)
    segmentation_loss(sure, torch.tensor([0], dtype=torch.uint8),
                      settings=SegmentationLoss("focal", gamma=0.5)).backward()  # fmt: skip
    assert torch.isfinite(sure.grad).all()


def test_ordinal_errors_cost_their_distance() -> None:
    sure = torch.full((5, 5), -1e3, dtype=torch.float64).fill_diagonal_(0.0)
    cost = pixel_loss(sure, torch.zeros(5, dtype=torch.int64), SegmentationLoss("ordinal"))
    assert cost.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    # The cross entropy does not know the order: .4 on the neighbour or at the far end.
    near, far = [0.6, 0.4, 0.0], [0.6, 0.0, 0.4]
    logp = torch.tensor([near, far], dtype=torch.float64).clamp_min(1e-12).log()
    label = torch.tensor([0, 0])
    plain = pixel_loss(logp, label)
    assert float(plain[0]) == pytest.approx(float(plain[1]))
    ranked = pixel_loss(logp, label, SegmentationLoss("ordinal"))
    assert ranked.tolist() == pytest.approx([0.08, 0.16])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("extra", [{}, {"smoothing": 0.1}, {"dice": 1.0}])
def test_one_hot_shares_are_the_label(name: str, extra: dict) -> None:
    z, y = window()
    s, weights = replace(SETTINGS[name], **extra), torch.tensor([0.5, 1.0, 2.0])
    pixels = torch.rand(y.shape, generator=torch.Generator().manual_seed(2)).double()
    pixels[0, 0] = 0
    soft = 255 * F.one_hot(y.long().clamp(max=2), 3).movedim(-1, 1).to(torch.uint8)
    soft[1, :, 0] = 0  # no shares here: the class counts
    k = {"settings": s, "weights": weights, "pixel_weights": pixels, "transition": matrix(name)}
    for keep in (1.0, 0.6):
        hard = value(z, y, keep=keep, **k)
        assert value(z, y, soft=soft, keep=keep, **k) == pytest.approx(hard, rel=1e-12)
    # Shares without a label have no influence.
    soft.movedim(1, -1)[y == IGNORE] = 77
    assert value(z, y, soft=soft, **k) == pytest.approx(value(z, y, **k), rel=1e-12)


def test_shares_are_what_training_ends_at() -> None:
    """Proper losses of shares are least where the prediction has these shares; of any sum."""
    share = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    soft = (share * 250).round().to(torch.uint8).repeat(4, 1)
    y = torch.zeros(4, dtype=torch.uint8)
    for s in (SegmentationLoss(), SegmentationLoss("ordinal"), SegmentationLoss(dice=1.0)):
        z = torch.zeros((4, 3), dtype=torch.float64, requires_grad=True)
        opt = torch.optim.Adam([z], lr=0.02)
        for _ in range(800):
            opt.zero_grad()
            segmentation_loss(z, y, settings=s, soft=soft).backward()
            opt.step()
        assert torch.allclose(z.detach().softmax(1), share.expand(4, 3), atol=0.01), s
    with pytest.raises(ModelError, match="shares"):
        segmentation_loss(z, y, soft=soft[:, :2])


def test_gce_has_its_two_limits() -> None:
    """Zhang and Sabuncu 2018: q -> 0 is the cross entropy, q = 1 the mean absolute error."""
    z, y = window()
    ce = value(z, y)
    assert value(z, y, settings=SegmentationLoss("gce", q=0)) == ce
    assert value(z, y, settings=SegmentationLoss("gce", q=1e-9)) == pytest.approx(ce, rel=1e-7)
    logits, target, _ = labelled_pixels(z, y)
    p = logits.softmax(1)
    mae = (p - F.one_hot(target, 3)).abs().sum(1).mean() / 2
    assert value(z, y, settings=SegmentationLoss("gce", q=1)) == pytest.approx(float(mae))
    # In single precision the plain formula has lost the loss: 1 - p^q is a few ulp.
    single = value(z.float(), y, settings=SegmentationLoss("gce", q=1e-6))
    assert single == pytest.approx(ce, rel=1e-4)


def test_gce_worked_value() -> None:
    logp = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert pixel(logp, torch.tensor([0]), SegmentationLoss("gce", q=0.5)) == pytest.approx(1.0)


def test_sce_worked_value() -> None:
    """Wang et al. 2019: .1 CE + 1 RCE, RCE = -A (1 - p) with A = -4."""
    logp = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    found = pixel(logp, torch.tensor([0]), SegmentationLoss("sce"))
    assert found == pytest.approx(0.1 * np.log(4) + 4 * 0.75)


def test_sce_without_its_second_part_is_the_cross_entropy() -> None:
    z, y = window()
    only_ce = SegmentationLoss("sce", alpha=1, beta=0)
    assert value(z, y, settings=only_ce) == pytest.approx(value(z, y))


def test_forward_is_the_cross_entropy_of_what_labels_should_look_like() -> None:
    z, y = window()
    logits, target, _ = labelled_pixels(z, y)
    seen = logits.softmax(1) @ torch.from_numpy(NOISE)  # (T' p) per pixel
    expected = F.nll_loss(seen.log(), target)
    forward = SegmentationLoss("forward")
    assert value(z, y, settings=forward, transition=NOISE) == pytest.approx(float(expected))
    plain = value(z, y, settings=forward, transition=np.eye(3))
    assert plain == pytest.approx(value(z, y), rel=1e-6)


def test_bootstrap_targets() -> None:
    """Reed et al. 2015, eq. 6 and 8."""
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    label = torch.tensor([0])
    soft = -(0.95 * p.log()[0, 0] + 0.05 * (p * p.log()).sum())
    hard = -(0.8 * p.log()[0, 0] + 0.2 * p.log()[0, 1])
    assert pixel(p.log(), label, SegmentationLoss("soft_bootstrap")) == pytest.approx(float(soft))
    assert pixel(p.log(), label, SegmentationLoss("hard_bootstrap")) == pytest.approx(float(hard))
    for name in ("soft_bootstrap", "hard_bootstrap"):
        trusting = SegmentationLoss(name, trust=1.0)  # type: ignore[arg-type]
        assert pixel(p.log(), label, trusting) == pytest.approx(-np.log(0.2))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_values(name: str) -> None:
    z, y = window()
    z.requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return segmentation_loss(logits, y, settings=SETTINGS[name], transition=matrix(name))

    assert torch.autograd.gradcheck(loss, (z,))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_errors_give_finite_gradients(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([1, 1], dtype=torch.uint8)
    loss = segmentation_loss(z, y, settings=SETTINGS[name], transition=matrix(name))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_gce_and_mae_do_not_run_after_outliers() -> None:
    """The gradient of a label that the network contradicts is damped by p^q."""
    z = torch.tensor([[6.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1], dtype=torch.uint8)
    size = {}
    for name in ("ce", "gce", "sce"):
        at = z.clone().requires_grad_()
        segmentation_loss(at, y, settings=SETTINGS[name]).backward()
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
        loss = segmentation_loss(at, labels, settings=SETTINGS[name], transition=matrix(name),
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
        loss = segmentation_loss(z, torch.full_like(y, IGNORE), settings=s, transition=matrix(name),
                           keep=0.5)  # fmt: skip
        loss.backward()
        assert float(loss.detach()) == 0
    assert (z.grad == 0).all()


def test_keep_rate_is_co_teachings_schedule() -> None:
    """Han et al. 2018: R(t) = 1 - min(t / T_k tau, tau)."""
    rates = [keep_rate(t, 0.4, 10) for t in (0, 5, 10, 50)]
    assert rates == pytest.approx([1, 0.8, 0.6, 0.6])
    assert SegmentationLoss(forget=0.4, forget_by=0.1).keep(5, 100) == pytest.approx(0.8)
    assert SegmentationLoss(forget=0.4, forget_by=0).keep(0, 100) == pytest.approx(0.6)
    assert SegmentationLoss().keep(99, 100) == 1


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
        segmentation_loss(z, y, settings=SegmentationLoss(per_class=per_class), keep=0.5).backward()
        assert bool((z.grad[8:] != 0).any()) == per_class


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    centre = np.array([[0.0, 0.0], [2.2, 0.0], [1.1, 1.9]])
    return (centre[y] + rng.normal(0, 0.6, (n, 2))).astype(np.float32), y.astype(np.uint8)


def train(x: np.ndarray, y: np.ndarray, s: SegmentationLoss, t: np.ndarray | None = None) -> Tensor:
    """Logistic regression by LBFGS, (3, 3): weights and bias."""
    z = torch.from_numpy(np.column_stack([x, np.ones(len(x))])).double()
    target = torch.from_numpy(y)
    w = torch.zeros((3, 3), dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = segmentation_loss(z @ w, target, settings=s, transition=t) + 1e-5 * (w**2).sum()
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
    clean = train(x, true, SegmentationLoss())
    plain = train(x, label, SegmentationLoss())
    forward = train(x, label, SegmentationLoss("forward"), noise)
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
     {"forget_by": -0.1}, {"q": float("nan")}, {"gamma": -1}, {"smoothing": 1}, {"dice": -1}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ModelError, match="allowed"):
        SegmentationLoss(**settings)


def test_what_does_not_fit_is_refused() -> None:
    z, y = window()
    with pytest.raises(ModelError, match="no transition matrix"):
        segmentation_loss(z, y, settings=SegmentationLoss("forward"))
    with pytest.raises(ModelError, match="only with it"):
        segmentation_loss(z, y, transition=NOISE)
    with pytest.raises(LabelError, match="row 0"):
        segmentation_loss(z, y, settings=SegmentationLoss("forward"), transition=NOISE * 2)
    with pytest.raises(LabelError, match=r"\(2, 2\)"):
        segmentation_loss(z, y, settings=SegmentationLoss("forward"), transition=np.eye(2))
    with pytest.raises(ModelError, match="for logits"):
        segmentation_loss(z, y[:1])
    with pytest.raises(ModelError, match="classes 0-7"):
        segmentation_loss(z, torch.where(y == 1, torch.tensor(7, dtype=torch.uint8), y))
