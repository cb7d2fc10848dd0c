"""Bad input is one clear message, exit code 2, and nothing half-written.

Every case goes through the command line's own entry point, on a small simulated region.
"""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import yaml
from shapely import LineString, Polygon, box

from support.road import ROOT
from terraloom import cli
from terraloom.acquire.simulate import simulate_region
from terraloom.aoi import campaign_grid
from terraloom.config.load import load_campaign
from terraloom.config.simulation import Simulation
from terraloom.io import geobox_of, read_json, read_store, write_json, write_raster
from terraloom.preprocess.reasons import Reason

SIM = {"size_px": 384, "optical_dates": 4, "sar_dates": 1}
AOI = {"bbox": [420000, 5816160, 423840, 5820000], "crs": "EPSG:32633"}
S2 = "resources/simulated/sim-s2-l2a"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("region") / "simulated"
    simulate_region(Simulation(**SIM), out)
    return out


@pytest.fixture(autouse=True)
def folder(region: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's own folder with the archive in it, and logging as it was."""
    shutil.copytree(region, tmp_path / "resources/simulated")
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def keys() -> dict[str, Any]:
    """Keys of a sound campaign on the region."""
    data = yaml.safe_load((ROOT / "config/campaigns/rehearsal.yaml").read_text())
    data |= {
        "aoi": copy.deepcopy(AOI),
        "grid": {"crs": "EPSG:32633", "tile_px": 192, "tiles_per_job": 4},
        "scenes": {"jobs": 1}, "coregister": {"enabled": False},
        "folds": {"count": 4, "block_m": 480},
    }  # fmt: skip
    data["archive"]["simulation"] = dict(SIM)
    data["tasks"][0]["classes"] = "resources/simulated/classes.csv"
    return data


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb as the shell does; returns what it said on stderr."""

    def call(*words: str, campaign: dict[str, Any] | None = None, fails: bool = True) -> str:
        if campaign is not None:
            Path("bad.yaml").write_text(yaml.safe_dump(campaign), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["terraloom", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr().err
        assert end.value.code == (2 if fails else 0), said
        return said

    return call


def complains(said: str, *parts: str, allowed: bool = True, fix: bool = True) -> None:
    """The message has its parts: where and what was found, what is allowed, what to do."""
    message = said[said.index("error: ") :]
    for part in parts:
        assert part in message, message
    assert ("  allowed: " in message) or not allowed, message
    assert ("  to do: " in message) or not fix, message
    assert "Traceback" not in said


def nothing_written(*allowed: str) -> None:
    """No result, and no temporary file of an interrupted one."""
    made = [p.as_posix() for base in ("results", "work") for p in Path(base).rglob("*")
            if p.is_file() and p.as_posix() != "work/verified.json"]  # fmt: skip
    assert sorted(made) == sorted(allowed)
    assert not list(Path().rglob(".tmp-*"))


def labels_with(keys: dict[str, Any], frame: gpd.GeoDataFrame, **settings: Any) -> dict[str, Any]:
    """A campaign whose only task reads a label file of one's own."""
    frame.to_file("mine.gpkg", driver="GPKG", engine="pyogrio")
    keys["tasks"] = keys["tasks"][:1]
    keys["tasks"][0]["labels"] = {"file": "mine.gpkg", "column": "class", **settings}
    keys["sample"] = None
    return keys


def squares(classes: list[str], places: list[tuple[int, int]], crs: str | None) -> gpd.GeoDataFrame:
    """Squares of 100 m at pixel (column, row) of the AOI."""
    west, _, _, north = AOI["bbox"]
    shapes = [box(west + 10 * c, north - 10 * r - 100, west + 10 * c + 100, north - 10 * r)
              for c, r in places]  # fmt: skip
    return gpd.GeoDataFrame({"class": classes}, geometry=shapes, crs=crs)


# --- campaign file -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["check", "lock-items", "align-labels", "build-report"])
def test_unknown_key(run: Run, keys: dict[str, Any], verb: str) -> None:
    keys["masks"]["cloud_treshold"] = 0.3
    words = ("check", "bad.yaml") if verb == "check" else (verb, "--campaign", "bad.yaml")
    said = run(*words, campaign=keys)
    complains(said, "bad.yaml: key `masks.cloud_treshold`: unknown", "did you mean "
              "`cloud_threshold`?", "config/README.md", "terraloom check")  # fmt: skip
    nothing_written()


def test_dates_reversed(run: Run, keys: dict[str, Any]) -> None:
    keys["cube"]["periods"][1] |= {"start": "2022-05-31", "end": "2022-03-16"}
    said = run("check", "bad.yaml", campaign=keys)
    complains(said, "bad.yaml: key `cube.periods.1`", "period spring ends (2022-03-16) before it")
    nothing_written()


def test_a_sound_campaign_passes(
    run: Run, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The other tests mean something only if this one holds."""
    run("check", "bad.yaml", campaign=keys, fails=False)
    run("lock-items", "--campaign", "bad.yaml", fails=False)
    run("verify-items", "--campaign", "bad.yaml", fails=False)
    assert set(read_json("results/scenes/verified.json").values()) == {"ok"}
    run("align-labels", "--campaign", "bad.yaml", fails=False)
    nothing_written("results/scenes/items.json", "results/scenes/verified.json",
                    "results/chips/labels.json", "results/chips/folds.gpkg")  # fmt: skip


# --- area of interest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "crs", "found"),
    [
        ([Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])], "EPSG:32633", "Self-intersection"),
        ([], "EPSG:32633", "no polygon in it (found nothing)"),
        ([Polygon()], "EPSG:32633", "no polygon in it (found nothing)"),
        ([LineString([(0, 0), (1, 1)])], "EPSG:32633", "no polygon in it (found ['LineString'])"),
        ([box(0, 0, 1, 1)], None, "no coordinate system"),
    ],
    ids=["self-crossing", "no row", "empty", "line", "no crs"],
)
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_aoi_file(
    run: Run, keys: dict[str, Any], shapes: list[Any], crs: str | None, found: str
) -> None:
    aoi = gpd.GeoDataFrame({"n": range(len(shapes))}, geometry=shapes, crs=crs)
    aoi.to_file("aoi.gpkg", driver="GPKG", engine="pyogrio")
    keys["aoi"] = {"file": "aoi.gpkg"}
    said = run("check", "bad.yaml", campaign=keys)
    complains(said, "aoi.file", "aoi.gpkg", found, allowed="Self" in found)
    assert not run("lock-items", "--campaign", "bad.yaml").startswith("Traceback")
    nothing_written()


def test_aoi_is_no_vector_file(run: Run, keys: dict[str, Any]) -> None:
    Path("aoi.gpkg").write_text("not a GeoPackage")
    keys["aoi"] = {"file": "aoi.gpkg"}
    complains(run("check", "bad.yaml", campaign=keys), "not a readable vector", allowed=False)
    keys["aoi"] = {"file": "none.gpkg"}
    complains(run("check", "bad.yaml", campaign=keys), "there is no such file", allowed=False)
    nothing_written()


@pytest.mark.parametrize("bbox", [[13, 52, 12, 53], [13, 52, 13, 53]], ids=["order", "empty"])
def test_aoi_bbox_is_empty(run: Run, keys: dict[str, Any], bbox: list[float]) -> None:
    keys["aoi"] = {"bbox": bbox}
    complains(run("check", "bad.yaml", campaign=keys), "key `aoi`", "west < east")
    nothing_written()


def test_unknown_crs_of_the_aoi(run: Run, keys: dict[str, Any]) -> None:
    for where in ("aoi", "grid"):
        bad = copy.deepcopy(keys)
        bad[where]["crs"] = "EPSG:999999"
        said = run("check", "bad.yaml", campaign=bad)
        complains(said, "EPSG:999999", allowed=False, fix=False)
    nothing_written()


def test_aoi_outside_every_scene(run: Run, keys: dict[str, Any]) -> None:
    keys["aoi"]["bbox"] = [520000, 5816160, 523840, 5820000]
    said = run("lock-items", "--campaign", "bad.yaml", campaign=keys)
    complains(said, "sources[0] sentinel-2-l2a", "lies outside all", "aoi.bbox", allowed=False)
    nothing_written()


# --- scenes --------------------------------------------------------------------------------------


def test_no_item_in_the_collection(run: Run, keys: dict[str, Any]) -> None:
    path = Path(S2) / "collection.json"
    collection = json.loads(path.read_text())
    collection["links"] = [x for x in collection["links"] if x["rel"] != "item"]
    path.write_text(json.dumps(collection))
    said = run("lock-items", "--campaign", "bad.yaml", campaign=keys)
    complains(said, "sim-s2-l2a", "no item found", "cube.periods", allowed=False)
    nothing_written()


def test_no_item_in_the_periods(run: Run, keys: dict[str, Any]) -> None:
    keys["cube"]["periods"] = [{"name": "a", "start": "2019-01-01", "end": "2019-12-31"}]
    said = run("lock-items", "--campaign", "bad.yaml", campaign=keys)
    complains(said, "none of 4 items can be used (4 x outside every period)", allowed=False)
    nothing_written()


def test_no_catalogue(run: Run, keys: dict[str, Any]) -> None:
    keys["sources"][0]["catalogue"] = "elsewhere/catalog.json"
    complains(run("check", "bad.yaml", campaign=keys), "elsewhere", "no such catalogue",
              allowed=False)  # fmt: skip
    complains(run("lock-items", "--campaign", "bad.yaml"), "elsewhere", "no such catalogue")
    nothing_written()


def _assets(lock: dict[str, Any], item_id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(i for i in lock["items"] if i["id"] == item_id)["assets"]
    return found


def missing(path: Path, asset: dict[str, Any]) -> None:
    path.unlink()


def truncated(path: Path, asset: dict[str, Any]) -> None:
    """A transfer that broke off, from an archive that records neither size nor checksum."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    asset |= {"size": None, "checksum": None}


def other_size(path: Path, asset: dict[str, Any]) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def other_bytes(path: Path, asset: dict[str, Any]) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_shape(path: Path, asset: dict[str, Any]) -> None:
    asset["shape"] = [10, 10]


def other_crs(path: Path, asset: dict[str, Any]) -> None:
    """The file was exchanged for one in the next zone."""
    with rasterio.open(path) as src:
        data, nodata = src.read(), src.nodata
    geobox = geobox_of(path)
    moved = type(geobox)(geobox.shape, geobox.affine, "EPSG:32632")
    write_raster(path, data, moved, nodata=nodata)
    asset |= {"size": None, "checksum": None}


def other_radiometry(path: Path, asset: dict[str, Any]) -> None:
    """The record says that stored values are offset by one whole reflectance."""
    asset["offset"] = asset["offset"] - 1.0


BROKEN = {
    missing: "the file is missing",
    truncated: "cannot be opened or read to the end",
    other_size: "recorded",
    other_bytes: "checksum differs",
    other_shape: "[10, 10] recorded",
    other_crs: "its CRS is EPSG:32632, EPSG:32633 recorded",
    other_radiometry: "offset",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_bad_asset(run: Run, keys: dict[str, Any], damage: Callable[..., None]) -> None:
    keys["scenes"] |= {"on_bad_item": "stop"}
    run("lock-items", "--campaign", "bad.yaml", campaign=keys, fails=False)
    lock = read_json("results/scenes/items.json")
    item = "SIM_S2_20220701"
    damage(Path(S2) / item / "B04.tif", _assets(lock, item)["B04"])
    write_json("results/scenes/items.json", lock)
    said = run("verify-items", "--campaign", "bad.yaml")
    complains(said, item, BROKEN[damage], allowed=False)
    nothing_written("results/scenes/items.json")


def test_a_bad_item_is_left_out_or_too_many(run: Run, keys: dict[str, Any]) -> None:
    """The other policy leaves the item out and says so, as long as it is not too many."""
    run("lock-items", "--campaign", "bad.yaml", campaign=keys, fails=False)
    item = "SIM_S2_20220701"
    missing(Path(S2) / item / "B04.tif", {})
    keys["scenes"] |= {"on_bad_item": "skip-and-report", "max_failed_pct": 20}
    run("verify-items", "--campaign", "bad.yaml", campaign=keys, fails=False)
    verdicts = read_json("results/scenes/verified.json")
    assert "the file is missing" in verdicts.pop(item) and set(verdicts.values()) == {"ok"}
    Path("results/scenes/verified.json").unlink()
    keys["scenes"]["max_failed_pct"] = 10
    said = run("verify-items", "--campaign", "bad.yaml", campaign=keys)
    complains(said, "campaign rehearsal", "1 of 6 items cannot be used", "max_failed_pct 10")
    nothing_written("results/scenes/items.json")


# --- coverage ------------------------------------------------------------------------------------


def _cloudy_masks(fraction: float) -> None:
    """Masks in which the left share of the AOI is cloud in every scene."""
    campaign = load_campaign("bad.yaml")
    grid = campaign_grid(campaign)
    items = {i["id"]: i for i in read_json("results/scenes/items.json")["items"]}
    ids = [i for i in items if "S2" in i]
    from terraloom.preprocess import masking, scenes

    source = campaign.sources[0].source
    strip = masking._strip(campaign, grid, "p000", 20)
    assert strip is not None
    reasons = np.zeros((len(ids), *strip.shape), np.uint8)
    west = AOI["bbox"][0]
    edge = round((west + fraction * 3840 - strip.affine.c) / 20)
    reasons[:, :, :edge] = Reason.CLOUD
    for period in campaign.cube.periods:
        mine = [i for i in ids if scenes.item_period(campaign, items[i]) == period.name]
        manifest = {"files": {}, "scenes": {}, "compare": {}}
        if mine:
            name = (scenes.MASKS / f"{period.name}-p000.tif").as_posix()
            bands = [ids.index(i) for i in mine]
            write_raster(name, reasons[bands], strip, nodata=255, band_names=mine)
            manifest |= {"files": {source: name}, "scenes": {source: mine}}
        write_json(scenes.MASKS / f"{period.name}-p000.json", manifest)


def _through_audit(run: Run, keys: dict[str, Any], fraction: float) -> None:
    words = ("--campaign", "bad.yaml")
    # The made-up masks leave real clouds in, which the audit would take for faults.
    keys["scenes"] = keys.get("scenes", {}) | {"on_audit": "report"}
    run("lock-items", *words, campaign=keys, fails=False)
    run("verify-items", *words, fails=False)
    _cloudy_masks(fraction)
    for verb in ("measure-shifts", "audit-scenes"):
        run(verb, *words, fails=False)


def test_a_tile_without_a_clear_look_is_no_data_with_its_reason(
    run: Run, keys: dict[str, Any]
) -> None:
    from support.networks import random_ensemble

    _through_audit(run, keys, 0.5)
    said = run("build-cube", "--batch", "b0000", "--campaign", "bad.yaml", fails=False)
    assert "tile x000y000 has no clear pixel; its products will be no data" in said
    assert "x001y000 has no clear" not in said, said
    store = read_store("work/cube/x000y000.zip")
    assert np.all(store["reasons"].to_numpy() == Reason.CLOUD)
    for group in ("s2_10", "s2_20"):
        assert np.isnan(store[group].to_numpy()).all()

    campaign = load_campaign("bad.yaml")
    random_ensemble(campaign, campaign_grid(campaign))
    for words in (("predict-tiles", "--batch", "b0000"), ("mosaic-products",)):
        run(*words, "--campaign", "bad.yaml", fails=False)
    for name, nodata in (("class_map", 0), ("probabilities", 255), ("uncertainty", 255),
                         ("boundary", 255), ("canopy_height", -9999)):  # fmt: skip
        with rasterio.open(f"results/map/{name}.tif") as src:
            assert src.nodata == nodata
            data = src.read()
            assert np.all(data[:, :, :192] == nodata), name
            assert np.all(data[:, :, 192:] != nodata), name
    with rasterio.open("results/map/reasons.tif") as src:
        reasons = src.read(1)
    assert np.all(reasons[:, :192] == Reason.CLOUD) and not np.any(reasons[:, 192:])
    facts = read_json("results/map/map.json")
    assert facts["valid_pct"] == 50 and facts["reason_pct"]["cloud"] == 50

    from terraloom.report.panels import main_reason

    assert "cloud" in main_reason(facts).lower()


def test_no_clear_scene_at_all(run: Run, keys: dict[str, Any]) -> None:
    """Radar and elevation are left, but a map of them alone is not what was asked for."""
    _through_audit(run, keys, 1.0)
    table = Path("results/scenes/quality.csv").read_text()
    assert table.count("clear 0.0 % < 5 %") == 4
    said = run("build-cube", "--batch", "b0000", "--campaign", "bad.yaml")
    complains(said, "campaign rehearsal", "no scene of sentinel-2-l2a is left", "quality.csv")
    assert not list(Path("work").rglob("*.zip"))


# --- labels --------------------------------------------------------------------------------------


def check_labels(run: Run, *parts: str, allowed: bool = True) -> None:
    """Both the check and the stage refuse, with the same words."""
    for words in (("check", "bad.yaml"), ("align-labels", "--campaign", "bad.yaml")):
        complains(run(*words), "land_cover", *parts, allowed=allowed)
    nothing_written()


GOOD = [(20 + 80 * i, 20 + 80 * j) for i in range(4) for j in range(4)]
CLASSES = ["water", "built", "grassland", "water"] * 4


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_labels_without_coordinate_system(run: Run, keys: dict[str, Any]) -> None:
    run("check", "bad.yaml", campaign=labels_with(keys, squares(CLASSES, GOOD, AOI["crs"])),
        fails=False)  # fmt: skip
    keys = labels_with(keys, squares(CLASSES, GOOD, None))
    Path("bad.yaml").write_text(yaml.safe_dump(keys))
    check_labels(run, "mine.gpkg: the file has no coordinate system")


def test_labels_with_unknown_classes(run: Run, keys: dict[str, Any]) -> None:
    frame = squares(["lava", *CLASSES[1:]], GOOD, AOI["crs"])
    Path("bad.yaml").write_text(yaml.safe_dump(labels_with(keys, frame)))
    check_labels(run, "mine.gpkg", "'lava' (1)", "broadleaf forest", "labels.mapping")


def test_labels_outside_the_aoi(run: Run, keys: dict[str, Any]) -> None:
    frame = squares(CLASSES, [(c + 5000, r) for c, r in GOOD], AOI["crs"])
    Path("bad.yaml").write_text(yaml.safe_dump(labels_with(keys, frame)))
    check_labels(run, "mine.gpkg", "all 16 labels lie outside the AOI", "420000, 5816160")


def test_labels_empty(run: Run, keys: dict[str, Any]) -> None:
    Path("bad.yaml").write_text(yaml.safe_dump(labels_with(keys, squares([], [], AOI["crs"]))))
    check_labels(run, "mine.gpkg", "the file has no rows", allowed=False)


def test_labels_missing(run: Run, keys: dict[str, Any]) -> None:
    keys["tasks"][0]["labels"]["file"] = "nowhere.gpkg"
    said = run("check", "bad.yaml", campaign=keys)
    complains(said, "tasks[land_cover].labels.file nowhere.gpkg", "no such label", allowed=False)
    complains(run("align-labels", "--campaign", "bad.yaml"), "nowhere.gpkg", "no such file")
    nothing_written()


def test_fewer_labelled_blocks_than_folds(run: Run, keys: dict[str, Any]) -> None:
    frame = squares(["water", "built", "water", "built"],
                    [(5, 5), (20, 5), (350, 350), (365, 350)], AOI["crs"])  # fmt: skip
    Path("bad.yaml").write_text(yaml.safe_dump(labels_with(keys, frame)))
    said = run("align-labels", "--campaign", "bad.yaml")
    complains(said, "folds: count 4, block_m 480", "in 2 blocks, too few for 4 folds",
              "at least 4 labelled blocks", "folds.block_m")  # fmt: skip
    nothing_written()


def test_a_class_in_one_block_only(run: Run, keys: dict[str, Any]) -> None:
    frame = squares(["conifer forest", *(["water", "built"] * 8)[1:]], GOOD, AOI["crs"])
    Path("bad.yaml").write_text(yaml.safe_dump(labels_with(keys, frame)))
    said = run("align-labels", "--campaign", "bad.yaml")
    complains(said, "'conifer forest' (block 0) lie in one block only", "two blocks or more")
    nothing_written()


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["lock-items", "align-labels"])
def test_disk_full(
    run: Run, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = run(verb, "--campaign", "bad.yaml", campaign=keys)
    complains(said, "the disk is full", "nothing half-written", allowed=False)
    nothing_written()


def test_disk_full_while_a_tile_is_written(
    run: Run, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles finished before stay and are not computed again."""
    _through_audit(run, keys, 0.0)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    words = ("build-cube", "--batch", "b0000", "--campaign", "bad.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        complains(run(*words), "the disk is full", allowed=False)
    made = sorted(p.name for p in Path("work/cube").iterdir())
    assert made == ["x000y000.zip", "x001y000.zip"]
    said = run(*words, fails=False)
    assert said.count("finished before, kept") == 2
    assert len(list(Path("work/cube").glob("*.zip"))) == 4


def test_other_system_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    Path("bad.yaml").write_text(yaml.safe_dump(keys))
    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(sys, "argv", ["terraloom", "lock-items", "--campaign", "bad.yaml"])
    with pytest.raises(OSError, match="Input/output"):
        cli.main()
    nothing_written()
