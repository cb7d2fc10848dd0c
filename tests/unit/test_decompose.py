"""Closed forms and properties of the uncertainty decomposition."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from terraloom.errors import ModelError
from terraloom.uncertainty.decompose import (
    ENTROPY_NODATA,
    decode_entropy,
    decompose_entropy,
    decompose_regression,
    encode_entropy,
    variation_ratio,
)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def test_three_members_fixture() -> None:
    p = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], dtype=np.float32)[:, :, None]
    parts = decompose_entropy(p)
    assert parts.total[0] == pytest.approx(0.6909233, abs=2e-7)
    assert parts.aleatoric[0] == pytest.approx(0.5062109, abs=2e-7)
    assert parts.epistemic[0] == pytest.approx(0.1847125, abs=2e-7)
    assert variation_ratio(p)[0] == pytest.approx(1 / 3)


def test_certain_and_opposite_members_give_ln_2_without_nan() -> None:
    p = np.array([[[1.0], [0.0]], [[0.0], [1.0]]], dtype=np.float32)
    parts = decompose_entropy(p)
    assert parts.aleatoric[0] == 0
    assert parts.epistemic[0] == pytest.approx(log(2))
    assert variation_ratio(p)[0] == pytest.approx(0.5)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(1, 7)),
           elements=st.floats(-40, 40))
)  # fmt: skip
def test_parts_are_non_negative_bounded_and_add_up(z: np.ndarray) -> None:
    p = _softmax(z)
    m, k, _ = p.shape
    parts = decompose_entropy(p)
    assert (parts.aleatoric >= 0).all()
    assert (parts.epistemic >= 0).all()
    assert (parts.total <= log(k) + 1e-6).all()
    assert (parts.epistemic <= log(m) + 1e-6).all()
    np.testing.assert_allclose(parts.aleatoric + parts.epistemic, parts.total, atol=1e-6)
    ratio = variation_ratio(p)
    assert ((ratio >= -1e-7) & (ratio <= 1 - 1 / m + 1e-6)).all()


def test_equal_members_have_no_epistemic_part() -> None:
    one = _softmax(np.random.default_rng(0).normal(size=(1, 5, 200)))
    parts = decompose_entropy(np.repeat(one, 7, axis=0))
    np.testing.assert_allclose(parts.epistemic, 0, atol=1e-12)
    assert (decompose_entropy(one).epistemic == 0).all()


def test_shape_and_chunking_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    p = _softmax(np.random.default_rng(1).normal(size=(3, 4, 6 * 5)))
    whole = decompose_entropy(p)
    monkeypatch.setattr("terraloom.uncertainty.decompose._CHUNK_PX", 7)
    image = decompose_entropy(p.reshape(3, 4, 6, 5))
    assert image.mean.shape == (4, 6, 5)
    np.testing.assert_array_equal(image.total.ravel(), whole.total)
    np.testing.assert_array_equal(image.epistemic.ravel(), whole.epistemic)
    np.testing.assert_array_equal(
        variation_ratio(p.reshape(3, 4, 6, 5)).ravel(), variation_ratio(p)
    )
    assert image.total.dtype == np.float32


def test_invalid_pixels_stay_invalid_and_alone() -> None:
    p = _softmax(np.random.default_rng(2).normal(size=(3, 4, 5)))
    bad = p.copy()
    bad[1, 2, 3] = np.nan
    parts, clean = decompose_entropy(bad), decompose_entropy(p)
    for name in ("total", "aleatoric", "epistemic"):
        got = getattr(parts, name)
        assert np.isnan(got[3])
        np.testing.assert_array_equal(np.delete(got, 3), np.delete(getattr(clean, name), 3))
    assert np.isnan(parts.mean[:, 3]).all()
    assert np.isnan(variation_ratio(bad)[3])
    assert encode_entropy(parts.total, 4)[3] == ENTROPY_NODATA


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (np.zeros((2, 3)), "shape"),
        (np.full((2, 3, 4), 2.0), "do not sum to 1"),
        (np.array([[[1.5], [-0.5]]]), "smallest value -0.5"),
    ],
)
def test_what_is_not_a_probability_is_refused(probs: np.ndarray, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decompose_entropy(probs)


def test_regression_mixture_matches_its_samples() -> None:
    mu, var = np.array([[10.0], [14.0], [12.0]]), np.array([[1.0], [4.0], [2.0]])
    parts = decompose_regression(mu, var)
    rng = np.random.default_rng(3)
    draws = np.concatenate(
        [rng.normal(m, np.sqrt(v), 100_000) for m, v in zip(mu, var, strict=True)]
    )
    assert parts.mean[0] == pytest.approx(12.0)
    assert parts.aleatoric_sd[0] ** 2 == pytest.approx(7 / 3)
    assert parts.epistemic_sd[0] ** 2 == pytest.approx(8 / 3, rel=1e-6)
    assert parts.sd[0] == pytest.approx(np.sqrt(5), rel=1e-6)
    assert parts.sd[0] == pytest.approx(draws.std(), rel=0.01)


def test_regression_edge_cases() -> None:
    same = decompose_regression(np.full((4, 2), 3.0), np.zeros((4, 2)))
    assert (same.sd == 0).all()
    # Equal large means: a one-pass float32 variance would leave noise here.
    big = decompose_regression(
        np.full((5, 1), 8848.86, dtype=np.float32), np.full((5, 1), 1e-4, dtype=np.float32)
    )
    assert big.epistemic_sd[0] == pytest.approx(0, abs=1e-6)
    hole = decompose_regression(np.array([[1.0, np.nan]]), np.array([[np.nan, 1.0]]))
    for name in ("mean", "sd", "aleatoric_sd", "epistemic_sd"):
        assert np.isnan(getattr(hole, name)).all()
    with pytest.raises(ModelError, match="negative"):
        decompose_regression(np.ones((2, 1)), -np.ones((2, 1)))
    with pytest.raises(ModelError, match="shape"):
        decompose_regression(np.ones((2, 1)), np.ones((3, 1)))


@pytest.mark.parametrize("k", [2, 7, 30])
def test_encoding_round_trip(k: int) -> None:
    nats = np.linspace(0, log(k), 1001).astype(np.float32)
    code = encode_entropy(nats, k)
    assert code.dtype == np.uint8
    assert (code.min(), code.max()) == (0, 200)
    assert np.abs(decode_entropy(code, k) - nats).max() <= log(k) / 400 + 1e-6
    assert (encode_entropy(decode_entropy(code, k), k) == code).all()


def test_encoding_nodata_and_refusals() -> None:
    code = encode_entropy(np.array([0.1, np.nan, 0.2]), 3, np.array([True, True, False]))
    assert code.tolist()[1:] == [255, 255]
    assert np.isnan(decode_entropy(code, 3)).tolist() == [False, True, True]
    with pytest.raises(ModelError, match="ln 2"):
        encode_entropy(np.array([1.0]), 2)  # one bit given as if nats
    with pytest.raises(ModelError, match="2 or more"):
        encode_entropy(np.array([0.0]), 1)
