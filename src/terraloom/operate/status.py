"""Where a run stands: jobs and tiles done, what failed and why, how long it takes, the disk.

Only files are read: the record of the run (:mod:`terraloom.operate.record`), Snakemake's log,
the logs and benchmarks of the jobs. Nothing is locked and no plan is drawn, so it is quick, works
while the run is under way, after it was killed, and on another machine of a cluster.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from terraloom.operate.record import Holder, read_run

__all__ = ["Job", "RunStatus", "read_status", "reason_of", "text_of"]

State = Literal["done", "running", "failed", "interrupted", "to do"]

#: Rules whose jobs make one file per tile, and where.
TILE_FILES = {
    "build_cube": "work/cube/{}.zip",
    "predict_tiles": "work/predict/{}.zip",
    "write_tiles": "results/map/tiles/{}",
}
_FOLDERS = ("work", "results", "resources")
#: Longest time that sizes of files are added up, seconds; then the sum is a least one.
_SIZES_S = 0.8
_STAMP = re.compile(r"\[(\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4})\]")
_STARTED = re.compile(r"(?:Job|rule|localrule|jobid:?) ?(\d+):")
_FINISHED = re.compile(r"Finished jobid: (\d+)")
#: Snakemake itself refuses what a job made; the next line says why.
_REFUSED = re.compile(r"\w+(?:Error|Exception) in rule (\w+) in file")
_SIGNAL = re.compile(r"died with <Signals\.(\w+): (\d+)>|non-zero exit status (1[2-9]\d)\b")
#: Lines of a log that are shown as the reason of a failure.
_REASON_LINES = 4


@dataclass
class Job:
    """A job of the run.

    Attributes:
        id: Its number in this run.
        rule: Its rule.
        name: Its wildcards, such as ``b0003``; empty for the only job of a rule.
        state: Where it stands.
        log: Its log files.
        seconds: Time it took, or has been running; None if unknown.
        reason: Why it failed.
    """

    id: int
    rule: str
    name: str
    state: State
    log: list[str]
    seconds: float | None = None
    reason: str = ""


@dataclass
class RunStatus:
    """Where a run stands; see :func:`read_status`.

    Attributes:
        title: What the campaign is called.
        state: Of the run: ``running``, ``killed``, ``done``, ``failed``; ``unknown`` if it runs,
            or ran, on a machine that cannot be asked.
        holder: Process of the run.
        seconds: Since its first job began, up to its end.
        jobs: All jobs in the order of the plan.
        tiles: Tiles done of all, per rule with one file per tile.
        left_s: Estimated seconds to the end; None where nothing is known.
        unknown: Rules with jobs to do that were never measured: not in the estimate.
        disk: Bytes used per folder, ``complete`` (0 if not all was counted) and ``free``.
        silent_s: Seconds since the run's last word.
    """

    title: str
    state: str
    holder: Holder
    seconds: float
    jobs: list[Job]
    tiles: dict[str, tuple[int, int]]
    left_s: float | None
    unknown: list[str]
    disk: dict[str, int]
    silent_s: float
    rules: list[str] = field(default_factory=list)

    def counts(self, rule: str) -> dict[str, int]:
        """Jobs of a rule by state."""
        states = [job.state for job in self.jobs if job.rule == rule]
        return {s: states.count(s) for s in dict.fromkeys(states)}

    def record(self) -> dict[str, Any]:
        """All of it as plain values, for machines."""
        return {
            "title": self.title, "state": self.state, "holder": vars(self.holder),
            "seconds": self.seconds, "left_s": self.left_s, "left_without": self.unknown,
            "silent_s": self.silent_s, "disk_bytes": self.disk,
            "tiles": {rule: {"done": d, "of": n} for rule, (d, n) in self.tiles.items()},
            "rules": {rule: self.counts(rule) for rule in self.rules},
            "jobs": [vars(job) for job in self.jobs],
        }  # fmt: skip


def read_status(folder: Path = Path(), *, now: float | None = None) -> RunStatus:
    """Where the last run of a folder stands.

    Args:
        folder: Folder of the run.
        now: Clock, seconds since 1970; the real one if not given.

    Raises:
        StateError: No run is recorded here.
    """
    now = time.time() if now is None else now
    run = read_run(folder)
    holder: Holder = run["holder"]
    log = folder / run["log"] if run["log"] else None
    heard = max(p.stat().st_mtime for p in (log, folder / "work/run.json") if p and p.exists())
    state = _state(run, holder)
    events = _events(log)
    jobs = [_job(folder, j, events, state, now) for j in run["jobs"]]
    means = _means(folder, run["jobs"])
    end = run["ended"]["time"] if run["ended"] else (now if state != "killed" else heard)
    left, unknown = _left(jobs, means, run, max(end - holder.started, 1e-3))
    return RunStatus(
        run["title"], state, holder, max(end - holder.started, 0.0), jobs,
        _tiles(folder, run, jobs, holder.started), left, unknown, _disk(folder),
        max(now - heard, 0.0), list(dict.fromkeys(j.rule for j in jobs)),
    )  # fmt: skip


def _state(run: Mapping[str, Any], holder: Holder) -> str:
    if run["ended"]:
        return str(run["ended"]["how"])
    return {"here": "running", "gone": "killed"}.get(holder.state, "unknown")


@dataclass
class _Events:
    """What Snakemake's log says, by number of the job."""

    started: dict[int, float] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    signal: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def _events(log: Path | None) -> _Events:
    found = _Events()
    if log is None or not log.exists():
        return found
    when, error, signal, refused = 0.0, False, "", ""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if stamp := _STAMP.match(line):
            when, error = time.mktime(time.strptime(stamp[1])), False
        elif begun := _STARTED.match(line):
            found.started[int(begun[1])] = when
            found.failed.discard(int(begun[1]))
        elif done := _FINISHED.match(line):
            found.finished.add(int(done[1]))
        elif rule := _REFUSED.match(line):
            refused = rule[1]
        elif refused:
            found.refused[refused], refused = line, ""
        elif killed := _SIGNAL.search(line):
            signal = killed[1] or f"signal {int(killed[3]) - 128}"
        elif line.startswith("Error in rule"):
            error = True
        elif error and (number := re.match(r"    jobid: (\d+)", line)):
            found.failed.add(int(number[1]))
            found.signal[number[1]], signal = signal, ""
    return found


def _job(folder: Path, job: Mapping[str, Any], events: _Events, run: str, now: float) -> Job:
    number, seconds = int(job["id"]), None
    state: State = "to do"
    if not job["todo"] or number in events.finished or run == "done":
        state, seconds = "done", _measured(folder, job)
    elif number in events.failed:
        state = "failed"
    elif number in events.started and job["rule"] in events.refused:
        return Job(
            number, job["rule"], job["name"], "failed", list(job["log"]),
            reason=events.refused[job["rule"]],
        )  # fmt: skip
    elif number in events.started:
        state = "running" if run in ("running", "unknown") else "interrupted"
        seconds = now - events.started[number] if state == "running" else None
    reason = ""
    if state == "failed":
        reason = reason_of([folder / p for p in job["log"]], events.signal.get(str(number), ""))
    return Job(number, job["rule"], job["name"], state, list(job["log"]), seconds, reason)


def reason_of(logs: Sequence[Path], signal: str = "") -> str:
    """Why a job failed: its error with what to do, or its last lines.

    Args:
        logs: Its log files.
        signal: Name of the signal that ended it.
    """
    lines = [
        line.rstrip()
        for path in logs
        if path.exists()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    starts = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[starts[-1] :] if starts else lines[-_REASON_LINES:]
    if signal:
        why = " (out of memory?)" if signal in ("SIGKILL", "signal 9") else ""
        said = [f"ended by {signal}{why}", *(() if starts else said[-1:])]
    return "\n".join(said) or "it wrote nothing; see Snakemake's log"


def _measured(folder: Path, job: Mapping[str, Any]) -> float | None:
    """Seconds of a job, from its benchmark."""
    if not job["benchmark"]:
        return None
    try:
        text = (folder / job["benchmark"]).read_text(encoding="utf-8")
        return float(text.splitlines()[1].split("\t")[0])
    except (OSError, IndexError, ValueError):
        return None  # none yet, or it is just being written


def _means(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds of the jobs of each rule: of this run, or of one before."""
    taken: dict[str, list[float]] = {}
    for job in jobs:
        if (seconds := _measured(folder, job)) is not None:
            taken.setdefault(job["rule"], []).append(seconds)
    return {rule: fmean(values) for rule, values in taken.items()}


def _left(
    jobs: Sequence[Job], means: Mapping[str, float], run: Mapping[str, Any], elapsed: float
) -> tuple[float | None, list[str]]:
    """Seconds to the end, and the rules that it does not know."""
    todo = [j for j in jobs if j.state != "done"]
    if not todo:
        return 0.0, []
    unknown = list(dict.fromkeys(j.rule for j in todo if j.rule not in means))
    work = sum(
        max(means[j.rule] - (j.seconds or 0.0 if j.state == "running" else 0.0), 0.0)
        for j in todo
        if j.rule in means
    )
    if not any(j.rule in means for j in todo):
        return None, unknown
    ran = {int(j["id"]) for j in run["jobs"] if j["todo"]}
    spent = sum(j.seconds or 0.0 for j in jobs if j.id in ran)
    at_once = min(max(spent / elapsed, 1.0), float(run["at_once"] or len(jobs)))
    return work / at_once, unknown


def _tiles(
    folder: Path, run: Mapping[str, Any], jobs: Sequence[Job], started: float
) -> dict[str, tuple[int, int]]:
    """Tiles done and all tiles, of each rule that makes them.

    A job to do counts the tiles that are there: it keeps them. If its outputs were there when the
    run began, they are of another campaign file or code, and only newer ones count.
    """
    found: dict[str, tuple[int, int]] = {}
    stale = {int(j["id"]) for j in run["jobs"] if j["stale"]}
    for job in jobs:
        if job.rule not in TILE_FILES or job.name not in run["tiles"]:
            continue
        tiles = run["tiles"][job.name]
        done, of = found.get(job.rule, (0, 0))
        if job.state == "done":
            here = len(tiles)
        else:
            since = started if job.id in stale else 0.0
            here = sum(_newer(folder / TILE_FILES[job.rule].format(t), since) for t in tiles)
        found[job.rule] = (done + here, of + len(tiles))
    return found


def _newer(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime >= since
    except FileNotFoundError:
        return False


def _disk(folder: Path) -> dict[str, int]:
    until, complete = time.monotonic() + _SIZES_S, 1
    used = dict.fromkeys(_FOLDERS, 0)
    for name in _FOLDERS:
        for root, _, files in os.walk(folder / name):
            if time.monotonic() > until:
                complete = 0
                break
            for file in files:
                try:
                    used[name] += Path(root, file).lstat().st_size
                except FileNotFoundError:
                    continue  # a temporary that is gone by now
    return used | {"complete": complete, "free": shutil.disk_usage(folder).free}


def text_of(status: RunStatus) -> str:
    """One screen of 80 columns."""
    lines = [status.title, _headline(status), ""]
    width = max((len(r) for r in status.rules), default=4)
    lines.append(f"{'rule':{width}}  done  running  failed  to do   tiles")
    for rule in status.rules:
        n = status.counts(rule)
        waiting = n.get("to do", 0) + n.get("interrupted", 0)
        cells = (n.get("done", 0), n.get("running", 0), n.get("failed", 0), waiting)
        shown = "{:>6}{:>9}{:>8}{:>7}".format(*(c or "." for c in cells))
        tiles = "{} of {}".format(*status.tiles[rule]) if rule in status.tiles else ""
        lines.append(f"{rule:{width}}{shown}   {tiles}".rstrip())
    done = sum(j.state == "done" for j in status.jobs)
    lines += ["", f"{done} of {len(status.jobs)} jobs done{_estimate(status)}", _space(status)]
    for state, said in (("running", "running"), ("interrupted", "interrupted")):
        some = [j for j in status.jobs if j.state == state]
        if some:
            names = ", ".join(_named(j) for j in some[:6])
            lines.append(f"{said}: {names}{' ...' if len(some) > 6 else ''}")
    failed = [j for j in status.jobs if j.state == "failed"]
    for job in failed[:5]:
        lines += ["", f"FAILED {_named(job)}; terraloom logs {job.name or job.rule}"]
        for line in job.reason.splitlines()[:6]:
            lines += textwrap.wrap(line, 78, initial_indent="  ", subsequent_indent="  ")[:4]
    if len(failed) > 5:
        lines += ["", f"and {len(failed) - 5} more failed"]
    return "\n".join(lines)


def _named(job: Job) -> str:
    return f"{job.rule} {job.name}".rstrip()


def _headline(status: RunStatus) -> str:
    took = _duration(status.seconds)
    return {
        "running": f"running for {took}: {status.holder}",
        "done": f"done after {took}",
        "failed": f"failed after {took}; to go on, start it again: finished tiles are kept",
        "killed": f"killed after {took}; to go on: terraloom resume",
    }.get(
        status.state,
        f"{status.holder}; this machine cannot ask it. Its last word was "
        f"{_duration(status.silent_s)} ago",
    )


def _estimate(status: RunStatus) -> str:
    if status.left_s is None or not any(j.state != "done" for j in status.jobs):
        return ""
    more = ""
    if status.unknown:
        names = ", ".join(status.unknown[:3]) + (" ..." if len(status.unknown) > 3 else "")
        more = f", besides {names}"
    return f"; about {_duration(status.left_s)} left{more}"


def _space(status: RunStatus) -> str:
    least = "" if status.disk["complete"] else "at least "
    used = ", ".join(f"{name} {_size(status.disk[name])}" for name in _FOLDERS)
    return f"disk: {least}{used}; {_size(status.disk['free'])} free"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
