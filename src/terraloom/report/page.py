"""The report: one HTML file that explains a map to someone who was not there.

The page needs no network: pictures travel as data URIs, style and script are inlined, and the
script (it compares and zooms the map; the page can be read without it) is allowed by its hash in
the page's content security policy. Everything that comes from files is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.errors import StateError
from terraloom.io import read_json, write_text
from terraloom.origin import PINNED
from terraloom.plan import product_path
from terraloom.report import (
    charts,
    facts,
    figures,
    formats,
    measures,
    panels,
    provenance,
    scores,
    trust,
)
from terraloom.report.advice import advise
from terraloom.report.regional import regions
from terraloom.report.scenes import scene_section

__all__ = ["build_report"]

_HERE = Path(__file__).parent


def build_report(
    results_dir: Path | str, campaign: Campaign, out: Path | str, *, config_path: str | None = None
) -> Path:
    """Write the report of a finished campaign.

    Needed are ``scenes/items.json``, ``model/held_out.json``, ``map/map.json`` and
    ``map/class_map.tif``; a section whose other files are absent is left out.

    Args:
        results_dir: The folder with scenes, chips, model and map.
        campaign: The campaign that was run.
        out: The HTML file; written atomically.
        config_path: Campaign file as the commands to reproduce should name it.

    Returns:
        Path of the page.

    Raises:
        StateError: A needed file is missing or lacks a key.
    """
    root, out = Path(results_dir), Path(out)
    context = _context(root, campaign, config_path or f"config/campaigns/{campaign.name}.yaml")
    write_text(out, _environment().get_template("report.html.j2").render(context))
    return out


def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        pct=formats.percent, ha=formats.hectares, num=formats.number, whole=formats.whole,
        day=formats.day, words=facts.label,
    )  # fmt: skip
    return env


def _context(root: Path, campaign: Campaign, config_path: str) -> dict[str, Any]:
    map_json = root / "map" / "map.json"
    record = read_json(map_json)
    legend = provenance.need(record, "legend", map_json)
    simulated = campaign.archive.kind == "simulated"
    place = panels.place(provenance.need(record, "geobox", map_json), simulated=simulated)
    items_file = root / "scenes" / "items.json"
    items = provenance.need(read_json(items_file), "items", items_file)
    skill = facts.skill(read_json(root / "model" / "held_out.json"))
    if not product_path("class_map", root / "map").is_file():
        raise StateError(
            "the class map is missing", where=(root / "map" / "class_map.tif").as_posix(),
            fix="run the map stage",
        )  # fmt: skip
    scoreboard = provenance.optional_json(root / "map" / "scoreboard.json")
    accuracy = provenance.optional_json(root / "map" / "accuracy.json")
    areas = facts.areas(legend, accuracy, scoreboard)
    rows = facts.scenes(items, provenance.optional_csv(root / "scenes" / "quality.csv"))
    coverage = panels.coverage(root, record)
    shown = panels.map_panel(root, record, place)
    doubt, layers = panels.uncertainty(root, len(legend)), panels.task_layers(root, campaign)
    trusted = trust.trust(root, record, skill.raw, campaign.land_cover.name)
    script = _template("viewer.js")
    context: dict[str, Any] = {
        "style": Markup(_template("style.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "campaign": campaign,
        "simulated": simulated,
        "place": place,
        "summary": _summary(campaign, record, place, areas, skill, rows),
        "map": shown,
        "viewer": panels.viewer(shown, doubt, trusted, layers, place),
        "advice": advise(campaign, areas, skill, record, place.resolution_m),
        "areas": areas,
        "scene_facts": scene_section(root, items),
        "area_chart": _area_chart(areas),
        "uncertainty": doubt,
        "layers": layers,
        "trust": trusted,
        "regions": regions(root, legend),
        "assisted": measures.assisted(accuracy),
        "value_tables": measures.values(accuracy),
        "causes": measures.disagreement(accuracy),
        "probabilities": measures.probabilities(skill.raw),
        "skill": skill,
        "charts": _skill_charts(skill, root),
        "scenes": rows,
        "coverage": coverage,
        "tiles": panels.tiles(root),
        "labels": panels.labels(root, record, campaign.land_cover.name),
        "suspects": scores.suspects(skill.raw.get("suspects")),
        "scoreboard": scores.scoreboard(scoreboard) if scoreboard else None,
        "made": _made(root, campaign, config_path, record, rows),
    }
    return context | {"nav": _nav(context)}


def _template(name: str) -> str:
    return (_HERE / "templates" / name).read_text(encoding="utf-8")


def _nav(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    wanted = [
        ("map", "Map", True),
        ("use", "What for", True),
        ("areas", "Areas", True),
        ("doubt", "Uncertainty", bool(context["uncertainty"])),
        ("regions", "Regions", bool(context["regions"])),
        ("layers", "Other layers", bool(context["layers"])),
        ("skill", "Model skill", True),
        ("data", "Data", True),
        ("scenes", "Scenes", True),
        ("labels", "Labels", bool(context["labels"])),
        ("score", "Scoreboard", bool(context["scoreboard"])),
        ("notes", "Reading the numbers", True),
        ("made", "How it was made", True),
    ]
    return [(anchor, title) for anchor, title, there in wanted if there]


def _summary(
    campaign: Campaign, record: Mapping[str, Any], place: panels.Place, areas: facts.Areas,
    skill: facts.Skill, rows: Sequence[facts.SceneRow],
) -> list[dict[str, str]]:  # fmt: skip
    """Three lines: what and when, how sure, how complete. The accuracy is the best one at hand."""
    what = f"{place.words}, mapped from {_when(campaign, rows)}."
    if areas.oa.known:
        oa, source = areas.oa, "map accuracy, estimated from a probability sample"
        more = f"{areas.level_text} interval"
    else:
        oa, source = skill.oa, "agreement with the labels on blocks the model never saw"
        more = "95% interval"
    sure = f"{source}" + (f"; {more} {oa.range_text()}%." if oa.has_range else ".")
    valid = formats.interval(record.get("valid_pct")).value / 100
    sized = sum(r.map_ha for r in areas.rows if r.map_ha == r.map_ha)
    complete = "of the area has a class. " + panels.main_reason(record)
    return [
        {"head": "What", "value": place.size_text, "unit": place.size_unit, "text": what},
        {"head": "How sure", "value": formats.percent(oa.value), "unit": "", "text": sure},
        {
            "head": "How complete", "value": formats.percent(valid), "unit": "",
            "text": f"{complete} {formats.hectares(sized)} ha are mapped.",
        },
    ]  # fmt: skip


def _when(campaign: Campaign, rows: Sequence[facts.SceneRow]) -> str:
    """How many scenes, and from when; terrain and other undated data do not count as scenes."""
    first = min(p.start for p in campaign.cube.periods).isoformat()
    last = max(p.end for p in campaign.cube.periods).isoformat()
    dated = [r for r in rows if first <= r.date <= last]
    dates = sorted(r.date for r in dated if r.used)
    if not dates:
        return f"data of {formats.day(first)} to {formats.day(last)}"
    start, end = formats.day(dates[0]), formats.day(dates[-1])
    if len(dated) == 1:
        return f"one scene of {start}"
    of = f"{len(dates)} of {len(dated)}" if len(dates) < len(dated) else f"{len(dates)}"
    return f"{of} scenes taken " + (f"on {start}" if start == end else f"between {start} and {end}")


def _area_chart(areas: facts.Areas) -> figures.Picture:
    rows = areas.rows
    return charts.area_chart(
        [r.name for r in rows], [r.map_ha for r in rows], [r.estimate for r in rows],
        [r.truth_ha for r in rows],
    )  # fmt: skip


def _skill_charts(skill: facts.Skill, root: Path) -> dict[str, figures.Picture | None]:
    made: dict[str, figures.Picture | None] = dict.fromkeys(
        ("classes", "confusion", "reliability", "learning")
    )
    if skill.rows:
        made["classes"] = charts.skill_chart(
            [r.name for r in skill.rows],
            {
                "precision": [r.precision for r in skill.rows],
                "recall": [r.recall for r in skill.rows],
                "F1": [r.f1 for r in skill.rows],
            },
        )
    if skill.confusion.size:
        made["confusion"] = charts.confusion_chart(skill.confusion, skill.names)
    curves = facts.curves(provenance.optional_csv(root / "model" / "reliability.csv"))
    if curves:
        made["reliability"] = charts.reliability_chart(curves)
    history = facts.learning(provenance.optional_csv(root / "model" / "history.csv"))
    if history:
        made["learning"] = charts.curves_chart(history)
    return made


def _made(
    root: Path, campaign: Campaign, config_path: str, record: Mapping[str, Any],
    rows: Sequence[facts.SceneRow],
) -> dict[str, Any]:  # fmt: skip
    config = campaign.model_dump(mode="json", exclude_none=True)
    products = [
        (str(name), str(entry.get("file", "")), str(entry.get("sha256", "")))
        for name, entry in sorted((record.get("products") or {}).items())
        if isinstance(entry, Mapping)
    ]
    kinds = [
        f"{t.name}: {t.kind.value}" + (f" ({t.unit})" if t.kind is TaskKind.REGRESSION else "")
        for t in campaign.tasks
    ]
    return {
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=88),
        "config_path": config_path,
        "config_digest": provenance.config_digest(campaign),
        "versions": provenance.versions(),
        "weights": provenance.weights(root),
        "pinned": provenance.optional_json(root / "model" / PINNED),
        "products": products,
        "scenes": [r.id for r in rows if r.used],
        "tasks": "; ".join(kinds),
        "networks": campaign.folds.count * campaign.model.members,
        "periods": [
            (p.name, formats.day(p.start), formats.day(p.end)) for p in campaign.cube.periods
        ],
    }
