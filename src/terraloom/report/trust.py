"""What stays possible where: sets of classes and their coverage, the area of applicability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from terraloom.plan import product_path
from terraloom.report import charts, facts, figures, formats

__all__ = ["applicability", "coverage", "trust"]

_METHODS = {
    "class": "each class by itself",
    "split": "all labels together",
    "block": "each block of land",
}


def trust(
    root: Path, record: Mapping[str, Any], held_out: Mapping[str, Any], task: str
) -> dict[str, Any]:
    """Both parts; None for what the campaign did not ask for."""
    return {
        "coverage": coverage(root, record, held_out, task),
        "applicability": applicability(root, record),
    }


def coverage(
    root: Path, record: Mapping[str, Any], held_out: Mapping[str, Any], task: str
) -> dict[str, Any] | None:
    """Sets of classes: a picture of their size, and how often they held the label.

    Args:
        root: The results folder.
        record: Content of ``map.json``.
        held_out: Content of ``held_out.json``.
        task: Name of the class map's task.
    """
    path = product_path("conformal_set", root / "map")
    found = (held_out.get("coverage") or {}).get(task)
    if not path.is_file() or not isinstance(found, Mapping):
        return None
    chosen = found["methods"][found["method"]]
    size = figures.scalar_picture(
        path, 1, cmap="doubt", low=1.0,
        alt="Number of classes that stay possible at each pixel",
    )  # fmt: skip
    sizes = (record.get("conformal_set") or {}).get("size_pct") or {}
    rows = [
        (str(c["name"]), formats.interval(c.get("coverage")), int(c.get("labels") or 0))
        for c in chosen["per_class"]
    ]
    blocks = [(float(b["coverage"]), int(b["units"])) for b in chosen["per_block"]]
    return {
        "target": float(found["target"]),
        "method": _METHODS.get(str(found["method"]), str(found["method"])),
        "overall": formats.interval(chosen["coverage"]),
        "noise": found.get("label_noise_pct"),
        "true": chosen.get("true_coverage"),
        "labels": int(chosen["units"]),
        "blocks": len(blocks),
        "low_blocks": sum(c < float(found["target"]) for c, _ in blocks),
        "worst": formats.interval(chosen["worst_block"]).value,
        "always": [str(n) for n in found["always_in_the_set"]],
        "size": size,
        "single": formats.interval(sizes.get("1")).value / 100,
        "mean_size": formats.interval((record.get("conformal_set") or {}).get("mean_size")).value,
        "chart": charts.coverage_chart(
            [n for n, _, _ in rows], [v for _, v, _ in rows], float(found["target"])
        ),
        "rows": rows,
        "values": _values(held_out, task),
    }


def _values(held_out: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Coverage of the intervals of the regression tasks."""
    out = []
    for name, found in (held_out.get("coverage") or {}).items():
        if name == task or not isinstance(found, Mapping):
            continue
        chosen = found["methods"][found["method"]]
        out.append(
            {
                "name": facts.label(str(name).replace("-", "_")),
                "target": float(found["target"]),
                "coverage": formats.interval(chosen["coverage"]),
                "width": formats.interval(chosen.get("mean_width")),
                "unit": str(found.get("of_unit") or ""),
                "blocks": int(found["blocks"]),
            }
        )
    return out


def applicability(root: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Dissimilarity to the training data, and the share of the map that is like it."""
    path = product_path("applicability", root / "map")
    facts_of_map = record.get("applicability")
    if not path.is_file() or not isinstance(facts_of_map, Mapping):
        return None
    picture = figures.scalar_picture(
        path, 1, cmap="ignorance", factor=1e-3,
        alt="Dissimilarity of each pixel to the training data",
    )  # fmt: skip
    outside = figures.flag_picture(path, 3, 0, "Places unlike the training data")
    inside = formats.interval(facts_of_map.get("inside_pct")).value / 100
    tiles = {
        str(t): formats.interval(v).value
        for t, v in (facts_of_map.get("tiles_inside_pct") or {}).items()
    }
    known = {t: v for t, v in tiles.items() if math.isfinite(v)}
    worst = min(known, key=known.__getitem__) if known else ""
    return {
        "picture": picture,
        "outside": outside,
        "inside": inside,
        "worst": worst,
        "worst_inside": known.get(worst, math.nan) / 100,
        "tiles": len(tiles),
    }
