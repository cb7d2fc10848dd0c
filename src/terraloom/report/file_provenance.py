"""What a file of a map was made from: told by its own tags, checked against what lies beside it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from terraloom.errors import StateError
from terraloom.io import digest_json, read_json, sha256
from terraloom.origin import TAG, used_scenes

__all__ = ["origin_of", "origin_text"]

#: Vector files of the map; all others are rasters.
_VECTOR = ".gpkg"
_INDEX = ".gti.gpkg"
#: Scenes that the text lists unless all are asked for.
_SHOWN = 5


def origin_of(file: Path | str) -> dict[str, Any]:
    """Origin of a product file, or of one of its tiles, wherever it lies.

    Args:
        file: Raster, index or polygons of a map.

    Returns:
        ``product``, ``tile``, ``campaign``, ``config``, ``version``, ``code``, ``period``,
        ``scenes`` (``count``, ``digest``, ``ids`` or None), ``labels``, ``networks``, ``weights``,
        ``estimator``, ``bytes`` (``sha256``, ``status``), ``file_time``, and ``unknown``: what
        cannot be told, and why.

    Raises:
        StateError: There is no such file, or it carries no tags of a map.
    """
    path = Path(file)
    if not path.is_file():
        raise StateError("there is no such file", where=str(file), fix="name a file of a map")
    tags = _tags(path)
    if f"{TAG}CAMPAIGN" not in tags:
        raise StateError(
            "the file does not say what it was made from: not a product of Terraloom, or written "
            "over by a program that drops tags", where=str(file),
            allowed=f"files of results/map and their tiles, with tags {TAG}*",
            fix="name the file as the run wrote it; `gdalinfo` shows the tags of a raster",
        )  # fmt: skip
    told = {k.removeprefix(TAG).lower(): v for k, v in tags.items() if k.startswith(TAG)}
    folder = _map_folder(path)
    unknown: list[str] = []
    if folder is None:
        unknown.append("no map.json lies beside the file, so only its tags are told")
    record: dict[str, Any] = {"file": path.name, "tile": told.get("tile")}
    for key in ("product", "campaign", "config", "version", "code", "period", "labels", "networks",
                "weights"):  # fmt: skip
        record[key] = told.get(key)
        if record[key] is None:
            unknown.append(f"{key}: the file has no tag for it")
    record["scenes"] = _scenes(told, folder, unknown)
    record["estimator"] = _estimator(folder, unknown)
    record["bytes"] = _bytes(path, folder, unknown)
    time = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    record["file_time"] = time.isoformat(timespec="seconds")
    unknown.append("when it was computed: files carry no clock; a copy has a time of its own")
    return record | {"unknown": unknown}


def _tags(path: Path) -> dict[str, str]:
    """Tags of a raster, or of the first layer of a vector file; empty where nothing reads it."""
    import rasterio
    from rasterio.errors import RasterioIOError

    if path.name.endswith(_VECTOR) and not path.name.endswith(_INDEX):
        import pyogrio
        from pyogrio.errors import DataLayerError, DataSourceError

        try:
            return dict(pyogrio.read_info(path).get("layer_metadata") or {})
        except (DataSourceError, DataLayerError):
            return {}
    try:
        with rasterio.open(path) as src:
            return dict(src.tags())
    except RasterioIOError:
        return {}


def _map_folder(path: Path) -> Path | None:
    """Folder of the map that a file belongs to; a tile lies in ``tiles/PRODUCT`` below it."""
    near = (path.resolve().parent, *path.resolve().parents[2:3])
    return next((f for f in near if (f / "map.json").is_file()), None)


def _scenes(told: dict[str, str], folder: Path | None, unknown: list[str]) -> dict[str, Any]:
    count = int(told["scenes"]) if "scenes" in told else None
    digest, ids = told.get("scenes_digest"), None
    if "scene_ids" in told:
        ids = told["scene_ids"].split()
    elif folder is not None and (folder.parent / "scenes/items.json").is_file():
        beside = used_scenes(folder.parent)
        if digest_json(beside) == digest:
            ids = beside
        else:
            unknown.append("scenes: the item lock has changed since the map was made")
    if ids is None:
        unknown.append("scenes: their ids are in results/scenes/items.json of the run")
    return {"count": count, "digest": digest, "ids": ids}


def _estimator(folder: Path | None, unknown: list[str]) -> dict[str, Any] | None:
    """Design and method of the areas that were estimated with this map."""
    file = folder / "accuracy.json" if folder is not None else None
    if file is None or not file.is_file():
        unknown.append("estimator: accuracy.json lies not beside the file")
        return None
    record = read_json(file)
    return {"status": record.get("status"), **(record.get("sample") or {})}


def _bytes(path: Path, folder: Path | None, unknown: list[str]) -> dict[str, str]:
    digest = sha256(path)
    recorded = None if folder is None else _recorded(path, folder)
    if recorded is None:
        unknown.append("bytes: no record of this file's digest lies beside it")
        return {"sha256": digest, "status": "not recorded"}
    same = "as recorded" if recorded == digest else "differ from the record"
    return {"sha256": digest, "status": same}


def _recorded(path: Path, folder: Path) -> str | None:
    """SHA-256 that the run recorded for a file."""
    for product in read_json(folder / "map.json").get("products", {}).values():
        if product.get("file") == path.name and path.resolve().parent == folder:
            return str(product["sha256"])
    for manifest in sorted((folder / "tiles").glob("b*.json")):
        record = read_json(manifest)["tiles"].get(path.stem, {}).get(path.parent.name)
        if record:
            return str(record["sha256"])
    for item in sorted((folder / "stac").glob("*/*.json")):
        for asset in read_json(item).get("assets", {}).values():
            checksum = str(asset.get("file:checksum", ""))
            if Path(asset["href"]).name == path.name and checksum:
                return checksum[4:]  # the multihash begins with its kind and length
    return None


def origin_text(record: dict[str, Any], *, everything: bool = False, as_json: bool = False) -> str:
    """The origin as text for people, or as JSON.

    Args:
        record: Of :func:`origin_of`.
        everything: List all scenes.
        as_json: As JSON; always with all scenes.
    """
    if as_json:
        return json.dumps(record, indent=1, ensure_ascii=False)
    scenes, estimator = record["scenes"], record["estimator"]
    lines = [
        f"{record['file']}: product {record['product']}"
        + (f", tile {record['tile']}" if record["tile"] else ""),
        f"  campaign   {record['campaign']} (config {record['config']}), {record['period']}",
        f"  code       Terraloom {record['version']} ({record['code']})",
        f"  labels     {record['labels'] or 'unknown'}",
        f"  model      {record['networks'] or 'unknown number of'} networks, weights "
        f"{record['weights'] or 'unknown'}",
        f"  scenes     {scenes['count'] if scenes['count'] is not None else 'unknown number'} "
        f"({scenes['digest'] or 'no digest'})",
    ]
    ids = scenes["ids"] or []
    lines += [f"             {i}" for i in (ids if everything else ids[:_SHOWN])]
    if len(ids) > _SHOWN and not everything:
        lines.append(f"             and {len(ids) - _SHOWN} more (--all)")
    if estimator:
        design = ", ".join(f"{k} {v}" for k, v in estimator.items() if k != "status")
        lines.append(f"  areas      {estimator['status']}" + (f": {design}" if design else ""))
    lines.append(f"  bytes      {record['bytes']['status']} (SHA-256 {record['bytes']['sha256']})")
    lines.append(f"  file time  {record['file_time']}")
    lines += ["  cannot be told:", *(f"    {u}" for u in record["unknown"])]
    return "\n".join(lines)
