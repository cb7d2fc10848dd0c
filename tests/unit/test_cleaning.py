"""Weights of labels in training are found without the fold that is held out."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pytest
import xarray as xr
from shapely.geometry import box

from terraloom.errors import LabelError
from terraloom.labels.corrupt import flip, symmetric_transition
from terraloom.models.heads import TaskSpec
from terraloom.train import cleaning
from terraloom.train.cleaning import LabelRule, training_weights

CHIPS, SIZE, CELL, FOLDS, CLASSES = 4, 60, 5, 4, 3
NAMES = ("water", "forest", "field")
COVER = TaskSpec("cover", "segmentation", NAMES)
PERIODS = [
    SimpleNamespace(name="early", start=date(2021, 1, 1), end=date(2021, 12, 31)),
    SimpleNamespace(name="late", start=date(2022, 1, 1), end=date(2022, 12, 31)),
]


@pytest.fixture(autouse=True)
def _small_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "_TREES", 20)
    monkeypatch.setattr(cleaning, "_MOST_PX", 6)


class World(SimpleNamespace):
    """Chips, their labels, and which of them are wrong or outdated."""


def world(rate: float = 0.3, changed: float = 0.0, seed: int = 0) -> World:
    """One chip per fold; labels of 5 x 5 pixels, wrong at a rate or with changed ground."""
    rng = np.random.default_rng(seed)
    side = SIZE // CELL
    count = CHIPS * side * side
    true = rng.integers(0, CLASSES, count)
    given = flip(true, symmetric_transition(CLASSES, rate), rng)
    turned = rng.random(count) < changed
    now = np.where(turned, (true + 1) % CLASSES, true)
    centre = np.array([[0.0, 0.0], [2.5, 0.0], [1.2, 2.2]])
    of = np.arange(count, dtype=np.int32).reshape(CHIPS, side, side)
    of = of.repeat(CELL, 1).repeat(CELL, 2)
    planes = [centre[true], centre[now]]
    own = rng.normal(0, 0.3, (2, count, 2))
    x = np.concatenate([(p + own[t])[of] for t, p in enumerate(planes)], axis=-1)
    x = (x + rng.normal(0, 0.4, x.shape)).transpose(0, 3, 1, 2).astype(np.float32)
    fold = np.zeros(of.shape, np.uint8) + np.arange(CHIPS, dtype=np.uint8)[:, None, None]
    block = of // (side * 3)
    y = given.astype(np.uint8)[of]
    dims = ("n", "y_10", "x_10")
    chips = xr.Dataset(
        {
            "x_s2_10": (("n", "channel_s2_10", "y_10", "x_10"), x),
            "y_cover": (dims, y), "label_cover": (dims, of), "fold": (dims, fold),
            "block": (dims, block),
        },
        {"channel_s2_10": [f"{p.name}/{b}" for p in PERIODS for b in ("B04", "B08")]},
        {"tasks": [{"name": "cover", "kind": "segmentation"}]},
    )  # fmt: skip
    labels = gpd.GeoDataFrame(
        {
            "task": "cover", "label_id": np.arange(count), "value": given.astype(float),
            "date": "2021-06-01", "fold": np.arange(count) // (side * side),
        },
        geometry=[box(i, 0, i + 1, 1) for i in range(count)], crs="EPSG:32633",
    )  # fmt: skip
    return World(chips=chips, labels=labels, of=of, wrong=given != true, turned=turned, given=given)


def spoiled(w: World, fold: int) -> World:
    """The same, but for other labels in one fold."""
    there = w.chips["fold"].values == fold
    y = np.where(there, (w.chips["y_cover"].values + 1) % CLASSES, w.chips["y_cover"].values)
    at = w.labels["fold"] == fold
    labels = w.labels.assign(value=np.where(at, (w.given + 1) % CLASSES, w.given).astype(float))
    chips = w.chips.assign(y_cover=(w.chips["y_cover"].dims, y.astype(np.uint8)))
    return World(chips=chips, labels=labels)


@pytest.mark.parametrize("how", ["drop", "weigh"])
def test_the_held_out_fold_has_no_influence(how: str) -> None:
    w = world(changed=0.1)
    rules = {"cover": LabelRule(how, 365.0, 0.8, forward=True)}
    known = {"held_out_fold": 2, "seed": 5, "periods": PERIODS}
    one = training_weights(w.chips, [COVER], rules, labels=w.labels, **known)
    other = spoiled(w, 2)
    two = training_weights(other.chips, [COVER], rules, labels=other.labels, **known)
    assert np.array_equal(one.weights["cover"], two.weights["cover"])
    assert np.array_equal(one.transitions["cover"], two.transitions["cover"])
    assert one.record == two.record
    assert (one.weights["cover"][2] == 0).all() and (one.weights["cover"][0] > 0).any()
    # Labels that are trained on do matter.
    third = spoiled(w, 1)
    three = training_weights(third.chips, [COVER], rules, labels=third.labels, **known)
    assert not np.array_equal(one.weights["cover"], three.weights["cover"])


def test_wrong_labels_lose_their_weight() -> None:
    w = world()
    found = training_weights(
        w.chips, [COVER], {"cover": LabelRule("drop")}, held_out_fold=0, seed=1
    )
    weight, wrong = found.weights["cover"], w.wrong[w.of]
    train = w.chips["fold"].values != 0
    assert (
        weight.dtype == np.float32
        and weight.shape == w.of.shape
        and set(np.unique(weight)) == {0, 1}
    )
    gone = weight == 0
    assert gone[train & wrong].mean() > 0.85 and wrong[train & gone].mean() > 0.85
    card = found.record["cover"]
    assert card["clean"]["how"] == "drop" and card["clean"]["labels"] == 3 * 144
    assert card["without_weight_px"] == (gone & train).sum() and "transition" not in card
    assert not found.transitions
    again = training_weights(
        w.chips, [COVER], {"cover": LabelRule("drop")}, held_out_fold=0, seed=1
    )
    assert np.array_equal(again.weights["cover"], weight)


def test_noise_for_the_forward_loss() -> None:
    w = world(0.3)
    rule = LabelRule(forward=True)
    found = training_weights(w.chips, [COVER], {"cover": rule}, held_out_fold=1, seed=1)
    assert (found.weights["cover"][w.chips["fold"].values != 1] == 1).all()
    assert np.diag(found.transitions["cover"]) == pytest.approx(0.7, abs=0.1)
    assert found.transitions["cover"].sum(axis=1) == pytest.approx(1)
    # Cleaning leaves less noise to correct for.
    rule = LabelRule("drop", forward=True)
    cleaned = training_weights(w.chips, [COVER], {"cover": rule}, held_out_fold=1, seed=1)
    assert np.diag(cleaned.transitions["cover"]).min() > 0.95


def test_outdated_labels_lose_their_weight() -> None:
    w = world(0.0, changed=0.1)
    rule = LabelRule(tau_days=None, drop_changed=0.8)
    found = training_weights(
        w.chips, [COVER], {"cover": rule}, held_out_fold=3, seed=0, labels=w.labels,
        periods=PERIODS,
    )  # fmt: skip
    train = w.chips["fold"].values != 3
    gone, turned = (found.weights["cover"] == 0)[train], w.turned[w.of][train]
    assert gone[turned].mean() >= 0.8 and turned[gone].mean() >= 0.7
    time = found.record["cover"]["time"]
    assert time["labels"] == 3 * 144 and time["dropped"] == gone.sum() // CELL**2
    assert "clean" not in found.record["cover"]


def test_weights_multiply_and_pixels_can_be_kept_out() -> None:
    w = world()
    dims = w.chips["y_cover"].dims
    half = w.chips.assign(w_cover=(dims, np.full(w.of.shape, 0.5, np.float32)))
    keep = np.ones(w.of.shape, bool)
    keep[:, :30] = False
    found = training_weights(
        half, [COVER], {"cover": LabelRule("drop")}, held_out_fold=0, seed=1, keep=keep
    )
    assert set(np.unique(found.weights["cover"])) == {0, 0.5}
    assert (found.weights["cover"][~keep] == 0).all()


def test_a_single_training_fold_is_judged_block_by_block() -> None:
    w = world()
    two = w.chips.isel(n=slice(0, 2))
    found = training_weights(two, [COVER], {"cover": LabelRule("drop")}, held_out_fold=0, seed=1)
    gone, wrong = found.weights["cover"][1] == 0, w.wrong[w.of][1]
    assert gone[wrong].mean() > 0.75 and wrong[gone].mean() > 0.75


def test_a_class_of_one_place_is_not_judged() -> None:
    """Forests that never saw it would call all its labels wrong."""
    w = world(0.0)
    y = w.chips["y_cover"].values.copy()
    y[(w.chips["fold"].values != 1) & (y == 2)] = 255
    chips = w.chips.assign(y_cover=(w.chips["y_cover"].dims, y))
    found = training_weights(chips, [COVER], {"cover": LabelRule("drop")}, held_out_fold=0, seed=1)
    assert (found.weights["cover"][y == 2] == 1).all()


def test_tasks_without_a_rule_have_no_weights() -> None:
    found = training_weights(world().chips, [COVER], {}, held_out_fold=0, seed=0)
    assert not found.weights and not found.record and not found.transitions


def test_all_weights_zero_names_the_task_and_the_reason() -> None:
    w = world()
    known = {"held_out_fold": 0, "seed": 0, "periods": PERIODS}
    far = w.labels.assign(date="1990-01-01")
    rules = {"cover": LabelRule(tau_days=1.0)}
    with pytest.raises(LabelError, match=r"task cover, .*without fold 0: .*432 are far"):
        training_weights(w.chips, [COVER], rules, labels=far, **known)
    none = w.chips.assign(w_cover=(w.chips["y_cover"].dims, np.zeros(w.of.shape, np.float32)))
    with pytest.raises(LabelError, match=r"all 10800 labelled pixels are without weight"):
        training_weights(none, [COVER], {"cover": LabelRule("drop")}, **known)
    bare = w.chips.assign(y_cover=(w.chips["y_cover"].dims, np.full(w.of.shape, 255, np.uint8)))
    with pytest.raises(LabelError, match=r"task cover.*no labelled pixel"):
        training_weights(bare, [COVER], {"cover": LabelRule("drop")}, **known)
    with pytest.raises(LabelError, match="no labels to take dates from"):
        training_weights(w.chips, [COVER], rules, **known)
