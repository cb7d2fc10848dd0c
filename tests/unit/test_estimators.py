"""Published worked examples, edge cases and simulated designs for `assess.estimators`."""

from __future__ import annotations

import json
from math import isnan

import numpy as np
import pytest

from terraloom.assess.estimators import AccuracyReport, estimate_accuracy
from terraloom.assess.intervals import Estimate
from terraloom.assess.matrix import disagreement, olofsson
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.errors import DesignError

# Olofsson et al. (2014), table 8: deforestation, forest gain, stable forest, stable non-forest.
E1_MATRIX = [[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]]
E1_PIXELS = [200_000, 150_000, 3_200_000, 6_450_000]
E1_AREA_HA = [21157.762, 11686.154, 285769.930, 581386.154]
E1_HALF_HA = [6157.521, 3755.757, 15509.551, 16281.357]

# Stehman (2014), 40 points; A B C D coded 1 2 3 4.
E3_STRATA = "AAAAAAAAAA BBBBBBBBBB CCCCCCCCCC DDDDDDDDDD"
E3_MAP = "AAAAAAABBB ABBBBBBBBB BBCCCCCCBB DDDDDDDDDD"
E3_REF = "AAAAACBABC ABBBBBAABB CCCCCDDBBA DDDDDDDCCB"


def _codes(text: str) -> np.ndarray:
    return np.array(["ABCD".index(c) + 1 for c in text.replace(" ", "")])


def _e1(fpc: bool = False, level: float = 0.95) -> AccuracyReport:
    classes = [1, 2, 3, 4]
    sample = ReferenceSample.from_matrix(E1_MATRIX, classes, SampleKind.STRATIFIED_RANDOM)
    strata = Strata.from_pixels(dict(zip(classes, E1_PIXELS, strict=True)), 900.0)
    return estimate_accuracy(sample, strata, classes=classes, fpc=fpc, level=level)


def _e3() -> AccuracyReport:
    sample = ReferenceSample(
        _codes(E3_STRATA), _codes(E3_MAP), _codes(E3_REF), SampleKind.STRATIFIED_RANDOM
    )
    strata = Strata.from_pixels({1: 40_000, 2: 30_000, 3: 20_000, 4: 10_000}, 900.0)
    return estimate_accuracy(sample, strata, classes=[1, 2, 3, 4])


def _values(table: dict[int, Estimate], name: str = "value") -> list[float]:
    return [getattr(est, name) for est in table.values()]


def test_e1_olofsson_2014_table_8() -> None:
    report = _e1()
    assert report.overall.value == pytest.approx(0.9465119, abs=5e-8)
    assert report.overall.half_width == pytest.approx(0.0184833, abs=5e-8)
    ua, pa = report.users, report.producers
    assert _values(ua) == pytest.approx([0.88, 0.7333333, 0.9272727, 0.9630769], abs=5e-8)
    assert _values(ua, "half_width") == pytest.approx(
        [0.0740396, 0.1007552, 0.0397446, 0.0205331], abs=5e-8
    )
    assert _values(pa) == pytest.approx([0.7486614, 0.8471564, 0.9345089, 0.9616090], abs=5e-8)
    assert _values(pa, "half_width") == pytest.approx(
        [0.2133059, 0.2544037, 0.0343238, 0.0183612], abs=5e-8
    )
    assert _values(report.area_ha) == pytest.approx(E1_AREA_HA, abs=5e-4)
    # .1 ha tells z = 1.959964 from 1.96 and from a finite population correction.
    assert _values(report.area_ha, "half_width") == pytest.approx(E1_HALF_HA, abs=1e-3)
    assert _values(report.mapped_ha) == pytest.approx([18000, 13500, 288000, 580500])
    assert _values(report.mapped_ha, "se") == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert report.counts.tolist() == E1_MATRIX
    assert report.matrix.sum() == pytest.approx(1.0)


def test_e1_disagreement() -> None:
    parts = disagreement(_e1().matrix)
    assert parts.quantity == pytest.approx(0.0044932, abs=1e-7)
    assert parts.allocation == pytest.approx(0.0489949, abs=1e-7)
    assert parts.exchange == pytest.approx(0.0444923, abs=1e-7)
    assert parts.shift == pytest.approx(0.0045026, abs=1e-7)


def test_e1_fpc_and_level_change_the_interval_only() -> None:
    plain, corrected = _e1(), _e1(fpc=True)
    wide = _e1(level=0.99)
    assert _values(corrected.area_ha) == _values(plain.area_ha)
    for a, b in zip(_values(corrected.users, "se"), _values(plain.users, "se"), strict=True):
        assert a < b
    ratio = wide.overall.half_width / plain.overall.half_width
    assert ratio == pytest.approx(2.575829 / 1.959964, abs=1e-6)


def test_e3_stehman_2014() -> None:
    report = _e3()
    assert report.overall.value == pytest.approx(0.63, abs=1e-12)
    assert report.overall.se == pytest.approx(0.084642, abs=5e-7)
    expected = {
        "area_share": ([0.35, 0.34, 0.20, 0.11], [0.082248, 0.075853, 0.064280, 0.030722]),
        "users": (
            [0.741935, 0.574468, 0.5, 0.7],
            [0.164542, 0.124782, 0.215112, 0.152676],
        ),
        "producers": (
            [0.657143, 0.794118, 0.3, 0.636364],
            [0.147710, 0.116548, 0.150411, 0.162280],
        ),
    }
    for name, (value, se) in expected.items():
        assert _values(getattr(report, name)) == pytest.approx(value, abs=5e-7), name
        assert _values(getattr(report, name), "se") == pytest.approx(se, abs=5e-7), name
    assert report.matrix[1, 2] == pytest.approx(0.08, abs=1e-12)
    assert report.matrix_se[1, 2] == pytest.approx(0.048066, abs=5e-7)


def test_f1_is_the_harmonic_mean() -> None:
    report = _e3()
    for code in report.classes:
        u, p = report.users[code].value, report.producers[code].value
        assert report.f1[code].value == pytest.approx(2 * u * p / (u + p))
        assert 0 < report.f1[code].se < report.users[code].se + report.producers[code].se


def test_general_form_reduces_to_olofsson() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        matrix = rng.integers(0, 30, (4, 4)) + np.diag(rng.integers(5, 40, 4)) + 1
        pixels = rng.integers(10_000, 500_000, 4)
        sample = ReferenceSample.from_matrix(matrix, range(4), SampleKind.STRATIFIED_RANDOM)
        strata = Strata.from_pixels(dict(enumerate(pixels.tolist())), 100.0)
        general = estimate_accuracy(sample, strata, classes=range(4), fpc=False)
        closed = olofsson(matrix, pixels)
        assert general.overall.value == pytest.approx(closed.oa)
        assert general.overall.se == pytest.approx(closed.oa_se)
        pairs = [
            ("users", closed.ua, closed.ua_se),
            ("producers", closed.pa, closed.pa_se),
            ("area_share", closed.share, closed.share_se),
        ]
        for name, value, se in pairs:
            assert _values(getattr(general, name)) == pytest.approx(value.tolist())
            assert _values(getattr(general, name), "se") == pytest.approx(se.tolist())


def test_olofsson_closed_form_on_e1() -> None:
    closed = olofsson(E1_MATRIX, E1_PIXELS)
    assert closed.oa == pytest.approx(0.9465119, abs=5e-8)
    assert (closed.share * 900_000).tolist() == pytest.approx(E1_AREA_HA, abs=5e-4)
    half = closed.share_se * 900_000 * 1.959963985
    assert half.tolist() == pytest.approx(E1_HALF_HA, abs=1e-3)


@pytest.mark.parametrize("kind", [SampleKind.CONVENIENCE, SampleKind.ACTIVE])
def test_non_probability_sample_is_refused(kind: SampleKind) -> None:
    sample = ReferenceSample.from_matrix([[5, 1], [1, 5]], [1, 2], kind)
    with pytest.raises(DesignError, match="map area, not an estimate"):
        estimate_accuracy(sample, Strata.from_pixels({1: 50, 2: 50}, 100.0), classes=[1, 2])


def _estimate(
    matrix: list[list[int]], pixels: dict[int, int], classes: list[int]
) -> AccuracyReport:
    sample = ReferenceSample.from_matrix(
        matrix, classes[: len(matrix)], SampleKind.STRATIFIED_RANDOM
    )
    return estimate_accuracy(sample, Strata.from_pixels(pixels, 100.0), classes=classes)


def test_map_class_never_in_reference_has_undefined_producers_accuracy() -> None:
    report = _estimate([[20, 0], [10, 0]], {1: 1000, 2: 500}, [1, 2])
    assert isnan(report.producers[2].value)
    assert isnan(report.producers[2].se)
    assert report.users[2].value == 0
    assert report.area_ha[2].value == 0
    assert any("not certainty" in note for note in report.notes)


def test_reference_class_never_mapped_has_area_and_zero_producers_accuracy() -> None:
    report = _estimate([[20, 0, 5], [1, 19, 0], [0, 0, 0]], {1: 1000, 2: 500, 3: 0}, [1, 2, 3])
    assert report.area_ha[3].value == pytest.approx(1000 * 100 / 1e4 * 0.2)
    assert report.area_ha[3].se > 0
    assert report.producers[3].value == 0
    assert isnan(report.users[3].value)
    assert report.mapped_ha[3].value == 0


def test_zero_area_class_stays_in_the_legend() -> None:
    report = _estimate([[20, 2], [1, 19]], {1: 1000, 2: 500}, [1, 2, 9])
    assert report.classes == (1, 2, 9)
    assert report.area_ha[9].value == 0
    assert isnan(report.f1[9].value)
    assert json.loads(json.dumps(report.to_dict()))["f1"]["9"]["value"] is None


def test_single_unit_stratum_is_refused_then_collapsed_explicitly() -> None:
    kind = SampleKind.STRATIFIED_RANDOM
    stratum = np.array([1] * 10 + [2])
    reference = np.array([1] * 8 + [2] * 2 + [2])
    sample = ReferenceSample(stratum, stratum, reference, kind)
    strata = Strata.from_pixels({1: 1000, 2: 500}, 100.0)
    with pytest.raises(DesignError, match="stratum 2 has one unit"):
        estimate_accuracy(sample, strata, classes=[1, 2])
    report = estimate_accuracy(sample, strata, classes=[1, 2], collapse={2: 1})
    # The estimate keeps its own stratum weights; only the variance is borrowed.
    assert report.area_share[1].value == pytest.approx(2 / 3 * 0.8)
    own = (2 / 3) ** 2 * 0.99 * np.var([1] * 8 + [0] * 2, ddof=1) / 10
    lent = (1 / 3) ** 2 * (1 - 1 / 500) * np.var([1] * 8 + [0] * 3, ddof=1) / 1
    assert report.area_share[1].se == pytest.approx(np.sqrt(own + lent))
    assert any("borrowed" in note for note in report.notes)


def test_census_has_no_sampling_error() -> None:
    report = _estimate([[3, 1], [1, 4]], {1: 4, 2: 5}, [1, 2])
    assert report.overall.value == pytest.approx(7 / 9)
    assert report.overall.se == 0


@pytest.mark.parametrize(
    ("stratum", "mapped", "reference", "message"),
    [
        ([1, 1, 2, 7], [1, 1, 2, 2], [1, 1, 2, 2], r"strata \[7\]"),
        ([1, 1, 2, 2], [1, 1, 2, 8], [1, 1, 2, 2], r"map class codes \[8\]"),
        ([1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 9], r"reference class codes \[9\]"),
        ([1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 2, 2], "stratum 2 has 50 pixels and no unit"),
    ],
)
def test_units_that_do_not_fit_are_refused(
    stratum: list[int], mapped: list[int], reference: list[int], message: str
) -> None:
    sample = ReferenceSample(
        np.array(stratum), np.array(mapped), np.array(reference), SampleKind.STRATIFIED_RANDOM
    )
    with pytest.raises(DesignError, match=message):
        estimate_accuracy(sample, Strata.from_pixels({1: 50, 2: 50}, 100.0), classes=[1, 2])


def test_missing_reference_class_is_refused() -> None:
    one = np.array([1, 1])
    with pytest.raises(DesignError, match="1 of 2 reference_class values are missing"):
        ReferenceSample(one, one, np.array([1.0, np.nan]), SampleKind.SIMPLE_RANDOM)  # type: ignore[arg-type]


def test_bad_strata_matrix_and_level() -> None:
    with pytest.raises(DesignError, match="both zero or both positive"):
        Strata((1,), (10,), (0.0,))
    with pytest.raises(DesignError, match="unique"):
        Strata((1, 1), (10, 10), (1.0, 1.0))
    with pytest.raises(DesignError, match="square"):
        olofsson([[1, 2, 3], [1, 2, 3]], [1, 2])
    with pytest.raises(DesignError, match="row 0 has 1"):
        olofsson([[1, 0], [1, 2]], [1, 2])
    with pytest.raises(DesignError, match="confidence level"):
        _e1(level=95)


def test_unequal_pixel_areas_weight_the_units() -> None:
    stratum = np.ones(4, dtype=int)
    reference = np.array([1, 1, 2, 2])
    area = np.array([300.0, 100.0, 100.0, 100.0])
    sample = ReferenceSample(stratum, stratum, reference, SampleKind.SIMPLE_RANDOM, area)
    strata = Strata((1,), (1000,), (150_000.0,))
    report = estimate_accuracy(sample, strata, classes=[1, 2])
    assert report.area_share[1].value == pytest.approx(4 / 6)
    # A pure stratum has no error however its pixels differ in size.
    pure = ReferenceSample(stratum, stratum, stratum, SampleKind.SIMPLE_RANDOM, area)
    assert estimate_accuracy(pure, strata, classes=[1, 2]).area_share[1].se == 0
    equal = ReferenceSample(stratum, stratum, reference, SampleKind.SIMPLE_RANDOM, area * 0 + 7)
    bare = ReferenceSample(stratum, stratum, reference, SampleKind.SIMPLE_RANDOM)
    a, b = (estimate_accuracy(s, strata, classes=[1, 2]) for s in (equal, bare))
    assert a.area_share[1].se == pytest.approx(b.area_share[1].se)


def test_unbiased_with_honest_intervals_over_simulated_designs() -> None:
    """Strata differ from map classes; 1200 designs drawn from one fixed population."""
    rng = np.random.default_rng(20260)
    # Share of (map, reference) cells (1,1) (1,2) (2,1) (2,2) in each stratum.
    shares = {1: [0.70, 0.12, 0.08, 0.10], 2: [0.10, 0.08, 0.17, 0.65], 3: [0.3, 0.3, 0.1, 0.3]}
    pixels = {1: 5000, 2: 9000, 3: 1500}
    population = {
        h: np.repeat(np.arange(4), (np.array(p) * pixels[h]).round().astype(int))
        for h, p in shares.items()
    }
    total = sum(pixels.values())
    cells = np.sum([np.bincount(c, minlength=4) for c in population.values()], axis=0) / total
    truth = {
        "oa": cells[0] + cells[3],
        "area": cells[0] + cells[2],
        "ua": cells[0] / (cells[0] + cells[1]),
        "pa": cells[0] / (cells[0] + cells[2]),
        "f1": 2 * cells[0] / (2 * cells[0] + cells[1] + cells[2]),
    }
    strata = Strata.from_pixels(pixels, 100.0)
    stratum = np.repeat([1, 2, 3], 100)
    runs = 1200
    value = {name: np.empty(runs) for name in truth}
    inside = dict.fromkeys(truth, 0)
    for i in range(runs):
        drawn = np.concatenate([rng.choice(population[h], 100, replace=False) for h in (1, 2, 3)])
        sample = ReferenceSample(
            stratum, drawn // 2 + 1, drawn % 2 + 1, SampleKind.STRATIFIED_RANDOM
        )
        report = estimate_accuracy(sample, strata, classes=[1, 2])
        estimates = {
            "oa": report.overall,
            "area": report.area_share[1],
            "ua": report.users[1],
            "pa": report.producers[1],
            "f1": report.f1[1],
        }
        for name, est in estimates.items():
            value[name][i] = est.value
            inside[name] += est.contains(truth[name])
    for name, true in truth.items():
        error = value[name].mean() - true
        assert abs(error) < 3.5 * value[name].std() / np.sqrt(runs) + 1e-3, name
        assert 0.93 <= inside[name] / runs <= 0.97, (name, inside[name] / runs)


def test_sample_kind_round_trip_and_systematic_note() -> None:
    assert SampleKind("active") is SampleKind.ACTIVE
    sample = ReferenceSample.from_matrix([[8, 2], [1, 9]], [1, 2], SampleKind.SYSTEMATIC)
    report = estimate_accuracy(sample, Strata.from_pixels({1: 50, 2: 50}, 1.0), classes=[1, 2])
    assert any("systematic" in note for note in report.notes)


def test_more_units_than_pixels_and_broken_columns_are_refused() -> None:
    kind = SampleKind.STRATIFIED_RANDOM
    sample = ReferenceSample.from_matrix([[8, 2], [1, 9]], [1, 2], kind)
    with pytest.raises(DesignError, match="10 units but 5 pixels"):
        estimate_accuracy(sample, Strata.from_pixels({1: 5, 2: 50}, 1.0), classes=[1, 2])
    with pytest.raises(DesignError, match="legend"):
        estimate_accuracy(sample, Strata.from_pixels({1: 50, 2: 50}, 1.0), classes=[1, 1])
    with pytest.raises(DesignError, match="2 codes, 1 pixel counts"):
        Strata((1, 2), (10,), (1.0,))
    one = np.array([1, 1])
    with pytest.raises(DesignError, match="one length"):
        ReferenceSample(one, one[:1], one, kind)
    with pytest.raises(DesignError, match="not positive"):
        ReferenceSample(one, one, one, kind, np.array([1.0, 0.0]))
    with pytest.raises(DesignError, match="1 of 2"):
        ReferenceSample(one, one, np.array([1, None], dtype=object), kind)  # type: ignore[arg-type]
    with pytest.raises(DesignError, match="not codes"):
        ReferenceSample(one, one, np.array([1, "maize"], dtype=object), kind)  # type: ignore[arg-type]
