"""The minimum mapping unit: no small patch is left, no empty pixel is touched, no tile is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy.ndimage import gaussian_filter
from shapely import box
from skimage.measure import label

from terraloom.grid import CampaignGrid, row_areas_m2, window_of
from terraloom.predict.sieve import least_pixels, sieved_windows


def grid_of(shape: tuple[int, int], tile_px: int) -> CampaignGrid:
    geobox = GeoBox(shape, Affine(10, 0, 399840, 0, -10, 5800320), "EPSG:32633")
    b = geobox.boundingbox
    return CampaignGrid(geobox, tile_px, box(b.left, b.bottom, b.right, b.top))


def landscape(seed: int = 0, shape: tuple[int, int] = (150, 200)) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 0.8)
    codes = (1 + np.digitize(noise / noise.std(), [-0.6, 0.6])).astype(np.uint8)
    codes[30:60, 90:120] = 0
    codes[44, 104] = 3  # an island in what has no class
    codes[70:72, 10] = 0  # a gap smaller than the unit
    return codes


def sieved(
    codes: np.ndarray, folder: Path, *, tile_px: int = 48, least: int = 12, connectivity: int = 4
) -> tuple[np.ndarray, dict[str, Any]]:
    grid = grid_of(codes.shape, tile_px)

    def windows() -> Iterator[tuple[slice, slice, np.ndarray]]:
        for tile in grid.tiles():
            rows, cols = window_of(tile.geobox, grid.geobox)
            yield rows, cols, codes[rows, cols][None]

    folder.mkdir(exist_ok=True)
    out, facts = np.full(codes.shape, 99, np.uint8), {}
    for rows, cols, data in sieved_windows(
        windows(), grid, folder, least=least, connectivity=connectivity, facts=facts
    ):
        out[rows, cols] = data[0]
    return out, facts


def sizes(codes: np.ndarray, connectivity: int) -> np.ndarray:
    ids = label(codes, background=0, connectivity=1 if connectivity == 4 else 2)
    return np.bincount(ids.ravel())[1:]


@pytest.mark.parametrize("connectivity", [4, 8])
def test_no_patch_below_the_unit_is_left_but_islands(tmp_path: Path, connectivity: int) -> None:
    codes = landscape()
    assert (sizes(codes, connectivity) < 12).sum() > 30
    out, facts = sieved(codes, tmp_path, connectivity=connectivity)
    small = sizes(out, connectivity)
    assert (small < 12).sum() == 1 and out[44, 104] == 3, "the island has no neighbour"
    assert ((out == 0) == (codes == 0)).all(), "what has no class stays without"
    large = label(codes, background=0, connectivity=1 if connectivity == 4 else 2)
    keep = np.isin(large, np.flatnonzero(np.bincount(large.ravel()) >= 12)) & (codes > 0)
    assert (out == codes)[keep].all(), "large patches lose no pixel"
    assert facts["changed_px"] == (out != codes).sum() and facts["passes"] > 1
    assert facts["mapped_px"] == (codes > 0).sum()


def test_tiles_are_not_seen(tmp_path: Path) -> None:
    codes = landscape(1)
    made = [sieved(codes, tmp_path / str(t), tile_px=t)[0] for t in (48, 96, 240)]
    assert (made[0] == made[1]).all() and (made[0] == made[2]).all()


def test_the_largest_neighbour_may_be_far_larger_than_any_halo(tmp_path: Path) -> None:
    """Two neighbours of one small patch look alike nearby; only far away one is larger."""
    codes = np.full((24, 200), 1, np.uint8)
    codes[:, 100:] = 2
    codes[10:12, 99:101] = 3  # as much border with 1 as with 2
    codes[:, 150:] = 4
    left, _ = sieved(codes, tmp_path / "a")
    assert (left[10:12, 99:101] == 1).all()
    codes[:, 150:], codes[:, :60] = 2, 5
    right, _ = sieved(codes, tmp_path / "b")
    assert (right[10:12, 99:101] == 2).all()


def test_pixels_of_a_unit_follow_true_areas() -> None:
    grid = grid_of((150, 200), 48)
    pixel = row_areas_m2(grid.geobox).mean()
    assert least_pixels(grid, 0.5) == int(np.ceil(5000 / pixel))
    assert least_pixels(grid, 10 * pixel / 1e4) == 10
    assert least_pixels(grid, 1e-6) == 1
