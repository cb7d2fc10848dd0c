"""Sub-pixel shifts between scenes, estimated on arrays and applied as an offset of the one warp.

Sign: a :class:`Shift` says how the CONTENT of a scene lies relative to the reference, ``dy_px``
down (south) and ``dx_px`` right (east), in pixels of the arrays compared. Content that lies too
far right is read from a window further right: :func:`shifted_geobox` adds the shift to the geobox
to read with, and the result lies on the reference. Nothing is resampled a second time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from scipy import ndimage

from terraloom.errors import SceneError
from terraloom.preprocess.matching import (
    MIN_STACK,
    MIN_VALID,
    Pair,
    TiePoints,
    match_windows,
    summed_peak,
)  # fmt: skip

__all__ = [
    "UNKNOWN", "Shift", "choose_windows", "combine", "estimate_shift", "shift_between",
    "shifted_geobox", "solve_shifts", "window_starts",
]  # fmt: skip

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

#: Windows that lie closer to the result than this agree with it, whatever their spread, pixels.
_AGREE_PX = 0.15
#: Share of the windows that must agree.
_MIN_AGREE = 0.25
#: Windows that scatter more than this have found different things, pixels.
_MAX_SPREAD_PX = 1.0
#: Windows whose summed surface gives the first guess ...
_FEW = 4
#: ... and how far from it the single ones look, in units of the smoothing.
_NEAR_PX = 1.25


@dataclass(frozen=True, slots=True)
class Shift:
    """Position of a scene's content relative to the reference.

    Attributes:
        dy_px: Downwards (south), pixels; NaN when it could not be told.
        dx_px: To the right (east), pixels.
        reliability: 0-1; share of the windows that agree with the result, at most half for one
            window alone, 0 when unknown.
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

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Shift:
        """Shift of a record of ``shifts.json``, whose further keys are left alone; null is NaN."""
        names = ("dy_px", "dx_px", "reliability", "residual_px")
        dy, dx, reliability, residual = (
            math.nan if record[k] is None else float(record[k]) for k in names
        )
        return cls(dy, dx, reliability, residual, int(record["n_windows"]))


UNKNOWN = Shift(math.nan, math.nan, 0.0, math.nan, 0)


# --- one scene -------------------------------------------------------------------------------


def estimate_shift(
    reference: FloatArray,
    moving: FloatArray,
    valid: BoolArray | None = None,
    *,
    max_shift_px: float = 3.0,
    window_px: int = 256,
    max_windows: int = 9,
    gradient: bool = True,
    sigma_px: float = 1.2,
) -> Shift:
    """Shift of a scene's content relative to a reference on the same grid.

    A few windows are enough: they are chosen where both images are clear and textured, far from
    each other. Their correlation surfaces are added up for a first, whole answer; from there each
    window is measured by itself, and the weighted median of those that agree is the result.

    Args:
        reference: (H, W) or (B, H, W) reflectance, NaN invalid.
        moving: Same shape.
        valid: (H, W) bool, pixels that are clear in both; NaN is invalid anyway.
        max_shift_px: Larger shifts are not looked for; a result beyond it is unknown.
        window_px: Size of the windows.
        max_windows: Most windows that are measured.
        gradient: Compare edges, for scenes of different seasons; False compares reflectance.
        sigma_px: Smoothing, pixels; more for noisy images such as radar.

    Returns:
        Down and right shift of the content of ``moving``; unknown (NaN, reliability 0) when too
        few windows are clear or agree.

    Raises:
        SceneError: Shapes differ.
    """
    ref = reference[None] if reference.ndim == 2 else reference
    mov = moving[None] if moving.ndim == 2 else moving
    if ref.shape != mov.shape or (valid is not None and valid.shape != ref.shape[1:]):
        shapes = f"reference {ref.shape} and scene {mov.shape}"
        raise SceneError(f"{shapes} and their mask differ in shape", fix="read them on one grid")
    size = min(window_px, ref.shape[1]), min(window_px, ref.shape[2])
    pair = Pair(ref, mov, valid, size, gradient, sigma_px)
    corners = choose_windows(pair, max_windows, pair.reach + math.ceil(max_shift_px))
    guess = _first_guess(pair, corners, max_shift_px)
    if guess is None:
        return UNKNOWN
    near = _NEAR_PX * pair.sigma_px
    found = combine(match_windows(pair, corners, max_shift_px=near, start=guess))
    far = found.known and math.hypot(found.dy_px, found.dx_px) > max_shift_px
    return UNKNOWN if far else found


def _first_guess(
    pair: Pair, corners: npt.NDArray[np.int64], max_shift_px: float
) -> tuple[float, float] | None:
    """Summed peak of a few windows; of all, if these do not say; None: unknown."""
    for n in (_FEW, len(corners)):
        if n <= len(corners) and len(corners) > 0:
            y, x, height = summed_peak(pair, corners[:n], max_shift_px)
            if height >= MIN_STACK:
                return y, x
    return None


def _weighted_median(values: FloatArray, weights: FloatArray) -> float:
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    return float(np.interp(0.5 * cumulative[-1], cumulative - 0.5 * weights[order], values[order]))


def combine(points: TiePoints) -> Shift:
    """Weighted median of the windows after rejection of low peaks and of outliers."""
    seen = points.shares >= MIN_VALID
    good = np.isfinite(points.shifts).all(axis=1)
    if not good.any():
        return UNKNOWN
    shifts, weights = points.shifts[good], (points.peaks * points.shares)[good]
    keep = np.ones(len(shifts), dtype=bool)
    centre = np.zeros(2)
    for _ in range(3):
        centre = np.array([_weighted_median(shifts[keep, k], weights[keep]) for k in (0, 1)])
        distance = np.hypot(*(shifts - centre).T)
        spread = 1.4826 * float(np.median(distance[keep]))
        # The floor keeps windows that agree within the noise of a good match.
        keep = distance <= max(3.0 * spread, _AGREE_PX)
        if not keep.any():
            return UNKNOWN
    agree = float(keep.sum()) / max(int(seen.sum()), 1)
    residual = 1.4826 * float(np.median(distance[keep]))
    # One window has nobody to agree with: its peak must speak for it.
    alone = keep.sum() == 1 and points.peaks[good][keep][0] < MIN_STACK
    if agree < _MIN_AGREE or alone or residual > _MAX_SPREAD_PX:
        return UNKNOWN
    # It is given half the trust at most.
    trust = agree if keep.sum() > 1 else 0.5 * agree
    return Shift(float(centre[0]), float(centre[1]), trust, residual, int(keep.sum()))


# --- choice of windows -----------------------------------------------------------------------


def choose_windows(pair: Pair, most: int, margin_px: int) -> IntArray:
    """Corners of at most so many windows, clear and textured ones, far from each other.

    Args:
        pair: The images.
        most: Largest number of windows.
        margin_px: Windows keep this far from the border where the image is large enough.

    Returns:
        (N, 2) upper row and left column; the first ones promise most.
    """
    corners, worth = _candidates(pair, margin_px)
    if len(corners) == 0:
        return corners
    at = corners / np.array(pair.size)
    chosen = [int(np.argmax(worth))]
    apart = np.full(len(corners), np.inf)
    while len(chosen) < min(most, len(corners)):
        apart = np.minimum(apart, np.hypot(*(at - at[chosen[-1]]).T))
        score = worth * np.sqrt(apart)
        score[chosen] = -1.0
        chosen.append(int(np.argmax(score)))
    return corners[chosen]


def window_starts(length: int, size: int, margin: int, stride: int) -> IntArray:
    """First pixels of windows at most ``stride`` apart that keep off the border."""
    free = max(length - size, 0)
    margin = min(margin, free // 2)
    n = math.ceil((free - 2 * margin) / stride) + 1
    return np.unique(np.linspace(margin, free - margin, n).round().astype(np.int64))


def _candidates(pair: Pair, margin: int) -> tuple[IntArray, FloatArray]:
    """(N, 2) corners of all windows and (N,) how much each promises: valid and not flat."""
    thin = max(1, min(pair.size) // 16)
    views = [bands[0, ::thin, ::thin] for bands in (pair.reference, pair.moving)]
    fine = np.isfinite(views[0]) & np.isfinite(views[1])
    if pair.valid is not None:
        fine &= pair.valid[::thin, ::thin]
    rows, cols = (
        window_starts(n, size, margin, max(size * 2 // 3, 1))
        for n, size in zip(pair.reference.shape[1:], pair.size, strict=True)
    )
    corners = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
    first = corners // thin
    last = np.minimum(first + [max(s // thin, 1) for s in pair.size], fine.shape)
    count = _box_sums(fine.astype(np.float64), first, last)
    share = count / np.maximum(np.prod(last - first, axis=1), 1)
    contrasts = []
    for view in views:
        known = np.where(fine, view, 0.0).astype(np.float64)
        known -= known.sum() / max(int(fine.sum()), 1) * fine
        mean, power = (_box_sums(v, first, last) / np.maximum(count, 1) for v in (known, known**2))
        contrasts.append(np.sqrt(np.maximum(power - mean**2, 0.0)))
    good = share >= MIN_VALID
    corners, share, contrast = corners[good], share[good], np.array(contrasts)[:, good]
    if len(corners) == 0:
        return corners, share
    typical = np.maximum(np.median(contrast, axis=1, keepdims=True), 1e-12)
    return corners, share * np.minimum((contrast / typical).min(axis=0), 1.0)


def _box_sums(values: FloatArray, first: IntArray, last: IntArray) -> npt.NDArray[np.float64]:
    """(N,) sums of boxes, from one table of cumulative sums."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    (r0, c0), (r1, c1) = first.T, last.T
    sums: npt.NDArray[np.float64] = table[r1, c1] - table[r0, c1] - table[r1, c0] + table[r0, c0]
    return sums


# --- many scenes -----------------------------------------------------------------------------


def shift_between(
    reference: FloatArray,
    moving: FloatArray,
    valid: BoolArray | None = None,
    *,
    max_shift_px: float,
    sigma_px: float = 1.2,
) -> Shift:
    """Shift of a scene by the first way of looking that tells one; see :func:`estimate_shift`.

    Tried in turn: edges in a dozen windows; in more and larger ones (haze, few fields); values
    (smooth scenes of one season). Windows fit four times into a small image, so that they can be
    held against each other.
    """
    side = min(reference.shape[-2:])
    small, large = min(max(side // 2, 64), 256), min(side, 384)
    for window_px, most, gradient in ((small, 12, True), (large, 25, True), (small, 25, False)):
        found = estimate_shift(
            reference, moving, valid, max_shift_px=max_shift_px, window_px=window_px,
            max_windows=most, gradient=gradient, sigma_px=sigma_px,
        )  # fmt: skip
        if found.known and found.n_windows < _FEW and small > 64:
            # Clouds leave no more large windows: smaller ones can be held against each other.
            more = estimate_shift(
                reference, moving, valid, max_shift_px=max_shift_px,
                window_px=max(small // 2, 64), max_windows=25, gradient=gradient,
                sigma_px=sigma_px,
            )  # fmt: skip
            return more if more.n_windows > found.n_windows else found
        if found.known:
            return found
    return UNKNOWN


def solve_shifts(
    images: Sequence[FloatArray],
    valid: Sequence[BoolArray] | None = None,
    *,
    reference: FloatArray | None = None,
    max_shift_px: float = 3.0,
    rounds: int = 2,
    sigma_px: float = 1.2,
) -> list[Shift]:
    """Shifts of all scenes of one grid in one frame.

    The clearest scene is the first reference; then each scene is measured against the mean of
    the others, put back by what is known so far. Without a reference image the frame is the mean
    over the scenes: only differences between scenes can be observed, a common shift of all of
    them against the world cannot, and none is claimed. With a reference image (a reference
    mosaic, another sensor) shifts are relative to it.

    Args:
        images: T arrays (H, W) or (B, H, W), reflectance, NaN invalid.
        valid: T arrays (H, W) bool, clear pixels; None: whatever is not NaN.
        reference: Array like one of ``images``.
        max_shift_px: Larger shifts are unknown.
        rounds: Refinements against the mean of the others.
        sigma_px: Smoothing.

    Returns:
        T shifts; unknown ones are NaN with reliability 0 and must be decided on by policy.

    Raises:
        SceneError: Lists of different lengths, or shapes differ.
    """
    if valid is not None and len(images) != len(valid):
        raise SceneError(f"{len(images)} images but {len(valid)} masks")
    if not images:
        return []
    bands = [image if image.ndim == 3 else image[None] for image in images]
    clear: list[BoolArray] = [np.asarray(np.isfinite(b).all(axis=0)) for b in bands]
    if valid is not None:
        clear = [seen & ok for seen, ok in zip(clear, valid, strict=True)]
    look = {"max_shift_px": 2.0 * max_shift_px, "sigma_px": sigma_px}
    if reference is not None:
        fixed = reference if reference.ndim == 3 else reference[None]
        found = [shift_between(fixed, b, ok, **look) for b, ok in zip(bands, clear, strict=True)]
        return [_within(s, max_shift_px) for s in found]
    first = int(np.argmax([int(np.count_nonzero(ok)) for ok in clear]))
    shifts = []
    for t, (image, ok) in enumerate(zip(bands, clear, strict=True)):
        same = Shift(0.0, 0.0, 1.0, 0.0, 1) if t == first and ok.any() else None
        shifts.append(same or shift_between(bands[first], image, ok & clear[first], **look))
    shifts = to_mean(shifts)
    for _ in range(rounds if len(images) > 2 else 0):
        shifts = to_mean(_against_others(bands, clear, shifts, look))
    if sum(s.known for s in shifts) < min(len(shifts), 2):
        return [UNKNOWN] * len(shifts)  # the first reference agrees with itself alone
    return [_within(s, max_shift_px) for s in shifts]


def _within(shift: Shift, max_shift_px: float) -> Shift:
    near = shift.known and math.hypot(shift.dy_px, shift.dx_px) <= max_shift_px
    return shift if near else UNKNOWN


def moved_by(shift: Shift, dy_px: float, dx_px: float) -> Shift:
    """The shift in a frame that lies elsewhere; an unknown one stays unknown."""
    return replace(shift, dy_px=shift.dy_px + dy_px, dx_px=shift.dx_px + dx_px)


def to_mean(shifts: Sequence[Shift]) -> list[Shift]:
    """Shifts in the frame in which their mean is 0."""
    known = [s for s in shifts if s.known]
    if not known:
        return list(shifts)
    dy = float(np.mean([s.dy_px for s in known]))
    dx = float(np.mean([s.dx_px for s in known]))
    return [moved_by(s, -dy, -dx) for s in shifts]


def _against_others(
    images: Sequence[FloatArray],
    clear: Sequence[BoolArray],
    shifts: Sequence[Shift],
    look: Mapping[str, float],
) -> list[Shift]:
    """Each scene against the mean of the others, all put back by their present shifts.

    The mean, because leaving one scene out of it costs a subtraction; clouds are masked before.
    """
    back = [put_back(*scene) for scene in zip(images, clear, shifts, strict=True)]
    total = np.stack([values for values, _ in back]).sum(axis=0)
    count = np.stack([weight for _, weight in back]).sum(axis=0)
    out = []
    for image, ok, (values, weight) in zip(images, clear, back, strict=True):
        out.append(shift_between(without(total, count, values, weight), image, ok, **look))
    return out


def without(
    total: FloatArray, count: FloatArray, values: FloatArray, weight: FloatArray
) -> npt.NDArray[np.float32]:
    """Mean of scenes without one of them; NaN where no other is clear."""
    rest = count - weight
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(rest > 0.5, (total - values) / rest, np.float32(np.nan))


def put_back(
    image: FloatArray, ok: BoolArray, shift: Shift
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A scene put back by its shift, by a windowed sinc of 6 x 6 pixels; for measuring only.

    Returns:
        (B, H, W) values, 0 where invalid, and (H, W) weights 0 or 1.
    """
    h, w = ok.shape
    values, weight = np.zeros(image.shape, np.float32), np.zeros((h, w), np.float32)
    if not shift.known or not ok.any():
        return values, weight
    (dy, ty), (dx, tx) = (_taps(v) for v in (shift.dy_px, shift.dx_px))
    # The pixel at r comes from r + dy and its neighbours: what lies outside stays 0.
    to = slice(max(0, -dy), min(h, h - dy)), slice(max(0, -dx), min(w, w - dx))
    came = slice(max(0, dy), min(h, h + dy)), slice(max(0, dx), min(w, w + dx))
    whole = ndimage.minimum_filter(ok, size=(len(ty), len(tx)), mode="constant")
    weight[to] = whole[came]
    for k, band in enumerate(image):
        filled = np.where(ok, band, np.float32(band[ok].mean())).astype(np.float32)
        moved = ndimage.correlate1d(ndimage.correlate1d(filled, ty, axis=0), tx, axis=1)
        values[k][to] = moved[came]
    return values * weight, weight


def _taps(shift_px: float) -> tuple[int, FloatArray]:
    """Whole pixels of a shift, and a filter for its fraction (Lanczos of 3 lobes)."""
    whole = round(shift_px)
    if shift_px == whole:
        return whole, np.ones(1)
    at = np.arange(-3, 4) - (shift_px - whole)
    taps = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0.0)
    return whole, taps / taps.sum()


# --- use -----------------------------------------------------------------------------------------


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
