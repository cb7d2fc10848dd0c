"""Boosted trees read from LightGBM's text file and run tree by tree.

LightGBM sends each pixel through all trees, so that every step down a tree waits for memory: the
170 trees of s2cloudless take 10 MB. Here each tree sends a whole block of pixels down before the
next one starts, and its nodes stay in the processor's cache. The walk itself is the compiled one of
scikit-learn's decision trees. Comparisons are the same (a float32 value against a float64
threshold, equal goes left), so the probabilities are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import ModelError

__all__ = ["BoostedTrees", "read_trees"]

#: Pixels that go down one tree before the next: their features and sums stay in cache, too.
_BLOCK = 16_384
#: LightGBM's ``decision_type`` of a plain comparison: no category, no rule for missing values.
_NUMERICAL = 2


@dataclass(frozen=True)
class BoostedTrees:
    """Binary classifier: sigmoid of the sum of the values of K-feature trees.

    Attributes:
        features: Number of features, K.
        trees: Per tree scikit-learn's ``Tree`` and the value of each of its nodes.
    """

    features: int
    trees: list[tuple[Any, npt.NDArray[np.float64]]]

    def probability(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Probability of the positive class.

        Args:
            values: (N, K) float32 features, all finite.

        Returns:
            (N,) float32, 0-1.

        Raises:
            ModelError: The number of features is another one.
        """
        if values.ndim != 2 or values.shape[1] != self.features:
            raise ModelError(f"features of shape {values.shape}", allowed=f"(N, {self.features})")
        out = np.empty(len(values), dtype=np.float32)
        for start in range(0, len(values), _BLOCK):
            block = np.ascontiguousarray(values[start : start + _BLOCK], dtype=np.float32)
            total = np.zeros(len(block))
            for tree, leaf_value in self.trees:
                total += leaf_value[tree.apply(block)]
            out[start : start + _BLOCK] = 1.0 / (1.0 + np.exp(-total))
        return out


def read_trees(path: str | Path) -> BoostedTrees:
    """Read a binary classifier from LightGBM's text format.

    Raises:
        ModelError: The file is not such a model, or has categories, missing-value rules or
            another objective.
    """
    head, *parts = Path(path).read_text(encoding="utf-8").split("\nTree=")
    keys = _keys(head)
    if keys.get("objective") != "binary sigmoid:1" or keys.get("num_class") != "1" or not parts:
        raise ModelError(
            f"objective {keys.get('objective', '(none)')}, {len(parts)} trees",
            where=str(path),
            allowed="a LightGBM text model of objective binary sigmoid:1",
        )
    features = int(keys["max_feature_idx"]) + 1
    return BoostedTrees(features, [_tree_of(_keys(p), features, path) for p in parts])


def _keys(text: str) -> dict[str, str]:
    body = text.split("\nend of trees")[0]
    return dict(line.split("=", 1) for line in body.splitlines() if "=" in line)


def _tree_of(
    keys: dict[str, str], features: int, path: str | Path
) -> tuple[Any, npt.NDArray[np.float64]]:
    from sklearn.tree import _tree  # most methods of masks need no trees

    try:
        feature = np.array(keys["split_feature"].split(), dtype=np.int64)
        threshold = np.array(keys["threshold"].split(), dtype=np.float64)
        left = np.array(keys["left_child"].split(), dtype=np.int64)
        right = np.array(keys["right_child"].split(), dtype=np.int64)
        leaves = np.array(keys["leaf_value"].split(), dtype=np.float64)
        kinds = set(keys["decision_type"].split())
    except (KeyError, ValueError) as err:
        raise ModelError(f"a tree cannot be read ({err!r})", where=str(path)) from err
    if kinds - {str(_NUMERICAL)} or keys.get("num_cat", "0") != "0":
        raise ModelError(
            "a tree has categories or rules for missing values",
            where=str(path),
            allowed="plain comparisons",
        )
    inner, all_ = len(threshold), len(threshold) + len(leaves)
    # Leaf k, which LightGBM writes as ~k, becomes node inner + k.
    nodes = np.zeros(all_, dtype=_tree.NODE_DTYPE)
    nodes["left_child"], nodes["right_child"], nodes["feature"] = -1, -1, -2
    for side, child in (("left_child", left), ("right_child", right)):
        nodes[side][:inner] = np.where(child >= 0, child, inner + ~child)
    nodes["feature"][:inner] = feature
    nodes["threshold"][:inner] = threshold
    nodes["n_node_samples"] = 1
    nodes["weighted_n_node_samples"] = 1.0
    value = np.zeros(all_)
    value[inner:] = leaves
    tree = _tree.Tree(features, np.array([1], dtype=np.intp), 1)
    tree.__setstate__({
        "max_depth": inner, "node_count": all_, "nodes": nodes, "values": value.reshape(-1, 1, 1),
    })  # fmt: skip
    return tree, value
