"""Samples that were drawn before: checked against their record, and joined to the present map.

A probability sample stays one when the map changes: its strata keep their sizes, only the class
that the map has at each unit is read again. Points without inclusion probabilities are none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio

from terraloom.assess.areas import PixelAreas
from terraloom.assess.design import (
    UNIT_COLUMNS,
    DrawnSample,
    SampleDesign,
    StratumDesign,
    unit_text,
)
from terraloom.assess.draw import survey_map
from terraloom.assess.samples import SampleKind
from terraloom.assess.strips import WHOLE
from terraloom.errors import DesignError
from terraloom.io import geobox_of, read_json
from terraloom.legend import NODATA_CODE, Legend

__all__ = ["MOST_SHOWN", "kept_sample", "listed", "read_points", "require_unedited"]

#: Faults that one message names, of those found.
MOST_SHOWN = 12
#: A point may lie this far from the centre of its pixel, pixels: rounding of file formats.
_MOVED_PX = 0.05


def listed(problems: list[str]) -> str:
    """Faults point by point, as many as a message can hold."""
    more = len(problems) - MOST_SHOWN
    lines = problems[:MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return f"{len(problems)} fault(s)\n  - " + "\n  - ".join(lines)


def read_points(path: Path) -> gpd.GeoDataFrame:
    """Read a sample file.

    Raises:
        DesignError: It is missing or no vector file.
    """
    try:
        return gpd.read_file(path)
    except (OSError, ValueError) as err:
        raise DesignError(
            f"the sample cannot be read ({err})", where=str(path),
            fix="draw it (rule draw_sample), or bring the file back",
        ) from err  # fmt: skip


def require_unedited(points: gpd.GeoDataFrame, design: SampleDesign, where: str) -> None:
    """Compare the points with what the design fixed about them.

    Raises:
        DesignError: Point by point: moved, another stratum, another chance, twice, missing, new.
    """
    missing = sorted({*UNIT_COLUMNS, "map_code", "area_m2"} - {"cluster"} - set(points.columns))
    if missing:
        raise DesignError(
            f"the columns {', '.join(missing)} are missing", where=where,
            fix="bring back sample.gpkg as it was written; give answers in a file of their own",
        )  # fmt: skip
    drawn = {u.split(",", 1)[0]: u for u in design.units}
    ids = points["id"].astype(str)
    problems = [f"{i}: stands there {n} times" for i, n in Counter(ids).items() if n > 1]
    problems += [f"{i}: is missing" for i in drawn if i not in set(ids)]
    a = design.transform
    columns = ["row", "col", "stratum", "cluster", "reserve"]
    for point, text in zip(points.itertuples(), unit_text(points), strict=True):
        i = str(point.id)
        if i not in drawn:
            problems.append(f"{i}: was never drawn")
            continue
        for name, now, then in zip(
            [*columns, "inclusion_prob"], text.split(",")[1:], drawn[i].split(",")[1:], strict=True
        ):
            if now != then:
                problems.append(f"{i}: {name} is {now}, drawn was {then}")
        right, down = point.col + 0.5, point.row + 0.5
        x, y = a[0] * right + a[1] * down + a[2], a[3] * right + a[4] * down + a[5]
        off = np.hypot(point.geometry.x - x, point.geometry.y - y) / abs(a[0])
        if not off <= _MOVED_PX:
            problems.append(f"{i}: moved by {off:.1f} pixels")
    if problems:
        raise DesignError(
            listed(problems), where=where, allowed="the points as they were drawn",
            fix="bring back sample.gpkg (git, DVC, a copy), or delete it and draw it again: the "
            "same map and seed give the same points",
        )  # fmt: skip


def kept_sample(source: Path, map_path: Path, legend: Legend) -> DrawnSample:
    """A sample drawn before, with the classes of the present map.

    Args:
        source: Folder with ``sample.gpkg`` and ``design.json``, a GeoPackage beside such a record,
            or points of another origin with the columns ``inclusion_prob`` and, if wanted, ``id``.
        map_path: The map to be assessed.
        legend: Its legend.

    Raises:
        DesignError: The sample was edited, has no inclusion probabilities, or has units where the
            present map has no class.
    """
    path = source / "sample.gpkg" if source.is_dir() else source
    points = read_points(path)
    record = path.with_name("design.json")
    if record.is_file():
        design = SampleDesign.from_dict(read_json(record))
        require_unedited(points, design, str(path))
    else:
        design = None
        _require_chances(points, path)
    points = points.assign(map_code=_classes_at(points, map_path, legend, path))
    if design is None:
        return _foreign(points, map_path, legend)
    present = survey_map(map_path, classes=legend.codes, strata=WHOLE)
    first = points[points["reserve"] == 0]
    found = first["map_code"].value_counts().to_dict()
    classes = _classes(present.census.class_pixels, present.census.class_area_m2, found, legend)
    return DrawnSample(points, replace(design, classes=classes, map_name=map_path.name))


def _classes(
    pixels: dict[int, int], areas: dict[int, float], found: dict[int, int], legend: Legend
) -> tuple[StratumDesign, ...]:
    return tuple(
        StratumDesign(c, pixels.get(c, 0), areas.get(c, 0.0), int(found.get(c, 0)))
        for c in legend.codes
    )


def _require_chances(points: gpd.GeoDataFrame, path: Path) -> None:
    if "inclusion_prob" not in points.columns:
        raise DesignError(
            f"{len(points)} points with the columns {', '.join(points.columns)}: a "
            f"{SampleKind.CONVENIENCE} sample, not a probability sample",
            where=f"sample.drawn {path}",
            allowed="points with the column inclusion_prob, the chance that each had to be drawn, "
            "or a sample with its design.json",
            fix="leave `sample.drawn` out to draw a sample; labels chosen by people train a map, "
            "they cannot tell its accuracy or areas",
        )
    prob = points["inclusion_prob"].to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~((prob > 0) & (prob <= 1)))
    if bad.size:
        raise DesignError(
            f"inclusion_prob of {bad.size} points is not above 0 and at most 1, first in row "
            f"{bad[0] + 1}: {prob[bad[0]]}", where=f"sample.drawn {path}",
        )  # fmt: skip
    if points.crs is None or not (points.geom_type == "Point").all():
        raise DesignError(
            "geometries that are not points, or no coordinate system", where=f"sample.drawn {path}"
        )


def _classes_at(
    points: gpd.GeoDataFrame, map_path: Path, legend: Legend, path: Path
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Class that the map has at each point."""
    with rasterio.open(map_path) as src:
        there = points.to_crs(str(src.crs)).geometry
        xy = np.column_stack([there.x, there.y])
        left, bottom, right, top = src.bounds
        inside = (xy[:, 0] >= left) & (xy[:, 0] < right) & (xy[:, 1] > bottom) & (xy[:, 1] <= top)
        codes = np.array([int(v[0]) for v in src.sample(xy)], dtype=np.int64)
    codes[~inside] = NODATA_CODE
    lost = np.flatnonzero(~np.isin(codes, legend.codes))
    if lost.size:
        ids = [str(i) for i in points["id"].iloc[lost]] if "id" in points else lost.tolist()
        raise DesignError(
            listed([f"{i}: the present map has no class there" for i in ids]),
            where=f"sample.drawn {path}",
            allowed="a map that covers the domain of the sample",
            fix="map the missing parts, or draw a new sample from this map",
        )
    return codes


def _foreign(points: gpd.GeoDataFrame, map_path: Path, legend: Legend) -> DrawnSample:
    """Points of another origin: one stratum, unequal chances."""
    geobox = geobox_of(map_path)
    domain = survey_map(map_path, classes=legend.codes, strata=WHOLE)
    there = points.to_crs(str(geobox.crs)).geometry
    back = ~geobox.affine
    col = np.floor(back.a * there.x + back.b * there.y + back.c).to_numpy().astype(np.int64)
    row = np.floor(back.d * there.x + back.e * there.y + back.f).to_numpy().astype(np.int64)
    a = geobox.affine
    frame = gpd.GeoDataFrame(
        {
            "id": points["id"].astype(str) if "id" in points
            else [f"p{i:05d}" for i in range(1, len(points) + 1)],
            "stratum": np.full(len(points), WHOLE),
            "map_code": points["map_code"].to_numpy(),
            "inclusion_prob": points["inclusion_prob"].to_numpy(dtype=np.float64),
            "row": row, "col": col, "area_m2": PixelAreas(geobox).at(row, col),
            "reserve": np.zeros(len(points), np.int64),
        },
        geometry=gpd.points_from_xy(a.a * (col + 0.5) + a.c, a.e * (row + 0.5) + a.f),
        crs=str(geobox.crs),
    )  # fmt: skip
    found = frame["map_code"].value_counts().to_dict()
    census = domain.census
    design = SampleDesign(
        kind=SampleKind.UNEQUAL, seed=0, allocation=None,
        strata=(StratumDesign(WHOLE, domain.n_pixels[0], domain.area_m2[0], len(frame)),),
        classes=_classes(census.class_pixels, census.class_area_m2, found, legend),
        not_covered_pixels=census.invalid_pixels, not_covered_m2=census.invalid_m2,
        map_name=map_path.name, crs=str(geobox.crs),
        transform=tuple(float(v) for v in geobox.affine[:6]),
        shape=(int(geobox.shape[0]), int(geobox.shape[1])), units=tuple(unit_text(frame)),
    )  # fmt: skip
    return DrawnSample(frame, design)
