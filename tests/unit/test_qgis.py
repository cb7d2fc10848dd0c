"""QGIS styles: XML that names every class, and ramps over the values that can be."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.products import campaign
from terraloom.legend import Legend
from terraloom.predict.qgis import class_map_qml, ramp_qml, write_styles
from terraloom.predict.specs import product_specs

LEGEND = Legend((1, 4), ('Built-up & "bare"', "Wald <Laub>"), ("#aa0000", "#00bb00"))


def renderer(text: str) -> ElementTree.Element:
    found = ElementTree.fromstring(text).find("pipe/rasterrenderer")
    assert found is not None
    return found


def test_the_style_lists_every_class_and_is_xml() -> None:
    found = renderer(class_map_qml(LEGEND))
    assert found.get("type") == "paletted" and found.get("band") == "1"
    entries = [e.attrib for e in found.iter("paletteEntry")]
    assert [(e["value"], e["label"], e["color"]) for e in entries] == [
        ("1", 'Built-up & "bare"', "#aa0000"),
        ("4", "Wald <Laub>", "#00bb00"),
    ]


def test_a_ramp_spans_its_values_evenly() -> None:
    found = renderer(ramp_qml(0.0, 2.0, band=3))
    assert found.get("type") == "singlebandpseudocolor" and found.get("band") == "3"
    items = [(float(i.attrib["value"]), i.attrib["color"]) for i in found.iter("item")]
    assert [v for v, _ in items] == [0, 0.5, 1, 1.5, 2] and len({c for _, c in items}) == 5
    shader = found.find("rastershader/colorrampshader")
    assert shader is not None and float(shader.attrib["maximumValue"]) == 2


def test_products_with_fixed_values_have_styles(tmp_path: Path) -> None:
    specs = product_specs(campaign(products={"minimum_mapping_unit_ha": 0.5}), LEGEND)
    names = [p.name for p in write_styles(tmp_path, LEGEND, specs)]
    assert sorted(names) == sorted(
        ["class_map.qml", "class_map_mmu.qml", "probabilities.qml", "uncertainty.qml", "edge.qml"]
    )
    top = [float(i.attrib["value"]) for i in
           renderer((tmp_path / "uncertainty.qml").read_text()).iter("item")][-1]  # fmt: skip
    assert top == pytest.approx(math.log(2), rel=1e-5)
