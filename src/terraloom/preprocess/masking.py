"""Masks of a campaign's scenes, made by period and strip of the AOI."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox

from terraloom.acquire.assets import read_band
from terraloom.acquire.fetch import is_remote, limit_requests, read_many
from terraloom.acquire.sources import SourceTable, load_source
from terraloom.config.campaign import Campaign
from terraloom.errors import SceneError
from terraloom.grid import CampaignGrid, coarsen, pad
from terraloom.io import write_json, write_raster
from terraloom.log import get_logger, progress
from terraloom.preprocess.compare import USED, combine, count_agreement, merge_counts
from terraloom.preprocess.csmask import Level
from terraloom.preprocess.layers import CLOUD_CODES, SHADOW_CODES, layer_reasons
from terraloom.preprocess.masks import METHOD_BANDS, MaskMethod, add_edge, mask_scene, mask_series
from terraloom.preprocess.scenes import MASK_OUTSIDE, MASKS, item_period, period_items

__all__ = ["mask_part"]

Item = dict[str, Any]
Reasons = npt.NDArray[np.uint8]

#: Masks reach this far beyond the AOI (10 m pixels), so that shifted tiles find their border.
_MARGIN_PX = 120
#: Blocks have this margin, so that shadows find clouds beyond the block's edge.
_REACH_M = 3000.0
#: Largest and smallest width of a block without its margin ...
_BLOCK_PX = (256, 1024)
#: ... so that the bands of all dates of a block take no more than this.
_BLOCK_BYTES = 400e6

log = get_logger(__name__)


def mask_part(
    campaign: Campaign, grid: CampaignGrid, period: str, part: str, *, stamp: str = ""
) -> None:
    """Mask the scenes of one period on one strip of the AOI.

    Optical scenes by ``masks.methods`` or the source's own ``masks``; of other sources those whose
    product has a layer of clouds (MODIS indices). Scenes of the periods before and after tell what
    clear sky looks like, where a method asks.

    Writes ``<period>-<part>.json`` with the rasters, their scenes and the counts of how far the
    methods agree (:mod:`terraloom.preprocess.compare`), and per source one raster, one band of
    reasons per scene.

    Args:
        campaign: The campaign.
        grid: Its grid.
        period: Name of the period.
        part: Name of the strip, ``p000``.
        stamp: What the caller knows this job by; kept in the manifest.

    Raises:
        SceneError: A method cannot mask a source's items; names what it lacks.
    """
    limit_requests(campaign.scenes.requests, campaign.scenes.timeout_s)
    files: dict[str, str] = {}
    scenes: dict[str, list[str]] = {}
    compared: dict[str, Any] = {}
    for source in dict.fromkeys(s.source for s in campaign.sources):
        near = [i for i in period_items(campaign, period) if i["source"] == source]
        mine = [i for i in near if item_period(campaign, i) == period]
        jobs = _plans(campaign, source, near, mine)
        if not jobs:
            continue
        strip = _strip(campaign, grid, part, jobs[0].table.mask_resolution_m)
        if strip is None:
            continue
        path = MASKS / f"{period}-{part}-{Path(source).stem}.tif"
        if path.as_posix() in files.values():  # two tables of one name
            path = MASKS / f"{period}-{part}-{len(files)}-{Path(source).stem}.tif"
        reasons: dict[str, Reasons] = {}
        for job in jobs:
            masks, counts = _mask_strip(campaign, job, strip, _inside(grid, strip))
            names = [str(job.items[n]["id"]) for n in job.own]
            reasons |= dict(zip(names, masks, strict=True))
            compared |= dict(zip(names, counts, strict=True))
        ids = [str(i["id"]) for i in mine]
        stack = np.stack([reasons[i] for i in ids])
        write_raster(path, stack, strip, nodata=MASK_OUTSIDE, band_names=ids)
        files[source], scenes[source] = path.as_posix(), ids
    record = {"stamp": stamp, "files": files, "scenes": scenes, "compare": compared}
    write_json(MASKS / f"{period}-{part}.json", record)


def _strip(campaign: Campaign, grid: CampaignGrid, part: str, resolution_m: int) -> GeoBox | None:
    """Rows of one job on the mask grid; None when there are more jobs than rows."""
    factor = round(resolution_m / grid.resolution_m)
    whole = coarsen(pad(grid.geobox, -(-_MARGIN_PX // factor) * factor), factor)
    rows = np.linspace(0, whole.shape[0], campaign.scenes.jobs + 1).round().astype(int)
    n = int(part[1:])
    first, last = int(rows[n]), int(rows[n + 1])
    return whole[first:last, :] if last > first else None


def _inside(grid: CampaignGrid, strip: GeoBox) -> npt.NDArray[np.bool_]:
    from rasterio.features import geometry_mask

    out: npt.NDArray[np.bool_] = geometry_mask(
        [grid.aoi], out_shape=strip.shape, transform=strip.affine, invert=True
    )
    return out


# --- what is to be done ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Scenes of one source to mask.

    Attributes:
        table: Source table.
        items: Scenes to read, in the order of the lock.
        own: Which of them are masked; the others only help.
        methods: Methods of each of ``own``.
        bands: Roles to read, and the source's band of each.
        level: Processing level of the reflectance.
    """

    table: SourceTable
    items: list[Item]
    own: list[int]
    methods: list[list[MaskMethod]]
    bands: dict[str, str]
    level: Level


def _plans(
    campaign: Campaign, source: str, near: Sequence[Item], mine: Sequence[Item]
) -> list[_Job]:
    """One job per update of the lock: later scenes do not change the masks of earlier ones."""
    jobs = []
    for update in sorted({i.get("added", 0) for i in mine}):
        helping = [i for i in near if i.get("added", 0) <= update]
        job = _plan(campaign, source, helping, [i for i in mine if i.get("added", 0) == update])
        jobs += [job] if job else []
    return jobs


def _plan(
    campaign: Campaign, source: str, near: Sequence[Item], mine: Sequence[Item]
) -> _Job | None:
    """Methods and bands of the scenes; None for a source that is not masked."""
    table = load_source(source)
    layered = any(t.codes in CLOUD_CODES for t in table.layers.values())
    if table.kind != "optical" and not layered:
        return None
    entry = next(s for s in campaign.sources if s.source == source)
    names = (entry.masks or campaign.masks.methods) if table.kind == "optical" else ["layer"]
    there = _roles(table, near)
    methods = [_methods(table, i, names, there) for i in mine]
    used = {m for several in methods for m in several}
    ids = {i["id"] for i in mine}
    # Other dates help the spectral tests only.
    items = list(near) if MaskMethod.SPECTRAL in used else list(mine)
    own = [n for n, i in enumerate(items) if i["id"] in ids]
    wanted: list[str] = []
    for method in sorted(used):
        needed, more = METHOD_BANDS[method]
        _require(table, method, needed, there)
        # A layer that knows shadows needs no pixels at all.
        if method is not MaskMethod.LAYER or _projects(campaign, table):
            wanted += [*needed, *more]
    bands = {r: there[r] for r in dict.fromkeys(wanted) if r in there}
    if not bands and MaskMethod.NONE in used:
        # Bands that play no known part still say where pixels are missing.
        bands = {"B04": next(b for b in table.bands if any(b in i["assets"] for i in near))}
    level: Level = "l1c" if "l1c" in f"{table.key} {table.collection}".lower() else "l2a"
    return _Job(table, items, own, methods, bands, level)


def _roles(table: SourceTable, items: Sequence[Item]) -> dict[str, str]:
    """Role to band of those bands that any item has; one near infrared stands in for the other."""
    have = {a for i in items for a in i["assets"]}
    there = {role: band for role, band in table.roles().items() if band in have}
    for role, other in (("B08", "B8A"), ("B8A", "B08")):
        if role not in there and other in there:
            there[role] = there[other]
    return there


def _methods(
    table: SourceTable, item: Item, names: Sequence[str], there: dict[str, str]
) -> list[MaskMethod]:
    """Methods of one scene; ``auto`` is its own layer, else spectral tests."""
    found = []
    layered = any(t.codes in CLOUD_CODES and k in item["assets"] for k, t in table.layers.items())
    for name in names:
        if name == "auto" and layered:
            found.append(MaskMethod.LAYER)
        elif name == "auto" and not set(METHOD_BANDS[MaskMethod.SPECTRAL][0]) <= set(there):
            log.warning(
                "item %s: neither a layer of clouds nor the bands to find them; only missing "
                "pixels are masked", item["id"],
            )  # fmt: skip
            found.append(MaskMethod.NONE)
        elif name == "layer" and not layered:
            raise SceneError(
                "the item has no layer of clouds",
                where=f"item {item['id']}, masks.methods layer",
                allowed=", ".join(table.layers) or "(the source has none)",
                fix="choose masks.methods auto or spectral, or drop the item",
            )
        else:
            found.append(MaskMethod.SPECTRAL if name == "auto" else MaskMethod(name))
    return list(dict.fromkeys(found))


def _require(
    table: SourceTable, method: MaskMethod, needed: Sequence[str], there: dict[str, str]
) -> None:
    absent = [r for r in needed if r not in there]
    if absent:
        raise SceneError(
            f"no item has a band for {', '.join(absent)} (named as Sentinel-2 bands)",
            where=f"source {table.key}, masks.methods {method}",
            allowed=f"all of {', '.join(needed)}; there are {', '.join(sorted(there)) or 'none'}",
            fix="add the bands to sources[].bands, or give this source methods of its own in "
            "sources[].masks",
        )


def _projects(campaign: Campaign, table: SourceTable) -> bool:
    """Whether shadows are searched from the sun beside a layer that knows none."""
    known = any(t.codes in SHADOW_CODES for t in table.layers.values())
    return campaign.masks.shadow and not known and table.kind == "optical"


# --- pixels ----------------------------------------------------------------------------------


def _mask_strip(
    campaign: Campaign, job: _Job, strip: GeoBox, inside: npt.NDArray[np.bool_]
) -> tuple[list[Reasons], list[dict[str, Any]]]:
    """Reasons of the own scenes, and counts of how far their methods agree, block by block."""
    out = [np.zeros(strip.shape, np.uint8) for _ in job.own]
    counts: list[dict[str, Any]] = [{} for _ in job.own]
    h, w = strip.shape
    reach = math.ceil(_REACH_M / float(strip.resolution.x))
    side = _block_px(len(job.items) * max(len(job.bands), 1), reach)
    blocks = [(r, c) for r in range(0, h, side) for c in range(0, w, side)]
    for r, c in progress(blocks, what="mask blocks"):
        rows, cols = min(side, h - r), min(side, w - c)
        at = slice(r, r + rows), slice(c, c + cols)
        inner = slice(reach, reach + rows), slice(reach, reach + cols)
        geobox = pad(strip[at], reach)
        for n, masks in enumerate(_mask_block(campaign, job, geobox)):
            used = combine(list(masks.values()), campaign.masks.combine)
            used = add_edge(used, campaign.masks.dilation_m, float(geobox.resolution.x))
            out[n][at] = used[inner]
            cut = {str(m): mask[inner] for m, mask in masks.items()} | {USED: used[inner]}
            counts[n] = merge_counts([counts[n], count_agreement(cut, inside[at])])
    return out, counts


def _block_px(planes: int, reach: int) -> int:
    """Width of a block whose planes of float32, margins included, fit the memory for them."""
    side = math.isqrt(int(_BLOCK_BYTES / 4 / planes)) - 2 * reach
    return int(np.clip(side, *_BLOCK_PX))


def _mask_block(
    campaign: Campaign, job: _Job, geobox: GeoBox
) -> Iterator[dict[MaskMethod, Reasons]]:
    """Per own scene the reasons by each of its methods, without the edge."""
    scenes, layers = _read(campaign, job, geobox)
    sun = [_sun(i) if campaign.masks.shadow else None for i in job.items]
    common: dict[str, Any] = {
        "resolution_m": float(geobox.resolution.x), "dilation_m": 0.0,
        "cloud_threshold": campaign.masks.cloud_threshold, "shadow": campaign.masks.shadow,
    }  # fmt: skip
    spectral: dict[int, Reasons] = {}
    asked = [n for n, m in zip(job.own, job.methods, strict=True) if MaskMethod.SPECTRAL in m]
    if asked:
        usable = [_pick(s, MaskMethod.SPECTRAL) for s in scenes]
        days = [datetime.fromisoformat(i["datetime"]).timestamp() / 86400 for i in job.items]
        found = mask_series(
            usable, method=MaskMethod.SPECTRAL, sun=sun, days=days, wanted=asked, **common
        )
        spectral = dict(zip(asked, found, strict=True))
    for n, methods in zip(job.own, job.methods, strict=True):
        azimuth, elevation = sun[n] or (None, None)
        masks: dict[MaskMethod, Reasons] = {}
        for method in methods:
            if method is MaskMethod.SPECTRAL:
                masks[method] = spectral.pop(n)
                continue
            masks[method] = mask_scene(
                _pick(scenes[n], method), method=method, layer=layers.get(n), level=job.level,
                layer_has_shadow=not _projects(campaign, job.table), sun_azimuth_deg=azimuth,
                sun_elevation_deg=elevation, **common,
            )  # fmt: skip
        yield masks


def _sun(item: Item) -> tuple[float, float] | None:
    """Azimuth and elevation of the sun in degrees; None where the item does not say."""
    azimuth, elevation = item["sun_azimuth_deg"], item["sun_elevation_deg"]
    if azimuth is None or elevation is None:
        return None
    if elevation <= 0:
        raise SceneError(
            f"the sun's elevation is {elevation:g} degrees",
            where=f"item {item['id']}",
            allowed="above 0",
            fix="drop the item, or set masks.shadow to false",
        )
    return float(azimuth), float(elevation)


def _pick(bands: dict[str, Any], method: MaskMethod) -> dict[str, Any]:
    """Bands a method uses; the optional ones only where the item has them."""
    needed, more = METHOD_BANDS[method]
    optional = [r for r in more if r in bands and np.isfinite(bands[r]).any()]
    return {r: bands[r] for r in dict.fromkeys([*needed, *optional])}


def _read(
    campaign: Campaign, job: _Job, geobox: GeoBox
) -> tuple[list[dict[str, Any]], dict[int, Reasons]]:
    """Bands of all scenes by role, and the reasons of all layers of scenes masked by them."""
    asked = [n for n, m in zip(job.own, job.methods, strict=True) if MaskMethod.LAYER in m]
    keys = [
        *((n, band) for n in range(len(job.items)) for band in dict.fromkeys(job.bands.values())),
        *((n, k) for n in asked for k in job.table.layers if k in job.items[n]["assets"]),
    ]
    remote = any(is_remote(a["href"]) for i in job.items for a in i["assets"].values())
    calls = [partial(read_band, job.items[n], key, geobox) for n, key in keys]
    found = dict(
        zip(keys, read_many(calls, campaign.scenes.requests if remote else 1), strict=True)
    )
    scenes = [
        {role: found[n, band] for role, band in job.bands.items()} for n in range(len(job.items))
    ]
    layers = {n: np.zeros(geobox.shape, dtype=np.uint8) for n in asked}
    for n, key in keys:
        if key in job.table.layers:
            layer = job.table.layers[key]
            layers[n] |= layer_reasons(
                found.pop((n, key)), layer.codes, nodata=layer.nodata,
                where=f"item {job.items[n]['id']}, layer {key}",
            )  # fmt: skip
    return scenes, layers
