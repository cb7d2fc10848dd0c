"""Prediction: throughput beside the pure forward pass, and memory beside the size of the raster.

Usage: python benchmarks/prediction.py [--large] [--device cuda] [--threads N] [--members M]
           [--width 12] [--plain]

Simulated cubes (10 bands of Sentinel-2), networks of the default size with random weights; needs no
run. The job of `terraloom predict-tiles` (cubes from disk in, predicted tiles on disk out) is timed
beside the forward passes alone, of the same networks on inputs in memory, in the windows that
are fastest for them: all threads in one window, and a window per thread. These have the networks
up to their logits alone, not the features of the area of applicability, of which the job makes a
layer; with --plain the job makes none of it, and no conformal sets. --width is that of the
networks: their cost grows with its square, that of all else does not. 24 is the size of those that
the peers were measured with (0.55 million parameters), who take 2.3-2.5 times as long as eager
forward passes of 4 x 256 px in the default layout alone, which are timed as well.

With --large memory is measured to 16128 px instead of 8064 (multiples of the 48 px lattice next to
16384 and 8192).
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely import box

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch

from support.networks import random_ensemble
from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_json, write_store
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import load_member
from terraloom.predict.engine import fitting_window_px, predict_batch
from terraloom.predict.ensemble import Ensemble, member_files, workers_of
from terraloom.predict.reader import CubeReader

#: The script, and where it was started: regions are made, and become current, elsewhere.
SCRIPT, HERE = Path(__file__).resolve(), Path.cwd()
BANDS = {"s2_10": ["B02", "B03", "B04", "B08"],
         "s2_20": ["B05", "B06", "B07", "B8A", "B11", "B12"]}  # fmt: skip
#: Sides of inputs (pixels) and how many at once, of the forward passes alone.
FORWARD = ((240, 1), (288, 4), (480, 1), (864, 1), (1152, 1), (1632, 1))
#: On GPUs, where small inputs leave it idle.
FORWARD_CUDA = ((288, 16), (864, 1), (864, 4), (1632, 1), (2400, 1))
#: Side of an input (pixels), how many at once, and how many such side by side.
Key = tuple[int, int, int]
#: Whole time of the fastest peer (tiled inference of terratorch 1.2.11, on another machine) over
#: that of eager forward passes of the same network.
PEERS = 2.31
#: Windows of these: how many at once, and their side (pixels).
EAGER = (4, 256)


def build(
    folder: Path, size_px: int, tile_px: int, **predict: Any
) -> tuple[Campaign, CampaignGrid]:
    """Cubes of a square region, all tiles alike, and its campaign; the folder becomes current."""
    os.chdir(folder)
    rng = np.random.default_rng(0)
    geobox = GeoBox((size_px, size_px), Affine(10, 0, 399960, 0, -10, 5800020), "EPSG:32633")
    b = geobox.boundingbox
    grid = CampaignGrid(geobox, tile_px, box(b.left, b.bottom, b.right, b.top))
    parts: dict[str, Any] = {"reasons": (("y_10", "x_10"), np.zeros((tile_px, tile_px), np.uint8))}
    coords: dict[str, Any] = {"period": ["a"]}
    encoding = {}
    for group, bands in BANDS.items():
        res = int(group[3:])
        n = tile_px * 10 // res
        values = (rng.gamma(9, 0.02, (1, len(bands), n, n))).astype(np.float32)
        parts[group] = (("period", f"band_{group}", f"y_{res}", f"x_{res}"), values)
        coords[f"band_{group}"] = bands
        # As cubes store it: reflectance in steps of 1e-4, chunks of 512 px.
        encoding[group] = {"dtype": "uint16", "scale_factor": 1e-4, "add_offset": -0.1,
                           "_FillValue": 65535,
                           "chunks": (1, 1, min(n, 512), min(n, 512))}  # fmt: skip
    dataset = xr.Dataset(parts, coords=coords)
    for group, how in encoding.items():
        dataset[group].encoding = how
    write_store("work/cube/one.zip", dataset)
    for tile in grid.tiles():
        os.link("work/cube/one.zip", f"work/cube/{tile.name}.zip")
    write_json("work/cube/b0000.json", {"tiles": {t.name: {"digest": "1"} for t in grid.tiles()}})
    names = "\n".join(f"{k + 1},class {k},#00{k:02x}00" for k in range(8))
    Path("classes.csv").write_text(f"code,name,color\n{names}\n")
    campaign = parse_campaign(
        {
            "name": "b", "title": "B", "aoi": {"bbox": [0, 0, 1, 1]},
            "grid": {"tile_px": tile_px, "tiles_per_job": 64},
            "sources": [{"source": "sentinel-2-l1c"}], "predict": predict,
            "cube": {"periods": [{"name": "a", "start": "2023-01-01", "end": "2023-12-31"}]},
            "tasks": [{"name": "lc", "kind": "segmentation", "classes": "classes.csv",
                       "labels": {"file": "l.gpkg", "column": "c"}}],
        }
    )  # fmt: skip
    return campaign, grid


def clear() -> None:
    """Forget predicted tiles."""
    for file in Path("work/predict").glob("*"):
        file.unlink()


def forward(ensemble: Ensemble, x: dict[str, Any], workers: int, threads: int) -> float:
    """Seconds of the networks alone: ``workers`` times the input, side by side."""
    tensors = {g: torch.from_numpy(v).to(ensemble.device) for g, v in x.items()}

    def one(_: int) -> None:
        for member in ensemble.members:
            found = member.predict(tensors, logits=True)
        for values in found.values():
            values[..., :1].cpu()  # a GPU has finished when this is there

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                            initargs=(threads // workers,)) as pool:  # fmt: skip
        list(pool.map(lambda _: None, range(workers)))
        start = time.perf_counter()
        list(pool.map(one, range(workers)))
        return time.perf_counter() - start


def eager_nets() -> list[MapNet]:
    """The same networks in the default layout, nothing folded."""
    nets = [load_member(f)[0] for f in member_files()]
    return [net.to(memory_format=torch.contiguous_format) for net in nets]


def eager(nets: list[MapNet], x: dict[str, Any], threads: int) -> float:
    """Mpx/s of their forward passes alone, as a script does them that knows of no other way."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        n, side = EAGER
        given = [{f: t.contiguous() for f, t in net.prepare(
            {g: torch.from_numpy(np.stack([v] * n)) for g, v in x.items()}).items()}
            for net in nets]  # fmt: skip
        start = time.perf_counter()
        for net, prepared in zip(nets, given, strict=True):
            net.forward_prepared(prepared)
        return n * side**2 / 1e6 / (time.perf_counter() - start)


def throughput(args: argparse.Namespace) -> None:
    """Print Mpx/s of jobs and of the forward passes alone, and their ratios."""
    with tempfile.TemporaryDirectory() as name:
        campaign, grid = build(Path(name), args.size, args.tile, device=args.device,
                               threads=args.threads, window_px=args.window)  # fmt: skip
        if args.plain:
            none = campaign.uncertainty.model_copy(update={"sets": False, "applicability": False})
            campaign = campaign.model_copy(update={"uncertainty": none})
        random_ensemble(campaign, grid, args.members, width=args.width)
        ensemble = Ensemble.load(campaign=campaign)
        reader = CubeReader(Path("work/cube"), grid)
        window = min(args.window, fitting_window_px(campaign, ensemble))
        own = window // ensemble.stride_px * ensemble.stride_px + 2 * ensemble.halo_px
        known = FORWARD_CUDA if ensemble.device.type == "cuda" else FORWARD
        workers = workers_of(args.threads, ensemble.device)
        keys = [(side, n, w) for side, n in {**dict.fromkeys(known), (own, 1): None}
                for w in {1: None, workers: None}]  # fmt: skip
        inputs = {}
        for side, n in {(side, n) for side, n, _ in keys}:
            one = reader.window(0, 0, side, side)
            inputs[side, n] = {g: np.stack([x] * n) for g, x in one.items()}
        rates: dict[Key, list[float]] = {k: [] for k in keys}
        nets = eager_nets() if ensemble.device.type == "cpu" else []
        floors: list[float] = []
        corner = reader.window(0, 0, EAGER[1], EAGER[1])
        computed, delivered, shares = [], [], []
        for turn in range(args.rounds + 1):  # the first warms up
            for side, n, w in keys:
                seconds = forward(ensemble, inputs[side, n], w, args.threads)
                if turn:
                    rates[side, n, w].append(w * n * side**2 / 1e6 / seconds)
            floor = eager(nets, corner, args.threads) if nets else 0.0
            clear()
            start = time.perf_counter()
            predict_batch(campaign, grid, "b0000")
            seconds = time.perf_counter() - start
            if turn:
                speed = read_json("work/predict/b0000.json")["speed"]
                # The whole job, networks loaded and all, over what its windows computed.
                done = speed["computed_mpx_per_s"] * speed["seconds"]
                computed.append(done / seconds)
                delivered.append(args.size**2 / 1e6 / seconds)
                shares.append(speed["network_share"])
                floors.append(floor)
        os.chdir(HERE)
        print(f"region {args.size} px, tiles {args.tile} px, windows {window} px, halo "
              f"{ensemble.halo_px} px, {args.members} members of width {args.width}, "
              f"{args.threads} threads, "
              f"{ensemble.device}")  # fmt: skip
        report((own, 1, workers), rates, computed, delivered, shares)
        if nets:
            ratio = statistics.median(v / f for v, f in zip(delivered, floors, strict=True))
            floor = statistics.median(floors)
            print(f"eager forward alone, {EAGER[0]} x {EAGER[1]} px: {floor:.3f} Mpx/s")
            print(f"delivered / it: {ratio:.3f}, {PEERS * ratio:.2f} x as fast as the fastest peer")


def report(
    own: Key, rates: dict[Key, list[float]], computed: list[float], delivered: list[float],
    shares: list[float],
) -> None:  # fmt: skip
    """Print the table."""
    middle = {k: statistics.median(v) for k, v in rates.items()}
    for (side, n, w), rate in middle.items():
        print(f"forward alone, {w} x {n:2} x {side:4} px  {rate:8.3f} Mpx/s")
    whole = {k: v for k, v in middle.items() if k[2] == 1}
    print(f"job, computed (halo counted) {statistics.median(computed):8.3f} Mpx/s")
    print(f"job, delivered               {statistics.median(delivered):8.3f} Mpx/s, "
          f"{100 * statistics.median(delivered):.1f} ha/s")  # fmt: skip
    print(f"share of a job in networks   {statistics.median(shares):8.3f}")
    for what, key in (
        ("its own windows", own),
        ("the fastest one at a time", max(whole, key=lambda k: whole[k])),
        ("the fastest of all", max(middle, key=lambda k: middle[k])),
    ):
        for label, values in (("computed", computed), ("delivered", delivered)):
            ratio = statistics.median(v / r for v, r in zip(values, rates[key], strict=True))
            print(f"{label} / forward in {what} ({key[2]} x {key[1]} x {key[0]} px): {ratio:.3f}")


def memory(size_px: int) -> None:
    """Predict a region with a tiny network, job by job; print the peak RSS in MB."""
    with tempfile.TemporaryDirectory() as name:
        campaign, grid = build(Path(name), size_px, 672, device="cpu")
        random_ensemble(campaign, grid, 1, width=4)
        jobs = grid.batches(campaign.grid.tiles_per_job)
        for batch in jobs:
            predict_batch(campaign, grid, batch)
            clear()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--size", type=int, default=4608)
    parser.add_argument("--tile", type=int, default=1536)
    parser.add_argument("--window", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["throughput", "memory"])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--memory", type=int, help="size in pixels; used by the script itself")
    args = parser.parse_args()
    if args.memory:
        memory(args.memory)
        return
    if args.only != "memory":
        throughput(args)
    if args.only != "throughput":
        for size in (2016, 16128 if args.large else 8064):
            command = [sys.executable, str(SCRIPT), "--memory", str(size)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"peak RSS {size:5} x {size:5} px  {float(out.split()[-1]):7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
