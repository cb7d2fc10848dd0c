"""The class map as polygons that no tile edge splits.

The map is read in strips of rows. Patches are labelled per strip and joined across seams by
union-find; a patch is finished when it does not reach the next strip. So memory is bounded by one
strip and the patches that are still open, not by the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyogrio
import rasterio
import shapely
from affine import Affine
from rasterio.features import shapes
from rasterio.windows import Window
from shapely.geometry import MultiPolygon, Polygon
from skimage.measure import label

from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, row_areas_m2
from terraloom.io import atomic
from terraloom.legend import NODATA_CODE, Legend, read_legend
from terraloom.log import get_logger
from terraloom.origin import TAG, map_tags
from terraloom.plan import product_path

__all__ = ["Patch", "Strip", "patches", "polygonise_map"]

MAP = Path("results/map")
#: Pixels of a strip, about; the number of rows follows from the width alone.
_STRIP_PX = 1 << 23
#: Features that are written at once.
_CHUNK = 50_000
#: Fixed date in the file: the same map gives the same bytes.
_FILE_DATE = "2000-01-01T00:00:00Z"

log = get_logger(__name__)


@dataclass(frozen=True)
class Strip:
    """Rows of the map over its whole width.

    Attributes:
        top: First row.
        codes: (h, W) uint8 class codes; 0 is no class.
        area_m2: (h, W) true areas of the pixels.
        probability: (h, W) of the mapped class, 0-1.
    """

    top: int
    codes: npt.NDArray[np.uint8]
    area_m2: npt.NDArray[np.float64]
    probability: npt.NDArray[np.float32]


@dataclass
class Patch:
    """One connected patch of a class.

    Attributes:
        first: Its first pixel in reading order, (row, column).
        code: Class code.
        pixels: Number of pixels.
        area_m2: True area.
        sum_probability: Sum over the pixels of the probability of the class.
        parts: Polygons, split at the seams of strips until the patch is finished.
    """

    first: tuple[int, int]
    code: int
    pixels: int = 0
    area_m2: float = 0.0
    sum_probability: float = 0.0
    parts: list[Polygon] = field(default_factory=list)

    def join(self, other: Patch) -> None:
        """Take in another part of the same patch."""
        self.first = min(self.first, other.first)
        self.pixels += other.pixels
        self.area_m2 += other.area_m2
        self.sum_probability += other.sum_probability
        self.parts += other.parts

    def geometry(self) -> MultiPolygon:
        """The outline, without vertices where strips met."""
        whole = self.parts[0] if len(self.parts) == 1 else shapely.union_all(self.parts)
        parts = [_straightened(p) for p in shapely.get_parts(whole)]
        return shapely.normalize(MultiPolygon(parts))


def _straightened(polygon: Polygon) -> Polygon:
    return Polygon(_corners(polygon.exterior), [_corners(r) for r in polygon.interiors])


def _corners(ring: Any) -> npt.NDArray[np.float64]:
    """Vertices of a ring at which it turns."""
    xy = np.asarray(ring.coords)[:-1]
    before, after = xy - np.roll(xy, 1, axis=0), np.roll(xy, -1, axis=0) - xy
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    kept: npt.NDArray[np.float64] = xy[turn != 0]
    return kept


def patches(
    strips: Iterator[Strip], transform: Affine, *, connectivity: int = 4
) -> Iterator[Patch]:
    """Patches of a class map, each once and whole, in the order in which they end.

    Args:
        strips: The map from top to bottom.
        transform: From pixels to coordinates.
        connectivity: 4 (sides) or 8 (sides and corners).
    """
    open_: dict[int, Patch] = {}  # patches that reach the last row, by the label of their root
    edge_ids = edge_codes = None  # roots and codes of the last row, (W,)
    for strip in strips:
        found, ids = _labelled(strip, transform, connectivity)
        parent = {i: i for i in found} | {-r: -r for r in open_}
        merged = {-r: p for r, p in open_.items()} | found
        if edge_ids is not None and edge_codes is not None:
            for a, b in _touching(edge_ids, edge_codes, ids[0], strip.codes[0], connectivity):
                _union(parent, -a, b)
        groups: dict[int, list[int]] = {}
        for i in parent:
            groups.setdefault(_root(parent, i), []).append(i)
        last = {_root(parent, int(i)) for i in np.unique(ids[-1]) if i}
        open_, ended = {}, []
        renamed: dict[int, int] = {}
        for root, members in groups.items():
            patch = merged[members[0]]
            for i in members[1:]:
                patch.join(merged[i])
            if root in last:
                key = len(open_) + 1
                open_[key] = patch
                renamed |= {i: key for i in members if i > 0}
            else:
                ended.append(patch)
        yield from sorted(ended, key=lambda p: p.first)
        table = np.zeros(int(ids.max()) + 1, np.int64)
        for i, key in renamed.items():
            table[i] = key
        edge_ids, edge_codes = table[ids[-1]], strip.codes[-1]
    yield from sorted(open_.values(), key=lambda p: p.first)


def _labelled(
    strip: Strip, transform: Affine, connectivity: int
) -> tuple[dict[int, Patch], npt.NDArray[np.int32]]:
    """Patches of one strip by label from 1, and the labels (h, W)."""
    reach = 1 if connectivity == 4 else 2
    ids: npt.NDArray[np.int32] = label(  # type: ignore[no-untyped-call]
        strip.codes, background=NODATA_CODE, connectivity=reach
    ).astype(np.int32)
    flat = ids.ravel()
    pixels = np.bincount(flat)
    area = np.bincount(flat, weights=strip.area_m2.ravel())
    chance = np.bincount(flat, weights=strip.probability.ravel())
    at = np.zeros(pixels.size, np.int64)
    at[flat[::-1]] = np.arange(flat.size)[::-1]  # the first pixel of each label is written last
    width = strip.codes.shape[1]
    code = strip.codes.ravel()[at]
    found = {
        i: Patch(
            (strip.top + int(at[i]) // width, int(at[i]) % width), int(code[i]), int(pixels[i]),
            float(area[i]), float(chance[i]),
        )
        for i in range(1, pixels.size)
    }  # fmt: skip
    here = transform @ Affine.translation(0, strip.top)
    # By sides always: rings that touch themselves at a corner are no valid polygon. The label
    # keeps the parts of an 8-connected patch together.
    for outline, value in shapes(ids, mask=ids > 0, connectivity=4, transform=here):
        outer, *holes = outline["coordinates"]
        found[int(value)].parts.append(Polygon(outer, holes))
    return found, ids


def _touching(
    above: npt.NDArray[np.int64], above_codes: npt.NDArray[np.uint8],
    below: npt.NDArray[np.int32], below_codes: npt.NDArray[np.uint8], connectivity: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Pairs of labels above and below a seam that belong together."""
    pairs = set()
    for step in (0,) if connectivity == 4 else (-1, 0, 1):
        n = above.size
        a = slice(max(step, 0), n + min(step, 0))
        b = slice(max(-step, 0), n + min(-step, 0))
        same = (above_codes[a] == below_codes[b]) & (above_codes[a] != NODATA_CODE)
        pairs |= set(zip(above[a][same].tolist(), below[b][same].tolist(), strict=True))
    return sorted(pairs)


def _root(parent: dict[int, int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def _union(parent: dict[int, int], a: int, b: int) -> None:
    parent[_root(parent, a)] = _root(parent, b)


def polygonise_map(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write ``class_map.gpkg``: polygons of the sieved class map where there is one.

    Columns: ``code``, ``class``, ``pixels``, ``area_ha`` (true), ``mean_probability`` of the class.
    """
    legend = read_legend(str(campaign.land_cover.classes))
    sieved = campaign.products.minimum_mapping_unit_ha > 0
    name = "class_map_mmu" if sieved else "class_map"
    found = patches(
        _strips(product_path(name, MAP), grid, legend), grid.geobox.affine,
        connectivity=campaign.products.connectivity,
    )  # fmt: skip
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _FILE_DATE})
    tags = map_tags(campaign) | {f"{TAG}PRODUCT": name}
    count = 0
    with atomic(MAP / "class_map.gpkg") as tmp:
        tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
        for frame in _frames(found, legend, grid.crs):
            pyogrio.write_dataframe(
                frame, tmp, driver="GPKG", layer=name, append=count > 0,
                geometry_type="MultiPolygon", layer_metadata=None if count else tags,
            )  # fmt: skip
            count += len(frame)
    log.info("wrote %s: %d polygons", MAP / "class_map.gpkg", count)


def _strips(path: Path, grid: CampaignGrid, legend: Legend) -> Iterator[Strip]:
    h, w = grid.geobox.shape
    rows = max(64, _STRIP_PX // w)
    with (
        rasterio.open(path) as codes,
        rasterio.open(product_path("probabilities", MAP)) as chances,
    ):
        for top in range(0, h, rows):
            window = Window(0, top, w, min(rows, h - top))
            found = codes.read(1, window=window)
            chance = np.zeros(found.shape, np.float32)
            for i, code in enumerate(legend.codes, 1):
                at = found == code
                if at.any():
                    # A pixel that the sieve filled counts with its new class.
                    chance[at] = chances.read(i, window=window)[at] * chances.scales[i - 1]
            yield Strip(top, found, _areas(grid, top, int(window.height)), chance)


def _areas(grid: CampaignGrid, top: int, h: int) -> npt.NDArray[np.float64]:
    """True pixel areas of a strip, (h, W), tile by tile as in the map's own areas."""
    out = np.empty((h, grid.geobox.shape[1]))
    size = grid.tile_px
    for row in range(top // size, (top + h - 1) // size + 1):
        for column in range(-(-out.shape[1] // size)):
            areas = row_areas_m2(grid.tile(column, row).geobox)
            first, last = max(row * size, top), min(row * size + areas.size, top + h)
            part = areas[first - row * size : last - row * size, None]
            out[first - top : last - top, column * size : column * size + size] = part
    return out


def _frames(found: Iterator[Patch], legend: Legend, crs: str) -> Iterator[gpd.GeoDataFrame]:
    """Tables of at most ``_CHUNK`` patches; one empty table where there is none."""
    names = dict(zip(legend.codes, legend.names, strict=True))
    held: list[Patch] = []
    written = False
    for patch in found:
        held.append(patch)
        if len(held) == _CHUNK:
            yield _frame(held, names, crs)
            held, written = [], True
    if held or not written:
        yield _frame(held, names, crs)


def _frame(held: list[Patch], names: dict[int, str], crs: str) -> gpd.GeoDataFrame:
    return gpd.GeoDataFrame(
        {
            "code": np.array([p.code for p in held], np.int32),
            "class": [names[p.code] for p in held],
            "pixels": np.array([p.pixels for p in held], np.int64),
            "area_ha": np.array([p.area_m2 / 1e4 for p in held], np.float64),
            "mean_probability": np.array([p.sum_probability / p.pixels for p in held], np.float64),
        },
        geometry=[p.geometry() for p in held],
        crs=crs,
    )  # fmt: skip
