"""Presto gives the numbers of its authors' code; what is not observed has no influence; LoRA."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from terraloom.errors import ModelError
from terraloom.models.heads import TaskSpec
from terraloom.models.lora import add_lora
from terraloom.models.presto import (
    GROUPS,
    PRESTO_BANDS,
    Presto,
    PrestoSeries,
    load_presto,
    presto_bands,
    presto_scaling,
)
from terraloom.models.temporal import SeriesNet, SeriesSpec
from terraloom.train.series import SeriesAugmentation, SeriesSettings, fit_series
from terraloom.train.series_table import SeriesTable

DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
WEIGHTS = DATA / "weights/presto/default_model.pt"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason="needs the weights of Presto (TERRALOOM_TEST_DATA)"
)
BANDS = ("B04", "B08", "VV", "VH")
TASK = TaskSpec("class", "segmentation", ("a", "b", "c"))


def pretrained() -> Presto:
    net = Presto().eval()
    load_presto(net, WEIGHTS)
    return net


def inputs(n: int = 3, length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Values by formula, all observed, months from April on."""
    i = torch.arange(n * length * 17, dtype=torch.float64)
    x = (0.5 + 0.5 * torch.sin(i * 0.37)).float().view(n, length, 17)
    month = (torch.tensor([3, 9, 0])[:n, None] + torch.arange(length)) % 12
    return x, torch.ones(n, length, 17, dtype=torch.bool), month


#: Features 0, 16, .. 112 from the authors' code (geoml-presto 0.0.3, encoder with eval_task) with
#: the same weights and the inputs of the test below, which mask as their `mask` and classes do.
PUBLISHED = (
    (-0.1413, -2.76598, 0.59044, -1.80191, -0.62898, -0.40661, -2.65403, 0.69888),
    (-0.45128, -2.863, 1.1511, -1.45266, -0.82697, -0.64859, -1.05681, 0.88788),
    (-0.5858, -1.23878, 0.36307, -1.6067, 0.24655, -2.29378, -2.829, 0.2892),
)


@needs_weights
def test_it_gives_the_numbers_of_the_published_code() -> None:
    x, seen, month = inputs()
    seen[1, :, :2] = False  # no radar in the second
    seen[1, 5, 3] = False  # and one band of a group in one month: the group is masked
    seen[2, 3:] = False  # three months only, no elevation
    seen[2, :, 14:16] = False
    place = torch.tensor([[51.0, 4.5], [-12.0, -55.0], [0.0, 180.0]])
    world = torch.full((3, 12), 9)
    world[0], world[2, 1] = torch.arange(12) % 9, 4
    net = pretrained()
    with torch.no_grad():
        out = net(x, seen, month, place, world)
        other = net(torch.where(seen, x, 7.0), seen, month, place, world)
    assert out[:, ::16].numpy() == pytest.approx(np.array(PUBLISHED), abs=2e-5)
    assert torch.equal(out, other), "masked values must not count"


@needs_weights
def test_fixed_codes_are_those_of_the_file() -> None:
    """Codes of month and position are formulas here and numbers in the file."""
    fresh, net = Presto(), pretrained()
    assert (fresh.pos_embed - net.pos_embed).abs().max() < 2e-6
    assert (fresh.month_embed.weight - net.month_embed.weight).abs().max() < 2e-6
    assert not net.month_embed.weight.requires_grad
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 402_240


def test_each_observation_counts_and_nothing_else() -> None:
    torch.manual_seed(0)
    net = Presto().eval()
    x, seen, month = inputs()
    with torch.no_grad():
        whole = net(x, seen, month)
        for group in GROUPS.values():
            without = seen.clone()
            without[..., PRESTO_BANDS.index(group[0])] = False
            assert (net(x, without, month) - whole).abs().max() > 1e-4
        # Elevation is read once: that of later steps is ignored.
        later = x.clone()
        later[:, 1:, 14:16] = 3.0
        assert torch.equal(net(later, seen, month), whole)
        none = net(x, torch.zeros_like(seen), month)
        one = torch.zeros_like(seen)
        one[1] = True
        mixed = net(x, one, month)
    assert torch.isfinite(none).all() and torch.equal(none[0], none[1])
    assert torch.allclose(mixed[1], whole[1], atol=1e-6) and torch.equal(mixed[0], none[0])
    with pytest.raises(ModelError, match="T up to 24"):
        net(*inputs(2, 25))


def test_names_of_bands() -> None:
    assert presto_bands(["B02", "green", "RED", "nir"]) == ("B2", "B3", "B4", "B8")
    assert presto_bands(["B8A", "dem", "slope", "vv", "VH"]) == (
        "B8A", "elevation", "slope", "VV", "VH")  # fmt: skip
    assert presto_bands(["B04", "B08"]) == ("B4", "B8"), "they give the NDVI"
    for names, text in (
        (["NDVI", "EVI"], "no place for EVI"),
        (["B8", "nir"], "B8 more than once"),
        (["B11", "B08"], "B11 without B12"),
        (["B04", "B8A"], "B4 without B2, B3"),
        (["VV"], "VV without VH"),
    ):
        with pytest.raises(ModelError, match=text):
            presto_bands(names)


def test_scaling_is_that_of_its_training() -> None:
    norm = presto_scaling(("VV", "B8", "elevation", "temperature_2m", "NDVI"))
    values = np.array([-10.0, 0.31, 500.0, 293.15, 0.7])
    scaled = (values - np.array(norm.mean)) / np.array(norm.std)
    # (dB + 25) / 25, DN / 10000, m / 2000, (K - 272.15) / 35, as it is
    assert scaled == pytest.approx([0.6, 0.31, 0.25, 0.6, 0.7])


def test_months_are_means_of_what_was_seen() -> None:
    net = PrestoSeries(BANDS, start_day=335.0)
    month = net.month.tolist()
    assert month == [11, *range(11)], "a season from December on"
    x = torch.full((1, 4, 4), math.nan)
    t = torch.tensor([[3.0, 12.0, 40.0, 364.9]])
    x[0, :, 0] = torch.tensor([0.1, 0.3, 0.2, math.nan])
    x[0, :, 1] = torch.tensor([0.3, 0.5, math.nan, 0.4])
    mean, seen = net.monthly(x.nan_to_num(5.0), torch.isfinite(x), t)
    red, nir, ndvi = (PRESTO_BANDS.index(b) for b in ("B4", "B8", "NDVI"))
    assert mean[0, :2, red].tolist() == pytest.approx([0.2, 0.2])
    assert mean[0, [0, 11], nir].tolist() == pytest.approx([0.4, 0.4])
    assert seen[0, :, red].nonzero().flatten().tolist() == [0, 1]
    assert seen[0, :, nir].nonzero().flatten().tolist() == [0, 11]
    assert seen[0, :, ndvi].nonzero().flatten().tolist() == [0], "where both are"
    assert mean[0, 0, ndvi] == pytest.approx((0.4 - 0.2) / 0.6)
    assert not seen[0, :, :2].any()
    two_years = PrestoSeries(BANDS, period_days=730.5)
    assert two_years.month.tolist() == [*range(12)] * 2
    for settings in ({"period_days": 1500.0}, {"lat_lon": (95.0, 0.0)}, {"adapt": "some"}):
        with pytest.raises(ModelError, match="Presto"):
            PrestoSeries(BANDS, **settings)


def test_elevation_is_one_token_of_the_whole_series() -> None:
    net = PrestoSeries(("dem", "slope"))
    x = torch.tensor([[[100.0, 5.0], [math.nan, math.nan], [300.0, 7.0]]])
    mean, seen = net.monthly(x, torch.isfinite(x), torch.tensor([[100.0, 150.0, 200.0]]))
    at = [PRESTO_BANDS.index(b) for b in ("elevation", "slope")]
    assert seen[..., at].all() and (mean[0, :, at] == torch.tensor([200.0, 6.0])).all()


def series(n: int = 40) -> SeriesTable:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    days = np.tile(np.arange(10.0, 360.0, 25.0, dtype=np.float32), (n, 1))
    green = np.exp(-0.5 * ((days - np.array([90, 180, 270])[y][:, None]) / 40) ** 2)
    x = np.stack([0.1 - 0.05 * green, 0.2 + 0.3 * green, green - 12, green - 18], -1)
    x = (x + rng.normal(0, 0.01, x.shape)).astype(np.float32)
    return SeriesTable(x, days, y, np.arange(n) % 4, BANDS, ("a", "b", "c"))


def network(**settings: object) -> SeriesNet:
    torch.manual_seed(1)
    spec = SeriesSpec(BANDS, (TASK,), "presto", width=16, dropout=0.0, **settings)
    net = SeriesNet(spec).eval()
    if WEIGHTS.is_file():
        net.load_pretrained(WEIGHTS)
    return net


def output(net: SeriesNet) -> Tensor:
    table = series()
    return net(torch.from_numpy(table.x), torch.from_numpy(table.days))["class"]


def test_lora_starts_as_the_frozen_network_and_trains_only_its_additions() -> None:
    frozen, lora = network(adapt="frozen"), network(adapt="lora", rank=4, alpha=8.0)
    missing = lora.load_state_dict(frozen.state_dict(), strict=False)
    assert missing.missing_keys and all(".lora_" in k for k in missing.missing_keys)
    assert torch.equal(output(lora), output(frozen))
    output(lora).square().sum().backward()
    grads = {k for k, p in lora.named_parameters() if p.grad is not None}
    inner = {k for k in grads if k.startswith("encoder.presto.")}
    assert inner == {k for k, _ in lora.named_parameters() if ".lora_" in k}
    assert len(inner) == 2 * 8, "A and B of four layers in two blocks"
    outer = {k for k, _ in lora.named_parameters() if not k.startswith("encoder.presto.")}
    assert grads == inner | outer
    with torch.no_grad():
        for k, p in lora.named_parameters():
            if k.endswith("lora_b"):
                p.normal_(0, 0.1)
    assert (output(lora) - output(frozen)).abs().max() > 1e-3


def test_lora_is_small_and_says_what_it_cannot_do() -> None:
    counts = {a: network(adapt=a).parameter_counts()["encoder"]
              for a in ("fine-tune", "lora", "frozen")}  # fmt: skip
    # rank 8: (128 + 384) + (128 + 128) + 2 * (128 + 512) per block
    assert counts["lora"] - counts["frozen"] == 2 * 8 * (512 + 256 + 1280)
    assert counts["fine-tune"] - counts["frozen"] == 402_240
    layer = nn.Linear(6, 4)
    net = nn.Sequential()
    net.add_module("fc", layer)
    for rank, alpha in ((5, 1.0), (0, 1.0), (2, 0.0)):
        with pytest.raises(ModelError, match="rank 1 to 4"):
            add_lora(net, ["fc"], rank=rank, alpha=alpha)
    with pytest.raises(ModelError, match="no linear layer named other"):
        add_lora(net, ["other"], rank=1, alpha=1.0)
    assert layer.weight.requires_grad, "refused before anything is frozen"


QUICK = SeriesSettings(
    "presto", {"width": 16}, epochs=2, batch=16, augmentation=SeriesAugmentation(0, 0, 0, 0, 0)
)


@needs_weights
@pytest.mark.parametrize("adapt", ["fine-tune", "frozen", "lora"])
def test_fits_change_what_they_should(adapt: str) -> None:
    table = series()
    settings = replace(
        QUICK, weights=str(WEIGHTS), network={"width": 16, "adapt": adapt, "rank": 2}
    )
    fit = fit_series(table, settings, held_out_fold=0, seed=0)
    again = fit_series(table, settings, held_out_fold=0, seed=0)
    assert all(torch.equal(v, again.state_dict[k]) for k, v in fit.state_dict.items())
    fresh = pretrained().state_dict()
    moved = {k for k, v in fresh.items()
             if not torch.equal(fit.state_dict[f"encoder.presto.encoder.{k}"], v)}  # fmt: skip
    assert bool(moved) == (adapt == "fine-tune")
    assert not moved & {"pos_embed", "month_embed.weight"}
    assert fit.normalisation.mean[2] == -25.0, "its own scaling, not that of the sample"
    card = json.dumps(fit.card())
    assert str(WEIGHTS.parent) not in card and "sha256" in card
    p = fit.network().predict(torch.from_numpy(table.x), torch.from_numpy(table.days))["class"]
    assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)


@needs_weights
def test_it_learns_the_season() -> None:
    table = series(120)
    settings = replace(QUICK, epochs=8, learning_rate=2e-3, weights=str(WEIGHTS))
    fit = fit_series(table, settings, held_out_fold=0, seed=0)
    own = table.rows(table.fold == 0)
    p = fit.network().predict(torch.from_numpy(own.x), torch.from_numpy(own.days))["class"]
    assert (p.argmax(1).numpy() == own.y).mean() > 0.8


def test_weights_that_do_not_do(tmp_path: Path) -> None:
    net = Presto()
    with pytest.raises(ModelError, match="no such file"):
        load_presto(net, tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ModelError, match="no file of torch weights"):
        load_presto(net, tmp_path / "text.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="a state dict"):
        load_presto(net, tmp_path / "list.pt")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save({k: v for k, v in Presto().state_dict().items() if "norm" not in k},
               tmp_path / "part.pt")  # fmt: skip
    with pytest.raises(ModelError, match="do not fit"):
        load_presto(net, tmp_path / "part.pt")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "all or nothing"
    for state in ({f"encoder.{k}": v for k, v in before.items()}, before):
        torch.save({**state, "decoder.mask_token": torch.zeros(3)}, tmp_path / "whole.pt")
        load_presto(Presto(), tmp_path / "whole.pt")
    with pytest.raises(ModelError, match="frozen without weights"):
        SeriesSettings("presto", {"adapt": "frozen"})
    with pytest.raises(ModelError, match="encoder presto"):
        SeriesSettings("ltae", weights="file.pt")
    with pytest.raises(ModelError, match="encoder presto"):
        SeriesNet(SeriesSpec(BANDS, (TASK,))).load_pretrained(WEIGHTS)
