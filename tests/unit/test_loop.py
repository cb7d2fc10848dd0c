"""The training loop: files in place of memory, several processes, early stopping, divergence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from test_checkpoint import Killed, kill_after
from test_fit import COVER, FAST, TASKS, make_chips
from torch import Tensor

from terraloom.errors import FoldError, ModelError
from terraloom.io import read_store, write_store
from terraloom.train import loop
from terraloom.train.checkpoint import Checkpoint
from terraloom.train.fit import FitResult, FitSettings, fit_member
from terraloom.train.held_out import Validator, predict_held_out
from terraloom.train.pack import Positions, pack_chips, pack_labels
from terraloom.train.sampler import Augmentation, Prefetch, Sampler

ROOT = Path(__file__).parents[2]
CHIPS = make_chips(3)


pytestmark = pytest.mark.usefixtures("one_thread")


def fit(chips: xr.Dataset = CHIPS, s: FitSettings = FAST, **more: object) -> FitResult:
    given = {"held_out_fold": 0, "member": 0, "seed": 7, **more}
    return fit_member(chips, TASKS, s, **given)  # type: ignore[arg-type]


def same(a: FitResult, b: FitResult) -> bool:
    return all(torch.equal(v, b.state_dict[k]) for k, v in a.state_dict.items())


def test_files_give_the_bytes_of_memory(tmp_path: Path) -> None:
    write_store(tmp_path / "chips.zip", CHIPS)
    read = read_store(tmp_path / "chips.zip")
    a, b = fit(), fit(read, folder=tmp_path / "pack")
    assert same(a, b)
    assert {p.name.split("-")[0] for p in (tmp_path / "pack").iterdir()} == {"x", "y"}
    x = predict_held_out(CHIPS, [a.network()], 0)["cover"]
    y = predict_held_out(read, [a.network()], 0, batch=2)["cover"]
    assert np.array_equal(x.p, y.p) and np.array_equal(x.index, y.index)


def test_of_many_positions_a_fair_part_is_kept() -> None:
    for most, least in ((10_000, 5_000), (300, 200)):
        kept = np.zeros(5_000)
        for seed in range(40 if most == 300 else 1):
            p = Positions(most, seed)
            for start in range(0, 5_000, 250):
                p.add(np.arange(start, start + 250))
            at = p.array()
            assert p.count == 5_000 and least <= len(at) <= most and np.all(np.diff(at) > 0)
            kept[at] += 1
        quarters = kept.reshape(4, -1).mean(1)
        assert np.allclose(quarters, kept.mean(), rtol=0.06), "early and late ones alike"


def test_held_out_pixels_beyond_the_most_are_a_part_of_all() -> None:
    net = fit().network()
    few, every = (predict_held_out(CHIPS, [net], 0, most=m)["cover"] for m in (500, 10**6))
    assert 300 < len(few.index) <= 500 < len(every.index)
    at = np.searchsorted(every.index, few.index)
    assert np.array_equal(every.index[at], few.index)
    assert np.array_equal(every.y[at], few.y) and np.allclose(every.p[:, at], few.p, atol=1e-6)


def sampler_of(seed: int = 3) -> Sampler:
    net = fit(s=replace(FAST, epochs=0)).network()
    pack = pack_chips(net, CHIPS, pack_labels(CHIPS, TASKS, lambda _, c: c["fold"].values != 0))
    return Sampler(net, pack, crop_px=48, class_power=1, augmentation=Augmentation(),
                   generator=torch.Generator().manual_seed(seed))  # fmt: skip


def test_prefetch_gives_the_batches_of_the_sampler_and_their_states() -> None:
    plain = sampler_of()
    want = [plain.batch(2) for _ in range(5)]
    with Prefetch(sampler_of(), 2) as batches:
        got = [batches.take() for _ in range(3)]
        state = batches.get_state()
        got += [batches.take() for _ in range(2)]
        batches.set_state(state)
        again = [batches.take() for _ in range(2)]
    for a, b in zip([*want, *want[3:]], [*got, *again], strict=True):
        assert a.where == b.where
        assert all(torch.equal(a.x[f], b.x[f]) for f in a.x)
        assert all(torch.equal(a.y[t].nan_to_num(), b.y[t].nan_to_num()) for t in a.y)


def test_accumulated_batches_make_one_step() -> None:
    a = fit(s=replace(FAST, epochs=10, batch=2, accumulate=2, learning_rate=1e-2))
    b = fit(s=replace(FAST, epochs=10, batch=4, learning_rate=1e-2))
    assert len(a.history["cover"]) == len(b.history["cover"])
    assert not same(a, b), "batch statistics differ"
    assert np.nanmean(a.history["cover"][-3:]) < np.nanmean(a.history["cover"][:3])


def test_bf16_learns_as_fp32_does() -> None:
    s = replace(FAST, epochs=6)
    a, b = fit(s=replace(s, precision="bf16")), fit(s=replace(s, precision="fp32"))
    end = [np.nanmean(f.history["cover"][-4:]) for f in (a, b)]
    assert not same(a, b) and abs(end[0] - end[1]) < 0.15 * end[1]
    with pytest.raises(ModelError, match="fp16 on a processor"):
        fit(s=replace(s, precision="fp16", device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_auto_is_not() -> None:
    with pytest.raises(ModelError, match="no GPU") as caught:
        fit(s=replace(FAST, device="cuda"))
    assert "auto" in str(caught.value)
    assert loop.choose_device("auto").type == "cpu"


def test_early_stopping_keeps_the_best_epoch_and_looks_at_a_fold_of_its_own() -> None:
    s = replace(FAST, epochs=12, patience=3, learning_rate=1e-2)
    done = fit(s=s)
    best = int(np.argmax(done.scores)) + 1
    assert done.epoch == best and len(done.scores) <= 12
    assert done.scores[best - 1] > done.scores[0]
    assert len(done.scores) in (12, best + 3), "it ends when nothing has come for three epochs"
    # Labels of the held-out fold change neither training nor the choice of the epoch.
    held = CHIPS.copy(deep=True)
    at = held["fold"].values == 0
    held["y_cover"].values[at] = 2 - np.minimum(held["y_cover"].values[at], 2)
    assert same(done, fit(held, s)) and fit(held, s).scores == done.scores
    # Those of the fold of early stopping change the choice, but no weight of an epoch.
    val = Validator(CHIPS, done.spec.tasks, 1)
    assert val(done.network()) == pytest.approx(done.scores[best - 1], abs=1e-6)


def test_a_killed_training_with_early_stopping_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = replace(FAST, epochs=5, patience=2)
    whole, file = fit(s=s), tmp_path / "state.safetensors"
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, len(whole.history["cover"]) // 2)
        fit(s=s, checkpoint=Checkpoint(file, "a", every_s=0))
    again = fit(s=s, checkpoint=Checkpoint(file, "a", every_s=1e9))
    assert same(whole, again) and again.scores == whole.scores and again.epoch == whole.epoch


def test_early_stopping_needs_a_fold_to_spare() -> None:
    two = CHIPS.copy(deep=True)
    two["fold"].values[:] = two["fold"].values % 2
    with pytest.raises(FoldError, match="1 folds to train on"):
        fit(two, replace(FAST, patience=2))


def test_a_diverged_training_names_its_windows_and_keeps_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop._Step.forward

    def broken(self: loop._Step, batch: object, done: float) -> dict[str, Tensor]:
        each = run(self, batch, done)  # type: ignore[arg-type]
        taken.append(1)
        return {k: v * float("nan") if len(taken) == 4 else v for k, v in each.items()}

    taken: list[int] = []
    monkeypatch.setattr(loop._Step, "forward", broken)
    file = tmp_path / "state.safetensors"
    with pytest.raises(ModelError, match="diverged at step 4") as caught:
        fit(checkpoint=Checkpoint(file, "a", every_s=1e9))
    text = str(caught.value)
    assert "chips" in text and "row" in text and "learning_rate" in text
    monkeypatch.setattr(loop._Step, "forward", run)
    assert file.is_file() and same(fit(checkpoint=Checkpoint(file, "a", every_s=1e9)), fit())


def test_a_learning_rate_that_is_far_too_high_is_told() -> None:
    with pytest.raises(ModelError, match="diverged"):
        fit(s=replace(FAST, epochs=30, learning_rate=1e12))


_TORCHRUN = """
import json, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from dataclasses import replace
from test_fit import FAST, TASKS, make_chips
from terraloom.train.distributed import join_world, leave_world
from terraloom.train.fit import fit_member
world = join_world(torch.device("cpu"))
done = fit_member(make_chips(2), TASKS, replace(FAST, epochs=3, dropout=0.0, batch=4),
                  held_out_fold=0, member=0, seed=7, world=world)
if world.rank == 0:
    total = {{k: float((v.double() ** 2).sum()) for k, v in done.state_dict.items()}}
    with open(sys.argv[1], "w") as f:
        json.dump({{"size": world.size, "history": done.history, "sums": total}}, f)
leave_world()
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_TORCHRUN.format(paths=[str(ROOT / "tests/unit"), str(ROOT / "tests")]))
    records = []
    for size in (1, 2):
        out = tmp_path / f"{size}.json"
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", str(size), str(script), str(out)],
            check=True, capture_output=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        records.append(json.loads(out.read_text()))
    one, two = records
    assert (one["size"], two["size"]) == (1, 2)
    for name, losses in one["history"].items():
        assert len(losses) > 5
        assert np.allclose(losses, two["history"][name], rtol=2e-3, atol=1e-4, equal_nan=True)
    for name, value in one["sums"].items():
        assert two["sums"][name] == pytest.approx(value, rel=2e-2, abs=1e-3), name


def test_a_batch_is_shared_evenly_or_not_at_all() -> None:
    world = loop.World(1, 2)
    assert world.share(8) == slice(4, 8)
    with pytest.raises(ModelError, match="multiple"):
        world.share(5)


def test_a_validator_without_a_label_is_refused() -> None:
    with pytest.raises(ModelError, match="no label in fold 9"):
        Validator(CHIPS, (COVER,), 9)
