"""Score of a random forest on the folds of the networks: what any network has to beat."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.assess.reliability import confusion_matrix, skill_from_matrix
from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, geobox_from_record
from terraloom.io import read_store, write_json
from terraloom.labels.buffer import buffered
from terraloom.labels.chips import cut_chips
from terraloom.legend import IGNORE_INDEX
from terraloom.models.heads import TaskSpec
from terraloom.preprocess.cube import build_tile
from terraloom.preprocess.scenes import gather_scenes
from terraloom.train.baseline import pixel_forest, random_folds
from terraloom.train.model_files import CHIPS, MODEL, task_specs

__all__ = ["fit_baseline", "forest_scores"]


def fit_baseline(campaign: Campaign, grid: CampaignGrid) -> None:
    """Per-pixel random forest on all bands, on the same folds; writes ``baseline.json``.

    Two scores: on the pixels that the networks are scored on, and on all labelled pixels, clouds
    and shadows included, which is what a map without masks would face. Beside them
    ``random_split``: the same forest on the same pixels, but with random folds. It is no score to
    be proud of: its gap to ``same_pixels`` is what a random split would have claimed too much.
    """
    task = next(t for t in task_specs(campaign) if t.name == campaign.land_cover.name)
    buffer_m = campaign.folds.buffer_m
    masked = read_store(CHIPS).load()
    plain = _unmasked_chips(campaign, grid)
    scores = {
        "same_pixels": forest_scores(masked, task, campaign.seed, buffer_m=buffer_m),
        "all_pixels": forest_scores(plain, task, campaign.seed, buffer_m=buffer_m),
        "random_split": forest_scores(masked, task, campaign.seed, random=True),
    }
    write_json(MODEL / "baseline.json", scores)


def _unmasked_chips(campaign: Campaign, grid: CampaignGrid) -> xr.Dataset:
    """The same chips from cubes in which nothing is masked."""
    folder = Path("work/unmasked")
    scenes = [replace(s, masks=()) for s in gather_scenes(campaign)]
    for tile in grid.tiles():
        build_tile(tile, grid, campaign, scenes, folder / f"{tile.name}.zip", "unmasked")
    for name in ("folds.gpkg", "labels.json"):
        shutil.copyfile(CHIPS.with_name(name), folder / name)
    cut_chips(campaign, grid, folder, folder)
    chips: xr.Dataset = read_store(folder / "chips.zip").load()
    return chips


def forest_scores(
    chips: xr.Dataset, task: TaskSpec, seed: int, *, buffer_m: float = 0, random: bool = False
) -> dict[str, float]:
    """Overall accuracy and macro-F1 of a forest on pixels of folds it did not see.

    Args:
        chips: Inputs, ``y_<task>``, ``fold``; with a buffer ``row``, ``col`` and the geobox, too.
        task: A segmentation task.
        seed: Seed of the forest, and of random folds.
        buffer_m: Labels closer than this to a held-out one do not train, metres.
        random: Shuffle the folds over the labelled pixels; without a buffer.

    Returns:
        ``oa`` and ``macro_f1`` (0-1), ``pixels``.
    """
    fold = random_folds(chips, task, seed=seed) if random else None
    usable = _apart(chips, buffer_m) if buffer_m > 0 and not random else None
    held = pixel_forest(chips, task, seed=seed, fold=fold, usable=usable)
    matrix = confusion_matrix(held.y, held.p[0].argmax(axis=1), range(len(task.classes)))
    skill = skill_from_matrix(matrix)
    return {"oa": float(skill.oa), "macro_f1": float(skill.macro_f1), "pixels": len(held.y)}


def _apart(chips: xr.Dataset, buffer_m: float) -> Callable[[int], npt.NDArray[np.bool_]]:
    """From a held-out fold to the pixels at least ``buffer_m`` from its labels, of any task."""
    targets = [chips[v].to_numpy() for v in chips.data_vars if str(v).startswith("y_")]
    labelled = np.any(
        [y != IGNORE_INDEX if y.dtype == np.uint8 else np.isfinite(y) for y in targets], axis=0
    )
    pixel_m = abs(float(geobox_from_record(chips.attrs).resolution.x))

    def usable(held_out_fold: int) -> npt.NDArray[np.bool_]:
        return buffered(
            chips["fold"].to_numpy(), labelled, chips["row"].to_numpy(), chips["col"].to_numpy(),
            pixel_m, held_out_fold, buffer_m,
        )  # fmt: skip

    return usable
