from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import Polygon, box

from support import scenes_stage as made
from terraloom.config.campaign import Campaign
from terraloom.config.simulation import Simulation
from terraloom.errors import SceneError
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_json
from terraloom.preprocess import audit, checks, coverage, position, scenes, views
from terraloom.preprocess.views import Header, View

#: Few, mostly clear dates on both sides of the Sentinel-2 offset: all that the faults need.
SIM = Simulation(
    seed=7, size_px=384, optical_dates=5, sar_dates=2, cloud_share=0.12, snow=False
)  # fmt: skip

Stage = tuple[Campaign, CampaignGrid]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        campaign, grid = made.make_campaign(SIM)
        made.finish_stage(campaign, grid)
        seen: dict[str, Any] = {}

        def look(kind: str, real: Any) -> Any:
            """Scenes that no fault touches are read once."""

            def cached(scene: Any, *places: Any) -> Any:
                key = kind + repr(scene if kind == "head" else (scene.item, scene.shift))
                if key not in seen:
                    seen[key] = real(scene, *places)
                return seen[key]

            return cached

        patch.setattr(audit, "look_at", look("view", audit.look_at))
        patch.setattr(position, "look_fine", look("fine", position.look_fine))
        patch.setattr(audit, "headers", look("head", audit.headers))
        yield campaign, grid


@pytest.fixture
def results(stage: Stage) -> Iterator[Path]:
    """Files of the stage, put back afterwards."""
    shutil.copytree("results", "kept")
    yield Path("results")
    shutil.rmtree("results")
    Path("kept").rename("results")


def failed(stage: Stage) -> list[dict[str, Any]]:
    campaign, grid = stage
    with pytest.raises(SceneError) as error:
        audit.audit_scenes(campaign, grid)
    bad = [c for c in read_json(audit.AUDIT)["checks"] if not c["ok"]]
    assert bad and all(c["fix"] and c["found"] and c["allowed"] for c in bad)
    assert bad[0]["item"] in str(error.value) and error.value.fix
    for path in (scenes.QUALITY, audit.MASK_TABLE, scenes.SCENES / "metrics.json"):
        assert not path.exists(), "the run goes on from a table of a failed audit"
    return bad


def test_clean_scenes_raise_no_alarm(stage: Stage, results: Path) -> None:
    campaign, grid = stage
    audit.audit_scenes(campaign, grid)
    records = read_json(audit.AUDIT)["checks"]
    assert all(r["ok"] for r in records)
    kinds = {r["check"] for r in records}
    assert {check for _, check in made.FAULTS.values()} <= kinds
    assert {"tile", "valid share", "value range", "pixels", "decision"} <= kinds
    optical = {i["id"] for i in read_json(scenes.ITEMS)["items"] if i["source"] == made.S2}
    rows = {r["id"]: r for r in _table(scenes.QUALITY)}
    assert all(rows[i]["audit"] == "ok" for i in optical)
    assert all(float(rows[i]["rest_px"]) < 0.15 for i in optical), "aligned by the truth"
    assert read_json(results / "scenes/metrics.json")["checks_failed"] == 0


def _table(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("name", made.FAULTS)
def test_a_fault_stops_the_run_and_names_its_item(
    stage: Stage, results: Path, tmp_path: Path, name: str
) -> None:
    fault, check = made.FAULTS[name]
    lock = read_json(scenes.ITEMS)
    item = [i for i in lock["items"] if i["source"] == made.S2][2]
    fault(lock, item, tmp_path)
    write_json(scenes.ITEMS, lock)
    bad = failed(stage)
    named = item["id"] + ("_TWIN" if name == "duplicate" else "")
    assert {b["item"] for b in bad} == {named}, bad
    assert check in {b["check"] for b in bad}


def test_report_goes_on_and_says_so_in_the_table(
    stage: Stage, results: Path, tmp_path: Path
) -> None:
    campaign, grid = stage
    lock = read_json(scenes.ITEMS)
    item = [i for i in lock["items"] if i["source"] == made.S2][1]
    made.constant_band(lock, item, tmp_path)
    write_json(scenes.ITEMS, lock)
    kept = campaign.model_copy(
        update={"scenes": campaign.scenes.model_copy(update={"on_audit": "report"})}
    )
    audit.audit_scenes(kept, grid)
    rows = {r["id"]: r for r in _table(scenes.QUALITY)}
    assert rows[item["id"]]["audit"] == "constant band"
    assert rows[item["id"]]["decision"] == "use"
    assert read_json(results / "scenes/metrics.json")["checks_failed"] == 1


def test_unreadable_file_is_a_record(stage: Stage, results: Path) -> None:
    lock = read_json(scenes.ITEMS)
    item = next(i for i in lock["items"] if i["source"] == made.S2)
    item["assets"]["B02"]["href"] = "resources/none.tif"
    write_json(scenes.ITEMS, lock)
    bad = failed(stage)
    assert [(b["check"], b["item"]) for b in bad] == [("readable", item["id"])]


def test_item_without_verdict(stage: Stage, results: Path) -> None:
    verdicts = read_json(scenes.VERIFIED)
    name = next(i["id"] for i in read_json(scenes.ITEMS)["items"] if i["source"] == made.S2)
    del verdicts[name]
    write_json(scenes.VERIFIED, verdicts)
    assert [(b["check"], b["item"]) for b in failed(stage)] == [("decision", name)]


# --- single checks -------------------------------------------------------------------------------


def item(name: str, source: str = made.S2, **more: Any) -> dict[str, Any]:
    unit = {"sentinel-1-rtc": "dB", "copernicus-dem": "m"}.get(source, "reflectance")
    bands = {"sentinel-1-rtc": ["VV"], "copernicus-dem": ["elevation"]}.get(source, ["B04", "B08"])
    asset = {"href": "x.tif", "unit": unit, "scale": 1e-4, "offset": 0.0, "resolution_m": 10}
    return {"id": name, "source": source, "datetime": "2022-05-01T10:00:00Z", "footprint": None,
            "assets": {b: dict(asset) for b in bands}} | more  # fmt: skip


def view(name: str, values: Any, source: str = made.S2, **more: Any) -> View:
    record = item(name, source, **more)
    bands = {b: np.asarray(v, np.float32) for b, v in zip(record["assets"], values, strict=True)}
    shape = next(iter(bands.values())).shape
    return View(record, bands, np.ones(shape, bool), 1.0)


def field(seed: int, low: float = 0.02, high: float = 0.3) -> Any:
    return np.random.default_rng(seed).uniform(low, high, (1, 32, 32))


def head(phase: tuple[float, float], pixel: float = 30.0, band: str = "red") -> Header:
    return Header(band, "EPSG:32613", 1.0, pixel, phase, None)


def test_lattice_of_landsat_is_that_of_most_scenes() -> None:
    """Landsat's pixels start half a pixel beside the multiples of 30 m; that is no fault."""
    from terraloom.acquire.sources import load_source

    band = next(iter(load_source("landsat-c2-l2").bands))
    heads = {f"L{i}": [head((0.5, 0.5), band=band)] for i in range(4)}
    assert all(r["ok"] for r in checks.check_lattice(heads, "landsat-c2-l2"))
    heads["ODD"] = [head((0.0, 0.5), band=band)]
    bad = [r for r in checks.check_lattice(heads, "landsat-c2-l2") if not r["ok"]]
    assert [r["item"] for r in bad] == ["ODD"] and "0.50 px across" in bad[0]["found"]


def test_lattice_of_one_sentinel_2_scene_is_known_and_its_pixels_too() -> None:
    good, half, coarse = head((0, 0), 10, "B04"), head((0.5, 0), 10, "B04"), head((0, 0), 20, "B04")
    for header, fine in ((good, True), (half, False), (coarse, False)):
        (record,) = checks.check_lattice({"S": [header]}, made.S2)
        assert record["ok"] is fine, record


def test_lattice_compares_within_one_zone_only() -> None:
    zones = [Header("elevation", f"EPSG:326{z}", 1.0, 30.0, (p, 0.2), None)
             for z, p in ((32, 0.3), (33, 0.8))]  # fmt: skip
    records = checks.check_lattice({"a": [zones[0]], "b": [zones[1]]}, "copernicus-dem")
    assert all(r["ok"] for r in records)


def test_degrees_may_get_wider_towards_the_poles() -> None:
    """Copernicus DEM has 1.5 times wider pixels north of 50 degrees."""
    tiles = {f"N{n}": [Header("elevation", "EPSG:4326", 0.0, w / 3600, (0.5, 0.5), None)]
             for n, w in ((49, 1.0), (48, 1.0), (51, 1.5))}  # fmt: skip
    assert all(r["ok"] for r in checks.check_lattice(tiles, "copernicus-dem"))


def test_neighbouring_tiles_of_one_overpass_are_no_duplicates() -> None:
    values = [field(1), field(2)]
    left, right = box(10, 50, 11, 51).wkt, box(10.5, 50, 11.5, 51).wkt
    apart = [view("A", values, footprint=left), view("B", values, footprint=right)]
    assert all(r["ok"] for r in checks.check_duplicates(apart, [v.item for v in apart]))
    same = [view("A", values, footprint=left), view("B", values, footprint=left)]
    records = checks.check_duplicates(same, [v.item for v in same])
    assert [r["ok"] for r in records] == [True, False] and "those of A" in records[1]["found"]


def test_an_id_twice_and_views_without_pixels() -> None:
    empty = view("E", [np.full((1, 32, 32), np.nan)] * 2)
    other = view("F", [np.full((1, 32, 32), np.nan)] * 2)
    assert all(r["ok"] for r in checks.check_duplicates([empty, other], [empty.item, other.item]))
    one = view("A", [field(1), field(2)])
    (record,) = checks.check_duplicates([one], [one.item, one.item])
    assert not record["ok"] and "2 times" in record["found"]


@pytest.mark.parametrize(
    ("source", "values", "fine"),
    [
        (made.S2, (0.02, 0.5), True),
        (made.S2, (200.0, 5000.0), False),  # digital numbers
        ("sentinel-1-rtc", (-25.0, 3.0), True),
        ("sentinel-1-rtc", (-200.0, -150.0), False),
        ("copernicus-dem", (-3.0, 2500.0), True),
        ("copernicus-dem", (-32768.0, 900.0), False),  # nodata that was not declared
    ],
)
def test_ranges_by_unit(source: str, values: tuple[float, float], fine: bool) -> None:
    count = len(item("x", source)["assets"])
    seen = view("A", [field(n, *values) for n in range(count)], source)
    assert checks.check_ranges(seen)["ok"] is fine


def test_power_taken_for_decibels_is_the_odd_one_out() -> None:
    backscatter = [view(f"S{n}", [field(n, -18, -6)], "sentinel-1-rtc") for n in range(4)]
    assert all(r["ok"] for r in checks.check_levels(backscatter))
    power = view("P", [10 ** (field(9, -18, -6) / 10)], "sentinel-1-rtc")
    bad = [r for r in checks.check_levels([*backscatter, power]) if not r["ok"]]
    assert [r["item"] for r in bad] == ["P"]


def test_seasons_and_haze_are_no_offset() -> None:
    """Crops green up (infrared rises, red falls), haze lifts the visible only."""
    ground = [view(f"S{n}", [field(n, 0.03, 0.2), field(n + 50, 0.1, 0.3)]) for n in range(4)]
    green = view("G", [field(90, 0.02, 0.06), field(91, 0.25, 0.5)])
    haze = view("H", [field(92, 0.1, 0.27), field(93, 0.11, 0.31)])
    assert all(r["ok"] for r in checks.check_levels([*ground, green, haze]))


def test_a_clear_pixel_without_a_band_is_seen() -> None:
    lost = field(1)
    lost[:, :20] = np.nan
    record = coverage.check_valid(view("A", [lost, field(2)]))
    assert not record["ok"] and "B04" in record["found"] and "B08" not in record["found"]
    assert coverage.check_valid(view("A", [field(1), field(2)]))["ok"]


def test_empty_where_the_footprint_promises_pixels() -> None:
    nothing = [np.full((1, 32, 32), np.nan)] * 2
    full = view("A", nothing)
    assert not checks.check_empty(full)["ok"]
    beside = View(full.item, full.bands, full.clear, 0.0)
    assert checks.check_empty(beside)["ok"]


# --- windows -------------------------------------------------------------------------------------


def _grid(aoi: Any) -> CampaignGrid:
    return CampaignGrid.from_aoi(aoi, "EPSG:32633")


@pytest.mark.parametrize("side_m", [60, 660, 3840, 40_000, 400_020])
def test_windows_are_few_lie_inside_and_on_the_lattice(side_m: int) -> None:
    grid = _grid(box(300_000, 5_000_040, 300_000 + side_m, 5_000_040 + side_m))
    places = views.windows(grid)
    assert 1 <= len(places) <= views.MOST_WINDOWS
    assert len({tuple(p.shape) for p in places}) == 1 and max(places[0].shape) <= views.WINDOW_PX
    for p in places:
        b, g = p.boundingbox, grid.geobox.boundingbox
        assert g.left <= b.left < b.right <= g.right and g.bottom <= b.bottom < b.top <= g.top
        assert (b.left % 10, b.top % 10) == (0, 0)


def test_windows_follow_the_area_not_its_box() -> None:
    aoi = Polygon([(300_000, 5_000_040), (360_000, 5_000_040), (300_000, 5_060_040)])
    grid = _grid(aoi)
    places = views.windows(grid)
    assert len(places) == views.MOST_WINDOWS
    inside = aoi.buffer(1)
    assert all(inside.contains(p.extent.geom.centroid) for p in places)


def test_outlines_across_the_180th_meridian_stay_small() -> None:
    tile = box(790_000, 8_100_000, 900_000, 8_200_000)
    across = views._lonlat(tile, "EPSG:32760")
    assert 0.9 < across.area < 1.2, "about one square degree, not the whole Earth"


def test_scenes_are_read_where_the_content_lies() -> None:
    """The view of a scene read with its shift is the view of the scene that lies right."""
    geobox = GeoBox((64, 64), Affine(10, 0, 300_000, 0, -10, 5_000_040), "EPSG:32633")
    assert views._coarse(geobox, 4).shape == (16, 16)
    assert views._coarse(geobox, 4).boundingbox == geobox.boundingbox
    assert copy.copy(views.data_bands(item("A"))) == ["B04", "B08"]
