"""Parcel geometry: Voronoi blocks divided again and again by straight cuts.

All coordinates are pixel coordinates (column, row) of the work grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely
from rasterio.features import rasterize
from scipy import ndimage
from shapely.geometry import MultiPoint, Polygon, box

__all__ = ["Blocks", "divide_blocks", "make_blocks", "parcel_raster"]

#: Distance between the seeds of neighbouring blocks, pixels: about 30 ha a block.
BLOCK_SPACING_PX = 56

Ring = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Blocks:
    """Blocks of parcels: convex cells with one field direction each.

    Attributes:
        rings: Vertices (n, 2) of each block.
        centers: (N, 2) centroids.
        angle: (N,) direction of the cuts, radians.
    """

    rings: list[Ring]
    centers: npt.NDArray[np.float64]
    angle: npt.NDArray[np.float64]


def make_blocks(rng: np.random.Generator, size: int) -> Blocks:
    """Voronoi blocks that cover a square of ``size`` pixels."""
    ticks = np.arange(-BLOCK_SPACING_PX / 2, size + BLOCK_SPACING_PX, BLOCK_SPACING_PX)
    x, y = np.meshgrid(ticks, ticks)
    seeds = np.column_stack([x.ravel(), y.ravel()])
    seeds += rng.uniform(-0.38, 0.38, seeds.shape) * BLOCK_SPACING_PX
    frame = box(0, 0, size, size)
    cells = shapely.voronoi_polygons(MultiPoint(seeds), extend_to=frame.buffer(size / 2))
    cut = [c.intersection(frame) for c in cells.geoms]
    polygons = [p for p in cut if isinstance(p, Polygon) and p.area > 1]
    polygons.sort(key=lambda p: (round(p.centroid.y, 6), round(p.centroid.x, 6)))
    rings = [np.asarray(p.exterior.coords)[:-1] for p in polygons]
    centers = np.array([(p.centroid.x, p.centroid.y) for p in polygons])
    return Blocks(rings, centers, rng.uniform(0, np.pi, len(rings)))


def _area(ring: Ring) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _clip(ring: Ring, normal: Ring, offset: float) -> Ring:
    """Part of a convex ring where ``normal . p <= offset`` (Sutherland-Hodgman)."""
    side = ring @ normal - offset
    points: list[Ring] = []
    for i in range(len(ring)):
        j = (i + 1) % len(ring)
        if side[i] <= 0:
            points.append(ring[i])
        if (side[i] < 0) != (side[j] < 0) and side[i] != side[j]:
            points.append(ring[i] + side[i] / (side[i] - side[j]) * (ring[j] - ring[i]))
    return np.array(points).reshape(-1, 2)


def _divide(rng: np.random.Generator, ring: Ring, angle: float, target_px: float) -> list[Ring]:
    stack, leaves = [ring], []
    while stack:
        part = stack.pop()
        if _area(part) <= target_px * rng.uniform(0.9, 1.7):
            leaves.append(part)
            continue
        turn = angle + rng.normal(0, 0.06)
        axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        along = part @ axes.T
        spans = np.ptp(along, axis=0)
        k = int(spans[1] > spans[0])
        cut = float(along[:, k].min() + spans[k] * rng.uniform(0.36, 0.64))
        halves = _clip(part, axes[k], cut), _clip(part, -axes[k], -cut)
        if any(len(h) < 3 for h in halves):
            leaves.append(part)
        else:
            stack.extend(halves)
    return leaves


def divide_blocks(
    rng: np.random.Generator, blocks: Blocks, target_px: npt.NDArray[np.float64]
) -> tuple[list[Polygon], npt.NDArray[np.int32]]:
    """Divide every block into parcels of about ``target_px`` pixels each.

    Returns:
        Parcel polygons and the block of each parcel, (N,).
    """
    polygons: list[Polygon] = []
    owner: list[int] = []
    for b, ring in enumerate(blocks.rings):
        parts = _divide(rng, ring, float(blocks.angle[b]), float(target_px[b]))
        polygons.extend(Polygon(p) for p in parts)
        owner.extend([b] * len(parts))
    return polygons, np.array(owner, dtype=np.int32)


def parcel_raster(polygons: list[Polygon], size: int) -> npt.NDArray[np.int32]:
    """Parcel index of every pixel centre, (H, W); the polygons tile the square."""
    shapes = [(p, i + 1) for i, p in enumerate(polygons)]
    raster = rasterize(shapes, out_shape=(size, size), fill=0, dtype="int32") - 1
    holes = raster < 0  # a pixel centre on a shared edge may belong to neither side
    if holes.any():
        near = ndimage.distance_transform_edt(holes, return_distances=False, return_indices=True)
        raster = raster[tuple(near)]
    return np.asarray(raster, dtype=np.int32)
