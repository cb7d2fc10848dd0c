"""One class per window: pooled evidence, its loss, training and score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from terraloom.errors import ModelError
from terraloom.models.heads import TaskSpec, scene_of
from terraloom.models.losses import IGNORE, MultiTaskLoss, scene_loss
from terraloom.train.augment import Augmentation
from terraloom.train.fit import FitSettings, fit_member
from terraloom.train.held_out import Validator

SCENE = TaskSpec("scene", "scene", ("field", "park"))


def test_a_window_is_the_softmax_of_its_mean_logits() -> None:
    z = torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    valid = torch.ones((2, 4, 5), dtype=torch.bool)
    valid[0, :, 2:] = False
    got = scene_of(z.softmax(1), valid)
    assert torch.allclose(got[0], z[0, :, :, :2].mean((1, 2)).softmax(0), atol=1e-6)
    assert torch.allclose(got[1], z[1].mean((1, 2)).softmax(0), atol=1e-6)
    assert bool(scene_of(z.softmax(1), torch.zeros_like(valid)).isnan().all())
    spread = z.clone()
    spread[0, :, :, 2:] = 50.0  # what does not count has no influence
    assert torch.equal(scene_of(spread.softmax(1), valid)[0], got[0])


def test_loss_by_hand() -> None:
    z = torch.zeros((3, 2, 1, 2))
    z[0, 0] = torch.tensor([[3.0, 1.0]])  # mean 2 against 0: the label is the first class
    z[1, 1] = torch.tensor([[1.0, 9.0]])  # the second pixel does not count
    y = torch.tensor([[[0, 0]], [[1, IGNORE]], [[IGNORE, IGNORE]]], dtype=torch.uint8)
    want = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert float(scene_loss(z, y)) == pytest.approx(want)
    weights = torch.tensor([3.0, 1.0])
    want = (3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 4
    assert float(scene_loss(z, y, weights=weights)) == pytest.approx(want)
    w = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 1.0]]])
    assert float(scene_loss(z, y, pixel_weights=w)) == pytest.approx(math.log1p(math.exp(-2)))
    mixed = torch.tensor([[[0, 1]]], dtype=torch.uint8)  # each by its share
    assert float(scene_loss(z[:1], mixed)) == pytest.approx(math.log1p(math.exp(-2)) + 1.0)


def test_unlabelled_windows_and_pixels_get_no_gradient() -> None:
    z = torch.zeros((2, 2, 2, 2), requires_grad=True)
    y = torch.full((2, 2, 2), IGNORE, dtype=torch.uint8)
    loss = MultiTaskLoss([SCENE])
    assert loss.each({"scene": z}, {"scene": y}) == {}
    y[0, 0] = 1
    loss.each({"scene": z}, {"scene": y})["scene"].backward()
    assert z.grad is not None and bool((z.grad[0, :, 0] != 0).all())
    assert not bool(z.grad[0, :, 1].any()) and not bool(z.grad[1].any())


def test_a_scene_needs_classes_and_its_own_loss() -> None:
    for wrong in ({"classes": ("one",)}, {"classes": ("a", "b"), "loss": "ce"},
                  {"classes": ("a", "b"), "dice": 1.0}):  # fmt: skip
        with pytest.raises(ModelError):
            TaskSpec("scene", "scene", **wrong)  # type: ignore[arg-type]
    assert TaskSpec.from_json(SCENE.to_json()) == SCENE and SCENE.channels == 2


def chips(n: int = 16, size: int = 24) -> xr.Dataset:
    """Parks are fields with a pond somewhere: most pixels of both look the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 0.05, (n, 2, size, size)).astype(np.float32)
    y = np.zeros((n, size, size), np.uint8)
    for i in range(0, n, 2):
        row, col = rng.integers(0, size - 6, 2)
        x[i, :, row : row + 6, col : col + 6] -= 0.3
        y[i] = 1
    y[:, :3], x[:, :, :3] = IGNORE, np.nan  # not imaged: no label
    fold = np.broadcast_to((np.arange(n) // 2 % 4).astype(np.uint8)[:, None, None], y.shape)
    dims = ("n", "y_10", "x_10")
    return xr.Dataset(
        {"x_s2_10": (("n", "channel_s2_10", "y_10", "x_10"), x), "y_scene": (dims, y),
         "fold": (dims, fold.copy())},
        coords={"channel_s2_10": ["B04", "B08"]},
    )  # fmt: skip


def test_training_tells_scenes_that_most_pixels_cannot() -> None:
    data = chips()
    settings = FitSettings(
        width=6, depth=3, epochs=20, batch=4, crop_px=24, patience=0, device="cpu",
        augmentation=Augmentation(drop_band=0.0, drop_sensor=0.0),
    )  # fmt: skip
    fit = fit_member(data, [SCENE], settings, held_out_fold=0, member=0, seed=1)
    score = Validator(data, [SCENE], 0)(fit.network())
    assert score == 1.0, "four chips that it has not seen"
    losses = fit.history["scene"]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
