"""Class rasters in full-width row strips: what is in each stratum, and where its r-th pixel lies.

Memory is bounded by one strip. Units are found by rank: the r-th pixel of a stratum in row-major
order, which does not depend on the strip height.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize
from rasterio.io import DatasetReader
from rasterio.windows import Window

from terraloom.assess.areas import AREA_KNOT_PX, PixelAreas
from terraloom.errors import DesignError, GridError
from terraloom.io import geobox_of

__all__ = [
    "STRIP_PX",
    "WHOLE",
    "Census",
    "Polygons",
    "Strip",
    "StripReader",
    "locate",
    "map_digest",
    "survey",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Pixels read at once: positions of one stratum then take at most 128 MiB. Strips are full-width.
STRIP_PX = 1 << 24
#: Code of the one stratum of a sample that is not stratified: the whole domain.
WHOLE = 0


@dataclass(frozen=True, slots=True)
class Polygons:
    """Strata given as polygons: codes 1 .. S in the order of their names.

    Attributes:
        names: Name of each code.
        shapes: Outlines in the CRS of the map, with their code.
    """

    names: dict[int, str]
    shapes: tuple[tuple[Any, int], ...]

    @classmethod
    def read(cls, path: Path, column: str, crs: Any) -> Polygons:
        """Read polygons of any CRS; those of one name are one stratum.

        Raises:
            DesignError: The file or the column is missing, or polygons of two strata overlap.
        """
        try:
            table = gpd.read_file(path)
        except (OSError, ValueError) as err:
            raise DesignError(
                f"the strata cannot be read ({err})", where=f"sample.strata {path}",
                allowed="a raster of codes on the pixels of the map, or polygons",
            ) from err  # fmt: skip
        if column not in table.columns or table.crs is None:
            raise DesignError(
                f"columns {list(table.columns)}, CRS {table.crs}", where=f"sample.strata {path}",
                allowed=f"the column `{column}` (sample.strata_column) and a CRS",
            )  # fmt: skip
        table = table[table[column].notna()].to_crs(str(crs))
        merged = table.assign(stratum=table[column].astype(str)).dissolve("stratum").sort_index()
        areas = list(zip(merged.index, merged.geometry, strict=True))
        for i, (name, shape) in enumerate(areas):
            for other, shape2 in areas[i + 1 :]:
                if shape.intersection(shape2).area > 1e-6 * min(shape.area, shape2.area):
                    raise DesignError(
                        f"the strata {name!r} and {other!r} overlap", where=f"sample.strata {path}",
                        allowed="each place in one stratum", fix="cut the polygons",
                    )  # fmt: skip
        names = {code: str(name) for code, (name, _) in enumerate(areas, 1)}
        return cls(names, tuple((shape, code) for code, (_, shape) in enumerate(areas, 1)))


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of the raster: map codes, stratum codes and validity, each (h, W)."""

    first_row: int
    codes: NDArray[Any]
    strata: NDArray[Any]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class StripReader:
    """Full-width strips of the map and of the strata.

    Attributes:
        map_path: One-band integer raster of class codes, (H, W).
        geobox: Its pixels.
        invalid_codes: Map codes that mean no class, besides the nodata value of the file.
        strata: Raster of stratum codes on the same pixels, polygons, `WHOLE` for one stratum, or
            None where the strata are the map classes.
        strip_px: Most pixels held at once.
    """

    map_path: Path
    geobox: GeoBox
    invalid_codes: tuple[int, ...]
    strata: Path | Polygons | int | None = None
    strip_px: int = STRIP_PX

    def starts(self) -> list[tuple[int, int]]:
        """First row and height of every strip."""
        h, w = self.geobox.shape
        rows = max(1, self.strip_px // w)
        return [(r, min(rows, h - r)) for r in range(0, h, rows)]

    def strips(self, chosen: Sequence[int] | None = None) -> Iterator[tuple[int, Strip]]:
        """Number and content of the chosen strips (all by default)."""
        starts = self.starts()
        order = list(range(len(starts)) if chosen is None else chosen)
        yield from zip(order, self.rows(starts[k] for k in order), strict=True)

    def rows(self, wanted: Iterable[tuple[int, int]]) -> Iterator[Strip]:
        """Full-width rows: first row and height of each part."""
        with rasterio.open(self.map_path) as src:
            _require_codes(src, self.map_path)
            for first, height in wanted:
                yield self._strip(src, first, height)

    def _strip(self, src: DatasetReader, first: int, height: int) -> Strip:
        codes, valid = _read_codes(src, first, height)
        valid &= ~np.isin(codes, self.invalid_codes)
        strata, inside = self._strata(codes, first, height)
        return Strip(first, codes, strata, valid & inside)

    def _strata(
        self, codes: NDArray[Any], first: int, height: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | np.bool_]:
        if self.strata is None:
            return codes, np.True_
        if isinstance(self.strata, int):
            return np.full(codes.shape, self.strata, np.uint8), np.True_
        if isinstance(self.strata, Polygons):
            part = self.geobox[first : first + height, :]
            burnt = rasterize(
                self.strata.shapes, out_shape=part.shape, transform=part.affine, dtype="int32"
            )
            return burnt, burnt > 0
        other = geobox_of(self.strata)
        if other != self.geobox:
            raise GridError(
                f"strata on {other.shape} px, map on {self.geobox.shape} px",
                where=str(self.strata),
                allowed="the same pixels as the map",
            )
        with rasterio.open(self.strata) as src:
            _require_codes(src, self.strata)
            return _read_codes(src, first, height)


@dataclass(frozen=True, slots=True)
class Census:
    """Counts of one pass over the raster.

    Attributes:
        pixels: Valid pixels of each stratum.
        area_m2: Their true area.
        class_pixels: Valid pixels of each map class.
        class_area_m2: Their true area.
        per_strip: Pixels of each stratum in each strip.
        invalid_pixels: Pixels outside the domain.
        invalid_m2: Their true area.
    """

    pixels: dict[int, int] = field(default_factory=dict)
    area_m2: dict[int, float] = field(default_factory=dict)
    class_pixels: dict[int, int] = field(default_factory=dict)
    class_area_m2: dict[int, float] = field(default_factory=dict)
    per_strip: list[dict[int, int]] = field(default_factory=list)
    invalid_pixels: int = 0
    invalid_m2: float = 0.0


def survey(reader: StripReader, areas: PixelAreas) -> Census:
    """Pixels and true area of every stratum and class, and pixels of the strata per strip."""
    found = Census()
    invalid_pixels, invalid_m2 = 0, 0.0
    for _, strip in reader.strips():
        here: dict[int, int] = {}
        h, w = strip.codes.shape
        # Blocks bound the float64 area array to 2 MiB, whatever the strip.
        for r in range(0, h, AREA_KNOT_PX):
            for c in range(0, w, AREA_KNOT_PX):
                rows, cols = slice(r, min(r + AREA_KNOT_PX, h)), slice(c, min(c + AREA_KNOT_PX, w))
                top = strip.first_row
                area = areas.window(slice(top + rows.start, top + rows.stop), cols)
                valid = strip.valid[rows, cols]
                invalid_pixels += int(valid.size - valid.sum())
                invalid_m2 += float(area[~valid].sum())
                _add(strip.strata[rows, cols][valid], area[valid], here, found.area_m2)
                _add(
                    strip.codes[rows, cols][valid], area[valid], found.class_pixels,
                    found.class_area_m2,
                )  # fmt: skip
        found.per_strip.append(here)
        for code, k in here.items():
            found.pixels[code] = found.pixels.get(code, 0) + k
    return Census(
        found.pixels, found.area_m2, found.class_pixels, found.class_area_m2, found.per_strip,
        invalid_pixels, invalid_m2,
    )  # fmt: skip


def _add(codes: NDArray[Any], area: F64, counts: dict[int, int], sums: dict[int, float]) -> None:
    found, index, count = np.unique(codes, return_inverse=True, return_counts=True)
    total = np.bincount(index, weights=area, minlength=found.size)
    for code, k, a in zip(found.tolist(), count.tolist(), total.tolist(), strict=True):
        counts[int(code)] = counts.get(int(code), 0) + k
        sums[int(code)] = sums.get(int(code), 0.0) + a


def locate(reader: StripReader, census: Census, ranks: Mapping[int, I64]) -> I64:
    """Row, column, stratum and map code (n, 4) of the drawn ranks; reads only strips with units."""
    wanted: dict[int, list[tuple[int, I64]]] = {}
    before = dict.fromkeys(ranks, 0)
    for k, here in enumerate(census.per_strip):
        for code, rank in ranks.items():
            count = here.get(code, 0)
            lo, hi = np.searchsorted(rank, [before[code], before[code] + count])
            if hi > lo:
                wanted.setdefault(k, []).append((code, rank[lo:hi] - before[code]))
            before[code] += count
    parts = []
    for k, strip in reader.strips(sorted(wanted)):
        for code, local in wanted[k]:
            flat = np.flatnonzero((strip.strata == code) & strip.valid)[local]
            row, col = np.divmod(flat, strip.codes.shape[1])
            mapped = strip.codes.ravel()[flat].astype(np.int64)
            parts.append(
                np.column_stack([row + strip.first_row, col, np.full(row.size, code), mapped])
            )
    units: I64 = np.concatenate(parts).astype(np.int64)
    # By stratum, then row-major: the order must not depend on the strips.
    return units[np.lexsort((units[:, 1], units[:, 0], units[:, 2]))]


def map_digest(path: Path) -> str:
    """Digest of a map's codes and place, however its file is laid out or packed."""
    geobox = geobox_of(path)
    h = hashlib.sha256(f"{geobox.crs} {geobox.affine[:6]} {geobox.shape}".encode())
    reader = StripReader(path, geobox, ())
    for _, strip in reader.strips():
        h.update(np.ascontiguousarray(strip.codes, dtype=np.int32).tobytes())
    return h.hexdigest()[:16]


def _require_codes(src: DatasetReader, path: Path) -> None:
    if src.count != 1 or np.dtype(src.dtypes[0]).kind not in "iu":
        raise DesignError(
            f"{src.count} band(s) of {src.dtypes[0]}",
            where=str(path),
            allowed="one band of integer codes",
        )


def _read_codes(
    src: DatasetReader, first: int, height: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    window = Window(0, first, src.width, height)
    codes: NDArray[Any] = src.read(1, window=window)
    valid = np.ones(codes.shape, dtype=np.bool_)
    if src.nodata is not None:
        valid = codes != src.nodata
    return codes, valid
