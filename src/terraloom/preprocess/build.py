"""Cube jobs of a campaign: many tiles in one process."""

from __future__ import annotations

from pathlib import Path

from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid
from terraloom.io import write_json
from terraloom.log import get_logger, progress
from terraloom.preprocess.cube import build_tile
from terraloom.preprocess.scenes import gather_scenes
from terraloom.state import code_digest

__all__ = ["CUBES", "build_batch"]

CUBES = Path("work/cube")

log = get_logger(__name__)


def build_batch(campaign: Campaign, grid: CampaignGrid, batch: str, *, stamp: str = "") -> None:
    """Build the cubes of one job's tiles and write their manifest; finished tiles are kept.

    Args:
        campaign: The campaign.
        grid: Its grid.
        batch: Name of the job, ``b0000``.
        stamp: What the caller knows this job by; kept in the manifest.
    """
    scenes = gather_scenes(campaign)
    code = code_digest("preprocess.cube")
    tiles = {}
    for tile in progress(
        grid.batches(campaign.grid.tiles_per_job)[batch], what=f"{batch}: cubes built"
    ):
        path = CUBES / f"{tile.name}.zip"
        tiles[tile.name] = build_tile(tile, grid, campaign, scenes, path, code)
        if tiles[tile.name]["clear_pct"] == 0:
            log.warning("tile %s has no clear pixel; its products will be no data", tile.name)
    write_json(CUBES / f"{batch}.json", {"stamp": stamp, "tiles": tiles})
