"""Runs whose controller was killed: their jobs end first, nobody else's, then they start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from terraloom.errors import StateError
from terraloom.io import write_json
from terraloom.operate import resume as module
from terraloom.operate.record import RECORD, Holder
from terraloom.operate.resume import MARK_VARIABLE, orphans, resume, slurm_jobs

#: Queue of SLURM as a file of lines "job name"; a job leaves it some calls after scancel.
SQUEUE = """#!{python}
import pathlib, sys
queue = pathlib.Path({folder!r}) / "queue"
names = [w[7:].split(",") for w in sys.argv if w.startswith("--name=")][0]
rows = [line.split() for line in queue.read_text().splitlines()]
print("\\n".join(job for job, name, *_ in rows if name in names))
keep = [r for r in rows if r[2] != "1"]
queue.write_text("\\n".join(f"{{j}} {{n}} {{int(c) - (c != '0')}}" for j, n, c in keep))
"""
SCANCEL = """#!{python}
import pathlib, sys
queue = pathlib.Path({folder!r}) / "queue"
rows = [line.split() for line in queue.read_text().splitlines()]
queue.write_text("\\n".join(
    f"{{j}} {{n}} {{'2' if j in sys.argv[1:] else c}}" for j, n, c in rows))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run whose controller is gone."""
    folder = tmp_path / "run"
    gone = subprocess.Popen(["true"])
    gone.wait()
    record(folder, pid=gone.pid)
    (folder / ".snakemake/locks").mkdir(parents=True)
    (folder / ".snakemake/locks/0.input.lock").write_text("a\n")
    return folder


def record(folder: Path, *, ended: Any = None, **holder: Any) -> None:
    words = {"words": ["--cores", "2", "--config", "x={a: 1}"], "cwd": str(folder),
             "environment": {"PYTHONHASHSEED": "0", "PATH": "/nowhere"}}  # fmt: skip
    write_json(
        folder / RECORD,
        {"holder": vars(Holder.me()) | holder, "ended": ended, "log": None, "jobs": [],
         "tiles": {}, "title": "x", "command": words},
    )  # fmt: skip


@pytest.fixture
def queue(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A queue with two jobs of the run and one of another."""
    place = tmp_path / "slurm"
    place.mkdir()
    for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL)):
        (place / name).write_text(text.format(python=sys.executable, folder=str(place)))
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    log = run / ".snakemake/log/2026-01-01T000000.0.snakemake.log"
    log.parent.mkdir()
    log.write_text("Building DAG of jobs...\nSLURM run ID: mine-1\nSelect jobs\n")
    (place / "queue").write_text("11 mine-1 0\n12 mine-1 0\n13 other-1 0")
    return place / "queue"


def test_jobs_in_the_queue_end_first_and_nobody_elses(run: Path, queue: Path) -> None:
    assert slurm_jobs(run) == ["11", "12"]
    restart = resume(run)
    assert restart.said == "cancelled 2 jobs in SLURM; unlocked the folder"
    assert queue.read_text().split() == ["13", "other-1", "0"]
    assert not (run / ".snakemake/locks").exists()
    assert restart.words[1:] == ["-m", "snakemake", "--cores", "2", "--config", "x={a: 1}"]
    assert restart.environment.get("PATH") is None, "what is set now stays"


def test_jobs_that_do_not_end_keep_the_folder_locked(
    run: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_END_S", 0.1)
    (queue.parent / "scancel").write_text("#!/bin/sh\n")
    with pytest.raises(StateError, match="jobs of this run do not end: 11 12"):
        resume(run)
    assert (run / ".snakemake/locks/0.input.lock").exists()


def test_a_cluster_that_cannot_be_asked_keeps_the_folder_locked(run: Path, queue: Path) -> None:
    (queue.parent / "squeue").write_text("#!/bin/sh\necho 'connect failure' >&2\nexit 1\n")
    with pytest.raises(StateError, match="connect failure"):
        resume(run)
    assert (run / ".snakemake/locks/0.input.lock").exists()


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    all_of_them: list[subprocess.Popen[bytes]] = []
    yield all_of_them
    for process in all_of_them:
        process.kill()
        process.wait()


def start(
    started: list[subprocess.Popen[bytes]], *words: str, cwd: Path | None = None, **env: str
) -> subprocess.Popen[bytes]:
    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(words, env=os.environ | env, cwd=cwd)
    finally:
        signal.signal(signal.SIGINT, before)
    started.append(process)
    return process


def test_orphans_of_the_folder_end_and_no_others(
    run: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    mine = {MARK_VARIABLE: str(run.resolve())}
    soft = start(started, "sleep", "60", **mine)
    hard = start(started, sys.executable, "-c", deaf, **mine)
    other = start(started, "sleep", "60", **{MARK_VARIABLE: str(tmp_path / "run-2")})
    plain = start(started, "sleep", "60", cwd=run)
    time.sleep(0.3)
    assert sorted(orphans(run)) == sorted([soft.pid, hard.pid])
    module._GRACE_S, before = 0.5, module._GRACE_S
    try:
        # Their parent is this test: as zombies they have no environment, so they count as gone.
        assert "ended 2 processes" in resume(run).said
    finally:
        module._GRACE_S = before
    assert soft.wait(5) == -signal.SIGINT and hard.wait(5) == -signal.SIGKILL
    assert other.poll() is None and plain.poll() is None


def test_a_run_that_lives_is_left_alone(
    run: Path, queue: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    record(run)  # held by this process
    with pytest.raises(StateError, match="the run is alive: process") as err:
        resume(run)
    assert "stop it first" in err.value.fix
    record(run, host="node7")
    with pytest.raises(StateError, match="cannot ask whether the run lives") as err:
        resume(run)
    assert "--surely-dead" in err.value.fix and "node7" in err.value.fix
    assert "11 mine-1 0" in queue.read_text(), "nothing was cancelled"
    assert "cancelled 2 jobs" in resume(run, surely_dead=True).said


def test_a_run_that_is_just_beginning_is_left_alone(
    run: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    """Before its first job it has not written who it is."""
    program = tmp_path / "snakemake"
    program.write_text("import time\ntime.sleep(60)\n")
    begun = start(started, sys.executable, str(program), "--cores", "1", cwd=run)
    time.sleep(0.3)
    with pytest.raises(StateError, match=f"just beginning: process {begun.pid}"):
        resume(run)


def test_a_finished_run_has_nothing_left(run: Path) -> None:
    (run / ".snakemake/locks/0.input.lock").unlink()
    record(run, ended={"how": "failed", "time": 0.0}, host=socket.gethostname() + "-2")
    assert resume(run).said == "nothing was left behind"


def test_no_run_no_resume(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no run is recorded here"):
        resume(tmp_path)
