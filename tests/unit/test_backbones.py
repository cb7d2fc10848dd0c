"""Encoders of other libraries: reach, tiles, missing sensors, weights. Skipped without them."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.networks import check_folded
from terraloom.config.model import Model
from terraloom.errors import ModelError
from terraloom.models.backbones import BackboneNet, BackboneSpec, encoder_reach
from terraloom.models.heads import TaskSpec
from terraloom.models.reference import BACKBONES, _figures
from terraloom.models.registry import architecture_of, build, load_member, make_spec, save_member
from terraloom.preprocess.groups import group_factor

CHANNELS = {
    "s2_10": ("B02", "B03", "B04", "B08"), "s1_10": ("VV", "VH"), "s2_20": ("B8A", "B11"),
    "own_30": ("b",),
}  # fmt: skip
TASKS = (TaskSpec("cover", "segmentation", ("a", "b", "c")), TaskSpec("edge", "boundary"))


@pytest.fixture
def timm() -> Any:
    pytest.importorskip("torchvision", exc_type=ImportError)
    return pytest.importorskip("timm", exc_type=ImportError)


def make_net(name: str = "resnet18", depth: int = 4, **kw: Any) -> BackboneNet:
    channels = kw.pop("channels", CHANNELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(make_spec("backbone", channels, TASKS, backbone=name, depth=depth, width=6))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.uniform_(-0.2, 0.2)
                m.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(m.weight, 0.5, 1.5)  # fresh residual branches weigh nothing
    assert isinstance(net, BackboneNet)
    net.eval()
    return net


def scene(h: int, w: int, n: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    size = {name: group_factor(name) for name in CHANNELS}
    return {
        name: torch.rand((n, len(c), math.ceil(h / size[name]), math.ceil(w / size[name])),
                         generator=g)
        for name, c in CHANNELS.items()
    }  # fmt: skip


def refused(name: str, depth: int = 4) -> ModelError:
    with pytest.raises(ModelError) as err:
        make_net(name, depth)
    return err.value


# --- without the libraries -----------------------------------------------------------------------


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    encoder_reach.cache_clear()
    err = refused("resnet18")
    assert "timm" in err.found and "terraloom[backbones]" in err.fix


def test_keys_belong_together() -> None:
    assert Model(network="backbone", backbone="resnet18").weights is None
    for wrong in (
        {"network": "backbone"}, {"backbone": "resnet18"}, {"weights": "file.pt"},
        {"network": "presto"}, {"network": "backbone", "backbone": "hf_hub:timm/resnet18"},
        {"network": "backbone", "backbone": "../resnet18"},
        {"network": "backbone", "backbone": "resnet18", "adapt": "lora"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"backbone|weights"):
            Model.model_validate(wrong)


def test_a_card_names_the_encoder() -> None:
    spec = make_spec("backbone", CHANNELS, TASKS, backbone="resnet34")
    assert isinstance(spec, BackboneSpec) and architecture_of(spec) == "backbone"
    again = BackboneSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.backbone == "resnet34"


def test_other_networks_take_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without published"):
        build(make_spec("fusion", CHANNELS, TASKS)).load_pretrained(tmp_path / "w.pt")


# --- with them -----------------------------------------------------------------------------------


def test_how_far_a_resnet_looks(timm: Any) -> None:
    """By hand: 7x7 at stride 1 (3), pooling (+2), 4 convolutions of 40 m (+16), then of 80 m."""
    assert encoder_reach("resnet18", 4) == {1: (3, 3), 2: (21, 21), 3: (49, 49)}
    assert encoder_reach("resnet18", 5)[4] == (105, 105)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "vgg11"])
def test_receptive_field_is_what_a_missing_pixel_touches(timm: Any, name: str) -> None:
    net = make_net(name, 3, channels={"s2_20": ("B8A", "B11")}).double()
    rf, s = net.receptive_field_px(), net.stride_px
    size, reach = 2 * net.halo_px() + 2 * s, 0
    for at in range(size // 2, size // 2 + s, 2):
        x = torch.zeros((1, 4, size // 2, 2), dtype=torch.float64)
        x[0, :, at // 2] = math.nan  # past `prepare`, which would mask it
        with torch.inference_mode():
            out = net.forward_prepared({2: x})["cover"]
        rows = torch.nonzero(out.isnan().any(1).any(-1)[0])[:, 0]
        reach = max(reach, at + 1 - int(rows.min()), int(rows.max()) - at)
    assert reach == rf <= net.halo_px() < rf + s


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_tiles_with_halo_equal_the_whole(timm: Any, name: str) -> None:
    net = make_net(name, 3)
    halo, size = net.halo_px(), 96
    x = scene(size + 2 * halo, size + 2 * halo)
    x["s2_10"][:, :, 30:60, 40:90] = math.nan
    whole = net.predict(x)
    step = 48
    for top in range(0, size, step):
        for left in range(0, size, step):
            cut = {}
            for k, v in x.items():
                f = group_factor(k)
                px = step + 2 * halo
                cut[k] = v[..., top // f : (top + px) // f, left // f : (left + px) // f]
            for k, v in net.predict(cut).items():
                want = whole[k][..., halo + top : halo + top + step, halo + left :][..., :step]
                assert float((v[..., halo:-halo, halo:-halo] - want).abs().max()) < 1e-5


@pytest.mark.parametrize(("h", "w"), [(1, 1), (37, 53)])
def test_any_window_and_any_sensor_left_out(timm: Any, h: int, w: int) -> None:
    net, x = make_net(), scene(h, w, n=2)
    out = net.predict(x)
    assert out["cover"].shape == (2, 3, h, w) and out["edge"].shape == (2, 1, h, w)
    for name in CHANNELS:
        without = net.predict({k: v for k, v in x.items() if k != name})["cover"]
        invalid = net.predict({**x, name: torch.full_like(x[name], math.nan)})["cover"]
        assert torch.equal(without, invalid) and bool(torch.isfinite(without).all())
        assert float((without - out["cover"]).abs().max()) > 1e-6, f"{name} is not used"


def test_encoders_that_do_not_do_are_refused(timm: Any) -> None:
    assert "window as a whole" in refused("efficientnet_b0", 3).found
    assert "resnet18" in refused("mobilenetv3_small_100", 3).allowed
    assert refused("vit_tiny_patch16_224").fix and refused("swin_tiny_patch4_window7_224").fix
    pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    assert "list_models" in refused("nonsense").allowed


def test_an_encoder_of_segmentation_models(timm: Any) -> None:
    pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    net = make_net("tu-resnet18")
    assert net.receptive_field_px() == make_net("resnet18").receptive_field_px()
    assert net.predict(scene(24, 24))["cover"].shape == (1, 3, 24, 24)


def test_weights_of_a_file(timm: Any, tmp_path: Path) -> None:
    """Kernels of bands go to their bands, whatever stands around the names in the file."""
    other = timm.create_model("resnet18", pretrained=False, num_classes=7)
    state = {f"backbone.{k}": v.contiguous() for k, v in other.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": other.state_dict()}, tmp_path / "w.pt")
    nets = [make_net(), make_net()]
    for net, name in zip(nets, ("w.safetensors", "w.pt"), strict=True):
        assert len(net.load_pretrained(tmp_path / name)) > 20
    a, b = (n.encoder.body.state_dict() for n in nets)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(a["layer2.0.conv1.weight"], other.layer2[0].conv1.weight)
    first, rgb = nets[0].encoder.first().weight.detach(), other.conv1.weight.detach()
    slices = nets[0].feature_slices()
    # 6 features of s2_10 (two are indices), 2 of radar, 3 of s2_20 and 1 of its own.
    n = 6 + 2 + 3 + 1
    assert first.shape[1] == n + 4
    at = slices["s2_10"][1].start
    assert torch.allclose(first[:, at + 2], rgb[:, 0] * 3 / n), "B04 is red"
    assert torch.allclose(first[:, at], rgb[:, 2] * 3 / n), "B02 is blue"
    assert torch.allclose(first[:, at + 3], rgb.mean(1) * 3 / n)
    assert not bool(first[:, slices["s1_10"][1].stop - 1].any()), "a mask"
    levels = nets[0].encoder(torch.ones((1, n + 4, 64, 64)))
    assert all(bool(torch.isfinite(f).all()) for f in levels.values())


def test_weights_of_13_bands(timm: Any, tmp_path: Path) -> None:
    other = timm.create_model("resnet18", pretrained=False, in_chans=13)
    torch.save(other.state_dict(), tmp_path / "s2.pt")
    net = make_net()
    net.load_pretrained(tmp_path / "s2.pt")
    at = net.feature_slices()["s2_10"][1].start
    got = net.encoder.first().weight.detach()[:, at + 3]
    assert torch.allclose(got, other.conv1.weight.detach()[:, 7] * 13 / 12), "B08 is the eighth"


def test_weights_that_do_not_do(timm: Any, tmp_path: Path) -> None:
    net = make_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "34.pt")
    torch.save(timm.create_model("mobilenetv2_100").state_dict(), tmp_path / "m.pt")
    (tmp_path / "text.pt").write_text("no weights")
    make_net("resnet18").load_pretrained(tmp_path / "34.pt")  # more of the same blocks
    for name, match in (("m.pt", "missing"), ("text.pt", "no file"), ("none.pt", "no such file")):
        with pytest.raises(ModelError, match=match):
            net.load_pretrained(tmp_path / name)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_member_saved_and_loaded_predicts_the_same(timm: Any, tmp_path: Path) -> None:
    net, path = make_net(), tmp_path / "m.safetensors"
    from terraloom.models.fusion import Normalisation

    n = {g: len(c) + len(net.spec.pairs(g)) for g, c in CHANNELS.items()}
    norm = {g: Normalisation((0.0,) * k, (1.0,) * k) for g, k in n.items()}
    save_member(path, net.state_dict(), net.spec, norm)
    again, card = load_member(path)
    x = scene(48, 48)
    assert torch.allclose(again.predict(x)["cover"], net.predict(x)["cover"], atol=1e-5)
    assert card["architecture"] == "backbone" and card["halo_px"] == net.halo_px()


def test_every_used_weight_learns(timm: Any) -> None:
    net = make_net().train()
    sum(v.square().sum() for v in net(scene(48, 48, n=2)).values()).backward()  # type: ignore[union-attr]
    dead = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not dead


def test_figures_of_the_page(timm: Any) -> None:
    for (name, depth), figures in BACKBONES.items():
        assert _figures("backbone", depth=depth, backbone=name) == figures, name


def test_nothing_is_imported_before_it_is_needed() -> None:
    source = Path(importlib.import_module("terraloom.models.backbones").__file__ or "").read_text()
    assert "import timm" not in source and "import torchvision" not in source


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "vgg11"])
def test_folding_changes_nothing_but_time(timm: Any, name: str) -> None:
    check_folded(make_net(name, 3), scene(48, 72))
