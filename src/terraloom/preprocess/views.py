"""What the audit looks at: a few windows of every scene, coarse for values, fine for position.

Windows instead of the whole area keep reading and memory bounded, whatever the size of the area
and the number of scenes: a scene costs under a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from pyproj import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform_geom
from shapely import from_wkt
from shapely.geometry import box, mapping
from shapely.geometry.base import BaseGeometry

from terraloom.acquire.assets import open_asset
from terraloom.acquire.outlines import outline
from terraloom.acquire.sources import load_source
from terraloom.grid import CampaignGrid
from terraloom.preprocess.placed import read_placed
from terraloom.preprocess.reasons import INVALID
from terraloom.preprocess.stack import Scene, mask_on

__all__ = ["COARSE", "Header", "View", "data_bands", "headers", "look_at", "look_fine", "windows"]

#: Side of a window, pixels of the campaign grid, and most windows.
WINDOW_PX, MOST_WINDOWS = 256, 4
#: Values are compared on pixels so many times larger (40 m): clear of noise and small shifts.
COARSE = 4
#: Missing rows between windows that are laid below each other.
GAP_PX = 16
#: Candidate places for windows along each axis.
_PLACES = 9

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class View:
    """Coarse look at one scene.

    Attributes:
        item: Its record in the lock.
        bands: Band key: (N, H, W) values of N windows, physical units, NaN missing.
        clear: (N, H, W) not masked, and inside the mask's strips.
        expected: Share of the windows that the footprint of the item covers, 0-1.
    """

    item: Mapping[str, Any]
    bands: Mapping[str, Float32]
    clear: Bool
    expected: float

    @property
    def id(self) -> str:
        """Id of the item."""
        return str(self.item["id"])


@dataclass(frozen=True)
class Header:
    """Pixels of one asset as its file says; metres or degrees of ``crs``.

    Attributes:
        band: Band key.
        crs: Coordinate system, as text of rasterio.
        metres: Metres per unit of the CRS; 0 for degrees.
        pixel: Width of a pixel, units of the CRS.
        phase: (x, y) position of the upper left corner between lattice points, pixels, 0-1.
        outline: Outline of the raster in longitude and latitude; None where it cannot be told.
    """

    band: str
    crs: str
    metres: float
    pixel: float
    phase: tuple[float, float]
    outline: BaseGeometry | None


def data_bands(item: Mapping[str, Any]) -> list[str]:
    """Bands of an item without its classification layers."""
    layers = load_source(item["source"]).layers
    return [b for b in item["assets"] if b not in layers]


def windows(grid: CampaignGrid) -> list[GeoBox]:
    """At most four windows of one size that lie well inside the AOI and far apart."""
    h, w = grid.geobox.shape
    size = [max(min(n, WINDOW_PX) // COARSE * COARSE, min(n, COARSE)) for n in (h, w)]
    rows, cols = (_starts(n, s) for n, s in zip((h, w), size, strict=True))
    boxes = [grid.geobox[r : r + size[0], c : c + size[1]] for r in rows for c in cols]
    shares = np.array([_share(b, grid.aoi) for b in boxes])
    able = np.flatnonzero(shares >= min(0.5, float(shares.max())))
    centres = np.array([[b.affine.f, b.affine.c] for b in boxes])
    chosen = [int(able[np.argmax(shares[able])])]
    apart = np.hypot(*(centres - centres[chosen[0]]).T)
    reach = WINDOW_PX / 2 * grid.resolution_m
    while len(chosen) < MOST_WINDOWS and float(apart[able].max()) >= reach:
        chosen.append(int(able[np.argmax(apart[able])]))
        apart = np.minimum(apart, np.hypot(*(centres - centres[chosen[-1]]).T))
    return [boxes[i] for i in sorted(chosen)]


def _starts(length: int, size: int) -> list[int]:
    n = min(_PLACES, max(1, math.ceil(length / size)))
    return sorted({int(v) for v in np.linspace(0, length - size, n).round()})


def _share(geobox: GeoBox, aoi: BaseGeometry) -> float:
    b = geobox.boundingbox
    cell = box(b.left, b.bottom, b.right, b.top)
    return float(aoi.intersection(cell).area / cell.area)


def _coarse(geobox: GeoBox, factor: int) -> GeoBox:
    h, w = geobox.shape
    affine = geobox.affine @ geobox.affine.scale(factor)
    return GeoBox((max(h // factor, 1), max(w // factor, 1)), affine, geobox.crs)


def _clear(scene: Scene, geobox: GeoBox) -> Bool:
    return np.asarray((mask_on(geobox, scene) & np.uint8(INVALID)) == 0)


def _read(scene: Scene, band: str, geobox: GeoBox) -> Float32:
    return read_placed(scene.item, band, geobox, scene.shift, scene.field)


def look_at(scene: Scene, places: Sequence[GeoBox]) -> View:
    """Read all bands of a scene in all windows, 40 m pixels, its shift taken off.

    Raises:
        SceneError: An asset cannot be read.
    """
    coarse = [_coarse(p, COARSE) for p in places]
    bands = {b: np.stack([_read(scene, b, p) for p in coarse]) for b in data_bands(scene.item)}
    clear = np.stack([_clear(scene, p) for p in coarse])
    return View(scene.item, bands, clear, _expected(scene.item, places))


def look_fine(scene: Scene, bands: Sequence[str], places: Sequence[GeoBox]) -> tuple[Float32, Bool]:
    """Read some bands at the campaign's resolution: (B, H, W) values, (H, W) clear.

    The windows lie below each other, with a gap of missing pixels between.
    """
    parts, seen = [], []
    for place in places:
        values = np.stack([_read(scene, b, place) for b in bands])
        clear = _clear(scene, place) & np.isfinite(values).all(axis=0)
        parts.append(np.pad(values, ((0, 0), (0, GAP_PX), (0, 0)), constant_values=np.nan))
        seen.append(np.pad(clear, ((0, GAP_PX), (0, 0))))
    return np.concatenate(parts, axis=1), np.concatenate(seen, axis=0)


def _expected(item: Mapping[str, Any], places: Sequence[GeoBox]) -> float:
    """Share of the windows that the item's footprint covers; 1 when the lock has none."""
    if not item.get("footprint"):
        return 1.0
    footprint = from_wkt(str(item["footprint"]))
    shares = []
    for p in places:
        b = p.boundingbox
        cell = _lonlat(box(b.left, b.bottom, b.right, b.top), str(p.crs))
        shares.append(float(cell.intersection(footprint).area / cell.area) if cell.area else 0.0)
    return float(np.mean(shares))


def _lonlat(place: BaseGeometry, crs: str) -> BaseGeometry:
    dense = place.segmentize(max(place.length / 80, 1e-9))
    return outline(transform_geom(crs, "EPSG:4326", mapping(dense)), None)


def headers(item: Mapping[str, Any]) -> list[Header]:
    """Pixels of every band as the files say.

    Raises:
        SceneError: A file cannot be opened.
    """
    found = []
    for band in data_bands(item):
        with open_asset(dict(item), band) as src:
            found.append(_header(band, src))
    return found


def _header(band: str, src: Any) -> Header:
    t = src.transform
    crs = CRS.from_user_input(src.crs.to_wkt()) if src.crs else None
    metres = 0.0
    where = None
    if crs is not None:
        if crs.is_projected:
            metres = float(crs.axis_info[0].unit_conversion_factor)
        where = _outline(src)
    phase = ((t.c / abs(t.a)) % 1.0, (t.f / abs(t.e)) % 1.0) if t.a and t.e else (0.0, 0.0)
    return Header(band, str(src.crs), metres, abs(t.a), phase, where)


def _outline(src: Any) -> BaseGeometry | None:
    """Outline in degrees; None where the tag makes no place of it."""
    try:
        found = _lonlat(box(*src.bounds), src.crs.to_wkt())
    except (RasterioError, ValueError):
        return None
    return found if np.isfinite(found.bounds).all() else None
