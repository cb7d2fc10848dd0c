"""Extending an item lock with what the catalogues have got since; what it holds stays as it is."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from shapely import from_wkt

from terraloom.acquire.lock import (
    NO_RECORD,
    TWIN_OVERLAP,
    TWIN_SECONDS,
    keys_digest,
    lock_items,
)
from terraloom.acquire.locked import LOCK_KEYS
from terraloom.config.campaign import Campaign
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_json

__all__ = ["update_items", "update_lock"]


def update_lock(
    campaign: Campaign, grid: CampaignGrid, old: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Extend a lock with the items that the catalogues have got since.

    What the lock holds stays as it is: its items, their decisions, and items that a catalogue has
    lost. An item whose record could not be read then is asked for again. A new processing of an
    acquisition that is in use is dropped, since it would change a finished map.

    Args:
        campaign: The campaign, unchanged since the lock was made.
        grid: Its grid.
        old: The lock.

    Returns:
        The longer lock, and the records that are new in it.

    Raises:
        StateError: The lock was made for other settings.
        SceneError: As of :func:`lock_items`.
    """
    if old.get("keys") != keys_digest(campaign):
        raise StateError(
            "the campaign changed since its items were locked",
            where="results/scenes/items.json", allowed=f"the same {', '.join(LOCK_KEYS)}",
            fix="run snakemake, which makes a new lock; or take the change back",
        )  # fmt: skip
    kept = [r for r in old["items"] if not r["why"].startswith(NO_RECORD)]
    known = {(r["source"], r["id"]) for r in kept}
    found = lock_items(campaign, grid)["items"]
    new = [r for r in found if (r["source"], r["id"]) not in known]
    before = {(r["source"], r["id"]): r for r in old["items"]}
    new = [r for r in new if not _same(r, before.get((r["source"], r["id"])))]
    kept += [r for k, r in before.items() if k not in known | {(n["source"], n["id"]) for n in new}]
    generation = max((r.get("added", 0) for r in old["items"]), default=0) + 1
    for record in new:
        record["added"] = generation
        twin = next((r for r in kept if _twins(record, r)), None)
        if record["decision"] == "use" and twin is not None:
            record |= {"decision": "drop", "why": f"reprocessed twin: of {twin['id']}, in use"}
    items = sorted(kept + new, key=lambda r: (r["datetime"], r["id"]))
    return {**old, "items": items}, new


def update_items(campaign: Campaign, grid: CampaignGrid, path: Path) -> str:
    """Extend the lock at ``path``, and say what was added.

    Raises:
        StateError: There is no lock, it is frozen, or it was made for other settings.
        SceneError: As of :func:`lock_items`.
    """
    if campaign.milestones.scenes == "frozen":
        raise StateError(
            "the scenes are frozen", where="milestones.scenes", fix="set it to `build`"
        )
    lock, new = update_lock(campaign, grid, read_json(path))
    used = [r for r in new if r["decision"] == "use"]
    if not new:
        return "No new item; the lock stays as it is."
    write_json(path, lock)
    days = f", {used[0]['datetime'][:10]} to {used[-1]['datetime'][:10]}" if used else ""
    return (
        f"{len(new)} new items, {len(used)} of them used{days}.\n"
        "Next: snakemake -n (shows what they touch), then snakemake."
    )


def _same(new: dict[str, Any], old: dict[str, Any] | None) -> bool:
    """Whether an item that could not be read before still cannot."""
    return old is not None and new["why"] == old["why"]


def _twins(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["source"] != b["source"] or b["decision"] != "use":
        return False
    if not (a.get("footprint") and b.get("footprint")):
        return False
    apart = datetime.fromisoformat(a["datetime"]) - datetime.fromisoformat(b["datetime"])
    if abs(apart.total_seconds()) > TWIN_SECONDS:
        return False
    one, two = from_wkt(a["footprint"]), from_wkt(b["footprint"])
    union = float(one.union(two).area)
    return bool(union and float(one.intersection(two).area) / union > TWIN_OVERLAP)
