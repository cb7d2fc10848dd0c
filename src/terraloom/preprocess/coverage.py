"""How much of the area the scenes show: valid shares of dates, and tiles without any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window
from shapely import from_wkt, union_all
from shapely.geometry import box

from terraloom.acquire.sources import load_source
from terraloom.aoi import to_crs
from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, Tile
from terraloom.io import geobox_of
from terraloom.preprocess.checks import LEAST_PIXELS, Record, record
from terraloom.preprocess.reasons import INVALID, Reason
from terraloom.preprocess.scenes import mask_manifests
from terraloom.preprocess.stack import MASK_OUTSIDE, Scene
from terraloom.preprocess.views import View

__all__ = ["check_tiles", "check_valid"]

#: Share of the clear pixels that every band must have values at.
LEAST_VALID = 0.5

Bool = npt.NDArray[np.bool_]


def check_valid(view: View) -> Record:
    """Where the mask says clear, every band has values."""
    clear = int(view.clear.sum())
    shares = {
        b: float(np.isfinite(v)[view.clear].mean()) if clear else 1.0 for b, v in view.bands.items()
    }
    lost = [f"{b} has values at {100 * s:.0f} %" for b, s in shares.items() if s < LEAST_VALID]
    enough = clear >= LEAST_PIXELS and view.expected > LEAST_VALID
    return record(
        "valid share", view.id, ok=not lost or not enough,
        found=("; ".join(lost) + " of the clear pixels")
        if lost else f"{100 * float(view.clear.mean()):.0f} % of the windows are clear, and "
        f"bands have values at {100 * min(shares.values(), default=1.0):.0f} % of these",
        allowed=f"at least {100 * LEAST_VALID:.0f} % of the clear pixels in every band",
        fix=f"correct the nodata value of the band, fetch {view.id} again, or leave the band out "
        "of sources[].bands",
    )  # fmt: skip


def check_tiles(campaign: Campaign, grid: CampaignGrid, scenes: Sequence[Scene]) -> list[Record]:
    """Every tile has some observation; tiles that were never clear are named, which is no fault."""
    tiles = grid.tiles()
    valid, clear, masked = _seen(campaign, grid, tiles, {str(s.item["id"]) for s in scenes})
    other = [s for s in scenes if str(s.item["id"]) not in masked]
    dated = [s for s in other if not load_source(str(s.item["source"])).static]
    covered = _covered(dated, grid, tiles)
    static_only = not masked and not dated
    records = []
    for k, tile in enumerate(tiles):
        ok = bool(valid[k] or covered[k] or static_only)
        found = "clear pixels" if clear[k] else "never clear"
        if not valid[k]:
            found = "only scenes without masks" if covered[k] else "no observation in any period"
        records.append(
            record(
                "tile", tile.name, ok=ok, found=found, allowed="at least one observation",
                fix="cut the AOI to where there are scenes, add scenes (cube.periods, "
                "sources[].max_cloud_pct), or go on without the tile (scenes.on_audit: report)",
            )
        )  # fmt: skip
    return records


def _seen(
    campaign: Campaign, grid: CampaignGrid, tiles: Sequence[Tile], used: set[str]
) -> tuple[Bool, Bool, set[str]]:
    """Per tile whether any used scene has pixels there, and clear ones; ids that have masks."""
    valid, clear = np.zeros(len(tiles), bool), np.zeros(len(tiles), bool)
    masked: set[str] = set()
    for manifest in mask_manifests(campaign):
        for source, file in manifest["files"].items():
            strip = geobox_of(file)
            bands = [n for n, i in enumerate(manifest["scenes"][source], 1) if i in used]
            masked |= {manifest["scenes"][source][n - 1] for n in bands}
            with rasterio.open(file) as src:
                for k, tile in enumerate(tiles):
                    window = _window(tile, strip.affine, strip.shape)
                    if window is None or (valid[k] and clear[k]):
                        continue
                    for band in bands:
                        codes = src.read(band, window=window)
                        inside = codes != MASK_OUTSIDE
                        valid[k] |= bool((inside & ((codes & int(Reason.NODATA)) == 0)).any())
                        clear[k] |= bool((inside & ((codes & int(INVALID)) == 0)).any())
                        if valid[k] and clear[k]:
                            break
    return valid, clear, masked


def _window(tile: Tile, affine: object, shape: Sequence[int]) -> Window | None:
    """Pixels of a strip that a tile covers; None: none."""
    b = tile.geobox.boundingbox
    (c0, r0), (c1, r1) = (~affine @ p for p in ((b.left, b.top), (b.right, b.bottom)))  # type: ignore[operator]
    rows = slice(max(round(r0), 0), min(round(r1), shape[0]))
    cols = slice(max(round(c0), 0), min(round(c1), shape[1]))
    if rows.stop <= rows.start or cols.stop <= cols.start:
        return None
    return Window.from_slices(rows, cols)


def _covered(scenes: Sequence[Scene], grid: CampaignGrid, tiles: Sequence[Tile]) -> Bool:
    """Per tile whether the footprint of any of the scenes touches it."""
    outlines = [s.item.get("footprint") for s in scenes]
    if not scenes or not all(outlines):
        return np.full(len(tiles), bool(scenes))
    area = to_crs(union_all([from_wkt(str(o)) for o in outlines]), "EPSG:4326", grid.crs)
    boxes = [t.geobox.boundingbox for t in tiles]
    return np.array([area.intersects(box(b.left, b.bottom, b.right, b.top)) for b in boxes])
