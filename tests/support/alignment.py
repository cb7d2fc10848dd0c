"""Simulated scenes whose content lies off by a known amount."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox
from scipy import fft, ndimage
from scipy.spatial import cKDTree


@cache
def texture(seed: int, n: int = 420, fields: int = 400) -> np.ndarray:
    """Fields of random brightness: what a scene at 10 m looks like; (N, N)."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, n, (fields, 2))
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
    _, label = cKDTree(seeds).query(grid)
    return rng.uniform(0.05, 0.4, fields)[label].reshape(n, n)


def fractal(n: int, seed: int, slope: float = 1.5) -> np.ndarray:
    """Image with a power-law spectrum, as landscapes have, of spread 1; (N, N) float32."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    radius[0, 0] = 1
    spectrum = fft.rfft2(rng.standard_normal((n, n), dtype=np.float32)) / radius**slope
    spectrum[0, 0] = 0
    image = fft.irfft2(spectrum, s=(n, n)).astype(np.float32)
    return image / image.std()


def averaged(image: np.ndarray, k: int) -> np.ndarray:
    """Means of k x k blocks: what a sensor's pixels are."""
    h, w = (n // k for n in image.shape)
    return image[: h * k, : w * k].reshape(h, k, w, k).mean(axis=(1, 3))


def averaged_pair(
    fine: np.ndarray, shift: tuple[float, float], k: int, noise: float, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Two sensor images of a fine one; the second one's content lies off, coarse pixels."""
    n, m = fine.shape
    turn = np.fft.fftfreq(n)[:, None] * shift[0] * k + np.fft.rfftfreq(m)[None] * shift[1] * k
    moved = fft.irfft2(fft.rfft2(fine) * np.exp(-2j * np.pi * turn), s=fine.shape)
    rng = np.random.default_rng(seed)
    pair = [averaged(a, k) for a in (fine, moved)]
    return tuple((a + noise * rng.standard_normal(a.shape)).astype(np.float32) for a in pair)


def clouds(n: int, share: float, seed: int, size: float = 48.0) -> np.ndarray:
    """(N, N) bool: round clouds that cover a share of the image."""
    rng = np.random.default_rng(seed)
    step = 4
    field = ndimage.gaussian_filter(rng.standard_normal((n // step, n // step)), size / step)
    return np.kron(field > np.quantile(field, 1 - share), np.ones((step, step), bool))


def write_item(
    folder: Path, name: str, bands: dict[str, np.ndarray], geobox: GeoBox, *,
    source: str = "sentinel-2-l2a", date: str = "2023-05-01", added: int = 0,
    unit: str = "reflectance",
) -> dict:  # fmt: skip
    """Write bands (reflectance, or power) as rasters; the item's record in the lock."""
    assets = {}
    folder.mkdir(parents=True, exist_ok=True)
    for band, values in bands.items():
        path = folder / f"{name}-{band}.tif"
        plain = unit == "power"
        stored = values.astype(np.float32)
        if not plain:
            stored = np.where(np.isfinite(values), (values + 0.1) * 10_000, 0).round()
        with rasterio.open(
            path, "w", driver="GTiff", height=geobox.shape[0], width=geobox.shape[1], count=1,
            dtype="float32" if plain else "uint16", crs=str(geobox.crs),
            transform=geobox.affine, nodata=-32768 if plain else 0,
        ) as dst:  # fmt: skip
            dst.write(stored.astype("float32" if plain else "uint16"), 1)
        assets[band] = {
            "href": str(path), "band": 1, "size": None, "checksum": None, "etag": None,
            "scale": 1.0 if plain else 1e-4, "offset": 0.0 if plain else -0.1, "unit": unit,
            "nodata": -32768 if plain else 0, "resolution_m": float(geobox.resolution.x),
            "shape": list(geobox.shape), "sign": None,
        }  # fmt: skip
    return {
        "id": name, "source": source, "collection": "c", "datetime": f"{date}T10:00:00Z",
        "crs": str(geobox.crs), "footprint": None, "added": added, "assets": assets,
        "decision": "use", "why": "",
    }  # fmt: skip


def moved(fine: np.ndarray, shift: Sequence[float], sigma: float = 0.7) -> np.ndarray:
    """A fine image smoothed, its content moved down and right by a shift."""
    return ndimage.shift(ndimage.gaussian_filter(fine, sigma), shift, order=3, mode="nearest")
