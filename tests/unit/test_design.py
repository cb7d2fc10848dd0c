"""Drawing samples from class rasters: exactness, allocation, true areas, the design record."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from pyproj import CRS, Geod, Transformer
from scipy.stats import chi2
from shapely.geometry import box

from terraloom.assess.allocation import (
    Allocation,
    allocate,
    allocation_table,
    anticipated_se,
    sample_size,
    size_for,
)
from terraloom.assess.areas import PixelAreas
from terraloom.assess.design import DrawnSample, SampleDesign, reference_sample
from terraloom.assess.draw import (
    cluster_sample,
    simple_sample,
    stratified_sample,
    survey_map,
    systematic_sample,
)
from terraloom.assess.estimators import estimate_accuracy
from terraloom.assess.samples import ReferenceSample, SampleKind
from terraloom.assess.strips import WHOLE, Polygons
from terraloom.errors import DesignError, GridError
from terraloom.io import write_raster

# Olofsson et al. (2014): shares of the four map classes and conjectured user's accuracies.
W = [0.02, 0.015, 0.32, 0.645]
UA = [0.70, 0.60, 0.90, 0.95]
UTM = Affine(10, 0, 600_000, 0, -10, 2_000_000)


def _class_map(h: int = 60, w: int = 80) -> np.ndarray:
    """Columns of classes 1, 2, 3 of very different size, with a nodata corner."""
    codes = np.full((h, w), 1, np.uint8)
    codes[:, w // 2 :] = 2
    codes[5:10, 3:9] = 3
    codes[-10:, -20:] = 0
    return codes


def _write(path: Path, codes: np.ndarray, crs: str = "EPSG:32615") -> Path:
    affine = UTM if crs != "EPSG:4326" else Affine(0.01, 0, 10, 0, -0.01, 60)
    write_raster(path, codes, GeoBox(codes.shape, affine, crs), nodata=0)
    return path


@pytest.fixture(scope="module")
def map_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("map") / "map.tif", _class_map())


def _draw(path: Path, n: int, *, seed: int, **options: Any) -> DrawnSample:
    """A stratified draw from a file."""
    reading = ("classes", "strata", "invalid_codes", "strip_px")
    domain = survey_map(path, **{k: v for k, v in options.items() if k in reading})
    rest = {k: v for k, v in options.items() if k not in reading}
    return stratified_sample(domain, n, seed=seed, **rest)


# --- sample size and allocation ---------------------------------------------------------------


def test_sample_size_of_olofsson_2014() -> None:
    assert sample_size(W, UA, 0.01) == 641
    assert sample_size(np.array(W) * 7, UA, 0.01) == 641
    assert sample_size([1.0], 0.5, 0.05) == 100  # an exact integer is not rounded up
    with pytest.raises(DesignError, match="target standard error"):
        sample_size(W, UA, 0)
    with pytest.raises(DesignError, match="expected user's accuracies"):
        sample_size(W, [0.7, 0.6, 1.9, 0.5], 0.01)


@pytest.mark.parametrize(
    ("units", "se"),
    [
        ((13, 10, 205, 413), 0.0102),
        ((50, 50, 183, 358), 0.0104),
        ((75, 75, 165, 326), 0.0109),
        ((100, 100, 149, 292), 0.0114),
        ((160, 160, 160, 160), 0.0135),
    ],
)
def test_anticipated_se_of_published_allocations(units: tuple[int, ...], se: float) -> None:
    assert anticipated_se(W, UA, units) == pytest.approx(se, abs=5e-5)


def test_allocations_of_olofsson_2014() -> None:
    pixels = [200_000, 150_000, 3_200_000, 6_450_000]
    assert allocate(pixels, 641, Allocation.PROPORTIONAL) == (13, 10, 205, 413)
    assert allocate(pixels, 640, Allocation.EQUAL) == (160, 160, 160, 160)
    assert allocate(pixels, 641, Allocation.NEYMAN, expected_ua=UA) == (23, 19, 243, 356)
    rare = allocate(pixels, 641, Allocation.RARE)
    assert rare[:2] == (75, 75)
    assert sum(rare) == 641
    assert rare[3] / rare[2] == pytest.approx(6.45 / 3.2, abs=0.02)


def test_neyman_has_the_least_anticipated_error() -> None:
    pixels = [200_000, 150_000, 3_200_000, 6_450_000]
    best = anticipated_se(W, UA, allocate(pixels, 641, Allocation.NEYMAN, expected_ua=UA))
    for method in (Allocation.PROPORTIONAL, Allocation.EQUAL, Allocation.RARE):
        assert best <= anticipated_se(W, UA, allocate(pixels, 641, method))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=8).filter(any),
    st.sampled_from(list(Allocation)),
    st.integers(2, 40),
    st.floats(0, 1),
)
def test_allocation_sums_to_n_within_bounds(
    pixels: list[int], method: Allocation, least: int, share: float
) -> None:
    low, high = sum(min(p, least) for p in pixels), sum(pixels)
    n = round(low + share * (high - low))
    units = allocate(pixels, n, method, min_per_stratum=least)
    assert sum(units) == n
    for take, size in zip(units, pixels, strict=True):
        assert min(size, least) <= take <= size


def test_allocation_refusals() -> None:
    with pytest.raises(DesignError, match="60 to 300"):
        allocate([100, 200], 50, min_per_stratum=30)
    with pytest.raises(DesignError, match="2 or more"):
        allocate([100, 200], 50, min_per_stratum=1)
    with pytest.raises(DesignError, match="no stratum"):
        allocate([0, 0], 5)
    with pytest.raises(DesignError, match="0 or 1 only"):
        allocate([100, 200], 50, Allocation.NEYMAN, expected_ua=1.0)
    with pytest.raises(DesignError, match="one or more in each"):
        anticipated_se(W, UA, [10, 10, 10, 0])
    with pytest.raises(DesignError, match="stratum shares"):
        sample_size([0, 0], 0.5, 0.01)


# --- areas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "affine", "shape"),
    [
        ("EPSG:32615", Affine(60, 0, 150_000, 0, -60, 6_000_000), (1100, 1300)),
        ("EPSG:4326", Affine(0.001, 0, 10, 0, -0.001, 60), (1100, 700)),
        ("EPSG:3857", Affine(50, 0, 1_000_000, 0, -50, 7_000_000), (700, 600)),
        ("EPSG:32615", Affine(10, 0, 600_000, 0, -10, 2_000_000), (1, 1)),
    ],
)
def test_pixel_areas_sum_to_the_geodesic_area(
    crs: str, affine: Affine, shape: tuple[int, int]
) -> None:
    geobox = GeoBox(shape, affine, crs)
    h, w = shape
    top = np.linspace(0, w, 400)
    side = np.linspace(0, h, 400)
    col = np.concatenate([top, np.full(400, w), top[::-1], np.zeros(400)])
    row = np.concatenate([np.zeros(400), side, np.full(400, h), side[::-1]])
    x, y = affine.a * col + affine.c, affine.e * row + affine.f
    lon, lat = Transformer.from_crs(CRS(crs), "EPSG:4326", always_xy=True).transform(x, y)
    true = abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0])
    areas = PixelAreas(geobox)
    assert areas.window(slice(0, h), slice(0, w)).sum() == pytest.approx(true, rel=1e-6)


def test_utm_areas_vary_along_the_row() -> None:
    areas = PixelAreas(GeoBox((100, 10_980), UTM, "EPSG:32615"))
    row = areas.window(slice(0, 1), slice(0, 10_980))[0]
    assert row[0] == pytest.approx(100.05525741, abs=1e-3)
    assert row[-1] == pytest.approx(99.97109231, abs=1e-3)
    np.testing.assert_allclose(areas.at(np.array([0]), np.array([10_979])), row[-1:])


# --- drawing ----------------------------------------------------------------------------------


def test_sample_has_the_contract_of_the_design(map_path: Path) -> None:
    codes = _class_map()
    sample = _draw(map_path, 90, seed=4, classes=[1, 2, 3, 9], min_per_stratum=15)
    points, design = sample.points, sample.design
    assert list(points.columns) == [
        "id", "stratum", "map_code", "inclusion_prob", "row", "col", "area_m2", "reserve",
        "geometry",
    ]  # fmt: skip
    assert points.crs == "EPSG:32615"
    assert len(points) == 90
    assert points["id"].is_unique
    assert not points.duplicated(["row", "col"]).any()
    row, col = points["row"].to_numpy(), points["col"].to_numpy()
    assert (codes[row, col] == points["map_code"]).all()
    assert (points["map_code"] == points["stratum"]).all()
    np.testing.assert_allclose(points.geometry.x, 600_000 + 10 * (col + 0.5))
    np.testing.assert_allclose(points.geometry.y, 2_000_000 - 10 * (row + 0.5))
    for stratum in design.strata:
        assert stratum.n_pixels == (codes == stratum.code).sum()
        here = points[points["stratum"] == stratum.code]
        assert len(here) == stratum.n_units >= (15 if stratum.n_pixels else 0)
        assert (here["inclusion_prob"] == stratum.inclusion_prob).all()
    # Inverse probabilities add up to the population.
    assert (1 / points["inclusion_prob"]).sum() == pytest.approx((codes > 0).sum())
    assert design.strata[3].n_pixels == design.strata[3].n_units == 0
    assert design.not_covered_pixels == (codes == 0).sum() == 200
    assert design.not_covered_share == pytest.approx(200 / codes.size, rel=1e-4)
    total = PixelAreas(GeoBox(codes.shape, UTM, "EPSG:32615")).window(slice(0, 60), slice(0, 80))
    assert design.covered_m2 + design.not_covered_m2 == pytest.approx(total.sum())


def test_draw_does_not_depend_on_strips_but_on_the_seed(map_path: Path) -> None:
    whole = _draw(map_path, 90, seed=4).points
    strips = _draw(map_path, 90, seed=4, strip_px=7 * 80).points
    single = _draw(map_path, 90, seed=4, strip_px=1).points
    assert whole.equals(strips)
    assert whole.equals(single)
    other = _draw(map_path, 90, seed=5).points
    assert not whole[["row", "col"]].equals(other[["row", "col"]])


def test_every_pixel_of_a_stratum_is_equally_likely(tmp_path: Path) -> None:
    codes = np.ones((6, 10), np.uint8)
    codes[1::2, ::3] = 2
    path = _write(tmp_path / "small.tif", codes)
    runs, counts = 120, np.zeros(codes.shape)
    for seed in range(runs):
        points = _draw(path, 20, seed=seed, min_per_stratum=5, strip_px=20).points
        counts[points["row"], points["col"]] += 1
    for code in (1, 2):
        seen = counts[codes == code]
        expected = seen.sum() / seen.size
        # Sampling without replacement: variance p (1 - p) per pixel and draw.
        p = expected / runs
        stat = ((seen - expected) ** 2).sum() / (expected * (1 - p)) * (1 - 1 / seen.size)
        low, high = chi2.ppf([0.001, 0.999], seen.size - 1)
        assert low < stat < high, (code, stat)


def test_neyman_draw_takes_expected_accuracy_by_class(map_path: Path) -> None:
    options = {"seed": 0, "allocation": Allocation.NEYMAN, "min_per_stratum": 5}
    sure = _draw(map_path, 200, expected_ua={1: 0.99, 2: 0.6}, **options).design
    same = _draw(map_path, 200, **options).design
    assert sure.strata[0].n_units < same.strata[0].n_units
    assert sure.strata[1].n_units > same.strata[1].n_units


def test_rows_are_in_random_order(map_path: Path) -> None:
    strata = _draw(map_path, 90, seed=4, allocation=Allocation.EQUAL).points["stratum"]
    assert min(Counter(strata[:45].tolist()).values()) >= 8


def test_strata_raster_may_differ_from_the_map(map_path: Path, tmp_path: Path) -> None:
    strata = np.full((60, 80), 11, np.uint8)
    strata[30:] = 12
    strata[:2] = 0
    path = _write(tmp_path / "strata.tif", strata)
    sample = _draw(map_path, 80, seed=1, strata=path, strip_px=900)
    assert [s.code for s in sample.design.strata] == [11, 12]
    row, col = sample.points["row"].to_numpy(), sample.points["col"].to_numpy()
    assert (strata[row, col] == sample.points["stratum"]).all()
    assert (_class_map()[row, col] == sample.points["map_code"]).all()
    assert (sample.points["map_code"] > 0).all()
    assert row.max() >= 57  # the last rows are reached although 200 of their pixels are invalid
    assert sample.design.strata[0].n_pixels == 28 * 80
    assert sample.design.not_covered_pixels == 160 + 200
    wrong = _write(tmp_path / "wrong.tif", strata[:50])
    with pytest.raises(GridError, match="same pixels"):
        _draw(map_path, 80, seed=1, strata=wrong)


def test_geographic_map_has_smaller_pixels_in_the_north(tmp_path: Path) -> None:
    codes = np.ones((200, 20), np.uint8)
    codes[100:] = 2
    design = _draw(_write(tmp_path / "deg.tif", codes, "EPSG:4326"), 60, seed=0).design
    north, south = design.strata
    assert north.n_pixels == south.n_pixels
    assert north.area_m2 / south.area_m2 == pytest.approx(
        np.cos(np.radians(59.5)) / np.cos(np.radians(58.5)), rel=1e-3
    )


def test_refusals(map_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DesignError, match=r"map codes \[3\]"):
        _draw(map_path, 90, seed=0, classes=[1, 2])
    with pytest.raises(DesignError, match="no pixel with a class"):
        _draw(_write(tmp_path / "e.tif", np.zeros((5, 5), np.uint8)), 9, seed=0)
    with pytest.raises(DesignError, match="integer codes"):
        _draw(_write(tmp_path / "f.tif", np.ones((5, 5), np.float32)), 9, seed=0)
    with pytest.raises(DesignError, match="raise the sample size"):
        _draw(map_path, 20, seed=0)
    # A code declared invalid leaves the domain.
    design = _draw(map_path, 90, seed=0, classes=[1, 2], invalid_codes=(0, 3)).design
    assert design.not_covered_pixels == 230


def test_design_record_round_trip(map_path: Path) -> None:
    design = _draw(map_path, 90, seed=4).design
    record = json.loads(json.dumps(design.to_dict()))
    assert SampleDesign.from_dict(record) == design
    assert record["n_units"] == 90
    assert record["not_covered"]["n_pixels"] == 200
    edited = json.loads(json.dumps(record))
    edited["strata"][0]["n_pixels"] += 1
    with pytest.raises(DesignError, match="edited after the draw"):
        SampleDesign.from_dict(edited)
    del record["strata"][0]["area_m2"]
    with pytest.raises(DesignError, match="design record"):
        SampleDesign.from_dict(record)


def test_from_draw_to_estimate(map_path: Path) -> None:
    """Truth: a tenth of class 1 is really class 2; the estimate must find it, the map cannot."""
    truth = _class_map()
    truth[(truth == 1) & (np.arange(60) % 10 == 0)[:, None]] = 2
    sample = _draw(map_path, 900, seed=3)
    row, col = sample.points["row"].to_numpy(), sample.points["col"].to_numpy()
    answers = dict(zip(sample.points["id"], truth[row, col].tolist(), strict=True))
    reference = reference_sample(sample.points, answers, sample.design)
    assert reference.kind is SampleKind.STRATIFIED_RANDOM
    report = estimate_accuracy(reference, sample.design.sizes(), classes=[1, 2, 3])
    area = PixelAreas(GeoBox(truth.shape, UTM, "EPSG:32615")).window(slice(0, 60), slice(0, 80))
    for code in (1, 2, 3):
        assert report.area_ha[code].contains(area[truth == code].sum() / 1e4)
    assert report.mapped_ha[1].value == pytest.approx(area[_class_map() == 1].sum() / 1e4)
    assert not report.area_ha[1].contains(report.mapped_ha[1].value)
    del answers[sample.points["id"][0]]
    with pytest.raises(DesignError, match="1 points without an answer"):
        reference_sample(sample.points, answers, sample.design)


def test_kinds_ask_for_what_their_estimators_need() -> None:
    ones = [1, 1, 1]
    for kind in (SampleKind.CLUSTER, SampleKind.UNEQUAL):
        assert kind.is_probability
        with pytest.raises(DesignError, match="inclusion"):
            ReferenceSample(ones, ones, ones, kind)
    full = ReferenceSample(
        ones, ones, ones, SampleKind.CLUSTER, cluster=[4, 4, 9], inclusion_prob=[0.1, 0.1, 1]
    )
    assert full.cluster is not None and full.cluster.tolist() == [4, 4, 9]
    with pytest.raises(DesignError, match="out of range"):
        ReferenceSample(ones, ones, ones, SampleKind.UNEQUAL, inclusion_prob=[0.1, 0, 1])
    with pytest.raises(DesignError, match="inclusion"):
        ReferenceSample(ones, ones, ones, SampleKind.UNEQUAL, inclusion_prob=[0.1])


# --- other designs ----------------------------------------------------------------------------


def _whole(path: Path, **options: Any) -> Any:
    return survey_map(path, strata=WHOLE, **options)


def _frequencies(draw: Any, shape: tuple[int, int], runs: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each pixel was drawn, and the sum of the probabilities its draws stated."""
    counts, stated = np.zeros(shape), np.zeros(shape)
    for seed in range(500, 500 + runs):
        points = draw(seed).points
        counts[points["row"], points["col"]] += 1
        stated[points["row"], points["col"]] = points["inclusion_prob"]
    return counts, stated


def _fits(counts: np.ndarray, prob: np.ndarray, runs: int) -> bool:
    """Whether frequencies fit their probabilities, pixel by pixel and all together."""
    z = (counts - runs * prob) / np.sqrt(runs * prob * (1 - prob))
    return bool(abs(z).max() < 5 and 0.6 < z.std() < 1.5)


@pytest.fixture(scope="module")
def small_map(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    codes = _class_map(20, 24)
    return _write(tmp_path_factory.mktemp("map") / "small.tif", codes), codes


def test_simple_sample_is_as_likely_everywhere(
    map_path: Path, small_map: tuple[Path, np.ndarray]
) -> None:
    codes = _class_map()
    domain = _whole(map_path)
    drawn = simple_sample(domain, 50, seed=3, overhead=1.2)
    design = drawn.design
    assert (design.kind, design.n_units, design.strata[0].n_reserve) == ("simple_random", 50, 10)
    assert design.allocation is None
    assert [c.n_pixels for c in design.classes] == [(codes == c).sum() for c in (1, 2, 3)]
    assert sum(c.n_units for c in design.classes) == 50
    assert (drawn.points["reserve"].to_numpy() == np.repeat([0, 1], [50, 10])).all()
    assert (drawn.points["inclusion_prob"] == 50 / (codes > 0).sum()).all()
    path, codes = small_map
    whole = _whole(path)
    counts, stated = _frequencies(lambda s: simple_sample(whole, 60, seed=s), codes.shape, 50)
    assert counts[codes == 0].sum() == 0
    assert (stated[codes > 0] == 60 / (codes > 0).sum()).all()
    assert _fits(counts[codes > 0], stated[codes > 0], 50)
    with pytest.raises(DesignError, match="strata"):
        simple_sample(survey_map(map_path), 50, seed=3)
    with pytest.raises(DesignError, match="2 to 4600"):
        simple_sample(domain, 5000, seed=3)


def test_systematic_sample_is_a_grid_with_exact_chances(
    map_path: Path, small_map: tuple[Path, np.ndarray]
) -> None:
    domain = _whole(map_path)
    one = systematic_sample(domain, 100, seed=1)
    step = one.design.spacing_px
    assert step == pytest.approx(np.sqrt(46))
    assert one.points.equals(systematic_sample(_whole(map_path, strip_px=500), 100, seed=1).points)
    for axis in ("row", "col"):
        gaps = np.diff(np.unique(one.points[axis]))
        assert set(gaps) <= {6, 7}
    path, codes = small_map
    whole, runs = _whole(path), 80
    counts, stated = _frequencies(lambda s: systematic_sample(whole, 60, seed=s), codes.shape, runs)
    prob = 60 / (codes > 0).sum()
    assert abs(stated[codes > 0] - prob).max() < 1e-12
    assert counts.sum() / runs == pytest.approx(60, abs=2)
    assert _fits(counts[codes > 0], stated[codes > 0], runs)


def test_clusters_have_the_chances_they_state(
    map_path: Path, small_map: tuple[Path, np.ndarray]
) -> None:
    domain = _whole(map_path)

    def draw(seed: int) -> DrawnSample:
        return cluster_sample(domain, 36, seed=seed, block_px=12, per_block=4)

    one = draw(0)
    facts = one.design.cluster
    assert facts is not None and (facts.n_blocks, facts.n_drawn) == (35, 9)
    blocks = one.points.groupby("cluster")
    assert len(blocks) == 9 and (blocks.size() == 4).all()
    assert (blocks["row"].agg(lambda r: len(set(r // 12))) == 1).all()
    assert (blocks["col"].agg(lambda r: len(set(r // 12))) == 1).all()
    assert draw(0).points.equals(
        cluster_sample(_whole(map_path, strip_px=900), 36, seed=0, block_px=12, per_block=4).points
    )
    path, codes = small_map
    whole, runs = _whole(path), 100
    totals = []

    def draw_small(seed: int) -> DrawnSample:
        drawn = cluster_sample(whole, 32, seed=seed, block_px=3, per_block=4)
        totals.append((1 / drawn.points["inclusion_prob"]).sum())
        return drawn

    counts, stated = _frequencies(draw_small, codes.shape, runs)
    assert ((stated > 0) == (codes > 0)).all()
    # By area: pixels of whole blocks are as likely as in a simple random sample.
    assert stated[0, 0] == pytest.approx(32 / (codes > 0).sum(), rel=1e-3)
    assert _fits(counts[codes > 0], stated[codes > 0], runs)
    # Sums of 1/p estimate the number of pixels without bias.
    assert np.mean(totals) == pytest.approx((codes > 0).sum(), rel=0.02)
    with pytest.raises(DesignError, match="blocks"):
        cluster_sample(domain, 200, seed=0, block_px=12, per_block=4)


def test_a_block_that_is_most_of_the_map_is_taken_for_certain(tmp_path: Path) -> None:
    codes = np.zeros((8, 64), np.uint8)
    codes[:, :8] = 1
    codes[0, 8:] = 1
    domain = _whole(_write(tmp_path / "lone.tif", codes))
    for seed in range(20):
        points = cluster_sample(domain, 12, seed=seed, block_px=8, per_block=4).points
        first = points[points["cluster"] == 1]
        assert (first["inclusion_prob"] == 4 / 64).all() and len(first) == 4
        assert points["cluster"].nunique() == 3


def test_reserve_is_drawn_like_the_sample(map_path: Path) -> None:
    sample = _draw(map_path, 90, seed=4, min_per_stratum=15, overhead=1.3)
    for stratum in sample.design.strata:
        here = sample.points[sample.points["stratum"] == stratum.code]
        spare = min(int(np.ceil(stratum.n_units * 0.3 - 1e-9)), stratum.n_pixels - stratum.n_units)
        assert (here["reserve"] == 1).sum() == stratum.n_reserve == spare
    assert sample.points["reserve"].is_monotonic_increasing


def test_strata_from_polygons(map_path: Path, tmp_path: Path) -> None:
    west, east = box(600_000, 1_999_400, 600_300, 2_000_000), box(600_300, 1_999_400, 600_800, 2e6)
    frame = gpd.GeoDataFrame(
        {"unit": ["west", "east"]}, geometry=[west, east], crs="EPSG:32615"
    ).to_crs("EPSG:4326")
    frame.to_file(tmp_path / "units.gpkg")
    polygons = Polygons.read(tmp_path / "units.gpkg", "unit", "EPSG:32615")
    sample = _draw(map_path, 80, seed=1, strata=polygons, strip_px=900)
    assert [(s.code, s.name) for s in sample.design.strata] == [(1, "east"), (2, "west")]
    assert ((sample.points.geometry.x < 600_300) == (sample.points["stratum"] == 2)).all()
    assert sample.design.strata[1].n_pixels == 60 * 30
    with pytest.raises(DesignError, match="strata_column"):
        Polygons.read(tmp_path / "units.gpkg", "name", "EPSG:32615")
    frame.to_crs("EPSG:32615").assign(geometry=[west.buffer(20), east]).to_file(
        tmp_path / "over.gpkg"
    )
    with pytest.raises(DesignError, match="overlap"):
        Polygons.read(tmp_path / "over.gpkg", "unit", "EPSG:32615")


def test_size_for_a_target_and_the_allocation_table() -> None:
    pixels = [200_000, 150_000, 3_200_000, 6_450_000]
    assert size_for(pixels, 0.01, Allocation.NEYMAN, expected_ua=UA) == 641
    rare = size_for(pixels, 0.01, Allocation.RARE, expected_ua=UA)
    assert anticipated_se(W, UA, allocate(pixels, rare, Allocation.RARE)) <= 0.01
    assert anticipated_se(W, UA, allocate(pixels, rare - 1, Allocation.RARE)) > 0.01
    table = allocation_table(pixels, 641, expected_ua=UA)
    assert table["proportional"][:4] == [13, 10, 205, 413]
    assert table["alloc_75"][:2] == [75, 75] and table["alloc_100"][:2] == [100, 100]
    for column, se in (("proportional", 0.0102), ("alloc_50", 0.0104), ("alloc_75", 0.0109),
                       ("alloc_100", 0.0114), ("equal", 0.0135)):  # fmt: skip
        assert table[column][-1] == pytest.approx(se, abs=1e-4)
    assert table["std_dev"][:4] == pytest.approx([0.458, 0.490, 0.300, 0.218], abs=5e-4)
    assert allocation_table(pixels, 300)["alloc_100"] == [None] * 5
    with pytest.raises(DesignError, match="not even all"):
        size_for([30, 30], 0.04, Allocation.EQUAL)


def test_units_are_divided_by_true_area(tmp_path: Path) -> None:
    codes = np.ones((200, 20), np.uint8)
    codes[100:] = 2
    path = _write(tmp_path / "deg.tif", codes, "EPSG:4326")
    north, south = _draw(path, 2000, seed=0, allocation=Allocation.PROPORTIONAL).design.strata
    assert north.n_units < south.n_units
    assert north.n_units / south.n_units == pytest.approx(north.area_m2 / south.area_m2, abs=1e-3)
