"""Sub-pixel shifts between scenes, estimated on arrays and applied as an offset of the one warp.

Sign: a :class:`Shift` says how the CONTENT of a scene lies relative to the reference, ``dy_px``
down (south) and ``dx_px`` right (east), in pixels of the arrays compared. Content that lies too
far right is read from a window further right: :func:`shifted_geobox` adds the shift to the geobox
to read with, and the result lies on the reference. Nothing is resampled a second time.

Method: phase correlation (Kuglin and Hines 1975) on a grid of windows, refined by a
matrix-multiply DFT around the peak (Guizar-Sicairos, Thurman and Fienup 2008, Optics Letters 33,
156-158, also behind ``skimage.registration.phase_cross_correlation``), then a weighted median over
windows without outliers. Written here because the peak's height and a spectral weight are needed
(whitening gives noise at high frequencies the same say as content), and because a masked call of
scikit-image returns whole pixels only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from scipy import fft, ndimage
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from terraloom.errors import SceneError

__all__ = [
    "Shift",
    "apply_shift",
    "estimate_shift",
    "phase_shift",
    "shifted_geobox",
    "solve_shifts",
]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]

#: Share of a window that must be valid in both images.
_MIN_VALID = 0.25
#: Most windows that are measured; the clearest are taken.
_MAX_WINDOWS = 49
#: Peak of a window's correlation over the spread of its surface; below this it says nothing.
_MIN_PEAK = 6.0
#: Spread of the spectral weight, cycles per pixel: most content of a scene lies below.
_SPECTRAL_SIGMA = 0.18


@dataclass(frozen=True, slots=True)
class Shift:
    """Position of a scene's content relative to the reference.

    Attributes:
        dy_px: Downwards (south), pixels; NaN when it could not be told.
        dx_px: To the right (east), pixels.
        reliability: 0-1; share of the windows that agree with the result, 0 when unknown.
        residual_px: Robust spread (1.4826 MAD) of the agreeing windows about the result.
        n_windows: Windows that agree.
    """

    dy_px: float
    dx_px: float
    reliability: float
    residual_px: float
    n_windows: int

    @property
    def known(self) -> bool:
        """Whether a shift was found."""
        return math.isfinite(self.dy_px) and math.isfinite(self.dx_px)


_UNKNOWN = Shift(math.nan, math.nan, 0.0, math.nan, 0)


def phase_shift(
    reference: FloatArray,
    moving: FloatArray,
    *,
    max_shift_px: float,
    upsample: int = 100,
    spectral_sigma: float | None = None,
) -> tuple[float, float, float]:
    """Shift of one pair of windows without missing values, by phase correlation.

    Args:
        reference: (H, W), already tapered towards its edges.
        moving: (H, W), likewise.
        max_shift_px: Only peaks within this distance are looked at.
        upsample: Steps per pixel of the refinement.
        spectral_sigma: Width of the Gaussian weight of frequencies, cycles per pixel; None: all
            frequencies count alike, as in scikit-image.

    Returns:
        Down and right shift of the content of ``moving``, pixels, and the peak's height over the
        spread of the surface.
    """
    return _peak(
        fft.rfft2(moving) * np.conj(fft.rfft2(reference)),
        reference.shape, max_shift_px, upsample, spectral_sigma,
    )  # fmt: skip


def _peak(
    cross: npt.NDArray[np.complexfloating],
    shape: tuple[int, ...],
    max_shift_px: float,
    upsample: int,
    spectral_sigma: float | None,
) -> tuple[float, float, float]:
    """Peak of a half-plane cross-power spectrum; see :func:`phase_shift`."""
    height, width = shape
    size = np.abs(cross)
    spectrum = cross / np.maximum(size, 1e-12 * max(float(size.max()), 1e-30))
    fy, fx = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    if spectral_sigma is not None:
        radius2 = fy[:, None] ** 2 + fx[None, :] ** 2
        spectrum = spectrum * np.exp(-0.5 * radius2 / spectral_sigma**2).astype(size.dtype)
    surface = fft.irfft2(spectrum, s=(height, width))
    rows, cols = np.fft.fftfreq(height, 1.0 / height), np.fft.fftfreq(width, 1.0 / width)
    reach = max(max_shift_px, 1.0)
    near_rows = np.flatnonzero(np.abs(rows) <= reach)
    near_cols = np.flatnonzero(np.abs(cols) <= reach)
    near = surface[np.ix_(near_rows, near_cols)]
    i, j = np.unravel_index(int(np.argmax(near)), near.shape)
    y, x = float(rows[near_rows[i]]), float(cols[near_cols[j]])
    quality = (float(near[i, j]) - float(surface.mean())) / max(float(surface.std()), 1e-12)
    if upsample > 1:
        # Columns of the left half plane are the mirror of the right one: count them twice.
        twice = np.full(fx.size, 2.0, dtype=size.dtype)
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        y, x = _refine(spectrum * twice, fy, fx, y, x, upsample)
    return y, x, quality


def _refine(
    spectrum: npt.NDArray[np.complexfloating],
    fy: FloatArray,
    fx: FloatArray,
    y: float,
    x: float,
    upsample: int,
) -> tuple[float, float]:
    """Peak of the surface on a grid of 1/upsample within 1 pixel of (y, x), coarse then fine."""
    for step in sorted({1.0 / min(upsample, 10), 1.0 / upsample}, reverse=True):
        half = 1.0 if step > 1.0 / upsample or upsample <= 10 else 0.15
        offsets = np.arange(-round(half / step), round(half / step) + 1) * step
        left = np.exp(2j * np.pi * np.outer(y + offsets, fy))
        right = np.exp(2j * np.pi * np.outer(fx, x + offsets))
        fine = (left @ spectrum @ right).real
        i, j = np.unravel_index(int(np.argmax(fine)), fine.shape)
        y, x = y + float(offsets[i]), x + float(offsets[j])
    return y, x


def _structure(image: FloatArray, valid: BoolArray) -> FloatArray:
    """Gradient magnitude of a filled image, 0 near invalid pixels.

    Edges between fields stay where they are when crops turn from dark to bright.
    """
    smooth = ndimage.gaussian_filter(image, 0.7, truncate=3.0)
    gradient = np.hypot(
        ndimage.correlate1d(smooth, [-0.5, 0.0, 0.5], axis=0),
        ndimage.correlate1d(smooth, [-0.5, 0.0, 0.5], axis=1),
    )
    inner = ndimage.binary_erosion(valid, iterations=3, border_value=1)
    scale = float(np.median(gradient[inner])) if inner.any() else 0.0
    # Compressed, so that a few strong edges (a shore) do not decide alone.
    out = np.log1p(gradient / scale) if scale > 0 else gradient
    soft = ndimage.uniform_filter(inner.astype(np.float32), 5) * inner
    level = float(out[inner].mean()) if inner.any() else 0.0
    structure: FloatArray = ((out - level) * soft).astype(np.float32)
    return structure


def _fill(bands: FloatArray, valid: BoolArray) -> npt.NDArray[np.float32]:
    """(B, H, W): invalid pixels take the value of the nearest valid one."""
    if valid.all():
        return bands.astype(np.float32)
    if not valid.any():
        return np.zeros(bands.shape, dtype=np.float32)
    index = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
    filled: npt.NDArray[np.float32] = bands[:, index[0], index[1]].astype(np.float32)
    return filled


def _window_starts(length: int, size: int) -> list[int]:
    if length <= size:
        return [0]
    n = max(2, math.ceil((length - size) / (size * 2 / 3)) + 1)
    return sorted({round(i * (length - size) / (n - 1)) for i in range(n)})


def estimate_shift(
    reference: FloatArray,
    moving: FloatArray,
    valid: BoolArray | None = None,
    *,
    max_shift_px: float = 3.0,
    upsample: int = 100,
    window_px: int = 192,
    iterations: int = 2,
    gradient: bool = True,
) -> Shift:
    """Shift of a scene's content relative to a reference on the same grid.

    Args:
        reference: (H, W) or (B, H, W) reflectance, NaN invalid; each band gives its own windows.
        moving: Same shape.
        valid: (H, W) bool, pixels that are clear in both; NaN is invalid anyway.
        max_shift_px: Larger shifts are not looked for; a result beyond it is unknown.
        upsample: Steps per pixel.
        window_px: Size of the windows; they overlap by a third
            or more.
        iterations: Passes; from the second on ``moving`` is put back by the estimate and the rest
            is measured, which takes away the pull towards whole pixels.
        gradient: Compare gradient magnitudes, for scenes of different seasons; False compares
            reflectance.

    Returns:
        Down and right shift of the content of ``moving``; unknown (NaN, reliability 0) when too
        few windows are clear or agree.

    Raises:
        SceneError: Shapes differ.
    """
    ref = reference[None] if reference.ndim == 2 else reference
    mov = moving[None] if moving.ndim == 2 else moving
    if ref.shape != mov.shape:
        raise SceneError(f"reference {ref.shape} and scene {mov.shape} differ in shape")
    usable: BoolArray = np.logical_and.reduce(np.isfinite(ref) & np.isfinite(mov), axis=0)
    if valid is not None:
        usable &= valid
    prepare = _structure if gradient else _centred
    windows = _windows(usable, window_px)
    fixed = _spectra([prepare(b, usable) for b in _fill(ref, usable)], windows)
    filled = _fill(mov, usable)
    total, result = (0.0, 0.0), _UNKNOWN
    for k in range(max(1, iterations)):
        bands = filled if k == 0 else [apply_shift(b, (-total[0], -total[1])) for b in filled]
        moved = _spectra([prepare(b, usable) for b in bands], windows)
        # The products are tiny: threads would only wait for each other (5 times slower).
        with threadpool_limits(limits=1, user_api="blas"):
            found = _measure(fixed, moved, windows, max_shift_px, upsample)
        step = _combine(found)
        if not step.known:
            return result
        total = (total[0] + step.dy_px, total[1] + step.dx_px)
        result = replace(step, dy_px=total[0], dx_px=total[1])
    return _UNKNOWN if math.hypot(*total) > max_shift_px else result


def apply_shift(image: FloatArray, shift: tuple[float, float]) -> FloatArray:
    """Move the content of an image (down, right) by cubic interpolation; for measuring only."""
    moved: FloatArray = ndimage.shift(image, shift, order=3, mode="nearest")
    return moved


def _centred(image: FloatArray, valid: BoolArray) -> FloatArray:
    level = float(image[valid].mean()) if valid.any() else 0.0
    centred: FloatArray = np.where(valid, image - level, 0.0)
    return centred


@dataclass(frozen=True, slots=True)
class _Window:
    """One window: its pixels and the share of them that is valid, weighted by the taper."""

    rows: slice
    cols: slice
    share: float


def _taper(height: int, width: int) -> npt.NDArray[np.float32]:
    """Hann window that does not start at 0."""
    taper = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    return taper.astype(np.float32)


def _windows(usable: BoolArray, window_px: int) -> list[_Window]:
    """Windows with enough valid pixels, at most ``_MAX_WINDOWS`` of them, clearest first."""
    height, width = usable.shape
    size_y, size_x = min(window_px, height), min(window_px, width)
    taper = _taper(size_y, size_x)
    found = []
    for top in _window_starts(height, size_y):
        for left in _window_starts(width, size_x):
            rows, cols = slice(top, top + size_y), slice(left, left + size_x)
            share = float((usable[rows, cols] * taper).sum() / taper.sum())
            if share >= _MIN_VALID:
                found.append(_Window(rows, cols, share))
    return sorted(found, key=lambda w: -w.share)[:_MAX_WINDOWS]


def _spectra(
    bands: Sequence[FloatArray], windows: Sequence[_Window]
) -> list[list[npt.NDArray[np.complexfloating]]]:
    """Half-plane spectrum of every window and band."""
    if not windows:
        return []
    first = windows[0]
    taper = _taper(first.rows.stop - first.rows.start, first.cols.stop - first.cols.start)
    return [
        [fft.rfft2(band[w.rows, w.cols].astype(np.float32) * taper) for band in bands]
        for w in windows
    ]


def _measure(
    fixed: Sequence[Sequence[npt.NDArray[np.complexfloating]]],
    moved: Sequence[Sequence[npt.NDArray[np.complexfloating]]],
    windows: Sequence[_Window],
    max_shift_px: float,
    upsample: int,
) -> npt.NDArray[np.float64]:
    """(N, 4): down, right, peak height, valid share of each window and band."""
    found = []
    for window, refs, movs in zip(windows, fixed, moved, strict=True):
        shape = (window.rows.stop - window.rows.start, window.cols.stop - window.cols.start)
        for a, b in zip(refs, movs, strict=True):
            cross = b * np.conj(a)
            if not np.abs(cross).max() > 0.0:
                continue
            y, x, peak = _peak(cross, shape, max_shift_px, upsample, _SPECTRAL_SIGMA)
            found.append((y, x, peak, window.share))
    return np.array(found, dtype=np.float64).reshape(-1, 4)


def _weighted_median(values: FloatArray, weights: FloatArray) -> float:
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    return float(np.interp(0.5 * cumulative[-1], cumulative - 0.5 * weights[order], values[order]))


def _combine(windows: npt.NDArray[np.float64]) -> Shift:
    """Weighted median of the windows after rejection of low peaks and of outliers."""
    good = windows[windows[:, 2] >= _MIN_PEAK]
    if len(good) == 0:
        return _UNKNOWN
    keep = np.ones(len(good), dtype=bool)
    centre = (0.0, 0.0)
    for _ in range(3):
        weights = good[keep, 2] * good[keep, 3]
        centre = (
            _weighted_median(good[keep, 0], weights),
            _weighted_median(good[keep, 1], weights),
        )
        distance = np.hypot(good[:, 0] - centre[0], good[:, 1] - centre[1])
        spread = 1.4826 * float(np.median(distance[keep]))
        # The floor keeps windows that agree within the noise of a good match.
        keep = distance <= max(3.0 * spread, 0.15)
        if not keep.any():
            return _UNKNOWN
    distance = np.hypot(good[keep, 0] - centre[0], good[keep, 1] - centre[1])
    agree = float(keep.sum()) / len(windows)
    residual = 1.4826 * float(np.median(distance))
    # One window has nobody to agree with: its peak must speak for it.
    if len(good) == 1 and good[0, 2] < 2.0 * _MIN_PEAK:
        return _UNKNOWN
    return Shift(centre[0], centre[1], agree, residual, int(keep.sum()))


# --- many scenes -----------------------------------------------------------------------------


def solve_shifts(
    images: Sequence[FloatArray],
    valid: Sequence[BoolArray],
    *,
    reference: FloatArray | None = None,
    max_shift_px: float = 3.0,
    rounds: int = 2,
    window_px: int = 192,
) -> list[Shift]:
    """Shifts of all scenes of one grid in one frame.

    The clearest scene is the first reference; then each scene is measured against the mean of
    the others, put back by what is known so far. Without a reference image the frame is the mean
    over the scenes: only differences between scenes can be observed, a common shift of all of
    them against the world cannot, and none is claimed. With a reference image (a reference
    mosaic, another sensor) shifts are relative to it.

    Args:
        images: T arrays (H, W) or (B, H, W), reflectance, NaN invalid.
        valid: T arrays (H, W) bool, clear pixels.
        reference: Array like one of ``images``.
        max_shift_px: Larger shifts are unknown.
        rounds: Refinements against the mean of the others.
        window_px: Size of the windows.

    Returns:
        T shifts; unknown ones are NaN with reliability 0 and must be decided on by policy.

    Raises:
        SceneError: Lists of different lengths, or shapes differ.
    """
    if len(images) != len(valid):
        raise SceneError(f"{len(images)} images but {len(valid)} masks")
    if not images:
        return []
    if reference is not None:
        return [
            estimate_shift(reference, im, ok, max_shift_px=max_shift_px, window_px=window_px)
            for im, ok in zip(images, valid, strict=True)
        ]
    clearest = int(np.argmax([int(np.count_nonzero(v)) for v in valid]))
    first, seen = images[clearest], valid[clearest]
    shifts = [
        estimate_shift(first, im, ok & seen, max_shift_px=2.0 * max_shift_px, window_px=window_px)
        for im, ok in zip(images, valid, strict=True)
    ]
    shifts = _to_mean(shifts)
    for _ in range(rounds if len(images) > 2 else 0):
        shifts = _to_mean(_against_others(images, valid, shifts, max_shift_px, window_px))
    return [s if s.known and math.hypot(s.dy_px, s.dx_px) <= max_shift_px else _UNKNOWN
            for s in shifts]  # fmt: skip


def _to_mean(shifts: Sequence[Shift]) -> list[Shift]:
    known = [s for s in shifts if s.known]
    if not known:
        return list(shifts)
    dy = float(np.mean([s.dy_px for s in known]))
    dx = float(np.mean([s.dx_px for s in known]))
    return [replace(s, dy_px=s.dy_px - dy, dx_px=s.dx_px - dx) if s.known else s for s in shifts]


def _against_others(
    images: Sequence[FloatArray],
    valid: Sequence[BoolArray],
    shifts: Sequence[Shift],
    max_shift_px: float,
    window_px: int,
) -> list[Shift]:
    """Each scene against the mean of the others, all put back by their present shifts.

    The mean, because leaving one scene out of it costs a subtraction; clouds are masked before.
    """
    shape = images[0].shape if images[0].ndim == 3 else (1, *images[0].shape)
    total, count = np.zeros(shape, dtype=np.float32), np.zeros(shape[1:], dtype=np.float32)
    aligned = [_aligned(im, ok, s) for im, ok, s in zip(images, valid, shifts, strict=True)]
    for bands, weight in aligned:
        total += bands
        count += weight
    out = []
    for i, (image, ok) in enumerate(zip(images, valid, strict=True)):
        rest = count - aligned[i][1]
        with np.errstate(invalid="ignore", divide="ignore"):
            reference = np.where(rest > 0.5, (total - aligned[i][0]) / rest, np.nan)
        out.append(
            estimate_shift(
                reference,
                image if image.ndim == 3 else image[None],
                ok,
                max_shift_px=2.0 * max_shift_px,
                window_px=window_px,
            )
        )
    return out


def _aligned(
    image: FloatArray, ok: BoolArray, shift: Shift
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(B, H, W) values put back by the shift, 0 where invalid, and (H, W) weights 0 or 1."""
    bands = image if image.ndim == 3 else image[None]
    if not shift.known:
        return np.zeros(bands.shape, np.float32), np.zeros(bands.shape[1:], np.float32)
    fine = ok & np.isfinite(bands).all(axis=0)
    back = (-shift.dy_px, -shift.dx_px)
    weight = ndimage.shift(fine.astype(np.float32), back, order=1, mode="nearest") > 0.9
    moved = np.stack([apply_shift(b, back) for b in _fill(bands, fine)])
    return np.where(weight, moved, 0.0).astype(np.float32), weight.astype(np.float32)


def shifted_geobox(geobox: GeoBox, shift: Shift, *, pixel_m: float | None = None) -> GeoBox:
    """Geobox to read a scene with so that its content falls on the reference.

    Content that lies ``dx_px`` too far right is found ``dx_px`` further right in the file, so the
    geobox moves by (+dx_px right, +dy_px down); the array read is then taken as lying on the
    unmoved ``geobox``.

    Args:
        geobox: Target pixels.
        shift: Shift of the scene; an unknown one leaves the geobox as it is.
        pixel_m: Pixel size that the shift was measured on, in units of the CRS; None: that of
            ``geobox``.
    """
    if not shift.known:
        return geobox
    scale = 1.0 if pixel_m is None else pixel_m / abs(float(geobox.affine.a))
    moved = geobox.affine @ geobox.affine.translation(shift.dx_px * scale, shift.dy_px * scale)
    return GeoBox(geobox.shape, moved, geobox.crs)
