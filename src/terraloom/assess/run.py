"""Sample and areas of a campaign: estimates where there is a probability sample, else map areas."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio

from terraloom.assess.allocation import Allocation
from terraloom.assess.design import SampleDesign, reference_sample, stratified_sample
from terraloom.assess.estimators import AccuracyReport, estimate_accuracy
from terraloom.config.campaign import Campaign, Sample
from terraloom.errors import DesignError
from terraloom.io import atomic, read_json, write_json, write_text
from terraloom.legend import Legend, read_legend
from terraloom.log import get_logger
from terraloom.plan import product_path

__all__ = ["MAP", "NOT_AN_ESTIMATE", "draw_sample", "estimate_areas"]

MAP = Path("results/map")
TRUTH = Path("resources/simulated/truth")
#: Said wherever areas are shown without a probability sample.
NOT_AN_ESTIMATE = "map area, not an estimate"
#: Fixed date in the sample file: the same sample gives the same bytes.
_FILE_DATE = "2000-01-01T00:00:00Z"

log = get_logger(__name__)


def draw_sample(campaign: Campaign) -> None:
    """Draw the stratified random sample; writes ``sample.gpkg`` and ``design.json``."""
    sample = _settings(campaign)
    legend = read_legend(str(campaign.land_cover.classes))
    drawn = stratified_sample(
        product_path("class_map", MAP), sample.size, seed=campaign.seed, classes=legend.codes,
        allocation=Allocation(sample.allocation), min_per_stratum=sample.min_per_stratum,
    )  # fmt: skip
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _FILE_DATE})
    with atomic(MAP / "sample.gpkg") as tmp:
        tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
        drawn.points.to_file(tmp, driver="GPKG", layer="sample", engine="pyogrio")
    write_json(MAP / "design.json", drawn.design.to_dict())
    log.info("%d sample units drawn", len(drawn.points))


def _settings(campaign: Campaign) -> Sample:
    if campaign.sample is None:
        raise DesignError("the campaign has no `sample`", where=f"campaign {campaign.name}")
    return campaign.sample


def estimate_areas(campaign: Campaign) -> None:
    """Write ``areas.csv``, ``accuracy.json`` and ``metrics.json`` of the map."""
    legend = read_legend(str(campaign.land_cover.classes))
    facts = read_json(MAP / "map.json")
    report = _estimate(campaign, legend) if campaign.sample else None
    rows = _rows(facts, legend, report)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(MAP / "areas.csv", text.getvalue())
    write_json(MAP / "accuracy.json", _record(legend, facts, report, campaign))
    metrics: dict[str, Any] = {"valid_pct": facts["valid_pct"]}
    if report is not None:
        metrics |= {"oa": report.overall.value, "oa_se": report.overall.se}
    write_json(MAP / "metrics.json", metrics)


def _estimate(campaign: Campaign, legend: Legend) -> AccuracyReport:
    points = gpd.read_file(MAP / "sample.gpkg")
    design = SampleDesign.from_dict(read_json(MAP / "design.json"))
    sample = reference_sample(points, _answers(_settings(campaign), points, legend), design)
    return estimate_accuracy(sample, design.sizes(), classes=legend.codes)


def _answers(settings: Sample, points: gpd.GeoDataFrame, legend: Legend) -> dict[str, int]:
    if settings.answers == "truth":
        import rasterio

        with rasterio.open(TRUTH / "landcover.tif") as src:
            xy = np.column_stack([points.geometry.x, points.geometry.y])
            codes = [int(v[0]) for v in src.sample(xy)]
        return dict(zip(points["id"].astype(str), codes, strict=True))
    try:
        table = pd.read_csv(settings.answers, dtype=str)
    except (FileNotFoundError, pd.errors.ParserError, pd.errors.EmptyDataError) as err:
        raise DesignError(
            f"the answers cannot be read ({err})", where=f"sample.answers {settings.answers}",
            allowed="a CSV with the columns id,class",
        ) from err  # fmt: skip
    if not {"id", "class"} <= set(table.columns):
        raise DesignError(
            f"columns {list(table.columns)}", where=f"sample.answers {settings.answers}",
            allowed="id, class",
        )  # fmt: skip
    unknown = sorted(set(table["class"].dropna()) - set(legend.names))
    if unknown or table["class"].isna().any():
        raise DesignError(
            f"classes {unknown or 'empty'}", where=f"sample.answers {settings.answers}",
            allowed=", ".join(legend.names), fix="answer every point with a class of the legend",
        )  # fmt: skip
    code = dict(zip(legend.names, legend.codes, strict=True))
    return {str(i): code[str(c)] for i, c in zip(table["id"], table["class"], strict=True)}


def _rows(
    facts: dict[str, Any], legend: Legend, report: AccuracyReport | None
) -> list[dict[str, Any]]:
    mapped = {e["code"]: e["map_area_ha"] for e in facts["legend"]}
    rows = []
    for code, name in zip(legend.codes, legend.names, strict=True):
        row: dict[str, Any] = {"code": code, "name": name, "map_area_ha": round(mapped[code], 4)}
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
    legend: Legend, facts: dict[str, Any], report: AccuracyReport | None, campaign: Campaign
) -> dict[str, Any]:
    if report is None:
        return {"status": NOT_AN_ESTIMATE, "sample": None}
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
    sample = _settings(campaign)
    return {
        "status": "design-based estimate",
        "classes": classes,
        "oa": show(report.overall),
        "level": report.level,
        "sample": {
            "kind": str(report.kind), "size": report.n_units, "allocation": sample.allocation,
            "not_covered_share": read_json(MAP / "design.json")["not_covered"]["share"],
            "answers": "simulated truth" if sample.answers == "truth" else sample.answers,
        },
        "report": report.to_dict(),
    }  # fmt: skip
