"""What a job of tiles costs before it works: interpreter, imports, grid, and Snakemake's share.

    python benchmarks/overhead.py [--repeats 3] [--tiles 10000] [--tiles-per-job N]

A verb's start is its imports, the campaign file and the grid of so many tiles, which each job lays
out; beside it stands an interpreter that does nothing. Seconds are those of the processor,
medians, with modules that are compiled. Snakemake's share is a dry run of all stages. By default
so many tiles are in a job as `grid.tiles_per_job: auto` packs. The line `all` is what that comes
to for a tile: its share of a job of cubes, of a job of prediction and of Snakemake.

On a cluster Snakemake starts once more inside each job; the line `all, on a cluster` has twice
what a dry run of one such job costs as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

from dry_run import PROJECT, overrides, run

from terraloom.grid import tiles_of_job

#: Module that a verb runs; its imports are most of a start.
VERBS = {
    "build-cube": "terraloom.preprocess.build",
    "predict-tiles": "terraloom.predict.engine",
}


def seconds(text: str) -> float:
    """Processor seconds of a program."""
    child = subprocess.Popen([sys.executable, "-c", text], cwd=PROJECT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{text} failed")
    return used.ru_utime + used.ru_stime


def program(module: str, tiles: int, per_job: int) -> str:
    """What a verb does before it works."""
    return (
        f"import terraloom.cli, {module}\n"
        "from terraloom.plan import Plan, resolve_campaign\n"
        f"Plan.of(resolve_campaign({overrides(tiles, per_job)!r})[0]).batches\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=10000)
    parser.add_argument("--tiles-per-job", type=int, help="default: as `auto` packs --tiles")
    # As Python is when nobody sets it: compiled modules are kept.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    given = parser.parse_args()
    tiles = round(given.tiles**0.5) ** 2
    per_job = given.tiles_per_job or tiles_of_job(tiles)
    print(f"{tiles} tiles, {per_job} in a job")
    print("start                CPU s  ms a tile")

    def line(name: str, measure: Callable[[], float], among: int = per_job) -> float:
        """Print a line of the table; returns its milliseconds a tile."""
        measure()  # compiles what is not
        took = statistics.median(measure() for _ in range(given.repeats))
        print(f"{name:19}  {took:5.2f}  {1000 * took / among:9.1f}", flush=True)
        return 1000 * took / among

    line("nothing", lambda: seconds("pass"))
    line("terraloom.cli", lambda: seconds("import terraloom.cli"))
    total = 0.0
    for name, module in VERBS.items():
        total += line(name, lambda module=module: seconds(program(module, tiles, per_job)))
    with tempfile.TemporaryDirectory() as folder:

        def planned(*words: str) -> float:
            return run(folder, tiles, *words, "-n", "-q", "rules", per_job=per_job)[1]

        total += line("Snakemake, all jobs", planned, among=tiles)
        inside = line("Snakemake, in a job", lambda: planned("work/cube/b0000.json"))
    print(f"{'all':26}  {total:9.1f}")
    print(f"{'all, on a cluster':26}  {total + len(VERBS) * inside:9.1f}")


if __name__ == "__main__":
    main()
