"""Pixels of an open raster on a geobox, in one warp or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.enums import MaskFlags, Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject
from rasterio.windows import Window

from terraloom.errors import SceneError

__all__ = ["read_on_lattice", "read_pixels", "readable", "warp"]

#: Pixels this close to a raster's own, in its pixels, are its own.
_ON_LATTICE_PX = 1e-6


def readable(src: Any, band: int) -> None:
    """Refuse a raster that a warp would read wrongly, or in a way that nobody meant.

    Raises:
        SceneError: It has no such band or no CRS, or is rotated.
    """
    found = allowed = ""
    if src.crs is None:
        found, allowed = "the raster has no coordinate system", "a raster with one"
    elif src.transform.b or src.transform.d:
        found = f"the raster is rotated (geotransform {tuple(src.transform)[:6]})"
        allowed = "rows and columns along the axes of the coordinate system"
    elif band > src.count:
        found, allowed = f"the raster has {src.count} bands, not {band}", f"1 to {src.count}"
    if found:
        raise SceneError(
            found, where=str(src.name), allowed=allowed,
            fix="give it one with gdal_edit or gdalwarp, or leave the item out",
        )  # fmt: skip


def read_pixels(
    src: Any, band: int, geobox: GeoBox, nodata: float | None, resampling: str
) -> npt.NDArray[Any]:
    """One band on a geobox: as stored where that lies on the raster's lattice, else warped once.

    Args:
        src: Open raster.
        band: Band number, from 1.
        geobox: Target pixels, (H, W).
        nodata: Value that means missing, or None.
        resampling: Method of the warp, by rasterio's names.

    Returns:
        (H, W) array of the raster's dtype; pixels outside hold ``nodata``, or 0.
    """
    stored = read_on_lattice(src, band, geobox, nodata)
    return warp(src, band, geobox, nodata, resampling) if stored is None else stored


def read_on_lattice(
    src: Any, band: int, geobox: GeoBox, nodata: float | None
) -> npt.NDArray[Any] | None:
    """The pixels as they are where the geobox lies on the raster's own; None elsewhere.

    The same values as the warp, without setting one up. Rasters with a mask or transparency of
    their own, and values of nodata that their type cannot hold, are left to the warp.
    """
    own, asked, (h, w) = src.transform, geobox.affine, geobox.shape
    flags = src.mask_flag_enums[band - 1]
    fill = 0 if nodata is None else nodata
    dtype = np.dtype(src.dtypes[band - 1])
    col, row = (asked.c - own.c) / own.a, (asked.f - own.f) / own.e
    left, top = round(col), round(row)
    off = (col - left, row - top, (asked.a / own.a - 1) * w, (asked.e / own.e - 1) * h)
    if (
        max(map(abs, off)) > _ON_LATTICE_PX
        or asked.b or asked.d
        or src.crs.to_string() != str(geobox.crs)
        or MaskFlags.per_dataset in flags or MaskFlags.alpha in flags
        or not (dtype.kind == "f" or _holds(dtype, fill))
    ):  # fmt: skip
        return None
    out = np.full((h, w), fill, dtype)
    x0, x1 = max(left, 0), min(left + w, src.width)
    y0, y1 = max(top, 0), min(top + h, src.height)
    if x0 < x1 and y0 < y1:
        part = src.read(band, window=Window(x0, y0, x1 - x0, y1 - y0))
        out[y0 - top : y1 - top, x0 - left : x1 - left] = part
    return out


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    """Whether a whole-number type has a value."""
    if dtype.kind not in "iu" or not np.isfinite(value):
        return False
    limits = np.iinfo(dtype)
    return bool(limits.min <= value <= limits.max and value == int(value))


def warp(
    src: Any, band: int, geobox: GeoBox, nodata: float | None, resampling: str
) -> npt.NDArray[Any]:
    """The one warp, of the band asked for alone.

    GDAL takes the fourth of four uint8 bands for transparency where a file does not say otherwise;
    a ``WarpedVRT`` of all bands would then drop pixels where that band is zero.
    """
    options = {
        "resampling": Resampling[resampling],
        "src_nodata": nodata,
        "tolerance": 0.001,  # pixels; the default .125 would show at tile borders
        **_scale(src, geobox),
    }
    crs, affine = str(geobox.crs), geobox.affine
    if src.count > 1:
        data = np.zeros(geobox.shape, src.dtypes[band - 1])
        reproject(
            rasterio.band(src, band), data, dst_crs=crs, dst_transform=affine,
            dst_nodata=nodata, **options,
        )  # fmt: skip
        return data
    h, w = geobox.shape
    with WarpedVRT(
        src, crs=crs, transform=affine, width=w, height=h, nodata=nodata, **options
    ) as vrt:
        only: npt.NDArray[Any] = vrt.read(band)
        return only


def _scale(src: Any, geobox: GeoBox) -> dict[str, float]:
    """Target pixels per source pixel, said to GDAL instead of left to its guess.

    The guess divides the sizes of the windows at hand, margins included; a shift of a tenth of a
    pixel was then wrong by almost half of itself, and differently in each window.
    """
    if not (src.crs and src.crs.is_projected and geobox.crs and geobox.crs.projected):
        return {}
    return {
        "XSCALE": abs(src.res[0] / geobox.resolution.x),
        "YSCALE": abs(src.res[1] / geobox.resolution.y),
    }
