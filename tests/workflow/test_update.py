"""New scenes in an archive: the lock grows, and only what they touch is computed again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rasterio
from rasterio.windows import Window
from rasterio.windows import transform as window_transform
from shapely.geometry import box, mapping

from support.road import REHEARSAL, command, jobs, run_stand_ins, snakemake
from terraloom.aoi import to_crs
from terraloom.io import read_json, sha256

#: A small region: 2 x 2 tiles, one tile a job.
KEYS = (
    "archive={kind: simulated, simulation: {seed: 7, size_px: 384, optical_dates: 8, "
    "sar_dates: 1, cloud_share: 0.1}}",
    "aoi={bbox: [420000, 5816160, 423840, 5820000], crs: 'EPSG:32633'}",
    "grid={crs: 'EPSG:32633', tile_px: 192, tiles_per_job: 1}",
    "scenes={jobs: 1, min_clear_pct: 0}",
    "coregister={on_unaligned: keep}",
)
CUBES = [f"work/cube/b000{n}.json" for n in range(4)]
ARCHIVE = Path("resources/simulated/sim-s2-l2a")
#: The western part of the region that the late scene covers: tiles of the first column only.
WEST_PX = 150


def run(folder: Path, *words: str) -> str:
    return snakemake(folder, *words, campaign=REHEARSAL, keys=KEYS)


def withhold(folder: Path, item_id: str) -> None:
    """Cut a scene to the west of the region and take it out of its collection."""
    place = folder / ARCHIVE / item_id
    for path in place.glob("*.tif"):
        with rasterio.open(path) as src:
            west = src.index(420000 + 10 * WEST_PX, src.bounds.top)[1]
            window = Window(0, 0, west, src.height)
            data, profile = src.read(window=window), src.profile
            profile |= {"width": west, "transform": window_transform(window, src.transform)}
            bounds = rasterio.windows.bounds(window, src.transform)
        with rasterio.open(path, "w", **profile) as dst:
            dst.write(data)
    file = place / f"{item_id}.json"
    item = json.loads(file.read_text())
    outline = to_crs(box(*bounds), "EPSG:32633", "EPSG:4326")
    item["geometry"], item["bbox"] = mapping(outline), list(outline.bounds)
    for name, asset in item["assets"].items():
        path = place / f"{name}.tif"
        with rasterio.open(path) as src:
            asset["proj:shape"] = list(src.shape)
        asset.pop("file:checksum", None)
        asset["file:size"] = path.stat().st_size
    file.write_text(json.dumps(item))
    listing = folder / ARCHIVE / "collection.json"
    collection = json.loads(listing.read_text())
    collection["links"] = [x for x in collection["links"] if item_id not in x["href"]]
    listing.write_text(json.dumps(collection))


def give(folder: Path, item_id: str) -> None:
    """Put a scene into its collection."""
    listing = folder / ARCHIVE / "collection.json"
    collection = json.loads(listing.read_text())
    link = {"rel": "item", "href": f"./{item_id}/{item_id}.json", "type": "application/geo+json"}
    collection["links"].append(link)
    listing.write_text(json.dumps(collection))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Cubes of a region whose archive lacks one scene of the summer."""
    folder = tmp_path_factory.mktemp("update")
    run(folder, "--quiet", "all", "--cores", "2", "resources/simulated/catalog.json")
    summer = [p.name for p in (folder / ARCHIVE).iterdir() if "S2_20220" in p.name]
    late = next(n for n in sorted(summer) if "20220601" <= n[-8:] <= "20220815")
    withhold(folder, late)
    run(folder, "--quiet", "all", "--cores", "2", *CUBES)
    return folder, late


def test_only_touched_tiles_and_periods_run_again(built: tuple[Path, str]) -> None:
    folder, late = built
    assert jobs(run(folder, "-n", *CUBES)) == {}, "finished, yet there is work to do"
    lock = read_json(folder / "results/scenes/items.json")["items"]
    shifts = read_json(folder / "results/scenes/shifts.json")["shifts"]
    tiles = {p.name: sha256(p) for p in (folder / "work/cube").glob("*.zip")}
    same = command("terraloom", "update", cwd=folder).stdout
    assert "No new item" in same

    give(folder, late)
    assert "1 new items, 1 of them used" in command("terraloom", "update", cwd=folder).stdout
    longer = read_json(folder / "results/scenes/items.json")["items"]
    assert [i for i in longer if i["id"] != late] == lock, "what was locked has changed"
    assert next(i for i in longer if i["id"] == late)["added"] == 1

    todo = jobs(run(folder, "-n", *CUBES))
    assert todo == {
        "verify_items": 1, "mask_scenes": 1, "measure_shifts": 1, "audit_scenes": 1,
        "build_cube": 2,
    }  # fmt: skip

    run(folder, "--quiet", "all", "--cores", "2", *CUBES)
    assert jobs(run(folder, "-n", *CUBES)) == {}
    after = read_json(folder / "results/scenes/shifts.json")["shifts"]
    assert {k: v for k, v in after.items() if k != late} == shifts, "finished scenes were moved"
    now = {p.name: sha256(p) for p in (folder / "work/cube").glob("*.zip")}
    assert {n for n in tiles if now[n] != tiles[n]} == {"x000y000.zip", "x000y001.zip"}


@pytest.mark.slow
def test_a_frozen_model_predicts_the_changed_tiles_and_their_neighbours(tmp_path: Path) -> None:
    """Counted on stand-ins of all files, with a lock of two scenes."""
    grid = "grid={crs: 'EPSG:32633', tile_px: 96, tiles_per_job: 1}"
    keys = (*KEYS[:2], grid, *KEYS[3:])
    lock = tmp_path / "results/scenes/items.json"
    options: dict[str, object] = {"campaign": REHEARSAL, "keys": keys}
    west, south, east, north = 420000, 5816160, 423840, 5820000

    def item(name: str, day: str, place: tuple[float, ...], added: int) -> dict[str, object]:
        outline = to_crs(box(*place), "EPSG:32633", "EPSG:4326").wkt
        return {
            "id": name, "source": "sentinel-2-l2a", "datetime": f"{day}T10:00:00Z",
            "decision": "use", "footprint": outline, "added": added, "assets": {},
        }  # fmt: skip

    first = [item("a", "2022-04-01", (west, south, east, north), 0)]
    run_stand_ins(tmp_path, {"items.json": json.dumps({"items": first})}, **options)
    options["keys"] = (*keys, "milestones={chips: frozen, model: frozen}")
    todo = jobs(snakemake(tmp_path, "all", "-n", **options))  # type: ignore[arg-type]
    assert set(todo) == {"catalogue_products", "build_report", "all"}, "these print all keys"

    corner = (west, north - 500, west + 500, north)
    lock.write_text(json.dumps({"items": [*first, item("b", "2022-07-01", corner, 1)]}))
    todo = jobs(snakemake(tmp_path, "all", "-n", **options))  # type: ignore[arg-type]
    assert todo["mask_scenes"] == 1
    assert todo["build_cube"] == 1, "the one tile of sixteen that the scene touches"
    assert todo["predict_tiles"] == 4, "that tile and its three neighbours"
    assert not {"train_member", "cut_chips", "lock_items", "simulate"} & set(todo)


def test_a_changed_campaign_asks_for_a_new_lock(built: tuple[Path, str]) -> None:
    folder, _ = built
    file = folder / "work/campaign.yaml"
    text = file.read_text()
    file.write_text(text.replace("2022-08-15", "2022-08-14"))
    done = command("terraloom", "update", cwd=folder, ok=False)
    file.write_text(text)
    assert done.returncode == 2
    assert "changed since its items were locked" in done.stderr
