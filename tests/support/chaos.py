"""Runs that are killed: a reduced rehearsal, the end of a whole process tree, what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from base64 import urlsafe_b64decode
from pathlib import Path

import psutil

from support.road import BIN, REHEARSAL, ROOT
from terraloom.io import sha256

#: The rehearsal with all its stages, as small as they can be.
SMALL = (
    "archive={simulation: {seed: 7, size_px: 384, optical_dates: 4, sar_dates: 1, "
    "cloud_share: 0.1}}",
    "aoi={bbox: [420000, 5816160, 423840, 5820000]}",
    "grid={tile_px: 192, tiles_per_job: 2}",
    "sources=[{source: sentinel-2-l2a, catalogue: resources/simulated/catalog.json, "
    "collection: sim-s2-l2a, bands: [B02, B03, B04, B08, B11]}]",
    "cube={periods: [{name: spring, start: 2022-01-01, end: 2022-06-15}, "
    "{name: summer, start: 2022-06-16, end: 2022-12-31}]}",
    "scenes={jobs: 1, min_clear_pct: 0}",
    "coregister={on_unaligned: keep}",
    "folds={count: 3, block_m: 480}",
    "chips={size_px: 192}",
    "model={members: 1, epochs: 2}",
    "sample={size: 100, min_per_stratum: 5}",
)
#: Files of one tile: finished ones are never made again, whatever becomes of their job.
TILES = ("work/cube/*.zip", "work/predict/*.zip")
DAY_S = 24 * 3600


def start(
    folder: Path, *words: str, keys: tuple[str, ...] = SMALL, before: str = "", zone: str = "UTC"
) -> subprocess.Popen[str]:
    """Start Snakemake in a session of its own; its words go to ``said.txt`` beside the folder."""
    env = os.environ | {
        "PATH": os.pathsep.join([*filter(None, [before]), str(BIN), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
        "TZ": zone,
    }  # fmt: skip
    config = ["--config", f"campaign={REHEARSAL}", *keys]
    with folder.with_suffix(".said.txt").open("a") as out:
        return subprocess.Popen(
            ["snakemake", *words, "--directory", str(folder), *config], cwd=ROOT, env=env,
            stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def said(folder: Path) -> str:
    """All that the runs of a folder have said."""
    return folder.with_suffix(".said.txt").read_text()


def kill_tree(process: subprocess.Popen[str]) -> int:
    """``kill -9`` all processes of a session until none is left; returns how many."""
    killed = set()
    while alive := [p for p in session(process.pid) if p.status() != psutil.STATUS_ZOMBIE]:
        for p in alive:
            killed.add(p.pid)
            p.send_signal(signal.SIGKILL)
        process.poll()
        time.sleep(0.01)
    process.wait()
    return len(killed)


def session(leader: int) -> list[psutil.Process]:
    """Living processes of a session."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def finished_jobs(folder: Path) -> dict[str, float]:
    """End of each job, by the outputs that Snakemake holds to be finished.

    It records them one after the other: a kill in between leaves a job that is not finished.
    """
    base = folder / ".snakemake"
    begun = {p.name for p in (base / "incomplete").rglob("*") if p.is_file()}
    found = {}
    for path in (base / "metadata").rglob("*"):
        if path.is_file() and path.name not in begun:
            try:
                record = json.loads(path.read_text())
            except json.JSONDecodeError:
                continue  # it was being written
            if not record.get("incomplete"):
                found[urlsafe_b64decode(path.name).decode()] = record["endtime"]
    return found


def outputs_together(folder: Path) -> dict[str, set[str]]:
    """All outputs of the job that made an output, of each recorded one."""
    jobs: dict[str, set[str]] = {}
    for path in (folder / ".snakemake/metadata").rglob("*"):
        if path.is_file():
            record = json.loads(path.read_text())
            job = str((record["rule"], record["log"]))
            jobs.setdefault(job, set()).add(urlsafe_b64decode(path.name).decode())
    return {output: outputs for outputs in jobs.values() for output in outputs}


def finished_tiles(folder: Path) -> dict[str, int]:
    """Inode of each finished tile: one that is made again is renamed over the old, and has another.

    Times do not tell: they follow the clock.
    """
    return {
        path.relative_to(folder).as_posix(): path.stat().st_ino
        for pattern in TILES
        for path in folder.glob(pattern)
    }


def set_clock_back(folder: Path) -> None:
    """A clock that jumps back by a day: all that is there comes from tomorrow."""
    for path in folder.rglob("*"):
        if path.is_file():
            seen = path.stat()
            day = DAY_S * 10**9
            os.utime(path, ns=(seen.st_atime_ns + day, seen.st_mtime_ns + day))


def products(folder: Path) -> dict[str, str]:
    """Digest of each file of the results."""
    root = folder / "results"
    return {
        p.relative_to(root).as_posix(): sha256(p)
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != "provenance.jsonl"
    }


def leftovers(folder: Path) -> list[str]:
    """Temporary files of a run, its folder of Snakemake included."""
    found = [p for p in folder.rglob("*") if p.name.startswith(".tmp") or p.name.endswith(".old")]
    return [p.relative_to(folder).as_posix() for p in found]
