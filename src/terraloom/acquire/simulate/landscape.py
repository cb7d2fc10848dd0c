"""The simulated landscape: terrain, water, parcels, classes, canopy height and change.

The *work grid* is the area of interest with ``WORK_MARGIN_PX`` on every side; scene rasters have
``SCENE_MARGIN_PX``, so that a shifted scene never shows the edge of the simulated world.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import numpy.typing as npt
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage
from shapely.geometry import Polygon

from terraloom.acquire.simulate.fields import F32, fractal, grain, stream
from terraloom.acquire.simulate.parcels import Blocks, divide_blocks, make_blocks, parcel_raster
from terraloom.config.simulation import Simulation
from terraloom.grid import pad
from terraloom.legend import Legend

__all__ = [
    "CONFUSABLE",
    "LEGEND",
    "SCENE_MARGIN_PX",
    "WORK_MARGIN_PX",
    "Landscape",
    "Parcels",
    "aoi_geobox",
    "build_landscape",
    "class_map",
    "edge_mask",
    "height_map",
    "period",
]

LEGEND = Legend(
    codes=(1, 2, 3, 4, 5, 6, 7),
    names=(
        "water", "broadleaf forest", "conifer forest", "winter cropland", "summer cropland",
        "grassland", "built",
    ),
    colors=("#2f7fc1", "#57a639", "#14532d", "#e3c53f", "#d9813a", "#b5dd86", "#b3263e"),
)  # fmt: skip
WATER, BROADLEAF, CONIFER, WINTER, SUMMER, GRASS, BUILT = range(7)

#: Classes that look like each class: what an interpreter mistakes it for, and what is mixed in.
CONFUSABLE: dict[int, tuple[int, ...]] = {
    WATER: (GRASS, CONIFER),
    BROADLEAF: (CONIFER, GRASS),
    CONIFER: (BROADLEAF,),
    WINTER: (SUMMER, GRASS),
    SUMMER: (WINTER, GRASS),
    GRASS: (WINTER, SUMMER, BROADLEAF),
    BUILT: (GRASS, SUMMER),
}

#: 18 px = 180 m: on the 60 m lattice and wider than any shift.
SCENE_MARGIN_PX = 18
#: Six pixels more than the scenes: room for the interpolator and the largest shift.
WORK_MARGIN_PX = 24
CRS = "EPSG:32633"
#: Upper left corner of the area of interest, metres; on the 60 m lattice.
ORIGIN_M = (420_000, 5_820_000)
#: Day number (from the start of the period) of parcels that never change.
NEVER = 10_000

MIN_HEIGHT_M, MAX_HEIGHT_M = 5.0, 30.0

#: Pixels per hectare at 10 m.
_PX_PER_HA = 100
_FOREST_HA, _BUILT_HA = 8.0, 1.1
#: Distance between main rivers and between tributaries, pixels.
_RIVER_PX, _TRIBUTARY_PX = 560.0, 330.0
_FOREST_SHARE = 0.3
#: Largest share of a look-alike class in a parcel.
_MOST_MIXED = 0.48
_KM2_PER_VILLAGE = 4.5


@dataclass(frozen=True)
class Parcels:
    """Properties of the N parcels; water parcels (one per block) come last.

    Attributes:
        polygons: Outline of the land parcels in pixel coordinates of the work grid; water is not
            cut out. Fewer than N: the rest is water.
        block: (N,) block of each parcel.
        before: (N,) class index before the change.
        after: (N,) class index after it; equal to ``before`` where nothing changes.
        change_day: (N,) day of the change from the start of the period, ``NEVER`` without one.
        delay_days: (N,) shift of the growing season.
        vigour: (N,) factor of the vegetation fraction.
        soil: (N,) factor of the background brightness.
        mowing_day: (N, 2) days of year of the cuts of grassland; above 366 where grazed.
        partner: (N,) class index of the look-alike mixed into the parcel.
        mix: (N,) share of the look-alike, 0 to below 0.5.
        tint: (N, 10) factor of each optical band.
        echo_db: (N, 2) radar backscatter offset of VV and VH, dB.
    """

    polygons: list[Polygon]
    block: npt.NDArray[np.int32]
    before: npt.NDArray[np.int8]
    after: npt.NDArray[np.int8]
    change_day: npt.NDArray[np.int32]
    delay_days: F32
    vigour: F32
    soil: F32
    mowing_day: F32
    partner: npt.NDArray[np.int8]
    mix: F32
    tint: F32
    echo_db: F32

    def classes_on(self, day: int) -> npt.NDArray[np.int8]:
        """Class index of every parcel on a day from the start of the period, (N,)."""
        return np.where(day >= self.change_day, self.after, self.before).astype(np.int8)


@dataclass(frozen=True)
class Landscape:
    """Everything on the ground, on the work grid (H, W).

    Attributes:
        geobox: The work grid.
        start: First day of the period.
        blocks: Blocks the parcels were cut from, pixel coordinates.
        parcels: Properties per parcel.
        parcel: (H, W) parcel index.
        elevation: (H, W) metres above sea level.
        stand: (H, W) height that forest has or would have here, metres, before any change.
        texture: (H, W) within-field variation, mean 0 and sd 1.
        grain: (H, W) fine variation, mean 0 and sd 1.
    """

    geobox: GeoBox
    start: date
    blocks: Blocks
    parcels: Parcels
    parcel: npt.NDArray[np.int32]
    elevation: F32
    stand: F32
    texture: F32
    grain: F32

    def day(self, when: date) -> int:
        """Days from the start of the period."""
        return (when - self.start).days


def period(sim: Simulation) -> tuple[date, date]:
    """First and last day of the simulated period; the last one is the date of the map."""
    return date(sim.year - 1, 11, 10), date(sim.year, 10, 31)


def aoi_geobox(sim: Simulation) -> GeoBox:
    """Pixels of the area of interest, 10 m."""
    affine = Affine(10, 0, ORIGIN_M[0], 0, -10, ORIGIN_M[1])
    return GeoBox((sim.size_px, sim.size_px), affine, CRS)


def build_landscape(sim: Simulation) -> Landscape:
    """Make the ground of a region from its settings."""
    geobox = pad(aoi_geobox(sim), WORK_MARGIN_PX)
    size = geobox.shape[0]
    elevation, water, valley = _terrain(sim, size)
    blocks, use = _land_use(sim, size, elevation, water, valley)
    rng = stream(sim.seed, "parcels")
    field_ha = np.clip(sim.parcel_ha * rng.lognormal(0, 0.35, len(use)), 1.0, 7.0)
    target = np.select([use == BROADLEAF, use == BUILT], [_FOREST_HA, _BUILT_HA], field_ha)
    polygons, block = divide_blocks(rng, blocks, target * _PX_PER_HA)
    parcel = parcel_raster(polygons, size)
    before = _classes(sim, polygons, use[block], valley)
    parcel = np.where(water, len(polygons) + block[parcel], parcel).astype(np.int32)
    block = np.concatenate([block, np.arange(len(use), dtype=np.int32)])
    before = np.concatenate([before, np.full(len(use), WATER, np.int8)])
    parcels = _properties(sim, polygons, block, before)
    extra = stream(sim.seed, "texture")
    return Landscape(
        geobox=geobox,
        start=period(sim)[0],
        blocks=blocks,
        parcels=_change(sim, parcels),
        parcel=parcel,
        elevation=elevation,
        stand=_stand_height(sim, parcel, len(block), elevation),
        texture=fractal(extra, (size, size), scale_px=14, power=2.4),
        grain=grain(extra, (size, size)),
    )


def _channel(level: F32) -> tuple[F32, F32]:
    """Distance to the nearest integer level of a field: in pixels, and as a share 0-1."""
    away = np.abs(level - np.round(level))
    dy, dx = np.gradient(level)
    slope = np.hypot(dy, dx)
    return away / np.maximum(slope, 1e-4), 2 * away


def _terrain(sim: Simulation, size: int) -> tuple[F32, npt.NDArray[np.bool_], F32]:
    """Elevation (m), water mask and height above the valley (0-1).

    Rivers are level lines of a ramp bent by noise; the terrain rises away from them, so that
    water follows low ground by construction.
    """
    rng = stream(sim.seed, "terrain")
    shape = (size, size)
    y, x = (np.arange(size, dtype=np.float32) - size / 2 for _ in range(2))
    turn = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(turn)) * x[None, :] + np.float32(np.sin(turn)) * y[:, None]
    across = np.float32(-np.sin(turn)) * x[None, :] + np.float32(np.cos(turn)) * y[:, None]
    bend = fractal(rng, shape, scale_px=420, power=4)
    main = along / np.float32(_RIVER_PX) + np.float32(0.13) * (bend - bend[size // 2, size // 2])
    twist = fractal(rng, shape, scale_px=260, power=4)
    side = across / np.float32(_TRIBUTARY_PX) + np.float32(0.16) * twist
    main_px, valley = _channel(main)
    side_px, _ = _channel(side)
    part = main - np.floor(main)
    width = 3.2 + 0.7 * fractal(rng, shape, scale_px=120, power=4)
    stream_here = (side_px < 1.3) & (part < 0.36)
    river = (main_px < np.maximum(width, 1.8)) | stream_here
    rise = valley * valley * (3 - 2 * valley)
    rough = fractal(rng, shape, scale_px=260, power=3.2)
    dent = np.exp(-((side_px / 28) ** 2)) * (part < 0.5)
    relief = 0.75 * rise + 0.16 * rough * (0.25 + rise) - 0.14 * dent * rise
    elevation = np.float32(35) + np.float32(sim.relief_m) * relief - along * np.float32(0.002)
    water = river | _lakes(rng, valley)
    labels, count = ndimage.label(water)
    if count:  # drop puddles, and rings of level lines too small to be a river
        sizes = np.bincount(labels.ravel())
        water &= (sizes >= 90)[labels]
    # Water surfaces are level across the river: the lowest ground nearby.
    low = ndimage.minimum_filter(elevation, 9)
    return np.where(water, low, elevation).astype(np.float32), water, valley


def _lakes(rng: np.random.Generator, valley: F32) -> npt.NDArray[np.bool_]:
    pond = fractal(rng, valley.shape, scale_px=150, power=3.4)
    pond -= 1.2 * np.clip(valley - 0.5, 0, None)
    return np.asarray(pond > np.quantile(pond[::4, ::4], 0.982))


def _land_use(
    sim: Simulation, size: int, elevation: F32, water: npt.NDArray[np.bool_], valley: F32
) -> tuple[Blocks, npt.NDArray[np.int64]]:
    """Blocks and what each is used for: forest, village or fields (as a class index)."""
    rng = stream(sim.seed, "land-use")
    blocks = make_blocks(rng, size)
    col, row = (np.clip(blocks.centers[:, i].astype(int), 0, size - 1) for i in (0, 1))
    wood = fractal(rng, (size, size), scale_px=200, power=3) + 1.1 * valley
    wood_here = wood[row, col]
    use = np.full(len(row), GRASS)
    use[wood_here > np.quantile(wood_here, 1 - _FOREST_SHARE)] = BROADLEAF
    dry = ~water[row, col] & (use != BROADLEAF)
    # Villages keep their distance, so that every part of the region has some.
    count = max(2, round((size / 100) ** 2 / _KM2_PER_VILLAGE))
    order = rng.permutation(np.flatnonzero(dry))
    gap = 0.72 * size / np.sqrt(count)
    chosen: list[int] = []
    for b in order:
        far = all(np.hypot(*(blocks.centers[b] - blocks.centers[c])) > gap for c in chosen)
        if far and len(chosen) < count:
            chosen.append(int(b))
    use[chosen] = BUILT
    return blocks, use


def _classes(
    sim: Simulation, polygons: list[Polygon], use: npt.NDArray[np.int64], valley: F32
) -> npt.NDArray[np.int8]:
    """Class index of each land parcel, (N,)."""
    rng = stream(sim.seed, "classes")
    size = valley.shape[0]
    at = np.array([(p.centroid.y, p.centroid.x) for p in polygons]).astype(int)
    row, col = np.clip(at, 0, size - 1).T
    needle = fractal(rng, (size, size), scale_px=160, power=3)[row, col]
    u, v = rng.random((2, len(polygons)))
    wet = np.clip(0.45 - valley[row, col], 0, 0.45)
    grass = 0.24 + 0.9 * wet
    crop = np.where(v < 0.53, WINTER, SUMMER)
    copse = np.where(needle > 0, CONIFER, BROADLEAF)
    fields = np.select([u < grass, u > 0.965], [np.full(len(u), GRASS), copse], crop)
    forest = np.where(needle + rng.normal(0, 0.7, len(u)) > 0.05, CONIFER, BROADLEAF)
    forest = np.where(u > 0.97, GRASS, forest)
    village = np.where(u < 0.84, BUILT, GRASS)
    return np.select([use == BROADLEAF, use == BUILT], [forest, village], fields).astype(np.int8)


def _properties(
    sim: Simulation,
    polygons: list[Polygon],
    block: npt.NDArray[np.int32],
    before: npt.NDArray[np.int8],
) -> Parcels:
    rng = stream(sim.seed, "properties")
    n = len(block)
    mowing = np.column_stack([rng.normal(150, 11, n), rng.normal(207, 14, n)])
    mowing[rng.random(n) < 0.4] = 999
    water = before == WATER
    soil = rng.lognormal(0, 0.16, n)
    # One river is one colour: neighbouring water parcels must not differ.
    soil[water] = 1
    # Stands differ less in colour than fields: what is left is the effect of their height.
    spread = np.select([water, np.isin(before, (BROADLEAF, CONIFER))], [0, 0.025], 0.05)
    tint = 1 + spread[:, None] * rng.standard_normal((n, 10))
    mix = np.where(water, 0, _MOST_MIXED * rng.beta(1.0, 3.0, n))
    partner = [rng.choice(CONFUSABLE[int(k)]) for k in before]
    return Parcels(
        polygons=polygons,
        block=block,
        before=before,
        after=before.copy(),
        change_day=np.full(n, NEVER, np.int32),
        delay_days=rng.normal(0, 10, n).astype(np.float32),
        vigour=rng.normal(1, 0.1, n).clip(0.7, 1.25).astype(np.float32),
        soil=soil.astype(np.float32),
        mowing_day=mowing.astype(np.float32),
        partner=np.array(partner, dtype=np.int8),
        mix=mix.astype(np.float32),
        tint=tint.astype(np.float32),
        echo_db=np.where(water[:, None], 0, rng.normal(0, 0.6, (n, 2))).astype(np.float32),
    )


def _change(sim: Simulation, parcels: Parcels) -> Parcels:
    """Fell some forest and build on some fields, from spring to midsummer."""
    rng = stream(sim.seed, "change")
    land = np.flatnonzero(parcels.before != WATER)
    can = land[parcels.before[land] != BUILT]
    count = min(round(len(land) * sim.label_change_pct / 100), len(can))
    forest = np.isin(parcels.before[can], (BROADLEAF, CONIFER))
    # Forest stands are few and large; draw them more often so that felling is seen.
    weight = np.where(forest, 2.0, 1.0)
    chosen = rng.choice(can, count, replace=False, p=weight / weight.sum()) if count else can[:0]
    after, day = parcels.after.copy(), parcels.change_day.copy()
    felled = np.isin(parcels.before[chosen], (BROADLEAF, CONIFER))
    after[chosen] = np.where(felled, GRASS, BUILT)
    first = (date(sim.year, 4, 1) - period(sim)[0]).days
    day[chosen] = rng.integers(first, first + 90, count)
    return replace(parcels, after=after, change_day=day)


def _stand_height(sim: Simulation, parcel: npt.NDArray[np.int32], n: int, elevation: F32) -> F32:
    """Canopy height (m): age of the stand, site quality along the slope, fine variation."""
    rng = stream(sim.seed, "height")
    shape = (parcel.shape[0], parcel.shape[1])
    age = rng.uniform(-1.6, 1.6, n).astype(np.float32)[parcel]
    site = fractal(rng, shape, scale_px=90, power=3) * np.float32(0.45)
    site -= np.float32(0.5) * (elevation - elevation.mean()) / np.float32(sim.relief_m)
    fine = fractal(rng, shape, scale_px=7, power=2.4) * np.float32(0.22)
    share = 1 / (1 + np.exp(-1.25 * (age + site + fine)))
    return np.asarray(MIN_HEIGHT_M + (MAX_HEIGHT_M - MIN_HEIGHT_M) * share, dtype=np.float32)


def class_map(land: Landscape, day: int) -> npt.NDArray[np.int8]:
    """Class index of every pixel on a day from the start of the period, (H, W)."""
    return land.parcels.classes_on(day)[land.parcel]


def height_map(land: Landscape, day: int) -> F32:
    """Canopy height on a day, (H, W), metres; 0 outside forest."""
    forest = np.isin(land.parcels.classes_on(day), (BROADLEAF, CONIFER))[land.parcel]
    return np.where(forest, land.stand, 0).astype(np.float32)


def edge_mask(land: Landscape) -> npt.NDArray[np.bool_]:
    """Pixels whose centre lies within 10 m of another parcel, (H, W).

    A pixel is an edge where one of its four neighbours belongs to another parcel; all water is
    one parcel here. The edge is two pixels thick, one on either side of the outline.
    """
    first_water = len(land.parcels.polygons)
    ids = np.minimum(land.parcel, first_water)
    edge = np.zeros(ids.shape, dtype=bool)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge
