"""Gap filling: between observations, near them, marked, and nothing observed is changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from terraloom.errors import CoverageError
from terraloom.preprocess.fill import fill_linear, fill_whittaker, whittaker

FILLERS = [fill_linear, fill_whittaker]
DAYS = np.array([0, 5, 17, 20, 41, 60, 62, 90, 120, 200], float)


def gappy(t: int = 10, n: int = 300, missing: float = 0.4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 0.5, (t, 3, n // 3)).astype(np.float32)
    values[rng.random(values.shape) < missing] = np.nan
    return values


@pytest.mark.parametrize("fill", FILLERS)
@given(limit=st.floats(1, 250), missing=st.floats(0.05, 0.95), seed=st.integers(0, 50))
def test_filled_exactly_where_both_sides_are_near(
    fill: Callable[..., tuple[np.ndarray, np.ndarray]], limit: float, missing: float, seed: int
) -> None:
    values = gappy(missing=missing, seed=seed, n=30)
    done, marks = fill(values, DAYS, limit)
    known = np.isfinite(values)
    for t, day in enumerate(DAYS):
        before = known[(day > DAYS) & (day - limit <= DAYS)].any(axis=0)
        after = known[(day < DAYS) & (day + limit >= DAYS)].any(axis=0)
        assert np.array_equal(marks[t], ~known[t] & before & after)
    assert np.array_equal(done[known], values[known]), "observed values are never changed"
    assert np.array_equal(np.isfinite(done), known | marks)


@pytest.mark.parametrize("fill", FILLERS)
def test_nothing_before_the_first_or_after_the_last(
    fill: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> None:
    values = np.full((10, 1), np.nan, np.float32)
    values[[2, 6]] = 0.2
    done, marks = fill(values, DAYS, 1e6)
    assert np.isnan(done[[0, 1, 7, 8, 9]]).all()
    assert marks[:, 0].tolist() == [False] * 3 + [True] * 3 + [False] * 4
    assert done[2:7, 0] == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("fill", FILLERS)
def test_a_straight_line_is_restored(
    fill: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> None:
    line = (0.1 + 0.001 * DAYS)[:, None] * np.ones((1, 50))
    values = line.astype(np.float32)
    values[np.random.default_rng(0).random(values.shape) < 0.5] = np.nan
    done, marks = fill(values, DAYS, 1e6)
    assert marks.any()
    assert done[marks] == pytest.approx(line[marks], abs=1e-5)


def test_whittaker_is_the_minimum_of_its_definition() -> None:
    """Against the normal equations written out, on irregular dates with missing values."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=(10, 4))
    y[rng.random(y.shape) < 0.3] = np.nan
    second = np.zeros((8, 10))
    for i in range(8):
        h1, h2 = DAYS[i + 1] - DAYS[i], DAYS[i + 2] - DAYS[i + 1]
        second[i, i : i + 3] = 2 / (h1 * (h1 + h2)), -2 / (h1 * h2), 2 / (h2 * (h1 + h2))
    step = (DAYS[2:] - DAYS[:-2]) / 2
    rough = 10.0**3 * second.T @ np.diag(step) @ second
    for n in range(4):
        w = np.isfinite(y[:, n]).astype(float)
        expected = np.linalg.solve(np.diag(w) + rough, w * np.nan_to_num(y[:, n]))
        assert whittaker(y, DAYS, 10.0)[:, n] == pytest.approx(expected, abs=1e-8)


def test_whittaker_follows_a_season_better_than_a_line() -> None:
    days = np.arange(0, 360, 10.0)
    truth = np.sin(2 * np.pi * days / 360)[:, None] * np.ones((1, 40))
    rng = np.random.default_rng(2)
    values = (truth + rng.normal(0, 0.05, truth.shape)).astype(np.float32)
    values[8:12] = np.nan  # the summer, where the curve bends
    line, marks = fill_linear(values, days, 60)
    smooth, _ = fill_whittaker(values, days, 60)
    err = [float(np.sqrt(np.mean((v - truth)[marks] ** 2))) for v in (line, smooth)]
    assert err[1] < 0.75 * err[0]


def test_one_observation_is_no_series() -> None:
    values = np.full((4, 2), np.nan)
    values[1] = 0.3
    assert np.isnan(whittaker(values, np.arange(4.0), 16)).all()


@pytest.mark.parametrize("days", [[0, 5, 5], [3, 2, 1], [0, 1]])
def test_days_must_rise(days: list[float]) -> None:
    with pytest.raises(CoverageError, match="rising order"):
        fill_linear(np.zeros((3, 2), np.float32), np.array(days), 10)
