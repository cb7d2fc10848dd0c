"""The record of a run: its jobs, and the process that holds the folder.

The workflow writes ``work/run.json`` when it begins and when it ends. Who watches a run, or finds
one that was killed, reads it: only files, so it works on another machine of a cluster too.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from terraloom.errors import StateError
from terraloom.io import read_json, write_json
from terraloom.scratch import alive, host_name, sweep

__all__ = ["RECORD", "Holder", "begin_run", "end_run", "locked", "other_run", "read_run"]

RECORD = Path("work/run.json")

#: Folders of a run in which its jobs write.
_WRITTEN = ("work", "results", "resources")
_LOCKS = Path(".snakemake/locks")

State = Literal["here", "gone", "elsewhere", "ended"]


@dataclass(frozen=True)
class Holder:
    """The process that runs, or ran, a campaign in a folder.

    Attributes:
        pid: Its number.
        born: When it began, in the ticks of its machine; None where that cannot be asked.
        host: Its machine.
        user: Who started it.
        started: Clock when its jobs began, seconds since 1970.
    """

    pid: int
    born: int | None
    host: str
    user: str
    started: float

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        return cls(os.getpid(), _born(os.getpid()), host_name(), _user(), time.time())

    @property
    def state(self) -> State:
        """Whether the process is on this machine, gone, or on a machine that cannot be asked."""
        if self.host != host_name():
            return "elsewhere"
        same = alive(self.pid) and (self.born is None or _born(self.pid) == self.born)
        return "here" if same else "gone"

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} of {self.user} on {self.host}, since {since}"


def _born(pid: int) -> int | None:
    """Start of a process in clock ticks: a number that is used again belongs to a later one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return str(os.getuid())


def begin_run(
    jobs: Iterable[Mapping[str, Any]], *, tiles: Mapping[str, Sequence[str]], title: str,
    log: str | None, at_once: int | None, command: Mapping[str, Any] | None = None,
    folder: Path = Path(),
) -> str:  # fmt: skip
    """Record a run that begins; remove the temporaries of processes that are gone.

    Files of a time to come are dated now, see :func:`_settle_clock`. The caller holds Snakemake's
    lock of the folder: no other run writes here.

    Args:
        jobs: All jobs in the order of the plan, with ``id``, ``rule``, ``name``, ``todo``,
            ``output``, ``log`` and ``benchmark``.
        tiles: Tiles of each job of tiles.
        title: What the campaign is called.
        log: Snakemake's log of this run.
        at_once: Most jobs at once, or cores of one machine; None if unlimited.
        command: How to start it again: the words after ``snakemake``, the folder it was called in,
            variables of its environment.
        folder: Folder of the run.

    Returns:
        What was removed or dated, a line each; empty if nothing.
    """
    told = [_swept(folder), _settle_clock(folder)]
    record = {
        "title": title, "holder": vars(Holder.me()), "ended": None, "log": log, "at_once": at_once,
        "command": command, "tiles": {k: list(v) for k, v in tiles.items()},
        "jobs": [
            dict(job) | {"stale": bool(job["todo"] and _any_there(folder, job["output"]))}
            for job in jobs
        ],
    }  # fmt: skip
    write_json(folder / RECORD, record)
    return "\n".join(filter(None, told))


def _settle_clock(folder: Path = Path()) -> str:
    """Date files of a time to come as of now: the clock was ahead, or jumped back.

    Snakemake refuses the outputs of a job that are older than its inputs, so a run could not go on
    until the clock has caught up. What is stale is decided by content.

    Returns:
        How many there were, in one line; empty if none.
    """
    now, count = time.time(), 0
    for name in _WRITTEN:
        for root, _, files in os.walk(folder / name):
            for file in files:
                path = Path(root, file)
                try:
                    if path.lstat().st_mtime > now:
                        os.utime(path, (now, now), follow_symlinks=False)
                        count += 1
                except (FileNotFoundError, PermissionError):
                    continue  # another user's: Snakemake will say so
    return f"Dated {count} files of a time to come as of now: a clock was ahead." if count else ""


def _any_there(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / file).exists() for file in files)


def end_run(how: Literal["done", "failed"], folder: Path = Path()) -> str:
    """Record that the run is over; remove what jobs that were killed in it left.

    Returns:
        What was removed, in one line; empty if nothing.
    """
    removed = _swept(folder)
    if (folder / RECORD).exists():  # work/ may be deleted at any time
        record = read_json(folder / RECORD)
        record["ended"] = {"how": how, "time": time.time()}
        write_json(folder / RECORD, record)
    return removed


def _swept(folder: Path) -> str:
    gone = sweep(folder / name for name in _WRITTEN)
    if not gone:
        return ""
    return f"Removed {len(gone)} temporary files of processes that were killed."


def read_run(folder: Path = Path()) -> dict[str, Any]:
    """The record of the last run, its holder as a :class:`Holder`.

    Raises:
        StateError: No run is recorded here.
    """
    path = folder / RECORD
    if not path.exists():
        raise StateError(
            "no run is recorded here", where=str(path),
            fix="run this in the folder of a run: that of `snakemake --directory`; the record is "
            "written when its first job begins",
        )  # fmt: skip
    record: dict[str, Any] = read_json(path)
    try:
        record["holder"] = Holder(**record["holder"])
    except (KeyError, TypeError) as err:
        raise StateError(
            "not the record of a run", where=str(path), fix="delete it; a new run writes another"
        ) from err
    return record


def locked(folder: Path = Path()) -> bool:
    """Whether Snakemake has locked the folder."""
    return any((folder / _LOCKS).glob("*.lock"))


def other_run(folder: Path = Path()) -> str:
    """Who holds a folder that is locked, and what to do: Snakemake's own message names nobody.

    Returns:
        Lines of text; empty if the folder is free.
    """
    if not locked(folder):
        return ""
    try:
        record = read_run(folder)
    except StateError:
        record = None
    if record is None or record["ended"]:
        return (
            f"{folder.resolve()}: a run is just beginning here, or was killed before its first "
            "job.\n  to do: wait for it; if none is there: terraloom resume"
        )
    holder: Holder = record["holder"]
    if holder.state == "gone":
        return (
            f"{folder.resolve()}: the run before was killed ({holder}).\n"
            "  to do: terraloom resume (in that folder); finished tiles are kept"
        )
    unsure = "" if holder.state == "here" else " (this machine cannot ask whether it lives)"
    return (
        f"{folder.resolve()}: a run is under way here: {holder}{unsure}.\n"
        "  to do: wait for it (terraloom status), or stop it first. Do not unlock: two runs would "
        "write the same files"
    )
