"""A training that was killed goes on to the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from test_fit import FAST, TASKS, make_chips

from terraloom.config.load import load_campaign
from terraloom.errors import StateError
from terraloom.grid import geobox_record
from terraloom.io import sha256, write_store
from terraloom.train import fit as fitting
from terraloom.train import model_files, run
from terraloom.train.checkpoint import Checkpoint, Progress
from terraloom.train.fit import FitResult, fit_member, save_fit

ROOT = Path(__file__).parents[2]
SETTINGS = replace(FAST, epochs=2, dropout=0.1)
CHIPS = make_chips(3)
GRID = geobox_record(GeoBox((288, 96), Affine(10, 0, 0, 0, -10, 0), "EPSG:32633"))


pytestmark = pytest.mark.usefixtures("one_thread")


def train(checkpoint: Checkpoint | None = None, seed: int = 7) -> FitResult:
    return fit_member(
        CHIPS, TASKS, SETTINGS, held_out_fold=0, member=0, seed=seed, checkpoint=checkpoint
    )


class Killed(Exception):
    """Stands for the end of the process."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The training dies right after a step whose state was written."""
    keep = Checkpoint.keep

    def dying(self: Checkpoint, now: Progress) -> None:
        keep(self, now)
        if now.step == step:
            raise Killed

    monkeypatch.setattr(Checkpoint, "keep", dying)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, FitResult]:
    torch.set_num_threads(1)
    fit = train()
    path = tmp_path_factory.mktemp("whole") / "member.safetensors"
    save_fit(path, fit)
    return sha256(path), fit


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_training_ends_in_the_same_bytes(
    whole: tuple[str, FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    digest, fit = whole
    assert len(fit.history["cover"]) > 5
    file = tmp_path / "state.safetensors"
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, step)
        train(Checkpoint(file, "a", every_s=0))
    torch.rand(5)  # whatever the process after it has drawn
    seen: list[int] = []
    restore = Checkpoint.restore

    def watch(self: Checkpoint, now: Progress) -> None:
        restore(self, now)
        seen.append(now.step)

    monkeypatch.setattr(Checkpoint, "restore", watch)
    again = train(Checkpoint(file, "a", every_s=1e9))
    assert seen == [step], "it started anew"
    save_fit(tmp_path / "member.safetensors", again)
    assert sha256(tmp_path / "member.safetensors") == digest
    assert again.history.keys() == fit.history.keys()
    for name, values in fit.history.items():
        assert repr(again.history[name]) == repr(values), "also the losses, NaN included"


def test_a_state_of_other_data_is_not_used(
    whole: tuple[str, FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.safetensors"
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, 4)
        train(Checkpoint(file, "a", every_s=0), seed=8)
    save_fit(tmp_path / "member.safetensors", train(Checkpoint(file, "b", every_s=1e9)))
    assert sha256(tmp_path / "member.safetensors") == whole[0]


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_state_is_left_aside(
    whole: tuple[str, FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    damage: bytes | None,
) -> None:  # fmt: skip
    file = tmp_path / "state.safetensors"
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, 2)
        train(Checkpoint(file, "a", every_s=0))
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    save_fit(tmp_path / "member.safetensors", train(Checkpoint(file, "a", every_s=1e9)))
    assert sha256(tmp_path / "member.safetensors") == whole[0]


def test_states_are_written_no_more_often_than_asked(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    train(Checkpoint(file, "a", every_s=1e9))
    assert not file.exists()
    assert fitting.Checkpoint is Checkpoint


def test_a_killed_member_of_a_campaign_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_store(run.CHIPS, CHIPS)
    run.CHIPS.with_name("folds.gpkg").write_bytes(b"")
    campaign = load_campaign(ROOT / "config/campaigns/havel.yaml")
    model = campaign.model.model_copy(update={"epochs": 1, "width": 4})
    campaign = campaign.model_copy(update={"model": model})
    monkeypatch.setattr(run, "task_specs", lambda c: list(TASKS))
    monkeypatch.setattr(run, "Checkpoint", lambda path, origin: Checkpoint(path, origin, every_s=0))
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, 2)
        run.train_member(campaign, 0, 1)
    assert [p.name for p in run.WORK.iterdir()] == ["fold-0-member-1.safetensors"]
    assert not model_files.member_files(0)
    run.train_member(campaign, 0, 1)
    assert model_files.member_files(0) == [run.member_file(0, 1)]
    left = [p.name for p in run.WORK.iterdir()]
    assert left == ["fold-0-member-1.csv"], "the state of a finished training is left"
    first = sha256(run.member_file(0, 1))
    run.train_member(campaign, 0, 1)
    assert sha256(run.member_file(0, 1)) == first
    run.train_member(campaign.model_copy(update={"seed": 1}), 0, 1)
    assert sha256(run.member_file(0, 1)) != first


def test_a_buffer_and_several_processes_reach_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chips = CHIPS.assign_coords(row=("n", [0, 96, 192]), col=("n", [0, 0, 0]))
    write_store(run.CHIPS, chips.assign_attrs(GRID))
    run.CHIPS.with_name("folds.gpkg").write_bytes(b"")
    campaign = load_campaign(ROOT / "config/campaigns/havel.yaml")
    folds = campaign.folds.model_copy(update={"buffer_m": 60.0})
    campaign = campaign.model_copy(update={"folds": folds})
    monkeypatch.setattr(run, "task_specs", lambda c: list(TASKS))
    tasks = [t.model_copy(update={"name": n}) for t, n in
             zip(campaign.tasks, ("cover", "edge"), strict=True)]  # fmt: skip
    seen: dict[str, object] = {}
    monkeypatch.setattr(run, "fit_member", lambda *a, **k: seen.update(k) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train_member(campaign.model_copy(update={"tasks": tasks}), 0, 0)
    keep = seen["keep"]
    assert isinstance(keep, np.ndarray) and 0 < keep.mean() < 1
    several = campaign.model_copy(
        update={"model": campaign.model.model_copy(update={"processes": 2})}
    )
    called: list[list[str]] = []

    class Done:
        returncode = 3

    monkeypatch.setattr(run.subprocess, "run", lambda c, check: called.append(c) or Done())
    with pytest.raises(StateError, match="2 processes ended with code 3"):
        run.train_member(several, 0, 0)
    assert "--nproc-per-node=2" in called[0] and "terraloom.cli" in called[0]
