"""Sample of a campaign: how many units, which ones; or one that was drawn before, for a new map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio

from terraloom.assess.allocation import (
    DEFAULT_EXPECTED_UA,
    Allocation,
    allocation_table,
    anticipated_se,
    size_for,
)
from terraloom.assess.design import DrawnSample, SampleDesign
from terraloom.assess.draw import (
    Domain,
    cluster_sample,
    simple_sample,
    stratified_sample,
    survey_map,
    systematic_sample,
)
from terraloom.assess.strips import WHOLE, Polygons, map_digest
from terraloom.config.campaign import Campaign
from terraloom.config.sample import Sample
from terraloom.errors import DesignError
from terraloom.io import atomic, geobox_of, write_json, write_text
from terraloom.legend import Legend, read_legend
from terraloom.log import get_logger
from terraloom.plan import product_path
from terraloom.tables import csv_text

__all__ = ["DESIGN", "MAP", "POINTS", "draw_sample", "settings_of", "write_sample"]

MAP = Path("results/map")
POINTS = MAP / "sample.gpkg"
DESIGN = MAP / "design.json"
#: Fixed date in the sample file: the same sample gives the same bytes.
_FILE_DATE = "2000-01-01T00:00:00Z"

log = get_logger(__name__)


def settings_of(campaign: Campaign) -> Sample:
    """The keys of the sample.

    Raises:
        DesignError: The campaign has none.
    """
    if campaign.sample is None:
        raise DesignError("the campaign has no `sample`", where=f"campaign {campaign.name}")
    return campaign.sample


def draw_sample(campaign: Campaign) -> None:
    """Write ``sample.gpkg``, ``design.json`` and ``allocation.csv``: a new draw, or a kept one."""
    sample = settings_of(campaign)
    legend = read_legend(str(campaign.land_cover.classes))
    path = product_path("class_map", MAP)
    if sample.drawn is not None:
        from terraloom.assess.kept import kept_sample

        drawn = kept_sample(Path(sample.drawn), path, legend)
        domain = survey_map(path, classes=legend.codes)
        n = drawn.design.n_units
    else:
        domain = survey_map(path, classes=legend.codes, strata=_strata(sample, path))
        n = _size(sample, domain, legend)
        drawn = _draw(sample, domain, n, campaign.seed, legend)
    names = _names(domain, legend)
    table = allocation_table(
        domain.n_pixels, n, expected_ua=_expected(sample, names),
        areas=domain.area_m2, min_per_stratum=sample.min_per_stratum,
    )  # fmt: skip
    design = replace(
        drawn.design, map_digest=map_digest(path), planned=_planned(sample, drawn.design, names)
    )
    write_sample(DrawnSample(drawn.points, design))
    write_text(MAP / "allocation.csv", _table_text(table, names, design))
    log.info("%d sample units, digest %s", len(drawn.points), design.digest)


def write_sample(drawn: DrawnSample) -> None:
    """Write the points and, after them, the record."""
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _FILE_DATE})
    with atomic(POINTS) as tmp:
        tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
        drawn.points.to_file(tmp, driver="GPKG", layer="sample", engine="pyogrio")
    write_json(DESIGN, drawn.design.to_dict())


def _strata(sample: Sample, map_path: Path) -> Path | Polygons | int | None:
    if sample.design != "stratified":
        return WHOLE
    if sample.strata is None:
        return None
    path = Path(sample.strata)
    if path.suffix.lower() in (".tif", ".tiff"):
        return path
    return Polygons.read(path, sample.strata_column, geobox_of(map_path).crs)


def _names(domain: Domain, legend: Legend) -> dict[int, str]:
    """Names of the strata, or of the classes where the strata have none."""
    if domain.reader.strata is None:
        return dict(zip(legend.codes, legend.names, strict=True))
    given = domain.names()
    whole = {WHOLE: "whole map"}
    return {c: given.get(c) or whole.get(c, f"stratum {c}") for c in domain.codes}


def _expected(sample: Sample, names: Mapping[int, str]) -> list[float]:
    """User's accuracy to expect in each stratum, in order."""
    given = sample.expected_ua
    if not isinstance(given, dict):
        return [given] * len(names)
    unknown = sorted(set(given) - set(names.values()))
    if unknown and list(names) != [WHOLE]:
        raise DesignError(
            f"names {unknown}", where="sample.expected_ua", allowed=", ".join(names.values())
        )
    return [given.get(name, DEFAULT_EXPECTED_UA) for name in names.values()]


def _overall(sample: Sample, domain: Domain, legend: Legend) -> float:
    """Overall accuracy to expect from the classes' shares of the map."""
    share = np.array([domain.census.class_area_m2.get(c, 0.0) for c in legend.codes])
    ua = _expected(sample, dict(zip(legend.codes, legend.names, strict=True)))
    return float(share @ np.array(ua) / share.sum())


def _size(sample: Sample, domain: Domain, legend: Legend) -> int:
    if sample.target_se is None:
        return sample.size
    if sample.design == "stratified":
        return size_for(
            domain.n_pixels, sample.target_se, Allocation(sample.allocation),
            min_per_stratum=sample.min_per_stratum,
            expected_ua=_expected(sample, _names(domain, legend)), areas=domain.area_m2,
        )  # fmt: skip
    p = _overall(sample, domain, legend)
    n = p * (1 - p) / sample.target_se**2
    if sample.design == "cluster":
        n *= 1 + (sample.cluster.per_block - 1) * sample.cluster.icc
    return max(20, ceil(n - 1e-9))


def _draw(sample: Sample, domain: Domain, n: int, seed: int, legend: Legend) -> DrawnSample:
    if sample.design == "simple":
        return simple_sample(domain, n, seed=seed, overhead=sample.overhead)
    if sample.design == "systematic":
        return systematic_sample(domain, n, seed=seed)
    if sample.design == "cluster":
        pixel = abs(float(domain.reader.geobox.resolution.x))
        size = sample.cluster.block_m / pixel
        if abs(size - round(size)) > 1e-9:
            raise DesignError(
                f"blocks of {sample.cluster.block_m:g} m on pixels of {pixel:g}",
                where="sample.cluster.block_m", allowed="whole pixels",
            )  # fmt: skip
        return cluster_sample(
            domain, n, seed=seed, block_px=round(size), per_block=sample.cluster.per_block
        )
    ua = dict(zip(domain.codes, _expected(sample, _names(domain, legend)), strict=True))
    return stratified_sample(
        domain, n, seed=seed, allocation=Allocation(sample.allocation),
        min_per_stratum=sample.min_per_stratum, expected_ua=ua, overhead=sample.overhead,
    )  # fmt: skip


def _planned(sample: Sample, design: SampleDesign, names: Mapping[int, str]) -> dict[str, Any]:
    """What was asked for and what to expect of it."""
    planned: dict[str, Any] = {
        "design": sample.design if sample.drawn is None else "kept",
        "size": None if sample.target_se else sample.size, "target_se": sample.target_se,
        "expected_ua": sample.expected_ua, "overhead": sample.overhead, "drawn": sample.drawn,
    }  # fmt: skip
    if sample.drawn is None and design.allocation is not None:
        live = [s for s in design.strata if s.n_units]
        ua = dict(zip(names, _expected(sample, names), strict=True))
        planned["anticipated_se"] = anticipated_se(
            [s.area_m2 for s in live], [ua[s.code] for s in live], [s.n_units for s in live]
        )
    return planned


def _table_text(
    table: Mapping[str, Sequence[float | None]], names: Mapping[int, str], design: SampleDesign
) -> str:
    """The allocation table as CSV: one row per stratum, the last one the standard error."""
    units = {s.code: s.n_units for s in (*design.classes, *design.strata)}
    rows = []
    for i, (code, name) in enumerate(names.items()):
        values = [_short(column[i]) for column in table.values()]
        rows.append([code, name, *values, units.get(code, 0)])
    last = [_short(column[-1]) for column in table.values()]
    expected = design.planned.get("anticipated_se")
    rows.append(["", "anticipated standard error", *last, _short(expected)])
    return csv_text(["code", "name", *table, "drawn"], rows)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
