"""Settings by rule of thumb: what they look at, and that they grow with the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from terraloom.config.model import Model
from terraloom.errors import ModelError
from terraloom.models.heads import TaskSpec
from terraloom.train.preset import LabelFacts, facts_of, preset, preset_of

FEW = LabelFacts(chips=20, windows=40, pixels=3000, share=0.02, classes=5, rarest=0.02, dates=2)


def make_chips(dates: int = 2) -> xr.Dataset:
    y = np.full((4, 96, 96), 255, np.uint8)
    y[0, :10, :10], y[1, :4, :25] = 0, 2
    height = np.full(y.shape, np.nan, np.float32)
    height[0, 0, :50] = 3.0
    names = [f"2018-{i + 1:02}/{b}" for i in range(dates) for b in ("B03", "B04")]
    dims = ("n", "y_10", "x_10")
    x = (("n", "channel_s2_10", "y_10", "x_10"), np.zeros((4, 2 * dates, 96, 96), np.float32))
    return xr.Dataset(
        {"x_s2_10": x, "y_cover": (dims, y), "y_height": (dims, height),
         "fold": (dims, np.zeros(y.shape, np.uint8))},
        coords={"channel_s2_10": names},
    )  # fmt: skip


TASKS = (TaskSpec("cover", "segmentation", ("a", "b", "c")), TaskSpec("height", "regression"))


def test_counts_what_is_there() -> None:
    got = facts_of(make_chips(3), TASKS)
    assert got == LabelFacts(2, 4, 50, 240 / (2 * 96 * 96), 3, 0.5, 3)
    empty = make_chips()
    empty["y_height"].values[:] = np.nan
    with pytest.raises(ModelError, match="height"):
        facts_of(empty, TASKS)


def test_settings_are_valid_and_each_has_a_reason() -> None:
    for dates in (1, 9):
        for pixels, windows in ((10, 1), (10**5, 600), (10**8, 10**5)):
            for rarest, classes in ((1.0, 0), (0.01, 200)):
                f = LabelFacts(1, windows, pixels, 0.001, classes, rarest, dates)
                got = preset_of(f)
                assert got.settings.keys() == got.reasons.keys() <= Model.model_fields.keys()
                Model(**got.settings)
    assert preset(make_chips(), TASKS).settings["network"] == "fusion"


def test_more_labels_give_larger_networks_and_shorter_schedules() -> None:
    grow = [preset_of(replace(FEW, pixels=p, windows=p // 75 + 1)).settings
            for p in (10**3, 10**5, 10**6, 10**8)]  # fmt: skip
    assert [s["width"] for s in grow] == sorted(s["width"] for s in grow)
    assert [s["batch"] for s in grow] == sorted(s["batch"] for s in grow)
    assert [s["epochs"] for s in grow] == sorted((s["epochs"] for s in grow), reverse=True)
    assert grow[0]["width"] < grow[-1]["width"] and grow[0]["epochs"] > grow[-1]["epochs"]


def test_dates_and_points_choose_the_network_and_rare_classes_the_sampling() -> None:
    networks = [preset_of(replace(FEW, dates=d, share=s)).settings["network"]
                for d, s in ((2, 0.0001), (12, 0.0001), (12, 0.1))]  # fmt: skip
    assert networks == ["fusion", "ltae", "utae"]
    assert preset_of(FEW).settings["sampling"] == "class"
    assert preset_of(replace(FEW, rarest=0.2)).settings["sampling"] == "area"
