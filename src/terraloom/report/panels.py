"""Sections of the page that need rasters or vectors: map, doubt, layers, coverage, folds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from pyproj import CRS, Transformer

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.grid import geobox_from_record, row_areas_m2
from terraloom.plan import product_path
from terraloom.preprocess.reasons import INVALID, Reason
from terraloom.report import charts, facts, figures, formats, provenance, scores

__all__ = [
    "Place", "coverage", "labels", "main_reason", "map_panel", "place", "task_layers", "tiles",
    "uncertainty", "viewer",
]  # fmt: skip

#: Words and colour of each reason that keeps a pixel out of the map.
REASONS: dict[Reason, tuple[str, str]] = {
    Reason.NODATA: ("no observation", "#3c464e"),
    Reason.CLOUD: ("cloud", "#6f9cc3"),
    Reason.CLOUD_EDGE: ("edge of a cloud", "#aac6df"),
    Reason.SHADOW: ("cloud shadow", "#6b5b7b"),
    Reason.SNOW: ("snow or ice", "#5fc0c4"),
    Reason.SATURATED: ("saturated or defective", "#d06a4c"),
}
_NICE = (1, 2, 5, 10)


@dataclass(frozen=True)
class Place:
    """Where the map lies, in words and numbers.

    Attributes:
        geobox: Pixels of the map.
        words: Centre and extent as text.
        crs: Name of the coordinate system.
        resolution_m: Pixel size, metres.
        size_text: Size of the grid's ground, as a number.
        size_unit: Its unit, hectares or square kilometres.
    """

    geobox: GeoBox
    words: str
    crs: str
    resolution_m: float
    size_text: str
    size_unit: str

    @property
    def aspect(self) -> float:
        """Width over height."""
        h, w = self.geobox.shape
        return float(w / h)

    def scale_bar(self) -> tuple[str, float]:
        """Text of a scale bar and its length as share of the map's width, at most a quarter."""
        width_m = self.geobox.shape[1] * self.resolution_m
        power = 10.0 ** math.floor(math.log10(width_m / 4))
        length = max(n * power for n in _NICE if n * power <= width_m / 4)
        text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
        return text, length / width_m


def place(record: Mapping[str, Any], *, simulated: bool = False) -> Place:
    """Describe the geobox of ``map.json``; a simulated region has no place on Earth to name."""
    geobox = geobox_from_record(dict(record))
    crs = CRS.from_user_input(str(geobox.crs))
    h, w = geobox.shape
    b = geobox.boundingbox
    to_deg = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    lon, lat = to_deg.transform((b.left + b.right) / 2, (b.bottom + b.top) / 2)
    step = float(abs(geobox.affine.a))
    ns, ew = ("N" if lat >= 0 else "S"), ("E" if lon >= 0 else "W")
    where = f"around {abs(lat):.3f}° {ns}, {abs(lon):.3f}° {ew}"
    words = f"{w * step / 1000:.1f} by {h * step / 1000:.1f} km "
    words += "of simulated land" if simulated else where.replace("° ", "°\u00a0")
    area_ha = float(row_areas_m2(geobox).sum()) * w / 1e4
    big = area_ha >= 1000
    code = crs.to_authority()
    name = f"{crs.name} ({':'.join(code)})" if code else crs.name
    size = f"{area_ha / 100:,.0f}".replace(",", "\u202f") if area_ha >= 1e4 else (
        f"{area_ha / 100:.1f}" if big else f"{area_ha:.0f}"
    )  # fmt: skip
    return Place(geobox, words, name, step, size, "km²" if big else "ha")


def map_panel(root: Path, record: Mapping[str, Any], where: Place) -> dict[str, Any]:
    """The class map over the image, with the legend's areas."""
    legend = record["legend"]
    colors = {int(e["code"]): str(e["color"]) for e in legend}
    names = ", ".join(str(e["name"]) for e in legend)
    classes = figures.class_picture(
        product_path("class_map", root / "map"), colors, f"Map of the classes {names}"
    )
    image = product_path("image", root / "map")
    text, share = where.scale_bar()
    shares = [formats.interval(e.get("share_pct")).value for e in legend]
    shares = [s if math.isfinite(s) else 0.0 for s in shares]
    most = max(shares, default=0.0)
    return {
        "classes": classes,
        "image": figures.image_picture(image, "Satellite image of the last period")
        if image.is_file() else None,
        "period": str(record.get("image_period") or ""),
        "legend": [
            {**e, "share": s / 100, "bar": 100 * s / most if most else 0.0}
            for e, s in zip(legend, shares, strict=True)
        ],
        "bar_text": text,
        "bar_pct": 100 * share,
        "small": classes.width < 700,
    }  # fmt: skip


def viewer(
    shown: Mapping[str, Any], doubt: Mapping[str, Any] | None,
    trusted: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], where: Place,
) -> dict[str, Any]:  # fmt: skip
    """Layers that can be laid over each other; those shown elsewhere are taken from there."""
    found = [("image", "Satellite image", shown["image"], "")] if shown["image"] else []
    found.append(("classes", "Class map", shown["classes"], ""))
    if doubt:
        found += [
            ("total", "Total uncertainty", doubt["total"].picture, "pic-total"),
            ("epistemic", "Epistemic uncertainty", doubt["epistemic"].picture, "pic-epistemic"),
        ]
    sets, known = trusted["coverage"], trusted["applicability"]
    if sets and sets["size"]:
        found.append(("sets", "Classes possible", sets["size"].picture, "pic-sets"))
    if known and known["picture"]:
        found.append(("known", "Dissimilarity", known["picture"].picture, "pic-known"))
    for n, layer in enumerate(layers):
        title = layer["title"] + (" (spread)" if layer["caption"].startswith("standard") else "")
        found.append((f"layer-{n}", title, layer["scalar"].picture, f"pic-layer-{n}"))
    left, top = where.geobox.boundingbox.left, where.geobox.boundingbox.top
    facts_of_place = {
        "width_m": where.geobox.shape[1] * where.resolution_m,
        "height_m": where.geobox.shape[0] * where.resolution_m,
        "left": left,
        "top": top,
        "legend": [[str(e["color"]).lower(), str(e["name"])] for e in shown["legend"]],
    }
    return {
        "place": json.dumps(facts_of_place),
        "layers": [
            {"key": k, "title": title, "picture": p, "source": source}
            for k, title, p, source in found
        ],
        "under": "image" if shown["image"] else "classes",
    }


def uncertainty(root: Path, n_classes: int) -> dict[str, Any] | None:
    """Total and epistemic entropy as shares of the largest possible entropy, ln K."""
    path = product_path("uncertainty", root / "map")
    if not path.is_file():
        return None
    # Stored value to nats by the file's own scale, nats to a share of the most there can be.
    factor = figures.scale_of(path) / math.log(max(2, n_classes))
    total = figures.scalar_picture(
        path, 1, cmap="doubt", alt="Total uncertainty of each pixel", factor=factor, top=1.0
    )
    epistemic = figures.scalar_picture(
        path, 3, cmap="ignorance", alt="Disagreement of the networks at each pixel", factor=factor
    )
    if total is None or epistemic is None:
        return None
    data, nodata = figures.read_small(path, [1])
    valid = data[0] != nodata
    return {
        "total": total, "epistemic": epistemic, "max_nats": math.log(max(2, n_classes)),
        "doubtful": float((data[0][valid] * factor > 0.5).mean()),
    }  # fmt: skip


def task_layers(root: Path, campaign: Campaign) -> list[dict[str, Any]]:
    """Boundary and regression products, as far as their files are there, one entry per picture."""
    layers: list[dict[str, Any]] = []
    for task in campaign.tasks:
        path = product_path(task.name, root / "map")
        if task.kind is TaskKind.SEGMENTATION or not path.is_file():
            continue
        title = facts.label(task.name.replace("-", "_"))
        if task.kind is TaskKind.BOUNDARY:
            edge = figures.scalar_picture(
                path, 1, cmap="edge", factor=figures.scale_of(path), top=1.0,
                alt=f"Probability that a pixel lies on an edge ({title})",
            )  # fmt: skip
            parts = [("probability that a pixel lies on a boundary", "", edge)]
        else:
            mean = figures.scalar_picture(
                path, 1, cmap="amount", alt=f"{title}: predicted value", low=None
            )
            spread = figures.scalar_picture(
                path, 2, cmap="doubt", alt=f"{title}: standard deviation", squares_of=(2, 3)
            )
            parts = [
                ("predicted value", task.unit, mean),
                ("standard deviation, from data and model together", task.unit, spread),
            ]
        layers.extend(
            {
                "title": title,
                "caption": c,
                "unit": u,
                "scalar": s,
                "median": task.kind is TaskKind.REGRESSION,
            }
            for c, u, s in parts
            if s is not None
        )
    return layers


def _reason_rows(record: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    words = {str(bit.name).lower(): part for bit, part in REASONS.items()}
    # Water and filled pixels are marked but mapped: they are no reason for a gap.
    skip = {str(b.name).lower() for b in Reason if not b & INVALID} | {"clear", "valid"}
    rows = []
    for key, raw in (record.get("reason_pct") or {}).items():
        pct, name = formats.interval(raw).value, str(key).lower()
        if math.isfinite(pct) and pct > 0 and name not in skip:
            text, color = words.get(name, (name.replace("_", " "), "#8a949b"))
            rows.append((text, color, pct))
    return sorted(rows, key=lambda r: -r[2])


def main_reason(record: Mapping[str, Any]) -> str:
    """One sentence on the commonest reason for unmapped pixels."""
    rows = _reason_rows(record)
    valid = formats.interval(record.get("valid_pct")).value
    if not rows or not valid < 100:
        return ""
    return f"The rest is empty mostly because of: {rows[0][0]}."


def tiles(root: Path) -> dict[str, Any] | None:
    """How often each tile was seen clearly, per period; None without such a table."""
    rows = [r for r in provenance.optional_csv(root / "map" / "tiles.csv") if r.get("period")]
    if not rows:
        return None
    places = list(dict.fromkeys((int(r["column"]), int(r["row"])) for r in rows))
    order = {place: n for n, place in enumerate(places)}
    values: dict[str, list[float]] = {}
    for r in rows:
        row = values.setdefault(r["period"], [math.nan] * len(places))
        row[order[int(r["column"]), int(r["row"])]] = float(r["clear_dates"])
    worst = sorted(rows, key=lambda r: -float(r["never_clear_pct"]))[:5]
    return {
        "n": len(places),
        "chart": charts.tiles_chart(
            places, values, "clear dates of a pixel, mean over the tile",
            "Clear dates per tile and period",
        ),
        "worst": facts.Table(
            "Least covered",
            ["Tile", "Period", "Clear dates", "Never clear"],
            [
                [r["tile"], r["period"], formats.number(float(r["clear_dates"])),
                 formats.percent(float(r["never_clear_pct"]) / 100)]
                for r in worst
            ],
        ),
    }  # fmt: skip


def coverage(root: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Reasons for unmapped pixels, and their map where it is there."""
    rows = _reason_rows(record)
    picture = None
    present: set[int] = set()
    path = product_path("reasons", root / "map")
    if path.is_file():
        picture, shares = figures.reason_picture(
            path,
            product_path("class_map", root / "map"),
            {int(b): c for b, (_, c) in REASONS.items()},
        )
        present = set(shares)
    return {
        "rows": rows,
        "picture": picture,
        "keys": [(text, color) for b, (text, color) in REASONS.items() if int(b) in present],
        "valid_pct": formats.interval(record.get("valid_pct")).value,
    }


def labels(root: Path, record: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    """What happened to the labels, and where the folds lie."""
    tasks, tables = scores.label_tasks(provenance.optional_json(root / "chips" / "labels.json"))
    folds = _folds(root / "chips" / "folds.gpkg", geobox_from_record(record["geobox"]), task)
    if not tables and not tasks and folds is None:
        return None
    return {"tasks": tasks, "tables": tables, "folds": folds}


def _folds(path: Path, geobox: GeoBox, task: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    import geopandas as gpd

    frame = gpd.read_file(path)
    if "task" in frame:
        frame = frame[frame["task"] == task]
    if "fold" not in frame or frame.empty:
        return None
    if frame.crs is not None and CRS.from_user_input(str(geobox.crs)) != frame.crs:
        frame = frame.to_crs(str(geobox.crs))
    rings: list[tuple[int, npt.NDArray[np.float64]]] = []
    counts: dict[int, int] = {}
    for geometry, fold in zip(frame.geometry, frame["fold"], strict=True):
        if geometry is None or geometry.is_empty or fold is None or math.isnan(fold):
            continue
        counts[int(fold)] = counts.get(int(fold), 0) + 1  # a label may have several parts
        for part in getattr(geometry, "geoms", [geometry]):
            outline = part.exterior if part.geom_type == "Polygon" else part.buffer(15).exterior
            rings.append((int(fold), np.asarray(outline.coords)[:, :2]))
    if not rings:
        return None
    b = geobox.boundingbox
    picture, colors = charts.folds_chart(rings, (b.left, b.bottom, b.right, b.top))
    return {"picture": picture, "keys": [(f, c, counts[f]) for f, c in colors.items()]}
