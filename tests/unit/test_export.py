"""Networks in ONNX Runtime: the same predictions, and refusal of what is not the same."""

from __future__ import annotations

import builtins
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from support.networks import random_ensemble
from support.prediction import GROUPS, H, W, campaign, cut, whole
from terraloom.errors import ConfigError, ModelError, StateError
from terraloom.io import read_json, write_json, write_store
from terraloom.models.heads import TaskSpec
from terraloom.models.mapnet import FEATURES, MapNet
from terraloom.models.registry import build, card_path, make_spec
from terraloom.predict.agreement import chips_to_compare, mean_iou
from terraloom.predict.certify import certify
from terraloom.predict.engine import predict_batch
from terraloom.predict.ensemble import Ensemble, member_files
from terraloom.predict.export import export_member, export_model
from terraloom.predict.folding import folded
from terraloom.predict.onnx_runtime import onnx_members, onnx_path, open_session
from terraloom.predict.quantise import fewest_kept, split_chips
from terraloom.predict.reader import CubeReader
from terraloom.train.ensemble import averaged

SIZE = 96


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scene(folder: Path, **predict: Any) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Campaign and grid of a run with networks and chips, and the inputs of its region."""
    c, grid = cut(folder, 240, **predict)
    random_ensemble(c, grid)
    for file in member_files():
        card = read_json(card_path(file))
        write_json(card_path(file), card | {"held_out_fold": 0})
    inputs = CubeReader(Path("work/cube"), grid).window(0, 0, H, W)
    write_chips(inputs)
    return c, grid, inputs


def write_chips(inputs: dict[str, np.ndarray]) -> None:
    """Chips of the region side by side, labelled by what the networks say, mostly."""
    corners = [(r, c) for r in (0, 96) for c in (0, 96)]
    parts: dict[str, Any] = {}
    coords: dict[str, Any] = {"row": ("n", [r for r, _ in corners]),
                              "col": ("n", [c for _, c in corners])}  # fmt: skip
    for g, x in inputs.items():
        f = H // x.shape[1]
        cells = [x[:, r // f : (r + SIZE) // f, c // f : (c + SIZE) // f] for r, c in corners]
        parts[f"x_{g}"] = (("n", f"channel_{g}", f"y_{10 * f}", f"x_{10 * f}"), np.stack(cells))
        coords[f"channel_{g}"] = [f"a/{b}" for b in GROUPS[g]]
    rng, shape = np.random.default_rng(1), (len(corners), SIZE, SIZE)
    at = ("n", "y_10", "x_10")
    ensemble = Ensemble.load()
    given = {k[2:]: x for k, (_, x) in parts.items()}
    members = torch.from_numpy(ensemble.predict(given)["lc"]).double().softmax(2).numpy()
    said = averaged(np.moveaxis(members, 2, -1), ensemble.calibrations["lc"]).argmax(-1)
    wrong = rng.random(shape) < 0.2
    parts["y_lc"] = (at, np.where(wrong, rng.integers(0, 3, shape), said).astype(np.uint8))
    parts["y_height"] = (at, rng.uniform(0, 9, shape).astype(np.float32))
    parts["y_edge"] = (at, rng.uniform(0, 1, shape).astype(np.float32))
    parts["fold"] = (at, np.zeros(shape, np.uint8))
    chips = xr.Dataset(parts, coords=coords, attrs={"size_px": SIZE})
    write_store("results/chips/chips.zip", chips)


def both(net: MapNet, inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    member = Path("results/model/fold-0/member-0.safetensors")
    tensors = {g: torch.from_numpy(x) for g, x in inputs.items()}
    twin = onnx_members([member], [net], 1)[0]
    return [
        {k: v.numpy() for k, v in m.predict(tensors, describe=True).items()} for m in (net, twin)
    ]


def assert_same(pair: list[dict[str, np.ndarray]]) -> None:
    assert FEATURES in pair[0] and pair[0].keys() == pair[1].keys()
    for name, want in pair[0].items():
        got = pair[1][name]
        assert got.shape == want.shape and np.isfinite(got).all()
        assert np.max(np.abs(got - want) / (1 + np.abs(want))) < 1e-4, name


# --- without ONNX Runtime -------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused() -> None:
    for wrong in ({"precision": "bf16"}, {"dropout_passes": 2}, {"device": "cuda"}):
        with pytest.raises(ConfigError, match="without dropout"):
            campaign(96, runtime="onnx", **wrong)


def test_a_missing_extra_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c, _, _ = scene(here)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("onnx", "onnxruntime"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"terraloom\[onnx\]"):
        export_model(c)
    with pytest.raises(ModelError, match=r"terraloom\[onnx\]"):
        open_session(here / "net.onnx", 1)


def test_networks_over_time_are_refused(here: Path) -> None:
    spec = make_spec("convgru", {"s2_10": ("2023-05-01/B04", "2023-06-01/B04")},
                     (TaskSpec("lc", "segmentation", ("a", "b")),), width=4)  # fmt: skip
    with pytest.raises(ModelError, match="convgru cannot be exported") as err:
        export_member(build(spec).eval(), Path("results/model/fold-0/member-0.safetensors"))
    assert "fusion, fpn, context" in str(err.value)


def test_tiles_without_exported_networks_are_refused(here: Path) -> None:
    c, grid, _ = scene(here, runtime="onnx")
    with pytest.raises(StateError, match="export-model"):
        predict_batch(c, grid, "b0000")


@pytest.mark.parametrize("n", [1, 40, 64, 1000])
def test_chips_to_compare_are_few_and_spread(n: int) -> None:
    chosen = chips_to_compare(n)
    assert len(chosen) == len(set(chosen)) == min(n, 64)
    assert chosen[0] == 0 and chosen[-1] == n - 1


def test_mean_iou_by_hand() -> None:
    y, said = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 2])
    assert mean_iou(y, said) == pytest.approx((1 / 2 + 2 / 4) / 2)


@pytest.mark.parametrize("needed", range(9))
def test_fewest_layers_are_found_by_halving(needed: int) -> None:
    tried = []

    def agrees(n: int) -> bool:
        tried.append(n)
        return n >= needed

    assert fewest_kept(9, agrees) == needed and len(tried) <= 4


@pytest.mark.parametrize("n", [2, 4, 30, 1000])
def test_chips_that_choose_do_not_judge(n: int) -> None:
    choose, judge = split_chips(n)
    assert choose and judge and not set(choose) & set(judge)
    assert len(choose) <= 24 and len(judge) <= 64 and max(choose + judge) < n
    with pytest.raises(StateError, match="2 or more"):
        split_chips(1)


# --- with it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["fusion", "fpn", "context"])
def test_round_trip_of_any_size_with_gaps(here: Path, decoder: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    c, _, inputs = scene(here)
    spec = Ensemble.load(campaign=c).members[0].spec
    torch.manual_seed(0)
    net = folded(build(make_spec(decoder, spec.channels, spec.tasks, width=4)).eval())
    export_member(net, Path("results/model/fold-0/member-0.safetensors"))
    some = {g: np.stack([x, x[..., ::-1, :]]) for g, x in inputs.items()}
    some["s2_10"][0, 0, 70, 70] = np.inf
    assert_same(both(net, some))
    odd = {"s2_10": inputs["s2_10"][None, :, :53, :101]}
    assert_same(both(net, odd))
    assert_same(both(net, {"s2_20": inputs["s2_20"][None, :, :24, :31]}))


def test_tiles_from_onnx_are_those_of_torch(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    c, grid, _ = scene(here)
    predict_batch(c, grid, "b0000")
    before = whole(grid)
    other, _ = cut(here, 240, runtime="onnx")
    assert "onnx agrees with torch" in export_model(other)
    record = read_json("results/model/onnx/agreement.json")
    assert record["passed"] and record["same_class"]["lc"] > 0.9999
    assert 0 < record["largest_difference"]["lc"] < 1e-4 and record["pixels"] > SIZE**2
    assert record["held_out"]["lc"]["miou_after"] > 40
    made = Path("work/predict/x000y000.zip").stat().st_mtime_ns
    predict_batch(other, grid, "b0000")
    assert Path("work/predict/x000y000.zip").stat().st_mtime_ns != made, "runtime is in the digest"
    after = whole(grid)
    assert (before["class_index"] == after["class_index"]).mean() > 0.9999
    assert abs(before["probabilities"].astype(int) - after["probabilities"]).max() <= 1
    assert certify(other, grid, Path("certificate.json"), windows_px=(100,)).passed


def test_what_changed_after_the_comparison_is_refused(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    c, _, _ = scene(here, runtime="onnx")
    export_model(c)
    file = member_files()[0]
    card, contract = read_json(card_path(file)), read_json(card_path(onnx_path(file)))
    write_json(card_path(onnx_path(file)), contract | {"weights": "0"})
    with pytest.raises(ModelError, match="other weights"):
        Ensemble.load(campaign=c)
    takes = {"s2_10": {"channels": ["a/B08", "a/B04"], "pixel_factor": 1}}
    write_json(card_path(onnx_path(file)), contract | {"inputs": takes})
    with pytest.raises(ModelError, match="other channels"):
        Ensemble.load(campaign=c)
    path = onnx_path(file)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(StateError, match="not those that were compared"):
        Ensemble.load(campaign=c)
    assert card["sha256"] == contract["weights"]


def test_networks_that_differ_are_refused_with_figures(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    c, _, _ = scene(here, runtime="onnx")
    real = export_member

    def spoiled(net: MapNet, member: Path) -> Path:
        other = deepcopy(net)
        with torch.no_grad():
            for name, values in other.named_parameters():
                if name.startswith("heads.lc") and name.endswith("bias"):
                    values += torch.linspace(0, 0.5, len(values))
        return real(other, member)

    monkeypatch.setattr("terraloom.predict.export.export_member", spoiled)
    with pytest.raises(ModelError, match=r"lc differs by 0\.\d+"):
        export_model(c)
    assert not read_json("results/model/onnx/agreement.json")["passed"]
    with pytest.raises(ModelError, match="do not agree"):
        Ensemble.load(campaign=c)


def test_tiles_in_8_bits_are_nearly_those_of_torch(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    c, grid, _ = scene(here, runtime="onnx-int8")
    with pytest.raises(StateError, match="export-model"):
        Ensemble.load(campaign=c)
    assert "onnx-int8 agrees with torch" in export_model(c)
    record = read_json("results/model/onnx/agreement-int8.json")
    assert record["passed"] and record["same_class"]["lc"] >= 0.99
    assert record["largest_difference"]["lc"] > 1e-4, "some layer runs in 8 bits"
    assert record["held_out"]["lc"]["miou_before"] - record["held_out"]["lc"]["miou_after"] <= 0.5
    assert not set(record["chips"]) & set(record["chosen_on"])
    assert read_json(card_path(onnx_path(member_files()[0], "onnx-int8")))["numbers"] == "int8"
    predict_batch(c, grid, "b0000")
    fine, _ = cut(here, 240)
    a, b = (Ensemble.load(campaign=x) for x in (c, fine))
    assert a.digest != b.digest
    assert Path("work/predict/x000y000.zip").exists()


def test_8_bits_that_change_classes_are_refused_with_figures(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    c, _, _ = scene(here, runtime="onnx-int8")
    monkeypatch.setattr("terraloom.predict.agreement.LEAST_SAME", 1.01)
    with pytest.raises(ModelError, match=r"the same class of lc at \d+\.\d+ %") as err:
        export_model(c)
    assert "set predict.runtime to onnx or torch" in str(err.value)
    with pytest.raises(ModelError, match="do not agree") as err:
        Ensemble.load(campaign=c)
    assert "onnx or torch" in str(err.value)
