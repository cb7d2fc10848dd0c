"""How a result was made: versions, digests of weights and config, scenes; no clock involved."""

from __future__ import annotations

import csv
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from terraloom import __version__
from terraloom.errors import StateError
from terraloom.io import read_json, sha256
from terraloom.origin import config_digest, used_scenes

__all__ = [
    "config_digest",
    "need",
    "optional_csv",
    "optional_json",
    "used_scenes",
    "versions",
    "weights",
]

#: Packages whose version can change a pixel or a number.
_PACKAGES = (
    "numpy", "scipy", "rasterio", "odc-geo", "pyproj", "xarray", "torch", "scikit-learn",
    "scikit-image", "geopandas", "pystac", "snakemake", "dvc",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Terraloom, Python and the packages that do the arithmetic, where installed."""
    found = {"terraloom": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def weights(results_dir: Path) -> dict[str, str]:
    """SHA-256 of the weights of every network, by path below ``results/model``."""
    root = Path(results_dir) / "model"
    return {p.relative_to(root).as_posix(): sha256(p) for p in sorted(root.rglob("*.safetensors"))}


def need(record: Any, key: str, where: Path) -> Any:
    """Value of a key that a file must hold.

    Raises:
        StateError: Names the file and the key.
    """
    if not isinstance(record, dict) or key not in record:
        raise StateError(
            f"the key `{key}` is missing",
            where=where.as_posix(),
            fix="rerun the stage that writes it",
        )
    return record[key]


def optional_json(path: Path) -> Any:
    """Content of a JSON file, or None where there is no such file."""
    return read_json(path) if path.is_file() else None


def optional_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; empty where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(f)]
