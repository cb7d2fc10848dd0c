"""What an error matrix says by itself: closed forms of Olofsson, kinds of disagreement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.assess.samples import square_counts
from terraloom.errors import DesignError

__all__ = ["Disagreement", "OlofssonEstimates", "disagreement", "olofsson"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class OlofssonEstimates:
    """Estimates where strata are map classes; arrays (K,) in matrix order, SE without fpc."""

    oa: float
    oa_se: float
    ua: F64
    ua_se: F64
    pa: F64
    pa_se: F64
    share: F64
    share_se: F64


def olofsson(matrix: ArrayLike, mapped: ArrayLike) -> OlofssonEstimates:
    """Closed forms of Olofsson et al. (2014) from a count matrix: the independent cross-check.

    Args:
        matrix: (K, K) sample counts, rows = map class = stratum, columns = reference class.
        mapped: (K,) mapped size of each class, pixels or any area unit.

    Returns:
        Proportions and standard errors, without finite population correction.

    Raises:
        DesignError: If a mapped class has fewer than two units.

    References:
        Olofsson et al. (2014), eq. 4-11; methods note section 1.1.
    """
    counts = square_counts(matrix).astype(np.float64)
    size = np.asarray(mapped, dtype=np.float64)
    row = counts.sum(axis=1)
    for i, (n, total) in enumerate(zip(row, size, strict=True)):
        if total > 0 and n < 2:
            raise DesignError(
                f"row {i} has {int(n)} unit(s)", where="error matrix", allowed="at least 2"
            )
    live = size > 0
    n = np.where(live, row, np.nan)
    w = size / size.sum()
    q = np.where(live[:, None], counts / n[:, None], 0.0)
    unit_var = np.where(live[:, None], q * (1 - q) / (n[:, None] - 1), 0.0)
    share = w @ q
    ua = np.where(live, np.diag(q), np.nan)
    ua_var = np.where(live, np.diag(unit_var), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        pa = w * np.diag(q) / share
        other = (w**2) @ unit_var - w**2 * np.diag(unit_var)
        pa_var = ((w * (1 - pa)) ** 2 * np.diag(unit_var) + pa**2 * other) / share**2
    return OlofssonEstimates(
        oa=float(w @ np.diag(q)),
        oa_se=sqrt(float(w**2 @ np.diag(unit_var))),
        ua=ua,
        ua_se=np.sqrt(ua_var),
        pa=pa,
        pa_se=np.sqrt(pa_var),
        share=share,
        share_se=np.sqrt((w**2) @ unit_var),
    )


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Shares of the domain where map and reference differ, by cause.

    Quantity and allocation sum to 1 - OA; exchange and shift sum to allocation.
    """

    quantity: float
    allocation: float
    exchange: float
    shift: float

    def to_dict(self) -> dict[str, float]:
        """JSON-able form."""
        return asdict(self)


def disagreement(matrix: F64) -> Disagreement:
    """Split 1 - OA into quantity and allocation (exchange + shift) disagreement.

    Args:
        matrix: (K, K) area-weighted shares summing to 1, never raw sample counts.

    References:
        Pontius & Millones (2011); Pontius & Santacruz (2014) for exchange and shift.
    """
    quantity = 0.5 * float(np.abs(matrix.sum(axis=0) - matrix.sum(axis=1)).sum())
    allocation = float(1.0 - np.trace(matrix)) - quantity
    pair = np.minimum(matrix, matrix.T)
    exchange = float(pair.sum() - np.trace(pair))
    return Disagreement(quantity, allocation, exchange, allocation - exchange)
