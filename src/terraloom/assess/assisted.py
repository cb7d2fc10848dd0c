"""Model-assisted areas: the map's probabilities as a helper of the sample.

The mean of a probability over the whole map is known without sampling error; only how far it is
off must be learned from the sample. With lambda = 1 this is the difference estimator, which is
prediction-powered inference for a mean; with lambda estimated, the power-tuned form (PPI++), a
regression estimator of one coefficient. The estimate is unbiased whatever the model is worth, as
long as the model was not fitted to the answers of this sample: then its probabilities are closer
to the answers at the sampled pixels than elsewhere, and the correction is too small. A model
fitted to them needs probabilities cross-fitted by sample fold, which is not done here.

References:
    Särndal, Swensson & Wretman (1992), Model Assisted Survey Sampling, ch. 6.
    Angelopoulos et al. (2023), Science 382: prediction-powered inference.
    Angelopoulos, Duchi & Zrnic (2023), PPI++, arXiv 2311.01453.
    McConville, Moisen & Frescino (2020), Forests 11, for forest area.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window

from terraloom.assess.areas import PixelAreas
from terraloom.assess.estimators import M2_PER_HA, class_indicators, survey_of
from terraloom.assess.intervals import Estimate, critical_value, wilson_estimate
from terraloom.assess.samples import ReferenceSample, Strata
from terraloom.assess.survey import Survey
from terraloom.errors import DesignError
from terraloom.io import geobox_of
from terraloom.plan import product_path

__all__ = [
    "Assisted", "MapMeans", "assisted_areas", "assisted_block", "difference_means", "map_means",
]  # fmt: skip

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Side of the windows in which the rasters are read: 8 classes take 32 MiB.
_WINDOW_PX = 1024
#: Least standard error at which a gain is stated: below it both errors are rounding.
_NO_ERROR = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Assisted:
    """Means of V variables with the help of predictions.

    Attributes:
        value: (V,) estimates.
        se: (V,) standard errors.
        plain_se: (V,) those of the sample alone.
        tuning: lambda, how much of the prediction is used; 0 is the sample alone.
    """

    value: F64
    se: F64
    plain_se: F64
    tuning: float

    @property
    def gain(self) -> F64:
        """(V,) how many times as many units the sample alone would need; NaN where sure."""
        sure = self.se > _NO_ERROR
        out = np.full(self.se.shape, np.nan)
        return np.asarray(np.divide(self.plain_se**2, self.se**2, out=out, where=sure))

    @property
    def overall_gain(self) -> float:
        """The same for the sum of the variances of all variables."""
        total = float((self.se**2).sum())
        return float((self.plain_se**2).sum()) / total if total > 0 else float("nan")


def difference_means(
    survey: Survey,
    y: F64,
    f: F64,
    f_mean: F64,
    *,
    tuning: float | None = None,
    f_variance: F64 | None = None,
) -> Assisted:
    """Means of y with predictions f as helpers.

    Estimate lambda F + mean(y - lambda f), F being the mean of f over the domain. One lambda for
    all variables, so that shares still sum to 1.

    Args:
        survey: The design; its means are those of the sample alone.
        y: (N, V) what was found at the units.
        f: (N, V) what was predicted there.
        f_mean: (V,) mean of the predictions over the domain.
        tuning: lambda; None takes the one with the least total variance, kept within 0-1.
        f_variance: (V,) variance of `f_mean`, where it was not taken over the whole domain.

    Raises:
        DesignError: If the shapes do not fit, or a prediction is not finite.
    """
    if y.shape != f.shape or f_mean.shape != y.shape[1:] or not np.isfinite(f).all():
        raise DesignError(
            f"answers {y.shape}, predictions {f.shape}, means {f_mean.shape}",
            where="model-assisted estimate", allowed="(N, V) twice and (V,), finite",
        )  # fmt: skip
    own, helper = survey.scores(y), survey.scores(f)
    extra = np.zeros(f_mean.shape) if f_variance is None else f_variance
    lam = tuning
    if lam is None:
        bottom = float((helper**2).sum() + extra.sum())
        lam = (
            float(np.clip((own * helper).sum() / bottom, 0.0, 1.0))
            if bottom > _NO_ERROR**2
            else 0.0
        )
    value = lam * f_mean + survey.weight @ (y - lam * f)
    variance = ((own - lam * helper) ** 2).sum(axis=0) + lam**2 * extra
    return Assisted(value, np.sqrt(variance), np.sqrt((own**2).sum(axis=0)), lam)


def assisted_areas(
    sample: ReferenceSample,
    strata: Strata,
    at_units: F64,
    map_mean: F64,
    *,
    classes: Sequence[int],
    level: float = 0.95,
    post_strata: Strata | None = None,
) -> tuple[dict[int, Estimate], Assisted]:
    """Hectares by class with the map's class probabilities as helpers.

    Args:
        sample: The interpreted units.
        strata: Known stratum sizes.
        at_units: (N, K) class probabilities of the map at the units.
        map_mean: (K,) their area-weighted means over the sampled domain.
        classes: K class codes.
        level: Confidence level, 0-1 exclusive.
        post_strata: As in `estimate_accuracy`.

    Returns:
        Hectares by class, with Wilson intervals at the effective sample size; and the shares.
    """
    survey = survey_of(sample, strata, post_strata=post_strata)
    y = class_indicators(sample.reference_class, classes, "reference class")
    found = difference_means(survey, y, at_units, map_mean)
    z = critical_value(level, survey)
    total = strata.total_area_m2 / M2_PER_HA
    areas = {
        int(code): wilson_estimate(float(v), float(s), z).scaled(total)
        for code, v, s in zip(classes, found.value, found.se, strict=True)
    }
    return areas, found


@dataclass(frozen=True, slots=True, eq=False)
class MapMeans:
    """Class probabilities of the map at the units and on average.

    Attributes:
        at_units: (N, K) at the units; each row sums to 1.
        mean: (K,) area-weighted mean over the pixels with a class.
        n_pixels: Pixels by map class.
    """

    at_units: F64
    mean: F64
    n_pixels: dict[int, int]


def map_means(class_map: Path, probabilities: Path, row: I64, col: I64) -> MapMeans | None:
    """Read what the model-assisted estimate needs, window by window.

    Probabilities are taken relative to their sum in each pixel, so their scale does not matter.

    Args:
        class_map: Raster of class codes.
        probabilities: Raster with one band per class, on the same pixels.
        row: (N,) rows of the units.
        col: (N,) columns of the units.

    Returns:
        The means; None where a pixel has a class and no probability.
    """
    geobox = geobox_of(class_map)
    areas = PixelAreas(geobox)
    height, width = geobox.shape
    counts: dict[int, int] = {}
    with rasterio.open(class_map) as codes, rasterio.open(probabilities) as prob:
        if prob.shape != codes.shape:
            raise DesignError(
                f"probabilities of {prob.shape} px, map of {codes.shape} px",
                where=str(probabilities), allowed="the same pixels",
            )  # fmt: skip
        k = prob.count
        at_units, total, domain = np.full((row.size, k), np.nan), np.zeros(k), 0.0
        for r in range(0, height, _WINDOW_PX):
            for c in range(0, width, _WINDOW_PX):
                rows = slice(r, min(r + _WINDOW_PX, height))
                cols = slice(c, min(c + _WINDOW_PX, width))
                window = Window(c, r, cols.stop - c, rows.stop - r)
                code = codes.read(1, window=window)
                p = prob.read(window=window)
                valid = code != codes.nodata
                missing = (p == prob.nodata).any(axis=0)
                share = p.astype(np.float64)
                sums = share.sum(axis=0)
                if (valid & (missing | (sums <= 0))).any():
                    return None
                share /= np.where(sums > 0, sums, 1.0)
                area = areas.window(rows, cols) * valid
                total += np.einsum("khw,hw->k", share, area)
                domain += float(area.sum())
                for value, n in zip(*np.unique(code[valid], return_counts=True), strict=True):
                    counts[int(value)] = counts.get(int(value), 0) + int(n)
                here = np.flatnonzero((row >= r) & (row < rows.stop) & (col >= c)
                                      & (col < cols.stop))  # fmt: skip
                at_units[here] = share[:, row[here] - r, col[here] - c].T
    return MapMeans(at_units, total / domain, counts)


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


def assisted_record(
    sample: ReferenceSample,
    strata: Strata,
    means: MapMeans,
    names: Mapping[int, str],
    post_strata: Strata | None,
) -> dict[str, Any]:
    """The block `assisted` of ``accuracy.json``."""
    areas, found = assisted_areas(
        sample, strata, means.at_units, means.mean, classes=list(names), post_strata=post_strata
    )
    n = sample.stratum.size
    gains = dict(zip(names, found.gain, strict=True))
    return {
        "method": "difference estimator with class probabilities, power-tuned (PPI++)",
        "tuning": found.tuning,
        "gain": _known(found.overall_gain),
        "effective_units": _known(n * found.overall_gain),
        "classes": [
            {
                "code": code, "name": names[code], "area_ha": est.value, "area_se_ha": est.se,
                "low_ha": est.lower, "high_ha": est.upper, "gain": _known(gains[code]),
            }
            for code, est in areas.items()
        ],
    }  # fmt: skip


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
