"""Signed addresses: tokens of a service on loopback, hooks of other packages, buckets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from terraloom.acquire import retry, signing
from terraloom.acquire.signing import PlanetaryComputer, signed_href, signers
from terraloom.errors import ConfigError, SceneError
from terraloom.log import hide_secrets

HREF = "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/06/V/VN/B02_10m.tif"


class _Service:
    """A token service: what it was asked, and how long its tokens last."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.life = timedelta(minutes=45)
        self.trouble: list[int] = []
        self.body: Any = None
        self.url = ""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Service]:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    monkeypatch.delenv("PC_SDK_SUBSCRIPTION_KEY", raising=False)
    made = _Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, self.headers.get("Ocp-Apim-Subscription-Key")))
            if made.trouble:
                self.send_error(made.trouble.pop(0))
                return
            expiry = (datetime.now(UTC) + made.life).strftime("%Y-%m-%dT%H:%M:%SZ")
            body = made.body or {"msft:expiry": expiry, "token": f"se=x&sig=n{len(made.asked)}%3D"}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/token"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def test_one_token_serves_a_container(service):
    hook = PlanetaryComputer(service.url)
    assert hook.sign(HREF) == f"{HREF}?se=x&sig=n1%3D"
    assert hook.sign(HREF.replace("B02", "B03")).endswith("B03_10m.tif?se=x&sig=n1%3D")
    assert service.asked == [("/token/sentinel2l2a01/sentinel2-l2", None)]
    hook.sign("https://landsateuwest.blob.core.windows.net/landsat-c2/a.TIF")
    assert service.asked[1][0] == "/token/landsateuwest/landsat-c2"


def test_a_token_is_renewed_before_it_runs_out(service):
    service.life = timedelta(minutes=4)  # less than the margin: asked for every time
    hook = PlanetaryComputer(service.url)
    assert hook.sign(HREF) != hook.sign(HREF)
    service.life = timedelta(minutes=45)
    assert hook.sign(HREF) == hook.sign(HREF)
    assert len(service.asked) == 3


def test_a_token_that_still_lasts_is_used_when_the_service_is_down(service):
    service.life = timedelta(minutes=4)
    hook = PlanetaryComputer(service.url)
    first = hook.sign(HREF)
    service.trouble = [404]
    assert hook.sign(HREF) == first
    service.life = timedelta(seconds=-60)
    hook.sign(HREF)
    service.trouble = [404]
    with pytest.raises(SceneError, match="no token"):
        hook.sign(HREF)


def test_many_threads_ask_once(service):
    hook = PlanetaryComputer(service.url)
    with ThreadPoolExecutor(16) as pool:
        signed = list(pool.map(hook.sign, [HREF] * 200))
    assert len(set(signed)) == 1
    assert len(service.asked) == 1


def test_a_busy_service_is_asked_again(service):
    service.trouble = [429, 503, 500]
    assert PlanetaryComputer(service.url).sign(HREF).endswith("sig=n4%3D")


@pytest.mark.parametrize("body", [{"token": "x"}, {"msft:expiry": "2030-01-01T00:00:00Z"}, [1],
                                  {"token": "x", "msft:expiry": "soon"}])  # fmt: skip
def test_an_answer_without_token_is_an_error(service, body):
    service.body = body
    with pytest.raises(SceneError, match="no token to read with") as err:
        PlanetaryComputer(service.url).sign(HREF)
    assert "PC_SDK_SUBSCRIPTION_KEY" in str(err.value)


def test_settings_come_from_the_environment(service, monkeypatch):
    monkeypatch.setenv("PC_SDK_SAS_URL", service.url + "/")
    monkeypatch.setenv("PC_SDK_SUBSCRIPTION_KEY", "mine")
    PlanetaryComputer().sign(HREF)
    assert service.asked == [("/token/sentinel2l2a01/sentinel2-l2", "mine")]


@pytest.mark.parametrize(
    "href",
    [
        "https://example.org/a.tif",
        "https://blob.core.windows.net.example.org/c/a.tif",
        "https://ai4edatasetspublicassets.blob.core.windows.net/assets/a.png",
        HREF + "?st=1&sig=abc",
        "data/a.tif",
        "/vsis3/bucket/a.tif",
    ],
)
def test_other_addresses_stay_as_they_are(href):
    assert PlanetaryComputer("http://127.0.0.1:9").sign(href) == href


def test_what_gdal_opens(monkeypatch, service):
    assert signed_href("data/a.tif", None) == "data/a.tif"
    assert signed_href("https://example.org/a.tif", None) == "https://example.org/a.tif"
    assert signed_href("s3://bucket/a/b.tif", None) == "/vsis3/bucket/a/b.tif"
    monkeypatch.setenv("PC_SDK_SAS_URL", service.url)
    signing._hook.cache_clear()
    assert signed_href(HREF, "planetary-computer").startswith(HREF + "?se=x&sig=")
    assert signed_href(HREF, "planetary-computer") == signed_href(HREF, "planetary-computer")
    assert len(service.asked) == 1
    signing._hook.cache_clear()


def _archive(href: str) -> str:
    return href.replace("https://archive.example.org/", "s3://archive/")


def test_hooks_of_other_packages(monkeypatch):
    entry = EntryPoint("archive", f"{__name__}:_archive", signing.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: _archive)
    monkeypatch.setattr(signing, "entry_points", lambda group: [entry])
    signing._hook.cache_clear()
    assert signers() == ["archive", "planetary-computer"]
    assert signed_href("https://archive.example.org/a.tif", "archive") == "/vsis3/archive/a.tif"
    with pytest.raises(ConfigError, match="no signing hook 'other'") as err:
        signed_href("https://x/a.tif", "other")
    assert "archive, planetary-computer" in str(err.value)
    signing._hook.cache_clear()


def test_signatures_do_not_get_into_messages():
    text = f"'{HREF}?st=2024&se=x&sig=abc%2Fdef%3D' not recognized; X-Amz-Signature"
    assert "abc" not in hide_secrets(text)
    assert hide_secrets(text).startswith(f"'{HREF}?st=2024&se=x&sig=***'")
    aws = "https://b.s3.amazonaws.com/a.tif?X-Amz-Security-Token=tok/en&X-Amz-Signature=0a1b&x=1"
    assert hide_secrets(aws).endswith("a.tif?X-Amz-Security-Token=***&X-Amz-Signature=***&x=1")
    assert hide_secrets("nothing secret") == "nothing secret"
    text = "'https://ann:p:w%40d@h.org/a.tif', ssh://bob:word@host/dir, s3://bucket/a@b, 10:30 a@b"
    kept = "'https://ann:***@h.org/a.tif', ssh://bob:***@host/dir, s3://bucket/a@b, 10:30 a@b"
    assert hide_secrets(text) == kept
