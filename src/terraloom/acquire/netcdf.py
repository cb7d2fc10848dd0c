"""What GDAL's netCDF driver leaves open: time axes, wavelengths, place and row order.

The wheels of rasterio bring the driver, so no netCDF library is needed. Where the coordinate
variables of a file lack the CF attributes, GDAL gives no geotransform and takes the rows to run
from south to north: it then returns images upside down. Such files are read in file order and
placed by their coordinate variables instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from terraloom.errors import SceneError

__all__ = ["FILE_ORDER", "band_axes", "coordinate_transform", "decode_time", "wavelength_um"]

#: GDAL setting under which rows come as they lie in the file.
FILE_ORDER = {"GDAL_NETCDF_BOTTOMUP": "NO"}

_SECONDS = {"second": 1, "sec": 1, "s": 1, "minute": 60, "min": 60, "hour": 3600, "hr": 3600,
            "h": 3600, "day": 86400, "d": 86400}  # fmt: skip
_CALENDARS = ("", "standard", "gregorian", "proleptic_gregorian")
_PER_UM = {"nm": 1e-3, "nanometer": 1e-3, "nanometre": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0,
           "micron": 1.0, "micrometer": 1.0, "micrometre": 1.0}  # fmt: skip
_AXES = (("x", "y"), ("X", "Y"), ("lon", "lat"), ("longitude", "latitude"),
         ("easting", "northing"))  # fmt: skip


def decode_time(value: float, units: str, calendar: str = "") -> datetime:
    """Time of a CF axis such as ``days since 1990-01-01``, UTC.

    Raises:
        SceneError: Units or calendar that are not understood.
    """
    match = re.fullmatch(r"\s*(\w+?)s?\s+since\s+(.+?)\s*(?:Z|UTC)?\s*", units, re.IGNORECASE)
    unit = _SECONDS.get(match[1].lower()) if match else None
    if match is None or unit is None or calendar.lower() not in _CALENDARS:
        raise SceneError(
            f"time in {units!r}, calendar {calendar or 'standard'!r}",
            allowed="seconds, minutes, hours or days since a date, Gregorian calendar",
            fix="give the dates in the spec (`dates`)",
        )
    try:
        start = datetime.fromisoformat(match[2].strip())
        start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
        return start + timedelta(seconds=value * unit)
    except (ValueError, OverflowError) as err:
        raise SceneError(f"time {value} in {units!r} cannot be read ({err})") from err


def wavelength_um(value: float, units: str) -> float | None:
    """Wavelength in micrometres; None where the unit is no length of light.

    Without a unit, values above 100 are taken for nanometres: no sensor of land reaches 100 um.
    """
    name = units.strip().lower().removesuffix("s")
    if not name or name in ("unknown", "none"):
        return value * 1e-3 if value > 100 else value
    factor = _PER_UM.get(name)
    return None if factor is None else value * factor


def band_axes(src: Any) -> list[tuple[datetime | None, float | None]]:
    """Time and wavelength (micrometres) of each band of an open netCDF variable."""
    tags: Mapping[str, str] = src.tags()
    names = [n for n in tags.get("NETCDF_DIM_EXTRA", "").strip("{}").split(",") if n]
    time = next((n for n in names if " since " in tags.get(f"{n}#units", "")), None)
    light = next((n for n in names if n != time and _is_light(n, tags)), None)
    axes: list[tuple[datetime | None, float | None]] = []
    for band in range(1, src.count + 1):
        own = src.tags(band)
        when = um = None
        if time is not None and f"NETCDF_DIM_{time}" in own:
            calendar = tags.get(f"{time}#calendar", "")
            when = decode_time(float(own[f"NETCDF_DIM_{time}"]), tags[f"{time}#units"], calendar)
        if light is not None and f"NETCDF_DIM_{light}" in own:
            um = wavelength_um(float(own[f"NETCDF_DIM_{light}"]), tags.get(f"{light}#units", ""))
        axes.append((when, um))
    return axes


def _is_light(name: str, tags: Mapping[str, str]) -> bool:
    unit = tags.get(f"{name}#units", "").strip().lower().removesuffix("s")
    return name.lower().startswith("wavelength") or unit in _PER_UM


def coordinate_transform(path: str, height: int, width: int) -> tuple[Affine, bool] | None:
    """Geotransform from the coordinate variables, and whether the rows must be turned over.

    Args:
        path: The netCDF file.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        Transform with the first row at the top, and True where the file has it at the bottom; None
        without coordinate variables of these lengths.

    Raises:
        SceneError: Coordinates that are not evenly spaced.
    """
    for x_name, y_name in _AXES:
        x, y = _axis(path, x_name), _axis(path, y_name)
        if x is None or y is None or len(x) != width or len(y) != height:
            continue
        if min(width, height) < 2:
            return None
        dx, dy = (x[-1] - x[0]) / (width - 1), (y[-1] - y[0]) / (height - 1)
        for name, axis, step in ((x_name, x, dx), (y_name, y, dy)):
            if not step or np.abs(np.diff(axis) - step).max() > 1e-3 * abs(step):
                raise SceneError(
                    f"coordinates {name} are not evenly spaced",
                    where=path, fix="put the data on a regular grid first",
                )  # fmt: skip
        if dx < 0:
            raise SceneError("columns run from east to west", where=path, fix="turn the data over")
        top = max(y[0], y[-1]) + abs(dy) / 2
        return Affine(dx, 0, x[0] - dx / 2, 0, -abs(dy), top), bool(dy > 0)
    return None


def _axis(path: str, name: str) -> npt.NDArray[np.float64] | None:
    try:
        with warnings.catch_warnings(), rasterio.Env(**FILE_ORDER):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(f'netcdf:"{path}":{name}', driver="netCDF") as src:
                values: npt.NDArray[np.float64] = src.read(1).astype(np.float64).ravel()
                return values
    except RasterioError:
        return None
