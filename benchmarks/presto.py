"""Presto on few labelled series: fine-tuned, frozen, LoRA, from scratch; L-TAE; random forest.

Usage: python benchmarks/presto.py [folder of the test data] [--per-class N] [--epochs N]

Two kinds of table, every model on the same training series and the same folds:

- MODIS series of Mato Grosso, 4 classes, blocks of one degree. MODIS is not a sensor of Presto:
  NDVI is its NDVI, NIR stands for B8, and MIR (band 7, 2.1 um) for B12 and, for want of a 1.6 um
  band, for B11. EVI has no place. L-TAE and forest get NDVI, NIR, MIR, too.
- WorldCereal sites A and C (Flanders): 12 monthly medians of Sentinel-2 (20 m bands) and
  Sentinel-1, labels of land cover (LC) and crop type (CT), folds of whole fields. Fields are few.

Training takes at most N series a class (MODIS) or a field (WorldCereal), drawn by seed; all series
of the held-out fold are scored. Mean and standard deviation are over seeds. The epochs are few, so
that the whole takes minutes. From scratch Presto then learns nothing yet: its loss stands still for
some 200 steps before it falls.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning
from scipy.ndimage import label
from sklearn.ensemble import RandomForestClassifier

from terraloom.acquire.netcdf import decode_time
from terraloom.labels.knndm import group_folds
from terraloom.labels.leakage import degree_blocks
from terraloom.train.fit import HeldOut
from terraloom.train.score_series import scores_of
from terraloom.train.series import SeriesSettings, fit_series
from terraloom.train.series_table import SeriesTable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.parquet import read_parquet  # noqa: E402

SEEDS = (0, 1, 2)
TREES = 200
FOLDS = 3
S2 = ("B05", "B06", "B07", "B8A", "B11", "B12")
S1 = ("VV", "VH")
#: Classes of the scene classification that are no clear observation.
UNCLEAR = (0, 1, 3, 8, 9, 10)
#: Pixels of 20 m per field that are scored, and the fewest of a field.
PIXELS, FEWEST = 10, 3
#: Learning rate (peak) and rate of pre-trained weights beside it.
MODELS: dict[str, dict[str, Any]] = {
    "fine-tuned": {"adapt": "fine-tune", "rate": 2e-3, "pretrained": 0.2},
    "frozen": {"adapt": "frozen", "rate": 5e-3},
    "lora": {"adapt": "lora", "rate": 2e-3},
    "from scratch": {"adapt": "fine-tune", "rate": 5e-4, "scratch": True},
}


def modis(folder: Path) -> tuple[SeriesTable, npt.NDArray[Any]]:
    rows = read_parquet(folder / "sits/data/samples_modis_4bands.parquet")
    rows = rows.sort_values(["sample", "date"], kind="stable")
    first = rows.groupby("sample").first()
    x = rows[["NDVI", "NIR", "MIR", "MIR"]].to_numpy(np.float32).reshape(len(first), -1, 4)
    days = rows["date"].dt.day_of_year.to_numpy(np.float32).reshape(x.shape[:2])
    names, y = np.unique(first["label"].astype(str), return_inverse=True)
    block = degree_blocks(first["longitude"], first["latitude"])
    fold = group_folds(block, count=FOLDS, rng=np.random.default_rng(0))
    bands = ("NDVI", "B08", "B11", "B12")
    return SeriesTable(x, days, y.astype(np.int64), fold, bands, tuple(names)), y


def planes(folder: Path, pattern: str, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """All dates of a variable (T, H, W), NaN where there is no value, and their months."""
    path = next(folder.glob(pattern))
    with rasterio.Env(GDAL_NETCDF_BOTTOMUP="NO"), rasterio.open(f"netcdf:{path}:{name}") as file:
        raw = file.read()
        values = np.where(raw == file.nodata, np.nan, raw * file.scales[0] + file.offsets[0])
        units = file.tags()["timestamp#units"]
        dates = [decode_time(float(file.tags(i + 1)["NETCDF_DIM_timestamp"]), units)
                 for i in range(file.count)]  # fmt: skip
    months = np.array([d.strftime("%Y-%m") for d in dates], dtype="datetime64[M]")
    return values.astype(np.float32), months


def monthly(values: npt.NDArray[Any], month: npt.NDArray[Any], first: str) -> npt.NDArray[Any]:
    """Medians (12, H, W) of the months from ``first`` on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # months without a clear date
        parts = [values[month == np.datetime64(first, "M") + m] for m in range(12)]
        return np.stack([np.nanmedian(p, 0) if len(p) else np.full(values.shape[1:], np.nan)
                         for p in parts])  # fmt: skip


def site(folder: Path, task: str, first: str) -> tuple[SeriesTable, npt.NDArray[Any]]:
    """Pixels of 20 m that one class fills, a few per field; the field of each."""
    scl, months = planes(folder, "S2*20m*", "SCL")
    cloudy = np.isin(scl, UNCLEAR) | np.isnan(scl)
    layers = [monthly(np.where(cloudy, np.nan, planes(folder, "S2*20m*", b)[0]), months, first)
              for b in S2]  # fmt: skip
    for b in S1:
        layers.append(monthly(*planes(folder, "S1*", b), first))
    x = np.stack(layers, -1).transpose(1, 2, 0, 3)
    with rasterio.Env(GDAL_NETCDF_BOTTOMUP="NO"):
        path = next(folder.glob("OUTPUT*"))
        with rasterio.open(f"netcdf:{path}:{task}") as file:
            codes = file.read(1).reshape(32, 2, 32, 2).transpose(0, 2, 1, 3).reshape(32, 32, 4)
    pure = (codes == codes[..., :1]).all(-1) & (codes[..., 0] > 0)
    field = np.zeros((32, 32), np.int64)
    rng, chosen = np.random.default_rng(0), []
    for code in np.unique(codes[pure]):
        parts, count = label(pure & (codes[..., 0] == code))
        parts = [np.flatnonzero(parts == i + 1) for i in range(count)]
        parts = [p for p in parts if len(p) >= FEWEST]
        if len(parts) < 2:  # a class of one field cannot be learnt and tested
            continue
        for part in parts:
            field.flat[part] = field.max() + 1
            chosen.append(rng.permutation(part)[:PIXELS])
    rows = np.concatenate(chosen)
    names, y = np.unique(codes[..., 0].flat[rows], return_inverse=True)
    group = field.flat[rows]
    fold = group_folds(group, count=FOLDS, rng=np.random.default_rng(0), strata=y)
    days = np.tile(((np.arange(12) + 0.5) * 365.25 / 12).astype(np.float32), (len(rows), 1))
    table = SeriesTable(x.reshape(1024, 12, -1)[rows].astype(np.float32), days, y.astype(np.int64),
                        fold, (*S2, *S1), tuple(map(str, names)))  # fmt: skip
    return table, group


def drawn(groups: npt.NDArray[Any], keep: npt.NDArray[Any], most: int, seed: int) -> Any:
    """At most so many rows of each group among those to keep."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.flatnonzero(keep & (groups == g)))[:most]
             for g in np.unique(groups[keep])]  # fmt: skip
    return np.sort(np.concatenate(parts))


def held_out(
    table: SeriesTable, groups: npt.NDArray[Any], most: int, predict: Callable[..., Any]
) -> HeldOut:
    """Out-of-fold probabilities, one member per seed; each fit sees the drawn rows only."""
    p = np.zeros((len(SEEDS), len(table.y), len(table.classes)), np.float32)
    for m, seed in enumerate(SEEDS):
        for fold in np.unique(table.fold):
            own = table.fold == fold
            rows = drawn(groups, ~own, most, seed)
            p[m, own] = predict(table.rows(rows), table.rows(own), seed)
    return HeldOut(np.arange(len(table.y)), table.fold.astype(np.uint8), table.y, p)


def forest(train: SeriesTable, test: SeriesTable, seed: int) -> npt.NDArray[Any]:
    x, z = (np.nan_to_num(t.x.reshape(len(t.y), -1), nan=-9999.0) for t in (train, test))
    trees = RandomForestClassifier(TREES, random_state=seed).fit(x, train.y)
    p = np.zeros((len(z), len(test.classes)), np.float32)
    p[:, trees.classes_] = trees.predict_proba(z)
    return p


def network(settings: SeriesSettings) -> Callable[..., npt.NDArray[Any]]:
    def predict(train: SeriesTable, test: SeriesTable, seed: int) -> npt.NDArray[Any]:
        fit = fit_series(train, settings, held_out_fold=255, seed=seed)
        net = fit.network()
        out = net.predict(torch.from_numpy(test.x), torch.from_numpy(test.days))["class"]
        return np.nan_to_num(out.numpy())

    return predict


def models(
    weights: str, season: dict[str, Any], place: tuple[float, float], epochs: int, batch: int
) -> Any:
    """Name and predictor of every row of the table."""
    yield "forest", forest
    ltae = SeriesSettings("ltae", {**season, "width": 64}, epochs=3 * epochs, batch=batch)
    yield "ltae", network(ltae)
    for name, m in MODELS.items():
        settings = SeriesSettings(
            "presto", {**season, "width": 64, "adapt": m["adapt"], "lat_lon": place},
            epochs=epochs, batch=batch, learning_rate=m["rate"],
            pretrained_rate=m.get("pretrained", 0.1), weights="" if m.get("scratch") else weights,
        )  # fmt: skip
        yield name, network(replace(settings, ema=0.9))


def main() -> None:
    shared = os.environ.get("TERRALOOM_TEST_DATA", str(ROOT.parent / "shared/data"))
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(shared))
    parser.add_argument("--per-class", type=int, default=20, help="MODIS series to train on")
    parser.add_argument("--per-field", type=int, default=2, help="pixels of a field to train on")
    parser.add_argument("--epochs", type=int, default=8, help="of Presto; L-TAE has 3 times more")
    parser.add_argument("--batch", type=int, default=8, help="series per step")
    parser.add_argument("--only", choices=("modis", "worldcereal"))
    given = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    torch.set_num_threads(1)
    weights = str(given.folder / "weights/presto/default_model.pt")
    cases: list[tuple[str, Any, int, dict[str, Any], tuple[float, float]]] = []
    if given.only != "worldcereal":
        cases.append(("MODIS", modis(given.folder), given.per_class, {"start_day": 257.0},
                      (-13.0, -55.0)))  # fmt: skip
    if given.only != "modis":
        for key, first in (("a", "2017-12"), ("c", "2018-12")):
            for task in ("CT", "LC"):
                # Days count from the first month, so the season's codes start in December.
                table, field = site(given.folder / f"worldcereal/site_{key}", task, first)
                table = replace(table, days=(table.days + 333.0) % 365.25 + 1)
                cases.append((f"{key.upper()} {task}", (table, field), given.per_field,
                              {"start_day": 335.0}, (51.0, 3.0)))  # fmt: skip
    print(f"{len(SEEDS)} seeds, {FOLDS} folds, 1 thread, {given.epochs} epochs of Presto")
    print(f"{'table':6} {'model':13} {'series':>6} {'trained':>7} {'OA':15} {'macro-F1':15} "
          f"{'reachable':>9} {'seconds':>7}")  # fmt: skip
    for case, (table, groups), most, season, place in cases:
        trained = len(drawn(groups, table.fold != 0, most, 0))
        for name, predict in models(weights, season, place, given.epochs, given.batch):
            start = time.perf_counter()
            s = scores_of(held_out(table, groups, most, predict))
            oa, f1 = (f"{np.mean(v):.3f} +- {np.std(v, ddof=1):.3f}" for v in (s.accuracy, s.f1))
            print(f"{case:6} {name:13} {len(table.y):6} {trained:7} {oa:15} {f1:15} "
                  f"{s.reachable:9.3f} {time.perf_counter() - start:7.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
