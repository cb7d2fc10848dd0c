"""The source tables, and what is read from real items of several ages and providers."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cassettes import DATA
from terraloom.acquire.records import item_baseline, item_record, s2_offset
from terraloom.acquire.sources import load_source, source_keys, sources_text
from terraloom.acquire.sun import sun_position
from terraloom.errors import ConfigError, SceneError

API = "https://example.org/stac"
ROOT = Path(__file__).resolve().parents[2]
REAL = DATA / "stac" / "items"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real STAC items of shared/data")


def _real(name: str) -> dict:
    return json.loads((REAL / name).read_text())


def test_every_table_loads_and_covers_the_groups():
    groups = {
        "s2_10": {"B02", "B03", "B04", "B08"},
        "s2_20": {"B05", "B06", "B07", "B8A", "B11", "B12"},
        "s2_60": {"B01", "B09", "B10"},
        "s1_10": {"VV", "VH"},
        "dem_10": {"elevation"},
        "landsat_30": {"coastal", "blue", "green", "red", "nir08", "swir16", "swir22"},
        "hls_30": {"coastal", "blue", "green", "red", "nir08", "swir16", "swir22"},
        "hlss_30": {"rededge1", "rededge2", "rededge3", "nir"},
        "modis_240": {"NDVI", "EVI"},
    }
    found: dict[str, set[str]] = {}
    for key in source_keys():
        for name, band in load_source(key).bands.items():
            found.setdefault(band.group, set()).add(name)
            if band.group.startswith("s2"):
                assert band.group == f"s2_{band.resolution_m:g}"
    assert found == groups
    assert "B10" not in load_source("sentinel-2-l2a").bands  # cirrus has no surface reflectance
    assert load_source("copernicus-dem").static
    assert all(f"## `{key}`" in sources_text() for key in source_keys())


def test_the_issue_s_sources_and_providers_are_there():
    providers = {key: list(load_source(key).providers) for key in source_keys()}
    assert providers == {
        "copernicus-dem": ["earth-search", "planetary-computer"],
        "hls-l30": ["planetary-computer", "lp-daac"],
        "hls-s30": ["planetary-computer", "lp-daac"],
        "landsat-c2-l2": ["planetary-computer", "earth-search", "usgs"],
        "modis-vi": ["planetary-computer"],
        "sentinel-1-grd": [],
        "sentinel-1-rtc": ["planetary-computer"],
        "sentinel-2-l1c": ["earth-search"],
        "sentinel-2-l2a": ["earth-search", "planetary-computer", "cdse"],
    }
    for key in source_keys():
        for name, p in load_source(key).providers.items():
            assert (p.sign == "planetary-computer") == (name == "planetary-computer")


@pytest.mark.parametrize(
    ("key", "scale", "offset", "nodata", "layers"),
    [
        ("landsat-c2-l2", 2.75e-5, -0.2, 0, {"QA_PIXEL": 1, "QA_RADSAT": 0}),
        ("hls-l30", 1e-4, 0, -9999, {"Fmask": 255}),
        ("hls-s30", 1e-4, 0, -9999, {"Fmask": 255}),
        ("modis-vi", 1e-4, 0, -3000, {"pixel_reliability": -1}),
        ("sentinel-2-l2a", 1e-4, 0, 0, {"SCL": 0}),
        ("sentinel-1-rtc", 1, 0, -32768, {}),
    ],
)
def test_values_are_those_of_the_product_guides(key, scale, offset, nodata, layers):
    table = load_source(key)
    assert (table.scale, table.offset, table.nodata) == (scale, offset, nodata)
    assert {name: layer.nodata for name, layer in table.layers.items()} == layers


def test_roles_are_the_same_for_all_optical_sensors():
    s2 = load_source("sentinel-2-l2a").roles()
    assert s2 == {b: b for b in load_source("sentinel-2-l2a").bands}
    assert load_source("sentinel-2-l1c").roles()["B10"] == "B10"
    landsat = load_source("landsat-c2-l2").roles()
    assert landsat["B04"] == "red" and landsat["B08"] == landsat["B8A"] == "nir08"
    assert {band: role for role, band in landsat.items()}["nir08"] == "B8A"
    s30 = load_source("hls-s30").roles()
    assert (s30["B05"], s30["B08"], s30["B8A"]) == ("rededge1", "nir", "nir08")
    assert load_source("sentinel-1-rtc").roles() == {}


# --------------------------------------------------------------------------------- providers


def test_providers_are_chosen_by_name_by_catalogue_or_first():
    table = load_source("sentinel-2-l2a")
    first = table.provider()
    assert (first.catalogue, first.sign) == ("https://earth-search.aws.element84.com/v1", None)
    pc = table.provider("planetary-computer")
    assert (pc.collection, pc.sign) == ("sentinel-2-l2a", "planetary-computer")
    assert table.provider(None, pc.catalogue + "/").sign == "planetary-computer"
    own = table.provider(None, "mine/catalog.json", "c")
    assert (own.catalogue, own.collection, own.sign) == ("mine/catalog.json", "c", None)
    mirror = table.provider("planetary-computer", "https://mirror.example.org")
    assert (mirror.catalogue, mirror.sign) == ("https://mirror.example.org", "planetary-computer")
    assert load_source("landsat-c2-l2").provider("usgs").collection == "landsat-c2l2-sr"


def test_unknown_or_missing_providers_are_named():
    with pytest.raises(ConfigError, match="no provider 'aws'") as err:
        load_source("sentinel-2-l2a").provider("aws", where="sources[0]")
    assert "earth-search, planetary-computer, cdse" in str(err.value)
    with pytest.raises(ConfigError, match="no catalogue of its own") as err:
        load_source("sentinel-1-grd").provider()
    assert "sentinel-1-rtc" in str(err.value)


# -------------------------------------------------------------------------- tables of one's own


def _page_example() -> str:
    page = (ROOT / "docs" / "how-to" / "add-a-source.md").read_text(encoding="utf-8")
    return re.search(r"```yaml\n(title: .*?)```", page, re.DOTALL)[1]


def test_the_example_of_the_page_is_a_valid_table(tmp_path):
    path = tmp_path / "ga-landsat.yaml"
    path.write_text(_page_example())
    table = load_source(str(path))
    assert table.key == str(path)
    assert list(table.provider().model_dump()) == ["catalogue", "collection", "sign"]
    assert set(table.roles()) >= {"B02", "B03", "B04", "B08", "B8A", "B11", "B12"}


@real
def test_the_example_of_the_page_reads_a_real_item(tmp_path):
    path = tmp_path / "ga-landsat.yaml"
    path.write_text(_page_example())
    table = load_source(str(path))
    item = _real("ga_ls8c_ard_3-1-0_088080_2020-05-25_final.stac-item.json")
    record = item_record(item, table, table.choose(None), API)
    assert record["why"] == "" and record["platform"] == "landsat-8"
    assert record["crs"] == "EPSG:32656" and record["cloud_pct"] == pytest.approx(42.421)
    red = record["assets"]["red"]
    assert red["href"].endswith("_final_band04.tif") and red["shape"] == [7841, 7781]
    assert (red["scale"], red["offset"], red["nodata"], red["resolution_m"]) == (1e-4, 0, -999, 30)


@real
def test_elevation_from_lidar_with_a_table_of_ones_own(tmp_path):
    path = tmp_path / "lidar.yaml"
    path.write_text(
        "title: lidar\nkind: dem\nstatic: true\ncollection: lidar_collection\nunit: m\n"
        "nodata: -9999\nbands:\n  height: {assets: [dem], resolution_m: 1, group: lidar_10}\n"
    )
    record = item_record(_real("lidar_dem.json"), load_source(str(path)), ["height"], API)
    assert record["datetime"] == "2012-01-01T00:00:00Z"  # only a range
    assert record["assets"]["height"]["href"] == "s3://example-bucket/lidar_id.tif"
    assert (record["crs"], record["assets"]["height"]["resolution_m"]) == ("EPSG:28355", 1)


def test_a_changed_table_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "own.yaml"
    path.write_text(_page_example())
    monkeypatch.chdir(tmp_path)
    assert load_source("own.yaml").scale == 1e-4
    path.write_text(_page_example().replace("scale: 0.0001", "scale: 0.5"))
    os.utime(path, ns=(1, 1))
    assert load_source("own.yaml").scale == 0.5


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("kind: optical", "kind: optic", "kind: Input should be"),
        ("nodata: -999", "no_data: -999", "nodata: Field required; no_data: Extra inputs"),
        ("group: ga_30", "group: ga", "pixel size that fits the tiles"),
        ("group: ga_30", "group: ga_25", "pixel size that fits the tiles"),
        ("scale: 0.0001", "scale: 0", "scale: Input should be greater than 0"),
        ("title: ", "title: [", "not valid"),
        ("codes: fmask", "codes: clouds", "codes: Input should be 'scl'"),
        ("  Fmask:", "  red:", "red is both a band and a layer"),
    ],
)
def test_mistakes_in_a_table_are_named_by_key(tmp_path, old, new, named):
    text = _page_example()
    if old not in text:
        text += "layers:\n  Fmask: {assets: [f], resolution_m: 30, codes: fmask}\n"
    path = tmp_path / "own.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match="the source table is not valid") as err:
        load_source(str(path))
    assert named in str(err.value) and str(path) in str(err.value)


def test_a_missing_or_empty_table_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_source(str(tmp_path / "none.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="not valid"):
        load_source(str(tmp_path / "empty.yaml"))


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(ConfigError, match="sentinel-2-l1c, sentinel-2-l2a") as err:
        load_source("sentinel2-l2a")
    assert "did you mean 'sentinel-2-l2a'" in str(err.value)


def test_choose_keeps_the_tables_order_and_refuses_unknown_bands():
    table = load_source("sentinel-2-l2a")
    assert table.choose(["B08", "B02"]) == ["B02", "B08"]
    with pytest.raises(ConfigError, match="no band B10"):
        table.choose(["B10"])


@pytest.mark.parametrize(
    ("properties", "declared", "offset"),
    [
        ({"s2:processing_baseline": "03.01"}, None, 0),
        ({"s2:processing_baseline": "04.00"}, None, -0.1),
        ({"s2:processing_baseline": "05.09"}, None, -0.1),
        ({"s2:processing_baseline": "05.09"}, 0.0, 0),
        ({"s2:processing_baseline": "02.14"}, -0.1, -0.1),
        # Earth Search: offset taken off the pixels, -0.1 still in raster:bands.
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, -0.1, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": False}, -0.1, -0.1),
        ({"datetime": "2022-01-24T23:00:00Z"}, None, 0),
        ({"datetime": "2022-01-25T01:00:00Z"}, None, -0.1),
        # Old scene, processed again under a new baseline.
        ({"datetime": "2018-05-01T10:00:00Z", "s2:processing_baseline": "05.00"}, None, -0.1),
    ],
)
def test_sentinel_2_offset_is_decided_per_item(properties, declared, offset):
    item = {"id": "x", "properties": {"datetime": "2023-01-01T00:00:00Z", **properties}}
    assert s2_offset(item, declared)[0] == offset


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("S2A_MSIL2A_20200714T115221_N0214_R123_T28QCH_20200714T191310", (2, 14)),
        ("S2A_MSIL2A_20230714T115221_N0509_R123_T28QCH_20230714T191310.SAFE", (5, 9)),
        ("GS2B_20190629T212529_012081_N02.12", (2, 12)),
        ("S2A_28QCH_20200714_0_L2A", None),
    ],
)
def test_baseline_is_read_from_product_names(name, baseline):
    assert item_baseline({"id": "x", "properties": {"s2:product_uri": name}}) == baseline


@real
def test_legacy_earth_search_item():
    """STAC 1.0.0-beta, proj:epsg, no raster extension, no sun, baseline only in a name."""
    item = _real("S2A_28QCH_20200714_0_L2A.json")
    table = load_source("sentinel-2-l2a")
    record = item_record(item, table, table.choose(None), API)
    assert record["crs"] == "EPSG:32628"
    assert list(record["assets"]) == [*table.bands, "SCL"]
    assert record["cloud_pct"] == 2.36
    assert record["offset_rule"] == "0: processing baseline 02.14"
    b8a = record["assets"]["B8A"]
    assert (b8a["scale"], b8a["offset"], b8a["nodata"]) == (1e-4, 0, 0)
    assert (b8a["resolution_m"], b8a["shape"], b8a["size"]) == (20, [5490, 5490], None)
    assert record["assets"]["SCL"]["scale"] == 1
    assert 60 < record["sun_elevation_deg"] < 90  # summer noon at 20 degrees north


@real
@pytest.mark.parametrize("ext", ["", "_raster_ext"])
def test_planetary_computer_item(ext):
    """Same scene with and without raster extension (which declares nodata but no scale)."""
    item = _real(f"S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531{ext}.json")
    record = item_record(item, load_source("sentinel-2-l2a"), ["B02", "B11"], API)
    assert record["sun_elevation_deg"] == pytest.approx(90 - 37.9128805424161)
    assert record["sun_azimuth_deg"] == pytest.approx(170.148039164397)
    assert record["assets"]["B11"]["offset"] == 0
    assert record["assets"]["B02"]["shape"] == [10980, 10980]
    assert record["datetime"] == "2019-06-29T21:25:29Z"


@real
def test_items_of_another_sensor_are_refused_with_their_assets():
    item = _real("LC08_L2SP_028030_20200114_20200824_02_T1_SR.json")
    for asset in item["assets"].values():
        asset["href"] = "https://example.org/x.tif"
    with pytest.raises(SceneError, match="none of the bands VV, VH") as err:
        item_record(item, load_source("sentinel-1-rtc"), ["VV", "VH"], API)
    assert "item LC08_L2SP_028030_20200114_20200824_02_T1_SR" in str(err.value)
    assert "assets here:" in str(err.value)


def test_stac_1_1_fields_and_cop_dem_address():
    asset = {
        "href": "s3://copernicus-dem-30m/a/a.tif", "proj:code": "EPSG:4326",
        "proj:transform": [0.0002777, 0, 12, 0, -0.0002777, 53], "nodata": -9999,
        "bands": [{"name": "z", "raster:scale": 0.5, "raster:offset": 3}],
    }  # fmt: skip
    item = {
        "id": "Copernicus_DSM_COG_10_N52_00_E012_00_DEM", "bbox": [12, 52, 13, 53],
        "properties": {"datetime": "2021-04-22T00:00:00Z"}, "assets": {"data": asset},
    }  # fmt: skip
    record = item_record(item, load_source("copernicus-dem"), ["elevation"], API)
    found = record["assets"]["elevation"]
    assert found["href"] == "https://copernicus-dem-30m.s3.amazonaws.com/a/a.tif"
    assert (found["scale"], found["offset"], found["nodata"]) == (0.5, 3, -9999)
    assert found["resolution_m"] == 30  # degrees are not metres: the table's
    assert record["sun_elevation_deg"] is None


def test_sun_position_of_the_published_example():
    """Reda and Andreas 2004 (NREL SPA), appendix 5: 2003-10-17 12:30:30 UTC-7 near Golden."""
    when = datetime(2003, 10, 17, 12, 30, 30, tzinfo=timezone(timedelta(hours=-7)))
    azimuth, elevation = sun_position(when, -105.1786, 39.742476)
    assert azimuth == pytest.approx(194.34024, abs=0.02)
    assert elevation == pytest.approx(39.872046, abs=0.02)  # topocentric, without refraction


def test_sun_is_south_in_the_north_and_north_in_the_south():
    noon = datetime(2020, 3, 20, 12, 7)
    assert sun_position(noon, 0, 50)[0] == pytest.approx(180, abs=1.5)
    assert sun_position(noon, 0, -50)[0] % 360 == pytest.approx(0, abs=1.5)
    assert sun_position(noon, 0, 50)[1] == pytest.approx(40, abs=0.3)
