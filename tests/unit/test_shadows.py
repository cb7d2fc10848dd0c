from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from terraloom.acquire.sun import sun_position
from terraloom.errors import SceneError
from terraloom.preprocess.shadows import cast_shadow, darkness, shadow_displacement


def test_sun_position_matches_the_published_example_of_reda_and_andreas():
    # NREL SPA report (2004), appendix A.5: zenith 50.11162 (refracted), azimuth 194.34024.
    when = datetime(2003, 10, 17, 12, 30, 30, tzinfo=timezone(timedelta(hours=-7)))
    azimuth, elevation = sun_position(when, -105.1786, 39.742476)
    assert azimuth == pytest.approx(194.34024, abs=0.02)
    # The refraction of the report at this height is about 0.016 degrees.
    assert elevation == pytest.approx(90 - 50.11162, abs=0.03)


@pytest.mark.parametrize(
    ("when", "lon", "lat", "azimuth", "elevation"),
    [
        # Equinox at local noon on the equator: overhead; solstice noon on the tropic of Cancer.
        (datetime(2022, 3, 20, 12, 7, 27, tzinfo=UTC), 0.0, 0.0, None, 90.0),
        (datetime(2022, 6, 21, 12, 1, 50, tzinfo=UTC), 0.0, 23.437, None, 90.0),
        # Midsummer noon in the south: sun in the north, 90 - 45 + 23.4 - ...
        (datetime(2022, 12, 21, 11, 58, 0, tzinfo=UTC), 0.0, -45.0, 0.0, 68.44),
    ],
)
def test_sun_position_in_symmetric_places(when, lon, lat, azimuth, elevation):
    az, el = sun_position(when, lon, lat)
    assert el == pytest.approx(elevation, abs=0.2)
    if azimuth is not None:
        assert abs((az - azimuth + 180) % 360 - 180) < 1.0


def test_sun_position_takes_a_naive_time_as_utc():
    when = datetime(2017, 2, 16, 10, 21, 1)
    naive = sun_position(when, 12.6, 52.5)
    assert naive == sun_position(when.replace(tzinfo=UTC), 12.6, 52.5)
    # The real scene: low winter sun in the south-south-east.
    assert naive == pytest.approx((163.2, 23.9), abs=0.1)


def test_displacement_of_the_fixture():
    dx, dy = shadow_displacement(1000.0, 150.0, 50.0)
    assert dx == pytest.approx(-419.55, abs=0.01)
    assert dy == pytest.approx(726.68, abs=0.01)
    assert math.hypot(dx, dy) == pytest.approx(839.10, abs=0.01)


@given(
    lat=st.floats(-60, 60), lon=st.floats(-180, 180), day=st.integers(0, 364),
    height=st.floats(200, 10_000),
)  # fmt: skip
def test_shadows_point_away_from_the_sun_in_both_hemispheres(lat, lon, day, height):
    local_morning = datetime(2022, 1, 1, tzinfo=UTC) + timedelta(days=day, hours=10.5 - lon / 15)
    azimuth, elevation = sun_position(local_morning, lon, lat)
    if elevation < 1:
        return
    dx, dy = shadow_displacement(height, azimuth, elevation)
    to_sun = (math.sin(math.radians(azimuth)), math.cos(math.radians(azimuth)))
    length = math.hypot(dx, dy)
    assert dx * to_sun[0] + dy * to_sun[1] == pytest.approx(-length, rel=1e-9)
    assert length == pytest.approx(height * math.tan(math.radians(90 - elevation)), rel=1e-6)
    if abs(lat) > 30:  # outside the tropics the morning sun is on the equator's side ...
        assert dx < 0  # ... and in the east: shadows fall westwards


@pytest.mark.parametrize("elevation", [0.0, -3.0, 91.0, float("nan")])
def test_a_sun_that_is_not_up_is_refused(elevation):
    with pytest.raises(SceneError, match="elevation"):
        shadow_displacement(1000.0, 150.0, elevation)


def _scene(height_m: float, azimuth: float, elevation: float, seed: int = 0):
    """Clouds on a textured ground, their shadows, and a lake away from all shadows; 20 m."""
    rng = np.random.default_rng(seed)
    n, res = 300, 20.0
    field = ndimage.gaussian_filter(rng.standard_normal((n, n)), 8)
    cloud = np.zeros((n, n), dtype=bool)
    inner = slice(90, 210)
    cloud[inner, inner] = field[inner, inner] > np.quantile(field[inner, inner], 0.8)
    dx, dy = shadow_displacement(height_m, azimuth, elevation)
    shadow = ndimage.shift(cloud.astype(float), (-dy / res, dx / res), order=0) > 0.5
    ground = 0.28 + 0.02 * ndimage.gaussian_filter(rng.standard_normal((n, n)), 2) / 0.14
    nir = np.where(shadow, 0.4 * ground, ground)
    water = np.zeros_like(cloud)
    water[20:60, 230:280] = True
    nir[water] = 0.02
    nir[cloud] = 0.6
    return cloud, shadow & ~cloud & ~water, water, nir.astype(np.float32)


@pytest.mark.parametrize(
    ("height_m", "azimuth", "elevation"),
    [(1000, 150, 50), (1500, 30, 45), (700, 165, 25), (2000, 335, 60)],
)
def test_height_and_shadow_are_found(height_m, azimuth, elevation):
    cloud, shadow, water, nir = _scene(height_m, azimuth, elevation)
    clear = ~cloud & ~water
    dark = darkness(nir, clear, resolution_m=20)
    found = cast_shadow(
        cloud, dark, valid=np.ones_like(cloud), water=water, sun_azimuth_deg=azimuth,
        sun_elevation_deg=elevation, resolution_m=20,
    )  # fmt: skip
    assert found.height_m == pytest.approx(height_m, rel=0.1)
    assert found.agreement > 0.3
    f1 = 2 * (found.mask & shadow).sum() / (found.mask.sum() + shadow.sum())
    assert f1 > 0.85
    assert not (found.mask & water).any()  # a lake is dark too
    assert not (found.mask & cloud).any()


def test_dark_ground_out_of_reach_of_any_cloud_is_not_shadow():
    cloud, _, water, nir = _scene(1000, 150, 50)
    nir[250:280, 20:60] = 0.08  # a burnt field, south-west: no cloud lies towards the sun
    dark = darkness(nir, ~cloud & ~water, resolution_m=20)
    found = cast_shadow(
        cloud, dark, valid=np.ones_like(cloud), water=water, sun_azimuth_deg=150,
        sun_elevation_deg=50, resolution_m=20,
    )  # fmt: skip
    assert not found.mask[250:280, 20:60].any()


def test_no_cloud_no_shadow():
    empty = np.zeros((50, 50), dtype=bool)
    found = cast_shadow(
        empty, np.ones((50, 50), np.float32), valid=~empty, water=empty, sun_azimuth_deg=150,
        sun_elevation_deg=40, resolution_m=20,
    )  # fmt: skip
    assert not found.mask.any()
    assert math.isnan(found.height_m)


def test_shadow_of_a_cloud_beyond_the_border_needs_its_own_clear_sky_as_witness():
    cloud = np.zeros((100, 100), dtype=bool)
    cloud[5:15, 5:15] = True
    dark = np.zeros((100, 100), dtype=np.float32)
    dark[70:90, 40:60] = 0.9
    common = {
        "valid": np.ones_like(cloud), "water": np.zeros_like(cloud), "sun_azimuth_deg": 180.0,
        "sun_elevation_deg": 40.0, "resolution_m": 20.0,
    }  # fmt: skip
    assert not cast_shadow(cloud, dark, **common).mask[70:90, 40:60].any()
    assert cast_shadow(cloud, dark, swath_threshold=0.5, **common).mask[72:88, 42:58].all()


def test_darkness_prefers_the_pixels_own_clear_sky():
    nir = np.full((60, 60), 0.3, dtype=np.float32)
    nir[:, 30:] = 0.1  # a forest that is always dark
    clear = np.ones(nir.shape, dtype=bool)
    background = nir.copy()
    assert darkness(nir, clear, resolution_m=20).max() > 0.3
    assert darkness(nir, clear, resolution_m=20, background=background).max() == 0.0
    half = darkness(0.75 * nir, clear, resolution_m=20, background=background)
    np.testing.assert_allclose(half, 0.5, atol=1e-5)


def test_darkness_of_nan_is_zero():
    band = np.full((40, 40), np.nan, dtype=np.float32)
    assert (darkness(band, np.ones(band.shape, bool), resolution_m=20) == 0).all()
