"""What drawing the batches costs beside the steps, and what memory many chips need.

Usage: python benchmarks/loader.py [--rounds 5] [--chips 200 2000]

Steps per second of the training loop with the sampler, beside the same loop on one batch that is
held in memory; the order alternates within each round. Then the peak memory of a training on few
and on many chips of the same size, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import xarray as xr

from terraloom.io import read_store, write_store
from terraloom.labels.spool import Spool
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import MultiTaskLoss
from terraloom.models.registry import build
from terraloom.train.fit import FitSettings, fit_member
from terraloom.train.loop import LoopSettings, train
from terraloom.train.pack import pack_chips, pack_labels
from terraloom.train.sampler import Augmentation, Batch, Sampler
from terraloom.train.windows import normalisation_of, spec_of

SIDE = 192
COVER = TaskSpec("cover", "segmentation", ("a", "b", "c"))
CHANNELS = {"s2_10": 4, "s2_20": 6, "s1_10": 2}


def one_chip(rng: np.random.Generator) -> dict[str, np.ndarray]:
    chip: dict[str, np.ndarray] = {}
    for group, count in CHANNELS.items():
        size = SIDE * 10 // int(group.split("_")[1])
        chip[f"x_{group}"] = rng.random((count, size, size), dtype=np.float32)
    chip["y_cover"] = rng.integers(0, 3, (SIDE, SIDE)).astype(np.uint8)
    chip["y_cover"][rng.random((SIDE, SIDE)) < 0.7] = 255
    chip["fold"] = np.full((SIDE, SIDE), int(rng.integers(4)), np.uint8)
    return chip


def write_chips(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with Spool(path.parent) as spool:
        for _ in range(count):
            spool.add(one_chip(rng))
        data = {}
        for name, values in spool.arrays().items():
            res = "10" if not name.startswith("x_") else name.split("_")[2]
            dims = ("n", f"y_{res}", f"x_{res}")
            if name.startswith("x_"):
                dims = ("n", f"channel_{name[2:]}", *dims[1:])
            chunks = (min(8, count), *values.shape[1:])
            data[name] = xr.Variable(dims, values, encoding={"chunks": chunks})
        names = {f"channel_{g}": [f"p/b{i}" for i in range(c)] for g, c in CHANNELS.items()}
        write_store(path, xr.Dataset(data, coords=names))


class Still:
    """One batch for ever, in the form of a sampler."""

    def __init__(self, sampler: Sampler, size: int) -> None:
        self._batch = sampler.batch(size)
        self.generator, self.crops_per_epoch = sampler.generator, sampler.crops_per_epoch

    def batch(self, size: int) -> Batch:
        """The same batch again."""
        return Batch(dict(self._batch.x), self._batch.y, self._batch.w, self._batch.soft,
                     self._batch.where)  # fmt: skip


def rates(folder: Path, rounds: int, steps: int = 40) -> dict[str, list[float]]:
    write_chips(folder / "chips.zip", 24)
    chips = read_store(folder / "chips.zip")
    spec = spec_of(chips, (COVER,))
    net = build(spec, normalisation_of(chips, spec, 0))
    labels = pack_labels(chips, (COVER,), lambda _, c: c["fold"].values != 0)
    pack = pack_chips(net, chips, labels, folder=folder / "pack")
    out: dict[str, list[float]] = {"held": [], "drawn": []}
    for i in range(rounds):
        for kind in sorted(out, reverse=bool(i % 2)):
            torch.manual_seed(0)
            net = build(spec, normalisation_of(chips, spec, 0))
            sampler = Sampler(
                net, pack, crop_px=72, class_power=1, augmentation=Augmentation(),
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            source = sampler if kind == "drawn" else Still(sampler, 4)
            epochs = steps * 4 / sampler.crops_per_epoch
            start = time.perf_counter()
            done = train(net, source, MultiTaskLoss([COVER]), LoopSettings(epochs=epochs, batch=4))  # type: ignore[arg-type]
            out[kind].append(len(done.history["cover"]) / (time.perf_counter() - start))
    return out


def fit_once(path: Path) -> None:
    """Train a little and print the peak memory: anonymous and mapped."""
    chips = read_store(path)
    settings = FitSettings(width=8, depth=3, epochs=40 * 16 * 0.14 / chips.sizes["n"], batch=4)
    fit_member(chips, (COVER,), settings, held_out_fold=0, member=0, seed=1,
               folder=path.parent / "pack-fit")  # fmt: skip
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kb = {k: int(status[k].split()[0]) for k in ("VmHWM", "RssAnon", "RssFile")}
    print(json.dumps(kb))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chips", type=int, nargs=2, default=[200, 2000])
    parser.add_argument("--fit", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.fit:
        fit_once(given.fit)
        return
    with tempfile.TemporaryDirectory() as name:
        got = rates(Path(name), given.rounds)
    held, drawn = median(got["held"]), median(got["drawn"])
    ratios = [d / h for d, h in zip(got["drawn"], got["held"], strict=True)]
    print(f"one batch in memory {held:.1f} steps/s, drawn batches {drawn:.1f} steps/s, median "
          f"ratio {median(ratios):.3f}")  # fmt: skip
    for count in given.chips:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "chips.zip"
            write_chips(path, count)
            done = subprocess.run(
                [sys.executable, __file__, "--fit", str(path)], check=True, capture_output=True,
                text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            kb = json.loads(done.stdout.splitlines()[-1])
            own, mapped = kb["RssAnon"] / 1e3, kb["RssFile"] / 1e3
            print(f"{count:6} chips ({path.stat().st_size / 1e6:,.0f} MB): own memory "
                  f"{own:,.0f} MB, mapped files {mapped:,.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
