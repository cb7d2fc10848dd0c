"""A finished scenes stage of a small simulated region, and faults put into it.

Masks and shifts come from the truth of the simulator, so that what is found is the fault.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import yaml
from scipy import ndimage

from support.road import ROOT
from terraloom.acquire.lock import lock_items
from terraloom.acquire.simulate import simulate_region
from terraloom.aoi import campaign_grid
from terraloom.config.campaign import Campaign
from terraloom.config.load import load_campaign
from terraloom.config.simulation import Simulation
from terraloom.grid import CampaignGrid, coarsen
from terraloom.io import geobox_of, read_json, write_json, write_raster
from terraloom.preprocess import scenes as stage
from terraloom.preprocess.reasons import Reason

S2 = "sentinel-2-l2a"
Item = dict[str, Any]
_BITS = {1: Reason.CLOUD, 2: Reason.SHADOW, 3: Reason.SNOW}


def make_campaign(sim: Simulation) -> tuple[Campaign, CampaignGrid]:
    """Campaign on a region simulated below the working folder."""
    simulate_region(sim, Path("resources/simulated"))
    keys = yaml.safe_load((ROOT / "config/campaigns/rehearsal.yaml").read_text())
    b = geobox_of("resources/simulated/truth/landcover.tif").boundingbox
    keys |= {
        "aoi": {"bbox": [b.left, b.bottom, b.right, b.top], "crs": "EPSG:32633"},
        "grid": {"crs": "EPSG:32633", "tile_px": 192, "tiles_per_job": 4},
        "scenes": {"jobs": 1},
    }
    keys["archive"]["simulation"] = sim.model_dump()
    keys["tasks"][0]["classes"] = "resources/simulated/classes.csv"
    Path("campaign.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    campaign = load_campaign("campaign.yaml")
    return campaign, campaign_grid(campaign)


def finish_stage(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write lock, verdicts, masks and shifts as the stages before the audit would."""
    lock = lock_items(campaign, grid)
    write_json(stage.ITEMS, lock)
    items = [i for i in lock["items"] if i["decision"] == "use"]
    write_json(stage.VERIFIED, {i["id"]: "ok" for i in items})
    optical = [i for i in items if i["source"] == S2]
    for period in campaign.cube.periods:
        ids = [i["id"] for i in optical if stage.item_period(campaign, i) == period.name]
        name = stage.MASKS / f"{period.name}-p000"
        files = {S2: f"{name}.tif"} if ids else {}
        if ids:
            box = geobox_of(_truth(ids[0]))
            write_raster(f"{name}.tif", np.stack([_reasons(i) for i in ids]), coarsen(box, 2),
                         nodata=255, band_names=ids)  # fmt: skip
        write_json(f"{name}.json", {"files": files, "scenes": {S2: ids} if ids else {}})
    moved = read_json("resources/simulated/truth/truth.json")["shifts"]
    shifts = {
        i["id"]: {"dy_px": moved[i["id"]][0], "dx_px": moved[i["id"]][1], "reliability": 1.0,
                  "residual_px": 0.01, "n_windows": 9}
        for i in optical
    }  # fmt: skip
    write_json(stage.SHIFTS, {"shifts": shifts, "refused": {}, "pixel_m": 10})


def _truth(item: str) -> str:
    return f"resources/simulated/truth/cloud/{item}.tif"


def _reasons(item: str) -> npt.NDArray[np.uint8]:
    with rasterio.open(_truth(item)) as src:
        codes = src.read(1)
    h, w = codes.shape
    parts = codes.reshape(h // 2, 2, w // 2, 2)
    out = np.zeros((h // 2, w // 2), np.uint8)
    for code, bit in _BITS.items():
        out[(parts == code).any(axis=(1, 3))] |= np.uint8(bit)
    return out


# --- faults ------------------------------------------------------------------------------------


def _rewrite(item: Item, folder: Path, change: Callable[..., Any] | None = None, **profile: Any
             ) -> None:  # fmt: skip
    """Give an item changed copies of its files."""
    for band, asset in item["assets"].items():
        with rasterio.open(asset["href"]) as src:
            data, keep = src.read(1), src.profile
        settings = {k: v(src.transform) if callable(v) else v for k, v in profile.items()}
        path = folder / f"{item['id']}-{band}.tif"
        plain = {k: keep[k] for k in ("width", "height", "count", "dtype", "nodata")}
        plain |= {"crs": keep["crs"], "transform": keep["transform"]} | settings
        with rasterio.open(path, "w", driver="GTiff", **plain) as dst:
            dst.write(data if change is None else change(data, band, asset).astype(data.dtype), 1)
        asset |= {"href": path.as_posix(), "size": path.stat().st_size, "checksum": None}


def half_pixel_shift(lock: Item, item: Item, folder: Path) -> None:
    """Content half a 10 m pixel further right, after the alignment."""

    def move(data: npt.NDArray[Any], band: str, asset: Item) -> npt.NDArray[Any]:
        by = (0, 5.0 / asset["resolution_m"])
        moved = ndimage.shift(data.astype(np.float32), by, order=3, mode="nearest")
        return np.asarray(np.clip(moved, 1, 65535).round())

    _rewrite(item, folder, move)


def thousand_dn(lock: Item, item: Item, folder: Path) -> None:
    """Digital numbers 1000 too high."""
    _rewrite(item, folder, lambda data, band, asset: np.where(data > 0, data + 1000, 0))


def offset_twice(lock: Item, item: Item, folder: Path) -> None:
    """An offset taken off again."""
    for asset in item["assets"].values():
        asset["offset"] -= 0.1


def duplicate(lock: Item, item: Item, folder: Path) -> None:
    """The same pixels under a second id."""
    twin = copy.deepcopy(item) | {"id": item["id"] + "_TWIN"}
    lock["items"].append(twin)
    for path, key in ((stage.VERIFIED, None), (stage.SHIFTS, "shifts")):
        content = read_json(path)
        part = content if key is None else content[key]
        part[twin["id"]] = part[item["id"]]
        write_json(path, content)
    for path in stage.MASKS.glob("*.json"):
        content = read_json(path)
        ids = content["scenes"].get(S2, [])
        if item["id"] in ids:
            with rasterio.open(content["files"][S2]) as src:
                masks = src.read()
            box = geobox_of(content["files"][S2])
            masks = np.concatenate([masks, masks[[ids.index(item["id"])]]])
            write_raster(content["files"][S2], masks, box, nodata=255)
            ids.append(twin["id"])
            write_json(path, content)


def swapped_bands(lock: Item, item: Item, folder: Path) -> None:
    """Red and near infrared exchanged."""
    a, b = item["assets"]["B04"], item["assets"]["B08"]
    a["href"], b["href"] = b["href"], a["href"]


def half_pixel_grid(lock: Item, item: Item, folder: Path) -> None:
    """Corners given as pixel centres."""
    _rewrite(item, folder, transform=lambda t: t @ t.translation(0.5, 0.5))


def constant_band(lock: Item, item: Item, folder: Path) -> None:
    """One band of one value."""
    _rewrite(item, folder, lambda data, band, asset: np.full_like(data, 1234)
             if band == "B05" else data)  # fmt: skip


def wrong_crs(lock: Item, item: Item, folder: Path) -> None:
    """The neighbouring UTM zone, in the files and in the record."""
    _rewrite(item, folder, crs="EPSG:32632")
    item["crs"] = "EPSG:32632"


#: Fault, and the check that names it.
FAULTS: dict[str, tuple[Callable[[Item, Item, Path], None], str]] = {
    "half-pixel shift": (half_pixel_shift, "shift"),
    "+1000 DN": (thousand_dn, "offset"),
    "offset twice": (offset_twice, "offset"),
    "duplicate": (duplicate, "duplicate"),
    "swapped bands": (swapped_bands, "band order"),
    "half-pixel grid": (half_pixel_grid, "lattice"),
    "constant band": (constant_band, "constant band"),
    "wrong CRS tag": (wrong_crs, "place"),
}
