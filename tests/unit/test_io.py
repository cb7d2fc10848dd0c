"""Files: atomic, deterministic, exact."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from terraloom.errors import SceneError, StateError
from terraloom.io import (
    array_digest,
    atomic,
    digest_json,
    geobox_of,
    read_json,
    read_store,
    read_window,
    sha256,
    write_json,
    write_raster,
    write_store,
)

BOX = GeoBox((60, 90), Affine(10, 0, 300000, 0, -10, 5900040), "EPSG:32633")


def coordinates(box: GeoBox) -> np.ndarray:
    """Pixels whose value is their own x coordinate: a resampling error shows as metres."""
    h, w = box.shape
    x = box.affine.c - 300000 + (np.arange(w) + 0.5) * box.affine.a
    return np.broadcast_to(x, (h, w)).astype(np.float32).copy()


def test_atomic_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file.txt"
    with pytest.raises(RuntimeError), atomic(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"


def test_json_round_trip_and_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": np.float32(1.5), "a": float("nan"), "c": np.arange(2)})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": 1.5, "c": [0, 1]}
    with pytest.raises(StateError, match="missing"):
        read_json(tmp_path / "none.json")
    for bad in (b"{", b"\xff\xfe{", b"[" * 200_000):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(StateError, match="not JSON"):
            read_json(tmp_path / "bad.json")


def test_digests_do_not_depend_on_order() -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest_json([1, 2]) != digest_json([2, 1])
    a = np.arange(6, dtype=np.int16)
    assert array_digest(a) != array_digest(a.reshape(2, 3))


def test_store_is_deterministic_and_lazy(tmp_path: Path) -> None:
    data = xr.Dataset({"v": (("y", "x"), np.random.default_rng(1).random((5, 7)))})
    data.attrs["digest"] = "d"
    write_store(tmp_path / "a.zip", data)
    write_store(tmp_path / "b.zip", data)
    assert sha256(tmp_path / "a.zip") == sha256(tmp_path / "b.zip")
    back = read_store(tmp_path / "a.zip")
    np.testing.assert_array_equal(back["v"].to_numpy(), data["v"].to_numpy())
    assert back.attrs["digest"] == "d"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip"]
    (tmp_path / "c.zip").write_bytes(b"no zip")
    with pytest.raises(StateError, match="not a readable store"):
        read_store(tmp_path / "c.zip")


def test_packed_reflectance_survives(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.1234, np.nan, -0.05]], np.float32)
    data = xr.Dataset({"s2_10": (("y", "x"), values)})
    data["s2_10"].encoding = {
        "dtype": "uint16", "scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 65535,
    }  # fmt: skip
    write_store(tmp_path / "a.zip", data)
    back = read_store(tmp_path / "a.zip")["s2_10"].to_numpy()
    np.testing.assert_allclose(back, values, atol=6e-5)


def test_raster_with_legend(tmp_path: Path) -> None:
    path = tmp_path / "map.tif"
    codes = np.random.default_rng(0).integers(0, 3, BOX.shape).astype(np.uint8)
    write_raster(
        path, codes, BOX, nodata=0, band_names=["class"],
        colormap={0: (0, 0, 0, 0), 1: (1, 2, 3, 255), 2: (9, 8, 7, 255)},
        category_names=["no data", "water", "forest & field"],
    )  # fmt: skip
    with rasterio.open(path) as src:
        np.testing.assert_array_equal(src.read(1), codes)
        assert src.colormap(1)[2] == (9, 8, 7, 255)
        assert src.descriptions == ("class",)
        assert src.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    assert "<Category>forest &amp; field</Category>" in (tmp_path / "map.tif.aux.xml").read_text()
    assert geobox_of(path) == BOX
    again = tmp_path / "again.tif"
    write_raster(again, codes, BOX, nodata=0, band_names=["class"])
    write_raster(tmp_path / "again2.tif", codes, BOX, nodata=0, band_names=["class"])
    assert sha256(again) == sha256(tmp_path / "again2.tif")


def test_reading_on_the_lattice_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    write_raster(path, coordinates(BOX), BOX, nodata=-1)
    inner = BOX[6:30, 12:60]
    np.testing.assert_array_equal(
        read_window(path, inner, resampling="bilinear"), coordinates(inner)
    )


def test_shifted_reading_is_right_to_a_hundredth_of_a_pixel(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    write_raster(path, coordinates(BOX), BOX, nodata=-1)
    inner = BOX[6:30, 12:60].translate_pix(0.37, 0)
    error = read_window(path, inner, resampling="bilinear") - coordinates(inner)
    assert np.abs(error).max() < 0.1  # metres, of 10 m pixels


def test_outside_is_nodata(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    write_raster(path, coordinates(BOX), BOX, nodata=-1)
    out = read_window(path, BOX.translate_pix(80, 0), resampling="nearest")
    assert (out[:, 10:] == -1).all() and (out[:, :10] > 0).all()


def test_missing_and_truncated_rasters(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="cannot be opened"):
        read_window(tmp_path / "none.tif", BOX)
    path = tmp_path / "x.tif"
    noise = np.random.default_rng(0).random(BOX.shape).astype(np.float32)
    write_raster(path, noise, BOX)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SceneError, match=r"cannot be (read|opened)"):
        read_window(path, BOX)


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="px for a grid"):
        write_raster(tmp_path / "x.tif", np.zeros((3, 3), np.uint8), BOX)
    assert not (tmp_path / "x.tif").exists()


def test_archives_carry_no_clock(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zip", xr.Dataset({"v": ("x", np.arange(3))}))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_zeros_of_many_bands_are_values(tmp_path: Path) -> None:
    """A window where every band is zero is not missing (a clear sky in a mask of many scenes)."""
    path = tmp_path / "mask.tif"
    bits = np.zeros((4, *BOX.shape), np.uint8)
    bits[:, :, :20] = 2
    write_raster(path, bits, BOX, nodata=255)
    fine = GeoBox((40, 60), Affine(5, 0, 300400, 0, -5, 5900000), BOX.crs)
    for band in (1, 4):
        assert (read_window(path, fine, band=band) == 0).all()
    assert (read_window(path, BOX.translate_pix(85, 0), band=2)[:, 6:] == 255).all()


def test_the_fourth_band_is_no_transparency(tmp_path: Path) -> None:
    """GDAL's default would make a product of four classes vanish where the fourth is zero."""
    import rasterio
    from rasterio.enums import ColorInterp

    path = tmp_path / "four.tif"
    geobox = GeoBox((8, 8), Affine(10, 0, 0, 0, -10, 0), "EPSG:32633")
    write_raster(path, np.zeros((4, 8, 8), np.uint8), geobox, nodata=255)
    with rasterio.open(path) as src:
        assert ColorInterp.alpha not in src.colorinterp
        assert np.all(src.dataset_mask() == 255)


def test_a_full_disk_is_named_whatever_the_library_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import shutil
    from types import SimpleNamespace

    def broken() -> None:
        with atomic(tmp_path / "a.gpkg"):
            raise RuntimeError("Could not add feature to layer")

    with pytest.raises(RuntimeError, match="feature"):
        broken()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.gpkg'") as err:
        broken()
    assert err.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
