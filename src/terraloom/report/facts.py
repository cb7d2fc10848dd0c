"""From the files of a run to what the page says: pure functions on parsed JSON and CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.report.formats import MISSING, Interval, interval, number, percent, whole

__all__ = [
    "AreaRow", "Areas", "SceneRow", "Skill", "SkillRow", "Table", "areas", "curves", "label",
    "scenes", "skill", "tabulate",
]  # fmt: skip

_WORDS = {
    "oa": "overall accuracy", "f1": "F1", "macro f1": "macro F1", "ha": "ha", "pct": "%",
    "rmse": "RMSE", "r2": "R²", "mae": "MAE", "iou": "IoU", "miou": "mean IoU", "ece": "ECE",
    "ua": "user's accuracy", "pa": "producer's accuracy", "sd": "sd", "se": "standard error",
    "px": "px", "auc": "AUC", "ci": "interval", "crs": "CRS", "id": "id", "dem": "DEM",
}  # fmt: skip


def label(key: Any) -> str:
    """A key of a file as words: ``area_ha`` becomes ``Area (ha)``; other text stays as it is."""
    if not re.fullmatch(r"[a-z0-9_]+", str(key)):
        return str(key)
    text = str(key).replace("_", " ").strip()
    unit = re.search(r" (ha|pct|px|m|m2|days|db)$", text)
    if unit and len(text) > len(unit[0]):
        text = text[: -len(unit[0])]
    words = _WORDS.get(text.lower()) or " ".join(_WORDS.get(w.lower(), w) for w in text.split())
    if unit and unit[1] != text:
        words += f" ({_WORDS.get(unit[1], unit[1])})"
    return words[:1].upper() + words[1:]


# ---------------------------------------------------------------- any JSON as tables


@dataclass
class Table:
    """A table of texts.

    Attributes:
        title: Heading; empty at the top level.
        columns: Headings of the columns; none for a list of names and values.
        rows: Cells as text, one list per row.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    @property
    def narrow(self) -> bool:
        """Whether several such tables fit side by side."""
        return not self.columns or len(self.columns) <= 3


def tabulate(raw: Any, title: str = "", *, depth: int = 0) -> list[Table]:
    """Show JSON of unknown shape as plain tables, so that no number of a run is hidden.

    Mappings of plain values become two columns; lists of mappings, and mappings of mappings,
    become one row each; deeper levels become tables of their own.
    """
    if depth > 4 or raw is None:
        return []
    if isinstance(raw, list):
        if raw and all(isinstance(r, Mapping) for r in raw):
            return [_rows_table(title, [(None, r) for r in raw])]
        # A long list (such as the fold of every block) is data for programs, not for readers.
        shown = [[_cell(r)] for r in raw] if len(raw) <= 12 else [[f"{len(raw)} values"]]
        return [Table(title, [], shown)] if raw else []
    if not isinstance(raw, Mapping):
        return [Table(title, [], [[_cell(raw)]])]
    plain = {k: v for k, v in raw.items() if _is_plain(v)}
    deep = {k: v for k, v in raw.items() if k not in plain}
    if deep and not plain and len(deep) > 1 and all(_is_flat(v) for v in deep.values()):
        return [_rows_table(title, list(deep.items()))]
    tables = []
    if plain:
        rows = [[label(k), _cell(v)] for k, v in plain.items()]
        tables.append(Table(title, [], rows))
    for key, value in deep.items():
        name = f"{title} · {label(key)}" if title else label(key)
        tables.extend(tabulate(value, name, depth=depth + 1))
    return tables


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "value" in value and set(value) <= {
            "value", "low", "high", "lower", "upper", "se", "half_width",
        }  # fmt: skip
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(v, (str, int, float)) for v in value)
    return True


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_plain(v) for v in value.values())


def _rows_table(title: str, rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> Table:
    keys = list(dict.fromkeys(k for _, row in rows for k in row))
    keys.sort(key=lambda k: k not in ("name", "class", "task", "id", "code"))  # stable: names first
    named = any(name is not None for name, _ in rows)
    columns = ([""] if named else []) + [label(k) for k in keys]
    cells = [
        ([str(name)] if named else []) + [_cell(row.get(k, "")) for k in keys] for name, row in rows
    ]
    return Table(title, columns, cells)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        part = interval(value)
        if not part.known:
            inner = ", ".join(f"{label(k)} {_cell(v)}" for k, v in value.items())
            return inner if "value" not in value else MISSING
        ends = f" ({number(part.low)} to {number(part.high)})" if part.has_range else ""
        return number(part.value) + ends
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    if isinstance(value, str) and re.fullmatch(r"[a-z]+(_[a-z]+)+", value):
        return value.replace("_", " ")
    return number(value)


# ---------------------------------------------------------------- model skill


@dataclass(frozen=True)
class SkillRow:
    """Held-out skill of one class; all measures are shares 0-1."""

    name: str
    precision: Interval
    recall: Interval
    f1: Interval
    pixels: str


@dataclass
class Skill:
    """Held-out skill of the ensemble, and of the baseline on the same folds.

    Attributes:
        names: K class names.
        oa: Overall agreement on held-out blocks, 0-1.
        macro_f1: Mean F1 over classes, 0-1.
        rows: One row per class.
        confusion: (K, K) pixel counts, rows reference, columns model; empty if absent.
        baseline: Rows of (who, overall, macro F1) texts; empty without a baseline.
        other: Tables of the regression and boundary tasks.
        raw: The file's content, for single numbers such as ``n_blocks``.
    """

    names: list[str]
    oa: Interval
    macro_f1: Interval
    rows: list[SkillRow]
    confusion: npt.NDArray[np.float64]
    baseline: list[list[str]]
    other: list[Table]
    raw: dict[str, Any]

    def whole(self, key: str) -> str:
        """A count of the file, grouped; a dash where absent."""
        return whole(self.raw.get(key))

    def calibration(self) -> tuple[str, str] | None:
        """Calibration error before and after, in percent."""
        before, after = interval(self.raw.get("ece_before")), interval(self.raw.get("ece_after"))
        return (percent(before.value), percent(after.value)) if after.known else None


def skill(raw: Mapping[str, Any]) -> Skill:
    """Read ``held_out.json``; every part but the overall numbers may be absent."""
    overall = raw.get("overall") or {}
    oa, macro = interval(overall.get("oa")), interval(overall.get("macro_f1"))
    rows = [
        SkillRow(
            str(c.get("name", "")), interval(c.get("precision")), interval(c.get("recall")),
            interval(c.get("f1")), whole(c.get("pixels")),
        )
        for c in raw.get("per_class") or []
    ]  # fmt: skip
    names = [str(n) for n in raw.get("classes") or [r.name for r in rows]]
    matrix = np.array(raw.get("confusion") or [], dtype=float)
    if matrix.shape != (len(names), len(names)):
        matrix = np.zeros((0, 0))
    other = [
        t
        for key, title in (("regression", "Regression"), ("boundary", "Boundaries"))
        for t in tabulate(raw.get(key) or None, title)
    ]
    return Skill(
        names, oa, macro, rows, matrix, _baseline(raw.get("baseline"), oa, macro), other, dict(raw)
    )


def _baseline(raw: Any, oa: Interval, macro: Interval) -> list[list[str]]:
    if not isinstance(raw, Mapping):
        return []
    rows = [["This model (ensemble)", oa.percent_text(), macro.percent_text()]]
    titles = {
        "all_pixels": "Random forest, all held-out pixels",
        "same_pixels": "Random forest, only pixels that both can classify",
        "ensemble_same_pixels": "This model, only pixels that both can classify",
    }
    for key, part in raw.items():
        if isinstance(part, Mapping) and ("oa" in part or "macro_f1" in part):
            texts = [interval(part.get(m)).percent_text() for m in ("oa", "macro_f1")]
            rows.append([titles.get(key, f"Random forest, {label(key).lower()}"), *texts])
    if len(rows) == 1 and "oa" in raw:
        texts = [interval(raw.get(m)).percent_text() for m in ("oa", "macro_f1")]
        rows.append(["Random forest", *texts])
    return rows if len(rows) > 1 else []


def curves(rows: Sequence[Mapping[str, str]]) -> dict[str, npt.NDArray[np.float64]]:
    """Reliability bins by curve: (bins, 3) of confidence, accuracy (0-1) and count.

    A text column (``stage``, ``when``, ``which``, ``curve``) divides the rows into curves.
    """
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        name = next((row[k] for k in ("stage", "when", "which", "curve") if row.get(k)), "")
        values = [interval(row.get(k)).value for k in ("confidence", "accuracy", "count")]
        if all(math.isfinite(v) for v in values):
            found.setdefault(name, []).append(values)
    return {name: np.array(sorted(bins)) for name, bins in found.items()}


def learning(rows: Sequence[Mapping[str, str]]) -> dict[str, npt.NDArray[np.float64]]:
    """Training loss by task: (steps, 2) of step and loss."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        values = [interval(row.get(k)).value for k in ("step", "loss")]
        if all(math.isfinite(v) for v in values):
            found.setdefault(label(str(row.get("task", "")).replace("-", "_")), []).append(values)
    return {name: np.array(points) for name, points in found.items()}


# ---------------------------------------------------------------- areas


@dataclass(frozen=True)
class AreaRow:
    """Area of one class in hectares; accuracies are shares 0-1; NaN where unknown."""

    code: int
    name: str
    color: str
    map_ha: float
    share: float
    estimate: Interval
    users: Interval
    producers: Interval
    truth_ha: float

    @property
    def covered(self) -> bool | None:
        """Whether the interval holds the truth; None where either is unknown."""
        if not (self.estimate.has_range and math.isfinite(self.truth_ha)):
            return None
        return self.estimate.low <= self.truth_ha <= self.estimate.high


@dataclass(frozen=True)
class Areas:
    """Areas of all classes, and the overall accuracy where a probability sample gives it."""

    rows: list[AreaRow]
    sampled: bool
    oa: Interval
    level: float
    sample: list[list[str]]
    notes: list[str]

    @property
    def has_truth(self) -> bool:
        """Whether any true area is known."""
        return any(math.isfinite(r.truth_ha) for r in self.rows)

    @property
    def level_text(self) -> str:
        """Confidence level, such as ``95%``."""
        return f"{100 * self.level:g}%"


def areas(legend: Sequence[Mapping[str, Any]], accuracy: Any, scoreboard: Any) -> Areas:
    """Join map areas, design-based estimates (``accuracy.json``) and truth (``scoreboard.json``).

    Args:
        legend: Entries of ``map.json``: code, name, color, map_area_ha, share_pct.
        accuracy: The estimators' JSON, with one entry per class or with one mapping per measure;
            None without a probability sample.
        scoreboard: JSON of the simulated region's scores; None elsewhere.
    """
    accuracy = accuracy if isinstance(accuracy, Mapping) else {}
    by_class = _per_class(accuracy)
    truth = _truth_areas(scoreboard)
    rows = []
    for entry in legend:
        code, name = int(entry["code"]), str(entry["name"])
        found = by_class.get(str(code)) or by_class.get(name) or {}
        true_ha = truth.get(name, truth.get(str(code), interval(found.get("truth_area_ha")).value))
        share = interval(entry.get("share_pct")).value / 100
        rows.append(
            AreaRow(
                code, name, str(entry["color"]), interval(entry.get("map_area_ha")).value, share,
                found.get("area", Interval()), interval(found.get("ua")),
                interval(found.get("pa")), true_ha,
            )
        )  # fmt: skip
    oa = interval(accuracy.get("oa", accuracy.get("overall")))
    sample = accuracy.get("sample")
    facts = dict(sample) if isinstance(sample, Mapping) else {}
    for key in ("kind", "n_units", "total_area_ha"):
        if key in accuracy and key not in facts:
            facts[key] = accuracy[key]
    inner = accuracy.get("report")
    notes = accuracy.get("notes") or (inner.get("notes") if isinstance(inner, Mapping) else None)
    level = interval(accuracy.get("level", 0.95)).value
    texts = [[label(k), _cell(v)] for k, v in facts.items() if _is_plain(v)]
    return Areas(
        rows, any(r.estimate.known for r in rows), oa, level, texts, [str(n) for n in notes or []]
    )


def _per_class(accuracy: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Both forms of the estimators' JSON as class (code and name) to measures."""
    found: dict[str, dict[str, Any]] = {}
    for entry in accuracy.get("classes") or []:
        if isinstance(entry, Mapping):
            ends = [interval(entry.get(k)).value for k in ("area_ha", "low_ha", "high_ha")]
            part = {**entry, "area": Interval(*ends)}
            found[str(entry.get("name"))] = part
            if "code" in entry:
                found[str(entry["code"])] = part
        else:
            names = {"area": "area_ha", "ua": "users", "pa": "producers"}
            part = {k: (accuracy.get(v) or {}).get(str(entry)) for k, v in names.items()}
            found[str(entry)] = {**part, "area": interval(part["area"])}
    return found


def _truth_areas(scoreboard: Any) -> dict[str, float]:
    """True hectares by class name or code, wherever the scoreboard keeps them."""
    found: dict[str, float] = {}
    for node in _walk(scoreboard):
        for key, value in node.items():
            if not re.fullmatch(r"(truth|true)(_area)?(_ha)?|area_true(_ha)?", str(key)):
                continue
            if isinstance(value, Mapping):
                pairs = {str(k): interval(v).value for k, v in value.items()}
                found.update({k: v for k, v in pairs.items() if math.isfinite(v)})
            elif str(key).endswith("_ha") and math.isfinite(interval(value).value):
                for which in ("name", "class", "code"):
                    if which in node:
                        found[str(node[which])] = float(value)
    return found


def _walk(raw: Any, name: str = "") -> Iterable[Mapping[str, Any]]:
    if isinstance(raw, Mapping):
        yield {"name": name, **raw} if name else raw
        for key, value in raw.items():
            yield from _walk(value, str(key))
    elif isinstance(raw, list):
        for value in raw:
            yield from _walk(value)


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class SceneRow:
    """One scene as the page shows it; ISO date, percentages 0-100 or NaN."""

    id: str
    source: str
    date: str
    used: bool
    why: str
    clear: float
    cloud: float
    shadow: float
    shift: str


def scenes(
    items: Sequence[Mapping[str, Any]], quality: Sequence[Mapping[str, str]]
) -> list[SceneRow]:
    """Scenes of the lock with what the masks and the alignment found; the later decision wins."""
    by_id = {row.get("id", ""): row for row in quality}
    rows = []
    for item in items:
        row: Mapping[str, Any] = by_id.get(str(item.get("id")), {})
        decision = str(row.get("decision") or item.get("decision") or "use")
        dy, dx = interval(row.get("dy_px")).value, interval(row.get("dx_px")).value
        shift = f"{dy:+.2f}, {dx:+.2f}" if math.isfinite(dy) and math.isfinite(dx) else MISSING
        rows.append(
            SceneRow(
                str(item.get("id", "")), str(row.get("source") or item.get("source") or ""),
                str(row.get("datetime") or item.get("datetime") or "")[:10], decision == "use",
                str(row.get("why") or item.get("why") or ""),
                interval(row.get("clear_pct")).value, interval(row.get("cloud_pct")).value,
                interval(row.get("shadow_pct")).value, shift.replace("-", "\u2212"),
            )
        )  # fmt: skip
    return rows
