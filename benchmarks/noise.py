"""What wrong labels cost, with and without cleaning or a robust loss.

Accuracy against the truth on a fold that no label was taken from, for labels that are wrong by
polygon (symmetric, or each class taken for one that looks alike) or whose boundaries are shifted.
A small network on single pixels; cleaning by confident learning on spatially held-out
probabilities of the training folds.

Usage: python benchmarks/noise.py [--run FOLDER] [--seeds 3] [--first 0]

With --run, the folder of a finished rehearsal (chips, labels and truth) takes the place of the
simulated fields.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import torch
from odc.geo.geobox import GeoBox
from scipy import ndimage

from terraloom.config.base import TaskKind
from terraloom.io import geobox_of, read_store
from terraloom.labels.clean import label_weights, review_in_rounds
from terraloom.labels.corrupt import (
    flip,
    noise_rate,
    pair_transition,
    shift_boundaries,
    symmetric_transition,
)
from terraloom.labels.rasterise import burn
from terraloom.models.class_losses import SegmentationLoss, segmentation_loss
from terraloom.train.baseline import pixels_at_10m

FOLDS = 4
TEST = 0
TRAIN_PX, TEST_PX = 6000, 6000
HIDDEN, STEPS, BATCH, RATE = 64, 150, 256, 5e-3
MOST_SHIFT_PX = 12


@dataclass
class World:
    """Features (H W, D), truth, label objects (-1 = none) and folds, all flattened (H W)."""

    x: np.ndarray
    truth: np.ndarray
    of: np.ndarray
    fold: np.ndarray
    shape: tuple[int, int]
    classes: int


def fields(seed: int, side: int = 240, parcels: int = 700, classes: int = 6) -> World:
    """Fields of a class each: own brightness, a smooth trend over the region, pixel noise."""
    rng = np.random.default_rng(seed)
    points = rng.random((parcels, 2)) * side
    seeds = np.full((side, side), -1)
    seeds[tuple(points.astype(int).T)] = np.arange(parcels)
    near = ndimage.distance_transform_edt(seeds < 0, return_indices=True)[1]
    of = seeds[tuple(near)]
    kind = rng.integers(0, classes, parcels)
    centre = rng.normal(0, 1, (classes, 8))
    x = centre[kind[of]] + rng.normal(0, 0.6, (parcels, 8))[of]
    trend = ndimage.gaussian_filter(rng.normal(size=(side, side, 8)), (30, 30, 0), mode="reflect")
    x = x + 0.4 * trend / trend.std() + rng.normal(0, 0.5, x.shape)
    block = np.arange(side) // (side // 8)
    fold = (block[:, None] + 2 * block[None]) % FOLDS
    labelled = rng.random(parcels) < 0.6
    # A parcel belongs to the fold that most of it lies in: it is never divided.
    votes = np.zeros((parcels, FOLDS))
    np.add.at(votes, (of.ravel(), fold.ravel()), 1)
    fold = np.where(labelled[of], votes.argmax(1)[of], fold)
    return World(x.reshape(-1, 8).astype(np.float32), kind[of].ravel(),
                 np.where(labelled[of], of, -1).ravel(), fold.ravel(), (side, side),
                 classes)  # fmt: skip


def rehearsal(folder: Path) -> World:
    """Pixels, label polygons, folds and truth of a finished rehearsal."""
    chips = read_store(folder / "results/chips/chips.zip").load()
    path = folder / "resources/simulated/truth/landcover.tif"
    box: GeoBox = geobox_of(path)
    with rasterio.open(path) as src:
        code = src.read(1)
    labels = gpd.read_file(folder / "results/chips/folds.gpkg", layer="labels")
    cover = labels[labels["task"] == "land_cover"].reset_index(drop=True)
    of = burn(cover.set_crs(str(box.crs), allow_override=True), box, kind=TaskKind.SEGMENTATION)
    n, h, w = chips["fold"].shape
    x = pixels_at_10m(chips, np.arange(n * h * w)).reshape(n, h, w, -1)
    fold, plane = np.full(box.shape, 255), np.zeros((*box.shape, x.shape[-1]), np.float32)
    for i, (r, c) in enumerate(zip(chips["row"].values, chips["col"].values, strict=True)):
        at = slice(int(r), int(r) + h), slice(int(c), int(c) + w)
        plane[at], fold[at] = x[i], chips["fold"].values[i]
    classes = len(chips.attrs["classes"])
    truth = np.where((code >= 1) & (code <= classes), code.astype(int) - 1, 255)
    plane[plane == -9999.0] = np.nan
    flat = plane.reshape(-1, plane.shape[-1])
    low, mid, high = np.nanpercentile(flat, (16, 50, 84), axis=0)
    flat = np.nan_to_num(np.clip((flat - mid) / np.maximum((high - low) / 2, 1e-6), -5, 5))
    return World(flat.astype(np.float32), truth.ravel(), of.label.ravel(), fold.ravel(),
                 tuple(box.shape), classes)  # fmt: skip


def mlp(
    x: np.ndarray, y: np.ndarray, classes: int, seed: int, *, loss: SegmentationLoss | None = None,
    w: np.ndarray | None = None, transition: np.ndarray | None = None,
) -> Callable[[np.ndarray], np.ndarray]:  # fmt: skip
    """A small network on single pixels; the same for every method."""
    settings = loss or SegmentationLoss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, classes),
        )  # fmt: skip
        draws = torch.randint(0, len(y), (STEPS, BATCH))
    tx, ty = torch.from_numpy(x), torch.from_numpy(y.astype(np.uint8))
    tw = torch.ones(len(y)) if w is None else torch.from_numpy(w).float()
    optimiser = torch.optim.Adam(net.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for step, at in enumerate(draws):
        value = segmentation_loss(net(tx[at]), ty[at], settings=settings, pixel_weights=tw[at],
                            transition=transition, keep=settings.keep(step, STEPS))  # fmt: skip
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        schedule.step()

    def predict(new: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(new)).softmax(1).numpy()

    return predict


METHODS = ("none", "cleaned", "gce", "sce", "forward", "small loss", "cleaned + gce")


def methods(
    x: np.ndarray, y: np.ndarray, of: np.ndarray | None, fold: np.ndarray, classes: int, seed: int
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Each method fitted on the same pixels; none sees the fold of the test."""

    def fit(fx: np.ndarray, fy: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return mlp(fx, fy, classes, seed)

    ids = np.arange(len(y)) if of is None else of
    review = review_in_rounds(x, y, fold, fit, ids)
    at = np.searchsorted(review.ids, ids)
    drop = label_weights(review)[at]
    share = min(float(review.flags.mean()), 0.9)

    def run(loss: SegmentationLoss | None = None, **k: Any) -> Callable[[np.ndarray], np.ndarray]:
        return mlp(x, y, classes, seed, loss=loss, **k)

    return {
        "none": run(),
        "cleaned": run(w=drop),
        "gce": run(SegmentationLoss("gce")),
        "sce": run(SegmentationLoss("sce")),
        "forward": run(SegmentationLoss("forward"), transition=review.noise),
        "small loss": run(SegmentationLoss(forget=share)),
        "cleaned + gce": run(SegmentationLoss("gce"), w=drop),
    }  # fmt: skip


def noisy(world: World, kind: str, rate: float, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Labels of all labelled pixels (255 elsewhere) with noise of a kind, and its strength."""
    count = int(world.of.max()) + 1
    has = (world.of >= 0) & (world.truth < world.classes)
    votes = np.zeros((count, world.classes))
    np.add.at(votes, (world.of[has], world.truth[has]), 1)
    clean = votes.argmax(1)
    plane = np.where(has, clean[world.of], 255)
    if rate == 0:
        return plane, "-"
    if kind == "boundary":
        # All fields move their boundaries; labels are read from the moved ones.
        truth = world.truth.reshape(world.shape).astype(np.uint8)
        for px in range(1, MOST_SHIFT_PX + 1):
            moved = np.where(has, shift_boundaries(truth, px, rng).ravel(), 255)
            if noise_rate(plane, moved) >= rate:
                break
        return moved, f"{px} px"
    make = symmetric_transition if kind == "symmetric" else pair_transition
    return np.where(has, flip(clean, make(world.classes, rate), rng)[world.of], 255), "-"


def trial(world: World, kind: str, rate: float, seed: int) -> tuple[dict[str, float], float, str]:
    """Accuracy of each method on true classes of the test fold, share of wrong labels, strength."""
    rng = np.random.default_rng([seed, int(100 * rate), len(kind)])
    y, strength = noisy(world, kind, rate, rng)
    train = np.flatnonzero((y != 255) & (world.fold != TEST) & (world.fold != 255))
    train = np.sort(rng.choice(train, min(TRAIN_PX, len(train)), replace=False))
    test = np.flatnonzero((world.fold == TEST) & (world.truth < world.classes))
    test = rng.choice(test, min(TEST_PX, len(test)), replace=False)
    # A shifted boundary makes pixels wrong, not polygons: there each pixel is judged by itself.
    of = None if kind == "boundary" else world.of[train]
    fitted = methods(world.x[train], y[train], of, world.fold[train], world.classes, seed)
    truth = world.truth[test]
    score = {m: float((f(world.x[test]).argmax(1) == truth).mean()) for m, f in fitted.items()}
    return score, noise_rate(world.truth[train], y[train]), strength


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--run", type=Path, help="folder of a finished rehearsal")
    options.add_argument("--seeds", type=int, default=3, help="number of seeds, 3 or more")
    options.add_argument("--first", type=int, default=0, help="first seed")
    args = options.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    read = rehearsal(args.run) if args.run else None
    seeds = range(args.first, args.first + args.seeds)
    worlds = {s: read or fields(s) for s in seeds}
    what = "rehearsal" if args.run else "simulated fields"
    print(f"{what}, {args.seeds} seeds: OA on true classes of a held-out fold, % (mean, sd)")
    print(f"{'noise':12} {'wrong':>6} {'shift':>6}  " + " ".join(f"{m:>13}" for m in METHODS))
    base: dict[str, float] = {}
    for kind, rate in [("symmetric", 0.0), *((k, r) for k in ("symmetric", "class", "boundary")
                                             for r in (0.2, 0.4))]:  # fmt: skip
        done = [trial(w, kind, rate, s) for s, w in worlds.items()]
        table = {m: np.array([100 * d[0][m] for d in done]) for m in METHODS}
        name = "none" if rate == 0 else f"{kind} {100 * rate:.0f}"
        cells = " ".join(f"{v.mean():7.1f} ({v.std(ddof=1):3.1f})" for v in table.values())
        print(f"{name:12} {100 * np.mean([d[1] for d in done]):5.1f}% {done[0][2]:>6}  {cells}")
        base = base or {m: float(v.mean()) for m, v in table.items()}
        if rate == 0.4:
            cost = {m: base["none"] - float(v.mean()) for m, v in table.items()}
            ratio = " ".join(f"{cost[m] / cost['none']:13.2f}" for m in METHODS)
            print(f"{'  cost / cost of doing nothing':28}{ratio}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
