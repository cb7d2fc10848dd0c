"""From predicted tiles to products: cloud-optimised rasters, and the facts about the map.

Rasters are written tile by tile: memory is bounded by the tile, not by the region. All files are
made beside the final ones and moved when the last is done, so the map is never half of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, Tile, geobox_record, row_areas_m2, window_of
from terraloom.io import cog_from_windows, digest_json, read_store, sha256, write_json, write_text
from terraloom.legend import IGNORE_INDEX, NODATA_CODE, Legend, read_legend
from terraloom.log import get_logger
from terraloom.origin import TAG, map_tags
from terraloom.plan import (
    CUBES,
    SUFFIXES,
    TILES,
    product_names,
    product_path,
    product_suffix,
)
from terraloom.predict.index import write_index, write_overviews
from terraloom.predict.picture import Picture
from terraloom.predict.qgis import write_styles
from terraloom.predict.sieve import least_pixels, sieved_windows
from terraloom.predict.specs import Spec, product_specs
from terraloom.predict.tile_coverage import TileCover
from terraloom.predict.tile_products import tile_products, tile_records
from terraloom.predict.tiles import check_tiles, picture_of, tile_reader
from terraloom.predict.trust import TrustFacts
from terraloom.preprocess.reasons import Reason
from terraloom.scratch import scratch_folder, staging, sweep

__all__ = ["MAP", "mosaic_products"]

MAP = Path("results/map")

Windows = Iterator[tuple[slice, slice, npt.NDArray[Any]]]
log = get_logger(__name__)


def mosaic_products(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write all rasters of the map, their styles and ``map.json``.

    With ``products.layout: tiles`` the rasters of the tiles are there already
    (:func:`terraloom.predict.tile_products.write_tiles`); their indexes and overviews are written.

    Raises:
        StateError: A tile is missing or damaged; the products stay as they were.
    """
    legend = read_legend(str(campaign.land_cover.classes))
    specs = product_specs(campaign, legend)
    check_tiles(campaign, grid, specs, grid.tiles())
    picture = picture_of(grid)
    tags = map_tags(campaign)
    sweep([MAP])  # of a job that was killed
    with scratch_folder(MAP, "map") as folder:
        if campaign.products.layout == "tiles":
            _indexes(folder, campaign, grid, tile_products(specs), tags)
        else:
            _one_each(folder, grid, legend, tile_products(specs), picture, tags)
        unit = {}
        if "class_map_mmu" in specs:
            read = tile_reader("class_map", legend, picture)
            unit = _sieved(folder, campaign, grid, specs["class_map_mmu"], read, tags)
        write_styles(folder, legend, specs)
        _publish(folder, specs)
    facts = _facts(campaign, grid, legend, picture)
    write_json(MAP / "map.json", facts | ({"minimum_mapping_unit": unit} if unit else {}))


def _one_each(
    folder: Path, grid: CampaignGrid, legend: Legend, specs: dict[str, Spec], picture: Picture,
    tags: dict[str, str],
) -> None:  # fmt: skip
    """One raster per product, of all tiles."""
    for name, spec in specs.items():
        windows = _windows(grid, tile_reader(name, legend, picture), spec)
        cog_from_windows(
            folder / f"{name}.tif", grid.geobox, windows,
            tags=tags | {f"{TAG}PRODUCT": name}, **spec.options(),
        )  # fmt: skip


def _indexes(
    folder: Path, campaign: Campaign, grid: CampaignGrid, specs: dict[str, Spec],
    tags: dict[str, str],
) -> None:  # fmt: skip
    """One index per product over the rasters of its tiles, with overviews."""
    suffix = {n: product_suffix(campaign, n, len(grid.tiles())) for n in specs}
    for name, held in tile_records(campaign, grid, specs).items():
        path, spec = folder / f"{name}{suffix[name]}", specs[name]
        # So that the digest of the index vouches for its tiles.
        own = tags | {f"{TAG}PRODUCT": name, f"{TAG}TILES": digest_json(held["sums"])}
        write_index(path, grid, spec, held["files"], held["stats"], own)
        write_overviews(path, MAP, grid, spec, held["files"])


def _sieved(
    folder: Path, campaign: Campaign, grid: CampaignGrid, spec: Spec,
    read: Callable[[Tile], npt.NDArray[Any]], tags: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Write the class map with a minimum mapping unit; returns what it changed."""
    keys = campaign.products
    least = least_pixels(grid, keys.minimum_mapping_unit_ha)
    facts: dict[str, Any] = {"ha": keys.minimum_mapping_unit_ha, "pixels": least,
                             "connectivity": keys.connectivity}  # fmt: skip
    area = np.zeros(256)
    codes = [c for c in spec.colormap or {} if c != NODATA_CODE]
    with scratch_folder(staging(folder), "sieve") as scratch:
        windows = sieved_windows(
            _windows(grid, read, spec), grid, scratch, least=least,
            connectivity=keys.connectivity, facts=facts,
        )  # fmt: skip

        def counted() -> Windows:
            for rows, cols, data in windows:
                tile = grid.tile(cols.start // grid.tile_px, rows.start // grid.tile_px)
                row_area = row_areas_m2(tile.geobox)
                for code in codes:
                    area[code] += float(((data[0] == code).sum(axis=1) * row_area).sum()) / 1e4
                yield rows, cols, data

        cog_from_windows(
            folder / f"{spec.name}.tif", grid.geobox, counted(),
            tags=tags | {f"{TAG}PRODUCT": spec.name}, **spec.options(),
        )  # fmt: skip
    changed = 100 * facts["changed_px"] / max(1, facts["mapped_px"])
    return facts | {"changed_pct": changed, "area_ha": {str(c): area[c] for c in codes}}


def _publish(folder: Path, specs: Iterable[str]) -> None:
    """Move all files to the map; what another layout left of the same products goes."""
    made = {f.name for f in folder.iterdir()}
    for name in {*specs, "class_map_mmu"}:
        for suffix in SUFFIXES:
            for file in MAP.glob(f"{name}{suffix}*"):
                if file.name not in made:
                    file.unlink()
    for name in sorted(made):
        (folder / name).replace(MAP / name)
        log.info("wrote %s", MAP / name)


def _windows(grid: CampaignGrid, read: Callable[[Tile], npt.NDArray[Any]], spec: Spec) -> Windows:
    """Tiles of the AOI with their data; cells outside the AOI with no data."""
    h, w = grid.geobox.shape
    inside = {(t.column, t.row) for t in grid.tiles()}
    for row in range(-(-h // grid.tile_px)):
        for column in range(-(-w // grid.tile_px)):
            tile = grid.tile(column, row)
            rows, cols = window_of(tile.geobox, grid.geobox)
            if (column, row) in inside:
                yield rows, cols, read(tile)
            else:
                shape = (spec.count, *tile.geobox.shape)
                yield rows, cols, np.full(shape, spec.outside, spec.dtype)


def _facts(
    campaign: Campaign, grid: CampaignGrid, legend: Legend, picture: Picture
) -> dict[str, Any]:
    area = dict.fromkeys(legend.codes, 0.0)
    reasons = dict.fromkeys(Reason, 0)
    total = valid = 0
    codes = np.array([NODATA_CODE, *legend.codes])
    cover = TileCover()
    trust = TrustFacts(legend.codes)
    for tile in grid.tiles():
        store = read_store(TILES / f"{tile.name}.zip")
        index = store["class_index"].to_numpy()
        cover.add(tile, read_store(CUBES / f"{tile.name}.zip"), index)
        row_area = row_areas_m2(tile.geobox)
        for k, code in enumerate(legend.codes):
            area[code] += float(((index == k).sum(axis=1) * row_area).sum()) / 1e4
        bits = store["reasons"].to_numpy()
        for reason in Reason:
            reasons[reason] += int(((bits & reason) > 0).sum())
        trust.add(tile.name, store, row_area)
        total += bits.size
        valid += int((index != IGNORE_INDEX).sum())
    write_text(MAP / "tiles.csv", cover.csv())
    whole = sum(area.values())
    log.info("%.1f %% of the pixels are mapped (%d codes)", 100 * valid / total, len(codes) - 1)
    return {
        "campaign": campaign.name,
        "geobox": geobox_record(grid.geobox),
        "tiles": len(grid.tiles()),
        "valid_pct": 100 * valid / total,
        "reason_pct": {r.name.lower(): 100 * n / total for r, n in reasons.items() if r.name},
        "image": picture.record(),
        **trust.record(),
        "image_period": campaign.cube.periods[-1].name,
        "legend": [
            {
                "code": code, "name": name, "color": color, "map_area_ha": area[code],
                "share_pct": 100 * area[code] / whole if whole else None,
            }
            for code, name, color in zip(legend.codes, legend.names, legend.colors, strict=True)
        ],
        "products": {
            n: {"file": (path := product_path(n, MAP)).name, "sha256": sha256(path)}
            for n in product_names(campaign)
        },
    }  # fmt: skip
