"""Scenes of a campaign between the stages: where their files lie, which are used, how clear."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.campaign import Campaign
from terraloom.errors import CoverageError
from terraloom.grid import CampaignGrid
from terraloom.io import geobox_of, read_json
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.field import ShiftField
from terraloom.preprocess.reasons import INVALID, Reason
from terraloom.preprocess.stack import MASK_OUTSIDE, Scene

__all__ = [
    "ITEMS", "MASKS", "MASK_OUTSIDE", "QUALITY", "SCENES", "SHIFTS", "VERIFIED", "gather_scenes",
    "item_period", "mask_manifests", "mask_statistics", "period_items", "usable_items",
]  # fmt: skip

SCENES = Path("results/scenes")
ITEMS = SCENES / "items.json"
VERIFIED = SCENES / "verified.json"
MASKS = SCENES / "masks"
SHIFTS = SCENES / "shifts.json"
QUALITY = SCENES / "quality.csv"


def usable_items() -> list[dict[str, Any]]:
    """Items of the lock that are used and passed verification, in the order of the lock."""
    verified = read_json(VERIFIED)
    return [i for i in read_json(ITEMS)["items"] if verified.get(i["id"]) == "ok"]


def item_period(campaign: Campaign, item: dict[str, Any]) -> str | None:
    """Name of the period an item falls into; None outside all of them."""
    return campaign.cube.period_of(date.fromisoformat(str(item["datetime"])[:10]))


def period_items(campaign: Campaign, period: str) -> list[dict[str, Any]]:
    """Usable items of a period and of the periods before and after it in time.

    These are the items that the masks of the period depend on.
    """
    near = campaign.cube.around(period)
    return [i for i in usable_items() if item_period(campaign, i) in near]


def mask_manifests(campaign: Campaign) -> Iterator[dict[str, Any]]:
    """Manifests of all mask jobs, by period and part."""
    for period in campaign.cube.periods:
        for n in range(campaign.scenes.jobs):
            yield read_json(MASKS / f"{period.name}-p{n:03d}.json")


def _mask_files(campaign: Campaign) -> dict[str, list[tuple[Path, int]]]:
    """Item id: rasters of its reasons and its band in each."""
    found: dict[str, list[tuple[Path, int]]] = {}
    for manifest in mask_manifests(campaign):
        for source, file in manifest["files"].items():
            for band, item_id in enumerate(manifest["scenes"][source], 1):
                found.setdefault(item_id, []).append((Path(file), band))
    return found


def mask_statistics(campaign: Campaign, grid: CampaignGrid) -> dict[str, dict[str, float]]:
    """Per scene the share of the AOI (percent) that is clear, and that has each reason."""
    import rasterio
    from rasterio.features import geometry_mask

    counts: dict[str, npt.NDArray[np.int64]] = {}
    for manifest in mask_manifests(campaign):
        for source, file in manifest["files"].items():
            geobox = geobox_of(file)
            inside = geometry_mask(
                [grid.aoi], out_shape=geobox.shape, transform=geobox.affine, invert=True
            )
            with rasterio.open(file) as src:
                for band, item_id in enumerate(manifest["scenes"][source], 1):
                    counts.setdefault(item_id, np.zeros(256, dtype=np.int64))
                    counts[item_id] += np.bincount(src.read(band)[inside], minlength=256)
    return {item_id: _shares(n) for item_id, n in counts.items()}


def _shares(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    codes = np.arange(256)
    total = max(int(counts.sum()), 1)
    return {
        "clear_pct": 100 * float(counts[(codes & int(INVALID)) == 0].sum()) / total,
        **{
            f"{bit.name.lower()}_pct": 100 * float(counts[(codes & int(bit)) > 0].sum()) / total
            for bit in (Reason.CLOUD, Reason.SHADOW, Reason.SNOW, Reason.NODATA)
            if bit.name
        },
    }


def gather_scenes(
    campaign: Campaign, *, decided: bool = True, aligned: bool | None = None
) -> list[Scene]:
    """Scenes for the cube: item, mask, shift.

    Args:
        campaign: The campaign.
        decided: Only scenes that the quality table uses; False: all verified scenes, for the
            stages before.
        aligned: With their shifts; default: when ``decided``.

    Raises:
        CoverageError: A source of the campaign has no scene left.
    """
    files = _mask_files(campaign)
    items = usable_items()
    shifts: dict[str, Any] = {}
    if decided:
        with QUALITY.open(encoding="utf-8", newline="") as f:
            used = {row["id"] for row in csv.DictReader(f) if row["decision"] == "use"}
        items = [i for i in items if i["id"] in used]
    if decided if aligned is None else aligned:
        shifts = read_json(SHIFTS)["shifts"]
    _require_all_sources(campaign, items)
    return [_scene(i, tuple(files.get(i["id"], ())), shifts.get(i["id"])) for i in items]


def _scene(
    item: dict[str, Any], masks: tuple[tuple[Path, int], ...], shift: dict[str, Any] | None
) -> Scene:
    if shift is None or shift["dy_px"] is None:
        return Scene(item, masks, None)
    field = ShiftField.from_record(shift["field"]) if shift.get("field") else None
    return Scene(item, masks, Shift.from_record(shift), field)


def _require_all_sources(campaign: Campaign, items: Sequence[dict[str, Any]]) -> None:
    """A map from radar and elevation alone must not pass for one from all sources."""
    left = {i["source"] for i in items}
    lost = [s.source for s in campaign.sources if s.source not in left]
    if lost:
        raise CoverageError(
            f"no scene of {', '.join(lost)} is left after the quality checks",
            where=f"campaign {campaign.name}", allowed="at least one usable scene per source",
            fix="see `why` in results/scenes/quality.csv and verified.json; then lower "
            "scenes.min_clear_pct, widen cube.periods, set coregister.enabled to false, or leave "
            "the source out",
        )  # fmt: skip
