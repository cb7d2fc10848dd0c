"""Answers to a sample: bad files are refused point by point, people who differ are settled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from terraloom.assess.answers import CANNOT_TELL, read_answers, settle
from terraloom.assess.design import DrawnSample, SampleDesign
from terraloom.assess.draw import stratified_sample, survey_map
from terraloom.assess.kept import kept_sample, require_unedited
from terraloom.assess.samples import SampleKind
from terraloom.assess.sampling import write_sample
from terraloom.config.sample import Sample
from terraloom.errors import DesignError
from terraloom.io import write_raster
from terraloom.legend import Legend

LEGEND = Legend((1, 2), ("water", "tree cover"), ("#0000ff", "#00ff00"))
NAMES = dict(zip(LEGEND.codes, LEGEND.names, strict=True))
BOX = GeoBox((40, 50), Affine(10, 0, 600_000, 0, -10, 5_800_000), "EPSG:32633")


def _codes() -> np.ndarray:
    codes = np.ones((40, 50), np.uint8)
    codes[:, 30:] = 2
    return codes


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DrawnSample:
    """A run folder with a map and its sample of 20 units and 4 in reserve."""
    monkeypatch.chdir(tmp_path)
    write_raster("results/map/class_map.tif", _codes(), BOX, nodata=0)
    domain = survey_map(Path("results/map/class_map.tif"), classes=LEGEND.codes)
    drawn = stratified_sample(
        domain, 20, seed=1, min_per_stratum=10, overhead=1.2, allocation="equal"
    )
    write_sample(drawn)
    return drawn


def _rows(drawn: DrawnSample, who: str = "ada") -> pd.DataFrame:
    points = drawn.points[drawn.points["reserve"] == 0]
    there = points.to_crs("EPSG:4326").geometry
    return pd.DataFrame(
        {
            "id": points["id"], "class": [NAMES[c] for c in points["map_code"]],
            "interpreter": who, "confidence": "high", "date": "2026-05-01", "comment": "",
            "lon": there.x.round(7), "lat": there.y.round(7), "sample": drawn.design.digest,
        }
    )  # fmt: skip


def _read(drawn: DrawnSample, *tables: pd.DataFrame) -> pd.DataFrame:
    files = []
    for n, table in enumerate(tables):
        table.to_csv(f"answers-{n}.csv", index=False)
        files.append(f"answers-{n}.csv")
    return read_answers(files, drawn.design, drawn.points, LEGEND)


def test_answers_from_csv_and_geojson_are_the_same(run: DrawnSample) -> None:
    rows = _rows(run)
    rows.loc[3, "comment"] = 'a "quoted", comment'
    table = _read(run, rows)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [r["lon"], r["lat"]]},
            "properties": {k: v for k, v in r.items() if k not in ("lon", "lat", "sample")},
        }
        for r in rows.to_dict("records")
    ]
    Path("a.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "sample": run.design.digest, "features": features})
    )
    other = read_answers(["a.geojson"], run.design, run.points, LEGEND)
    columns = ["id", "class", "interpreter", "confidence", "date", "comment"]
    assert table[columns].equals(other[columns])
    answers = settle(table, run.points, Sample())
    assert answers.unclear == () and set(answers.decided.values()) == {"single"}
    assert answers.classes == dict(zip(rows["id"], rows["class"], strict=True))


def _move(rows: pd.DataFrame) -> None:
    rows.loc[0, "lon"] += 0.0003


def _stratum(rows: pd.DataFrame) -> None:
    rows["stratum"] = ""
    rows.loc[0, "stratum"] = "7"


FAULTS: list[tuple[Callable[[pd.DataFrame], object], str]] = [
    (lambda r: r.__setitem__("class", ["lava", *r["class"][1:]]), "s00001: 'lava' is not in"),
    (lambda r: r.__setitem__("id", [r["id"][1], *r["id"][1:]]), "s00002: 2 rows of ada"),
    (lambda r: r.__setitem__("id", ["x9", *r["id"][1:]]), "x9: no unit of this sample"),
    (lambda r: r.__setitem__("confidence", "sure"), "s00001: confidence 'sure'"),
    (lambda r: r.__setitem__("sample", "0123456789abcdef"), "answers to the sample 0123456789ab"),
    (_move, r"s00001: answered 2\.\d pixels away"),
    (_stratum, "s00001: stratum 7, drawn in stratum"),
    (lambda r: r.pop("id"), "a convenience sample"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_faulty_rows_are_refused_point_by_point(
    run: DrawnSample, spoil: Callable[[pd.DataFrame], object], message: str
) -> None:
    rows = _rows(run)
    spoil(rows)
    with pytest.raises(DesignError, match=message):
        _read(run, rows)


def test_many_faults_are_counted(run: DrawnSample) -> None:
    rows = _rows(run)
    rows["class"] = "lava"
    with pytest.raises(DesignError, match=r"20 fault\(s\)[\s\S]*and 8 more"):
        _read(run, rows)


def test_a_file_that_is_none_and_missing_answers(run: DrawnSample) -> None:
    with pytest.raises(DesignError, match="cannot be read"):
        read_answers(["nothing.csv"], run.design, run.points, LEGEND)
    Path("bad.geojson").write_text('{"type": "FeatureCollection"}')
    with pytest.raises(DesignError, match="cannot be read"):
        read_answers(["bad.geojson"], run.design, run.points, LEGEND)
    rows = _rows(run)
    rows.loc[5, "class"] = ""
    with pytest.raises(DesignError, match=r"2 fault\(s\)\n  - s00006: no answer\n  - s00010"):
        settle(_read(run, rows.drop(index=9)), run.points, Sample())


def test_people_who_differ(run: DrawnSample) -> None:
    ada, bob = _rows(run), _rows(run, "bob")
    flip = {"water": "tree cover", "tree cover": "water"}
    bob.loc[[2, 4], "class"] = bob.loc[[2, 4], "class"].map(flip)
    two = _read(run, ada, bob)
    with pytest.raises(DesignError, match=r"2 fault\(s\)\n  - s00003: ada says"):
        settle(two, run.points, Sample())
    by_ada = settle(two, run.points, Sample(primary="ada"))
    assert by_ada.classes["s00003"] == ada.loc[2, "class"]
    assert by_ada.facts["decided_by"] == {"agreement": 18, "primary": 2}
    assert list(by_ada.said) == ["ada", "bob"]
    assert by_ada.said["bob"] == dict(zip(bob["id"], bob["class"], strict=True))
    third = _rows(run, "eve")
    most = settle(_read(run, ada, bob, third), run.points, Sample())
    assert most.decided["s00003"] == "majority" and most.classes == by_ada.classes
    talk = bob.loc[[2, 4]].assign(interpreter="consensus")
    agreed = settle(_read(run, ada, bob, talk), run.points, Sample(primary="ada"))
    assert agreed.decided["s00003"] == "consensus"
    assert agreed.classes["s00003"] == bob.loc[2, "class"]
    assert list(agreed.facts["interpreters"]) == ["ada", "bob"]
    other = ada.assign(**{"class": ada["class"].map(flip)})
    with pytest.raises(DesignError, match=r"ada says .* and "):
        _read(run, ada, other)


def test_what_cannot_be_told_is_replaced_from_the_reserve(run: DrawnSample) -> None:
    rows = _rows(run)
    points = run.points
    rows.loc[0, "class"] = CANNOT_TELL
    stratum = points["stratum"].iloc[0]
    spare = points[(points["reserve"] == 1) & (points["stratum"] == stratum)]["id"].tolist()
    with pytest.raises(DesignError, match=f"{spare[0]}: no answer"):
        settle(_read(run, rows), points, Sample())
    more = rows.iloc[:2].assign(id=spare[:2], lon="", lat="")
    more["class"] = [CANNOT_TELL, NAMES[stratum]]
    answers = settle(_read(run, rows, more), points, Sample())
    assert answers.unclear == ("s00001", spare[0])
    assert len(answers.classes) == 20 and spare[1] in answers.classes
    with pytest.raises(DesignError, match="2 of 20 units cannot be told"):
        settle(_read(run, rows, more), points, Sample(max_unclear_pct=5))
    # A unit of the reserve that nobody asked for does not count.
    rows.loc[0, "class"] = NAMES[stratum]
    assert spare[1] not in settle(_read(run, rows, more), points, Sample()).classes


EDITS: list[tuple[Callable[[gpd.GeoDataFrame], gpd.GeoDataFrame], str]] = [
    (lambda p: p.assign(geometry=p.geometry.translate(25)), r"s00001: moved by 2\.5 pixels"),
    (lambda p: p.assign(stratum=2), "stratum is 2, drawn was 1"),
    (lambda p: p.assign(inclusion_prob=0.5), "inclusion_prob is 0.5, drawn was"),
    (lambda p: pd.concat([p, p.iloc[:1]]), "s00001: stands there 2 times"),
    (lambda p: p.iloc[1:], "s00001: is missing"),
    (lambda p: p.assign(id=["new", *p["id"][1:]]), "new: was never drawn"),
    (lambda p: p.drop(columns="row"), "columns row are missing"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=[m for _, m in EDITS])
def test_an_edited_sample_is_refused_point_by_point(
    run: DrawnSample, edit: Callable[[gpd.GeoDataFrame], gpd.GeoDataFrame], message: str
) -> None:
    file = Path("results/map/sample.gpkg")
    require_unedited(gpd.read_file(file), run.design, str(file))
    edit(gpd.read_file(file)).to_file("edited.gpkg")
    with pytest.raises(DesignError, match=message):
        require_unedited(gpd.read_file("edited.gpkg"), run.design, "edited.gpkg")


def test_a_kept_sample_serves_a_newer_map(run: DrawnSample) -> None:
    newer = _codes()
    newer[:, 25:30] = 2
    write_raster("newer.tif", newer, BOX, nodata=0)
    kept = kept_sample(Path("results/map"), Path("newer.tif"), LEGEND)
    assert kept.design.digest == run.design.digest
    assert kept.design.strata == run.design.strata
    assert [c.n_pixels for c in kept.design.classes] == [1000, 1000]
    now = newer[kept.points["row"], kept.points["col"]]
    assert (kept.points["map_code"] == now).all()
    assert (kept.points["map_code"] != run.points["map_code"]).any()
    newer[:20] = 0
    write_raster("holes.tif", newer, BOX, nodata=0)
    with pytest.raises(DesignError, match="the present map has no class there"):
        kept_sample(Path("results/map"), Path("holes.tif"), LEGEND)


def test_labels_are_no_probability_sample(run: DrawnSample) -> None:
    labels = run.points[["id", "geometry"]].assign(**{"class": "water"})
    labels.to_file("labels.gpkg")
    map_path = Path("results/map/class_map.tif")
    with pytest.raises(DesignError, match="convenience sample, not a probability sample"):
        kept_sample(Path("labels.gpkg"), map_path, LEGEND)
    labels.assign(inclusion_prob=1.2).to_file("labels.gpkg")
    with pytest.raises(DesignError, match="not above 0 and at most 1"):
        kept_sample(Path("labels.gpkg"), map_path, LEGEND)
    labels.assign(inclusion_prob=0.012).to_crs("EPSG:4326").to_file("own.gpkg")
    own = kept_sample(Path("own.gpkg"), map_path, LEGEND)
    assert own.design.kind is SampleKind.UNEQUAL
    assert (own.points["map_code"] == run.points["map_code"]).all()
    require_unedited(own.points, own.design, "own.gpkg")
    record = json.loads(json.dumps(own.design.to_dict()))
    assert SampleDesign.from_dict(record).digest == own.design.digest
