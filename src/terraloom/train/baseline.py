"""Baseline: a random forest on single pixels, with the folds of the networks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr
from sklearn.ensemble import RandomForestClassifier

from terraloom.errors import FoldError
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.preprocess.groups import group_factor
from terraloom.train.fit import HeldOut
from terraloom.train.windows import modalities_of

__all__ = ["pixel_forest", "pixels_at_10m"]

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
) -> HeldOut:
    """Out-of-fold class probabilities of a per-pixel random forest.

    Args:
        chips: As for the networks: inputs, ``y_<task>``, ``fold``.
        task: A segmentation task.
        seed: Seed of forest and subsample.
        trees: Number of trees (count).
        max_train: Training pixels are a random subsample of at most this size (count).
        jobs: Processes (count); without influence on the result.

    Returns:
        Predictions of all labelled pixels with a fold, in the order of ``index``; one "member".

    Raises:
        FoldError: Fewer than two folds have labels.
    """
    y = np.asarray(chips[f"y_{task.name}"].values).ravel()
    fold = np.asarray(chips["fold"].values).ravel()
    index = np.flatnonzero((y < len(task.classes)) & (fold != IGNORE))
    names = np.unique(fold[index])
    if len(names) < 2:
        raise FoldError(f"{len(names)} fold with labels", where=f"task {task.name}",
                        allowed="2 or more", fix="use more folds or more labels")  # fmt: skip
    x = pixels_at_10m(chips, index)
    p = np.zeros((1, len(index), len(task.classes)), np.float32)
    for f in names:
        rng = np.random.default_rng([seed, int(f)])
        rows = np.flatnonzero(fold[index] != f)
        if len(rows) > max_train:
            rows = np.sort(rng.choice(rows, max_train, replace=False))
        forest = RandomForestClassifier(
            trees, min_samples_leaf=2, n_jobs=jobs, random_state=int(rng.integers(2**31))
        )
        forest.fit(x[rows], y[index][rows])
        held = fold[index] == f
        p[0][np.ix_(held, forest.classes_.astype(int))] = forest.predict_proba(x[held])
    return HeldOut(index.astype(np.int64), fold[index].astype(np.uint8), y[index], p)
