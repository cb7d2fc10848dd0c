"""The pixels of local files: what bands a file holds, where they lie, and reading them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.crs import CRS
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from terraloom.acquire.netcdf import FILE_ORDER, band_axes, coordinate_transform, wavelength_um
from terraloom.acquire.polsar import folder_size, matrix_files
from terraloom.errors import SceneError

__all__ = ["LOCAL_DRIVERS", "Plane", "plane_strips", "planes_of", "polsar_planes"]

#: Formats of local files. They hold their own pixels; VRT and the like name other files.
LOCAL_DRIVERS = ["GTiff", "JP2OpenJPEG", "ENVI", "netCDF", "HFA", "EHdr", "AAIGrid"]

_DATA_ENDINGS = ("", ".bin", ".img", ".dat", ".raw", ".bsq", ".bil", ".bip")
#: Rows read and written at once: one row of blocks of a cloud-optimised GeoTIFF.
_STRIP_ROWS = 512


@dataclass(frozen=True)
class Plane:
    """One band of pixels in a local file.

    Attributes:
        file: The file, as named in messages.
        dataset: What GDAL opens; None for a raw float32 file without header.
        index: Number of the band, from 1.
        name: Variable, description or matrix element.
        shape: (H, W), pixels.
        dtype: Numpy name of the data type.
        crs: Coordinate system, or None.
        transform: Geotransform, or None.
        nodata: Value that the file says is missing, or None.
        scale: Scale that the file says.
        offset: Offset that the file says.
        when: Time on the file's own time axis.
        wavelength_um: Centre of the band, micrometres.
        flip: The file has the southern rows first.
        file_order: Rows must be asked for as they lie in the file.
    """

    file: Path
    dataset: str | None
    index: int
    name: str
    shape: tuple[int, int]
    dtype: str
    crs: str | None = None
    transform: Affine | None = None
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    when: datetime | None = None
    wavelength_um: float | None = None
    flip: bool = False
    file_order: bool = False

    @property
    def geobox(self) -> GeoBox:
        """Pixels of the band, northern row first.

        Raises:
            SceneError: No coordinate system or no place, or a rotated raster.
        """
        where = self.file.as_posix()
        if self.crs is None or self.transform is None:
            lacks = "coordinate system" if self.crs is None else "geotransform"
            raise SceneError(
                f"the file has no {lacks}",
                where=where,
                allowed="files with their own place, or files.crs and files.transform in the spec",
                fix="give crs (like EPSG:32631) and transform (pixel width, 0, left edge, 0, "
                "-pixel height, top edge) in the spec",
            )
        t = self.transform
        if abs(t.b) > 1e-9 * abs(t.a) or abs(t.d) > 1e-9 * abs(t.e) or t.a <= 0 or not t.e:
            raise SceneError(
                f"rotated or mirrored geotransform {tuple(t)[:6]}",
                where=where,
                allowed="rows from north to south, columns from west to east",
                fix="warp the file to an upright grid first",
            )
        if self.flip and t.e > 0:
            t = Affine(t.a, 0, t.c, 0, -t.e, t.f + t.e * self.shape[0])
        return GeoBox(self.shape, t, self.crs)

    def placed(self, crs: str | None, transform: tuple[float, ...] | None) -> Plane:
        """The plane with the place of the spec where the file has none.

        Raises:
            SceneError: The spec contradicts the file, or the coordinate system is unknown.
        """
        if crs is None and transform is None:
            return self
        try:
            given = None if crs is None else CRS.from_user_input(crs)
        except CRSError as err:
            raise SceneError(f"unknown coordinate system {crs!r} ({err})", where="crs") from err
        own = None if self.crs is None else CRS.from_user_input(self.crs)
        lies = None if transform is None else Affine(*transform)
        moved = lies and self.transform and not lies.almost_equals(self.transform, 1e-9)
        if (own and given and own != given) or moved:
            raise SceneError(
                f"the spec gives {crs} and {transform}, the file has {self.crs} and "
                f"{self.transform and tuple(self.transform)[:6]}",
                where=self.file.as_posix(),
                fix="leave crs and transform out of the spec, or correct the file",
            )
        return replace(
            self,
            crs=self.crs or (given and given.to_string()),
            transform=self.transform or lies,
            flip=self.flip or (self.transform is None and lies is not None and lies.e > 0),
        )


def planes_of(file: Path) -> list[Plane]:
    """All bands of a file.

    Raises:
        SceneError: Missing, empty, unreadable, of a format that is not allowed, or truncated.
    """
    file = _data_file(file)
    where = file.as_posix()
    if not file.is_file():
        raise SceneError("there is no such file", where=where, fix="correct path in the spec")
    if file.stat().st_size == 0:
        raise SceneError("the file is empty (0 bytes)", where=where, fix="fetch it again")
    with file.open("rb") as f:
        if b"<VRTDataset" in f.read(1024):
            raise SceneError(
                "format VRT", where=where, allowed=", ".join(LOCAL_DRIVERS),
                fix="name the files that it is made of",
            )  # fmt: skip
    try:
        with _open(where) as src:
            if src.driver != "netCDF":
                return _raster_planes(file, where, src)
            names = list(src.subdatasets) or [where]
        return [p for name in names for p in _netcdf_planes(file, name)]
    except (RasterioError, CRSError) as err:
        raise SceneError(
            f"not a readable raster ({err})",
            where=where,
            allowed=", ".join(LOCAL_DRIVERS),
            fix="the file is damaged, of another format, or its header is missing",
        ) from err
    except SceneError as err:
        raise SceneError(err.found, where=where, allowed=err.allowed, fix=err.fix) from err


def _data_file(file: Path) -> Path:
    """ENVI is named by its data file or by its header; GDAL wants the data file."""
    if file.suffix.lower() != ".hdr":
        return file
    stem = file.with_suffix("")
    found = (stem.with_name(stem.name + end) for end in _DATA_ENDINGS)
    return next((f for f in found if f.is_file()), file)


def _open(name: str, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.Env(**settings):
            # `rasterio.open` takes one driver only; other drivers must not even look at the file.
            return DatasetReader(name, driver=LOCAL_DRIVERS)


def _raster_planes(file: Path, name: str, src: Any) -> list[Plane]:
    if src.driver == "ENVI":
        _whole_envi(file, src)
    crs, transform = _place(src)
    planes = []
    for band in range(1, src.count + 1):
        planes.append(
            Plane(
                file, name, band, src.descriptions[band - 1] or "", src.shape,
                _dtype(src.dtypes[band - 1], file), crs, transform, src.nodatavals[band - 1],
                src.scales[band - 1], src.offsets[band - 1],
                wavelength_um=_envi_wavelength(src, band),
                flip=transform is not None and transform.e > 0,
            )
        )  # fmt: skip
    return planes


def _netcdf_planes(file: Path, name: str) -> list[Plane]:
    with _open(name) as src:
        if src.count == 0:
            return []
        crs, transform = _place(src)
        flip, file_order = False, transform is None
        if transform is None:
            found = coordinate_transform(file.as_posix(), *src.shape)
            transform, flip = found if found else (None, False)
        return [
            Plane(
                file, name, band, src.tags(band).get("NETCDF_VARNAME", ""), src.shape,
                _dtype(src.dtypes[band - 1], file), crs, transform, src.nodatavals[band - 1],
                src.scales[band - 1], src.offsets[band - 1], when, um, flip, file_order,
            )
            for band, (when, um) in enumerate(band_axes(src), 1)
        ]  # fmt: skip


def _place(src: Any) -> tuple[str | None, Affine | None]:
    crs = src.crs.to_string() if src.crs else None
    t = src.transform
    if (t.a, abs(t.e), t.c, t.f, t.b, t.d) != (1, 1, 0, 0, 0, 0):
        return crs, t
    # PolSARpro writes "UTM, corner 0 0, 1 m" into headers of images whose place it does not know.
    return (None if src.driver == "ENVI" else crs), None


def _dtype(name: str, file: Path) -> str:
    if name.startswith("complex"):
        raise SceneError(
            f"complex numbers ({name})",
            where=file.as_posix(),
            allowed="real numbers",
            fix="export a covariance or coherency matrix (format polsarpro), or amplitude",
        )
    return name


def _envi_wavelength(src: Any, band: int) -> float | None:
    tags = src.tags(band)
    try:
        value = float(tags["wavelength"])
    except (KeyError, ValueError):
        return None
    units = tags.get("wavelength_units") or src.tags(ns="ENVI").get("wavelength_units", "")
    return wavelength_um(value, units)


def _whole_envi(file: Path, src: Any) -> None:
    """GDAL reads a raw file that ends early as zeros; its size tells."""
    offset = int(src.tags(ns="ENVI").get("header_offset", 0))
    pixels = src.count * src.height * src.width
    wanted = offset + pixels * np.dtype(src.dtypes[0]).itemsize
    if src.compression is None and file.stat().st_size < wanted:
        raise SceneError(
            f"the file is truncated: {file.stat().st_size} bytes, {wanted} by its header",
            fix="fetch it again",
        )


def polsar_planes(folder: Path) -> list[Plane]:
    """Elements of the matrix in a PolSARpro folder.

    PolSARpro writes the place into the header of one element only; it holds for all.

    Raises:
        SceneError: See :func:`terraloom.acquire.polsar.matrix_files`; files of different size.
    """
    if not folder.is_dir():
        raise SceneError("there is no such folder", where=folder.as_posix())
    planes = []
    for band, file in matrix_files(folder).items():
        headers = (file.with_name(file.name + ".hdr"), file.with_suffix(".hdr"))
        if any(h.is_file() for h in headers):
            plane = planes_of(file)[0]
        else:
            shape = folder_size(folder)
            if file.stat().st_size != shape[0] * shape[1] * 4:
                raise SceneError(
                    f"{file.stat().st_size} bytes, {shape[0]} x {shape[1]} x 4 by config.txt",
                    where=file.as_posix(), fix="the file is truncated; export it again",
                )  # fmt: skip
            plane = Plane(file, None, 1, band, shape, "float32")
        planes.append(replace(plane, name=band))
    sizes = {p.shape for p in planes}
    if len(sizes) > 1:
        raise SceneError(
            f"elements of {len(sizes)} sizes: {', '.join(map(str, sorted(sizes)))}",
            where=folder.as_posix(), allowed="one size", fix="export the folder again",
        )  # fmt: skip
    known = next((p for p in planes if p.crs and p.transform), None)
    if known is None:
        return planes
    return [
        p if p.crs else replace(p, crs=known.crs, transform=known.transform, flip=known.flip)
        for p in planes
    ]


def plane_strips(plane: Plane) -> Iterator[tuple[slice, slice, npt.NDArray[Any]]]:
    """Pixels of a plane in strips of rows from north to south: rows, columns, (h, W) values.

    Raises:
        SceneError: The file cannot be read to the end.
    """
    height, width = plane.shape
    try:
        with _reader(plane) as read:
            for r in range(0, height, _STRIP_ROWS):
                end = min(r + _STRIP_ROWS, height)
                data = read(*((height - end, height - r) if plane.flip else (r, end)))
                yield slice(r, end), slice(0, width), data[::-1] if plane.flip else data
    except RasterioError as err:
        raise SceneError(
            f"the file cannot be read to the end ({err})",
            where=plane.file.as_posix(),
            fix="it is truncated or damaged; fetch it again",
        ) from err


@contextmanager
def _reader(plane: Plane) -> Iterator[Callable[[int, int], npt.NDArray[Any]]]:
    """Function that reads rows of a plane, in the order of the file."""
    width = plane.shape[1]
    if plane.dataset is None:
        raw = np.memmap(plane.file, dtype="<f4", mode="r", shape=plane.shape)
        yield lambda first, last: np.array(raw[first:last], dtype=np.float32)
        return
    with _open(plane.dataset, **(FILE_ORDER if plane.file_order else {})) as src:
        yield lambda first, last: src.read(plane.index, window=((first, last), (0, width)))
