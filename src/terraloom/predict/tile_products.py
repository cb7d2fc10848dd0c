"""Products as one raster per tile, written by jobs, for maps of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import rasterio

from terraloom.bandstats import BandStats
from terraloom.config.campaign import Campaign
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid
from terraloom.io import (
    cog_from_windows,
    digest_json,
    read_json,
    sha256,
    write_json,
)
from terraloom.legend import read_legend
from terraloom.log import get_logger, progress
from terraloom.origin import TAG, map_tags
from terraloom.predict.specs import Spec, product_specs
from terraloom.predict.tiles import check_tiles, picture_of, tile_reader

__all__ = ["TILED", "tile_products", "tile_records", "write_tiles"]

TILED = Path("results/map/tiles")
#: Made of the whole map, not of its tiles.
WHOLE = ("class_map_mmu",)

log = get_logger(__name__)


def tile_products(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Products that are made of tiles."""
    return {n: s for n, s in specs.items() if n not in WHOLE}


def write_tiles(campaign: Campaign, grid: CampaignGrid, batch: str) -> None:
    """Write the products of the tiles of one job, and its manifest; finished files are kept.

    Raises:
        StateError: A predicted tile is missing or damaged; nothing is written.
    """
    legend = read_legend(str(campaign.land_cover.classes))
    # Names of classes are in the index; a tile would need a second file for them.
    specs = {
        n: replace(s, category_names=())
        for n, s in tile_products(product_specs(campaign, legend)).items()
    }
    tiles = grid.batches(campaign.grid.tiles_per_job)[batch]
    inputs = check_tiles(campaign, grid, specs, tiles)
    picture = picture_of(grid)
    tags = map_tags(campaign)
    made: dict[str, Any] = {}
    for tile in progress(tiles, what=f"{batch}: tiles written"):
        made[tile.name] = {}
        for name, spec in specs.items():
            path = TILED / name / f"{tile.name}.tif"
            own = tags | {f"{TAG}PRODUCT": name, f"{TAG}TILE": tile.name}
            facts = [inputs[tile.name], spec.options(), picture.record(), own]
            own[f"{TAG}INPUT"] = digest_json(facts)
            stats = _finished(path, own[f"{TAG}INPUT"])
            if stats is None:
                h, w = tile.geobox.shape
                window = (slice(0, h), slice(0, w), tile_reader(name, legend, picture)(tile))
                stats = cog_from_windows(
                    path, tile.geobox, iter([window]), tags=own, **spec.options()
                )
            made[tile.name][name] = {
                "sha256": sha256(path), "stats": [s.record() for s in stats]
            }  # fmt: skip
    write_json(TILED / f"{batch}.json", {"tiles": made})


def _finished(path: Path, digest: str) -> list[BandStats] | None:
    """Statistics of a file that an earlier job made of the same inputs; else None."""
    if not path.is_file():
        return None
    try:
        with rasterio.open(path) as src:
            if src.tags().get(f"{TAG}INPUT") != digest:
                return None
            found = []
            for i in src.indexes:
                stats = BandStats(src.nodata)
                stats.add(src.read(i))
                found.append(stats)
            return found
    except rasterio.errors.RasterioError:
        return None  # damaged since: written again


def tile_records(
    campaign: Campaign, grid: CampaignGrid, specs: Mapping[str, Spec]
) -> dict[str, dict[str, Any]]:
    """Records of all tiles by product, each file checked against its digest.

    Manifests of jobs that there are no more are removed: what they say of files may not hold.

    Returns:
        Per product ``files`` (paths from the folder of the map, by tile), ``stats`` (one
        :class:`BandStats` per band) and ``digest`` of all its tiles.

    Raises:
        StateError: Files are missing or are not those of their job; names them.
    """
    out: dict[str, dict[str, Any]] = {
        n: {"files": {}, "stats": [BandStats(s.nodata) for _ in range(s.count)], "sums": []}
        for n, s in specs.items()
    }
    bad: list[str] = []
    jobs: set[str] = set()
    batches = grid.batches(campaign.grid.tiles_per_job)
    for batch, tiles in batches.items():
        manifest = read_json(TILED / f"{batch}.json")["tiles"]
        for tile in tiles:
            for name, held in out.items():
                path = TILED / name / f"{tile.name}.tif"
                record = manifest.get(tile.name, {}).get(name)
                if record is None or not path.is_file() or sha256(path) != record["sha256"]:
                    bad.append(path.as_posix())
                    jobs.add(f"{TILED}/{batch}.json")
                    continue
                held["files"][tile.name] = f"{TILED.name}/{name}/{tile.name}.tif"
                held["sums"].append(record["sha256"])
                for stats, part in zip(held["stats"], record["stats"], strict=True):
                    stats.merge(part)
    if bad:
        named = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise StateError(
            f"{len(bad)} tiles are missing or damaged: {named}", where=TILED.as_posix(),
            allowed="the files that their jobs wrote",
            fix=f"rm -f {' '.join([*bad[:5], *sorted(jobs)])}; then rerun: other tiles are kept",
        )  # fmt: skip
    for old in TILED.glob("b*.json"):
        if old.stem not in batches:
            old.unlink()  # of tiles that were packed into more jobs before
    return out
