"""The model card: what a model was made from, how good it is, and what it must not be used for.

After Mitchell et al. (2019), Model Cards for Model Reporting.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from terraloom.config.campaign import Campaign
from terraloom.io import read_json, write_text
from terraloom.tables import markdown_table
from terraloom.train.model_files import CHIPS, MODEL, member_files

__all__ = ["CARD", "write_model_card"]

CARD = MODEL / "model_card.md"


def write_model_card(campaign: Campaign) -> None:
    """Write ``model_card.md`` from the records of labels, chips, members and held-out scores."""
    labels, chips = read_json(CHIPS.with_name("labels.json")), read_json(_near("metrics.json"))
    held = read_json(MODEL / "held_out.json")
    member = read_json(member_files(0)[0].with_suffix(".json"))
    parts = [
        "# Model card\n",
        _what(campaign, member),
        _data(campaign, labels, chips),
        _scores(campaign, held, labels),
        _limits(held, chips),
    ]
    write_text(CARD, "\n".join(parts))


def _near(name: str) -> Path:
    return CHIPS.with_name(name)


def _what(campaign: Campaign, member: Mapping[str, Any]) -> str:
    m = campaign.model
    channels = member["spec"]["channels"]
    rows = [[g, str(len(names)), ", ".join(names)] for g, names in channels.items()]
    return (
        "## What it is\n\n"
        f"{campaign.folds.count * m.members} networks of kind `{member['architecture']}` with "
        f"{member['parameters']:,} weights each, {m.members} for each of "
        f"{campaign.folds.count} folds that they have not seen; their mean is the prediction. A "
        f"pixel's output depends on inputs at most {member['receptive_field_px']} pixels "
        f"({10 * member['receptive_field_px']} m) away. Weights are in `fold-*/`; inputs are "
        "channels by sensor and pixel size:\n\n"
        + markdown_table(["group", "channels", "names"], rows)
    )


def _data(campaign: Campaign, labels: Mapping[str, Any], chips: Mapping[str, Any]) -> str:
    rows = []
    for task in campaign.tasks:
        read, cut = labels["tasks"][task.name], chips["tasks"][task.name]
        dropped = sum(read["dropped"].values())
        rows.append([task.name, str(task.kind), read["file"], str(read["kept"]), str(dropped),
                     f"{cut['kept_px']:,}", f"{cut['lost_invalid_pct']:.1f} %"])  # fmt: skip
    periods = ", ".join(f"{p.name} ({p.start} to {p.end})" for p in campaign.cube.periods)
    sources = ", ".join(s.source for s in campaign.sources)
    return (
        f"## What it was made from\n\nImages: {sources}; periods {periods}. Training windows: "
        f"{chips['chips']} of {campaign.chips.size_px} pixels.\n\n"
        + markdown_table(
            ["task", "kind", "labels", "kept", "left out", "pixels", "under cloud"], rows
        )
        + f"\nFolds: {campaign.folds.count} by `{campaign.folds.method}`, blocks of "
        f"{labels['folds']['block_m']:g} m, buffer {campaign.folds.buffer_m:g} m.\n"
    )


def _interval(v: Mapping[str, float] | None) -> str:
    if v is None or v["value"] is None or not np.isfinite(v["value"]):
        return "undefined"
    return f"{v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f})"


def _scores(campaign: Campaign, held: Mapping[str, Any], labels: Mapping[str, Any]) -> str:
    rows = [[c["name"], f"{c['pixels']:,}", *(_interval(c[k]) for k in ("precision", "recall",
             "f1"))] for c in held["per_class"]]  # fmt: skip
    overall = held["overall"]
    text = (
        "## How good it is on labels it has not seen\n\n"
        f"Overall accuracy {_interval(overall['oa'])}, "
        f"macro-F1 {_interval(overall['macro_f1'])} on "
        f"{held['n_pixels']:,} pixels of {held['n_blocks']} held-out blocks (95 % intervals over "
        f"blocks). Calibration error {held['ece_before']:.3f} before, {held['ece_after']:.3f} "
        "after calibration.\n\n"
        + markdown_table(["class", "pixels", "precision", "recall", "F1"], rows)
    )
    for name, r in held["regression"].items():
        text += f"\n{name}: RMSE {r['rmse']:.3g} {r['unit']}, bias {r['bias']:.3g} {r['unit']}.\n"
    for name, b in held["boundary"].items():
        text += f"\n{name}: F1 {b['f1']:.3f} at a probability of {b['cut']:.2f}.\n"
    if held["baseline"]:
        same = held["baseline"]["same_pixels"]
        text += (
            "\nA random forest on the same pixels and folds: overall accuracy "
            f"{same['oa']:.3f}, macro-F1 {same['macro_f1']:.3f}.\n"
        )
    return text


def _limits(held: Mapping[str, Any], chips: Mapping[str, Any]) -> str:
    lines = [
        "The scores above are those of held-out labels, which are no probability sample: they are "
        "not the accuracy of the map. That, and areas with intervals, come from `sample`.",
        "It knows the sensors, bands, periods and pixel sizes named above. Other ones are refused; "
        "another region or year is outside of what was tested.",
    ]
    if held["label_noise_pct"] > 0:
        lines.append(
            f"{held['label_noise_pct']:.1f} % of the labels are contradicted by held-out "
            "predictions; they are listed in `suspects.gpkg` for review."
        )
    few = [c["name"] for c in held["per_class"] if c["f1"] and (c["f1"]["value"] or 0) < 0.5]
    if few:
        lines.append(f"Classes with F1 below .5, not to be relied on: {', '.join(few)}.")
    if chips["classes_in_one_fold"]:
        lines.append(f"Seen in one fold only: {', '.join(chips['classes_in_one_fold'])}.")
    aim = "Intended use: the map of this area for the periods named above, and its update."
    return "## Limits\n\n" + f"{aim}\n\n" + "".join(f"- {line}\n" for line in lines)
