"""Labels of the simulated region: polygons of classes, outlines, and canopy height plots.

Labels have the faults of real ones: a share names a wrong class, some are older than a change,
heights are measured with an error.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import shapes
from shapely.affinity import affine_transform
from shapely.geometry import Polygon, box, shape
from shapely.geometry.base import BaseGeometry

from terraloom.acquire.simulate.fields import stream
from terraloom.acquire.simulate.landscape import (
    BROADLEAF,
    CONFUSABLE,
    CONIFER,
    LEGEND,
    NEVER,
    WORK_MARGIN_PX,
    Landscape,
    edge_mask,
    height_map,
    period,
)
from terraloom.config.simulation import Simulation

__all__ = ["LabelSet", "make_labels"]

#: Labels stay this far from the parcel's edge, metres.
_ERODE_M = 10.0
_LEAST_AREA_M2 = 2_000.0
#: Complete blocks are chosen one per cell of this size, so that labels lie everywhere.
_CELL_PX = 128
#: Every class has this many labels, where the ground offers them, per cell of twice that size.
_PER_CLASS = 3
#: Share of the labels of changed parcels that were made before the change.
_OUTDATED_SHARE = 0.75
_PLOT_FOREST_SHARE = 0.75


@dataclass(frozen=True)
class LabelSet:
    """All labels, and what is wrong with them.

    Attributes:
        layers: Layer name to table (``landcover``, ``height``, ``boundary``).
        noisy: Parcel ids whose class was replaced, with the class given and the true one.
        outdated: Parcel ids labelled before they changed.
    """

    layers: dict[str, gpd.GeoDataFrame]
    noisy: list[dict[str, object]]
    outdated: list[int]


def make_labels(sim: Simulation, land: Landscape) -> LabelSet:
    """Choose parcels, date them, and give them classes with the asked share of errors."""
    rng = stream(sim.seed, "labels")
    geometry = _outlines(land)
    inner = {i: _inside(g) for i, g in geometry.items()}
    eligible = {i: g for i, g in inner.items() if g.area >= _LEAST_AREA_M2}
    complete, chosen = _choose(sim, land, rng, geometry, eligible)
    landcover, noisy, outdated = _landcover(sim, land, rng, chosen, eligible)
    crs = str(land.geobox.crs)
    ids = sorted(complete)
    last = period(sim)[1].isoformat()
    boundary = gpd.GeoDataFrame(
        {"parcel_id": ids, "label_date": [last] * len(ids)},
        geometry=[geometry[i] for i in ids],
        crs=crs,
    )
    layers = {"landcover": landcover, "height": _height_plots(sim, land), "boundary": boundary}
    return LabelSet(layers, noisy, outdated)


def _world(land: Landscape) -> list[float]:
    t: Affine = land.geobox.affine
    return [t.a, t.b, t.d, t.e, t.c, t.f]


def _aoi(land: Landscape) -> Polygon:
    h, w = land.geobox.shape
    m = WORK_MARGIN_PX
    t = land.geobox.affine
    x0, y1 = t.c + m * t.a, t.f + m * t.e
    return box(x0, y1 + (h - 2 * m) * t.e, x0 + (w - 2 * m) * t.a, y1)


def _outlines(land: Landscape) -> dict[int, BaseGeometry]:
    """Outline of every parcel wholly inside the area of interest, in map coordinates (m)."""
    first_water = len(land.parcels.polygons)
    mask = land.parcel >= first_water
    parts: dict[int, list[BaseGeometry]] = defaultdict(list)
    for geo, value in shapes(land.parcel, mask=mask, transform=land.geobox.affine):
        parts[int(value)].append(shape(geo))
    water = {i: shapely.union_all(g) for i, g in parts.items()}
    tree = shapely.STRtree([g for gs in parts.values() for g in gs])
    world, aoi = _world(land), _aoi(land)
    out: dict[int, BaseGeometry] = {}
    for i, polygon in enumerate(land.parcels.polygons):
        ground = affine_transform(polygon, world)
        if not aoi.covers(ground):
            continue
        wet = tree.geometries[tree.query(ground, predicate="intersects")]
        dry = ground.difference(shapely.union_all(wet)) if len(wet) else ground
        if dry.area > 0:
            out[i] = _polygons(dry)
    for i, pond in sorted(water.items()):
        inside = _polygons(pond.intersection(aoi))
        if inside.area > 0:
            out[i] = inside
    return out


def _polygons(geometry: BaseGeometry) -> BaseGeometry:
    """Only the areas of a geometry; cuts along a shared edge leave stray lines."""
    parts = [g for g in shapely.get_parts(geometry) if g.geom_type == "Polygon"]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _inside(geometry: BaseGeometry) -> Polygon:
    """Largest part of a geometry shrunk by the erosion distance."""
    parts = shapely.get_parts(geometry.buffer(-_ERODE_M, join_style="mitre"))
    polygons = [g for g in parts if g.geom_type == "Polygon"]
    return max(polygons, key=lambda g: g.area) if polygons else Polygon()


def _choose(
    sim: Simulation,
    land: Landscape,
    rng: np.random.Generator,
    geometry: dict[int, BaseGeometry],
    eligible: dict[int, Polygon],
) -> tuple[set[int], set[int]]:
    """Parcels of completely digitised blocks, and all parcels with a class label."""
    members: dict[int, list[int]] = defaultdict(list)
    for i in geometry:
        members[int(land.parcels.block[i])].append(i)
    target = max(1, round(len(geometry) * sim.label_share_pct / 100))
    complete: set[int] = set()
    chosen: set[int] = set()
    for block in _spread_blocks(land, rng):
        ready = [i for i in members[block] if i in eligible]
        if len(chosen) + len(ready) > 0.75 * target:
            break
        complete.update(members[block])
        chosen.update(ready)
    chosen |= _missing_classes(land, rng, eligible, chosen)
    rest = sorted(set(eligible) - chosen)
    short = max(0, min(target - len(chosen), len(rest)))
    chosen.update(int(i) for i in rng.choice(rest, short, replace=False) if short)
    return complete, chosen


def _spread_blocks(land: Landscape, rng: np.random.Generator) -> list[int]:
    """Blocks wholly inside the area of interest; one of every cell before a second of any."""
    size = land.geobox.shape[0]
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for b in rng.permutation(len(land.blocks.rings)):
        ring = land.blocks.rings[b]
        if ring.min() >= WORK_MARGIN_PX and ring.max() <= size - WORK_MARGIN_PX:
            col, row = land.blocks.centers[b] - WORK_MARGIN_PX
            cells[int(row // _CELL_PX), int(col // _CELL_PX)].append(int(b))
    order = [cells[k] for k in sorted(cells)]
    order = [order[i] for i in rng.permutation(len(order))]
    most = max((len(c) for c in order), default=0)
    return [cell[turn] for turn in range(most) for cell in order if turn < len(cell)]


def _missing_classes(
    land: Landscape,
    rng: np.random.Generator,
    eligible: dict[int, Polygon],
    chosen: set[int],
) -> set[int]:
    """Further parcels, so that each part of the region has labels of every class it holds."""
    x0, _, _, y1 = _aoi(land).bounds
    span = 20.0 * _CELL_PX  # two cells, metres
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for i, g in eligible.items():
        at = g.representative_point()
        cell = int((y1 - at.y) // span), int((at.x - x0) // span)
        groups[(*cell, int(land.parcels.before[i]))].append(i)
    more: set[int] = set()
    for key in sorted(groups):
        have = sum(i in chosen for i in groups[key])
        spare = [i for i in groups[key] if i not in chosen]
        wanted = max(0, min(_PER_CLASS - have, len(spare)))
        if wanted:
            more.update(int(i) for i in rng.choice(spare, wanted, replace=False))
    return more


def _landcover(
    sim: Simulation,
    land: Landscape,
    rng: np.random.Generator,
    chosen: set[int],
    eligible: dict[int, Polygon],
) -> tuple[gpd.GeoDataFrame, list[dict[str, object]], list[int]]:
    ids = np.array(sorted(chosen))
    p = land.parcels
    length = land.day(period(sim)[1])
    change = p.change_day[ids]
    old = (change < NEVER) & (rng.random(len(ids)) < _OUTDATED_SHARE)
    low = np.where((change < NEVER) & ~old, change, 0)
    high = np.where(old, change, length + 1)
    day = low + np.floor(rng.random(len(ids)) * (high - low)).astype(int)
    true = np.where(day >= change, p.after[ids], p.before[ids]).astype(int)
    given = true.copy()
    wrong = rng.choice(len(ids), round(len(ids) * sim.label_noise_pct / 100), replace=False)
    for w in sorted(wrong):
        given[w] = rng.choice(CONFUSABLE[int(true[w])])
    names = np.array(LEGEND.names)
    table = gpd.GeoDataFrame(
        {
            "parcel_id": ids,
            "class_name": names[given],
            "label_date": [(land.start + timedelta(days=int(d))).isoformat() for d in day],
        },
        geometry=[eligible[int(i)] for i in ids],
        crs=str(land.geobox.crs),
    )
    noisy: list[dict[str, object]] = [
        {"parcel_id": int(ids[w]), "given": LEGEND.names[given[w]], "true": LEGEND.names[true[w]]}
        for w in sorted(wrong)
    ]
    return table, noisy, [int(i) for i in ids[old]]


def _height_plots(sim: Simulation, land: Landscape) -> gpd.GeoDataFrame:
    """Square plots of 3 x 3 pixels with their mean canopy height; zeros outside forest."""
    rng = stream(sim.seed, "height-plots")
    count = max(8, round((sim.size_px / 100) ** 2 * sim.height_plots_per_km2))
    forest = round(count * _PLOT_FOREST_SHARE)
    last = land.day(period(sim)[1])
    m = WORK_MARGIN_PX
    clear = ~edge_mask(land)
    kind = height_map(land, 0) > 0
    place = np.zeros(kind.shape, dtype=bool)
    place[m + 1 : -m - 1, m + 1 : -m - 1] = clear[m + 1 : -m - 1, m + 1 : -m - 1]
    rows, cols = [], []
    for wanted, where in ((forest, place & kind), (count - forest, place & ~kind)):
        at = np.flatnonzero(where)
        take = np.sort(rng.choice(at, min(wanted, len(at)), replace=False))
        r, c = np.unravel_index(take, kind.shape)
        rows.append(r)
        cols.append(c)
    row, col = np.concatenate(rows), np.concatenate(cols)
    day = rng.integers(0, last + 1, len(row))
    height = _plot_means(land, row, col, day)
    measured = np.where(height > 0, height + rng.normal(0, sim.height_noise_m, len(row)), 0)
    t = land.geobox.affine
    left, top = t.c + t.a * (col - 1.0), t.f + t.e * (row - 1.0)
    plots = shapely.box(left, top + 3 * t.e, left + 3 * t.a, top)
    return gpd.GeoDataFrame(
        {
            "plot_id": np.arange(1, len(row) + 1),
            "height_m": measured.clip(0).round(2),
            "label_date": [(land.start + timedelta(days=int(d))).isoformat() for d in day],
        },
        geometry=plots,
        crs=str(land.geobox.crs),
    )


def _plot_means(
    land: Landscape,
    row: npt.NDArray[np.int64],
    col: npt.NDArray[np.int64],
    day: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Mean height of the 3 x 3 pixels around each plot centre on its day, metres."""
    p = land.parcels
    total = np.zeros(len(row))
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            at = land.parcel[row + dr, col + dc]
            k = np.where(day >= p.change_day[at], p.after[at], p.before[at])
            forest = (k == BROADLEAF) | (k == CONIFER)
            total += np.where(forest, land.stand[row + dr, col + dc], 0)
    return np.asarray(total / 9)
