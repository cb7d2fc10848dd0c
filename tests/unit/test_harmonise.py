"""Band-pass and view direction: published coefficients, known limits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from terraloom.errors import SceneError
from terraloom.preprocess.harmonise import (
    adjustment,
    bandpass,
    c_factor,
    geometric_kernel,
    sensor_of,
    view_unknown,
    volume_kernel,
)

ROLES = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def item(platform: str = "sentinel-2a", **keys: Any) -> dict[str, Any]:
    return {"id": "I", "source": "sentinel-2-l2a", "platform": platform, "sun_azimuth_deg": 150.0,
            "sun_elevation_deg": 45.0, "view_azimuth_deg": 100.0, "view_zenith_deg": 8.0,
            **keys}  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "sensor"),
    [("sentinel-2a", "S2A"), ("Sentinel-2B", "S2B"), ("S2C", "S2C"), ("sentinel_2a", "S2A"),
     ("landsat-8", "L8"), ("LANDSAT_9", "L9"), ("Landsat-5", "L5"), ("LC08", "L8"),
     ("terra", "terra"), ("", "")],
)  # fmt: skip
def test_names_of_platforms(platform: str, sensor: str) -> None:
    assert sensor_of(item(platform)) == sensor


@pytest.mark.parametrize(
    ("platform", "role", "slope", "offset"),
    [("sentinel-2a", "B02", 0.9778, -0.0040), ("sentinel-2b", "B03", 1.0075, -0.0008),
     ("sentinel-2a", "B12", 1.0030, -0.0012), ("sentinel-2b", "B8A", 0.9966, 0.0)],
)  # fmt: skip
def test_coefficients_of_hls(platform: str, role: str, slope: float, offset: float) -> None:
    assert bandpass(item(platform), role, "landsat-8") == pytest.approx((slope, offset))


@pytest.mark.parametrize("role", ROLES)
def test_there_and_back_is_the_same(role: str) -> None:
    gain, offset = bandpass(item("sentinel-2a"), role, "landsat-8")
    back_gain, back_offset = bandpass(item("landsat-8"), role, "sentinel-2")
    assert (0.2 * gain + offset) * back_gain + back_offset == pytest.approx(0.2)
    assert bandpass(item("sentinel-2a"), role, "sentinel-2") == (1, 0)
    assert bandpass(item("landsat-8"), role, "landsat-8") == (1, 0)
    assert bandpass(item("sentinel-2c"), role, "none") == (1, 0)


def test_sentinel_2b_goes_to_2a_by_way_of_oli() -> None:
    gain, offset = bandpass(item("sentinel-2b"), "B12", "sentinel-2")
    oli = 0.9867 * 0.3 + 0.0004
    assert gain * 0.3 + offset == pytest.approx((oli + 0.0012) / 1.0030)


def test_bands_without_a_counterpart_stay_as_they_are() -> None:
    for role in ("B05", "B06", "B07", "B08", "B09", ""):
        assert bandpass(item(), role, "landsat-8") == (1, 0)


@pytest.mark.parametrize("platform", ["sentinel-2c", "landsat-5", "landsat-7", "unheard-of", ""])
def test_platforms_without_coefficients_are_refused(platform: str) -> None:
    with pytest.raises(SceneError, match=r"item I(.|\n)*no published(.|\n)*not used in their"):
        bandpass(item(platform), "B04", "landsat-8")


def test_hls_has_the_response_of_landsat_whatever_flew() -> None:
    hls = item("sentinel-2c", source="hls-s30")
    assert bandpass(hls, "B04", "landsat-8") == (1, 0)
    assert bandpass(hls, "B04", "sentinel-2")[0] == pytest.approx(1 / 0.9765)


def test_kernels_are_zero_in_the_zenith_and_reciprocal() -> None:
    for kernel in (volume_kernel, geometric_kernel):
        assert kernel(0, 0, 0) == pytest.approx(0, abs=1e-12)
        assert kernel(40, 12, 70) == pytest.approx(kernel(12, 40, 70))
        assert kernel(40, 12, 70) == pytest.approx(kernel(40, 12, -70))


def test_kernels_at_nadir_under_a_sun_at_45_degrees() -> None:
    """Worked by hand from the definitions."""
    root = math.sqrt(0.5)
    volume = (math.pi / 4 * root + root) / (root + 1) - math.pi / 4
    assert volume_kernel(45, 0, 0) == pytest.approx(volume)
    secants = 1 + math.sqrt(2)
    t = math.acos(2 / secants)
    overlap = (t - math.sin(t) * math.cos(t)) * secants / math.pi
    assert geometric_kernel(45, 0, 0) == pytest.approx(
        overlap - secants + 0.5 * (1 + root) * math.sqrt(2)
    )


def test_the_hot_spot_is_where_the_sun_stands() -> None:
    at = {v: geometric_kernel(35, abs(v), 0 if v >= 0 else 180) for v in range(-60, 50, 5)}
    assert max(at, key=lambda v: at[v]) == 35
    for kernel in (volume_kernel, geometric_kernel):
        assert kernel(35, 20, 0) > kernel(35, 0, 0) > kernel(35, 20, 180)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("sun", [20, 35, 60])
def test_c_is_one_at_nadir_under_the_same_sun(role: str, sun: float) -> None:
    assert c_factor(role, sun, 0, 77) == 1
    assert c_factor(role, sun, 0, 77, target_sun_zenith_deg=sun) == 1


def test_backward_views_are_darkened_and_forward_views_brightened() -> None:
    for role in ROLES:
        backward, forward = c_factor(role, 40, 10, 0), c_factor(role, 40, 10, 180)
        assert 0.85 < backward < 1 < forward < 1.15


def test_c_is_cut_at_twenty_per_cent() -> None:
    every = [c_factor(r, s, v, a) for r in ROLES for s in (20, 50, 75) for v in (0, 30, 65)
             for a in (0, 90, 180)]  # fmt: skip
    assert min(every) >= 0.8 and max(every) <= 1.2
    assert max(every) == 1.2 or min(every) == 0.8, "the cut is never used"


def test_bands_without_weights_are_left_alone() -> None:
    assert c_factor("B09", 40, 10, 0) == 1


def test_unknown_angles_are_said_and_skipped() -> None:
    known, unknown = item(), item(view_zenith_deg=None, view_azimuth_deg=None)
    assert view_unknown(known) is None
    assert view_unknown(unknown) == "view azimuth, view zenith not in the item's record"
    assert view_unknown(item(view_zenith_deg=0.0, view_azimuth_deg=None)) is None
    off: dict[str, Any] = {"bandpass_to": "none", "brdf": "c-factor"}
    assert adjustment(unknown, "B04", **off) == (1, 0)
    assert adjustment(known, "B04", **off)[0] == pytest.approx(c_factor("B04", 45, 8, 50))
    assert adjustment(known, None, **off) == (1, 0)


def test_view_comes_before_band_pass() -> None:
    gain, offset = adjustment(item(), "B04", bandpass_to="landsat-8", brdf="c-factor")
    expected = 0.9765 * (0.2 * c_factor("B04", 45, 8, 50)) + 0.0009
    assert 0.2 * gain + offset == pytest.approx(expected)
