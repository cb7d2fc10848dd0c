"""From campaign keys to a drawn sample and to areas, with every design."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest

from support import drawn
from terraloom.assess.areas import PixelAreas
from terraloom.assess.design import SampleDesign
from terraloom.assess.run import NOT_AN_ESTIMATE, estimate_areas
from terraloom.assess.sampling import DESIGN, POINTS, draw_sample
from terraloom.config.campaign import Campaign
from terraloom.config.sample import Sample
from terraloom.errors import ConfigError, DesignError
from terraloom.io import read_json, write_json, write_raster

NAMES = dict(zip((1, 2, 4), drawn.NAMES, strict=True))
DESIGNS: dict[str, dict[str, Any]] = {
    "stratified": {"size": 300},
    "simple": {"design": "simple", "size": 300},
    "systematic": {"design": "systematic", "size": 300},
    "cluster": {"design": "cluster", "size": 240, "cluster": {"block_m": 80, "per_block": 3}},
}


def _truth() -> np.ndarray:
    """What is really there: a fifth of the trees are open land."""
    truth = drawn.codes()
    truth[(truth == 2) & (np.arange(144) % 5 == 0)] = 4
    return truth


def _map_json(legend: dict[int, str]) -> None:
    entries = [{"code": c, "name": n, "map_area_ha": 1.0} for c, n in legend.items()]
    write_json("results/map/map.json", {"valid_pct": 100.0, "legend": entries})


def _answer(path: str, wrong: int = 0) -> Path:
    points = gpd.read_file(POINTS)
    found = _truth()[points["row"], points["col"]]
    table = points[["id"]].assign(**{"class": [NAMES[c] for c in found]})
    table["sample"] = read_json(DESIGN)["digest"]
    table.loc[: wrong - 1, "class"] = "lava"
    table.to_csv(path, index=False)
    return Path(path)


def _table(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _map_json(NAMES)
    return tmp_path


def _given(keys: dict[str, Any], **more: Any) -> Campaign:
    plain = {} if keys.get("design", "stratified") == "stratified" else {"allocation": "rare"}
    return drawn.campaign(**(plain | keys | more))


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_leads_to_areas(folder: Path, name: str) -> None:
    keys = DESIGNS[name]
    campaign = drawn.write_run(**keys)
    estimate_areas(campaign)
    assert {r["status"] for r in _table("results/map/areas.csv")} == {NOT_AN_ESTIMATE}
    waiting = read_json("results/map/accuracy.json")
    assert waiting["status"] == NOT_AN_ESTIMATE
    assert waiting["sample"]["digest"] == read_json(DESIGN)["digest"]
    _answer("answers.csv")
    estimate_areas(_given(keys, answers="answers.csv"))
    area = PixelAreas(drawn.GEOBOX).window(slice(0, 96), slice(0, 144)) / 1e4
    truth, mapped = _truth(), drawn.codes()
    for row in _table("results/map/areas.csv"):
        true = area[truth == int(row["code"])].sum()
        value, se = float(row["area_ha"]), float(row["se_ha"])
        assert abs(value - true) < 4 * se + 1e-3, row
        assert float(row["low_ha"]) <= value <= float(row["high_ha"])
    record = read_json("results/map/accuracy.json")
    true_oa = area[truth == mapped].sum() / area.sum()
    assert abs(record["oa"]["value"] - true_oa) < 4 * record["oa"]["se"]
    assert record["sample"]["interpreters"] == {"interpreter": len(gpd.read_file(POINTS))}
    assert record["sample"]["decided_by"] == {"single": len(gpd.read_file(POINTS))}
    first = Path("results/map/accuracy.json").read_bytes(), POINTS.read_bytes()
    draw_sample(campaign)
    estimate_areas(_given(keys, answers="answers.csv"))
    assert first == (Path("results/map/accuracy.json").read_bytes(), POINTS.read_bytes())


def test_a_target_gives_size_and_table(folder: Path) -> None:
    ua = {drawn.NAMES[0]: 0.98, drawn.NAMES[1]: 0.7, drawn.NAMES[2]: 0.7}
    campaign = drawn.write_run()
    sample = Sample(target_se=0.02, expected_ua=ua, min_per_stratum=8)
    draw_sample(campaign.model_copy(update={"sample": sample}))
    record = read_json(DESIGN)
    assert record["planned"]["anticipated_se"] == pytest.approx(0.02, rel=0.01)
    table = _table("results/map/allocation.csv")
    assert [r["name"] for r in table] == [*drawn.NAMES, "anticipated standard error"]
    assert [r["expected_ua"] for r in table] == ["0.98", "0.7", "0.7", ""]
    assert sum(int(r["drawn"]) for r in table[:-1]) == record["n_units"]
    assert float(table[-1]["neyman"]) < float(table[-1]["drawn"]) <= 0.02
    unknown = sample.model_copy(update={"expected_ua": {"lava": 0.5}})
    with pytest.raises(DesignError, match="lava"):
        draw_sample(campaign.model_copy(update={"sample": unknown}))


def test_bad_answers_leave_the_old_areas_alone(folder: Path) -> None:
    drawn.write_run()
    estimate_areas(drawn.campaign())
    before = Path("results/map/areas.csv").read_bytes()
    _answer("bad.csv", wrong=3)
    with pytest.raises(DesignError, match=r"3 fault\(s\)"):
        estimate_areas(drawn.campaign(answers="bad.csv"))
    assert Path("results/map/areas.csv").read_bytes() == before


def test_people_who_differ_are_compared_in_the_record(folder: Path) -> None:
    drawn.write_run(size=60)
    _answer("ada.csv")
    text = Path("ada.csv").read_text(encoding="utf-8").splitlines()
    rows = [f"{line},{who}" for line, who in zip(text, ["interpreter", *["bob"] * 60], strict=True)]
    at = next(i for i, r in enumerate(rows) if ",water," in r)
    rows[at] = rows[at].replace(",water,", ",open land,")
    Path("bob.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    both = ["ada.csv", "bob.csv"]
    with pytest.raises(DesignError, match=r"1 fault\(s\)"):
        estimate_areas(drawn.campaign(size=60, answers=both))
    estimate_areas(drawn.campaign(size=60, answers=both, primary="interpreter"))
    record = read_json("results/map/accuracy.json")
    assert record["sample"]["decided_by"] == {"agreement": 59, "primary": 1}
    (pair,) = record["interpreters"]["pairs"]
    assert (pair["first"], pair["second"]) == ("bob", "interpreter")
    assert (pair["units"], pair["agree"]) == (60, 59)
    assert record["interpreters"]["spread_ha"]["1"] > 0
    settled = record["interpreters"]["areas"]["settled"]["area_ha"]
    assert settled == record["interpreters"]["areas"]["interpreter"]["area_ha"]


def test_answers_serve_a_newer_map_when_the_sample_is_kept(folder: Path) -> None:
    drawn.write_run(size=120)
    Path("kept").mkdir()
    for file in (POINTS, DESIGN):
        (Path("kept") / file.name).write_bytes(file.read_bytes())
    _answer("answers.csv")
    newer = drawn.codes()
    newer[:, 70:90] = 2
    write_raster("results/map/class_map.tif", newer, drawn.GEOBOX, nodata=0)
    with pytest.raises(DesignError, match="it is newer"):
        estimate_areas(drawn.campaign(size=120, answers="answers.csv"))
    draw_sample(drawn.campaign(size=120))
    with pytest.raises(DesignError, match=r"sample\.drawn"):
        estimate_areas(drawn.campaign(size=120, answers="answers.csv"))
    keep = drawn.campaign(drawn="kept", answers="answers.csv")
    draw_sample(keep)
    estimate_areas(keep)
    design = SampleDesign.from_dict(read_json(DESIGN))
    old = SampleDesign.from_dict(read_json("kept/design.json"))
    assert (design.digest, design.strata) == (old.digest, old.strata)
    assert design.map_digest != old.map_digest
    points = gpd.read_file(POINTS)
    assert (points["map_code"] == newer[points["row"], points["col"]]).all()
    record = read_json("results/map/accuracy.json")
    share = float((newer == _truth()).mean())
    assert abs(record["oa"]["value"] - share) < 4 * record["oa"]["se"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_se": 0.02}, "either size or target_se"),
        ({"design": "simple", "strata": "s.tif"}, "strata belong to"),
        ({"cluster": {"block_m": 100}}, "`cluster` belongs to"),
        ({"design": "systematic", "overhead": 1.2}, "a reserve needs"),
        ({"expected_ua": {"water": 1.5}}, "between 0 and 1"),
        ({"answers": "truth"}, "only a simulated region"),
    ],
)
def test_keys_that_do_not_fit_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drawn.campaign(**keys)
