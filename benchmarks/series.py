"""Networks of pixel series beside a random forest: labelled MODIS series, blocks of one degree.

Usage: python benchmarks/series.py [folder of the test data] [--deals N] [--early-stopping]

1,218 series in 4 classes and 2,115 series in 9 classes of Mato Grosso (23 dates a year). All
series of Forest lie in one block, so that folds of blocks never train on Forest when they test it:
no classifier exceeds the accuracy that the table calls reachable, nor a macro-F1 of .713. The case
without Forest has no such bound. Every row is scored on the same folds; mean and standard
deviation are over seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from terraloom.labels.knndm import group_folds
from terraloom.labels.leakage import degree_blocks
from terraloom.models.heads import TaskSpec
from terraloom.models.temporal import SeriesNet, SeriesSpec
from terraloom.train.baseline import out_of_fold
from terraloom.train.held_out import HeldOut
from terraloom.train.score_series import scores_of
from terraloom.train.series import SeriesSettings, cross_validate
from terraloom.train.series_table import SeriesTable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.parquet import read_parquet  # noqa: E402

SEEDS = (0, 1, 2)
PROCESSES = 2
TREES = 200
#: Case: table, bands, classes left out, folds.
CASES = {
    "4 classes": ("samples_modis_4bands", ("NDVI", "EVI", "NIR", "MIR"), (), 10),
    "without Forest": ("samples_modis_4bands", ("NDVI", "EVI", "NIR", "MIR"), ("Forest",), 10),
    "9 classes": ("samples_mt_9classes", ("mir", "blue", "nir", "red", "evi", "ndvi"), (), 5),
}
#: The year of these series starts in the middle of September.
SEASON = {"start_day": 257.0}
NETWORKS = {
    "tempcnn": SeriesSettings("tempcnn", {**SEASON, "width": 32}),
    "ltae": SeriesSettings("ltae", {**SEASON, "width": 64}, epochs=30),
    "gru": SeriesSettings("gru", {**SEASON, "width": 32, "layers": 1}),
}


def read(folder: Path, case: str, deal: int) -> SeriesTable:
    name, bands, without, count = CASES[case]
    rows = read_parquet(folder / f"sits/data/{name}.parquet")
    rows = rows[~rows["label"].isin(without)].sort_values(["sample", "date"], kind="stable")
    first = rows.groupby("sample").first()
    x = rows[list(bands)].to_numpy(np.float32).reshape(len(first), -1, len(bands))
    days = rows["date"].dt.day_of_year.to_numpy(np.float32).reshape(x.shape[:2])
    names, y = np.unique(first["label"].astype(str), return_inverse=True)
    block = degree_blocks(first["longitude"], first["latitude"])
    fold = group_folds(block, count=count, rng=np.random.default_rng(deal))
    return SeriesTable(x, days, y.astype(np.int64), fold, bands, tuple(names))


def forest(table: SeriesTable) -> HeldOut:
    """Out-of-fold probabilities of random forests on the same folds, one member per seed."""
    x = np.nan_to_num(table.x.reshape(len(table.y), -1), nan=-9999.0)
    p = np.stack([
        out_of_fold(x, table.y, table.fold, len(table.classes), seed=seed, trees=TREES,
                    jobs=PROCESSES)
        for seed in SEEDS
    ])  # fmt: skip
    return HeldOut(np.arange(len(table.y)), table.fold.astype(np.uint8), table.y, p)


def one_seed(table: SeriesTable, settings: SeriesSettings, seed: int) -> HeldOut:
    torch.set_num_threads(1)
    return cross_validate(table, settings, seeds=[seed])


def network(table: SeriesTable, settings: SeriesSettings, pool: ProcessPoolExecutor) -> HeldOut:
    parts = [pool.submit(one_seed, table, settings, seed) for seed in SEEDS]
    held = [part.result() for part in parts]
    return replace(held[0], p=np.concatenate([h.p for h in held]))


def parameters(table: SeriesTable, settings: SeriesSettings) -> int:
    task = TaskSpec("class", "segmentation", table.classes)
    spec = SeriesSpec(table.bands, (task,), settings.encoder, **settings.network)
    return SeriesNet(spec).parameter_counts()["total"]


def row(case: str, deal: int, name: str, count: int, held: HeldOut, seconds: float) -> None:
    s = scores_of(held)
    oa, f1 = (f"{np.mean(v):.3f} +- {np.std(v, ddof=1):.3f}" for v in (s.accuracy, s.f1))
    print(f"{case:15} {deal:4} {name:8} {count:10,} {oa:15} {f1:15} {s.joint_accuracy:8.3f} "
          f"{s.joint_f1:8.3f} {s.reachable:9.3f} {seconds:7.1f}", flush=True)  # fmt: skip


def main() -> None:
    shared = os.environ.get("TERRALOOM_TEST_DATA", str(ROOT.parent / "shared/data"))
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(shared))
    parser.add_argument("--deals", type=int, default=1, help="deals of blocks to folds")
    parser.add_argument("--early-stopping", action="store_true")
    given = parser.parse_args()
    print(f"{len(SEEDS)} seeds, {PROCESSES} processes of 1 thread; seconds are for all seeds")
    print(f"{'case':15} {'deal':>4} {'model':8} {'parameters':>10} {'OA':15} {'macro-F1':15} "
          f"{'joint OA':>8} {'joint F1':>8} {'reachable':>9} {'seconds':>7}")  # fmt: skip
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        list(pool.map(torch.set_num_threads, [1] * PROCESSES))  # start-up is not timed
        for case in CASES:
            for deal in range(given.deals):
                table = read(given.folder, case, deal)
                start = time.perf_counter()
                row(case, deal, "forest", 0, forest(table), time.perf_counter() - start)
                for name, settings in NETWORKS.items():
                    s = replace(settings, patience=5 if given.early_stopping else 0)
                    start = time.perf_counter()
                    held = network(table, s, pool)
                    seconds = time.perf_counter() - start
                    row(case, deal, name, parameters(table, s), held, seconds)


if __name__ == "__main__":
    main()
