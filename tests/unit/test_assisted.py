"""Model-assisted areas: against ppi-python, by simulation, and from rasters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from scipy import stats

from terraloom.assess.assisted import assisted_areas, assisted_record, difference_means, map_means
from terraloom.assess.continuous import value_accuracy
from terraloom.assess.estimators import estimate_accuracy
from terraloom.assess.interpreters import NOT_ANSWERED, compare_interpreters
from terraloom.assess.intervals import wilson_estimate
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.assess.survey import Survey
from terraloom.errors import DesignError

DOMAIN = Strata.from_pixels({0: 10**7}, 100.0)

# 40 labelled units, 400 unlabelled; expected values computed once with ppi-python 0.2.3 (MIT):
# ppi_mean_pointestimate and ppi_mean_ci (95 %) with lam = 1, 0 and tuned.
PPI_Y = "1110111100000100011110010000101001001101"
PPI_F = [
    73, 61, 87, 35, 47, 44, 51, 91, 19, 51, 67, 61, 49, 20, 42, 17, 31, 83, 22, 32, 68, 20, 25, 85,
    32, 57, 70, 34, 73, 30, 34, 59, 38, 79, 62, 34, 88, 33, 58, 65,
]  # fmt: skip
PPI = {1.0: (0.45995, 0.31633067, 0.60356933), 0.0: (0.475, 0.32024505, 0.62975495)}
PPI_TUNED = (0.4635514, 0.32032884, 0.60677397)


def _ppi() -> tuple[Survey, np.ndarray, np.ndarray]:
    y = np.array([float(c) for c in PPI_Y])[:, None]
    sample = ReferenceSample(np.zeros(40), np.ones(40), y[:, 0], SampleKind.SIMPLE_RANDOM)
    return Survey.of(sample, DOMAIN, fpc=False), y, np.array(PPI_F)[:, None] / 100


#: Mean and variance (over 400) of the unlabelled predictions behind the numbers above.
PPI_MEAN = 0.45995 - np.mean([float(c) for c in PPI_Y]) + np.mean(PPI_F) / 100


@pytest.mark.parametrize("tuning", [1.0, 0.0])
def test_prediction_powered_mean_agrees_with_ppi_python(tuning: float) -> None:
    survey, y, f = _ppi()
    spread = _unlabelled_variance()
    found = difference_means(
        survey, y, f, np.array([PPI_MEAN]), tuning=tuning, f_variance=np.array([spread / 400])
    )
    value, low, high = PPI[tuning]
    assert found.value[0] == pytest.approx(value, abs=1e-9)
    # ppi-python divides by n, not n - 1; the unlabelled variance is backed out of its own interval.
    half = (high - low) / 2 / 1.959964
    assert found.se[0] * np.sqrt(39 / 40) == pytest.approx(half, rel=2e-3)


def _unlabelled_variance() -> float:
    """What ppi-python's interval at lambda = 1 leaves for the 400 unlabelled predictions."""
    _, y, f = _ppi()
    half = (PPI[1.0][2] - PPI[1.0][1]) / 2 / 1.959964
    return 400 * (half**2 - float(np.var(y - f)) / 40)


def test_tuned_lambda_is_that_of_ppi_python() -> None:
    survey, y, f = _ppi()
    spread = _unlabelled_variance()
    assert spread == pytest.approx(np.var(f), rel=0.3)
    found = difference_means(
        survey, y, f, np.array([PPI_MEAN]), f_variance=np.array([spread / 400])
    )
    tuned = (PPI[0.0][0] - PPI_TUNED[0]) / (PPI[0.0][0] - PPI[1.0][0])
    # ppi-python takes the variance of f from both parts together.
    both = (39 * np.var(f, ddof=1) + 400 * spread + 40 / 1.1 * (f.mean() - PPI_MEAN) ** 2) / 439
    cov = float(((y - y.mean()) * (f - f.mean())).mean())
    assert tuned == pytest.approx(cov / (1.1 * both), rel=1e-4)
    own = 40 / 39 * cov / (np.var(f, ddof=1) + spread / 10)
    assert found.tuning == pytest.approx(own, rel=1e-9)
    same = difference_means(
        survey, y, f, np.array([PPI_MEAN]), tuning=tuned, f_variance=np.array([spread / 400])
    )
    assert same.value[0] == pytest.approx(PPI_TUNED[0], abs=1e-7)
    half = (PPI_TUNED[2] - PPI_TUNED[1]) / 2 / 1.959964
    assert same.se[0] * np.sqrt(39 / 40) == pytest.approx(half, rel=2e-3)
    assert found.se[0] <= same.se[0]


def test_perfect_useless_and_wrong_predictions() -> None:
    rng = np.random.default_rng(2)
    ref = rng.choice([1, 2, 3], 300, p=[0.5, 0.3, 0.2])
    sample = ReferenceSample(np.zeros(300), ref, ref, SampleKind.SIMPLE_RANDOM)
    y = np.eye(3)[ref - 1]
    truth = np.array([0.5, 0.3, 0.2])
    areas, found = assisted_areas(sample, DOMAIN, y, truth, classes=[1, 2, 3])
    assert found.value == pytest.approx(truth) and found.se == pytest.approx([0, 0, 0], abs=1e-12)
    assert areas[1].value == pytest.approx(0.5 * 10**5) and np.isnan(found.gain).all()
    plain = estimate_accuracy(sample, DOMAIN, classes=[1, 2, 3])
    for f, gain in ((np.full((300, 3), 1 / 3), 1.0), (1 - y, 1.0)):
        _, other = assisted_areas(sample, DOMAIN, f, f.mean(axis=0), classes=[1, 2, 3])
        assert other.tuning == 0 and other.gain == pytest.approx([gain] * 3)
        assert other.value == pytest.approx([e.value for e in plain.area_share.values()])


def test_means_of_strata_as_predictions_are_post_stratification() -> None:
    rng = np.random.default_rng(3)
    mapped = rng.choice([1, 2], 500, p=[0.8, 0.2])
    ref = np.where(rng.random(500) < 0.9, mapped, 3 - mapped)
    sample = ReferenceSample(np.zeros(500), mapped, ref, SampleKind.SIMPLE_RANDOM)
    by = np.array([np.eye(2)[ref[mapped == m] - 1].mean(axis=0) for m in (1, 2)])
    f, mean = by[mapped - 1], np.array([0.8, 0.2]) @ by
    _, found = assisted_areas(sample, DOMAIN, f, mean, classes=[1, 2])
    sizes = Strata.from_pixels({1: 8 * 10**6, 2: 2 * 10**6}, 100.0)
    post = estimate_accuracy(sample, DOMAIN, classes=[1, 2], post_strata=sizes)
    assert found.tuning == pytest.approx(1)
    assert found.value == pytest.approx([e.value for e in post.area_share.values()])
    assert found.se == pytest.approx([e.se for e in post.area_share.values()], rel=0.01)


def test_intervals_cover_and_are_shorter_than_those_of_the_sample_alone() -> None:
    """A fixed population of 20,000 pixels with miscalibrated probabilities; 400 samples."""
    rng = np.random.default_rng(4)
    size, runs, n = 20_000, 400, (60, 60, 130)
    p = rng.dirichlet([1.2, 0.4, 2.4], size)
    truth = (rng.random(size)[:, None] > np.cumsum(p, axis=1)).sum(axis=1) + 1
    said = p**1.5 / (p**1.5).sum(axis=1, keepdims=True)
    mapped = said.argmax(axis=1) + 1
    pixels = {k: int((mapped == k).sum()) for k in (1, 2, 3)}
    strata = Strata.from_pixels(pixels, 100.0)
    share = np.bincount(truth, minlength=4)[1:] / size
    inside, gain, error = np.zeros(3), [], []
    of_class = [np.flatnonzero(mapped == k) for k in (1, 2, 3)]
    for _ in range(runs):
        units = np.concatenate([
            rng.choice(pool, m, replace=False) for pool, m in zip(of_class, n, strict=True)
        ])  # fmt: skip
        sample = ReferenceSample(
            mapped[units], mapped[units], truth[units], SampleKind.STRATIFIED_RANDOM
        )
        areas, found = assisted_areas(
            sample, strata, said[units], said.mean(axis=0), classes=[1, 2, 3]
        )
        inside += [areas[k].contains(share[k - 1] * size / 100) for k in (1, 2, 3)]
        gain.append(found.overall_gain)
        error.append(found.value - share)
    assert ((inside / runs > 0.915) & (inside / runs < 0.985)).all(), inside / runs
    assert np.mean(gain) > 1.05
    spread = np.std(error, axis=0)
    assert (np.abs(np.mean(error, axis=0)) < 4 * spread / np.sqrt(runs)).all()


def test_wilson_of_a_standard_error_and_broken_input() -> None:
    est = wilson_estimate(0.3, float(np.sqrt(0.3 * 0.7 / 50)), 1.959964)
    low, high = stats.binomtest(15, 50).proportion_ci(method="wilson")
    assert (est.lower, est.upper) == pytest.approx((low, high), abs=1e-6)
    assert wilson_estimate(-0.01, 0.02, 2.0).lower == 0
    survey, y, f = _ppi()
    with pytest.raises(DesignError, match="model-assisted"):
        difference_means(survey, y, f * np.nan, np.array([0.5]))


def _write(path: Path, data: np.ndarray, nodata: int) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", height=data.shape[1], width=data.shape[2], count=len(data),
        dtype=data.dtype, crs="EPSG:32633", transform=Affine(10, 0, 3e5, 0, -10, 5.8e6),
        nodata=nodata,
    ) as dst:  # fmt: skip
        dst.write(data)


def test_means_of_the_map_follow_its_domain(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    codes = rng.choice(np.array([0, 1, 2], np.uint8), (1, 40, 1100))
    first = rng.integers(0, 201, (40, 1100))
    prob = np.stack([first, 200 - first]).astype(np.uint8)
    prob[:, codes[0] == 0] = 255
    _write(tmp_path / "class_map.tif", codes, 0)
    _write(tmp_path / "probabilities.tif", prob, 255)
    row, col = np.nonzero(codes[0])
    row, col = row[::97], col[::97]
    means = map_means(tmp_path / "class_map.tif", tmp_path / "probabilities.tif", row, col)
    assert means is not None
    assert means.at_units[:, 0] == pytest.approx(first[row, col] / 200)
    valid = codes[0] > 0
    assert means.mean[0] == pytest.approx(first[valid].mean() / 200, rel=1e-5)
    assert means.n_pixels == {1: int((codes == 1).sum()), 2: int((codes == 2).sum())}
    mapped = codes[0][row, col].astype(int)
    sample = ReferenceSample(mapped, mapped, mapped, SampleKind.STRATIFIED_RANDOM)
    record = assisted_record(
        sample, Strata.from_pixels(means.n_pixels, 100.0), means, {1: "a", 2: "b"}, None
    )
    assert [c["name"] for c in record["classes"]] == ["a", "b"] and record["gain"] is None
    prob[:, 3, 3] = 255
    codes[0, 3, 3] = 1
    _write(tmp_path / "class_map.tif", codes, 0)
    _write(tmp_path / "probabilities.tif", prob, 255)
    assert map_means(tmp_path / "class_map.tif", tmp_path / "probabilities.tif", row, col) is None


# --- values --------------------------------------------------------------------------------------


def test_value_accuracy_by_hand_and_weights() -> None:
    y = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 12.0])
    m = np.array([1.5, 2.0, 2.0, 5.0, 9.0, 14.0])
    stratum = np.array([1, 1, 1, 1, 2, 2])
    sample = ReferenceSample(stratum, stratum, stratum, SampleKind.STRATIFIED_RANDOM)
    survey = Survey.of(sample, Strata.from_pixels({1: 1000, 2: 3000}, 100.0), fpc=False)
    found = value_accuracy(m, y, survey)
    w = np.array([0.0625] * 4 + [0.375] * 2)
    e = m - y
    assert found.bias.value == pytest.approx(w @ e)
    assert found.mae.value == pytest.approx(w @ np.abs(e))
    assert found.rmse.value == pytest.approx(np.sqrt(w @ e**2))
    assert found.r2.value == pytest.approx(1 - w @ e**2 / (w @ (y - w @ y) ** 2))
    own = 0.25**2 * np.var(e[:4], ddof=1) / 4 + 0.75**2 * np.var(e[4:], ddof=1) / 2
    assert found.bias.se == pytest.approx(np.sqrt(own))
    assert 0 < found.rmse.lower < found.rmse.value < found.rmse.upper
    assert found.to_dict()["n"] == 6
    same = value_accuracy(y, y, survey)
    assert (same.rmse.value, same.rmse.upper, same.r2.value) == (0, 0, 1)
    with pytest.raises(DesignError, match="1 of them not finite"):
        value_accuracy(np.array([np.nan, *m[1:]]), y, survey)


def test_value_intervals_cover() -> None:
    rng = np.random.default_rng(7)
    size, runs = 30_000, 300
    y = rng.gamma(2.0, 5.0, size)
    m = 2 + 0.8 * y + rng.normal(0, 2, size) * (1 + y / 20)
    stratum = (y > 12).astype(int)
    pixels = np.bincount(stratum)
    e = m - y
    truth = {
        "bias": e.mean(), "mae": np.abs(e).mean(), "rmse": np.sqrt((e**2).mean()),
        "r2": 1 - (e**2).mean() / y.var(),
    }  # fmt: skip
    strata = Strata.from_pixels(dict(enumerate(pixels.tolist())), 100.0)
    inside = dict.fromkeys(truth, 0)
    pools = [np.flatnonzero(stratum == h) for h in (0, 1)]
    for _ in range(runs):
        u = np.concatenate([rng.choice(p, 100, replace=False) for p in pools])
        sample = ReferenceSample(stratum[u], stratum[u], stratum[u], SampleKind.STRATIFIED_RANDOM)
        found = value_accuracy(m[u], y[u], Survey.of(sample, strata))
        for name, true in truth.items():
            inside[name] += getattr(found, name).contains(true)
    for name, n in inside.items():
        assert 0.91 <= n / runs <= 0.985, (name, n / runs)


# --- interpreters --------------------------------------------------------------------------------


def test_interpreters_are_compared_in_shares_and_hectares() -> None:
    rng = np.random.default_rng(9)
    mapped = np.repeat([1, 2], 100)
    anna = np.where(rng.random(200) < 0.9, mapped, 3 - mapped)
    ben = np.where(rng.random(200) < 0.95, anna, 1)
    few = np.full(200, NOT_ANSWERED)
    few[:30] = anna[:30]
    strata = Strata.from_pixels({1: 90_000, 2: 10_000}, 100.0)
    sample = ReferenceSample(mapped, mapped, anna, SampleKind.STRATIFIED_RANDOM)
    found = compare_interpreters(
        {"anna": anna, "ben": ben, "cy": few}, sample, strata, classes=[1, 2]
    )
    first, second, third = found["pairs"]
    same = anna == ben
    share = 0.9 * same[:100].mean() + 0.1 * same[100:].mean()
    assert first["agreement"]["value"] == pytest.approx(share)
    assert np.sum(first["table"]) == pytest.approx(1)
    assert np.trace(first["table"]) == pytest.approx(share)
    assert (second["units"], second["agree"]) == (30, 30)
    assert "agreement" not in second and np.sum(third["counts"]) == 30
    assert set(found["areas"]) == {"anna", "ben", "settled"}
    a, b = (found["areas"][n]["area_ha"]["1"] for n in ("anna", "ben"))
    assert found["spread_ha"]["1"] == pytest.approx(abs(a - b)) and a != b
    assert found["areas"]["settled"] == found["areas"]["anna"]
    with pytest.raises(DesignError, match="interpreter dora"):
        compare_interpreters({"dora": few[:3]}, sample, strata, classes=[1, 2])
