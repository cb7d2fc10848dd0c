"""Regions: exact cover, sums in one pass, files of any kind, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from odc.geo.geobox import GeoBox
from shapely.affinity import translate
from shapely.geometry import LineString, MultiPolygon, Point, Polygon, box

from support.fake_results import LEGEND, fake_campaign, fake_results
from terraloom.assess.region_file import read_regions
from terraloom.assess.regions import aggregate_regions
from terraloom.config.campaign import Regions
from terraloom.errors import AoiError, ConfigError, ModelError, StateError
from terraloom.io import geobox_of, read_json, write_json, write_raster
from terraloom.uncertainty import regions as module
from terraloom.uncertainty.covariance import ErrorCovariance, total_variance
from terraloom.uncertainty.coverage_fractions import Outline
from terraloom.uncertainty.regions import Block, sum_regions

GEOBOX = GeoBox((60, 80), Affine(10, 0, 500000, 0, -10, 5000600), "EPSG:32633")
RING = Polygon(
    [(500055, 5000133), (500610, 5000071), (500722, 5000410), (500300, 5000577)],
    [[(500300, 5000200), (500430, 5000220), (500333, 5000402)]],
)
TWO = [box(500010, 5000010, 500200, 5000200), box(500500, 5e6, 500705, 5000206)]
SHAPES = {
    "hole": RING,
    "parts": MultiPolygon(TWO),
    "on borders of pixels": box(500100, 5000100, 500300, 5000200),
    "inside one pixel": box(500103, 5000104, 500105, 5000109),
    "reaching out": box(499900, 5000450, 500155.5, 5000800),
    "all around": box(499000, 4999000, 502000, 5002000),
    "outside": box(510000, 5000000, 510100, 5000100),
}  # fmt: skip


def by_exactextract(shape: Polygon) -> np.ndarray:
    b = GEOBOX.boundingbox
    frame = gpd.GeoDataFrame(geometry=[shape], crs="EPSG:32633")
    raster = NumPyRasterSource(
        np.zeros(GEOBOX.shape), b.left, b.bottom, b.right, b.top, srs_wkt=frame.crs.to_wkt()
    )
    found = exact_extract(raster, frame, ["cell_id", "coverage"], output="pandas").iloc[0]
    share = np.zeros(GEOBOX.shape)
    share.ravel()[np.asarray(found["cell_id"], dtype=np.int64)] = found["coverage"]
    return share


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "outside"])
def test_cover_is_that_of_exactextract(name):
    shape = SHAPES[name]
    found = Outline.of(shape, GEOBOX.affine).cover(slice(0, 60), slice(0, 80))
    assert found == pytest.approx(by_exactextract(shape), abs=1e-6)
    extent = GEOBOX.extent.geom
    assert 100 * found.sum() == pytest.approx(shape.intersection(extent).area, rel=1e-10)


def test_cover_of_a_window_is_that_of_the_whole():
    outline = Outline.of(RING, GEOBOX.affine)
    whole = outline.cover(slice(0, 60), slice(0, 80))
    for rows, cols in ((slice(7, 30), slice(11, 64)), (slice(0, 5), slice(0, 5))):
        assert outline.cover(rows, cols) == pytest.approx(whole[rows, cols], abs=1e-12)


def raster(seed: int = 0) -> Block:
    rng = np.random.default_rng(seed)
    valid = (rng.random(GEOBOX.shape) > 0.2).astype(np.float32)
    values = rng.random((3, *GEOBOX.shape)).astype(np.float32) * valid
    codes = rng.integers(0, 4, GEOBOX.shape)
    return Block(values, valid, values * (1 - values), codes)


def cut(block: Block, window: tuple[slice, slice]) -> Block:
    rows, cols = window
    assert block.variance is not None and block.codes is not None
    return Block(block.values[:, rows, cols], block.valid[rows, cols],
                 block.variance[:, rows, cols], block.codes[rows, cols])  # fmt: skip


COVARIANCES = [
    ErrorCovariance(1.2, 0.3, "exponential", 170.0),
    None,
    ErrorCovariance(1.0, 0.0, "spherical", 90.0),
]


@pytest.mark.parametrize("size", [(1024, 2048), (16, 24)])
def test_sums_are_those_of_the_pixels(size, monkeypatch):
    """Overlapping regions, true areas, pixels without data; over any division into blocks."""
    monkeypatch.setattr(module, "_ROWS", size[0])
    monkeypatch.setattr(module, "_COLS", size[1])
    block = raster()
    area = 99 + np.random.default_rng(1).random(GEOBOX.shape)
    shapes = list(SHAPES.values())
    found = sum_regions(
        shapes, GEOBOX, lambda w: cut(block, w), layers=3, codes=4,
        areas=lambda rows, cols: area[rows, cols], covariances=COVARIANCES,
    )  # fmt: skip
    for shape, sums in zip(shapes, found, strict=True):
        cover = Outline.of(shape, GEOBOX.affine).cover(slice(0, 60), slice(0, 80))
        weight = cover * area * block.valid
        assert sums.inside == pytest.approx((cover * area).sum())
        assert sums.covered == pytest.approx(weight.sum())
        assert sums.pixels == pytest.approx((cover * block.valid).sum())
        assert sums.total == pytest.approx((weight * block.values).sum(axis=(1, 2)), rel=1e-6)
        counted = [weight[block.codes == c].sum() for c in range(4)]
        assert sums.counted == pytest.approx(counted)
        assert np.isnan(sums.variance[1])
        if not sums.inside:
            continue
        assert block.variance is not None
        w = np.sqrt(block.variance) * weight
        assert sums.independent == pytest.approx((w**2).sum(axis=(1, 2)), rel=1e-5)
        for q in (0, 2):
            c = COVARIANCES[q]
            assert c is not None and sums.block == 1
            exact = total_variance(w[q], float((w[q] ** 2).sum()), c, 10.0)
            assert sums.variance[q] == pytest.approx(exact, rel=1e-5)


def test_large_regions_take_blocks_where_memory_is_small(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 17)
    monkeypatch.setattr(module, "_COLS", 33)
    block, shapes = raster(), [SHAPES["all around"], RING, RING]
    cov = [ErrorCovariance(1.0, 0.2, "exponential", 900.0)] * 3

    def sums(grid_bytes: int) -> list[module.RegionSums]:
        return sum_regions(shapes, GEOBOX, lambda w: cut(block, w), layers=3, covariances=cov,
                           grid_bytes=grid_bytes)  # fmt: skip

    exact, coarse = sums(10**8), sums(3 * 3 * 4 * 200)
    for a, b in zip(exact, coarse, strict=True):
        assert a.block == 1 and b.block > 1
        assert b.variance == pytest.approx(a.variance, rel=0.03)
        assert b.total == pytest.approx(a.total)
    assert coarse[1].variance == pytest.approx(coarse[2].variance)


def write(path: Path, shapes: list, crs: str = "EPSG:32632", **columns: list) -> Path:
    gpd.GeoDataFrame(columns, geometry=shapes, crs=crs).to_file(path)
    return path


HERE = box(684500, 5332300, 685500, 5333100)


def settings(path: Path, **keys: object) -> Regions:
    return Regions.model_validate({"file": str(path), **keys})


def test_file_in_degrees_has_the_same_regions(tmp_path):
    one = Polygon(HERE.exterior, [box(684700, 5332500, 684900, 5332700).exterior])
    two = MultiPolygon([HERE, box(686000, 5332300, 686100, 5332400)])
    plain = write(tmp_path / "a.gpkg", [one, two], name=["a", "b"])
    frame = gpd.GeoDataFrame({"name": ["a", "b"]}, geometry=[one, two], crs="EPSG:32632")
    frame.to_crs(4326).to_file(tmp_path / "b.geojson")
    a = read_regions(settings(plain, name_column="name"), "EPSG:32632")
    b = read_regions(settings(tmp_path / "b.geojson", name_column="name"), "EPSG:32632")
    assert a.names == b.names == ("a", "b") and b.crs == "EPSG:4326"
    assert a.area_m2 == pytest.approx(b.area_m2, rel=1e-6)
    for p, q in zip(a.polygons, b.polygons, strict=True):
        assert p.symmetric_difference(q).area < 2e-3 * p.area
    # 185 km off the central meridian the scale of UTM is .9996 (1 + 185^2 / (2 x 6381^2)).
    scale = 0.9996 * (1 + 185**2 / (2 * 6381**2))
    assert a.area_m2[0] == pytest.approx(760_000 / scale**2, rel=1e-5)


def test_long_edges_stay_where_they_are(tmp_path):
    """A side of 200 km along a parallel is no straight line in UTM."""
    wide = box(10, 48, 12.7, 48.01)
    frame = gpd.GeoDataFrame({"name": ["wide"]}, geometry=[wide], crs="EPSG:4326")
    frame.to_file(tmp_path / "w.gpkg")
    found = read_regions(settings(tmp_path / "w.gpkg"), "EPSG:32632")
    assert found.names == ("1",)
    middle = gpd.GeoSeries([Point(11.35, 48.0005)], crs=4326).to_crs(32632)[0]
    assert found.polygons[0].contains(middle)
    corners = gpd.GeoSeries([wide], crs=4326).to_crs(32632)[0]
    assert not corners.contains(middle)


def test_crossing_outlines_are_repaired_and_named(tmp_path):
    bow = Polygon([(684000, 5332200), (685000, 5333200), (685000, 5332200), (684000, 5333200)])
    found = read_regions(settings(write(tmp_path / "a.gpkg", [HERE, bow])), "EPSG:32632")
    assert found.repaired == ("2",) and found.polygons[1].is_valid
    assert found.polygons[1].area == pytest.approx(500_000)


@pytest.mark.parametrize(
    ("shapes", "names", "says"),
    [
        ([HERE, HERE], ["a", "a"], r"not unique: a \(2 times\)"),
        ([HERE, HERE], ["a", None], "1 regions without a name: rows 2"),
        ([HERE, LineString([(684000, 5332000), (685000, 5333000)])], ["a", "b"],
         r"1 of 2 regions are no polygons: b \(LineString\)"),
        ([HERE, None], ["a", "b"], r"b \(nothing\)"),
        ([HERE, Polygon([(0, 0), (10, 10), (20, 20), (0, 0)])], ["a", "b"], "b has no area"),
    ],
)  # fmt: skip
def test_rows_that_are_no_regions_are_refused(shapes, names, says, tmp_path):
    path = write(tmp_path / "a.gpkg", shapes, name=names)
    with pytest.raises(AoiError, match=says):
        read_regions(settings(path, name_column="name"), "EPSG:32632")


def test_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(AoiError, match="no such file"):
        read_regions(settings(tmp_path / "none.gpkg"), "EPSG:32632")
    path = write(tmp_path / "a.gpkg", [HERE], name=["a"])
    with pytest.raises(AoiError, match="no column 'nam'"):
        read_regions(settings(path, name_column="nam"), "EPSG:32632")
    gpd.GeoDataFrame(geometry=[HERE], crs="EPSG:32632").to_file(path, layer="second")
    with pytest.raises(AoiError, match="2 layers with geometry: a, second"):
        read_regions(settings(path), "EPSG:32632")
    (tmp_path / "text.gpkg").write_text("no vector file")
    with pytest.raises(AoiError, match="not a readable vector file"):
        read_regions(settings(tmp_path / "text.gpkg"), "EPSG:32632")
    bare = tmp_path / "bare.shp"
    gpd.GeoDataFrame({"name": ["a"]}, geometry=[HERE], crs="EPSG:32632").to_file(bare)
    bare.with_suffix(".prj").unlink()
    with pytest.raises(AoiError, match="no coordinate system"):
        read_regions(settings(bare), "EPSG:32632")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a map and covariances; the water class has none."""
    monkeypatch.chdir(tmp_path)
    fake_results(Path("results"))
    legend = [f"{c},{n},{k}" for c, n, k in zip(LEGEND.codes, LEGEND.names, LEGEND.colors,
                                                strict=True)]  # fmt: skip
    Path("config/classes").mkdir(parents=True)
    Path("config/classes/five.csv").write_text("\n".join(["code,name,color", *legend]))
    record = ErrorCovariance(1.2, 0.3, "exponential", 300.0, 900).record() | {"borrowed": False}
    classes = dict.fromkeys(LEGEND.names, record) | {"Water": None}
    tasks = {"land-cover": {"classes": classes}, "canopy-height": {"value": record}}
    write_json("results/model/covariance.json", {"tasks": tasks})
    return tmp_path


def table() -> list[dict[str, str]]:
    with Path("results/map/regions.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_table_map_and_facts_of_regions(run):
    shapes = [HERE, translate(HERE, 500, 100), box(683500, 5333500, 684500, 5334500),
              translate(HERE, 1e5, 0)]  # fmt: skip
    write(Path("r.gpkg"), shapes, name=["a", "b", "edge", "away"])
    aggregate_regions(fake_campaign(regions={"file": "r.gpkg", "name_column": "name"}))
    rows, facts = table(), read_json("results/map/regions.json")
    assert len(rows) == 4 * (5 + 2) == len(facts["rows"])
    assert facts["outside"] == ["away"] and "edge" in facts["partly_mapped"]
    assert set(rows[0]) == set(facts["columns"]) == set(facts["rows"][0])
    for name in ("a", "b", "edge"):
        mine = [r for r in facts["rows"] if r["region"] == name and r["quantity"] == "area"]
        mapped = mine[0]["mapped_ha"]
        assert sum(r["value"] for r in mine) == pytest.approx(mapped)
        assert sum(r["map_value"] for r in mine) == pytest.approx(mapped)
        assert mine[4]["se"] is None and mine[4]["low"] is None  # no covariance, no interval
        for r in mine[:4]:
            assert 0 <= r["low"] <= r["independent_low"] <= r["value"]
            assert r["value"] <= r["independent_high"] <= r["high"] <= mapped
            assert r["se"] > 2 * r["independent_se"] and r["effective_px"] < r["pixels"] / 4
    edge = next(r for r in facts["rows"] if r["region"] == "edge")
    assert edge["mapped_pct"] < 25.5 and edge["area_ha"] == pytest.approx(100, rel=0.002)
    mean, total = (next(r for r in facts["rows"] if r["region"] == "a" and r["quantity"] == q)
                   for q in ("mean", "total"))  # fmt: skip
    assert total["value"] == pytest.approx(mean["value"] * mean["mapped_ha"])
    assert total["se"] == pytest.approx(mean["se"] * mean["mapped_ha"])
    assert all(r["value"] == "" for r in rows if r["region"] == "away")
    polygons = gpd.read_file("results/map/regions.gpkg").set_index("region")
    assert polygons.crs == geobox_of("results/map/class_map.tif").crs
    wide = polygons.loc["a", [f"{n} pct" for n in LEGEND.names]]
    assert float(wide.sum()) == pytest.approx(100)
    assert polygons.loc["a", "canopy-height mean"] == pytest.approx(mean["value"])


def test_the_same_regions_give_the_same_bytes(run):
    write(Path("r.gpkg"), [HERE])
    campaign = fake_campaign(regions={"file": "r.gpkg"})
    found = []
    for _ in range(2):
        aggregate_regions(campaign)
        found.append(
            [Path(f"results/map/regions.{e}").read_bytes() for e in ("csv", "json", "gpkg")]
        )
    assert found[0] == found[1]


def refused(campaign, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        aggregate_regions(campaign)
    assert not list(Path("results/map").glob("*regions*"))


def test_probabilities_that_do_not_sum_to_one_are_refused_with_number_and_place(run):
    import rasterio

    path = Path("results/map/probabilities.tif")
    with rasterio.open(path) as src:
        stored, scales = src.read(), src.scales
    row, col = np.argwhere((stored != 255).all(axis=0))[500]
    stored[0, row, col : col + 2] = (stored[0, row, col : col + 2].astype(int) + 90) % 200
    write_raster(path, stored, geobox_of(path), nodata=255, scales=scales)
    write(Path("r.gpkg"), [box(683000, 5331000, 689000, 5335000)])
    campaign = fake_campaign(regions={"file": "r.gpkg"})
    refused(campaign, StateError, rf"of 2 pixels do not sum to 1; the worst is row {row}, column")


def test_what_does_not_fit_together_is_refused(run):
    write(Path("away.gpkg"), [translate(HERE, 1e5, 0)])
    away = fake_campaign(regions={"file": "away.gpkg"})
    refused(away, AoiError, "none of the 1 regions has a mapped pixel")
    refused(fake_campaign(), ConfigError, "no `regions`")
    write(Path("r.gpkg"), [HERE])
    campaign = fake_campaign(regions={"file": "r.gpkg"})
    path = Path("results/map/probabilities.tif")
    write_raster(path, np.full((3, 192, 384), 67, np.uint8), geobox_of(path), nodata=255)
    refused(campaign, StateError, "3 bands")
    Path("results/model/covariance.json").unlink()
    refused(campaign, StateError, "missing")
    write_json("results/model/covariance.json", {"tasks": {}})
    refused(campaign, ModelError, "no covariance of land-cover")
