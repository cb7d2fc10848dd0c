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
            {m: _same(a, b, f"results/{m}") for m in MILESTONES},
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


def _same(a: Recorded, b: Recorded, out: str) -> bool | None:
    return a.outs[out] == b.outs[out] if out in a.outs and out in b.outs else None


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
    write_text(out / TEXT, text_of(comparison) + "\n")
    if comparison.difference is not None:
        lines = ["before,after,area_ha"]
        for (a, b), ha in _changes(comparison.difference):
            lines.append(f'"{a}","{b}",{ha:.4f}')
        write_text(out / TABLE, "\n".join(lines) + "\n")


# --- text -----------------------------------------------------------------------------------------


def text_of(c: Comparison, *, level: int = 1) -> str:
    """A comparison as Markdown.

    Args:
        c: The comparison.
        level: Of its first heading.
    """
    head = "#" * level
    lines = [f"{head} {c.before} -> {c.after}", ""]
    same = {True: "the same bytes", False: "other", None: "not in both"}
    lines += [f"- {m}: {same[is_same]}" for m, is_same in c.milestones.items()]
    lines += ["", f"{head}# Campaign", "", *_key_lines(c.keys)]
    lines += ["", f"{head}# Scores", "", *_score_lines(c.scores)]
    lines += ["", f"{head}# Areas (ha)", "", *_area_lines(c.areas)]
    lines += ["", f"{head}# Where the maps differ", "", *_change_lines(c.difference)]
    return "\n".join(lines)


def present_text(c: Comparison, *, level: int = 1) -> str:
    """Scores and areas of the later state alone, as Markdown.

    Args:
        c: A comparison; of a first release, one of a state with itself.
        level: Of its headings.
    """
    head = "#" * level
    scores = [(name, _number(b)) for name, (_, b) in c.scores.items()]
    areas = [(name, _area(b)) for name, (_, b) in c.areas.items()]
    lines = [f"{head} Scores", "", *(_table(("score", "value"), scores) if scores else ["None."])]
    lines += ["", f"{head} Areas (ha)", ""]
    return "\n".join(lines + (_table(("class", "area"), areas) if areas else ["None."]))


def _key_lines(keys: Mapping[str, tuple[Any, Any]] | None) -> list[str]:
    if keys is None:
        return ["A state was saved without its campaign; see git diff."]
    if not keys:
        return ["All keys are the same."]
    rows = [(f"`{k}`", _short(a), _short(b)) for k, (a, b) in keys.items()]
    return _table(("key", "before", "after"), rows)


def _score_lines(scores: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    rows = []
    for name, (a, b) in scores.items():
        step = _ABSENT if a is None or b is None else f"{b - a:+.4g}"
        rows.append((name, _number(a), _number(b), step))
    return _table(("score", "before", "after", "change"), rows) if rows else ["None."]


def _area_lines(
    areas: Mapping[str, tuple[Mapping[str, str] | None, Mapping[str, str] | None]],
) -> list[str]:
    rows = [(name, _area(a), _area(b)) for name, (a, b) in areas.items()]
    return _table(("class", "before", "after"), rows) if rows else ["None."]


def _change_lines(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["A state has no map."]
    d = difference
    share = 100 * d.changed_ha / d.compared_ha if d.compared_ha else 0.0
    lines = [
        f"{d.changed_ha:.1f} ha of {d.compared_ha:.1f} ha have another class ({share:.2f} %); "
        f"{d.unknown_ha:.1f} ha have no class in one of the maps."
    ]
    if not d.aligned:
        lines.append("The maps have other pixels: the earlier one was read at the nearest pixel.")
    changes = _changes(d)
    rows = [(a, b, f"{ha:.2f}") for (a, b), ha in changes[:_SHOWN]]
    if rows:
        lines += ["", *_table(("before", "after", "ha"), rows)]
    if len(changes) > _SHOWN:
        lines.append(f"\nand {len(changes) - _SHOWN} smaller changes")
    return lines


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in lines]


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
