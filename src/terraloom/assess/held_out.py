"""Calibration and skill of the ensemble on blocks that did not train.

These figures say how good the model is on labels it has not seen. They are not the accuracy of
the map: the labels are no probability sample.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.assess.coverage import judge_coverage
from terraloom.assess.model_card import write_model_card
from terraloom.assess.reliability import SkillReport, skill_report
from terraloom.assess.residuals import residual_covariances
from terraloom.assess.skill import edge_scores, probability_scores, value_scores
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.errors import LabelError, StateError
from terraloom.grid import geobox_from_record
from terraloom.io import read_json, read_store, write_json, write_text
from terraloom.labels.clean import LabelReview, review_labels, write_review
from terraloom.labels.noise import noise_beyond_chance
from terraloom.labels.time import weigh_chips
from terraloom.legend import Legend, read_legend
from terraloom.log import get_logger
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import check_contract, load_member
from terraloom.train.applicability import fit_applicability
from terraloom.train.calibrate import Reliability, reliability
from terraloom.train.ensemble import averaged, cross_fitted_average, fit_calibration
from terraloom.train.held_out import HeldOut, predict_held_out
from terraloom.train.model_files import CHIPS, MODEL, member_files, task_specs
from terraloom.train.windows import modalities_of, units_of

__all__ = ["calibrate"]

#: Equal-width confidence bins of the reliability curve and of the calibration error.
BINS = 15
#: A boundary pixel is one whose target (1 on the outline, falling with distance) is above this.
EDGE_TARGET = 0.5

log = get_logger(__name__)


def calibrate(campaign: Campaign) -> None:
    """Fit the calibration, score the held-out blocks, list suspect labels."""
    torch.set_num_threads(1)
    chips = read_store(CHIPS)
    labels = _labels(campaign, chips)
    held = _held_out(campaign, chips)
    task = campaign.land_cover
    legend = read_legend(str(task.classes))
    cover, outdated_px = _current(campaign, chips, labels, held[task.name])
    y = cover.y.astype(np.int64)
    label_of = chips[f"label_{task.name}"].to_numpy().ravel()[cover.index]
    review = review_labels(averaged(cover.p), y, label_of)
    method = campaign.model.calibration
    noise = review.noise if campaign.model.label_noise == "estimated" else None
    calibration = fit_calibration(cover.p, y, method, noise)
    honest = cross_fitted_average(cover.p, y, cover.fold, method, noise)
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
    wrong = None
    if campaign.uncertainty.label_noise == "estimated":
        rng = np.random.default_rng(campaign.seed)
        known = review_labels(honest, y, label_of)
        wrong = noise_beyond_chance(known.mean, known.given, rng)
    sets, coverage = judge_coverage(campaign, chips, cover, honest, held, wrong)
    regression = _regressions(campaign, held)
    record = {
        "classes": list(legend.names),
        "confusion": skill.matrix.tolist(),
        "overall": {k: _interval(skill.overall[k]) for k in ("oa", "macro_f1")},
        "per_class": _per_class(skill, legend),
        "ece_before": reliability(raw, y, n_bins=BINS).error(),
        "ece_after": curve.error(),
        "temperature": calibration.temperature,
        "calibration": method,
        "n_bins": BINS,
        "n_pixels": len(y),
        "probabilities": probability_scores(seen, y, cover.fold, legend.names, n_bins=BINS),
        "outdated_px": outdated_px,
        "n_blocks": skill.n_blocks,
        "baseline": baseline,
        "regression": regression,
        "fold_spread": {name: r.pop("folds") for name, r in regression.items()},
        "sparsification": {name: r.pop("sparsification") for name, r in regression.items()},
        "boundary": _boundaries(campaign, chips, held),
        "coverage": coverage,
        "label_noise": campaign.model.label_noise,
        "label_noise_pct": 100 * float(review.flags.mean()),
        "suspects": _suspects(review, legend),
    }
    write_json(MODEL / "held_out.json", record)
    write_text(MODEL / "reliability.csv", _csv(_curve(curve)))
    write_text(MODEL / "history.csv", _history(campaign))
    write_json(MODEL / "metrics.json", _metrics(record))
    fitted = calibration.record() | {"n_pixels": len(y)}
    write_json(MODEL / "calibration.json", {"tasks": {task.name: fitted}})
    if campaign.uncertainty.sets:
        write_json(MODEL / "conformal.json", sets)
    if campaign.uncertainty.applicability:
        fit_applicability(campaign)
    covariances = residual_covariances(campaign, chips, legend, cover, seen, held)
    write_json(MODEL / "covariance.json", covariances)
    write_review(MODEL / "suspects.gpkg", review, labels, legend.names)
    write_model_card(campaign)
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
        members = [_fitting(campaign, chips, f) for f in files]
        for name, held in predict_held_out(chips, members, fold).items():
            parts[name].append(held)
    return {name: HeldOut.join(p) for name, p in parts.items()}


def _fitting(campaign: Campaign, chips: xr.Dataset, file: Path) -> MapNet:
    """A member, which must have been trained on what these chips and tasks are."""
    net, card = load_member(file)
    check_contract(
        card, modalities_of(chips), task_specs(campaign), units=units_of(chips), where=str(file)
    )
    return net


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
        p = held[task.name].p.astype(np.float64)
        mean = p[..., 0].mean(axis=0)
        error = mean - y
        spread = float(((y - y.mean()) ** 2).sum())
        out[task.name] = {
            "rmse": float(np.sqrt((error**2).mean())),
            "bias": float(error.mean()),
            "r2": 1 - float((error**2).sum()) / spread if spread > 0 else None,
            "unit": task.unit,
            "pixels": len(y),
            **value_scores(
                mean, p[..., 1].mean(axis=0) + p[..., 0].var(axis=0), y, held[task.name].fold
            ),
        }
    return out


def _boundaries(campaign: Campaign, chips: xr.Dataset, held: dict[str, HeldOut]) -> dict[str, Any]:
    out = {}
    pixel_m = abs(float(geobox_from_record(chips.attrs).resolution.x))
    for task in campaign.tasks:
        if task.kind is not TaskKind.BOUNDARY:
            continue
        true = held[task.name].y.astype(np.float64) > EDGE_TARGET
        p = held[task.name].p[..., 0].mean(axis=0)
        # The head learns a soft edge, so the best cut is not known beforehand; it is reported.
        cuts = np.linspace(0.1, 0.9, 17)
        scores = [_f1(p > c, true) for c in cuts]
        best = int(np.argmax(scores))
        _, h, w = chips["fold"].shape
        out[task.name] = {
            "f1": scores[best], "cut": float(cuts[best]), "pixels": len(true),
            "edge_share": float(true.mean()),
            **edge_scores(held[task.name].index, p > cuts[best], true, (h, w), pixel_m),
        }  # fmt: skip
    return out


def _f1(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    both = int((found & true).sum())
    total = int(found.sum()) + int(true.sum())
    return 2 * both / total if total else float("nan")


def _labels(campaign: Campaign, chips: xr.Dataset) -> gpd.GeoDataFrame:
    """Aligned labels of the class map."""
    labels = gpd.read_file(CHIPS.with_name("folds.gpkg"), layer="labels")
    mine = labels[labels["task"] == campaign.land_cover.name].reset_index(drop=True)
    crs = str(geobox_from_record(chips.attrs).crs)
    return mine.set_crs(crs, allow_override=True)


def _current(
    campaign: Campaign, chips: xr.Dataset, labels: gpd.GeoDataFrame, held: HeldOut
) -> tuple[HeldOut, int]:
    """Held-out pixels without those whose ground has changed since, and how many went.

    What was true before the images says nothing about a map of their time. The test knows the
    classes by the labels of other folds, and no prediction has a part in it.
    """
    task = campaign.land_cover
    if task.labels.drop_changed is None:
        return held, 0
    stays = np.ones(len(held.index), dtype=bool)
    for fold in np.unique(held.fold):
        timed, _ = weigh_chips(
            chips, labels, task.name, periods=campaign.cube.periods,
            drop_changed=task.labels.drop_changed, erode_m=task.labels.erode_m,
            held_out_fold=int(fold), require=False,
        )  # fmt: skip
        here = held.fold == fold
        stays[here] = timed[f"w_{task.name}"].to_numpy().ravel()[held.index[here]] > 0
    if not stays.any():
        raise LabelError(
            f"the ground of all {len(stays)} held-out pixels has changed",
            where=f"task {task.name}",
            allowed="at least one label that is still true",
            fix="a larger labels.drop_changed, or labels of another time",
        )  # fmt: skip
    kept = replace(
        held, index=held.index[stays], fold=held.fold[stays], y=held.y[stays], p=held.p[:, stays]
    )
    return kept, int((~stays).sum())


def _suspects(review: LabelReview, legend: Legend) -> list[dict[str, Any]]:
    """Labels that are probably wrong, for the report; with their places in ``suspects.gpkg``."""
    return [
        {
            "label_id": int(review.ids[i]), "class": legend.names[review.given[i]],
            "likely": legend.names[review.likely[i]],
            "p_class": float(review.mean[i, review.given[i]]),
            "p_likely": float(review.mean[i, review.likely[i]]),
        }
        for i in np.flatnonzero(review.flags)
    ]  # fmt: skip


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
    for name, c in record["coverage"].items():
        found = c["methods"][c["method"]]
        log.info(
            "%s: sets for %.2f hold %.3f of the held-out %ss, %.3f in the worst block",
            name,
            c["target"],
            found["coverage"]["value"],
            c["unit"],
            found["worst_block"],
        )
    for name, scores in (record["baseline"] or {}).items():
        log.info("random forest, %s: OA %.3f, macro-F1 %.3f", name, scores["oa"],
                 scores["macro_f1"])  # fmt: skip
