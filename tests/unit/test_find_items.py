"""Item search: recorded traffic of real APIs, static catalogues, a server that misbehaves."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cassettes import play, recorded
from terraloom.acquire import catalogue, retry
from terraloom.acquire.catalogue import UNREADABLE, Query, find_items
from terraloom.acquire.records import item_record
from terraloom.acquire.sources import load_source
from terraloom.errors import ConfigError, SceneError

PC = "https://planetarycomputer.microsoft.com/api/stac/v1"
ES = "https://earth-search.aws.element84.com/v1"
EVERYWHERE = (-180.0, -90.0, 180.0, 90.0)
DAY = ((date(2023, 10, 8), date(2023, 10, 8)),)
CLEAR = {"op": "<", "args": [{"property": "eo:cloud_cover"}, 0.01]}


def _query(url: str, collection: str, **options: Any) -> Query:
    options.setdefault("intervals", DAY)
    return Query(url, collection, EVERYWHERE, **options)


def _records(items: list[dict], source: str, provider: str) -> list[dict]:
    table = load_source(source)
    p = table.provider(provider)
    return [item_record(i, table, table.choose(None), p.catalogue, sign=p.sign) for i in items]


# ------------------------------------------------------------------------------ recorded traffic


@recorded
def test_sentinel_2_of_planetary_computer():
    with play(
        "test_client/TestAPI.test_instance", "test_item_search/TestItemSearch.test_datetime_results"
    ) as api:
        items = find_items(_query(PC, "sentinel-2-l2a"))
    assert len(items) == 33
    method, url, body = api.asked[-1]
    assert (method, url) == ("POST", f"{PC}/search")
    assert body["collections"] == ["sentinel-2-l2a"]
    assert body["datetime"] == "2023-10-08T00:00:00Z/2023-10-08T23:59:59Z"
    for record in _records(items, "sentinel-2-l2a", "planetary-computer"):
        assert record["platform"] == "sentinel-2a"
        assert record["crs"].startswith(("EPSG:326", "EPSG:327"))
        assert record["offset_rule"] == "0: processing baseline 02.12"
        assert len(record["assets"]) == 13
        assert {a["sign"] for a in record["assets"].values()} == {"planetary-computer"}
        for asset in record["assets"].values():
            assert asset["href"].startswith("https://sentinel2l2a01.blob.core.windows.net/")
            assert "?" not in asset["href"]


@recorded
def test_landsat_of_planetary_computer_without_search():
    """Items come one by one from the items of the collection."""
    from support.cassettes import _CASSETTES, yaml

    text = (_CASSETTES / "test_client/test_fallback_strategy.yaml").read_text()
    page = yaml.load(text, Loader=yaml.CSafeLoader)["interactions"][2]["response"]["body"]["string"]
    records = _records(json.loads(page)["features"], "landsat-c2-l2", "planetary-computer")
    assert len(records) == 10
    for record in records:
        assert record["platform"] in ("landsat-7", "landsat-8", "landsat-9")
        assert {"QA_PIXEL", "QA_RADSAT", "red"} <= set(record["assets"])
        red = record["assets"]["red"]
        assert (red["scale"], red["offset"], red["nodata"]) == (2.75e-5, -0.2, 0)
        assert record["assets"]["QA_PIXEL"]["nodata"] == 1


@recorded
def test_earth_search_answers_with_more_than_was_asked_for():
    """The recorded page holds one item of each of two collections."""
    for source in ("sentinel-2-l2a", "landsat-c2-l2"):
        with play("test_client/TestAPI.test_v1", "test_item_search/test_multiple_collections"):
            items = find_items(_query(ES, source))
        (record,) = _records(items, source, "earth-search")
        assert record["collection"] == source
        assert record["datetime"].startswith("2023-10-08T1")
        if source == "sentinel-2-l2a":  # raster:bands still say -0.1
            assert record["offset_rule"] == "0: earthsearch:boa_offset_applied"
            assert record["assets"]["B02"]["offset"] == 0
        else:
            assert record["assets"]["red"]["href"].startswith("s3://usgs-landsat/")


@recorded
def test_copernicus_dem_of_earth_search():
    with play("test_client/TestAPI.test_v1", "test_cli/TestCLISearch.test_save[inprocess]"):
        items = find_items(_query(ES, "cop-dem-glo-30", intervals=()))
    records = _records(items, "copernicus-dem", "earth-search")
    assert len(records) == 10
    for record in records:
        asset = record["assets"]["elevation"]
        assert asset["href"].startswith("https://copernicus-dem-30m.s3.amazonaws.com/")
        assert (asset["resolution_m"], asset["unit"], record["crs"]) == (30, "m", "EPSG:4326")


@recorded
def test_pages_are_followed_to_the_end():
    with play(
        "test_client/TestAPI.test_instance",
        "test_item_search/TestItemSearch.test_result_paging_max_items",
    ) as api:
        items = find_items(_query(PC, "naip", intervals=()))
    assert len({i["id"] for i in items}) == len(items) == 30
    assert next(b.get("token") for _, _, b in api.asked[1:] if b) is None
    assert len(api.asked) >= 5  # root, three pages, the empty last one


@recorded
def test_an_api_that_does_not_say_what_it_can_is_searched():
    url = "https://earth-search.aws.element84.com/v0"
    with play("test_cli/TestCLI.test_non_conformant_can_be_fixed[inprocess]"):
        items = find_items(_query(url, "sentinel-s2-l2a-cogs"))
    (record,) = _records(items, "sentinel-2-l2a", "earth-search")
    assert record["offset_rule"] == "0: sentinel:boa_offset_applied"
    assert record["assets"]["SCL"]["unit"] == "class"


@recorded
def test_filter_is_sent_where_the_api_filters():
    with play(
        "test_client/TestAPI.test_instance", "test_item_search/TestItemSearch.test_datetime_results"
    ) as api:
        find_items(_query(PC, "sentinel-2-l2a", filter=CLEAR))
    body = api.asked[-1][2]
    assert body["filter"] == CLEAR
    assert body["filter-lang"] == "cql2-json"


@recorded
def test_filter_is_applied_here_where_the_api_does_not():
    with play("test_client/TestAPI.test_v1", "test_item_search/test_multiple_collections") as api:
        assert len(find_items(_query(ES, "sentinel-2-l2a", filter=CLEAR))) == 1
        assert find_items(_query(ES, "landsat-c2-l2", filter=CLEAR)) == []
        assert "filter" not in api.asked[1][2]
        spatial = {"op": "s_intersects", "args": [{"property": "geometry"}, {}]}
        with pytest.raises(ConfigError, match="s_intersects"):
            find_items(_query(ES, "sentinel-2-l2a", filter=spatial))


# ---------------------------------------------------------------------------- static catalogues


def _static(root: Path, items: dict[str, Any]) -> Query:
    root.mkdir(exist_ok=True)
    base = {"stac_version": "1.0.0", "description": "x", "type": "Catalog"}
    links = [{"rel": "item", "href": f"./{name}"} for name in items]
    for name, content in items.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (root / name).write_text(text)
    (root / "catalog.json").write_text(json.dumps({**base, "id": "c", "links": links}))
    return _query(str(root / "catalog.json"), "c")


def _item(item_id: str, **properties: Any) -> dict[str, Any]:
    square = [[[12, 52], [13, 52], [13, 53], [12, 53], [12, 52]]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": item_id, "links": [],
        "bbox": [12, 52, 13, 53], "geometry": {"type": "Polygon", "coordinates": square},
        "properties": {"datetime": "2023-10-08T10:00:00Z", **properties},
        "assets": {"blue": {"href": "./B02.tif"}},
    }  # fmt: skip


def test_one_broken_item_does_not_stop_the_others(tmp_path):
    query = _static(
        tmp_path / "cat",
        {
            "good.json": _item("good"), "cut.json": '{"type": "Feature", "id": "cut",',
            "gone.json": None, "list.json": "[]", "empty.json": "",
            "bare.json": {"type": "Feature"},
            "later.json": _item("later", datetime="not a time"),
            "catalogue.json": {"type": "Catalog", "id": "d", "stac_version": "1.0.0",
                               "description": "x", "links": []},
            "last.json": _item("last"),
        },
    )  # fmt: skip
    found = {i["id"]: i.get(UNREADABLE) for i in find_items(query)}
    assert [k for k, why in found.items() if why is None] == ["good", "last"]
    broken = ["cut", "gone", "list", "empty", "bare", "later", "catalogue"]
    assert list(found) == ["good", *broken, "last"]
    assert found["cut"].startswith("cut.json: JSONDecodeError: ")
    assert "No such file" in found["gone"]
    assert "not an item" in found["catalogue"]
    absolute = next(i for i in find_items(query) if i["id"] == "good")["assets"]["blue"]["href"]
    assert absolute == str(tmp_path / "cat" / "B02.tif")


def test_static_catalogues_are_filtered(tmp_path):
    items = {f"{n}.json": _item(f"i{n}", **{"eo:cloud_cover": n * 10}) for n in range(5)}
    query = _static(tmp_path / "cat", {**items, "odd.json": "{"})
    condition = {"op": "<=", "args": [{"property": "eo:cloud_cover"}, 20]}
    kept = [i["id"] for i in find_items(Query(query.catalogue, "c", EVERYWHERE, DAY, condition))]
    assert kept == ["i0", "i1", "i2", "odd"]  # what cannot be read is reported, not hidden
    assert "filter" in str(Query(query.catalogue, "c", EVERYWHERE, DAY, condition))


# --------------------------------------------------------------------------- a server that fails


class _Api:
    """A STAC API on loopback; ``turns`` say how the next searches are answered."""

    def __init__(self) -> None:
        self.url = ""
        self.turns: list[Callable[[BaseHTTPRequestHandler], bool]] = []
        self.features: list[Any] = []
        self.next_link = False
        self.times: list[float] = []

    def root(self) -> dict[str, Any]:
        return {
            "type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "x",
            "conformsTo": ["https://api.stacspec.org/v1.0.0/core",
                           "https://api.stacspec.org/v1.0.0/item-search"],
            "links": [{"rel": "self", "href": self.url},
                      {"rel": "search", "href": f"{self.url}/search", "method": "POST"}],
        }  # fmt: skip

    def page(self) -> dict[str, Any]:
        link = {"rel": "next", "href": f"{self.url}/search", "method": "POST", "body": {"token": 1}}
        links = [link] if self.next_link else []
        return {"type": "FeatureCollection", "features": self.features, "links": links}


@contextmanager
def _serve() -> Iterator[_Api]:
    api = _Api()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body: Any, status: int = 200, cut: int = 0, **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[: len(data) - cut])
            if cut:
                self.close_connection = True

        def do_GET(self) -> None:
            self.answer(api.root())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            api.times.append(time.monotonic())
            if api.turns and api.turns.pop(0)(self):
                return
            self.answer(api.page())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Api]:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    with _serve() as api:
        api.features = [{**_item("a"), "collection": "c"}]
        yield api


def test_too_many_requests_waits_as_asked(api):
    api.turns = [lambda h: h.answer({}, 429, Retry_After="1") or True]
    assert [i["id"] for i in find_items(_query(api.url, "c"))] == ["a"]
    assert len(api.times) == 2
    assert 0.9 < api.times[1] - api.times[0] < 5


def test_nobody_waits_for_hours(api, monkeypatch):
    monkeypatch.setattr(retry, "WAIT_S", 0.05)
    api.turns = [lambda h: h.answer({}, 503, Retry_After="86400") or True]
    start = time.monotonic()
    assert len(find_items(_query(api.url, "c"))) == 1
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_servers_in_trouble_are_asked_again(api, status):
    api.turns = [lambda h: h.answer({}, status) or True] * 2
    assert len(find_items(_query(api.url, "c"))) == 1


def test_an_answer_cut_short_is_asked_for_again(api):
    api.turns = [lambda h: h.answer(api.page(), cut=40) or True] * 2
    assert len(find_items(_query(api.url, "c"))) == 1
    assert len(api.times) == 3


def test_a_refusal_is_final_and_says_so(api):
    api.turns = [lambda h: h.answer({"detail": "no such collection"}, 404) or True]
    with pytest.raises(SceneError, match="cannot be reached"):
        find_items(_query(api.url, "c"))
    assert len(api.times) == 1


def test_a_silent_server_does_not_hold_up_the_search(api, monkeypatch):
    monkeypatch.setattr(retry, "RETRIES", 1)
    api.turns = [lambda h: time.sleep(1.5) or True] * 2
    start = time.monotonic()
    with pytest.raises(SceneError, match="cannot be reached"):
        find_items(_query(api.url, "c", timeout_s=0.2))
    assert time.monotonic() - start < 5


def test_text_instead_of_items_is_named(api):
    api.turns = [lambda h: h.answer("<html>") or True]
    with pytest.raises(SceneError, match="not readable STAC"):
        find_items(_query(api.url, "c"))


def test_malformed_items_of_an_api_are_kept_apart(api):
    api.features += [{"type": "Feature"}, {**_item("odd"), "collection": "c", "assets": [1]}]
    api.features.append({**_item("href"), "collection": "c", "assets": {"blue": {}}})
    found = {i["id"]: i.get(UNREADABLE) for i in find_items(_query(api.url, "c"))}
    assert found == {"a": None, "item-1": "the record has no id", "odd": "its assets are no table",
                     "href": None}  # fmt: skip


def test_relative_addresses_start_at_the_item(api):
    item = {**_item("rel"), "collection": "c"}
    item["links"] = [{"rel": "self", "href": f"{api.url}/collections/c/items/rel"}]
    api.features = [item]
    (found,) = find_items(_query(api.url, "c"))
    assert found["assets"]["blue"]["href"] == f"{api.url}/collections/c/items/B02.tif"


def test_two_items_of_one_id_are_kept_and_repeats_are_not(api):
    twin = {**_item("a", **{"eo:cloud_cover": 3}), "collection": "c"}
    api.features = [*api.features * 2, twin]
    assert [i["id"] for i in find_items(_query(api.url, "c"))] == ["a", "a"]


def test_paging_without_end_is_noticed(api, monkeypatch):
    monkeypatch.setattr(catalogue, "_LOST_ITEMS", 20)
    api.next_link = True
    with pytest.raises(SceneError, match="paging does not end"):
        find_items(_query(api.url, "c"))
