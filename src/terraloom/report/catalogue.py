"""A static STAC catalogue of the products: findable, self-describing, movable as a folder.

One catalogue, one item, relative links only. Dates come from the campaign's periods, never from a
clock, so that the same results give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any

import pystac
from odc.geo.geobox import GeoBox
from pyproj import CRS
from pystac.extensions.classification import Classification
from shapely import set_precision
from shapely.geometry import box, mapping

from terraloom import __version__
from terraloom.aoi import to_crs
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.labels import Task
from terraloom.errors import StateError
from terraloom.grid import geobox_from_record
from terraloom.io import read_json, sha256, write_text
from terraloom.origin import TAG, map_tags
from terraloom.predict.encoding import (
    APPLICABILITY_NODATA,
    APPLICABILITY_SCALES,
    MOST_IN_MASK,
    PROBABILITY_CODES,
    SET_NODATA,
    ProbabilityCode,
    set_dtype,
)
from terraloom.preprocess.reasons import INVALID, Reason, describe
from terraloom.report import provenance

__all__ = ["catalogue_products"]

_EXTENSIONS = (
    "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
)
_JSON, _CSV, _HTML = "application/json", "text/csv", "text/html"
_MEDIA_TYPES = {
    ".tif": pystac.MediaType.COG, ".vrt": "application/xml", ".gpkg": pystac.MediaType.GEOPACKAGE,
}  # fmt: skip
#: Every multihash of SHA-256 starts with its code and its length, 32 bytes.
_SHA256_PREFIX = "1220"


def catalogue_products(
    results_dir: Path | str, campaign: Campaign, *, out: Path | str | None = None
) -> Path:
    """Write the STAC catalogue of a finished map.

    Args:
        results_dir: The folder with scenes, model and map.
        campaign: The campaign that was run.
        out: Folder of the catalogue; default ``map/stac`` below ``results_dir``.

    Returns:
        Path of ``catalog.json``.

    Raises:
        StateError: ``map/map.json`` or ``scenes/items.json`` is missing or lacks a key, or a
            product that ``map.json`` names is not there.
    """
    root = Path(results_dir)
    folder = Path(out) if out is not None else root / "map" / "stac"
    record_file = root / "map" / "map.json"
    record = read_json(record_file)
    item = _item(root, campaign, record, record_file)
    item_file = folder / item.id / f"{item.id}.json"
    for key, asset in _assets(root, campaign, record, record_file).items():
        asset.href = _relative(root / "map" / asset.href, item_file.parent)
        item.add_asset(key, asset)
    catalog = pystac.Catalog(
        campaign.name,
        f"Products of the campaign {campaign.name}: {campaign.title}.",
        title=campaign.title,
    )
    record_of_item = item.to_dict(include_self_link=False)
    record_of_item["stac_extensions"] = list(_EXTENSIONS)
    record_of_item["links"] = [
        {"rel": rel, "href": "../catalog.json", "type": _JSON} for rel in ("root", "parent")
    ]
    record_of_catalog = catalog.to_dict(include_self_link=False)
    record_of_catalog["links"] = [
        {"rel": "root", "href": "./catalog.json", "type": _JSON},
        {
            "rel": "item", "href": f"./{item.id}/{item.id}.json", "type": "application/geo+json",
            "title": campaign.title,
        },
    ]  # fmt: skip
    _write(item_file, record_of_item)
    _write(folder / "catalog.json", record_of_catalog)
    return folder / "catalog.json"


def _write(path: Path, record: Mapping[str, Any]) -> None:
    # Not io.write_json: STAC readers expect the customary order of keys, not the alphabet's.
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _relative(target: Path, start: Path) -> str:
    """Relative path with ``..``; ``Path.relative_to`` can do it only from Python 3.12 on."""
    there, here, ups = target.resolve(), start.resolve(), 0
    while not there.is_relative_to(here):
        here, ups = here.parent, ups + 1
    return "/".join([*[".."] * ups, there.relative_to(here).as_posix()])


def _item(root: Path, campaign: Campaign, record: Any, where: Path) -> pystac.Item:
    geobox = geobox_from_record(provenance.need(record, "geobox", where))
    b = geobox.boundingbox
    outline = to_crs(box(b.left, b.bottom, b.right, b.top), str(geobox.crs), "EPSG:4326")
    outline = set_precision(outline.simplify(1e-6), 1e-7)  # good to about 10 cm
    start = min(p.start for p in campaign.cube.periods)
    end = max(p.end for p in campaign.cube.periods)
    item = pystac.Item(
        f"{campaign.name}-map",
        mapping(outline),
        [round(v, 7) for v in outline.bounds],
        None,
        {},
        start_datetime=datetime.combine(start, time(), UTC),
        end_datetime=datetime.combine(end, time(23, 59, 59), UTC),
    )
    item.properties.update(
        {
            "title": campaign.title,
            "license": campaign.license,
            "gsd": abs(float(geobox.affine.a)),
            **_projection(geobox),
            "terraloom:version": __version__,
            "terraloom:config_digest": provenance.config_digest(campaign),
            "terraloom:scenes": provenance.used_scenes(root),
            "terraloom:weights": provenance.weights(root),
            **_made_from(root, campaign),
            "terraloom:simulated": campaign.archive.kind == "simulated",
            "terraloom:valid_pct": record.get("valid_pct"),
        }
    )
    return item


def _made_from(root: Path, campaign: Campaign) -> dict[str, Any]:
    """Digests of labels, weights, code and settings, as the files carry them; the estimator."""
    tags = map_tags(campaign, root)
    found: dict[str, Any] = {
        "processing:software": {"terraloom": __version__},
        "processing:lineage": "Composites of the scenes, classified by an ensemble of networks.",
    }
    for name in ("CONFIG", "CODE", "LABELS", "WEIGHTS"):
        found[f"terraloom:map_{name.lower()}"] = tags.get(TAG + name)
    if f"{TAG}MODEL_RELEASE" in tags:
        found["terraloom:model_release"] = tags[f"{TAG}MODEL_RELEASE"]
    accuracy = provenance.optional_json(root / "map" / "accuracy.json")
    if accuracy:
        found["terraloom:estimator"] = {
            "status": accuracy.get("status"), **(accuracy.get("sample") or {})
        }  # fmt: skip
    return found


def _projection(geobox: GeoBox) -> dict[str, Any]:
    """Fields of the projection extension; a CRS without a code carries its PROJJSON."""
    crs = CRS.from_user_input(str(geobox.crs))
    authority = crs.to_authority()
    b = geobox.boundingbox
    named: dict[str, Any] = {"proj:code": ":".join(authority) if authority else None}
    if authority is None:
        named["proj:projjson"] = crs.to_json_dict()
    return named | {
        "proj:shape": list(geobox.shape),
        "proj:transform": [float(v) for v in geobox.affine[:6]],
        "proj:bbox": [b.left, b.bottom, b.right, b.top],
    }


# ---------------------------------------------------------------- assets


def _assets(root: Path, campaign: Campaign, record: Any, where: Path) -> dict[str, pystac.Asset]:
    provenance.need(record, "legend", where)
    products = provenance.need(record, "products", where)
    assets = {}
    for key, entry in sorted(products.items()):
        file = str(entry["file"] if isinstance(entry, Mapping) else entry)
        assets[str(key)] = _product(root, campaign, record, str(key), Path(file).name, entry)
    for style in sorted((root / "map").glob("*.qml")):
        title = f"QGIS style of {style.stem.replace('_', ' ')}"
        assets[f"{style.stem}_style"] = _plain(style.name, title, "text/xml", ["style"])
    if (polygons := root / "map" / "class_map.gpkg").is_file():
        asset = _plain(polygons.name, "Polygons of the class map", _MEDIA_TYPES[".gpkg"], ["data"])
        asset.extra_fields["file:checksum"] = _SHA256_PREFIX + sha256(polygons)
        assets["polygons"] = asset
    # The rest is written later in the same run, so that it carries no checksum here.
    assets["areas"] = _plain("areas.csv", "Areas per class", _CSV, ["data"])
    assets["accuracy"] = _plain("accuracy.json", "Accuracy and area estimates", _JSON, ["metadata"])
    assets["report"] = _plain("report.html", "Report for people", _HTML, ["metadata", "overview"])
    if campaign.sample is not None:
        assets["sample"] = _plain(
            "sample.gpkg", "Probability sample", pystac.MediaType.GEOPACKAGE, ["reference"]
        )
    return assets


def _plain(file: str, title: str, media_type: str, roles: list[str]) -> pystac.Asset:
    return pystac.Asset(file, title, media_type=media_type, roles=roles)


def _product(
    root: Path, campaign: Campaign, record: Mapping[str, Any], key: str, file: str, entry: Any
) -> pystac.Asset:  # fmt: skip
    path = root / "map" / file
    if not path.is_file():
        raise StateError(
            f"the product `{key}` of map.json is missing", where=path.as_posix(),
            fix="run the map stage",
        )  # fmt: skip
    title, roles, fields = _description(campaign, record, key)
    digest = entry.get("sha256") if isinstance(entry, Mapping) else None
    fields["file:size"] = path.stat().st_size
    fields["file:checksum"] = _SHA256_PREFIX + str(digest or sha256(path))
    kind = _MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
    return pystac.Asset(file, title, media_type=kind, roles=roles, extra_fields=fields)


def _description(
    campaign: Campaign, record: Mapping[str, Any], stem: str
) -> tuple[str, list[str], dict[str, Any]]:
    """Title, roles and extra fields of a product by its file name."""
    legend = list(record["legend"])
    code = PROBABILITY_CODES[campaign.products.probability_bits]
    if stem in ("class_map", "class_map_mmu"):
        fields = _bands([_band("class", "uint8", 0)])
        fields["classification:classes"] = _classes(legend)
        unit = "" if stem == "class_map" else " with a minimum mapping unit"
        return f"Class map{unit}", ["data"], fields
    if stem == "probabilities":
        names = [str(e["name"]) for e in legend]
        bands = [
            _band(n, code.dtype, code.nodata, scale=1 / code.steps, description="probability")
            for n in names
        ]
        return "Class probabilities", ["data"], _bands(bands)
    if stem == "uncertainty":
        # The largest entropy, ln K, is stored as 200.
        scale = math.log(max(2, len(legend))) / 200
        names = ["total", "aleatoric", "epistemic"]
        bands = [
            _band(n, "uint8", 255, scale=scale, unit="nat", description=f"{n} entropy")
            for n in names
        ]
        return "Uncertainty", ["data", "uncertainty"], _bands(bands)
    if stem == "conformal_set":
        return _set(len(legend))
    if stem == "applicability":
        bands = [
            _band(n, "uint16", APPLICABILITY_NODATA, scale=s)
            for n, s in zip(("dissimilarity", "density", "inside"), APPLICABILITY_SCALES,
                            strict=True)
        ]  # fmt: skip
        return "Area of applicability", ["data", "uncertainty"], _bands(bands)
    if stem == "reasons":
        fields = _bands([_band("reasons", "uint8", None)])
        fields["classification:bitfields"] = _bitfields()
        return "Why pixels have no class", ["data-mask", "metadata"], fields
    if stem == "image":
        return _image(record.get("image") or {})
    task = next((t for t in campaign.tasks if t.name == stem), None)
    if task is None:
        return stem.replace("_", " ").capitalize(), ["data"], {}
    return _task(task, code, campaign.uncertainty.sets)


def _image(image: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """The picture: what each of its three colours shows stands in ``map.json``."""
    shown = list(image.get("bands") or ("", "", ""))
    group = str(image.get("group") or "")
    bands = [
        _band(n, "uint8", 0, description=f"{group} {b}".strip())
        for n, b in zip(("red", "green", "blue"), shown, strict=True)
    ]
    title = {"false-colour": "False-colour image", "grey": "Image in grey"}.get(
        str(image.get("kind")), "Image"
    )
    return f"{title} of the last period", ["visual", "overview"], _bands(bands)


def _set(n_classes: int) -> tuple[str, list[str], dict[str, Any]]:
    names = ["size", "classes"] if n_classes <= MOST_IN_MASK else ["size"]
    bands = [_band(n, set_dtype(n_classes), SET_NODATA) for n in names]
    return "Classes that stay possible", ["data", "uncertainty"], _bands(bands)


def _task(task: Task, code: ProbabilityCode, bounds: bool) -> tuple[str, list[str], dict[str, Any]]:
    title = task.name.replace("_", " ").replace("-", " ").capitalize()
    if task.kind is TaskKind.REGRESSION:
        names = ["mean", "sd_aleatoric", "sd_epistemic", *(["lower", "upper"] if bounds else [])]
        bands = [_band(n, "float32", -9999, unit=task.unit) for n in names]
        return title, ["data", "uncertainty"], _bands(bands)
    text = "probability of a boundary"
    band = _band("edge", code.dtype, code.nodata, scale=1 / code.steps, description=text)
    return title, ["data"], _bands([band])


def _band(
    name: str, data_type: str, nodata: float | None, *, scale: float | None = None,
    unit: str = "", description: str = "",
) -> dict[str, Any]:  # fmt: skip
    optional = {"nodata": nodata, "raster:scale": scale, "unit": unit, "description": description}
    given = {k: v for k, v in optional.items() if v not in (None, "")}
    return {"name": name, "data_type": data_type, **given}


def _bands(bands: list[dict[str, Any]]) -> dict[str, Any]:
    return {"bands": bands}


def _classes(legend: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [{"value": 0, "name": "no-data", "title": "No data", "nodata": True}]
    for e in legend:
        slug = re.sub(r"[^0-9A-Za-z_]+", "-", str(e["name"])).strip("-") or f"class-{e['code']}"
        color = str(e["color"]).removeprefix("#").upper()
        entry = Classification.create(
            value=int(e["code"]), name=slug, title=str(e["name"]), color_hint=color
        )
        rows.append(entry.to_dict())
    return rows


def _bitfields() -> list[dict[str, Any]]:
    return [
        {
            "name": str(bit.name).lower(), "description": describe(int(bit)),
            "offset": int(bit).bit_length() - 1, "length": 1,
            "classes": [{"value": 0, "name": "no"}, {"value": 1, "name": "yes"}],
        }
        for bit in Reason
        if bit & INVALID
    ]  # fmt: skip
