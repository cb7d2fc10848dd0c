"""The legend: class codes, names and colours of a land-cover map."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from terraloom.errors import ConfigError

__all__ = ["IGNORE_INDEX", "NODATA_CODE", "Legend", "read_legend"]

#: Class index of a pixel without a label.
IGNORE_INDEX = 255
#: Code of a map pixel without a class.
NODATA_CODE = 0


@dataclass(frozen=True)
class Legend:
    """Classes in order. Maps hold *codes*; networks use the *index* 0 .. K-1 in this order.

    Attributes:
        codes: Map value of each class, 1-254.
        names: Name of each class.
        colors: Colour of each class, ``#rrggbb``.
        broader: Name of each broader class that is no class itself, and the indices of the classes
            it stands for, in the order in which the legend first names them.
    """

    codes: tuple[int, ...]
    names: tuple[str, ...]
    colors: tuple[str, ...]
    broader: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.codes)

    def index_of(self, name: str) -> int:
        """Index 0 .. K-1 of a class name."""
        return self.names.index(name)

    def colormap(self) -> dict[int, tuple[int, int, int, int]]:
        """Code to (red, green, blue, alpha); the nodata code is transparent."""
        table = {NODATA_CODE: (0, 0, 0, 0)}
        for code, color in zip(self.codes, self.colors, strict=True):
            r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
            table[code] = (r, g, b, 255)
        return table

    def category_names(self) -> list[str]:
        """Name of each code from 0 to the highest."""
        by_code = dict(zip(self.codes, self.names, strict=True))
        return ["no data", *(by_code.get(c, "") for c in range(1, max(self.codes) + 1))]


def read_legend(path: Path | str) -> Legend:
    """Read a CSV with the columns code, name, color and, for a hierarchy, parent.

    ``parent`` is the name of a broader class; that need not be a row. A broader class stands for
    all classes below it, over any number of levels.

    Raises:
        ConfigError: The file is missing or a row is not valid; names file, row and what is allowed.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except FileNotFoundError as err:
        raise ConfigError(
            "the legend is missing", where=str(path), fix="write a CSV with code,name,color"
        ) from err
    allowed = (
        "columns code (1-254, unique), name (unique), color (#rrggbb, unique) and, if wanted, "
        "parent; two rows or more"
    )
    if len(rows) < 2 or not {"code", "name", "color"} <= set(rows[0]):
        raise ConfigError("not a legend", where=str(path), allowed=allowed)
    for n, row in enumerate(rows, 2):
        ok = (row["code"] or "").isdigit() and 1 <= int(row["code"]) <= 254 and row["name"]
        if not ok or not re.fullmatch(r"#[0-9a-fA-F]{6}", row["color"] or ""):
            raise ConfigError(f"row {n} is {dict(row)}", where=str(path), allowed=allowed)
    codes = [int(r["code"]) for r in rows]
    names = [r["name"] for r in rows]
    colors = [r["color"].lower() for r in rows]
    for key, values in (("code", codes), ("name", names), ("color", colors)):
        _check_unique(key, values, names, str(path))
    parents = [(r.get("parent") or "").strip() for r in rows]
    return Legend(tuple(codes), tuple(names), tuple(colors), _broader(names, parents, str(path)))


def _check_unique(key: str, values: Sequence[object], names: Sequence[str], where: str) -> None:
    """Two classes of one code cannot be told apart in the map, two of one colour not by eye."""
    owners: dict[object, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        owners.setdefault(value, []).append(name)
    twice = [f"{key} {v} of {', '.join(who)}" for v, who in owners.items() if len(who) > 1]
    if twice:
        raise ConfigError(
            f"given more than once: {'; '.join(twice)}", where=where,
            allowed=f"another {key} for each class",
            fix="correct the rows, or join the classes and map their labels to one",
        )  # fmt: skip


def _broader(
    names: Sequence[str], parents: Sequence[str], where: str
) -> dict[str, tuple[int, ...]]:
    """Classes below each broader class that is not a class itself."""
    up = dict(zip(names, parents, strict=True))
    found: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        chain = [name]
        while above := up.get(chain[-1]):
            if above in chain:
                raise ConfigError(
                    f"classes are below themselves: {' < '.join([*chain, above])}", where=where,
                    allowed="parents that form a tree", fix="correct the column parent",
                )  # fmt: skip
            chain.append(above)
        for above in chain[1:]:
            if above not in up:
                found.setdefault(above, []).append(k)
    return {name: tuple(below) for name, below in found.items()}
