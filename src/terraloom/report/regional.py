"""Section on regions: a map of them and a table of their areas and values with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terraloom.report import charts, facts, formats, provenance

__all__ = ["regions"]

#: Rows of the table; what is left stands in the file.
_MOST_ROWS = 400

#: Maps of regions side by side.
_MOST_MAPS = 6


def regions(root: Path, legend: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What ``regions.json`` and ``regions.gpkg`` hold; None without regions.

    Args:
        root: The results folder.
        legend: Entries of ``map.json`` with name and colour.
    """
    raw = provenance.optional_json(root / "map" / "regions.json")
    if not isinstance(raw, Mapping):
        return None
    rows = [_row(r) for r in raw["rows"]]
    narrow = [r["independent_se"] / r["se"] for r in raw["rows"] if r["se"] and r["independent_se"]]
    return {
        "file": str(raw.get("file") or ""),
        "level": f"{100 * float(raw['level']):g}%",
        "n": int(raw["regions"]),
        "rows": rows[:_MOST_ROWS],
        "more": max(0, len(rows) - _MOST_ROWS),
        "notes": [str(n) for n in raw.get("notes") or []],
        "maps": _maps(root / "map" / "regions.gpkg", legend),
        "naive": float(np.median(narrow)) if narrow else None,
        "networks": int(raw.get("networks") or 0),
        "applicability": bool(raw.get("applicability")),
    }


def _row(raw: Mapping[str, Any]) -> dict[str, Any]:
    area = raw["quantity"] == "area"
    show = formats.hectares if area else formats.number
    cells = {k: show(raw.get(k)) for k in ("value", "low", "high", "map_value", "ensemble_sd")}
    inside = raw.get("inside_pct")
    what = raw["class"] or f"{facts.label(str(raw['task']).replace('-', '_'))}, {raw['quantity']}"
    return cells | {
        "region": str(raw["region"]),
        "what": str(what),
        "unit": str(raw["unit"] or ""),
        "mapped": formats.interval(raw.get("mapped_pct")).value / 100,
        "inside": None if inside is None else float(inside) / 100,
        "naive": f"{show(raw.get('independent_low'))} to {show(raw.get('independent_high'))}",
    }


def _maps(path: Path, legend: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Share of each class per region, largest class first."""
    if not path.is_file():
        return []
    import geopandas as gpd

    frame = gpd.read_file(path)
    shares = {str(e["name"]): f"{e['name']} pct" for e in legend}
    columns = [(n, c) for n, c in shares.items() if c in frame and frame[c].notna().any()]
    columns.sort(key=lambda nc: -float(frame[nc[1]].mean()))
    colors = {str(e["name"]): str(e["color"]) for e in legend}
    out = []
    for name, column in columns[:_MOST_MAPS]:
        values = frame[column].to_numpy(dtype=float)
        picture, top = charts.choropleth(
            list(frame.geometry), values, colors[name], f"Share of {name} per region"
        )
        out.append({"name": name, "picture": picture, "top": top, "color": colors[name]})
    return out
