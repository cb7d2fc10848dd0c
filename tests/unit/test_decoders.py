"""Decoders of the fusion network: reach, tiles, odd windows, what is missing."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from support.networks import check_folded, check_reach
from terraloom.errors import ModelError
from terraloom.models.decoders import DECODERS
from terraloom.models.fusion import FusionNet, FusionSpec, Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.preprocess.groups import group_factor

S2_10 = ("B02", "B03", "B04", "B08")
S2_20 = ("B05", "B06", "B07", "B8A", "B11", "B12")
CHANNELS = {"s2_10": S2_10, "s1_10": ("VV", "VH"), "s2_20": S2_20, "own_30": ("b",)}
TASKS = (TaskSpec("cover", "segmentation", ("a", "b", "c")), TaskSpec("edge", "boundary"))
NAMES = tuple(DECODERS)


def make_net(decoder: str, depth: int = 3, **kw: object) -> FusionNet:
    kw = {"channels": CHANNELS, "width": 6, **kw}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FusionNet(FusionSpec(tasks=TASKS, depth=depth, decoder=decoder, **kw))  # type: ignore[arg-type]
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.uniform_(-0.2, 0.2)
                m.running_var.uniform_(0.5, 1.5)
        for p in net.parameters():  # fresh weights hardly look beyond their nearest pixels
            if p.ndim == 4:
                p.data.mul_(2)
    return net.eval()


def scene(h: int, w: int, n: int = 1, channels: dict[str, tuple[str, ...]] | None = None,
          seed: int = 0) -> dict[str, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(
            (n, len(c), math.ceil(h / group_factor(name)), math.ceil(w / group_factor(name))),
            generator=g,
        )
        for name, c in (channels or CHANNELS).items()
    }


@pytest.mark.parametrize("decoder", NAMES)
@pytest.mark.parametrize(
    ("depth", "convs", "channels"),
    [
        (2, 1, {"s2_10": ("B04",)}),
        (3, 1, CHANNELS),
        (3, 2, {"l8_30": ("b1",)}),
        (4, 1, {"s2_10": ("B04",), "modis_240": ("v",)}),
        (5, 1, {"s1_10": ("VV",), "b_160": ("b",)}),
    ],
)
def test_receptive_field_equals_reach_of_gradient(
    decoder: str, depth: int, convs: int, channels: dict[str, tuple[str, ...]]
) -> None:
    net = make_net(decoder, depth, channels=channels, convs=convs, width=4, indices=False)
    for name, p in net.named_parameters():
        # Positive weights: no path from input to output can cancel or be cut by a ReLU.
        p.data.fill_(0.05 if p.ndim > 1 else (1.0 if name.endswith("weight") else 0.1))
    check_reach(net, lambda h, w, n: scene(h, w, n=n, channels=channels))


@pytest.mark.parametrize("decoder", NAMES)
def test_tiles_with_halo_equal_the_whole_and_without_do_not(decoder: str) -> None:
    net = make_net(decoder)
    halo, s, size = net.halo_px(), net.stride_px, 96
    x = scene(size + 2 * halo, size + 2 * halo)
    x["s2_10"][:, :, 30:60, 40:90] = math.nan
    whole = net.predict(x)
    core = {k: v[..., halo:-halo, halo:-halo] for k, v in whole.items()}

    def tile(top: int, left: int, px: int) -> dict[str, Tensor]:
        cut = {}
        for k, v in x.items():
            f = group_factor(k)
            rows, columns = slice(top // f, (top + px) // f), slice(left // f, (left + px) // f)
            cut[k] = v[..., rows, columns]
        return net.predict(cut)

    step = 4 * s
    for top in range(0, size, step):
        for left in range(0, size, step):
            got = tile(top, left, step + 2 * halo)
            for k, v in got.items():
                want = core[k][..., top : top + step, left : left + step]
                assert float((v[..., halo:-halo, halo:-halo] - want).abs().max()) < 1e-5
    bare = tile(halo, halo, step)["cover"]
    assert float((bare - core["cover"][..., :step, :step]).abs().max()) > 1e-3


@pytest.mark.parametrize("decoder", NAMES)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (37, 53), (96, 97)])
def test_any_window_and_any_sensor_left_out(decoder: str, h: int, w: int) -> None:
    net, x = make_net(decoder), scene(h, w, n=2)
    out = net.predict(x)
    assert out["cover"].shape == (2, 3, h, w) and out["edge"].shape == (2, 1, h, w)
    assert torch.allclose(out["cover"].sum(1), torch.ones(2, h, w), atol=1e-5)
    for name in CHANNELS:
        without = net.predict({k: v for k, v in x.items() if k != name})["cover"]
        invalid = net.predict({**x, name: torch.full_like(x[name], math.nan)})["cover"]
        assert torch.equal(without, invalid), name
        assert bool(torch.isfinite(without).all())
        if h > 1:
            assert float((without - out["cover"]).abs().max()) > 1e-3, f"{name} is not used"


@pytest.mark.parametrize("decoder", NAMES)
def test_a_missing_band_is_masked_whatever_stands_for_it(decoder: str) -> None:
    """Nothing is guessed: neither the band's mean nor any marker of "no value" has influence."""
    counts = {"s2_10": 4 + 2, "s1_10": 2, "s2_20": 6 + 3, "own_30": 1}
    plain = {g: Normalisation((0.4,) * n, (0.3,) * n) for g, n in counts.items()}
    x = scene(48, 48)
    for group, band, touched in (("s2_10", 3, (3, 4, 5)), ("s2_20", 4, (4, 7, 8)),
                                 ("s1_10", 0, (0,)), ("own_30", 0, (0,))):  # fmt: skip
        outs = []
        for marker, mean in ((math.nan, 0.4), (math.inf, 0.4), (-math.inf, 0.4), (math.nan, 9.0)):
            means = tuple(mean if i in touched else 0.4 for i in range(counts[group]))
            norm = {**plain, group: replace(plain[group], mean=means)}
            net = make_net(decoder)
            again = FusionNet(net.spec, norm)
            own = {k: v for k, v in again.state_dict().items() if k.startswith(("mean_", "std_"))}
            again.load_state_dict({**net.state_dict(), **own})
            y = {k: v.clone() for k, v in x.items()}
            y[group][:, band] = marker
            outs.append(again.eval().predict(y)["cover"])
            if mean == 0.4 and marker != marker:  # the mask tells a missing band from its mean
                y[group][:, band] = 0.4
                assert not torch.allclose(outs[-1], again.predict(y)["cover"])
        assert all(torch.equal(outs[0], o) for o in outs[1:]), (group, band)


@pytest.mark.parametrize("decoder", NAMES)
def test_moving_the_scene_moves_the_map(decoder: str) -> None:
    net = make_net(decoder, depth=4)
    s, rf = net.stride_px, net.receptive_field_px()
    size = 2 * rf + 4 * s
    x = scene(size + s, size)
    a = net.predict(x)["cover"][..., s + rf : size + s - rf, rf : size - rf]
    moved = {k: v[..., s // group_factor(k) :, :] for k, v in x.items()}
    b = net.predict(moved)["cover"][..., rf : size - rf, rf : size - rf]
    assert float((a - b).abs().max()) < 1e-4
    assert float((a[..., 1:, :] - b[..., :-1, :]).abs().max()) > 0.05


def test_the_context_sees_further_and_the_pyramid_costs_no_more_weights() -> None:
    nets = {d: make_net(d, depth=4, width=12) for d in NAMES}
    count = {d: sum(p.numel() for p in n.parameters()) for d, n in nets.items()}
    assert nets["context"].receptive_field_px() > 2 * nets["unet"].receptive_field_px()
    assert count["fpn"] < count["unet"] < count["context"] < 2 * count["unet"]


@pytest.mark.parametrize("decoder", NAMES)
def test_every_weight_learns_and_copies_are_free(decoder: str) -> None:
    net = make_net(decoder, depth=4).train()
    other = copy.deepcopy(net)
    sum(v.square().sum() for v in net(scene(96, 96, n=2)).values()).backward()  # type: ignore[union-attr]
    dead = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not dead
    for p in other.parameters():
        p.data.zero_()
    other(scene(48, 48))
    assert all(bool(p.any()) for n, p in net.named_parameters() if p.ndim == 4)
    with pytest.raises(RuntimeError):
        make_net("unet" if decoder != "unet" else "fpn", depth=4).load_state_dict(net.state_dict())


def test_cards_name_the_decoder_and_old_ones_mean_a_unet() -> None:
    for name in NAMES:
        spec = FusionSpec(CHANNELS, TASKS, decoder=name)
        card = json.loads(json.dumps(spec.to_json()))
        assert card["decoder"] == name and FusionSpec.from_json(card) == spec
        card.pop("decoder")
        assert FusionSpec.from_json(card).decoder == "unet"
    with pytest.raises(ModelError, match="pyramid"):
        FusionSpec(CHANNELS, TASKS, decoder="pyramid")


@pytest.mark.parametrize("decoder", NAMES)
def test_folding_changes_nothing_but_time(decoder: str) -> None:
    check_folded(make_net(decoder), scene(37, 53, n=2))
