"""Fusion network: geometry, missing data, tiles; losses."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.networks import check_reach
from terraloom.errors import ModelError, StateError
from terraloom.models.fusion import FusionNet, FusionSpec, Normalisation, index_pairs
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import (
    SegmentationLoss,
    boundary_loss,
    class_weights,
    gaussian_nll,
    segmentation_loss,
)
from terraloom.models.registry import card_path, load_member, save_member
from terraloom.preprocess.groups import group_factor

S2_10 = ("B02", "B03", "B04", "B08")
S2_20 = ("B05", "B06", "B07", "B8A", "B11", "B12")
S2_60 = ("B01", "B09", "B10")
CHANNELS = {"s2_10": S2_10, "s2_20": S2_20, "s2_60": S2_60}
#: Pixels of 10, 20, 30, 60 and 240 m together; the 30 m ones have enough bands to be reduced.
MIXED = {
    "s1_10": ("VV", "VH"), "s2_20": S2_20, "l8_30": tuple(f"b{i}" for i in range(11)),
    "s2_60": S2_60, "modis_240": ("a/NDVI", "b/NDVI"),
}  # fmt: skip
LANDSAT = {"SR_B3": "B03", "SR_B4": "B04", "SR_B5": "B8A", "SR_B6": "B11", "SR_B7": "B12"}
COVER = TaskSpec("cover", "segmentation", ("a", "b", "c"))
HEIGHT = TaskSpec("height", "regression", unit="m", mean=8.0, std=4.0)
EDGE = TaskSpec("edge", "boundary")
TASKS = (COVER, HEIGHT, EDGE)


def make_net(depth: int = 3, convs: int = 1, channels: dict[str, tuple[str, ...]] = CHANNELS,
             **kw: Any) -> FusionNet:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FusionNet(FusionSpec(channels, TASKS, width=6, depth=depth, convs=convs, **kw))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.uniform_(-0.2, 0.2)
                m.running_var.uniform_(0.5, 1.5)
    return net.eval()


def scene(
    h: int, w: int, n: int = 1, seed: int = 0, channels: dict[str, tuple[str, ...]] = CHANNELS
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    size = {name: group_factor(name) for name in channels}
    return {
        name: torch.rand((n, len(c), math.ceil(h / f), math.ceil(w / f)), generator=g)
        for (name, c), f in zip(channels.items(), size.values(), strict=True)
    }


def cut(x: dict[str, Tensor], top: int, left: int, h: int, w: int) -> dict[str, Tensor]:
    """Window of a scene; NaN outside of it."""
    out = {}
    for name, src in x.items():
        f = group_factor(name)
        box = src.new_full((src.shape[0], src.shape[1], h // f, w // f), math.nan)
        t, left_f = top // f, left // f
        r0, c0 = max(t, 0), max(left_f, 0)
        r1, c1 = min(t + h // f, src.shape[2]), min(left_f + w // f, src.shape[3])
        box[:, :, r0 - t : r1 - t, c0 - left_f : c1 - left_f] = src[:, :, r0:r1, c0:c1]
        out[name] = box
    return out


@pytest.mark.parametrize(
    ("depth", "convs", "channels"),
    [
        (2, 1, CHANNELS),
        (3, 1, CHANNELS),
        (3, 2, CHANNELS),
        (4, 1, CHANNELS),
        (3, 1, {"l8_30": ("b1",)}),
        (4, 1, {"s2_10": ("B04",), "l8_30": ("b1",), "modis_240": ("v",)}),
        (3, 1, {"a_40": ("b",), "b_120": ("b",), "c_160": ("b",)}),
        (2, 1, {"s1_10": ("VV",), "era5_480": ("t",)}),
    ],
)
def test_receptive_field_equals_reach_of_gradient(
    depth: int, convs: int, channels: dict[str, tuple[str, ...]]
) -> None:
    net = make_net(depth, convs, channels, indices=False)
    for name, p in net.named_parameters():
        # Positive weights: no path from input to output can cancel or be cut by a ReLU.
        p.data.fill_(0.05 if p.ndim > 1 else (1.0 if name.endswith("weight") else 0.1))
    check_reach(net, lambda h, w, n: scene(h, w, n=n, channels=channels))


def test_tiles_with_halo_equal_the_whole_scene() -> None:
    net = make_net(depth=3, convs=1)
    h, w = 144, 168
    x = scene(h, w)
    x["s2_10"][:, :, 30:60, 40:90] = math.nan
    halo, whole = net.halo_px(), net.predict(cut(x, -24, -24, h + 48, w + 48))
    pad_whole = {k: v[..., 24:-24, 24:-24] for k, v in whole.items()}
    assert halo % net.stride_px == 0
    # The whole scene gets the same surroundings as the tiles: a full halo of missing data.
    full = net.predict(cut(x, -halo, -halo, h + 2 * halo, w + 2 * halo))
    full = {k: v[..., halo:-halo, halo:-halo] for k, v in full.items()}
    for size in (24, 48, 72):
        for name, want in full.items():
            got = torch.full_like(want, math.nan)
            for top in range(0, h, size):
                for left in range(0, w, size):
                    tile = cut(x, top - halo, left - halo, size + 2 * halo, size + 2 * halo)
                    core = net.predict(tile)[name][..., halo:-halo, halo:-halo]
                    core = core[..., : h - top, : w - left]
                    got[..., top : top + size, left : left + size] = core
            assert float((got - want).abs().max()) < 1e-5
    rf = net.receptive_field_px()
    for name, v in full.items():
        inner = (slice(rf, h - rf), slice(rf, w - rf))
        assert float((v[0, 0][inner] - pad_whole[name][0, 0][inner]).abs().max()) < 1e-5


def louder(net: FusionNet) -> FusionNet:
    """Fresh weights hardly look beyond their nearest pixels; these do."""
    for p in net.parameters():
        if p.ndim == 4:
            p.data.mul_(2)
    return net


def test_tiles_equal_the_whole_for_pixels_of_10_to_240_m_together() -> None:
    net = louder(make_net(4, 1, MIXED, reduce_to=4))
    assert list(net.reduce) == ["s2_20", "l8_30"]
    size, x = 288, scene(288, 288, channels=MIXED)
    x["l8_30"][:, :, 20:40, 10:30] = math.nan
    halo = net.halo_px()
    assert net.stride_px == 24 and halo % 48 in (0, 24)
    full = net.predict(cut(x, -halo, -halo, size + 2 * halo, size + 2 * halo))["cover"]
    full = full[..., halo:-halo, halo:-halo]
    for name in MIXED:  # each is used, or its geometry would not be tested
        without = net.predict({k: v for k, v in x.items() if k != name})["cover"]
        assert float((without - net.predict(x)["cover"]).abs().max()) > 1e-3, name
    for step in (48, 96, 144):
        got = torch.full_like(full, math.nan)
        for top in range(0, size, step):
            for left in range(0, size, step):
                tile = cut(x, top - halo, left - halo, step + 2 * halo, step + 2 * halo)
                core = net.predict(tile)["cover"][..., halo:-halo, halo:-halo]
                got[..., top : top + step, left : left + step] = core
        assert float((got - full).abs().max()) < 1e-4, step


def test_moving_the_scene_by_480_m_moves_the_map() -> None:
    net = louder(make_net(4, 1, MIXED, reduce_to=4))
    x, rf = scene(336, 288, channels=MIXED), net.receptive_field_px()
    a = net.predict(x)["cover"][..., 48 + rf : 336 - rf, rf : 288 - rf]
    moved = {k: v[..., 48 // group_factor(k) :, :] for k, v in x.items()}
    b = net.predict(moved)["cover"][..., rf : 288 - rf, rf : 288 - rf]
    assert float((a - b).abs().max()) < 1e-4
    assert float((a[..., 1:, :] - b[..., :-1, :]).abs().max()) > 0.1


def test_too_small_a_halo_shows() -> None:
    net = make_net(depth=3, convs=1)
    x = scene(144, 144)
    want = net.predict(x)["cover"]
    got = net.predict(cut(x, 24, 24, 72, 72))["cover"]
    assert float((got - want[..., 24:96, 24:96]).abs().max()) > 1e-4


@pytest.mark.parametrize(("h", "w"), [(1, 1), (37, 53), (96, 97), (50, 144)])
def test_any_window_size(h: int, w: int) -> None:
    out = make_net().predict(scene(h, w, n=2))
    assert out["cover"].shape == (2, 3, h, w)
    assert out["height"].shape == (2, 2, h, w)
    assert out["edge"].shape == (2, 1, h, w)
    assert all(bool(torch.isfinite(v).all()) for v in out.values())
    assert torch.allclose(out["cover"].sum(1), torch.ones(2, h, w), atol=1e-5)


def test_batch_does_not_matter() -> None:
    net, x = make_net(), scene(48, 48, n=3)
    alone = torch.cat([net.predict({k: v[i : i + 1] for k, v in x.items()})["cover"]
                       for i in range(3)])  # fmt: skip
    assert float((net.predict(x)["cover"] - alone).abs().max()) < 1e-5


def test_missing_modality_is_the_same_as_invalid_everywhere() -> None:
    net, x = make_net(), scene(48, 48)
    without = {k: v for k, v in x.items() if k != "s2_20"}
    invalid = {**x, "s2_20": torch.full_like(x["s2_20"], math.nan)}
    a, b = net.predict(without)["cover"], net.predict(invalid)["cover"]
    assert torch.equal(a, b)
    assert not torch.allclose(a, net.predict(x)["cover"])


def test_mask_tells_invalid_from_mean() -> None:
    net, x = make_net(indices=False), scene(48, 48)
    mean = {**x, "s2_10": torch.zeros_like(x["s2_10"])}
    invalid = {**x, "s2_10": torch.full_like(x["s2_10"], math.nan)}
    assert not torch.allclose(net.predict(mean)["cover"], net.predict(invalid)["cover"])


def test_wrong_inputs_are_refused() -> None:
    net, x = make_net(), scene(48, 48)
    with pytest.raises(ModelError, match="s2_10"):
        net({**x, "s2_10": x["s2_10"][:, :2]})
    with pytest.raises(ModelError, match="s2_20"):
        net({**x, "s2_20": x["s2_20"][..., :-1]})
    with pytest.raises(ModelError):
        net({"thermal": x["s2_10"]})
    with pytest.raises(ModelError, match="training mode"):
        make_net().train().predict(x)


def test_indices_pair_bands_of_one_period() -> None:
    names = ("2018-05/B04", "2018-05/B08", "2018-08/B08", "2018-08/B04")
    assert index_pairs("s2_10", names) == [(1, 0), (2, 3)]
    assert index_pairs("s2_10", S2_10) == [(3, 2), (1, 3)]
    assert index_pairs("s2_20", S2_20) == [(3, 0), (3, 4), (4, 5)]
    net = make_net(channels={"s2_10": S2_10})
    x = torch.rand(1, 4, 6, 6)
    ndvi = (x[:, 3] - x[:, 2]) / (x[:, 3] + x[:, 2])
    assert torch.allclose(net.features("s2_10", x)[:, 4], ndvi, atol=1e-2)


def test_indices_follow_the_roles_of_any_sensor() -> None:
    names = tuple(f"{p}/{b}" for p in ("t1", "t2") for b in ("SR_B4", "SR_B5", "SR_B6", "ST_B10"))
    assert index_pairs("l8_30", names) == [], "without roles no band is guessed"
    # NDVI and NDMI of each period.
    assert index_pairs("l8_30", names, LANDSAT) == [(1, 0), (1, 2), (5, 4), (5, 6)]
    every = ("SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7")
    assert index_pairs("l8_30", every, LANDSAT) == [(2, 1), (0, 2), (2, 3), (3, 4)]
    both = ("B03", "B04", "B05", "B08", "B8A", "B11")
    roles = {b: b for b in both}
    assert index_pairs("own_10", both, roles) == [(3, 1), (0, 3), (4, 2), (4, 5)]
    net = make_net(channels={"l8_30": names}, roles={"l8_30": LANDSAT})
    x = torch.rand(1, 8, 4, 4)
    ndmi = (x[:, 5] - x[:, 6]) / (x[:, 5] + x[:, 6]).clamp_min(1e-3)
    assert torch.allclose(net.features("l8_30", x)[:, 11], ndmi)


def test_linear_power_becomes_decibels() -> None:
    spec = FusionSpec({"s1_10": ("VV", "VH")}, (COVER,))
    net = FusionNet(spec, {"s1_10": Normalisation((0.0, 0.0), (1.0, 1.0), decibel=True)})
    x = torch.tensor([0.1, 0.01]).view(1, 2, 1, 1)
    assert net.features("s1_10", x).flatten().tolist() == pytest.approx([-10.0, -20.0])


def test_signed_channels_of_a_matrix_stay_linear() -> None:
    names = ("a/T11", "a/T12_re", "a/T22")
    spec = FusionSpec({"polsar_10": names}, (COVER,), signed={"polsar_10": ("a/T12_re",)})
    norm = {"polsar_10": Normalisation((0.0,) * 3, (1.0,) * 3, decibel=True)}
    x = torch.tensor([0.1, -0.3, 0.001]).view(1, 3, 1, 1)
    for again in (spec, FusionSpec.from_json(json.loads(json.dumps(spec.to_json())))):
        got = FusionNet(again, norm).features("polsar_10", x).flatten().tolist()
        assert got == pytest.approx([-10.0, -0.3, -30.0])


def test_hundreds_of_bands_cost_little() -> None:
    few = FusionNet(FusionSpec({"own_30": tuple(f"b{i}" for i in range(32))}, (COVER,)))
    many = FusionNet(FusionSpec({"own_30": tuple(f"b{i}" for i in range(200))}, (COVER,)))
    bare = FusionNet(
        FusionSpec({"own_30": tuple(f"b{i}" for i in range(200))}, (COVER,), reduce_to=0)
    )
    count = [sum(p.numel() for p in n.parameters()) for n in (few, many, bare)]
    assert count[1] - count[0] == 201 * 32 + 2 * 32, "one small layer more, the same trunk"
    assert count[2] > 3 * count[1]
    assert few.receptive_field_px() == many.receptive_field_px()


def test_the_demos_network_is_the_one_its_weights_were_trained_for() -> None:
    """Shapes and their order decide which random numbers a training draws."""
    net = FusionNet(FusionSpec(CHANNELS, (COVER,)))
    shapes = [tuple(p.shape) for n, p in net.named_parameters() if p.ndim == 4]
    assert shapes == [
        (12, 7, 3, 3), (32, 12, 2, 2), (48, 32, 2, 2), (64, 48, 2, 2),
        (32, 60, 3, 3), (48, 76, 3, 3), (64, 92, 3, 3), (12, 32, 1, 1), (32, 48, 1, 1),
        (48, 64, 1, 1), (12, 12, 3, 3), (32, 32, 3, 3), (48, 48, 3, 3), (3, 12, 1, 1),
    ]  # fmt: skip
    assert (net.stride_px, net.receptive_field_px()) == (24, 32)
    assert list(net.feature_slices()) == ["s2_10", "s2_20", "s2_60"]
    old = {k: v for k, v in net.spec.to_json().items() if k not in ("roles", "signed", "reduce_to")}
    again = FusionNet(FusionSpec.from_json(old))
    assert again.spec.reduce_to == 0, "a network from before was never reduced"
    assert again.state_dict().keys() == net.state_dict().keys()


def test_regression_head_gives_unit_and_lognormal_moments() -> None:
    net = make_net()
    raw = torch.tensor([0.5, math.log(0.25)]).view(1, 2, 1, 1)
    got = net.heads["height"].physical(raw).flatten().tolist()  # type: ignore[operator,union-attr]
    assert got == pytest.approx([8.0 + 0.5 * 4, 0.25 * 16])
    skewed = TaskSpec("b", "regression", transform="log1p", mean=1.0, std=0.5)
    head = FusionNet(FusionSpec(CHANNELS, (skewed,))).heads["b"]
    m, v = head.physical(torch.tensor([0.4, 0.0]).view(1, 2, 1, 1)).flatten().tolist()  # type: ignore[operator,union-attr]
    draws = np.expm1(np.random.default_rng(0).normal(1.2, 0.5, 2_000_000))
    assert m == pytest.approx(draws.mean(), rel=0.01)
    assert v == pytest.approx(draws.var(), rel=0.03)


def test_spec_survives_json_and_bad_specs_are_refused() -> None:
    spec = FusionSpec(
        CHANNELS, TASKS, width=8, depth=5, roles={"s2_10": {"B08": "B08"}},
        signed={"s2_60": ("B01",)}, reduce_to=8,
    )  # fmt: skip
    assert FusionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(ModelError, match="attention"):
        FusionSpec.from_json(spec.to_json() | {"attention": True})
    for bad in ({"depth": 1}, {"widths": (4, 4), "depth": 3}):
        with pytest.raises(ModelError):
            FusionSpec(CHANNELS, TASKS, **bad)  # type: ignore[arg-type]
    for name in ("thermal", "aster_15", "modis_250", "l8_0"):
        with pytest.raises(ModelError, match=name):
            FusionSpec({name: ("B10",)}, TASKS)
    with pytest.raises(ModelError):
        TaskSpec("x", "detection")


def test_member_file_round_trip_and_tampering(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, path = make_net(), tmp_path / "m.safetensors"
    norm = {g: Normalisation((0.0,) * n, (1.0,) * n)
            for g, n in (("s2_10", 6), ("s2_20", 9), ("s2_60", 3))}  # fmt: skip
    save_member(path, net.state_dict(), net.spec, norm)
    again, card = load_member(path)
    x = scene(48, 48)
    assert float((again.predict(x)["cover"] - net.predict(x)["cover"]).abs().max()) < 1e-6
    assert card["receptive_field_px"] == net.receptive_field_px()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StateError, match="differ"):
        load_member(path)
    card_path(path).unlink()
    with pytest.raises(StateError, match="missing"):
        load_member(path)


# --- losses ----------------------------------------------------------------------------------
def _batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn((2, 3, 8, 8), generator=g), torch.randint(0, 3, (2, 8, 8), generator=g)


def test_cross_entropy_equals_torch_and_ignores() -> None:
    z, y = _batch()
    y[0, :4] = 255
    w = torch.tensor([1.0, 2.0, 0.5])
    want = nn.functional.cross_entropy(z, y, weight=w, ignore_index=255)
    assert float(segmentation_loss(z, y, weights=w)) == pytest.approx(float(want), rel=1e-5)
    z2 = z.clone()
    z2[0, :, :4] = 99.0
    assert float(segmentation_loss(z2, y)) == float(segmentation_loss(z, y))
    assert float(segmentation_loss(z, torch.full_like(y, 255))) == 0.0


def test_generalised_cross_entropy_limits() -> None:
    z, y = _batch()
    ce = float(segmentation_loss(z, y))
    near = float(segmentation_loss(z, y, settings=SegmentationLoss("gce", q=1e-4)))
    assert near == pytest.approx(ce, rel=1e-3)
    true = z.softmax(1).gather(1, y[:, None]).mean()
    mae = float(segmentation_loss(z, y, settings=SegmentationLoss("gce", q=1.0)))
    assert mae == pytest.approx(1 - float(true), rel=1e-5)


def test_dice_is_zero_when_right_and_pixel_weights_act() -> None:
    _, y = _batch()
    sure = 50 * nn.functional.one_hot(y, 3).permute(0, 3, 1, 2).float()
    assert float(segmentation_loss(sure, y, settings=SegmentationLoss(dice=1.0))) < 1e-5
    wrong = sure.roll(1, 1)
    w = torch.zeros_like(y, dtype=torch.float32)
    w[0, 0, 0] = 1
    mixed = wrong.clone()
    mixed[0, :, 0, 0] = sure[0, :, 0, 0]
    assert float(segmentation_loss(mixed, y, pixel_weights=w)) < 1e-5


def test_class_weights() -> None:
    w = class_weights([900, 100, 0], 0.5)
    assert w[1] / w[0] == pytest.approx(3.0) and w[2] == 0
    assert (w * [900, 100, 0]).sum() / 1000 == pytest.approx(1.0)
    assert class_weights([5, 95], 0).tolist() == pytest.approx([1, 1])
    with pytest.raises(ModelError):
        class_weights([0, 0])


def test_gaussian_nll_minimum_and_boundary_masks() -> None:
    y = torch.tensor([[[1.0, 3.0, math.nan, 2.0]]])
    best = torch.stack([torch.full((1, 1, 4), 2.0), torch.full((1, 1, 4), math.log(2 / 3))], 1)
    low = float(gaussian_nll(best, y))
    assert low == pytest.approx(0.5 * (math.log(2 / 3) + 1), rel=1e-5)
    for shift in (torch.tensor([0.3, 0.0]), torch.tensor([0.0, 0.3]), torch.tensor([0.0, -0.3])):
        assert float(gaussian_nll(best + shift.view(1, 2, 1, 1), y)) > low
    t = torch.tensor([[[0.0, 1.0, math.nan]]])
    z = torch.tensor([[[[-30.0, 30.0, 7.0]]]])
    assert float(boundary_loss(z, t, l1=1.0)) < 1e-6
