"""The legend: class codes, names and colours of a land-cover map."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
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
    """

    codes: tuple[int, ...]
    names: tuple[str, ...]
    colors: tuple[str, ...]

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
    """Read a CSV with the columns code, name, color.

    Raises:
        ConfigError: The file is missing or a row is not valid; names file, row and what is allowed.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except FileNotFoundError as err:
        raise ConfigError(
            "the legend is missing", where=str(path), fix="write a CSV with code,name,color"
        ) from err
    allowed = "columns code (1-254, unique), name (unique), color (#rrggbb); two rows or more"
    if len(rows) < 2 or not {"code", "name", "color"} <= set(rows[0]):
        raise ConfigError("not a legend", where=str(path), allowed=allowed)
    for n, row in enumerate(rows, 2):
        ok = (row["code"] or "").isdigit() and 1 <= int(row["code"]) <= 254 and row["name"]
        if not ok or not re.fullmatch(r"#[0-9a-fA-F]{6}", row["color"] or ""):
            raise ConfigError(f"row {n} is {dict(row)}", where=str(path), allowed=allowed)
    codes = tuple(int(r["code"]) for r in rows)
    names = tuple(r["name"] for r in rows)
    if len(set(codes)) < len(codes) or len(set(names)) < len(names):
        raise ConfigError("a code or name stands twice", where=str(path), allowed=allowed)
    return Legend(codes, names, tuple(r["color"].lower() for r in rows))
