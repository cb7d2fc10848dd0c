"""Stores of tiles: readable by others, the same bytes for the same data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rioxarray  # noqa: F401  (the accessor .rio)
import xarray as xr
import zarr

from support.cubes import (
    BANDS,
    GEOBOX,
    build,
    optical,
)
from terraloom.io import sha256

# --- the store -----------------------------------------------------------------------------------


def test_xarray_opens_the_store_in_one_line_with_crs(tmp_path: Path) -> None:
    build(tmp_path, [optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 3000))])
    path = tmp_path / "cube.zip"
    ds = xr.open_zarr(zarr.storage.ZipStore(path, mode="r"), consolidated=False)
    b = GEOBOX.boundingbox
    for res in BANDS.values():
        assert ds[f"s2_{res}"].rio.crs.to_epsg() == 32633
        assert ds[f"s2_{res}"].rio.bounds() == (b.left, b.bottom, b.right, b.top)
        assert abs(ds[f"s2_{res}"].rio.transform().a) == res
    assert ds["reasons"].rio.crs.to_epsg() == 32633
    again = xr.open_dataset(f"zip::{path}", engine="zarr")
    assert again["s2_10"].rio.crs == ds["s2_10"].rio.crs
    assert float(again["s2_10"][0, 0, 0, 0]) == pytest.approx(0.3, abs=1e-6)
    assert ds["s2_20"].attrs["kind"] == "optical" and ds["s2_20"].attrs["unit"] == "reflectance"
    assert json.loads(ds["s2_20"].attrs["roles"]) == {"B11": "B11"}


def test_order_of_variables_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    build(tmp_path, [optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 3000))])
    code = (
        "import sys, xarray as xr, zarr; from pathlib import Path;"
        "from terraloom.io import read_store; from terraloom.preprocess.channels import *;"
        "p = Path(sys.argv[1]); ds = read_store(p);"
        "print(list(xr.open_zarr(zarr.storage.ZipStore(p)).variables),"
        "list(channel_names(ds).items()), list(cube_inputs(ds)))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "cube.zip"], check=True, text=True,
            capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert "['s2_10', 's2_20', 's2_60']" in said.pop()


def test_an_unreadable_store_is_built_anew(tmp_path: Path) -> None:
    scenes = [optical(tmp_path, "2023-04-01", dict.fromkeys(BANDS, 3000))]
    build(tmp_path, scenes)
    good = sha256(tmp_path / "cube.zip")
    (tmp_path / "cube.zip").write_bytes(b"PK broken")
    build(tmp_path, scenes)
    assert sha256(tmp_path / "cube.zip") == good
    assert not list(tmp_path.glob(".tmp*"))
