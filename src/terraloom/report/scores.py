"""Label reports and scoreboards as the page shows them; unknown parts stay visible as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from terraloom.report.facts import Table, label, tabulate
from terraloom.report.formats import interval, number, percent, whole

__all__ = ["LabelTask", "ScoreRow", "label_tasks", "scoreboard", "suspects"]


@dataclass(frozen=True)
class LabelTask:
    """What became of the labels of one task.

    Attributes:
        name: Task.
        kept: Labels used, grouped text.
        rows: Rows of the file, grouped text.
        share: Used share of the rows, 0-1; NaN if unknown.
        facts: Name and value of single facts (file, repaired, clipped ...).
        dropped: Rule and count of the labels left out, largest first.
        classes: Table of labels and area per class, or None.
    """

    name: str
    kept: str
    rows: str
    share: float
    facts: list[list[str]]
    dropped: list[list[str]]
    classes: Table | None


def suspects(raw: Any, most: int = 12) -> tuple[int, Table] | None:
    """Labels that the held-out predictions contradict, the surest first.

    Args:
        raw: ``suspects`` of ``held_out.json``: label_id, class, likely, p_class, p_likely.
        most: Rows shown.

    Returns:
        How many there are, and a table of the first ``most``; None where none were looked for.
    """
    if not isinstance(raw, list) or not all(isinstance(s, Mapping) for s in raw):
        return None
    order = sorted(raw, key=lambda s: -interval(s.get("p_likely")).value)
    rows = [
        [
            whole(s.get("label_id")), str(s.get("class", "")), percent(s.get("p_class"), 0),
            str(s.get("likely", "")), percent(s.get("p_likely"), 0),
        ]
        for s in order[:most]
    ]  # fmt: skip
    columns = ["Row of the label file", "Label says", "Model gives it", "Model says", "Gives it"]
    return len(raw), Table("", columns, rows)


_DROP_WORDS = {
    "no_value": "without a value",
    "drop": "left out on purpose",
    "no_geometry": "without a shape",
    "outside_aoi": "outside the area",
    "sliver": "too small for a pixel",
    "contradiction": "same shape, other class",
    "duplicate": "drawn twice",
    "out_of_range": "value out of range",
    "too_small": "too small",
}


def label_tasks(raw: Any) -> tuple[list[LabelTask], list[Table]]:
    """Divide ``labels.json`` into one report per task and tables of all the rest.

    A task's report is a mapping with the key ``dropped``, wherever it stands.
    """
    found = sorted(_reports(raw), key=lambda pair: "classes" not in pair[1])  # the map first
    tasks = [_task(name, report) for name, report in found]
    rest = _without(raw, [id(r) for _, r in found])
    if isinstance(rest, Mapping):
        rest = {k: v for k, v in rest.items() if k not in ("campaign", "classes")}
        if isinstance(rest.get("leakage"), list):
            rest["leakage"] = {
                f"{r['check']}, {r['item']}": "ok" if r["ok"] else r["found"]
                for r in rest["leakage"]
            }
        folds = rest.get("folds")
        if isinstance(folds, Mapping):
            rest["folds"] = _folds(folds)
        audit = rest.get("audit")
        if isinstance(audit, Mapping) and "per_fold" in audit:
            per_fold = _per_fold(audit["per_fold"])
            rest["audit"] = {
                k: v for k, v in audit.items() if k not in ("per_fold", "labels_per_fold")
            }
            parts = (tabulate(v, label(k)) for k, v in rest.items())
            return tasks, [*per_fold, *(t for tables in parts for t in tables)]
    return tasks, tabulate(rest)


def _folds(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fold map without what only programs read: the fold of each block, lists of distances."""
    shown = {k: v for k, v in raw.items() if k != "fold_of_block" and v is not None}
    if isinstance(fitted := shown.pop("variogram", None), Mapping):
        shown |= {f"variogram_{k}": fitted[k] for k in ("model", "nugget", "sill") if k in fitted}
    return shown


def _per_fold(raw: Any) -> list[Table]:
    """A row per fold: labels, classes, and distances to the labels of the other folds."""
    if not isinstance(raw, list) or not all(isinstance(r, Mapping) for r in raw):
        return []
    columns = ["Fold", "Labels", "Classes", "Nearest label of another fold (m)", "Median (m)"]
    keys = ("labels", "classes", "nearest_m", "median_m")
    rows = [[str(r.get("fold", "")), *(whole(r.get(k)) for k in keys)] for r in raw]
    return [Table("Labels in folds", columns, rows)] if rows else []


def _reports(raw: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(raw, Mapping):
        if isinstance(raw.get("dropped"), Mapping):
            yield str(raw.get("task") or name), raw
            return
        for key, value in raw.items():
            yield from _reports(value, str(key))
    elif isinstance(raw, list):
        for value in raw:
            yield from _reports(value, name)


def _without(raw: Any, ids: list[int]) -> Any:
    if id(raw) in ids:
        return None
    if isinstance(raw, Mapping):
        kept = {k: _without(v, ids) for k, v in raw.items()}
        return {k: v for k, v in kept.items() if v is not None} or None
    if isinstance(raw, list):
        rest = [v for v in (_without(v, ids) for v in raw) if v is not None]
        return rest or None
    return raw


def _task(name: str, report: Mapping[str, Any]) -> LabelTask:
    kept = next((report[k] for k in ("kept", "used") if k in report), None)
    rows = next((report[k] for k in ("rows", "read") if k in report), None)
    share = interval(kept).value / interval(rows).value if interval(rows).value else math.nan
    dropped = sorted(report["dropped"].items(), key=lambda kv: (-interval(kv[1]).value, kv[0]))
    skip = {"task", "dropped", "classes", "kept", "used", "rows", "read", "pixels"}
    erosion = report.get("erosion")
    flat = {**report, **(erosion if isinstance(erosion, Mapping) else {})}
    single = {k: v for k, v in flat.items() if k not in skip and not isinstance(v, Mapping)}
    per_class = report.get("classes") or report.get("pixels")
    tables = tabulate(per_class) if isinstance(per_class, Mapping) else []
    return LabelTask(
        label(name.replace("-", "_")),
        whole(kept),
        whole(rows),
        share,
        [
            [label(k), ", ".join(map(number, v)) if isinstance(v, list) else number(v)]
            for k, v in single.items()
            if v not in (None, "", [])
        ],
        [[_DROP_WORDS.get(k, label(k).lower()), whole(n)] for k, n in dropped if n],
        tables[0] if tables else None,
    )


@dataclass(frozen=True)
class ScoreRow:
    """One score of the rehearsal: stage, what is scored, value, and how to read it."""

    stage: str
    what: str
    value: str
    note: str


_SCORES: dict[str, tuple[str, str, str, str]] = {
    "cloud_f1": ("Masks", "Clouds found", "%", "F1 of cloud pixels, all scenes"),
    "shadow_f1": ("Masks", "Cloud shadows found", "%", "F1 of shadow pixels, all scenes"),
    "shift_rmse_px": ("Alignment", "Error of scene shifts", "px", "root mean square, 10 m pixels"),
    "label_noise_recall": ("Labels", "Wrong labels found", "%", "of the labels made wrong"),
    "label_noise_precision": ("Labels", "Suspicions that were right", "%", "of labels suspected"),
    "oa": ("Map", "Overall accuracy", "%", "all pixels against the truth, not a sample"),
    "miou": ("Map", "Mean IoU", "%", "overlap of map and truth, mean over classes"),
    "boundary_iou": ("Map", "Boundary IoU", "%", "the same of the outermost 20 m of patches"),
    "height_rmse_m": ("Map", "Error of heights", "m", "root mean square"),
    "height_r2": ("Map", "R\u00b2 of heights", "", "1 is perfect, 0 no better than the mean"),
    "region_areas_inside": (
        "Regions",
        "True areas inside their intervals",
        "%",
        "the level of the intervals is wanted",
    ),
    "region_areas_inside_naive": (
        "Regions",
        "The same, pixels independent",
        "%",
        "what is too narrow holds less",
    ),
    "region_heights_inside": (
        "Regions",
        "True mean heights inside their intervals",
        "%",
        "a bias is in no interval",
    ),
    "region_heights_inside_naive": (
        "Regions",
        "The same, pixels independent",
        "%",
        "what is too narrow holds less",
    ),
    "ece": ("Confidence", "Calibration error", "%", "mean gap of confidence and accuracy"),
}


def scoreboard(raw: Any) -> tuple[list[ScoreRow], list[Table]]:
    """Divide ``scoreboard.json`` into known scores and tables of all the rest.

    A score that is null was not measured: it is left out, never shown as zero.
    """
    if not isinstance(raw, Mapping):
        return [], tabulate(raw)
    rows = []
    for key, (stage, what, unit, note) in _SCORES.items():
        value = interval(raw.get(key)).value
        if math.isfinite(value):
            text = percent(value) if unit == "%" else f"{number(value)} {unit}".strip()
            rows.append(ScoreRow(stage, what, text, note))
    inside, total = (interval(raw.get(k)).value for k in ("areas_inside_ci", "areas_total"))
    if math.isfinite(inside) and total > 0:
        note = "about one in twenty may lie outside"
        rows.append(
            ScoreRow("Areas", "True area inside its interval", f"{inside:.0f} of {total:.0f}", note)
        )
    known = {*_SCORES, "areas_inside_ci", "areas_total"}
    # True areas stand in the table of areas already.
    rest = {k: v for k, v in raw.items() if k not in known and not str(k).startswith("truth_area")}
    return rows, tabulate(rest) if rest else []
