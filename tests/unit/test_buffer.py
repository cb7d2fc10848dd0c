"""Buffer between folds: exact against brute force, across chips, and only where it should act."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terraloom.errors import FoldError
from terraloom.labels.buffer import buffered


def brute(fold, labelled, rows, cols, pixel_m, held, buffer_m):
    n, h, w = fold.shape
    r = np.asarray(rows)[:, None, None] + np.arange(h)[:, None] + np.zeros((n, h, w))
    c = np.asarray(cols)[:, None, None] + np.arange(w) + np.zeros((n, h, w))
    own, other = labelled & (fold == held), labelled & (fold != held) & (fold != 255)
    keep = np.ones(fold.shape, bool)
    d2 = (r[other][:, None] - r[own]) ** 2 + (c[other][:, None] - c[own]) ** 2
    # Whole numbers squared against the squared buffer: no root, no dust.
    keep[other] = ~(d2 * pixel_m**2 < buffer_m**2 - 1e-6).any(axis=1)
    return keep


def case(seed: int, patches: bool):
    """Chips of 24 px, next to each other or apart; labels scattered or in patches."""
    rng = np.random.default_rng(seed)
    at = rng.choice(16, 5, replace=False)
    rows, cols = (at // 4) * 24, (at % 4) * 24 + 1000
    shape = (5, 24, 24)
    fold = np.kron(rng.choice([0, 1, 2, 255], (5, 4, 4), p=[0.4, 0.3, 0.2, 0.1]), np.ones((6, 6)))
    labelled = rng.random(shape) < (0.9 if patches else 0.08)
    return fold.astype(np.uint8), labelled, rows, cols


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), patches=st.booleans(),
    buffer_m=st.sampled_from([1.0, 10.0, 10.1, 14.2, 20.0, 50.0, 100.0, 133.7]),
)  # fmt: skip
def test_equal_to_brute_force(seed: int, patches: bool, buffer_m: float) -> None:
    fold, labelled, rows, cols = case(seed, patches)
    expected = brute(fold, labelled, rows, cols, 10, 0, buffer_m)
    others = labelled & (fold != 0) & (fold != 255)
    if others.any() and not expected[others].any():
        with pytest.raises(FoldError):
            buffered(fold, labelled, rows, cols, 10, 0, buffer_m)
        return
    assert np.array_equal(buffered(fold, labelled, rows, cols, 10, 0, buffer_m), expected)


def two_chips(gap: int):
    """A held-out pixel at the right edge of one chip, and a training pixel in the chip beside."""
    fold = np.zeros((2, 8, 8), np.uint8)
    labelled = np.zeros((2, 8, 8), bool)
    fold[1] = 1
    labelled[0, 3, 7] = labelled[1, 3, gap] = labelled[1, 7, 7] = True
    return fold, labelled, [0, 0], [0, 8]


def test_the_buffer_reaches_across_chips_and_its_end_is_open() -> None:
    chips = two_chips(2)  # 3 pixels, 30 m apart
    assert buffered(*chips, 10, 0, 30.0).all()
    keep = buffered(*chips, 10, 0, 30.1)
    assert not keep[1, 3, 2] and keep.sum() == keep.size - 1


def test_only_labels_of_other_folds_are_set_aside() -> None:
    fold, labelled, rows, cols = case(3, True)
    keep = buffered(fold, labelled, rows, cols, 10, 0, 40)
    assert not keep.all()
    assert keep[fold == 0].all() and keep[fold == 255].all() and keep[~labelled].all()
    assert buffered(fold, labelled, rows, cols, 10, 0, 0).all()
    assert buffered(fold, labelled, rows, cols, 10, 7, 40).all()  # a fold that no pixel has


def test_a_larger_buffer_keeps_no_more() -> None:
    fold, labelled, rows, cols = case(5, False)
    kept = [buffered(fold, labelled, rows, cols, 10, 0, b) for b in (15, 30, 60)]
    assert (kept[0] >= kept[1]).all() and (kept[1] >= kept[2]).all()


def test_nothing_left_to_train_with_is_said() -> None:
    fold, labelled, rows, cols = two_chips(2)
    with pytest.raises(FoldError, match="no label is 500 m or more") as caught:
        buffered(fold, labelled, rows, cols, 10, 0, 500)
    assert "buffer_m" in caught.value.fix
    with pytest.raises(FoldError, match="rows"):
        buffered(fold, labelled, rows[:1], cols, 10, 0, 50)
