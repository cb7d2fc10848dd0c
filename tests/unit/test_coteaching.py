"""Two networks that choose labels for each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from test_checkpoint import Killed, kill_after
from torch import Tensor

from terraloom.config.campaign import Campaign
from terraloom.config.load import load_campaign
from terraloom.models.class_losses import segmentation_loss
from terraloom.models.coteaching import CoTeachingLoss, Pair
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import MultiTaskLoss
from terraloom.models.registry import build, make_spec
from terraloom.train.augment import Augmentation
from terraloom.train.checkpoint import Checkpoint
from terraloom.train.fit import FitResult, FitSettings, fit_member

ROOT = Path(__file__).parents[2]
CLASSES = ("a", "b", "c")
COVER = TaskSpec("cover", "segmentation", CLASSES, forget=0.4)
EXACT = FitSettings(
    network="ltae", width=16, epochs=60, batch=4, crop_px=24, learning_rate=1e-2, weight_decay=0,
    dropout=0, ema=0.9, indices=False,
    augmentation=Augmentation(gain=0, bias=0, drop_band=0, drop_sensor=0, flips=False),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def separable(noise: float, seed: int = 0) -> tuple[xr.Dataset, np.ndarray]:
    """Pixels of three classes in 12 bands, few of them labelled, and their true classes."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, (2, 48, 48))
    spectra = rng.uniform(0.1, 0.4, (3, 12)).astype(np.float32)
    x = spectra[true].transpose(0, 3, 1, 2) + rng.normal(0, 0.06, (2, 12, 48, 48))
    y = true.copy()
    wrong = rng.random(y.shape) < noise
    y[wrong] = (y[wrong] + rng.integers(1, 3, wrong.sum())) % 3
    y = y.astype(np.uint8)
    y[rng.random(y.shape) > 0.12] = 255
    chips = xr.Dataset(
        {
            "x_s2_10": (("n", "channel_s2_10", "y_10", "x_10"), x.astype(np.float32)),
            "y_cover": (("n", "y_10", "x_10"), y),
            "fold": (("n", "y_10", "x_10"), np.ones(y.shape, np.uint8)),
        },
        coords={"channel_s2_10": [f"2018-06/b{i}" for i in range(12)]},
    )
    return chips, true


def fit(chips: xr.Dataset, s: FitSettings, task: TaskSpec = COVER, **more: object) -> FitResult:
    return fit_member(chips, (task,), s, held_out_fold=0, member=0, seed=1, **more)  # type: ignore[arg-type]


def accuracy(done: FitResult, chips: xr.Dataset, true: np.ndarray) -> float:
    """Share of pixels without a label that are right."""
    said = done.network().predict({"s2_10": torch.from_numpy(chips["x_s2_10"].values)})["cover"]
    return float((said.argmax(1).numpy() == true)[chips["y_cover"].values == 255].mean())


def test_forty_percent_of_wrong_labels_mislead_two_networks_little() -> None:
    chips, true = separable(0.4)
    plain = accuracy(fit(chips, EXACT, replace(COVER, forget=0.0)), chips, true)
    paired = accuracy(fit(chips, replace(EXACT, co_teaching=True)), chips, true)
    assert paired > 0.85 and paired > plain + 0.15


def test_one_network_is_handed_back_and_a_killed_pair_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chips, _ = separable(0.2)
    s = replace(EXACT, epochs=5, co_teaching=True, dropout=0.1)
    whole, file = fit(chips, s), tmp_path / "state.safetensors"
    assert set(whole.state_dict) == set(whole.network().state_dict())
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, 5)
        fit(chips, s, checkpoint=Checkpoint(file, "a", every_s=0))
    again = fit(chips, s, checkpoint=Checkpoint(file, "a", every_s=1e9))
    assert again.history == whole.history
    assert all(torch.equal(v, again.state_dict[k]) for k, v in whole.state_dict.items())


def test_each_network_learns_from_what_the_other_finds_easy() -> None:
    y = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    # One finds the first label of each class easy, the other the second.
    sure = torch.tensor([[[[3.0, -3.0, -3.0, 3.0]], [[-3.0, 3.0, 3.0, -3.0]]]])
    raw = torch.cat([sure, -sure], 1).requires_grad_()
    task = TaskSpec("cover", "segmentation", ("a", "b"), forget=0.5)
    loss = CoTeachingLoss([task]).each({"cover": raw}, {"cover": y}, done=1.0)["cover"]
    loss.backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    one, other = (g.abs().sum(1).flatten() > 0 for g in raw.grad.chunk(2, 1))
    assert one.tolist() == [False, True, False, True]
    assert other.tolist() == [True, False, True, False]
    by_itself = MultiTaskLoss([task]).each({"cover": sure}, {"cover": y}, done=1.0)["cover"]
    assert float(by_itself) < 0.01 < float(loss.detach()), "its own choice is what it knows"


def test_a_judge_without_forgetting_says_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    z, judge = (torch.randn((2, 3, 4, 4), generator=g) for _ in range(2))
    y = torch.randint(0, 3, (2, 4, 4), generator=g)
    assert torch.equal(segmentation_loss(z, y, judge=judge), segmentation_loss(z, y))
    own = segmentation_loss(z, y, keep=0.5)
    assert torch.equal(segmentation_loss(z, y, keep=0.5, judge=z), own)
    assert not torch.equal(segmentation_loss(z, y, keep=0.5, judge=judge), own)


def test_a_pair_predicts_as_its_first_and_shares_no_weight() -> None:
    spec = make_spec("fusion", {"s2_10": ("p/B02", "p/B03")}, (COVER,), width=4, depth=2)
    pair = Pair(build(spec), build(spec)).eval()
    assert len(pair.state_dict()) == 2 * len(pair.one.state_dict())
    x: dict[str, Tensor] = {"s2_10": torch.rand((1, 2, 16, 16))}
    assert torch.equal(pair.predict(x)["cover"], pair.one.predict(x)["cover"])
    assert Pair.of_first(pair.state_dict()).keys() == pair.one.state_dict().keys()
    assert len(list(pair.get_submodule("heads").parameters())) == 4
    wanted = torch.ones((1, 16, 16), dtype=torch.bool)
    assert pair.forward_at(pair.one.prepare(x), wanted)["cover"].shape == (1, 6, 16, 16)


def test_a_campaign_without_labels_to_forget_is_refused() -> None:
    campaign = load_campaign(ROOT / "config/campaigns/havel.yaml").model_dump(mode="json")
    campaign["model"]["co_teaching"] = True
    with pytest.raises(ValueError, match=r"co_teaching` needs `loss\.forget"):
        Campaign.model_validate(campaign)
    campaign["tasks"][0]["loss"]["forget"] = 0.2
    assert Campaign.model_validate(campaign).model.co_teaching
