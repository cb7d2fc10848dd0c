"""How long `terraloom resume` takes until the first job runs again, after a kill.

    python benchmarks/resume.py [--tiles 10000] [--tiles-per-job N]

A folder is filled with stand-ins of all files of a run over so many tiles, those of each tile as
well, and with Snakemake's records of them. One prediction is missing. A run begins to make it, and
its controller is killed with SIGKILL when its first job is under way. That job is ended as well.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dry_run import PROJECT, finish, outputs, overrides, snakemake

from terraloom.operate.resume import orphans
from terraloom.plan import Plan, resolve_campaign

#: Outputs that are missing: of the first job of prediction, and of what is made of it.
MISSING = ("work/predict/b0000.json", "results/map/map.json")
LONGEST_S = 120


def started(record: Path, child: subprocess.Popen[str]) -> dict[str, object]:
    """Record of the run of a process, once its first job may begin."""
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end and child.poll() is None:
        if record.exists():
            run = json.loads(record.read_text())
            if run["holder"]["pid"] == child.pid:
                return run
        time.sleep(0.01)
    child.kill()
    raise SystemExit(f"no run began:\n{child.communicate()[0]}")


def predicts(pid: int) -> bool:
    """Whether a process is a job of prediction."""
    try:
        return b"predict-tiles" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def fill(folder: str, tiles: int, per_job: int | str) -> int:
    """Stand-ins of a finished run; returns the number of files of tiles."""
    finish(folder, tiles, outputs(folder, tiles, per_job), per_job)
    os.chdir(PROJECT)
    grid = Plan.of(resolve_campaign(overrides(tiles, per_job))[0]).grid
    paths = [Path(folder, f"work/{kind}/{t.name}.zip") for kind in ("cube", "predict")
             for t in grid.tiles()]  # fmt: skip
    for path in paths:
        path.write_text(path.name)
    for name in MISSING:
        Path(folder, name).unlink()
    return len(paths)


def begin(words: list[str], folder: str | Path) -> subprocess.Popen[str]:
    """A process in a group of its own."""
    return subprocess.Popen(
        words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=10000)
    parser.add_argument("--tiles-per-job", type=int, help="default: auto")
    given = parser.parse_args()
    per_job = given.tiles_per_job or "auto"
    with tempfile.TemporaryDirectory() as folder:
        files = fill(folder, given.tiles, per_job)
        record = Path(folder, "work/run.json")
        run = begin(snakemake(folder, given.tiles, "--cores", "2", per_job=per_job), PROJECT)
        jobs = len(started(record, run)["jobs"])  # type: ignore[arg-type]
        while not any(map(predicts, orphans(Path(folder)))):
            time.sleep(0.01)
        run.kill()
        run.wait()
        start = time.monotonic()
        terraloom = Path(sys.executable).with_name("terraloom")
        again = begin([str(terraloom), "resume"], folder)
        assert again.stdout is not None
        said = again.stdout.readline().strip()
        cleared = time.monotonic() - start
        started(record, again)
        begun = time.monotonic() - start
        os.killpg(again.pid, signal.SIGKILL)
        _, _, used = os.wait4(again.pid, 0)
        again.returncode = -signal.SIGKILL
    print(f"{given.tiles} tiles, {jobs} jobs, {files} files of tiles: {said}")
    print(
        f"cleared after {cleared:.1f} s, going on after {begun:.1f} s "
        f"({used.ru_utime + used.ru_stime:.1f} s of processor)"
    )


if __name__ == "__main__":
    main()
