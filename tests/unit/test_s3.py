"""Buckets: a real server that speaks the protocol, signatures, regions, open buckets."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

from support.faulty_server import Fault, serve_folder
from terraloom.acquire import fetch, rasters, s3
from terraloom.acquire.assets import read_band, verify_item
from terraloom.errors import SceneError

moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")

BOX = GeoBox((256, 256), Affine(10, 0, 360000, 0, -10, 5820000), "EPSG:32633")
DN = np.random.default_rng(5).integers(1001, 9000, BOX.shape).astype(np.uint16)
AWS = (
    "AWS_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_HTTPS",
    "AWS_DEFAULT_REGION", "AWS_VIRTUAL_HOSTING", "AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials of this machine, and nothing kept from other tests."""
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.005)
    s3._session.cache_clear()
    s3._regions.clear()
    rasters._heads.clear()
    yield
    s3._session.cache_clear()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


def credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_S3_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_HTTPS", "NO")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


def raster(path: Path) -> bytes:
    with rasterio.open(
        path, "w", driver="GTiff", width=256, height=256, count=1, dtype="uint16", nodata=0,
        crs="EPSG:32633", transform=BOX.affine, tiled=True, blockxsize=64, blockysize=64,
    ) as dst:  # fmt: skip
        dst.write(DN, 1)
    return path.read_bytes()


def item_at(href: str) -> dict[str, Any]:
    asset = {
        "href": href, "band": 1, "size": None, "checksum": None, "etag": None, "scale": 1e-4,
        "offset": -0.1, "unit": "reflectance", "nodata": 0, "resolution_m": 10,
        "shape": [256, 256], "sign": None,
    }  # fmt: skip
    return {
        "id": "S2", "source": "sentinel-2-l2a", "crs": "EPSG:32633", "assets": {"B02": asset},
    }  # fmt: skip


def test_a_raster_in_a_bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.session import Session

    credentials(monkeypatch, server)
    client = Session().create_client("s3", endpoint_url=f"http://{server}", region_name="us-east-1")
    client.create_bucket(Bucket="scenes")
    body = raster(tmp_path / "a.tif")
    for key in ("a.tif", "odd+key=(1)/a.tif"):
        client.put_object(Bucket="scenes", Key=key, Body=body)
        item = item_at(f"s3://scenes/{key}")
        item["assets"]["B02"]["size"] = len(body)
        verify_item(item)
        got = read_band(item, "B02", BOX[50:200, 30:99])
        np.testing.assert_allclose(
            got, (DN * np.float32(1e-4) - np.float32(0.1))[50:200, 30:99], atol=1e-6
        )
    with pytest.raises(SceneError, match=r"does not have the file \(404\)") as err:
        read_band(item_at("s3://scenes/none.tif"), "B02", BOX)
    assert "item S2, asset B02 (s3://scenes/none.tif)" in str(err.value)

    client.put_object(Bucket="scenes", Key="a.tif", Body=body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(SceneError, match="another one now"):
        read_band(item_at("s3://scenes/a.tif"), "B02", BOX)


def test_requests_are_signed_only_with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3.s3_request("s3://bucket/a/b.tif") == (
        "https://bucket.s3.us-east-1.amazonaws.com/a/b.tif", {},
    )  # fmt: skip
    s3._session.cache_clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    url, headers = s3.s3_request("s3://bucket/a/b.tif")
    assert url == "https://bucket.s3.us-west-2.amazonaws.com/a/b.tif"
    assert "/us-west-2/s3/aws4_request" in headers["Authorization"]
    assert "x-amz-request-payer" in headers["Authorization"]
    assert headers["X-Amz-Security-Token"] == "token"
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert s3.s3_request("s3://bucket/a/b.tif")[1] == {"x-amz-request-payer": "requester"}


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        # A dot in the name would break the certificate of a bucket's own host.
        ({}, "https://s3.us-east-1.amazonaws.com/my.bucket/k"),
        ({"AWS_S3_ENDPOINT": "eodata.example"}, "https://eodata.example/my.bucket/k"),
        ({"AWS_ENDPOINT_URL": "http://h:9/"}, "http://h:9/my.bucket/k"),
        ({"AWS_S3_ENDPOINT": "h", "AWS_VIRTUAL_HOSTING": "TRUE"}, "https://my.bucket.h/k"),
        ({"AWS_REGION": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/my.bucket/k"),
    ],
    ids=["default", "endpoint", "url", "host", "region"],
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], url: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert s3.s3_request("s3://my.bucket/k")[0] == url


def test_a_bucket_tells_its_region() -> None:
    href = "s3://bucket/a.tif"
    assert not s3.learn_region(href, None)
    assert not s3.learn_region("https://h/a.tif", "eu-central-1")
    assert s3.learn_region(href, "eu-central-1")
    assert not s3.learn_region(href, "eu-central-1"), "told twice, it is no news"
    assert s3.s3_request(href)[0] == "https://bucket.s3.eu-central-1.amazonaws.com/a.tif"


def test_faults_of_buckets_are_those_of_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scenes").mkdir()
    raster(tmp_path / "scenes/a.tif")
    with serve_folder(tmp_path, Fault("status", times=2), Fault("truncate")) as server:
        credentials(monkeypatch, server.url.removeprefix("http://"))
        got = read_band(item_at("s3://scenes/a.tif"), "B02", BOX)
        np.testing.assert_allclose(got, DN * np.float32(1e-4) - np.float32(0.1), atol=1e-6)
        assert server.count(status=503) == 2
        assert all("Authorization" in h for h in server.headers)
        server.reset(Fault("status", code=403, times=None))
        with pytest.raises(SceneError, match=r"does not let it be read \(403\)"):
            rasters.remote_identity("s3://scenes/a.tif")


def test_credentials_without_the_package_that_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("botocore"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert s3.s3_request("s3://bucket/k")[1] == {}, "open buckets need no package"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(SceneError, match="nothing here can sign") as err:
        s3.s3_request("s3://bucket/k")
    assert "extra `s3`" in err.value.fix
