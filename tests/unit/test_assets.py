"""Assets: pixels as stored or warped once, odd rasters refused, addresses signed."""

from __future__ import annotations

from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

from support.faulty_server import serve_folder
from terraloom.acquire import fetch, rasters
from terraloom.acquire.assets import asset_geobox, open_asset, read_band, verify_item
from terraloom.errors import SceneError
from terraloom.io import geobox_of, open_file, read_window
from terraloom.warp import read_on_lattice, warp

BOX = GeoBox((300, 200), Affine(10, 0, 360000, 0, -10, 5820000), "EPSG:32633")
DN = np.random.default_rng(5).integers(1001, 9000, BOX.shape).astype(np.uint16)


def write(path: Path, data: np.ndarray = DN, **profile: Any) -> Path:
    """A GeoTIFF of one band, or more."""
    cube = data[None] if data.ndim == 2 else data
    settings = {
        "driver": "GTiff", "width": cube.shape[2], "height": cube.shape[1], "count": len(cube),
        "dtype": str(cube.dtype), "crs": "EPSG:32633", "transform": BOX.affine, "nodata": 0,
        "tiled": True, "blockxsize": 64, "blockysize": 64, **profile,
    }  # fmt: skip
    with rasterio.open(path, "w", **settings) as dst:
        dst.write(cube)
    return path


def item_of(href: str | Path, **asset: Any) -> dict[str, Any]:
    record = {
        "href": str(href), "band": 1, "size": None, "checksum": None, "etag": None, "scale": 1e-4,
        "offset": -0.1, "unit": "reflectance", "nodata": 0, "resolution_m": 10, "shape": None,
        "sign": None, **asset,
    }  # fmt: skip
    return {
        "id": "S2", "source": "sentinel-2-l2a", "crs": "EPSG:32633", "assets": {"B02": record},
    }  # fmt: skip


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodata", [None, 0, 7])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint8"])
def test_pixels_on_the_lattice_are_those_of_the_warp(
    tmp_path: Path, dtype: str, nodata: float | None
) -> None:
    """Windows inside, across the edges and outside; bilinear weights must all be 0 or 1."""
    rng = np.random.default_rng(8)
    data = rng.integers(0, 200, BOX.shape).astype(dtype)
    with rasterio.open(write(tmp_path / "a.tif", data, nodata=nodata)) as src:
        for _ in range(25):
            row, col = (int(n) for n in rng.integers(-60, 320, 2))
            h, w = (int(n) for n in rng.integers(1, 120, 2))
            geobox = GeoBox(
                (h, w), Affine(10, 0, 360000 + 10 * col, 0, -10, 5820000 - 10 * row), "EPSG:32633"
            )
            stored = read_on_lattice(src, 1, geobox, nodata)
            warped = warp(src, 1, geobox, nodata, "bilinear")
            assert stored is not None and stored.dtype == warped.dtype == dtype
            np.testing.assert_array_equal(stored, warped)


def test_what_is_not_on_the_lattice_is_warped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif")
    inner = BOX[20:60, 20:60]
    with rasterio.open(path) as src:
        assert read_on_lattice(src, 1, inner, 0) is not None
        for other in (
            inner.translate_pix(0.01, 0), inner.zoom_out(2), inner.to_crs("EPSG:32632"),
            GeoBox((40, 40), Affine(10.001, 0, 360200, 0, -10.001, 5819800), "EPSG:32633"),
        ):  # fmt: skip
            assert read_on_lattice(src, 1, other, 0) is None
        assert read_on_lattice(src, 1, inner, -1) is None, "no such value of its type"
    masked = write(tmp_path / "b.tif", nodata=None)
    with rasterio.open(masked, "r+") as dst:
        dst.write_mask(np.where(DN > 5000, 255, 0).astype(np.uint8))
    with rasterio.open(masked) as src:
        assert read_on_lattice(src, 1, inner, 0) is None, "the raster's own mask counts"


def test_the_band_of_the_record_is_read(tmp_path: Path) -> None:
    cube = np.stack([DN, DN + 1, DN + 2])
    path = write(tmp_path / "a.tif", cube)
    for band in (1, 3):
        item = item_of(path, band=band)
        verify_item(item)
        got = read_band(item, "B02", BOX) + np.float32(0.1)
        np.testing.assert_allclose(got, cube[band - 1] * np.float32(1e-4), atol=1e-6)
    for bad in (verify_item, lambda i: read_band(i, "B02", BOX)):
        with pytest.raises(SceneError, match="has 3 bands, not 4"):
            bad(item_of(path, band=4))


def test_nodata_of_the_file_counts_where_the_record_has_none(tmp_path: Path) -> None:
    data = DN.astype(np.float32)
    data[3, 4] = np.nan
    data[5, 6] = -5
    for nodata, where in ((np.nan, {(3, 4)}), (-5.0, {(3, 4), (5, 6)})):
        path = write(tmp_path / "a.tif", data, nodata=nodata)
        got = read_band(item_of(path, nodata=None), "B02", BOX)
        assert set(zip(*np.nonzero(np.isnan(got)), strict=True)) == where
    verify_item(item_of(write(tmp_path / "b.tif", data, nodata=np.nan), nodata=float("nan")))
    with pytest.raises(SceneError, match="nodata value is nan, 0 recorded"):
        verify_item(item_of(tmp_path / "b.tif"))


def test_jpeg_2000_behind_an_address(tmp_path: Path) -> None:
    data = np.kron(DN[:100, :100], np.ones((4, 4), np.uint16))
    write(tmp_path / "a.jp2", data, driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES",
          YCBCR420="NO", nodata=None, tiled=None, blockxsize=128, blockysize=128)  # fmt: skip
    rasters._heads.clear()
    with serve_folder(tmp_path) as server:
        item = item_of(f"{server.url}/a.jp2")
        verify_item(item)
        window = BOX[10:50, 20:90]
        got = read_band(item, "B02", window) + np.float32(0.1)
        np.testing.assert_allclose(got, data[10:50, 20:90] * np.float32(1e-4), atol=1e-6)
        assert asset_geobox(item, "B02").shape == data.shape


# --- rasters that are refused --------------------------------------------------------------------


ROTATED = BOX.affine @ Affine.rotation(10)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"transform": ROTATED}, "the raster is rotated"),
        ({"crs": None}, "no coordinate system"),
        ({"crs": "EPSG:32632"}, "its CRS is EPSG:32632, EPSG:32633 recorded"),
        ({"nodata": 1}, "its nodata value is 1, 0 recorded"),
        ({"transform": Affine(20, 0, 0, 0, -20, 0)}, "its pixels are 20 m, 10 m recorded"),
    ],
    ids=["rotated", "no crs", "other crs", "other nodata", "other pixels"],
)
def test_odd_rasters_are_refused(tmp_path: Path, profile: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "a.tif", **profile)
    with pytest.raises(SceneError, match=words) as err:
        verify_item(item_of(path))
    assert err.value.where.startswith("item S2, asset B02 (") and err.value.fix


def test_odd_rasters_are_not_read_wrongly(tmp_path: Path) -> None:
    for profile, words in (({"transform": ROTATED}, "rotated"), ({"crs": None}, "no coordinate")):
        with pytest.raises(SceneError, match=words):
            read_window(write(tmp_path / "a.tif", **profile), BOX)


def test_a_block_of_any_level_beyond_the_end(tmp_path: Path) -> None:
    """The last block of the file may be one of an overview, or not the last one in space."""
    path = write(tmp_path / "a.tif")
    with rasterio.open(path, "r+") as dst:
        dst.build_overviews([2, 4])
    item = item_of(path)
    verify_item(item)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with rasterio.open(path) as src:
        src.read(1)  # the full pixels are all there
    with pytest.raises(SceneError, match=r"a block ends at \d+ bytes, the file at"):
        verify_item(item)


def test_formats_that_name_other_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tif")
    text = (
        '<VRTDataset rasterXSize="200" rasterYSize="300">'
        "<GeoTransform>360000, 10, 0, 5820000, 0, -10</GeoTransform>"
        '<VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path}/a.tif</SourceFilename>"
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    (tmp_path / "v.tif").write_text(text)
    rasters._heads.clear()
    with pytest.raises(SceneError, match="format VRT"):
        read_band(item_of(tmp_path / "v.tif"), "B02", BOX)
    with serve_folder(tmp_path) as server, pytest.raises(SceneError, match="no raster"):
        read_band(item_of(f"{server.url}/v.tif"), "B02", BOX)


def test_addresses_are_no_files() -> None:
    for href in ("http://127.0.0.1:1/a.tif", "/vsicurl/http://127.0.0.1:1/a.tif", "s3://b/a.tif"):
        with pytest.raises(SceneError, match="an address, not a file"):
            geobox_of(href)
        with pytest.raises(SceneError, match="an address, not a file"):
            open_file(href)


# --- addresses -----------------------------------------------------------------------------------


def test_addresses_are_signed_when_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock's address stays unsigned; errors show no signature."""
    write(tmp_path / "a.tif")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    monkeypatch.setattr(
        fetch, "signed_href", lambda href, sign: href + ("?sig=SECRET" if sign == "mine" else "")
    )
    rasters._heads.clear()
    with serve_folder(tmp_path) as server:
        item = item_of(f"{server.url}/a.tif", sign="mine")
        with open_asset(item, "B02") as src:
            assert src.shape == BOX.shape
        assert {path for _, path, _, _ in server.requests} == {"/a.tif?sig=SECRET"}
        with pytest.raises(SceneError) as err:
            read_band(item_of(f"{server.url}/none.tif", sign="mine"), "B02", BOX)
        assert "404" in str(err.value) and "SECRET" not in str(err.value)
    rasters._heads.clear()
    with pytest.raises(SceneError, match="the connection failed") as err:
        read_band(item, "B02", BOX)
    assert "SECRET" not in str(err.value)


class _Guarded(BaseHTTPRequestHandler):
    """A data server that sends strangers to a login, and the login, on two names of one host."""

    protocol_version = "HTTP/1.1"
    data, asked = b"", []  # type: ignore[var-annotated]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        port, kind = self.server.server_port, self.path.split("?")[0]  # type: ignore[attr-defined]
        secret, cookie = self.headers.get("Authorization"), self.headers.get("Cookie")
        self.asked.append((self.headers["Host"].split(":")[0], kind, secret, cookie))
        if kind == "/login":
            good = secret == "Basic " + b64encode(b"me:word").decode()
            self.send_response(302 if good else 401)
            self.send_header("Location", f"http://127.0.0.1:{port}/welcome?code=1")
        elif kind == "/welcome":
            self.send_response(302)
            self.send_header("Set-Cookie", "token=mine; Path=/; HttpOnly")
            self.send_header("Location", "/a.tif")
        elif cookie != "token=mine":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{port}/login?back=1")
        else:
            first, last = (int(n) for n in self.headers["Range"][6:].split("-"))
            body = self.data[first : last + 1]
            self.send_response(206)
            span = f"bytes {first}-{first + len(body) - 1}/{len(self.data)}"
            self.send_header("Content-Range", span)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_an_archive_with_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NASA's: the password goes to the login alone, and once; then the cookie does."""
    _Guarded.data = write(tmp_path / "a.tif").read_bytes()
    _Guarded.asked.clear()
    (tmp_path / "netrc").write_text("machine localhost login me password word\n")
    (tmp_path / "netrc").chmod(0o600)
    rasters._heads.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Guarded)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        item = item_of(f"http://127.0.0.1:{server.server_port}/a.tif")
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        fetch.limit_requests(4, 5)
        with pytest.raises(SceneError, match=r"does not let it be read \(401\)"):
            read_band(item, "B02", BOX)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        fetch.limit_requests(4, 5)
        got = read_band(item, "B02", BOX) + np.float32(0.1)
        np.testing.assert_allclose(got, DN * np.float32(1e-4), atol=1e-6)
    finally:
        server.shutdown()
        server.server_close()
        fetch.limit_requests(16, 60)
    assert (
        sum(kind == "/login" and secret is not None for _, kind, secret, _ in _Guarded.asked) == 1
    )
    assert all(secret is None for host, _, secret, _ in _Guarded.asked if host != "localhost")
    assert all(cookie is None for host, _, _, cookie in _Guarded.asked if host == "localhost")


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What is kept of remote files does not grow with what was read of them."""
    write(tmp_path / "a.tif", np.zeros((2000, 2000), np.uint16), blockxsize=16, blockysize=16)
    rasters._heads.clear()
    with serve_folder(tmp_path) as server:
        href = f"{server.url}/a.tif"
        remote = rasters._Remote(fetch.Address(href), fetch.Identity())
        for first in range(0, remote.size - 600, 600):
            assert len(remote.read(first, first + 600)) == 600
        assert len(remote.pieces) <= rasters._PIECES
        remote.check()
    assert len(rasters._heads) == 1
