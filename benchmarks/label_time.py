"""What the labels' time tells: outdated labels found, and the accuracy gained by leaving them out.

On a finished rehearsal the changed labels are known: recall and precision of the change test,
whose classes are known by the labels of other folds only, and the accuracy against the truth of a
random forest with and without these labels. On real images (labels of 1999 on images of 1999 and
2002; labels of 1996 on an image of 2000) nobody knows which labels changed: what the test finds is
printed, and the score of a forest in spatial blocks with and without the labels it would drop.

Usage: python benchmarks/label_time.py [--run FOLDER] [--data FOLDER] [--seeds 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import yaml
from rasterio.features import rasterize
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import f1_score

from terraloom.io import read_store
from terraloom.labels.change import change_test
from terraloom.labels.time import gap_days, time_weights, weigh_chips
from terraloom.train.baseline import pixels_at_10m

DROP = 0.8
TREES, MOST_TRAIN, MOST_TEST = 60, 12_000, 20_000


def period(name: str, first: str, last: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, start=date.fromisoformat(first), end=date.fromisoformat(last))


def forest(x: np.ndarray, y: np.ndarray, seed: int, w: np.ndarray | None = None) -> Any:
    model = RandomForestClassifier(TREES, min_samples_leaf=2, random_state=seed)
    return model.fit(x, y, w)


# --- rehearsal -----------------------------------------------------------------------------------


def truth_of(folder: Path, chips: Any, name: str) -> np.ndarray:
    """A raster of the truth on the chips, (N, h, w)."""
    size = int(chips.attrs["size_px"])
    with rasterio.open(folder / f"resources/simulated/truth/{name}.tif") as src:
        plane = np.pad(src.read(1), ((0, size), (0, size)))
    at = zip(chips["row"].values, chips["col"].values, strict=True)
    return np.stack([plane[r : r + size, c : c + size] for r, c in at])


def rehearsal(folder: Path, seeds: int) -> None:
    chips = read_store(folder / "results/chips/chips.zip").load()
    campaign = yaml.safe_load((folder / "work/campaign.yaml").read_text())
    periods = [SimpleNamespace(**p) for p in campaign["cube"]["periods"]]
    labels = gpd.read_file(folder / "results/chips/folds.gpkg", layer="labels")
    cover = labels[labels["task"] == "land_cover"].reset_index(drop=True)
    raw = gpd.read_file(folder / "resources/simulated/labels.gpkg", layer="landcover")
    truth = json.loads((folder / "resources/simulated/truth/truth.json").read_text())
    parcel = raw["parcel_id"].to_numpy()[cover["label_id"]]
    outdated = np.isin(parcel, truth["outdated_label_ids"])
    fold = cover["fold"].to_numpy()
    p, weights = np.zeros(len(cover)), {}
    for f in np.unique(fold):
        out, report = weigh_chips(chips, labels, "land_cover", periods=periods, drop_changed=DROP,
                                  held_out_fold=int(f))  # fmt: skip
        # A label is judged by the labels of other folds, as it is where its fold is scored.
        p[fold == f] = np.array(report["per_label"]["p_change"])[fold == f]
        weights[int(f)] = out["w_land_cover"].values.ravel()
    found = p >= DROP
    print(f"rehearsal: {len(cover)} labels, {outdated.sum()} outdated, {found.sum()} found: recall "
          f"{(found & outdated).sum() / outdated.sum():.2f}, precision "
          f"{(found & outdated).sum() / max(found.sum(), 1):.2f}")  # fmt: skip
    legend = csv.DictReader((folder / "resources/simulated/classes.csv").open())
    code = {int(r["code"]): list(chips.attrs["classes"]).index(r["name"]) for r in legend}
    true = np.array([code.get(v, 255) for v in range(256)])[truth_of(folder, chips, "landcover")]
    changed = truth_of(folder, chips, "change").ravel() > 0
    gain(chips, true.ravel(), changed, weights, seeds)


def gain(
    chips: Any, true: np.ndarray, changed: np.ndarray, weights: dict[int, np.ndarray], seeds: int
) -> None:
    """Accuracy against the truth with all labels, and with the weights of each fold."""
    y, fold = chips["y_land_cover"].values.ravel(), chips["fold"].values.ravel()
    rows: dict[str, list[tuple[float, float]]] = {"all labels": [], "without changed": []}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        hits: dict[str, list[np.ndarray]] = {k: [] for k in rows}
        which = []
        for f, w in weights.items():
            train = np.flatnonzero((y != 255) & (fold != f) & (fold != 255))
            train = np.sort(rng.choice(train, min(MOST_TRAIN, len(train)), replace=False))
            test = np.flatnonzero((fold == f) & (true != 255))
            # Changed ground is rare: half of the test is drawn there, and weighed back below.
            some = [g[rng.permutation(len(g))[: MOST_TEST // 2 // len(weights)]]
                    for g in (test[~changed[test]], test[changed[test]])]  # fmt: skip
            test = np.sort(np.concatenate(some))
            which.append(test)
            x, far = pixels_at_10m(chips, train), pixels_at_10m(chips, test)
            for name, kept in (("all labels", w > -1), ("without changed", w > 0)):
                rows_of = kept[train]
                model = forest(x[rows_of], y[train][rows_of], seed)
                hits[name].append(model.predict(far) == true[test])
        at = np.concatenate(which)
        share = changed[true != 255].mean()
        for name, parts in hits.items():
            ok = np.concatenate(parts)
            there = ok[changed[at]].mean()
            rows[name].append((100 * (share * there + (1 - share) * ok[~changed[at]].mean()),
                               100 * there))  # fmt: skip
    print("random forest against the truth, % (mean, sd over seeds)      all  where ground changed")
    for name, values in rows.items():
        v = np.array(values)
        print(f"  {name:18}" + " ".join(f"{m:22.2f} ({s:.2f})"
                                        for m, s in zip(v.mean(0), v.std(0, ddof=1), strict=True))
        )  # fmt: skip


# --- real labels ---------------------------------------------------------------------------------


def medians(planes: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """(N, F) median of planes (F, H, W) per label, NaN where it has no valid pixel."""
    out = np.full((count, len(planes)), np.nan)
    for i in range(count):
        inside = planes[:, label == i]
        if np.isfinite(inside).any():
            out[i] = np.nanmedian(inside, axis=1)
    return out


def chiapas(folder: Path) -> None:
    labels = gpd.read_file(folder / "chiapas/example/training_data.shp")
    names, y = np.unique(labels["class"], return_inverse=True)
    periods = [
        period("1999", "1999-11-18", "1999-11-18"),
        period("2002", "2002-04-16", "2002-04-16"),
    ]
    series = []
    for scene in ("LE70220491999322EDC01", "LE70220492002106EDC00"):
        with rasterio.open(folder / f"chiapas/example/{scene}_stack.gtif") as src:
            x, fmask, transform = src.read(range(1, 8)).astype(float), src.read(8), src.transform
        x[:, (fmask > 1) | (x <= -9999).any(0) | (x >= 20000).any(0)] = np.nan
        burnt = rasterize(zip(labels.geometry, range(len(labels)), strict=True),
                          x.shape[1:], fill=-1, transform=transform, dtype="int32")  # fmt: skip
        series.append(medians(x, burnt, len(labels)))
    both = np.stack(series, axis=1)
    dates = ["1999-11-18"] * len(labels)
    print(f"chiapas: {len(labels)} polygons of 1999; without a clear pixel in 1999, 2002: "
          f"{[int(np.isnan(s).all(1).sum()) for s in series]}")  # fmt: skip
    for what, x, p in (("both images", both, periods), ("2002 alone", both[:, 1:], periods[1:])):
        test = change_test(x, y, dates, p)
        weight = time_weights(gap_days(dates, p), test.p_change, tau_days=730)
        print(f"  {what}: {test.tested.sum()} tested; p_change >= .8: "
              f"{(test.p_change >= 0.8).sum()}, >= .5: {(test.p_change >= 0.5).sum()}, p_wrong >= "
              f".5: {(test.p_wrong >= 0.5).sum()}; mean weight {weight.mean():.2f} "
              "(tau 730 days)")  # fmt: skip
        for i in np.flatnonzero(test.p_change >= 0.5):
            red, nir = both[i, :, 2], both[i, :, 3]
            ndvi = ", ".join(f"{v:.2f}" for v in (nir - red) / (nir + red))
            print(
                f"    polygon {i} ({names[y[i]]}): p {test.p_change[i]:.2f}, NDVI 1999, 2002 {ndvi}"
            )


def landsat(folder: Path, seeds: int) -> None:
    base = folder / "nc_landsat"
    points = gpd.read_file(base / "landsat96_points.shp").to_crs("EPSG:32119")
    bands = []
    for band in (10, 20, 30, 40, 50, 70):
        with rasterio.open(base / f"lsat7_2000_{band}.tif") as src:
            plane = src.read(1).astype(float)
            plane[plane == src.nodata] = np.nan
            bands.append(plane)
            transform = src.transform
    planes = np.stack(bands)
    polygons = gpd.read_file(base / "landsat96_polygons.shp").to_crs("EPSG:32119")
    row, col = rasterio.transform.rowcol(transform, points.geometry.x, points.geometry.y)
    inside = (np.array(row) >= 0) & (np.array(row) < planes.shape[1])
    inside &= (np.array(col) >= 0) & (np.array(col) < planes.shape[2])
    x = np.full((len(points), 6), np.nan)
    x[inside] = planes[:, np.array(row)[inside], np.array(col)[inside]].T
    seen = np.isfinite(x).all(1)
    x, points = x[seen], points[seen]
    burnt = rasterize(zip(polygons.geometry, range(len(polygons)), strict=True),
                      planes.shape[1:], fill=-1, transform=transform, dtype="int32")  # fmt: skip
    image = [period("2000", "2000-03-31", "2000-03-31")]
    for what, values, said in (("polygons", medians(planes, burnt, len(polygons)), polygons.label),
                               ("points", x, points["label"])):  # fmt: skip
        names, y = np.unique(said.astype(str), return_inverse=True)
        dates = ["1996-07-01"] * len(y)
        test = change_test(values[:, None], y, dates, image)
        gap = gap_days(dates, image)
        weight = time_weights(gap, test.p_change, tau_days=730)
        found = test.p_change >= DROP
        each = ", ".join(
            f"{n} {found[y == k].sum()} of {(y == k).sum()}" for k, n in enumerate(names)
        )
        print(f"nc_landsat, {what}: {len(y)} labels, gap {gap[0]:.0f} days, "
              f"{test.tested.sum()} tested; "
              f"p_change >= .8: {found.sum()} ({each}); mean weight {weight.mean():.2f} "
              "(tau 730 days)")  # fmt: skip
    blocks(x, y, np.column_stack([points.geometry.x, points.geometry.y]), image, seeds)


def blocks(x: np.ndarray, y: np.ndarray, at: np.ndarray, image: list[Any], seeds: int) -> None:
    """Score in 2 km blocks: all labels, and without those that training folds call changed."""
    _, block = np.unique(np.floor(at / 2000), axis=0, return_inverse=True)
    dates = ["1996-07-01"] * len(y)
    scores: dict[str, list[tuple[float, float]]] = {"all": [], "without changed": []}
    for seed in range(seeds):
        fold = np.random.default_rng(seed).permutation(block.max() + 1)[block.ravel()] % 5
        got = {k: np.full(len(y), -1) for k in scores}
        for f in range(5):
            p = change_test(x[:, None], y, dates, image, fit=fold != f).p_change
            for name, kept in (("all", fold != f), ("without changed", (fold != f) & (p < DROP))):
                got[name][fold == f] = forest(x[kept], y[kept], seed).predict(x[fold == f])
        for name, said in got.items():
            scores[name].append(
                (100 * (said == y).mean(), 100 * f1_score(y, said, average="macro"))
            )
    for name, values in scores.items():
        v = np.array(values)
        print(f"  points in blocks, {name:16} OA {v[:, 0].mean():.1f} ({v[:, 0].std(ddof=1):.1f}), "
              f"macro-F1 {v[:, 1].mean():.1f} ({v[:, 1].std(ddof=1):.1f}) on labels "
              "as given")  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--run", type=Path, help="folder of a finished rehearsal")
    options.add_argument("--data", type=Path, help="folder of real data; default: as for the tests")
    options.add_argument("--seeds", type=int, default=3, help="number of seeds, 2 or more")
    args = options.parse_args()
    start = time.perf_counter()
    near = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = args.data or Path(os.environ.get("TERRALOOM_TEST_DATA", near))
    if args.run:
        rehearsal(args.run, args.seeds)
    if data.is_dir():
        chiapas(data)
        landsat(data, args.seeds)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
