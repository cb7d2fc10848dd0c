"""Training: determinism, held-out labels without influence, learning, baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from terraloom.errors import FoldError, ModelError
from terraloom.models.fusion import FusionSpec
from terraloom.models.heads import TaskSpec
from terraloom.train.baseline import pixel_forest, pixels_at_10m
from terraloom.train.fit import (
    FitSettings,
    HeldOut,
    fit_member,
    load_member,
    predict_held_out,
    save_fit,
)
from terraloom.train.windows import labels_of, modalities_of, normalisation_of

COVER = TaskSpec("cover", "segmentation", ("water", "crop", "forest"))
HEIGHT = TaskSpec("height", "regression", unit="m")
EDGE = TaskSpec("edge", "boundary")
TASKS = (COVER, HEIGHT, EDGE)
FAST = FitSettings(width=6, depth=3, epochs=1, batch=4, crop_px=48)


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_chips(n: int = 4, size: int = 96, seed: int = 0) -> xr.Dataset:
    """Blocks of three classes with spectra of their own; height and edges follow the classes."""
    rng = np.random.default_rng(seed)
    cover = np.kron(rng.integers(0, 3, (n, size // 12, size // 12)), np.ones((12, 12), int))
    spectra = rng.uniform(0.05, 0.4, (3, 13)).astype(np.float32)
    x = spectra[cover].transpose(0, 3, 1, 2) + rng.normal(0, 0.05, (n, 13, size, size))
    x = x.astype(np.float32)
    edge = np.zeros((n, size, size), np.float32)
    edge[:, :, 1:] = cover[:, :, 1:] != cover[:, :, :-1]
    fold = np.kron(rng.permuted(np.arange(n * 16) % 4).reshape(n, 4, 4),
                   np.ones((size // 4, size // 4))).astype(np.uint8)  # fmt: skip
    y = cover.astype(np.uint8)
    unlabelled = rng.random(y.shape) < 0.4
    y[unlabelled] = 255
    height = (cover * 10 + rng.normal(0, 1, cover.shape)).astype(np.float32)
    height[rng.random(y.shape) < 0.9] = np.nan
    x[0, :, :20, :20] = np.nan

    def mean(v: np.ndarray, f: int) -> np.ndarray:
        return v.reshape(n, v.shape[1], size // f, f, size // f, f).mean((3, 5))

    names = {
        "s2_10": ["p1_B02", "p1_B03", "p1_B04", "p1_B08"],
        "s2_20": ["p1_B05", "p1_B06", "p1_B07", "p1_B8A", "p1_B11", "p1_B12"],
        "s2_60": ["p1_B01", "p1_B09", "p1_B10"],
    }
    data = {"s2_10": x[:, :4], "s2_20": mean(x[:, 4:10], 2), "s2_60": mean(x[:, 10:], 6)}
    variables = {f"x_{g}": (("n", f"channel_{g}", f"y_{g}", f"x_{g}"), v) for g, v in data.items()}
    for k, v in (("cover", y), ("height", height), ("edge", edge)):
        variables[f"y_{k}"] = (("n", "y_10", "x_10"), v)
    variables["fold"] = (("n", "y_10", "x_10"), fold)
    return xr.Dataset(variables, coords={f"channel_{g}": c for g, c in names.items()})


def test_same_seed_same_bytes_and_card(tmp_path: Path) -> None:
    chips, files = make_chips(), []
    for i in range(2):
        torch.manual_seed(i)
        fit = fit_member(chips, TASKS, FAST, held_out_fold=0, member=0, seed=7)
        save_fit(tmp_path / f"{i}.safetensors", fit)
        files.append((tmp_path / f"{i}.safetensors").read_bytes())
        files.append((tmp_path / f"{i}.json").read_bytes())
    assert files[0] == files[2] and files[1] == files[3]
    other = fit_member(chips, TASKS, FAST, held_out_fold=0, member=1, seed=7)
    assert not torch.equal(other.state_dict["stem10.0.weight"], fit.state_dict["stem10.0.weight"])
    net, card = load_member(tmp_path / "0.safetensors")
    assert card["held_out_fold"] == 0 and card["seed"] == 7
    assert card["spec"]["channels"]["s2_60"] == ["p1_B01", "p1_B09", "p1_B10"]
    assert not net.training


def test_trains_with_deterministic_algorithms_required() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        fit_member(make_chips(1), TASKS, FAST, held_out_fold=0, member=0, seed=1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    fit_member(make_chips(2), (COVER,), FAST, held_out_fold=0, member=0, seed=1)
    assert torch.equal(torch.rand(3), want)


def test_held_out_labels_have_no_influence() -> None:
    chips = make_chips()
    held = chips["fold"].values == 2
    a = fit_member(chips, TASKS, FAST, held_out_fold=2, member=0, seed=1)
    changed = chips.copy(deep=True)
    changed["y_cover"].values[held] = 0
    changed["y_height"].values[held] = 1e4
    changed["y_edge"].values[held] = 0.5
    b = fit_member(changed, TASKS, FAST, held_out_fold=2, member=0, seed=1)
    assert a.spec == b.spec
    assert all(torch.equal(v, b.state_dict[k]) for k, v in a.state_dict.items())
    c = fit_member(changed, TASKS, FAST, held_out_fold=1, member=0, seed=1)
    assert c.spec != fit_member(chips, TASKS, FAST, held_out_fold=1, member=0, seed=1).spec


def test_held_out_pixels_are_not_in_the_normalisation() -> None:
    chips = make_chips()
    spec = FusionSpec(modalities_of(chips), TASKS)
    want = normalisation_of(chips, spec, 2)
    changed = chips.copy(deep=True)
    held = chips["fold"].values == 2
    changed["x_s2_10"].values[np.broadcast_to(held[:, None], changed["x_s2_10"].shape)] = 9.0
    assert normalisation_of(changed, spec, 2) == want
    assert normalisation_of(changed, spec, 1) != want
    assert want["s2_10"].mean[0] == pytest.approx(
        float(np.nanmedian(np.where(held, np.nan, chips["x_s2_10"].values[:, 0]))), abs=1e-4
    )


def test_it_learns_all_tasks() -> None:
    chips = make_chips()
    settings = FitSettings(width=8, depth=3, epochs=25, batch=4, crop_px=48, learning_rate=1e-2)
    fit = fit_member(chips, TASKS, settings, held_out_fold=0, member=0, seed=1)
    held = predict_held_out(chips, [fit.network()], 0)
    cover, height = held["cover"], held["height"]
    assert (cover.p.mean(0).argmax(1) == cover.y).mean() > 0.9
    assert (cover.fold == 0).all()
    error = height.p[0, :, 0] - height.y
    assert np.sqrt((error**2).mean()) < 0.5 * height.y.std()
    p, y = held["edge"].p[0, :, 0], held["edge"].y > 0.5
    assert p[y].mean() > 1.3 * p[~y].mean()
    assert all(np.nanmean(h[-5:]) < np.nanmean(h[:5]) for h in fit.history.values())


def test_held_out_covers_exactly_the_labels_of_the_fold_and_joins() -> None:
    chips = make_chips(3)
    fit = fit_member(chips, (COVER,), FAST, held_out_fold=1, member=0, seed=1)
    net = fit.network()
    one = predict_held_out(chips, [net, net], 1, batch=1)["cover"]
    many = predict_held_out(chips, [net], 1, batch=3)["cover"]
    flat_y, flat_f = chips["y_cover"].values.ravel(), chips["fold"].values.ravel()
    assert np.array_equal(one.index, np.flatnonzero((flat_y != 255) & (flat_f == 1)))
    assert np.array_equal(one.y, flat_y[one.index])
    assert one.p.shape == (2, len(one.y), 3)
    assert np.abs(one.p[0] - many.p[0]).max() < 1e-5
    assert HeldOut.join([many, many]).p.shape[1] == 2 * len(one.y)


def test_erosion_removes_only_pixels_near_another_class() -> None:
    y = np.full((1, 48, 48), 255, np.uint8)
    y[0, :, :10], y[0, :, 10:20] = 0, 1
    chips = xr.Dataset({"y_cover": (("n", "y", "x"), y)})
    got = labels_of(chips, (COVER,), np.ones(y.shape, bool), erode_px=1)[0]["cover"].numpy()
    assert (got[0, :, 9:11] == 255).all()
    assert (got[0, :, :9] == 0).all() and (got[0, :, 11:20] == 1).all()


def test_errors_name_what_is_wrong() -> None:
    chips = make_chips(2)
    none = chips.copy(deep=True)
    none["fold"].values[:] = 3
    with pytest.raises((FoldError, ModelError)):
        fit_member(none, (COVER,), FAST, held_out_fold=3, member=0, seed=1)
    with pytest.raises(ModelError, match="y_soil"):
        fit_member(chips, (TaskSpec("soil", "regression"),), FAST, held_out_fold=0, member=0,
                   seed=1)  # fmt: skip
    with pytest.raises(ModelError, match="crop"):
        fit_member(chips, (COVER,), FitSettings(depth=3, crop_px=50), held_out_fold=0, member=0,
                   seed=1)  # fmt: skip


def test_pixel_forest_is_out_of_fold() -> None:
    chips = make_chips()
    a = pixel_forest(chips, COVER, seed=3, trees=10)
    assert (a.p[0].argmax(1) == a.y).mean() > 0.7
    assert np.allclose(a.p[0].sum(1), 1, atol=1e-5)
    changed = chips.copy(deep=True)
    changed["y_cover"].values[(chips["fold"].values == 1) & (chips["y_cover"].values != 255)] = 0
    b = pixel_forest(changed, COVER, seed=3, trees=10)
    assert np.array_equal(a.p[:, a.fold == 1], b.p[:, b.fold == 1])
    x = pixels_at_10m(chips, np.array([5 * 96 + 7 + 96 * 96]))
    want = [chips["x_s2_10"].values[1, 0, 5, 7], chips["x_s2_20"].values[1, 0, 2, 3]]
    assert [x[0, 0], x[0, 4]] == pytest.approx(want)
