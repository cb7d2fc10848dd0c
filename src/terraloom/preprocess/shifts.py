"""Co-registration of a campaign: one sub-pixel shift per optical scene."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from odc.geo.geobox import GeoBox

from terraloom.acquire.assets import read_band
from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid
from terraloom.io import write_json
from terraloom.log import get_logger
from terraloom.preprocess.coregister import solve_shifts
from terraloom.preprocess.cube import Scene, mask_on
from terraloom.preprocess.reasons import INVALID
from terraloom.preprocess.scenes import SHIFTS, gather_scenes, mask_statistics

__all__ = ["measure_shifts"]

#: Shifts are measured in the middle of the AOI, on at most this many 10 m pixels a side: scenes
#: of one grid are shifted as a whole, and a larger window only costs time.
_WINDOW_PX = 1024
#: Bands that are compared: those of these that all scenes have; two bands err less than one.
_BANDS = ("B04", "B08")

log = get_logger(__name__)


def measure_shifts(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write ``shifts.json``: per scene its shift, and scenes refused with the reason.

    Scenes too cloudy to be used are not measured. One scene alone has nothing to be aligned to.
    """
    settings = campaign.coregister
    stats = mask_statistics(campaign, grid)
    scenes = [
        s
        for s in gather_scenes(campaign, decided=False)
        if s.masks and stats[s.item["id"]]["clear_pct"] >= campaign.scenes.min_clear_pct
    ]
    shifts: dict[str, Any] = {}
    refused: dict[str, str] = {}
    if settings.enabled and len(scenes) > 1:
        max_px = settings.max_shift_m / grid.resolution_m
        for scene, shift in zip(scenes, _solve(scenes, grid, max_px), strict=True):
            name = scene.item["id"]
            shifts[name] = asdict(shift)
            if not shift.known:
                refused[name] = (
                    f"no shift of at most {settings.max_shift_m:g} m could be told; "
                    "too few clear windows, or a larger shift"
                )
            log.info("%s: dy %.3f, dx %.3f px", name, shift.dy_px, shift.dx_px)
    write_json(SHIFTS, {"shifts": shifts, "refused": refused, "pixel_m": grid.resolution_m})


def _solve(scenes: list[Scene], grid: CampaignGrid, max_px: float) -> list[Any]:
    geobox = _middle(grid.geobox)
    bands = [b for b in _BANDS if all(b in s.item["assets"] for s in scenes)]
    images = [np.stack([read_band(dict(s.item), b, geobox) for b in bands]) for s in scenes]
    valid = [
        ((mask_on(geobox, s) & np.uint8(INVALID)) == 0) & np.isfinite(im).all(axis=0)
        for s, im in zip(scenes, images, strict=True)
    ]
    return solve_shifts(images, valid, max_shift_px=max_px)


def _middle(geobox: GeoBox) -> GeoBox:
    h, w = geobox.shape
    rows, cols = min(h, _WINDOW_PX), min(w, _WINDOW_PX)
    top, left = (h - rows) // 2, (w - cols) // 2
    return geobox[top : top + rows, left : left + cols]
