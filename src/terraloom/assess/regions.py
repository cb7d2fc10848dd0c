"""Areas, means and totals of regions from the map's own probabilities, with intervals.

These are *model-based*: they are right where the probabilities are, which held-out labels check
but no probability sample. The interval takes in that errors of neighbouring pixels go together.
Beside it stands what independent pixels would give, far too narrow; and the count of pixels of a
class, which is biased wherever one class is taken for another more often than the other way round.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyogrio
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterWindow
from scipy.stats import norm

from terraloom.aoi import campaign_grid
from terraloom.assess.areas import PixelAreas
from terraloom.assess.member_spread import MemberCells, member_spread
from terraloom.assess.region_file import RegionSet, read_regions
from terraloom.assess.run import MAP, NOT_AN_ESTIMATE
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign, Regions
from terraloom.config.labels import Task
from terraloom.errors import AoiError, ConfigError, ModelError, StateError
from terraloom.grid import Tile
from terraloom.io import (
    GDAL_ENV,
    INDEXES,
    atomic,
    geobox_of,
    open_file,
    read_json,
    write_json,
    write_text,
)
from terraloom.legend import Legend, read_legend
from terraloom.log import get_logger
from terraloom.plan import product_path
from terraloom.predict.encoding import APPLICABILITY_NODATA
from terraloom.predict.members import member_layer
from terraloom.uncertainty.covariance import ErrorCovariance
from terraloom.uncertainty.regions import Block, RegionSums, Window, sum_regions

__all__ = ["ProbabilityBlocks", "aggregate_regions", "regression_blocks"]

COVARIANCE = Path("results/model/covariance.json")
#: Fixed date in the file: the same regions give the same bytes.
_FILE_DATE = "2000-01-01T00:00:00Z"
#: Departure of a sum of probabilities from 1 that is allowed to floating-point rasters.
_FLOAT_SUM = 1e-3

log = get_logger(__name__)


def aggregate_regions(campaign: Campaign) -> None:
    """Write ``regions.csv``, ``regions.gpkg`` and ``regions.json`` beside the map."""
    if campaign.regions is None:
        raise ConfigError("the campaign has no `regions`", where=f"campaign {campaign.name}",
                          fix="name a file of polygons in regions.file")  # fmt: skip
    legend = read_legend(str(campaign.land_cover.classes))
    path = product_path("probabilities", MAP)
    geobox = geobox_of(path)
    regions = read_regions(campaign.regions, str(geobox.crs))
    known = read_json(COVARIANCE)["tasks"]
    for task in campaign.tasks:
        if task.kind is not TaskKind.BOUNDARY and task.name not in known:
            raise ModelError(f"no covariance of {task.name}", where=str(COVARIANCE),
                             fix="run target `model` again")  # fmt: skip
    areas = PixelAreas(geobox)
    cover = [known[campaign.land_cover.name]["classes"].get(n) for n in legend.names]
    covariances = [_covariance(c) for c in cover]
    with rasterio.Env(**GDAL_ENV), open_file(path, INDEXES) as src:
        with open_file(product_path("class_map", MAP), INDEXES) as codes:
            blocks = ProbabilityBlocks(src, codes, legend)
            sums = sum_regions(
                regions.polygons, geobox, blocks, layers=len(legend), codes=256,
                areas=areas.window, covariances=covariances,
            )  # fmt: skip
        blocks.check()
    if not any(s.covered > 0 for s in sums):
        raise AoiError(
            f"none of the {len(sums)} regions has a mapped pixel", where=f"regions.file "
            f"{campaign.regions.file}", allowed="at least one region on the map",
            fix="check the CRS of the file and the area of interest",
        )  # fmt: skip
    inside = _inside(regions, geobox, areas) if campaign.uncertainty.applicability else None
    tiles, level = campaign_grid(campaign).tiles(), campaign.regions.level
    spread = _spread(campaign.land_cover, regions, geobox, tiles)
    heads = _heads(regions, sums, inside)
    rows = _class_rows(campaign.land_cover.name, heads, sums, legend, level, spread.sd)
    measured = {campaign.land_cover.name: dict(zip(legend.names, cover, strict=True))}
    for task in campaign.tasks:
        if task.kind is TaskKind.REGRESSION:
            record = known[task.name]["value"]
            found = _regression(task, regions, geobox, areas, _covariance(record))
            heads, sd = _heads(regions, found, inside), _spread(task, regions, geobox, tiles).sd
            rows += _value_rows(task, heads, found, level, sd)
            measured[task.name] = {"value": record}
    facts = _facts(campaign.regions, regions, sums, measured, rows)
    facts |= {"networks": spread.networks, "applicability": inside is not None}
    facts["notes"] += _notes_of_spread(spread.networks, inside is not None)
    _write(rows, regions, facts, str(geobox.crs))
    log.info("%d regions, %d with mapped pixels", len(sums), sum(s.covered > 0 for s in sums))


def _covariance(record: dict[str, Any] | None) -> ErrorCovariance | None:
    return None if record is None else ErrorCovariance.from_record(record, str(COVARIANCE))


class ProbabilityBlocks:
    """Reads class probabilities and mapped codes; probabilities have to sum to one.

    Args:
        src: Raster of K probabilities; value = stored x scale.
        codes: Class map on the same pixels.
        legend: The K classes.

    Raises:
        StateError: The rasters do not fit together or do not fit the legend.
    """

    def __init__(self, src: DatasetReader, codes: DatasetReader, legend: Legend) -> None:
        where = str(src.name)
        fix = "run target `map` again"
        if src.count != len(legend):
            allowed = f"one per class of the legend, {len(legend)}"
            raise StateError(f"{src.count} bands", where=where, allowed=allowed, fix=fix)
        if geobox_of(src) != geobox_of(codes):
            raise StateError(f"other pixels than {codes.name}", where=where, fix=fix)
        self._src, self._codes = src, codes
        self._scale = np.array(src.scales, np.float32)[:, None, None]
        whole = np.issubdtype(np.dtype(src.dtypes[0]), np.integer)
        # Every stored value is off by half a step at most.
        self._allowed = len(legend) * float(max(src.scales)) / 2 if whole else _FLOAT_SUM
        self._wrong, self._worst = 0, (0.0, 0, 0)

    def __call__(self, window: Window) -> Block:
        """Layers of a window: probabilities, their variance p (1 - p), mapped codes."""
        at = RasterWindow.from_slices(*window)
        stored = self._src.read(window=at)
        missing = np.zeros(stored.shape, bool)
        if self._src.nodata is not None:
            missing = stored == self._src.nodata
        p: npt.NDArray[np.float32] = stored.astype(np.float32) * self._scale
        none = missing.all(axis=0)
        p[missing] = 0
        self._look(p, ~none, window)
        p[:, none] = 0
        valid = np.asarray(~none, dtype=np.float32)
        variance: npt.NDArray[np.float32] = np.maximum(p * (1 - p), 0)
        return Block(p, valid, variance, self._codes.read(1, window=at))

    def _look(self, p: Any, valid: Any, window: Window) -> None:
        off = np.where(valid, np.abs(p.sum(axis=0) - 1), 0)
        off = np.where(valid & ~((p >= 0) & (p <= 1)).all(axis=0), np.inf, off)
        self._wrong += int((~(off <= self._allowed + 1e-6)).sum())
        off = np.nan_to_num(off, nan=np.inf)
        row, col = np.unravel_index(int(off.argmax()), off.shape)
        if off[row, col] > self._worst[0]:
            place = (window[0].start + int(row), window[1].start + int(col))
            self._worst = (float(off[row, col]), *place)

    def check(self) -> None:
        """Refuse a raster with pixels that do not sum to one.

        Raises:
            StateError: With their number and the place of the worst.
        """
        if not self._wrong:
            return
        _, row, col = self._worst
        x, y = self._src.xy(row, col)
        total = self._src.read(window=RasterWindow(col, row, 1, 1)).ravel() * self._scale.ravel()
        raise StateError(
            f"the class probabilities of {self._wrong} pixels do not sum to 1; the worst is row "
            f"{row}, column {col} ({x:.0f}, {y:.0f}): {total.sum():.4g}", where=str(self._src.name),
            allowed=f"1 within {self._allowed:.3g} (rounding), each from 0 to 1",
            fix="run target `map` again; other rasters need softmax before they are stored",
        )  # fmt: skip


def regression_blocks(src: DatasetReader) -> Callable[[Window], Block]:
    """Reader of a regression product: mean, and variance as the sum of its two parts."""

    def read(window: Window) -> Block:
        data = src.read(window=RasterWindow.from_slices(*window)).astype(np.float32)
        valid = (data[0] != src.nodata) & np.isfinite(data).all(axis=0)
        data[:, ~valid] = 0
        variance = (data[1:] ** 2).sum(axis=0, keepdims=True)
        return Block(data[:1], valid.astype(np.float32), variance)

    return read


def _same_pixels(path: Path, geobox: GeoBox) -> None:
    if geobox_of(path) != geobox:
        raise StateError("other pixels than the class map", where=str(path),
                         fix="run target `map` again")  # fmt: skip


def _regression(
    task: Task, regions: RegionSet, geobox: GeoBox, areas: PixelAreas,
    covariance: ErrorCovariance | None,
) -> list[RegionSums]:  # fmt: skip
    path = product_path(task.name, MAP)
    _same_pixels(path, geobox)
    with rasterio.Env(**GDAL_ENV), open_file(path, INDEXES) as src:
        return sum_regions(
            regions.polygons, geobox, regression_blocks(src), layers=1, areas=areas.window,
            covariances=[covariance],
        )  # fmt: skip


def _inside(regions: RegionSet, geobox: GeoBox, areas: PixelAreas) -> list[float] | None:
    """Share of each region's mapped pixels inside the area of applicability, percent."""
    path = product_path("applicability", MAP)
    if not path.exists():
        return None
    _same_pixels(path, geobox)
    with rasterio.Env(**GDAL_ENV), open_file(path, INDEXES) as src:

        def read(window: Window) -> Block:
            inside = src.read(3, window=RasterWindow.from_slices(*window))
            valid = (inside != APPLICABILITY_NODATA).astype(np.float32)
            return Block((inside == 1).astype(np.float32)[None], valid)

        sums = sum_regions(regions.polygons, geobox, read, layers=1, areas=areas.window)
    return [float(100 * s.total[0] / s.covered) if s.covered else np.nan for s in sums]


class _Spread(NamedTuple):
    """Between networks: their number (0: not known), and sd (N, c) of the mean over regions."""

    networks: int
    sd: npt.NDArray[np.float64] | None


def _spread(task: Task, regions: RegionSet, geobox: GeoBox, tiles: Sequence[Tile]) -> _Spread:
    cells = MemberCells(member_layer(task), geobox, tiles)
    if cells.missing or cells.members < 2:
        log.warning(
            "%s: no spread between networks; %d of %d predicted tiles lack the layer %s", task.name,
            len(cells.missing), len(tiles), member_layer(task),
        )  # fmt: skip
        return _Spread(0, None)
    return _Spread(cells.members, member_spread(cells, regions.polygons))


def _class_rows(
    name: str, heads: Sequence[dict[str, Any]], sums: Sequence[RegionSums], legend: Legend,
    level: float, spread: npt.NDArray[np.float64] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per region and class: areas in hectares."""
    rows = []
    for i, s in enumerate(sums):
        whole = float(s.total.sum())
        # Rounding of the stored values is shared out: classes add up to the mapped area.
        fit = s.covered / whole if whole > 0 else np.nan
        for k, (code, label) in enumerate(zip(legend.codes, legend.names, strict=True)):
            value, sd, alone = (
                v * fit / 1e4
                for v in (s.total[k], np.sqrt(s.variance[k]), np.sqrt(s.independent[k]))
            )
            top = s.covered / 1e4
            rows.append(
                heads[i]
                | {"task": name, "class": label, "quantity": "area", "unit": "ha",
                   "map_value": s.counted[code] / 1e4 if s.covered else None}
                | _interval(value, sd, alone, level, (0.0, top))
                | {"effective_px": _effective(s, k),
                   "ensemble_sd": None if spread is None else float(spread[i, k]) * top}
            )  # fmt: skip
    return rows


def _value_rows(
    task: Task, heads: Sequence[dict[str, Any]], sums: Sequence[RegionSums], level: float,
    spread: npt.NDArray[np.float64] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Two rows per region: mean, and total (mean x area, per hectare)."""
    rows = []
    low, high = task.range if task.range is not None else (-np.inf, np.inf)
    for i, s in enumerate(sums):
        value, sd, alone = (
            float(v) / s.covered if s.covered else np.nan
            for v in (s.total[0], np.sqrt(s.variance[0]), np.sqrt(s.independent[0]))
        )
        ha = s.covered / 1e4
        unit = task.unit or ""
        for what, factor, of in (("mean", 1.0, unit), ("total", ha, f"{unit} x ha".strip())):
            rows.append(
                heads[i]
                | {"task": task.name, "class": "", "quantity": what, "unit": of, "map_value": None}
                | _interval(value * factor, sd * factor, alone * factor, level,
                            (low * factor, high * factor) if s.covered else (low, high))
                | {"effective_px": _effective(s, 0),
                   "ensemble_sd": None if spread is None else float(spread[i, 0]) * factor}
            )  # fmt: skip
    return rows


def _heads(
    regions: RegionSet, sums: Sequence[RegionSums], inside: Sequence[float] | None
) -> list[dict[str, Any]]:
    """What all rows of a region begin with."""
    return [
        {
            "region": name,
            "area_ha": area / 1e4,
            "mapped_ha": s.covered / 1e4,
            "mapped_pct": min(100.0, 100 * s.covered / area),
            "pixels": s.pixels,
            "inside_pct": None if inside is None else inside[i],
        }
        for i, (name, area, s) in enumerate(
            zip(regions.names, regions.area_m2.tolist(), sums, strict=True)
        )
    ]


def _interval(
    value: float, sd: float, alone: float, level: float, bounds: tuple[float, float]
) -> dict[str, Any]:
    z = float(norm.ppf(0.5 + level / 2))

    def cut(x: float) -> float:
        return float(np.clip(x, *bounds))

    return {
        "value": value, "se": sd, "low": cut(value - z * sd), "high": cut(value + z * sd),
        "independent_se": alone, "independent_low": cut(value - z * alone),
        "independent_high": cut(value + z * alone),
    }  # fmt: skip


def _effective(s: RegionSums, q: int) -> float | None:
    """Number of independent pixels that would give the same variance."""
    if not s.variance[q] > 0:
        return None
    return float(s.pixels * s.independent[q] / s.variance[q])


def _facts(
    settings: Regions,
    regions: RegionSet,
    sums: Sequence[RegionSums],
    covariances: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    outside = [n for n, s in zip(regions.names, sums, strict=True) if not s.covered]
    partly = [
        n for n, s, a in zip(regions.names, sums, regions.area_m2, strict=True)
        if 0 < s.covered < 0.999 * a
    ]  # fmt: skip
    return {
        "file": settings.file, "crs": regions.crs, "level": settings.level,
        "method": "model-based, with the spatial covariance of held-out errors",
        "regions": len(regions.names), "outside": outside, "partly_mapped": partly,
        "repaired": list(regions.repaired),
        "block_px": max(s.block for s in sums),
        "covariance": covariances,
        "columns": COLUMNS,
        "notes": _notes(settings, outside, partly, regions.repaired),
        "rows": rows,
    }  # fmt: skip


#: What the columns of the table mean.
COLUMNS = {
    "region": "name of the region",
    "area_ha": "its true area on the ellipsoid, hectares",
    "mapped_ha": "area of its mapped pixels, by exact cover; all figures are of this part",
    "mapped_pct": "that as share of its area, percent",
    "pixels": "mapped pixels, by cover",
    "inside_pct": "share of the mapped area inside the area of applicability, like the training "
    "data, percent; empty without that layer",
    "task": "task of the campaign",
    "class": "class; empty for values",
    "quantity": "area, mean or total",
    "unit": "unit of the figures",
    "map_value": f"area of the pixels mapped as the class ({NOT_AN_ESTIMATE})",
    "value": "expected value by the probabilities or predicted means",
    "se": "its standard error, with errors of neighbouring pixels going together",
    "low": "lower end of the interval",
    "high": "upper end of the interval",
    "independent_se": "standard error if pixels were independent: too small, for comparison only",
    "independent_low": "lower end with it",
    "independent_high": "upper end with it",
    "effective_px": "independent pixels that would leave the same error",
    "ensemble_sd": "standard deviation of the figure between the networks of the ensemble; empty "
    "where prediction kept none of them",
}


def _notes(
    settings: Regions, outside: list[str], partly: list[str], repaired: Sequence[str]
) -> list[str]:
    notes = [
        "These figures rest on the model: they are right where its probabilities are. They are no "
        "design-based estimates; for those a probability sample is needed.",
        f"The {settings.level:.0%} interval takes in that errors of neighbouring pixels go "
        "together, as they did at labels that no network had seen. Labels are no random sample, "
        "and their own errors are in it.",
        "The interval of independent pixels is too narrow and shown only for comparison.",
        f"The count of mapped pixels is a {NOT_AN_ESTIMATE}: it is biased where one class is "
        "taken for another more often than the other way round.",
        "Regions may overlap; each stands for itself. Errors of different regions are not "
        "independent, so their intervals must not be added up.",
    ]
    if outside:
        notes.append(f"{len(outside)} regions have no mapped pixel and no figures.")
    if partly:
        notes.append(f"{len(partly)} regions are mapped in part; figures are of the mapped part.")
    if repaired:
        notes.append(f"{len(repaired)} regions had invalid outlines, which were repaired.")
    return notes


def _notes_of_spread(networks: int, applicability: bool) -> list[str]:
    notes = []
    if networks:
        notes.append(
            f"The spread between the {networks} networks says how far the figure depends on which "
            "of them one has. It is no standard error: what all of them get wrong is not in it."
        )
    if applicability:
        notes.append(
            "Figures of regions of which a small share is inside the area of applicability rest on "
            "ground unlike all training data; their intervals do not know that."
        )
    return notes


def _write(rows: list[dict[str, Any]], regions: RegionSet, facts: dict[str, Any], crs: str) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _shown(v) for k, v in r.items()} for r in rows)
    frame = gpd.GeoDataFrame(_wide(rows, regions), geometry=list(regions.polygons), crs=crs)
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _FILE_DATE})
    with atomic(MAP / "regions.gpkg") as tmp:
        tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
        frame.to_file(tmp, driver="GPKG", layer="regions", engine="pyogrio")
    write_text(MAP / "regions.csv", text.getvalue())
    write_json(MAP / "regions.json", facts)


def _shown(value: Any) -> Any:
    """A number with six significant digits; nothing for what is not known."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}" if np.isfinite(value) else ""
    return "" if value is None else value


#: Columns of a region in the GeoPackage, before its figures.
_ONCE = ("region", "area_ha", "mapped_ha", "mapped_pct", "inside_pct")


def _wide(rows: list[dict[str, Any]], regions: RegionSet) -> list[dict[str, Any]]:
    """One row per region, for a map of regions: shares of classes (percent) and means."""
    wide: dict[str, dict[str, Any]] = {n: {} for n in regions.names}
    for r in rows:
        out = wide[r["region"]]
        if not out:
            out |= {k: r[k] for k in _ONCE}
        if r["quantity"] == "total":
            continue
        share = r["quantity"] == "area"
        factor = (100 / r["mapped_ha"] if r["mapped_ha"] else np.nan) if share else 1.0
        key = f"{r['class']} pct" if share else f"{r['task']} mean"
        out |= {key: r["value"] * factor, f"{key} se": r["se"] * factor}
        if r["ensemble_sd"] is not None:
            out[f"{key} spread"] = r["ensemble_sd"] * factor
    return list(wide.values())
