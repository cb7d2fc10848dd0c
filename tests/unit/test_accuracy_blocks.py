"""Blocks of accuracy.json that rasters and points make: model-assisted areas, values."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine

from terraloom.assess.assisted import assisted_block
from terraloom.assess.continuous import values_at, values_block
from terraloom.assess.samples import ReferenceSample, SampleKind, Strata
from terraloom.errors import DesignError

GRID = Affine(10, 0, 3e5, 0, -10, 5.8e6)


def _write(path: Path, data: np.ndarray, nodata: float) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", height=data.shape[1], width=data.shape[2], count=len(data),
        dtype=data.dtype, crs="EPSG:32633", transform=GRID, nodata=nodata,
    ) as dst:  # fmt: skip
        dst.write(data)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, ReferenceSample, gpd.GeoDataFrame, Strata]:
    """A map of two classes, its probabilities, heights, and 60 units."""
    rng = np.random.default_rng(1)
    p = rng.beta(0.6, 0.6, (50, 50))
    truth = np.where(rng.random((50, 50)) < p, 1, 2)
    mapped = np.where(p > 0.5, 1, 2).astype(np.uint8)
    mapped[0] = 0
    prob = np.stack([np.rint(p * 200), 200 - np.rint(p * 200)]).astype(np.uint8)
    height = rng.gamma(2, 5, (50, 50)).astype(np.float32)
    _write(tmp_path / "class_map.tif", mapped[None], 0)
    _write(tmp_path / "probabilities.tif", prob, 255)
    _write(tmp_path / "height.tif", height[None], -9999)
    _write(tmp_path / "true.tif", height[None] + 1, -9999)
    cells = np.concatenate([rng.choice(np.flatnonzero(mapped == c), 30, False) for c in (1, 2)])
    row, col = np.divmod(cells, 50)
    points = gpd.GeoDataFrame(
        {"row": row, "col": col},
        geometry=gpd.points_from_xy(3e5 + 10 * col + 5, 5.8e6 - 10 * row - 5), crs="EPSG:32633",
    )  # fmt: skip
    code = mapped[row, col].astype(int)
    sample = ReferenceSample(code, code, truth[row, col], SampleKind.STRATIFIED_RANDOM)
    strata = Strata.from_pixels({c: int((mapped == c).sum()) for c in (1, 2)}, 100.0)
    return tmp_path, sample, points, strata


def test_assisted_block_uses_what_probabilities_know_within_a_class(made) -> None:
    folder, sample, points, strata = made
    block = assisted_block(folder, sample, points, strata, strata, None, {1: "a", 2: "b"})
    assert block["gain"] > 1 and 0 < block["tuning"] <= 1
    assert block["effective_units"] == pytest.approx(60 * block["gain"])
    areas = [c["area_ha"] for c in block["classes"]]
    assert sum(areas) == pytest.approx(strata.total_area_m2 / 1e4)
    assert all(c["low_ha"] < c["area_ha"] < c["high_ha"] for c in block["classes"])


def test_assisted_block_says_why_it_cannot_be_made(made) -> None:
    folder, sample, points, strata = made
    names = {1: "a", 2: "b"}
    other = Strata.from_pixels({1: 2000, 2: 2000}, 100.0)
    block = assisted_block(folder, sample, points, strata, other, None, names)
    assert block == {"why_not": "the sampled domain is not the whole map"}
    with pytest.raises(DesignError, match="2 bands of probability, 3 classes"):
        assisted_block(folder, sample, points, strata, strata, None, {**names, 3: "c"})
    (folder / "probabilities.tif").unlink()
    block = assisted_block(folder, sample, points, strata, strata, None, names)
    assert block == {"why_not": "the map has no probabilities"}


def test_values_block_needs_a_value_at_every_unit(made) -> None:
    folder, sample, points, strata = made
    files = folder / "height.tif", values_at(folder / "true.tif", points)
    block = values_block(*files, sample, points, strata, None, "m")
    assert block["bias"]["value"] == pytest.approx(-1) and block["unit"] == "m"
    assert block["bias"]["se"] == pytest.approx(0, abs=1e-6) and block["n"] == 60
    with rasterio.open(files[0], "r+") as dst:
        data = dst.read()
        data[0, points["row"][0], points["col"][0]] = -9999
        dst.write(data)
    block = values_block(*files, sample, points, strata, None, "m")
    assert block == {"why_not": "1 of 60 units have no value", "unit": "m"}
