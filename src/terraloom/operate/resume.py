"""Go on with a run whose controller was killed: end what it left running, then start it again.

A killed controller leaves jobs behind: on a cluster they stay in the queue, on a workstation they
are orphans. A second run would submit the same targets while these still write them. So they are
ended first, and only when the last is gone the folder is unlocked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terraloom.errors import StateError
from terraloom.operate.cluster import ask
from terraloom.operate.record import Holder, locked, read_run

__all__ = ["MARK_VARIABLE", "Restart", "orphans", "resume", "slurm_jobs"]

#: Environment variable of all jobs of a run; its value is the folder of the run.
MARK_VARIABLE = "TERRALOOM_RUN"

#: How long jobs of a cluster may take to end, seconds.
_END_S = 180.0
#: How long an orphan may take to end by itself when it is asked, seconds.
_GRACE_S = 4.0
#: Jobs in one call of scancel.
_CHUNK = 500
_LOGS = Path(".snakemake/log")
_LOCKS = Path(".snakemake/locks")
_RUN_ID = re.compile(r"(?m)^SLURM run ID: ([A-Za-z0-9_-]+)\s*$")


@dataclass(frozen=True)
class Restart:
    """How to start a run again.

    Attributes:
        said: What was ended and unlocked, as text.
        words: The command.
        cwd: Where it was called.
        environment: Variables that were set then and are not set now.
    """

    said: str
    words: list[str]
    cwd: Path
    environment: dict[str, str]

    def exec(self) -> None:
        """Become the run: signals and the exit code are Snakemake's own."""
        os.chdir(self.cwd)
        os.environ.update(self.environment)
        os.execv(self.words[0], self.words)


def resume(folder: Path = Path(), *, surely_dead: bool = False) -> Restart:
    """End the jobs that a killed run left, unlock its folder, and tell how to start it again.

    Args:
        folder: Folder of the run.
        surely_dead: Believe that a controller on another machine is gone.

    Raises:
        StateError: No run is recorded, its controller lives, or its jobs do not end.
    """
    run = read_run(folder)
    refuse_beside_another(folder, run, surely_dead=surely_dead)
    said = [*_end_slurm_jobs(folder), *_end_orphans(folder)]
    if locked(folder):
        shutil.rmtree(folder / _LOCKS)  # as Snakemake's --unlock does, without a plan of the jobs
        said.append("unlocked the folder")
    return _restart(run, "; ".join(said) or "nothing was left behind")


def refuse_beside_another(folder: Path, run: Mapping[str, Any], *, surely_dead: bool) -> None:
    """Refuse when the controller of a folder lives, or a new one is just beginning there."""
    holder: Holder = run["holder"]
    fix = "wait for it (terraloom status), or stop it first with Ctrl-C where it runs"
    over = run["ended"] and not locked(folder)
    if holder.state == "here" and not over:
        raise StateError(f"the run is alive: {holder}", where=str(folder.resolve()), fix=fix)
    if holder.state == "elsewhere" and not over and not surely_dead:
        raise StateError(
            f"this machine cannot ask whether the run lives: {holder}",
            where=str(folder.resolve()),
            fix=f"call this on {holder.host}; if that machine or the process is gone for sure: "
            "terraloom resume --surely-dead",
        )  # fmt: skip
    for pid in _controllers(folder):
        raise StateError(
            f"a run is just beginning: process {pid}", where=str(folder.resolve()), fix=fix
        )


# --- jobs of a cluster ---------------------------------------------------------------------------


def slurm_jobs(folder: Path) -> list[str]:
    """Jobs of the runs of a folder that are in the queue of SLURM.

    Raises:
        StateError: There were such jobs once, and SLURM cannot be asked.
    """
    ids = _run_ids(folder)
    if not ids:
        return []
    return ask("squeue", "-h", "-o", "%A", f"--name={','.join(ids)}").split()


def _run_ids(folder: Path) -> list[str]:
    """Names of the jobs of all runs of a folder, from Snakemake's logs."""
    found: dict[str, None] = {}
    for log in sorted((folder / _LOGS).glob("*.snakemake.log")):
        with log.open(encoding="utf-8", errors="replace") as f:
            found |= dict.fromkeys(_RUN_ID.findall(f.read(1 << 16)))  # it stands near the top
    return list(found)


def _end_slurm_jobs(folder: Path) -> Iterator[str]:
    jobs = list(dict.fromkeys(slurm_jobs(folder)))
    if not jobs:
        return
    for at in range(0, len(jobs), _CHUNK):
        ask("scancel", *jobs[at : at + _CHUNK])
    if not _within(_END_S, lambda: not slurm_jobs(folder)):
        raise StateError(
            f"jobs of this run do not end: {' '.join(slurm_jobs(folder)[:5])} ...",
            where=str(folder.resolve()),
            fix="see `squeue`; when they are gone, call this again",
        )  # fmt: skip
    yield f"cancelled {len(jobs)} jobs in SLURM"


# --- processes of this machine -------------------------------------------------------------------


def orphans(folder: Path) -> list[int]:
    """Processes of this machine that are jobs of a folder's runs; its controller is none."""
    mark = f"{MARK_VARIABLE}={folder.resolve()}".encode()
    mine = {os.getpid(), os.getppid()}
    return [pid for pid, read in _processes() if pid not in mine and mark in read("environ")]


def _controllers(folder: Path) -> list[int]:
    """Processes of Snakemake that work in a folder and are no jobs of a run."""
    here = str(folder.resolve())
    found = []
    for pid, read in _processes():
        words = read("cmdline")
        snakemake = any(Path(os.fsdecode(w)).name == "snakemake" for w in words[:3])
        if not snakemake or b"--mode" in words or pid == os.getpid():
            continue
        try:
            if str(Path(f"/proc/{pid}/cwd").readlink()) == here:
                found.append(pid)
        except OSError:
            continue  # it has ended, or is another user's
    return found


def _processes() -> Iterator[tuple[int, Callable[[str], list[bytes]]]]:
    """Processes with a reader of their NUL-separated files; none where there is no /proc."""
    for entry in Path("/proc").glob("[0-9]*"):

        def read(name: str, entry: Path = entry) -> list[bytes]:
            try:
                return (entry / name).read_bytes().rstrip(b"\0").split(b"\0")
            except OSError:  # it has ended, or is another user's
                return []

        yield int(entry.name), read


def _end_orphans(folder: Path) -> Iterator[str]:
    """Ask the orphans to end, which lets them remove their temporaries; then kill them."""
    left = orphans(folder)
    if not left:
        return
    _send(left, signal.SIGINT)
    if not _within(_GRACE_S, lambda: not _send(orphans(folder), 0)):
        _send(orphans(folder), signal.SIGKILL)
        if not _within(_GRACE_S, lambda: not orphans(folder)):
            raise StateError(
                f"processes do not end: {orphans(folder)}", where=str(folder.resolve()),
                fix="they may wait for a file system; call this again when they are gone",
            )  # fmt: skip
    yield f"ended {len(left)} processes"


def _send(pids: Sequence[int], sent: int) -> list[int]:
    """Send a signal; which of the processes were there."""
    there = []
    for pid in pids:
        try:
            os.kill(pid, sent)
            there.append(pid)
        except ProcessLookupError:
            continue
    return there


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    pause = 0.05
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 2.0)
    return True


# --- the command ---------------------------------------------------------------------------------


def _restart(run: Mapping[str, Any], said: str) -> Restart:
    command = run.get("command")
    if not command:
        raise StateError(
            "the command of the run is not recorded (an older version began it)",
            where="work/run.json",
            fix="its jobs are ended and the folder is unlocked: give the same command again",
        )  # fmt: skip
    cwd = Path(command["cwd"])
    if not cwd.is_dir():
        raise StateError(
            "the folder in which the run was started is gone", where=str(cwd),
            fix="its jobs are ended and the folder is unlocked: give the same command again",
        )  # fmt: skip
    unset = {k: v for k, v in command["environment"].items() if k not in os.environ}
    words = [sys.executable, "-m", "snakemake", *command["words"]]
    return Restart(said, words, cwd, unset)
