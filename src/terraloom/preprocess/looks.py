"""What is compared when scenes are aligned: a few clear blocks of the area, side by side.

Blocks instead of the whole area keep reading and memory bounded. They are laid into one array,
with gaps, so that whatever compares images need not know of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox

from terraloom.acquire.sources import load_source
from terraloom.errors import SceneError
from terraloom.grid import CampaignGrid, coarsen, pad
from terraloom.io import geobox_of, read_window
from terraloom.preprocess.coregister import Shift, choose_windows
from terraloom.preprocess.field import (
    WINDOW_PX,
    ShiftField,
    fit_field,
    spacing_for,
    tie_points,
)
from terraloom.preprocess.matching import Pair, TiePoints, match_windows
from terraloom.preprocess.placed import read_placed
from terraloom.preprocess.reasons import INVALID
from terraloom.preprocess.stack import Scene, mask_on

__all__ = ["Look", "choose_blocks", "measure_fields", "pixels_per", "read_look", "residuals"]

Float32 = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.floating]

#: Spectral parts that are compared, in order of preference; each by the first band a source has.
_PARTS = (("B04",), ("B08", "B8A"), ("B11",), ("B03",))
#: So many of them: two bands err less than one.
_MOST_PARTS = 2
#: Values held in memory at a time (float32), which bounds the size of the blocks.
_VALUES = 64e6
#: Blocks, and their least and largest side, pixels.
_BLOCKS, _LEAST_PX, _MOST_PX = 4, 384, 1024
#: More blocks than usual where some scenes would be seen in none.
_MOST_BLOCKS = 8
#: Candidate places along each axis.
_PLACES = 9
#: Rows without data between two blocks.
_GAP = 16
#: Masks are looked at in pixels of this size to choose blocks, campaign pixels.
_COARSE = 6
#: Side of the pieces in which a field is measured, pixels.
_PIECE_PX = 1024


@dataclass(frozen=True)
class Look:
    """Blocks that are compared, and by what.

    Attributes:
        blocks: Pixels of the blocks, all of one shape.
        roles: Alternatives of each spectral part, by Sentinel-2 names; none for radar.
        factor: Campaign pixels along one pixel of the blocks.
    """

    blocks: tuple[GeoBox, ...]
    roles: tuple[tuple[str, ...], ...]
    factor: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the array that holds all blocks."""
        h, w = self.blocks[0].shape
        return len(self.blocks) * (h + _GAP) - _GAP, w

    def lay(self, parts: Sequence[Float32]) -> Float32:
        """Blocks (B, h, w) below each other in one array (B, H, W), NaN between them."""
        h, _ = self.blocks[0].shape
        out = np.full((len(parts[0]), *self.shape), np.nan, np.float32)
        for k, part in enumerate(parts):
            out[:, k * (h + _GAP) : k * (h + _GAP) + h] = part
        return out

    def bands(self, scene: Scene) -> list[str]:
        """Bands of a scene that are compared."""
        item = scene.item
        table = load_source(str(item["source"]))
        if table.kind == "sar":
            return [b for b in table.bands if b in item["assets"]][:_MOST_PARTS]
        return [_band(scene, options) or "" for options in self.roles]

    def read_reference(self, path: Path) -> Float32:
        """A given image on the blocks: its bands of the same names, else its first one.

        Raises:
            SceneError: The image is missing, cannot be read or covers none of the blocks.
        """
        import rasterio
        from rasterio.errors import RasterioError

        native = geobox_of(path)
        try:
            with rasterio.open(path) as src:
                names, nodata = list(src.descriptions), src.nodata
        except RasterioError as err:
            raise SceneError(f"the image cannot be read ({err})", where=str(path)) from err
        bands = [next((names.index(n) + 1 for n in o if n in names), 0) for o in self.roles]
        bands = bands if all(bands) else [1] * max(len(bands), 1)
        coarse = self.blocks[0].resolution.x > 1.5 * abs(native.resolution.x)
        parts = []
        for block in self.blocks:
            values = np.stack(
                [
                    read_window(path, block, band=b, resampling="average" if coarse else "cubic")
                    for b in bands
                ]
            ).astype(np.float32)
            # Pixels outside hold the nodata value, or 0 where the image has none.
            values[values == np.float32(0 if nodata is None else nodata)] = np.nan
            parts.append(values)
        out = self.lay(parts)
        if not np.isfinite(out).any():
            raise SceneError(
                "the image covers none of the clear area", where=f"coregister.reference: {path}",
                allowed="a GeoTIFF that covers the area of interest",
                fix="give another image, or one of mean, clearest, median",
            )  # fmt: skip
        return out


def _band(scene: Scene, options: Sequence[str]) -> str | None:
    roles = load_source(str(scene.item["source"])).roles()
    return next((roles[o] for o in options if roles.get(o) in scene.item["assets"]), None)


def _shared(scenes: Sequence[Scene]) -> tuple[tuple[str, ...], ...]:
    """Spectral parts that all optical scenes have."""
    optical = [s for s in scenes if load_source(str(s.item["source"])).kind == "optical"]
    parts = [o for o in _PARTS if optical and all(_band(s, o) for s in optical)]
    return tuple(parts[:_MOST_PARTS])


def pixels_per(scenes: Sequence[Scene], grid: CampaignGrid) -> int:
    """Campaign pixels along one pixel on which scenes can be compared: that of the coarsest."""
    sizes = [grid.resolution_m]
    for scene in scenes:
        bands = [b for b in (_band(scene, o) for o in _shared([scene])) if b]
        sizes += [float(scene.item["assets"][b]["resolution_m"]) for b in bands]
    # The lattice of the grid holds pixels of these sizes whole.
    wanted = max(sizes) / grid.resolution_m
    return next((f for f in (1, 2, 3) if wanted <= f + 0.01), _COARSE)


def choose_blocks(scenes: Sequence[Scene], grid: CampaignGrid, factor: int, held: int) -> Look:
    """Blocks where many scenes are clear, and every scene somewhere.

    Args:
        scenes: The scenes to compare.
        grid: Grid of the campaign.
        factor: Campaign pixels along one pixel of the blocks.
        held: Scenes that are held in memory at a time.

    Raises:
        SceneError: Optical scenes have no band in common that can be compared.
    """
    roles = _shared(scenes)
    if not roles and any(load_source(str(s.item["source"])).kind == "optical" for s in scenes):
        raise SceneError(
            "the scenes have no band in common that could be compared to align them",
            where=", ".join(dict.fromkeys(str(s.item["source"]) for s in scenes)),
            allowed="one of red (B04), near infrared (B08, B8A), SWIR (B11), green (B03)",
            fix="add one of these bands to sources[].bands, or set coregister.enabled to false",
        )
    geobox = coarsen(grid.geobox, factor)
    side = math.sqrt(_VALUES / (max(held, 2) * max(len(roles), 1) * _BLOCKS))
    side = min(max(int(side), _LEAST_PX), _MOST_PX)
    h, w = (min(side, n) for n in geobox.shape)
    rows, cols = (_places(n, s) for n, s in zip(geobox.shape, (h, w), strict=True))
    places = [(r, c) for r in rows for c in cols]
    if len(places) > _BLOCKS:
        shares = _clear_shares(scenes, grid, places, (h, w), factor)
        places = [places[i] for i in _greedy(shares)]
    blocks = tuple(geobox[r : r + h, c : c + w] for r, c in places)
    return Look(blocks, roles, factor)


def _places(length: int, size: int) -> list[int]:
    """First pixels of blocks beside each other, spread over the length."""
    n = min(_PLACES, length // size)
    if n == 1:
        return [(length - size) // 2]
    return [int(v) for v in np.linspace(0, length - size, n).round()]


def _clear_shares(
    scenes: Sequence[Scene], grid: CampaignGrid, places: Sequence[tuple[int, int]],
    size: tuple[int, int], factor: int,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """(T, N): share of each place that is clear in each scene and inside the AOI."""
    from rasterio.features import geometry_mask

    view = coarsen(grid.geobox, _COARSE)
    inside = geometry_mask([grid.aoi], out_shape=view.shape, transform=view.affine, invert=True)
    scale = factor / _COARSE
    shares = np.zeros((len(scenes), len(places)))
    for t, scene in enumerate(scenes):
        bare = replace(scene, shift=None, field=None)
        clear = ((mask_on(view, bare) & np.uint8(INVALID)) == 0) & inside
        for n, (r, c) in enumerate(places):
            cut = clear[
                int(r * scale) : math.ceil((r + size[0]) * scale),
                int(c * scale) : math.ceil((c + size[1]) * scale),
            ]
            shares[t, n] = cut.mean()
    return shares


def _greedy(shares: npt.NDArray[np.float64]) -> list[int]:
    """Places one after the other, each where the scenes seen least so far are clear."""
    seen = np.zeros(len(shares))
    chosen: list[int] = []
    while len(chosen) < min(_MOST_BLOCKS, shares.shape[1]):
        if len(chosen) >= _BLOCKS and (seen >= np.minimum(0.5, shares.max(axis=1))).all():
            break
        gain = (shares / (1.0 + 4.0 * seen[:, None])).sum(axis=0)
        gain[chosen] = -1.0
        chosen.append(int(np.argmax(gain)))
        seen += shares[:, chosen[-1]]
    return sorted(chosen)


def read_look(
    scene: Scene, look: Look, shift: Shift | None = None, field: ShiftField | None = None
) -> Float32:
    """A scene on the blocks, (B, H, W), NaN where it is not clear; aligned if a shift is given.

    Raises:
        SceneError: An asset cannot be read.
    """
    return look.lay([_read(scene, look, block, shift, field) for block in look.blocks])


def _read(
    scene: Scene, look: Look, block: GeoBox, shift: Shift | None, field: ShiftField | None
) -> Float32:
    moved = replace(scene, shift=shift, field=field)
    bad = (mask_on(block, moved) & np.uint8(INVALID)) != 0
    bands = [read_placed(scene.item, b, block, shift, field) for b in look.bands(scene)]
    image = np.stack(bands)
    image[:, bad] = np.nan
    return image


def residuals(reference: Float32, image: Float32, shift: Shift | None) -> float:
    """Median distance of an image's windows from the reference, pixels; NaN where unknown.

    Args:
        reference: (B, H, W).
        image: (B, H, W), which lies off by about ``shift``.
        shift: Where to look for it; None: in place.
    """
    side = min(max(min(image.shape[1:]) // 2, 64), 256)
    pair = Pair(reference, image, None, (min(side, image.shape[1]), min(side, image.shape[2])))
    corners = choose_windows(pair, 12, pair.reach)
    start = (0.0, 0.0) if shift is None else (shift.dy_px, shift.dx_px)
    points = match_windows(pair, corners, max_shift_px=1.5, start=start)
    away = np.hypot(*points.shifts.T)
    away = away[np.isfinite(away)]
    return float(np.median(away)) if len(away) else math.nan


# --- fields ----------------------------------------------------------------------------------


def measure_fields(
    scenes: Sequence[Scene],
    base: Sequence[Scene],
    shifts: Mapping[str, Shift],
    grid: CampaignGrid,
    max_px: float,
    given: Path | None,
) -> dict[str, ShiftField]:
    """Local shifts of scenes of one source, piece by piece of the area.

    Args:
        scenes: Scenes with a known shift.
        base: Scenes whose mean they are compared with, each without itself.
        shifts: Item id: global shift, campaign pixels.
        grid: Grid of the campaign.
        max_px: Largest shift, campaign pixels.
        given: A reference image in place of the mean.

    Returns:
        Item id: field, for the scenes that have one.
    """
    if not scenes:
        return {}
    factor = pixels_per(scenes[:1], grid)
    geobox = coarsen(grid.geobox, factor)
    spacing = spacing_for((geobox.height, geobox.width))
    parts: dict[str, list[TiePoints]] = {str(s.item["id"]): [] for s in scenes}
    roles = _shared([*scenes, *base])
    for top in range(0, geobox.height, _PIECE_PX):
        for left in range(0, geobox.width, _PIECE_PX):
            h, w = min(_PIECE_PX, geobox.height - top), min(_PIECE_PX, geobox.width - left)
            piece = pad(geobox[top : top + h, left : left + w], WINDOW_PX // 2)
            look = Look((piece,), roles, factor)
            for name, points in _piece(scenes, base, shifts, look, max_px, given, spacing).items():
                # Centres on the far edges belong to the next piece.
                mine = (points.rows < h + WINDOW_PX // 2 - 1) & (
                    points.cols < w + WINDOW_PX // 2 - 1
                )
                parts[name].append(_moved(points, mine, top, left))
    fields = {}
    for name, pieces in parts.items():
        own = _per(shifts[name], factor)
        field = fit_field(
            _joined(pieces), own, geobox, max_shift_px=max_px / factor, spacing_px=spacing
        )
        if field is not None:
            fields[name] = field
    return fields


def _piece(
    scenes: Sequence[Scene], base: Sequence[Scene], shifts: Mapping[str, Shift], look: Look,
    max_px: float, given: Path | None, spacing_px: int,
) -> dict[str, TiePoints]:  # fmt: skip
    """Tie points of all scenes on one piece."""
    names = {str(s.item["id"]) for s in base}
    total = np.zeros((max(len(look.roles), 1), *look.shape), np.float32)
    count = np.zeros(total.shape, np.float32)
    fixed = None if given is None else look.read_reference(given)
    for scene in base if fixed is None else ():
        image = read_look(scene, look, shifts[str(scene.item["id"])])
        total += np.nan_to_num(image)
        count += np.isfinite(image)
    found = {}
    for scene in scenes:
        name = str(scene.item["id"])
        reference = fixed
        if reference is None:
            placed = read_look(scene, look, shifts[name]) if name in names else None
            rest = count if placed is None else count - np.isfinite(placed)
            others = total if placed is None else total - np.nan_to_num(placed)
            with np.errstate(invalid="ignore", divide="ignore"):
                reference = np.where(rest > 0.5, others / rest, np.nan).astype(np.float32)
        own = _per(shifts[name], look.factor)
        points = tie_points(
            reference, read_look(scene, look), None, own,
            max_shift_px=max_px / look.factor, spacing_px=spacing_px,
        )  # fmt: skip
        if fixed is None and name in names:
            # Off the others by n / (n - 1) of what it lies off the mean of all n, itself included.
            n = max(float(count[count > 0].mean()) if count.any() else 2.0, 2.0)
            middle = np.array([own.dy_px, own.dx_px])
            points = replace(points, shifts=middle + (points.shifts - middle) * (n - 1) / n)
        found[name] = points
    return found


def _per(shift: Shift, factor: int) -> Shift:
    """A shift in pixels ``factor`` times as large."""
    return replace(shift, dy_px=shift.dy_px / factor, dx_px=shift.dx_px / factor)


def _moved(points: TiePoints, keep: npt.NDArray[np.bool_], top: int, left: int) -> TiePoints:
    """Tie points of a piece in pixels of the area."""
    half = WINDOW_PX // 2
    return TiePoints(
        points.rows[keep] - half + top, points.cols[keep] - half + left,
        points.shifts[keep], points.peaks[keep], points.shares[keep],
    )  # fmt: skip


def _joined(parts: Sequence[TiePoints]) -> TiePoints:
    def one(name: str) -> Any:
        return np.concatenate([getattr(p, name) for p in parts])

    return TiePoints(one("rows"), one("cols"), one("shifts"), one("peaks"), one("shares"))
