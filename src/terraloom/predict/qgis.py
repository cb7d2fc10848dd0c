"""Style files that make QGIS show a product with its legend, without a click."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

from terraloom.io import write_text
from terraloom.legend import Legend
from terraloom.predict.specs import Spec

__all__ = ["class_map_qml", "ramp_qml", "write_styles"]

_HEAD = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.22" styleCategories="Symbology">
  <pipe>
    <provider>
      <resampling enabled="false" zoomedInResamplingMethod="nearestNeighbour" \
zoomedOutResamplingMethod="nearestNeighbour" maxOversampling="2"/>
    </provider>
"""
_TAIL = """    </rasterrenderer>
    <brightnesscontrast brightness="0" contrast="0" gamma="1"/>
    <huesaturation colorizeOn="0" grayscaleMode="0" saturation="0"/>
    <rasterresampler maxOversampling="2"/>
  </pipe>
  <blendMode>0</blendMode>
</qgis>
"""
#: Even steps of matplotlib's viridis, which stays in order in grey and for the colour-blind.
_RAMP = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")


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
    return (
        _HEAD + '    <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" '
        f'nodataColor="">\n      <rasterTransparency/>\n      <colorPalette>\n{rows}'
        "      </colorPalette>\n" + _TAIL
    )


def ramp_qml(low: float, high: float, *, band: int = 1, colors: Sequence[str] = _RAMP) -> str:
    """QGIS layer style of one band with values: a continuous ramp of colours.

    Args:
        low: Value of the first colour, scale applied, as QGIS reads it.
        high: Value of the last colour.
        band: Band shown at first, from 1.
        colors: Evenly spaced colours, ``#rrggbb``.

    Returns:
        The text of a ``.qml`` file.
    """
    step = (high - low) / (len(colors) - 1)
    values = [low + i * step for i in range(len(colors))]
    items = "".join(
        f'          <item value="{v:.6g}" color={quoteattr(c)} label="{v:.3g}" alpha="255"/>\n'
        for v, c in zip(values, colors, strict=True)
    )
    span = f'classificationMin="{low:.6g}" classificationMax="{high:.6g}"'
    shader = (
        f'colorRampType="INTERPOLATED" classificationMode="1" clip="0" '
        f'minimumValue="{low:.6g}" maximumValue="{high:.6g}" labelPrecision="3"'
    )
    return (
        _HEAD + f'    <rasterrenderer type="singlebandpseudocolor" band="{band}" opacity="1" '
        f'alphaBand="-1" nodataColor="" {span}>\n      <rasterTransparency/>\n'
        "      <minMaxOrigin>\n        <limits>None</limits>\n"
        "        <extent>WholeRaster</extent>\n      </minMaxOrigin>\n"
        f"      <rastershader>\n        <colorrampshader {shader}>\n{items}"
        "        </colorrampshader>\n      </rastershader>\n" + _TAIL
    )


def write_styles(folder: Path, legend: Legend, specs: Mapping[str, Spec]) -> list[Path]:
    """Write the style of each product that has one, named as QGIS looks for it.

    Class maps show their classes; probabilities the first class from 0 to 1, uncertainty its total
    from 0 to ln K, a boundary probability 0 to 1. The rest is shown well without a style.

    Returns:
        Paths of the style files.
    """
    written = []
    for name, spec in specs.items():
        if spec.colormap:
            text = class_map_qml(legend)
        elif spec.largest is not None:
            text = ramp_qml(0.0, spec.largest)
        else:
            continue
        path = folder / f"{name}.qml"
        write_text(path, text)
        written.append(path)
    return written
