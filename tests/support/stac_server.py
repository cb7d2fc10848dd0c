"""A STAC API with files on the loopback interface: the real protocol, no internet.

stac-fastapi serves search, paging and conformance; Starlette serves the files with range reads;
uvicorn runs both in a thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime as DateTime
from pathlib import Path
from typing import Any

import uvicorn
from shapely.geometry import box, shape
from stac_fastapi.api.app import StacApi
from stac_fastapi.types.config import ApiSettings
from stac_fastapi.types.core import BaseCoreClient
from stac_fastapi.types.errors import NotFoundError
from stac_fastapi.types.search import BaseSearchPostRequest
from starlette.staticfiles import StaticFiles

__all__ = ["Server", "serve_stac"]


@dataclass
class Server:
    """A running server.

    Attributes:
        url: Its root.
        requests: Method, path and status of each request.
        fail_next: The next this many searches answer 503.
        searches: Bodies of the searches.
        bytes_sent: Bytes of the bodies sent, by path.
    """

    url: str = ""
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    fail_next: int = 0
    searches: list[dict[str, Any]] = field(default_factory=list)
    bytes_sent: Counter[str] = field(default_factory=Counter)

    @property
    def stac(self) -> str:
        return self.url + "/"

    def count(self, status: int, suffix: str = "") -> int:
        return sum(s == status and p.endswith(suffix) for _, p, s in self.requests)


class _Settings(ApiSettings):
    enable_response_models: bool = False
    stac_fastapi_title: str = "test"
    stac_fastapi_description: str = "test"
    stac_fastapi_version: str = "0"
    stac_fastapi_landing_id: str = "test"


class _SearchBody(BaseSearchPostRequest):
    """Search with the token of the next page."""

    token: str | None = None


class _Memory(BaseCoreClient):
    """Items in memory, searched by collection, bounding box and time, in pages."""

    def __init__(self, items: list[dict[str, Any]], page: int, server: Server) -> None:
        super().__init__()
        self.items, self.page, self.server = items, page, server
        self.base_conformance_classes = [
            "https://api.stacspec.org/v1.0.0/core",
            "https://api.stacspec.org/v1.0.0/collections",
            "https://api.stacspec.org/v1.0.0/item-search",
            "https://api.stacspec.org/v1.0.0/ogcapi-features",
        ]

    def _collection(self, name: str) -> dict[str, Any]:
        return {
            "type": "Collection", "stac_version": "1.0.0", "id": name, "description": name,
            "license": "other", "links": [],
            "extent": {
                "spatial": {"bbox": [[-180, -90, 180, 90]]},
                "temporal": {"interval": [[None, None]]},
            },
        }  # fmt: skip

    def all_collections(self, **kwargs: Any) -> dict[str, Any]:
        names = sorted({i["collection"] for i in self.items})
        return {"collections": [self._collection(n) for n in names], "links": []}

    def get_collection(self, collection_id: str, **kwargs: Any) -> dict[str, Any]:
        return self._collection(collection_id)

    def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> dict[str, Any]:
        raise NotFoundError(item_id)

    def item_collection(self, collection_id: str, **kwargs: Any) -> dict[str, Any]:
        raise NotFoundError(collection_id)

    def get_search(self, **kwargs: Any) -> dict[str, Any]:
        raise NotFoundError("only POST searches")

    def post_search(self, search_request: Any, **kwargs: Any) -> dict[str, Any]:
        body = search_request.model_dump(mode="json", exclude_none=True)
        self.server.searches.append(body)
        found = [i for i in self.items if _matches(i, search_request)]
        start = int(getattr(search_request, "token", None) or 0)
        size = min(self.page, search_request.limit or self.page)
        links = []
        if start + size < len(found):
            links.append(
                {
                    "rel": "next", "method": "POST", "href": f"{self.server.url}/search",
                    "type": "application/geo+json", "merge": True,
                    "body": {"token": str(start + size)},
                }
            )  # fmt: skip
        page = found[start : start + size]
        return {"type": "FeatureCollection", "features": page, "links": links}


def _matches(item: dict[str, Any], request: Any) -> bool:
    if request.collections and item["collection"] not in request.collections:
        return False
    if request.bbox and not shape(item["geometry"]).intersects(box(*request.bbox)):
        return False
    when = DateTime.fromisoformat(item["properties"]["datetime"])
    first, last = request.start_date, request.end_date
    return not ((first and when < first) or (last and when > last))


class _Recorder:
    """Keeps what was asked and answered, and fails searches on request."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.server.requests.append((scope["method"], scope["path"], message["status"]))
            self.server.bytes_sent[scope["path"]] += len(message.get("body", b""))
            await send(message)

        if scope["path"].endswith("/search") and self.server.fail_next > 0:
            self.server.fail_next -= 1
            await note({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"busy"})
            return
        await self.app(scope, receive, note)


@contextmanager
def serve_stac(items: list[dict[str, Any]], files: Path, *, page: int = 2) -> Iterator[Server]:
    """Serve items at ``/`` and the folder ``files`` at ``/files`` on a free port.

    Asset addresses in ``items`` may hold ``{url}``, which becomes the server's root.
    """
    server = Server()
    api = StacApi(
        settings=_Settings(),
        client=_Memory(items, page, server),
        search_post_request_model=_SearchBody,
    )
    api.app.mount("/files", StaticFiles(directory=files))
    config = uvicorn.Config(
        _Recorder(api.app, server), host="127.0.0.1", port=0, log_level="error", lifespan="off"
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not runner.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise RuntimeError("the test server did not start")
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    for item in items:
        for asset in item["assets"].values():
            asset["href"] = asset["href"].replace("{url}", server.url)
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(timeout=20)
