"""Training and prediction on a GPU beside a processor, in each number format.

Usage: python benchmarks/gpu.py [--rounds 5] [--networks fusion utae ltae]

Trains and predicts in rounds: every round times each row once, so that load falls on all alike.
Figures are medians over the rounds; ratios are medians of the ratios within a round. Training is
the whole loop with its sampler, after one training that is not counted. Prediction is one window
with all copies. Three months of Sentinel-2 at 10 and 20 m; without a GPU only the processor's rows.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
import xarray as xr

from terraloom.models.devices import be_exact
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import MultiTaskLoss
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import build, ready
from terraloom.train.augment import Augmentation
from terraloom.train.loop import LoopSettings, train
from terraloom.train.pack import Pack, pack_chips, pack_labels
from terraloom.train.sampler import Sampler
from terraloom.train.windows import normalisation_of, spec_of

SIDE, CHIPS, PREDICT_PX = 192, 12, 960
COVER = TaskSpec("cover", "segmentation", ("a", "b", "c"))
BANDS = {"s2_10": 4, "s2_20": 6}
MONTHS = ("2018-05", "2018-07", "2018-08")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    network: str
    device: str
    precision: str


def make_chips() -> xr.Dataset:
    rng = np.random.default_rng(0)
    data, coords = {}, {}
    for group, count in BANDS.items():
        px = SIDE * 10 // int(group.split("_")[1])
        names = [f"{m}/b{i}" for m in MONTHS for i in range(count)]
        x = rng.random((CHIPS, len(names), px, px), dtype=np.float32)
        data[f"x_{group}"] = (("n", f"channel_{group}", f"y_{group}", f"x_{group}"), x)
        coords[f"channel_{group}"] = names
    y = rng.integers(0, 3, (CHIPS, SIDE, SIDE)).astype(np.uint8)
    data["y_cover"] = (("n", "y_10", "x_10"), np.where(rng.random(y.shape) < 0.7, 255, y))
    data["fold"] = (("n", "y_10", "x_10"), np.zeros(y.shape, np.uint8))
    return xr.Dataset(data, coords=coords)


class Case:
    """A network with its packed chips and a window to predict."""

    def __init__(self, chips: xr.Dataset, network: str, batch: int, steps: int) -> None:
        self.spec = spec_of(chips, (COVER,), network, width=16, depth=4)
        self.norm = normalisation_of(chips, self.spec, 9)
        labels = pack_labels(chips, (COVER,), lambda _, c: c["fold"].values == 0)
        self.pack: Pack = pack_chips(self.net(), chips, labels)
        self.batch, self.steps = batch, steps
        g = torch.Generator().manual_seed(0)
        self.window = {
            n: torch.rand((1, len(c), *[PREDICT_PX * 10 // int(n.split("_")[1])] * 2), generator=g)
            for n, c in self.spec.channels.items()
        }

    def net(self) -> MapNet:
        """Fresh weights, always the same."""
        torch.manual_seed(0)
        return ready(build(self.spec, self.norm))

    def steps_per_s(self, row: Row, steps: int) -> float:
        """Steps per second of a training of ``steps``."""
        net = self.net()
        sampler = Sampler(
            net, self.pack, crop_px=96, class_power=1, augmentation=Augmentation(),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        s = LoopSettings(
            batch=self.batch, epochs=steps * self.batch / sampler.crops_per_epoch,
            device=row.device, precision=row.precision,
        )  # fmt: skip
        start = time.perf_counter()
        done = train(net, sampler, MultiTaskLoss([COVER]), s)
        return len(done.history["cover"]) / (time.perf_counter() - start)

    def mpx_per_s(self, row: Row) -> float:
        """Million pixels per second of prediction."""
        net = self.net().to(row.device)
        number = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(row.precision)
        times = []
        # A processor is slow: a quarter of the window, and no round to warm up, say enough.
        cut = 1 if row.device == "cuda" else 2
        window = {n: v[..., : v.shape[2] // cut, : v.shape[3] // cut]
                  for n, v in self.window.items()}  # fmt: skip
        for _ in range(4 if row.device == "cuda" else 1):
            start = time.perf_counter()
            with torch.autocast(row.device, number, enabled=number is not None):
                net.predict(window)["cover"].cpu()
            times.append(time.perf_counter() - start)
        return (PREDICT_PX / cut) ** 2 / 1e6 / median(times[-3:])


def table(names: list[str], rounds: int, batch: int, steps: int) -> None:
    chips = make_chips()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(f"{len(MONTHS)} months, batches of {batch} windows of 96 px, {steps} steps; window of "
          f"{PREDICT_PX} px; {torch.get_num_threads()} threads; medians of {rounds} rounds; ratios "
          "to fp32 on the processor")  # fmt: skip
    print(f"{'network':8} {'device':6} {'number':6} {'steps/s':>8} {'ratio':>7} {'Mpx/s':>8} "
          f"{'ratio':>7}")  # fmt: skip
    for name in names:
        case = Case(chips, name, batch, steps)
        rows = [Row(name, d, p) for d in devices for p in ("fp32", "bf16", "fp16")
                if d == "cuda" or p != "fp16"]  # fmt: skip
        for row in rows:
            case.steps_per_s(row, 4)
        got: dict[Row, list[tuple[float, float]]] = {r: [] for r in rows}
        for _ in range(rounds):
            for row in rows:
                # A processor is slow: fewer steps say enough.
                count = steps if row.device == "cuda" else max(4, steps // 10)
                got[row].append((case.steps_per_s(row, count), case.mpx_per_s(row)))
        for row in rows:
            cells = []
            for i in range(2):
                each = [v[i] for v in got[row]]
                ratio = [v[i] / w[i] for v, w in zip(got[row], got[rows[0]], strict=True)]
                cells += [median(each), median(ratio)]
            print(f"{row.network:8} {row.device:6} {row.precision:6} {cells[0]:8.2f} "
                  f"{cells[1]:7.2f} {cells[2]:8.3f} {cells[3]:7.2f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--networks", nargs="+", default=["fusion", "utae", "ltae"])
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    be_exact(torch.device("cuda" if cuda else "cpu"))
    if cuda:
        print(torch.cuda.get_device_name(), f"torch {torch.__version__}, {os.cpu_count()} cores")
    table(given.networks, given.rounds, given.batch, given.steps)


if __name__ == "__main__":
    main()
