"""The page's section on scenes: which are used, how they were checked, and what was found.

A season of several sources has hundreds of scenes, so the section starts with sums and a calendar;
tables scroll, one per source, and open by themselves only while they are short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from terraloom.report.formats import MISSING, day, interval, number, percent
from terraloom.report.provenance import optional_csv, optional_json

__all__ = ["Check", "SceneLine", "Source", "scene_section"]

#: Tables up to this many scenes are open from the start.
OPEN_UP_TO = 24
#: Failed checks that are spelt out on the page; all of them stand in audit.json.
NAMED = 40
#: What each check of the audit asks.
QUESTIONS = {
    "decision": "Was every item of the lock decided on?",
    "readable": "Can its files be read?",
    "lattice": "Do its pixels lie on the lattice of the source?",
    "duplicate": "Is it there only once?",
    "place": "Do its files lie where the record says?",
    "pixels": "Are there pixels where the footprint is?",
    "constant band": "Does every band vary?",
    "value range": "Are values possible in their unit?",
    "valid share": "Has every band values where it is clear?",
    "offset": "Is its brightness that of the other scenes?",
    "band order": "Is every band the band it says it is?",
    "shift": "Does its content lie on the other scenes?",
    "content": "Does it show this place at all?",
    "tile": "Is there an observation of every tile?",
}
_WIDTH, _LEFT, _ROW, _TOP = 1060, 150, 30, 8


@dataclass(frozen=True)
class SceneLine:
    """One scene; percentages 0-100 and pixels, NaN where unknown.

    Attributes:
        id: Item id.
        source: Source key.
        date: ISO date.
        used: Whether the cube is made from it.
        why: Reason of the decision.
        clear: Share of the AOI that is clear.
        cloud: Share under cloud.
        shadow: Share under cloud shadow.
        before: How far its content lay off, 10 m pixels.
        after: What is left of it.
        masks: How its masks compare, as text.
        audit: ``ok``, names of failed checks, or empty where it was not checked.
    """

    id: str
    source: str
    date: str
    used: bool
    why: str
    clear: float
    cloud: float
    shadow: float
    before: float
    after: float
    masks: str
    audit: str

    @property
    def shift(self) -> str:
        """Shift before and after, pixels."""
        first, last = (
            f"{v:.2f}" if math.isfinite(v) else MISSING for v in (self.before, self.after)
        )
        return MISSING if first == last == MISSING else f"{first} → {last}"


@dataclass(frozen=True)
class Source:
    """Scenes of one source, in order of time."""

    name: str
    scenes: list[SceneLine]

    @property
    def used(self) -> int:
        """Scenes that are used."""
        return sum(s.used for s in self.scenes)

    @property
    def open(self) -> bool:
        """Whether its table is short enough to be open from the start."""
        return len(self.scenes) <= OPEN_UP_TO

    @property
    def masked(self) -> bool:
        """Whether its scenes have masks."""
        return any(math.isfinite(s.clear) for s in self.scenes)


@dataclass(frozen=True)
class Check:
    """One kind of check: what it asks, and how often it was passed."""

    name: str
    question: str
    passed: int
    failed: int


def scene_section(root: Path, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template ``scenes.html.j2`` shows.

    Args:
        root: The folder with the scenes stage.
        items: Items of the lock.

    Returns:
        ``sources``, ``checks``, ``failed`` (records of audit.json), ``more`` (failed checks that
        are not spelt out), ``audited``, ``compared`` (masks by several methods), ``aligned``
        (median shift before and after, texts; None) and ``calendar`` (see :func:`_calendar`).
    """
    folder = root / "scenes"
    quality = {r.get("id", ""): r for r in optional_csv(folder / "quality.csv")}
    masks = _masks(optional_csv(folder / "masks.csv"))
    audit = optional_json(folder / "audit.json")
    records = [r for r in (audit or {}).get("checks", []) if isinstance(r, Mapping)]
    lines = [_line(i, quality.get(str(i.get("id")), {}), masks) for i in items]
    names = dict.fromkeys(s.source for s in lines)
    sources = [Source(n, sorted((s for s in lines if s.source == n), key=_by_time)) for n in names]
    failed = [r for r in records if not r.get("ok")]
    return {
        "sources": sources,
        "checks": _checks(records),
        "failed": failed[:NAMED],
        "more": max(len(failed) - NAMED, 0),
        "audited": bool(records),
        "compared": any(s.masks for s in lines),
        "aligned": _aligned(lines),
        "calendar": _calendar(sources),
    }


def _by_time(scene: SceneLine) -> tuple[str, str]:
    return scene.date, scene.id


def _line(item: Mapping[str, Any], row: Mapping[str, str], masks: Mapping[str, str]) -> SceneLine:
    def value(key: str) -> float:
        return interval(row.get(key)).value

    name = str(item.get("id", ""))
    before = value("before_px")
    if not math.isfinite(before):
        before = math.hypot(value("dy_px"), value("dx_px"))
    after = value("rest_px")
    return SceneLine(
        name, str(row.get("source") or item.get("source") or ""),
        str(row.get("datetime") or item.get("datetime") or "")[:10],
        str(row.get("decision") or item.get("decision") or "use") == "use",
        str(row.get("why") or item.get("why") or ""),
        value("clear_pct"), value("cloud_pct"), value("shadow_pct"), before,
        after if math.isfinite(after) else value("after_px"), masks.get(name, ""),
        str(row.get("audit") or ""),
    )  # fmt: skip


def _masks(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Item id: agreement of each pair of methods, as text."""
    found: dict[str, list[str]] = {}
    for row in rows:
        agreement = interval(row.get("agreement_pct")).value
        if not row.get("other") or not math.isfinite(agreement):
            continue
        cloud = interval(row.get("cloud_f1")).value
        text = f"{row.get('method')} / {row.get('other')}: agree {percent(agreement / 100)}"
        text += f", cloud F1 {number(cloud, 2)}" if math.isfinite(cloud) else ""
        found.setdefault(str(row.get("id")), []).append(text)
    return {k: "; ".join(v) for k, v in found.items()}


def _checks(records: Sequence[Mapping[str, Any]]) -> list[Check]:
    names = dict.fromkeys([*QUESTIONS, *(str(r.get("check")) for r in records)])
    out = []
    for name in names:
        mine = [bool(r.get("ok")) for r in records if r.get("check") == name]
        if mine:
            out.append(Check(name, QUESTIONS.get(name, ""), sum(mine), len(mine) - sum(mine)))
    return out


def _aligned(lines: Sequence[SceneLine]) -> tuple[str, str] | None:
    """Median distance of used scenes before and after the alignment, metres as text."""
    pairs = [
        (s.before, s.after)
        for s in lines
        if s.used and math.isfinite(s.before) and math.isfinite(s.after)
    ]
    if not pairs:
        return None
    middle = [sorted(p[k] for p in pairs)[len(pairs) // 2] for k in (0, 1)]
    return f"{10 * middle[0]:.1f}", f"{10 * middle[1]:.1f}"


def _calendar(sources: Sequence[Source]) -> dict[str, Any] | None:
    """Positions of all dated scenes in a drawing: one row per source, one tick per scene.

    Returns:
        ``width``, ``height``, ``rows`` of (name, y, ticks), ticks of (x, y, height, used, title),
        ``months`` of (x, text); None with less than two dates. Ticks are as high as the share of
        the AOI that is clear.
    """
    dated = {s.name: [(d, v) for v in s.scenes if (d := _day(v.date))] for s in sources}
    # Elevation and the like have no date that says something.
    shown = {n: v for n, v in dated.items() if len({d for d, _ in v}) > 1}
    days = sorted(d for v in shown.values() for d, _ in v)
    if len(set(days)) < 2:
        return None
    first, last = days[0], days[-1]
    span = (last - first).days

    def at(when: date) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - 10) * (when - first).days / span, 1)

    rows = []
    for k, (name, scenes) in enumerate(shown.items()):
        bottom = _TOP + (k + 1) * _ROW - 6
        ticks = []
        for when, s in scenes:
            share = s.clear / 100 if math.isfinite(s.clear) else 1.0
            height = round(3 + (_ROW - 11) * share, 1)
            state = "used" if s.used else "not used"
            title = f"{s.id}, {s.date}, {state}" + (f": {s.why}" if s.why else "")
            ticks.append((at(when), round(bottom - height, 1), height, s.used, title))
        rows.append((name, bottom, ticks))
    height = _TOP + len(rows) * _ROW + 18
    return {
        "width": _WIDTH, "height": height, "left": _LEFT, "rows": rows,
        "months": _months(first, last, at),
    }  # fmt: skip


def _months(first: date, last: date, at: Any) -> list[tuple[float, str]]:
    """Labels at the first of every month, thinned out to what can be read."""
    count = (last.year - first.year) * 12 + last.month - first.month
    step = next((s for s in (1, 2, 3, 6, 12) if count <= 14 * s), 12)
    out: list[tuple[float, str]] = []
    for n in range(first.month, first.month + count):
        start = date(first.year + n // 12, n % 12 + 1, 1)
        if (start.month - 1) % step == 0 and at(start) < _WIDTH - 40:
            name = day(start.isoformat()).split()[1]
            year = f" {start.year}" if start.month == 1 or not out else ""
            out.append((at(start), name + year))
    return out


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None
