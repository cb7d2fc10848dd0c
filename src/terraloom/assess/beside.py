"""What stands beside the design-based areas: the model-assisted ones, and accuracy of values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray

from terraloom.assess.assisted import assisted_record, map_means
from terraloom.assess.continuous import value_accuracy
from terraloom.assess.samples import ReferenceSample, Strata
from terraloom.assess.survey import Survey
from terraloom.errors import DesignError
from terraloom.plan import product_path

__all__ = ["assisted_block", "values_block"]

F64 = NDArray[np.float64]


def assisted_block(
    folder: Path,
    sample: ReferenceSample,
    points: gpd.GeoDataFrame,
    strata: Strata,
    classes: Strata,
    post_strata: Strata | None,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Block `assisted` of ``accuracy.json``; with only `why_not` where it cannot be made.

    Args:
        folder: Where the class map and the probabilities are.
        sample: The interpreted units, in the order of `points`.
        points: Units with `row` and `col`.
        strata: Known stratum sizes.
        classes: Known sizes of the map classes in the sampled domain.
        post_strata: As in `estimate_accuracy`.
        names: Class names by code.
    """
    file = product_path("probabilities", folder)
    if not file.exists():
        return {"why_not": "the map has no probabilities"}
    means = map_means(
        product_path("class_map", folder),
        file,
        points["row"].to_numpy(),
        points["col"].to_numpy(),
    )
    if means is None:
        return {"why_not": "some mapped pixels have no probability"}
    known = {c: n for c, n in zip(classes.codes, classes.n_pixels, strict=True) if n}
    if means.n_pixels != known:
        return {"why_not": "the sampled domain is not the whole map"}
    if len(names) != means.mean.size:
        raise DesignError(
            f"{means.mean.size} bands of probability, {len(names)} classes", where=str(file),
            allowed="one band per class of the legend",
        )  # fmt: skip
    return assisted_record(sample, strata, means, names, post_strata)


def values_block(
    map_file: Path,
    truth_file: Path,
    sample: ReferenceSample,
    points: gpd.GeoDataFrame,
    strata: Strata,
    post_strata: Strata | None,
    unit: str | None,
) -> dict[str, Any]:
    """Accuracy of a map of values at the units; only `why_not` where a unit has no value.

    Leaving units out would change what the rest stand for.
    """
    mapped, true = _values(map_file, points), _values(truth_file, points)
    ok = np.isfinite(mapped) & np.isfinite(true)
    if not ok.all():
        return {"why_not": f"{int((~ok).sum())} of {ok.size} units have no value", "unit": unit}
    found = value_accuracy(mapped, true, Survey.of(sample, strata, post_strata=post_strata))
    return {"unit": unit, **found.to_dict()}


def _values(file: Path, points: gpd.GeoDataFrame) -> F64:
    """First band at the points, NaN where there is no value."""
    with rasterio.open(file) as src:
        xy = np.column_stack([points.geometry.x, points.geometry.y])
        out = np.array([v[0] for v in src.sample(xy, indexes=1)], dtype=np.float64)
        return np.where(out == src.nodata, np.nan, out) if src.nodata is not None else out
