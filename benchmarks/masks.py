"""Throughput of the mask methods on one core, in megapixels per second.

The model of s2cloudless is timed against LightGBM's own prediction of the same file with one
thread, in turns inside one process, because the speed of a shared machine changes by the minute;
medians of the ratios count. Pixels are drawn around typical spectra: what a tree ensemble costs
depends on how alike neighbours are, so a real scene may be given as a ``.npz`` of its bands
(keys B01 to B12, reflectance 0-1, on one grid).

Usage: python benchmarks/masks.py [--rounds 5] [--side 256] [--scene FILE.npz]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage
from threadpoolctl import threadpool_limits

from terraloom.preprocess.csmask import CSMASK_BANDS
from terraloom.preprocess.masks import S2CLOUDLESS_BANDS, mask_scene
from terraloom.preprocess.trees import read_trees

#: B01 B02 B04 B05 B08 B8A B09 B10 B11 B12 B03 of vegetation, soil, water and cloud.
SPECTRA = np.array([
    (0.12, 0.09, 0.05, 0.12, 0.35, 0.37, 0.20, 0.002, 0.20, 0.09, 0.08),
    (0.13, 0.12, 0.16, 0.20, 0.26, 0.28, 0.15, 0.002, 0.34, 0.28, 0.13),
    (0.12, 0.09, 0.05, 0.05, 0.03, 0.03, 0.01, 0.001, 0.01, 0.01, 0.07),
    (0.55, 0.55, 0.56, 0.58, 0.62, 0.62, 0.35, 0.020, 0.45, 0.33, 0.55),
])  # fmt: skip


def draw(side: int) -> dict[str, np.ndarray]:
    """Smooth patches of the spectra, with noise, rounded as stored numbers are."""
    rng = np.random.default_rng(0)
    fields = ndimage.gaussian_filter(rng.normal(size=(4, side, side)), (0, 12, 12))
    share = np.exp(6 * fields / fields.std())
    share /= share.sum(axis=0)
    cube = np.einsum("khw,kb->bhw", share, SPECTRA)
    cube *= 1 + rng.normal(0, 0.05, cube.shape)
    cube = np.round(np.clip(cube, 0, 1.6), 4).astype(np.float32)
    return dict(zip((*S2CLOUDLESS_BANDS, "B03"), cube, strict=True))


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def model_file() -> Path | None:
    spec = importlib.util.find_spec("s2cloudless")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((f for d in folders for f in Path(d).glob("models/*lightGBM*.txt")), None)


def compare_trees(bands: dict[str, np.ndarray], rounds: int) -> None:
    file = model_file()
    if file is None or importlib.util.find_spec("lightgbm") is None:
        print("s2cloudless: needs the wheels s2cloudless and lightgbm, left out")
        return
    import lightgbm

    booster, trees = lightgbm.Booster(model_file=str(file)), read_trees(file)
    values = np.stack([bands[b].ravel() for b in S2CLOUDLESS_BANDS], axis=1)
    wide = values.astype(np.float64)
    difference = np.abs(trees.probability(values) - booster.predict(wide, num_threads=1)).max()
    times = [
        (
            seconds(lambda: trees.probability(values)),
            seconds(lambda: booster.predict(wide, num_threads=1)),
        )
        for _ in range(rounds)
    ]
    mpx = len(values) / 1e6
    ours, theirs = (statistics.median(mpx / t[k] for t in times) for k in (0, 1))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{'s2cloudless model, Terraloom':34s} {ours:8.3f} Mpx/s")
    print(f"{'s2cloudless model, LightGBM':34s} {theirs:8.3f} Mpx/s")
    print(f"{'ratio':34s} {ratio:8.2f}   largest difference {difference:.1e}")


def time_methods(bands: dict[str, np.ndarray], rounds: int) -> None:
    methods = ["spectral"]
    if model_file():
        methods.append("s2cloudless")
    if all(map(importlib.util.find_spec, ("onnxruntime", "ukis_csmask"))):
        methods.append("csmask")
    for method in methods:
        wanted = (*S2CLOUDLESS_BANDS, "B03") if method == "s2cloudless" else CSMASK_BANDS
        work = partial(
            mask_scene, {b: bands[b] for b in wanted}, method=method, resolution_m=20.0,
            sun_azimuth_deg=150.0, sun_elevation_deg=50.0,
        )  # fmt: skip
        work()
        speed = statistics.median(bands["B02"].size / 1e6 / seconds(work) for _ in range(rounds))
        print(f"{'whole mask, ' + method:34s} {speed:8.3f} Mpx/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--scene", type=Path)
    args = parser.parse_args()
    if args.scene:
        with np.load(args.scene) as data:
            bands = {b: data[b][: args.side, : args.side].astype(np.float32) for b in data.files}
    else:
        bands = draw(args.side)
    with threadpool_limits(1):
        compare_trees(bands, args.rounds)
        time_methods(bands, args.rounds)


if __name__ == "__main__":
    main()
