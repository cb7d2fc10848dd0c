from __future__ import annotations

import base64
import io
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from PIL import Image
from shapely.geometry import MultiPolygon, box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fake_results import LEGEND, SCENES, fake_campaign, fake_results
from terraloom.errors import StateError
from terraloom.grid import geobox_record
from terraloom.io import read_json, write_json, write_raster
from terraloom.report import charts, facts, figures, formats, panels, scores
from terraloom.report import page as page_module
from terraloom.report.page import build_report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_results(tmp_path_factory.mktemp("results"), simulated=True)


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "results"))


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    out = made.parent / "report.html"
    build_report(made, fake_campaign(simulated=True), out)
    return out.read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts cost most of a build; tests of the text do without."""
    dot = figures.Picture("data:image/png;base64,AA==", 1, 1, "a chart")
    charts = dict.fromkeys(("classes", "confusion", "reliability", "learning"))
    monkeypatch.setattr(page_module, "_area_chart", lambda areas: dot)
    monkeypatch.setattr(page_module, "_skill_charts", lambda skill, root: charts)


class _Outline(HTMLParser):
    """Collects tags, attributes and visible text; complains about badly nested tags."""

    VOID = frozenset({"img", "meta", "br", "input", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.alts: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action") and v]
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "img":
            self.alts.append(found.get("alt") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def _outline(html: str) -> _Outline:
    outline = _Outline()
    outline.feed(html)
    assert outline.open == []
    return outline


def _words(html: str) -> str:
    return re.sub(r"\s+", " ", " ".join(_outline(html).text))


# ------------------------------------------------------------------ the page


def test_page_is_one_file_without_network(page: str):
    outline = _outline(page)
    for link in outline.links:
        inside = ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
        assert link.startswith(inside), link[:60]
    assert {link[1:] for link in outline.links if link.startswith("#")} <= outline.ids
    assert "default-src 'none'" in page
    assert "url(" not in page and "@import" not in page
    assert len(page) < 3_000_000


def test_all_sections_and_pictures_are_there(page: str):
    outline = _outline(page)
    wanted = "map areas doubt layers skill data labels score notes made"
    assert set(wanted.split()) <= outline.ids
    assert all(outline.alts)
    words = _words(page)
    for name in (*LEGEND.names, *SCENES):
        assert name in words
    # 8 scenes, one of them dropped by its quality, whatever the lock said.
    assert "7 of 8 scenes taken between 3 Apr 2023 and 25 Sep 2023" in words
    assert "2.1% clear is less than min_clear_pct 5" in words
    assert "6.1%, after 1.4%" in words
    assert "84.2%" in words and "RMSE" in words
    assert "15 labels contradict" in words and "fold 0 18 labels" in words


@pytest.mark.usefixtures("quick")
def test_simulated_region_says_so(page: str, made: Path, tmp_path: Path):
    assert page.count("This region is simulated") == 2
    assert "of simulated land" in page and "around 48" not in page
    real = build_report(made, fake_campaign(), tmp_path / "real.html").read_text()
    assert 'class="banner"' not in real and "around 48.123" in real


def test_areas_with_a_sample_have_estimates_intervals_and_truth(page: str, made: Path):
    words = _words(page)
    assert "Map area, not an estimate" not in words
    water = read_json(made / "map" / "accuracy.json")["classes"][-1]
    text = f"{water['low_ha']:.1f} to {water['high_ha']:.1f}"
    assert text in words
    assert "map accuracy, estimated from a probability sample; 95% interval 85.7 to 91.1%" in words
    assert words.count(" no ") and "Inside?" in words  # built-up lies outside its interval


@pytest.mark.parametrize("accuracy", [None, {}, {"classes": [], "oa": None}])
@pytest.mark.usefixtures("quick")
def test_without_a_sample_areas_are_no_estimates(results: Path, accuracy: object, tmp_path: Path):
    path = results / "map" / "accuracy.json"
    path.unlink()
    if accuracy is not None:
        write_json(path, accuracy)
    out = build_report(results, fake_campaign(sample=False), tmp_path / "r.html")
    words = _words(out.read_text())
    assert "Map area, not an estimate" in words
    assert "agreement with the labels on blocks the model never saw" in words
    assert "Estimate (ha)" not in words


def test_optional_files_leave_their_sections_out(results: Path, tmp_path: Path):
    for name in ("map/scoreboard.json", "map/accuracy.json", "map/uncertainty.tif", "map/image.tif",
                 "map/field-edges.tif", "map/canopy-height.tif", "map/reasons.tif",
                 "scenes/quality.csv", "model/reliability.csv", "chips/labels.json",
                 "chips/folds.gpkg"):  # fmt: skip
        (results / name).unlink()
    held_out = read_json(results / "model" / "held_out.json")
    write_json(results / "model" / "held_out.json", {"overall": held_out["overall"]})
    outline = _outline(build_report(results, fake_campaign(), tmp_path / "r.html").read_text())
    assert not {"doubt", "layers", "labels", "score", "fade"} & outline.ids
    assert {"map", "areas", "skill", "data", "made"} <= outline.ids


@pytest.mark.parametrize(
    "name",
    ["map/map.json", "map/class_map.tif", "model/held_out.json", "scenes/items.json"],
)
@pytest.mark.usefixtures("quick")
def test_missing_needed_file_is_named(results: Path, name: str, tmp_path: Path):
    (results / name).unlink()
    with pytest.raises(StateError, match=Path(name).name):
        build_report(results, fake_campaign(), tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.usefixtures("quick")
def test_missing_key_is_named(results: Path, tmp_path: Path):
    path = results / "map" / "map.json"
    write_json(path, {k: v for k, v in read_json(path).items() if k != "legend"})
    with pytest.raises(StateError, match="`legend` is missing"):
        build_report(results, fake_campaign(), tmp_path / "r.html")


@pytest.mark.usefixtures("quick")
def test_damaged_raster_is_named(results: Path, tmp_path: Path):
    (results / "map" / "uncertainty.tif").write_bytes(b"not a raster")
    with pytest.raises(StateError, match="uncertainty"):
        build_report(results, fake_campaign(), tmp_path / "r.html")


@pytest.mark.usefixtures("quick")
def test_text_from_files_is_escaped(results: Path, tmp_path: Path):
    evil = "<script>alert('x')</script>$x_{y}$"
    record = read_json(results / "map" / "map.json")
    record["legend"][0]["name"] = evil
    write_json(results / "map" / "map.json", record)
    items = read_json(results / "scenes" / "items.json")
    items["items"][0]["id"] = evil
    write_json(results / "scenes" / "items.json", items)
    write_json(results / "map" / "scoreboard.json", {evil: evil})
    campaign = fake_campaign(simulated=True, title=evil)
    html = build_report(results, campaign, tmp_path / "r.html").read_text()
    assert "<script>alert" not in html
    assert html.count("<script>") == 1
    assert "&lt;script&gt;" in html


def test_same_results_give_the_same_bytes(made: Path, page: str, tmp_path: Path):
    again = build_report(made, fake_campaign(simulated=True), tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == page


def test_script_runs_under_its_own_policy(page: str):
    import hashlib

    script = re.search(r"<script>(.*)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page


# ------------------------------------------------------------------ figures


def _pixels(picture: figures.Picture) -> np.ndarray:
    raw = base64.b64decode(picture.uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGBA"))


def _raster(path: Path, data: np.ndarray, **options: object) -> Path:
    from affine import Affine
    from odc.geo.geobox import GeoBox

    geobox = GeoBox(data.shape[-2:], Affine(10, 0, 6e5, 0, -10, 5e6), "EPSG:32632")
    write_raster(path, data, geobox, **options)
    return path


def test_large_rasters_are_read_small(tmp_path: Path):
    path = _raster(tmp_path / "a.tif", np.ones((600, 3000), np.uint8))
    data, _ = figures.read_small(path)
    assert data.shape == (1, 307, 1536)
    tall = _raster(tmp_path / "b.tif", np.ones((3000, 300), np.uint8))
    assert figures.read_small(tall, max_px=400)[0].shape == (1, 600, 60)


def test_class_picture_has_the_legend_colours_and_no_nodata(tmp_path: Path):
    code = np.array([[0, 1], [3, 1]], np.uint8)
    picture = figures.class_picture(
        _raster(tmp_path / "c.tif", code), {1: "#ff0000", 3: "#0102fe"}, "classes"
    )
    rgba = _pixels(picture)
    assert rgba[0, 0, 3] == 0
    assert rgba[0, 1].tolist() == [255, 0, 0, 255]
    assert rgba[1, 0].tolist() == [1, 2, 254, 255]


def test_scalar_picture_leaves_nodata_out_of_scale_and_picture(tmp_path: Path):
    data = np.array([[0.0, 10.0], [-9999, 5.0]], np.float32)
    path = _raster(tmp_path / "s.tif", data, nodata=-9999)
    scalar = figures.scalar_picture(path, 1, cmap="amount", alt="x", low=None)
    assert scalar is not None
    assert 0 <= scalar.low < 1 and 9 < scalar.high <= 10 and scalar.median == 5
    assert _pixels(scalar.picture)[..., 3].tolist() == [[255, 255], [0, 255]]
    empty = _raster(tmp_path / "e.tif", np.full((2, 2), -9999, np.float32), nodata=-9999)
    assert figures.scalar_picture(empty, 1, cmap="amount", alt="x") is None
    flat = _raster(tmp_path / "f.tif", np.full((2, 2), 7, np.float32), nodata=-9999)
    assert figures.scalar_picture(flat, 1, cmap="amount", alt="x", low=None) is not None


def test_standard_deviations_add_as_squares(tmp_path: Path):
    data = np.stack([np.full((2, 2), v, np.float32) for v in (100.0, 3.0, 4.0)])
    path = _raster(tmp_path / "s.tif", data, nodata=-9999)
    scalar = figures.scalar_picture(path, 2, cmap="doubt", alt="x", squares_of=(2, 3))
    assert scalar is not None and scalar.median == 5.0


def test_reason_picture_shows_the_first_reason_of_unmapped_pixels_only(tmp_path: Path):
    reasons = _raster(tmp_path / "r.tif", np.array([[2 | 8, 8, 64, 2]], np.uint8))
    classes = _raster(tmp_path / "c.tif", np.array([[0, 0, 1, 1]], np.uint8))
    picture, shares = figures.reason_picture(reasons, classes, {2: "#0000ff", 8: "#00ff00"})
    assert shares == {2: 0.25, 8: 0.25}
    rgb = _pixels(picture)[0, :, :3].tolist()
    assert rgb[0] == [0, 0, 255] and rgb[1] == [0, 255, 0] and rgb[2] == rgb[3]


def test_charts_take_odd_input():
    nothing = formats.Interval()
    names = ["a very long class name that will not fit", "$a_b$ & <c>"]
    measures = {"F1": [nothing, formats.Interval(0.5)]}
    assert charts.skill_chart(names, measures).width > 500
    matrix = np.array([[0.0, 0.0], [3.0, 1.0]])
    assert charts.confusion_chart(matrix, names).uri.startswith("data:image/png")
    assert charts.area_chart(names, [0.0, 2.0], [nothing, nothing], [math.nan, 1.0]).height > 100
    assert charts.reliability_chart({"": np.zeros((0, 3))}).width > 500
    many = [f"class {k}" for k in range(25)]
    assert charts.confusion_chart(np.eye(25), many).width > 500


# ------------------------------------------------------------------ numbers and texts


def test_percent_never_rounds_to_a_false_zero():
    assert formats.percent(0.8842) == "88.4%"
    assert formats.percent(0.0) == "0.0%"
    assert formats.percent(0.0001) == "<0.1%"
    assert formats.percent(-1e-9) == "0.0%"
    assert formats.percent(None) == formats.percent(math.nan) == formats.MISSING


def test_number_texts():
    assert formats.hectares(12345.6) == "12\u202f346"
    assert formats.hectares(27.93) == "27.9" and formats.hectares(0.456) == "0.46"
    assert formats.number(-0.24) == "\u22120.24"
    assert formats.number(True) == "yes" and formats.number("x") == "x"
    assert formats.day("2023-05-04T10:00:00Z") == "4 May 2023"
    assert formats.day("later") == "later"


def test_intervals_of_both_spellings():
    a = formats.interval({"value": 0.5, "low": 0.4, "high": 0.6})
    assert a == formats.interval({"value": 0.5, "lower": 0.4, "upper": 0.6, "se": 1})
    assert a.percent_text() == "50.0% (40.0 to 60.0)"
    assert not formats.interval({"value": None, "low": None}).known
    assert not formats.interval("n/a").known


def _legend_entry(code: int, name: str, ha: float) -> dict[str, object]:
    return {"code": code, "name": name, "color": "#000000", "map_area_ha": ha, "share_pct": 50}


def test_areas_read_the_estimators_own_json():
    from terraloom.assess.estimators import estimate_accuracy
    from terraloom.assess.intervals import Interval
    from terraloom.assess.samples import ReferenceSample, SampleKind, Strata

    # Olofsson et al. (2014), table 8: deforestation, gain, stable forest, stable other.
    matrix = [[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]]
    pixels = {1: 200_000, 2: 150_000, 3: 3_200_000, 4: 6_450_000}
    report = estimate_accuracy(
        ReferenceSample.from_matrix(matrix, [1, 2, 3, 4], SampleKind.STRATIFIED_RANDOM),
        Strata.from_pixels(pixels, 900.0),
        classes=[1, 2, 3, 4],
        fpc=False,
        interval=Interval.NORMAL,
    )
    legend = [_legend_entry(c, f"class {c}", n * 0.09) for c, n in pixels.items()]
    areas = facts.areas(legend, report.to_dict(), {"truth_area_ha": {"class 1": 21_158}})
    assert areas.sampled and areas.level_text == "95%"
    # Published: 21 158 +- 6158 ha of deforestation, overall accuracy 0.95, user's 0.88.
    loss = areas.rows[0]
    assert loss.estimate.value == pytest.approx(21_158, abs=1)
    assert (loss.estimate.high - loss.estimate.low) / 2 == pytest.approx(6158, rel=0.002)
    assert loss.users.value == pytest.approx(0.88)
    assert areas.oa.value == pytest.approx(0.947, abs=5e-4)
    assert loss.covered is True and areas.rows[1].covered is None


def test_areas_without_anything_but_the_map():
    areas = facts.areas([_legend_entry(3, "x", 4.0)], None, None)
    assert not areas.sampled and not areas.has_truth and not areas.oa.known
    assert areas.rows[0].covered is None


@pytest.mark.parametrize(
    "board",
    [
        {"truth_area_ha": {"x": 7}},
        {"truth_area_ha": {"3": 7}},
        {"classes": [{"name": "x", "truth_ha": 7}]},
        {"areas": {"x": {"true_area_ha": 7, "map_ha": 6}}},
    ],
)
def test_truth_is_found_where_the_scoreboard_keeps_it(board: dict[str, object]):
    assert facts.areas([_legend_entry(3, "x", 4.0)], None, board).rows[0].truth_ha == 7


def test_scoreboard_leaves_unmeasured_scores_out_and_hides_no_number():
    rows, tables = scores.scoreboard(
        {"oa": 0.9, "ece": None, "areas_inside_ci": 4, "areas_total": 5, "extra_m": 3}
    )
    assert [(r.what, r.value) for r in rows] == [
        ("Overall accuracy", "90.0%"),
        ("True area inside its interval", "4 of 5"),
    ]
    assert tables[0].rows == [["Extra (m)", "3"]]


def test_label_report_of_each_task_and_the_rest():
    raw = {
        "tasks": [{"task": "edges", "rows": 10, "kept": 8, "dropped": {"sliver": 2, "drop": 0}}],
        "folds": {"min_distance_m": 640.0},
    }
    tasks, rest = scores.label_tasks(raw)
    assert [(t.name, t.kept, t.rows, t.share) for t in tasks] == [("Edges", "8", "10", 0.8)]
    assert tasks[0].dropped == [["too small for a pixel", "2"]]
    assert [t.title for t in rest] == ["Folds"]
    assert scores.label_tasks(None) == ([], [])


def test_folds_are_a_table_and_lists_for_programs_are_not_shown():
    raw = {
        "folds": {"count": 2, "fold_of_block": [0, 1] * 40, "range_m": None, "variogram": {
            "model": "spherical", "sill": 0.5, "nugget": 0.1, "lag_m": [1.0] * 20}},
        "audit": {"min_distance_m": 40, "labels_per_fold": {"0": 3, "1": 4}, "per_fold": [
            {"fold": 0, "labels": 3, "classes": 2, "nearest_m": 40.4, "median_m": 90.0},
            {"fold": 1, "labels": 4, "classes": 2, "nearest_m": 40.4, "median_m": 120.0}]},
    }  # fmt: skip
    _, rest = scores.label_tasks(raw)
    assert rest[0].title == "Labels in folds"
    assert rest[0].rows == [["0", "3", "2", "40", "90"], ["1", "4", "2", "40", "120"]]
    shown = dict(r for t in rest[1:] for r in t.rows if len(r) == 2)
    assert not any("values" in c for t in rest for r in t.rows for c in r)
    assert shown["Variogram model"] == "spherical"
    assert not any("Labels per fold" in t.title for t in rest)


def test_the_gap_between_random_and_blocked_folds_is_said(results: Path, quick: None):
    path = results / "model" / "held_out.json"
    held = read_json(path)
    assert "random split" not in _words_of(results)
    held["baseline"]["random_split"] = {"oa": 0.988, "macro_f1": 0.98, "pixels": 1218}
    held["baseline"]["same_pixels"] = {"oa": 0.878, "macro_f1": 0.7, "pixels": 1218}
    write_json(path, held)
    words = _words_of(results)
    assert "would claim 98.8% instead of 87.8%. The gap of 11.0 points is what" in words
    assert "Random forest, random split" in words


def _words_of(results: Path) -> str:
    out = results.parent / "report.html"
    build_report(results, fake_campaign(simulated=True), out)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", out.read_text(encoding="utf-8")))


def test_surest_suspects_come_first():
    raw = [
        {"label_id": 7, "class": "a", "likely": "b", "p_class": 0.2, "p_likely": 0.6},
        {"label_id": 9, "class": "b", "likely": "a", "p_class": 0.1, "p_likely": 0.9},
    ]
    found = scores.suspects(raw, most=1)
    assert found is not None
    assert found[0] == 2
    assert found[1].rows == [["9", "b", "10%", "a", "90%"]]
    assert scores.suspects(None) is None


def test_long_lists_are_not_spelt_out():
    assert facts.tabulate({"fold_of_block": list(range(400))})[0].rows == [["400 values"]]


def test_any_json_becomes_tables():
    raw = {"a": 1, "b": {"x": {"p": 1, "q": 2}, "y": {"p": 3}}, "c": [{"n": 1}, {"m": 2}]}
    tables = {t.title: t for t in facts.tabulate(raw)}
    assert tables[""].rows == [["A", "1"]]
    assert tables["B"].rows == [["x", "1", "2"], ["y", "3", ""]]
    assert tables["C"].columns == ["N", "M"]


def test_reliability_rows_with_and_without_curves():
    row = {"confidence": "0.5", "accuracy": "0.4", "count": "10"}
    assert facts.curves([row])[""].tolist() == [[0.5, 0.4, 10.0]]
    two = facts.curves([row | {"stage": "before"}, row | {"stage": "after"}, row | {"count": ""}])
    assert set(two) == {"before", "after"}


def test_scale_bar_is_round_and_short():
    record = {"crs": "EPSG:32632", "shape": [100, 384], "transform": [10, 0, 6e5, 0, -10, 5e6]}
    text, share = panels.place(record).scale_bar()
    assert text == "500 m" and share == pytest.approx(500 / 3840)


def test_only_defects_are_reasons_for_gaps():
    record = {"valid_pct": 97.0, "reason_pct": {"water": 40, "filled": 9, "clear": 97, "cloud": 3}}
    assert panels.main_reason(record) == "The rest is empty mostly because of: cloud."
    assert panels.main_reason({"valid_pct": 100, "reason_pct": {}}) == ""


def test_a_label_of_several_parts_counts_once(tmp_path: Path) -> None:
    parts = [box(684000 + x, 5333000, 684060 + x, 5333060) for x in (0, 200, 400)]
    shapes = [MultiPolygon(parts[:2]), parts[2]]
    path = tmp_path / "chips" / "folds.gpkg"
    path.parent.mkdir()
    gpd.GeoDataFrame(
        {"task": ["cover"] * 2, "fold": [0, 1]}, geometry=shapes, crs="EPSG:32632"
    ).to_file(path)
    geobox = GeoBox((96, 96), Affine(10, 0, 684000, 0, -10, 5333960), "EPSG:32632")
    found = panels.labels(tmp_path, {"geobox": geobox_record(geobox)}, "cover")
    assert found is not None and [n for _, _, n in found["folds"]["keys"]] == [1, 1]
