"""Networks of single pixels as networks for maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from terraloom.models.fusion import Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.pixelwise import PixelNet, series_spec
from terraloom.models.registry import build, make_spec

STEPS = ("2018-03-05", "2018-05-20", "2018-09-14")
CHANNELS = {
    "s2_10": tuple(f"{s}/{b}" for s in STEPS for b in ("B04", "B08")),
    "s2_20": tuple(f"{s}/B11" for s in STEPS),
    "s1_60": tuple(f"{s}/VV" for s in STEPS[1:]),
    "dem_30": ("dem",),
}
FACTOR = {"s2_10": 1, "s2_20": 2, "s1_60": 6, "dem_30": 3}
COVER = TaskSpec("cover", "segmentation", ("a", "b", "c"))


def make_net(network: str = "ltae", **kw: Any) -> PixelNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(make_spec(network, CHANNELS, (COVER,), **kw))
    assert isinstance(net, PixelNet)
    net.eval()
    return net


def scene(size: int = 24, n: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: torch.rand((n, len(c), size // FACTOR[k], size // FACTOR[k]), generator=g)
            for k, c in CHANNELS.items()}  # fmt: skip


@pytest.mark.parametrize("network", ["ltae", "tempcnn", "gru"])
def test_map_equals_the_series_of_its_pixels(network: str) -> None:
    net, x = make_net(network), scene()
    x["s2_10"][:, 2:4, 3:9, 3:9] = math.nan
    x["s2_10"][:, 0, 12, 12] = math.nan  # one band of a date that is valid otherwise
    raw = net(x)["cover"]
    row, col = torch.tensor([0, 5, 12, 23]), torch.tensor([7, 6, 12, 23])
    series = torch.full((4, 3, 6), math.nan)
    for i, (r, c) in enumerate(zip(row.tolist(), col.tolist(), strict=True)):
        values = x["s2_10"][0, :, r, c].view(3, 2)
        ndvi = (values[:, 1] - values[:, 0]) / (values[:, 1] + values[:, 0]).clamp_min(1e-3)
        series[i, :, :2], series[i, :, 2] = values, ndvi.clamp(-1.5, 1.5)
        series[i, :, 3] = x["s2_20"][0, :, r // 2, c // 2]
        series[i, 1:, 4] = x["s1_60"][0, :, r // 6, c // 6]
        series[i, :, 5] = x["dem_30"][0, 0, r // 3, c // 3]
    assert series_spec(net.spec).bands == (
        "s2_10/B04", "s2_10/B08", "s2_10/index0", "s2_20/B11", "s1_60/VV", "dem_30/dem",
    )  # fmt: skip
    days = (net.day + 1).expand(4, -1)
    f = net.series.encoder(net.series.prepare(series, days))
    want = net.heads["cover"](f[..., None, None])[..., 0, 0]
    assert float((raw[0, :, row, col].T - want).detach().abs().max()) < 1e-5


def test_a_pixel_sees_itself_and_its_coarse_pixels_only() -> None:
    net, x = make_net(), {k: v.requires_grad_() for k, v in scene().items()}
    assert (net.stride_px, net.receptive_field_px(), net.halo_px()) == (6, 5, 0)
    fine = build(make_spec("ltae", {"s2_10": CHANNELS["s2_10"]}, (COVER,)))
    assert (fine.stride_px, fine.receptive_field_px(), fine.halo_px()) == (1, 0, 0)
    net(x)["cover"][0, :, 11, 6].sum().backward()
    for name, v in x.items():
        grad = v.grad
        assert grad is not None
        seen = torch.nonzero(grad.abs().sum((0, 1))).tolist()
        assert seen == [[11 // FACTOR[name], 6 // FACTOR[name]]], name


def test_static_bands_do_not_make_a_cloudy_date_count() -> None:
    net, x = make_net(), scene()
    cloudy = {k: v.clone() for k, v in x.items()}
    for k, per in (("s2_10", 2), ("s2_20", 1)):
        cloudy[k][:, :per] = math.nan
    series = net._series(net.prepare(cloudy))
    assert bool(torch.isnan(series[:, 0]).all()) and bool(torch.isfinite(series[:, 1:]).all())
    flat = net.predict({**x, "dem_30": torch.zeros_like(x["dem_30"])})["cover"]
    assert float((flat - net.predict(x)["cover"]).abs().max()) > 1e-4


def test_strips_of_series_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_net("gru"), scene(n=2)
    whole = net.predict(x)["cover"]
    monkeypatch.setattr("terraloom.models.pixelwise._ROWS", 100)
    assert float((net.predict(x)["cover"] - whole).abs().max()) < 1e-5


def test_presto_gets_values_in_their_units() -> None:
    bands = ("B02", "B03", "B04", "B08")
    channels = {
        "s2_10": tuple(f"{s}/{b}" for s in STEPS for b in bands),
        "s1_10": tuple(f"{s}/{b}" for s in STEPS for b in ("VV", "VH")),
    }
    spec = make_spec("presto", channels, (COVER,), width=4, adapt="frozen", lat_lon=(46.0, 7.0))
    norm = {
        "s2_10": Normalisation((0.2,) * (12 + len(spec.pairs("s2_10"))), (0.1,) * 18),
        "s1_10": Normalisation((-12.0,) * 6, (3.0,) * 6, decibel=True),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(spec, norm)
    assert isinstance(net, PixelNet)
    g = torch.Generator().manual_seed(0)
    x = {"s2_10": 0.1 + 0.2 * torch.rand((1, 12, 4, 4), generator=g),
         "s1_10": torch.full((1, 6, 4, 4), 0.1)}  # fmt: skip
    series = net._series(net.prepare(x))
    assert series_spec(net.spec).bands == (*bands, "VV", "VH")
    at = series_spec(net.spec).bands.index("B08")
    assert torch.allclose(series[:, 1, at].view(4, 4), x["s2_10"][0, 7], atol=1e-6)
    vv = series_spec(net.spec).bands.index("VV")
    assert series[:, :, vv].flatten().tolist() == pytest.approx([-10.0] * 48, abs=1e-4)
    assert net.eval().predict(x)["cover"].shape == (1, 3, 4, 4)
    names = {k for k, p in net.named_parameters() if p.requires_grad}
    assert names and not any(".presto." in k for k in names), "frozen"


@pytest.mark.parametrize("network", ["ltae", "tempcnn", "gru"])
def test_pixels_that_do_not_count_are_left_out(network: str) -> None:
    """In evaluation the others are as always; in training they cost nothing."""
    net, x = make_net(network), scene(n=2)
    ready = net.prepare(x)
    wanted = torch.rand((2, 24, 24), generator=torch.Generator().manual_seed(1)) < 0.2
    whole, some = net.forward_prepared(ready)["cover"], net.forward_at(ready, wanted)["cover"]
    at = wanted[:, None].expand_as(whole)
    assert torch.allclose(some[at], whole[at], atol=1e-6)
    assert not torch.allclose(some[~at], whole[~at], atol=1e-3)
    seen: list[int] = []
    net.series.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0].x)))
    net.forward_at(ready, wanted)
    assert seen == [int(wanted.sum())]
    for none in (torch.zeros_like(wanted), torch.ones_like(wanted)):
        assert torch.equal(net.forward_at(ready, none)["cover"], whole)
