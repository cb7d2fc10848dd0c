"""Balanced dealing: whole units (blocks, regions, years) to folds, alike in all their strata.

First every stratum is present in as many folds as possible, then each fold holds a like share of
each stratum. The search is greedy from random orders; the best one is improved by single moves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from terraloom.errors import FoldError

__all__ = ["deal", "score", "shares"]

#: Work of the search: units x restarts.
_SEARCH_STEPS = 8_000

Counts = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def shares(weight: Counts, folds: Ints, count: int) -> Counts:
    """Share of each stratum's total that lies in each fold, (count, strata)."""
    share = np.zeros((count, weight.shape[1]))
    np.add.at(share, folds, weight)
    total: Counts = share / np.maximum(weight.sum(axis=0), 1e-12)
    return total


def deal(weight: Counts, count: int, rng: np.random.Generator) -> Ints:
    """Fold of each unit: greedy from random orders, the best one improved by moves.

    Args:
        weight: (U, strata) amount of each stratum in each unit, such as square metres; >= 0.
        count: Number of folds.
        rng: Source of the orders.

    Returns:
        (U,) fold 0 .. count-1.
    """
    share = weight / np.maximum(weight.sum(axis=0), 1e-12)
    n = len(share)
    best: tuple[tuple[int, float], Ints] | None = None
    for _ in range(int(np.clip(_SEARCH_STEPS // n, 2, 200))):
        folds = _greedy(share, rng.permutation(n), count)
        now = score(shares(share, folds, count))
        if best is None or now < best[0]:
            best = now, folds
    if best is None:  # pragma: no cover - the loop runs at least twice
        raise FoldError("no unit to deal", where="folds")
    return _improve(share, best[1], count, rng)


def _greedy(share: Counts, order: Ints, count: int) -> Ints:
    sums = np.zeros((count, share.shape[1]))
    folds = np.zeros(len(share), dtype=np.int64)
    for b in order:
        # Growth of the sum of squares: small where the fold still lacks the unit's strata.
        k = int(np.argmin((2 * sums * share[b]).sum(axis=1)))
        folds[b] = k
        sums[k] += share[b]
    return folds


def score(sums: Counts) -> tuple[int, float]:
    """Pairs of fold and stratum without a label (an empty fold counts more), and imbalance."""
    present = sums.sum(axis=0) > 0
    missing = (sums[:, present] <= 0).sum() + 1000 * (sums.sum(axis=1) <= 0).sum()
    # A stratum in one fold only cannot be learnt while that fold is held out.
    alone = ((sums[:, present] > 0).sum(axis=0) == 1).sum()
    imbalance = ((sums[:, present] - 1 / len(sums)) ** 2).sum()
    return int(missing + 100 * alone), float(imbalance)


def _improve(share: Counts, folds: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Move single units between folds while that improves the score."""
    folds = folds.copy()
    sums = shares(share, folds, count)
    best = score(sums)
    for _ in range(int(np.clip(_SEARCH_STEPS // (len(folds) * count), 1, 20))):
        moved = False
        for b in rng.permutation(len(folds)):
            for k in range(count):
                trial = sums.copy()
                trial[folds[b]] -= share[b]
                trial[k] += share[b]
                # Differences of floats leave dust where a fold has lost its last unit.
                trial[np.abs(trial) < 1e-12] = 0
                new = score(trial)
                if k != folds[b] and new < best:
                    folds[b], sums, best, moved = k, trial, new, True
        if not moved:
            break
    return folds
