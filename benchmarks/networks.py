"""Size and speed of the networks, and of the first for different sensors.

Times stand beside those of the U-Net of the same run: of training a step of 4 windows of 72 px
(forward, backward, AdamW) and of predicting one scene.

Usage: python benchmarks/networks.py [variants|sensors]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from terraloom.models.fusion import FusionSpec
from terraloom.models.heads import TaskSpec
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import build, make_spec, ready
from terraloom.preprocess.groups import group_factor

ROUNDS = 3
SIZE_PX = 240
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


PERIODS = ("2018-05", "2018-08")
TYPICAL: dict[str, tuple[str, ...]] = {
    "s2_10": tuple(f"{p}/{b}" for p in PERIODS for b in S2_10),
    "s1_10": tuple(f"{p}/{b}" for p in PERIODS for b in ("VV", "VH")),
    "dem_10": ("DEM",),
    "s2_20": tuple(f"{p}/{b}" for p in PERIODS for b in S2_20),
}
VARIANTS = ("fusion", "fpn", "context", "utae", "convgru", "convlstm", "ltae", "tempcnn", "gru")


def network(channels: dict[str, tuple[str, ...]], reduce_to: int) -> MapNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = FusionSpec(channels, TASKS, roles={"l8_30": LANDSAT}, reduce_to=reduce_to)
        return ready(build(spec))


def inputs(
    channels: dict[str, tuple[str, ...]], n_windows: int = 1, size_px: int = SIZE_PX
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {name: size_px // group_factor(name) for name in channels}
    return {n: torch.rand((n_windows, len(c), sizes[n], sizes[n]), generator=g)
            for n, c in channels.items()}  # fmt: skip


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def training(net: MapNet) -> Callable[[], None]:
    net.train()
    x = net.prepare(inputs(TYPICAL, 4, 72))
    y = torch.randint(0, 6, (4, 72, 72), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step() -> None:
        raw = net.forward_prepared(x)
        loss = torch.nn.functional.cross_entropy(raw["cover"], y) + raw["edge"].square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def variants() -> None:
    """All networks beside the U-Net: every round times each once, so that load falls on all."""

    def made(name: str) -> MapNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ready(build(make_spec(name, TYPICAL, TASKS)))

    half = SIZE_PX // 2
    x = inputs(TYPICAL, 1, half)  # networks of single pixels take seconds for more
    nets = {n: made(n) for n in VARIANTS}
    steps = {n: training(made(n)) for n in VARIANTS}
    train: dict[str, list[float]] = {n: [] for n in VARIANTS}
    predict: dict[str, list[float]] = {n: [] for n in VARIANTS}
    for n in VARIANTS:
        steps[n]()
    for _ in range(ROUNDS):
        for n in VARIANTS:
            train[n].append(seconds(steps[n]))
            predict[n].append(seconds(lambda net=nets[n]: net.predict(x)))
    print(f"two periods of Sentinel-1 and -2, elevation; 1 thread, medians of {ROUNDS} rounds")
    print(f"{'network':10} {'parameters':>11} {'halo px':>8} {'steps/s':>8} {'ratio':>6} "
          f"{'Mpx/s':>7} {'ratio':>6}")  # fmt: skip
    for n, net in nets.items():
        count = sum(p.numel() for p in net.parameters())
        t, p = statistics.median(train[n]), statistics.median(predict[n])
        speed = [
            statistics.median(a / b for a, b in zip(times["fusion"], times[n], strict=True))
            for times in (train, predict)
        ]
        print(f"{n:10} {count:11,} {net.halo_px():8} {1 / t:8.2f} {speed[0]:6.2f} "
              f"{half**2 / 1e6 / p:7.3f} {speed[1]:6.2f}")  # fmt: skip


def sensors() -> None:
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


def main() -> None:
    torch.set_num_threads(1)
    which = sys.argv[1] if len(sys.argv) > 1 else ""
    if which in ("", "variants"):
        variants()
    if which in ("", "sensors"):
        sensors()


if __name__ == "__main__":
    main()
