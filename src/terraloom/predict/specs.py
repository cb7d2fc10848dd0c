"""What each product is: bands, type, scale, no data, colours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.legend import NODATA_CODE, Legend
from terraloom.plan import product_names
from terraloom.predict.encoding import (
    APPLICABILITY_NODATA,
    APPLICABILITY_SCALES,
    MOST_IN_MASK,
    PROBABILITY_CODES,
    REGRESSION_NODATA,
    SET_NODATA,
    set_dtype,
)
from terraloom.preprocess.reasons import Reason
from terraloom.uncertainty.decompose import ENTROPY_NODATA, ENTROPY_STEPS

__all__ = ["Spec", "product_specs"]


@dataclass(frozen=True)
class Spec:
    """One product.

    Attributes:
        name: Name of the product.
        dtype: Numpy type of the stored values.
        nodata: Stored value that means missing; None where every value means something.
        band_names: Names of the bands, B of them.
        scales: Value = stored x scale, per band; empty: 1.
        units: Unit of the values.
        colormap: Code to (red, green, blue, alpha).
        category_names: Name of each code from 0 on.
        overviews: Resampling of the overviews.
        largest: Largest value that can be, scale applied, where values go from 0 to it.
    """

    name: str
    dtype: str
    nodata: float | None
    band_names: tuple[str, ...]
    scales: tuple[float, ...] = ()
    units: str | None = None
    colormap: Mapping[int, tuple[int, int, int, int]] | None = None
    category_names: tuple[str, ...] = ()
    overviews: str = "average"
    largest: float | None = None

    @property
    def count(self) -> int:
        """Number of bands B."""
        return len(self.band_names)

    @property
    def outside(self) -> float:
        """Stored value of pixels outside the tiles of the AOI."""
        return int(Reason.NODATA) if self.nodata is None else self.nodata

    def options(self) -> dict[str, Any]:
        """Arguments of :func:`terraloom.io.cog_from_windows`."""
        return {
            "count": self.count, "dtype": self.dtype, "nodata": self.nodata,
            "band_names": list(self.band_names), "scales": list(self.scales) or None,
            "units": self.units, "colormap": self.colormap,
            "category_names": list(self.category_names) or None, "overviews": self.overviews,
        }  # fmt: skip


def product_specs(campaign: Campaign, legend: Legend) -> dict[str, Spec]:
    """All products of a campaign by name, in order."""
    tasks = {t.name: t for t in campaign.tasks}
    bits, bounds = campaign.products.probability_bits, campaign.uncertainty.sets
    return {n: _spec(n, tasks.get(n), legend, bits, bounds) for n in product_names(campaign)}


def _trust(name: str, n_classes: int) -> Spec:
    if name == "applicability":
        bands = ("dissimilarity", "density", "inside")
        return Spec(name, "uint16", APPLICABILITY_NODATA, bands, APPLICABILITY_SCALES,
                    overviews="nearest")  # fmt: skip
    members = ("classes",) if n_classes <= MOST_IN_MASK else ()
    return Spec(name, set_dtype(n_classes), SET_NODATA, ("size", *members), overviews="nearest")


def _spec(name: str, task: Task | None, legend: Legend, bits: int, bounds: bool) -> Spec:
    code = PROBABILITY_CODES[bits]
    if name in ("class_map", "class_map_mmu"):
        return Spec(
            name, "uint8", NODATA_CODE, ("class",), colormap=legend.colormap(),
            category_names=tuple(legend.category_names()), overviews="mode",
        )  # fmt: skip
    if name == "probabilities":
        scales = (1 / code.steps,) * len(legend)
        return Spec(name, code.dtype, code.nodata, legend.names, scales, largest=1.0)
    if name == "uncertainty":
        step = float(np.log(len(legend)) / ENTROPY_STEPS)
        kinds = ("total", "aleatoric", "epistemic")
        most = float(np.log(len(legend)))
        return Spec(name, "uint8", ENTROPY_NODATA, kinds, (step,) * 3, "nat", largest=most)
    if name in ("conformal_set", "applicability"):
        return _trust(name, len(legend))
    if name == "reasons":
        return Spec(name, "uint8", None, ("reasons",), overviews="nearest")
    if name == "image":
        return Spec(name, "uint8", 0, ("red", "green", "blue"))
    if task is not None and task.kind is TaskKind.REGRESSION:
        parts = ("mean", "sd_aleatoric", "sd_epistemic", "lower", "upper")[: 5 if bounds else 3]
        return Spec(name, "float32", REGRESSION_NODATA, parts, units=task.unit or None)
    named = ("boundary probability",)
    return Spec(name, code.dtype, code.nodata, named, (1 / code.steps,), largest=1.0)
