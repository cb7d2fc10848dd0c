"""Pictures of the report, made from rasters: bounded memory, same bytes for the same input.

Rasters are read decimated and become pictures of one pixel per cell read; their legends and
colour bars are text in the page, so that they stay sharp and can be read aloud.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from terraloom.errors import StateError

__all__ = [
    "MAX_PX",
    "Picture",
    "Scalar",
    "class_picture",
    "css_gradient",
    "flag_picture",
    "image_picture",
    "read_small",
    "reason_picture",
    "scalar_picture",
]

U8 = npt.NDArray[np.uint8]

#: Largest width of a picture and, in the same way, 1.5 times this for its height (pixels).
MAX_PX = 1536

_CMAPS = {
    # Light is sure, dark is doubtful: the page is light, so doubt is what stands out.
    "doubt": LinearSegmentedColormap.from_list(
        "doubt", ["#f6f3ec", "#efd7a5", "#df9b62", "#b55a50", "#6d2a52", "#2b1338"]
    ),
    "ignorance": LinearSegmentedColormap.from_list(
        "ignorance", ["#f4f5f1", "#c9dfd0", "#83bfb5", "#3f93a0", "#26608a", "#1e2c5c"]
    ),
    "edge": LinearSegmentedColormap.from_list("edge", ["#f7f6f3", "#d8b989", "#8a4b25", "#2c1508"]),
    "amount": colormaps["viridis"],
}


@dataclass(frozen=True)
class Picture:
    """An image that travels inside the page.

    Attributes:
        uri: Data URI, PNG or JPEG.
        width: Pixels.
        height: Pixels.
        alt: What it shows, for readers who do not see it.
    """

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Scalar:
    """A picture of a quantity with the ends of its colour scale.

    Attributes:
        picture: The picture.
        low: Value at the first colour, in the quantity's unit.
        high: Value at the last colour and above.
        gradient: CSS of the colour bar.
        clipped: Whether values lie above ``high``.
        median: Median of the valid pixels read.
    """

    picture: Picture
    low: float
    high: float
    gradient: str
    clipped: bool
    median: float


def read_small(
    path: Path, bands: Sequence[int] | None = None, *, max_px: int = MAX_PX
) -> tuple[npt.NDArray[Any], float | None]:
    """Read a raster at most ``max_px`` wide and 1.5 times as high, nearest pixel.

    Args:
        path: Raster file.
        bands: Band numbers from 1; default all.
        max_px: Largest width, pixels.

    Returns:
        Array (B, h, w) of the file's dtype, and its nodata value.

    Raises:
        StateError: The raster is missing or cannot be read.
    """
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.open(path) as src:
            step = max(1.0, src.width / max_px, src.height / (1.5 * max_px))
            shape = (max(1, round(src.height / step)), max(1, round(src.width / step)))
            indexes = list(bands) if bands else list(range(1, src.count + 1))
            data: npt.NDArray[Any] = src.read(indexes, out_shape=(len(indexes), *shape))
            return data, src.nodata
    except (RasterioIOError, IndexError) as err:
        raise StateError(
            f"the raster cannot be read ({err})", where=path.as_posix(), fix="rerun its stage"
        ) from err


def scale_of(path: Path, band: int = 1) -> float:
    """Value = stored x scale, as the raster says.

    Raises:
        StateError: The raster is missing or cannot be read.
    """
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.open(path) as src:
            return float(src.scales[band - 1])
    except RasterioIOError as err:
        raise StateError(
            f"the raster cannot be read ({err})", where=path.as_posix(), fix="rerun its stage"
        ) from err


def _uri(image: Image.Image, alt: str, kind: str = "PNG", **options: Any) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind.lower()};base64,{text}", *image.size, alt)


def _indexed(index: U8, palette: Mapping[int, tuple[int, int, int]], alt: str) -> Picture:
    """Picture of up to 256 colours; index 0 is transparent."""
    table = np.zeros((256, 3), np.uint8)
    for code, rgb in palette.items():
        table[code] = rgb
    image = Image.fromarray(np.ascontiguousarray(index), "L")
    image.putpalette(table.tobytes())  # turns "L" into "P" without touching the indices
    return _uri(image, alt, transparency=0)


def class_picture(path: Path, colors: Mapping[int, str], alt: str) -> Picture:
    """Class map in its legend's colours; code 0 is transparent.

    Args:
        path: Raster of class codes (uint8).
        colors: ``#rrggbb`` of each code.
        alt: What it shows.
    """
    data, _ = read_small(path, [1])
    return _indexed(data[0].astype(np.uint8), {c: _rgb(v) for c, v in colors.items()}, alt)


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def image_picture(path: Path, alt: str) -> Picture:
    """Photograph-like raster (uint8 RGB) as JPEG; pixels without data become pale grey."""
    data, _ = read_small(path, [1, 2, 3])
    rgb = np.moveaxis(data, 0, -1).astype(np.uint8)
    rgb[(rgb == 0).all(axis=-1)] = (233, 236, 234)
    return _uri(Image.fromarray(rgb), alt, "JPEG", quality=86)


def reason_picture(
    reasons: Path, class_map: Path, bits: Mapping[int, str]
) -> tuple[Picture, dict[int, float]]:
    """Where the map has no class, and why: the lowest reason bit of each pixel without a class.

    Args:
        reasons: Raster of reason bits (uint8).
        class_map: Raster of class codes; 0 is not mapped.
        bits: Colour ``#rrggbb`` of each reason bit.

    Returns:
        The picture, and the share (0-1) of the area that each first reason takes.
    """
    code, _ = read_small(class_map, [1])
    why, _ = read_small(reasons, [1])
    if why.shape != code.shape:
        raise StateError("reasons and class map differ in shape", where=reasons.as_posix())
    first = (why[0] & (~why[0] + 1)).astype(np.uint8)  # the lowest set bit alone
    first[code[0] != 0] = 0
    shares = {b: float((first == b).mean()) for b in bits if (first == b).any()}
    index = np.where(code[0] != 0, 1, 0).astype(np.uint8)
    palette = {1: (226, 232, 226)}
    for n, (bit, color) in enumerate(bits.items(), 2):
        index[first == bit] = n
        palette[n] = _rgb(color)
    return _indexed(index, palette, "Mapped pixels and the reasons of unmapped ones"), shares


def scalar_picture(
    path: Path, band: int, *, cmap: str, alt: str, factor: float = 1.0, top: float | None = None,
    low: float | None = 0.0, squares_of: Sequence[int] = (),
) -> Scalar | None:  # fmt: skip
    """A quantity as picture with a colour scale; nodata is transparent.

    Args:
        path: Raster file.
        band: Band number.
        cmap: One of the report's colour maps: doubt, ignorance, edge, amount.
        alt: What it shows.
        factor: Value = stored * factor.
        top: Value of the last colour; default the 99th percentile of the pixels read.
        low: Value of the first colour; None takes the 1st percentile.
        squares_of: Bands whose root of summed squares is shown instead of ``band``.

    Returns:
        The picture with its scale, or None where no pixel is valid.
    """
    data, nodata = read_small(path, list(squares_of) or [band])
    values = data.astype(np.float64)
    valid = np.isfinite(values).all(axis=0)
    if nodata is not None and math.isfinite(nodata):
        valid &= (data != nodata).all(axis=0)
    if not valid.any():
        return None
    shown = (np.sqrt((values**2).sum(axis=0)) if squares_of else values[0]) * factor
    inside = shown[valid]
    start = float(np.percentile(inside, 1)) if low is None else low
    end = float(np.percentile(inside, 99)) if top is None else top
    if end <= start:
        end = start + max(abs(start), 1.0) * 1e-3
    level = np.clip((np.where(valid, shown, start) - start) / (end - start), 0, 1)
    index = np.where(valid, 1 + np.round(level * 254), 0).astype(np.uint8)
    table = (_CMAPS[cmap](np.linspace(0, 1, 255))[:, :3] * 255).round().astype(int)
    palette = {n + 1: (int(r), int(g), int(b)) for n, (r, g, b) in enumerate(table)}
    picture = _indexed(index, palette, alt)
    clipped = bool((inside > end * (1 + 1e-9)).any())
    return Scalar(picture, start, end, css_gradient(cmap), clipped, float(np.median(inside)))


def flag_picture(path: Path, band: int, value: int, alt: str, color: str = "#b4572b") -> Picture:
    """Pixels of a band that have a value, in one colour; all others transparent."""
    data, _ = read_small(path, [band])
    return _indexed((data[0] == value).astype(np.uint8), {1: _rgb(color)}, alt)


def css_gradient(cmap: str, stops: int = 9) -> str:
    """CSS ``linear-gradient`` of one of the report's colour maps, left to right."""
    rgb = (_CMAPS[cmap](np.linspace(0, 1, stops))[:, :3] * 255).round().astype(int)
    return "linear-gradient(90deg," + ",".join(f"rgb({r},{g},{b})" for r, g, b in rgb) + ")"
