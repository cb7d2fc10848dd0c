"""Regional sums of 8 probabilities of 5490^2 over 500 overlapping polygons, beside exactextract.

Both read the same compressed file, in turns; medians of seconds on the clock and of the processor,
and the largest relative difference of the sums. One plain read of the file is the floor. The last
line adds what exactextract does not give: true pixel areas and the variance with correlated errors.

Usage: python benchmarks/regions.py [--size 5490] [--regions 500] [--rounds 3] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio
from affine import Affine
from exactextract import exact_extract
from odc.geo.geobox import GeoBox
from rasterio.windows import Window
from scipy.ndimage import zoom
from shapely.geometry import Polygon

from terraloom.assess.areas import PixelAreas
from terraloom.uncertainty.covariance import ErrorCovariance
from terraloom.uncertainty.regions import Block, RegionSums, sum_regions

CLASSES, PIXEL, CRS = 8, 10.0, "EPSG:32633"
LEFT, TOP = 300_000.0, 5_900_040.0


def make_raster(path: Path, size: int) -> None:
    """Smooth class probabilities with noise, float32, in compressed tiles."""
    rng = np.random.default_rng(0)
    coarse = -(-size // 60) + 1
    scores = np.stack([
        2 * zoom(rng.normal(size=(coarse, coarse)), 60, order=1)[:size, :size].astype(np.float32)
        + 0.3 * rng.normal(size=(size, size)).astype(np.float32)
        for _ in range(CLASSES)
    ])  # fmt: skip
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=0)
    with rasterio.open(
        path, "w", driver="GTiff", width=size, height=size, count=CLASSES, dtype="float32", crs=CRS,
        transform=Affine(PIXEL, 0, LEFT, 0, -PIXEL, TOP), tiled=True, blockxsize=512,
        blockysize=512, compress="deflate", predictor=3, zlevel=1, interleave="band",
    ) as dst:  # fmt: skip
        dst.write(scores)


def make_regions(count: int, size: int) -> gpd.GeoDataFrame:
    """Star-shaped polygons of about 95,000 pixels that overlap."""
    rng = np.random.default_rng(1)
    shapes = []
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for _ in range(count):
        x, y = rng.uniform(0.06, 0.94, 2) * size * PIXEL
        wave = rng.normal(size=60).cumsum()
        # Tied at both ends, so that the outline closes without a spike.
        wave -= np.linspace(0, 1, 60) * wave[-1]
        r = np.clip(1750 * (1 + 0.03 * wave), 500, 3000)
        ring = np.column_stack([LEFT + x + r * np.cos(angle), TOP - y + r * np.sin(angle)])
        shapes.append(Polygon(ring))
    return gpd.GeoDataFrame({"id": range(count)}, geometry=shapes, crs=CRS)


def ours(path: Path, regions: gpd.GeoDataFrame, *, errors: bool) -> list[RegionSums]:
    with rasterio.open(path) as src:
        geobox = GeoBox((src.height, src.width), src.transform, CRS)
        valid = np.ones(geobox.shape, np.float32)

        def read(window: tuple[slice, slice]) -> Block:
            p = src.read(window=Window.from_slices(*window))
            return Block(p, valid[window], p * (1 - p) if errors else None)

        c = ErrorCovariance(1.0, 0.3, "exponential", 400.0)
        more = {"areas": PixelAreas(geobox).window, "covariances": [c] * CLASSES} if errors else {}
        return sum_regions(list(regions.geometry), geobox, read, layers=CLASSES, **more)


def plain_read(path: Path) -> None:
    with rasterio.open(path) as src:
        for band in range(1, src.count + 1):
            src.read(band)


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    clock, cpu = time.monotonic(), time.process_time()
    found = work()
    return time.monotonic() - clock, time.process_time() - cpu, found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--size", type=int, default=5490, help="pixels per side")
    options.add_argument("--regions", type=int, default=500, help="polygons")
    options.add_argument("--rounds", type=int, default=3, help="rounds")
    options.add_argument("--work", type=Path, help="folder that keeps the raster")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = (args.work or Path(scratch)) / f"probabilities-{args.size}.tif"
        if not path.exists():
            make_raster(path, args.size)
        regions = make_regions(args.regions, args.size)
        ways: dict[str, Callable[[], object]] = {
            "one plain read": lambda: plain_read(path),
            "exactextract": lambda: exact_extract(str(path), regions, ["sum"], output="pandas"),
            "terraloom": lambda: ours(path, regions, errors=False),
            "terraloom, with errors": lambda: ours(path, regions, errors=True),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        found: dict[str, object] = {}
        for _ in range(args.rounds):
            for name, work in ways.items():
                clock, cpu, found[name] = timed(work)
                times[name].append((clock, cpu))
    size = regions.area.mean() / PIXEL**2
    print(f"{CLASSES} bands of {args.size}^2, {len(regions)} polygons of {size:.0f} px on average")
    for name, pairs in times.items():
        clock, cpu = (statistics.median(v) for v in zip(*pairs, strict=True))
        print(f"{name:24} {clock:7.2f} s  processor {cpu:7.2f} s")
    ratios = [e[1] / t[1] for e, t in zip(times["exactextract"], times["terraloom"], strict=True)]
    print(f"exactextract / terraloom {statistics.median(ratios):7.2f} of processor seconds")
    sums = np.array([s.total for s in found["terraloom"]])  # type: ignore[attr-defined]
    peer = found["exactextract"].to_numpy()  # type: ignore[attr-defined]
    print(f"largest relative difference of the sums {np.abs(sums / peer - 1).max():.1e}")


if __name__ == "__main__":
    main()
