"""Districts: polygons that cover a simulated region, of which totals are wanted."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
from odc.geo.geobox import GeoBox
from shapely.geometry import Polygon

from terraloom.acquire.simulate.fields import stream
from terraloom.config.simulation import Simulation

__all__ = ["DISTRICTS_PER_SIDE", "make_districts"]

#: Districts along a side of the region.
DISTRICTS_PER_SIDE = 4
#: Corners are moved by at most this share of a district's side.
_MOVED = 0.3


def make_districts(sim: Simulation, aoi: GeoBox) -> gpd.GeoDataFrame:
    """Oblique quadrangles with a ``name`` that cover the region without gap or overlap."""
    b, n = aoi.boundingbox, DISTRICTS_PER_SIDE
    rng = stream(sim.seed, "districts")
    ticks = np.arange(n + 1) / n
    x, y = np.meshgrid(ticks, ticks)
    move = rng.uniform(-_MOVED, _MOVED, (2, n + 1, n + 1)) / n
    # A corner on the border stays on it, and those of the region stay where they are.
    x[:, 1:-1] += move[0][:, 1:-1]
    y[1:-1] += move[1][1:-1]
    corners = np.stack([b.left + x * (b.right - b.left), b.top - y * (b.top - b.bottom)], axis=-1)
    names, shapes = [], []
    for r in range(n):
        for c in range(n):
            names.append(f"district {r * n + c + 1:02d}")
            ring = [corners[r, c], corners[r, c + 1], corners[r + 1, c + 1], corners[r + 1, c]]
            shapes.append(Polygon(ring))
    return gpd.GeoDataFrame({"name": names}, geometry=shapes, crs=str(aoi.crs))
