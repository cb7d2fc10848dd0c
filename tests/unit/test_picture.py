"""The picture of the map: any sensor, one stretch for all tiles."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

from terraloom.errors import StateError
from terraloom.predict.picture import paint, plan_picture

RGB = {"SR_B2": "B02", "SR_B3": "B03", "SR_B4": "B04"}
PERIODS = ["early", "late"]


def cube(
    groups: dict[str, tuple[list[str], dict[str, Any], np.ndarray]], over: str = "period"
) -> xr.Dataset:
    """A cube of groups: bands, attributes and values, (T, B, h, w), or (B, h, w) if static."""
    data: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for g, (bands, attrs, values) in groups.items():
        res = g.rsplit("_", 1)[1]
        time = over if over == "period" else f"{over}_{g}"
        dims = (f"band_{g}", f"y_{res}", f"x_{res}")
        data[g] = ((time, *dims) if values.ndim == 4 else dims, values.astype(np.float32), attrs)
        coords[f"band_{g}"] = bands
        if values.ndim == 4:
            coords[time] = (
                PERIODS if over == "period"
                else np.array(["2023-05-01", "2023-06-02"], "datetime64[ns]")
            )  # fmt: skip
    return xr.Dataset(data, coords=coords)


def optical(roles: dict[str, str] = RGB, unit: str = "reflectance") -> dict[str, str]:
    return {"kind": "optical", "unit": unit, "roles": json.dumps(roles)}


@pytest.mark.parametrize("over", ["period", "time"])
def test_natural_colours_of_landsat_repeat_its_pixels(over: str) -> None:
    values = np.full((2, 4, 4, 4), np.nan)
    values[:, 0], values[:, 1], values[:, 2], values[:, 3] = 0.05, 0.10, 0.20, 0.4
    values[1, :, 0, 0] = 0.30  # the later value wins,
    values[1, :, 1, 1] = np.nan  # a gap shows the earlier one,
    values[:, :, 2, 2] = np.nan  # and no value at all is 0
    bands = ["SR_B2", "SR_B3", "SR_B4", "SR_B5"]
    store = cube({"l8_30": (bands, optical(), values)}, over)
    picture = plan_picture([store])
    assert (picture.kind, picture.bands) == ("natural", ("SR_B4", "SR_B3", "SR_B2"))
    got = paint(picture, store, (12, 12))
    assert got.shape == (3, 12, 12) and got.dtype == np.uint8
    for block in ((0, 0), (1, 1), (2, 2), (3, 3)):
        part = got[:, 3 * block[0] : 3 * block[0] + 3, 3 * block[1] : 3 * block[1] + 3]
        assert (part == part[:, :1, :1]).all()
    assert (got[:, 0, 0] == 255).all()
    want = [int(1 + 254 * ((v - 0.02) / 0.28) ** 0.6) for v in (0.20, 0.10, 0.05)]
    assert np.abs(got[:, 4, 4].astype(int) - want).max() <= 1
    assert (got[:, 7, 7] == 0).all()


def test_the_finest_group_with_colours_is_shown() -> None:
    x = np.full((2, 3, 6, 6), 0.1)
    coarse = (list(RGB), optical(), x[..., :2, :2])
    fine = (["B02", "B03", "B04"], optical({b: b for b in ("B02", "B03", "B04")}), x)
    assert plan_picture([cube({"l8_30": coarse, "s2_10": fine})]).group == "s2_10"
    no_blue = (["B03", "B04"], optical({"B03": "B03", "B04": "B04"}), x[:, :2])
    picture = plan_picture([cube({"l8_30": coarse, "s2_10": no_blue})])
    assert (picture.group, picture.kind) == ("l8_30", "natural")


def test_stored_numbers_without_unit_of_reflectance_are_stretched() -> None:
    rng = np.random.default_rng(0)
    dn = rng.uniform(5000, 9000, (2, 3, 50, 50))
    store = cube({"own_10": (list(RGB), optical(unit="1"), dn)})
    picture = plan_picture([store])
    got = paint(picture, store, (50, 50))
    assert picture.kind == "natural" and 110 < got.mean() < 145
    assert 5000 < picture.low[0] < 5200 and 8800 < picture.high[0] < 9000


@pytest.mark.parametrize("unit", ["power", "dB"])
def test_radar_is_shown_in_false_colours_of_decibels(unit: str) -> None:
    rng = np.random.default_rng(1)
    db = rng.normal(0, 2, (2, 2, 60, 60)) + np.array([-10.0, -17.0])[:, None, None]
    values = db if unit == "dB" else 10 ** (db / 10)
    attrs = {"kind": "sar", "unit": unit}
    height = (["DEM"], {"kind": "dem", "unit": "m"}, np.zeros((1, 60, 60)))
    store = cube({"s1_10": (["VV", "VH"], attrs, values), "dem_10": height})
    picture = plan_picture([store])
    assert (picture.kind, picture.bands) == ("false-colour", ("VV", "VH", "VV - VH"))
    last = db[1]
    shown = np.stack([last[0], last[1], last[0] - last[1]])
    low, high = np.percentile(shown.reshape(3, -1), (2, 98), axis=1)
    assert picture.low == pytest.approx(low, abs=0.15)
    assert picture.high == pytest.approx(high, abs=0.15)
    got = paint(picture, store, (60, 60))
    middle = (got[0] > 1) & (got[0] < 255)
    assert np.corrcoef(got[0][middle], last[0][middle])[0, 1] > 0.999
    assert got.min() >= 1, "no value is lost"


def test_a_polarimetric_matrix_is_shown_in_pauli_colours() -> None:
    bands = ["T11", "T12_re", "T12_im", "T22", "T33"]
    x = np.random.default_rng(2).gamma(2, 0.1, (2, 5, 30, 30))
    picture = plan_picture([cube({"polsar_10": (bands, {"kind": "polsar", "unit": "power"}, x)})])
    assert picture.bands == ("T22", "T33", "T11") and picture.decibel


def test_without_colours_the_first_band_is_grey_and_elevation_comes_last() -> None:
    x = np.random.default_rng(3).uniform(0, 1, (2, 1, 2, 2))
    height = (["DEM"], {"kind": "dem", "unit": "m"}, np.arange(2304.0).reshape(1, 48, 48))
    index = (["NDVI"], {"kind": "index", "unit": "1"}, x)
    both = cube({"dem_10": height, "modis_240": index})
    picture = plan_picture([both])
    assert (picture.group, picture.kind, picture.bands) == ("modis_240", "grey", ("NDVI",) * 3)
    got = paint(picture, both, (48, 48))
    assert (got[0] == got[1]).all() and len(np.unique(got)) <= 4
    assert plan_picture([cube({"dem_10": height})]).group == "dem_10"


def test_all_tiles_share_one_stretch_and_empty_ones_do_not_matter() -> None:
    def tile(level: float) -> xr.Dataset:
        x = np.random.default_rng(4).normal(level, 1, (1, 40, 40))
        return cube({"dem_10": (["DEM"], {"kind": "dem"}, x)})

    dark, bright, empty = tile(100), tile(200), tile(np.nan)
    picture = plan_picture([dark, bright, empty])
    assert picture.low[0] < 100 and picture.high[0] > 200
    levels = [paint(picture, t, (40, 40)) for t in (dark, bright, empty)]
    assert levels[0].max() < 20 and levels[1].min() > 235 and not levels[2].any()
    nothing = plan_picture([empty])
    assert not paint(nothing, empty, (40, 40)).any()


def test_no_cube_is_said() -> None:
    with pytest.raises(StateError, match="no cube"):
        plan_picture([])


def test_the_record_is_plain() -> None:
    x = np.full((2, 3, 6, 6), 0.1)
    record = plan_picture([cube({"l8_30": (list(RGB), optical(), x)})]).record()
    assert json.loads(json.dumps(record)) == record
    assert record["bands"] == ["SR_B4", "SR_B3", "SR_B2"]
