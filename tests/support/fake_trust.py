"""Adds to a made-up results folder what says how far a map can be trusted, and regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from shapely.geometry import Polygon, box

from support.fake_results import LEGEND
from terraloom.grid import geobox_from_record
from terraloom.io import read_json, write_json, write_raster, write_text


def _held(value: float | None, half: float = 0.04) -> dict[str, float] | None:
    return None if value is None else {"value": value, "low": value - half, "high": value + half}


def add_trust(root: Path) -> None:
    """Write sets of classes, applicability, their coverage and regions into a results folder."""
    record = read_json(root / "map" / "map.json")
    geobox = geobox_from_record(record["geobox"])
    with rasterio.open(root / "map" / "probabilities.tif") as src:
        p = src.read().astype(float)
    none = (p == 255).all(axis=0)
    members = p / 200 >= 0.12
    size = np.where(none, 0, np.maximum(members.sum(axis=0), 1)).astype(np.uint16)
    bits = sum(members[k].astype(np.uint16) << k for k in range(len(p)))
    sets = np.stack([size, np.where(none, 0, bits)]).astype(np.uint16)
    write_raster(root / "map" / "conformal_set.tif", sets, geobox, nodata=0,
                 band_names=["size", "classes"])  # fmt: skip
    rows, cols = np.mgrid[: p.shape[1], : p.shape[2]]
    far = np.hypot(rows - 60, cols - 120) / 240
    known = np.stack([1000 * far, 200 * np.exp(-far), far < 0.8]).astype(np.uint16)
    known[:, none] = 65535
    write_raster(root / "map" / "applicability.tif", known, geobox, nodata=65535,
                 band_names=["dissimilarity", "density", "inside"])  # fmt: skip
    record |= {
        "conformal_set": {"size_pct": {"1": 71.0, "2": 24.0, "3": 5.0}, "mean_size": 1.34},
        "applicability": {
            "inside_pct": 88.2, "inside_ha": {str(c): 10.0 for c in LEGEND.codes},
            "tiles_inside_pct": {"x000y000": 97.0, "x001y000": 71.5, "x002y000": None},
        },
    }  # fmt: skip
    write_json(root / "map" / "map.json", record)
    held = read_json(root / "model" / "held_out.json")
    spread = {k: {"mean": 0.8, "sd": 0.06, "values": [0.74, 0.86]} for k in ("oa", "ece")}
    scores = {"n": 31000, "n_bins": 10, "ece": 0.014, "brier": 0.21, "aurc": 0.018, "folds": spread}
    more = {"coverage": _coverage(), "probabilities": scores}
    write_json(root / "model" / "held_out.json", held | more)
    accuracy = read_json(root / "map" / "accuracy.json")
    areas = [
        {"code": c, "name": n, "area_ha": 100.0, "area_se_ha": 4.0, "low_ha": 92.0,
         "high_ha": 108.0, "gain": 1.4}
        for c, n in zip(LEGEND.codes, LEGEND.names, strict=True)
    ]  # fmt: skip
    measured = {"value": 2.5, "se": 0.2, "low": 2.1, "high": 2.9}
    write_json(root / "map" / "accuracy.json", accuracy | {
        "assisted": {"classes": areas, "gain": 1.31, "effective_units": 524},
        "values": {"canopy-height": {"unit": "m", "n": 400, "bias": measured, "mae": measured,
                                     "rmse": measured, "r2": measured}},
        "report": {"disagreement": {"quantity": 0.02, "allocation": 0.09, "exchange": 0.08,
                                    "shift": 0.01}},
    })  # fmt: skip
    _regions(root / "map", geobox.boundingbox)
    head = "tile,column,row,mapped_pct,period,clear_dates,least_clear_dates,never_clear_pct"
    rows = [
        f"x{c:03d}y{r:03d},{c},{r},97,{period},{base + c - r},1,{3 * c + r}"
        for r in range(2)
        for c in range(4)
        if (c, r) != (3, 1)
        for period, base in (("spring", 2), ("summer", 4))
    ]
    write_text(root / "map" / "tiles.csv", "\n".join([head, *rows]) + "\n")


def _coverage() -> dict[str, Any]:
    shares = (0.93, 0.9, 0.88, 0.85, None)
    found = {
        "coverage": _held(0.894, 0.03), "units": 187, "worst_block": 0.6, "mean_size": 1.4,
        "single_pct": 70.0, "coverage_of_pixels": 0.9,
        "per_block": [{"block": b, "coverage": c, "units": 9}
                      for b, c in enumerate((0.6, 0.88, 0.93, 0.97, 1.0))],
        "per_class": [{"name": n, "coverage": _held(v), "labels": 0 if v is None else 30}
                      for n, v in zip(LEGEND.names, shares, strict=True)],
    }  # fmt: skip
    values = {"coverage": _held(0.87), "worst_block": 0.7, "mean_width": 11.2}
    return {
        "land-cover": {
            "target": 0.9, "method": "class", "score": "lac", "unit": "label",
            "always_in_the_set": ["Water"], "methods": {"class": found},
        },
        "canopy-height": {
            "target": 0.9, "method": "split", "kind": "normalised", "unit": "block",
            "of_unit": "m", "blocks": 24, "methods": {"split": values},
        },
    }  # fmt: skip


def _regions(folder: Path, b: Any) -> None:
    w, h = (b.right - b.left) / 3, (b.top - b.bottom) / 2
    shapes: list[Polygon] = [
        box(b.left + i * w, b.bottom + j * h, b.left + (i + 1) * w, b.bottom + (j + 1) * h)
        for j in range(2)
        for i in range(3)
    ]
    hole = shapes[0].buffer(-w / 4)
    shapes[0] = Polygon(shapes[0].exterior.coords, [hole.exterior.coords])
    names = [f"district {n}" for n in range(len(shapes))]
    rng = np.random.default_rng(3)
    frame: dict[str, Any] = {"region": names}
    rows: list[dict[str, Any]] = []
    for k, name in enumerate(LEGEND.names):
        share = rng.uniform(2, 40, len(shapes))
        share[-1] = np.nan if k == 0 else share[-1]
        frame[f"{name} pct"] = share
        for region, value in zip(names, share, strict=True):
            v, se = (None, None) if np.isnan(value) else (value, 0.1 * value)
            rows.append({
                "region": region, "area_ha": 110.0, "mapped_ha": 100.0, "mapped_pct": 90.9,
                "pixels": 10000.0, "task": "land-cover", "class": name, "quantity": "area",
                "unit": "ha", "map_value": v, "value": v, "se": se,
                "low": None if v is None else v - 2, "high": None if v is None else v + 2,
                "independent_se": None if se is None else se / 8,
                "independent_low": None if v is None else v - 0.2,
                "independent_high": None if v is None else v + 0.2, "effective_px": 50.0,
                "inside_pct": 88.0, "ensemble_sd": None if v is None else 0.03 * v,
            })  # fmt: skip
    gpd.GeoDataFrame(frame, geometry=shapes, crs="EPSG:32632").to_file(folder / "regions.gpkg")
    write_json(folder / "regions.json", {
        "file": "districts.gpkg", "crs": "EPSG:32632", "level": 0.9, "method": "model-based",
        "regions": len(names), "rows": rows, "networks": 8,
        "applicability": True, "notes": ["These figures rest on the model."],
    })  # fmt: skip
