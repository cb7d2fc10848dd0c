"""Reading and checking the assets of locked items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError

from terraloom.acquire.catalogue import is_url
from terraloom.acquire.sources import load_source
from terraloom.errors import SceneError
from terraloom.io import DRIVERS, GDAL_ENV, read_window, sha256

__all__ = ["read_band", "verify_item"]

#: Coarser than this many native pixels, continuous bands are averaged instead of interpolated.
_AVERAGE_FROM = 1.5


def read_band(
    item: dict[str, Any], band: str, geobox: GeoBox, *, resampling: str | None = None
) -> npt.NDArray[np.float32]:
    """Read one band of a locked item onto a geobox, in physical units.

    Reprojection, change of resolution and co-registration shift are this one warp: to correct a
    shift, pass a geobox moved by it.

    Args:
        item: Item of the lock.
        band: Band key, or ``SCL``.
        geobox: Target pixels, (H, W).
        resampling: Method by rasterio's names; default: the source's own, ``average`` onto much
            coarser pixels, and always ``nearest`` for ``SCL`` unless ``mode`` is asked for.

    Returns:
        (H, W) float32: reflectance (0-1), backscatter (dB), metres; NaN where the pixel is missing
        or outside the raster, and everywhere for a band that the source has but this item came
        without (the lock says so under ``why``). ``SCL``: class codes, 0 where missing.

    Raises:
        SceneError: The source has no such band, or the asset is missing or damaged.
    """
    if band not in item["assets"] and band in load_source(item["source"]).bands:
        return np.full(geobox.shape, np.nan, np.float32)
    asset = _asset(item, band)
    try:
        nodata = _own_nodata(asset["href"]) if asset["nodata"] is None else asset["nodata"]
        method = _resampling(item, band, asset, geobox, resampling)
        stored = read_window(asset["href"], geobox, resampling=method, src_nodata=nodata)
    except SceneError as err:
        raise _named(err, item, band, asset) from err
    missing = ~np.isfinite(stored)
    if nodata is not None and np.isfinite(nodata):
        missing |= stored == np.asarray(nodata).astype(stored.dtype)
    values = stored.astype(np.float32) * np.float32(asset["scale"]) + np.float32(asset["offset"])
    if asset.get("unit") == "power":
        # Warped as power, which is what adds up; decibels only afterwards.
        missing |= ~(values > 0)
        values = 10 * np.log10(np.where(missing, 1, values), dtype=np.float32)
    # Classes have a code of their own for no data; everything else is NaN.
    values[missing] = 0 if band == "SCL" else np.nan
    return values


def verify_item(item: dict[str, Any]) -> None:
    """Check every asset of a locked item against its record, to the last block of pixels.

    Raises:
        SceneError: Naming item and asset: missing, wrong size or checksum, not a raster of an
            allowed format, other CRS, shape, resolution or nodata than recorded, or truncated.
    """
    for band in item["assets"]:
        asset = _asset(item, band)
        try:
            _verify_file(asset)
            _verify_raster(item, asset)
        except SceneError as err:
            raise _named(err, item, band, asset) from err


def _asset(item: dict[str, Any], band: str) -> dict[str, Any]:
    try:
        asset: dict[str, Any] = item["assets"][band]
    except KeyError as err:
        raise SceneError(
            f"the item has no band {band}",
            where=f"item {item['id']}",
            allowed=", ".join(item["assets"]) or "(no band)",
            fix="leave the band out of sources[].bands, or drop the item",
        ) from err
    return asset


def _named(err: SceneError, item: dict[str, Any], band: str, asset: dict[str, Any]) -> SceneError:
    return SceneError(
        err.found,
        where=f"item {item['id']}, asset {band} ({asset['href']})",
        allowed=err.allowed,
        fix=err.fix or "fetch the file again, or make a new item lock",
    )


def _resampling(
    item: dict[str, Any], band: str, asset: dict[str, Any], geobox: GeoBox, asked: str | None
) -> str:
    if band == "SCL":
        return asked if asked in ("nearest", "mode") else "nearest"
    if asked is not None:
        return asked
    coarse = float(abs(geobox.resolution.x)) > _AVERAGE_FROM * asset["resolution_m"]
    return "average" if coarse else load_source(item["source"]).resampling


def _own_nodata(href: str) -> float | None:
    try:
        with rasterio.Env(**GDAL_ENV), rasterio.open(href) as src:
            return None if src.nodata is None else float(src.nodata)
    except RasterioError as err:
        raise SceneError(f"the raster cannot be opened ({err})") from err


def _verify_file(asset: dict[str, Any]) -> None:
    href = asset["href"]
    if is_url(href):
        return
    path = Path(href)
    if not path.is_file():
        raise SceneError("the file is missing", fix="fetch it, or make a new item lock")
    size = path.stat().st_size
    if asset["size"] is not None and size != asset["size"]:
        raise SceneError(f"{size} bytes, {asset['size']} recorded", fix="fetch the file again")
    if asset["checksum"] is not None and sha256(path) != asset["checksum"]:
        raise SceneError("the checksum differs from the record", fix="fetch the file again")


def _verify_raster(item: dict[str, Any], asset: dict[str, Any]) -> None:
    try:
        with rasterio.Env(**GDAL_ENV), rasterio.open(asset["href"]) as src:
            if src.driver not in DRIVERS:
                raise SceneError(f"format {src.driver}", allowed=", ".join(DRIVERS))
            for problem in _differences(item, asset, src):
                raise SceneError(problem, fix="make a new item lock, or report the catalogue")
            _, window = list(src.block_windows(1))[-1]
            src.read(1, window=window)
    except RasterioError as err:
        raise SceneError(
            f"the raster cannot be opened or read to the end ({err})",
            fix="the file is truncated or damaged; fetch it again",
        ) from err


def _differences(item: dict[str, Any], asset: dict[str, Any], src: Any) -> list[str]:
    found = []
    if item["crs"] is not None:
        try:
            same = src.crs == CRS.from_user_input(item["crs"])
        except CRSError:
            same = False
        if not same:
            found.append(f"its CRS is {src.crs}, {item['crs']} recorded")
    if asset["shape"] is not None and list(src.shape) != list(asset["shape"]):
        found.append(f"its shape is {list(src.shape)} px, {list(asset['shape'])} recorded")
    if src.crs is not None and src.crs.is_projected:
        pixel_m = abs(src.transform.a) * float(src.crs.linear_units_factor[1])
        if abs(pixel_m - asset["resolution_m"]) > 1e-6 * pixel_m:
            found.append(f"its pixels are {pixel_m:g} m, {asset['resolution_m']:g} m recorded")
    nodata, recorded = src.nodata, asset["nodata"]
    if nodata is not None and recorded is not None and nodata != recorded:
        found.append(f"its nodata value is {nodata:g}, {recorded:g} recorded")
    return found
