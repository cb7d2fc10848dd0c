"""Reading and checking the assets of locked items."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.windows import Window

from terraloom.acquire.fetch import Address, Identity, digest_of, is_remote
from terraloom.acquire.rasters import open_raster, plain_tag, remote_identity
from terraloom.acquire.sources import load_source
from terraloom.errors import SceneError
from terraloom.io import geobox_of, read_window
from terraloom.warp import readable

__all__ = [
    "DIGEST_BYTES", "asset_geobox", "named", "open_asset", "read_band", "verify_asset",
    "verify_item",
]  # fmt: skip

#: Remote files up to this size are read whole where a checksum is recorded.
DIGEST_BYTES = 64 << 20

#: Coarser than this many native pixels, continuous bands are averaged instead of interpolated.
_AVERAGE_FROM = 1.5
#: Which digest a checksum is, by its length in hexadecimal digits.
_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}


def read_band(
    item: dict[str, Any], band: str, geobox: GeoBox, *, resampling: str | None = None
) -> npt.NDArray[np.float32]:
    """Read one band of a locked item onto a geobox, in physical units.

    Reprojection, change of resolution and co-registration shift are this one warp: to correct a
    shift, pass a geobox moved by it.

    Args:
        item: Item of the lock.
        band: Key of a band or of a layer (SCL, QA_PIXEL, ...).
        geobox: Target pixels, (H, W).
        resampling: Method by rasterio's names; default: the source's own, ``average`` onto much
            coarser pixels, and always ``nearest`` for layers unless ``mode`` is asked for.

    Returns:
        (H, W) float32: reflectance (0-1), backscatter (dB), metres; NaN where the pixel is missing
        or outside the raster, and everywhere for a band that the source has but this item came
        without (the lock says so under ``why``). Layers: codes, where missing that for no data.

    Raises:
        SceneError: The source has no such band, or the asset is missing or damaged.
    """
    if band not in item["assets"] and band in load_source(item["source"]).bands:
        return np.full(geobox.shape, np.nan, np.float32)
    asset = _asset(item, band)
    method = _resampling(item, band, asset, geobox, resampling)
    with open_asset(item, band) as src:
        number, nodata = asset.get("band", 1), asset["nodata"]
        if nodata is None and number <= src.count:
            nodata = src.nodatavals[number - 1]
        stored = read_window(src, geobox, resampling=method, band=number, src_nodata=nodata)
    missing = ~np.isfinite(stored)
    if nodata is not None and np.isfinite(nodata):
        missing |= stored == np.asarray(nodata).astype(stored.dtype)
    values = stored.astype(np.float32) * np.float32(asset["scale"]) + np.float32(asset["offset"])
    if asset.get("unit") == "power":
        # Warped as power, which is what adds up; decibels only afterwards.
        missing |= ~(values > 0)
        values = 10 * np.log10(np.where(missing, 1, values), dtype=np.float32)
    # Classes have a code of their own for no data; everything else is NaN.
    layer = load_source(item["source"]).layers.get(band)
    values[missing] = np.nan if layer is None else layer.nodata
    return values


@contextmanager
def open_asset(item: dict[str, Any], band: str) -> Iterator[Any]:
    """Open the raster of one band of a locked item, as a ``rasterio`` dataset.

    Raises:
        SceneError: Naming item, asset and fault; also when the block is left, if what was read in
            it did not come right.
    """
    asset = _asset(item, band)
    try:
        with open_raster(
            asset["href"], sign=asset.get("sign"), size=asset["size"], etag=asset.get("etag")
        ) as src:
            yield src
    except SceneError as err:
        raise named(err, item, band) from err


def asset_geobox(item: dict[str, Any], band: str) -> GeoBox:
    """Native pixels of one band of a locked item.

    Raises:
        SceneError: Naming item, asset and fault.
    """
    with open_asset(item, band) as src:
        return geobox_of(src)


def named(err: SceneError, item: dict[str, Any], band: str) -> SceneError:
    """The same error, naming item and asset."""
    where = f"item {item['id']}, asset {band} ({_asset(item, band)['href']})"
    if err.where.startswith(f"item {item['id']},"):
        return err
    return SceneError(
        err.found,
        where=where,
        allowed=err.allowed,
        fix=err.fix or "fetch the file again, or make a new item lock",
    )


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


def _resampling(
    item: dict[str, Any], band: str, asset: dict[str, Any], geobox: GeoBox, asked: str | None
) -> str:
    if band in load_source(item["source"]).layers:
        return asked if asked in ("nearest", "mode") else "nearest"
    if asked is not None:
        return asked
    coarse = float(abs(geobox.resolution.x)) > _AVERAGE_FROM * asset["resolution_m"]
    return "average" if coarse else load_source(item["source"]).resampling


def verify_item(item: dict[str, Any], *, max_bytes: float = math.inf) -> None:
    """Check every asset of a locked item, see :func:`verify_asset`."""
    for band in item["assets"]:
        verify_asset(item, band, max_bytes=max_bytes)


def verify_asset(item: dict[str, Any], band: str, *, max_bytes: float = math.inf) -> None:
    """Check one asset of a locked item against its record, to the last block of pixels.

    Checksums of remote files are checked up to a size of ``DIGEST_BYTES``.

    Args:
        item: Item of the lock.
        band: Key of a band or of a layer.
        max_bytes: Larger files are refused before they are read.

    Raises:
        SceneError: Naming item and asset: missing, empty, too large, other size, checksum or ETag
            than recorded, not a raster of an allowed format, without CRS, rotated, other CRS,
            shape, resolution or nodata than recorded, or truncated.
    """
    asset = _asset(item, band)
    try:
        size = _verify_file(asset, max_bytes)
        with open_asset(item, band) as src:
            readable(src, asset.get("band", 1))
            for problem in _differences(item, asset, src):
                raise SceneError(problem, fix="make a new item lock, or report the catalogue")
            _read_last_block(src, asset.get("band", 1), size)
    except SceneError as err:
        raise named(err, item, band) from err


def _verify_file(asset: dict[str, Any], max_bytes: float) -> int:
    """Size of the file, after checking it as a file."""
    href, remote, tag = asset["href"], is_remote(asset["href"]), None
    if remote:
        now = remote_identity(href, sign=asset.get("sign"))
        size, tag = int(now.size or 0), now.tag
    elif Path(href).is_file():
        size = Path(href).stat().st_size
    else:
        raise SceneError("the file is missing", fix="fetch it, or make a new item lock")
    if size == 0:
        raise SceneError("the file has zero bytes", fix="fetch the file again")
    if size > max_bytes:
        raise SceneError(
            f"the file has {size / 1e9:.3g} GB",
            allowed=f"scenes.max_asset_gb {max_bytes / 1e9:g}",
            fix="raise scenes.max_asset_gb if the file is meant to be so large",
        )
    if asset["size"] is not None and size != asset["size"]:
        raise SceneError(f"{size} bytes, {asset['size']} recorded", fix="fetch the file again")
    recorded = plain_tag(asset.get("etag"))
    if recorded is not None and tag is not None and tag != recorded:
        raise SceneError(
            f"the file changed since the lock (ETag {tag}, {recorded} recorded)",
            fix="make a new item lock",
        )
    if asset["checksum"] is None or (remote and size > DIGEST_BYTES):
        return size
    algorithm = _ALGORITHMS[len(asset["checksum"])]
    address = Address(href, asset.get("sign"))
    if remote:
        found = digest_of(address, algorithm, Identity(size, tag))
    else:
        with Path(href).open("rb") as f:
            found = hashlib.file_digest(f, algorithm).hexdigest()
    if found != asset["checksum"]:
        raise SceneError("the checksum differs from the record", fix="fetch the file again")
    return size


def _read_last_block(src: Any, band: int, size: int) -> None:
    """Read the last block of a band, and see that no block of any level ends beyond the file."""
    try:
        if src.driver in ("GTiff", "COG"):
            _blocks_in_file(src, band, size)
        h, w = src.block_shapes[band - 1]
        last = Window((src.width - 1) // w * w, (src.height - 1) // h * h, w, h)
        src.read(band, window=last.intersection(Window(0, 0, src.width, src.height)))
    except RasterioError as err:
        raise SceneError(
            f"the raster cannot be opened or read to the end ({err})",
            fix="the file is truncated or damaged; fetch it again",
        ) from err


def _blocks_in_file(src: Any, band: int, size: int) -> None:
    """Where the directory of a GeoTIFF says that its blocks lie; no pixel is read."""
    h, w = src.block_shapes[band - 1]
    for level, factor in enumerate([1, *src.overviews(band)]):
        more = {} if level == 0 else {"ovr": level - 1}
        rows, cols = (math.ceil(n / factor / b) for n, b in ((src.height, h), (src.width, w)))
        for i, j in product(range(rows), range(cols)):
            offset, length = (
                src.get_tag_item(f"BLOCK_{what}_{j}_{i}", "TIFF", bidx=band, **more)
                for what in ("OFFSET", "SIZE")
            )
            # None: a block that was never written holds no data, which is allowed.
            if offset is not None and int(offset) + int(length or 0) > size:
                raise SceneError(
                    "the raster cannot be opened or read to the end (a block ends at "
                    f"{int(offset) + int(length or 0)} bytes, the file at {size})",
                    fix="the file is truncated; fetch it again",
                )


def _differences(item: dict[str, Any], asset: dict[str, Any], src: Any) -> list[str]:
    """What the raster says otherwise than its record."""
    found = []
    if item["crs"] is not None and src.crs is not None:
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
    number, recorded = asset.get("band", 1), asset["nodata"]
    nodata = src.nodatavals[number - 1] if number <= src.count else None
    if nodata is None or recorded is None or (math.isnan(nodata) and math.isnan(recorded)):
        return found
    if nodata != recorded:
        found.append(f"its nodata value is {nodata:g}, {recorded:g} recorded")
    return found
