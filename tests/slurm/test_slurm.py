"""A reduced rehearsal on a real SLURM cluster of one node (``cluster.sh``); needs root.

The controller is killed and taken up again, a job is killed for its memory, Ctrl-C cancels. The
figures that it prints stand in docs/how-to/run-on-slurm.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos import said, start
from support.road import BIN, command
from support.slurm import PATIENCE_S, SCRATCH, cluster, make_profile, queue, until
from terraloom.operate.resume import slurm_jobs

pytestmark = pytest.mark.slurm

#: What is made; on a busy machine one early file will do.
TARGETS = os.environ.get("TERRALOOM_SLURM_TARGETS", "all").split()


@pytest.fixture(scope="module", autouse=True)
def one_node() -> Iterator[None]:
    """The cluster."""
    with cluster():
        yield


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that the cluster was asked for."""
    place = tmp_path_factory.mktemp("site")
    made = make_profile(place)
    assert "no accounting" in made.stdout and "watched with squeue, every 2 s" in made.stdout
    assert "60 minutes" in made.stdout, "the partition's limit"
    return place


def overlaps(folder: Path) -> list[tuple[str, str]]:
    """Pairs of jobs of one target whose times overlap."""
    names = ",".join(ids(folder))
    rows = command("squeue", "-h", "--states=all", f"--name={names}", "-o", "%k|%A|%S|%e").stdout
    jobs = [row.split("|") for row in rows.splitlines()]
    ran = [job for job in jobs if not job[2].startswith("N/A")]
    return [
        (a[1], b[1])
        for a in ran for b in ran
        if a[0] == b[0] and int(a[1]) < int(b[1]) and b[2] < a[3]
    ]  # fmt: skip


def ids(folder: Path) -> list[str]:
    return [
        line.split()[-1]
        for line in said(folder).splitlines()
        if line.startswith("SLURM run ID")
    ]  # fmt: skip


def out_of_memory(folder: Path) -> bool:
    logs = (folder / ".snakemake/slurm_logs/rule_simulate").rglob("*.log")
    return any("exceeded memory limit" in log.read_text() for log in logs)


def test_a_controller_that_is_killed_and_a_job_without_memory(
    tmp_path: Path, profile: Path
) -> None:
    folder = tmp_path / "run"
    words = (*TARGETS, "--workflow-profile", str(profile))
    began = time.monotonic()
    run = start(folder, *words)
    until(lambda: "simulate 600M" in queue("RUNNING"), run)
    assert out_of_memory(folder)
    first = time.monotonic() - began
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = slurm_jobs(folder)
    assert left, "SLURM goes on without its controller"

    began = time.monotonic()
    with folder.with_suffix(".said.txt").open("a") as out:
        again = subprocess.Popen(
            [BIN / "terraloom", "resume"], cwd=folder, stdout=out, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
            env=os.environ | {"PATH": os.pathsep.join([str(BIN), os.environ["PATH"]])},
        )  # fmt: skip
    until(lambda: "unlocked the folder" in said(folder), again)
    overhead = time.monotonic() - began
    assert f"cancelled {len(left)} jobs in SLURM" in said(folder)
    assert again.wait(PATIENCE_S) == 0, said(folder)[-3000:]
    total = first + time.monotonic() - began

    ended = "results/map/report.html" if TARGETS == ["all"] else TARGETS[0]
    assert (folder / ended).exists()
    assert not overlaps(folder), "no target was written by two jobs at once"
    staged = [p for p in SCRATCH.rglob("*") if p.is_file()]
    assert SCRATCH.is_dir() and not staged
    jobs = command("squeue", "-h", "--states=all", f"--name={','.join(ids(folder))}", "-o", "%T")
    print(f"{len(jobs.stdout.split())} jobs in {total:.0f} s; resume after {overhead:.1f} s")


def test_ctrl_c_cancels(tmp_path: Path, profile: Path) -> None:
    folder = tmp_path / "run"
    run = start(folder, "--workflow-profile", str(profile))
    until(lambda: "simulate" in queue("RUNNING"), run)
    run.send_signal(signal.SIGINT)
    assert run.wait(120) != 0
    until(lambda: not slurm_jobs(folder))
    assert not list((folder / ".snakemake/locks").glob("*.lock"))


def test_a_partition_that_is_not_there(tmp_path: Path) -> None:
    refused = make_profile(tmp_path, ok=False, partition="big")
    assert refused.returncode == 2 and "there is no partition big" in refused.stderr
    assert "main (60 min" in refused.stderr and not (tmp_path / "config.yaml").exists()
