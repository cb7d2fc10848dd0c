from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
from pyproj import CRS
from shapely.geometry import GeometryCollection, MultiPolygon, Point, Polygon, box

from terraloom.acquire.records import item_time
from terraloom.aoi import campaign_grid, read_aoi, to_crs
from terraloom.config.load import parse_campaign
from terraloom.errors import AoiError, ConfigError
from terraloom.grid import LATTICE_M, CampaignGrid, row_areas_m2, window_of
from terraloom.io import geobox_of, write_raster


def grid_of(aoi: dict[str, Any], crs: str = "auto", **grid: Any) -> CampaignGrid:
    return campaign_grid(
        parse_campaign(
            {
                "name": "place",
                "title": "A place",
                "aoi": aoi,
                "grid": {"crs": crs} | grid,
                "sources": [{"source": "sentinel-2-l2a"}],
                "cube": {"periods": [{"name": "p", "start": "2022-01-01", "end": "2022-12-31"}]},
                "tasks": [
                    {
                        "name": "cover",
                        "kind": "segmentation",
                        "classes": "c.csv",
                        "labels": {"file": "l.gpkg", "column": "c"},
                    }
                ],
            }
        )
    )


def file_of(folder: Path, shapes: list[Any], crs: str | None = "EPSG:4326") -> dict[str, Any]:
    path = folder / "aoi.gpkg"
    gpd.GeoDataFrame(geometry=shapes, crs=crs).to_file(path, driver="GPKG", engine="pyogrio")
    return {"file": path.as_posix()}


def abut(grid: CampaignGrid) -> None:
    """Tiles cover the grid without a gap or an overlap, and lie on the lattice."""
    seen = np.zeros(grid.geobox.shape, np.uint8)
    for tile in grid.tiles():
        seen[window_of(tile.geobox, grid.geobox)] += 1
        b = tile.geobox.boundingbox
        assert b.left % LATTICE_M == 0 and b.top % LATTICE_M == 0
    assert seen.max() == 1
    assert seen.min() == 1 or grid.aoi.area < 0.999 * grid.geobox.extent.geom.area


# --- the CRS of the grid -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bbox", "code"),
    [
        ([13.1, 52.4, 13.2, 52.5], 32633),
        ([13.1, -33.5, 13.2, -33.4], 32733),
        ([11.9, 50.0, 12.05, 50.1], 32632),  # over the border of two zones: that of the middle
        ([-0.05, -0.1, -0.01, 0.05], 32730),  # over the equator: negative northings are fine
        ([179.8, -17.0, 180.0, -16.9], 32760),
        ([-180.0, -17.0, -179.9, -16.9], 32701),
    ],
)
def test_utm_zone_of_the_area(bbox: list[float], code: int) -> None:
    grid = grid_of({"bbox": bbox})
    assert CRS.from_user_input(grid.crs).to_epsg() == code
    abut(grid)


@pytest.mark.parametrize(
    "bbox", [[2.0, 50.0, 14.0, 50.02], [20.0, 85.0, 21.0, 85.02], [-60, -85.02, -59.0, -85.0]]
)
def test_wide_and_polar_areas_get_an_equal_area_grid(bbox: list[float], tmp_path: Path) -> None:
    grid = grid_of({"bbox": bbox}, tile_px=384)
    crs = CRS.from_user_input(grid.crs)
    assert crs.coordinate_operation and "Lambert Azimuthal Equal Area" in (
        crs.coordinate_operation.method_name
    )
    tiles = grid.tiles()
    first, last = tiles[0].geobox, tiles[-1].geobox
    for box_ in (first, last):  # nominal pixels are true ones everywhere
        assert row_areas_m2(box_) == pytest.approx(100, rel=1e-5)
    by_place = {(t.column, t.row): t.geobox for t in tiles}
    joined = [(g, by_place[c + 1, r]) for (c, r), g in by_place.items() if (c + 1, r) in by_place]
    assert joined
    for left, right in joined:
        assert left.boundingbox.right == right.boundingbox.left
        window_of(right, grid.geobox)
    # The grid comes back from a file as the same pixels in the same place.
    part = first[:48, :48]
    write_raster(tmp_path / "t.tif", np.ones(part.shape, np.uint8), part)
    back = geobox_of(tmp_path / "t.tif")
    assert back.affine == part.affine and CRS.from_user_input(str(back.crs)).equals(
        CRS.from_user_input(str(part.crs)), ignore_axis_order=True
    )


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:2263"])
def test_grid_in_degrees_or_feet_is_refused(crs: str) -> None:
    with pytest.raises(ConfigError, match=r"grid\.crs") as error:
        grid_of({"bbox": [-74.0, 40.7, -73.9, 40.8]}, crs)
    assert "auto" in error.value.fix


def test_grid_crs_that_cannot_hold_the_area() -> None:
    with pytest.raises(AoiError, match="cannot be projected"):  # the other side of the Earth
        grid_of({"bbox": [-120.0, -40.0, -119.9, -39.9]}, "ESRI:102035")


# --- what longitude and latitude cannot say ------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "crs"),
    [
        ([box(178.9, -17, 180.5, -16)], "EPSG:4326"),
        ([MultiPolygon([box(179.5, -17, 180, -16), box(-180, -17, -179.5, -16)])], "EPSG:4326"),
        ([box(800_000, 8_100_000, 960_000, 8_110_000)], "EPSG:32760"),
    ],
)
def test_across_the_180th_meridian_is_refused_with_the_remedy(
    shapes: list[Any], crs: str, tmp_path: Path
) -> None:
    with pytest.raises(AoiError, match="180th meridian") as error:
        grid_of(file_of(tmp_path, shapes, crs))
    assert "two campaigns" in error.value.fix and "aoi.gpkg" in error.value.where


def test_longitudes_of_0_to_360_are_turned_back(tmp_path: Path) -> None:
    turned = grid_of(file_of(tmp_path, [box(286.0, 40.6, 286.1, 40.7)]))
    assert turned.geobox == grid_of({"bbox": [-74.0, 40.6, -73.9, 40.7]}).geobox


@pytest.mark.parametrize(
    ("shapes", "crs"),
    [
        ([box(-60_000, -60_000, 60_000, 60_000)], "EPSG:3413"),
        ([box(0, 89.0, 30, 90)], "EPSG:4326"),
        ([box(-50_000, -50_000, 50_000, 50_000)], "EPSG:3031"),
    ],
)
def test_poles_are_refused(shapes: list[Any], crs: str, tmp_path: Path) -> None:
    with pytest.raises(AoiError, match="reaches a pole"):
        grid_of(file_of(tmp_path, shapes, crs))


# --- coordinates that cannot be meant ------------------------------------------------------------


def test_degrees_given_as_metres() -> None:
    with pytest.raises(AoiError, match="look like degrees") as error:
        grid_of({"bbox": [13.1, 52.4, 13.2, 52.5], "crs": "EPSG:32633"})
    assert "EPSG:4326" in error.value.fix


def test_latitude_before_longitude(tmp_path: Path) -> None:
    with pytest.raises(AoiError, match="latitudes 103") as error:
        grid_of(file_of(tmp_path, [box(20.0, 103.0, 20.1, 103.1)]))
    assert "exchange" in error.value.fix


def test_metres_in_a_file_that_says_degrees(tmp_path: Path) -> None:
    """GeoJSON has no place for a CRS, so projected coordinates in it pass for degrees."""
    path = tmp_path / "aoi.geojson"
    ring = [[420000, 5816160], [423840, 5816160], [423840, 5820000], [420000, 5816160]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    with pytest.raises(AoiError, match="latitudes 5"):
        grid_of({"file": path.as_posix()})


@pytest.mark.parametrize("bbox", [[14, 52, 13, 53], [13, 53, 14, 52], [13, 52, 13, 53]])
def test_bbox_in_wrong_order(bbox: list[float]) -> None:
    with pytest.raises(ConfigError, match="west < east"):
        grid_of({"bbox": bbox})


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:3035", "EPSG:25833", "EPSG:4258", "EPSG:32632"])
def test_area_files_of_any_crs_give_the_same_grid(crs: str, tmp_path: Path) -> None:
    home = box(420_030, 5_816_190, 423_810, 5_819_970)
    there = to_crs(home.segmentize(500), "EPSG:32633", crs)
    grid = grid_of(file_of(tmp_path, [there], crs), "EPSG:32633")
    assert grid.geobox.boundingbox.bbox == (420_000, 5_816_160, 423_840, 5_820_000)


def test_polygons_in_collections_and_with_heights_are_read(tmp_path: Path) -> None:
    tall = Polygon([(13, 52, 5.0), (13.1, 52, 5.0), (13.1, 52.1, 6.0), (13, 52.1, 7.0)])
    mixed = GeometryCollection([tall, Point(13, 52)])
    aoi, crs = read_aoi(file_of(tmp_path, [mixed])["file"], None, "EPSG:4326")
    assert not aoi.has_z and aoi.area == pytest.approx(0.01) and crs == "EPSG:4326"


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([Polygon()], "no polygon"),
        ([Point(13, 52)], "no polygon in it .*Point"),
        ([Polygon([(13, 52), (14, 53), (14, 52), (13, 53)])], "Self-intersection"),
        ([Polygon([(13, 52), (14, 53), (15, 54)])], "not valid|empty"),
    ],
)
def test_empty_and_invalid_polygons(shapes: list[Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(AoiError, match=text):
        grid_of(file_of(tmp_path, shapes))


# --- time zones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Auckland", "America/Los_Angeles"])
@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2022-05-01T00:30:00+02:00", "2022-04-30T22:30"),
        ("2022-04-30T23:30:00-05:00", "2022-05-01T04:30"),
        ("2022-05-01T10:00:00Z", "2022-05-01T10:00"),
        ("2022-05-01T10:00:00", "2022-05-01T10:00"),  # no zone: UTC, wherever the program runs
    ],
)
def test_item_times_are_utc_wherever_the_program_runs(
    text: str, utc: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        when = item_time({"id": "A", "properties": {"datetime": text}})
    finally:
        monkeypatch.undo()
        time.tzset()
    assert when.isoformat().startswith(utc) and when.utcoffset() is not None
    assert when.utcoffset().total_seconds() == 0  # type: ignore[union-attr]
