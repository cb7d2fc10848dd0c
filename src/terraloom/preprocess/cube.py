"""The cube: a tile's harmonised stack, one masked composite per period at native resolutions.

Optical bands are masked medians of reflectance, SAR bands means of linear power kept as decibels,
static layers (elevation) are read once. Every band is resampled at most once: shift, reprojection
and resolution change are one warp, and bands on the tile's lattice are not resampled at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from odc.geo.geobox import GeoBox

from terraloom.acquire.assets import read_band
from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign, Composite
from terraloom.grid import CampaignGrid, Tile, coarsen
from terraloom.io import digest_json, read_store, read_window, sha256, write_store
from terraloom.log import get_logger
from terraloom.preprocess.coregister import Shift, shifted_geobox
from terraloom.preprocess.reasons import INVALID, Reason

__all__ = [
    "MASK_OUTSIDE",
    "MASK_RESOLUTION_M",
    "Scene",
    "build_tile",
    "channel_names",
    "cube_inputs",
    "mask_on",
    "period_of",
]

Float = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]

#: Masks are made at this resolution, metres: the finest that has all bands a mask needs.
MASK_RESOLUTION_M = 20
#: Value of a mask raster outside its strip; all reason bits at once never occur.
MASK_OUTSIDE = 255
#: Reflectance is stored as uint16 with this step; -0.1 .. 6.45 fits, 65535 is missing.
_SCALE, _OFFSET, _FILL = 1e-4, -0.1, 65535

log = get_logger(__name__)


@dataclass(frozen=True)
class Scene:
    """One used acquisition: its record in the lock, its mask and its shift.

    Attributes:
        item: Record of the item lock.
        masks: Rasters of reasons (strips of the AOI) and this scene's band in them, in the frame
            of the scene as delivered; empty where the source needs no mask (SAR, elevation).
        shift: How far the content lies off, 10 m pixels.
    """

    item: Mapping[str, Any]
    masks: tuple[tuple[Path, int], ...]
    shift: Shift | None

    @property
    def day(self) -> date:
        """Day of acquisition, UTC."""
        return date.fromisoformat(str(self.item["datetime"])[:10])


def period_of(day: date, periods: Sequence[Composite]) -> str | None:
    """Name of the first period that holds a day; None if none does."""
    return next((p.name for p in periods if p.start <= day <= p.end), None)


def _placed(geobox: GeoBox, scene: Scene) -> GeoBox:
    return geobox if scene.shift is None else shifted_geobox(geobox, scene.shift, pixel_m=10)


def mask_on(geobox: GeoBox, scene: Scene) -> Bits:
    """Reasons of a scene on a geobox of 10, 20 or 60 m pixels, (H, W) uint8.

    The mask has 20 m pixels; a 60 m pixel takes every reason found in its nine parts, since one
    cloudy part spoils the whole pixel's reflectance.
    """
    if not scene.masks:
        return np.zeros(geobox.shape, np.uint8)
    res = round(geobox.resolution.x)
    if res <= MASK_RESOLUTION_M:
        return _joined(scene, _placed(geobox, scene))
    factor = res // MASK_RESOLUTION_M
    h, w = geobox.shape
    fine_box = GeoBox(
        (h * factor, w * factor), geobox.affine @ geobox.affine.scale(1 / factor), geobox.crs
    )
    fine = _joined(scene, _placed(fine_box, scene))
    parts = fine.reshape(h, factor, w, factor)
    bits: Bits = np.bitwise_or.reduce(np.bitwise_or.reduce(parts, axis=3), axis=1)
    return bits


def _joined(scene: Scene, geobox: GeoBox) -> Bits:
    """Strips of a mask joined on a geobox; outside all strips there is no data."""
    out = np.full(geobox.shape, np.uint8(Reason.NODATA))
    for path, band in scene.masks:
        part = read_window(path, geobox, band=band)
        seen = part != MASK_OUTSIDE
        out[seen] = part[seen]
    return out


def _median(stack: Float) -> Float:
    if len(stack) == 1:
        only: Float = stack[0]
        return only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-NaN pixels stay NaN: wanted
        return np.asarray(np.nanmedian(stack, axis=0), dtype=np.float32)


def _mean(stack: Float) -> Float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(stack, axis=0), dtype=np.float32)


def _mean_db(stack: Float) -> Float:
    """Mean of decibels, taken in linear power: averaging decibels is biased by speckle."""
    power = np.power(10, stack / 10, dtype=np.float32)
    return np.asarray(10 * np.log10(_mean(power)), dtype=np.float32)


_REDUCE = {"optical": _median, "sar": _mean_db, "dem": _mean}


def _composite(scenes: Sequence[Scene], bands: Sequence[str], geobox: GeoBox, kind: str) -> Float:
    """(B, H, W) composite of the scenes of one period; NaN where no scene is clear."""
    out = np.full((len(bands), *geobox.shape), np.nan, np.float32)
    if not scenes:
        return out
    clear = [(mask_on(geobox, s) & INVALID) == 0 for s in scenes]
    for b, band in enumerate(bands):
        stack = np.stack([read_band(dict(s.item), band, _placed(geobox, s)) for s in scenes])
        for t, ok in enumerate(clear):
            stack[t][~ok] = np.nan
        out[b] = _REDUCE[kind](stack)
    return out


def _groups(campaign: Campaign) -> dict[str, tuple[str, list[str], int]]:
    """Group name: (source key, bands, resolution in metres), in the order of the campaign."""
    groups: dict[str, tuple[str, list[str], int]] = {}
    for source in campaign.sources:
        table = load_source(source.source)
        for key, band in table.bands.items():
            if source.bands is not None and key not in source.bands:
                continue
            # The group's name ends with the pixel size its bands are kept at.
            res = int(band.group.rsplit("_", 1)[1])
            _, bands, _ = groups.setdefault(band.group, (source.source, [], res))
            bands.append(key)
    return groups


def _reasons(scenes: Sequence[Scene], tile: Tile, counts: npt.NDArray[np.uint8]) -> Bits:
    """Why a pixel has no clear optical observation in any period: all reasons seen, else 0."""
    bits = np.zeros(tile.geobox.shape, np.uint8)
    if not scenes:  # nothing optical: radar and elevation see through clouds
        return bits
    for scene in scenes:
        bits |= mask_on(tile.geobox, scene)
    bits &= np.uint8(INVALID)
    unseen = counts.sum(axis=0, dtype=np.int32) == 0
    bits[unseen & (bits == 0)] = Reason.NODATA
    bits[~unseen] = 0
    return bits


def build_tile(
    tile: Tile, grid: CampaignGrid, campaign: Campaign, scenes: Sequence[Scene], path: Path,
    code: str,
) -> dict[str, Any]:  # fmt: skip
    """Build one tile's cube and write it as one store; a finished one is left as it is.

    Args:
        tile: The tile.
        grid: Grid of the campaign.
        campaign: The campaign.
        scenes: All used scenes of all sources.
        path: Store to write (``.zip``).
        code: Digest of the code, so that a changed program rebuilds the tile.

    Returns:
        Summary: ``path``, ``digest`` of everything the tile depends on, ``clear_pct``.
    """
    digest = digest_json(
        [
            code, tile.name, tile.geobox.affine[:6], list(tile.geobox.shape), str(tile.geobox.crs),
            [s.model_dump(mode="json") for s in campaign.sources],
            campaign.cube.model_dump(mode="json"),
            [(s.item["assets"], str(s.item["datetime"]), [sha256(m) for m, _ in s.masks],
              None if s.shift is None else (s.shift.dy_px, s.shift.dx_px)) for s in scenes],
        ]
    )  # fmt: skip
    if path.exists():
        done = read_store(path)
        if done.attrs.get("digest") == digest:
            log.info("tile %s: finished before, kept", tile.name)
            return {"path": path.as_posix(), "digest": digest, "clear_pct": done.attrs["clear_pct"]}
    dataset = _assemble(tile, grid, campaign, scenes)
    dataset.attrs["digest"] = digest
    write_store(path, dataset)
    return {"path": path.as_posix(), "digest": digest, "clear_pct": dataset.attrs["clear_pct"]}


def _assemble(
    tile: Tile, grid: CampaignGrid, campaign: Campaign, scenes: Sequence[Scene]
) -> xr.Dataset:
    periods = campaign.cube.periods
    names = [p.name for p in periods]
    by_source: dict[str, list[Scene]] = {}
    for scene in scenes:
        by_source.setdefault(str(scene.item["source"]), []).append(scene)
    data: dict[str, Any] = {}
    optical = [s for s in scenes if s.masks]
    counts = np.zeros((len(periods), *tile.geobox.shape), np.uint8)
    for p, period in enumerate(names):
        for scene in (s for s in optical if period_of(s.day, periods) == period):
            counts[p] += (mask_on(tile.geobox, scene) & INVALID) == 0
    for group, (source, bands, res) in _groups(campaign).items():
        kind = load_source(source).kind
        geobox = coarsen(tile.geobox, res // round(grid.resolution_m))
        dims = (f"band_{group}", f"y_{res}", f"x_{res}")
        if kind == "dem":
            values = _composite(by_source.get(source, []), bands, geobox, kind)
            data[group] = (dims, values)
            continue
        mine = by_source.get(source, [])
        stack = [
            _composite(
                [s for s in mine if period_of(s.day, periods) == period],
                bands, geobox, kind,
            )
            for period in names
        ]  # fmt: skip
        data[group] = (("period", *dims), np.stack(stack))
    data["clear_count"] = (("period", "y_10", "x_10"), counts)
    reasons = _reasons(optical, tile, counts)
    reasons[~_inside(tile.geobox, grid)] |= np.uint8(Reason.NODATA)
    data["reasons"] = (("y_10", "x_10"), reasons)
    return _dataset(data, tile, names, campaign)


def _inside(geobox: GeoBox, grid: CampaignGrid) -> npt.NDArray[np.bool_]:
    from rasterio.features import geometry_mask

    inside: npt.NDArray[np.bool_] = geometry_mask(
        [grid.aoi], out_shape=geobox.shape, transform=geobox.affine, invert=True
    )
    return inside


def _dataset(
    data: dict[str, Any], tile: Tile, periods: list[str], campaign: Campaign
) -> xr.Dataset:
    coords: dict[str, Any] = {"period": periods}
    for group, (_, bands, res) in _groups(campaign).items():
        coords[f"band_{group}"] = bands
        affine = coarsen(tile.geobox, res // 10).affine
        h, w = (s * 10 // res for s in tile.geobox.shape)
        coords[f"y_{res}"] = affine.f + (np.arange(h) + 0.5) * affine.e
        coords[f"x_{res}"] = affine.c + (np.arange(w) + 0.5) * affine.a
    reasons = data["reasons"][1]
    attrs = {
        "tile": tile.name,
        "crs": str(tile.geobox.crs),
        "transform": [float(v) for v in tile.geobox.affine[:6]],
        "shape": list(tile.geobox.shape),
        "clear_pct": round(100 * float(np.mean(reasons == 0)), 3),
    }
    dataset = xr.Dataset(data, coords=coords, attrs=attrs)
    for name, array in dataset.data_vars.items():
        if str(name).startswith("s2"):
            array.encoding = {
                "dtype": "uint16", "scale_factor": _SCALE, "add_offset": _OFFSET,
                "_FillValue": _FILL,
            }  # fmt: skip
    return dataset


def cube_inputs(dataset: xr.Dataset) -> dict[str, Float]:
    """Inputs of the networks: per group (C, h, w) float32, C = periods x bands, NaN = missing."""
    inputs: dict[str, Float] = {}
    for group in _input_groups(dataset):
        values = dataset[group].to_numpy().astype(np.float32)
        inputs[group] = values.reshape(-1, *values.shape[-2:])
    return inputs


def channel_names(dataset: xr.Dataset) -> dict[str, list[str]]:
    """Names ``period/band`` (or ``band`` of a static layer) of the channels of each group."""
    names: dict[str, list[str]] = {}
    for group in _input_groups(dataset):
        bands = [str(b) for b in dataset[f"band_{group}"].to_numpy()]
        if "period" in dataset[group].dims:
            periods = [str(p) for p in dataset["period"].to_numpy()]
            names[group] = [f"{p}/{b}" for p in periods for b in bands]
        else:
            names[group] = bands
    return names


def _input_groups(dataset: xr.Dataset) -> list[str]:
    return [str(v) for v in dataset.data_vars if f"band_{v}" in dataset.coords]
