"""Releases of a toy project: made, described, compared, pinned, examined, shared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

from support.states import GRID, make_project, make_results, run
from terraloom.config.load import parse_campaign, read_yaml
from terraloom.errors import ConfigError, StateError
from terraloom.grid import row_areas_m2
from terraloom.operate.compare import compare_states, text_of
from terraloom.operate import doctor
from terraloom.operate.doctor import examine
from terraloom.operate.pin import pin_model
from terraloom.operate.provenance import restore_state
from terraloom.operate.release import release
from terraloom.operate.versions import verify_state
from terraloom.plan import check_pinned, forget_pin

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(committer: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Project with a local remote and two releases; what the releases said."""
    base = tmp_path_factory.mktemp("releases")
    folder = make_project(base / "project")
    run(folder, "dvc", "remote", "add", "-q", "-d", "store", str(base / "store"))
    run(folder, "git", "commit", "-q", "-am", "remote")
    make_results(folder, seed=1, model={"members": 1})
    said = [release("v1", folder, message="The beginning.")]
    make_results(folder, seed=2, strip=6, iou=0.625, model={"members": 3})
    said.append(release("v2", folder))
    return folder, said


@pytest.fixture
def project(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(made[0], tmp_path / "copy", symlinks=True))


def test_a_release_is_tagged_pushed_and_described(made: tuple[Path, list[str]]) -> None:
    folder, (first, second) = made
    assert "The first release." in first
    assert "dvc push: store" in second
    assert run(folder, "git", "status", "--porcelain") == ""
    notes = run(folder, "git", "show", "v2:releases/v2.md")
    assert "Against v1:" in notes
    assert "| `model.members` | 1 | 3 |" in notes
    assert "| model.iou | 0.5 | 0.625 | +0.125 |" in notes
    assert "| water | 11.5 (11.0-13.0) | 10.0 (11.0-13.0) |" in notes
    assert "- scenes: other" not in notes
    assert "- model: other" in notes
    assert verify_state(folder)


@pytest.mark.slow
def test_a_pushed_release_comes_back_in_a_clone(made: tuple[Path, list[str]], tmp_path) -> None:
    folder, _ = made
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(folder), str(clone))
    run(clone, "git", "checkout", "-q", "v1")
    with pytest.raises(StateError, match="the cache lacks") as err:
        restore_state(clone)
    assert "dvc fetch" in str(err.value)
    with pytest.raises(StateError, match="the cache lacks") as err:
        compare_states("v1", "v2", clone)
    assert "store" in str(err.value)
    run(clone, "dvc", "fetch", "-q", "--all-tags")
    restore_state(clone)
    assert (clone / "results/model/net.txt").read_text() == "net 1\n"
    run(clone, "git", "checkout", "-q", "v2")
    restore_state(clone)
    here, there = (
        {p.name: p.read_bytes() for p in (f / "results").rglob("*") if p.is_file()}
        for f in (folder, clone)
    )
    assert here == there


def test_the_raster_and_the_table_of_changes(made: tuple[Path, list[str]], tmp_path) -> None:
    folder, _ = made
    found = compare_states("v1", "v2", folder, tmp_path)
    truth = row_areas_m2(GRID)[1:].sum() * 6 / 1e4
    assert found.difference is not None
    assert found.difference.aligned
    assert found.difference.pairs_ha["water", "forest"] == pytest.approx(truth, rel=1e-12)
    assert found.difference.changed_ha == pytest.approx(truth, rel=1e-12)
    total = row_areas_m2(GRID).sum() * 60 / 1e4
    assert found.difference.compared_ha + found.difference.unknown_ha == pytest.approx(total)
    with rasterio.open(tmp_path / "change.tif") as src:
        before, after = src.read()
    assert (before[0] == 255).all()
    expected = np.zeros((39, 60))
    expected[:, :6] = 1
    assert (before[1:] == expected).all()
    assert (after[1:] == 2 * expected).all()
    assert json.loads((tmp_path / "compare.json").read_text())["scores"]["model.iou"] == [0.5, 0.625]
    assert (tmp_path / "change.csv").read_text().startswith("before,after,area_ha\n")
    assert run(folder, "git", "status", "--porcelain") == ""


def test_the_present_state_compares_with_a_release(project: Path) -> None:
    make_results(project, seed=2, strip=6, iou=0.5, model={"members": 3})
    text = text_of(compare_states("v2", "WORK", project))
    assert "| model.iou | 0.625 | 0.5 | -0.125 |" in text
    assert "- scenes: the same bytes" in text
    assert "- model: other" in text, "what lies here counts, not what dvc.lock says"
    assert "0.0 ha of" in text


@pytest.mark.slow
def test_what_a_release_refuses(project: Path) -> None:
    for bad in ("a b", "-x", "a/b", "v1..v2"):
        with pytest.raises(StateError, match="cannot be the name"):
            release(bad, project)
    with pytest.raises(StateError, match="there already"):
        release("v1", project)
    (project / "notes.txt").write_text("x")
    with pytest.raises(StateError, match="not committed: notes.txt"):
        release("v3", project)
    (project / "notes.txt").unlink()
    make_results(project, seed=3)
    shutil.rmtree(project.parent / "store", ignore_errors=True)
    run(project, "dvc", "remote", "modify", "store", "url", "/proc/nowhere")
    run(project, "git", "commit", "-qam", "another remote")
    with pytest.raises(StateError, match="nothing is tagged") as err:
        release("v3", project)
    assert "--no-push" in str(err.value)
    assert run(project, "git", "tag").split() == ["v1", "v2"]
    head = run(project, "git", "rev-parse", "HEAD")
    release("v3", project, push=False)  # goes on where it stopped
    assert run(project, "git", "rev-parse", "v3^{commit}") == head


@pytest.mark.parametrize("name", ["v9", "main~99", "--help", "v1:dvc.lock"])
def test_an_unknown_state_is_named(made: tuple[Path, list[str]], name: str) -> None:
    with pytest.raises(StateError, match="no tag or commit") as err:
        compare_states(name, "v2", made[0])
    assert "v1, v2" in str(err.value)


@pytest.mark.slow
def test_a_missing_object_is_named_with_its_remote(project: Path) -> None:
    listed = run(project, "git", "show", "v1:dvc.lock")
    model = listed.split("path: results/model\n")[1].split("md5: ")[1].split("\n")[0]
    (project / ".dvc/cache/files/md5" / model[:2] / model[2:]).unlink()
    with pytest.raises(StateError, match="results/model") as err:
        compare_states("v1", "v2", project)
    assert "store (" in str(err.value)


@pytest.mark.slow
def test_the_model_of_a_release_is_pinned(project: Path) -> None:
    said = pin_model("v1", project)
    assert "model: v1" in said
    assert (project / "results/model/net.txt").read_text() == "net 1\n"
    data = read_yaml(ROOT / "config/campaigns/havel.yaml")
    campaign = parse_campaign(data | {"milestones": {"model": "v1"}}, where="test")
    check_pinned(campaign, project)
    assert compare_states("v1", "WORK", project).milestones["model"] is True
    forget_pin(campaign, project)
    assert (project / "results/model/pinned.json").exists()
    pin_model("v2", project)  # what lies there is the model of v1: recorded
    with pytest.raises(ConfigError, match="of release v2") as err:
        check_pinned(campaign, project)
    assert "terraloom pin model v1" in str(err.value)
    forget_pin(parse_campaign(data, where="test"), project)
    assert not (project / "results/model/pinned.json").exists(), "a model built again is no release"


def test_a_model_that_was_never_recorded_is_not_replaced(project: Path) -> None:
    (project / "results/model/net.txt").unlink()
    (project / "results/model/net.txt").write_text("new\n")
    with pytest.raises(StateError, match="results/model/net.txt"):
        pin_model("v1", project)
    assert (project / "results/model/net.txt").read_text() == "new\n"
    assert not list((project / "results").glob(".tmp*"))


@pytest.mark.slow
def test_two_campaigns_share_a_cache_and_nothing_else(committer: None, tmp_path: Path) -> None:
    one = make_project(tmp_path / "one", cache=tmp_path / "cache")
    make_results(one, seed=1)
    release("north-1", one)
    two = tmp_path / "two"
    run(one, "git", "worktree", "add", "-q", "-b", "south", str(two))
    make_results(two, seed=2, strip=6)
    release("south-1", two)
    assert (one / "results/model/net.txt").read_text() == "net 1\n"
    run(one, "dvc", "status", "-q")
    run(two, "dvc", "status", "-q")
    restore_state(one)
    restore_state(two)
    assert (two / "results/model/net.txt").read_text() == "net 2\n"
    assert compare_states("north-1", "south-1", two).milestones == {
        "scenes": True, "chips": True, "model": False, "map": False,
    }  # fmt: skip


@pytest.mark.slow
def test_the_doctor_finds_the_traps(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def how(what: str) -> list[str]:
        return [f.how for f in examine(project) if f.what == what]

    assert not [f for f in examine(project) if f.how == "wrong" and f.what != "SLURM"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    run(project, "dvc", "config", "cache.type", "hardlink,copy")
    assert how("cache") == ["wrong"]
    assert how("shared cache") == []
    common = project.parent / "common"
    run(project, "dvc", "config", "--local", "cache.dir", str(common))
    assert how("shared cache") == ["wrong"]
    common.mkdir()
    assert how("shared cache") == ["good"]
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert how("shared cache") == ["note"]
    run(project, "dvc", "config", "cache.shared", "group")
    assert how("shared cache") == ["good"]
    run(project, "dvc", "config", "--local", "--unset", "cache.dir")
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("persist: true", "persist: false", 1))
    assert how("DVC outputs") == ["wrong"]
    run(project, "dvc", "remote", "add", "-q", "open", "ssh://me:pa55word@store.example.org/maps")
    assert "ssh://me:***@store.example.org/maps" in doctor.text_of(examine(project))
    assert "pa55word" not in doctor.text_of(examine(project))
    run(project, "dvc", "remote", "remove", "-q", "open")
    run(project, "dvc", "remote", "add", "-q", "late", "/tmp/late")
    run(project, "dvc", "remote", "remove", "-q", "store")
    late = [f for f in examine(project) if f.what == "remotes" and f.how == "wrong"]
    assert "v1, v2" in late[0].said
    shutil.rmtree(project / ".git")
    assert how("git") == ["wrong"]
