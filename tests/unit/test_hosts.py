"""Addresses from outside that name this machine or its network; files that grow when read."""

from __future__ import annotations

import ipaddress
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import rasterio
import requests
from hypothesis import given
from hypothesis import strategies as st

from terraloom import io
from terraloom.acquire import catalogue, fetch
from terraloom.acquire.hosts import is_inside, may_lead_to
from terraloom.acquire.hrefs import guard_link, safe_href
from terraloom.errors import SceneError, StateError

PUBLIC = "https://archive.example.org/stac/catalog.json"
INSIDE = [
    "http://localhost/a.tif", "http://LOCALHOST.:80/a.tif", "http://127.0.0.1/a.tif",
    "http://127.1/a.tif", "http://2130706433/a.tif", "http://0x7f000001/a.tif",
    "http://0177.0.0.1/a.tif", "http://0/a.tif", "http://[::1]/a.tif", "http://[::ffff:10.0.0.1]/a",
    "http://[fe80::1%25eth0]/a", "http://169.254.169.254/latest/meta-data", "http://10.1.2.3/a",
    "http://192.168.0.7:8080/a", "https://172.16.0.1/a", "http://100.64.0.1/a", "http://0.0.0.0/",
    "http://224.0.0.1/a", "http://metadata.google.internal/a", "http://nas.local/a",
    "http://intranet/a", "http://user:word@127.0.0.1/a", "http://[fd00::1]/a",
]  # fmt: skip


@pytest.mark.parametrize("url", INSIDE)
def test_hosts_inside_are_refused_to_those_outside(url: str) -> None:
    assert is_inside(url)
    for check in (may_lead_to, safe_href, guard_link):
        with pytest.raises(SceneError, match="private network"):
            check(url, PUBLIC)
    may_lead_to(url, "resources/own/catalog.json")
    may_lead_to(url, "http://127.0.0.1:8000/catalog.json")


@pytest.mark.parametrize(
    "url", ["https://a.example.org/b.tif", "http://8.8.8.8/a", "http://[2001:4860:4860::8888]/a",
            "s3://localhost/a.tif", "https://localhost.example.org/a", "http://127.org/a"],
)  # fmt: skip
def test_hosts_of_the_internet_are_not(url: str) -> None:
    assert not is_inside(url) and safe_href(url, PUBLIC) == url


@given(st.integers(0, 2**32 - 1))
def test_every_notation_of_an_address_is_judged_alike(number: int) -> None:
    plain = ipaddress.IPv4Address(number)
    a, b, c, d = plain.packed
    told = {
        is_inside(f"http://{host}/x")
        for host in (str(plain), str(number), hex(number), f"0{a:o}.{b}.{c}.{d}",
                     f"{a}.{(b << 16) + (c << 8) + d}", f"[::ffff:{plain}]")
    }  # fmt: skip
    assert told == {not plain.is_global or plain.is_multicast}


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/secret")
            self.end_headers()
            return
        asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "40")
        self.end_headers()
        self.wfile.write(b"[" + b" " * 38 + b"]")

    def log_message(self, *_: object) -> None:
        pass


asked: list[str] = []


@pytest.fixture
def server() -> str:
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_no_redirect_leads_inside(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    # To the code, the server's number is one of the internet.
    monkeypatch.setattr("terraloom.acquire.hosts._address", lambda host: (
        ipaddress.ip_address("8.8.8.8") if host == "127.0.0.1" else None))  # fmt: skip
    with pytest.raises(SceneError, match="private network"):
        fetch.fetch_range(fetch.Address(f"{server}/moved.tif"), 0, 10, fetch.Identity())
    client = catalogue._ApiIO(f"{server}/stac", 5.0)
    with pytest.raises((SceneError, catalogue.APIError), match="private network"):
        client.request(f"{server}/moved")
    assert asked == []


def test_documents_have_an_end(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = catalogue._ApiIO(f"{server}/stac", 5.0)
    assert len(client.request(f"{server}/a")) == 40
    monkeypatch.setattr(catalogue, "DOCUMENT_BYTES", 39)
    with pytest.raises((SceneError, catalogue.APIError), match="a document of more than"):
        client.request(f"{server}/a")
    assert requests.get(f"{server}/a", timeout=5).text.strip("[] ") == ""


@pytest.mark.parametrize(
    ("side", "block"), [(40_000, 40_000), (400_000, 4096)], ids=["block", "px"]
)
def test_rasters_of_monstrous_size_are_refused_unread(
    tmp_path: Path, side: int, block: int
) -> None:
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=side, height=side, count=1, dtype="uint8",
        sparse_ok=True, tiled=True, blockxsize=block, blockysize=block, bigtiff="yes",
    ):  # fmt: skip
        pass
    assert (tmp_path / "a.tif").stat().st_size < 10**8
    with pytest.raises(SceneError, match=r"a raster of .* in blocks of"):
        io.open_file(tmp_path / "a.tif")


def test_a_store_that_would_grow_is_refused(tmp_path: Path) -> None:
    import xarray as xr

    io.write_store(tmp_path / "a.zip", xr.Dataset({"x": ("n", np.zeros(4))}))
    assert io.read_store(tmp_path / "a.zip")["x"].shape == (4,)
    with zipfile.ZipFile(tmp_path / "a.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"\0" * 10**6)
    with pytest.raises(StateError, match="a packed entry"):
        io.read_store(tmp_path / "a.zip")
