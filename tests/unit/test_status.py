"""Where a run stands, read from its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from terraloom import cli
from terraloom.errors import StateError
from terraloom.io import read_json, write_json
from terraloom.operate.joblogs import find_logs, show_logs
from terraloom.operate.record import (
    RECORD,
    Holder,
    begin_run,
    end_run,
    other_run,
    read_run,
)  # fmt: skip
from terraloom.operate.status import read_status, reason_of, text_of

TILES = {"b0000": ["x000y000", "x000y001"], "b0001": ["x001y000", "x001y001"]}
BEGUN = time.mktime((2026, 5, 4, 10, 0, 0, 0, 0, -1))


def job(number: int, rule: str, name: str = "", todo: bool = True) -> dict[str, Any]:
    at = f"{rule}/{name}" if name else rule
    return {
        "id": number, "rule": rule, "name": name, "todo": todo, "output": [f"work/{at}.json"],
        "log": [f"logs/{at}.log"], "benchmark": f"benchmarks/{at}.tsv",
    }  # fmt: skip


JOBS = [
    job(9, "lock_items", todo=False), job(1, "build_cube", "b0000"), job(2, "build_cube", "b0001"),
    job(3, "train_member", "0-1"), job(4, "predict_tiles", "b0000"),
    job(5, "predict_tiles", "b0001"), job(6, "mosaic_products"),
]  # fmt: skip
#: Words of Snakemake, with the times of a clock that stands two minutes after the begin.
SAID = """Building DAG of jobs...
[Mon May  4 10:00:00 2026]
Job 1: Build the cubes of the tiles of b0000
Reason: Missing output files: work/build_cube/b0000.json
[Mon May  4 10:00:30 2026]
Finished jobid: 1 (Rule: build_cube)
[Mon May  4 10:00:30 2026]
Job 2: Build the cubes of the tiles of b0001
[Mon May  4 10:00:30 2026]
Job 3: Train member 1
RuleException:
CalledProcessError in file "train.smk", line 45:
Command 'set -euo pipefail;  terraloom train-member' died with <Signals.SIGKILL: 9>.
[Mon May  4 10:01:30 2026]
Error in rule train_member:
    message: None
    jobid: 3
    log: logs/train_member/0-1.log (check log file(s) for error details)
"""


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of this process, two minutes old."""
    monkeypatch.chdir(tmp_path)
    begin_run(JOBS, tiles=TILES, title="demo: A demo", log=".snakemake/log/a.log", at_once=2)
    record = read_json(RECORD)
    record["holder"]["started"] = BEGUN
    write_json(RECORD, record)
    write(tmp_path, ".snakemake/log/a.log", SAID)
    write(tmp_path, "benchmarks/build_cube/b0000.tsv", "s\th:m:s\n30.0\t0:00:30\n")
    write(tmp_path, "benchmarks/predict_tiles/b0000.tsv", "s\th:m:s\n100.0\t0:01:40\n")
    write(tmp_path, "logs/build_cube/b0000.log", "tile x000y000 built\n" + "line\n" * 60)
    write(tmp_path, "logs/train_member/0-1.log", "epoch 1\nepoch 2\n")
    for tile in ("x000y000", "x000y001", "x001y000"):
        write(tmp_path, f"work/cube/{tile}.zip", "cube")
    return tmp_path


def end_holder(pid: int, host: str | None = None) -> None:
    record = read_json(RECORD)
    record["holder"] |= {"pid": pid} | ({"host": host} if host else {})
    write_json(RECORD, record)


@pytest.fixture(scope="module")
def gone() -> int:
    """Number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_jobs_tiles_failures_and_time_left(run: Path) -> None:
    s = read_status(run, now=BEGUN + 120)
    assert (s.state, s.seconds) == ("running", 120)
    assert [j.state for j in s.jobs] == [
        "done", "done", "running", "failed", "to do", "to do", "to do",
    ]  # fmt: skip
    assert s.tiles == {"build_cube": (3, 4), "predict_tiles": (0, 4)}
    assert s.jobs[3].reason == "ended by SIGKILL (out of memory?)\nepoch 2"
    # The cube is 60 s over its 30 s; two predictions of 100 s are left. Of 120 s, 30 s were of
    # finished and 90 s of running jobs: one at a time.
    assert s.left_s == pytest.approx(200)
    assert s.unknown == ["train_member", "mosaic_products"]
    assert s.disk["work"] > 0 and s.disk["free"] > 0
    text = text_of(s)
    assert "running for 2 min" in text and "3 of 4" in text and "about 3 min left" in text
    assert "FAILED train_member 0-1; terraloom logs 0-1\n  ended by SIGKILL" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("how", "state", "second"),
    [("kill", "killed", "interrupted"), ("elsewhere", "unknown", "running"),
     ("end", "failed", "interrupted")],
)  # fmt: skip
def test_a_run_that_is_over_or_elsewhere(
    run: Path, gone: int, how: str, state: str, second: str
) -> None:
    if how == "end":
        end_run("failed")
    else:
        end_holder(gone, "other-node" if how == "elsewhere" else None)
    s = read_status(run)
    assert (s.state, s.jobs[2].state) == (state, second)
    assert {"killed": "terraloom resume", "unknown": "cannot ask", "failed": "start it again"}[
        state
    ] in (text_of(s))


def test_outputs_of_another_campaign_file_are_not_counted_as_done_tiles(run: Path) -> None:
    for name in ("b0000", "b0001"):
        write(run, f"work/build_cube/{name}.json", "{}")
    os.utime(run / "work/cube/x001y000.zip", (1e9, 1e9))
    begin_run(JOBS, tiles=TILES, title="demo", log=None, at_once=None)
    later = time.time() + 5
    os.utime(run / "work/cube/x000y000.zip", (later, later))
    assert read_status(run).tiles["build_cube"] == (1, 4)


def test_another_run_is_named(run: Path, gone: int) -> None:
    assert other_run() == "", "no lock"
    write(run, ".snakemake/locks/0.output.lock", "work/a")
    assert f"process {os.getpid()} of " in other_run() and "Do not unlock" in other_run()
    end_holder(gone)
    assert "was killed" in other_run() and "terraloom resume" in other_run()
    end_run("done")
    assert "just beginning" in other_run()


def test_a_number_that_is_used_again_is_another_process() -> None:
    me = Holder.me()
    assert me.state == "here"
    assert Holder(me.pid, (me.born or 0) + 1, me.host, me.user, me.started).state == "gone"


def test_logs_by_tile_job_rule_and_wildcard(run: Path) -> None:
    cubes = [Path("logs/build_cube/b0000.log"), Path("logs/build_cube/b0001.log")]
    assert find_logs("build_cube") == find_logs("build-cube") == cubes
    assert find_logs("x000y001") == [cubes[0], Path("logs/predict_tiles/b0000.log")]
    assert find_logs("0-1") == [Path("logs/train_member/0-1.log")]
    text = show_logs("x000y000", lines=3)
    assert text.splitlines()[:2] == ["==> logs/build_cube/b0000.log (61 lines)",
                                     "tile x000y000 built"]  # fmt: skip
    assert "==> logs/predict_tiles/b0000.log: not written yet" in text
    with pytest.raises(StateError, match="did you mean x00"):
        find_logs("x000y00")


def test_what_snakemake_refuses_has_failed(run: Path) -> None:
    said = 'WorkflowError in rule build_cube in file "p.smk", line 4:\nOutput b0001 is older.\n'
    write(run, ".snakemake/log/a.log", SAID + said)
    end_run("failed")
    failed = read_status(run).jobs[2]
    assert (failed.state, failed.reason) == ("failed", "Output b0001 is older.")


def test_files_of_a_time_to_come_are_dated_now(run: Path) -> None:
    tile, other = run / "work/cube/x000y000.zip", run / "work/cube/x000y001.zip"
    ahead, before = time.time() + 24 * 3600, other.stat().st_mtime_ns
    os.utime(tile, (ahead, ahead))
    told = begin_run(JOBS, tiles=TILES, title="demo", log=None, at_once=None)
    assert "Dated 1 files" in told
    assert tile.stat().st_mtime <= time.time() and other.stat().st_mtime_ns == before


def test_the_reason_is_the_error_with_what_to_do(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("INFO one\nerror: tile x: damaged\n  to do: fetch it again\n")
    assert reason_of([log]) == "error: tile x: damaged\n  to do: fetch it again"
    assert "Snakemake's log" in reason_of([tmp_path / "absent.log"])


def test_verbs(run: Path) -> None:
    runner = CliRunner()
    told = json.loads(runner.invoke(cli.app, ["status", "--json"]).output)
    assert told["rules"]["build_cube"] == {"done": 1, "running": 1}
    assert "epoch 2" in runner.invoke(cli.app, ["logs", "train_member"]).output
    end_run("done")
    shown = runner.invoke(cli.app, ["status", "--watch", "5"]).output
    assert "done after" in shown, "it ends with the run"


def test_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StateError, match="no run is recorded here"):
        read_status()
    assert end_run("done") == "" and not RECORD.exists(), "work/ may be deleted at any time"
    write_json(RECORD, {"holder": {"pid": 1}})
    with pytest.raises(StateError, match="not the record of a run"):
        read_run()
