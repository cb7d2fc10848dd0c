"""Sets for the true class where labels are wrong: coverage by simulation, and when not to try."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from terraloom.config.campaign import Uncertainty
from terraloom.labels.noise import noise_beyond_chance
from terraloom.uncertainty.conformal import fit_sets
from terraloom.uncertainty.noise_aware import (
    fit_noise_aware_sets,
    true_class_hits,
    true_class_weights,
)

K, PX = 6, 4


class World:
    """Six overlapping classes; labels of four pixels, a share of them wrong, mostly one way."""

    def __init__(self, seed: int, n: int, rate: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.centre = self.rng.normal(0, 1.3, (K, 4))
        self.share = self.rng.dirichlet(np.full(K, 6.0))
        self.noise = (1 - rate) * np.eye(K) + rate * (
            0.6 * np.roll(np.eye(K), 1, axis=1) + 0.4 * (1 - np.eye(K)) / (K - 1)
        )
        self.mean, self.p, self.true = self.sample(n)
        given = (self.rng.random((n, 1)) > self.noise.cumsum(axis=1)[self.true[::PX]]).sum(axis=1)
        self.given, self.unit = np.repeat(given, PX), np.repeat(np.arange(n), PX)

    def sample(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean probabilities of labels, those of pixels, true class of pixels."""
        true = self.rng.choice(K, n, p=self.share)
        x = np.repeat(self.centre[true] + self.rng.normal(0, 0.9, (n, 4)), PX, axis=0)
        x += self.rng.normal(0, 0.5, x.shape)
        far = ((x[:, None] - self.centre) ** 2).sum(axis=2)
        e = np.exp(-(far - far.min(axis=1, keepdims=True)) / 2 / 1.06) * self.share
        p = e / e.sum(axis=1, keepdims=True)
        return p.reshape(n, PX, K).mean(axis=1), p, np.repeat(true, PX)


def covered(world: World, sets, by_class: bool) -> tuple[float, float]:
    """Share of true classes in the sets of new labels, and the mean size of sets."""
    _, p, true = world.sample(2000)
    inside = sets.contains(p.T)
    hit = inside[true, np.arange(len(true))]
    each = [hit[true == k].mean() for k in range(K)] if by_class else [hit.mean()]
    return float(np.mean(each)), float(inside.sum(axis=0).mean())


@pytest.mark.parametrize("method", ["split", "class"])
def test_sets_hold_the_true_class_where_plain_ones_are_too_large(method) -> None:
    """Nominal 90 %, 15 % of 1,500 labels wrong, over 12 worlds."""
    plain, aware, estimated, sizes = [], [], [], []
    for seed in range(12):
        w = World(seed, 1500, 0.15)
        known = {"method": method, "coverage": 0.9}
        rest = (w.p, w.given, w.unit, w.unit)
        a, b = fit_sets(*rest, **known), fit_noise_aware_sets(*rest, w.noise, **known)
        beyond = noise_beyond_chance(w.mean, w.given[::PX], np.random.default_rng(0))
        c = fit_noise_aware_sets(*rest, beyond, **known)
        found = [covered(w, s, method == "class") for s in (a, b, c)]
        for store, (share, _) in zip((plain, aware, estimated), found, strict=True):
            store.append(share)
        sizes.append([size for _, size in found])
    assert np.mean(plain) > 0.96
    assert np.mean(aware) == pytest.approx(0.9, abs=0.02)
    # What is estimated is rather too little: sets are smaller, and hold what they should.
    assert 0.9 <= np.mean(estimated) < np.mean(plain) - 0.015
    assert np.mean(sizes, axis=0)[2] < 0.8 * np.mean(sizes, axis=0)[0]


def test_right_labels_are_not_taken_for_wrong_ones() -> None:
    """Classes overlap, so many right labels are contradicted; that is no noise."""
    found = []
    for seed in range(8):
        w = World(seed, 600, 0.0)
        beyond = noise_beyond_chance(w.mean, w.given[::PX], np.random.default_rng(0))
        assert beyond.sum(axis=1) == pytest.approx(np.ones(K)) and (beyond >= 0).all()
        rest = (w.p, w.given, w.unit, w.unit, beyond)
        found.append(
            covered(w, fit_noise_aware_sets(*rest, method="split", coverage=0.9), False)[0]
        )
    assert np.mean(found) == pytest.approx(0.9, abs=0.02)


def test_without_noise_thresholds_are_the_plain_ones() -> None:
    w = World(3, 300, 0.1)
    rest = (w.p, w.given, w.unit, w.unit)
    for method in ("split", "class"):
        for score in ("lac", "aps"):
            plain = fit_sets(*rest, method=method, coverage=0.9, score=score)
            same = fit_noise_aware_sets(*rest, np.eye(K), method=method, coverage=0.9, score=score)
            assert same == plain
    hits = true_class_hits(plain.contains(w.p.T).T, w.given, w.noise)
    truly = plain.contains(w.p.T)[w.true, np.arange(len(w.true))].mean()
    assert hits is not None and hits.mean() == pytest.approx(truly, abs=0.03)


def test_noise_that_says_nothing_is_not_used() -> None:
    w = World(3, 300, 0.1)
    worst = np.full((K, K), 0.55 / (K - 1))
    np.fill_diagonal(worst, 0.45)
    assert true_class_weights(worst) is None
    rest = (w.p, w.given, w.unit, w.unit)
    plain = fit_sets(*rest, method="split", coverage=0.9)
    assert fit_noise_aware_sets(*rest, worst, method="split", coverage=0.9) == plain
    assert true_class_hits(np.ones(w.p.shape, bool), w.given, worst) is None
    with pytest.raises(ValidationError, match="split or class"):
        Uncertainty(method="block", label_noise="estimated")
