"""The rehearsal's scoreboard: what every stage recovered of the simulated truth."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import rasterio

from terraloom.assess.areas import PixelAreas
from terraloom.assess.estimators import AccuracyReport
from terraloom.assess.region_file import read_regions
from terraloom.assess.regional_truth import RegionalScores, score_regions, true_rows
from terraloom.assess.run import MAP, TRUTH, _estimate
from terraloom.assess.scoreboard import (
    areas_inside_ci,
    build_scoreboard,
    class_boundary_iou,
    height_scores,
    label_noise_scores,
    map_scores,
    pooled_mask_f1,
    shift_rmse_px,
)
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, coarsen
from terraloom.io import geobox_of, read_json, read_window, write_json
from terraloom.legend import NODATA_CODE, Legend, read_legend
from terraloom.log import get_logger
from terraloom.plan import product_path
from terraloom.preprocess.reasons import Reason
from terraloom.preprocess.scenes import QUALITY, gather_scenes
from terraloom.train.calibrate import calibration_error

__all__ = ["score_rehearsal"]

Codes = npt.NDArray[np.uint8]
log = get_logger(__name__)


def score_rehearsal(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write ``scoreboard.json`` beside the map."""
    truth = read_json(TRUTH / "truth.json")
    legend = read_legend(str(campaign.land_cover.classes))
    true_map = _raster(TRUTH / "landcover.tif")
    mapped = _raster(product_path("class_map", MAP))
    oa, miou = map_scores(mapped, _matching(true_map, mapped), legend.codes)
    outlines = class_boundary_iou(mapped, true_map, legend.codes, pixel_m=grid.resolution_m)
    rmse, r2 = _height(campaign)
    recall, precision = _noise(campaign, truth)
    inside, total = _areas(campaign, legend, true_map, mapped)
    board = build_scoreboard(
        cloud_f1=pooled_mask_f1(_masks(campaign, "cloud"), int(Reason.CLOUD)),
        shadow_f1=pooled_mask_f1(_masks(campaign, "shadow"), int(Reason.SHADOW)),
        shift_rmse_px=_shifts(truth),
        label_noise_recall=recall, label_noise_precision=precision,
        oa=oa, miou=miou, boundary=outlines, height_rmse_m=rmse, height_r2=r2,
        ece=_ece(legend, true_map), areas_inside_ci=inside, areas_total=total,
        regional=_regions(campaign, legend, true_map, mapped),
    )  # fmt: skip
    write_json(MAP / "scoreboard.json", board)
    for key, value in board.items():
        log.info("%s %s", key, value)


def _raster(path: Path, band: int = 1) -> npt.NDArray[Any]:
    with rasterio.open(path) as src:
        data: npt.NDArray[Any] = src.read(band)
        return data


def _matching(truth: Codes, mapped: Codes) -> Codes:
    """Truth where the map has a class; elsewhere nodata, which is not scored."""
    return np.where(mapped == NODATA_CODE, NODATA_CODE, truth).astype(np.uint8)


def _masks(campaign: Campaign, what: str) -> Iterator[tuple[Codes, npt.NDArray[np.bool_]]]:
    """Found and true mask of every scene, on the mask's own 20 m pixels of the AOI."""
    from terraloom.preprocess.cube import mask_on

    codes = read_json(TRUTH / "truth.json")["cloud_codes"]
    geobox = coarsen(geobox_of(TRUTH / "landcover.tif"), 2)
    for scene in gather_scenes(campaign, decided=False):
        file = TRUTH / "cloud" / f"{scene.item['id']}.tif"
        if scene.masks and file.exists():
            true = read_window(file, geobox, resampling="mode") == codes[what]
            yield mask_on(geobox, scene), true


def _shifts(truth: dict[str, Any]) -> float:
    with QUALITY.open(newline="", encoding="utf-8") as f:
        rows = [r for r in csv.DictReader(f) if r["decision"] == "use" and r["clear_pct"]]
    found = [[float(r["dy_px"] or "nan"), float(r["dx_px"] or "nan")] for r in rows]
    return shift_rmse_px(np.array(found), np.array([truth["shifts"][r["id"]] for r in rows]))


def _noise(campaign: Campaign, truth: dict[str, Any]) -> tuple[float, float]:
    """Recall and precision of the suspects among the labels that took part."""
    task = campaign.land_cover
    labels = gpd.read_file(task.labels.file, layer=task.labels.layer)
    wrong = set(truth["noisy_label_ids"]) | set(truth["outdated_label_ids"])
    used = gpd.read_file("results/chips/folds.gpkg", layer="labels")
    rows = used.loc[used["task"] == task.name, "label_id"].to_numpy()
    suspects = {s["label_id"] for s in read_json("results/model/held_out.json")["suspects"]}
    flagged = np.array([r in suspects for r in rows])
    noisy = np.array([labels["parcel_id"].iloc[r] in wrong for r in rows])
    return label_noise_scores(flagged, noisy)


def _height(campaign: Campaign) -> tuple[float, float]:
    task = next((t for t in campaign.tasks if t.kind is TaskKind.REGRESSION), None)
    if task is None:
        return float("nan"), float("nan")
    predicted = _raster(product_path(task.name, MAP)).astype(np.float64)
    true = _raster(TRUTH / "height.tif").astype(np.float64)
    predicted[predicted < -9000] = np.nan
    true[true < -9000] = np.nan
    return height_scores(predicted, true)


def _ece(legend: Legend, true_map: Codes) -> float:
    with rasterio.open(product_path("probabilities", MAP)) as src:
        p = src.read().astype(np.float32)
        valid = (p[0] != src.nodata) & (true_map != 255) & (true_map != NODATA_CODE)
    index = np.zeros(256, np.int64)
    index[list(legend.codes)] = np.arange(len(legend))
    chosen = p[:, valid].T
    return calibration_error(
        chosen / chosen.sum(axis=1, keepdims=True), index[true_map[valid]], n_bins=15
    )


def _areas(
    campaign: Campaign, legend: Legend, true_map: Codes, mapped: Codes
) -> tuple[float, float]:
    """How many true areas of the mapped domain lie inside their intervals."""
    if campaign.sample is None:
        return float("nan"), float("nan")
    report: AccuracyReport = _estimate(campaign, legend)[0]
    h, w = mapped.shape
    # The same pixel areas as in the estimates: a class without error has no width of interval.
    with rasterio.open(product_path("class_map", MAP)) as src:
        area = PixelAreas(geobox_of(src)).window(slice(0, h), slice(0, w)) / 1e4
    domain = mapped != NODATA_CODE
    true = {c: float((area * (domain & (true_map == c))).sum()) for c in legend.codes}
    return areas_inside_ci(report, true)


def _regions(
    campaign: Campaign, legend: Legend, true_map: Codes, mapped: Codes
) -> RegionalScores | None:
    """How many intervals of regions hold the truth of their mapped part."""
    if campaign.regions is None:
        return None
    geobox = geobox_of(product_path("class_map", MAP))
    regions = read_regions(campaign.regions, str(geobox.crs))
    measured = any(t.kind is TaskKind.REGRESSION for t in campaign.tasks)
    height = _raster(TRUTH / "height.tif") if measured else None
    truth = true_rows(regions, geobox, legend, true_map, mapped != NODATA_CODE, height)
    return score_regions(read_json(MAP / "regions.json")["rows"], truth)
