"""The item lock: which items a campaign reads, and why not the others.

The lock is made once and kept. From then on the campaign does not depend on what a catalogue
answers tomorrow.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from shapely.errors import GEOSException
from shapely.geometry.base import BaseGeometry

from terraloom.acquire.catalogue import Query, find_items
from terraloom.acquire.hrefs import safe_id
from terraloom.acquire.locked import LOCK_KEYS
from terraloom.acquire.records import item_baseline, item_footprint, item_record, item_time
from terraloom.acquire.sources import Provider, SourceTable, load_source
from terraloom.aoi import to_crs
from terraloom.config.campaign import Campaign, Composite, Source
from terraloom.errors import AoiError, ConfigError, SceneError
from terraloom.grid import CampaignGrid
from terraloom.io import digest_json
from terraloom.log import get_logger
from terraloom.plan import campaign_values

__all__ = [
    "NO_RECORD",
    "TWIN_OVERLAP",
    "TWIN_SECONDS",
    "keys_digest",
    "lock_items",
    "merge_periods",
]

log = get_logger(__name__)

#: Two items are one acquisition processed twice when they are this close in time (seconds) ...
TWIN_SECONDS = 60
#: ... and share this much of their outlines (intersection over union).
TWIN_OVERLAP = 0.9
NO_RECORD = "unreadable record"


@dataclass
class _Candidate:
    """An item on its way to a decision; ``why`` is set when it is dropped."""

    item: dict[str, Any]
    when: datetime | None = None
    outline: BaseGeometry | None = None
    why: str = ""
    bad: SceneError | None = None
    outside: bool = False

    @property
    def open(self) -> bool:
        return not self.why


def lock_items(campaign: Campaign, grid: CampaignGrid) -> dict[str, Any]:
    """Ask every source of a campaign for items and decide on each.

    Items are dropped for these reasons, in this order: unreadable record, outside the AOI, outside
    every period, older twin of a reprocessed item, too much cloud.

    Args:
        campaign: The campaign.
        grid: Its grid, which holds the AOI.

    Returns:
        ``{"campaign", "items"}``; items sorted by time and id, see the contract of items.json.

    Raises:
        ConfigError: A source without catalogue, an unknown source or band.
        AoiError: The AOI lies outside every item of a source.
        SceneError: Catalogue unreachable, no item found, none left, or an item that is refused
            while ``scenes.on_bad_item`` is ``stop``.
    """
    records: list[dict[str, Any]] = []
    for n, entry in enumerate(campaign.sources):
        found = _lock_source(campaign, grid, entry, where=f"sources[{n}] {entry.source}")
        used = sum(r["decision"] == "use" for r in found)
        log.info("%s: %d items found, %d used", entry.source, len(found), used)
        records += found
    seen: Counter[str] = Counter()
    for record in records:
        seen[record["id"]] += 1
        if seen[record["id"]] > 1:  # ids are file names: two sources may not share one
            record["id"] += f"-{seen[record['id']]}"
        record["added"] = 0
    records.sort(key=lambda r: (r["datetime"], r["id"]))
    return {"campaign": campaign.name, "keys": keys_digest(campaign), "items": records}


def keys_digest(campaign: Campaign) -> str:
    """Digest of what the lock depends on; a lock of other settings is not extended."""
    return digest_json(campaign_values(campaign, LOCK_KEYS))


def merge_periods(periods: list[Composite]) -> tuple[tuple[date, date], ...]:
    """Union of periods as intervals of days that neither overlap nor touch."""
    merged: list[tuple[date, date]] = []
    for start, end in sorted((p.start, p.end) for p in periods):
        if merged and start <= merged[-1][1] + timedelta(days=1):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _lock_source(
    campaign: Campaign, grid: CampaignGrid, entry: Source, *, where: str
) -> list[dict[str, Any]]:
    table = load_source(entry.source)
    bands = table.choose(entry.bands, where=f"{where}.bands")
    _check_lattice(campaign, table, bands, where)
    provider = table.provider(entry.provider, entry.catalogue, entry.collection, where=where)
    query = _query(campaign, grid, entry, table, provider)
    candidates = [_Candidate(i) for i in find_items(query)]
    if not candidates:
        raise SceneError(
            "no item found",
            where=f"{where}: {query}",
            fix="check the collection's dates and region, cube.periods and the AOI",
        )
    for c in candidates:
        _place(c, grid, query)
    if all(c.outside for c in candidates):
        raise AoiError(
            f"the area of interest lies outside all {len(candidates)} items found",
            where=f"{where}: {query}",
            fix="check aoi.bbox and aoi.crs (order west, south, east, north), or the collection",
        )
    _drop_twins([c for c in candidates if c.open])
    records = []
    for c in candidates:
        record = _decide(c, table, bands, provider, campaign)
        if c.open and record["id"] in campaign.scenes.exclude:
            c.why = "excluded by the campaign"
        _drop_cloudy(c, record, entry.max_cloud_pct)
        if c.bad is not None and campaign.scenes.on_bad_item == "stop":
            raise c.bad
        records.append(record)
    if not any(r["decision"] == "use" for r in records):
        reasons = Counter(r["why"].split(":")[0] for r in records)
        raise SceneError(
            f"none of {len(records)} items can be used ("
            + "; ".join(f"{n} x {why}" for why, n in reasons.most_common())
            + f"); first: {records[0]['id']}: {records[0]['why']}",
            where=f"{where}: {query}",
            fix="widen cube.periods, raise sources[].max_cloud_pct, or check the catalogue",
        )
    return records


def _check_lattice(campaign: Campaign, table: SourceTable, bands: list[str], where: str) -> None:
    """Pixels of every group must fit whole into the grid, or tiles would not abut."""
    for group in {table.bands[b].group for b in bands}:
        pixel_m = int(group.rsplit("_", 1)[1])
        if campaign.grid.lattice_m % pixel_m:
            raise ConfigError(
                f"pixels of {pixel_m} m (group {group}) on a grid of {campaign.grid.lattice_m} m",
                where=f"{where}: grid.lattice_m",
                allowed=f"a multiple of {pixel_m} that divides 480",
                fix="set grid.lattice_m to 480",
            )


def _query(
    campaign: Campaign, grid: CampaignGrid, entry: Source, table: SourceTable, provider: Provider
) -> Query:
    west, south, east, north = to_crs(grid.aoi, grid.crs, "EPSG:4326").bounds
    return Query(
        provider.catalogue,
        provider.collection,
        (west, south, east, north),
        () if table.static else merge_periods(campaign.cube.periods),
        filter=entry.filter,
        timeout_s=campaign.scenes.timeout_s,
    )


def _place(c: _Candidate, grid: CampaignGrid, query: Query) -> None:
    """Read time and outline; drop what lies outside the AOI or every period."""
    try:
        if not isinstance(c.item.get("properties"), dict):
            raise SceneError("the item has no properties", where=f"item {c.item['id']}")
        c.when = item_time(c.item)
        c.outline = to_crs(item_footprint(c.item), "EPSG:4326", grid.crs)
        touches = c.outline.intersection(grid.aoi).area > 0
    except (SceneError, GEOSException) as err:
        c.bad = err if isinstance(err, SceneError) else SceneError(f"unusable outline ({err})")
        c.why = f"{NO_RECORD}: {c.bad.found}"
        return
    day = c.when.date()
    if not touches:
        c.why, c.outside = "outside the AOI", True
    elif query.intervals and not any(a <= day <= b for a, b in query.intervals):
        c.why = f"outside every period: {day}"


def _drop_twins(candidates: list[_Candidate]) -> None:
    """Of one acquisition processed twice keep the newest processing."""

    def at(c: _Candidate) -> float:
        return c.when.timestamp() if c.when else 0.0

    ordered = sorted(candidates, key=lambda c: (at(c), c.item["id"]))
    for i, a in enumerate(ordered):
        for b in ordered[i + 1 :]:
            if at(b) - at(a) > TWIN_SECONDS or not a.open:
                break
            if b.open and _overlap(a, b) > TWIN_OVERLAP:
                old, new = sorted((a, b), key=lambda c: _processing(c.item))
                old.why = f"older twin: of {new.item['id']}"


def _overlap(a: _Candidate, b: _Candidate) -> float:
    if a.outline is None or b.outline is None:
        return 0.0
    both = float(a.outline.union(b.outline).area)
    return float(a.outline.intersection(b.outline).area) / both if both else 0.0


def _processing(item: dict[str, Any]) -> tuple[tuple[int, int], str, str]:
    p = item["properties"]
    made = p.get("s2:generation_time") or p.get("created") or p.get("updated") or ""
    return item_baseline(item) or (0, 0), str(made), item["id"]


def _decide(
    c: _Candidate, table: SourceTable, bands: list[str], provider: Provider, campaign: Campaign
) -> dict[str, Any]:
    """Record of a candidate; a refused one keeps only what is needed to report it."""
    record: dict[str, Any]
    if c.bad is None:
        try:
            record = item_record(
                c.item, table, bands, provider.catalogue,
                sign=provider.sign, allow_local=campaign.scenes.allow_local_files,
            )  # fmt: skip
        except SceneError as err:
            c.bad = err
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            found = f"malformed record ({type(err).__name__}: {err})"
            c.bad = SceneError(found, where=f"item {c.item['id']}")
        if c.bad is not None:
            c.why = c.why or f"{NO_RECORD}: {c.bad.found}"
    if c.bad is not None:
        log.warning("%s", c.bad)
        record = _stub(c, table)
    return record


def _drop_cloudy(c: _Candidate, record: dict[str, Any], max_cloud_pct: float) -> None:
    """Drop an item with too much cloud, and write the reason of any drop into the record."""
    cloud = record["cloud_pct"]
    if c.open and cloud is not None and cloud > max_cloud_pct:
        c.why = f"cloud: {cloud:g} % is more than {max_cloud_pct:g} %"
    if not c.open:
        record |= {"decision": "drop", "why": c.why}


def _stub(c: _Candidate, table: SourceTable) -> dict[str, Any]:
    raw = str(c.item["id"])
    try:
        name = safe_id(raw)
    except SceneError:
        name = f"refused-{hashlib.sha256(raw.encode()).hexdigest()[:12]}"
    return {
        "id": name,
        "source": table.key,
        "collection": table.collection,
        "datetime": c.when.strftime("%Y-%m-%dT%H:%M:%SZ") if c.when else "",
        "cloud_pct": None,
        "sun_azimuth_deg": None,
        "sun_elevation_deg": None,
        "view_azimuth_deg": None,
        "view_zenith_deg": None,
        "platform": "",
        "footprint": "",
        "crs": None,
        "offset_rule": "",
        "assets": {},
        "decision": "drop",
        "why": c.why,
    }
