"""What a job of tiles costs before it works: interpreter, imports, and Snakemake's share.

    python benchmarks/overhead.py [--repeats 3] [--tiles-per-job 8]

Each verb of a batch stands for its imports, beside an
interpreter that does nothing; seconds are those of the processor, medians. Snakemake's share is
the difference between two dry runs of different size, by job. The last line is what all that
comes to for a tile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from dry_run import run

#: Module that a verb runs; its imports are most of a start.
VERBS = {
    "build-cube": "terraloom.preprocess.build",
    "predict-tiles": "terraloom.predict.engine",
}


def seconds(words: list[str]) -> float:
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{words} failed")
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiles-per-job", type=int, default=8)
    given = parser.parse_args()
    starts = {"nothing": "pass", "terraloom.cli": "import terraloom.cli"} | {
        verb: f"import terraloom.cli, {module}" for verb, module in VERBS.items()
    }
    print("start                CPU s  ms a tile")
    total = 0.0
    for name, text in starts.items():
        took = statistics.median(
            seconds([sys.executable, "-c", text]) for _ in range(given.repeats)
        )
        print(f"{name:19}  {took:5.2f}  {1000 * took / given.tiles_per_job:9.1f}", flush=True)
        total += took if name in VERBS else 0.0
    cpu, jobs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for tiles in (256, 4096):
            cpu.append(run(folder, tiles, "-n", "-q", "rules")[1])
            jobs.append(2 * tiles / given.tiles_per_job)
    per_job = (cpu[1] - cpu[0]) / (jobs[1] - jobs[0])
    print(f"{'Snakemake, a job':19}  {per_job:5.3f}  {1000 * per_job / given.tiles_per_job:9.1f}")
    total += len(VERBS) * per_job
    print(f"{'all':19}  {total:5.2f}  {1000 * total / given.tiles_per_job:9.1f}")


if __name__ == "__main__":
    main()
