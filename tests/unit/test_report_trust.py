from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from shapely.geometry import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fake_results import fake_campaign, fake_results
from support.fake_trust import add_trust
from terraloom.io import read_json, write_json
from terraloom.report import charts, measures
from terraloom.report.page import build_report
from terraloom.report.regional import regions
from terraloom.report.trust import applicability, coverage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = fake_results(tmp_path_factory.mktemp("results"))
    add_trust(root)
    return root


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    out = made / "report.html"
    build_report(made, fake_campaign(), out)
    return out.read_text(encoding="utf-8")


def test_the_page_says_how_often_sets_held_the_label(page: str) -> None:
    assert "<strong>89.4%</strong>" in page
    assert "2 of 5 blocks lie below what was asked for" in page
    assert "Water stands in every set" in page
    assert "Canopy height" in page
    assert "11.2 m wide on average" in page


def test_the_page_says_what_is_like_the_training_data(page: str) -> None:
    assert "<strong>88.2%</strong> of the map looks to the networks" in page
    assert "least in tile x001y000: 72%" in page


def test_regions_have_a_table_and_maps(page: str) -> None:
    assert 'id="regions"' in page
    assert "Between networks<br><small>sd of 8</small>" in page
    assert "Inside<br><small>applicability</small>" in page
    assert "district 3" in page
    assert "8 times too narrow" in page
    assert "share of each region" in page


def test_nothing_is_made_up_where_files_are_absent(made: Path, tmp_path: Path) -> None:
    record = read_json(made / "map" / "map.json")
    held = read_json(made / "model" / "held_out.json")
    assert coverage(tmp_path, record, held, "land-cover") is None
    assert coverage(made, record, {}, "land-cover") is None
    assert applicability(made, {}) is None
    assert regions(tmp_path, record["legend"]) is None


def test_a_class_without_labels_has_a_dash(made: Path) -> None:
    record = read_json(made / "map" / "map.json")
    found = coverage(made, record, read_json(made / "model" / "held_out.json"), "land-cover")
    assert found is not None
    assert math.isnan(found["rows"][-1][1].value)


def test_a_long_table_is_cut_and_says_so(made: Path, tmp_path: Path) -> None:
    raw = read_json(made / "map" / "regions.json")
    write_json(tmp_path / "map" / "regions.json", raw | {"rows": raw["rows"] * 20})
    found = regions(tmp_path, read_json(made / "map" / "map.json")["legend"])
    assert found is not None
    assert len(found["rows"]) == 400
    assert found["more"] == 30 * 20 - 400


def test_a_choropleth_scales_to_its_largest_value() -> None:
    shapes = [box(0, 0, 1, 1), box(1, 0, 2, 1)]
    picture, top = charts.choropleth(shapes, np.array([np.nan, 12.0]), "#2f6b3c", "a map")
    assert top == 12.0
    assert picture.width > 100
    assert charts.choropleth(shapes, np.full(2, np.nan), "#2f6b3c", "none")[1] == 1.0


def test_the_page_shows_how_often_tiles_were_seen(page: str) -> None:
    assert "7 tiles, one map per period" in page
    assert "x003y000" in page


def test_the_page_shows_what_the_map_adds_to_the_sample(page: str) -> None:
    assert "worth 1.3 times as many units, 524 in effect" in page
    assert "Canopy height, 400 units" in page
    assert "two classes swapped for each other" in page


def test_probabilities_have_scores_with_their_spread_over_folds(page: str) -> None:
    assert "Probabilities on 31\u202f000 held-out pixels (ECE in 10 bins)" in page
    assert "80.0% ± 6.0%" in page


def test_tables_are_left_out_where_nothing_was_measured() -> None:
    assert measures.assisted(None) is None
    assert measures.assisted({"assisted": {"why_not": "the map has no probabilities"}}) is None
    assert measures.values({"values": {"height": {"why_not": "3 of 9 units have no value"}}}) == []
    assert measures.disagreement({"report": None}) is None
    assert measures.probabilities({}) is None
