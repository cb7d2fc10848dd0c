from __future__ import annotations

import csv
import io

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from terraloom.grid import Tile
from terraloom.legend import IGNORE_INDEX
from terraloom.predict.tile_coverage import TileCover

BOX = GeoBox.from_bbox((0, 0, 40, 40), "EPSG:32633", resolution=10)


def test_a_row_per_tile_and_period() -> None:
    count = np.zeros((2, 4, 4), np.uint8)
    count[0, :2] = 3
    count[1] = 5
    cube = xr.Dataset(
        {"clear_count": (("period", "y", "x"), count)}, coords={"period": ["spring", "summer"]}
    )
    index = np.zeros((4, 4), np.uint8)
    index[0] = IGNORE_INDEX
    cover = TileCover()
    cover.add(Tile("x001y002", 1, 2, BOX), cube, index)
    cover.add(Tile("x000y000", 0, 0, BOX), xr.Dataset(), index)
    rows = list(csv.DictReader(io.StringIO(cover.csv())))
    assert [(r["tile"], r["period"]) for r in rows][:2] == [
        ("x001y002", "spring"), ("x001y002", "summer"),
    ]  # fmt: skip
    assert [r["clear_dates"] for r in rows] == ["1.5", "5.0", ""]
    assert [r["never_clear_pct"] for r in rows] == ["50.0", "0.0", ""]
    assert [r["least_clear_dates"] for r in rows] == ["0", "5", ""]
    assert {r["mapped_pct"] for r in rows} == {"75.0"}
