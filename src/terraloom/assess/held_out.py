"""Calibration and skill of the ensemble on blocks that did not train.

These figures say how good the model is on labels it has not seen. They are not the accuracy of
the map: the labels are no probability sample.
"""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.assess.reliability import (
    SkillReport,
    confusion_matrix,
    skill_from_matrix,
    skill_report,
)
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid, geobox_from_record
from terraloom.io import read_json, read_store, write_json, write_text
from terraloom.labels.chips import cut_chips
from terraloom.labels.noise import noise_matrix, suspect_labels
from terraloom.labels.rasterise import NO_LABEL, burn
from terraloom.legend import Legend, read_legend
from terraloom.log import get_logger
from terraloom.models.heads import TaskSpec
from terraloom.preprocess.cube import build_tile
from terraloom.preprocess.scenes import gather_scenes
from terraloom.train.baseline import pixel_forest
from terraloom.train.calibrate import Reliability, reliability
from terraloom.train.ensemble import averaged, cross_fitted_average, fit_ensemble_temperature
from terraloom.train.fit import HeldOut, load_member, predict_held_out
from terraloom.train.run import CHIPS, MODEL, member_files, task_specs

__all__ = ["calibrate", "fit_baseline"]

#: Equal-width confidence bins of the reliability curve and of the calibration error.
BINS = 15
#: A boundary pixel is one whose target (1 on the outline, falling with distance) is above this.
EDGE_TARGET = 0.5

log = get_logger(__name__)


def calibrate(campaign: Campaign) -> None:
    """Fit the temperature, score the held-out blocks, list suspect labels."""
    torch.set_num_threads(1)
    chips = read_store(CHIPS).load()
    held = _held_out(campaign, chips)
    task = campaign.land_cover
    legend = read_legend(str(task.classes))
    cover = held[task.name]
    y = cover.y.astype(np.int64)
    review = _review(campaign, chips, cover, len(legend))
    noise = review.noise if campaign.model.label_noise == "estimated" else None
    temperature = fit_ensemble_temperature(cover.p, y, noise)
    honest = cross_fitted_average(cover.p, y, cover.fold, noise)
    # What the labels should show of it: with label noise, less than the true class would.
    seen = honest if noise is None else honest @ noise
    curve = reliability(seen, y, n_bins=BINS)
    raw = cover.p.mean(axis=0)
    block = chips["block"].to_numpy().ravel()[cover.index]
    skill = skill_report(
        y, honest.argmax(axis=1), block, range(len(legend)),
        rng=np.random.default_rng(campaign.seed),
    )  # fmt: skip
    baseline = read_json(MODEL / "baseline.json") if campaign.model.baseline else None
    record = {
        "classes": list(legend.names),
        "confusion": skill.matrix.tolist(),
        "overall": {k: _interval(skill.overall[k]) for k in ("oa", "macro_f1")},
        "per_class": _per_class(skill, legend),
        "ece_before": reliability(raw, y, n_bins=BINS).error(),
        "ece_after": curve.error(),
        "temperature": temperature,
        "n_bins": BINS,
        "n_pixels": len(y),
        "n_blocks": skill.n_blocks,
        "baseline": baseline,
        "regression": _regressions(campaign, held),
        "boundary": _boundaries(campaign, held),
        "label_noise": campaign.model.label_noise,
        "label_noise_pct": 100 * float(review.flags.mean()),
        "suspects": review.suspects(legend),
    }
    write_json(MODEL / "held_out.json", record)
    write_text(MODEL / "reliability.csv", _csv(_curve(curve)))
    write_text(MODEL / "history.csv", _history(campaign))
    write_json(MODEL / "metrics.json", _metrics(record))
    write_json(MODEL / "calibration.json", {"temperature": temperature, "n_pixels": len(y)})
    _say(record)


def _held_out(campaign: Campaign, chips: xr.Dataset) -> dict[str, HeldOut]:
    parts: dict[str, list[HeldOut]] = {t.name: [] for t in campaign.tasks}
    for fold in range(campaign.folds.count):
        files = member_files(fold)
        if len(files) != campaign.model.members:
            raise StateError(
                f"{len(files)} members, {campaign.model.members} are configured",
                where=f"results/model/fold-{fold}", fix="run target `model` again",
            )  # fmt: skip
        members = [load_member(f)[0] for f in files]
        for name, held in predict_held_out(chips, members, fold).items():
            parts[name].append(held)
    return {name: HeldOut.join(p) for name, p in parts.items()}


def _interval(estimate: Any) -> dict[str, Any]:
    record = estimate.to_dict()
    return {"value": record["value"], "low": record["lower"], "high": record["upper"]}


def _per_class(skill: SkillReport, legend: Legend) -> list[dict[str, Any]]:
    pixels = skill.matrix.sum(axis=1)
    return [
        {
            "name": name,
            "pixels": int(pixels[k]),
            **{m: _interval(skill.per_class[k][m]) for m in ("precision", "recall", "f1")},
        }
        for k, name in enumerate(legend.names)
    ]


def _regressions(campaign: Campaign, held: dict[str, HeldOut]) -> dict[str, Any]:
    out = {}
    for task in campaign.tasks:
        if task.kind is not TaskKind.REGRESSION:
            continue
        y = held[task.name].y.astype(np.float64)
        error = held[task.name].p[..., 0].mean(axis=0) - y
        spread = float(((y - y.mean()) ** 2).sum())
        out[task.name] = {
            "rmse": float(np.sqrt((error**2).mean())),
            "bias": float(error.mean()),
            "r2": 1 - float((error**2).sum()) / spread if spread > 0 else None,
            "unit": task.unit,
            "pixels": len(y),
        }
    return out


def _boundaries(campaign: Campaign, held: dict[str, HeldOut]) -> dict[str, Any]:
    out = {}
    for task in campaign.tasks:
        if task.kind is not TaskKind.BOUNDARY:
            continue
        true = held[task.name].y.astype(np.float64) > EDGE_TARGET
        p = held[task.name].p[..., 0].mean(axis=0)
        # The head learns a soft edge, so the best cut is not known beforehand; it is reported.
        cuts = np.linspace(0.1, 0.9, 17)
        scores = [_f1(p > c, true) for c in cuts]
        best = int(np.argmax(scores))
        out[task.name] = {"f1": scores[best], "cut": float(cuts[best]), "pixels": len(true),
                          "edge_share": float(true.mean())}  # fmt: skip
    return out


def _f1(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    both = int((found & true).sum())
    total = int(found.sum()) + int(true.sum())
    return 2 * both / total if total else float("nan")


@dataclass(frozen=True)
class _Review:
    """Labels held against the held-out predictions of their pixels.

    Attributes:
        ids: (L,) row of the label file.
        label: (L,) class index of the label.
        likely: (L,) class that the predictions support.
        mean: (L, K) mean held-out probability over the label's pixels.
        flags: (L,) label and support differ.
        noise: (K, K) estimated probability of a label given the true class.
    """

    ids: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    likely: npt.NDArray[np.intp]
    mean: npt.NDArray[np.float64]
    flags: npt.NDArray[np.bool_]
    noise: npt.NDArray[np.float64]

    def suspects(self, legend: Legend) -> list[dict[str, Any]]:
        """Labels that are probably wrong, for people to look at."""
        return [
            {
                "label_id": int(self.ids[i]), "class": legend.names[self.label[i]],
                "likely": legend.names[self.likely[i]],
                "p_class": float(self.mean[i, self.label[i]]),
                "p_likely": float(self.mean[i, self.likely[i]]),
            }
            for i in np.flatnonzero(self.flags)
        ]  # fmt: skip


def _review(campaign: Campaign, chips: xr.Dataset, cover: HeldOut, classes: int) -> _Review:
    which = _label_of_pixels(campaign.land_cover, chips)[cover.index]
    p = averaged(cover.p, 1.0)
    inside = which >= 0
    ids, where = np.unique(which[inside], return_inverse=True)
    count = np.bincount(where, minlength=len(ids))
    mean = np.stack(
        [np.bincount(where, p[inside, k], minlength=len(ids)) / count for k in range(classes)],
        axis=1,
    )
    label = np.zeros(len(ids), np.int64)
    label[where] = cover.y[inside].astype(np.int64)
    flags, likely = suspect_labels(mean, label)
    return _Review(ids, label, likely, mean, flags, noise_matrix(label, likely, classes))


def _label_of_pixels(task: Task, chips: xr.Dataset) -> npt.NDArray[np.int64]:
    """Row of the label file of each chip pixel (flattened N, h, w); -1 for none."""
    labels = gpd.read_file(CHIPS.with_name("folds.gpkg"), layer="labels")
    grid = geobox_from_record(chips.attrs)
    labels = labels[labels["task"] == task.name].set_crs(str(grid.crs), allow_override=True)
    mine = labels.reset_index(drop=True)
    ids = mine["label_id"].to_numpy()
    size = int(chips.attrs["size_px"])
    out = []
    for row, col in zip(chips["row"].to_numpy(), chips["col"].to_numpy(), strict=True):
        window = grid[0:size, 0:size].translate_pix(int(col), int(row))
        burned = burn(mine, window, kind=task.kind, erode_m=task.labels.erode_m)
        found = burned.label != NO_LABEL
        out.append(np.where(found, ids[np.where(found, burned.label, 0)], -1))
    return np.stack(out).ravel().astype(np.int64)


def _curve(table: Reliability) -> list[dict[str, Any]]:
    rows = zip(table.confidence, table.accuracy, table.count, strict=True)
    return [{"confidence": c, "accuracy": a, "count": int(n)} for c, a, n in rows if n]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _history(campaign: Campaign) -> str:
    """Mean loss of all members per task, every tenth step."""
    curves: dict[str, list[npt.NDArray[np.float64]]] = {}
    for fold in range(campaign.folds.count):
        for file in member_files(fold):
            card = read_json(file.with_suffix(".json"))
            for name, values in card["history"].items():
                clean = [np.nan if v is None else v for v in values]
                curves.setdefault(name, []).append(np.array(clean, dtype=np.float64))
    rows = []
    for name, members in curves.items():
        steps = min(len(m) for m in members)
        for start in range(0, steps, 10):
            chunk = np.concatenate([m[start : start + 10] for m in members])
            if np.isfinite(chunk).any():
                rows.append({"task": name, "step": start, "loss": float(np.nanmean(chunk))})
    return _csv(rows)


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "oa": record["overall"]["oa"]["value"],
        "macro_f1": record["overall"]["macro_f1"]["value"],
        "ece_before": record["ece_before"],
        "ece_after": record["ece_after"],
        "suspect_labels": len(record["suspects"]),
    }
    if record["baseline"]:
        out["baseline"] = record["baseline"]
    out |= {f"{n}_rmse": r["rmse"] for n, r in record["regression"].items()}
    out |= {f"{n}_f1": r["f1"] for n, r in record["boundary"].items()}
    return out


def _say(record: dict[str, Any]) -> None:
    log.info(
        "held-out blocks: OA %.3f, macro-F1 %.3f, ECE %.3f -> %.3f",
        record["overall"]["oa"]["value"], record["overall"]["macro_f1"]["value"],
        record["ece_before"], record["ece_after"],
    )  # fmt: skip
    for name, scores in (record["baseline"] or {}).items():
        log.info("random forest, %s: OA %.3f, macro-F1 %.3f", name, scores["oa"],
                 scores["macro_f1"])  # fmt: skip


def fit_baseline(campaign: Campaign, grid: CampaignGrid) -> None:
    """Per-pixel random forest on all bands, on the same folds; writes ``baseline.json``.

    Two scores: on the pixels that the networks are scored on, and on all labelled pixels, clouds
    and shadows included, which is what a map without masks would face.
    """
    task = next(t for t in task_specs(campaign) if t.name == campaign.land_cover.name)
    masked = read_store(CHIPS).load()
    plain = _unmasked_chips(campaign, grid)
    scores = {
        "same_pixels": _forest_scores(masked, task, campaign.seed),
        "all_pixels": _forest_scores(plain, task, campaign.seed),
    }
    write_json(MODEL / "baseline.json", scores)


def _unmasked_chips(campaign: Campaign, grid: CampaignGrid) -> xr.Dataset:
    """The same chips from cubes in which nothing is masked."""
    folder = Path("work/unmasked")
    scenes = [replace(s, masks=()) for s in gather_scenes(campaign)]
    for tile in grid.tiles():
        build_tile(tile, grid, campaign, scenes, folder / f"{tile.name}.zip", "unmasked")
    for name in ("folds.gpkg", "labels.json"):
        shutil.copyfile(CHIPS.with_name(name), folder / name)
    cut_chips(campaign, grid, folder, folder)
    chips: xr.Dataset = read_store(folder / "chips.zip").load()
    return chips


def _forest_scores(chips: xr.Dataset, task: TaskSpec, seed: int) -> dict[str, float]:
    held = pixel_forest(chips, task, seed=seed)
    matrix = confusion_matrix(held.y, held.p[0].argmax(axis=1), range(len(task.classes)))
    skill = skill_from_matrix(matrix)
    return {"oa": float(skill.oa), "macro_f1": float(skill.macro_f1), "pixels": len(held.y)}
