"""Areas of a campaign: estimates where there is a probability sample, else map areas."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt

from terraloom.assess.answers import CONSENSUS, read_answers, settle
from terraloom.assess.assisted import assisted_block
from terraloom.assess.continuous import values_at, values_block
from terraloom.assess.design import SampleDesign, reference_sample
from terraloom.assess.estimators import AccuracyReport, estimate_accuracy
from terraloom.assess.interpreters import NOT_ANSWERED, compare_interpreters
from terraloom.assess.kept import read_points, require_unedited
from terraloom.assess.measured import settle_values, values_of
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.assess.sampling import DESIGN, MAP, POINTS, settings_of
from terraloom.assess.strips import map_digest
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.errors import DesignError
from terraloom.io import read_json, write_json, write_text
from terraloom.legend import Legend, read_legend
from terraloom.plan import product_path

__all__ = ["MAP", "NOT_AN_ESTIMATE", "estimate_areas", "require_present_map"]

TRUTH = Path("resources/simulated/truth")
#: Said wherever areas are shown without a probability sample.
NOT_AN_ESTIMATE = "map area, not an estimate"


def estimate_areas(campaign: Campaign) -> None:
    """Write ``areas.csv``, ``accuracy.json`` and ``metrics.json`` of the map."""
    legend = read_legend(str(campaign.land_cover.classes))
    facts = read_json(MAP / "map.json")
    sample = campaign.sample
    report, answered = _estimate(campaign, legend) if sample and sample.answers else (None, None)
    rows = _rows(facts, legend, report)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(MAP / "areas.csv", text.getvalue())
    write_json(MAP / "accuracy.json", _record(legend, facts, report, answered, campaign))
    metrics: dict[str, Any] = {"valid_pct": facts["valid_pct"]}
    if report is not None:
        metrics |= {"oa": report.overall.value, "oa_se": report.overall.se}
    write_json(MAP / "metrics.json", metrics)


def _estimate(campaign: Campaign, legend: Legend) -> tuple[AccuracyReport, Answered]:
    points = read_points(POINTS)
    design = SampleDesign.from_dict(read_json(DESIGN))
    require_unedited(points, design, str(POINTS))
    require_present_map(design)
    answered = _answers(campaign, points, legend, design)
    used = points[points["id"].astype(str).isin(answered.codes)]
    sample = reference_sample(used, answered.codes, design)
    post_strata = _post_strata(design)
    report = estimate_accuracy(
        sample, design.sizes(), classes=legend.codes, post_strata=post_strata
    )
    if len(answered.said) > 1:
        by_person = {
            who: np.array([codes.get(str(i), NOT_ANSWERED) for i in used["id"]], dtype=np.int64)
            for who, codes in answered.said.items()
        }
        compared = compare_interpreters(
            by_person, sample, design.sizes(), classes=legend.codes, post_strata=post_strata
        )
        answered = replace(answered, compared=compared)
    blocks = _further_blocks(campaign, legend, sample, used, design, answered)
    return report, replace(answered, blocks=blocks)


def _further_blocks(
    campaign: Campaign, legend: Legend, sample: ReferenceSample, points: gpd.GeoDataFrame,
    design: SampleDesign, answered: Answered,
) -> dict[str, Any]:  # fmt: skip
    """Model-assisted areas; where values were measured, accuracy of the maps of values."""
    sizes, post = design.sizes(), _post_strata(design)
    names = dict(zip(legend.codes, legend.names, strict=True))
    out: dict[str, Any] = {
        "assisted": assisted_block(MAP, sample, points, sizes, design.class_sizes(), post, names)
    }
    for task in (t for t in campaign.tasks if t.name in answered.values):
        found = values_of([str(i) for i in points["id"]], answered.values[task.name])
        most = settings_of(campaign).max_unclear_pct
        block = _measured(task, found, points, answered.codes, design, post, most)
        out.setdefault("values", {})[task.name] = block
    return out


def _measured(
    task: Task, values: npt.NDArray[np.float64], points: gpd.GeoDataFrame,
    codes: Mapping[str, int], design: SampleDesign, post: Strata | None, most_pct: float,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of a map of values at the units that have one; others count as unclear.

    As with units that cannot be told, this supposes that they are like the rest of their stratum.
    """
    known = np.isfinite(values)
    left_out = int((~known).sum())
    if left_out > most_pct / 100 * known.size:
        why = f"{left_out} of {known.size} units have no value; at most {most_pct:g}% may lack one"
        return {"why_not": f"{why} (sample.max_unclear_pct)", "unit": task.unit}
    some = points[known]
    sample = reference_sample(some, {str(i): codes[str(i)] for i in some["id"]}, design)
    try:
        block = values_block(
            product_path(task.name, MAP), values[known], sample, some, design.sizes(), post,
            task.unit,
        )  # fmt: skip
    except DesignError as err:  # a stratum may be left with less than two units
        return {"why_not": str(err).splitlines()[0], "unit": task.unit}
    return block | {"left_out": left_out}


def _post_strata(design: SampleDesign) -> Strata | None:
    """Map classes as post-strata of a sample that was not stratified, where they fill its domain.

    A sample that is kept for a newer map may have been drawn from another set of pixels.
    """
    same = sum(c.n_pixels for c in design.classes) == sum(s.n_pixels for s in design.strata)
    stratified = design.kind is SampleKind.STRATIFIED_RANDOM or len(design.strata) > 1
    return design.class_sizes() if same and not stratified else None


def require_present_map(design: SampleDesign) -> None:
    """Refuse a sample whose map classes are those of another map than the one that is there.

    Raises:
        DesignError: The class map was written after the sample was drawn from it.
    """
    now = map_digest(product_path("class_map", MAP))
    if design.map_digest != now:
        raise DesignError(
            f"the map ({now}) is not the one the sample was joined to "
            f"({design.map_digest}): it is newer", where=str(DESIGN),
            fix="run the rule draw_sample. An interpreted sample is kept by copying sample.gpkg "
            "and design.json into a folder and naming it in `sample.drawn`",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answered:
    """Class code of each unit that has one.

    Attributes:
        codes: Final class code by unit.
        facts: Who answered and how units were settled, JSON-able.
        said: Class code by unit, of each interpreter.
        compared: How interpreters differ and what it does to the areas; empty with one.
        blocks: Further blocks of ``accuracy.json``.
        values: Measured value by unit, of each task of values that has some.
    """

    codes: dict[str, int]
    facts: dict[str, Any]
    said: dict[str, dict[str, int]] = field(default_factory=dict)
    compared: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)


def _answers(
    campaign: Campaign, points: gpd.GeoDataFrame, legend: Legend, design: SampleDesign
) -> Answered:
    settings = settings_of(campaign)
    measured = [t for t in campaign.tasks if t.kind is TaskKind.REGRESSION]
    if settings.answers == "truth":
        import rasterio

        asked = points[points["reserve"] == 0]
        with rasterio.open(TRUTH / "landcover.tif") as src:
            xy = np.column_stack([asked.geometry.x, asked.geometry.y])
            codes = [int(v[0]) for v in src.sample(xy)]
        ids, truth = asked["id"].astype(str), TRUTH / "height.tif"
        heights = values_at(truth, asked) if truth.exists() else np.array([])
        known = {i: float(v) for i, v in zip(ids, heights, strict=False) if np.isfinite(v)}
        values = {t.name: known for t in measured if known}
        return Answered(dict(zip(ids, codes, strict=True)), {}, values=values)
    table = read_answers(settings.answer_paths, design, points, legend, campaign.tasks)
    answers = settle(table, points, settings)
    code = dict(zip(legend.names, legend.codes, strict=True))
    facts = {**answers.facts, "unclear": list(answers.unclear)}
    said = {
        who: {i: code[name] for i, name in units.items() if name in code}
        for who, units in answers.said.items()
    }
    values = {t.name: settle_values(table, t, CONSENSUS) for t in measured}
    return Answered(
        {i: code[name] for i, name in answers.classes.items()}, facts, said,
        values={name: found for name, found in values.items() if found},
    )  # fmt: skip


def _waiting(campaign: Campaign) -> dict[str, Any] | None:
    """A sample that was drawn and waits for answers."""
    if campaign.sample is None:
        return None
    design = read_json(DESIGN)
    return {"kind": design["kind"], "size": design["n_units"], "answers": None,
            "digest": design["digest"]}  # fmt: skip


def _rows(
    facts: dict[str, Any], legend: Legend, report: AccuracyReport | None
) -> list[dict[str, Any]]:
    mapped = {e["code"]: e["map_area_ha"] for e in facts["legend"]}
    rows = []
    for code, name in zip(legend.codes, legend.names, strict=True):
        row: dict[str, Any] = {"code": code, "name": name, "map_area_ha": round(mapped[code], 4)}
        if "applicability" in facts:
            inside = facts["applicability"]["inside_ha"][str(code)]
            row["map_area_inside_ha"] = round(inside, 4)
        if report is None:
            row["status"] = NOT_AN_ESTIMATE
        else:
            area = report.area_ha[code]
            row |= {
                "area_ha": round(area.value, 4), "se_ha": round(area.se, 4),
                "low_ha": round(area.lower, 4), "high_ha": round(area.upper, 4),
                "status": f"design-based estimate, {report.level:.0%} interval",
            }  # fmt: skip
        rows.append(row)
    return rows


def _record(
    legend: Legend, facts: dict[str, Any], report: AccuracyReport | None,
    answered: Answered | None, campaign: Campaign,
) -> dict[str, Any]:  # fmt: skip
    if report is None or answered is None:
        return {"status": NOT_AN_ESTIMATE, "sample": _waiting(campaign)}
    mapped = {e["code"]: e["map_area_ha"] for e in facts["legend"]}

    def show(estimate: Any) -> dict[str, Any]:
        r = estimate.to_dict()
        return {"value": r["value"], "se": r["se"], "low": r["lower"], "high": r["upper"]}

    classes = []
    for code, name in zip(legend.codes, legend.names, strict=True):
        area = show(report.area_ha[code])
        classes.append(
            {
                "code": code, "name": name, "map_area_ha": mapped[code],
                "area_ha": area["value"], "area_se_ha": area["se"], "low_ha": area["low"],
                "high_ha": area["high"], "ua": show(report.users[code]),
                "pa": show(report.producers[code]), "f1": show(report.f1[code]),
            }
        )  # fmt: skip
    sample, design = settings_of(campaign), read_json(DESIGN)
    return {
        "status": "design-based estimate",
        "classes": classes,
        "oa": show(report.overall),
        "level": report.level,
        "sample": {
            "kind": str(report.kind), "method": report.method, "size": report.n_units,
            "allocation": design["allocation"] or "none",
            "not_covered_share": design["not_covered"]["share"],
            "answers": "simulated truth" if sample.answers == "truth"
            else ", ".join(sample.answer_paths),
            "digest": design["digest"], **answered.facts,
        },
        "interpreters": answered.compared or None,
        "report": report.to_dict(),
        **answered.blocks,
    }  # fmt: skip
