"""The audit as a person meets it: the verb stops, says which item and why, and leaves no table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import scenes_stage as made
from terraloom import cli
from terraloom.config.simulation import Simulation
from terraloom.io import read_json, write_json
from terraloom.preprocess import audit, scenes

SMALL = {"size_px": 384, "optical_dates": 5, "sar_dates": 1}

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["terraloom", *words, "--campaign", "campaign.yaml"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr().err
        assert end.value.code == (2 if fails else 0), said
        return said

    return call


def optical() -> list[str]:
    return [i["id"] for i in read_json(scenes.ITEMS)["items"] if i["source"] == made.S2]


def put(name: str, target: str, folder: Path) -> str:
    """Put a fault into an item; returns the id that must be named."""
    lock = read_json(scenes.ITEMS)
    fault, _ = made.FAULTS[name]
    fault(lock, next(i for i in lock["items"] if i["id"] == target), folder)
    write_json(scenes.ITEMS, lock)
    return target + ("_TWIN" if name == "duplicate" else "")


def test_the_verb_stops_and_goes_on_when_the_fault_is_gone(run: Run, folder: Path) -> None:
    sim = Simulation(seed=9, cloud_share=0.1, snow=False, **SMALL)
    made.finish_stage(*made.make_campaign(sim))
    good = read_json(scenes.ITEMS)
    run("audit-scenes")
    assert scenes.QUALITY.exists() and audit.MASK_TABLE.exists()

    named = put("half-pixel grid", optical()[1], folder)
    said = run("audit-scenes", fails=True)
    for part in ("error: ", named, "lattice", "  allowed: ", "  to do: ", "scenes.on_audit"):
        assert part in said, said
    assert "Traceback" not in said
    failed = [c for c in read_json(audit.AUDIT)["checks"] if not c["ok"]]
    assert {c["item"] for c in failed} == {named}
    assert not scenes.QUALITY.exists() and not audit.MASK_TABLE.exists()
    assert not list(Path().rglob(".tmp-*"))

    write_json(scenes.ITEMS, good)
    run("audit-scenes")
    assert scenes.QUALITY.exists()
    assert all(c["ok"] for c in read_json(audit.AUDIT)["checks"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_clean_regions_with_clouds_and_snow_raise_no_alarm(seed: int, run: Run) -> None:
    sim = Simulation(seed=seed, size_px=384, optical_dates=6 + seed, sar_dates=2)
    made.finish_stage(*made.make_campaign(sim))
    run("audit-scenes")


@pytest.mark.slow
@pytest.mark.parametrize("name", made.FAULTS)
def test_every_fault_in_any_scene_is_caught(name: str, run: Run, folder: Path) -> None:
    sim = Simulation(seed=11, cloud_share=0.15, snow=False, **SMALL)
    campaign, grid = made.make_campaign(sim)
    for target in range(SMALL["optical_dates"]):
        made.finish_stage(campaign, grid)
        named = put(name, optical()[target], folder)
        assert named in run("audit-scenes", fails=True)
        failed = [c for c in read_json(audit.AUDIT)["checks"] if not c["ok"]]
        assert {c["item"] for c in failed} == {named}, failed
        assert made.FAULTS[name][1] in {c["check"] for c in failed}


@pytest.mark.slow
def test_a_shift_before_the_alignment_is_taken_off_and_shown(run: Run, folder: Path) -> None:
    """The same half pixel that stops the run after the alignment is aligned away before it."""
    sim = Simulation(seed=9, cloud_share=0.1, snow=False, shift_sd_px=0.05, **SMALL)
    campaign, _ = made.make_campaign(sim)
    run("lock-items")
    target = optical()[2]
    put("half-pixel shift", target, folder)
    run("verify-items")
    for period in campaign.cube.periods:
        run("mask-scenes", "--period", period.name, "--part", "p000")
    run("measure-shifts")
    run("audit-scenes")
    import pandas as pd

    row = pd.read_csv(scenes.QUALITY).set_index("id").loc[target]
    assert row["decision"] == "use" and row["audit"] == "ok"
    assert row["before_px"] > 0.3 > 0.15 > row["rest_px"]
