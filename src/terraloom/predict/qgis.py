"""Style files that make QGIS show a class map with its legend, without a click."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import quoteattr

from terraloom.io import write_text
from terraloom.legend import Legend

__all__ = ["class_map_qml", "write_class_map_qml"]

_HEAD = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.22" styleCategories="Symbology">
  <pipe>
    <provider>
      <resampling enabled="false" zoomedInResamplingMethod="nearestNeighbour" \
zoomedOutResamplingMethod="nearestNeighbour" maxOversampling="2"/>
    </provider>
    <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor="">
      <rasterTransparency/>
      <colorPalette>
"""
_TAIL = """      </colorPalette>
    </rasterrenderer>
    <brightnesscontrast brightness="0" contrast="0" gamma="1"/>
    <huesaturation colorizeOn="0" grayscaleMode="0" saturation="0"/>
    <rasterresampler maxOversampling="2"/>
  </pipe>
  <blendMode>0</blendMode>
</qgis>
"""


def class_map_qml(legend: Legend) -> str:
    """QGIS layer style of a class map: paletted, one entry per class, nodata left out.

    Args:
        legend: Codes, names and colours; the map's band 1 holds the codes.

    Returns:
        The text of a ``.qml`` file.
    """
    rows = "".join(
        f'        <paletteEntry value="{code}" color={quoteattr(color)} '
        f'label={quoteattr(name)} alpha="255"/>\n'
        for code, name, color in zip(legend.codes, legend.names, legend.colors, strict=True)
    )
    return _HEAD + rows + _TAIL


def write_class_map_qml(raster: Path | str, legend: Legend) -> Path:
    """Write the style beside ``class_map.tif`` as ``class_map.qml``, where QGIS looks for it.

    Returns:
        Path of the style file.
    """
    path = Path(raster).with_suffix(".qml")
    write_text(path, class_map_qml(legend))
    return path
