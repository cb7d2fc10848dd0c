"""All pixel, world and tile arithmetic. The one geometry value is odc-geo's ``GeoBox``.

Tile edges lie on multiples of 60 m from the origin of the coordinate system, so that the native
lattices of 10, 20 and 60 m bands are met exactly and their pixels are never resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import CRS, Geod
from shapely.geometry.base import BaseGeometry

from terraloom.errors import AoiError, GridError

__all__ = [
    "LATTICE_M",
    "CampaignGrid",
    "Tile",
    "block_windows",
    "coarsen",
    "geobox_from_record",
    "geobox_record",
    "pad",
    "pick_crs",
    "pixel_area_m2",
    "row_areas_m2",
    "tiles_of_job",
    "window_of",
]

#: Least common multiple of the native pixel sizes of Sentinel-2 (10, 20, 60 m), metres.
LATTICE_M = 60

#: Tiles packed into one job, unless that would make more jobs of a stage than this. A job costs
#: seconds before it works, so those of a large area should be few; ended ones keep their tiles.
FEW_TILES, MANY_JOBS = 8, 50

#: An AOI wider than this many degrees of longitude spans UTM zones badly: use an equal-area CRS.
UTM_MAX_WIDTH_DEG = 6.0


@dataclass(frozen=True)
class Tile:
    """One cell of the campaign grid: the unit of work.

    Attributes:
        name: ``x<column>y<row>`` counted from the upper left corner of the grid.
        column: Tile column, from the left, starting at 0.
        row: Tile row, from the top, starting at 0.
        geobox: Pixels of the tile at the campaign resolution.
    """

    name: str
    column: int
    row: int
    geobox: GeoBox


@dataclass(frozen=True)
class CampaignGrid:
    """The campaign's pixel grid and its tiles.

    Attributes:
        geobox: All pixels of the campaign at its resolution, (H, W).
        tile_px: Tile height and width, pixels.
        aoi: Area of interest in the grid's CRS.
    """

    geobox: GeoBox
    tile_px: int
    aoi: BaseGeometry

    @classmethod
    def from_aoi(
        cls,
        aoi: BaseGeometry,
        crs: str,
        *,
        resolution_m: float = 10,
        tile_px: int = 384,
        lattice_m: int = LATTICE_M,
    ) -> CampaignGrid:
        """Snap the bounds of ``aoi`` (already in ``crs``) outwards to the lattice."""
        if aoi.is_empty or aoi.area <= 0:
            raise AoiError("the area of interest is empty", where="aoi", fix="give a polygon")
        if (tile_px * resolution_m) % lattice_m:
            raise GridError(
                f"tiles of {tile_px} px x {resolution_m} m do not end on the {lattice_m} m lattice",
                where="grid.tile_px",
                allowed=f"a multiple of {lattice_m / resolution_m:g} px",
            )
        eps = 1e-6 * lattice_m  # a bound on the lattice up to rounding stays where it is
        left, bottom, right, top = aoi.bounds
        x0 = math.floor((left + eps) / lattice_m) * lattice_m
        y0 = math.floor((bottom + eps) / lattice_m) * lattice_m
        x1 = math.ceil((right - eps) / lattice_m) * lattice_m
        y1 = math.ceil((top - eps) / lattice_m) * lattice_m
        shape = (round((y1 - y0) / resolution_m), round((x1 - x0) / resolution_m))
        affine = Affine(resolution_m, 0, x0, 0, -resolution_m, y1)
        return cls(GeoBox(shape, affine, crs), tile_px, aoi)

    @property
    def crs(self) -> str:
        """Coordinate system as authority code or WKT."""
        return str(self.geobox.crs)

    @property
    def resolution_m(self) -> float:
        """Pixel size, metres."""
        return float(self.geobox.resolution.x)

    def tile(self, column: int, row: int) -> Tile:
        """Tile at a column and row; edge tiles are cut at the grid's border."""
        h, w = self.geobox.shape
        r0, c0 = row * self.tile_px, column * self.tile_px
        if not (0 <= r0 < h and 0 <= c0 < w):
            raise GridError(f"no tile at column {column}, row {row}", where="grid")
        shape = (min(self.tile_px, h - r0), min(self.tile_px, w - c0))
        gbox = GeoBox(shape, self.geobox.affine @ Affine.translation(c0, r0), self.geobox.crs)
        return Tile(f"x{column:03d}y{row:03d}", column, row, gbox)

    def tiles(self) -> list[Tile]:
        """Tiles that touch the AOI, row by row."""
        return list(self._tiles)

    @cached_property
    def _tiles(self) -> tuple[Tile, ...]:
        h, w = self.geobox.shape
        affine, size = self.geobox.affine, self.tile_px
        x = affine.c + affine.a * np.minimum(np.arange(0, w + size, size), w)
        y = affine.f + affine.e * np.minimum(np.arange(0, h + size, size), h)
        cells = shapely.box(x[:-1], y[1:, None], x[1:], y[:-1, None])
        shapely.prepare(self.aoi)
        # Nearly all tiles of a large area lie inside it, which is quick to tell.
        touched = shapely.contains(self.aoi, cells)
        edge = ~touched & shapely.intersects(self.aoi, cells)
        touched[edge] = shapely.area(shapely.intersection(self.aoi, cells[edge])) > 0
        return tuple(self.tile(int(column), int(row)) for row, column in np.argwhere(touched))

    def batches(self, tiles_per_job: int | Literal["auto"]) -> dict[str, list[Tile]]:
        """Tiles packed into jobs, keyed ``b0000``, ``b0001`` ...

        Args:
            tiles_per_job: Most tiles of a job, see :func:`tiles_of_job`.
        """
        tiles = self.tiles()
        size = tiles_of_job(len(tiles), tiles_per_job)
        return {f"b{i // size:04d}": tiles[i : i + size] for i in range(0, len(tiles), size)}


def tiles_of_job(tiles: int, tiles_per_job: int | Literal["auto"] = "auto") -> int:
    """Most tiles of a job of a campaign with so many tiles.

    ``auto`` is :data:`FEW_TILES`, or as many more as keep the jobs of a stage at
    :data:`MANY_JOBS`: all stages together then are some hundred jobs, however large the area.
    """
    if tiles_per_job != "auto":
        return tiles_per_job
    return max(FEW_TILES, math.ceil(tiles / MANY_JOBS))


def pick_crs(aoi_deg: BaseGeometry) -> str:
    """CRS of a campaign: the UTM zone of the AOI, or LAEA where the AOI spans zones.

    Args:
        aoi_deg: AOI in longitude and latitude (EPSG:4326), degrees.
    """
    west, south, east, north = aoi_deg.bounds
    lon, lat = (west + east) / 2, (south + north) / 2
    if east - west > UTM_MAX_WIDTH_DEG or abs(lat) > 84:
        return CRS.from_proj4(
            f"+proj=laea +lat_0={lat:.1f} +lon_0={lon:.1f} +datum=WGS84 +units=m +no_defs"
        ).to_wkt()
    zone = min(int((lon + 180) // 6) + 1, 60)
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


def coarsen(geobox: GeoBox, factor: int) -> GeoBox:
    """The same ground at pixels ``factor`` times as large; the shape must divide exactly."""
    h, w = geobox.shape
    if h % factor or w % factor:
        raise GridError(
            f"{h}x{w} px do not divide by {factor}", where="grid", fix="snap to the 60 m lattice"
        )
    return GeoBox((h // factor, w // factor), geobox.affine @ Affine.scale(factor), geobox.crs)


def pad(geobox: GeoBox, margin_px: int) -> GeoBox:
    """The geobox grown by ``margin_px`` pixels on every side."""
    h, w = geobox.shape
    affine = geobox.affine @ Affine.translation(-margin_px, -margin_px)
    return GeoBox((h + 2 * margin_px, w + 2 * margin_px), affine, geobox.crs)


def window_of(inner: GeoBox, outer: GeoBox) -> tuple[slice, slice]:
    """Rows and columns of ``inner`` within ``outer``; both must share one lattice and CRS.

    Raises:
        GridError: Different CRS, resolution or sub-pixel phase. Never rounds silently.
    """
    rel = ~outer.affine @ inner.affine
    c0, r0 = rel @ (0, 0)
    same = inner.crs == outer.crs and abs(rel.a - 1) < 1e-6 and abs(rel.e - 1) < 1e-6
    if not same or abs(c0 - round(c0)) > 1e-3 or abs(r0 - round(r0)) > 1e-3:
        raise GridError(
            f"pixels at {inner.affine[2]:.3f}, {inner.affine[5]:.3f} are not on the lattice of "
            f"{outer.affine[2]:.3f}, {outer.affine[5]:.3f}",
            where="grid",
            allowed="the same CRS, pixel size and phase",
        )
    r, c = round(r0), round(c0)
    h, w = inner.shape
    return slice(r, r + h), slice(c, c + w)


def row_areas_m2(geobox: GeoBox) -> npt.NDArray[np.float64]:
    """True area of one pixel of each row on the WGS 84 ellipsoid, (H,), square metres.

    Nominal pixel area is off by the square of the projection's scale factor (up to .2 % in UTM,
    far more elsewhere). The area is exact at every 64th row, in the middle column, and linear in
    between, which is good to 1e-6 for metre-scale pixels.
    """
    h, w = geobox.shape
    knots = np.unique(np.append(np.arange(0, h, 64), h - 1))
    areas = [_one_pixel_area(geobox, int(r), w // 2) for r in knots]
    return np.interp(np.arange(h), knots, areas)


def pixel_area_m2(geobox: GeoBox) -> npt.NDArray[np.float64]:
    """Row areas as an (H, 1) column that broadcasts over an (H, W) raster, square metres."""
    return row_areas_m2(geobox)[:, None]


def _one_pixel_area(geobox: GeoBox, row: int, column: int) -> float:
    from pyproj import Transformer

    crs = CRS.from_user_input(str(geobox.crs))
    to_deg = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    # 16 columns instead of one: keeps the polygon area far from rounding error.
    span = 16
    corners = [(column, row), (column + span, row), (column + span, row + 1), (column, row + 1)]
    xy = [geobox.affine @ c for c in corners]
    lon, lat = to_deg.transform([p[0] for p in xy], [p[1] for p in xy])
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)
    return abs(float(area)) / span


def block_windows(geobox: GeoBox, rows: int = 512) -> Iterator[tuple[slice, slice]]:
    """Row strips of a raster from top to bottom, for bounded memory."""
    h, w = geobox.shape
    for r in range(0, h, rows):
        yield slice(r, min(r + rows, h)), slice(0, w)


def geobox_record(geobox: GeoBox) -> dict[str, Any]:
    """JSON form of a geobox: ``crs``, ``shape``, ``transform`` (six numbers)."""
    return {
        "crs": str(geobox.crs),
        "shape": list(geobox.shape),
        "transform": [float(v) for v in geobox.affine[:6]],
    }


def geobox_from_record(record: dict[str, Any]) -> GeoBox:
    """Inverse of :func:`geobox_record`."""
    h, w = record["shape"]
    return GeoBox((h, w), Affine(*record["transform"]), record["crs"])
