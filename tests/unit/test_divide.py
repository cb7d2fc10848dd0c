"""From the campaign's keys to folds: regions of any file, and block widths found by themselves."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
from shapely import Point, box

from terraloom.config.labels import Folds
from terraloom.errors import FoldError
from terraloom.grid import CampaignGrid
from terraloom.labels.divide import block_size, divide_labels, read_regions

AREA = box(500_000, 5_788_000, 512_000, 5_800_000)
GRID = CampaignGrid.from_aoi(AREA, "EPSG:32633", tile_px=384)
NAMES = ["a", "b"]


def field_labels(range_m: float, n: int = 500, seed: int = 0) -> gpd.GeoDataFrame:
    """Points in 12 by 12 km whose class is the sign of a field with a spherical variogram."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 12_000, (n, 2))
    u = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) / range_m
    near = np.where(u < 1, 1 - 1.5 * u + 0.5 * u**3, 0)
    z = np.linalg.cholesky(near + 1e-6 * np.eye(n)) @ rng.normal(size=n)
    stratum = (z > 0).astype(int)
    return gpd.GeoDataFrame(
        {
            "label_id": np.arange(n), "task": "cover", "stratum": stratum,
            "class": np.array(NAMES)[stratum], "value": stratum.astype(float),
            "date": [f"{2018 + k % 3}-07-01" for k in range(n)],
        },
        geometry=[Point(500_000 + x, 5_788_000 + y) for x, y in xy], crs="EPSG:32633",
    )  # fmt: skip


def divide(labels: gpd.GeoDataFrame, **keys: object) -> tuple[gpd.GeoDataFrame, dict]:
    out, fold_map, record = divide_labels(labels, Folds(**keys), GRID, seed=1, names=NAMES)
    assert record["fold_of_block"] == list(fold_map.fold_of_block)
    return out, record


def test_width_in_metres_is_kept() -> None:
    out, record = divide(field_labels(1000), block_m=1200, buffer_m=50)
    assert record["block_px"] == 120 and record["method"] == "blocks"
    assert record["buffer_m"] == 50 and "range_m" not in record
    assert record["labelled_blocks"] == out["block"].nunique()


def test_auto_follows_the_range_of_the_classes() -> None:
    """The sign of a field has the field's range, though a steeper rise: within 40 %, in order."""
    widths = []
    for range_m in (600, 1800):
        found = [block_size(field_labels(range_m, seed=s), GRID.geobox, seed=1) for s in range(5)]
        assert np.median([f.range_m for f in found]) == pytest.approx(range_m, rel=0.4)
        assert all(f.block_px % 6 == 0 and f.block_px * 10 >= f.range_m for f in found)
        widths.append(np.median([f.block_px for f in found]))
    assert widths[1] > 1.8 * widths[0]
    _, record = divide(field_labels(600), block_m="auto")
    assert record["block_m"] >= record["range_m"] > 0
    assert "correlated over" in record["block_m_reason"]
    assert len(record["variogram"]["lag_m"]) == len(record["variogram"]["gamma"])


def test_auto_takes_the_width_down_until_folds_can_be_dealt() -> None:
    labels = field_labels(9000)
    out, record = divide(labels, block_m="auto", count=4)
    wanted = block_size(labels, GRID.geobox, seed=1).block_px
    assert record["block_px"] < wanted
    assert out["block"].nunique() >= 12
    assert "are too large" in record["block_m_reason"]


def test_auto_without_structure_takes_the_smallest_width() -> None:
    labels = field_labels(600)
    few = labels.iloc[:20]
    assert block_size(few, GRID.geobox, seed=1).block_px == 12
    assert "smallest width" in block_size(few, GRID.geobox, seed=1).reason
    values = labels.assign(**{"class": None, "value": np.nan})
    assert block_size(values, GRID.geobox, seed=1).range_m is None


def test_auto_takes_the_task_with_the_largest_range() -> None:
    near, far = field_labels(600), field_labels(2500, seed=1)
    rng = np.random.default_rng(0)
    heights = far.assign(task="height", value=far["stratum"] * 3 + rng.normal(0, 0.1, len(far)))
    heights["class"] = None
    both = gpd.GeoDataFrame(
        {c: [*near[c], *heights[c]] for c in near.columns}, geometry="geometry", crs=near.crs
    )
    found = block_size(both, GRID.geobox, seed=1)
    assert "task height" in found.reason
    assert found.range_m > block_size(near, GRID.geobox, seed=1).range_m


def regions_file(folder: Path, name: str = "regions.geojson", crs: str = "EPSG:4326") -> str:
    shapes = [box(500_000 + 3000 * k, 5_788_000, 503_000 + 3000 * k, 5_800_000) for k in range(4)]
    # A row without a shape and one that is no polygon are no regions.
    frame = gpd.GeoDataFrame(
        geometry=[None, *shapes, Point(505_000, 5_790_000)], crs="EPSG:32633"
    ).to_crs(crs)  # fmt: skip
    frame.to_file(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3035"])
def test_regions_of_a_file_in_any_coordinate_system(tmp_path: Path, crs: str) -> None:
    file = regions_file(tmp_path, "regions.gpkg", crs)
    assert len(read_regions(file, GRID)) == 4
    labels = field_labels(600)
    inside = labels[labels.geometry.x.between(500_100, 511_900)]
    inside = inside[inside.geometry.y.between(5_788_100, 5_799_900)]
    out, record = divide(inside, method="regions", regions=file, count=2)
    strip = ((inside.geometry.x - 500_000) // 3000).to_numpy()
    near_border = np.abs((inside.geometry.x - 500_000) % 3000 - 1500).to_numpy() > 1400
    assert np.array_equal(out["region"].to_numpy()[~near_border], strip[~near_border])
    assert record["labelled_regions"] == 4 and record["method"] == "regions"
    assert (out.groupby("region")["fold"].nunique() == 1).all()


def test_regions_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FoldError, match="no such file"):
        read_regions(str(tmp_path / "none.gpkg"), GRID)
    (tmp_path / "text.gpkg").write_text("no vectors")
    with pytest.raises(FoldError, match="not a readable vector file"):
        read_regions(str(tmp_path / "text.gpkg"), GRID)
    points = gpd.GeoDataFrame(geometry=[Point(500_000, 5_790_000)], crs="EPSG:32633")
    points.to_file(tmp_path / "points.gpkg")
    with pytest.raises(FoldError, match="no polygon"):
        read_regions(str(tmp_path / "points.gpkg"), GRID)


@pytest.mark.parametrize("block_m", [1280, "auto"])
def test_years_and_distances(block_m: object) -> None:
    labels = field_labels(600)
    out, record = divide(labels, method="years", count=3, block_m=block_m)
    assert (out.groupby("date")["fold"].nunique() == 1).all()
    assert set(record["fold_of_block"]) == {255}
    matched, record = divide(labels, method="knndm", count=3, block_m=block_m)
    assert (matched.groupby("block")["fold"].nunique() == 1).all()
    assert set(matched["fold"]) == {0, 1, 2}
