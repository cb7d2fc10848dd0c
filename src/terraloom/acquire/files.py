"""Local files as an archive: cloud-optimised GeoTIFFs behind a static STAC catalogue.

After the import local files go the same road as any archive: item lock, verification, masks,
alignment, cube. Pixels are copied as they are, without resampling.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from odc.geo.geobox import GeoBox
from pydantic import ValidationError
from rasterio.crs import CRS

from terraloom.acquire.fileitems import LocalItem, local_items
from terraloom.acquire.filespec import BandSpec, LayerSpec, LocalSource, read_spec
from terraloom.acquire.hrefs import safe_id
from terraloom.acquire.planes import Plane, plane_strips
from terraloom.acquire.sources import SourceTable
from terraloom.acquire.static import AssetRecord, ItemRecord, write_catalogue
from terraloom.errors import SceneError
from terraloom.grid import pixel_area_m2
from terraloom.io import cog_from_windows, geobox_of, replace_folder, write_text
from terraloom.log import get_logger, progress
from terraloom.scratch import prefix

__all__ = ["CUBE_SIZES_M", "import_files"]

log = get_logger(__name__)

#: Pixel sizes that a cube can keep: multiples of 10 m that divide 480 m.
CUBE_SIZES_M = (10, 20, 30, 40, 60, 80, 120, 160, 240, 480)

Arrays = Iterator[tuple[slice, slice, npt.NDArray[Any]]]


def import_files(spec: Path, out_dir: Path) -> Path:
    """Turn local files into a static STAC catalogue of COGs and a source table.

    Writes ``catalog.json``, a collection named like the folder with one item per acquisition and
    one COG per band, and ``source.yaml``: the table that campaigns name as ``sources[].source``.
    The folder appears complete or not at all; the same inputs give the same bytes.

    Args:
        spec: YAML file, see docs/how-to/local-files.md; paths in it start from its own folder.
        out_dir: Folder to make; an older one is replaced. Its name is that of the source.

    Returns:
        Path of ``catalog.json``.

    Raises:
        ConfigError: The spec is not valid, or its rules find no file.
        SceneError: A file that is damaged, empty, without date or place, twice, or does not fit
            the others of its item.
    """
    source, name = read_spec(spec), safe_id(out_dir.name)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=prefix("files")))
    try:
        items = local_items(source, Path(spec))
        records = list(_write_items(source, name, items, tmp))
        table = _table(source, name, records, (out_dir / "catalog.json").as_posix())
        text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
        write_text(tmp / "source.yaml", f"# Made by `terraloom import-files`.\n{text}")
        write_catalogue(
            tmp, records, {name: source.title}, source.title,
            catalogue_id=name, licence=source.licence,
        )  # fmt: skip
        tmp.chmod(0o755)
        replace_folder(tmp, out_dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    log.info("%s: %d items written to %s", source.title, len(records), out_dir)
    return out_dir / "catalog.json"


def _write_items(
    source: LocalSource, key: str, items: list[LocalItem], root: Path
) -> Iterator[ItemRecord]:
    ids: set[str] = set()
    told: set[str] = set()
    left = 0
    for item in progress(items, what=f"items of {key}"):
        name = _item_id(source, key, item)
        if name in ids:
            raise SceneError(
                f"two items {name}", where=f"source {key}",
                fix="name what differs by the group (?P<item>..) of the pattern",
            )  # fmt: skip
        ids.add(name)
        _check_fit(item, name)
        folder = root / key / name
        assets: dict[str, AssetRecord] = {}
        for band, plane in item.planes.items():
            asset = _write_band(source, band, plane, folder / f"{band}.tif")
            if asset is not None:
                assets[band] = asset
                _tell_nodata(band, plane, asset.nodata, told)
        if not any(b not in source.layers for b in assets):
            left += 1
            shutil.rmtree(folder, ignore_errors=True)
            continue
        cloud = {} if item.cloud_pct is None else {"eo:cloud_cover": item.cloud_pct}
        yield ItemRecord(name, key, item.when, assets, cloud)
    if left:
        log.warning("%s: %d of %d items hold no valid pixel and are left out", key, left, len(ids))
    if left == len(ids):
        raise SceneError(
            f"none of {left} items holds a valid pixel", where=f"source {key}",
            fix="check nodata of the source",
        )  # fmt: skip


def _item_id(source: LocalSource, key: str, item: LocalItem) -> str:
    parts = [key]
    if not source.static:
        parts.append(item.when.strftime("%Y%m%dT%H%M%S" if item.timed else "%Y%m%d"))
    if item.name:
        parts.append(item.name)
    return safe_id("_".join(parts))


def _check_fit(item: LocalItem, name: str) -> None:
    """Bands of an item share one coordinate system, and those of one pixel size one grid."""
    first: dict[tuple[float, float], tuple[str, GeoBox]] = {}
    crs: tuple[str, CRS] | None = None
    for band, plane in item.planes.items():
        geobox = plane.geobox
        own = CRS.from_user_input(plane.crs)
        crs = crs or (band, own)
        if own != crs[1]:
            raise SceneError(
                f"band {band} is in {own.to_string()[:60]}, band {crs[0]} in "
                f"{crs[1].to_string()[:60]}",
                where=f"item {name}, {plane.file.name}",
                allowed="one coordinate system per item",
                fix="make them two sources, or warp one of them",
            )
        size = (round(geobox.resolution.x, 9), round(geobox.resolution.y, 9))
        other, ground = first.setdefault(size, (band, geobox))
        if geobox.shape != ground.shape or not geobox.affine.almost_equals(ground.affine, 1e-3):
            raise SceneError(
                f"band {band} has {tuple(geobox.shape)} px from {tuple(geobox.affine)[2:6:3]}, "
                f"band {other} {tuple(ground.shape)} px from {tuple(ground.affine)[2:6:3]}",
                where=f"item {name}, {plane.file.name}",
                allowed="one grid for the bands of one pixel size",
                fix="cut them to one area, or name what differs by the group (?P<item>..)",
            )


# --- pixels -------------------------------------------------------------------------------------


def _write_band(source: LocalSource, band: str, plane: Plane, path: Path) -> AssetRecord | None:
    """Write one band; None where every pixel is missing and the source skips such bands."""
    layer = source.layers.get(band)
    nodata, dtype = _nodata(source, layer, plane), _stored_type(layer, plane)
    seen = _Seen(nodata)
    strips = plane_strips(plane)
    cog_from_windows(
        path, plane.geobox, seen.watch(strips if layer is None else _recoded(strips, layer)),
        count=1, dtype=dtype, nodata=nodata, band_names=[band],
        overviews="average" if layer is None else "nearest",
    )  # fmt: skip
    if not seen.valid:
        if source.empty == "stop" and layer is None:
            raise SceneError(
                f"every pixel of band {band} is missing (nodata {nodata:g})",
                where=plane.file.as_posix(),
                allowed="at least one valid pixel",
                fix="check nodata of the source; `empty: skip` leaves such bands out",
            )
        if layer is None:
            path.unlink()
            return None
    own = geobox_of(path)
    spec = source.bands.get(band, BandSpec())
    scale, offset = _radiometry(source, spec, plane) if layer is None else (1.0, 0.0)
    unit = "class" if layer else source.unit
    centre = spec.center_wavelength_um or plane.wavelength_um
    return AssetRecord(
        path, own, dtype, nodata, scale, offset, unit,
        resolution_m=_pixel_m(own), common_name=spec.common_name,
        center_wavelength_um=None if centre is None else round(centre, 5),
    )  # fmt: skip


class _Seen:
    """Watches strips on their way for valid pixels."""

    def __init__(self, nodata: float) -> None:
        self.nodata, self.valid = nodata, False

    def watch(self, strips: Arrays) -> Arrays:
        """The strips, unchanged."""
        for rows, columns, data in strips:
            if not self.valid:
                self.valid = bool((np.isfinite(data) & (data != self.nodata)).any())
            yield rows, columns, data[None]


def _recoded(strips: Arrays, layer: LayerSpec) -> Arrays:
    if not layer.recode:
        yield from strips
        return
    old = np.array(sorted(layer.recode), dtype=np.int64)
    new = np.array([layer.recode[int(v)] for v in old], dtype=np.uint16)
    for rows, columns, data in strips:
        at = np.clip(np.searchsorted(old, data), 0, len(old) - 1)
        known = old[at] == data
        yield rows, columns, np.where(known, new[at], np.uint16(layer.nodata)).astype(np.uint16)


def _stored_type(layer: LayerSpec | None, plane: Plane) -> str:
    return "uint16" if layer is not None and layer.recode else plane.dtype


def _nodata(source: LocalSource, layer: LayerSpec | None, plane: Plane) -> float:
    """Value that means missing: the spec's, else the file's own."""
    value = layer.nodata if layer is not None else source.nodata
    own = plane.nodata
    dtype = np.dtype(_stored_type(layer, plane))
    if value is None:
        value = own if own is not None else (math.nan if dtype.kind == "f" else None)
    where = plane.file.as_posix()
    if value is None:
        raise SceneError(
            "neither the file nor the spec says which value means missing",
            where=where, fix="give nodata of the source, a value that no pixel has if need be",
        )  # fmt: skip
    if dtype.kind in "iu" and not (
        math.isfinite(value)
        and value == int(value)
        and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
    ):
        raise SceneError(
            f"nodata {value:g} in a file of {dtype}", where=where,
            allowed=f"whole numbers {np.iinfo(dtype).min} to {np.iinfo(dtype).max}",
            fix="correct nodata of the source or layer",
        )  # fmt: skip
    if dtype == np.float32 and math.isfinite(value):
        value = float(np.float32(value))
    return float(value)


def _tell_nodata(band: str, plane: Plane, nodata: float, told: set[str]) -> None:
    """Say once per band that the spec's nodata value is not the file's own."""
    own = plane.nodata
    same = own is None or own == nodata or (math.isnan(own) and math.isnan(nodata))
    if not same and band not in told:
        told.add(band)
        log.warning(
            "%s: %g means missing in band %s as the spec says, although the file says %g",
            plane.file.name, nodata, band, own,
        )  # fmt: skip


def _radiometry(source: LocalSource, spec: BandSpec, plane: Plane) -> tuple[float, float]:
    scales = [v for v in (spec.scale, source.scale, plane.scale) if v is not None]
    offsets = [v for v in (spec.offset, source.offset, plane.offset) if v is not None]
    return scales[0], offsets[0]


def _pixel_m(geobox: GeoBox) -> float:
    """Pixel size in metres; of degrees the root of the pixel's true area."""
    crs = CRS.from_user_input(str(geobox.crs))
    if crs.is_projected:
        return abs(float(geobox.resolution.x)) * float(crs.linear_units_factor[1])
    height = geobox.shape[0]
    middle = geobox[height // 2 : height // 2 + 1, :]
    return round(float(np.sqrt(pixel_area_m2(middle)[0, 0])), 3)


# --- source table -------------------------------------------------------------------------------


def _table(
    source: LocalSource, key: str, items: list[ItemRecord], catalogue: str
) -> dict[str, Any]:
    """Source table of what was written, checked."""
    sizes: dict[str, float] = {}
    first: dict[str, AssetRecord] = {}
    for item in items:
        for band, asset in item.assets.items():
            size = float(asset.resolution_m or 0)
            first.setdefault(band, asset)
            if not math.isclose(sizes.setdefault(band, size), size, rel_tol=0.01):
                raise SceneError(
                    f"band {band} has pixels of {sizes[band]:g} m and of {size:g} m",
                    where=f"source {key}, item {item.id}",
                    allowed="one pixel size per band", fix="make them two sources",
                )  # fmt: skip
    # In the order of the spec; bands that it does not name (wavelengths, matrices) as found.
    order = [*(b for b in source.bands if b in first), *(b for b in first if b not in source.bands)]
    bands = {b: _band_row(source, key, b, first[b]) for b in order if b not in source.layers}
    layers = {
        name: {
            "assets": [name], "resolution_m": sizes[name], "codes": layer.codes,
            "nodata": layer.nodata,
        }
        for name, layer in source.layers.items()
        if name in first
    }  # fmt: skip
    some = first[next(iter(bands))]
    finest = min(sizes[b] for b in (layers or bands))
    table: dict[str, Any] = {
        "title": source.title, "kind": source.kind,
        "collection": key,
        "providers": {
            "files": {"catalogue": catalogue, "collection": key}
        },
        "attribution": source.attribution, "note": source.note, "static": source.static,
        "unit": source.unit, "scale": some.scale, "offset": some.offset, "nodata": some.nodata,
        "resampling": source.resampling, "bands": bands, "layers": layers,
        "mask_resolution_m": source.mask_resolution_m or _cube_m(finest),
    }  # fmt: skip
    try:
        SourceTable(key=key, **table)
    except ValidationError as err:  # a new rule of source tables that this writer does not know
        raise SceneError(f"the source table is not valid: {err}", where=f"source {key}") from err
    return table


def _band_row(source: LocalSource, key: str, band: str, asset: AssetRecord) -> dict[str, Any]:
    size = float(asset.resolution_m or 0)
    sensor = source.sensor or key.replace("-", "")
    return {
        "assets": [band], "resolution_m": size,
        "group": f"{sensor}_{source.cube_m or _cube_m(size)}",
        "common_name": asset.common_name, "center_wavelength_um": asset.center_wavelength_um,
    }  # fmt: skip


def _cube_m(size_m: float) -> int:
    """Pixel size in the cube that is nearest to a native one, as a ratio."""
    return min(CUBE_SIZES_M, key=lambda m: (abs(math.log(m / size_m)), m))
