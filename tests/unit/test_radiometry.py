from __future__ import annotations

import numpy as np
import pytest

from terraloom.errors import SceneError
from terraloom.preprocess.radiometry import (
    DnStatistics,
    ScaleOffset,
    check_offset,
    dn_statistics,
)

PLAIN, SHIFTED = ScaleOffset(1e-4, 0.0), ScaleOffset(1e-4, -0.1)


def _land(seed: int = 0) -> dict[str, np.ndarray]:
    """DN without offset of a landscape with a lake (3 %), forest and fields, by band."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, 20_000, p=[0.03, 0.4, 0.57])
    table = {
        "B02": (450, 250, 700), "B04": (280, 280, 1100), "B08": (120, 2500, 2800),
        "B11": (60, 1100, 2600),
    }  # fmt: skip
    return {
        b: np.clip(np.array(v)[kind] + rng.normal(0, 40, kind.size), 1, None).round()
        for b, v in table.items()
    }


def _check(dn: dict[str, np.ndarray], pair: ScaleOffset) -> None:
    stats = {b: dn_statistics(v.astype(np.uint16)) for b, v in dn.items()}
    check_offset(stats, dict.fromkeys(stats, pair), "S2B_MSIL2A_20230101")


@pytest.mark.parametrize("seed", range(5))
def test_right_decoding_passes(seed):
    land = _land(seed)
    _check(land, PLAIN)
    _check({b: v + 1000 for b, v in land.items()}, SHIFTED)


@pytest.mark.parametrize("seed", range(5))
def test_offset_taken_off_twice_names_the_item(seed):
    with pytest.raises(SceneError, match=r"S2B_MSIL2A_20230101.*twice"):
        _check(_land(seed), SHIFTED)


@pytest.mark.parametrize("seed", range(5))
def test_offset_not_taken_off_names_the_item(seed):
    with pytest.raises(SceneError, match=r"S2B_MSIL2A_20230101.*not taken off"):
        _check({b: v + 1000 for b, v in _land(seed).items()}, PLAIN)


def test_slight_over_correction_is_not_an_error():
    land = {b: v + 1000 for b, v in _land().items()}
    land["B11"][:1500] = 1000 - 100  # 7 % of the pixels at reflectance -0.01: dark water in L2A
    _check(land, SHIFTED)


def test_overcast_scenes_and_visible_bands_alone_are_not_judged():
    rng = np.random.default_rng(1)
    cloud = {b: rng.normal(6000, 500, 5000) for b in ("B02", "B04", "B08", "B11")}
    _check(cloud, PLAIN)
    _check({b: v + 1000 for b, v in _land().items() if b in ("B02", "B04")}, PLAIN)


def test_statistics_leave_out_nodata_and_nan():
    stats = dn_statistics(np.array([0, 0, 10, 20, 30], dtype=np.uint16))
    assert (stats.count, stats.p50) == (3, 20.0)
    assert dn_statistics(np.array([0.0, np.nan, 4.0]), nodata=None).count == 2
    empty = dn_statistics(np.zeros((4, 4), dtype=np.uint16))
    assert empty.count == 0
    assert np.isnan(empty.p50)
    check_offset({"B02": empty}, {"B02": SHIFTED}, "x")  # nothing to judge


def test_few_pixels_are_not_judged():
    check_offset({"B08": DnStatistics(1, 1, 1, 50)}, {"B08": SHIFTED}, "x")


@pytest.mark.parametrize(("scale", "offset"), [(0, 0), (-1e-4, 0), (float("nan"), 0), (1, np.inf)])
def test_unusable_pairs_are_refused(scale, offset):
    with pytest.raises(SceneError, match="scale"):
        ScaleOffset(scale, offset)


# --- other sensors --------------------------------------------------------------------------------

LANDSAT = ScaleOffset(2.75e-5, -0.2)
#: Landsat's names of the bands of `_land`, by role.
ROLES = {"B02": "blue", "B04": "red", "B08": "nir08", "B11": "swir16"}


def _landsat(seed: int = 0) -> dict[str, np.ndarray]:
    """Digital numbers of Collection 2 surface reflectance of the same landscape."""
    return {ROLES[b]: ((v * 1e-4 + 0.2) / 2.75e-5).round() for b, v in _land(seed).items()}


def _check_landsat(dn: dict[str, np.ndarray], pair: ScaleOffset) -> None:
    stats = {b: dn_statistics(v.astype(np.uint16)) for b, v in dn.items()}
    check_offset(stats, dict.fromkeys(stats, pair), "LC08_L2SP_X", roles=ROLES, usual=LANDSAT)


@pytest.mark.parametrize("seed", range(3))
def test_landsat_right_twice_and_not_at_all(seed):
    dn = _landsat(seed)
    _check_landsat(dn, LANDSAT)
    with pytest.raises(SceneError, match=r"LC08_L2SP_X.*twice"):
        _check_landsat(dn, ScaleOffset(2.75e-5, -0.4))
    with pytest.raises(SceneError, match=r"LC08_L2SP_X.*not taken off") as error:
        _check_landsat(dn, ScaleOffset(2.75e-5, 0.0))
    assert "-0.2" in error.value.fix


def test_landsat_water_may_be_a_little_below_zero():
    dn = _landsat()
    dn["swir16"][:1400] = round((-0.03 + 0.2) / 2.75e-5)  # 7 % of the pixels
    _check_landsat(dn, LANDSAT)


def test_a_source_without_offset_is_not_told_to_have_one():
    """HLS over a bright desert: nothing was left in, since there is nothing to take off."""
    rng = np.random.default_rng(3)
    bright = {b: rng.normal(2500, 200, 5000) for b in ("B02", "B04", "B08", "B11")}
    stats = {b: dn_statistics(v) for b, v in bright.items()}
    decoding = dict.fromkeys(stats, PLAIN)
    check_offset(stats, decoding, "HLS.S30.X", usual=PLAIN)
    with pytest.raises(SceneError, match="not taken off"):
        check_offset(stats, decoding, "S2B_X")
    check_offset(stats, decoding, "S2B_X", dark_floor=0.3)


@pytest.mark.parametrize("scale", [1.0, 0.01, 1e-8])
def test_a_scale_that_makes_no_reflectance(scale):
    with pytest.raises(SceneError, match="scale") as error:
        _check(_land(), ScaleOffset(scale, 0.0))
    assert "0.0001" in error.value.allowed


def test_undeclared_nodata_is_not_taken_for_an_offset():
    land = {b: v + 1000 for b, v in _land().items()}
    for v in land.values():
        v[:2000] = 0
    stats = {b: dn_statistics(v, nodata=None) for b, v in land.items()}
    with pytest.raises(SceneError, match="stored value 0") as error:
        check_offset(stats, dict.fromkeys(stats, SHIFTED), "S2B_X")
    assert "nodata" in error.value.fix
