"""Pixel arithmetic: round trips, abutting tiles, true areas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Geod
from shapely.geometry import box

from terraloom.aoi import to_crs
from terraloom.errors import AoiError, GridError
from terraloom.grid import (
    LATTICE_M,
    CampaignGrid,
    coarsen,
    geobox_from_record,
    geobox_record,
    pad,
    pick_crs,
    row_areas_m2,
    window_of,
)

UTM = "EPSG:32633"


@given(
    x=st.floats(2e5, 7e5),
    y=st.floats(1e5, 9e6),
    w=st.floats(10, 30_000),
    h=st.floats(10, 30_000),
)
def test_grid_snaps_outwards_to_the_lattice(x: float, y: float, w: float, h: float) -> None:
    aoi = box(x, y, x + w, y + h)
    grid = CampaignGrid.from_aoi(aoi, UTM)
    b = grid.geobox.boundingbox
    for edge in (b.left, b.bottom, b.right, b.top):
        assert edge % LATTICE_M == 0
    # Never cuts the AOI, beyond the stated rounding of a bound that lies on the lattice.
    assert box(b.left, b.bottom, b.right, b.top).buffer(1e-3).contains(aoi)
    assert b.left > x - LATTICE_M and b.top < y + h + LATTICE_M


def test_tiles_abut_exactly_and_cover_the_grid() -> None:
    grid = CampaignGrid.from_aoi(box(330000, 5814360, 345360, 5822040), UTM, tile_px=384)
    assert grid.geobox.shape == (768, 1536)
    seen = np.zeros(grid.geobox.shape, int)
    for tile in grid.tiles():
        seen[window_of(tile.geobox, grid.geobox)] += 1
    assert (seen == 1).all()
    assert len(grid.tiles()) == 8
    batches = grid.batches(3)
    assert [len(b) for b in batches.values()] == [3, 3, 2]


def test_tiles_outside_a_slanted_aoi_are_left_out() -> None:
    from shapely.geometry import Polygon

    aoi = Polygon([(0, 0), (38400, 0), (0, 38400)])
    grid = CampaignGrid.from_aoi(aoi, UTM, tile_px=384)
    assert len(grid.tiles()) == 55  # of 100: those below and on the diagonal


def test_native_pixels_nest() -> None:
    grid = CampaignGrid.from_aoi(box(330000, 5814360, 345360, 5822040), UTM)
    for factor in (2, 6):
        coarse = coarsen(grid.geobox, factor)
        assert coarse.boundingbox == grid.geobox.boundingbox
    with pytest.raises(GridError, match="do not divide"):
        coarsen(grid.geobox[0:100, 0:100], 6)


def test_window_of_refuses_another_phase() -> None:
    grid = CampaignGrid.from_aoi(box(0, 0, 6000, 6000), UTM)
    shifted = grid.geobox.translate_pix(0.3, 0)
    with pytest.raises(GridError, match="not on the lattice"):
        window_of(shifted, grid.geobox)
    rows, cols = window_of(pad(grid.geobox, 5), grid.geobox)
    assert (rows.start, cols.start) == (-5, -5)


def test_row_areas_agree_with_the_ellipsoid() -> None:
    grid = CampaignGrid.from_aoi(box(330000, 5814360, 345360, 5822040), UTM)
    total = float(row_areas_m2(grid.geobox).sum() * grid.geobox.shape[1])
    ring = to_crs(box(*grid.geobox.boundingbox.bbox), UTM, "EPSG:4326")
    lon, lat = ring.exterior.coords.xy
    true = abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0])
    assert total == pytest.approx(true, rel=2e-5)
    nominal = 100.0 * grid.geobox.shape[0] * grid.geobox.shape[1]
    assert abs(nominal / true - 1) > 1e-4  # what nominal pixel areas would get wrong here


def test_pick_crs() -> None:
    assert pick_crs(box(12, 52, 13, 53)) == "EPSG:32633"
    assert pick_crs(box(-70, -40, -69, -39)) == "EPSG:32719"
    assert "Lambert Azimuthal Equal Area" in pick_crs(box(5, 45, 15, 55))


def test_errors() -> None:
    with pytest.raises(GridError, match="lattice"):
        CampaignGrid.from_aoi(box(0, 0, 1000, 1000), UTM, tile_px=100)
    with pytest.raises(AoiError, match="empty"):
        CampaignGrid.from_aoi(box(0, 0, 0, 10), UTM)


def test_record_round_trip() -> None:
    grid = CampaignGrid.from_aoi(box(0, 0, 6000, 6000), UTM)
    assert geobox_from_record(geobox_record(grid.geobox)) == grid.geobox
