"""Every asset of every locked item is checked before anything is computed from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from terraloom.acquire.assets import read_band, verify_asset
from terraloom.acquire.fetch import is_remote, limit_requests, read_many
from terraloom.acquire.records import S2_OFFSET
from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.errors import SceneError, StateError
from terraloom.grid import CampaignGrid
from terraloom.io import digest_json, read_json, write_json
from terraloom.log import get_logger, progress
from terraloom.preprocess.radiometry import ScaleOffset, check_offset, dn_statistics
from terraloom.preprocess.scenes import ITEMS, VERIFIED
from terraloom.state import code_digest, files_digest

__all__ = ["PASSED", "verify_items"]

#: Id of each item that passed, and the digest of all that this depended on.
PASSED = Path("work/verified.json")
#: Radiometry is checked on a view of the AOI of at most this many pixels a side.
_VIEW_PX = 256
#: Cloud cover from which a bright scene says nothing about its offset, percent.
_CLOUDED_PCT = 50
#: Items, and assets of one item, that are checked at once.
_LOCAL_ITEMS, _ASSETS = 4, 4
#: A killed job loses at most this much of its work, seconds.
_SAVE_S = 10.0

log = get_logger(__name__)


def verify_items(campaign: Campaign, grid: CampaignGrid) -> None:
    """Check assets and radiometry of all used items.

    Writes ``verified.json``: id to ``ok`` or what is wrong. Items that passed before, and are the
    same still (record, local files, settings, code), are not checked again.

    Raises:
        SceneError: With policy ``stop`` the first bad item; with ``skip-and-report`` when more
            items fail than allowed, naming them.
    """
    items = [i for i in read_json(ITEMS)["items"] if i["decision"] == "use"]
    verdicts = _verdicts(campaign, grid, items)
    bad = [(i, e) for i, e in zip(items, verdicts, strict=True) if e is not None]
    for _, err in bad:
        log.warning("%s", err)
    if bad and campaign.scenes.on_bad_item == "stop":
        raise bad[0][1]
    share = 100 * len(bad) / max(len(items), 1)
    if share > campaign.scenes.max_failed_pct:
        names = ", ".join(i["id"] for i, _ in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise SceneError(
            f"{len(bad)} of {len(items)} items cannot be used ({share:.0f} %): {names}; first: "
            f"{bad[0][1]}",
            where=f"campaign {campaign.name}",
            allowed=f"scenes.max_failed_pct {campaign.scenes.max_failed_pct:g}",
            fix="fetch the files again, or raise scenes.max_failed_pct",
        )
    write_json(
        VERIFIED,
        {
            i["id"]: "ok" if e is None else f"{e.where}: {e.found}"
            for i, e in zip(items, verdicts, strict=True)
        },
    )


def _verdicts(
    campaign: Campaign, grid: CampaignGrid, items: Sequence[dict[str, Any]]
) -> list[SceneError | None]:
    """What is wrong with each item; None where nothing is."""
    settings = [
        code_digest("preprocess.verify"), files_digest("acquire/sources"),
        campaign.scenes.max_asset_gb, grid.crs, list(grid.geobox.shape),
        list(grid.geobox.affine)[:6],
    ]  # fmt: skip
    digests = {i["id"]: digest_json([i, settings, _files(i)]) for i in items}
    before = _passed_before()
    passed = {i: d for i, d in digests.items() if before.get(i) == d}
    todo = [i for i in items if i["id"] not in passed]
    if passed:
        log.info("%d items passed before and are not checked again", len(passed))
    limit_requests(campaign.scenes.requests, campaign.scenes.timeout_s)
    remote = any(is_remote(a["href"]) for i in todo for a in i["assets"].values())
    found: dict[str, SceneError | None] = dict.fromkeys(passed)
    saved = time.monotonic()
    try:
        with ThreadPoolExecutor(campaign.scenes.requests if remote else _LOCAL_ITEMS) as pool:
            results = pool.map(partial(_verdict, campaign=campaign, grid=grid), todo)
            checked = progress(results, total=len(todo), what="items checked")
            for item, err in zip(todo, checked, strict=True):
                found[item["id"]] = err
                if err is None:
                    passed[item["id"]] = digests[item["id"]]
                if time.monotonic() - saved > _SAVE_S:
                    write_json(PASSED, passed)
                    saved = time.monotonic()
    finally:
        write_json(PASSED, passed)
    return [found[i["id"]] for i in items]


def _passed_before() -> dict[str, str]:
    try:
        passed: dict[str, str] = read_json(PASSED)
    except StateError:
        return {}
    return passed


def _files(item: dict[str, Any]) -> list[tuple[int, int] | None]:
    """Size and time of change of an item's local files: a replaced one is checked again."""
    found: list[tuple[int, int] | None] = []
    for asset in item["assets"].values():
        path = None if is_remote(asset["href"]) else Path(asset["href"])
        stat = path.stat() if path is not None and path.is_file() else None
        found.append(None if stat is None else (stat.st_size, stat.st_mtime_ns))
    return found


def _verdict(item: dict[str, Any], campaign: Campaign, grid: CampaignGrid) -> SceneError | None:
    max_bytes = campaign.scenes.max_asset_gb * 1e9
    try:
        calls = [partial(verify_asset, item, b, max_bytes=max_bytes) for b in item["assets"]]
        read_many(calls, _ASSETS if _remote(item) else 1)
        if load_source(item["source"]).kind == "optical":
            _check_radiometry(item, grid)
    except SceneError as err:
        return err
    return None


def _remote(item: dict[str, Any]) -> bool:
    return any(is_remote(a["href"]) for a in item["assets"].values())


def _check_radiometry(item: dict[str, Any], grid: CampaignGrid) -> None:
    """Hold scale and offset of an item against its pixels on a coarse view of the AOI."""
    side = max(grid.geobox.shape)
    view = grid.geobox.zoom_out(max(side / _VIEW_PX, 1))
    bands = [b for b in item["assets"] if b not in load_source(item["source"]).layers]
    calls = [partial(read_band, item, b, view, resampling="nearest") for b in bands]
    statistics, decoding = {}, {}
    for band, values in zip(bands, read_many(calls, _ASSETS if _remote(item) else 1), strict=True):
        pair = ScaleOffset(item["assets"][band]["scale"], item["assets"][band]["offset"])
        statistics[band] = dn_statistics((values - pair.offset) / pair.scale, nodata=None)
        decoding[band] = pair
    table = load_source(item["source"])
    # Under clouds nothing is dark: there the audit, which knows the masks, is the judge.
    clouded = (item.get("cloud_pct") or 0) > _CLOUDED_PCT
    offset = S2_OFFSET if table.offset_rule == "sentinel-2" else table.offset
    usual = ScaleOffset(table.scale, 0.0 if clouded else offset)
    check_offset(statistics, decoding, item["id"], roles=table.roles(), usual=usual)
