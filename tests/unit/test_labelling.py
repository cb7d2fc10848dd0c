"""The labelling page without a browser: what is in it, what is not, and its images."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import drawn
from terraloom.assess.sampling import DESIGN, POINTS
from terraloom.config.campaign import Campaign
from terraloom.errors import DesignError
from terraloom.io import read_json, write_raster
from terraloom.predict.picture import paint, plan_picture
from terraloom.report.labelling import PAGE, write_labelling_page
from terraloom.report.views import look_around, pack


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Campaign:
    monkeypatch.chdir(tmp_path)
    return drawn.write_run(overhead=1.25)


def _data() -> dict[str, Any]:
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_is_alone_escaped_and_blind(run: Campaign) -> None:
    write_labelling_page(run, drawn.grid())
    text, data = PAGE.read_text(encoding="utf-8"), _data()
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text
    assert "<i>map</i>" not in text and "A small &lt;i&gt;map&lt;/i&gt;" in text
    assert "<b>& shrubs" not in text and data["classes"][1]["name"] == drawn.NAMES[1]
    assert data["sample"] == read_json(DESIGN)["digest"]
    assert not any("map" in p for p in data["points"])
    assert len(data["points"]) == 24 + 6 and sum(p["reserve"] for p in data["points"]) == 6
    # Groups are strata under other numbers: as many, in the order in which units come.
    assert data["points"][0]["group"] == 0
    assert {p["group"] for p in data["points"]} == {0, 1, 2}
    run = drawn.campaign(overhead=1.25, page={"show_map": True})
    write_labelling_page(run, drawn.grid())
    assert {p["map"] for p in _data()["points"]} == set(drawn.NAMES)


def test_images_show_the_pixels_of_all_tiles(run: Campaign) -> None:
    grid, side = drawn.grid(), 32
    rows, cols = np.array([40, 70, 2]), np.array([95, 95, 140])
    views = look_around(
        rows, cols, grid, Path("work/cube"), Path("results/map/image.tif"), side=side, dates=4
    )
    store_like = plan_picture([_whole()])
    for i, (r, c) in enumerate(zip(rows, cols, strict=True)):
        names = [(v.when, v.colours) for v in views.views[i]]
        periods = ["summer"] if i == 1 else ["spring", "summer"]  # no value in the gap
        colours = ["natural colours", "false colours: B08, B04, B03"]
        assert names == [(p, k) for k in colours for p in periods] + [("", "surroundings")]
        assert views.strips[i].shape == (side, side * len(names), 3)
        k = periods.index("summer")
        whole = np.pad(
            paint(store_like, _whole(1), (96, 144)), ((0, 0), (side, side), (side, side))
        )
        want = whole[:, r + side // 2 : r + 3 * side // 2, c + side // 2 : c + 3 * side // 2]
        got = np.moveaxis(views.strips[i][:, k * side : (k + 1) * side], -1, 0)
        assert (got == want).all()
    # Vegetation is bright in the false colours, water dark.
    red = views.strips[0][side // 2, 2 * side + side // 2, 0]
    assert red > 150 if drawn.codes()[40, 95] != 1 else red < 60
    one = look_around(rows, cols, grid, Path("work/cube"), None, side=side, dates=1)
    assert [len(v) for v in one.views] == [2, 2, 2]


def _whole(step: int | None = None) -> Any:
    import xarray as xr

    x = drawn.reflectance()
    attrs = {"kind": "optical", "unit": "reflectance"}
    x = x if step is None else x[step : step + 1]
    dims = ("period", "band_s2_10", "y_10", "x_10")
    return xr.Dataset({"s2_10": (dims, x, attrs)}, coords={"band_s2_10": drawn.BANDS})


def test_images_are_packed_to_the_limit() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (64, 256, 3)).astype(np.uint8)
    fine, best = pack([noise] * 3, 1e9)
    coarse, less = pack([noise] * 3, 0.75 * sum(map(len, fine)))
    assert best == 90 and less < 90 and sum(map(len, coarse)) <= 0.75 * sum(map(len, fine))
    image = Image.open(io.BytesIO(base64.b64decode(fine[0].split(",")[1])))
    assert image.size == (256, 64)
    flat = np.zeros((16, 32, 3), np.uint8)
    flat[:, 16:] = (250, 10, 200)
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(pack([flat], 1e6)[0][0][23:]))))
    assert np.abs(back.astype(int) - flat).max() < 6, "chips bleed into each other"


def test_too_large_a_page_is_refused(run: Campaign) -> None:
    del run
    small = drawn.campaign(overhead=1.25, page={"max_mb": 0.05})
    with pytest.raises(DesignError, match=r"sample\.page\.max_mb"):
        write_labelling_page(small, drawn.grid())
    assert not PAGE.exists()


def test_a_page_for_a_newer_map_or_an_edited_sample_is_refused(run: Campaign) -> None:
    write_raster("results/map/class_map.tif", drawn.codes()[::-1], drawn.GEOBOX, nodata=0)
    with pytest.raises(DesignError, match="it is newer"):
        write_labelling_page(run, drawn.grid())
    import geopandas as gpd

    points = gpd.read_file(POINTS)
    points.loc[0, "stratum"] += 1
    points.to_file(POINTS)
    with pytest.raises(DesignError, match="stratum is"):
        write_labelling_page(run, drawn.grid())
