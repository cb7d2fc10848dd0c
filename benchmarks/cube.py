"""Cube of 12 dates x (10 bands + mask): seconds, ratios and peak memory against odc-stac.

A third of the dates lies in the next UTM zone; the composite is a masked median. Every run has a
process of its own; seconds count from after the imports, processor seconds too: on two free cores
ours takes about half of them. "odc" takes our median band by band, "odc, xarray" is what its users
write. odc-stac is left out where it is not installed (0.5.3 was compared).

Usage: python benchmarks/cube.py [--rounds 3] [--folder DIR] [--large]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

DATES, BANDS, SIDE = 12, 10, 1024
LEFT, TOP = 600_000, 5_800_020
TABLE = """
title: Ten bands
kind: optical
collection: bench
unit: reflectance
scale: 0.0001
nodata: 0
mask_resolution_m: 20
bands:
"""


def geobox(side: int, zone: int = 33):
    """Pixels of the tile, or in the zone west of it those that cover the tile."""
    from affine import Affine
    from odc.geo.geobox import GeoBox

    tile = GeoBox((side, side), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")
    if zone == 33:
        return tile
    box = tile.extent.to_crs(f"EPSG:326{zone}").boundingbox
    left, top = box.left // 10 * 10 - 200, box.top // 10 * 10 + 200
    n = int((max(box.right - box.left, box.top - box.bottom) + 400) // 10) + 1
    return GeoBox((n, n), Affine(10, 0, left, 0, -10, top), f"EPSG:326{zone}")


def now() -> np.ndarray:
    """Seconds of the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def make(folder: Path, side: int, bands: int, files: int) -> None:
    """Write scenes: ``files`` different images per zone, used in turn, and a mask per date."""
    from scipy import ndimage

    from terraloom.grid import coarsen
    from terraloom.io import write_raster

    rng = np.random.default_rng(0)
    (folder / "table.yaml").write_text(
        TABLE
        + "".join(
            f"  b{b}: {{assets: [b{b}], resolution_m: 10, group: ten_10}}\n" for b in range(bands)
        )
    )
    items = []
    for t in range(DATES):
        zone = 32 if t % 3 == 2 else 33
        box = geobox(side, zone)
        assets = {}
        for b in range(bands):
            n = (t * bands + b) % files if files else t * bands + b
            path = folder / f"{zone}-{n}.tif"
            if not path.exists():
                ground = ndimage.gaussian_filter(rng.normal(size=box.shape), 5) * 8000
                dn = np.clip(2000 + ground + rng.normal(0, 50, box.shape), 1, 9999)
                write_raster(path, dn.astype(np.uint16), box, nodata=0)
            assets[f"b{b}"] = {
                "href": str(path), "size": None, "checksum": None, "scale": 1e-4, "offset": 0.0,
                "nodata": 0, "resolution_m": 10.0, "shape": list(box.shape),
            }  # fmt: skip
        cloudy = ndimage.gaussian_filter(rng.normal(size=(side // 2, side // 2)), 20) > 0.01
        mask = folder / f"mask{t}.tif"
        write_raster(mask, cloudy.astype(np.uint8) * 2, coarsen(geobox(side), 2), nodata=255)
        items.append(
            {"id": f"i{t}", "source": str(folder / "table.yaml"), "crs": f"EPSG:326{zone}",
             "datetime": f"2023-06-{2 * t + 1:02}T10:00:00Z", "assets": assets, "mask": str(mask)}
        )  # fmt: skip
    (folder / "items.json").write_text(json.dumps(items))


def ours(folder: Path, items: list, side: int):
    from shapely import box

    from terraloom.config.load import parse_campaign
    from terraloom.grid import CampaignGrid
    from terraloom.preprocess.cube import Scene, build_tile

    b = geobox(side).boundingbox
    campaign = parse_campaign(
        {
            "name": "bench", "title": "B",
            "aoi": {"bbox": [b.left, b.bottom, b.right, b.top], "crs": "EPSG:32633"},
            "sources": [{"source": str(folder / "table.yaml")}],
            "cube": {"periods": [{"name": "p", "start": "2023-06-01", "end": "2023-06-30"}]},
            "tasks": [{"name": "t", "kind": "boundary", "labels": {"file": "l.gpkg"}},
                      {"name": "lc", "kind": "segmentation", "classes": "c.csv",
                       "labels": {"file": "l.gpkg", "column": "c"}}],
        }
    )  # fmt: skip
    grid = CampaignGrid(geobox(side), side, box(b.left, b.bottom, b.right, b.top))
    scenes = [Scene(i, ((Path(i["mask"]), 1),), None) for i in items]
    path = folder / "cube.zip"
    path.unlink(missing_ok=True)
    start = now()
    build_tile(grid.tiles()[0], grid, campaign, scenes, path, "bench")
    return now() - start, path


def floor(folder: Path, items: list, side: int):
    """Read and warp everything, one after another, and keep nothing but a sum."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT
    from rasterio.windows import from_bounds

    box = geobox(side)
    start = now()
    total = 0
    for item in items:
        for asset in item["assets"].values():
            with rasterio.open(asset["href"]) as src:
                if str(src.crs) == "EPSG:32633":
                    total += int(
                        src.read(1, window=from_bounds(*box.boundingbox, src.transform))[0, 0]
                    )
                    continue
                with WarpedVRT(
                    src, crs="EPSG:32633", transform=box.affine, width=side, height=side,
                    resampling=Resampling.bilinear,
                ) as vrt:  # fmt: skip
                    total += int(vrt.read(1)[0, 0])
        with rasterio.open(item["mask"]) as src:
            total += int(src.read(1, out_shape=(side, side))[0, 0])
    return now() - start, None


def odc_plain(folder: Path, items: list, side: int):
    """As odc-stac's users write it: load, mask, median."""
    return odc(folder, items, side, plain=True)


def odc(folder: Path, items: list, side: int, *, plain: bool = False):
    """With our median, band by band, which needs less memory than xarray's."""
    import odc.stac
    import pystac
    from odc.stac import configure_rio

    from terraloom.preprocess.composites import median

    configure_rio(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR")
    records = [_stac(i, side) for i in items]
    names = list(items[0]["assets"])
    start = now()
    cube = odc.stac.load(
        [pystac.Item.from_dict(r) for r in records], bands=[*names, "mask"], geobox=geobox(side),
        resampling={"*": "bilinear", "mask": "nearest"}, pool=2, groupby="id",
    )  # fmt: skip
    if plain:
        data = cube[names].where((cube["mask"] == 0) & (cube[names] != 0)).median("time")
        return now() - start, data
    cloudy = cube["mask"].to_numpy() != 0
    out = np.empty((len(names), side, side), np.float32)
    for n, name in enumerate(names):
        values = cube[name].to_numpy().astype(np.float32)
        values[cloudy | (values == 0)] = np.nan
        out[n] = median(values)
    spent = now() - start
    np.save(folder / "odc.npy", out)
    return spent, folder / "odc.npy"


def _stac(item: dict, side: int) -> dict:
    def asset(href: str, box) -> dict:
        return {
            "href": href, "type": "image/tiff; application=geotiff", "roles": ["data"],
            "proj:code": str(box.crs), "proj:shape": list(box.shape),
            "proj:transform": list(box.affine[:6]),
            "raster:bands": [{"nodata": 255 if "mask" in href else 0,
                              "data_type": "uint8" if "mask" in href else "uint16"}],
        }  # fmt: skip

    from terraloom.grid import coarsen

    box = geobox(side, int(item["crs"][-2:]))
    extent = box.extent.to_crs("EPSG:4326")
    assets = {b: asset(a["href"], box) for b, a in item["assets"].items()}
    assets["mask"] = asset(item["mask"], coarsen(geobox(side), 2))
    bounds = extent.boundingbox
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": item["id"], "links": [],
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
        ],
        "properties": {"datetime": item["datetime"], "proj:code": str(box.crs)},
        "geometry": extent.json, "collection": "bench", "assets": assets,
        "bbox": [bounds.left, bounds.bottom, bounds.right, bounds.top],
    }  # fmt: skip


def one(what: str, folder: Path, side: int) -> None:
    """Run one way in this process and print its figures."""
    items = json.loads((folder / "items.json").read_text())
    ways = {"ours": ours, "floor": floor, "odc": odc, "odc, xarray": odc_plain}
    spent, _ = ways[what](folder, items, side)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": spent[0], "cpu": spent[1], "rss": peak}))


def _call(what: str, folder: Path, side: int) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", what, "--folder", str(folder), "--side", str(side)],
        check=True, capture_output=True, text=True, env=env,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path) -> list[str]:
    """How far the values lie from the exact median of the same reads, and from odc-stac's."""
    import warnings

    from terraloom.acquire.assets import read_band
    from terraloom.io import read_store, read_window

    items = json.loads((folder / "items.json").read_text())
    box = geobox(SIDE)
    values = read_store(folder / "cube.zip")["ten_10"].to_numpy()[0]
    clear = np.stack([read_window(i["mask"], box) == 0 for i in items])
    worst = 0.0
    for b in (0, BANDS - 1):
        stack = np.stack([read_band(i, f"b{b}", box) for i in items])
        stack[~clear] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            worst = max(worst, float(np.nanmax(np.abs(np.nanmedian(stack, axis=0) - values[b]))))
    lines = [f"largest difference to numpy's exact median: {1e4 * worst:.2f} DN (step 1, so <= .5)"]
    if (folder / "odc.npy").exists():
        d = np.abs(np.load(folder / "odc.npy") - values * 1e4)
        lines.append(f"difference to odc-stac: median {np.nanmedian(d):.2f} DN, "
                     f"99 % {np.nanpercentile(d, 99):.2f} DN")  # fmt: skip
    return lines


def table(folder: Path, rounds: int) -> list[str]:
    """Medians of the rounds, each of which runs every way once."""
    ways = ["floor", "ours", *(["odc", "odc, xarray"] if find_spec("odc.stac") else [])]
    runs: dict[str, list[dict[str, float]]] = {w: [] for w in ways}
    for _ in range(rounds):
        for way in ways:
            runs[way].append(_call(way, folder, SIDE))
    middle = statistics.median
    lines = [f"{DATES} dates x ({BANDS} bands + mask), {SIDE}^2, medians of {rounds} rounds",
             "way                s  x floor   CPU s   peak MB"]  # fmt: skip
    for way, done in runs.items():
        ratio = middle([r["s"] / f["s"] for r, f in zip(done, runs["floor"], strict=True)])
        lines.append(
            f"{way:12} {middle([r['s'] for r in done]):6.1f} {ratio:8.2f} "
            f"{middle([r['cpu'] for r in done]):8.1f} {max(r['rss'] for r in done):8.0f}"
        )
    return lines + compare(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the scenes here")
    parser.add_argument("--large", action="store_true", help="only the memory of a 4096^2 tile")
    parser.add_argument(
        "--one", choices=["ours", "floor", "odc", "odc, xarray"], help=argparse.SUPPRESS
    )
    parser.add_argument("--side", type=int, default=SIDE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.folder, args.side)
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.folder or Path(tmp)
        folder.mkdir(parents=True, exist_ok=True)
        if args.large:
            if not (folder / "items.json").exists():
                make(folder, 4096, 2, 2)
            run = _call("ours", folder, 4096)
            print(f"4096^2, {DATES} dates x 2 bands: {run['s']:.0f} s, peak {run['rss']:.0f} MB")
            return
        if not (folder / "items.json").exists():
            make(folder, SIDE, BANDS, 0)
        print("\n".join(table(folder, args.rounds)))


if __name__ == "__main__":
    main()
