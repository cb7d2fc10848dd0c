"""All reading and atomic writing of files.

Writing goes to a temporary name in the target folder, is flushed to disk and renamed, so that a
killed job leaves nothing under a final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox

from terraloom.bandstats import BandStats
from terraloom.errors import SceneError, StateError
from terraloom.scratch import prefix, scratch_folder, staging

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

__all__ = [
    "allowed_format",
    "array_digest",
    "atomic",
    "cog_from_windows",
    "digest_json",
    "geobox_of",
    "open_file",
    "read_json",
    "read_store",
    "read_window",
    "replace_folder",
    "sha256",
    "write_json",
    "write_raster",
    "write_store",
    "write_text",
    "zip_folder",
    "zip_store",
]

#: GDAL settings for all reading: no directory listings, and no network, since GDAL keeps broken
#: answers (remote rasters are read by `terraloom.acquire.rasters`).
GDAL_ENV: dict[str, Any] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
}

#: Raster formats that hold their own pixels. Others (VRT, WMS, ...) can name further files.
DRIVERS = ("GTiff", "COG", "JP2OpenJPEG", "JP2ECW", "JP2KAK")
#: Formats of a map that is one raster per tile.
INDEXES = ("VRT", "GTI")

#: The largest block of pixels that is decoded, bytes; and pixels of a band: 1000 scenes in one.
MAX_BLOCK_BYTES = 1 << 30
MAX_PIXELS = 10**11

_COG_BLOCK = 512
#: A disk with less free space than this counts as full, bytes.
_FULL_BYTES = 1 << 16
#: Earliest date a zip entry can carry; a fixed one keeps archives byte-identical.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into the one ``OSError`` that says so.

    GDAL reports a failed write without its cause, so the free space is asked before the temporary
    file is removed.
    """
    try:
        yield
    except (OSError, RuntimeError) as err:
        told = isinstance(err, OSError) and err.errno == errno.ENOSPC
        if not told and shutil.disk_usage(path.parent).free > _FULL_BYTES:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path.as_posix()) from err


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed and renamed to ``path``.

    On any error the temporary file is removed and nothing stands under the final name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix(), suffix=path.suffix)
    os.close(handle)
    tmp = Path(name)
    try:
        with _full_disk_named(path):
            yield tmp
            with tmp.open("rb") as f:
                os.fsync(f.fileno())
        tmp.chmod(0o644)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
        for side in path.parent.glob(tmp.name + ".*"):
            side.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path | str, obj: Any) -> None:
    """Write sorted, indented JSON atomically; NaN is written as null."""
    write_text(path, json.dumps(_plain(obj), indent=1, sort_keys=True) + "\n")


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(k): _plain(v) for k, v in obj.items()}
    if isinstance(obj, np.ndarray):
        return _plain(obj.tolist())
    if isinstance(obj, (list, tuple)):
        return [_plain(v) for v in obj]
    if isinstance(obj, (float, np.floating)):
        return float(obj) if np.isfinite(obj) else None
    if isinstance(obj, np.integer):
        return int(obj)
    if isinstance(obj, np.bool_):
        return bool(obj)
    if isinstance(obj, Path):
        return obj.as_posix()
    return obj


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        StateError: The file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StateError(
            "the file is missing", where=str(path), fix="run the stage before"
        ) from err
    except (ValueError, RecursionError) as err:  # also other bytes than text; nested without end
        raise StateError(f"not JSON: {err}", where=str(path), fix="delete it and rerun") from err


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_json(obj: Any) -> str:
    """Short hex digest of a JSON-able value; independent of key order."""
    text = json.dumps(_plain(obj), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def array_digest(*arrays: npt.NDArray[Any]) -> str:
    """Short hex digest of arrays: dtype, shape and bytes."""
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.dtype}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()[:16]


def write_store(path: Path | str, dataset: Any) -> None:
    """Write an ``xarray.Dataset`` as one zarr store inside one zip file, atomically.

    Entries are sorted, stored and carry a fixed date: the same data give the same bytes.
    """
    path = Path(path)
    with scratch_folder(staging(path.parent), "store") as folder:
        root = folder / "store"
        # Fixed-width text has no settled place in zarr 3; variable-width text has.
        text = {k: v.astype(object) for k, v in dataset.coords.items() if v.dtype.kind == "U"}
        dataset.assign_coords(text).to_zarr(root, mode="w", zarr_format=3, consolidated=False)
        zip_folder(root, path)


def zip_folder(folder: Path, path: Path) -> None:
    """Pack the files of a folder into one zip file, atomically; stored, sorted, of a fixed date."""
    with atomic(path) as tmp, zipfile.ZipFile(tmp, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), _ZIP_DATE)
            archive.writestr(info, file.read_bytes())


def read_store(path: Path | str) -> Any:
    """Open a store of :func:`write_store` as a lazy ``xarray.Dataset``.

    Raises:
        StateError: The file is missing or is not such a store.
    """
    import xarray as xr

    path = Path(path)
    if not path.is_file():
        raise StateError("the store is missing", where=str(path), fix="run the stage before")
    try:
        return xr.open_zarr(zip_store(path), consolidated=False, chunks=None)
    except (zipfile.BadZipFile, FileNotFoundError, KeyError) as err:
        raise StateError(f"not a readable store ({err})", where=str(path), fix="delete it") from err


def zip_store(path: Path) -> Any:
    """A zip file as a store of zarr; refused if entries would grow when they are unpacked.

    Raises:
        StateError: It has such an entry; stores that Terraloom writes never do.
    """
    import zarr

    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise StateError(
                    f"a store with a packed entry ({entry.filename[:80]!r})", where=str(path),
                    allowed="stores that Terraloom wrote", fix="delete it",
                )  # fmt: skip
    return zarr.storage.ZipStore(path, mode="r")


def geobox_of(source: str | Path | DatasetReader) -> GeoBox:
    """Geobox of a raster file, or of an open raster.

    A file may be an index of other files (VRT, GTI), as those of the map are: none is read.
    """
    with _opened(source, INDEXES) as src:
        return GeoBox((src.height, src.width), src.transform, str(src.crs))


def open_file(path: str | Path, also: Sequence[str] = ()) -> DatasetReader:
    """Open a raster file for reading; to be called, and read from, under ``GDAL_ENV``.

    Args:
        path: The file.
        also: Formats that are allowed besides ``DRIVERS``.

    Raises:
        SceneError: It cannot be opened, or its format is not allowed.
    """
    import rasterio
    from rasterio.errors import RasterioIOError

    if "://" in str(path) or str(path).startswith("/vsi"):
        raise SceneError(
            "this is an address, not a file", where=str(path), allowed="paths of files",
            fix="download it, or put it behind a catalogue",
        )  # fmt: skip
    try:
        src = rasterio.open(path)
    except RasterioIOError as err:
        raise SceneError(
            f"the raster cannot be opened ({err})",
            where=str(path),
            fix="check that the file is there and complete; fetch it again",
        ) from err
    try:
        if src.driver not in also:
            allowed_format(src)
    except SceneError:
        src.close()
        raise
    return src


def allowed_format(src: DatasetReader) -> None:
    """Refuse an open raster of a format that can name further files, or of a monstrous size.

    A small file may declare pixels without end. Its blocks are decoded whole, so they are bounded
    here by what the header says, before any pixel is read.

    Raises:
        SceneError: Its format is not one of ``DRIVERS``, or it is too large.
    """
    for shape, dtype in zip(src.block_shapes, src.dtypes, strict=True):
        size = math.prod(shape) * np.dtype(dtype.removeprefix("complex_")).itemsize
        if size > MAX_BLOCK_BYTES or src.width * src.height > MAX_PIXELS:
            raise SceneError(
                f"a raster of {src.width} x {src.height} px in blocks of {size / 1e6:.3g} MB",
                where=str(src.name),
                allowed=f"{MAX_PIXELS:.0g} px, blocks of {MAX_BLOCK_BYTES / 1e6:.4g} MB",
                fix="convert it to a cloud-optimised GeoTIFF, if it is what it should be",
            )
    if src.driver not in DRIVERS:
        raise SceneError(
            f"format {src.driver}", where=str(src.name), allowed=", ".join(DRIVERS),
            fix="convert it to a cloud-optimised GeoTIFF",
        )  # fmt: skip


@contextmanager
def _opened(
    source: str | Path | DatasetReader, also: Sequence[str] = ()
) -> Iterator[DatasetReader]:
    import rasterio

    if isinstance(source, (str, Path)):
        with rasterio.Env(**GDAL_ENV), open_file(source, also) as src:
            yield src
    else:
        yield source


def read_window(
    source: str | Path | DatasetReader,
    geobox: GeoBox,
    *,
    resampling: str = "nearest",
    band: int = 1,
    src_nodata: float | None = None,
) -> npt.NDArray[Any]:
    """Read one band of a raster onto a geobox: only the window needed, in one warp.

    A raster that already lies on the geobox's lattice is read without resampling.

    Args:
        source: File path, or an open raster.
        geobox: Target pixels, (H, W).
        resampling: Method of the one warp, by rasterio's names; categorical layers use
            ``nearest`` or ``mode``.
        band: Band number, from 1.
        src_nodata: Value that means missing, when the file does not say so itself.

    Returns:
        (H, W) array of the file's dtype; pixels outside the raster hold its nodata value, or 0.

    Raises:
        SceneError: The raster cannot be opened or read to the end, has no such band or no CRS, or
            is rotated.
    """
    from rasterio.errors import RasterioError

    from terraloom.warp import read_pixels, readable

    with _opened(source) as src:
        readable(src, band)
        nodata = src.nodata if src_nodata is None else src_nodata
        try:
            return read_pixels(src, band, geobox, nodata, resampling)
        except RasterioError as err:
            raise SceneError(
                f"the raster cannot be read to the end ({err})",
                where=str(src.name),
                fix="the file is truncated or damaged; fetch it again",
            ) from err


def _dress(
    dst: Any,
    band_names: Sequence[str] | None,
    colormap: Mapping[int, tuple[int, int, int, int]] | None,
    tags: Mapping[str, str] | None,
    scales: Sequence[float] | None,
    units: str | None,
) -> None:
    for i, name in enumerate(band_names or (), 1):
        dst.set_band_description(i, name)
    if colormap:
        dst.write_colormap(1, dict(colormap))
    if scales:
        dst.scales = tuple(scales)
    if units:
        dst.units = (units,) * dst.count
    if tags:
        dst.update_tags(**dict(tags))


def cog_from_windows(
    path: Path | str,
    geobox: GeoBox,
    windows: Iterator[tuple[slice, slice, npt.NDArray[Any]]],
    *,
    count: int,
    dtype: str,
    nodata: float | None = None,
    band_names: Sequence[str] | None = None,
    colormap: Mapping[int, tuple[int, int, int, int]] | None = None,
    category_names: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    scales: Sequence[float] | None = None,
    units: str | None = None,
    overviews: str = "nearest",
) -> list[BandStats]:
    """Write a cloud-optimised GeoTIFF window by window: memory is bounded by the window.

    Each band carries the exact statistics of its stored values, as GDAL's ``STATISTICS_*``.

    Args:
        path: Final name; written atomically.
        geobox: All pixels of the raster, (H, W).
        windows: Rows, columns and data (B, h, w) of each window; windows must not overlap.
        count: Number of bands B.
        dtype: Numpy dtype name.
        nodata: Value that means missing.
        band_names: Description of each band.
        colormap: Code to (red, green, blue, alpha), 0-255, of a one-band raster.
        category_names: Name of each code from 0 on, shown as legend by GIS programs.
        tags: Further metadata.
        scales: Value = stored * scale, per band.
        units: Unit of the scaled value.
        overviews: Resampling of the overviews.

    Returns:
        Statistics of each band.
    """
    import rasterio
    from rasterio.shutil import copy as raster_copy
    from rasterio.windows import Window

    path = Path(path)
    h, w = geobox.shape
    stats = [BandStats(nodata) for _ in range(count)]
    with scratch_folder(staging(path.parent), "cog") as folder:
        plain = folder / "plain.tif"
        profile = {
            "driver": "GTiff", "width": w, "height": h, "count": count, "dtype": dtype,
            "crs": str(geobox.crs), "transform": geobox.affine, "nodata": nodata, "tiled": True,
            "blockxsize": _COG_BLOCK, "blockysize": _COG_BLOCK, "compress": "zstd",
            "zstd_level": 1, "bigtiff": "if_safer", "interleave": "band",
            # GDAL takes the fourth of four uint8 bands for transparency, unless told otherwise.
            "photometric": "rgb" if count == 3 and dtype == "uint8" else "minisblack",
            "alpha": "no",
        }  # fmt: skip
        with _full_disk_named(plain), rasterio.open(plain, "w", **profile) as dst:
            _dress(dst, band_names, colormap, tags, scales, units)
            for rows, cols, data in windows:
                window = Window.from_slices(rows, cols)
                dst.write(data, window=window)
                for band, found in zip(data, stats, strict=True):
                    found.add(band)
            for i, found in enumerate(stats, 1):
                dst.update_tags(i, **found.tags())
        if category_names:
            # GDAL keeps category names of GeoTIFF in a sidecar; COG creation embeds what it can,
            # so the names also travel as a tag and as the sidecar of the final file.
            _write_categories(path, category_names)
        with atomic(path) as tmp:
            raster_copy(
                plain, tmp, driver="COG", compress="DEFLATE", blocksize=str(_COG_BLOCK),
                predictor="YES", overview_resampling=overviews, bigtiff="IF_SAFER",
                num_threads="1",
            )  # fmt: skip
    return stats


def _write_categories(path: Path, names: Sequence[str]) -> None:
    from xml.sax.saxutils import escape

    rows = "\n".join(f"      <Category>{escape(n)}</Category>" for n in names)
    write_text(
        path.with_name(path.name + ".aux.xml"),
        f'<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n{rows}\n'
        "    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n",
    )


def write_raster(path: Path | str, data: npt.NDArray[Any], geobox: GeoBox, **options: Any) -> None:
    """Write an in-memory raster as a cloud-optimised GeoTIFF, atomically.

    Args:
        path: Final name.
        data: (B, H, W) or (H, W).
        geobox: Pixels of the raster.
        **options: As of :func:`cog_from_windows` (nodata, band_names, colormap, ...).
    """
    cube = data[None] if data.ndim == 2 else data
    h, w = geobox.shape
    if cube.shape[1:] != (h, w):
        raise StateError(f"data of {cube.shape[1:]} px for a grid of {(h, w)}", where=str(path))
    window = iter([(slice(0, h), slice(0, w), cube)])
    cog_from_windows(path, geobox, window, count=cube.shape[0], dtype=str(cube.dtype), **options)


def replace_folder(tmp: Path, final: Path) -> None:
    """Move a finished folder to its final name, replacing an older one."""
    if final.exists():
        with scratch_folder(final.parent, "old") as old:
            final.replace(old / final.name)
            tmp.replace(final)
    else:
        tmp.replace(final)
