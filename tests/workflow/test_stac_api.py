"""The example campaign for Earth Search, run against a real STAC API on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import box, mapping

from support.stac_server import serve_stac
from terraloom.acquire import retry
from terraloom.acquire.assets import read_band, verify_item
from terraloom.acquire.lock import lock_items
from terraloom.aoi import campaign_grid, to_crs
from terraloom.config.load import load_campaign, parse_campaign
from terraloom.errors import SceneError
from terraloom.io import write_raster

EXAMPLE = Path(__file__).parents[2] / "config" / "campaigns" / "example-earth-search.yaml"
CRS = "EPSG:32633"
#: A piece of a tile around the example's AOI, on the 20 m lattice.
LEFT, TOP, SIZE_PX = 325_020, 5_825_040, 2048
KEYS = {"B02": "blue", "B05": "rededge1"}


def _geobox(res: int) -> GeoBox:
    n = SIZE_PX * 10 // res
    return GeoBox((n, n), Affine(res, 0, LEFT, 0, -res, TOP), CRS)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two bands and a classification, with noise: too large to come in one read."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(7)
    for band, res in (("B02", 10), ("B05", 20)):
        shape = _geobox(res).shape
        dn = rng.integers(1100, 9000, shape, dtype=np.uint16)
        write_raster(root / f"{band}.tif", dn, _geobox(res), nodata=0)
    scl = rng.integers(4, 7, _geobox(20).shape, dtype=np.uint8)
    write_raster(root / "SCL.tif", scl, _geobox(20), nodata=0)
    return root


def _item(item_id: str, when: str, cloud: float, *, applied: bool, baseline: str) -> dict:
    b = _geobox(10).boundingbox
    outline = to_crs(box(b.left, b.bottom, b.right, b.top), CRS, "EPSG:4326")
    raster = {"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}
    assets = {
        KEYS[band]: {
            "href": f"{{url}}/files/{band}.tif", "proj:shape": list(_geobox(res).shape),
            "proj:transform": list(_geobox(res).affine[:6]),
            "raster:bands": [{**raster, "spatial_resolution": res}],
        }
        for band, res in (("B02", 10), ("B05", 20))
    }  # fmt: skip
    assets["scl"] = {"href": "{url}/files/SCL.tif", "raster:bands": [{"nodata": 0}]}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": item_id, "links": [],
        "collection": "sentinel-2-l2a", "bbox": list(outline.bounds),
        "geometry": json.loads(json.dumps(mapping(outline))),
        "properties": {
            "datetime": f"{when}T10:20:30Z", "eo:cloud_cover": cloud, "proj:epsg": 32633,
            "s2:processing_baseline": baseline, "earthsearch:boa_offset_applied": applied,
            "view:sun_azimuth": 160.0, "view:sun_elevation": 50.0,
        },
        "assets": assets,
    }  # fmt: skip


def _items() -> list[dict]:
    return [
        _item("S2A_a", "2024-04-01", 5, applied=True, baseline="05.10"),
        _item("S2A_b", "2024-06-15", 10, applied=False, baseline="05.10"),
        _item("S2B_cloudy", "2024-07-01", 95, applied=True, baseline="05.10"),
        _item("S2B_c_old", "2024-09-03", 1, applied=True, baseline="05.10"),
        _item("S2B_c_new", "2024-09-03", 1, applied=True, baseline="05.11"),
        _item("S2B_winter", "2024-12-24", 0, applied=True, baseline="05.11"),
    ]


def _campaign(url: str):
    data = yaml.safe_load(EXAMPLE.read_text())
    data["sources"][0] |= {"catalogue": url, "bands": ["B02", "B05"]}
    return parse_campaign(data)


def test_the_example_validates_and_uses_the_sources_own_catalogue():
    campaign = load_campaign(EXAMPLE)
    assert EXAMPLE.read_text().startswith("# yaml-language-server: $schema=../schema.json\n")
    assert campaign.sources[0].source == "sentinel-2-l2a"
    assert campaign.sources[0].catalogue is None
    assert campaign_grid(campaign).crs == CRS


def test_search_lock_and_partial_reads(files):
    with serve_stac(_items(), files, page=2) as server:
        campaign = _campaign(server.stac)
        grid = campaign_grid(campaign)
        lock = lock_items(campaign, grid)

        assert len(server.searches) == 3  # five items in pages of two
        assert {s["datetime"] for s in server.searches} == {
            "2024-03-15T00:00:00Z/2024-10-31T23:59:59Z"
        }
        decisions = {i["id"]: (i["decision"], i["why"]) for i in lock["items"]}
        assert decisions == {
            "S2A_a": ("use", ""),
            "S2A_b": ("use", ""),
            "S2B_cloudy": ("drop", "cloud: 95 % is more than 60 %"),
            "S2B_c_old": ("drop", "older twin: of S2B_c_new"),
            "S2B_c_new": ("use", ""),
        }
        taken_off, still_on = lock["items"][0], lock["items"][1]
        assert taken_off["assets"]["B02"]["offset"] == 0
        assert still_on["assets"]["B02"]["offset"] == -0.1
        assert taken_off["crs"] == CRS
        assert list(taken_off["assets"]) == ["B02", "B05", "SCL"]

        window = GeoBox((96, 96), Affine(10, 0, LEFT + 6000, 0, -10, TOP - 9000), CRS)
        before = len(server.requests)
        a, b = read_band(taken_off, "B02", window), read_band(still_on, "B02", window)
        np.testing.assert_allclose(a - b, 0.1, atol=1e-6)
        assert 0.11 <= a.min() < a.max() < 0.9
        scl = read_band(taken_off, "SCL", window)
        assert set(np.unique(scl)) <= {4, 5, 6}

        asked = server.requests[before:]
        assert {status for method, _, status in asked if method == "GET"} == {206}
        assert server.bytes_sent["/files/B02.tif"] < 0.6 * (files / "B02.tif").stat().st_size
        verify_item(taken_off)


def test_a_busy_server_is_asked_again(files, monkeypatch):
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    with serve_stac(_items(), files, page=100) as server:
        server.fail_next = 2
        campaign = _campaign(server.stac)
        assert len(lock_items(campaign, campaign_grid(campaign))["items"]) == 5
        assert server.count(503) == 2

        server.fail_next = 100
        monkeypatch.setattr(retry, "RETRIES", 1)
        with pytest.raises(SceneError, match="cannot be reached"):
            lock_items(campaign, campaign_grid(campaign))
        assert server.count(503) == 4


def test_missing_file_and_local_address_of_a_remote_item(files):
    items = _items()[:2]
    items[0]["assets"]["blue"]["href"] = "{url}/files/gone.tif"
    items[1]["assets"]["blue"]["href"] = "file:///etc/passwd"
    with serve_stac(items, files) as server:
        campaign = _campaign(server.stac)
        lock = lock_items(campaign, campaign_grid(campaign))
        assert lock["items"][1]["decision"] == "drop"
        assert "refused" in lock["items"][1]["why"]
        with pytest.raises(SceneError, match=r"item S2A_a, asset B02 .*gone\.tif"):
            verify_item(lock["items"][0])


def test_nothing_in_the_area_is_one_clear_error(files):
    with serve_stac([], files) as server:
        campaign = _campaign(server.stac)
        with pytest.raises(SceneError, match="no item found") as err:
            lock_items(campaign, campaign_grid(campaign))
        assert "2024-03-15 to 2024-10-31" in str(err.value)
