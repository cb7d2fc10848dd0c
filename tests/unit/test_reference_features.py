"""Features of training pixels: which pixels, as in prediction, files that stay readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from terraloom.errors import ModelError
from terraloom.models.fusion import FusionNet, FusionSpec
from terraloom.models.heads import TaskSpec
from terraloom.models.mapnet import FEATURES
from terraloom.train.applicability import _features, _some_pixels, importance
from terraloom.uncertainty.applicability import Applicability, fit_space
from terraloom.uncertainty.applicability_file import FILE, read_applicability, write_applicability


@pytest.fixture(scope="module")
def net() -> FusionNet:
    torch.manual_seed(3)
    tasks = (TaskSpec("cover", "segmentation", ("a", "b", "c")), TaskSpec("h", "regression"))
    spec = FusionSpec({"s2_10": ("p/B04", "p/B08"), "s2_20": ("p/B05",)}, tasks, width=6, depth=3)
    return FusionNet(spec).eval()


def _chips(n: int = 3, size: int = 24) -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims = {g: ("n", f"channel_{g}", f"y_{g}", f"x_{g}") for g in ("s2_10", "s2_20")}
    x = {"s2_10": rng.normal(size=(n, 2, size, size)),
         "s2_20": rng.normal(size=(n, 1, size // 2, size // 2))}  # fmt: skip
    fold = np.zeros((n, size, size), np.uint8)
    return xr.Dataset(
        {f"x_{g}": (dims[g], v.astype(np.float32)) for g, v in x.items()}
        | {"fold": (("n", "y_10", "x_10"), fold)}
    )


def test_one_pixel_of_each_label_before_a_second_of_any() -> None:
    label = np.repeat([7, 3, 9, -1, 4], [1000, 3, 1, 50, 200])
    take = label != 4
    rng = np.random.default_rng(1)
    few = _some_pixels(label, take, 3, rng)
    assert sorted(label[few]) == [3, 7, 9]
    more = _some_pixels(label, take, 7, rng)
    assert sorted(label[more]) == [3, 3, 3, 7, 7, 7, 9] and len(set(more)) == 7
    assert (np.diff(more) > 0).all()
    assert len(_some_pixels(label, take, 9999, rng)) == 1004


def test_features_are_those_of_prediction(net: FusionNet) -> None:
    chips = _chips()
    at = np.array([0, 25, 24 * 24 + 5, 3 * 24 * 24 - 1])
    found = _features(net, chips, at, batch=2)
    whole = {g[2:]: torch.from_numpy(chips[g].to_numpy()) for g in ("x_s2_10", "x_s2_20")}
    out = net.predict(whole, describe=True)
    described = out.pop(FEATURES)
    plain = net.predict(whole)
    assert all(torch.equal(out[k], plain[k]) for k in plain)
    with torch.inference_mode():
        again = net.heads["cover"](described).softmax(1)
    assert torch.allclose(again, out["cover"], atol=1e-6)
    cells = described.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).numpy()
    expected = [cells[0, :, 0, 0], cells[0, :, 0, 0], cells[1, :, 0, 2], cells[2, :, 11, 11]]
    assert found == pytest.approx(np.stack(expected), abs=1e-5)


def test_importance_is_the_norm_of_the_weights(net: FusionNet) -> None:
    weights: Any = net.heads["cover"].conv.weight
    expected = weights.detach().flatten(1).norm(dim=0).numpy()
    assert importance(net, "cover") == pytest.approx(expected, rel=1e-5)


def test_files_are_read_as_written_and_damage_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    spaces = tuple(fit_space(rng.normal(size=(20, d))) for d in (3, 40))
    what = Applicability(spaces, 0.4)
    names = ["fold-0/member-0", "fold-1/member-0"]
    write_applicability(tmp_path, what, names, np.array([0.1, 0.2, 0.5]))
    first = (tmp_path / FILE).read_bytes()
    found, networks = read_applicability(tmp_path)
    assert networks == names and found.threshold == 0.4
    x = [rng.normal(size=(50, d)) for d in (3, 40)]
    assert np.array_equal(found.judge(x).dissimilarity, what.judge(x).dissimilarity)
    write_applicability(tmp_path, what, names, np.array([0.1, 0.2, 0.5]))
    assert (tmp_path / FILE).read_bytes() == first
    (tmp_path / FILE).write_bytes(first[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        read_applicability(tmp_path)
