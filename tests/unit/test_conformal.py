"""Conformal sets and intervals: the law of their coverage, units, blocks, classes, records."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from terraloom.errors import ModelError
from terraloom.uncertainty.conformal import (
    ClassSets,
    Interval,
    block_quantile,
    class_scores,
    fit_interval,
    fit_sets,
    unit_quantile,
)


@pytest.mark.parametrize(
    ("n", "a", "mean", "sd", "low", "high"),
    [
        (100, 0.1, 0.90099, 0.02957, 0.8482, 0.9447),
        (1000, 0.1, 0.90010, 0.00947, 0.8841, 0.9152),
        (500, 0.05, 0.95010, 0.00972, 0.9332, 0.9650),
        (50, 0.1, 0.90196, 0.04124, 0.8262, 0.9598),
    ],
)
def test_law_of_coverage(n: int, a: float, mean: float, sd: float, low: float, high: float) -> None:
    """Coverage given the calibration is Beta(n + 1 - l, l) with l = floor((n + 1) a)."""
    rng = np.random.default_rng(n)
    unit = np.arange(n)
    # For uniform scores the coverage of a threshold is the threshold.
    found = [unit_quantile(rng.random(n), unit, 1 - a) for _ in range(1500)]
    ell = int(np.floor((n + 1) * a))
    law = stats.beta(n + 1 - ell, ell)
    assert (round(law.mean(), 5), round(law.std(), 5)) == (mean, sd)
    assert np.mean(found) == pytest.approx(mean, abs=4 * sd / np.sqrt(1500))
    assert np.std(found) == pytest.approx(sd, rel=0.08)
    assert np.percentile(found, (5, 95)) == pytest.approx((low, high), abs=0.2 * sd)
    assert stats.kstest(found, law.cdf).pvalue > 1e-3


def test_interpolated_quantile_would_cover_too_little() -> None:
    rng = np.random.default_rng(3)
    draws = rng.random((20_000, 20))
    assert np.quantile(draws, 0.9, axis=1).mean() == pytest.approx(0.863, abs=2e-3)
    right = np.mean([unit_quantile(d, np.arange(20), 0.9) for d in draws[:2000]])
    assert right == pytest.approx(0.904, abs=4e-3)


@given(st.integers(1, 120), st.sampled_from([0.5, 0.8, 0.9, 0.95]), st.integers(0, 99))
def test_rule_of_crepes(n: int, coverage: float, seed: int) -> None:
    """crepes takes the floor((1 - c)(n + 1))-th largest score, and everything where that is 0."""
    score = np.random.default_rng(seed).permutation(n).astype(float)
    rank = int((1 - coverage) * (n + 1) + 1e-9)
    expected = np.sort(score)[::-1][rank - 1] if rank else np.inf
    assert unit_quantile(score, np.arange(n), coverage) == expected
    if np.isfinite(expected):  # and the same by p-values: (#{s_i >= s} + 1) / (n + 1) > 1 - c
        p = lambda s: ((score >= s).sum() + 1) / (n + 1)  # noqa: E731
        assert p(expected) >= 1 - coverage - 1e-9 and p(expected + 1) < 1 - coverage + 1e-9


def test_repeated_pixels_do_not_count_as_more_units() -> None:
    rng = np.random.default_rng(5)
    score = rng.random(40)
    one = unit_quantile(score, np.arange(40), 0.9)
    many = np.repeat(np.arange(40), rng.integers(1, 200, 40))
    assert unit_quantile(score[many], many, 0.9) == one
    assert unit_quantile(score[:8][many % 8], many % 8, 0.9) == np.inf  # 8 units < 9


def test_coverage_of_a_pixel_of_a_new_unit() -> None:
    """Units of different size and level: pooled pixels cover too little, units do not."""
    rng = np.random.default_rng(8)

    def draw(n: int) -> tuple[Any, Any]:
        level = rng.gamma(1.0, 1.0, n)
        size = np.where(level < 0.5, 60, 3)  # easy fields are large
        unit = np.repeat(np.arange(n), size)
        return level[unit] + rng.normal(0, 0.1, len(unit)), unit

    covered, pooled = [], []
    for _ in range(400):
        score, unit = draw(30)
        q = unit_quantile(score, unit, 0.9)
        p = unit_quantile(score, np.arange(len(score)), 0.9)
        new, of = draw(200)
        first = np.unique(of, return_index=True)[1]
        covered.append((new[first] <= q).mean())
        pooled.append((new[first] <= p).mean())
    assert 0.89 < np.mean(covered) < 0.94
    assert np.mean(pooled) < 0.75


def test_block_quantile_holds_block_by_block() -> None:
    rng = np.random.default_rng(9)
    held, plain = [], []
    for _ in range(150):
        level = rng.normal(0, 1, 60)
        block = np.repeat(np.arange(60), 30)
        score = level[block] + rng.normal(0, 1, block.size)
        old = block < 29
        pixel = np.arange(block.size)
        q = block_quantile(score[old], pixel[old], block[old], 0.9, 0.9)
        s = unit_quantile(score[old], block[old], 0.9)
        new = score[~old].reshape(-1, 30)
        held.append(((new <= q).mean(axis=1) >= 0.9).mean())
        plain.append(((new <= s).mean(axis=1) >= 0.9).mean())
    assert 0.89 < np.mean(held) < 0.93  # ceil(30 x .9) = 27 of 29: .9 in the mean
    assert np.mean(plain) < 0.85


def test_block_quantile_of_few_blocks_is_the_worst_block() -> None:
    score = np.array([0.1, 0.2, 0.9, 0.3])
    assert block_quantile(score, np.arange(4), np.arange(4), 0.9, 0.9) == 0.9
    assert block_quantile(score, np.arange(4), np.arange(4), 0.9, 0.5) == 0.3  # ceil(2.5) = 3rd
    assert block_quantile(score[:0], np.arange(0), np.arange(0), 0.9, 0.9) == np.inf


def _sample(n: int, seed: int) -> tuple[Any, Any]:
    """Three classes, the third rare and hard to tell."""
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=(0.6, 0.35, 0.05))
    z = rng.normal(0, 1, (n, 3))
    z[np.arange(n), y] += np.array([3.0, 2.0, 0.5])[y]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return p, y


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_per_class_cover_each_class(score: Any) -> None:
    p, y = _sample(4000, 1)
    q, z = _sample(20_000, 2)
    at = np.arange(len(y))
    common = fit_sets(p, y, at, at, method="split", coverage=0.9, score=score)
    each = fit_sets(p, y, at, at, method="class", coverage=0.9, score=score)
    hit = lambda s: s.contains(q.T)[z, np.arange(len(z))]  # noqa: E731
    assert hit(common).mean() > 0.89  # the sums of APS are cautious: no class is in by chance
    assert min(hit(each)[z == k].mean() for k in range(3)) > 0.86
    if score == "lac":
        assert hit(common)[z == 2].mean() < 0.7
        assert hit(common).mean() == pytest.approx(0.9, abs=0.02)


def test_class_with_too_few_units_is_never_left_out() -> None:
    p, y = _sample(300, 4)
    some = (y != 2) | (np.cumsum(y == 2) <= 8)
    p, y = p[some], y[some]
    at = np.arange(len(y))
    sets = fit_sets(p, y, at, at, method="class", coverage=0.9)
    assert np.isfinite(sets.thresholds[:2]).all() and sets.thresholds[2] == np.inf
    assert sets.contains(p.T)[2].all()
    assert json.loads(json.dumps(sets.record()))["thresholds"][2] is None
    assert ClassSets.from_record(sets.record()) == sets


def test_set_is_never_empty_and_knows_no_invalid_pixel() -> None:
    sets = ClassSets("lac", (0.01, 0.01))
    p = np.array([[0.6, 0.5, np.nan, 0.995], [0.4, 0.5, np.nan, 0.005]], np.float32)
    assert sets.contains(p).tolist() == [[True, True, False, True], [False] * 4]
    with pytest.raises(ModelError, match="3 classes"):
        sets.contains(np.ones((3, 2)))


def test_aps_by_hand() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
    assert class_scores(p, np.array([0, 1, 1]), "aps") == pytest.approx([0.5, 0.8, 0.8])
    assert ClassSets("aps", (0.85,) * 3).contains(p.T).T.tolist() == [
        [True, True, False], [True, True, False], [True, True, False],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["normalised", "quantile"])
def test_intervals_cover_and_follow_the_spread(kind: Any) -> None:
    rng = np.random.default_rng(11)

    def draw(blocks: int) -> tuple[Any, ...]:
        block = np.repeat(np.arange(blocks), 10)
        mean, sd = rng.uniform(0, 30, block.size), rng.uniform(0.5, 4, block.size)
        y = mean + sd * rng.standard_t(4, block.size)  # heavier tails than the head says
        low, high = (mean, sd) if kind == "normalised" else (mean - 1.64 * sd, mean + 1.64 * sd)
        return y, low, high, block

    found, wide = [], []
    for _ in range(100):
        y, low, high, block = draw(60)
        how = fit_interval(y, low, high, block, kind=kind, method="split", coverage=0.9)
        assert Interval.from_record(how.record()) == how
        y, low, high, _ = draw(200)
        bounds = how.bounds(low, high)
        found.append(((y >= bounds[0]) & (y <= bounds[1])).mean())
        wide.append(np.corrcoef(bounds[1] - bounds[0], high if kind == "normalised" else
                                high - low)[0, 1])  # fmt: skip
    # (n + 1) / n of the wanted share of n units: 0.915 of 60 blocks.
    assert np.mean(found) == pytest.approx(0.915, abs=0.01)
    assert min(wide) > 0.99


def test_interval_by_blocks_is_wider_and_a_narrowed_band_never_turns_over() -> None:
    rng = np.random.default_rng(12)
    block = np.repeat(np.arange(40), 20)
    mean, sd = np.zeros(block.size), np.ones(block.size)
    y = rng.normal(0, 1, 40)[block] + rng.normal(0, 1, block.size)
    by = {m: fit_interval(y, mean, sd, block, kind="normalised", method=m, coverage=0.9).factor
          for m in ("split", "block")}  # fmt: skip
    assert by["block"] > by["split"] > 1.6
    assert Interval("quantile", -3.0).bounds(np.array([1.0]), np.array([3.0])).T.tolist() == [
        [2.0, 2.0]
    ]
    few = fit_interval(y[:60], mean[:60], sd[:60], block[:60], kind="normalised", method="split",
                       coverage=0.9)  # fmt: skip
    assert few.factor == np.inf and few.record()["factor"] is None
    with pytest.raises(ModelError, match="not above 0"):
        fit_interval(y, mean, mean, block, kind="normalised", method="split", coverage=0.9)
