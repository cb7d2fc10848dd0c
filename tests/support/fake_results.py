"""A made-up but complete results folder: every file of the report's contract, 192 x 384 px."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy.ndimage import gaussian_filter
from shapely.geometry import Point, box

from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import geobox_record, row_areas_m2
from terraloom.io import sha256, write_json, write_raster, write_text
from terraloom.legend import Legend

SHAPE = (192, 384)
LEGEND = Legend(
    (1, 2, 3, 5, 7),
    ("Forest", "Cropland", "Grassland", "Built-up & bare", "Water"),
    ("#2f6b3c", "#d9b44a", "#9fc46b", "#b5495b", "#3b78b5"),
)
SCENES = [f"S2A_32TPT_2023{m:02d}{d:02d}_0_L2A" for m, d in
          [(4, 3), (4, 28), (5, 23), (6, 17), (7, 12), (8, 6), (8, 31), (9, 25)]]  # fmt: skip

F64 = npt.NDArray[np.float64]


def fake_campaign(*, simulated: bool = False, sample: bool = True, **changes: Any) -> Campaign:
    """A campaign with a class, a boundary and a regression task."""
    data: dict[str, Any] = {
        "name": "isar-valley",
        "title": "Land cover of the Isar valley, summer 2023",
        "aoi": {"bbox": [684000, 5332080, 687840, 5334000], "crs": "EPSG:32632"},
        "sources": [{"source": "sentinel-2-l2a"}],
        "cube": {"periods": [
            {"name": "spring", "start": "2023-04-01", "end": "2023-06-15"},
            {"name": "summer", "start": "2023-06-16", "end": "2023-09-30"},
        ]},
        "tasks": [
            {"name": "land-cover", "kind": "segmentation", "classes": "config/classes/five.csv",
             "labels": {"file": "labels.gpkg", "column": "class"}},
            {"name": "field-edges", "kind": "boundary", "labels": {"file": "fields.gpkg"}},
            {"name": "canopy-height", "kind": "regression", "unit": "m", "range": [0, 50],
             "labels": {"file": "height.gpkg", "column": "height"}},
        ],
    }  # fmt: skip
    if simulated:
        data["archive"] = {"kind": "simulated", "simulation": {}}
    if sample:
        data["sample"] = {"answers": "truth" if simulated else "answers.csv"}
    return parse_campaign(data | changes)


def fake_results(root: Path, *, simulated: bool = False, sample: bool = True) -> Path:
    """Write a results folder and return it.

    Args:
        root: Folder to fill.
        simulated: Also write ``scoreboard.json``.
        sample: Also write ``accuracy.json``.
    """
    rng = np.random.default_rng(7)
    geobox = GeoBox(SHAPE, Affine(10, 0, 684000, 0, -10, 5334000), "EPSG:32632")
    _scenes(root / "scenes")
    _chips(root / "chips", rng)
    _model(root / "model", rng)
    mapped = _rasters(root / "map", geobox, rng)
    _map_json(root / "map", geobox, mapped)
    if sample:
        write_json(root / "map" / "accuracy.json", _accuracy(mapped))
    if simulated:
        write_json(root / "map" / "scoreboard.json", _scoreboard(mapped))
    points = [Point(684000 + x, 5332080 + y) for x, y in rng.uniform(0, 1900, (40, 2))]
    gpd.GeoDataFrame({"id": range(40)}, geometry=points, crs="EPSG:32632").to_file(
        root / "map" / "sample.gpkg"
    )
    return root


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _scenes(folder: Path) -> None:
    items, quality = [], []
    clouds = [4, 31, 11, 97.2, 2, 18, 0.4, 44]
    for n, (name, cloud) in enumerate(zip(SCENES, clouds, strict=True)):
        when = f"{name[10:14]}-{name[14:16]}-{name[16:18]}T10:16:{n:02d}Z"
        used = cloud < 95
        why = "" if used else "2.1% clear is less than min_clear_pct 5"
        items.append({
            "id": name, "source": "sentinel-2-l2a", "collection": "sentinel-2-l2a",
            "datetime": when, "cloud_pct": cloud, "crs": "EPSG:32632", "assets": {},
            "decision": "use", "why": "",
        })  # fmt: skip
        shadow = round(min(cloud / 4, 100 - cloud), 1)
        quality.append({
            "id": name, "source": "sentinel-2-l2a", "datetime": when,
            "decision": "use" if used else "drop", "why": why,
            "clear_pct": round(100 - cloud - shadow, 1), "cloud_pct": cloud, "shadow_pct": shadow,
            "snow_pct": 0, "nodata_pct": 0, "dy_px": round(0.31 - n * 0.12, 2),
            "dx_px": round(n * 0.08 - 0.2, 2) if used else "", "reliability": 0.9,
        })  # fmt: skip
    write_json(folder / "items.json", {"campaign": "isar-valley", "items": items})
    _write_csv(folder / "quality.csv", quality)


def _chips(folder: Path, rng: np.random.Generator) -> None:
    classes = {
        name: {"labels": n, "area_ha": 1.7 * n}
        for name, n in zip(LEGEND.names, [52, 81, 30, 16, 8], strict=True)
    }
    dropped = {"outside_aoi": 14, "duplicate": 8, "sliver": 5, "no_value": 0}
    write_json(folder / "labels.json", {
        "tasks": {
            "land_cover": {
                "task": "land_cover", "kind": "segmentation", "file": "labels.gpkg",
                "layer": "labels", "crs": "EPSG:4326", "rows": 214, "dropped": dropped,
                "repaired": 3, "clipped": 6, "kept": 187, "area_ha": 311.4, "classes": classes,
                "erosion": {"erode_m": 10.0, "lost_area_pct": 21.4, "kept_whole": 2},
            },
            "field-edges": {"task": "field-edges", "rows": 402, "kept": 402, "dropped": {}},
        },
        "campaign": "isar-valley",
        "classes": list(LEGEND.names),
        "folds": {"block_px": 128, "count": 4, "fold_of_block": [0, 1, 2] * 20},
        "audit": {"min_distance_m": 640.0, "labels_per_fold": {"0": 18, "1": 9}},
    })  # fmt: skip
    polygons, folds = [], []
    for by in range(2):
        for bx in range(3):
            for _ in range(9):
                x = 684000 + 1280 * bx + rng.uniform(60, 1080)
                y = 5332080 + 960 * by + rng.uniform(60, 800)
                polygons.append(box(x, y, x + rng.uniform(30, 140), y + rng.uniform(30, 120)))
                folds.append((bx + 2 * by) % 4)
    task = ["land-cover"] * len(folds) + ["field-edges"]
    frame = gpd.GeoDataFrame(
        {"task": task, "fold": [*folds, 0], "block": [*folds, 0], "class": "Forest"},
        geometry=[*polygons, polygons[0]], crs="EPSG:32632",
    )  # fmt: skip
    frame.to_file(folder / "folds.gpkg")


def _near(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def _model(folder: Path, rng: np.random.Generator) -> None:
    names = list(LEGEND.names)
    confusion = np.array([
        [8700, 160, 250, 10, 0], [90, 13100, 900, 120, 0], [310, 760, 4100, 60, 0],
        [20, 150, 70, 1850, 20], [4, 0, 6, 10, 860],
    ])  # fmt: skip
    hit = np.diag(confusion)
    precision, recall = hit / confusion.sum(0), hit / confusion.sum(1)
    f1 = 2 * precision * recall / (precision + recall)
    per_class: list[dict[str, Any]] = [
        {
            "name": n, "precision": _near(p, 0.02 + 0.01 * i), "recall": _near(r, 0.03),
            "f1": _near(f, 0.022), "pixels": int(confusion[i].sum()),
        }
        for i, (n, p, r, f) in enumerate(zip(names, precision, recall, f1, strict=True))
    ]  # fmt: skip
    per_class[-1]["recall"] = None  # undefined measures must be shown as such, not as zero
    oa = hit.sum() / confusion.sum()
    write_json(folder / "held_out.json", {
        "classes": names, "confusion": confusion, "per_class": per_class,
        "overall": {"oa": _near(oa, 0.018), "macro_f1": _near(f1.mean(), 0.025)},
        "ece_before": 0.061, "ece_after": 0.014, "temperature": 1.42, "n_bins": 10,
        "n_pixels": int(confusion.sum()), "n_blocks": 24,
        "baseline": {
            "all_pixels": {"oa": 0.842, "macro_f1": 0.801},
            "same_pixels": {"oa": 0.851, "macro_f1": 0.812},
        },
        "regression": {"canopy-height": {"rmse": 3.21, "r2": 0.71, "bias": -0.24, "unit": "m"}},
        "boundary": {"field-edges": {"f1": 0.63}},
        "suspects": [
            {"label_id": 40 + i, "class": "Grassland", "likely": "Cropland",
             "p_class": 0.04 + 0.01 * i, "p_likely": 0.95 - 0.01 * i}
            for i in range(15)
        ],
    })  # fmt: skip
    confidence = np.linspace(0.35, 0.985, 9)
    _write_csv(folder / "reliability.csv", [
        {"confidence": round(c, 4), "accuracy": round(c + rng.normal(0, 0.015), 4),
         "count": int(200 * np.exp(4.6 * c))}
        for c in confidence
    ])  # fmt: skip
    for fold in range(2):
        for member in range(2):
            path = folder / f"fold-{fold}" / f"member-{member}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.bytes(64))
    calibration = {"method": "temperature", "temperature": 1.42}
    write_json(folder / "calibration.json", {"tasks": {"land_cover": calibration}})


def _fields(rng: np.random.Generator) -> F64:
    """(K, H, W) class probabilities of a landscape with a river."""
    h, w = SHAPE
    noise = np.stack([gaussian_filter(rng.normal(size=SHAPE), s) for s in (14, 10, 9, 5)])
    noise /= noise.std(axis=(1, 2), keepdims=True)
    rows, cols = np.mgrid[:h, :w]
    river = np.abs(rows - h * 0.55 - 22 * np.sin(cols / 55)) - 5
    scores = np.concatenate([2.2 * noise, -0.9 * river[None]])
    scores[3] -= 2.6
    scores = np.exp(scores - scores.max(0))
    return np.asarray(scores / scores.sum(0))


def _rasters(folder: Path, geobox: GeoBox, rng: np.random.Generator) -> F64:
    prob = _fields(rng)
    codes = np.array(LEGEND.codes, np.uint8)[prob.argmax(0)]
    cloud = gaussian_filter(rng.normal(size=SHAPE), 16)
    reasons = np.zeros(SHAPE, np.uint8)
    reasons[cloud > np.percentile(cloud, 97.5)] |= 2
    reasons[np.roll(cloud, (9, 14), (0, 1)) > np.percentile(cloud, 98.5)] |= 8
    codes[reasons != 0] = 0
    write_raster(
        folder / "class_map.tif", codes, geobox, nodata=0, colormap=LEGEND.colormap(),
        category_names=LEGEND.category_names(),
    )  # fmt: skip
    invalid = codes == 0
    stored = np.where(invalid, 255, np.round(200 * prob)).astype(np.uint8)
    write_raster(
        folder / "probabilities.tif",
        stored,
        geobox,
        nodata=255,
        band_names=LEGEND.names,
        scales=[1 / 200] * len(LEGEND),
    )
    total = -(prob * np.log(np.clip(prob, 1e-9, 1))).sum(0) / np.log(len(prob))
    epistemic = total * np.clip(0.16 + 0.1 * gaussian_filter(rng.normal(size=SHAPE), 6) * 20, 0, 1)
    three = np.stack([total, total - epistemic, epistemic])
    stored = np.where(invalid, 255, np.round(200 * three)).astype(np.uint8)
    write_raster(
        folder / "uncertainty.tif", stored, geobox, nodata=255,
        band_names=["total", "aleatoric", "epistemic"], scales=[np.log(len(LEGEND)) / 200] * 3,
    )  # fmt: skip
    edges = np.hypot(*np.gradient(gaussian_filter(prob.argmax(0).astype(float), 1)))
    edge = np.where(invalid, 255, 200 * np.clip(edges, 0, 1)).astype(np.uint8)
    write_raster(folder / "field-edges.tif", edge, geobox, nodata=255, scales=[1 / 200])
    mean, aleatoric, epistemic = 28 * prob[0] + 3, 2 + 3 * prob[1], 1 + 2 * total
    spread = 1.6 * np.hypot(aleatoric, epistemic)
    height = np.stack([mean, aleatoric, epistemic, mean - spread, mean + spread])
    height = height.astype(np.float32)
    height[:, invalid] = -9999
    write_raster(
        folder / "canopy-height.tif", height, geobox, nodata=-9999,
        band_names=["mean", "sd_aleatoric", "sd_epistemic", "lower", "upper"],
    )  # fmt: skip
    write_raster(folder / "reasons.tif", reasons, geobox)
    tint = np.array([[38, 62, 40], [150, 128, 84], [104, 128, 70], [170, 160, 152], [30, 52, 70]])
    rgb = np.einsum("khw,kc->chw", prob, tint) + rng.normal(0, 7, (3, *SHAPE))
    picture = np.clip(rgb, 1, 255).astype(np.uint8)
    write_raster(folder / "image.tif", picture, geobox, nodata=0)
    area = np.broadcast_to(row_areas_m2(geobox)[:, None], SHAPE) / 1e4
    return np.array([area[codes == c].sum() for c in LEGEND.codes])


def _map_json(folder: Path, geobox: GeoBox, mapped: F64) -> None:
    legend = [
        {"code": c, "name": n, "color": v, "map_area_ha": a, "share_pct": 100 * a / mapped.sum()}
        for c, n, v, a in zip(LEGEND.codes, LEGEND.names, LEGEND.colors, mapped, strict=True)
    ]
    products = {p.stem: {"file": p.name, "sha256": sha256(p)} for p in sorted(folder.glob("*.tif"))}
    write_json(folder / "map.json", {
        "geobox": geobox_record(geobox), "tiles": 1, "valid_pct": 96.4,
        "reason_pct": {"NODATA": 0.0, "CLOUD": 2.5, "SHADOW": 1.5}, "image_period": "summer",
        "legend": legend, "products": products,
    })  # fmt: skip
    write_text(folder / "areas.csv", "code,name,map_area_ha\n")
    write_json(folder / "metrics.json", {"valid_pct": 96.4})


def _accuracy(mapped: F64) -> dict[str, Any]:
    classes = []
    for i, (code, name, ha) in enumerate(zip(LEGEND.codes, LEGEND.names, mapped, strict=True)):
        area, se = ha * (1.06, 0.95, 1.03, 1.1, 0.98)[i], ha * 0.03 + 1
        classes.append({
            "name": name, "code": code, "area_ha": area, "area_se_ha": se,
            "low_ha": area - 1.96 * se, "high_ha": area + 1.96 * se, "map_area_ha": ha,
            "ua": _near(0.93 - 0.03 * i, 0.04) | {"se": 0.02},
            "pa": _near(0.9 - 0.02 * i, 0.05) | {"se": 0.025}, "f1": _near(0.88, 0.04),
        })  # fmt: skip
    return {
        "classes": classes, "oa": _near(0.884, 0.027) | {"se": 0.014}, "level": 0.95,
        "sample": {"kind": "stratified_random", "size": 400, "allocation": "rare"},
        "notes": ["Reference answers are taken as right."],
    }  # fmt: skip


def _scoreboard(mapped: F64) -> dict[str, Any]:
    return {
        "cloud_f1": 0.953, "shadow_f1": 0.781, "shift_rmse_px": 0.08, "label_noise_recall": 0.72,
        "label_noise_precision": None, "oa": 0.891, "miou": 0.774, "height_rmse_m": 3.2,
        "height_r2": 0.71, "ece": 0.014, "areas_inside_ci": 4, "areas_total": 5,
        "truth_area_ha": {
            n: a * f
            for n, a, f in zip(LEGEND.names, mapped, (1.02, 0.97, 1.05, 1.35, 1.0), strict=True)
        },
    }  # fmt: skip
