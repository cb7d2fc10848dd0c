"""Wrong labels are found by held-out predictions, listed with their place, and left out."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
from shapely.geometry import Point, box
from sklearn.linear_model import LogisticRegression

from terraloom.errors import FoldError, LabelError
from terraloom.labels.clean import (
    SUSPECTS_LAYER,
    held_out_probabilities,
    label_weights,
    pixel_weights,
    review_counts,
    review_in_rounds,
    review_labels,
    transition,
    write_review,
)
from terraloom.labels.corrupt import flip, symmetric_transition
from terraloom.labels.noise import confident_joint

#: A published example: probability of class 0, and labels. The third label meets the threshold .7
#: of class 1 exactly, which does not survive rounding: it is a trifle above here.
P0 = np.array([0.9, 0.8, 0.3 - 1e-9, 0.2, 0.1, 0.6])
EXAMPLE = np.column_stack([P0, 1 - P0]), np.array([0, 0, 0, 1, 1, 1])
NAMES = ("water", "forest", "field")


def logistic(x: np.ndarray, y: np.ndarray, classes: int = 3):
    """All classes get a column, also those that the samples lack."""
    model = LogisticRegression(max_iter=300).fit(x, y)

    def predict(new: np.ndarray) -> np.ndarray:
        p = np.zeros((len(new), classes))
        p[:, model.classes_.astype(int)] = model.predict_proba(new)
        return p

    return predict


def blobs(n: int, seed: int = 0, sd: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, n)
    centre = np.array([[0.0, 0.0], [3.0, 0.0], [1.5, 2.6]])
    return centre[true] + rng.normal(0, sd, (n, 2)), true


def polygons(rate: float, labels: int = 240, pixels: int = 12, seed: int = 0):
    """Labels of many pixels each, wrong as a whole; four regions that differ a little."""
    rng = np.random.default_rng(seed)
    x, true = blobs(labels, seed)
    fold = np.arange(labels) % 4
    given = flip(true, symmetric_transition(3, rate), rng)
    of = np.repeat(np.arange(labels), pixels)
    px = x[of] + 0.2 * fold[of, None] + rng.normal(0, 0.5, (len(of), 2))
    return px, given[of], fold[of], of, given != true, true


def test_the_published_example() -> None:
    """Thresholds .6667 and .7; joint [[2, 1], [0, 2]]; index 2 is flagged."""
    review = review_labels(*EXAMPLE)
    assert np.flatnonzero(review.flags).tolist() == [2]
    assert review.likely.tolist() == [0, 0, 1, 1, 1, 1]
    assert review.given.tolist() == EXAMPLE[1].tolist() and review.pixels.tolist() == [1] * 6
    # Margins: (1 + p_other - p_given) / 2.
    assert review.score == pytest.approx([0.1, 0.2, 0.7, 0.2, 0.1, 0.6])
    assert confident_joint(*EXAMPLE, calibrated=False).tolist() == [[2, 1], [0, 2]]
    joint = confident_joint(*EXAMPLE)
    assert joint.tolist() == [[2, 1], [0, 3]]
    assert review.noise == pytest.approx(np.array([[1, 0], [1 / 4, 3 / 4]]))


def test_the_joint_keeps_the_number_of_labels_and_bears_missing_classes() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.dirichlet(np.ones(4), 300), rng.integers(0, 3, 300)
    assert confident_joint(p, y).sum(axis=1) == pytest.approx(np.bincount(y, minlength=4))
    review = review_labels(p, y)
    assert review.noise[3].tolist() == [0, 0, 0, 1]
    assert review.noise.sum(axis=1) == pytest.approx(1)


def test_noise_of_three_blobs_is_recovered() -> None:
    """20,000 points, labels wrong by known rates, five folds: rates within .045 (published)."""
    t = np.array([[0.8, 0.15, 0.05], [0.1, 0.85, 0.05], [0.0, 0.2, 0.8]])
    x, true = blobs(20_000, 1, sd=0.7)
    y = flip(true, t, np.random.default_rng(2))
    p = held_out_probabilities(x, y, np.arange(len(y)) % 5, logistic)
    review = review_labels(p, y)
    wrong = y != true
    assert wrong.mean() == pytest.approx(0.185, abs=0.005)
    assert np.abs(review.noise - t).max() < 0.045
    assert wrong[review.flags].mean() > 0.88 and review.flags[wrong].mean() > 0.7
    assert (review.likely == true)[review.flags & wrong].mean() > 0.95


def test_probabilities_are_held_out() -> None:
    """A model that knows its samples by heart knows nothing about the fold that it predicts."""
    seen: list[set[int]] = []

    def by_heart(x: np.ndarray, y: np.ndarray):
        known = {int(v) for v in x[:, 0]}
        seen.append(known)

        def predict(new: np.ndarray) -> np.ndarray:
            hit = np.array([int(v) in known for v in new[:, 0]])
            return np.column_stack([hit, ~hit]).astype(float)

        return predict

    x, fold = np.arange(12.0)[:, None], np.arange(12) // 3
    p = held_out_probabilities(x, np.zeros(12, int), fold, by_heart)
    assert (p[:, 0] == 0).all() and [len(s) for s in seen] == [9] * 4
    use = np.arange(12) != 11
    seen.clear()
    assert held_out_probabilities(x, np.zeros(12, int), fold, by_heart, use=use).shape == (12, 2)
    assert all(11 not in s for s in seen)


@pytest.mark.parametrize(
    ("rate", "recall", "precision"), [(0.1, 0.5, 0.75), (0.2, 0.75, 0.85), (0.4, 0.9, 0.9)]
)
def test_polygons_that_are_wrong_are_found(rate: float, recall: float, precision: float) -> None:
    """Where few are wrong the thresholds are high, and more of the wrong ones stay below them."""
    got = []
    for seed in range(4):
        x, y, fold, of, wrong, true = polygons(rate, seed=seed)
        review = review_in_rounds(x, y, fold, logistic, of)
        assert review.ids.tolist() == list(range(240)) and (review.pixels == 12).all()
        assert (review.likely == true)[review.flags & wrong].mean() > 0.85
        assert review.score[wrong].mean() > 0.6 > 0.4 > review.score[~wrong].mean()
        got.append((review.flags[wrong].mean(), wrong[review.flags].mean()))
    assert (np.mean(got, axis=0) > (recall, precision)).all(), got


def test_a_second_round_makes_fewer_false_alarms() -> None:
    """Labels of few pixels and much noise: the first models are poor judges."""
    precision = []
    for rounds in (1, 2):
        hits = []
        for seed in range(4):
            x, y, fold, of, wrong, _ = polygons(0.45, labels=120, pixels=4, seed=seed)
            review = review_in_rounds(x, y, fold, logistic, of, rounds=rounds)
            hits.append(wrong[review.flags].mean())
        precision.append(np.mean(hits))
    assert precision[1] > precision[0]


def test_order_of_pixels_and_pixels_without_a_label_do_not_matter() -> None:
    x, y, fold, of, _, _ = polygons(0.2, labels=60)
    p = held_out_probabilities(x, y, fold, logistic)
    plain = review_labels(p, y, of)
    order = np.random.default_rng(0).permutation(len(y))
    more = np.concatenate([order, order[:5]])
    extra_of, extra_p = of[more].copy(), p[more].copy()
    extra_of[-5:], extra_p[-5:] = -1, np.nan
    again = review_labels(extra_p, y[more], extra_of)
    assert np.array_equal(again.ids, plain.ids) and np.array_equal(again.flags, plain.flags)
    assert again.score == pytest.approx(plain.score)


def test_labels_of_the_test_fold_are_neither_judged_nor_heard() -> None:
    x, y, fold, of, _, _ = polygons(0.2)
    p = held_out_probabilities(x, y, fold, logistic)
    review = review_labels(p, y, of, fold=fold, held_out_fold=2)
    assert not set(review.ids) & set(of[fold == 2]) and len(review.ids) == 180
    rest = fold != 2
    alone = review_labels(p[rest], y[rest], of[rest])
    spoiled = np.where(fold == 2, (y + 1) % 3, y)
    same = review_labels(p, spoiled, of, fold=fold, held_out_fold=2)
    for other in (alone, same):
        assert np.array_equal(other.flags, review.flags)
        assert np.array_equal(other.noise, review.noise)


def test_weights() -> None:
    review = review_labels(*EXAMPLE)
    assert label_weights(review, least=0).tolist() == [1, 1, 0, 1, 1, 1]
    assert label_weights(review, "weigh", least=0) == pytest.approx([1, 1, 0.3 / 0.7, 1, 1, 1])
    with pytest.raises(LabelError, match="drop, weigh"):
        label_weights(review, "relabel")  # type: ignore[arg-type]


def test_a_class_is_never_cleaned_away() -> None:
    """All labels of class 2 look like class 1; the least doubtful ones stay."""
    p = np.tile([0.8, 0.1, 0.1], (6, 1))
    p = np.concatenate([p, np.tile([0.1, 0.8, 0.1], (6, 1)),
                        [[0.1, 0.9 - v, v] for v in (0.05, 0.1, 0.15, 0.2)]])  # fmt: skip
    y = np.repeat([0, 1, 2], [6, 6, 4])
    review = review_labels(p, y)
    # A model that cannot see class 2 must not be its only judge.
    assert review.flags[12:14].all()
    weight = label_weights(review, least=3)
    assert (weight[12:] > 0).sum() == 3 and weight[12] == 0
    assert (label_weights(review, "weigh", least=3)[13:] == 1).all()
    assert (label_weights(review, least=9)[12:] == 1).all()


def test_weights_reach_the_pixels() -> None:
    """Labels 10-16 are judged; label 12 says 0 and looks like 1; label 17 was not judged."""
    ids = np.arange(10, 17)
    y = ids % 2
    p = np.where(y[:, None] == [0, 1], 0.9, 0.1)
    p[2] = [0.1, 0.9]
    review = review_labels(p, y, ids)
    of = np.array([[-1, 10, 12], [12, 16, 17]])
    weights = label_weights(review, least=1)
    w = pixel_weights(review, weights, of)
    assert w.dtype == np.float32 and w.tolist() == [[1, 1, 0], [0, 1, 1]]
    softer = label_weights(review, "weigh", least=1)
    assert pixel_weights(review, softer, of)[0, 2] == pytest.approx(1 / 9)
    assert review_counts(review, weights) == {
        "labels": 7, "suspects": 1, "suspects_pct": pytest.approx(14.286, abs=1e-3), "dropped": 1,
        "down_weighted": 0, "kept_for_their_class": 0,
    }  # fmt: skip
    assert review_counts(review, softer)["down_weighted"] == 1


def test_cleaning_takes_noise_away() -> None:
    """The matrix for the loss is that of the labels trained on."""
    x, y, fold, of, _, _ = polygons(0.3)
    review = review_in_rounds(x, y, fold, logistic, of)
    before, after = transition(review), transition(review, label_weights(review))
    assert before.sum(axis=1) == pytest.approx(1) and after.sum(axis=1) == pytest.approx(1)
    assert np.diag(before) == pytest.approx(0.7, abs=0.12) and np.diag(after).min() > 0.95


def test_a_label_that_is_not_judged_still_teaches() -> None:
    """Labels without an id have no part in the verdict, but models learn from them every round."""
    x, y, fold, of, _, _ = polygons(0.2, labels=60)
    seen: list[int] = []

    def counting(fx: np.ndarray, fy: np.ndarray):
        seen.append(int((fx[:, 0] > 1e8).sum()))
        return logistic(np.minimum(fx, 10), fy)

    free = of >= 50
    marked = np.where(free[:, None], 1e9, x)
    review = review_in_rounds(marked, y, fold, counting, np.where(free, -1, of))
    assert review.ids.max() == 49 and len(seen) == 12
    assert seen[:4] == seen[4:8] == seen[8:] and min(seen) > 0


def places(count: int) -> gpd.GeoDataFrame:
    shapes = [box(i, 0, i + 1, 1) if i % 2 else Point(i, 0) for i in range(count)]
    return gpd.GeoDataFrame({"label_id": np.arange(count)}, geometry=shapes, crs="EPSG:32633")


def test_the_review_is_a_geopackage_with_the_surest_first(tmp_path: Path) -> None:
    x, y, fold, of, _, _ = polygons(0.2)
    review = review_in_rounds(x, y, fold, logistic, of)
    labels = places(240).sample(frac=1, random_state=1)  # order of the file does not matter
    path = tmp_path / "suspects.gpkg"
    count = write_review(path, review, labels, NAMES)
    assert count == review.flags.sum() > 20
    assert pyogrio.list_layers(path)[:, 0].tolist() == [SUSPECTS_LAYER]
    found = gpd.read_file(path, layer=SUSPECTS_LAYER)
    assert list(found.columns) == ["label_id", "class", "likely", "score", "p_class",
                                   "p_likely", "pixels", "geometry"]  # fmt: skip
    assert found.crs == labels.crs and found["score"].is_monotonic_decreasing
    assert sorted(found["label_id"]) == np.flatnonzero(review.flags).tolist()
    place = labels.set_index("label_id").geometry
    for row in found.itertuples():
        i = int(row.label_id)
        assert row.geometry.equals(place[i]) and row.pixels == 12
        assert (row[2], row.likely) == (NAMES[review.given[i]], NAMES[review.likely[i]])
        assert row.p_likely == pytest.approx(review.mean[i, review.likely[i]], abs=1e-4)
    again = tmp_path / "again.gpkg"
    write_review(again, review, labels, NAMES)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.gpkg", "suspects.gpkg"]


def test_no_suspect_is_an_empty_layer(tmp_path: Path) -> None:
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    path = tmp_path / "suspects.gpkg"
    assert write_review(path, review_labels(p, np.array([0, 1])), places(2), NAMES[:2]) == 0
    found = gpd.read_file(path, layer=SUSPECTS_LAYER)
    assert len(found) == 0 and "likely" in found and found.crs.to_epsg() == 32633


def test_a_review_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    review, path = review_labels(*EXAMPLE), tmp_path / "suspects.gpkg"
    with pytest.raises(LabelError, match="1 suspects without a label"):
        write_review(path, review, places(2), NAMES[:2])
    with pytest.raises(LabelError, match="3 class names"):
        write_review(path, review, places(6), NAMES)
    twice = places(6).assign(label_id=[0, 1, 2, 2, 4, 5])
    with pytest.raises(LabelError, match="1 ids twice"):
        write_review(path, review, twice, NAMES[:2])
    broken = places(6).rename_geometry("shape").assign(label_id=np.arange(6))
    assert write_review(path, review, broken, NAMES[:2]) == 1
    before = path.read_bytes()
    with pytest.raises(LabelError):
        write_review(path, review, places(2), NAMES[:2])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_bad_input_is_refused() -> None:
    p, y = EXAMPLE
    with pytest.raises(LabelError, match=r"allowed: \(S, K\)"):
        review_labels(p[:, 0], y)
    with pytest.raises(LabelError, match="label ids"):
        review_labels(p, y, np.arange(5))
    with pytest.raises(LabelError, match="different classes"):
        review_labels(p, y, np.zeros(6))
    with pytest.raises(LabelError, match="classes 0-7"):
        review_labels(p, np.where(y == 1, 7, 0))
    with pytest.raises(LabelError, match="not finite"):
        review_labels(np.where(p == 0.9, np.nan, p), y)
    with pytest.raises(LabelError, match="no label to judge"):
        review_labels(p, np.full(6, 255))
    with pytest.raises(LabelError, match="both or none"):
        review_labels(p, y, held_out_fold=1)
    with pytest.raises(LabelError, match="0 rounds"):
        review_in_rounds(p, y, y, logistic, rounds=0)
    with pytest.raises(FoldError, match="1 fold"):
        held_out_probabilities(p, y, np.zeros(6), logistic)
    with pytest.raises(FoldError, match="outside fold 0"):
        held_out_probabilities(p, y, y, logistic, use=y == 0)
