"""One raster out of many: indexes over the tiles of a product that GDAL reads as one.

A VRT is XML that any GDAL reads, and reads whole. A GTI is a GeoPackage of outlines that GDAL 3.9
or newer asks for the tiles of a window. Both name their tiles by relative paths, carry the same
bands, and have their overviews in one file beside them, so that a whole country is shown without
opening every tile.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyogrio
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from shapely.geometry import box

from terraloom.bandstats import BandStats
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid, Tile, window_of
from terraloom.io import atomic, cog_from_windows, write_text
from terraloom.predict.specs import Spec

__all__ = ["OVERVIEW_FACTOR", "write_index", "write_overviews"]

#: First overview of an index. It divides the tiles (multiples of 48 px).
OVERVIEW_FACTOR = 8
_GDAL_TYPES = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}
#: Fixed date in the GeoPackage: the same tiles give the same bytes.
_FILE_DATE = "2000-01-01T00:00:00Z"
_GTI_SINCE = (3, 9)


def write_index(
    path: Path, grid: CampaignGrid, spec: Spec, files: Mapping[str, str],
    stats: Sequence[BandStats], tags: Mapping[str, str],
) -> None:  # fmt: skip
    """Write the index of one product.

    Args:
        path: ``.vrt`` or ``.gti.gpkg``.
        grid: Grid of the campaign.
        spec: The product.
        files: Path of each tile's raster from the folder of ``path``, by tile name.
        stats: Statistics of each band over all tiles.
        tags: Metadata.

    Raises:
        StateError: The installed GDAL does not read a GTI.
    """
    tiles = [t for t in grid.tiles() if t.name in files]
    if path.suffix == ".vrt":
        write_text(path, _vrt(grid.geobox, spec, tiles, files, stats, tags))
        return
    found = tuple(int(v) for v in rasterio.__gdal_version__.split(".")[:2])
    if found < _GTI_SINCE:
        raise StateError(
            f"GDAL {rasterio.__gdal_version__} does not read tile indexes (GTI)",
            where="products.index", allowed="GDAL 3.9 or newer", fix="set products.index: vrt",
        )  # fmt: skip
    _write_gti(path, grid.geobox, spec, tiles, files, stats, tags)


def _band_xml(spec: Spec, i: int, stats: BandStats, *, hide_nodata: bool) -> list[str]:
    """Elements that VRT and GTI describe a band with, in common."""
    lines = [f"<Description>{escape(spec.band_names[i])}</Description>"]
    lines.append(f"<NoDataValue>{spec.outside:g}</NoDataValue>")
    if hide_nodata and spec.nodata is None:
        lines.append("<HideNoDataValue>1</HideNoDataValue>")
    if spec.scales:
        lines.append(f"<Offset>0</Offset><Scale>{spec.scales[i]!r}</Scale>")
    if spec.units:
        lines.append(f"<UnitType>{escape(spec.units)}</UnitType>")
    if spec.colormap:
        lines.append("<ColorInterp>Palette</ColorInterp><ColorTable>")
        none = (0, 0, 0, 0)
        for code in range(max(spec.colormap) + 1):
            r, g, b, a = spec.colormap.get(code, none)
            lines.append(f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="{a}"/>')
        lines.append("</ColorTable>")
    elif spec.name == "image":
        lines.append(f"<ColorInterp>{('Red', 'Green', 'Blue')[i]}</ColorInterp>")
    else:
        lines.append("<ColorInterp>Gray</ColorInterp>")
    if spec.category_names:
        names = "".join(f"<Category>{escape(n)}</Category>" for n in spec.category_names)
        lines.append(f"<CategoryNames>{names}</CategoryNames>")
    lines.append(_metadata(stats.tags()))
    return lines


def _metadata(tags: Mapping[str, str]) -> str:
    rows = (f"<MDI key={quoteattr(k)}>{escape(v)}</MDI>" for k, v in sorted(tags.items()))
    return f"<Metadata>{''.join(rows)}</Metadata>"


def _vrt(
    geobox: GeoBox, spec: Spec, tiles: Sequence[Tile], files: Mapping[str, str],
    stats: Sequence[BandStats], tags: Mapping[str, str],
) -> str:  # fmt: skip
    h, w = geobox.shape
    kind = _GDAL_TYPES[spec.dtype]
    lines = [
        f'<VRTDataset rasterXSize="{w}" rasterYSize="{h}">',
        f"<SRS>{escape(_wkt(geobox))}</SRS>",
        f"<GeoTransform>{_transform(geobox)}</GeoTransform>",
        _metadata(tags),
    ]
    for i in range(spec.count):
        lines.append(f'<VRTRasterBand dataType="{kind}" band="{i + 1}">')
        lines += _band_xml(spec, i, stats[i], hide_nodata=True)
        for tile in tiles:
            rows, cols = window_of(tile.geobox, geobox)
            th, tw = tile.geobox.shape
            size = f'xSize="{tw}" ySize="{th}"'
            lines.append(
                '<SimpleSource><SourceFilename relativeToVRT="1">'
                f"{escape(files[tile.name])}</SourceFilename><SourceBand>{i + 1}</SourceBand>"
                f'<SourceProperties RasterXSize="{tw}" RasterYSize="{th}" DataType="{kind}" '
                f'BlockXSize="512" BlockYSize="512"/><SrcRect xOff="0" yOff="0" {size}/>'
                f'<DstRect xOff="{cols.start}" yOff="{rows.start}" {size}/></SimpleSource>'
            )
        lines.append("</VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>"]) + "\n"


def _wkt(geobox: GeoBox) -> str:
    return str(rasterio.crs.CRS.from_user_input(str(geobox.crs)).to_wkt())


def _transform(geobox: GeoBox) -> str:
    return ", ".join(repr(float(v)) for v in geobox.affine.to_gdal())


def _write_gti(
    path: Path, geobox: GeoBox, spec: Spec, tiles: Sequence[Tile], files: Mapping[str, str],
    stats: Sequence[BandStats], tags: Mapping[str, str],
) -> None:  # fmt: skip
    h, w = geobox.shape
    kind = _GDAL_TYPES[spec.dtype]
    lines = [
        "<GDALTileIndexDataset><LocationField>location</LocationField>",
        f"<GeoTransform>{_transform(geobox)}</GeoTransform>",
        f"<XSize>{w}</XSize><YSize>{h}</YSize><BlockXSize>512</BlockXSize>",
        "<BlockYSize>512</BlockYSize>",
    ]
    for i in range(spec.count):
        lines.append(f'<Band band="{i + 1}" dataType="{kind}">')
        lines += [*_band_xml(spec, i, stats[i], hide_nodata=False), "</Band>"]
    inner = "".join([*lines, _metadata(tags), "</GDALTileIndexDataset>"])
    boxes = [t.geobox.boundingbox for t in tiles]
    frame = gpd.GeoDataFrame(
        {"location": [files[t.name] for t in tiles]},
        geometry=[box(b.left, b.bottom, b.right, b.top) for b in boxes], crs=str(geobox.crs),
    )  # fmt: skip
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _FILE_DATE})
    # Layer metadata that the driver reads as XML; pyogrio writes plain items, so the record that
    # it makes is filled in afterwards. Plain tags stay too: they are read without GTI.
    both = (
        f'<GDALMultiDomainMetadata>{_metadata(tags)}<Metadata domain="xml:GTI" format="xml">'
        f"{inner}</Metadata></GDALMultiDomainMetadata>"
    )
    with atomic(path) as tmp:
        tmp.unlink()  # GDAL refuses to make a GeoPackage out of an empty file
        pyogrio.write_dataframe(frame, tmp, driver="GPKG", layer="tiles", layer_metadata=dict(tags))
        with sqlite3.connect(tmp) as base:
            base.execute("UPDATE gpkg_metadata SET metadata = ?", (both,))
        base.close()


def write_overviews(
    path: Path, folder: Path, grid: CampaignGrid, spec: Spec, files: Mapping[str, str]
) -> None:
    """Write the overviews of an index, where GDAL looks for them: ``INDEX.ovr``.

    Args:
        path: The index.
        folder: Folder that the paths of the tiles start from.
        grid: Grid of the campaign.
        spec: The product.
        files: As for :func:`write_index`.
    """
    h, w = grid.geobox.shape
    f = OVERVIEW_FACTOR
    a = grid.geobox.affine
    shape = (-(-h // f), -(-w // f))
    coarse = GeoBox(shape, a @ a.scale(w / shape[1], h / shape[0]), grid.geobox.crs)
    made = path.with_name(path.name + ".tif")
    cog_from_windows(
        made, coarse, _coarse_windows(folder, grid, spec, files), count=spec.count,
        dtype=spec.dtype, nodata=spec.nodata, overviews=spec.overviews, colormap=spec.colormap,
    )  # fmt: skip
    made.replace(path.with_name(path.name + ".ovr"))


def _coarse_windows(
    folder: Path, grid: CampaignGrid, spec: Spec, files: Mapping[str, str]
) -> Iterator[tuple[slice, slice, npt.NDArray[Any]]]:
    h, w = grid.geobox.shape
    f, how = OVERVIEW_FACTOR, Resampling[spec.overviews]
    for row in range(-(-h // grid.tile_px)):
        for column in range(-(-w // grid.tile_px)):
            tile = grid.tile(column, row)
            rows, cols = window_of(tile.geobox, grid.geobox)
            shape = tuple(-(-n // f) for n in tile.geobox.shape)
            if tile.name in files:
                with rasterio.open(folder / files[tile.name]) as src:
                    data = src.read(out_shape=(spec.count, *shape), resampling=how)
            else:
                data = np.full((spec.count, *shape), spec.outside, spec.dtype)
            top, left = rows.start // f, cols.start // f
            yield slice(top, top + shape[0]), slice(left, left + shape[1]), data
