"""Where two class maps differ: a raster of the changes, and their areas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio

from terraloom.grid import block_windows, row_areas_m2
from terraloom.io import GDAL_ENV, INDEXES, cog_from_windows, geobox_of, open_file, read_window

__all__ = ["Difference", "map_difference"]

#: Stored where a map has no class.
UNKNOWN = 255
_CODES = 256


@dataclass
class Difference:
    """What changed between two class maps.

    Attributes:
        pairs_ha: True area (ha) of each pair of classes (before, after), both known.
        unknown_ha: Area of the later map where either has no class.
        aligned: Whether both maps have the same pixels; else the earlier one was read at the
            nearest pixel.
    """

    aligned: bool
    pairs_ha: dict[tuple[str, str], float] = field(default_factory=dict)
    unknown_ha: float = 0.0

    @property
    def changed_ha(self) -> float:
        """Area with another class, ha."""
        return sum(ha for (a, b), ha in self.pairs_ha.items() if a != b)

    @property
    def compared_ha(self) -> float:
        """Area with a class in both maps, ha."""
        return sum(self.pairs_ha.values())


def map_difference(
    before: Path, after: Path, names: tuple[Mapping[int, str], Mapping[int, str]],
    out: Path | None = None,
) -> Difference:  # fmt: skip
    """Compare two class maps by the names of their classes, strip by strip.

    Args:
        before: The earlier class map.
        after: The later one; its grid is the grid of the comparison.
        names: Name of each code of the earlier and of the later map.
        out: GeoTIFF to write: band 1 the class before, band 2 the class after, in the codes of
            each map; 0 in both where the class is the same, 255 where either map has none.

    Returns:
        The areas of all changes, on the ellipsoid.
    """
    geobox = geobox_of(after)
    areas = row_areas_m2(geobox) / 1e4
    sums = np.zeros((_CODES, _CODES))
    same = _same_names(*names)

    def strips() -> Iterator[tuple[slice, slice, npt.NDArray[Any]]]:
        for rows, cols in block_windows(geobox):
            strip = geobox[rows, cols]
            a, b = (read_window(src, strip).astype(np.intp) for src in sources)
            weights = np.broadcast_to(areas[rows, None], a.shape)
            found = np.bincount((a * _CODES + b).ravel(), weights.ravel(), minlength=_CODES**2)
            sums[...] += found.reshape(_CODES, _CODES)
            unknown = ~(_known(names[0])[a] & _known(names[1])[b])
            bands = np.stack([a, b]).astype(np.uint8)
            bands[:, same[a, b]] = 0
            bands[:, unknown] = UNKNOWN
            yield rows, cols, bands

    with rasterio.Env(**GDAL_ENV), ExitStack() as stack:
        sources = [stack.enter_context(open_file(p, INDEXES)) for p in (before, after)]
        if out is None:
            for _ in strips():
                pass
        else:
            cog_from_windows(
                out, geobox, strips(), count=2, dtype="uint8", nodata=UNKNOWN,
                band_names=["class before", "class after"],
            )  # fmt: skip
    result = Difference(aligned=geobox_of(before) == geobox)
    for a, b in np.argwhere(sums > 0):
        pair = (names[0].get(int(a)), names[1].get(int(b)))
        if pair[0] is None or pair[1] is None:
            result.unknown_ha += float(sums[a, b])
        else:
            key = (pair[0], pair[1])
            result.pairs_ha[key] = result.pairs_ha.get(key, 0.0) + float(sums[a, b])
    return result


def _known(names: Mapping[int, str]) -> npt.NDArray[np.bool_]:
    known = np.zeros(_CODES, bool)
    known[list(names)] = True
    return known


def _same_names(before: Mapping[int, str], after: Mapping[int, str]) -> npt.NDArray[np.bool_]:
    same = np.zeros((_CODES, _CODES), bool)
    for a, name in before.items():
        for b, other in after.items():
            same[a, b] = name == other
    return same
