"""Random forest on random and on blocked folds: equal pixels, and buffers are kept."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from shapely import box

from terraloom.assess.forest import forest_scores
from terraloom.grid import CampaignGrid, geobox_record
from terraloom.models.heads import TaskSpec
from terraloom.train.baseline import out_of_fold, pixel_forest, random_folds

COVER = TaskSpec("cover", "segmentation", ("crop", "forest"))
GRID = CampaignGrid.from_aoi(box(500_000, 5_788_000, 503_840, 5_791_840), "EPSG:32633")


def alike_chips(seed: int = 0, n: int = 6, size: int = 48) -> xr.Dataset:
    """Patches of 8 px with spectra of their own, and classes that only neighbours could tell."""
    rng = np.random.default_rng(seed)
    grid = (n, size // 8, size // 8)
    patch = np.kron(np.arange(np.prod(grid)).reshape(grid), np.ones((8, 8), int))
    x = rng.normal(size=(int(np.prod(grid)), 4))[patch] + rng.normal(0, 0.05, (n, size, size, 4))
    own = rng.integers(0, 2, int(np.prod(grid)))[patch].astype(np.uint8)
    own[rng.random(own.shape) < 0.5] = 255
    fold = np.kron(rng.integers(0, 3, grid), np.ones((8, 8), int)).astype(np.uint8)
    fold[0, :8, :8] = 255
    dims = ("n", "y_10", "x_10")
    return xr.Dataset(
        {
            "x_s2_10": (("n", "channel_s2_10", *dims[1:]), np.float32(x.transpose(0, 3, 1, 2))),
            "y_cover": (dims, own), "fold": (dims, fold),
        },
        {
            "row": ("n", np.arange(n) * size), "col": ("n", np.zeros(n, int)),
            "channel_s2_10": [f"p/{b}" for b in ("B02", "B03", "B04", "B08")],
        },
        geobox_record(GRID.geobox) | {"size_px": size},
    )  # fmt: skip


def test_random_folds_keep_pixels_and_sizes() -> None:
    chips = alike_chips()
    fold = random_folds(chips, COVER, seed=1)
    has = (chips["y_cover"].values != 255) & (chips["fold"].values != 255)
    assert np.array_equal(fold != 255, has)
    assert np.array_equal(np.bincount(fold[has]), np.bincount(chips["fold"].values[has]))
    assert (fold[has] != chips["fold"].values[has]).mean() > 0.5
    assert np.array_equal(fold, random_folds(chips, COVER, seed=1))
    assert not np.array_equal(fold, random_folds(chips, COVER, seed=2))


def test_a_random_split_flatters_on_equal_pixels() -> None:
    chips = alike_chips()
    blocked = forest_scores(chips, COVER, 1)
    random = forest_scores(chips, COVER, 1, random=True)
    assert random["pixels"] == blocked["pixels"]
    assert set(random) == set(blocked) == {"oa", "macro_f1", "pixels"}
    # Patches are known by their neighbours: nearly all on random folds, chance on blocked ones.
    assert random["oa"] > 0.95 and blocked["oa"] < 0.7


def test_the_forest_keeps_the_buffer() -> None:
    """Labels in the buffer of a fold have no influence on what is predicted in that fold."""
    chips = alike_chips()
    near = np.zeros(chips["fold"].shape, bool)
    near[:, ::3] = True

    def usable(fold: int) -> np.ndarray:
        return ~near

    a = pixel_forest(chips, COVER, seed=1, trees=5, usable=usable)
    changed = chips.copy(deep=True)
    y = changed["y_cover"].values
    y[near & (y != 255)] = 1 - y[near & (y != 255)]
    b = pixel_forest(changed, COVER, seed=1, trees=5, usable=usable)
    assert np.array_equal(a.p, b.p)
    assert not np.array_equal(a.p, pixel_forest(changed, COVER, seed=1, trees=5).p)
    plain, wide = forest_scores(chips, COVER, 1), forest_scores(chips, COVER, 1, buffer_m=30)
    assert wide["pixels"] == plain["pixels"] and wide["oa"] != plain["oa"]


def test_classes_that_only_one_fold_has_get_no_probability() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    fold = np.where(y == 2, 1, np.arange(60) % 2)
    p = out_of_fold(rng.normal(size=(60, 3)).astype(np.float32), y, fold, 3, seed=0, trees=5)
    assert np.all(p[fold == 1, 2] == 0) and p.sum(axis=1) == pytest.approx(1)
