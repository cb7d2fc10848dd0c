"""Scenes of a tile as stacks of arrays: read many at once, masked, harmonised, block by block.

Every band is resampled at most once: shift, reprojection and resolution change are one warp, and
bands on the tile's lattice are not resampled at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely import Polygon
from shapely.geometry.base import BaseGeometry

from terraloom.acquire.hrefs import is_url
from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.io import geobox_of
from terraloom.preprocess.coregister import Shift
from terraloom.preprocess.field import ShiftField
from terraloom.preprocess.harmonise import adjustment
from terraloom.preprocess.placed import read_placed, read_placed_mask
from terraloom.preprocess.reasons import INVALID, Reason

__all__ = [
    "MASK_OUTSIDE", "Block", "Scene", "Stacks", "is_clear", "mask_on", "role_of", "touching",
]  # fmt: skip

Float = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

#: Value of a mask raster outside its strip; all reason bits at once never occur.
MASK_OUTSIDE = 255
#: A footprint's edges are great circles or not, and its corners are rounded: slack, degrees.
_SLACK_DEG = 0.02
#: No shift is larger (``coregister.max_shift_m`` has this limit), metres.
_MOST_SHIFT_M = 500


@dataclass(frozen=True)
class Scene:
    """One used acquisition: its record in the lock, its mask and its shift.

    Attributes:
        item: Record of the item lock.
        masks: Rasters of reasons (strips of the AOI) and this scene's band in them, in the frame
            of the scene as delivered; empty where the source needs no mask (SAR, elevation).
        shift: How far the content lies off, 10 m pixels.
        field: Smooth local shifts, which take the place of `shift`; None: there are none.
    """

    item: Mapping[str, Any]
    masks: tuple[tuple[Path, int], ...]
    shift: Shift | None
    field: ShiftField | None = None

    @property
    def day(self) -> date:
        """Day of acquisition, UTC."""
        return date.fromisoformat(str(self.item["datetime"])[:10])


def touching(scenes: Sequence[Scene], geobox: GeoBox) -> list[Scene]:
    """Scenes whose footprint touches a tile; those without a footprint count as touching."""
    to_deg = Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True)
    side = shapely.segmentize(geobox.extent.geom, geobox.resolution.x * 64)
    lon_lat = to_deg.transform(*shapely.get_coordinates(side).T)
    near = Polygon(np.column_stack(lon_lat)).buffer(_SLACK_DEG)
    return [s for s in scenes if _touches(s.item.get("footprint"), near)]


def _touches(footprint: str | None, near: BaseGeometry) -> bool:
    if not footprint:
        return True
    shape: BaseGeometry = shapely.from_wkt(footprint)
    west, _, east, _ = shape.bounds
    # Across the antimeridian longitudes cannot be compared; reading tells.
    return bool(east - west > 180 or near.bounds[2] - near.bounds[0] > 180) or bool(
        shape.intersects(near)
    )


# --- one scene ---------------------------------------------------------------------------------


def mask_on(geobox: GeoBox, scene: Scene) -> Bits:
    """Reasons of a scene on a geobox, (H, W) uint8.

    A pixel larger than those of the mask takes every reason found in its parts, since one cloudy
    part spoils the whole pixel's reflectance. Outside the mask's rasters there is no data.
    """
    if not scene.masks:
        return np.zeros(geobox.shape, np.uint8)
    fine = load_source(str(scene.item["source"])).mask_resolution_m
    factor = math.ceil(geobox.resolution.x / fine - 1e-6)
    if factor == 1:
        return _joined(scene, geobox)
    h, w = geobox.shape
    fine_box = GeoBox(
        (h * factor, w * factor), geobox.affine @ geobox.affine.scale(1 / factor), geobox.crs
    )
    parts = _joined(scene, fine_box).reshape(h, factor, w, factor)
    bits: Bits = np.bitwise_or.reduce(np.bitwise_or.reduce(parts, axis=3), axis=1)
    return bits


def _joined(scene: Scene, geobox: GeoBox) -> Bits:
    """Strips of a mask joined on a geobox; outside all strips there is no data."""
    out = np.full(geobox.shape, np.uint8(Reason.NODATA))
    for path, band in scene.masks:
        if not _overlap(geobox, str(path), path.stat().st_mtime_ns):
            continue
        part = read_placed_mask(
            path, geobox, scene.shift, scene.field, band=band, outside=MASK_OUTSIDE
        )
        seen = part != MASK_OUTSIDE
        out[seen] = part[seen]
    return out


@lru_cache(maxsize=1024)
def _strip_box(path: str, stamp: int) -> GeoBox:
    """Pixels of a mask; ``stamp`` makes a rewritten file another one."""
    del stamp
    return geobox_of(path)


def _overlap(geobox: GeoBox, path: str, stamp: int) -> bool:
    strip = _strip_box(path, stamp)
    if strip.crs != geobox.crs:
        return True
    a, b = strip.boundingbox, geobox.boundingbox
    # A shifted scene is read from a window beside the geobox.
    m = _MOST_SHIFT_M
    across = a.left < b.right + m and b.left < a.right + m
    return bool(across and a.bottom < b.top + m and b.bottom < a.top + m)


@lru_cache(maxsize=64)
def _roles(source: str) -> dict[str, str]:
    return {band: role for role, band in load_source(source).roles().items()}


def role_of(source: str, band: str) -> str | None:
    """Sentinel-2 name of the spectral part that a band plays; None if it plays none."""
    return _roles(source).get(band)


# --- stacks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """What is read at once: some bands of some scenes on some rows of a tile.

    Attributes:
        rows: Rows of the group's pixels.
        bands: Positions of the bands in their group.
        geobox: Pixels to read, ``halo`` wider than the rows on every side.
        halo: Pixels.
    """

    rows: slice
    bands: tuple[int, ...]
    geobox: GeoBox
    halo: int = 0

    def cut(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values (..., h, w) of the geobox without the halo."""
        n = self.halo
        return values[..., n : values.shape[-2] - n, n : values.shape[-1] - n] if n else values


class Stacks:
    """Reads stacks of scenes, the next block while the caller works on this one.

    Args:
        campaign: The campaign: requests in flight, band-pass and view direction.
        scenes: All scenes that may be read.

    Use as a context; leaving it ends the threads.
    """

    def __init__(self, campaign: Campaign, scenes: Sequence[Scene]) -> None:
        remote = any(is_url(a["href"]) for s in scenes for a in s.item["assets"].values())
        # Decoding and warping run outside the interpreter's lock, so local reads use the cores.
        local = min(max(os.cpu_count() or 2, 2), 4)
        self._cube = campaign.cube
        self._pool = ThreadPoolExecutor(campaign.scenes.requests if remote else local)

    def __enter__(self) -> Stacks:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Results of a function of one argument, computed at the same time."""
        return list(self._pool.map(work, items))

    def read(
        self, scenes: Sequence[Scene], bands: Sequence[str], blocks: Sequence[Block],
        clear: Callable[[Scene, Block], Bool | None],
    ) -> Iterator[tuple[Block, Float]]:  # fmt: skip
        """Yield each block with its values, (T, B, h, w); NaN where missing or not clear.

        Args:
            scenes: T scenes of one source.
            bands: Keys of the group's bands.
            blocks: What to read, one after another.
            clear: Where a scene is clear, (h, w) without the halo; None: everywhere.
        """
        pending: tuple[Block, Float, list[Future[None]]] | None = None
        for block in blocks:
            following = self._start(scenes, bands, block, clear)
            if pending is not None:
                yield self._finish(pending)
            pending = following
        if pending is not None:
            yield self._finish(pending)

    def _start(
        self, scenes: Sequence[Scene], bands: Sequence[str], block: Block,
        clear: Callable[[Scene, Block], Bool | None],
    ) -> tuple[Block, Float, list[Future[None]]]:  # fmt: skip
        out = np.empty((len(scenes), len(block.bands), *block.geobox.shape), np.float32)
        tasks = [
            self._pool.submit(self._one, scene, bands[band], block, clear, out[t, b])
            for b, band in enumerate(block.bands)
            for t, scene in enumerate(scenes)
        ]
        return block, out, tasks

    def _one(
        self, scene: Scene, band: str, block: Block,
        clear: Callable[[Scene, Block], Bool | None], out: Float,
    ) -> None:  # fmt: skip
        values = read_placed(scene.item, band, block.geobox, scene.shift, scene.field)
        source = str(scene.item["source"])
        if load_source(source).kind == "optical":
            gain, offset = adjustment(
                scene.item, role_of(source, band),
                bandpass_to=self._cube.bandpass, brdf=self._cube.brdf,
            )  # fmt: skip
            if (gain, offset) != (1.0, 0.0):
                values = values * np.float32(gain) + np.float32(offset)
        out[...] = values
        seen = clear(scene, block)
        if seen is not None:
            inner = block.cut(out)
            inner[~seen] = np.nan

    def _finish(
        self, pending: tuple[Block, Float, list[Future[None]]]
    ) -> tuple[Block, Float]:  # fmt: skip
        block, values, tasks = pending
        for task in tasks:
            task.result()
        return block, values


def is_clear(bits: Bits) -> Bool:
    """True where no reason forbids the use of a pixel."""
    clear: Bool = (bits & np.uint8(INVALID)) == 0
    return clear
