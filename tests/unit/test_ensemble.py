"""One calibration for all members, found where they did not train."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terraloom.errors import FoldError, ModelError
from terraloom.train.calibrate import calibration_error, negative_log_likelihood, rescale
from terraloom.train.ensemble import (
    Calibration,
    averaged,
    calibrated,
    cross_fitted_average,
    fit_calibration,
)
from terraloom.uncertainty.decompose import decompose_entropy


def softmax(z: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def members_of(
    factor: float, n: int = 6000, k: int = 4, m: int = 3, spread: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Members (M, N, K) whose logits are ``factor`` times those that made the labels."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, k))
    y = (softmax(z).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    noisy = z[None] + rng.normal(0, spread, (m, n, k))
    return softmax(factor * noisy), y


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_overconfidence_is_measured(factor: float) -> None:
    """Logits too large by a factor need that temperature (members without spread)."""
    p, y = members_of(factor, spread=0)
    assert fit_calibration(p, y).temperature == pytest.approx(factor, rel=0.08)


def test_label_noise_does_not_pass_for_doubt() -> None:
    """Labels wrong at a known rate would soften the probabilities of the true class."""
    p, y = members_of(1.0, spread=0, n=20_000)
    rng = np.random.default_rng(3)
    matrix = np.full((4, 4), 0.3 / 3)
    np.fill_diagonal(matrix, 0.7)
    label = (matrix.cumsum(axis=1)[y] < rng.random((len(y), 1))).sum(axis=1)
    assert fit_calibration(p, label).temperature > 1.4
    assert fit_calibration(p, label, noise=matrix).temperature == pytest.approx(1, abs=0.1)
    both = fit_calibration(p, label, "vector", matrix)
    assert both.scale == pytest.approx([1] * 4, abs=0.12)
    assert both.shift == pytest.approx([0] * 4, abs=0.12)


@given(t=st.floats(0.3, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_temperature_keeps_order_and_sum(t: float, seed: int) -> None:
    p, _ = members_of(1.0, n=6, seed=seed)
    planes = np.moveaxis(p, 2, 1).astype(np.float32)  # (M, K, N)
    out = calibrated(planes, Calibration(scale=(1 / t,)), axis=1)
    assert out.shape == planes.shape and out.dtype == np.float32
    assert out.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(out.argmax(axis=1), planes.argmax(axis=1))
    larger, before = out.max(axis=1), planes.max(axis=1)
    assert np.all(larger <= before + 1e-6) if t >= 1 else np.all(larger >= before - 1e-6)


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_the_average_is_what_prediction_decomposes(method: str) -> None:
    """Calibration and map use the same probabilities, so the scores are those of the map."""
    p, y = members_of(2.0, n=400)
    how = fit_calibration(p, y, method)
    planes = calibrated(np.moveaxis(p, 2, 1), how, axis=1)
    assert decompose_entropy(planes).mean == pytest.approx(averaged(p, how).T, abs=1e-6)


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_each_fold_uses_the_calibration_of_the_others(method: str) -> None:
    """Labels of a fold do not reach its own probabilities."""
    p, y = members_of(2.0, n=2000)
    fold = np.arange(len(y)) % 3
    out = cross_fitted_average(p, y, fold, method)
    here = fold == 1
    how = fit_calibration(p[:, ~here], y[~here], method)
    assert out[here] == pytest.approx(averaged(p[:, here], how))
    changed = y.copy()
    changed[here] = 0
    again = cross_fitted_average(p, changed, fold, method)
    assert np.array_equal(again[here], out[here]) and not np.array_equal(again[~here], out[~here])


def skewed(n: int = 8000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A member that thinks too much of class 0 and is too sure of class 1; what would mend it."""
    rng = np.random.default_rng(seed)
    p = softmax(rng.normal(0, 1.5, (n, 4)))
    scale, shift = np.array([1.0, 0.6, 1.0, 1.0]), np.array([-0.8, 0.0, 0.4, 0.4])
    y = (rescale(p, scale, shift).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return p[None], y, scale, shift


def test_scale_and_shift_of_classes_are_recovered() -> None:
    p, y, scale, shift = skewed(30_000)
    how = fit_calibration(p, y, "vector")
    # Probabilities know shifts but for a constant.
    centred = np.subtract(how.shift, np.mean(how.shift))
    assert centred == pytest.approx(shift - shift.mean(), abs=0.15)
    assert how.scale == pytest.approx(scale, abs=0.12)


@given(seed=st.integers(0, 999), factor=st.floats(0.4, 3), k=st.integers(2, 6))
@settings(max_examples=12, deadline=None)
def test_a_vector_never_fits_worse_than_a_temperature(seed: int, factor: float, k: int) -> None:
    p, y = members_of(factor, n=300, k=k, seed=seed)
    nll = [
        negative_log_likelihood(averaged(p, fit_calibration(p, y, m)), y)
        for m in ("temperature", "vector")
    ]
    assert nll[1] <= nll[0] + 1e-9


def test_classes_that_are_off_are_mended_where_no_label_was_seen() -> None:
    p, y, _, _ = skewed()
    fold = np.arange(len(y)) % 4
    one, more = (cross_fitted_average(p, y, fold, m) for m in ("temperature", "vector"))
    assert negative_log_likelihood(more, y) < negative_log_likelihood(one, y) - 0.02
    assert calibration_error(more, y) < calibration_error(one, y)


def test_rare_classes_do_not_explode() -> None:
    """A handful of labels of a class, one of them a surprise, says little about its scale."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (3000, 4)) - np.array([0, 0, 0, 9.0])
    y = (softmax(z).cumsum(axis=1) < rng.random((len(z), 1))).sum(axis=1)
    y[:4] = 3
    how = fit_calibration(softmax(z)[None], y, "vector")
    assert 4 <= (y == 3).sum() < 12
    assert np.ptp(how.shift) < 1 and np.ptp(np.log(how.scale)) < 0.5
    # A class that no label has keeps its place as well.
    none = fit_calibration(softmax(z)[None][:, y != 3], y[y != 3], "vector")
    assert np.ptp(none.shift) < 1 and np.ptp(np.log(none.scale)) < 0.5


def test_a_calibration_survives_its_record() -> None:
    p, y = members_of(1.6, n=500)
    for method in ("temperature", "vector"):
        how = fit_calibration(p, y, method)
        again = Calibration.from_record(how.record())
        assert again.method == method
        assert averaged(p, again) == pytest.approx(averaged(p, how), abs=1e-12)
    assert Calibration(scale=(0.5,)).record() == {"method": "temperature", "temperature": 2.0}


@pytest.mark.parametrize(
    "record",
    [
        {"temperature": 1.3},
        {"method": "isotonic"},
        {"method": "temperature", "temperature": "hot"},
        {"method": "vector", "scale": [1.0, 1.0], "shift": [0.0]},
    ],
)
def test_records_that_are_none_are_refused(record: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="calibration"):
        Calibration.from_record(record)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="4 classes"):
        calibrated(np.full((1, 4), 0.25), Calibration("vector", (1.0,) * 3, (0.0,) * 3))


def test_one_fold_cannot_be_cross_fitted() -> None:
    p, y = members_of(1.0, n=20)
    with pytest.raises(FoldError, match="1 fold with held-out labels"):
        cross_fitted_average(p, y, np.zeros(20))
