"""What a finished item lock holds for one period or one place, as digests for the rules.

A rule that depends on "the scenes of this period" must not rerun because the lock got a scene of
another period. So the lock itself counts as ancient in the workflow, and the digests of the parts
of it that a job reads stand in the job's params.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from shapely import from_wkt
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from terraloom.aoi import to_crs
from terraloom.config.campaign import Campaign
from terraloom.grid import Tile
from terraloom.io import digest_json

__all__ = ["LOCK_KEYS", "ItemLock"]

#: Keys of the campaign that decide what the lock holds.
LOCK_KEYS = (
    "name", "aoi", "archive", "grid.crs", "sources", "cube.periods", "scenes.on_bad_item",
    "scenes.allow_local_files", "scenes.exclude",
)  # fmt: skip
#: Outlines are true to about this, and shifts reach beyond a tile, metres.
_REACH_M = 300.0


@dataclass(frozen=True)
class ItemLock:
    """The lock of a campaign as it stands on disk.

    Attributes:
        campaign: The campaign.
        items: Used items, in the order of the lock; None before the lock is made.
    """

    campaign: Campaign
    items: tuple[dict[str, Any], ...] | None

    @classmethod
    def read(cls, campaign: Campaign, path: Path) -> ItemLock:
        """The lock at ``path``; one that is absent or unreadable counts as not made yet."""
        try:
            items = json.loads(path.read_text(encoding="utf-8"))["items"]
            used = tuple(i for i in items if i["decision"] == "use")
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return cls(campaign, None)
        return cls(campaign, used)

    def digest(self) -> str:
        """Digest of all used items."""
        return "none" if self.items is None else digest_json(self.items)

    def of_period(self, period: str) -> str:
        """Digest of the items that the masks of a period depend on.

        These are its own and those around it that the lock got no later: a scene that comes
        later helps later scenes only, so that finished masks stay as they are.
        """
        if self.items is None:
            return "none"
        own = [i.get("added", 0) for i in self.items if self._period(i) == period]
        near = self.campaign.cube.around(period)
        return digest_json(
            [
                i
                for i in self.items
                if self._period(i) in near and i.get("added", 0) <= max(own, default=-1)
            ]
        )

    def of_tiles(self, tiles: Sequence[Tile]) -> str:
        """Digest of the used items that the cubes of tiles depend on: those that touch any."""
        if self.items is None:
            return "none"
        cells = [t.geobox.boundingbox for t in tiles]
        crs = str(tiles[0].geobox.crs)
        place = box(
            min(c.left for c in cells) - _REACH_M,
            min(c.bottom for c in cells) - _REACH_M,
            max(c.right for c in cells) + _REACH_M,
            max(c.top for c in cells) + _REACH_M,
        )
        lonlat = to_crs(place, crs, "EPSG:4326")
        touching = [
            item
            for item, outline in zip(self.items, self._outlines, strict=True)
            if outline is None or outline.intersects(lonlat)
        ]
        # A series of dates has all days of the campaign in every tile.
        whole = self.campaign.cube.series == "dates"
        days = sorted({(i["source"], i["datetime"][:10]) for i in self.items}) if whole else []
        return digest_json([touching, days])

    @cached_property
    def _outlines(self) -> list[BaseGeometry | None]:
        return [from_wkt(i["footprint"]) if i.get("footprint") else None for i in self.items or ()]

    def _period(self, item: dict[str, Any]) -> str | None:
        day = date.fromisoformat(str(item["datetime"])[:10])
        return self.campaign.cube.period_of(day)
