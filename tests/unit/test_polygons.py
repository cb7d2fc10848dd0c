"""Polygons of the class map: whole, whatever strips or tiles it was read in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import shapes
from scipy.ndimage import gaussian_filter
from shapely.geometry import shape

from terraloom.predict.polygons import Patch, Strip, patches

TRANSFORM = Affine(10, 0, 399840, 0, -10, 5800320)


def strips(codes: np.ndarray, rows: int) -> Iterator[Strip]:
    for top in range(0, codes.shape[0], rows):
        part = codes[top : top + rows]
        area = np.full(part.shape, 100.0)
        yield Strip(top, part, area, (part / 10).astype(np.float32))


def whole(codes: np.ndarray) -> set[bytes]:
    """What GDAL makes of the raster in one piece, by sides."""
    found = shapes(codes, mask=codes > 0, connectivity=4, transform=TRANSFORM)
    return {shapely.to_wkb(shapely.normalize(shapely.MultiPolygon([shape(g)]))) for g, _ in found}


def made(codes: np.ndarray, rows: int, connectivity: int = 4) -> list[Patch]:
    return list(patches(strips(codes, rows), TRANSFORM, connectivity=connectivity))


def landscape(seed: int, shape: tuple[int, int] = (70, 90), smooth: float = 1.5) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    codes = (1 + np.digitize(noise / noise.std(), [-0.5, 0.5])).astype(np.uint8)
    codes[20:30, 40:60] = 0
    return codes


@pytest.mark.parametrize("rows", [1, 7, 32, 70])
def test_strips_give_the_polygons_of_the_whole_raster(rows: int) -> None:
    codes = landscape(0)
    found = made(codes, rows)
    assert {shapely.to_wkb(p.geometry()) for p in found} == whole(codes)
    assert sum(p.pixels for p in found) == int((codes > 0).sum())
    for p in found:
        assert p.geometry().is_valid
        assert p.geometry().area == pytest.approx(p.area_m2)
        assert p.sum_probability / p.pixels == pytest.approx(p.code / 10, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 9), st.integers(1, 9))
def test_any_small_raster_in_any_strips(seed: int, h: int, w: int, rows: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (h, w)).astype(np.uint8)
    assert {shapely.to_wkb(p.geometry()) for p in made(codes, rows)} == whole(codes)


def test_corners_join_patches_of_eight_neighbours() -> None:
    codes = np.eye(6, dtype=np.uint8) * 2
    for rows in (1, 2, 6):
        assert len(made(codes, rows, 4)) == 6
        (one,) = made(codes, rows, 8)
        assert one.pixels == 6 and one.geometry().is_valid and len(one.geometry().geoms) == 6
    back = np.ascontiguousarray(codes[:, ::-1])
    assert [len(made(back, r, 8)) for r in (1, 2, 6)] == [1, 1, 1]


def test_a_spiral_that_meets_itself_again_is_one_patch() -> None:
    codes = np.ones((9, 9), np.uint8)
    codes[1, 1:8] = codes[1:8, 7] = codes[7, 1:8] = 2
    codes[3:8, 1] = codes[3, 1:6] = 2
    found = made(codes, 2)
    assert {shapely.to_wkb(p.geometry()) for p in found} == whole(codes)
    assert sorted((p.code, p.pixels) for p in found)[-1][0] == 2
    assert [p.first for p in found if p.code == 2] == [(1, 1)]


def test_a_map_without_classes_has_no_polygon() -> None:
    assert made(np.zeros((10, 10), np.uint8), 3) == []
