"""Noise models do what they say: the rate, the classes, the place, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from terraloom.errors import LabelError
from terraloom.labels.corrupt import (
    checked_transition,
    flip,
    flip_patches,
    noise_rate,
    omit,
    pair_transition,
    shift_boundaries,
    symmetric_transition,
)

T = np.array([[0.8, 0.1, 0.1], [0.15, 0.8, 0.05], [0.05, 0.15, 0.8]])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def fields(side: int = 60, seed: int = 0) -> np.ndarray:
    """Rectangles of 3 classes, with a strip without labels."""
    y = rng(seed).integers(0, 3, (side // 10, side // 10)).astype(np.uint8)
    y = y.repeat(10, 0).repeat(10, 1)
    y[:, 25:28] = 255
    return y


MODELS = {
    "flip": lambda y, g: flip(y, T, g),
    "patches": lambda y, g: flip_patches(y, 0.2, 3, g, classes=3),
    "boundary": lambda y, g: shift_boundaries(y, 2, g),
    "omission": lambda y, g: omit(y, 0.3, g),
    "background": lambda y, g: omit(y, 0.3, g, classes=[1, 2], into=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_seeded_and_leaves_its_input_and_missing_labels_alone(name: str) -> None:
    y = fields()
    kept = y.copy()
    first, again, other = (MODELS[name](y, rng(s)) for s in (1, 1, 2))
    assert np.array_equal(y, kept) and first.dtype == y.dtype and first.shape == y.shape
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first, y)
    assert (first[y == 255] == 255).all()
    if name != "omission":
        assert (first[y != 255] != 255).all()


def test_symmetric_noise_hits_all_other_classes_alike() -> None:
    t = symmetric_transition(4, 0.3)
    assert t == pytest.approx(np.full((4, 4), 0.1) + 0.6 * np.eye(4))
    y = np.repeat(np.arange(4), 50_000)
    label = flip(y, t, rng())
    found = np.array([[(label[y == i] == j).mean() for j in range(4)] for i in range(4)])
    assert found == pytest.approx(t, abs=0.01) and noise_rate(y, label) == pytest.approx(
        0.3, abs=0.01
    )


def test_labels_follow_the_transition_matrix() -> None:
    y = np.repeat(np.arange(3, dtype=np.uint8), 50_000)
    label = flip(y, T, rng())
    found = np.array([[(label[y == i] == j).mean() for j in range(3)] for i in range(3)])
    assert found == pytest.approx(T, abs=0.01)


def test_an_impossible_label_is_never_drawn() -> None:
    t = np.array([[0, 1.0, 0], [0.3, 0, 0.7], [0, 0, 1]])
    y = np.repeat(np.arange(3), 3000)
    label = flip(y, t, rng())
    assert all(t[i, j] > 0 for i, j in zip(y, label, strict=True))
    assert np.array_equal(flip(y, np.eye(3), rng()), y)


def test_pairs() -> None:
    assert pair_transition(3, 0.4) == pytest.approx(
        np.array([[0.6, 0.4, 0], [0, 0.6, 0.4], [0.4, 0, 0.6]])
    )
    named = pair_transition(3, 0.4, {2: 1})
    assert named == pytest.approx(np.array([[1, 0, 0], [0, 1, 0], [0, 0.4, 0.6]]))
    with pytest.raises(LabelError, match="1: 1"):
        pair_transition(3, 0.4, {1: 1})


def test_patches_are_connected_and_reach_the_rate() -> None:
    y = np.zeros((120, 120), dtype=np.uint8)
    label = flip_patches(y, 0.2, 5, rng(), classes=3)
    assert 0.2 <= noise_rate(y, label) < 0.2 + 81 / y.size
    inner = ndimage.binary_erosion(label != y, np.ones((3, 3)), border_value=1)
    assert inner.sum() > 0.4 * (label != y).sum(), "single pixels, not patches"
    assert np.array_equal(flip_patches(y, 0, 5, rng(), classes=3), y)


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_a_straight_boundary_moves_by_the_shift(shift: int) -> None:
    y = np.zeros((20, 40), dtype=np.uint8)
    y[:, 20:] = 1
    seen = set()
    for seed in range(12):
        label = shift_boundaries(y, shift, rng(seed))
        edge = {int(e) for e in (label == 0).sum(axis=1)}
        assert len(edge) == 1
        seen |= edge
    assert seen == {20 - shift, 20 + shift}


def test_only_pixels_near_another_class_change_and_they_take_its_class() -> None:
    y = fields(seed=3)
    label = shift_boundaries(y, 2, rng())
    changed = label != y
    assert changed.any() and (label[y == 255] == 255).all()
    for k in range(3):
        took = changed & (label == k)
        assert (ndimage.distance_transform_edt(y != k)[took] <= 2).all()
    assert np.array_equal(shift_boundaries(y, 0, rng()), y)


def test_a_missing_label_pushes_no_boundary() -> None:
    y = np.full((9, 9), 255, dtype=np.uint8)
    y[3:6, 3:6] = 1
    assert np.array_equal(shift_boundaries(y, 3, rng()), y)


def test_whole_objects_are_left_out() -> None:
    y = np.zeros((40, 40), dtype=np.uint8)
    for r in range(2, 40, 8):
        for c in range(2, 40, 8):
            y[r : r + 4, c : c + 4] = 1 + (r + c) % 16 // 8
    before, count = ndimage.label(y > 0)
    label = omit(y, 0.4, rng(), classes=[1, 2], into=0)
    kept = ndimage.label(label > 0)[1]
    assert count == 25 and kept == 15
    assert all((label[before == i] > 0).all() or not label[before == i].any() for i in range(1, 26))
    assert (label[y == 0] == 0).all()
    only = omit(y, 1.0, rng(), classes=[2])
    assert (only[y == 2] == 255).all() and np.array_equal(only[y != 2], y[y != 2])


def test_lists_of_objects_lose_their_share() -> None:
    y = np.array([0, 1, 255, 2, 1, 0, 1, 0, 2, 1, 0], dtype=np.uint8)
    label = omit(y, 0.5, rng())
    assert (label == 255).sum() == 6 and label[2] == 255
    assert (label[label != 255] == y[label != 255]).all()


def test_noise_rate_counts_labels_that_are_there() -> None:
    assert noise_rate(np.array([0, 1, 255, 1]), np.array([0, 0, 1, 255])) == 0.5
    assert np.isnan(noise_rate(np.array([255]), np.array([0])))


def test_matrices_that_are_none_are_refused() -> None:
    with pytest.raises(LabelError, match=r"row 1 is \[0\.5, 0\.4\]"):
        checked_transition([[1, 0], [0.5, 0.4]])
    with pytest.raises(LabelError, match="row 0"):
        checked_transition([[1.5, -0.5], [0, 1]])
    with pytest.raises(LabelError, match="row 1"):
        checked_transition([[1, 0], [np.nan, 1]])
    with pytest.raises(LabelError, match=r"allowed: \(3, 3\)"):
        checked_transition(np.eye(2), 3)
    with pytest.raises(LabelError, match="shape"):
        checked_transition(np.full((2, 3), 1 / 3))


def test_bad_input_is_refused() -> None:
    y = fields()
    with pytest.raises(LabelError, match="0-1, or 255"):
        flip(y, np.eye(2), rng())
    with pytest.raises(LabelError, match=r"rate = 1\.5"):
        symmetric_transition(3, 1.5)
    with pytest.raises(LabelError, match="radius 0 px"):
        flip_patches(y, 0.1, 0, rng(), classes=3)
    with pytest.raises(LabelError, match="-1 px"):
        shift_boundaries(y, -1, rng())
    for model in (lambda v: shift_boundaries(v, 1, rng()), lambda v: omit(v, 0.1, rng())):
        with pytest.raises(LabelError, match=r"\(H, W\)"):
            model(y[None])
