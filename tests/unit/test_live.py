"""What a running training shows."""

from __future__ import annotations

import csv
import io
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint import Killed, kill_after
from test_fit import FAST, TASKS, make_chips

from terraloom.train.checkpoint import Checkpoint
from terraloom.train.fit import FitResult, fit_member
from terraloom.train.live import Live, epoch_table

CHIPS = make_chips(2)


pytestmark = pytest.mark.usefixtures("one_thread")


def fit(live: Live, **more: object) -> FitResult:
    s = replace(FAST, epochs=3, patience=3)
    return fit_member(CHIPS, TASKS, s, held_out_fold=0, member=0, seed=1, live=live, **more)  # type: ignore[arg-type]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_epochs_are_means_of_their_steps_and_the_last_may_be_short() -> None:
    history = {"a": [1.0, 3.0, math.nan, 5.0, 7.0], "b": [math.nan] * 5}
    got = rows(epoch_table(history, [0.5, 0.75], 2))
    a, b = ([r for r in got if r["task"] == t] for t in "ab")
    assert [(r["epoch"], r["step"], r["loss"], r["score"]) for r in a] == [
        ("1", "2", "2", "0.5"), ("2", "4", "5", "0.75"), ("3", "5", "7", ""),
    ]  # fmt: skip
    assert [r["loss"] for r in b] == ["", "", ""]
    assert len(rows(epoch_table(history, [], 2.5))) == 4, "an epoch need not be whole steps"


def test_a_training_shows_how_far_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "terraloom.train.live")
    done = fit(Live(tmp_path / "live.csv", every_s=0))
    lines = [r.getMessage() for r in caplog.records if r.name == "terraloom.train.live"]
    steps = len(done.history["cover"])
    assert len(lines) == steps and f"step 1 of {steps}, epoch 0." in lines[0]
    assert "cover" in lines[0] and "s left" in lines[1] and "s left" not in lines[-1]
    assert f"score {done.scores[-1]:.4f}" in lines[-1]
    found = [r for r in rows((tmp_path / "live.csv").read_text()) if r["task"] == "cover"]
    assert [float(r["score"]) for r in found] == pytest.approx(done.scores, rel=1e-5)
    assert int(found[-1]["step"]) == steps


def test_looks_are_rare_and_the_end_is_always_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "terraloom.train.live")
    fit(Live(tmp_path / "live.csv", every_s=1e9))
    assert len([r for r in caplog.records if r.name == "terraloom.train.live"]) == 1
    assert (tmp_path / "live.csv").is_file()


def test_a_resumed_training_has_all_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(Live(tmp_path / "whole.csv"))
    with monkeypatch.context() as m, pytest.raises(Killed):
        kill_after(m, 4)
        fit(Live(), checkpoint=Checkpoint(tmp_path / "s", "a", every_s=0))
    fit(Live(tmp_path / "again.csv"), checkpoint=Checkpoint(tmp_path / "s", "a", every_s=1e9))
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "whole.csv").read_text()
