"""Records of items: every quirk of real ones, and what is refused."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from shapely import from_wkt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cassettes import DATA
from terraloom.acquire.catalogue import UNREADABLE
from terraloom.acquire.outlines import outline
from terraloom.acquire.records import item_footprint, item_record, item_time
from terraloom.acquire.sources import load_source, source_keys
from terraloom.errors import SceneError

API = "https://example.org/stac"
ITEMS = DATA / "stac" / "items"
real = pytest.mark.skipif(not ITEMS.is_dir(), reason="needs the real STAC items of shared/data")
SQUARE = {"type": "Polygon", "coordinates": [[[12, 52], [13, 52], [13, 53], [12, 53], [12, 52]]]}


def _item(assets: dict | None = None, **properties) -> dict:
    return {
        "id": "S2A_x", "collection": "sentinel-2-l2a", "geometry": SQUARE,
        "properties": {"datetime": "2023-06-01T10:00:00Z", **properties},
        "assets": assets or {"blue": {"href": "https://example.org/B02.tif"}},
    }  # fmt: skip


def _record(item: dict, source: str = "sentinel-2-l2a", bands: list[str] | None = None, **options):
    table = load_source(source)
    return item_record(item, table, bands or table.choose(None), API, **options)


def _real(name: str) -> dict:
    return json.loads((ITEMS / name).read_text())


# ------------------------------------------------------------------------------- real items


def _all_real() -> list[tuple[str, dict]]:
    found = []
    for path in sorted(ITEMS.glob("*json")):
        record = json.loads(path.read_text())
        parts = record.get("features") or [record]
        found += [(f"{path.name}[{n}]", part) for n, part in enumerate(parts)]
    return found


@real
def test_every_real_item_gives_a_record_or_a_reason():
    """Of any item and any source: a complete record, or one line that says why not."""
    made: dict[str, set[str]] = {}
    for name, item in _all_real():
        for key in source_keys():
            try:
                record = _record(item, key)
            except SceneError as err:
                assert err.found and err.where, name
                continue
            json.dumps(record, allow_nan=False)
            assert from_wkt(record["footprint"]).is_valid
            assert record["assets"] and record["source"] == key
            made.setdefault(name.split("[")[0], set()).add(key)
    assert made["LC08_L2SP_028030_20200114_20200824_02_T1_SR.json"] >= {"landsat-c2-l2"}
    assert made["LE07_L2SP_044033_20210329_20210424_02_T1_SR.json"] >= {"landsat-c2-l2"}
    assert made["S2A_28QCH_20200714_0_L2A.json"] >= {"sentinel-2-l2a"}
    assert made["site1-20200606-tall-strip-africa.geojson"] >= {"sentinel-2-l2a"}
    assert made["S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531.json"] >= {"sentinel-2-l2a"}
    assert "sentinel-2-l2a.collection.json" not in made  # a collection is no item
    assert "S2A_28QCH_20200714_0_L2A.odc-metadata.json" not in made


@real
def test_landsat_8_and_7_share_band_names():
    """Level 2 of USGS: no raster extension, upper-case platform, checksums only of metadata."""
    oli = _record(_real("LC08_L2SP_028030_20200114_20200824_02_T1_SR.json"), "landsat-c2-l2")
    etm = _record(_real("LE07_L2SP_044033_20210329_20210424_02_T1_SR.json"), "landsat-c2-l2")
    assert (oli["platform"], etm["platform"]) == ("landsat-8", "landsat-7")
    assert (oli["crs"], etm["crs"]) == ("EPSG:32615", "EPSG:32610")
    assert (oli["why"], etm["why"]) == ("", "without coastal")
    red, qa = oli["assets"]["red"], oli["assets"]["QA_PIXEL"]
    assert red["href"].startswith("s3://usgs-landsat/collection02/level-2/standard/oli-tirs/2020/")
    assert red["href"].endswith("_SR_B4.TIF") and etm["assets"]["red"]["href"].endswith(
        "_SR_B3.TIF"
    )
    assert (red["scale"], red["offset"], red["nodata"]) == (2.75e-5, -0.2, 0)
    assert (qa["unit"], qa["scale"], qa["offset"], qa["nodata"]) == ("class", 1, 0, 1)
    assert len(red["checksum"]) == 128  # sha2-512
    assert oli["view_zenith_deg"] == 0
    assert oli["sun_elevation_deg"] == pytest.approx(22.57988462)


@real
def test_old_asset_names_are_refused_with_what_is_there():
    """SR_B2.TIF is blue on Landsat 8 and green on Landsat 7: not guessed."""
    with pytest.raises(SceneError, match="none of the bands") as err:
        _record(_real("LC08_L2SR_081119_20200101_20200823_02_T2.json"), "landsat-c2-l2")
    assert "SR_B2.TIF" in str(err.value)


# ------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("properties", "time"),
    [
        ({"datetime": "2020-05-25T23:35:47.745731Z"}, datetime(2020, 5, 25, 23, 35, 47, 745731)),
        ({"datetime": "2020-05-26T09:35:00+10:00"}, datetime(2020, 5, 25, 23, 35)),
        ({"datetime": "2020-05-25T18:35:00-05:00"}, datetime(2020, 5, 25, 23, 35)),
        ({"datetime": "2020-05-25T23:35:00"}, datetime(2020, 5, 25, 23, 35)),  # no zone is UTC
        (
            {"datetime": None, "start_datetime": "2013-09-14T00:00:00Z",
             "end_datetime": "2013-09-29T23:59:59Z"},
            datetime(2013, 9, 14),
        ),
    ],
)  # fmt: skip
def test_times_and_zones(properties, time, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    assert item_time({"id": "x", "properties": properties}) == time.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("properties", "why"),
    [
        ({}, "no time"),
        ({"datetime": "yesterday"}, "'yesterday' is not readable"),
        ({"datetime": None, "end_datetime": "2013-09-14T00:00:00Z"}, "no time"),
        (
            {"start_datetime": "2013-09-14T00:00:00Z", "end_datetime": "2013-09-13T00:00:00Z"},
            "ends .* before it starts",
        ),
    ],
)
def test_bad_times_are_refused(properties, why):
    with pytest.raises(SceneError, match=why):
        item_time({"id": "x", "properties": properties})


def test_an_item_that_could_not_be_read_says_why():
    with pytest.raises(SceneError, match="item x: not JSON"):
        item_time({"id": "x", "properties": {}, UNREADABLE: "not JSON"})


# ---------------------------------------------------------------------------------- outline


def test_outline_that_jumps_over_the_180th_meridian_is_cut_there():
    jump = [[179, 10], [-179, 10], [-179, 12], [179, 12], [179, 10]]
    beyond = [[179, 10], [181, 10], [181, 12], [179, 12], [179, 10]]
    west = [[-181, 10], [-179, 10], [-179, 12], [-181, 12], [-181, 10]]
    split = {
        "type": "MultiPolygon",
        "coordinates": [
            [[[179, 10], [180, 10], [180, 12], [179, 12], [179, 10]]],
            [[[-180, 10], [-179, 10], [-179, 12], [-180, 12], [-180, 10]]],
        ],
    }
    wanted = outline(split, None)
    assert wanted.area == pytest.approx(4)
    for ring in (jump, beyond, west, jump[::-1]):
        found = outline({"type": "Polygon", "coordinates": [ring]}, None)
        assert found.symmetric_difference(wanted).area == pytest.approx(0, abs=1e-9)
    assert outline(None, [179, 10, -179, 12]).equals(wanted)
    assert wanted.bounds == (-180, 10, 180, 12)


def test_ordinary_outlines_stay_as_they_are():
    assert outline(SQUARE, None).bounds == (12, 52, 13, 53)
    assert outline(None, [12, 52, -5, 13, 53, 900]).bounds == (12, 52, 13, 53)
    world = [[-180, -90], [180, -90], [180, 90], [-180, 90], [-180, -90]]
    assert outline({"type": "Polygon", "coordinates": [world]}, None).area == 360 * 180
    assert outline(None, [-180, -90, 180, 90]).area == 360 * 180
    hole = [[12.4, 52.4], [12.6, 52.4], [12.6, 52.6], [12.4, 52.6], [12.4, 52.4]]
    holed = {"type": "Polygon", "coordinates": [*SQUARE["coordinates"], hole]}
    assert outline(holed, None).area == pytest.approx(0.96)
    bow = [[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]  # crosses itself: made valid
    assert outline({"type": "Polygon", "coordinates": [bow]}, None).is_valid


@pytest.mark.parametrize(
    ("geometry", "bbox", "why"),
    [
        (None, None, "neither a geometry"),
        (None, [1, 2, 3], "bounding box of 3"),
        ({"type": "Point", "coordinates": [1, 2]}, None, "no area"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [0, 0], [0, 0]]]}, None, "no area"),
        ({"type": "Blob"}, None, "not a geometry"),
        (None, [500_000, 4_600_000, 610_000, 4_700_000], "not in degrees"),
        (
            {"type": "Polygon",
             "coordinates": [[[0, 80], [120, 80], [-120, 80], [0, 80]]]},
            None, "around a pole",
        ),
    ],
)  # fmt: skip
def test_unusable_outlines_are_refused(geometry, bbox, why):
    with pytest.raises(SceneError, match=why):
        item_footprint({"id": "x", "geometry": geometry, "bbox": bbox})


# ----------------------------------------------------------------------------------- angles


def test_view_angles():
    seen = {"view:incidence_angle": 7.5, "view:azimuth": -75, "view:off_nadir": 1}
    record = _record(_item(**seen), bands=["B02"])
    assert (record["view_zenith_deg"], record["view_azimuth_deg"]) == (7.5, 285)
    placeholder = _record(_item(**{"view:off_nadir": 0}), bands=["B02"])
    assert placeholder["view_zenith_deg"] is None
    landsat = _item({"red": {"href": "https://example.org/a.tif"}}, **{"view:off_nadir": 15})
    zenith = _record(landsat, "landsat-c2-l2", ["red"])["view_zenith_deg"]
    assert 15 < zenith < 18  # the ground is curved


def test_impossible_angles_are_not_believed():
    record = _record(_item(**{"view:sun_elevation": 200, "view:sun_azimuth": 10}), bands=["B02"])
    assert 0 < record["sun_elevation_deg"] < 62
    assert _record(_item(**{"view:incidence_angle": 95}), bands=["B02"])["view_zenith_deg"] is None
    assert _record(_item(**{"eo:cloud_cover": 120}), bands=["B02"])["cloud_pct"] is None


@pytest.mark.parametrize(
    ("item_id", "platform", "found"),
    [
        ("x", "Sentinel-2A", "sentinel-2a"),
        ("x", "LANDSAT_8", "landsat-8"),
        ("S2B_33UUU_20200101_0_L2A", None, "sentinel-2b"),
        ("LT05_L2SP_044033_20010329_02_T1", None, "landsat-5"),
        ("HLS.S30.T33UUU", None, ""),
        ("thing", None, ""),
    ],
)
def test_platform(item_id, platform, found):
    item = {**_item(platform=platform), "id": item_id}
    assert _record(item, bands=["B02"])["platform"] == found


# ----------------------------------------------------------------------------------- assets


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("1220" + "a" * 64, "a" * 64),
        ("1114" + "b" * 40, "b" * 40),
        ("d50110" + "c" * 32, "c" * 32),
        ("1340" + "D" * 128, "d" * 128),
        ("d" * 32, None),  # a bare digest is no multihash
        ("1e20" + "e" * 64, None),  # blake3 is not checked
        ("1220" + "a" * 60, None),
    ],
)
def test_checksums_are_told_apart_by_length(given, kept):
    asset = {
        "href": "https://example.org/a.tif",
        "file:checksum": given,
        "file:size": 9,
        "etag": "e",
    }
    record = _record(_item({"B02": asset}), bands=["B02"])["assets"]["B02"]
    assert (record["checksum"], record["size"], record["etag"]) == (kept, 9, "e")


@pytest.mark.parametrize(
    ("asset", "why"),
    [
        ({"file:size": 0}, "its size is 0"),
        ({"file:size": -5}, "its size is -5"),
        ({"file:size": "12"}, "its size is '12'"),
        ({"proj:shape": [10]}, "its shape"),
        ({"proj:shape": "10x10"}, "its shape"),
        ({"raster:bands": [{"scale": 0}]}, "its scale is 0"),
        ({"href": None}, "no address"),
        ({"href": "/etc/passwd"}, "refused"),
        ({"href": "file:///etc/passwd"}, "refused"),
        ({"href": "/vsicurl/http://example.org/a.tif"}, "refused"),
        ({"href": "s3://bucket/../other/a.tif"}, "refused"),
        ({"href": "https://example.org/a.vrt"}, "not a raster"),
    ],
)
def test_bad_assets_are_refused_by_name(asset, why):
    item = _item({"B02": {"href": "https://example.org/a.tif", **asset}})
    with pytest.raises(SceneError, match=f"item S2A_x, asset B02: .*{why}"):
        _record(item, bands=["B02"])


def test_local_files_of_a_remote_catalogue_only_when_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    item = _item({"B02": {"href": f"file://{tmp_path}/data/a.tif"}})
    assert _record(item, bands=["B02"], allow_local=True)["assets"]["B02"]["href"] == "data/a.tif"
    for odd in ("data/a.tif", "/vsizip/x.zip/a.tif", "ftp://x/a.tif"):
        with pytest.raises(SceneError, match="refused"):
            _record(_item({"B02": {"href": odd}}), bands=["B02"], allow_local=True)


def test_s3_addresses_and_hooks_stand_in_the_record():
    cdse = {"href": "s3://eodata/Sentinel-2/MSI/L2A/2026/05/28/x_B02_10m.jp2", "raster:scale": 1e-4,
            "raster:offset": -0.1, "proj:code": "EPSG:32613", "nodata": 0}  # fmt: skip
    item = _item({"B02_10m": cdse}, **{"processing:version": "05.12"})
    record = _record(item, bands=["B02"], sign="hook")["assets"]["B02"]
    assert record["href"] == cdse["href"]
    assert (record["offset"], record["scale"], record["sign"], record["band"]) == (
        -0.1,
        1e-4,
        "hook",
        1,
    )


def test_modis_items_have_a_range_a_projection_by_text_and_no_nodata():
    """As Planetary Computer has them: sinusoidal as WKT, no EPSG code, no declared nodata."""
    wkt = (
        'PROJCS["MODIS sinusoidal",GEOGCS["sphere",'
        'DATUM["sphere",SPHEROID["sphere",6371007.181,0]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Sinusoidal"],'
        'PARAMETER["longitude_of_center",0],PARAMETER["false_easting",0],'
        'PARAMETER["false_northing",0],UNIT["Meter",1]]'
    )
    size = 231.65635826
    asset = {
        "href": "https://modiseuwest.blob.core.windows.net/modis-061/a.tif",
        "raster:bands": [{"scale": 1e-4, "unit": "NDVI", "spatial_resolution": 250}],
        "proj:transform": [size, 0, 0, 0, -size, 0],
    }
    item = {
        **_item({"250m_16_days_NDVI": asset, "250m_16_days_pixel_reliability": asset}),
        "id": "MOD13Q1.A2013257.h12v10.061",
    }
    item["properties"] = {
        "datetime": None, "start_datetime": "2013-09-14T00:00:00Z", "platform": "terra",
        "end_datetime": "2013-09-29T23:59:59Z", "proj:epsg": None, "proj:wkt2": wkt,
    }  # fmt: skip
    record = _record(item, "modis-vi")
    assert record["crs"] == wkt and record["why"] == "without EVI"
    ndvi, layer = record["assets"]["NDVI"], record["assets"]["pixel_reliability"]
    assert (ndvi["nodata"], ndvi["scale"], ndvi["unit"]) == (-3000, 1e-4, "index")
    assert ndvi["resolution_m"] == size
    assert (layer["nodata"], layer["scale"], layer["unit"]) == (None, 1, "class")
    assert record["sun_elevation_deg"] is None
    item["properties"]["proj:transform"] = asset.pop("proj:transform")  # of the whole item
    assert _record(item, "modis-vi")["assets"]["NDVI"]["resolution_m"] == size
    del item["properties"]["proj:transform"]  # the nominal 250 m agree with the table
    assert _record(item, "modis-vi")["assets"]["NDVI"]["resolution_m"] == size


def test_bands_of_one_file_are_told_apart(tmp_path):
    table = tmp_path / "stack.yaml"
    table.write_text(
        "title: stack\nkind: optical\ncollection: c\nunit: reflectance\nnodata: 0\nbands:\n"
        "  red: {assets: [stack], band: 1, resolution_m: 10, group: x_10}\n"
        "  nir: {assets: [stack], band: 2, resolution_m: 10, group: x_10}\n"
    )
    bands = [{"scale": 0.5, "nodata": 9}, {"scale": 0.25}]
    item = _item({"stack": {"href": "https://example.org/a.tif", "raster:bands": bands}})
    assets = _record(item, str(table))["assets"]
    assert [(a["band"], a["scale"], a["nodata"]) for a in assets.values()] == [
        (1, 0.5, 9),
        (2, 0.25, 0),
    ]


def test_degrees_are_no_metres():
    asset = {
        "href": "https://example.org/a.tif",
        "proj:transform": [0.00027, 0, 12, 0, -0.00027, 53],
    }
    for code in ("EPSG:4326", "EPSG:4258", "OGC:CRS84", "nonsense"):
        record = _record(_item({"B02": {**asset, "proj:code": code}}), bands=["B02"])
        assert record["assets"]["B02"]["resolution_m"] == 10
