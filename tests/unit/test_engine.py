"""Prediction: a pixel's result does not depend on how the region is cut, and gaps stay gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.networks import random_ensemble
from support.prediction import H, W, cut, whole, world
from terraloom.errors import ModelError, StateError
from terraloom.io import read_json, write_json
from terraloom.predict.engine import predict_batch
from terraloom.predict.ensemble import Ensemble
from terraloom.predict.reader import CubeReader
from terraloom.preprocess.groups import group_factor
from terraloom.preprocess.reasons import Reason


def predicted(
    folder: Path, tile_px: int, monkeypatch: pytest.MonkeyPatch, **predict: Any
) -> dict[str, np.ndarray]:
    monkeypatch.chdir(folder)
    c, grid = cut(folder, tile_px, **predict)
    random_ensemble(c, grid)
    predict_batch(c, grid, "b0000")
    return whole(grid)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The region predicted as one tile."""
    with pytest.MonkeyPatch.context() as patch:
        return predicted(tmp_path_factory.mktemp("one"), 240, patch)


def test_the_reference_says_something(reference: dict[str, np.ndarray]) -> None:
    """Invariance of a constant would prove nothing."""
    assert len(np.unique(reference["class_index"])) == 4  # three classes and none
    assert reference["probabilities"][:, 120:].std() > 2
    assert reference["uncertainty"][2, 120:, 100:].max() > 0, "members disagree somewhere"


@pytest.mark.parametrize(
    ("tile_px", "predict"),
    [
        (96, {}),  # several tiles in a window
        (144, {"window_px": 96}),  # several windows in a tile
        (96, {"window_px": 96, "batch": 3, "threads": 2}),
    ],
)
def test_results_do_not_depend_on_tiles_and_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, np.ndarray], tile_px: int,
    predict: dict[str, Any],
) -> None:  # fmt: skip
    got = predicted(tmp_path, tile_px, monkeypatch, **predict)
    assert got.keys() == reference.keys()
    assert np.array_equal(got["class_index"], reference["class_index"])
    for name in ("probabilities", "uncertainty", "edge"):
        # Encoded in 200 steps: a value on the edge between two may round to either.
        step = np.abs(got[name].astype(int) - reference[name].astype(int))
        assert step.max() <= 1 and (step > 0).mean() < 1e-3, name
    assert got["height"] == pytest.approx(reference["height"], abs=1e-3)
    assert (got["conformal_set"] != reference["conformal_set"]).mean() < 1e-3
    di = [x["applicability"].astype(int) for x in (got, reference)]
    assert np.abs(di[0] - di[1])[0].max() <= 2, "steps of a thousandth"
    assert (di[0] != di[1])[1:].mean() < 1e-3


def test_raw_probabilities_agree_to_the_last_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window inside the region equals the same window cut out of the whole."""
    monkeypatch.chdir(tmp_path)
    c, grid = cut(tmp_path, 96)
    random_ensemble(c, grid)
    ensemble, reader = Ensemble.load(), CubeReader(Path("work/cube"), grid)
    halo = ensemble.halo_px
    assert halo % 12 == 0

    def predicted(row: int, col: int, h: int, w: int) -> np.ndarray:
        inputs = reader.window(row - halo, col - halo, h + 2 * halo, w + 2 * halo)
        logits = ensemble.predict({g: x[None] for g, x in inputs.items()})["lc"]
        return torch.from_numpy(logits).softmax(2).numpy()

    full, part = (predicted(*at) for at in ((0, 0, H, W), (96, 144, 48, 48)))
    inner = part[..., halo : halo + 48, halo : halo + 48]
    expected = full[..., halo + 96 : halo + 144, halo + 144 : halo + 192]
    assert inner == pytest.approx(expected, abs=1e-4)


def test_a_gap_is_never_a_class(reference: dict[str, np.ndarray]) -> None:
    _, reasons = world()
    gap = np.isin(reasons, (Reason.CLOUD, Reason.NODATA))
    assert np.all(reference["class_index"][gap] == 255)
    assert np.all(reference["class_index"][~gap] < 3), "water is mapped"
    for name, nodata in (("probabilities", 255), ("uncertainty", 255), ("edge", 255),
                         ("height", -9999)):  # fmt: skip
        assert np.all(reference[name][..., gap] == nodata), name
        assert np.all(reference[name][..., ~gap] != nodata), name
        assert np.isfinite(reference[name]).all()
    assert np.array_equal(reference["reasons"], reasons)


def test_products_keep_to_their_ranges(reference: dict[str, np.ndarray]) -> None:
    there = reference["class_index"] != 255
    p = reference["probabilities"][:, there].astype(int)
    assert p.max() <= 200 and np.all(np.abs(p.sum(axis=0) - 200) <= 2)
    best = p.argmax(axis=0) == reference["class_index"][there]
    ties = np.sort(p, axis=0)[-1] - np.sort(p, axis=0)[-2] <= 1
    assert np.all(best | ties)
    total, aleatoric, epistemic = reference["uncertainty"][:, there].astype(int)
    assert np.all(np.abs(total - aleatoric - epistemic) <= 2) and total.max() <= 200
    mean, *sd = reference["height"][:3, there]
    assert mean.min() >= 0 and mean.max() <= 40 and all(s.min() >= 0 for s in sd)


def test_layers_of_trust(reference: dict[str, np.ndarray]) -> None:
    there = reference["class_index"] != 255
    size, members = reference["conformal_set"][:, there].astype(int)
    assert np.array_equal(size, sum((members >> k) & 1 for k in range(3)))
    assert ((members >> reference["class_index"][there]) & 1).all(), "the mapped class is in"
    assert set(np.unique(size)) >= {1, 2}
    p = reference["probabilities"][:, there] / 200
    for k, threshold in enumerate((0.8, 0.8 - 0.2 / 3, 0.8 - 0.4 / 3)):
        sure = np.abs(p[k] - (1 - threshold)) > 0.01
        expected = (p[k] > 1 - threshold) | (reference["class_index"][there] == k)
        assert np.array_equal(expected[sure], ((members >> k) & 1).astype(bool)[sure])
    di, density, inside = reference["applicability"][:, there].astype(float)
    assert di.std() > 10 and 0.05 < inside.mean() < 0.99
    off = di != 400  # where rounding decides
    assert np.array_equal((inside == 1)[off], (di <= 400)[off]) and (density[di < 200] >= 5).all()
    assert (reference["applicability"][:, ~there] == 65535).all()
    assert (reference["conformal_set"][:, ~there] == 0).all()
    corner = np.s_[1, :96, :96]
    assert reference["applicability"][corner][there[:96, :96]].mean() > density.mean() * 0.9
    mean, aleatoric, epistemic, low, high = reference["height"][:, there]
    assert ((low <= mean) & (mean <= high)).all() and low.min() >= 0 and high.max() <= 40
    free = (low > 0) & (high < 40)
    reach = 1.9 * np.hypot(aleatoric, epistemic)
    assert (high - low)[free] == pytest.approx(2 * reach[free], rel=1e-3)


def test_the_reader_joins_tiles_and_pads_with_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, grid = cut(tmp_path, 96)
    data, _ = world()
    window = CubeReader(Path("work/cube"), grid).window(-24, 72, 192, 240)
    for group, x in data.items():
        f = group_factor(group)
        got = window[group]
        assert np.isnan(got[:, : 24 // f]).all(), "above the region"
        assert np.isnan(got[:, :, 168 // f :]).all(), "right of it"
        np.testing.assert_array_equal(
            got[:, 24 // f :, : 168 // f], x[0][:, : 168 // f, 72 // f :], group
        )


def test_finished_tiles_are_kept_and_a_changed_neighbour_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    c, grid = cut(tmp_path, 96)
    random_ensemble(c, grid)
    predict_batch(c, grid, "b0000")
    stamps = {p.name: p.stat().st_mtime_ns for p in Path("work/predict").glob("*.zip")}
    assert len(stamps) == 9
    predict_batch(c, grid, "b0000")
    assert stamps == {p.name: p.stat().st_mtime_ns for p in Path("work/predict").glob("*.zip")}
    record = read_json("work/cube/b0000.json")
    write_json("work/cube/b0003.json", record)  # of a packing before, with what it knew
    record["tiles"]["x000y000"]["digest"] = "changed"
    write_json("work/cube/b0000.json", record)
    predict_batch(c, grid, "b0000")
    after = {p.name: p.stat().st_mtime_ns for p in Path("work/predict").glob("*.zip")}
    changed = {n for n in stamps if stamps[n] != after[n]}
    near = {"x000y000.zip", "x001y000.zip", "x000y001.zip", "x001y001.zip"}
    assert changed == near, "only what the halo reaches"


def test_members_that_are_missing_or_exchanged_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no member"):
        Ensemble.load()
    c, grid = cut(tmp_path, 240)
    random_ensemble(c, grid)
    first, second = sorted(Path("results/model/fold-0").glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(StateError, match="differ from their card"):
        Ensemble.load()
