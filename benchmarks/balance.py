"""Networks of one task beside networks of all tasks, for each way of balancing the losses.

Held-out scores of short trainings, and delta-m: the mean over the tasks of what joint training
gains relative to the network of that task alone (%, above 0 is better). Mean and standard
deviation over seeds, each with its own initial weights, batches and held-out fold. All networks
have the same number of steps: those of one task together cost as many times as there are tasks.

Usage: python benchmarks/balance.py CHIPS [--epochs 4] [--seeds 3] [--site a]

CHIPS is results/chips/chips.zip of a finished campaign; with --site the real site of that name
takes its place, where its data are at hand.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from sklearn.metrics import average_precision_score, f1_score

from terraloom.io import read_store
from terraloom.models.balance import BALANCES
from terraloom.models.heads import TaskSpec
from terraloom.train.fit import FitSettings, HeldOut, fit_member, predict_held_out

#: Score of each kind, and whether more is better.
SCORES = {"segmentation": ("macro-F1", True), "regression": ("RMSE", False),
          "boundary": ("AP", True)}  # fmt: skip


def score(task: TaskSpec, held: HeldOut) -> float:
    p, y = held.p[0], held.y
    if task.kind == "segmentation":
        return float(f1_score(y, p.argmax(1), average="macro", labels=np.unique(y),
                              zero_division=0))  # fmt: skip
    if task.kind == "regression":
        return float(np.sqrt(np.mean((p[:, 0] - y) ** 2)))
    return float(average_precision_score(y > 0.5, p[:, 0]))


def campaign(path: Path) -> tuple[xr.Dataset, list[TaskSpec]]:
    chips = read_store(path).load()
    tasks = [
        TaskSpec(t["name"], t["kind"],
                 tuple(chips.attrs["classes"]) if t["kind"] == "segmentation" else (), t["unit"])
        for t in chips.attrs["tasks"]
    ]  # fmt: skip
    return chips, tasks


def site(name: str) -> tuple[xr.Dataset, list[TaskSpec]]:
    from real_worldcereal import chips

    with tempfile.TemporaryDirectory() as work:
        data, tasks = chips(name, Path(work), folds=4, seed=0)
        return data.load(), tasks


def run(
    chips: xr.Dataset, tasks: list[TaskSpec], settings: FitSettings, seed: int
) -> tuple[dict[str, float], float]:
    """Held-out score per task, and seconds per step."""
    folds = [int(f) for f in np.unique(chips["fold"].values) if f != 255]
    fold = folds[seed % len(folds)]
    start = time.perf_counter()
    fit = fit_member(chips, tasks, settings, held_out_fold=fold, member=0, seed=seed)
    spent = (time.perf_counter() - start) / len(fit.history[tasks[0].name])
    held = predict_held_out(chips, [fit.network()], fold)
    return {t.name: score(t, held[t.name]) for t in tasks}, spent


def gain(task: TaskSpec, multi: float, single: float) -> float:
    return (multi - single) / single * (100 if SCORES[task.kind][1] else -100)


def row(name: str, cells: list[np.ndarray], more: str) -> None:
    text = " ".join(f"{v.mean():10.3f} ({v.std(ddof=1):.3f})" for v in cells)
    print(f"{name:14}{text}{more}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("chips", type=Path, nargs="?", help="chips of a finished campaign")
    options.add_argument("--site", help="real site in place of the chips")
    options.add_argument("--epochs", type=float, default=4, help="passes over the chips")
    options.add_argument("--seeds", type=int, default=3, help="number of seeds, 3 or more")
    args = options.parse_args()
    if (args.chips is None) == (args.site is None):
        options.error("give either CHIPS or --site")
    torch.set_num_threads(1)
    start = time.perf_counter()
    chips, tasks = campaign(args.chips) if args.site is None else site(args.site)
    settings = FitSettings(epochs=args.epochs)
    seeds = range(args.seeds)
    print("".join([" " * 14, *(f"{t.name + ' ' + SCORES[t.kind][0]:>19}" for t in tasks),
                   "          delta-m %      step"]))  # fmt: skip
    alone = [[run(chips, [t], settings, s) for s in seeds] for t in tasks]
    single = [np.array([r[0][t.name] for r in a]) for t, a in zip(tasks, alone, strict=True)]
    row("single tasks", single, "")
    base = 0.0
    for name in BALANCES:
        done = [run(chips, tasks, replace(settings, balance=name), s) for s in seeds]
        cells = [np.array([r[0][t.name] for r in done]) for t in tasks]
        each = [[gain(t, m, o) for m, o in zip(c, s, strict=True)]
                for t, c, s in zip(tasks, cells, single, strict=True)]  # fmt: skip
        delta = np.mean(each, axis=0)
        step = float(np.median([r[1] for r in done]))
        base = base or step
        row(name, cells, f"{delta.mean():10.1f} ({delta.std(ddof=1):4.1f}){step / base:10.2f}")
    print(f"{args.epochs:g} epochs, {args.seeds} seeds; step: time beside `{next(iter(BALANCES))}`;"
          f" {time.perf_counter() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
