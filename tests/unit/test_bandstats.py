"""Statistics of bands: exact, and the same in whatever parts they are gathered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terraloom.bandstats import BandStats


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 255), ("uint16", 65535), ("float32", -9999.0), ("uint8", None)]
)
def test_statistics_are_those_of_numpy(dtype: str, nodata: float | None) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(3, 200, (40, 60)).astype(dtype)
    if nodata is not None:
        data[rng.random(data.shape) < 0.2] = nodata
    stats = BandStats(nodata)
    stats.add(data[:13])
    stats.add(data[13:])
    seen = data[data != nodata].astype(np.float64) if nodata is not None else data.astype(float)
    tags = {k.removeprefix("STATISTICS_"): float(v) for k, v in stats.tags().items()}
    assert tags["MINIMUM"] == seen.min() and tags["MAXIMUM"] == seen.max()
    assert tags["MEAN"] == pytest.approx(seen.mean(), rel=1e-9)
    assert tags["STDDEV"] == pytest.approx(seen.std(), rel=1e-9)
    assert tags["VALID_PERCENT"] == pytest.approx(100 * seen.size / data.size)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=60), st.integers(0, 59))
def test_parts_merge_to_the_whole(values: list[int], at: int) -> None:
    data = np.array(values, np.uint8)
    whole, left, right = BandStats(0), BandStats(0), BandStats(0)
    whole.add(data)
    left.add(data[:at])
    right.add(data[at:])
    joined = BandStats(0)
    joined.merge(left.record())
    joined.merge(right.record())
    assert joined.count == whole.count and joined.pixels == whole.pixels
    if whole.count:
        assert joined.mean == pytest.approx(whole.mean)
        assert joined.squares == pytest.approx(whole.squares, abs=1e-6)


def test_nothing_has_no_statistics() -> None:
    stats = BandStats(7)
    stats.add(np.full((3, 3), 7, np.uint8))
    assert stats.tags() == {} and stats.record()["mean"] is None
    nan = BandStats(-1.0)
    nan.add(np.array([np.nan, -1, 2], np.float32))
    assert nan.count == 1 and nan.mean == 2


def test_large_counts_lose_nothing() -> None:
    """Where a sum of squares in floating point would."""
    stats = BandStats()
    for _ in range(4):
        stats.add(np.full(1_000_000, 65_534, np.uint16))
    stats.add(np.array([65_535], np.uint16))
    n = 4_000_001
    assert stats.squares == pytest.approx(1 - 1 / n, rel=1e-12)
