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
