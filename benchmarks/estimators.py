"""Estimators: do 95 % intervals cover, and how long do they take.

Draws samples of simulated maps and counts how often the interval of each quantity covers the
truth, for normal and for Wilson intervals::

    python benchmarks/estimators.py --draws 2000

Each design is one row group: coverage in percent of overall accuracy, and the least and greatest
over classes of user's accuracy, producer's accuracy and area. The first lines are times: one report
on 10,000 units of 20 classes, and all draws of the first design.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from terraloom.assess.estimators import estimate_accuracy
from terraloom.assess.intervals import Interval
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata

F64 = np.ndarray


@dataclass(frozen=True)
class World:
    """A simulated map: (H, K, K) shares of the cells map x reference in each stratum."""

    cells: F64
    share: F64
    n: tuple[int, ...]

    @property
    def truth(self) -> dict[str, F64]:
        """True values by quantity, one per class."""
        p = np.tensordot(self.share, self.cells, axes=1)
        hit = np.diag(p)
        with np.errstate(invalid="ignore"):
            return {"oa": np.array([hit.sum()]), "ua": hit / p.sum(axis=1),
                    "pa": hit / p.sum(axis=0), "area": p.sum(axis=0)}  # fmt: skip


#: Olofsson et al. (2014), table 8, taken as the truth.
E1 = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]], dtype=float)
E1_SHARE = np.array([0.02, 0.015, 0.32, 0.645])
PIXELS = 10_000_000


def by_class(confusion: F64, share: F64, n: tuple[int, ...]) -> World:
    """Strata are the map classes; rows of `confusion` are map classes."""
    k = len(share)
    cells = np.zeros((k, k, k))
    for h in range(k):
        cells[h, h] = confusion[h] / confusion[h].sum()
    return World(cells, np.asarray(share), n)


def crossed() -> World:
    """Strata of an older map: they differ from the classes of the map under assessment."""
    first = by_class(E1 + 3, E1_SHARE, ())
    mixed = np.array([[0.75, 0.05, 0.1, 0.1], [0.05, 0.75, 0.1, 0.1], [0.01, 0.01, 0.9, 0.08],
                      [0.005, 0.005, 0.04, 0.95]])  # fmt: skip
    cells = np.einsum("hm,mij->hij", mixed, first.cells)
    return World(cells, E1_SHARE, (75, 75, 165, 185))


def eight() -> World:
    """Eight classes from 1 to 40 % with confusion between neighbours, 500 units, 30 at least."""
    share = np.array([0.4, 0.25, 0.15, 0.08, 0.06, 0.03, 0.02, 0.01])
    k = len(share)
    confusion = np.eye(k) * 0.85
    for i in range(k):
        confusion[i, (i + 1) % k] += 0.1
        confusion[i, (i - 1) % k] += 0.05
    return by_class(confusion, share, (110, 90, 70, 50, 50, 50, 40, 40))


WORLDS = {
    "Olofsson table 8, n = 640": by_class(E1, E1_SHARE, (75, 75, 165, 325)),
    "Olofsson table 8, n = 500": by_class(E1, E1_SHARE, (75, 75, 118, 232)),
    "proportional, n = 500": by_class(E1, E1_SHARE, (10, 8, 160, 322)),
    "eight classes, n = 500": eight(),
    "old strata, n = 500": crossed(),
}


Drawn = tuple[ReferenceSample, Strata, Strata | None]
WHOLE = Strata.from_pixels({0: PIXELS}, 100.0)


def stratified(world: World, rng: np.random.Generator) -> Drawn:
    h, k, _ = world.cells.shape
    flat = world.cells.reshape(h, k * k)
    stratum = np.repeat(np.arange(h), world.n)
    cell = np.concatenate([rng.choice(k * k, n, p=p) for n, p in zip(world.n, flat, strict=True)])
    sample = ReferenceSample(stratum, cell // k, cell % k, SampleKind.STRATIFIED_RANDOM)
    pixels = {i: int(s * PIXELS) for i, s in enumerate(world.share)}
    return sample, Strata.from_pixels(pixels, 100.0), None


def simple(world: World, rng: np.random.Generator, *, post: bool) -> Drawn:
    k = len(world.share)
    p = np.tensordot(world.share, world.cells, axes=1)
    cell = rng.choice(k * k, sum(world.n), p=p.ravel())
    sample = ReferenceSample(np.zeros(cell.size), cell // k, cell % k, SampleKind.SIMPLE_RANDOM)
    sizes = {i: int(s * PIXELS) for i, s in enumerate(p.sum(axis=1))}
    return sample, WHOLE, Strata.from_pixels(sizes, 100.0) if post else None


def clusters(world: World, rng: np.random.Generator) -> Drawn:
    """60 of many clusters, 10 units in each; accuracy and class shares vary between clusters."""
    k = len(world.share)
    p = np.tensordot(world.share, world.cells, axes=1).ravel()
    m, each = 60, 10
    live = np.flatnonzero(p > 0)
    # Dirichlet shares have the mean p, so the truth stays what it is.
    drawn = np.concatenate(
        [rng.choice(live, each, p=rng.dirichlet(p[live] * 12)) for _ in range(m)]
    )
    sample = ReferenceSample(
        np.zeros(drawn.size), drawn // k, drawn % k, SampleKind.CLUSTER,
        cluster=np.repeat(np.arange(m), each), inclusion_prob=np.full(drawn.size, 1e-4),
    )  # fmt: skip
    return sample, WHOLE, None


def coverage(
    world: World, draw: Callable[..., Drawn], draws: int
) -> dict[Interval, dict[str, F64]]:
    """Share of intervals that cover, by kind, quantity and class; undefined ones are left out."""
    rng = np.random.default_rng(1)
    k = len(world.share)
    inside = {how: {q: np.zeros(len(t)) for q, t in world.truth.items()} for how in Interval}
    tried = {q: np.zeros(len(t)) for q, t in world.truth.items()}
    for _ in range(draws):
        sample, strata, post = draw(world, rng)
        for how in Interval:
            report = estimate_accuracy(
                sample, strata, classes=range(k), interval=how, post_strata=post
            )
            found = {"oa": {0: report.overall}, "ua": report.users, "pa": report.producers,
                     "area": report.area_share}  # fmt: skip
            for name, true in world.truth.items():
                for i, est in found[name].items():
                    if np.isfinite(est.value):
                        tried[name][i] += how is Interval.NORMAL
                        inside[how][name][i] += est.contains(true[i])
    return {how: {q: v / tried[q] for q, v in part.items()} for how, part in inside.items()}


def show(name: str, world: World, draw: Callable[..., Drawn], draws: int) -> None:
    for how, cells in coverage(world, draw, draws).items():
        text = "  ".join(f"{q} {100 * v.min():5.1f}-{100 * v.max():5.1f}" for q, v in cells.items())
        print(f"{name:32s} {how:7s} {text}", flush=True)


def timing(draws: int) -> None:
    rng = np.random.default_rng(3)
    k, n = 20, 10_000
    mapped = rng.integers(0, k, n)
    ref = np.where(rng.random(n) < 0.8, mapped, rng.integers(0, k, n))
    sample = ReferenceSample(mapped, mapped, ref, SampleKind.STRATIFIED_RANDOM,
                             rng.uniform(99, 101, n))  # fmt: skip
    strata = Strata.from_pixels(dict.fromkeys(range(k), 1_000_000), 100.0)
    spent = []
    for _ in range(7):
        start = time.perf_counter()
        estimate_accuracy(sample, strata, classes=range(k))
        spent.append(time.perf_counter() - start)
    print(f"10,000 units, 20 classes: {np.median(spent):.3f} s (median of 7)")
    world = WORLDS["Olofsson table 8, n = 640"]
    start = time.perf_counter()
    for _ in range(draws):
        sample, strata, _ = stratified(world, rng)
        estimate_accuracy(sample, strata, classes=range(4))
    print(f"{draws} draws of 640 units, 4 classes: {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    timing(draws)
    for name, world in WORLDS.items():
        show(name, world, stratified, draws)
    world = WORLDS["Olofsson table 8, n = 500"]
    show("simple random, n = 500", world, lambda *a: simple(*a, post=False), draws)
    show("post-stratified, n = 500", world, lambda *a: simple(*a, post=True), draws)
    show("60 clusters of 10", world, clusters, draws)


if __name__ == "__main__":
    main()
