"""Two recorded states side by side: scores, areas, keys of the campaign, and where maps differ."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from terraloom.io import write_json, write_text
from terraloom.operate.difference import Difference, map_difference
from terraloom.operate.stored import MILESTONES, Recorded, open_state
from terraloom.plan import product_path
from terraloom.tables import csv_text, markdown_table

__all__ = ["Comparison", "compare_states", "present_text", "read_scores", "text_of"]

#: File names that a comparison writes.
RASTER, TABLE, FACTS, TEXT = "change.tif", "change.csv", "compare.json", "compare.md"

_SHOWN = 12
_ABSENT = "-"


@dataclass(frozen=True)
class Comparison:
    """What two states say, before and after.

    Attributes:
        before: Name of the earlier state.
        after: Name of the later one.
        milestones: Whether each milestone holds the same bytes; None where one has none.
        scores: Numbers of the milestones' metrics, by name; None where a state has no such.
        areas: Per class the areas (ha) with their intervals in both states.
        keys: Campaign keys whose values differ; None where a state was saved without campaign.
        difference: Where the maps differ; None where one has no map.
    """

    before: str
    after: str
    milestones: dict[str, bool | None]
    scores: dict[str, tuple[float | None, float | None]]
    areas: dict[str, tuple[dict[str, str] | None, dict[str, str] | None]]
    keys: dict[str, tuple[Any, Any]] | None
    difference: Difference | None = field(default=None)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        out = asdict(self)
        d = self.difference
        out["difference"] = d and {
            "aligned": d.aligned, "compared_ha": round(d.compared_ha, 4),
            "changed_ha": round(d.changed_ha, 4), "unknown_ha": round(d.unknown_ha, 4),
            "changes": [{"before": a, "after": b, "area_ha": round(ha, 4)}
                        for (a, b), ha in _changes(d)],
        }  # fmt: skip
        return out


def compare_states(
    before: str, after: str, run_dir: Path = Path(), out: Path | None = None
) -> Comparison:
    """Compare two recorded states; the workspace is not touched.

    Args:
        before: Tag or commit; ``WORK`` for the results that lie here now.
        after: Likewise.
        run_dir: Folder of the project, in a git repository.
        out: Folder for the raster and the table of changes, the text and the facts; nothing is
            written without.

    Raises:
        StateError: No such tag, no results in it, or the cache lacks them.
    """
    with tempfile.TemporaryDirectory(prefix="terraloom-") as scratch:
        links = [Path(scratch) / side for side in "ab"]
        a, b = (open_state(run_dir, n, d) for n, d in zip((before, after), links, strict=True))
        raster = out / RASTER if out else None
        comparison = Comparison(
            before, after,
            {m: _same(a, b, m) for m in MILESTONES},
            _side_by_side(read_scores(a), read_scores(b)),
            _side_by_side(_areas(a), _areas(b)),
            _keys(a.campaign, b.campaign),
            _difference(a, b, raster),
        )  # fmt: skip
    if out is not None:
        _write(comparison, out)
    return comparison


def read_scores(state: Recorded) -> dict[str, float]:
    """Numbers of the metrics of all milestones, as ``model.mean_iou``."""
    found = {}
    for milestone in MILESTONES:
        for key, value in _flat(state.json(f"{milestone}/metrics.json") or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[f"{milestone}.{key}"] = float(value)
    return found


def _same(a: Recorded, b: Recorded, milestone: str) -> bool | None:
    one, other = a.content(milestone), b.content(milestone)
    return one == other if one and other else None


def _areas(state: Recorded) -> dict[str, dict[str, str]]:
    path = state.folder / "results/map/areas.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as f:
        return {row["name"]: dict(row) for row in csv.DictReader(f)}


def _keys(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Any:
    if a is None or b is None:
        return None
    both = _side_by_side(_flat(a), _flat(b))
    return {key: pair for key, pair in both.items() if pair[0] != pair[1]}


def _difference(a: Recorded, b: Recorded, out: Path | None) -> Difference | None:
    facts = [s.json("map/map.json") for s in (a, b)]
    if None in facts:
        return None
    first, second = ({int(c["code"]): str(c["name"]) for c in f["legend"]} for f in facts)
    maps = [product_path("class_map", s.folder / "results/map") for s in (a, b)]
    return map_difference(maps[0], maps[1], (first, second), out)


def _side_by_side(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)]}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; items of lists by their name, else by their place."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[str, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        items = ((str(v.get("name", v.get("source", i))) if isinstance(v, Mapping) else str(i), v)
                 for i, v in enumerate(value))  # fmt: skip
    else:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def _changes(difference: Difference) -> list[tuple[tuple[str, str], float]]:
    changed = [(pair, ha) for pair, ha in difference.pairs_ha.items() if pair[0] != pair[1]]
    return sorted(changed, key=lambda item: (-item[1], item[0]))


def _write(comparison: Comparison, out: Path) -> None:
    write_json(out / FACTS, comparison.record())
    write_text(out / TEXT, text_of(comparison))
    if comparison.difference is not None:
        rows = ((a, b, f"{ha:.4f}") for (a, b), ha in _changes(comparison.difference))
        write_text(out / TABLE, csv_text(("before", "after", "area_ha"), rows))


# --- text -----------------------------------------------------------------------------------------


def text_of(c: Comparison, *, titled: bool = True) -> str:
    """A comparison as Markdown.

    Args:
        c: The comparison.
        titled: Whether its first line names the two states.
    """
    same = {True: "the same bytes", False: "other", None: "not in both"}
    title = f"# {c.before} -> {c.after}\n\n" if titled else ""
    milestones = "".join(f"- {m}: {same[is_same]}\n" for m, is_same in c.milestones.items())
    parts = {
        "Campaign": _keys_text(c.keys),
        "Scores": _scores_text(c.scores),
        "Areas (ha)": markdown_table(
            ("class", "before", "after"), ((n, _area(a), _area(b)) for n, (a, b) in c.areas.items())
        ),
        "Where the maps differ": _changes_text(c.difference),
    }
    return title + milestones + _sections(parts)


def present_text(state: Recorded) -> str:
    """Scores and areas of one state, as Markdown."""
    scores = ((name, _number(v)) for name, v in read_scores(state).items())
    areas = ((name, _area(row)) for name, row in _areas(state).items())
    return _sections({
        "Scores": markdown_table(("score", "value"), scores),
        "Areas (ha)": markdown_table(("class", "area"), areas),
    })  # fmt: skip


def _sections(parts: Mapping[str, str]) -> str:
    return "".join(f"\n## {title}\n\n{text}" for title, text in parts.items())


def _keys_text(keys: Mapping[str, tuple[Any, Any]] | None) -> str:
    if keys is None:
        return "A state was saved without its campaign; see git diff.\n"
    if not keys:
        return "All keys are the same.\n"
    rows = ((f"`{k}`", _short(a), _short(b)) for k, (a, b) in keys.items())
    return markdown_table(("key", "before", "after"), rows)


def _scores_text(scores: Mapping[str, tuple[float | None, float | None]]) -> str:
    rows = []
    for name, (a, b) in scores.items():
        if a != b:
            step = _ABSENT if a is None or b is None else f"{b - a:+.4g}"
            rows.append((name, _number(a), _number(b), step))
    table = markdown_table(("score", "before", "after", "change"), rows) if rows else ""
    return f"{table}{len(scores) - len(rows)} scores are the same.\n"


def _changes_text(difference: Difference | None) -> str:
    if difference is None:
        return "A state has no map.\n"
    d = difference
    share = 100 * d.changed_ha / d.compared_ha if d.compared_ha else 0.0
    text = (
        f"{d.changed_ha:.1f} ha of {d.compared_ha:.1f} ha have another class ({share:.2f} %); "
        f"{d.unknown_ha:.1f} ha have no class in one of the maps.\n"
    )
    if not d.aligned:
        text += "The maps have other pixels: the earlier one was read at the nearest pixel.\n"
    changes = _changes(d)
    if changes:
        rows = ((a, b, f"{ha:.2f}") for (a, b), ha in changes[:_SHOWN])
        text += "\n" + markdown_table(("before", "after", "ha"), rows)
    if len(changes) > _SHOWN:
        text += f"\nand {len(changes) - _SHOWN} smaller changes\n"
    return text


def _area(row: Mapping[str, str] | None) -> str:
    if row is None:
        return _ABSENT
    if row.get("area_ha"):
        return f"{float(row['area_ha']):.1f} ({_end(row, 'low_ha')}-{_end(row, 'high_ha')})"
    return f"{float(row['map_area_ha']):.1f} (of the map, not an estimate)"


def _end(row: Mapping[str, str], key: str) -> str:
    return f"{float(row[key]):.1f}" if row.get(key) else "?"


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    text = _ABSENT if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
