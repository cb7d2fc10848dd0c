"""Scenes of a campaign: verified, masked in strips of the AOI, and gathered for the cube."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from odc.geo.geobox import GeoBox

from terraloom.acquire.assets import read_band, verify_item
from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.errors import CoverageError, SceneError
from terraloom.grid import CampaignGrid, coarsen, pad
from terraloom.io import geobox_of, read_json, write_json, write_raster
from terraloom.log import get_logger, progress
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.cube import MASK_OUTSIDE, MASK_RESOLUTION_M, Scene
from terraloom.preprocess.masks import BACKGROUND_BANDS, S2CLOUDLESS_BANDS, mask_series
from terraloom.preprocess.radiometry import ScaleOffset, check_offset, dn_statistics
from terraloom.preprocess.reasons import INVALID, Reason

__all__ = [
    "ITEMS", "MASKS", "SCENES", "SHIFTS", "VERIFIED", "gather_scenes", "mask_part",
    "mask_statistics", "optical_items", "verify_items",
]  # fmt: skip

SCENES = Path("results/scenes")
ITEMS = SCENES / "items.json"
VERIFIED = SCENES / "verified.json"
MASKS = SCENES / "masks"
SHIFTS = SCENES / "shifts.json"
QUALITY = SCENES / "quality.csv"

#: Radiometry is checked on a view of the AOI of at most this many pixels a side.
_VIEW_PX = 256
#: Masks reach this far beyond the AOI (10 m pixels), so that shifted tiles find their border.
_MARGIN_PX = 120
#: A strip is masked in blocks of this many 20 m pixels, to bound memory ...
_BLOCK_PX = 1024
#: ... each with this margin (3 km), so that shadows find clouds beyond the block's edge.
_REACH_PX = 150

log = get_logger(__name__)


# --- verification ------------------------------------------------------------------------------


def verify_items(campaign: Campaign, grid: CampaignGrid) -> None:
    """Check assets and radiometry of all used items.

    Writes ``verified.json``: id to ``ok`` or what is wrong.

    Raises:
        SceneError: With policy ``stop`` the first bad item; with ``skip-and-report`` when more
            items fail than allowed, naming them.
    """
    items = [i for i in read_json(ITEMS)["items"] if i["decision"] == "use"]
    with ThreadPoolExecutor(max_workers=4) as pool:
        results = pool.map(lambda item: _verdict(item, grid), items)
        verdicts = list(progress(results, total=len(items), what="items checked"))
    bad = [(i, e) for i, e in zip(items, verdicts, strict=True) if e is not None]
    for _, err in bad:
        log.warning("%s", err)
    if bad and campaign.scenes.on_bad_item == "stop":
        raise bad[0][1]
    share = 100 * len(bad) / max(len(items), 1)
    if share > campaign.scenes.max_failed_pct:
        raise SceneError(
            f"{len(bad)} of {len(items)} items cannot be used ({share:.0f} %); first: {bad[0][1]}",
            where=f"campaign {campaign.name}",
            allowed=f"scenes.max_failed_pct {campaign.scenes.max_failed_pct:g}",
            fix="fetch the files again, or raise scenes.max_failed_pct",
        )
    write_json(
        VERIFIED,
        {
            i["id"]: "ok" if e is None else f"{e.where}: {e.found}"
            for i, e in zip(items, verdicts, strict=True)
        },
    )


def _verdict(item: dict[str, Any], grid: CampaignGrid) -> SceneError | None:
    try:
        verify_item(item)
        if load_source(item["source"]).kind == "optical":
            _check_radiometry(item, grid)
    except SceneError as err:
        return err
    return None


def _check_radiometry(item: dict[str, Any], grid: CampaignGrid) -> None:
    """Hold scale and offset of an item against its pixels on a coarse view of the AOI."""
    side = max(grid.geobox.shape)
    view = grid.geobox.zoom_out(max(side / _VIEW_PX, 1))
    statistics, decoding = {}, {}
    for band, asset in item["assets"].items():
        if band == "SCL":
            continue
        pair = ScaleOffset(asset["scale"], asset["offset"])
        values = read_band(item, band, view, resampling="nearest")
        statistics[band] = dn_statistics((values - pair.offset) / pair.scale, nodata=None)
        decoding[band] = pair
    check_offset(statistics, decoding, item["id"])


def _usable() -> list[dict[str, Any]]:
    verified = read_json(VERIFIED)
    return [i for i in read_json(ITEMS)["items"] if verified.get(i["id"]) == "ok"]


def optical_items() -> list[dict[str, Any]]:
    """Verified items of optical sources, in the order of the lock: the bands of the masks."""
    return [i for i in _usable() if load_source(i["source"]).kind == "optical"]


# --- masks -------------------------------------------------------------------------------------


def mask_part(campaign: Campaign, grid: CampaignGrid, part: str) -> None:
    """Mask all optical scenes on one strip of the AOI.

    Writes ``<part>.tif``, one band of reasons per scene, and ``<part>.json``.
    """
    strip = _strip(campaign, grid, part)
    items = optical_items()
    path = MASKS / f"{part}.tif"
    if strip is not None and items:
        reasons = np.stack(_mask_strip(campaign, items, strip))
        ids = [i["id"] for i in items]
        write_raster(path, reasons, strip, nodata=MASK_OUTSIDE, band_names=ids)
    written = strip is not None and bool(items)
    write_json(
        MASKS / f"{part}.json",
        {"file": path.as_posix() if written else None, "scenes": [i["id"] for i in items]},
    )


def _strip(campaign: Campaign, grid: CampaignGrid, part: str) -> GeoBox | None:
    """Rows of one job on the mask grid; None when there are more jobs than rows."""
    factor = round(MASK_RESOLUTION_M / grid.resolution_m)
    whole = coarsen(pad(grid.geobox, _MARGIN_PX), factor)
    rows = np.linspace(0, whole.shape[0], campaign.scenes.jobs + 1).round().astype(int)
    n = int(part[1:])
    first, last = int(rows[n]), int(rows[n + 1])
    return whole[first:last, :] if last > first else None


def _mask_strip(
    campaign: Campaign, items: Sequence[dict[str, Any]], strip: GeoBox
) -> list[npt.NDArray[np.uint8]]:
    out = [np.zeros(strip.shape, np.uint8) for _ in items]
    h, w = strip.shape
    blocks = [(r, c) for r in range(0, h, _BLOCK_PX) for c in range(0, w, _BLOCK_PX)]
    for r, c in progress(blocks, what="mask blocks"):
        rows, cols = min(_BLOCK_PX, h - r), min(_BLOCK_PX, w - c)
        geobox = pad(strip[r : r + rows, c : c + cols], _REACH_PX)
        inner = slice(_REACH_PX, _REACH_PX + rows), slice(_REACH_PX, _REACH_PX + cols)
        for target, mask in zip(out, _mask_block(campaign, items, geobox), strict=True):
            target[r : r + rows, c : c + cols] = mask[inner]
    return out


def _mask_block(
    campaign: Campaign, items: Sequence[dict[str, Any]], geobox: GeoBox
) -> list[npt.NDArray[np.uint8]]:
    settings = campaign.masks
    wanted = {
        "s2cloudless": (*S2CLOUDLESS_BANDS, "B03"),
        "spectral": (*BACKGROUND_BANDS, "B03", "B10", "B12"),
        "scl": ("SCL", "B03", "B08"),
    }[settings.method]
    scenes = [
        {b: read_band(i, b, geobox) for b in dict.fromkeys(wanted) if b in i["assets"]}
        for i in items
    ]
    sun = [
        None if i["sun_azimuth_deg"] is None else (i["sun_azimuth_deg"], i["sun_elevation_deg"])
        for i in items
    ]
    days = [pd.Timestamp(i["datetime"]).timestamp() / 86400 for i in items]
    return mask_series(
        scenes,
        method=settings.method,
        resolution_m=float(MASK_RESOLUTION_M),
        sun=sun,
        days=days,
        cloud_threshold=settings.cloud_threshold,
        dilation_m=settings.dilation_m,
        shadow=settings.shadow,
    )


@dataclass(frozen=True)
class _Parts:
    """Strips that were written and the band of each scene in them."""

    files: tuple[Path, ...]
    bands: dict[str, int]

    def of(self, item_id: str) -> tuple[tuple[Path, int], ...]:
        band = self.bands.get(item_id)
        return () if band is None else tuple((f, band) for f in self.files)


def _parts(campaign: Campaign) -> _Parts:
    records = [read_json(MASKS / f"p{n:03d}.json") for n in range(campaign.scenes.jobs)]
    files = tuple(Path(r["file"]) for r in records if r["file"])
    return _Parts(files, {s: n for n, s in enumerate(records[0]["scenes"], 1)})


def mask_statistics(campaign: Campaign, grid: CampaignGrid) -> dict[str, dict[str, float]]:
    """Per scene the share of the AOI (percent) that is clear, and that has each reason."""
    import rasterio
    from rasterio.features import geometry_mask

    parts = _parts(campaign)
    counts: dict[str, npt.NDArray[np.int64]] = {
        s: np.zeros(256, dtype=np.int64) for s in parts.bands
    }
    for file in parts.files:
        geobox = geobox_of(file)
        inside = geometry_mask(
            [grid.aoi], out_shape=geobox.shape, transform=geobox.affine, invert=True
        )
        with rasterio.open(file) as src:
            for scene, band in parts.bands.items():
                counts[scene] += np.bincount(src.read(band)[inside], minlength=256)
    codes = np.arange(256)
    stats = {}
    for scene, n in counts.items():
        total = max(int(n.sum()), 1)
        stats[scene] = {
            "clear_pct": 100 * float(n[(codes & int(INVALID)) == 0].sum()) / total,
            **{
                f"{bit.name.lower()}_pct": 100 * float(n[(codes & int(bit)) > 0].sum()) / total
                for bit in (Reason.CLOUD, Reason.SHADOW, Reason.SNOW, Reason.NODATA)
                if bit.name
            },
        }
    return stats


# --- for the cube ------------------------------------------------------------------------------


def gather_scenes(campaign: Campaign, *, decided: bool = True) -> list[Scene]:
    """Scenes for the cube: item, mask, shift.

    Args:
        campaign: The campaign.
        decided: Only scenes that the quality table uses, with their shifts; False: all verified
            scenes without shifts, for the stages before.

    Raises:
        CoverageError: A source of the campaign has no scene left.
    """
    parts = _parts(campaign)
    items = _usable()
    shifts: dict[str, Any] = {}
    if decided:
        table = pd.read_csv(QUALITY, dtype={"id": str})
        used = set(table.loc[table["decision"] == "use", "id"])
        items = [i for i in items if i["id"] in used]
        shifts = read_json(SHIFTS)["shifts"]
    _require_all_sources(campaign, items)
    return [Scene(i, parts.of(i["id"]), _shift(shifts.get(i["id"]))) for i in items]


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


def _shift(record: dict[str, Any] | None) -> Shift | None:
    if record is None or record["dy_px"] is None:
        return None
    return Shift(**record)
