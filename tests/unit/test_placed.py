from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

from support.alignment import fractal, write_item
from terraloom.acquire.assets import read_band
from terraloom.preprocess.coregister import Shift, shifted_geobox
from terraloom.preprocess.field import ShiftField
from terraloom.preprocess.placed import read_placed, read_placed_mask, sample

NATIVE = GeoBox((300, 320), Affine(10, 0, 300_000, 0, -10, 5_000_000), "EPSG:32633")
TILE = NATIVE[60:180, 50:210]
SHIFT = Shift(0.4, -0.7, 1.0, 0.0, 9)


def _field(dy=0.4, dx=-0.7, tilt=0.0) -> ShiftField:
    rows, cols = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    return ShiftField(
        x=300_005.0, y=4_999_995.0, spacing_m=1280.0, pixel_m=10.0,
        dy_px=dy + tilt * rows, dx_px=dx + tilt * cols, n_points=50, n_rejected=0,
        residual_px=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    image = 0.2 + 0.03 * fractal(320, seed=3, slope=2.0)[:300]
    image[100:104, 120:123] = np.nan
    folder = tmp_path_factory.mktemp("item")
    return write_item(folder, "s2", {"B04": image, "B08": image}, NATIVE)


def test_without_a_field_it_is_the_one_warp(item):
    plain = read_band(dict(item), "B04", TILE)
    np.testing.assert_array_equal(read_placed(item, "B04", TILE, None), plain)
    moved = read_band(dict(item), "B04", shifted_geobox(TILE, SHIFT, pixel_m=10))
    np.testing.assert_array_equal(read_placed(item, "B04", TILE, SHIFT), moved)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "cubic"])
def test_a_constant_field_is_the_same_as_the_warp(item, method):
    """Another implementation of the same resampling: GDAL's warp."""
    want = read_placed(item, "B04", TILE, SHIFT, resampling=method)
    got = read_placed(item, "B04", TILE, SHIFT, _field(), resampling=method)
    both = np.isfinite(want) & np.isfinite(got)
    assert both.mean() > 0.998
    assert (np.isfinite(want) != np.isfinite(got)).sum() <= 24  # around the hole only
    apart = np.abs(want - got)[both]
    assert np.percentile(apart, 99.5) < 6e-5  # GDAL rounds to the stored integers, steps of 1e-4
    assert apart.max() < 2e-2  # where neighbours are missing, weights are dealt out


def test_without_displacement_native_pixels_come_back_as_they_are(item):
    plain = read_band(dict(item), "B04", TILE)
    for method in ("nearest", "bilinear", "cubic"):
        got = read_placed(item, "B04", TILE, None, _field(0.0, 0.0), resampling=method)
        np.testing.assert_allclose(got, plain, atol=1e-7)


def test_a_field_puts_every_pixel_where_it_belongs(tmp_path):
    """Content moved by the field itself comes back; it is resampled once, so it stays sharp."""
    rows, cols = np.meshgrid(np.arange(300.0), np.arange(320.0), indexing="ij")

    def ground(r, c):
        return 0.3 + 0.1 * np.sin(r / 9.0) * np.cos(c / 7.0)

    field = _field(tilt=0.15)
    down, right = field.on(NATIVE)
    # The native pixel r + d(r) shows the ground of r: inverted by iteration.
    r, c = rows.copy(), cols.copy()
    for _ in range(8):
        x, y = 300_005 + 10 * c, 4_999_995 - 10 * r
        dy, dx = field.at(x, y)
        r, c = rows - dy, cols - dx
    item = write_item(tmp_path, "moved", {"B04": ground(r, c)}, NATIVE)
    got = read_placed(item, "B04", TILE, None, field, resampling="cubic")
    want = ground(rows, cols)[60:180, 50:210]
    assert np.abs(got - want).max() < 3e-4  # a step of storage is 1e-4
    still = read_placed(item, "B04", TILE, SHIFT, resampling="cubic")
    assert np.abs(still - want).max() > 10 * np.abs(got - want).max()
    assert np.abs(down - 0.4).max() > 0.3 and np.abs(right + 0.7).max() > 0.3


def test_another_projection_is_the_same_single_interpolation(item):
    """A tile in the next zone: positions go through the change of CRS."""
    there = rasterio.warp.transform_bounds("EPSG:32633", "EPSG:32632", *TILE.boundingbox.bbox)
    left, top = round(there[0] / 10) * 10 + 200, round(there[3] / 10) * 10 - 200
    tile = GeoBox((80, 100), Affine(10, 0, left, 0, -10, top), "EPSG:32632")
    calm = ShiftField(
        left, top, 1280.0, 10.0, np.full((2, 2), 0.4), np.full((2, 2), -0.7), 50, 0, 0.0
    )
    want = read_placed(item, "B08", tile, SHIFT, resampling="cubic")
    got = read_placed(item, "B08", tile, SHIFT, calm, resampling="cubic")
    assert np.isfinite(got).mean() > 0.9
    both = np.isfinite(want) & np.isfinite(got)
    assert np.percentile(np.abs(want - got)[both], 99) < 5e-4


def test_coarser_pixels_are_means_of_displaced_ones(item):
    coarse = TILE.zoom_out(2)
    fine = read_placed(item, "B04", TILE, None, _field())
    got = read_placed(item, "B04", coarse, None, _field())
    want = fine.reshape(60, 2, 80, 2).mean(axis=(1, 3))
    seen = np.isfinite(want)
    assert seen.mean() > 0.99
    np.testing.assert_allclose(got[seen], want[seen], atol=2e-6)


def test_power_is_interpolated_as_power(tmp_path):
    power = np.full((300, 320), 0.1)
    power[:, 1::2] = 0.001
    item = write_item(tmp_path, "s1", {"VV": power}, NATIVE, source="sentinel-1-rtc", unit="power")
    got = read_placed(item, "VV", TILE, None, _field(0.0, 0.5), resampling="bilinear")
    # Midway between the two: the mean power, not the mean of -10 and -30 dB.
    np.testing.assert_allclose(got, 10 * np.log10(0.0505), atol=1e-3)


def test_outside_the_raster_is_missing(item):
    beside = GeoBox((20, 20), Affine(10, 0, 290_000, 0, -10, 5_000_000), "EPSG:32633")
    assert np.isnan(read_placed(item, "B04", beside, SHIFT, _field())).all()
    edge = GeoBox((20, 20), Affine(10, 0, 299_900, 0, -10, 5_000_000), "EPSG:32633")
    seen = np.isfinite(read_placed(item, "B04", edge, SHIFT, _field()))
    assert not seen[:, :9].any() and seen[1:, 12:].all()


def test_a_band_an_item_came_without_is_missing_with_a_field_too(item):
    assert np.isnan(read_placed(item, "B02", TILE, SHIFT, _field())).all()


def test_masks_move_with_the_content_and_keep_their_codes(tmp_path):
    codes = np.zeros((300, 320), np.uint8)
    codes[100:120, 100:130] = 4
    path = tmp_path / "mask.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=300, width=320, count=1, dtype="uint8",
        crs="EPSG:32633", transform=NATIVE.affine, nodata=255,
    ) as dst:  # fmt: skip
        dst.write(codes, 1)
    shift, field = Shift(2.0, -3.0, 1, 0, 1), _field(2.0, -3.0)
    by_warp = read_placed_mask(path, TILE, shift)
    by_field = read_placed_mask(path, TILE, shift, field)
    np.testing.assert_array_equal(by_warp, codes[62:182, 47:207])
    np.testing.assert_array_equal(by_field, by_warp)
    assert by_field.dtype == np.uint8
    beside = GeoBox((20, 20), Affine(10, 0, 290_000, 0, -10, 5_000_000), "EPSG:32633")
    assert (read_placed_mask(path, beside, shift, field) == 255).all()
    assert (read_placed_mask(path, beside, shift) == 255).all()


def test_weights_of_missing_neighbours_go_to_the_others():
    image = np.array([[1.0, 3.0, np.nan, 5.0]], np.float32)
    rows = np.zeros((1, 4))
    got = sample(image, rows, np.array([[0.5, 1.25, 1.75, 3.0]]), method="bilinear")
    np.testing.assert_allclose(got, [[2.0, 3.0, np.nan, 5.0]])
