"""Save, tag and restore on a toy workflow with the folders of a campaign."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import snakemake.persistence
import yaml
from snakemake.persistence.file import FilePersistence

from support.states import ENV, OUTS, run
from terraloom.operate import provenance
from terraloom.errors import StateError
from terraloom.operate.provenance import MILESTONES, RECORD_FORMAT, restore_state, save_state
from terraloom.operate.versions import state_log, verify_state

SNAKEFILE = """
configfile: "config.yaml"

rule all:
    input: "results/map/map.txt", "results/scenes/metrics.json"

rule simulate:
    output: "resources/catalog.txt", "resources/truth.txt"
    params: seed=config["seed"]
    shell: "echo {params.seed} > {output[0]}; echo t{params.seed} > {output[1]}"

rule lock:
    input: "resources/catalog.txt"
    output: lock="results/scenes/items.txt", metrics="results/scenes/metrics.json"
    shell: "cp {input} {output.lock}; echo '{{\\"items\\": '$(cat {input})'}}' > {output.metrics}"

rule cube:
    input: "results/scenes/items.txt"
    output: "work/cube/b0.txt"
    params: period=config["period"]
    shell: "(cat {input}; echo {params.period}) > {output}"

rule chips:  # larger than 1 MB: Snakemake's own limit of hashing
    input: "work/cube/b0.txt"
    output: "results/chips/chips.zip"
    shell: "(cat {input}; head -c 1500000 /dev/zero) > {output}"

rule train:
    input: "results/chips/chips.zip"
    output: "results/model/net.txt"
    params: rate=config["rate"]
    shell: "(head -c 20 {input} | cksum; echo {params.rate}) > {output}"

rule predict:
    input: "results/model/net.txt", "work/cube/b0.txt"
    output: "work/predict/b0.txt"
    shell: "cat {input} > {output}"

rule mosaic:
    input: "work/predict/b0.txt", "resources/truth.txt"
    output: "results/map/map.txt"
    shell: "cat {input} > {output}"
"""

def _snakemake(folder: Path, *words: str) -> str:
    return run(folder, "snakemake", "--cores", "1", "--max-checksum-file-size", "2GB", *words)


def _record(folder: Path, tag: str, **config: object) -> dict[str, bytes]:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    _snakemake(folder, "--quiet", "rules")
    save_state(folder)
    run(folder, "dvc", "commit", "-q", "-f")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", f"state {tag}")
    run(folder, "git", "tag", tag)
    return _bytes(folder)


def _bytes(folder: Path) -> dict[str, bytes]:
    root = folder / "results"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _nothing_to_do(folder: Path) -> bool:
    return "Nothing to be done" in _snakemake(folder, "-n")


def _planned(folder: Path, *words: str) -> set[str]:
    text = _snakemake(folder, "-n", *words)
    return set(re.findall(r"^rule (\w+):", text, flags=re.M))


@pytest.fixture(scope="module")
def history(tmp_path_factory) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """Project with the tags v1 and v2 (another seed: everything differs), at v2."""
    folder = tmp_path_factory.mktemp("history") / "project"
    folder.mkdir()
    (folder / "Snakefile").write_text(SNAKEFILE)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": OUTS}))
    (folder / ".gitignore").write_text("/.snakemake/\n/work/\n/resources/\n/results/\n")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    states = {"v1": _record(folder, "v1", seed=1, period="june", rate=0.1)}
    states["v2"] = _record(folder, "v2", seed=2, period="june", rate=0.1)
    assert not any(states["v1"][name] == states["v2"][name] for name in states["v1"])
    return folder, states


@pytest.fixture
def project(history, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(history[0], tmp_path / "copy", symlinks=True))


@pytest.mark.slow
def test_restore_in_the_same_clone_back_and_forth(history):
    folder, states = history
    (folder / "resources" / "by-hand.txt").write_text("mine")
    for tag in ("v1", "v2"):
        (folder / "work" / "stale.txt").write_text("of another run")
        run(folder, "git", "checkout", "-q", tag)
        text = restore_state(folder)
        assert _bytes(folder) == states[tag]
        assert not any((folder / "work").iterdir())
        assert "resources/catalog.txt" in text or tag == "v2"
        assert not (folder / "resources" / "catalog.txt").exists()
        assert (folder / "resources" / "by-hand.txt").read_text() == "mine"
        assert _nothing_to_do(folder)
        assert "up to date" in run(folder, "dvc", "status")
        assert save_state(folder)
        assert _bytes(folder) == states[tag]


@pytest.mark.slow
def test_restore_in_a_clone_elsewhere_and_real_changes_are_seen(history, tmp_path):
    folder, states = history
    remote, clone = tmp_path / "remote", tmp_path / "elsewhere" / "clone"
    run(folder, "dvc", "remote", "add", "-f", "--local", "-q", "-d", "store", str(remote))
    run(folder, "dvc", "push", "-q", "--all-tags")
    run(tmp_path, "git", "clone", "-q", str(folder), str(clone))
    run(clone, "dvc", "remote", "add", "--local", "-q", "-d", "store", str(remote))
    run(clone, "git", "checkout", "-q", "v1")
    with pytest.raises(StateError, match="dvc fetch"):
        restore_state(clone)
    run(clone, "dvc", "fetch", "-q", "--all-tags")
    restore_state(clone)
    assert _bytes(clone) == states["v1"]
    assert _nothing_to_do(clone)
    assert "up to date" in run(clone, "dvc", "status")

    # The cube is an intermediate that is not here: its record alone shows the change.
    assert _planned(clone, "--config", "period=july") >= {"cube", "chips", "train", "mosaic"}
    assert "train" in _planned(clone, "--config", "rate=0.2")
    (clone / "results" / "chips" / "chips.zip").write_text("edited")
    assert "train" in _planned(clone)

    run(clone, "git", "checkout", "-q", "v2")
    with pytest.raises(StateError, match="never committed"):
        restore_state(clone)
    assert (clone / "results" / "chips" / "chips.zip").read_text() == "edited"


def test_provenance_is_portable_sorted_and_stable(project):
    kept = {m: (project / "results" / m / "provenance.jsonl").read_bytes() for m in MILESTONES}
    text = b"".join(kept.values()).decode()
    for private in (str(project.parent.parent), "/tmp", str(Path.home()), socket.gethostname()):
        assert private not in text
    outputs = {m: [json.loads(line)["output"] for line in kept[m].splitlines()] for m in MILESTONES}
    assert outputs == {
        "scenes": ["resources/catalog.txt", "resources/truth.txt", "results/scenes/items.txt",
                   "results/scenes/metrics.json"],
        "chips": ["results/chips/chips.zip", "work/cube/b0.txt"],
        "model": ["results/model/net.txt"],
        "map": ["results/map/map.txt", "work/predict/b0.txt"],
    }  # fmt: skip
    _snakemake(project, "--quiet", "rules", "--forceall")
    save_state(project)
    assert kept == {m: (project / "results" / m / "provenance.jsonl").read_bytes() for m in kept}


def test_results_that_do_not_fit_together_are_not_saved(project):
    (project / "results" / "chips" / "chips.zip").write_text("from elsewhere")
    with pytest.raises(StateError, match=r"net\.txt was made from another results/chips/chips"):
        save_state(project)
    assert "scenes" in save_state(project, ["scenes"])
    (project / "results" / "model" / "net.txt").write_text("a release")
    with pytest.raises(StateError, match=r"predict/b0\.txt was made from another results/model"):
        save_state(project, ["map"])
    with pytest.raises(StateError, match="no such milestone"):
        save_state(project, ["maps"])
    with pytest.raises(StateError, match="nothing to save"):
        save_state(project / "work")


def test_a_frozen_milestone_keeps_what_it_came_with(project):
    model = project / "results" / "model"
    (model / "net.txt").write_text("a release")
    (model / "provenance.jsonl").write_text("")
    campaign = project / "work" / "campaign.yaml"
    campaign.parent.mkdir(exist_ok=True)
    campaign.write_text("milestones: {scenes: build, chips: frozen, model: frozen}\n")
    assert "results/model: frozen" in save_state(project, ["scenes", "model"])
    assert (model / "provenance.jsonl").read_text() == ""
    # A cube that is made anew for the map belongs to the map, as nothing else is built.
    shutil.rmtree(project / "results" / "map")
    record = provenance._recorded(project)
    path = provenance._record_path(project / ".snakemake" / "metadata", "work/cube/b0.txt")
    path.write_text(json.dumps({**record["work/cube/b0.txt"], "params": ["'july'"]}))
    merged = provenance._merged(project, {"chips", "model"})
    merged["results/map/map.txt"] = record["results/map/map.txt"]
    assert provenance._owners(merged, ["scenes", "map"])["work/cube/b0.txt"] == "map"


def test_absolute_paths_of_a_campaign_are_kept_and_said(project):
    folder = project / ".snakemake" / "metadata"
    record = provenance._recorded(project)["results/model/net.txt"]
    record["params"] = ['\'{"file": "/data/labels.gpkg", "url": "https://x.org/a", "n": "1/2"}\'']
    record["shellcmd"] = f"train {project.resolve()}/results/model/net.txt"
    path = provenance._record_path(folder, "results/model/net.txt")
    path.write_text(json.dumps(record))
    assert "absolute paths (/data/labels.gpkg);" in save_state(project, ["model"])
    line = json.loads((project / "results" / "model" / "provenance.jsonl").read_text())
    assert line["params"] == record["params"]
    assert line["shellcmd"] == "train results/model/net.txt"


def test_an_unfinished_or_running_run_is_refused(project):
    marks = project / ".snakemake" / "incomplete"
    marks.mkdir(exist_ok=True)
    mark = provenance._record_path(marks, "results/model/net.txt")
    mark.write_text("{}")
    with pytest.raises(StateError, match=r"unfinished outputs: results/model/net\.txt"):
        save_state(project)
    mark.unlink()
    locks = project / ".snakemake" / "locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text("results/map/map.txt\n")
    (project / "work" / "partial.txt").write_text("in use")
    with pytest.raises(StateError, match="under way"):
        restore_state(project)
    assert (project / "work" / "partial.txt").exists()


def test_verify_names_what_is_damaged_behind_the_back_of_dvc(project):
    assert "are as recorded" in verify_state(project)
    result = project / "results" / "model" / "net.txt"
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    cache = project / ".dvc" / "cache" / "files" / "md5"
    folder = lock["stages"]["chips"]["outs"][0]["md5"]
    listed = json.loads((cache / folder[:2] / folder[2:]).read_text())
    md5 = next(e["md5"] for e in listed if e["relpath"] == "chips.zip")
    victim = cache / md5[:2] / md5[2:]
    for path in (victim, result):  # same size and time: DVC itself sees nothing
        stat = path.stat()
        path.chmod(0o644)
        path.write_bytes(b"x" + path.read_bytes()[1:])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (project / "results" / "map" / "map.txt").unlink()
    (project / "results" / "map" / "extra.txt").write_text("")
    with pytest.raises(StateError) as err:
        verify_state(project)
    text = str(err.value)
    assert text.count("\n  ") == 5  # four findings and what to do
    assert f"cache object {md5[:2]}/{md5[2:]} (results/chips/chips.zip)" in text
    assert "results/model/net.txt: differs from dvc.lock" in text
    assert "results/map/map.txt: missing" in text
    assert "results/map/extra.txt: not in dvc.lock" in text


def test_log_lists_tags_with_metrics_newest_first(project):
    run(project, "git", "tag", "empty-change")
    lines = state_log(project).splitlines()
    tags = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert sorted(tags) == ["empty-change", "v1", "v2"]
    assert tags.index("v2") < tags.index("v1")
    assert any(line.split()[0] == "scenes" and line.endswith("items=2") for line in lines)
    assert any(line.endswith("items=1") for line in lines)
    assert sum(" as " in line for line in lines) == 4


def test_the_record_format_is_the_one_we_know(tmp_path, monkeypatch):
    assert snakemake.persistence.RECORD_FORMAT_VERSION == RECORD_FORMAT
    assert set(snakemake.persistence.MetadataRecord.model_fields) == {
        "rule", "input", "log", "shellcmd", "params", "code", "record_format_version",
        "conda_env", "container_img_url", "software_stack_hash", "job_hash", "starttime",
        "endtime", "incomplete", "external_jobid", "input_checksums",
    }  # fmt: skip
    theirs = FilePersistence(path=tmp_path / ".snakemake")
    for output in ("results/map/map.txt", "results/map/" + "long-name/" * 60 + "ü.tif"):
        folder = tmp_path / ".snakemake" / "metadata"
        ours = provenance._record_path(folder, output)
        assert str(ours) == theirs._record_path(str(folder), output)
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.write_text("{}")
        assert provenance._decoded(folder)[output] == ours
    monkeypatch.setattr(snakemake.persistence, "RECORD_FORMAT_VERSION", RECORD_FORMAT + 1)
    for verb in (save_state, restore_state):
        with pytest.raises(StateError, match=f"format {RECORD_FORMAT + 1}"):
            verb(tmp_path)


def test_the_newest_record_of_an_output_counts_and_bad_files_are_refused(tmp_path):
    old, new = {"endtime": 1.0, "rule": "old"}, {"endtime": 2.0, "rule": "new"}
    assert provenance._newest([{"a": new}, {"a": old}])["a"] is new
    assert provenance._newest([{"a": old}, {"a": new}])["a"] is new
    path = tmp_path / "results" / "map" / "provenance.jsonl"
    path.parent.mkdir(parents=True)
    for line, said in (
        ('{"output": "results/map/a.tif", "record_format_version": 5}', "format 5"),
        ('{"output": "/etc/passwd", "record_format_version": 6}', "outside the run"),
        ('{"output": "work/../../a", "record_format_version": 6}', "outside the run"),
        ("[]", "not a record"),
        ("{", "not a record"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(StateError, match=said):
            provenance._stored(tmp_path, "map")


def test_milestones_are_the_outputs_of_dvc_and_only_folders():
    stages = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"]
    assert list(stages) == list(MILESTONES)
    for name, stage in stages.items():
        assert stage["outs"] == [{f"results/{name}": {"persist": True}}]
