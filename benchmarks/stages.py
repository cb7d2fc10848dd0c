"""Seconds, throughput and peak memory of every stage of a finished run.

Usage: python benchmarks/stages.py [RUN_FOLDER ...]     default: . runs/rehearsal
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path


def table(run: Path) -> list[str]:
    """Lines of one run's table, from Snakemake's benchmark records."""
    facts = json.loads((run / "results/map/map.json").read_text())
    h, w = facts["geobox"]["shape"]
    mpx = h * w / 1e6
    lines = [f"{run}: {w} x {h} px, {mpx:.2f} Mpx", f"{'rule':20} jobs  seconds  Mpx/s  peak MB"]
    rules: dict[str, list[dict[str, str]]] = {}
    for file in sorted((run / "benchmarks").rglob("*.tsv")):
        name = file.stem if file.parent.name == "benchmarks" else file.parent.name
        with file.open(newline="") as f:
            rules.setdefault(name, []).extend(csv.DictReader(f, delimiter="\t"))
    total = 0.0
    for name, rows in rules.items():
        seconds = sum(float(r["s"]) for r in rows)
        peak = max(float(r["max_rss"]) for r in rows if r["max_rss"] not in ("", "-", "NA"))
        total += seconds
        lines.append(
            f"{name:20} {len(rows):4} {seconds:8.1f} {mpx / max(seconds, 1e-9):6.3f} {peak:8.0f}"
        )
    lines.append(f"{'sum of jobs':20}      {total:8.1f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, default=[Path(), Path("runs/rehearsal")])
    for run in parser.parse_args().runs:
        if (run / "results/map/map.json").exists():
            print("\n".join(table(run)))
        else:
            print(f"{run}: no finished run")


if __name__ == "__main__":
    main()
