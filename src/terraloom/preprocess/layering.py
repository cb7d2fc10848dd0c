"""The layers of a tile's cube, computed and written block by block."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox
from scipy import ndimage

from terraloom.config.campaign import Campaign, Cube
from terraloom.grid import CampaignGrid, Tile, coarsen, pad
from terraloom.preprocess.composites import (
    best_pixel,
    geometric_median,
    mean,
    median,
    medoid,
    pixel_scores,
)
from terraloom.preprocess.fill import fill_linear, fill_whittaker
from terraloom.preprocess.reasons import INVALID, Reason
from terraloom.preprocess.speckle import WINDOW_PX, mean_db, multitemporal, to_db, to_power
from terraloom.preprocess.stack import Block, Scene, Stacks, is_clear, mask_on
from terraloom.preprocess.tilestore import CHUNK_PX, TileStore, decode, encode

__all__ = ["Group", "Layer", "Step", "Unit", "assemble"]

Float = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

#: Most values of a block that is read at once (float32, 128 MB); two are in memory.
_VALUES = 1 << 25
#: Clouds farther away than this do not lower the score of the best pixel, metres.
_REACH_M = 1000.0
_CLOUDY = np.uint8(Reason.CLOUD | Reason.CLOUD_EDGE | Reason.SHADOW)
_VECTORS = {"medoid": medoid, "geometric_median": geometric_median}


@dataclass(frozen=True)
class Group:
    """Bands of one sensor at one pixel size.

    Attributes:
        name: ``<sensor>_<pixel size>``.
        sources: Keys of the sources whose scenes it is made of.
        bands: Keys of its bands.
        res_m: Pixel size, metres.
        kind: ``optical``, ``sar``, ``index``, ``polsar``, ``dem`` or ``other``.
        unit: Unit of the values.
        static: One image for all time.
        roles: Band: the Sentinel-2 band that plays the same spectral part.
    """

    name: str
    sources: tuple[str, ...]
    bands: tuple[str, ...]
    res_m: int
    kind: str
    unit: str
    static: bool
    roles: Mapping[str, str]

    def record(self) -> list[Any]:
        """What of it decides the values."""
        same = [self.name, self.sources, self.bands, self.kind, self.unit, self.static]
        return [*same, dict(self.roles)]

    @property
    def dtype(self) -> str:
        """Data type that values are stored in."""
        return "uint16" if self.unit == "reflectance" else "float32"

    def attrs(self) -> dict[str, Any]:
        """Attributes of its variable, see :func:`terraloom.preprocess.groups.group_facts`."""
        return {
            "kind": self.kind, "unit": self.unit, "source": ", ".join(self.sources),
            "roles": json.dumps(dict(self.roles), sort_keys=True),
        }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step in time: a period or a day, with its day since 1970 (the middle of a period)."""

    name: str
    day: float


@dataclass(frozen=True)
class Unit:
    """Scenes that are read together, and the steps of the cube that come of them.

    Attributes:
        period: Name of their period; empty for static layers.
        scenes: T scenes.
        steps: Position of a step in the layer: the scenes it is made of. 0 for static layers.
    """

    period: str
    scenes: Sequence[Scene]
    steps: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """One group with its steps in time, the same for all tiles, and the work to fill them."""

    group: Group
    steps: tuple[Step, ...]
    units: tuple[Unit, ...]

    def unit_name(self, unit: Unit) -> str:
        """Name of a unit in the digests of a store."""
        names = [self.steps[n].name for n in unit.steps] if self.steps else ["static"]
        return f"{unit.period}/{','.join(names)}"


# --- masks of a period ---------------------------------------------------------------------------


class _Clear:
    """Where the scenes of a period are clear, whole tile, as bits; asked for by block.

    The bits of a scene are read once for all groups of a pixel size.
    """

    def __init__(self, stacks: Stacks, tile: Tile) -> None:
        self._stacks, self._tile = stacks, tile
        self._bits: dict[tuple[str, int], Bits] = {}
        self._distance: dict[tuple[str, int], Bits] = {}

    def __call__(self, scene: Scene, block: Block) -> Bool | None:
        if not scene.masks:
            return None
        width = block.geobox.shape[1] - 2 * block.halo
        packed = self._bits[_key(scene, block.geobox)][block.rows]
        return np.unpackbits(packed, axis=1, count=width).astype(bool)

    def distance_m(self, scene: Scene, block: Block) -> Float:
        """Metres to the nearest cloud or shadow, (h, w), at most ``_REACH_M``."""
        if not scene.masks:
            return np.full(block.geobox.shape, _REACH_M, np.float32)
        steps = self._distance[_key(scene, block.geobox)][block.rows]
        return steps.astype(np.float32) * np.float32(_REACH_M / 255)

    def summary(self, scenes: Sequence[Scene]) -> tuple[Bits, Bits]:
        """Clear looks at each 10 m pixel and all reasons seen there, both (H, W)."""
        count = np.zeros(self._tile.geobox.shape, np.uint8)
        reasons = np.zeros(self._tile.geobox.shape, np.uint8)
        for start in range(0, len(scenes), 4):
            some = scenes[start : start + 4]
            for scene, bits in zip(some, self._stacks.each(self._whole, some), strict=True):
                clear = is_clear(bits)
                count += clear
                reasons |= bits
                self._bits[_key(scene, self._tile.geobox)] = np.packbits(clear, axis=1)
        return count, reasons & np.uint8(INVALID)

    def _whole(self, scene: Scene) -> Bits:
        return mask_on(self._tile.geobox, scene)

    def load(self, scenes: Sequence[Scene], geobox: GeoBox, *, distance: bool) -> None:
        """Read what is not known yet of some scenes at the pixels of a group."""

        def one(scene: Scene) -> None:
            key = _key(scene, geobox)
            if key not in self._bits:
                self._bits[key] = np.packbits(is_clear(mask_on(geobox, scene)), axis=1)
            if distance and key not in self._distance:
                self._distance[key] = _cloud_distance(geobox, scene)

        self._stacks.each(one, [s for s in scenes if s.masks])


def _key(scene: Scene, geobox: GeoBox) -> tuple[str, int]:
    return str(scene.item["id"]), round(geobox.resolution.x)


def _cloud_distance(geobox: GeoBox, scene: Scene) -> Bits:
    """Distance to clouds in steps of ``_REACH_M`` / 255; those beyond the tile's edge count."""
    res = float(geobox.resolution.x)
    margin = math.ceil(_REACH_M / res)
    cloudy = (mask_on(pad(geobox, margin), scene) & _CLOUDY) != 0
    if not cloudy.any():
        return np.full(geobox.shape, 255, np.uint8)
    px = ndimage.distance_transform_edt(~cloudy)[margin:-margin, margin:-margin]
    steps: Bits = np.minimum(px * (res * 255 / _REACH_M), 255).astype(np.uint8)
    return steps


# --- one unit ------------------------------------------------------------------------------------


def _blocks(group: Group, geobox: GeoBox, looks: int, *, vectors: bool, halo: int) -> list[Block]:
    """Blocks of a group: rows of a chunk, or fewer where that is more than ``_VALUES``."""
    h, w = geobox.shape
    bands = len(group.bands) if vectors else 1
    rows = _rows(looks * bands * w)
    found = []
    for together in [tuple(range(bands))] if vectors else [(b,) for b in range(len(group.bands))]:
        for start in range(0, h, rows):
            at = slice(start, min(start + rows, h))
            found.append(Block(at, together, pad(geobox[at, :], halo), halo))
    return found


def _rows(values_per_row: int) -> int:
    rows = CHUNK_PX
    while rows > 32 and rows * values_per_row > _VALUES:
        rows //= 2
    return rows


def _haze(values: Float, group: Group) -> Float | None:
    """Haze of each look: blue less half of red, above the least of the looks at a pixel."""
    at = {role: b for b, band in enumerate(group.bands) if (role := group.roles.get(band))}
    if group.kind != "optical" or not {"B02", "B04"} <= at.keys():
        return None
    hazy = values[:, at["B02"]] - np.float32(0.5) * values[:, at["B04"]]
    above: Float = hazy - np.fmin.reduce(hazy, axis=0)
    return above


def _composite(
    group: Group, cube: Cube, values: Float, scenes: Sequence[Scene], block: Block, clear: _Clear,
    period: Sequence[float],
) -> Float:  # fmt: skip
    """(B, h, w) of (T, B, h, w): the looks of one step made one."""
    if group.kind == "sar":
        return mean_db(values)
    if group.kind in ("dem", "polsar"):
        return mean(values)
    if group.kind != "optical" or cube.method == "median":
        return median(values)
    if cube.method in _VECTORS:
        return _VECTORS[cube.method](values)
    middle, spread = period
    days = np.array([float(np.datetime64(s.day).astype(int)) - middle for s in scenes])
    distance = np.stack([clear.distance_m(s, block) for s in scenes])
    scores = pixel_scores(
        days, distance, _haze(values, group), spread_days=spread, reach_m=_REACH_M
    )
    return best_pixel(values, scores)


def _run(
    unit: Unit, layer: Layer, campaign: Campaign, tile: Tile, stacks: Stacks, clear: _Clear,
    target: Any,
) -> None:  # fmt: skip
    """Compute the steps of one unit and write them."""
    group, cube = layer.group, campaign.cube
    if not unit.scenes:
        return  # an array that nothing is written to is empty
    geobox = coarsen(tile.geobox, group.res_m // 10)
    vectors = group.kind == "optical" and cube.method != "median"
    clear.load(unit.scenes, geobox, distance=vectors and cube.method == "best_pixel")
    filtered = group.kind == "sar" and cube.speckle == "multitemporal" and len(unit.scenes) > 1
    halo = WINDOW_PX // 2 if filtered else 0
    blocks = _blocks(group, geobox, len(unit.scenes), vectors=vectors, halo=halo)
    period = _span(campaign, unit.period)
    for block, values in stacks.read(unit.scenes, group.bands, blocks, clear):
        if filtered:
            for b in range(values.shape[1]):
                values[:, b] = to_db(multitemporal(to_power(values[:, b])))
        first = block.bands[0]
        for n, members in unit.steps.items():
            some = [unit.scenes[i] for i in members]
            whole = len(some) == len(values)
            looks = block.cut(values if whole else values[list(members)])
            made = _composite(group, cube, looks, some, block, clear, period)
            at: tuple[Any, ...] = (slice(first, first + len(block.bands)), block.rows)
            target[at if group.static else (n, *at)] = encode(made, target.dtype)
            del looks
        del values  # else three blocks would be in memory while the next one is read


def _span(campaign: Campaign, period: str) -> tuple[float, float]:
    """Middle day of a period and the spread of the day score: a half of its half-length."""
    for p in campaign.cube.periods:
        if p.name == period:
            first, last = (float(np.datetime64(d).astype(int)) for d in (p.start, p.end))
            return (first + last) / 2, max((last - first) / 4, 5.0)
    return 0.0, 1.0


# --- the tile ------------------------------------------------------------------------------------


def assemble(
    store: TileStore, old: Any, tile: Tile, grid: CampaignGrid,
    campaign: Campaign, layers: Sequence[Layer], optical: Mapping[str, Sequence[Scene]],
    digests: Mapping[str, Mapping[str, str]],
) -> float:  # fmt: skip
    """Write all variables of a tile.

    Args:
        store: Store in the making.
        old: Arrays of the tile's older store, from which unchanged periods are taken.
        tile: The tile.
        grid: Grid of the campaign.
        campaign: The campaign.
        layers: Groups with their steps and units.
        optical: Masked scenes of each period.
        digests: Per group and unit, and per period under ``masks``: what they depend on.

    Returns:
        Share of the tile with a clear observation in any period, per cent.
    """
    names = [p.name for p in campaign.cube.periods]
    targets = _declare(store, tile, campaign, layers)
    count, why = (
        store.variable(v, ("period", "y_10", "x_10"), (len(names), *tile.geobox.shape), "uint8")
        for v in ("clear_count", "period_reasons")
    )
    known = _Old(old, digests)
    scenes = [s for layer in layers for u in layer.units for s in u.scenes]
    with Stacks(campaign, scenes) as stacks:
        for n, name in enumerate([*names, ""]):
            clear = _Clear(stacks, tile)
            if name and not known.copy_masks(name, count, why, n):
                count[n], why[n] = clear.summary(optical[name])
            for layer in layers:
                for unit in (u for u in layer.units if u.period == name):
                    target = targets[layer.group.name]
                    if not known.copy(layer, unit, target):
                        _run(unit, layer, campaign, tile, stacks, clear, target)
    marks = _fill(store, campaign, layers, targets)
    return _reasons(store, tile, grid, count, why, marks, any(optical.values()))


def _declare(
    store: TileStore, tile: Tile, campaign: Campaign, layers: Sequence[Layer]
) -> dict[str, Any]:
    """Coordinates and empty variables of all groups."""
    store.text("period", [p.name for p in campaign.cube.periods])
    targets = {}
    for layer in layers:
        group = layer.group
        store.text(f"band_{group.name}", group.bands)
        if campaign.cube.series == "dates" and not group.static:
            days = np.array([s.name for s in layer.steps], "datetime64[D]")
            store.days(f"time_{group.name}", days)
    store.axes(tile.geobox)
    for layer in layers:
        group = layer.group
        geobox = coarsen(tile.geobox, group.res_m // 10)
        store.axes(geobox)
        dims, shape = _dims(layer, campaign, geobox)
        targets[group.name] = store.variable(group.name, dims, shape, group.dtype, group.attrs())
    return targets


def _dims(layer: Layer, campaign: Campaign, geobox: GeoBox) -> tuple[list[str], list[int]]:
    group = layer.group
    dims = [f"band_{group.name}", f"y_{group.res_m}", f"x_{group.res_m}"]
    shape = [len(group.bands), *geobox.shape]
    if group.static:
        return dims, shape
    over = "period" if campaign.cube.series == "composites" else f"time_{group.name}"
    return [over, *dims], [len(layer.steps), *shape]


class _Old:
    """What an older store of the tile has that nothing has changed for."""

    def __init__(self, arrays: Any, digests: Mapping[str, Mapping[str, str]]) -> None:
        self._arrays: Any = {} if arrays is None else arrays
        self._new = digests
        self._had: dict[str, dict[str, str]] = {}
        if arrays is not None:
            self._had = json.loads(arrays.attrs.get("digests", "{}"))

    def _same(self, what: str, name: str) -> bool:
        had = self._had.get(what, {}).get(name)
        return had is not None and had == self._new[what][name]

    def copy_masks(self, period: str, count: Any, why: Any, n: int) -> bool:
        """Copy the counts and reasons of a period; False if they must be made."""
        if not self._same("masks", period):
            return False
        at = [str(p) for p in self._arrays["period"][:]].index(period)
        count[n], why[n] = self._arrays["clear_count"][at], self._arrays["period_reasons"][at]
        return True

    def copy(self, layer: Layer, unit: Unit, target: Any) -> bool:
        """Copy the steps of a unit, without what was filled; False if they must be made."""
        name = layer.group.name
        if not self._same(name, layer.unit_name(unit)):
            return False
        source, filled = self._arrays[name], self._arrays.get(f"filled_{name}")
        if layer.group.static:
            for b in range(len(layer.group.bands)):
                target[b] = source[b]
            return True
        steps = self._steps(name)
        for n in unit.steps:
            at = steps.index(layer.steps[n].name)
            for b in range(len(layer.group.bands)):
                values = source[at, b]
                if filled is not None:
                    values[filled[at, b] != 0] = target.fill_value
                target[n, b] = values
        return True

    def _steps(self, group: str) -> list[str]:
        if f"time_{group}" in self._arrays:
            return [str(np.datetime64(int(d), "D")) for d in self._arrays[f"time_{group}"][:]]
        return [str(p) for p in self._arrays["period"][:]]


def _strips(shape: tuple[int, int], depth: int) -> Iterator[slice]:
    rows = _rows(4 * depth * shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _fill(
    store: TileStore, campaign: Campaign, layers: Sequence[Layer], targets: Mapping[str, Any]
) -> list[tuple[int, Any]]:
    """Fill gaps over time in all groups that have a time; returns pixel size and marks of each."""
    cube = campaign.cube
    marks = []
    if cube.fill == "none":
        return []
    fill = {"linear": fill_linear, "whittaker": fill_whittaker}[cube.fill]
    for layer in layers:
        group, target = layer.group, targets[layer.group.name]
        if group.static or len(layer.steps) < 3:
            continue
        mark = store.variable(
            f"filled_{group.name}", target.metadata.dimension_names, target.shape, "uint8",
            {"long_name": "1 where the value was filled from other dates"},
        )  # fmt: skip
        marks.append((group.res_m, mark))
        days = np.array([s.day for s in layer.steps])
        order = np.argsort(days, kind="stable")
        back = np.argsort(order, kind="stable")
        for b in range(len(group.bands)):
            for rows in _strips(target.shape[-2:], len(days)):
                values = decode(target[:, b, rows])
                done, filled = fill(values[order], days[order], cube.fill_max_days)
                if filled.any():
                    target[:, b, rows] = encode(done[back], target.dtype)
                    mark[:, b, rows] = filled[back].astype(np.uint8)
    return marks


def _reasons(
    store: TileStore, tile: Tile, grid: CampaignGrid, count: Any, why: Any,
    marks: Sequence[tuple[int, Any]], optical: bool,
) -> float:  # fmt: skip
    """Write why a pixel has no clear optical observation in any period: all reasons seen, else 0.

    Without optical scenes nothing is missing: radar and elevation see through clouds.
    """
    target = store.variable("reasons", ("y_10", "x_10"), tile.geobox.shape, "uint8")
    bits = np.zeros(tile.geobox.shape, np.uint8)
    if optical:
        unseen = np.ones(bits.shape, bool)
        for n in range(count.shape[0]):
            unseen &= count[n] == 0
            bits |= why[n]
        bits[~unseen] = 0
        bits[unseen & (bits == 0)] = Reason.NODATA
    bits[~_inside(tile.geobox, grid)] |= np.uint8(Reason.NODATA)
    for res_m, mark in marks:
        any_filled = np.zeros(mark.shape[-2:], bool)
        for n in range(mark.shape[0]):
            for b in range(mark.shape[1]):
                any_filled |= mark[n, b] != 0
        factor = res_m // 10
        bits[np.repeat(np.repeat(any_filled, factor, 0), factor, 1)] |= np.uint8(Reason.FILLED)
    target[...] = bits
    return round(100 * float(np.mean(is_clear(bits))), 3)


def _inside(geobox: GeoBox, grid: CampaignGrid) -> Bool:
    from rasterio.features import geometry_mask

    inside: Bool = geometry_mask(
        [grid.aoi], out_shape=geobox.shape, transform=geobox.affine, invert=True
    )
    return inside
