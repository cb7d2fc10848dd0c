"""How many sample units, and how many of them in each stratum."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import ceil, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.errors import DesignError

__all__ = [
    "ALLOC_OPTIONS", "DEFAULT_EXPECTED_UA", "Allocation", "allocate", "allocation_table",
    "anticipated_se", "sample_size", "size_for",
]  # fmt: skip

F64 = NDArray[np.float64]

#: User's accuracy assumed where none is given (the default of sits_sampling_design).
DEFAULT_EXPECTED_UA = 0.75

#: A stratum below this share of the domain counts as rare (Olofsson et al. 2014, section 5).
RARE_SHARE = 0.1

#: Units wanted in each rare stratum: SE of a user's accuracy of .8 is then about .046.
RARE_UNITS = 75

#: Units of each rare stratum in the options of the allocation table, as sits_sampling_design has.
ALLOC_OPTIONS = (100, 75, 50)


class Allocation(StrEnum):
    """How the units are divided over the strata."""

    PROPORTIONAL = "proportional"
    EQUAL = "equal"
    NEYMAN = "neyman"
    RARE = "rare"


def sample_size(weights: ArrayLike, expected_ua: ArrayLike, target_se: float) -> int:
    """Units needed for a target standard error of overall accuracy.

    Args:
        weights: (H,) area share of each stratum; scaled to sum to 1.
        expected_ua: (H,) or scalar user's accuracy conjectured for each stratum, 0-1.
        target_se: Wanted standard error of overall accuracy, 0-1.

    Returns:
        n = (sum W_h S_h / SE)^2 rounded up, S_h = sqrt(UA_h (1 - UA_h)).

    Raises:
        DesignError: If shares, accuracies or the target are out of range.

    References:
        Cochran (1977), eq. 5.25; Olofsson et al. (2014), eq. 13.
    """
    w, s = _weights_and_sd(weights, expected_ua)
    if not 0 < target_se < 1:
        raise DesignError(f"target standard error {target_se}", allowed="between 0 and 1")
    # The tolerance keeps an exact integer from being rounded up by floating point.
    return max(1, ceil((float(w @ s) / target_se) ** 2 - 1e-9))


def anticipated_se(weights: ArrayLike, expected_ua: ArrayLike, n_per_stratum: ArrayLike) -> float:
    """Standard error of overall accuracy to expect from an allocation, 0-1.

    Args:
        weights: (H,) area share of each stratum; scaled to sum to 1.
        expected_ua: (H,) or scalar conjectured user's accuracy, 0-1.
        n_per_stratum: (H,) units in each stratum, all positive.
    """
    w, s = _weights_and_sd(weights, expected_ua)
    n = np.asarray(n_per_stratum, dtype=np.float64)
    if n.shape != w.shape or (n <= 0).any():
        raise DesignError(f"units {n.tolist()} for {w.size} strata", allowed="one or more in each")
    return sqrt(float((w**2 * s**2 / n).sum()))


def allocate(
    n_pixels: Sequence[int],
    n: int,
    method: Allocation = Allocation.RARE,
    *,
    min_per_stratum: int = 2,
    expected_ua: ArrayLike = DEFAULT_EXPECTED_UA,
    rare_share: float = RARE_SHARE,
    rare_units: int = RARE_UNITS,
    areas: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Divide n units over H strata; the parts sum to n exactly.

    `rare` gives every stratum below `rare_share` a fixed number of units (fewer where that would
    take more than half of n) and divides the rest by size. A minimum per stratum is then raised
    at the cost of the others, and no stratum gets more units than it has pixels. Strata without
    pixels get none.

    Args:
        n_pixels: Pixels of each stratum.
        n: Units in all.
        method: Rule of division.
        min_per_stratum: Least units in a stratum that has as many pixels; at least 2, because one
            unit has no variance.
        expected_ua: (H,) or scalar conjectured user's accuracy, for `neyman`.
        rare_share: Share of all pixels below which a stratum is rare, for `rare`.
        rare_units: Units for each rare stratum, for `rare`.
        areas: True area of each stratum, by which units are divided; None takes the pixels.

    Returns:
        Units per stratum, in the order of `n_pixels`.

    Raises:
        DesignError: If n is too small for the minimum or larger than the population.
    """
    size = np.asarray(n_pixels, dtype=np.float64)
    if size.ndim != 1 or (size < 0).any() or size.sum() <= 0:
        raise DesignError("no stratum with pixels", where="allocation", fix="check the map")
    if min_per_stratum < 2:
        raise DesignError(f"minimum of {min_per_stratum}", where="allocation", allowed="2 or more")
    floor = np.minimum(size, min_per_stratum)
    if floor.sum() > n or n > size.sum():
        raise DesignError(
            f"{n} units for {int((size > 0).sum())} strata",
            where="allocation",
            allowed=f"{int(floor.sum())} to {int(size.sum())} with at least {min_per_stratum} each",
            fix="raise the sample size, lower the minimum, or merge classes",
        )
    weight = size if areas is None else np.asarray(areas, dtype=np.float64)
    wanted = _wanted(weight, n, Allocation(method), expected_ua, rare_share, rare_units)
    return _round_to_sum(_within_bounds(wanted, floor, size, n), floor, size, n)


def size_for(
    n_pixels: Sequence[int],
    target_se: float,
    method: Allocation,
    *,
    min_per_stratum: int = 2,
    expected_ua: ArrayLike = DEFAULT_EXPECTED_UA,
    areas: Sequence[float] | None = None,
) -> int:
    """Least n whose allocation is expected to reach a standard error of overall accuracy.

    `sample_size` is that of the best (Neyman) allocation; any other needs more units.

    Args:
        n_pixels: Pixels of each stratum.
        target_se: Wanted standard error, 0-1.
        method: Rule of division.
        min_per_stratum: Least units per stratum.
        expected_ua: (H,) or scalar conjectured user's accuracy, 0-1.
        areas: True area of each stratum; None takes the pixels.

    Raises:
        DesignError: If not even all pixels reach it.
    """
    size = np.asarray(n_pixels, dtype=np.float64)
    live = size > 0
    weight = (size if areas is None else np.asarray(areas, dtype=np.float64))[live]
    ua = np.broadcast_to(np.asarray(expected_ua, dtype=np.float64), size.shape)
    most = int(size.sum())
    low = max(
        sample_size(weight, ua[live], target_se), int(np.minimum(size, min_per_stratum).sum())
    )

    def reached(n: int) -> bool:
        units = allocate(
            n_pixels, n, method, min_per_stratum=min_per_stratum, expected_ua=ua, areas=areas
        )
        se = anticipated_se(
            weight, ua[live], [u for u, here in zip(units, live, strict=True) if here]
        )
        return se <= target_se * (1 + 1e-12)

    high = low
    while high < most and not reached(high):
        high = min(2 * high, most)
    if high > most or not reached(high):
        raise DesignError(
            f"not even all {most} pixels reach a standard error of {target_se:g}",
            where="sample.target_se", fix="raise it",
        )  # fmt: skip
    while low < high:
        mid = (low + high) // 2
        low, high = (low, mid) if reached(mid) else (mid + 1, high)
    return low


def allocation_table(
    n_pixels: Sequence[int],
    n: int,
    *,
    expected_ua: ArrayLike = DEFAULT_EXPECTED_UA,
    areas: Sequence[float] | None = None,
    min_per_stratum: int = 2,
) -> dict[str, list[float | None]]:
    """What n units would be under every allocation, and the error to expect of each.

    Args:
        n_pixels: Pixels of each stratum.
        n: Units in all.
        expected_ua: (H,) or scalar conjectured user's accuracy, 0-1.
        areas: True area of each stratum; None takes the pixels.
        min_per_stratum: Least units per stratum of `rare`; the other columns show the rules bare.

    Returns:
        Columns of H + 1 values: `expected_ua`, `std_dev`, `share`, then units by allocation:
        `equal`, `proportional`, `neyman`, `rare`, `alloc_100`, `alloc_75`, `alloc_50` (that many
        for each stratum below a tenth of the domain). The last value of these is the
        anticipated standard error of overall accuracy; a column that n does not allow is None.

    References:
        Olofsson et al. (2014), table 5; the columns are those of sits_sampling_design.
    """
    size = np.asarray(n_pixels, dtype=np.float64)
    live = size > 0
    weight = size if areas is None else np.asarray(areas, dtype=np.float64)
    ua = np.broadcast_to(np.asarray(expected_ua, dtype=np.float64), size.shape)
    share, sd = _weights_and_sd(weight, ua)
    columns: dict[str, list[float | None]] = {
        "expected_ua": [*ua.tolist(), None], "std_dev": [*sd.tolist(), None],
        "share": [*share.tolist(), None],
    }  # fmt: skip
    options: dict[str, tuple[Allocation, int, int]] = {
        "equal": (Allocation.EQUAL, 2, RARE_UNITS),
        "proportional": (Allocation.PROPORTIONAL, 2, RARE_UNITS),
        "neyman": (Allocation.NEYMAN, 2, RARE_UNITS),
        "rare": (Allocation.RARE, min_per_stratum, RARE_UNITS),
        **{f"alloc_{k}": (Allocation.RARE, 2, k) for k in ALLOC_OPTIONS},
    }
    rare = int((live & (share < RARE_SHARE)).sum())
    for name, (method, least, units) in options.items():
        fits = not name.startswith("alloc") or 0 < rare * units <= n / 2
        try:
            if not fits:
                raise DesignError(f"{rare} rare strata of {units} units", where=name)
            found = allocate(
                n_pixels, n, method, min_per_stratum=least, expected_ua=ua, areas=areas,
                rare_units=units,
            )  # fmt: skip
        except DesignError:
            columns[name] = [None] * (size.size + 1)
            continue
        se = anticipated_se(weight[live], ua[live], np.asarray(found)[live])
        columns[name] = [*found, se]
    return columns


def _wanted(
    area: F64, n: int, method: Allocation, expected_ua: ArrayLike, rare_share: float, rare: int
) -> F64:
    """Unbounded real-valued units per stratum; sums to n."""
    live = area > 0
    if method is Allocation.EQUAL:
        return np.asarray(n * live / live.sum(), dtype=np.float64)
    weights = area / area.sum()
    if method is Allocation.NEYMAN:
        _, s = _weights_and_sd(weights, expected_ua)
        if not (weights * s).sum() > 0:
            raise DesignError("expected accuracies of 0 or 1 only", where="Neyman allocation")
        return np.asarray(n * weights * s / (weights * s).sum(), dtype=np.float64)
    if method is Allocation.RARE:
        small = live & (weights < rare_share)
        if small.any() and not small[live].all():
            # Rare strata never take more than half: the large ones carry the area.
            each = min(float(rare), n / 2 / small.sum())
            fixed = np.where(small, np.maximum(each, n * weights), 0.0)
            rest = np.where(small, 0.0, weights)
            return np.asarray(fixed + (n - fixed.sum()) * rest / rest.sum(), dtype=np.float64)
    return np.asarray(n * weights, dtype=np.float64)


def _within_bounds(wanted: F64, floor: F64, cap: F64, n: int) -> F64:
    """Scale the strata that are free so that floor <= x <= cap and the sum is n.

    The sum of clip(t * wanted, floor, cap) grows with t from sum(floor) to sum(cap); bisection
    finds the t that gives n.
    """
    positive = np.where(cap > 0, np.maximum(wanted, 1e-9), 0.0)
    low, high = 0.0, 1.0
    while np.clip(high * positive, floor, cap).sum() < n:
        high *= 2
    for _ in range(200):
        mid = (low + high) / 2
        if np.clip(mid * positive, floor, cap).sum() < n:
            low = mid
        else:
            high = mid
    return np.clip(high * positive, floor, cap)


def _round_to_sum(x: F64, floor: F64, cap: F64, n: int) -> tuple[int, ...]:
    """Largest-remainder rounding to the sum n inside the bounds; ties go to the first stratum."""
    base = np.clip(np.floor(x + 1e-6), floor, cap)
    order = np.argsort(-(x - base), kind="stable")
    short = n - int(base.sum())
    while short != 0:
        step = 1 if short > 0 else -1
        for i in order if step > 0 else order[::-1]:
            if short and floor[i] <= base[i] + step <= cap[i]:
                base[i] += step
                short -= step
    return tuple(int(v) for v in base)


def _weights_and_sd(weights: ArrayLike, expected_ua: ArrayLike) -> tuple[F64, F64]:
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise DesignError(f"stratum shares {w.tolist()}", allowed="non-negative, not all zero")
    ua = np.asarray(expected_ua, dtype=np.float64)
    if ua.shape not in ((), w.shape) or not ((ua >= 0) & (ua <= 1)).all():
        raise DesignError(
            f"expected user's accuracies {ua.tolist()}",
            allowed=f"one value or {w.size} values, 0-1",
        )
    return w / w.sum(), np.broadcast_to(np.sqrt(ua * (1 - ua)), w.shape)
