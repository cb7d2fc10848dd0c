"""How often conformal sets and intervals hold the truth, on blocks that did not train.

Each fold is judged with thresholds found on all other folds (cross-conformal); the thresholds of
the map are found on all folds. The networks that made the scores have not seen the labels. The
map itself averages the networks of all folds, which is rarely worse than those of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.assess.reliability import block_bootstrap
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign, Uncertainty
from terraloom.config.labels import Task
from terraloom.legend import read_legend
from terraloom.train.held_out import HeldOut
from terraloom.uncertainty.conformal import ClassSets, Interval, Method, fit_interval, fit_sets
from terraloom.uncertainty.decompose import decompose_regression
from terraloom.uncertainty.noise_aware import fit_noise_aware_sets, true_class_hits

__all__ = ["Held", "judge_coverage", "judge_intervals", "judge_sets"]

F64 = npt.NDArray[np.float64]
_RESAMPLES = 500


@dataclass(frozen=True)
class Held:
    """Where held-out pixels lie.

    Attributes:
        unit: (N,) label of each pixel.
        block: (N,) spatial block.
        fold: (N,) fold.
    """

    unit: npt.NDArray[np.int64]
    block: npt.NDArray[np.int64]
    fold: npt.NDArray[np.int64]


def judge_coverage(
    campaign: Campaign,
    chips: xr.Dataset,
    cover: HeldOut,
    p: F64,
    held: Mapping[str, HeldOut],
    noise: F64 | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sets and intervals of all tasks.

    Args:
        campaign: The campaign.
        chips: The chips, for labels and blocks.
        cover: Held-out pixels of the class map.
        p: (N, K) their calibrated probabilities, each by a calibration that has not seen it.
        held: Held-out predictions per task.
        noise: (K, K) estimated probability of a label given the true class; None: not wanted.

    Returns:
        What stands in ``conformal.json``; per task what the report shows.
    """
    rng = np.random.default_rng(campaign.seed)
    settings, task = campaign.uncertainty, campaign.land_cover
    blocks = chips["block"].to_numpy().ravel().astype(np.int64)
    labels = chips[f"label_{task.name}"].to_numpy().ravel().astype(np.int64)
    where = Held(labels[cover.index], blocks[cover.index], cover.fold.astype(np.int64))
    names = read_legend(str(task.classes)).names
    sets, shown = judge_sets(p, cover.y.astype(np.int64), where, names, settings, rng, noise)
    intervals, spans = judge_intervals(campaign, held, blocks, rng)
    record = settings.model_dump(mode="json", include={"coverage", "method", "blocks",
                                                        "label_noise"})  # fmt: skip
    return record | {"tasks": {task.name: sets, **intervals}}, {task.name: shown, **spans}


def judge_sets(
    p: F64,
    y: npt.NDArray[np.int64],
    held: Held,
    names: Sequence[str],
    settings: Uncertainty,
    rng: np.random.Generator,
    noise: F64 | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Thresholds for the map, and the coverage of sets of classes on held-out blocks.

    Args:
        p: (N, K) calibrated probabilities by networks that have not seen the labels.
        y: (N,) class of the labels.
        held: Where they lie.
        names: K classes.
        settings: The campaign's.
        rng: Source of the resamples.
        noise: (K, K) estimated probability of a label given the true class; None: sets are for
            the label as given.

    Returns:
        Record for ``conformal.json``, and what the report shows, for all methods.
    """
    shown: dict[str, Any] = {}
    for method in get_args(Method):
        inside = np.zeros(p.shape, dtype=bool)
        for f in np.unique(held.fold):
            old, here = held.fold != f, held.fold == f
            sets = _sets(p[old], y[old], held.unit[old], held.block[old], settings, method, noise)
            inside[here] = sets.contains(p[here].T).T
        hit = inside[np.arange(len(y)), y]
        size = inside.sum(axis=1)
        true = None if noise is None else true_class_hits(inside, y, noise)
        shown[method] = {
            "true_coverage": None if true is None else _mean_of_units(true, held.unit),
            **_coverage(hit, held.unit, held.block, rng),
            "mean_size": _mean_of_units(size, held.unit),
            "single_pct": 100 * _mean_of_units(size == 1, held.unit),
            "per_class": [
                {"name": name, **_of_class(hit, y == k, held, rng)} for k, name in enumerate(names)
            ],
        }
    final = _sets(p, y, held.unit, held.block, settings, settings.method, noise)
    record = {"kind": "sets", **final.record()}
    too_few = [n for n, t in zip(names, record["thresholds"], strict=True) if t is None]
    return record, {
        "target": settings.coverage, "method": settings.method, "score": settings.score,
        "unit": "label", "always_in_the_set": too_few, "methods": shown,
        "label_noise_pct": None if noise is None else 100 * float((1 - np.diag(noise)[y]).mean()),
    }  # fmt: skip


def _sets(
    p: F64, y: npt.NDArray[Any], unit: npt.NDArray[Any], block: npt.NDArray[Any],
    settings: Uncertainty, method: Method, noise: F64 | None,
) -> ClassSets:  # fmt: skip
    if noise is not None:
        return fit_noise_aware_sets(p, y, unit, block, noise, method=method,
                                    coverage=settings.coverage, score=settings.score)  # fmt: skip
    return fit_sets(p, y, unit, block, method=method, coverage=settings.coverage,
                    blocks=settings.blocks, score=settings.score)  # fmt: skip


def _of_class(
    hit: npt.NDArray[np.bool_], here: npt.NDArray[np.bool_], held: Held, rng: np.random.Generator
) -> dict[str, Any]:
    if not here.any():
        return {"coverage": None, "labels": 0}
    found = _coverage(hit[here], held.unit[here], held.block[here], rng)
    return {"coverage": found["coverage"], "labels": found["units"]}


def _mean_of_units(values: npt.NDArray[Any], unit: npt.NDArray[Any]) -> float:
    """Mean in which each unit counts once, whatever its size."""
    _, of = np.unique(unit, return_inverse=True)
    return float((np.bincount(of, values.astype(np.float64)) / np.bincount(of)).mean())


def _coverage(
    hit: npt.NDArray[np.bool_], unit: npt.NDArray[Any], block: npt.NDArray[Any],
    rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Coverage with an interval over resampled blocks, and block by block."""
    _, first, of = np.unique(unit, return_index=True, return_inverse=True)
    share = np.bincount(of, hit.astype(np.float64)) / np.bincount(of)
    where = block[first]
    blocks, at = np.unique(where, return_inverse=True)
    own = np.bincount(at, share) / np.bincount(at)
    coverage = {"value": float(share.mean()), "low": None, "high": None}
    if len(blocks) > 1:
        found = block_bootstrap(
            lambda s: float(s.mean()), [share], where, rng=rng, n_resamples=_RESAMPLES
        )
        coverage |= {"low": found.lower, "high": found.upper}
    return {
        "coverage": coverage,
        "coverage_of_pixels": float(hit.mean()),
        "units": len(share),
        "per_block": [
            {"block": int(b), "coverage": float(c), "units": int(n)}
            for b, c, n in zip(blocks, own, np.bincount(at), strict=True)
        ],
        "worst_block": float(own.min()),
    }


def judge_intervals(
    campaign: Campaign,
    held: Mapping[str, HeldOut],
    blocks: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Factors of the intervals of all regression tasks, and their coverage on held-out blocks.

    Args:
        campaign: The campaign.
        held: Held-out predictions per task.
        blocks: Block of each pixel of the flattened chips.
        rng: Source of the resamples.

    Returns:
        Per task: the record for ``conformal.json``; what the report shows.
    """
    records, shown = {}, {}
    for task in campaign.tasks:
        if task.kind is not TaskKind.REGRESSION:
            continue
        if not len(held[task.name].y):  # no label at all: anything is possible
            records[task.name] = Interval("normalised", np.inf).record()
        else:
            found = _intervals(task, held[task.name], blocks, campaign.uncertainty, rng)
            records[task.name], shown[task.name] = found
    return records, shown


def _intervals(
    task: Task, held: HeldOut, blocks: npt.NDArray[np.int64], settings: Uncertainty,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    y, block = held.y.astype(np.float64), blocks[held.index]
    kind: Any = "quantile" if held.p.shape[2] > 2 else "normalised"
    if kind == "quantile":
        low, high = held.p[..., 2].mean(axis=0), held.p[..., 3].mean(axis=0)
    else:
        parts = decompose_regression(held.p[..., 0], held.p[..., 1])
        low, high = parts.mean, parts.sd

    def fit(rows: npt.NDArray[np.bool_], method: Method) -> Interval:
        return fit_interval(y[rows], low[rows], high[rows], block[rows], kind=kind, method=method,
                            coverage=settings.coverage, blocks=settings.blocks)  # fmt: skip

    shown: dict[str, Any] = {}
    methods: tuple[Method, ...] = ("split", "block")
    for method in methods:
        bounds = np.empty((2, len(y)))
        for f in np.unique(held.fold):
            here = held.fold == f
            bounds[:, here] = fit(~here, method).bounds(low[here], high[here])
        bounds = np.clip(bounds, *(task.range or (-np.inf, np.inf)))
        hit = (y >= bounds[0]) & (y <= bounds[1])
        width = bounds[1] - bounds[0]
        shown[method] = {
            **_coverage(hit, block, block, rng),
            "mean_width": float(width.mean()) if np.isfinite(width).all() else None,
        }
    chosen: Method = "block" if settings.method == "block" else "split"
    final = fit(np.ones(len(y), dtype=bool), chosen)
    return final.record(), {
        "target": settings.coverage, "method": chosen, "kind": kind, "unit": "block",
        "of_unit": task.unit, "blocks": len(np.unique(block)), "methods": shown,
    }  # fmt: skip
