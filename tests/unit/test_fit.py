"""Training: determinism, held-out labels without influence, learning, baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from terraloom.errors import FoldError, ModelError
from terraloom.models.fusion import FusionNet, FusionSpec
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
from terraloom.train.pack import pack_chips, pack_labels
from terraloom.train.sampler import Augmentation, Sampler
from terraloom.train.windows import labels_of, modalities_of, normalisation_of, spec_of

COVER = TaskSpec("cover", "segmentation", ("water", "crop", "forest"))
HEIGHT = TaskSpec("height", "regression", unit="m")
EDGE = TaskSpec("edge", "boundary")
TASKS = (COVER, HEIGHT, EDGE)
FAST = FitSettings(width=6, depth=3, epochs=1, batch=4, crop_px=48)


pytestmark = pytest.mark.usefixtures("one_thread")


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
        "s2_10": ["p1/B02", "p1/B03", "p1/B04", "p1/B08"],
        "s2_20": ["p1/B05", "p1/B06", "p1/B07", "p1/B8A", "p1/B11", "p1/B12"],
        "s2_60": ["p1/B01", "p1/B09", "p1/B10"],
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
    assert card["spec"]["channels"]["s2_60"] == ["p1/B01", "p1/B09", "p1/B10"]
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
    with pytest.raises(ModelError, match="multiples of 192"):
        fit_member(chips, (COVER,), FitSettings(depth=7), held_out_fold=0, member=0, seed=1)


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


# --- other sensors -------------------------------------------------------------------------------
LANDSAT = {"SR_B4": "B04", "SR_B5": "B8A"}


def other_chips(n: int = 4, size: int = 96, bands: int = 120, seed: int = 0) -> xr.Dataset:
    """Three classes in radar power, Landsat, a polarimetric matrix, 120 bands, and 240 m pixels."""
    rng = np.random.default_rng(seed)
    chips = make_chips(n, size, seed)[["y_cover", "fold"]]
    cover = np.kron(rng.integers(0, 3, (n, size // 12, size // 12)), np.ones((12, 12), int))
    y = cover.astype(np.uint8)
    y[rng.random(y.shape) < 0.4] = 255

    def group(f: int, spectra: np.ndarray, noise: float) -> np.ndarray:
        at = cover[:, ::f, ::f]
        x = spectra[at].transpose(0, 3, 1, 2)
        return (x + rng.normal(0, noise, x.shape)).astype(np.float32)

    power = rng.gamma(4, 0.02, (n, 2, size, size)).astype(np.float32)
    power *= np.array([1.0, 0.1], np.float32)[:, None, None]
    matrix = np.concatenate([power[:, :1], power[:, :1] - 0.1], 1)
    # Bands that nearly all say how bright a pixel is; the classes differ by small features.
    axes = np.cumsum(rng.normal(0, 1, (2, bands)), axis=1) / bands**0.5
    hyper = group(3, 0.3 + 0.1 * np.eye(3)[:, :2] @ axes, 0.01)
    hyper *= rng.uniform(0.5, 1.5, hyper[:, :1].shape).astype(np.float32)
    data = {
        "s1_10": (power, ["a/VV", "a/VH"], {"kind": "sar", "unit": "power"}),
        "polsar_10": (matrix, ["a/T11", "a/T12_re"], {"kind": "polsar", "unit": "power"}),
        "l8_30": (group(3, rng.uniform(0.05, 0.4, (3, 2)), 0.03), ["a/SR_B4", "a/SR_B5"],
                  {"kind": "optical", "unit": "reflectance", "roles": json.dumps(LANDSAT)}),
        "hyper_30": (hyper, [f"a/b{i}" for i in range(bands)], {"kind": "optical"}),
        "modis_240": (group(24, rng.uniform(0, 1, (3, 1)), 0.1), ["a/NDVI"], {"kind": "index"}),
    }  # fmt: skip
    for g, (x, names, attrs) in data.items():
        res = g.rsplit("_", 1)[1]
        chips[f"x_{g}"] = (("n", f"channel_{g}", f"y_{res}", f"x_{res}"), x, attrs)
        chips = chips.assign_coords({f"channel_{g}": names})
    return chips.assign(y_cover=(("n", "y_10", "x_10"), y))


def test_the_spec_knows_what_the_chips_say_of_their_bands() -> None:
    chips = other_chips(2)
    spec = spec_of(chips, (COVER,), width=6, depth=3)
    assert list(spec.channels) == ["s1_10", "polsar_10", "hyper_30", "l8_30", "modis_240"]
    assert spec.roles == {"l8_30": LANDSAT} and spec.width == 6
    assert spec.signed == {"polsar_10": ("a/T12_re",)}
    assert spec.pairs("l8_30") == [(1, 0)] and spec.pairs("hyper_30") == []
    assert [g for g in spec.channels if spec.reduced(g)] == ["hyper_30"]
    sentinel = spec_of(make_chips(1), (COVER,))
    assert len(sentinel.pairs("s2_10")) == 2 and len(sentinel.pairs("s2_20")) == 3


def test_power_becomes_decibels_by_its_unit_not_by_its_name() -> None:
    chips = other_chips(2)
    norm = normalisation_of(chips, spec_of(chips, (COVER,)), 0)
    assert {g for g, n in norm.items() if n.decibel} == {"s1_10", "polsar_10"}
    keep = np.broadcast_to((chips["fold"].values != 0)[:, None], chips["x_s1_10"].shape)
    db = 10 * np.log10(chips["x_s1_10"].values)
    want = np.median(np.where(keep, db, np.nan)[:, 0][keep[:, 0]])
    assert norm["s1_10"].mean[0] == pytest.approx(want, abs=1e-3)
    assert norm["s1_10"].mean[1] == pytest.approx(norm["s1_10"].mean[0] - 10, abs=0.3)
    linear = chips["x_polsar_10"].values[:, 1][keep[:, 0]]
    assert norm["polsar_10"].mean[1] == pytest.approx(np.median(linear), abs=1e-4)
    # The same numbers called decibels stay as they are.
    chips["x_s1_10"].attrs["unit"] = "dB"
    assert not normalisation_of(chips, spec_of(chips, (COVER,)), 0)["s1_10"].decibel


def sampler_of(chips: xr.Dataset, crop_px: int = 72) -> tuple[FusionNet, Sampler]:
    spec = spec_of(chips, (COVER,), width=6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FusionNet(spec, normalisation_of(chips, spec, 0))
    keep = (chips["fold"].values != 0) & (chips["fold"].values != 255)
    pack = pack_chips(net, chips, pack_labels(chips, (COVER,), lambda at, _: keep[at]))
    still = Augmentation(0, 0, 0, 0, flips=False)
    sampler = Sampler(net, pack, crop_px=crop_px, class_power=1, augmentation=still,
                      generator=torch.Generator().manual_seed(0))  # fmt: skip
    sampler.start_reduction(net, lambda i: keep[i])
    return net, sampler


def test_crops_hold_whole_pixels_of_all_groups() -> None:
    chips = other_chips(2, size=192)
    # A ramp along the rows in the coarse group and, in dB, in the fine one.
    row = np.arange(192, dtype=np.float32)
    chips["x_s1_10"].values[:] = 10 ** (row[:, None] / 1000)
    chips["x_modis_240"].values[:] = row[::24, None]
    net, sampler = sampler_of(chips, crop_px=60)
    assert sampler.crop_px == 72, "rounded up to whole strides"
    scale = {g: [float(net.get_buffer(f"{k}_{g}")[0, 0, 0, 0]) for k in ("mean", "std")]
             for g in ("s1_10", "modis_240")}  # fmt: skip
    starts = set()
    for _ in range(20):
        batch = sampler.batch(2)
        x, y = batch.x, batch.y
        assert {f: v.shape[-1] for f, v in x.items()} == {1: 72, 3: 24, 24: 3}
        assert y["cover"].shape == (2, 72, 72)
        fine = (x[1][:, 0] * scale["s1_10"][1] + scale["s1_10"][0])[:, 0, 0] * 100
        coarse = (x[24][:, 0] * scale["modis_240"][1] + scale["modis_240"][0])[:, 0, 0]
        assert torch.allclose(fine, coarse, atol=0.1), "the same first row"
        starts |= set(fine.round().int().tolist())
    assert starts <= set(range(0, 192, 24)) and len(starts) > 3


def test_the_reduction_starts_at_the_axes_of_the_training_pixels() -> None:
    chips = other_chips()
    net, sampler = sampler_of(chips)
    weight = net.reduce["hyper_30"][0].weight[:, :, 0, 0].detach()
    assert torch.equal(weight[:16], -weight[16:]), "both signs"
    assert not weight[:, -1].any(), "the mask is no axis"
    at = net.feature_slices()["hyper_30"][1]
    x = sampler._pack.x[3][:, at.start : at.stop - 1]
    keep = chips["fold"].values != 0
    free = torch.from_numpy(keep.reshape(4, 32, 3, 32, 3).all((2, 4)))
    scores = weight[:16, :-1] @ x.permute(1, 0, 2, 3)[:, free]
    second = scores @ scores.T / scores.shape[1]
    assert torch.allclose(second / second[0, 0], torch.eye(16), atol=1e-2), "white"
    held = chips.copy(deep=True)
    hit = ~free.numpy()
    held["x_hyper_30"].values.transpose(0, 2, 3, 1)[hit] = 5.0
    other = sampler_of(held)[0].reduce["hyper_30"][0].weight[:, :, 0, 0].detach()
    assert torch.allclose(other, weight, atol=1e-4), "held-out pixels have no say"


def test_training_starts_from_what_the_chips_say() -> None:
    chips, none = other_chips(2), FitSettings(width=6, depth=3, epochs=0, crop_px=48)
    fit = fit_member(chips, (COVER,), none, held_out_fold=0, member=0, seed=1)
    assert fit.spec.roles == {"l8_30": LANDSAT} and fit.spec.signed
    weight = fit.state_dict["reduce.hyper_30.0.weight"][:, :, 0, 0]
    assert float((weight[:16] + weight[16:]).abs().max()) < 0.5 * float(weight.abs().max())


def test_it_learns_from_hundreds_of_bands_in_a_short_training() -> None:
    chips = other_chips(6)[["x_hyper_30", "y_cover", "fold"]]
    settings = FitSettings(width=8, depth=3, epochs=6, batch=4, crop_px=48, learning_rate=1e-2)
    fit = fit_member(chips, (COVER,), settings, held_out_fold=0, member=0, seed=1)
    held = predict_held_out(chips, [fit.network()], 0)["cover"]
    assert (held.p[0].argmax(1) == held.y).mean() > 0.9


def test_all_groups_go_through_training_file_and_forest(tmp_path: Path) -> None:
    chips = other_chips(2)
    fit = fit_member(chips, (COVER,), FAST, held_out_fold=0, member=0, seed=1)
    save_fit(tmp_path / "m.safetensors", fit)
    net, _ = load_member(tmp_path / "m.safetensors")
    a = predict_held_out(chips, [fit.network()], 0)["cover"].p
    assert np.array_equal(a, predict_held_out(chips, [net], 0)["cover"].p)
    x = pixels_at_10m(chips, np.array([95 * 96 + 50]))
    assert x.shape == (1, 2 + 2 + 2 + 120 + 1)
    assert x[0, -1] == pytest.approx(chips["x_modis_240"].values[0, 0, 3, 2])
    p = pixel_forest(chips, COVER, seed=3, trees=3).p
    assert np.isfinite(p).all()
