"""Accuracy of a map of values, such as heights, from a probability sample."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log, nan, sqrt
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray

from terraloom.assess.intervals import Estimate, critical_value
from terraloom.assess.samples import ReferenceSample, Strata
from terraloom.assess.survey import Survey
from terraloom.errors import DesignError

__all__ = ["ValueAccuracy", "value_accuracy", "values_at", "values_block"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ValueAccuracy:
    """How far mapped values are from those of the reference, over the domain.

    Attributes:
        bias: Mean of map less reference, in the unit of the values.
        mae: Mean absolute difference.
        rmse: Root of the mean squared difference.
        r2: 1 - mean squared difference / variance of the reference; at most 1, and negative where
            the reference's mean would be the better map.
        n: Units.
    """

    bias: Estimate
    mae: Estimate
    rmse: Estimate
    r2: Estimate
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, NaN as null."""
        names = ("bias", "mae", "rmse", "r2")
        return {"n": self.n, **{name: getattr(self, name).to_dict() for name in names}}


def value_accuracy(
    mapped: F64, reference: F64, survey: Survey, *, level: float = 0.95
) -> ValueAccuracy:
    """Bias, MAE, RMSE and R2 with design weights, by Taylor linearisation.

    RMSE has the variance of the mean squared error divided by 4 RMSE^2; R2 that of the linear
    combination (e^2 - (1 - R2) (y - ybar)^2) / S^2. The intervals of MAE, RMSE and 1 - R2, which
    cannot be negative, are symmetric in their logarithms.

    Args:
        mapped: (N,) values of the map at the units.
        reference: (N,) values found there, in the same unit.
        survey: The design of these N units.
        level: Confidence level, 0-1 exclusive.

    Raises:
        DesignError: If lengths differ or a value is not finite.
    """
    both = np.column_stack([mapped, reference]).astype(np.float64)
    if len(both) != len(survey.weight) or not np.isfinite(both).all():
        raise DesignError(
            f"{len(both)} pairs of values for {len(survey.weight)} units, "
            f"{int((~np.isfinite(both)).any(axis=1).sum())} of them not finite",
            where="accuracy of values", allowed="a finite pair for each unit",
        )  # fmt: skip
    z = critical_value(level, survey)
    error, y = both[:, 0] - both[:, 1], both[:, 1]
    centred = y - float(survey.weight @ y)
    columns = np.column_stack([error, np.abs(error), error**2, centred**2])
    found = survey.summarise(columns)
    bias, mae, mse, spread = found.mean.tolist()
    se = np.sqrt(found.variance)
    rmse = sqrt(mse)
    miss = mse / spread if spread > 0 else nan
    scores = found.scores[:, 2] - miss * found.scores[:, 3]
    miss_se = float(np.sqrt((scores**2).sum())) / spread if spread > 0 else nan
    half = z * float(se[0])
    left = _positive(miss, miss_se, z)
    return ValueAccuracy(
        bias=Estimate(bias, float(se[0]), bias - half, bias + half, half),
        mae=_positive(mae, float(se[1]), z),
        rmse=_positive(rmse, float(se[2]) / (2 * rmse) if rmse > 0 else 0.0, z),
        r2=Estimate(1 - miss, miss_se, 1 - left.upper, 1 - left.lower, z * miss_se),
        n=len(both),
    )


def _positive(value: float, se: float, z: float) -> Estimate:
    """Interval that is symmetric in the logarithm."""
    if not value > 0:
        return Estimate(value, se, value, value if se == 0 else inf, z * se)
    factor = exp(z * se / value)
    return Estimate(value, se, exp(log(value)) / factor, value * factor, z * se)


def values_block(
    map_file: Path,
    reference: F64,
    sample: ReferenceSample,
    points: gpd.GeoDataFrame,
    strata: Strata,
    post_strata: Strata | None,
    unit: str | None,
) -> dict[str, Any]:
    """Accuracy of a map of values at the units; only `why_not` where a unit has no value.

    Leaving units out would change what the rest stand for.

    Args:
        map_file: The map of values.
        reference: (N,) value found at each unit, NaN where there is none.
        sample: The N units.
        points: The same, with their places.
        strata: Sizes of the strata.
        post_strata: Of the post-strata.
        unit: Unit of the values.
    """
    mapped = values_at(map_file, points)
    ok = np.isfinite(mapped) & np.isfinite(reference)
    if not ok.all():
        return {"why_not": f"{int((~ok).sum())} of {ok.size} units have no value", "unit": unit}
    found = value_accuracy(mapped, reference, Survey.of(sample, strata, post_strata=post_strata))
    return {"unit": unit, **found.to_dict()}


def values_at(file: Path, points: gpd.GeoDataFrame) -> F64:
    """First band at the points, NaN where there is no value."""
    with rasterio.open(file) as src:
        xy = np.column_stack([points.geometry.x, points.geometry.y])
        out = np.array([v[0] for v in src.sample(xy, indexes=1)], dtype=np.float64)
        return np.where(out == src.nodata, np.nan, out) if src.nodata is not None else out
