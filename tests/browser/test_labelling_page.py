"""The labelling page in a real browser: from keys pressed to areas estimated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import geopandas as gpd
import pandas as pd
import pytest

from support import drawn
from support.browser import DELETE, ENTER, ESCAPE, LEFT, MISSING, RIGHT, Browser
from terraloom.assess.answers import CONSENSUS, read_answers, settle
from terraloom.assess.design import SampleDesign, reference_sample
from terraloom.assess.estimators import estimate_accuracy
from terraloom.assess.measured import settle_values
from terraloom.assess.sampling import DESIGN, POINTS
from terraloom.io import read_json
from terraloom.legend import read_legend
from terraloom.report.labelling import PAGE, write_labelling_page

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
CODES = dict(zip((1, 2, 4), drawn.NAMES, strict=True))
KEY = {name: str(n) for n, name in enumerate(drawn.NAMES, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a drawn sample and its page."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_labelling_page(drawn.write_run(overhead=1.25), drawn.grid())
    return folder


@pytest.fixture
def browser(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    monkeypatch.chdir(folder)
    browser = Browser(tmp_path)
    try:
        browser.log("performance")  # of the start page
        browser.open(PAGE)
        yield browser
        severe = [m["message"] for m in browser.log("browser") if m["level"] == "SEVERE"]
        assert not severe
        sent = [json.loads(m["message"])["message"] for m in browser.log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent
                if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert urls and not [
            u for u in urls if u.split(":")[0] not in ("file", "data", "blob", "chrome")
        ]
    finally:
        browser.close()


def _units() -> gpd.GeoDataFrame:
    return gpd.read_file(POINTS)


def _answer_all(browser: Browser, names: list[str]) -> None:
    browser.press("".join(KEY[n] + RIGHT for n in names))


def _state(browser: Browser) -> tuple[str, str]:
    chosen = browser.run(
        "const b = document.querySelector('#classes [aria-checked=true]');"
        "return b ? b.dataset.name : ''"
    )
    return browser.text("#unit"), chosen


def test_from_keys_to_areas(browser: Browser) -> None:
    units = _units()
    first = units[units["reserve"] == 0]
    truth = [CODES[c] for c in first["map_code"]]
    assert browser.text("#position") == "1 of 24 · 0 of 24 answered"
    browser.press("1")  # nobody answers without a name
    assert "your name" in browser.text("#message")
    browser.write("#who", "Ada L." + ENTER)
    _answer_all(browser, truth)
    assert browser.text("#position") == "24 of 24 · 24 of 24 answered"
    assert browser.text("#message") == "All points are answered: save them to a file."
    # Back to the point before, unsure, with a comment in which keys are only letters.
    browser.press(LEFT + "lc")
    browser.press('a "field", 12 x' + ESCAPE)
    assert _state(browser) == (first["id"].iloc[22], truth[22])
    browser.click("#save-csv")
    file = browser.downloaded(".csv")
    design = SampleDesign.from_dict(read_json(DESIGN))
    assert file.name == f"small-{design.digest[:8]}-ada-l.csv"
    legend = read_legend("classes.csv")
    table = read_answers([str(file)], design, units, legend)
    row = table.set_index("id").loc[first["id"].iloc[22]]
    assert (row["confidence"], row["comment"]) == ("low", 'a "field", 12 x')
    assert set(table["interpreter"]) == {"Ada L."}
    browser.click("#save-geojson")
    other = read_answers([str(browser.downloaded(".geojson"))], design, units, legend)
    columns = ["id", "class", "interpreter", "confidence", "date", "comment"]
    pd.testing.assert_frame_equal(
        table[columns].sort_values("id", ignore_index=True),
        other[columns].sort_values("id", ignore_index=True),
    )
    settled = settle(table, units, drawn.campaign(overhead=1.25).sample)
    code = {n: c for c, n in CODES.items()}
    answers = {i: code[n] for i, n in settled.classes.items()}
    used = units[units["id"].isin(answers)]
    sample = reference_sample(used, answers, design)
    report = estimate_accuracy(sample, design.sizes(), classes=legend.codes)
    assert report.overall.value == 1.0
    for c in legend.codes:
        assert report.area_ha[c].value == pytest.approx(report.mapped_ha[c].value)


def test_measured_values_travel_with_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    campaign = drawn.write_run(height=True)
    write_labelling_page(campaign, drawn.grid())
    browser = Browser(tmp_path)
    try:
        browser.open(PAGE)
        browser.write("#who", "ada" + ENTER)
        browser.press("2")
        browser.write("#values input", "51" + ENTER)
        assert browser.text("#message") == "tree height: a number from 0 to 50."
        browser.press(RIGHT + "3=")
        browser.write("#values input", "12.5" + ENTER)
        browser.press(LEFT + RIGHT)
        assert browser.run("return document.querySelector('#values input').value") == "12.5"
        browser.click("#save-csv")
        file = browser.downloaded(".csv")
    finally:
        browser.close()
    design = SampleDesign.from_dict(read_json(DESIGN))
    table = read_answers([str(file)], design, _units(), read_legend("classes.csv"), campaign.tasks)
    assert list(table["value_tree_height"]) == ["", "12.5"]
    assert settle_values(table, campaign.tasks[1], CONSENSUS) == {table["id"].iloc[1]: 12.5}


def test_answers_outlive_the_page_and_come_back_from_files(browser: Browser) -> None:
    browser.write("#who", "bob" + ENTER)
    browser.press("2" + RIGHT + "3m")
    browser.open(PAGE)
    assert browser.text("#position") == "2 of 24 · 2 of 24 answered"
    assert _state(browser) == ("s00002", drawn.NAMES[2])
    browser.press(DELETE)
    assert browser.text("#position") == "2 of 24 · 1 of 24 answered"
    browser.press("u")
    assert browser.text("#position") == "1 of 23 · 1 of 24 answered"
    browser.press("u" + LEFT)
    assert _state(browser) == ("s00001", drawn.NAMES[1])
    browser.click("#save-csv")
    saved = browser.downloaded(".csv")
    browser.run("localStorage.clear()")
    browser.open(PAGE)
    assert browser.text("#position") == "1 of 24 · 0 of 24 answered"
    browser.write("#load", str(saved))
    assert "1 answers of bob" in browser.text("#message")
    assert _state(browser) == ("s00001", drawn.NAMES[1])
    # A file of another sample, and one with a fault.
    text = saved.read_text()
    wrong = saved.with_name("wrong.csv")
    wrong.write_text(text.replace(str(read_json(DESIGN)["digest"]), "0123456789abcdef"))
    browser.write("#load", str(wrong))
    assert "answers another sample (0123456789abcdef)" in browser.text("#message")
    wrong.write_text(text.replace("s00001", "s99999"))
    browser.write("#load", str(wrong))
    assert "s99999 is no point of this sample" in browser.text("#message")


def test_the_reserve_is_asked_for_what_cannot_be_told(browser: Browser) -> None:
    units = _units()
    browser.write("#who", "eve" + ENTER)
    browser.press("x")
    assert browser.text("#position") == "1 of 25 · 1 of 25 answered"
    stratum = units["stratum"].iloc[0]
    spare = units[(units["reserve"] == 1) & (units["stratum"] == stratum)]["id"].iloc[0]
    browser.press(RIGHT * 24)
    assert browser.text("#unit") == spare
    browser.press(LEFT * 24 + "1")
    assert browser.text("#position") == "1 of 24 · 1 of 24 answered"


def test_two_people_are_kept_apart_and_settle_what_differs(browser: Browser) -> None:
    browser.write("#who", "ada" + ENTER)
    browser.press(("1" + RIGHT) * 3)
    browser.click("#save-csv")
    ada = browser.downloaded("-ada.csv")
    browser.run("localStorage.clear()")
    browser.open(PAGE)
    browser.write("#who", "bob" + ENTER)
    browser.press("1" + RIGHT + "2" + RIGHT + "1" + LEFT)
    browser.write("#load", str(ada))
    assert _state(browser) == ("s00002", drawn.NAMES[1]), "bob sees only his own answers"
    assert browser.text("#resolve") == "Resolve 1 disagreement"
    browser.click("#resolve")
    assert browser.text("#unit") == "s00002"
    shown = browser.text("#others")
    assert f"bob: {drawn.NAMES[1]}, high" in shown and "ada: water, high" in shown
    assert browser.text("#position") == "1 of 1 · 0 of 1 answered"
    browser.press("2")
    browser.click("#save-csv")
    rows = pd.read_csv(browser.downloaded("-consensus.csv"), dtype=str)
    assert rows[["id", "class", "interpreter"]].to_numpy().tolist() == [
        ["s00002", drawn.NAMES[1], "consensus"]
    ]
    browser.click("#resolve")
    assert browser.text("#resolve") == "Resolve 1 disagreement"


def test_the_images_are_drawn_and_the_map_is_hidden(browser: Browser) -> None:
    units = _units()
    n = int((units["reserve"] == 0).sum())
    browser.write("#who", "ada" + ENTER)
    seen = []
    for _ in range(n):
        # Natural colours of the last period at the marked pixel, outline off.
        seen.append(browser.run("""
            look.outline = false; look.zoom = 4; draw();
            const all = [...document.querySelectorAll('#views canvas')];
            const red = (v) => data.views[v].colours.startsWith('false');
            const k = data.points[at].views.findLastIndex(red);
            const shown = data.side / 4, middle = Math.round(512 * (shown / 2 + 0.5) / shown);
            return [...all[k].getContext('2d').getImageData(middle, middle, 1, 1).data];
        """))  # fmt: skip
        browser.press(RIGHT)
    red = pd.Series([s[0] for s in seen])
    code = units[units["reserve"] == 0]["map_code"].reset_index(drop=True)
    assert red[code == 1].max() < 90 < 130 < red[code == 2].min()
    browser.press("f")
    assert browser.run("return document.getElementById('mapped').hidden")
    text = browser.run("return document.getElementById('data').textContent")
    assert '"map"' not in text and '"map_code"' not in text


@pytest.mark.parametrize("size", [(1440, 900), (390, 844)])
def test_the_page_fits_its_window_and_themes(browser: Browser, size: tuple[int, int]) -> None:
    browser.resize(*size)
    wide = browser.run("return document.documentElement.scrollWidth")
    assert wide <= size[0]
    buttons = browser.run(
        "return [...document.querySelectorAll('main button, header button')]"
        ".filter((b) => !b.hidden).map((b) => b.getBoundingClientRect())"
        ".every((r) => r.left >= 0 && r.right <= innerWidth && r.height > 14)"
    )
    assert buttons
    colours = []
    for _ in range(2):
        colours.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
        browser.press("t")
    assert colours[0] != colours[1]
    browser.press("?")
    assert browser.run("return document.getElementById('keys').open")
    browser.press(ESCAPE)
    assert not browser.run("return document.getElementById('keys').open")
