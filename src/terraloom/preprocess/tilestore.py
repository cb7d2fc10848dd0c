"""The store of one tile: written piece by piece, one zarr store in one zip file.

Arrays are written by blocks, so the whole tile is never in memory. The same data give the same
bytes. xarray opens a store in one line and finds the coordinate system of every variable::

    ds = xr.open_zarr(zarr.storage.ZipStore(path, mode="r"), consolidated=False)
    ds["s2_10"].rio.crs
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from odc.geo.geobox import GeoBox
from zarr.codecs import ZstdCodec

from terraloom.errors import StateError
from terraloom.io import zip_folder, zip_store
from terraloom.log import get_logger
from terraloom.scratch import scratch_folder, staging

__all__ = ["CHUNK_PX", "TileStore", "decode", "encode", "open_arrays"]

Float = npt.NDArray[np.float32]

#: Rows and columns of a chunk.
CHUNK_PX = 512
#: Reflectance is stored as uint16 with this step; -0.1 .. 6.45 fits, 65535 is missing.
_SCALE, _OFFSET, _FILL = 1e-4, -0.1, 65535
_REFLECTANCE = {"scale_factor": _SCALE, "add_offset": _OFFSET, "_FillValue": _FILL}

log = get_logger(__name__)


def encode(values: Float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Values as they are stored in an array of a data type."""
    if dtype != np.uint16:
        return values
    codes = np.rint((values - np.float32(_OFFSET)) * np.float32(1 / _SCALE))
    np.clip(codes, 0, _FILL - 1, out=codes)
    codes[np.isnan(codes)] = _FILL
    stored: npt.NDArray[Any] = codes.astype(np.uint16)
    return stored


def decode(stored: npt.NDArray[Any]) -> Float:
    """Inverse of :func:`encode`, by the data type of what is stored."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32)
    values = stored.astype(np.float32) * np.float32(_SCALE) + np.float32(_OFFSET)
    values[stored == _FILL] = np.nan
    return values


def open_arrays(path: Path) -> Any:
    """Arrays of a finished store as they are stored; None when there is none to read."""
    if not path.is_file():
        return None
    try:
        return zarr.open_group(zip_store(path), mode="r")
    except (StateError, zipfile.BadZipFile, FileNotFoundError, KeyError, ValueError) as err:
        log.warning("%s cannot be read (%s) and is built anew", path, err)
        return None


class TileStore:
    """A store in the making. Leaving the context without an error puts it under its final name.

    Args:
        path: Final name, ``.zip``.
        crs: Coordinate system of all variables.
    """

    def __init__(self, path: Path, crs: Any) -> None:
        self._path = path
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder(staging(path.parent), "store"))
        self._root = zarr.create_group(self._folder / "store", zarr_format=3)
        self._order: list[str] = []
        self._grid_mapping(crs)

    def __enter__(self) -> TileStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._scratch.close()

    @property
    def attrs(self) -> Any:
        """Attributes of the store."""
        return self._root.attrs

    def _grid_mapping(self, crs: Any) -> None:
        """The CF grid mapping that rioxarray, GDAL and QGIS look for."""
        wkt = crs.to_wkt()
        self._array(
            "spatial_ref", (), np.array(0, np.int64),
            {"crs_wkt": wkt, "spatial_ref": wkt, **_cf(crs)},
        )  # fmt: skip

    def _array(
        self, name: str, dims: Sequence[str], values: npt.NDArray[Any], attrs: Mapping[str, Any]
    ) -> None:
        whole: tuple[int, ...] = tuple(max(n, 1) for n in values.shape)
        array = self._root.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=whole or "auto",
            dimension_names=list(dims), attributes=dict(attrs),
        )  # fmt: skip
        array[...] = values
        self._order.append(name)

    def text(self, name: str, values: Sequence[str]) -> None:
        """Add a coordinate of names."""
        self._array(name, (name,), np.array(values, dtype=np.dtypes.StringDType()), {})

    def days(self, name: str, days: npt.NDArray[np.datetime64]) -> None:
        """Add a coordinate of days."""
        attrs = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
        self._array(name, (name,), days.astype("datetime64[D]").astype(np.int64), attrs)

    def axes(self, geobox: GeoBox) -> None:
        """Add the coordinates ``y_<res>`` and ``x_<res>`` of pixel centres."""
        affine, (h, w) = geobox.affine, geobox.shape
        res = round(affine.a)
        for axis, n, first, step in (("y", h, affine.f, affine.e), ("x", w, affine.c, affine.a)):
            name = f"{axis}_{res}"
            if name not in self._root:
                attrs = {
                    "axis": axis.upper(), "units": "metre",
                    "standard_name": f"projection_{axis}_coordinate",
                }  # fmt: skip
                self._array(name, (name,), first + (np.arange(n) + 0.5) * step, attrs)

    def variable(
        self, name: str, dims: Sequence[str], shape: Sequence[int], dtype: str,
        attrs: Mapping[str, Any] | None = None, *, plain: bool = False,
        chunk_px: tuple[int, int] = (CHUNK_PX, CHUNK_PX),
    ) -> Any:  # fmt: skip
        """Add a variable on pixels, empty so far; returns the array to write to.

        Args:
            name: Its name.
            dims: Names of its dimensions; the last two are rows and columns.
            shape: Its shape.
            dtype: ``uint16`` for reflectance, see :func:`encode`; ``float32``; other integers.
            attrs: Attributes.
            plain: Also ``uint16`` is stored as it is, and chunks hold all bands: fewer, which are
                written in half the time where bands are always read together. They are packed
                at a fifth of the time, 5 % larger.
            chunk_px: Rows and columns of a chunk; what is written at once should be whole chunks,
                which otherwise are read, unpacked and packed again.
        """
        codes = _REFLECTANCE if dtype == "uint16" and not plain else {}
        fill: float = _FILL if codes else float("nan") if dtype == "float32" else 0
        first = shape[:-2] if plain else [1] * (len(shape) - 2)
        chunks = [*first, *(min(n, c) for n, c in zip(shape[-2:], chunk_px, strict=True))]
        self._order.append(name)
        # Few chunks of predictions are empty, and to look for them takes as long as to pack them.
        return self._root.create_array(
            name, shape=tuple(shape), dtype=dtype, chunks=tuple(chunks), fill_value=fill,
            compressors=ZstdCodec(level=1) if plain else "auto",
            dimension_names=list(dims), config={"write_empty_chunks": plain},
            attributes={
                **(attrs or {}), **codes, "grid_mapping": "spatial_ref",
                "coordinates": "spatial_ref",
            },
        )  # fmt: skip

    def _finish(self) -> None:
        root = self._folder / "store"
        self._consolidate(root)
        zip_folder(root, self._path)

    def _consolidate(self, root: Path) -> None:
        """Put all metadata into one place and in one order, which no directory listing has."""
        file = root / "zarr.json"
        record = json.loads(file.read_text(encoding="utf-8"))
        record["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": {
                name: json.loads((root / name / "zarr.json").read_text(encoding="utf-8"))
                for name in self._order
            },
        }
        file.write_text(json.dumps(record, indent=1, sort_keys=False), encoding="utf-8")


def _cf(crs: Any) -> dict[str, Any]:
    """CF attributes of a coordinate system, of values that JSON knows."""
    from pyproj import CRS

    known = CRS.from_user_input(str(crs)).to_cf()
    return {k: v for k, v in known.items() if k != "crs_wkt" and isinstance(v, (str, float, int))}
