"""Regional figures against simulated truth: how many intervals hold what is really there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox

from terraloom.assess.areas import PixelAreas
from terraloom.assess.region_file import RegionSet
from terraloom.legend import NODATA_CODE, Legend
from terraloom.uncertainty.regions import Block, Window, sum_regions

__all__ = ["RegionalScores", "score_regions", "true_rows"]

#: Rounding that is no error, hectares and metres.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class RegionalScores:
    """Shares (0-1) of intervals that hold the truth; NaN where there is none.

    Attributes:
        areas: Of the areas of classes, with the spatial covariance of errors.
        areas_naive: Of the same as if pixels were independent.
        heights: Of the means of the value, with the covariance.
        heights_naive: Of the same as if pixels were independent.
    """

    areas: float = nan
    areas_naive: float = nan
    heights: float = nan
    heights_naive: float = nan


def true_rows(
    regions: RegionSet, geobox: GeoBox, legend: Legend, true_map: npt.NDArray[np.uint8],
    mapped: npt.NDArray[np.bool_], height: npt.NDArray[np.float32] | None,
) -> dict[tuple[str, str, str], float]:  # fmt: skip
    """True areas (hectares) and mean heights of the mapped part of each region.

    Args:
        regions: Regions in the CRS of the map.
        geobox: Pixels of the map, (H, W).
        legend: Classes.
        true_map: (H, W) true codes.
        mapped: (H, W) where the map has a class.
        height: (H, W) true heights, metres; None: there are none.

    Returns:
        By region, class (empty for heights) and quantity, as the rows of ``regions.json``.
    """
    codes = np.where(mapped, true_map, NODATA_CODE)
    values = np.zeros(mapped.shape, np.float32) if height is None else height
    values = np.where(mapped, values, np.float32(0))

    def read(window: Window) -> Block:
        return Block(values[window][None], mapped[window].astype(np.float32), None, codes[window])

    sums = sum_regions(
        regions.polygons, geobox, read, layers=1, codes=256, areas=PixelAreas(geobox).window
    )
    out: dict[tuple[str, str, str], float] = {}
    for name, s in zip(regions.names, sums, strict=True):
        if not s.covered:
            continue
        for code, label in zip(legend.codes, legend.names, strict=True):
            out[name, label, "area"] = float(s.counted[code]) / 1e4
        if height is not None:
            out[name, "", "mean"] = float(s.total[0]) / s.covered
    return out


def score_regions(
    rows: Sequence[Mapping[str, Any]], truth: Mapping[tuple[str, str, str], float]
) -> RegionalScores:
    """Shares of the intervals of ``regions.json`` that hold the truth.

    Args:
        rows: Its rows; those without an interval or a truth are left out.
        truth: See :func:`true_rows`.
    """

    def share(quantity: str, prefix: str) -> float:
        held = []
        for r in rows:
            true = truth.get((r["region"], r["class"], r["quantity"]))
            low, high = r[f"{prefix}low"], r[f"{prefix}high"]
            if r["quantity"] == quantity and None not in (true, low, high):
                held.append(low - _ROUNDING <= true <= high + _ROUNDING)
        return float(np.mean(held)) if held else nan

    return RegionalScores(
        share("area", ""), share("area", "independent_"),
        share("mean", ""), share("mean", "independent_"),
    )  # fmt: skip
