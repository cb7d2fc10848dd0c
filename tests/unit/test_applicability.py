"""Area of applicability: distances by hand, known clusters, weights, folds, cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist

from terraloom.errors import ModelError
from terraloom.uncertainty.applicability import (
    CELL_PX,
    MOST_DIMS,
    Applicability,
    cell_means,
    dissimilarity,
    fit_space,
    threshold_of,
)


def _clusters(rng: np.random.Generator, centres: Any, n: int) -> tuple[Any, Any]:
    of = np.repeat(np.arange(len(centres)), n)
    return np.asarray(centres)[of] + rng.normal(0, 0.3, (len(of), len(centres[0]))), of


def test_dissimilarity_by_definition() -> None:
    rng = np.random.default_rng(1)
    train, new = rng.normal(5, (1, 7, 0.1), (60, 3)), rng.normal(5, (2, 9, 0.3), (1200, 3))
    weight = np.array([1.0, 0.5, 2.0])
    scale = lambda x: (x - train.mean(0)) / train.std(0, ddof=1) * weight  # noqa: E731
    expected = cKDTree(scale(train)).query(scale(new))[0] / pdist(scale(train)).mean()
    found, count = dissimilarity(new, fit_space(train, weight), 0.4)
    assert found == pytest.approx(expected, abs=2e-4)
    near = cKDTree(scale(train)).query_ball_point(
        scale(new), 0.4 * pdist(scale(train)).mean(), return_length=True
    )
    assert (np.abs(count - near) <= 1).all() and (count == near).mean() > 0.99
    assert ((found < 0.4) == (count > 0)).mean() > 0.99
    assert (dissimilarity(train, fit_space(train, weight))[0] < 2e-3).all()


def test_clusters_of_training_are_inside_and_another_is_outside() -> None:
    rng = np.random.default_rng(2)
    centres = [(0, 0, 0, 0), (4, 0, 0, 0), (0, 4, 0, 0)]
    train, of = _clusters(rng, centres, 120)
    fold = np.tile(np.arange(4), len(of) // 4)
    spaces = [fit_space(train[fold != f]) for f in range(4)]
    own = [dissimilarity(train[fold == f], spaces[f])[0] for f in range(4)]
    where = Applicability(tuple(spaces), threshold_of(np.concatenate(own)))
    new, _ = _clusters(rng, centres, 500)
    far, _ = _clusters(rng, [(4, 4, 0, 0), (0, 0, 3, 0)], 500)
    familiar, strange = where.judge([new] * 4), where.judge([far] * 4)
    assert familiar.inside.mean() > 0.93
    assert strange.inside.mean() < 0.01
    assert familiar.density.mean() > 5 and strange.density.max() < 1
    assert np.median(strange.dissimilarity) > 5 * np.median(familiar.dissimilarity)


def test_cluster_in_one_fold_only_raises_the_threshold() -> None:
    """Training DI looks at other folds: a cluster that one fold holds alone is far from them."""
    rng = np.random.default_rng(3)
    train, of = _clusters(rng, [(0, 0), (5, 0), (0, 5), (5, 5)], 100)

    def threshold(fold: Any) -> float:
        own = [dissimilarity(train[fold == f], fit_space(train[fold != f]))[0] for f in range(4)]
        return threshold_of(np.concatenate(own))

    mixed, alone = threshold(np.arange(len(of)) % 4), threshold(of)
    assert alone > 5 * mixed


def test_weight_zero_makes_a_feature_blind() -> None:
    rng = np.random.default_rng(4)
    train = rng.normal(size=(100, 2))
    odd = train[:50] + np.array([0.0, 30.0])
    seen = dissimilarity(odd, fit_space(train, np.array([1.0, 0.5])))[0]
    blind = dissimilarity(odd, fit_space(train, np.array([1.0, 0.0])))[0]
    assert seen.min() > 3 and blind.max() < 2e-3
    # A feature that never changes has no scale; it is left out rather than divided by 0.
    still = np.column_stack([train, np.full(100, 3.0)])
    assert np.isfinite(dissimilarity(still + 1, fit_space(still))[0]).all()


def test_threshold_is_that_of_the_paper() -> None:
    di = np.array([0.0, 1, 2, 3, 4])
    assert threshold_of(di) == 4  # Q75 + 1.5 IQR = 6 is beyond the largest
    assert threshold_of(np.append(di, 100)) == pytest.approx(3.75 + 1.5 * 2.5)
    with pytest.raises(ModelError, match="1 or more"):
        threshold_of(np.array([]))


def test_wide_features_keep_their_leading_dimensions() -> None:
    rng = np.random.default_rng(5)
    low = rng.normal(size=(300, 6))
    wide = low @ rng.normal(size=(6, 64))
    space = fit_space(wide)
    assert space.points.shape == (300, MOST_DIMS)
    exact = fit_space(wide, most_dims=64)
    new = wide[:200] * 1.3 + rng.normal(0, 0.01, (200, 64))
    found = dissimilarity(new, space)[0]
    assert found == pytest.approx(dissimilarity(new, exact)[0], abs=5e-3)
    assert found.max() > 0.05


def test_judgement_is_the_mean_over_networks_and_blocks_do_not_matter() -> None:
    rng = np.random.default_rng(6)
    spaces = tuple(fit_space(rng.normal(size=(70, d))) for d in (3, 5))
    f = [rng.normal(size=(1300, 3)), rng.normal(size=(1300, 5))]
    f[0][7] = np.nan
    both = Applicability(spaces, 0.5).judge(f)
    each = [dissimilarity(x, s, 0.5)[0] for x, s in zip(f, spaces, strict=True)]
    assert both.dissimilarity == pytest.approx((each[0] + each[1]) / 2, nan_ok=True, abs=1e-6)
    assert np.isnan(both.dissimilarity[7]) and not both.inside[7]
    part = Applicability(spaces, 0.5).judge([x[600:] for x in f])
    assert part.dissimilarity == pytest.approx(both.dissimilarity[600:], nan_ok=True, abs=2e-4)
    with pytest.raises(ModelError, match="1 networks"):
        Applicability(spaces, 0.5).judge(f[:1])
    with pytest.raises(ModelError, match="shape"):
        Applicability(spaces, 0.5).judge(f[::-1])


def test_bad_references_are_refused() -> None:
    for bad in (np.zeros((1, 3)), np.full((5, 3), np.nan), np.zeros((5, 3))):
        with pytest.raises(ModelError):
            fit_space(bad)
    with pytest.raises(ModelError, match="weights"):
        fit_space(np.eye(3), np.array([1.0, -1.0, 1.0]))


def test_cells() -> None:
    f = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
    cells = cell_means(f)
    assert cells.shape == (4 // CELL_PX * 6 // CELL_PX, 2)
    assert cells[0].tolist() == [f[0, :2, :2].mean(), f[1, :2, :2].mean()]
    assert cells[4, 0] == f[0, 2:, 2:4].mean()
