"""The cluster of ``cluster.sh`` with accounting, which forgets finished jobs after two seconds.

Jobs that run out of memory, that end and that fail are known from ``sacct`` alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos import said, start
from support.road import command
from support.slurm import PATIENCE_S, cluster, make_profile, until

pytestmark = pytest.mark.slurm

#: An early file: three rules.
TARGET = "results/scenes/verified.json"


@pytest.fixture(scope="module", autouse=True)
def one_node() -> Iterator[None]:
    """The cluster."""
    with cluster("accounting"):
        yield


def test_jobs_are_known_from_accounting(tmp_path: Path) -> None:
    made = make_profile(tmp_path, account="maps")
    assert "accounting answers" in made.stdout and "watched with sacct, every 2 s" in made.stdout
    folder = tmp_path / "run"
    began = time.monotonic()
    run = start(folder, TARGET, "--workflow-profile", str(tmp_path))
    assert run.wait(PATIENCE_S) == 0, said(folder)[-3000:]
    assert (folder / TARGET).exists()
    ran = command("sacct", "-nPX", "--starttime=now-1hours", "-o", "State,Account").stdout.split()
    print(f"{len(ran)} jobs in {time.monotonic() - began:.0f} s: {', '.join(sorted(ran))}")
    assert all(job.endswith("|maps") for job in ran)
    assert sum(job.startswith("COMPLETED") for job in ran) >= 3
    assert any(not job.startswith("COMPLETED") for job in ran), "the one without memory"
    until(lambda: not command("squeue", "-h", "--states=all").stdout)  # it knows none of them


def test_an_account_that_is_not_there(tmp_path: Path) -> None:
    refused = make_profile(tmp_path, ok=False, account="fields")
    assert refused.returncode == 2 and "you have no account fields" in refused.stderr
    assert "accounts maps" in refused.stderr and not (tmp_path / "config.yaml").exists()
