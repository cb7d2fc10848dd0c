"""Ways of folds and labels through a campaign: from its keys to chips and training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import torch
from shapely.geometry import box
from test_chips import LEGEND, H, W, X, Y, campaign, folder, grid, run

from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign
from terraloom.grid import CampaignGrid
from terraloom.io import read_json
from terraloom.models.heads import TaskSpec
from terraloom.train.fit import FitSettings, fit_member
from terraloom.train.run import _outside_buffer

__all__ = ["campaign", "folder", "grid"]  # fixtures


def changed(c: Campaign, folds: dict[str, Any], **labels: Any) -> Campaign:
    """The campaign with other folds, and other keys of the class map's labels."""
    data = c.model_dump(mode="json", exclude_unset=True)
    data["folds"] = {"count": 3, **folds}
    data["tasks"] = [t for t in data["tasks"] if t["name"] == "cover"]
    data["tasks"][0]["labels"] |= labels
    return parse_campaign(data)


def rewritten(folder: Path, **columns: Any) -> str:
    """The labels with further columns, in a file of their own."""
    frame = gpd.read_file(folder / "cover.gpkg").assign(**columns)
    path = folder / f"{'-'.join(columns)}.gpkg"
    frame.to_file(path)
    return str(path)


def folds_of(out: Path) -> gpd.GeoDataFrame:
    return gpd.read_file(out / "folds.gpkg", layer="labels")


def test_regions_are_held_out_whole(
    campaign: Campaign, grid: CampaignGrid, folder: Path, tmp_path: Path
) -> None:
    strips = [box(X + i * W / 6, Y, X + (i + 1) * W / 6, Y + H) for i in range(6)]
    gpd.GeoDataFrame({"n": range(6)}, geometry=strips, crs="EPSG:32633").to_crs(4326).to_file(
        folder / "regions.gpkg"
    )
    c = changed(campaign, {"method": "regions", "regions": str(folder / "regions.gpkg")})
    chips, _ = run(c, grid, tmp_path)
    labels = folds_of(tmp_path)
    strip = ((labels.representative_point().x - X) // (W / 6)).astype(int)
    assert (labels["fold"].groupby(strip).nunique() == 1).all()
    assert set(labels["fold"]) == {0, 1, 2} == set(chips["fold"].values[chips["y_cover"] != 255])


def test_years_are_held_out_whole_and_places_may_be_shared(
    campaign: Campaign, grid: CampaignGrid, folder: Path, tmp_path: Path
) -> None:
    n = len(gpd.read_file(folder / "cover.gpkg"))
    years = np.array(["2020-06-01", "2021-06-01", "2022-06-01", "2023-06-01"])
    file = rewritten(folder, seen=years[np.arange(n) // 3 % 4])
    c = changed(campaign, {"method": "years"}, file=file, date_column="seen")
    run(c, grid, tmp_path)
    labels = folds_of(tmp_path)
    assert (labels["fold"].groupby(labels["date"].str[:4]).nunique() == 1).all()
    assert labels["fold"].nunique() == 3
    bad = [r["check"] for r in read_json(tmp_path / "labels.json")["leakage"] if not r["ok"]]
    assert bad and all("year" in check for check in bad), "three years are off the images'"


def test_groups_stay_in_one_fold_and_blocks_are_chosen(
    campaign: Campaign, grid: CampaignGrid, folder: Path, tmp_path: Path
) -> None:
    n = len(gpd.read_file(folder / "cover.gpkg"))
    file = rewritten(folder, farm=[f"farm {i % (n // 2)}" for i in range(n)])
    c = changed(campaign, {"block_m": "auto"}, file=file, group_column="farm")
    run(c, grid, tmp_path)
    labels, record = folds_of(tmp_path), read_json(tmp_path / "labels.json")
    assert (labels["fold"].groupby(labels["group"]).nunique() == 1).all()
    assert record["folds"]["block_m"] > 0 and record["folds"]["block_m_reason"]
    assert all(r["ok"] for r in record["leakage"])


def test_shares_reach_chips_and_training(
    campaign: Campaign, grid: CampaignGrid, folder: Path, tmp_path: Path
) -> None:
    c = changed(campaign, {"block_m": 480}, policy="fractions", soft=True)
    chips, _ = run(c, grid, tmp_path)
    y, s = chips["y_cover"].values, chips["s_cover"].values
    assert s.shape == (y.shape[0], len(LEGEND), *y.shape[1:]) and s.dtype == np.uint8
    has = y != 255
    total = s.astype(int).sum(1)
    assert (total[has] >= 127).all() and (total[~has] == 0).all()
    assert np.array_equal(s.argmax(1)[has], y[has])
    task = TaskSpec("cover", "segmentation", LEGEND.names)
    torch.set_num_threads(1)
    settings = FitSettings(width=4, depth=2, epochs=1, crop_px=48)
    with_shares, hard = (
        fit_member(d, (task,), replace(settings), held_out_fold=0, member=0, seed=1)
        for d in (chips, chips.drop_vars("s_cover"))
    )
    assert all(np.isfinite(with_shares.history["cover"]))
    # Labels start and end on pixel edges here: every share is 0 or 1, as the class says.
    assert np.allclose(with_shares.history["cover"], hard.history["cover"], atol=1e-5)


def test_a_buffer_keeps_near_labels_from_training(
    campaign: Campaign, grid: CampaignGrid, tmp_path: Path
) -> None:
    chips, _ = run(changed(campaign, {"block_m": 480}), grid, tmp_path)
    assert _outside_buffer(changed(campaign, {"block_m": 480}), chips, 0) is None
    keep = _outside_buffer(changed(campaign, {"block_m": 480, "buffer_m": 200}), chips, 0)
    has, fold = chips["y_cover"].values != 255, chips["fold"].values
    assert keep is not None and keep[has & (fold == 0)].all()
    lost = (has & ~keep).sum() / (has & (fold != 0)).sum()
    assert 0.05 < lost < 0.9
