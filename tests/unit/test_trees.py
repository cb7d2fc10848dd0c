from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from terraloom.errors import ModelError
from terraloom.preprocess.trees import read_trees

MODEL = """tree
version=v2
num_class=1
num_tree_per_iteration=1
label_index=0
max_feature_idx=1
objective=binary sigmoid:1
feature_names=a b

Tree=0
num_leaves=3
num_cat=0
split_feature=0 1
threshold=0.5 0.25
decision_type=2 2
left_child=1 -1
right_child=-2 -3
leaf_value=-1 2 0.5
shrinkage=0.1


Tree=1
num_leaves=2
num_cat=0
split_feature=1
threshold=0.1
decision_type=2
left_child=-1
right_child=-2
leaf_value=0.25 -0.25
shrinkage=0.1


end of trees

feature importances:
a=1
"""


def _file(folder: Path, text: str = MODEL) -> Path:
    path = folder / "model.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_trees_by_hand(tmp_path):
    trees = read_trees(_file(tmp_path))
    values = np.array([[0.5, 0.25], [0.5, 0.26], [0.51, 0.0], [0.0, 0.1]], dtype=np.float32)
    sums = [-1 - 0.25, 0.5 - 0.25, 2 + 0.25, -1 - 0.25]
    # The last value: 0.1 as float32 lies above 0.1 as float64, so it goes right.
    expected = [1 / (1 + math.exp(-s)) for s in sums]
    np.testing.assert_allclose(trees.probability(values), expected, rtol=1e-6)


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    trees = read_trees(_file(tmp_path))
    values = np.random.default_rng(0).random((1000, 2), dtype=np.float32)
    whole = trees.probability(values)
    monkeypatch.setattr("terraloom.preprocess.trees._BLOCK", 7)
    np.testing.assert_array_equal(trees.probability(values), whole)
    assert trees.probability(values[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("objective=binary sigmoid:1", "objective=regression", "objective regression"),
        ("decision_type=2 2", "decision_type=2 10", "missing values"),
        ("num_cat=0", "num_cat=1", "categories"),
        ("leaf_value=-1 2 0.5\n", "", "cannot be read"),
        ("threshold=0.5 0.25", "threshold=0.5 x", "cannot be read"),
    ],
)
def test_other_models_are_refused(tmp_path, old, new, message):
    with pytest.raises(ModelError, match=message):
        read_trees(_file(tmp_path, MODEL.replace(old, new)))


def test_files_that_are_no_models_and_wrong_features_are_refused(tmp_path):
    with pytest.raises(ModelError, match="0 trees"):
        read_trees(_file(tmp_path, "hello"))
    with pytest.raises(ModelError, match="features of shape"):
        read_trees(_file(tmp_path)).probability(np.zeros((3, 5), np.float32))


def test_the_model_of_s2cloudless_gives_the_probabilities_of_lightgbm():
    lightgbm = pytest.importorskip("lightgbm")
    spec = importlib.util.find_spec("s2cloudless")
    if spec is None:
        pytest.skip("the model file of s2cloudless is not installed")
    (file,) = Path(str(spec.submodule_search_locations[0])).glob("models/*.txt")
    rng = np.random.default_rng(1)
    values = rng.beta(1, 4, (3000, 10)).astype(np.float32)
    values[:1000] = np.round(values[:1000], 4)  # as stored numbers are, on the thresholds' grid
    expected = lightgbm.Booster(model_file=str(file)).predict(
        values.astype(np.float64), num_threads=1
    )
    np.testing.assert_allclose(read_trees(file).probability(values), expected, atol=1e-6)
