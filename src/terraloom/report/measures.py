"""Tables of what else was measured: model-assisted areas, values, disagreement, probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from terraloom.report import facts, formats
from terraloom.report.facts import Table
from terraloom.report.formats import hectares, interval, number, percent

__all__ = ["assisted", "disagreement", "probabilities", "values"]

#: Name, what it says, whether it is a share; in the order of the table.
_SCORES = (
    ("oa", "agreement with the labels", True),
    ("macro_f1", "mean F1 of the classes", True),
    ("ece", "mean gap between confidence and accuracy (ECE)", True),
    ("brier", "squared error of the probabilities, 0 to 2 (Brier)", False),
    ("nll", "surprise at the labels, nats (NLL)", False),
    ("aurc", "error left when the least confident pixels go first (AURC)", False),
    ("augrc", "chance of an error that was not caught (AUGRC)", False),
)
_CAUSES = (
    ("quantity", "too much of one class, too little of another"),
    ("exchange", "two classes swapped for each other"),
    ("shift", "errors that go round among classes"),
)


def assisted(accuracy: Any) -> dict[str, Any] | None:
    """Model-assisted areas beside the design-based ones; None where there are none."""
    raw = accuracy.get("assisted") if isinstance(accuracy, Mapping) else None
    if not isinstance(raw, Mapping) or not raw.get("classes"):
        return None
    rows = [
        [
            str(c["name"]), hectares(c["area_ha"]),
            f"{hectares(c['low_ha'])} to {hectares(c['high_ha'])}", number(c.get("gain")),
        ]
        for c in raw["classes"]
    ]  # fmt: skip
    gain = interval(raw.get("gain"))
    return {
        "table": Table("", ["Class", "Area (ha)", "Interval", "Gain"], rows),
        "gain": number(gain.value, 2) if gain.known else "",
        "units": formats.whole(raw.get("effective_units")),
    }


def values(accuracy: Any) -> list[Table]:
    """Accuracy of maps of values at the sample's units, one table per task."""
    raw = accuracy.get("values") if isinstance(accuracy, Mapping) else None
    tables = []
    for name, found in (raw or {}).items():
        if not isinstance(found, Mapping) or "rmse" not in found:
            continue
        unit = f" {found['unit']}" if found.get("unit") else ""
        rows = []
        for key, text in (("bias", "bias"), ("mae", "mean error"), ("rmse", "RMSE"), ("r2", "R²")):
            v, of = interval(found[key]), "" if key == "r2" else unit
            rows.append([text, f"{number(v.value)}{of} ({number(v.low)} to {number(v.high)})"])
        title = f"{facts.label(str(name).replace('-', '_'))}, {formats.whole(found['n'])} units"
        tables.append(Table(title, [], rows))
    return tables


def disagreement(accuracy: Any) -> Table | None:
    """Where map and reference differ, by cause, in percent of the area."""
    report = accuracy.get("report") if isinstance(accuracy, Mapping) else None
    raw = report.get("disagreement") if isinstance(report, Mapping) else None
    if not isinstance(raw, Mapping):
        return None
    rows = [[text, percent(raw.get(key))] for key, text in _CAUSES if raw.get(key) is not None]
    return Table("Where the map is wrong, by cause", [], rows) if rows else None


def probabilities(held_out: Mapping[str, Any]) -> Table | None:
    """Scores of the class probabilities on held-out blocks, and their spread over folds."""
    raw = held_out.get("probabilities")
    if not isinstance(raw, Mapping):
        return None
    folds: Mapping[str, Any] = raw.get("folds") or {}
    overall = held_out.get("overall") or {}
    rows = []
    for key, text, is_share in _SCORES:
        found = interval(raw.get(key, overall.get(key)))
        if not found.known:
            continue
        show = percent if is_share else number
        spread = folds.get(key) or {}
        mean, sd = interval(spread.get("mean")), interval(spread.get("sd"))
        over = (
            f"{show(mean.value)} ± {show(sd.value)}" if mean.known and sd.known else formats.MISSING
        )
        rows.append([text, show(found.value), over])
    n, bins = formats.whole(raw.get("n")), formats.whole(raw.get("n_bins"))
    title = f"Probabilities on {n} held-out pixels (ECE in {bins} bins)"
    return Table(title, ["Score", "All folds", "Mean ± sd of folds"], rows)
