"""Recorded API traffic (VCR cassettes of pystac-client) played back through requests."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import requests
import yaml
from urllib3.response import HTTPResponse

__all__ = ["DATA", "Recorded", "play", "recorded"]

_SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", _SHARED))
_CASSETTES = DATA / "stac" / "pystac-client" / "tests" / "cassettes"
recorded = pytest.mark.skipif(
    not _CASSETTES.is_dir(), reason="needs the recorded API traffic of shared/data"
)
_EMPTY = b'{"type": "FeatureCollection", "features": [], "links": []}'


@dataclass
class Recorded:
    """What a cassette answers, and what it was asked.

    Attributes:
        answers: Method, address and body of a request, with the recorded response.
        asked: Method, address and body of the requests made, in order.
    """

    answers: list[tuple[str, str, Any, dict[str, Any]]]
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    def send(self, request: requests.PreparedRequest) -> requests.Response:
        body = json.loads(request.body) if request.body else None
        self.asked.append((str(request.method), str(request.url), body))
        same = [
            (wanted, answer)
            for method, url, wanted, answer in self.answers
            if method == request.method and url.rstrip("/") == str(request.url).rstrip("/")
        ]
        # A search may ask in other words than the recorded one; its page token must be the same.
        exact = [a for wanted, a in same if _token(wanted) == _token(body)]
        if not same:
            raise requests.ConnectionError(f"{request.method} {request.url} is not recorded")
        response = requests.Response()
        # Recordings stop before the last page.
        answer = exact[0] if exact else {"status": {"code": 200}, "body": {"string": _EMPTY}}
        response.status_code = answer["status"]["code"]
        response.raw = HTTPResponse(io.BytesIO(answer["body"]["string"]), preload_content=False)
        response.url, response.request = str(request.url), request
        return response


def _token(body: Any) -> Any:
    return [body.get(k) for k in ("token", "next", "page")] if isinstance(body, dict) else None


@contextmanager
def play(*names: str) -> Iterator[Recorded]:
    """Answer all requests from cassettes, named by folder and file without ``.yaml``."""
    answers: list[tuple[str, str, Any, dict[str, Any]]] = []
    for name in names:
        text = (_CASSETTES / f"{name}.yaml").read_text(encoding="utf-8")
        for one in yaml.load(text, Loader=yaml.CSafeLoader)["interactions"]:
            asked, body = one["request"], one["request"].get("body")
            answer = one["response"]
            content = answer["body"]["string"]
            answer["body"]["string"] = content.encode() if isinstance(content, str) else content
            answers.append(
                (asked["method"], asked["uri"], json.loads(body) if body else None, answer)
            )
    player = Recorded(answers)

    def send(self: Any, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        return player.send(request)

    with mock.patch("requests.adapters.HTTPAdapter.send", send):
        yield player
