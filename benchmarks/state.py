"""Saving and restoring a state of many tiles, beside what DVC takes itself.

Usage: python benchmarks/state.py [--tiles N]

A project under git and DVC in a temporary folder: N records of tiles in each of three stages, as
Snakemake writes them, and results of the usual number of files. `terraloom state save` is timed;
then `terraloom state restore`, beside `dvc checkout` of the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.states import ENV, make_project, make_results, run
from terraloom.operate.provenance import _record_path, restore_state, save_state

STAGES = ("cube", "predict", "mask")


def add_records(folder: Path, tiles: int) -> None:
    """Records of jobs of one tile each, with what a real one holds; the map reads them all."""
    records = folder / ".snakemake/metadata"
    model = json.loads(_record_path(records, "results/model/net.txt").read_text())
    names = []
    for stage in STAGES:
        for i in range(tiles):
            name = f"work/{stage}/t{i:05d}.json"
            names.append(name)
            record = model | {
                "rule": stage, "shellcmd": f"terraloom {stage} --tile t{i:05d} > logs/{stage}/{i}",
                "params": [json.dumps({"grid.tile_px": 1024, "stamp": f"{i:064x}"})],
                "input": [f"work/{other}/t{i:05d}.json" for other in STAGES if other < stage],
                "input_checksums": {},
            }  # fmt: skip
            _record_path(records, name).write_text(json.dumps(record))
    path = _record_path(records, "results/map/class_map.tif")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"input": names}))


def main() -> None:
    """Print the seconds of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=2000)
    tiles = parser.parse_args().tiles
    os.environ |= ENV
    with tempfile.TemporaryDirectory() as base:
        folder = make_project(Path(base) / "project")
        make_results(folder)
        add_records(folder, tiles)
        begin = time.perf_counter()
        save_state(folder)
        saved = time.perf_counter() - begin
        begin = time.perf_counter()
        save_state(folder)
        again = time.perf_counter() - begin
        run(folder, "dvc", "commit", "-q", "-f")
        shutil.rmtree(folder / "results")
        begin = time.perf_counter()
        run(folder, "dvc", "checkout", "-q")
        alone = time.perf_counter() - begin
        shutil.rmtree(folder / "results")
        begin = time.perf_counter()
        restore_state(folder)
        restored = time.perf_counter() - begin
    print(f"{tiles} tiles, {len(STAGES)} stages: {tiles * len(STAGES)} records of jobs")
    print(f"state save                      {saved:6.2f} s; again, nothing new {again:6.2f} s")
    print(f"state restore                   {restored:6.2f} s, of which DVC {alone:6.2f} s")
    print(f"both beyond DVC                 {saved + restored - alone:6.2f} s")


if __name__ == "__main__":
    main()
