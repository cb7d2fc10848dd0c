"""Time and memory of planning a campaign: `snakemake -n` of all stages, and its jobs and files.

    python benchmarks/dry_run.py [--tiles 1024 10000] [--repeats 1] [--finished]

Tiles have the default size, and are packed into jobs as `auto` does. With ``--finished`` each run
is given stand-ins of all files first, and a second line says what it costs to find that nothing
is to be done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
#: Side of a tile of the default size, metres.
TILE_M = 3840
#: South-western corner of the area, in UTM zone 33 N; a multiple of the lattice.
CORNER = (300000, 4320000)


def overrides(tiles: int, per_job: int | str = "auto") -> dict[str, Any]:
    """Campaign of a square of so many tiles."""
    side = round(tiles**0.5)
    west, south = CORNER
    box = [west, south, west + side * TILE_M, south + side * TILE_M]
    return {
        "campaign": "config/campaigns/havel.yaml",
        "aoi": {"bbox": box, "crs": "EPSG:32633"},
        "grid": {"crs": "EPSG:32633", "tile_px": 384, "tiles_per_job": per_job},
    }


def snakemake(folder: str, tiles: int, *words: str, per_job: int | str = "auto") -> list[str]:
    """The command, to be called in the project folder."""
    keys = overrides(tiles, per_job)
    return [
        sys.executable, "-m", "snakemake", *words,
        "--snakefile", str(PROJECT / "workflow/Snakefile"),
        "--workflow-profile", str(PROJECT / "workflow/profiles/default"), "--directory", folder,
        "--config", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items()),
    ]  # fmt: skip


def run(
    folder: str, tiles: int, *words: str, per_job: int | str = "auto"
) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, peak MB and output of Snakemake, for a square of so many tiles."""
    command = snakemake(folder, tiles, *words, per_job=per_job)
    with tempfile.TemporaryFile("w+") as out:
        start = time.monotonic()
        child = subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if child.returncode:
        raise SystemExit(text)
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, text


def outputs(folder: str, tiles: int, per_job: int | str = "auto") -> list[str]:
    """Files of a whole run."""
    rows = run(folder, tiles, "all", "--summary", per_job=per_job)[3].splitlines()
    return [n for n in (row.split("\t")[0] for row in rows if "\t" in row) if "/" in n]


def finish(folder: str, tiles: int, names: list[str], per_job: int | str = "auto") -> None:
    """Put stand-ins of all files there, with Snakemake's records of them."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    words = ("all", "--touch", "--forceall", "-q", "all", "--cores", "1")
    run(folder, tiles, *words, per_job=per_job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1024, 10000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--finished", action="store_true")
    given = parser.parse_args()
    print(" tiles  state     jobs   files  seconds  CPU s  peak MB")
    for tiles in given.tiles:
        with tempfile.TemporaryDirectory() as folder:
            names = outputs(folder, tiles)
            report(folder, tiles, "new", len(names), given.repeats)
            if given.finished:
                finish(folder, tiles, names)
                report(folder, tiles, "finished", len(names), given.repeats)


def report(folder: str, tiles: int, state: str, files: int, repeats: int) -> None:
    """Print a line of the table."""
    runs = [run(folder, tiles, "-n", "-q", "rules") for _ in range(repeats)]
    counted = re.findall(r"^total +(\d+)$", runs[0][3], flags=re.M)
    jobs = int(counted[-1]) if counted else 0
    seconds, cpu = (statistics.median(r[i] for r in runs) for i in (0, 1))
    peak = max(r[2] for r in runs)
    print(
        f"{tiles:6}  {state:8} {jobs:5}  {files:6}  {seconds:7.1f}  {cpu:5.1f}  {peak:7.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
