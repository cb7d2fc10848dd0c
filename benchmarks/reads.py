"""1,000 small reads from a server with 50 ms latency, 16 requests in flight.

`ratio` is the time taken over latency x requests / requests in flight, which no client can beat
without asking for less (3.1 s). Where the client's CPU seconds come near that, the machine is what
is slow. Server and client are two processes on the loopback interface. Medians of three rounds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.faulty_server import serve_folder
from terraloom.acquire.fetch import Address, Identity, fetch_range, limit_requests, read_many
from terraloom.acquire.rasters import open_raster
from terraloom.io import read_window

READS, IN_FLIGHT, LATENCY_S, ROUNDS = 1000, 16, 0.05, 3
BOX = GeoBox((1024, 1024), Affine(10, 0, 300000, 0, -10, 5900040), "EPSG:32633")
#: As GDAL is set up for cloud-optimised files, with no more waiting than here.
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_INGESTED_BYTES_AT_OPEN": 32768}


def serve(folder: Path, pipe: Any) -> None:
    with serve_folder(folder, latency_s=LATENCY_S) as server:
        pipe.send(server.url)
        while pipe.recv() == "count":
            pipe.send(len(server.requests))
            server.reset()


def window(n: int) -> GeoBox:
    """The n-th of 64 blocks of 128 x 128 pixels, 32 KB each."""
    row, col = divmod(n % 64, 8)
    return BOX[128 * row : 128 * (row + 1), 128 * col : 128 * (col + 1)]


def raw(url: str, n: int) -> None:
    fetch_range(Address(f"{url}/0.tif"), 4096 * (n % 500), 4096 * (n % 500 + 1), Identity())


def ours(url: str, n: int) -> None:
    with open_raster(f"{url}/{n // 64}.tif") as src:
        read_window(src, window(n))


def gdal(url: str, n: int) -> None:
    with rasterio.Env(**GDAL), rasterio.open(f"{url}/{n // 64}.tif") as src:
        read_window(src, window(n))


def timed(pipe: Any, read: Callable[[int], None]) -> tuple[float, float, int]:
    pipe.send("count")
    pipe.recv()
    start, cpu = time.monotonic(), time.process_time()
    read_many([partial(read, n) for n in range(READS)], IN_FLIGHT)
    took, cpu = time.monotonic() - start, time.process_time() - cpu
    pipe.send("count")
    return took, cpu, pipe.recv()


def main() -> None:
    limit_requests(IN_FLIGHT, 60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = np.random.default_rng(0).integers(1, 9000, BOX.shape).astype(np.uint16)
        profile = {
            "driver": "GTiff", "width": 1024, "height": 1024, "count": 1, "dtype": "uint16",
            "crs": "EPSG:32633", "transform": BOX.affine, "tiled": True, "blockxsize": 128,
            "blockysize": 128, "nodata": 0,
        }  # fmt: skip
        for n in range(READS // 64 + 1):
            with rasterio.open(folder / f"{n}.tif", "w", **profile) as dst:
                dst.write(data, 1)
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, there))
        server.start()
        url, rows = here.recv(), {}
        for _ in range(ROUNDS):
            for label, read in (("ranges of 4 KB", raw), ("blocks of 16 rasters", ours),
                                ("the same by GDAL's own reader", gdal)):  # fmt: skip
                rows.setdefault(label, []).append(timed(here, partial(read, url)))
        here.send("end")
        server.join()
    print(f"{'reads':30}  seconds  CPU s  requests  ratio")
    for label, runs in rows.items():
        seconds, cpu, requests = (statistics.median(column) for column in zip(*runs, strict=True))
        ratio = seconds / (LATENCY_S * READS / IN_FLIGHT)
        print(f"{label:30}  {seconds:7.2f}  {cpu:5.2f}  {requests:8.0f}  {ratio:5.2f}")


if __name__ == "__main__":
    main()
