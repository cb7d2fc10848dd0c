"""Cloud shadows from the sun's position, and the sun's position from time and place.

A cloud of height h above the ground throws its shadow away from the sun, at azimuth
``sun_azimuth + 180`` and distance ``h tan(zenith)``. The height is not known, so it is searched:
the displacement whose projection of the cloud falls on the darkest ground wins, first for the
scene as a whole, then for every large cloud (object matching as in Zhu and Woodcock 2012, Fmask,
Remote Sensing of Environment 118, 83-94). Only ground that is dark AND lies where a shadow can
fall becomes shadow: a lake is dark too.

The view angle's parallax, ``h tan(view zenith)``, is not modelled; with a search over the height
it is absorbed in part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from terraloom.errors import SceneError

__all__ = [
    "ShadowResult",
    "cast_shadow",
    "darkness",
    "local_median",
    "shadow_displacement",
]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]

#: Cloud heights that are searched, metres above ground.
HEIGHT_RANGE_M = (200.0, 10_000.0)
#: Clouds smaller than this take the scene's height: too few pixels to match (square metres).
MIN_OBJECT_M2 = 20_000.0
#: Most pixels of one cloud that are followed; a regular subset of larger ones says the same.
_MAX_POINTS = 4000
#: A projected cloud must have at least this share of its pixels on visible ground.
_MIN_VISIBLE = 0.25
#: How far a single cloud's height may lie from the scene's (ratio).
_OBJECT_RATIO = 1.8


@dataclass(frozen=True, slots=True)
class ShadowResult:
    """Shadows of one scene.

    Attributes:
        mask: (H, W) bool, True in cloud shadow.
        height_m: Cloud height that fits the scene best; NaN when nothing could be matched.
        agreement: Mean darkness (0-1) under the projected clouds minus that of all clear ground;
            near 0 means that no height explains the dark ground.
    """

    mask: BoolArray
    height_m: float
    agreement: float


def shadow_displacement(
    height_m: float, sun_azimuth_deg: float, sun_elevation_deg: float
) -> tuple[float, float]:
    """Offset of a shadow from its cloud, metres east and metres north.

    Args:
        height_m: Height of the cloud above ground.
        sun_azimuth_deg: Sun azimuth, clockwise from north.
        sun_elevation_deg: Sun elevation above the horizon; must be positive.

    Raises:
        SceneError: The sun is at or below the horizon, or not a number.
    """
    if not (0.0 < sun_elevation_deg <= 90.0) or not math.isfinite(sun_azimuth_deg):
        raise SceneError(
            f"sun azimuth {sun_azimuth_deg}, elevation {sun_elevation_deg} degrees",
            allowed="an elevation above 0 and up to 90 degrees",
            fix="check the item's view:sun_azimuth and view:sun_elevation",
        )
    length = height_m / math.tan(math.radians(sun_elevation_deg))
    away = math.radians(sun_azimuth_deg + 180.0)
    return length * math.sin(away), length * math.cos(away)


def darkness(
    band: FloatArray,
    clear: BoolArray,
    *,
    resolution_m: float,
    background: FloatArray | None = None,
    window_m: float = 2000.0,
    full_drop: float = 0.5,
) -> npt.NDArray[np.float32]:
    """How much darker a pixel is than it should be, 0 (not) to 1 (by ``full_drop`` or more).

    What it should be is the pixel's own clear-sky value of other dates where known, else the
    median of the clear ground around it.

    Args:
        band: (H, W) reflectance, NaN invalid; near infrared or short-wave infrared, where a
            shadow gets little scattered light.
        clear: (H, W) bool, pixels that may serve as surroundings: no cloud, water or nodata.
        resolution_m: Pixel size.
        background: (H, W) clear-sky reflectance of the same band, NaN unknown.
        window_m: Width of the surroundings.
        full_drop: Relative drop of reflectance that counts as fully dark.

    Returns:
        (H, W) float32, 0 where unknown.
    """
    should = local_median(band, clear, window_m / resolution_m)
    if background is not None:
        should = np.where(np.isfinite(background), background, should)
    with np.errstate(divide="ignore", invalid="ignore"):
        drop = (should - band) / (should * full_drop)
    out: npt.NDArray[np.float32] = np.clip(
        np.nan_to_num(drop, nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0
    ).astype(np.float32)
    return out


def local_median(band: FloatArray, clear: BoolArray, window_px: float) -> FloatArray:
    """Median of clear pixels on a coarse grid of blocks, smoothed and spread back to (H, W)."""
    height, width = band.shape
    usable = np.where(clear & np.isfinite(band), band, np.nan)
    if not np.isfinite(usable).any():
        return np.full(band.shape, np.nan, dtype=np.float32)
    block = max(4, round(window_px / 4.0))
    rows, cols = math.ceil(height / block), math.ceil(width / block)
    padded = np.full((rows * block, cols * block), np.nan, dtype=np.float32)
    padded[:height, :width] = usable
    tiles = padded.reshape(rows, block, cols, block).swapaxes(1, 2).reshape(rows, cols, -1)
    enough = np.isfinite(tiles).sum(axis=-1) >= 0.1 * block * block
    coarse = np.full((rows, cols), np.nanmedian(usable), dtype=np.float32)
    if enough.any():
        coarse[enough] = np.nanmedian(tiles[enough], axis=-1)
        weights = ndimage.gaussian_filter(enough.astype(np.float32), 1.0, mode="nearest")
        total = ndimage.gaussian_filter(np.where(enough, coarse, 0.0), 1.0, mode="nearest")
        coarse = np.where(weights > 1e-3, total / np.maximum(weights, 1e-3), coarse)
    y = (np.arange(height) + 0.5) / block - 0.5
    x = (np.arange(width) + 0.5) / block - 0.5
    grid = np.meshgrid(y, x, indexing="ij")
    level: npt.NDArray[np.float32] = ndimage.map_coordinates(
        coarse, grid, order=1, mode="nearest"
    ).astype(np.float32)
    return level


def _heights(step_m: float) -> npt.NDArray[np.float64]:
    low, high = HEIGHT_RANGE_M
    # At least 4 % apart: far clouds are long ago blurred by penumbra and parallax.
    values = [low]
    while values[-1] < high:
        values.append(values[-1] + max(step_m, 0.04 * values[-1]))
    return np.array(values)


class _Matcher:
    """Darkness under a projected set of cloud pixels, by height."""

    def __init__(
        self,
        dark: npt.NDArray[np.float32],
        visible: BoolArray,
        east_px: float,
        north_px: float,
    ) -> None:
        self.dark, self.visible = dark, visible
        # Displacement in rows and columns per metre of height.
        self.row_per_m, self.col_per_m = -north_px, east_px
        self.mean = float(dark[visible].mean()) if visible.any() else 0.0

    def offset(self, height_m: float) -> tuple[int, int]:
        return round(height_m * self.row_per_m), round(height_m * self.col_per_m)

    def score(
        self, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp], heights: FloatArray
    ) -> FloatArray:
        """Contrast of darkness for each height; NaN when too little of it is visible."""
        n_rows, n_cols = self.dark.shape
        out = np.full(len(heights), np.nan)
        for i, height in enumerate(heights):
            dr, dc = self.offset(float(height))
            r, c = rows + dr, cols + dc
            inside = (r >= 0) & (r < n_rows) & (c >= 0) & (c < n_cols)
            r, c = r[inside], c[inside]
            seen = self.visible[r, c]
            if seen.sum() < max(4, _MIN_VISIBLE * len(rows)):
                continue
            values = self.dark[r[seen], c[seen]]
            # Weighted by the square root of what is seen: a sliver that happens to be dark
            # must not beat a whole cloud that nearly fits.
            out[i] = (float(values.mean()) - self.mean) * math.sqrt(seen.sum() / len(rows))
        return out


def _thin(
    rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp], most: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    step = max(1, len(rows) // most)
    return rows[::step], cols[::step]


def _best(scores: FloatArray, heights: FloatArray) -> tuple[float, float]:
    if not np.isfinite(scores).any():
        return math.nan, 0.0
    i = int(np.nanargmax(scores))
    return float(heights[i]), float(scores[i])


def cast_shadow(
    cloud: BoolArray,
    dark: npt.NDArray[np.float32],
    *,
    valid: BoolArray,
    water: BoolArray,
    sun_azimuth_deg: float,
    sun_elevation_deg: float,
    resolution_m: float,
    dark_threshold: float = 0.35,
    border_threshold: float | None = None,
    border_least_m2: float = 250_000.0,
    swath_threshold: float | None = None,
    buffer_m: float = 60.0,
    height_tolerance: float = 0.15,
    water_dark: BoolArray | None = None,
    heights_m: Sequence[float] | None = None,
) -> ShadowResult:
    """Find the shadows that the clouds of one scene throw.

    Args:
        cloud: (H, W) bool, clouds (without their dilation); rows run south, columns east.
        dark: (H, W) darkness 0-1 of :func:`darkness`.
        valid: (H, W) bool, pixels with data.
        water: (H, W) bool, open water: always dark, so it neither helps to find the height
            nor becomes shadow outside the projected clouds.
        sun_azimuth_deg: Sun azimuth, clockwise from north.
        sun_elevation_deg: Sun elevation.
        resolution_m: Pixel size.
        dark_threshold: Darkness from which ground counts as dark.
        border_threshold: Darkness from which ground is shadow although its cloud would lie beyond
            the border of the picture; None: such ground stays clear.
        swath_threshold: Darkness from which ground is shadow wherever any cloud, or the border,
            lies towards the sun, at any height: for darkness against the pixel's own clear sky,
            which needs no height to be convincing.
        border_least_m2: Least size of such ground, unless it continues a shadow.
        buffer_m: Slack around the projected clouds.
        height_tolerance: Relative slack of the height: depth and thickness of clouds.
        water_dark: (H, W) bool, water known to be in shadow (darker than its own clear-sky
            value); None: no water becomes shadow.
        heights_m: Heights to try instead of the full range.

    Raises:
        SceneError: The sun is not above the horizon, or shapes differ.
    """
    if not cloud.shape == dark.shape == valid.shape == water.shape:
        raise SceneError("cloud, darkness, valid and water masks differ in shape")
    east_m, north_m = shadow_displacement(1.0, sun_azimuth_deg, sun_elevation_deg)
    ground = valid & ~cloud
    empty = np.zeros(cloud.shape, dtype=bool)
    if not cloud.any():
        return ShadowResult(empty, math.nan, 0.0)
    matcher = _Matcher(dark, ground & ~water, east_m / resolution_m, north_m / resolution_m)
    step_m = max(resolution_m / max(math.hypot(east_m, north_m), 1e-6), 20.0)
    heights = _heights(step_m) if heights_m is None else np.asarray(heights_m, dtype=float)
    labels, count = ndimage.label(cloud, structure=np.ones((3, 3)))
    objects = _objects(labels, int(count), resolution_m)
    scene = _scene_scores(matcher, objects, heights)
    height, agreement = _best(scene, heights)
    anywhere = empty
    if swath_threshold is not None:
        swath = _swath(cloud, east_m, north_m, resolution_m)
        anywhere = _tidy(swath & (dark >= swath_threshold) & ground & ~water, resolution_m)
    if not math.isfinite(height) or agreement <= 0.0:
        return ShadowResult(anywhere, math.nan, max(agreement, 0.0))
    band = _project_all(cloud, labels, objects, matcher, heights, height, height_tolerance)
    reach = ndimage.distance_transform_edt(~band) * resolution_m <= buffer_m
    dark_ground = (dark >= dark_threshold) & ~water
    if water_dark is not None:
        dark_ground |= water & water_dark
    mask = _tidy(dark_ground & reach & ground, resolution_m)
    if border_threshold is not None:
        outside = _source_outside(cloud.shape, *matcher.offset(height))
        dim = outside & (dark >= border_threshold) & ground & ~water
        mask |= _large_or_touching(dim, mask, border_least_m2, resolution_m)
    return ShadowResult((mask | anywhere) & ground, height, agreement)


@dataclass(frozen=True, slots=True)
class _Cloud:
    label: int
    rows: npt.NDArray[np.intp]
    cols: npt.NDArray[np.intp]


def _objects(labels: npt.NDArray[np.int32], count: int, resolution_m: float) -> list[_Cloud]:
    """Pixels of each cloud large enough to be matched on its own, largest first."""
    least = max(4.0, MIN_OBJECT_M2 / resolution_m**2)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    found = []
    for i, window in enumerate(ndimage.find_objects(labels), 1):
        if window is None or sizes[i] < least:
            continue
        rows, cols = np.nonzero(labels[window] == i)
        found.append(_Cloud(i, rows + window[0].start, cols + window[1].start))
    return sorted(found, key=lambda c: -len(c.rows))


def _scene_scores(matcher: _Matcher, objects: list[_Cloud], heights: FloatArray) -> FloatArray:
    """Scores of all clouds together, each weighted by the square root of its size."""
    total = np.zeros(len(heights))
    weight = np.zeros(len(heights))
    for cloud in objects[:200]:
        scores = matcher.score(*_thin(cloud.rows, cloud.cols, _MAX_POINTS), heights)
        seen = np.isfinite(scores)
        w = math.sqrt(len(cloud.rows))
        total[seen] += w * scores[seen]
        weight[seen] += w
    if not weight.any():
        return np.full(len(heights), np.nan)
    # Heights at which most clouds project out of the picture are judged on too little.
    return np.where(weight >= 0.3 * weight.max(), total / np.maximum(weight, 1e-9), np.nan)


def _project_all(
    cloud: BoolArray,
    labels: npt.NDArray[np.int32],
    objects: list[_Cloud],
    matcher: _Matcher,
    heights: FloatArray,
    scene_height: float,
    tolerance: float,
) -> BoolArray:
    """Ground on which a shadow may fall: every cloud at its own height, or at the scene's."""
    band = np.zeros(cloud.shape, dtype=bool)
    near = heights[
        (heights >= scene_height / _OBJECT_RATIO) & (heights <= scene_height * _OBJECT_RATIO)
    ]
    rest = cloud.copy()
    for item in objects[:200]:
        own, contrast = _best(matcher.score(*_thin(item.rows, item.cols, _MAX_POINTS), near), near)
        if not math.isfinite(own) or contrast <= 0.0:
            continue
        _stamp(band, item.rows, item.cols, matcher, own, tolerance)
        rest[item.rows, item.cols] = False
    rows, cols = np.nonzero(rest)
    _stamp(band, rows, cols, matcher, scene_height, tolerance)
    return band


def _swath(
    cloud: BoolArray, east_m: float, north_m: float, resolution_m: float, cell_m: float = 200.0
) -> BoolArray:
    """Ground with a cloud, or the border, towards the sun at any height of the range.

    Works on cells of about ``cell_m``: the swath is wide and its exact edge does not matter.
    """
    factor = max(1, round(cell_m / resolution_m))
    rows, cols = (-(-n // factor) for n in cloud.shape)
    padded = np.zeros((rows * factor, cols * factor), dtype=bool)
    padded[: cloud.shape[0], : cloud.shape[1]] = cloud
    cells: BoolArray = np.logical_or.reduce(padded.reshape(rows, factor, cols, factor), axis=(1, 3))
    y, x = np.indices(cells.shape)
    out = np.zeros(cells.shape, dtype=bool)
    length = math.hypot(east_m, north_m)
    step_m = factor * resolution_m / max(length, 1e-6)
    for height in np.arange(HEIGHT_RANGE_M[0], HEIGHT_RANGE_M[1] + step_m, step_m):
        scale = height / (factor * resolution_m)
        r, c = y + round(north_m * scale), x - round(east_m * scale)
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < cols)
        out |= np.where(inside, cells[np.clip(r, 0, rows - 1), np.clip(c, 0, cols - 1)], True)
        if out.all():
            break
    wide = np.kron(ndimage.binary_dilation(out), np.ones((factor, factor), dtype=bool))
    swath: BoolArray = wide[: cloud.shape[0], : cloud.shape[1]]
    return swath


def _source_outside(shape: tuple[int, ...], dr: int, dc: int) -> BoolArray:
    """Ground whose cloud, one displacement back towards the sun, lies beyond the border."""
    rows = np.arange(shape[0]) - dr
    cols = np.arange(shape[1]) - dc
    out_rows, out_cols = (rows < 0) | (rows >= shape[0]), (cols < 0) | (cols >= shape[1])
    outside: BoolArray = out_rows[:, None] | out_cols[None, :]
    return outside


def _stamp(
    band: BoolArray,
    rows: npt.NDArray[np.intp],
    cols: npt.NDArray[np.intp],
    matcher: _Matcher,
    height_m: float,
    tolerance: float,
) -> None:
    ends = [matcher.offset(height_m * (1.0 + s * tolerance)) for s in (-1.0, 1.0)]
    steps = max(abs(ends[1][0] - ends[0][0]), abs(ends[1][1] - ends[0][1]), 1)
    for k in range(steps + 1):
        dr = round(ends[0][0] + (ends[1][0] - ends[0][0]) * k / steps)
        dc = round(ends[0][1] + (ends[1][1] - ends[0][1]) * k / steps)
        r, c = rows + dr, cols + dc
        inside = (r >= 0) & (r < band.shape[0]) & (c >= 0) & (c < band.shape[1])
        band[r[inside], c[inside]] = True


def _large_or_touching(
    extra: BoolArray, mask: BoolArray, least_m2: float, resolution_m: float
) -> BoolArray:
    """Patches of ``extra`` that are large, or continue ``mask``."""
    labels, count = ndimage.label(_tidy(extra, resolution_m), structure=np.ones((3, 3)))
    keep = np.bincount(labels.ravel(), minlength=count + 1) * resolution_m**2 >= least_m2
    keep[np.unique(labels[ndimage.binary_dilation(mask)])] = True
    keep[0] = False
    kept: BoolArray = keep[labels]
    return kept


def _tidy(mask: BoolArray, resolution_m: float) -> BoolArray:
    """Close gaps of up to 2 pixels and drop specks under half a hectare."""
    closed = ndimage.binary_closing(np.pad(mask, 3), np.ones((3, 3)), iterations=2)[3:-3, 3:-3]
    labels, count = ndimage.label(closed)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= max(2.0, 5000.0 / resolution_m**2)
    keep[0] = False
    kept: BoolArray = keep[labels]
    return kept
