"""Baseline: a random forest on single pixels, with the folds of the networks and with random ones.

Random folds test a forest on pixels whose neighbours it was trained on. The gap to the score on
spatial folds is what near labels know of each other (Ploton et al. 2020, Nature Communications 11,
4540), not skill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score

from terraloom.errors import FoldError
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.preprocess.groups import group_factor
from terraloom.train.held_out import HeldOut
from terraloom.train.windows import modalities_of

__all__ = [
    "SplitScores", "out_of_fold", "pixel_forest", "pixels_at_10m", "random_folds", "split_scores",
]  # fmt: skip

#: Stands for invalid values: outside of every band, so that trees can split it off.
_INVALID = -9999.0


def pixels_at_10m(chips: xr.Dataset, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """All bands of single pixels; coarser bands take the value of the pixel they fill.

    Args:
        chips: ``x_<modality>`` (N, C, h, w).
        index: (S,) positions in the flattened (N, h, w) of the 10 m grid.

    Returns:
        (S, all channels); invalid values are -9999.
    """
    n, h, w = chips["fold"].shape
    chip, row, col = np.unravel_index(index, (n, h, w))
    factors = {g: group_factor(g) for g in modalities_of(chips)}
    parts = [chips[f"x_{g}"].values[chip, :, row // f, col // f] for g, f in factors.items()]
    return np.nan_to_num(np.concatenate(parts, 1).astype(np.float32), nan=_INVALID)


def pixel_forest(
    chips: xr.Dataset,
    task: TaskSpec,
    *,
    seed: int,
    trees: int = 60,
    max_train: int = 20_000,
    jobs: int = 1,
    fold: npt.NDArray[np.uint8] | None = None,
    usable: Callable[[int], npt.NDArray[np.bool_]] | None = None,
) -> HeldOut:
    """Out-of-fold class probabilities of a per-pixel random forest.

    Args:
        chips: As for the networks: inputs, ``y_<task>``, ``fold``.
        task: A segmentation task.
        seed: Seed of forest and subsample.
        trees: Number of trees (count).
        max_train: Training pixels are a random subsample of at most this size (count).
        jobs: Processes (count); without influence on the result.
        fold: (N, h, w) folds to use instead of those of the chips, such as :func:`random_folds`;
            255: the pixel is left out.
        usable: From a held-out fold to the pixels that may train then, (N, h, w), such as
            :func:`terraloom.labels.buffer.buffered`; default: all of other folds.

    Returns:
        Predictions of all labelled pixels with a fold, in the order of ``index``; one "member".

    Raises:
        FoldError: Fewer than two folds have labels.
    """
    y = np.asarray(chips[f"y_{task.name}"].values).ravel()
    folds = np.asarray(chips["fold"].values if fold is None else fold).ravel()
    index = np.flatnonzero((y < len(task.classes)) & (folds != IGNORE))
    if len(np.unique(folds[index])) < 2:
        raise FoldError(f"{len(np.unique(folds[index]))} fold with labels",
                        where=f"task {task.name}", allowed="2 or more",
                        fix="use more folds or more labels")  # fmt: skip
    x = pixels_at_10m(chips, index)
    may = None if usable is None else (lambda f: usable(f).ravel()[index])
    p = out_of_fold(
        x, y[index], folds[index], len(task.classes), seed=seed, trees=trees,
        max_train=max_train, jobs=jobs, usable=may,
    )  # fmt: skip
    return HeldOut(index.astype(np.int64), folds[index].astype(np.uint8), y[index], p[None])


def out_of_fold(
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.integer],
    fold: npt.NDArray[np.integer],
    classes: int,
    *,
    seed: int,
    trees: int = 60,
    max_train: int | None = None,
    jobs: int = 1,
    usable: Callable[[int], npt.NDArray[np.bool_]] | None = None,
) -> npt.NDArray[np.float32]:
    """Class probabilities of samples by random forests that did not see their fold.

    Args:
        x: (S, F) features, finite.
        y: (S,) class index 0 .. classes - 1.
        fold: (S,) fold of each.
        classes: Number of classes, K.
        seed: Seed of forest and subsample.
        trees: Number of trees (count).
        max_train: Largest number of samples a forest is fitted to; default: no limit.
        jobs: Processes (count); without influence on the result.
        usable: From a held-out fold to the samples that may train then, (S,); default: all others.

    Returns:
        (S, K); 0 for classes that the other folds do not have.
    """
    p = np.zeros((len(y), classes), np.float32)
    for f in np.unique(fold):
        rng = np.random.default_rng([seed, int(f)])
        others = fold != f
        rows = np.flatnonzero(others if usable is None else others & usable(int(f)))
        if max_train is not None and len(rows) > max_train:
            rows = np.sort(rng.choice(rows, max_train, replace=False))
        forest = RandomForestClassifier(
            trees, min_samples_leaf=2, n_jobs=jobs, random_state=int(rng.integers(2**31))
        )
        forest.fit(x[rows], y[rows])
        held = fold == f
        p[np.ix_(held, forest.classes_.astype(int))] = forest.predict_proba(x[held])
    return p


def random_folds(chips: xr.Dataset, task: TaskSpec, *, seed: int) -> npt.NDArray[np.uint8]:
    """The folds of a task's labelled pixels, shuffled over these pixels: (N, h, w), 255 elsewhere.

    Folds keep their sizes; neighbours, and pixels of one polygon, come to lie in several.
    """
    y, fold = np.asarray(chips[f"y_{task.name}"].values), np.asarray(chips["fold"].values)
    out = np.full(fold.shape, IGNORE, np.uint8)
    has = (y < len(task.classes)) & (fold != IGNORE)
    out[has] = np.random.default_rng([seed, 1]).permutation(fold[has])
    return out


@dataclass(frozen=True)
class SplitScores:
    """Scores of one forest under random and under spatial folds of equal sizes.

    Attributes:
        random_accuracy: Overall accuracy of out-of-fold predictions, random folds, 0 .. 1.
        blocked_accuracy: The same, spatial folds.
        random_f1: Macro-F1, random folds.
        blocked_f1: The same, spatial folds.
        samples: Number of samples.
    """

    random_accuracy: float
    blocked_accuracy: float
    random_f1: float
    blocked_f1: float
    samples: int


def split_scores(
    table: npt.ArrayLike,
    target: npt.ArrayLike,
    fold: npt.ArrayLike,
    *,
    seed: int,
    trees: int = 200,
    jobs: int = 1,
) -> SplitScores:
    """Out-of-fold scores of a random forest on given folds and on the same folds shuffled.

    Args:
        table: (S, F) features of samples, such as series; values not finite become -9999.
        target: (S,) class of each, numbers or text.
        fold: (S,) spatial fold of each, two folds or more.
        seed: Seeds the forests and shuffles the folds.
        trees: Trees of a forest (count).
        jobs: Processes (count); without influence on the result.

    Returns:
        Scores; samples of a class that no other fold has count as wrong.

    Raises:
        FoldError: One fold only, or one class only.
    """
    x = np.nan_to_num(
        np.asarray(table, dtype=np.float32), nan=_INVALID, posinf=_INVALID, neginf=_INVALID
    )
    names, y = np.unique(np.asarray(target), return_inverse=True)
    spatial = np.asarray(fold, dtype=np.int64)
    for what, values in (("fold", spatial), ("class", y)):
        if len(np.unique(values)) < 2:
            raise FoldError(
                f"the pixel table has one {what} only", where="random against spatial folds",
                allowed="two or more", fix="more labels, or smaller blocks",
            )  # fmt: skip
    scores = []
    for folds in (np.random.default_rng([seed, 1]).permutation(spatial), spatial):
        out = out_of_fold(x, y, folds, len(names), seed=seed, trees=trees, jobs=jobs).argmax(1)
        f1 = f1_score(y, out, average="macro", labels=np.arange(len(names)), zero_division=0)
        scores.append((float(accuracy_score(y, out)), float(f1)))
    (a, f), (b, g) = scores
    return SplitScores(a, b, f, g, len(y))
