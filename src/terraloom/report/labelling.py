"""The labelling page: one HTML file on which people answer the sample, offline.

The page holds everything it needs: images as data URIs, style and script inlined; its content
security policy allows no request. The class of the map is not in the file unless asked for, and
strata are replaced by numbers without meaning, since strata often are map classes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from terraloom import __version__
from terraloom.assess.answers import CANNOT_TELL, CONFIDENCE, CONSENSUS
from terraloom.assess.design import SampleDesign
from terraloom.assess.kept import read_points, require_unedited
from terraloom.assess.measured import value_columns
from terraloom.assess.run import require_present_map
from terraloom.assess.sampling import DESIGN, MAP, POINTS, settings_of
from terraloom.config.campaign import Campaign
from terraloom.errors import DesignError
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_text
from terraloom.legend import Legend, read_legend
from terraloom.log import get_logger
from terraloom.plan import CUBES, product_path
from terraloom.report.views import CONTEXT_TIMES, Views, look_around, pack

__all__ = ["PAGE", "write_labelling_page"]

PAGE = MAP / "labelling.html"
_TEMPLATES = Path(__file__).parent / "templates"
#: Part of the size limit that is kept for text.
_TEXT_SHARE = 0.1

log = get_logger(__name__)


def write_labelling_page(campaign: Campaign, grid: CampaignGrid) -> Path:
    """Write ``results/map/labelling.html`` for the sample that is drawn.

    Raises:
        DesignError: The sample was edited or belongs to another map, or its images do not fit the
            size limit.
        StateError: A cube or the sample is missing.
    """
    settings = settings_of(campaign).page
    legend = read_legend(str(campaign.land_cover.classes))
    points = read_points(POINTS)
    design = SampleDesign.from_dict(read_json(DESIGN))
    require_unedited(points, design, str(POINTS))
    require_present_map(design)
    rows, cols = _on_grid(points, grid)
    image = product_path("image", MAP)
    limit = settings.max_mb * 1e6
    least = 0.15 * len(points) * settings.chip_px**2  # bytes of one barely legible image each
    if least > limit:
        raise DesignError(
            f"images of {len(points)} points do not fit {settings.max_mb:g} MB",
            where="sample.page.max_mb", fix="raise it, or make sample.page.chip_px smaller",
        )  # fmt: skip
    views = look_around(
        rows, cols, grid, CUBES, image if image.is_file() else None,
        side=settings.chip_px, dates=settings.dates,
    )  # fmt: skip
    packed, quality = pack(views.strips, limit * (1 - _TEXT_SHARE))
    data = _data(campaign, legend, points, design, views, packed, grid)
    if not settings.show_map:
        for point in data["points"]:
            del point["map"]
    text = _render(campaign, data)
    size = len(text.encode()) / 1e6
    if size > settings.max_mb:
        raise DesignError(
            f"the page would have {size:.1f} MB", where="sample.page.max_mb",
            allowed=f"at most {settings.max_mb:g} MB",
            fix="raise it, or make sample.page.chip_px or sample.page.dates smaller",
        )  # fmt: skip
    write_text(PAGE, text)
    log.info("%s: %d points, %.1f MB, JPEG quality %d", PAGE.as_posix(), len(points), size, quality)
    return PAGE


def _on_grid(
    points: gpd.GeoDataFrame, grid: CampaignGrid
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Rows and columns of the points on the campaign's grid; a kept sample may have another."""
    there = points.to_crs(grid.crs).geometry
    a = ~grid.geobox.affine
    x, y = there.x.to_numpy(), there.y.to_numpy()
    col, row = a.a * x + a.b * y + a.c, a.d * x + a.e * y + a.f
    return np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)


def _data(
    campaign: Campaign, legend: Legend, points: gpd.GeoDataFrame, design: SampleDesign,
    views: Views, packed: list[str], grid: CampaignGrid,
) -> dict[str, Any]:  # fmt: skip
    """All that the script needs, JSON-able."""
    side = campaign.sample.page.chip_px if campaign.sample else 0
    kinds = sorted({(v.when, v.colours, v.metres) for row in views.views for v in row})
    number = {kind: n for n, kind in enumerate(kinds)}
    lonlat = points.to_crs("EPSG:4326").geometry
    # Numbers without meaning: the order in which the strata come in a random list of points.
    groups: dict[int, int] = {}
    for code in points["stratum"]:
        groups.setdefault(int(code), len(groups))
    names = dict(zip(legend.codes, legend.names, strict=True))
    return {
        "sample": design.digest,
        "campaign": campaign.name,
        "title": campaign.title,
        "cannotTell": CANNOT_TELL,
        "consensus": CONSENSUS,
        "confidence": list(CONFIDENCE),
        "classes": [
            {"name": n, "color": c} for n, c in zip(legend.names, legend.colors, strict=True)
        ],
        "values": [
            {"column": column, "label": task.name.replace("_", " ").replace("-", " "),
             "unit": task.unit or "", "range": list(task.range) if task.range else None}
            for column, task in value_columns(campaign.tasks).items()
        ],
        "side": side,
        "pixel": grid.resolution_m,
        "context": CONTEXT_TIMES,
        "views": [{"when": w, "colours": c, "metres": m} for w, c, m in kinds],
        "points": [
            {
                "id": str(i), "lon": round(float(p.x), 7), "lat": round(float(p.y), 7),
                "group": groups[int(stratum)], "reserve": int(reserve),
                "views": [number[(v.when, v.colours, v.metres)] for v in views.views[k]],
                "image": packed[k], "map": names.get(int(code), ""),
            }
            for k, (i, p, stratum, reserve, code) in enumerate(
                zip(points["id"], lonlat, points["stratum"], points["reserve"],
                    points["map_code"], strict=True)
            )
        ],
    }  # fmt: skip


def _render(campaign: Campaign, data: dict[str, Any]) -> str:
    env = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (_TEMPLATES / "labelling.js").read_text(encoding="utf-8")
    # "<" would let a name end the element that holds the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return env.get_template("labelling.html.j2").render(
        title=campaign.title,
        version=__version__,
        style=Markup((_TEMPLATES / "labelling.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(text),
        simulated=campaign.archive.kind == "simulated",
    )
