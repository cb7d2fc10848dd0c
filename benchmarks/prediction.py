"""Prediction: throughput beside the pure forward pass, and memory beside the size of the raster.

Usage: python benchmarks/prediction.py [RUN_FOLDER]     a finished run of the demo; default: .

The memory rows repeat one tile of that run (hard links), predict it with one member of the run
and write each tile: 2016 and 8064 px are the multiples of the 48 px lattice next to 2048 and 8192.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from shapely.geometry import box

from terraloom.aoi import campaign_grid
from terraloom.config.load import load_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import read_store, write_store
from terraloom.predict.engine import predict_tile
from terraloom.predict.ensemble import Ensemble
from terraloom.predict.reader import CubeReader

ROUNDS = 5
TILE_PX = 672


def throughput(run: Path) -> None:
    """Print Mpx/s of predicting one tile, and its ratio to the forward passes alone."""
    os.chdir(run)
    torch.set_num_threads(1)
    campaign = load_campaign("work/campaign.yaml")
    grid = campaign_grid(campaign)
    ensemble = Ensemble.load()
    tile = grid.tiles()[0]
    reasons = read_store(f"work/cube/{tile.name}.zip")["reasons"].to_numpy()
    h, w = tile.geobox.shape
    halo = ensemble.halo_px
    window = CubeReader(Path("work/cube"), grid).window(-halo, -halo, h + 2 * halo, w + 2 * halo)
    inputs = {g: x[None] for g, x in window.items()}
    whole, forward = [], []
    for _ in range(ROUNDS):
        start = time.monotonic()
        ensemble.predict(inputs)
        forward.append(time.monotonic() - start)
        start = time.monotonic()
        reader = CubeReader(Path("work/cube"), grid)  # reads from disk, as a job does
        data = predict_tile(tile, grid, campaign, ensemble, reader, reasons)
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder) / "tile.zip", data)
        whole.append(time.monotonic() - start)
    ratio = statistics.median(f / t for f, t in zip(forward, whole, strict=True))
    computed = (h + 2 * halo) * (w + 2 * halo) / 1e6
    print(f"tile {h} x {w} px, halo {halo} px, {len(ensemble.members)} members, 1 thread")
    print(f"forward passes alone   {computed / statistics.median(forward):6.3f} Mpx/s computed")
    print(f"read, predict, write   {computed / statistics.median(whole):6.3f} Mpx/s computed")
    print(f"ratio (median of {ROUNDS})    {ratio:6.3f}")


def memory(run: Path, size_px: int) -> None:
    """Predict a raster of ``size_px`` squared from one repeated tile; print the peak RSS in MB."""
    os.chdir(run)
    torch.set_num_threads(1)
    campaign = load_campaign("work/campaign.yaml")
    ensemble = Ensemble.load()
    ensemble = replace(ensemble, members=ensemble.members[:1])
    side = size_px * 10
    grid = CampaignGrid.from_aoi(box(0, 0, side, side), "EPSG:32633", tile_px=TILE_PX)
    first = campaign_grid(campaign).tiles()[0]
    cube = read_store(f"work/cube/{first.name}.zip").load()
    cut = {
        d: slice(0, TILE_PX * 10 // int(str(d).rsplit("_", 1)[1]))
        for d in cube.sizes
        if str(d)[:2] in ("y_", "x_")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "one.zip", cube.isel(cut))
        reasons = read_store(folder / "one.zip")["reasons"].to_numpy()
        for tile in grid.tiles():
            os.link(folder / "one.zip", folder / f"{tile.name}.zip")
        reader = CubeReader(folder, grid)
        for tile in grid.tiles():
            data = predict_tile(tile, grid, campaign, ensemble, reader, reasons)
            write_store(folder / "out.zip", data)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path())
    parser.add_argument("--memory", type=int, help="size in pixels; used by the script itself")
    args = parser.parse_args()
    if args.memory:
        memory(args.run, args.memory)
        return
    peaks = {}
    for size in (2016, 8064):
        command = [sys.executable, __file__, str(args.run), "--memory", str(size)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[size] = float(out.split()[-1])
    throughput(args.run)
    for size, peak in peaks.items():
        print(f"peak RSS {size:5} x {size} px  {peak:7.0f} MB")


if __name__ == "__main__":
    main()
