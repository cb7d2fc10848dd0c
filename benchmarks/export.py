"""Networks in torch, in ONNX Runtime and there in 8 bits: speed, and how far they agree.

Usage: python benchmarks/export.py [RUN] [--threads N] [--rounds N] [--side PX]

RUN is the folder of a finished run (`make demo` leaves one in the repository); its model and chips
are copied, nothing in it changes. The networks are exported and compared as by `export-model`, and
then all members are run on windows of chips, a window per thread, the runtimes in turn. Needs the
extra `terraloom[onnx]`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
import torch

from terraloom.config.campaign import Campaign
from terraloom.config.load import load_campaign
from terraloom.errors import TerraloomError
from terraloom.io import read_json, read_store
from terraloom.predict.ensemble import MODEL, Ensemble, workers_of
from terraloom.predict.export import export_model
from terraloom.predict.onnx_runtime import FP32, INT8, agreement_path
from terraloom.train.windows import inputs_of

RUNTIMES = ("torch", FP32, INT8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=384, help="of the windows, at most (px)")
    args = parser.parse_args()
    if not (args.run / MODEL / "calibration.json").exists():
        sys.exit(f"{args.run} is no finished run: run make demo, or name the folder of one")
    with tempfile.TemporaryDirectory() as name:
        for part in ("results/model", "results/chips"):
            shutil.copytree(args.run / part, Path(name) / part)
        campaign = load_campaign(args.run / "work/campaign.yaml")
        os.chdir(name)
        measure(campaign, args.threads, args.rounds, args.side)


def measure(campaign: Campaign, threads: int, rounds: int, side: int) -> None:
    """Export, compare, run and print."""
    cases = {r: with_runtime(campaign, r, threads) for r in RUNTIMES}
    start = time.perf_counter()
    try:
        print(export_model(cases[INT8]))
    except TerraloomError as err:
        print(err)
    print(f"exported and compared in {time.perf_counter() - start:.0f} s")
    for runtime in (FP32, INT8):
        if (path := agreement_path(MODEL, runtime)).exists():
            print(runtime, {k: v for k, v in read_json(path).items() if k != "chips"})
    ensembles = {}
    for runtime, case in cases.items():
        try:
            ensembles[runtime] = Ensemble.load(campaign=case)
        except TerraloomError as err:
            print(f"{runtime}: {err}")
    windows = windows_of(side)
    rates: dict[str, list[float]] = {r: [] for r in ensembles}
    for turn in range(rounds + 1):  # the first warms up
        for runtime, ensemble in ensembles.items():
            rate = speed(ensemble, windows, threads)
            if turn:
                rates[runtime].append(rate)
    for runtime, values in rates.items():
        ratio = {r: statistics.median(v / w for v, w in zip(values, rates[r], strict=True))
                 for r in rates if r != runtime}  # fmt: skip
        spread = (max(values) - min(values)) / statistics.median(values)
        print(f"{runtime:10} {statistics.median(values):7.3f} Mpx/s, spread {spread:.2f}, "
              + ", ".join(f"{v:.2f} x {r}" for r, v in ratio.items()))  # fmt: skip


def with_runtime(campaign: Campaign, runtime: str, threads: int) -> Campaign:
    """The campaign, which predicts in another way."""
    update = {"runtime": runtime, "threads": threads, "device": "cpu", "precision": "fp32",
              "dropout_passes": 0}  # fmt: skip
    return campaign.model_copy(update={"predict": campaign.predict.model_copy(update=update)})


def windows_of(side: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of windows of the chips, at most 8."""
    chips = read_store("results/chips/chips.zip")
    some = np.linspace(0, chips.sizes["n"] - 1, min(chips.sizes["n"], 8)).astype(int)
    cut = side // 48 * 48
    sizes = {str(d): n for d, n in chips.sizes.items() if str(d)[:2] in ("y_", "x_")}
    ends = {d: slice(0, min(n, cut * 10 // int(d[2:]))) for d, n in sizes.items()}
    return [inputs_of(chips.isel(n=[i]).isel(ends).load()) for i in some]


def speed(ensemble: Ensemble, windows: Sequence[dict[str, torch.Tensor]], threads: int) -> float:
    """Mpx/s of all members."""
    workers = workers_of(threads, ensemble.device)

    def one(x: dict[str, torch.Tensor]) -> int:
        for member in ensemble.members:
            found = member.predict(x)
        values = next(iter(found.values()))
        return values.shape[2] * values.shape[3]

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                            initargs=(threads // workers,)) as pool:  # fmt: skip
        start = time.perf_counter()
        pixels = sum(pool.map(one, [*windows] * workers))
        return pixels / 1e6 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
