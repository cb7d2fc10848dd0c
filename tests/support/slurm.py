"""A SLURM cluster of one node for tests, and what one waits for on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.road import command

_SCRIPT = Path(__file__).resolve().parents[1] / "slurm/cluster.sh"
#: Longest wait for anything, seconds: the machine may be busy.
PATIENCE_S = 1800
SCRATCH = Path("/tmp/terraloom-slurm")
#: 300 MB are too little for the first attempt of the simulation, which is what is tested.
SITE = {
    "jobs": 2, "poll_s": 2, "latency_s": 5, "scratch": f"{SCRATCH}/$SLURM_JOB_ID",
    "rules": {"simulate": {"mem_mb": 300}},
}  # fmt: skip


@contextmanager
def cluster(*kind: str) -> Iterator[None]:
    """The cluster, from Debian packages; it is left off afterwards. ``kind``: ``accounting``."""
    if os.geteuid() != 0:
        pytest.skip("a cluster is started by root only")
    subprocess.run([_SCRIPT, "up", *kind], check=True, timeout=600)
    try:
        yield
    finally:
        subprocess.run([_SCRIPT, "down"], check=True, timeout=60)
        shutil.rmtree(SCRATCH, ignore_errors=True)  # Snakemake leaves the folders of jobs, empty


def make_profile(place: Path, ok: bool = True, **keys: Any) -> subprocess.CompletedProcess[str]:
    """Write a site file and ask for the profile of it, in the same folder."""
    (place / "site.yaml").write_text(yaml.safe_dump(SITE | keys))
    return command(
        "terraloom", "cluster-profile", str(place / "site.yaml"), "--out", str(place), ok=ok
    )


def until(what: Callable[[], object], *processes: subprocess.Popen[str]) -> float:
    """Wait for something while processes live; seconds it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < PATIENCE_S
        assert all(p.poll() is None for p in processes), "the run ended before"
        time.sleep(0.2)
    return time.monotonic() - began


def queue(state: str) -> str:
    """Jobs in a state: the rule and its wildcards, and the memory."""
    return command("squeue", "-h", f"--states={state}", "-o", "%k %m").stdout
