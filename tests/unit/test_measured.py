"""Measured values in answer files: read, checked, settled, and used to judge a map of values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from support import drawn
from terraloom.assess.answers import CONSENSUS, read_answers
from terraloom.assess.design import SampleDesign
from terraloom.assess.kept import read_points
from terraloom.assess.measured import settle_values
from terraloom.assess.run import _estimate
from terraloom.assess.sampling import DESIGN, POINTS
from terraloom.config.campaign import Campaign
from terraloom.errors import DesignError
from terraloom.io import read_json, write_raster
from terraloom.legend import read_legend

CODES = dict(zip((1, 2, 4), drawn.NAMES, strict=True))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Campaign:
    """A run with a drawn sample, and a map of heights that is 1.5 m too high."""
    monkeypatch.chdir(tmp_path)
    made = drawn.write_run(height=True, answers="answers.csv")
    write_raster("results/map/tree_height.tif", truth()[None] + np.float32(1.5), drawn.GEOBOX,
                 nodata=-9999)  # fmt: skip
    return made


def truth() -> np.ndarray:
    rows, cols = np.mgrid[:96, :144]
    return (12 + 6 * np.sin(rows / 9) * np.cos(cols / 14)).astype(np.float32)


def answers() -> pd.DataFrame:
    points = read_points(POINTS)
    points = points[points["reserve"] == 0]
    with rasterio.open("results/map/tree_height.tif") as src:
        xy = np.column_stack([points.geometry.x, points.geometry.y])
        values = [v[0] - 1.5 for v in src.sample(xy, indexes=1)]
    return pd.DataFrame({
        "id": points["id"], "class": [CODES[c] for c in points["map_code"]],
        "interpreter": "ada", "value_tree_height": [f"{v:.4f}" for v in values],
    })  # fmt: skip


def read(made: Campaign, *tables: pd.DataFrame) -> pd.DataFrame:
    files = [f"a{n}.csv" for n in range(len(tables))]
    for file, table in zip(files, tables, strict=True):
        table.to_csv(file, index=False)
    design = SampleDesign.from_dict(read_json(DESIGN))
    return read_answers(files, design, read_points(POINTS), read_legend("classes.csv"), made.tasks)


def test_values_from_answers_judge_the_map(run: Campaign) -> None:
    table = answers()
    table.loc[[3], "value_tree_height"] = ""
    table.to_csv("answers.csv", index=False)
    report, answered = _estimate(run, read_legend("classes.csv"))
    assert report.overall.value == 1
    block = answered.blocks["values"]["tree_height"]
    assert (block["n"], block["left_out"], block["unit"]) == (23, 1, "m")
    assert block["bias"]["value"] == pytest.approx(1.5, abs=1e-3)
    assert block["rmse"]["value"] == pytest.approx(1.5, abs=1e-3) and block["r2"]["value"] < 1
    table.loc[:3, "value_tree_height"] = ""
    table.to_csv("answers.csv", index=False)
    _, answered = _estimate(run, read_legend("classes.csv"))
    assert "4 of 24 units have no value" in answered.blocks["values"]["tree_height"]["why_not"]
    table.drop(columns="value_tree_height").to_csv("answers.csv", index=False)
    assert "values" not in _estimate(run, read_legend("classes.csv"))[1].blocks


def test_values_may_come_in_a_file_of_their_own(run: Campaign) -> None:
    """The mean of all who measured a unit; what was agreed on goes before."""
    one = answers()
    alone = one[["id"]].assign(interpreter="crew", value_tree_height="10")
    agreed = one[["id"]][:1].assign(interpreter=CONSENSUS, value_tree_height="7.5")
    table = read(run, one.drop(columns="value_tree_height"), alone,
                 one[["id"]].assign(interpreter="bob", value_tree_height="13"), agreed)  # fmt: skip
    found = settle_values(table, run.tasks[1], CONSENSUS)
    first, *rest = one["id"]
    assert found[first] == 7.5 and all(found[i] == 11.5 for i in rest)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [("value_tree_height", "tall", "'tall'; a number from 0 to 50"),
     ("value_tree_height", "51", "'51'; a number from 0 to 50"),
     ("value_tree_height", "nan", "'nan'; a number"),
     ("value_height", "12", "value_height is of no task; columns of values: value_tree_height")],
)  # fmt: skip
def test_values_that_cannot_be_are_named(run: Campaign, column: str, value: str, says: str) -> None:
    table = answers().assign(**{column: ""})
    table.loc[2, column] = value
    with pytest.raises(DesignError, match=says):
        read(run, table)


def test_one_person_has_one_value_per_unit(run: Campaign) -> None:
    with pytest.raises(DesignError, match=r"ada says 1[0-9.]* and 3"):
        read(run, answers()[-1:], answers()[-1:].assign(value_tree_height="3"))
