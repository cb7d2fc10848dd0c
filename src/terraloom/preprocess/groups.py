"""Groups of bands: what their name and their attributes in a store say.

A group holds the bands of one sensor at one pixel size, as ``s2_10`` or ``l8_30``. Its name ends
with the pixel size in metres; its variable in a cube or in chips carries ``kind``, ``unit`` and
``roles`` as attributes. Nothing here depends on the sensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from terraloom.errors import ConfigError

__all__ = ["FACTORS", "GroupFacts", "group_factor", "group_facts", "group_order"]

#: Pixels of 10 m along a pixel of a group. They divide 48, the pixels along the edge of the
#: smallest tile, so that every tile and chip holds whole pixels of every group.
FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*_([1-9][0-9]*)")
#: Sensors whose groups come first, in this order; saved networks rely on it.
_FIRST = ("s2", "s1", "dem")
#: Sentinel-2 bands play their own part where a store does not say so.
_SENTINEL_2 = {f"B{i:02}": f"B{i:02}" for i in range(1, 13)} | {"B8A": "B8A"}


@dataclass(frozen=True)
class GroupFacts:
    """What the attributes of a group's variable say.

    Attributes:
        kind: ``optical``, ``sar``, ``index``, ``polsar``, ``dem`` or ``other``; empty if unknown.
        unit: ``reflectance``, ``power`` (linear), ``dB``, ``m`` ...; empty if unknown.
        roles: Band: the Sentinel-2 band that it is like, e.g. ``{"SR_B4": "B04"}`` for red.
    """

    kind: str = ""
    unit: str = ""
    roles: dict[str, str] = field(default_factory=dict)

    def band(self, role: str) -> str | None:
        """The first band that plays a role."""
        return next((b for b, r in self.roles.items() if r == role), None)


def group_factor(group: str) -> int:
    """Pixels of 10 m along one pixel of a group, whose name ends in its pixel size.

    Raises:
        ConfigError: The name has no pixel size, or one that does not fit the tiles.
    """
    hit = _NAME.fullmatch(group)
    size_m = int(hit[1]) if hit else 0
    if size_m % 10 or size_m // 10 not in FACTORS:
        raise ConfigError(
            f"group name {group!r}", where="group of a source table",
            allowed="<sensor>_<pixel size>, the size one of "
            + ", ".join(f"{10 * f}" for f in FACTORS) + " metres",
            fix="rename the group; its bands are brought to that pixel size",
        )  # fmt: skip
    return size_m // 10


def group_order(groups: Iterable[str]) -> list[str]:
    """Groups in the order of the networks' inputs: finest first, whatever order a store has."""

    def key(group: str) -> tuple[int, int, str]:
        sensor = group.rsplit("_", 1)[0]
        rank = _FIRST.index(sensor) if sensor in _FIRST else len(_FIRST)
        return group_factor(group), rank, group

    return sorted(groups, key=key)


def group_facts(group: str, attrs: Mapping[Any, Any]) -> GroupFacts:
    """Facts of a group from the attributes of its variable.

    Args:
        group: Its name.
        attrs: ``kind``, ``unit``, ``roles`` (a mapping, or its JSON text); each may be missing.
    """
    roles = attrs.get("roles")
    if isinstance(roles, str):
        roles = json.loads(roles) if roles else {}
    if roles is None:
        roles = _SENTINEL_2 if group.startswith("s2_") else {}
    return GroupFacts(
        str(attrs.get("kind", "")), str(attrs.get("unit", "")),
        {str(b): str(r) for b, r in roles.items()},
    )  # fmt: skip
