"""Archives that fail: what is read is right, or the error names item, asset and fault.

A real server on the loopback interface breaks its answers; afterwards it is sound again, and the
same process must read the right pixels: nothing wrong may have been kept.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from odc.geo.geobox import GeoBox

from support.faulty_server import Fault, FaultyServer, serve_folder
from support.road import HAVEL, ROOT
from terraloom.acquire import assets, fetch, rasters
from terraloom.acquire.assets import read_band, verify_asset, verify_item
from terraloom.aoi import campaign_grid
from terraloom.config.campaign import Source
from terraloom.config.load import parse_campaign
from terraloom.errors import SceneError
from terraloom.io import read_json, read_store, sha256, write_json
from terraloom.preprocess.cube import Scene, build_tile
from terraloom.preprocess.verify import PASSED, verify_items

LEFT, TOP, SIZE = 360000, 5820000, 512
BOX = GeoBox((SIZE, SIZE), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")
WINDOW = BOX[130:390, 200:460]
#: Longest silence of a server in these tests, seconds.
PATIENCE_S = 0.3
DN = np.random.default_rng(3).integers(1001, 9000, BOX.shape).astype(np.uint16)
RIGHT = (DN * np.float32(1e-4) - np.float32(0.1))[130:390, 200:460]


def write(path: Path, data: np.ndarray, compress: str = "none") -> None:
    with rasterio.open(
        path, "w", driver="GTiff", width=SIZE, height=SIZE, count=1, dtype="uint16", nodata=0,
        crs="EPSG:32633", transform=BOX.affine, tiled=True, blockxsize=128, blockysize=128,
        compress=compress,
    ) as dst:  # fmt: skip
        dst.write(data, 1)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.005)
    monkeypatch.setattr(rasters, "_WORDS_S", 0.005)
    # Ports are used again, so that one address may be two archives.
    rasters._heads.clear()
    fetch.limit_requests(8, PATIENCE_S)
    yield
    fetch.limit_requests(16, 60)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[FaultyServer]:
    """A server of one band, plain and compressed: random pixels, so that each block counts."""
    folder = tmp_path / "archive"
    folder.mkdir()
    write(folder / "none.tif", DN)
    write(folder / "deflate.tif", DN, "deflate")
    with serve_folder(folder) as server:
        yield server


def item_of(server: FaultyServer, name: str = "none", **asset: Any) -> dict[str, Any]:
    record = {
        "href": f"{server.url}/{name}.tif", "band": 1, "size": None, "checksum": None,
        "etag": None, "scale": 1e-4, "offset": -0.1, "unit": "reflectance", "nodata": 0,
        "resolution_m": 10, "shape": [SIZE, SIZE], "sign": None, **asset,
    }  # fmt: skip
    return {
        "id": "S2A_x", "source": "sentinel-2-l2a", "crs": "EPSG:32633", "datetime": "2024-04-01",
        "decision": "use", "assets": {"B02": record},
    }  # fmt: skip


def right(item: dict[str, Any]) -> bool:
    return bool(np.abs(read_band(item, "B02", WINDOW) - RIGHT).max() < 1e-6)


def fails(item: dict[str, Any], *words: str) -> SceneError:
    with pytest.raises(SceneError) as err:
        read_band(item, "B02", WINDOW)
    assert err.value.where == f"item S2A_x, asset B02 ({item['assets']['B02']['href']})"
    assert err.value.fix
    for word in words:
        assert re.search(word, err.value.found), err.value.found
    return err.value


ATTEMPTS = "5 attempts were made"
#: What goes wrong, and what a reader is told when it does so every time; None: it can be read.
FAULTS: dict[str, tuple[Fault, tuple[str, ...] | None]] = {
    "500": (Fault("status", code=500), ("the server answered 500", ATTEMPTS)),
    "503": (Fault("status", code=503), ("the server answered 503", ATTEMPTS)),
    "429": (Fault("status", code=429, retry_after="0"), ("the server answered 429", ATTEMPTS)),
    "reset": (Fault("reset"), ("connection failed .*[Rr]eset", ATTEMPTS)),
    "reset at once": (Fault("reset", keep=0), ("connection failed", ATTEMPTS)),
    "truncated": (Fault("truncate"), ("connection failed .*IncompleteRead", ATTEMPTS)),
    "stalled": (Fault("stall"), ("connection failed .*[Tt]ime", ATTEMPTS)),
    "too slow": (Fault("slow", rate=400), ("only .* bytes came in|broke off|Time", ATTEMPTS)),
    "words": (Fault("html"), ("no raster; it begins with b'<html>|file has .* bytes, not",)),
    "another range": (Fault("wrong_range"), ("bytes .* came instead of", ATTEMPTS)),
    "compressed on the way": (Fault("gzip"), ("sent the file as gzip", ATTEMPTS)),
    "no ranges": (Fault("whole"), None),
    "moved": (Fault("redirect", path="tif$"), None),
    "late": (Fault("delay", seconds=PATIENCE_S / 3), None),
    "slow": (Fault("slow", rate=1_000_000), None),
}


@pytest.mark.parametrize("first", [0, 1], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_time_only(archive: FaultyServer, name: str, first: int) -> None:
    fault, _ = FAULTS[name]
    for compress in ("none", "deflate"):
        archive.reset(_after(fault, first, 1))
        assert right(item_of(archive, compress)), compress
        assert archive.faults[0].seen > first, "the fault was never met"
        archive.reset()
        assert right(item_of(archive, compress))


@pytest.mark.parametrize("first", [0, 1], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_named_and_not_kept(
    archive: FaultyServer, name: str, first: int
) -> None:
    fault, words = FAULTS[name]
    item = item_of(archive)
    archive.reset(_after(fault, first, None))
    if words is None:
        assert right(item)
    else:
        fails(item, *words)
    archive.reset()
    assert right(item)


def _after(fault: Fault, first: int, times: int | None) -> Fault:
    fault = copy.copy(fault)
    fault.after, fault.times, fault.seen = first, times, 0
    return fault


# --- one at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [404, 410, 403])
def test_a_final_answer_is_not_asked_for_again(archive: FaultyServer, code: int) -> None:
    archive.reset(Fault("status", code=code, times=None))
    fails(item_of(archive), str(code))
    assert archive.faults[0].seen == 1
    archive.reset()
    assert right(item_of(archive))


def test_the_server_says_how_long_to_wait(archive: FaultyServer) -> None:
    archive.reset(Fault("status", code=429, retry_after="1"))
    began = time.monotonic()
    assert right(item_of(archive))
    assert 1 <= time.monotonic() - began < 5
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    archive.reset(Fault("status", code=503, retry_after=soon))
    began = time.monotonic()
    assert right(item_of(archive))
    assert 0.5 < time.monotonic() - began < 5


def test_no_wait_is_longer_than_allowed(
    archive: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "WAIT_S", 0.01)
    archive.reset(Fault("status", code=429, retry_after="86400", times=None))
    began = time.monotonic()
    fails(item_of(archive), "429")
    assert time.monotonic() - began < 5


def test_other_bytes_of_the_right_length(archive: FaultyServer) -> None:
    """A raster's own redundancy shows them; where it has none, the checksum does."""
    fault = Fault("noise", times=None)
    archive.reset(fault)
    fails(item_of(archive), "no raster")
    archive.reset(_after(fault, 1, None))
    fails(item_of(archive, "deflate"), "cannot be read to the end")
    archive.reset(_after(fault, 1, None))
    item = item_of(archive, checksum=sha256(archive.folder / "none.tif"))
    with pytest.raises(SceneError, match="the checksum differs") as err:
        verify_item(item)
    assert "item S2A_x, asset B02" in err.value.where
    archive.reset()
    verify_item(item)
    assert right(item) and right(item_of(archive, "deflate"))


def test_a_file_that_changes_while_it_is_read(archive: FaultyServer) -> None:
    """Blocks of two versions are never mixed, whatever is in memory of the older one."""
    item = item_of(archive)
    assert right(item)
    write(archive.folder / "none.tif", 65535 - DN)
    fails(item, "another one now")
    new = (65535 - DN) * np.float32(1e-4) - np.float32(0.1)
    np.testing.assert_allclose(read_band(item, "B02", WINDOW), new[130:390, 200:460], atol=1e-6)


def test_the_file_of_the_lock_is_read_or_none(archive: FaultyServer) -> None:
    size = (archive.folder / "none.tif").stat().st_size
    assert right(item_of(archive, size=size))
    fails(item_of(archive, size=size + 1), f"has {size} bytes, not {size + 1}")
    tag = rasters.remote_identity(f"{archive.url}/none.tif").tag
    assert tag and right(item_of(archive, etag=f'W/"{tag}"'))
    fails(item_of(archive, etag='"other"'), f"ETag {tag}, not other")


def test_the_end_is_missing(archive: FaultyServer) -> None:
    """A truncated upload: blocks beyond the end are no zeros."""
    path = archive.folder / "none.tif"
    path.write_bytes(path.read_bytes()[:300_000])
    fails(item_of(archive), "before its last block|cannot be read")
    with pytest.raises(SceneError, match=r"a block ends at .* the file at 300000"):
        verify_item(item_of(archive))


def test_only_the_window_comes_and_side_by_side(archive: FaultyServer) -> None:
    item, corner = item_of(archive), BOX[:128, :128]
    archive.reset()
    read_band(item, "B02", corner)
    read_band(item, "B02", corner)
    assert len(archive.faults) == 0 and archive.count(status=206) == 3  # one beginning, kept
    assert sum(archive.bytes_sent.values()) < (1 << 15) + 2.2 * 128 * 128 * 2
    archive.reset()
    archive.latency_s = 0.05
    calls = [lambda n=n: read_band(item, "B02", BOX[n * 16 : n * 16 + 16]) for n in range(30)]
    parts = fetch.read_many(calls, 30)
    np.testing.assert_allclose(
        np.concatenate(parts), DN[:480] * np.float32(1e-4) - np.float32(0.1), atol=1e-6
    )
    assert 5 <= archive.most_at_once <= 8  # as many as may be, and no more


def test_the_first_error_ends_side_by_side_reads(archive: FaultyServer) -> None:
    done: list[int] = []

    def call(n: int) -> int:
        if n == 3:
            raise SceneError("third")
        time.sleep(0.01)
        done.append(n)
        return n

    assert fetch.read_many([lambda n=n: call(n) for n in (5, 4, 9)], 2) == [5, 4, 9]
    done.clear()
    with pytest.raises(SceneError, match="third"):
        fetch.read_many([lambda n=n: call(n) for n in range(200)], 2)
    assert len(done) < 20


# --- verification --------------------------------------------------------------------------------


def test_sizes_and_tags_of_the_record(archive: FaultyServer) -> None:
    size = (archive.folder / "none.tif").stat().st_size
    verify_item(item_of(archive, size=size))
    for asset, words in (
        ({"size": 7}, f"{size} bytes, 7 recorded"),
        ({"etag": "older"}, "changed since the lock"),
        ({"checksum": "0" * 32}, "checksum differs"),
    ):
        with pytest.raises(SceneError, match=words):
            verify_item(item_of(archive, **asset))


def test_empty_and_huge_files_are_refused_before_they_are_read(archive: FaultyServer) -> None:
    (archive.folder / "none.tif").write_bytes(b"")
    with pytest.raises(SceneError, match="zero bytes"):
        verify_item(item_of(archive))
    with (archive.folder / "none.tif").open("wb") as f:
        f.write((archive.folder / "deflate.tif").read_bytes())
        f.truncate(100_000_000_000)  # a hole: takes no space
    archive.reset()
    with pytest.raises(SceneError, match="100 GB") as err:
        verify_asset(item_of(archive, checksum="0" * 64), "B02", max_bytes=20e9)
    assert err.value.allowed == "scenes.max_asset_gb 20"
    assert sum(archive.bytes_sent.values()) <= 1 << 15


def campaign_of(items: list[dict[str, Any]], **scenes: Any) -> tuple[Any, Any]:
    """A campaign on the archive's area, with a lock of these items."""
    data = yaml.safe_load((ROOT / HAVEL).read_text())
    data["aoi"] = {"bbox": [LEFT, TOP - 3840, LEFT + 3840, TOP], "crs": "EPSG:32633"}
    data["grid"] = {"crs": "EPSG:32633", "tile_px": 192}
    data["scenes"] = {"requests": 8, "timeout_s": PATIENCE_S, **scenes}
    campaign = parse_campaign(data)
    write_json("results/scenes/items.json", {"items": items})
    return campaign, campaign_grid(campaign)


def test_items_of_a_failing_archive_are_reported_never_passed(
    archive: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is named; once the archive is well, the next run checks just that."""
    monkeypatch.chdir(tmp_path)
    items = []
    for n in range(5):
        write(archive.folder / f"{n}.tif", DN, "deflate")
        items.append({**item_of(archive, str(n)), "id": f"S2A_{n}"})
    campaign, grid = campaign_of(items, max_failed_pct=50)
    archive.reset(Fault("status", path="/3.tif", times=None),
                  Fault("truncate", path="/4.tif", times=None),
                  Fault("reset", path="/1.tif"))  # fmt: skip
    verify_items(campaign, grid)
    verdicts = read_json("results/scenes/verified.json")
    assert [v == "ok" for v in verdicts.values()] == [True, True, True, False, False]
    assert verdicts["S2A_3"].startswith("item S2A_3, asset B02 (") and "503" in verdicts["S2A_3"]
    assert "IncompleteRead" in verdicts["S2A_4"]
    assert set(read_json(PASSED)) == {"S2A_0", "S2A_1", "S2A_2"}

    archive.reset()
    verify_items(campaign, grid)
    assert set(read_json("results/scenes/verified.json").values()) == {"ok"}
    assert archive.count("/[012].tif") == 0 < archive.count("/[34].tif")

    archive.reset()
    items[2]["assets"]["B02"]["nodata"] = 5  # another record is another item
    verify_items(*campaign_of(items))
    assert "nodata" in read_json("results/scenes/verified.json")["S2A_2"]
    assert archive.count("/[0134].tif") == 0


def test_a_failing_archive_stops_the_run_when_it_should(
    archive: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    items = [item_of(archive), {**item_of(archive, "deflate"), "id": "S2A_y"}]
    archive.reset(Fault("stall", path="deflate", times=None))
    for scenes, words in (
        ({"on_bad_item": "stop"}, r"item S2A_y, asset B02 .*connection failed"),
        ({"max_failed_pct": 40}, r"1 of 2 items cannot be used \(50 %\): S2A_y; first"),
    ):
        with pytest.raises(SceneError, match=words):
            verify_items(*campaign_of(items, **scenes))
        assert not Path("results/scenes/verified.json").exists()


def test_a_replaced_local_file_is_checked_again(
    archive: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = item_of(archive, href="archive/none.tif")
    checked: list[str] = []
    real = assets.verify_asset

    def counted(item: dict[str, Any], band: str, **more: Any) -> None:
        checked.append(band)
        real(item, band, **more)

    monkeypatch.setattr("terraloom.preprocess.verify.verify_asset", counted)
    for times in (1, 1):
        verify_items(*campaign_of([item]))
        assert len(checked) == times
    path = archive.folder / "none.tif"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SceneError, match="read to the end"):
        verify_items(*campaign_of([item]))
    assert len(checked) == 2


# --- cubes ---------------------------------------------------------------------------------------


def test_a_cube_is_right_or_is_not_there(
    archive: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes from a failing archive as from a sound one, or the item and no file."""
    monkeypatch.chdir(tmp_path)
    for n in range(3):
        write(archive.folder / f"{n}.tif", np.roll(DN, n), "deflate" if n else "none")
    scenes = []
    for n in range(3):
        item = {**item_of(archive, str(n)), "id": f"S2A_{n}", "datetime": f"2017-02-0{n + 1}"}
        scenes.append(Scene(item | {"footprint": None}, (), None))
    campaign, grid = campaign_of([])
    campaign = campaign.model_copy(
        update={"sources": [Source(source="sentinel-2-l2a", bands=["B02"])]}
    )
    tile = next(iter(grid.tiles()))

    def built(name: str) -> str:
        rasters._heads.clear()
        build_tile(tile, grid, campaign, scenes, tmp_path / name, "code")
        return sha256(tmp_path / name)

    sound = built("sound.zip")
    assert read_store(tmp_path / "sound.zip")["s2_10"].notnull().all()
    archive.reset(
        Fault("status", path="/0.tif", after=1), Fault("truncate", path="/1.tif", after=1),
        Fault("reset", path="/2.tif"), Fault("stall", path="/2.tif", after=1),
        Fault("wrong_range", path="/0.tif", after=1), Fault("html", path="/1.tif"),
    )  # fmt: skip
    assert built("shaken.zip") == sound
    assert sum(f.seen > f.after for f in archive.faults) == len(archive.faults)
    for kind in ("status", "truncate", "wrong_range", "whole"):
        archive.reset(Fault(kind, path="/1.tif", after=1, times=None))
        if kind == "whole":
            assert built("other.zip") == sound
            continue
        with pytest.raises(SceneError, match="item S2A_1, asset B02"):
            built("other.zip")
        assert not list(tmp_path.glob("other*")) and not list(tmp_path.glob(".tmp*"))
