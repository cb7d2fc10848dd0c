"""Designs beyond strata of map classes, against samplics and by simulation; Wilson intervals."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest
from scipy import stats

from terraloom.assess.estimators import AccuracyReport, estimate_accuracy
from terraloom.assess.intervals import Estimate, Interval
from terraloom.assess.matrix import disagreement, olofsson
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.assess.survey import merge_post_strata
from terraloom.errors import DesignError

# 15 clusters of 4 units with unequal chances. Expected values were computed once with samplics
# 0.6.1 (MIT): TaylorEstimator, weight = area / chance, psu = cluster or unit.
MAP = "111221221212211212222111112122221211211121112111222112221122"
REF = "211221211222211212122111112222221221221121112111222112111111"
CHANCE = [
    0.064, 0.041, 0.07, 0.059, 0.017, 0.078, 0.063, 0.065, 0.019, 0.042, 0.036, 0.075, 0.055,
    0.068, 0.041,
]  # fmt: skip
AREA = [
    102.2, 99.5, 97.7, 96.0, 104.0, 99.6, 97.0, 98.1, 100.8, 96.8, 103.6, 102.6, 102.2, 99.3,
    101.3, 100.8, 101.5, 95.8, 99.2, 95.4, 99.9, 98.3, 96.4, 96.0, 100.9, 96.7, 104.3, 100.8,
    98.5, 100.9, 95.2, 104.6, 99.8, 102.8, 95.8, 99.9, 99.9, 104.4, 100.7, 99.7, 97.7, 98.3,
    100.2, 99.4, 95.2, 103.3, 104.0, 96.4, 100.5, 96.1, 101.7, 97.8, 101.6, 102.3, 102.7, 96.1,
    104.2, 97.3, 95.4, 100.5,
]  # fmt: skip
VALUES = [0.797345999256479, 0.5395653733938938, 0.8285434980623899, 0.7873431277091227]
SE_CLUSTER = [0.03830480352905081, 0.05231205397221174, 0.055807867898509056, 0.08333105268787187]
SE_UNIT = [0.062357545173274784, 0.07486389825446312, 0.07999334888282136, 0.08761418279397779]
DOMAIN = Strata.from_pixels({0: 100_000}, 100.0)


def _weighted(kind: SampleKind, cluster: np.ndarray | None) -> ReferenceSample:
    return ReferenceSample(
        np.zeros(60), np.array(list(MAP), dtype=int), np.array(list(REF), dtype=int), kind,
        np.array(AREA), cluster, np.repeat(CHANCE, 4),
    )  # fmt: skip


def _four(report: AccuracyReport) -> list[Estimate]:
    return [report.overall, report.area_share[1], report.users[1], report.producers[1]]


@pytest.mark.parametrize(
    ("kind", "cluster", "se"),
    [
        (SampleKind.CLUSTER, np.repeat(np.arange(15), 4), SE_CLUSTER),
        (SampleKind.UNEQUAL, None, SE_UNIT),
    ],
)
def test_clusters_and_unequal_chances_agree_with_samplics(
    kind: SampleKind, cluster: np.ndarray | None, se: list[float]
) -> None:
    report = estimate_accuracy(_weighted(kind, cluster), DOMAIN, classes=[1, 2])
    found = _four(report)
    assert [e.value for e in found] == pytest.approx(VALUES, rel=1e-12)
    assert [e.se for e in found] == pytest.approx(se, rel=1e-9)
    # Student's t with clusters less strata degrees of freedom.
    m = 15 if cluster is not None else 60
    assert found[0].half_width == pytest.approx(stats.t.ppf(0.975, m - 1) * se[0])
    assert any(f"{m} primary units" in note for note in report.notes)


def test_equal_chances_without_clusters_are_a_simple_random_sample() -> None:
    rng = np.random.default_rng(3)
    mapped = rng.integers(1, 4, 200)
    ref = np.where(rng.random(200) < 0.8, mapped, 1)
    zero = np.zeros(200)
    plain = ReferenceSample(zero, mapped, ref, SampleKind.SIMPLE_RANDOM)
    flat = ReferenceSample(
        zero, mapped, ref, SampleKind.UNEQUAL, inclusion_prob=np.full(200, 0.002)
    )
    a = estimate_accuracy(plain, DOMAIN, classes=[1, 2, 3], fpc=False)
    b = estimate_accuracy(flat, DOMAIN, classes=[1, 2, 3])
    for x, y in zip(_four(a), _four(b), strict=True):
        assert (x.value, x.se) == pytest.approx((y.value, y.se), rel=1e-12)
    assert a.matrix_se == pytest.approx(b.matrix_se)


def test_post_strata_take_out_what_the_map_already_knows() -> None:
    rng = np.random.default_rng(4)
    mapped = rng.choice([1, 2, 3], 600, p=[0.7, 0.25, 0.05])
    ref = np.where(rng.random(600) < 0.9, mapped, 1)
    sample = ReferenceSample(np.zeros(600), mapped, ref, SampleKind.SYSTEMATIC)
    sizes = Strata.from_pixels({1: 70_000, 2: 25_000, 3: 5_000}, 100.0)
    plain = estimate_accuracy(sample, DOMAIN, classes=[1, 2, 3])
    post = estimate_accuracy(sample, DOMAIN, classes=[1, 2, 3], post_strata=sizes)
    assert post.area_share[2].se < 0.6 * plain.area_share[2].se
    assert post.mapped_ha[2].value == pytest.approx(250) and post.mapped_ha[2].se == 0
    assert plain.mapped_ha[2].se > 0
    # Given the counts it is the stratified estimator, whose closed form is independent.
    closed = olofsson(post.counts, [70_000, 25_000, 5_000])
    free = estimate_accuracy(sample, DOMAIN, classes=[1, 2, 3], post_strata=sizes, fpc=False)
    assert [e.value for e in free.area_share.values()] == pytest.approx(closed.share.tolist())
    assert [e.se for e in free.producers.values()] == pytest.approx(closed.pa_se.tolist())
    assert "post-stratified" in post.method and any("systematic" in n for n in post.notes)


def test_post_strata_with_few_units_are_merged_and_said() -> None:
    mapped = np.array([1] * 60 + [2] * 30 + [3] * 4 + [4] * 1)
    sizes = Strata.from_pixels({1: 600, 2: 300, 3: 50, 4: 20, 5: 10, 6: 0}, 1.0)
    of_unit, merged, small = merge_post_strata(mapped, sizes)
    # 3, 4 and 5 have 5 units together: the next smallest class joins them. 6 has no area.
    assert small == (2, 3, 4, 5)
    assert dict(zip(merged.codes, merged.n_pixels, strict=True)) == {1: 600, 2: 380, 6: 0}
    assert np.bincount(of_unit).tolist() == [0, 60, 35]
    sample = ReferenceSample(np.zeros(95), mapped, mapped, SampleKind.SIMPLE_RANDOM)
    whole = Strata.from_pixels({0: 980}, 1.0)
    report = estimate_accuracy(sample, whole, classes=range(1, 7), post_strata=sizes)
    assert any("2, 3, 4, 5 are one post-stratum" in n for n in report.notes)
    assert sum(e.value for e in report.area_share.values()) == pytest.approx(1)
    assert merge_post_strata(mapped[:90], Strata.from_pixels({1: 6, 2: 3}, 1.0))[2] == ()


def test_calibrated_clusters_are_surer_and_keep_the_known_areas() -> None:
    rng = np.random.default_rng(5)
    cluster = np.repeat(np.arange(40), 10)
    local = rng.beta(2, 2, 40)[cluster]
    mapped = np.where(rng.random(400) < local, 1, 2)
    ref = np.where(rng.random(400) < 0.92, mapped, 3 - mapped)
    sample = ReferenceSample(
        np.zeros(400), mapped, ref, SampleKind.CLUSTER, None, cluster, np.full(400, 0.004)
    )
    sizes = Strata.from_pixels({1: 50_000, 2: 50_000}, 100.0)
    plain = estimate_accuracy(sample, DOMAIN, classes=[1, 2])
    known = estimate_accuracy(sample, DOMAIN, classes=[1, 2], post_strata=sizes)
    assert known.area_share[1].se < 0.5 * plain.area_share[1].se
    assert known.matrix.sum(axis=1) == pytest.approx([0.5, 0.5])


def test_samples_that_lack_what_their_kind_needs_are_refused() -> None:
    one = np.ones(4)
    with pytest.raises(DesignError, match="without cluster"):
        ReferenceSample(one, one, one, SampleKind.CLUSTER)
    with pytest.raises(DesignError, match="without inclusion_prob"):
        ReferenceSample(one, one, one, SampleKind.UNEQUAL)
    with pytest.raises(DesignError, match="out of range"):
        ReferenceSample(one, one, one, SampleKind.UNEQUAL, inclusion_prob=np.zeros(4))
    chance = np.full(4, 0.1)
    crossed = ReferenceSample(
        np.array([1, 1, 2, 2]), one, one, SampleKind.CLUSTER, None, np.array([1, 2, 2, 3]),
        chance,
    )  # fmt: skip
    with pytest.raises(DesignError, match="a cluster in two strata"):
        estimate_accuracy(crossed, Strata.from_pixels({1: 50, 2: 50}, 1.0), classes=[1])
    single = ReferenceSample(one, one, one, SampleKind.CLUSTER, None, one, chance)
    with pytest.raises(DesignError, match="1 cluster"):
        estimate_accuracy(single, Strata.from_pixels({1: 50}, 1.0), classes=[1])
    drawn = ReferenceSample(one, one, one, SampleKind.STRATIFIED_RANDOM)
    sizes = Strata.from_pixels({1: 50}, 1.0)
    with pytest.raises(DesignError, match="post-strata of a stratified sample"):
        estimate_accuracy(drawn, sizes, classes=[1], post_strata=sizes)


# --- intervals -----------------------------------------------------------------------------------


def _simple(ref: list[int], interval: Interval = Interval.WILSON) -> AccuracyReport:
    n = len(ref)
    sample = ReferenceSample(np.zeros(n), np.ones(n), np.array(ref), SampleKind.SIMPLE_RANDOM)
    return estimate_accuracy(sample, DOMAIN, classes=[1, 2], fpc=False, interval=interval)


def test_one_stratum_has_the_wilson_interval() -> None:
    report = _simple([1] * 81 + [2] * 182)
    # Newcombe (1998), table I: 81 of 263, score method without continuity correction.
    assert report.area_share[1].lower == pytest.approx(0.2553, abs=5e-5)
    assert report.area_share[1].upper == pytest.approx(0.3662, abs=5e-5)
    assert report.users[1].lower == pytest.approx(report.area_share[1].lower)
    assert report.users[1].upper == pytest.approx(report.area_share[1].upper)
    none = _simple([1] * 20 + [2] * 0)
    assert none.area_share[2].upper == pytest.approx(0.1611, abs=5e-5)  # 0 of 20, same table
    assert none.area_share[2].lower == 0 and none.area_share[1].upper == 1
    normal = _simple([1] * 20, Interval.NORMAL)
    assert normal.area_share[2].upper == 0, "what the Wilson interval is there to avoid"


def test_users_accuracy_of_a_stratum_is_its_wilson_interval() -> None:
    sample = ReferenceSample.from_matrix(
        [[15, 0, 0], [2, 26, 1], [0, 0, 40]], [1, 2, 3], SampleKind.STRATIFIED_RANDOM
    )
    strata = Strata.from_pixels({1: 1000, 2: 5000, 3: 90_000}, 100.0)
    report = estimate_accuracy(sample, strata, classes=[1, 2, 3], fpc=False)
    # Other strata have no say, since they hold no unit that is mapped as the class.
    for code, hits, n in ((1, 15, 15), (2, 26, 29), (3, 40, 40)):
        low, high = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert report.users[code].lower == pytest.approx(low)
        assert report.users[code].upper == pytest.approx(high)
    assert report.mapped_ha[1].lower == report.mapped_ha[1].upper == pytest.approx(10)
    assert any("rests on few units for class" in n for n in report.notes)


def test_undefined_ratios_stay_undefined() -> None:
    report = _simple([1] * 10)
    assert isnan(report.users[2].value) and isnan(report.users[2].upper)
    assert isnan(report.producers[2].lower) and isnan(report.f1[2].se)


def test_many_units_make_both_intervals_one() -> None:
    rng = np.random.default_rng(8)
    mapped = rng.integers(1, 4, 60_000)
    ref = np.where(rng.random(60_000) < 0.8, mapped, rng.integers(1, 4, 60_000))
    sample = ReferenceSample(mapped, mapped, ref, SampleKind.STRATIFIED_RANDOM)
    strata = Strata.from_pixels({1: 10**7, 2: 2 * 10**7, 3: 10**6}, 100.0)
    a, b = (estimate_accuracy(sample, strata, classes=[1, 2, 3], interval=i) for i in Interval)
    for name in ("users", "producers", "f1", "area_share"):
        for code in (1, 2, 3):
            x, y = getattr(a, name)[code], getattr(b, name)[code]
            assert x.lower == pytest.approx(y.lower, abs=0.05 * y.half_width + 1e-12), name
            assert x.upper == pytest.approx(y.upper, abs=0.05 * y.half_width + 1e-12), name


@pytest.mark.slow
def test_intervals_cover_where_small_strata_break_the_normal_ones() -> None:
    """Olofsson's table 8 as the truth, 500 units: 2000 draws for each kind of interval."""
    truth = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]], float)
    share = np.array([0.02, 0.015, 0.32, 0.645])
    cells = truth / truth.sum(axis=1, keepdims=True)
    p = share[:, None] * cells
    true = [p.trace(), *p.sum(axis=0), *np.diag(cells), *(np.diag(p) / p.sum(axis=0))]
    n = np.array([75, 75, 118, 232])
    stratum = np.repeat(np.arange(4), n)
    strata = Strata.from_pixels({h: int(s * 10**7) for h, s in enumerate(share)}, 100.0)
    rng, runs = np.random.default_rng(11), 2000
    inside = {i: np.zeros(13) for i in Interval}
    for _ in range(runs):
        ref = np.concatenate([rng.choice(4, m, p=c) for m, c in zip(n, cells, strict=True)])
        sample = ReferenceSample(stratum, stratum, ref, SampleKind.STRATIFIED_RANDOM)
        for how in Interval:
            r = estimate_accuracy(sample, strata, classes=range(4), interval=how)
            found = [r.overall, *(e for t in (r.area_share, r.users, r.producers)
                                  for e in t.values())]  # fmt: skip
            inside[how] += [e.contains(t) for e, t in zip(found, true, strict=True)]
    wilson, normal = inside[Interval.WILSON] / runs, inside[Interval.NORMAL] / runs
    assert ((wilson > 0.925) & (wilson < 0.98)).all(), wilson
    assert normal.min() < 0.75, normal


def test_disagreement_needs_no_kappa() -> None:
    parts = disagreement(np.array([[0.5, 0.1], [0.1, 0.3]]))
    assert parts.to_dict() == pytest.approx(
        {"quantity": 0, "allocation": 0.2, "exchange": 0.2, "shift": 0}
    )
