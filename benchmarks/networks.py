"""Size and speed of the network for different sensors, beside that of the demo's groups.

Usage: python benchmarks/networks.py
"""

from __future__ import annotations

import statistics
import time

import torch

from terraloom.models.fusion import FusionNet, FusionSpec
from terraloom.models.heads import TaskSpec
from terraloom.models.registry import build, ready
from terraloom.preprocess.groups import group_factor

ROUNDS = 7
SIZE_PX = 480
TASKS = (TaskSpec("cover", "segmentation", tuple("abcdef")), TaskSpec("edge", "boundary"))
S2_10 = ("B02", "B03", "B04", "B08")
S2_20 = ("B05", "B06", "B07", "B8A", "B11", "B12")
LANDSAT = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B8A", "swir1": "B11",
           "swir2": "B12"}  # fmt: skip


def dates(n: int, bands: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"d{i:02}/{b}" for i in range(n) for b in bands)


HUNDREDS = tuple(f"b{i:03}" for i in range(200))
CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "demo (13 Sentinel-2 bands)": {"s2_10": S2_10, "s2_20": S2_20, "s2_60": ("B01", "B09", "B10")},
    "Landsat, 4 periods": {"l8_30": dates(4, tuple(LANDSAT))},
    "Sentinel-1 and 2, DEM, MODIS": {
        "s2_10": S2_10, "s1_10": ("VV", "VH"), "dem_10": ("DEM",), "s2_20": S2_20,
        "modis_240": dates(23, ("NDVI",)),
    },
    "200 bands at 30 m": {"hyper_30": HUNDREDS},
    "200 bands at 10 m": {"hyper_10": HUNDREDS},
    "12 dates x 10 bands at 10 m": {"s2_10": dates(12, S2_10 + S2_20)},
    "12 dates x (4 at 10 m + 6 at 20 m)": {"s2_10": dates(12, S2_10), "s2_20": dates(12, S2_20)},
}  # fmt: skip


def network(channels: dict[str, tuple[str, ...]], reduce_to: int) -> FusionNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = FusionSpec(channels, TASKS, roles={"l8_30": LANDSAT}, reduce_to=reduce_to)
        return ready(build(spec))


def inputs(channels: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {name: SIZE_PX // group_factor(name) for name in channels}
    return {n: torch.rand((1, len(c), sizes[n], sizes[n]), generator=g)
            for n, c in channels.items()}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    first = next(iter(CASES.values()))
    reference, reference_x = network(first, 32), inputs(first)
    print(f"{SIZE_PX} x {SIZE_PX} px of 10 m, 1 thread; time beside the demo's, {ROUNDS} rounds")
    print(f"{'groups':36} {'reduce_to':>9} {'parameters':>11} {'halo px':>8} {'time ratio':>10}")
    for name, channels in CASES.items():
        x = inputs(channels)
        reducible = any(network(channels, 32).reduce)
        for reduce_to in (32, 0) if reducible else (32,):
            net, ratios = network(channels, reduce_to), []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                reference.predict(reference_x)
                middle = time.perf_counter()
                net.predict(x)
                ratios.append((time.perf_counter() - middle) / (middle - start))
            count = sum(p.numel() for p in net.parameters())
            ratio = statistics.median(ratios)
            print(f"{name:36} {reduce_to:9} {count:11,} {net.halo_px():8} {ratio:10.2f}")


if __name__ == "__main__":
    main()
