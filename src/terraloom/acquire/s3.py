"""Requests to S3 and to servers that speak its protocol.

Settings are those of GDAL and of Amazon's tools, from the environment: ``AWS_S3_ENDPOINT`` (or
``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``), ``AWS_REGION`` (or ``AWS_DEFAULT_REGION``),
``AWS_HTTPS``, ``AWS_VIRTUAL_HOSTING``, ``AWS_NO_SIGN_REQUEST``, ``AWS_REQUEST_PAYER`` and the
credentials wherever Amazon's tools look for them. Without credentials requests are not signed,
which is what open buckets want.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

from terraloom.errors import SceneError

__all__ = ["learn_region", "s3_request"]

_REGION = "us-east-1"
#: Region of each bucket that told it.
_regions: dict[str, str] = {}


def s3_request(href: str) -> tuple[str, dict[str, str]]:
    """URL and headers of a GET of an ``s3://bucket/key`` address.

    Raises:
        SceneError: Credentials are set but the package that signs with them is not installed.
    """
    bucket, _, key = href[5:].partition("/")
    region = _regions.get(bucket) or _setting("AWS_REGION", "AWS_DEFAULT_REGION") or _REGION
    url = f"{_host(bucket, region)}/{quote(key)}"
    headers: dict[str, str] = {}
    payer = _setting("AWS_REQUEST_PAYER")
    if payer:
        headers["x-amz-request-payer"] = payer
    credentials = None if _yes("AWS_NO_SIGN_REQUEST") else _credentials()
    if credentials is not None:
        headers = _signed(url, headers, credentials, region)
    return url, headers


def learn_region(href: str, region: str | None) -> bool:
    """Keep the region that a bucket tells in an answer; True when that is news."""
    if not region or not href.lower().startswith("s3://"):
        return False
    bucket = href[5:].partition("/")[0]
    used = _regions.get(bucket) or _setting("AWS_REGION", "AWS_DEFAULT_REGION") or _REGION
    _regions[bucket] = region
    return used != region


def _setting(*names: str) -> str | None:
    return next((v for v in map(os.environ.get, names) if v), None)


def _yes(name: str, default: bool = False) -> bool:
    value = os.environ.get(name, "")
    return value.lower() in ("1", "yes", "true", "on") if value else default


def _host(bucket: str, region: str) -> str:
    """Root of a bucket: its own host at Amazon, a folder at other servers, unless told."""
    endpoint = _setting("AWS_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    own = _yes("AWS_VIRTUAL_HOSTING", endpoint is None and "." not in bucket)
    if endpoint is None:
        endpoint = f"s3.{region}.amazonaws.com"
    if "://" not in endpoint:
        endpoint = f"{'https' if _yes('AWS_HTTPS', True) else 'http'}://{endpoint}"
    parts = urlsplit(endpoint.rstrip("/"))
    if own:
        return f"{parts.scheme}://{bucket}.{parts.netloc}{parts.path}"
    return f"{parts.scheme}://{parts.netloc}{parts.path}/{bucket}"


@lru_cache(maxsize=1)
def _session() -> Any:
    try:
        from botocore.session import Session
    except ImportError:
        return None
    return Session()


def _credentials() -> Any:
    session = _session()
    if session is not None:
        return session.get_credentials()
    if _setting("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        raise SceneError(
            "credentials for S3 are set, but nothing here can sign with them",
            fix="install the extra `s3`, or set AWS_NO_SIGN_REQUEST=YES for open buckets",
        )
    return None


def _signed(url: str, headers: dict[str, str], credentials: Any, region: str) -> dict[str, str]:
    """Headers with a signature, version 4."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest

    request = AWSRequest("GET", url, headers=headers)
    request.context["payload_signing_enabled"] = False
    S3SigV4Auth(credentials, "s3", region).add_auth(request)
    return dict(request.headers.items())
