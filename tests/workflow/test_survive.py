"""A machine that fails: no room, no right to write, no memory, another run, a commit cut short."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr
import yaml
from affine import Affine
from odc.geo.geobox import GeoBox

from support.states import ENV, run
from support.chaos import finished_jobs, kill_tree, leftovers, said, session, start
from support.road import BIN, REHEARSAL, ROOT, command, put_stand_ins, snakemake
from terraloom import cli
from terraloom.io import sha256, write_raster, write_store, write_text
from terraloom.operate.versions import PROVENANCE, verify_state

BOX = GeoBox((512, 512), Affine(10, 0, 0, 0, -10, 0), "EPSG:32633")
NOISE = np.random.default_rng(1).integers(0, 65535, (3, *BOX.shape), dtype=np.uint16)


def mount(folder: Path, *options: str) -> None:
    """Mount a small disk on a folder; skips the test where that is refused."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=1m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def text(path: Path, px: int) -> None:
    write_text(path, "x" * 6 * px * px)


def raster(path: Path, px: int) -> None:
    write_raster(path.with_suffix(".tif"), NOISE[:, :px, :px], BOX[:px, :px])


def store(path: Path, px: int) -> None:
    write_store(path, xr.Dataset({"a": (("b", "y", "x"), NOISE[:, :px, :px])}))


@pytest.mark.parametrize("write", [text, raster, store])
def test_a_real_disk_that_is_full(disk: Path, write: Callable[[Path, int], None]) -> None:
    """What was finished stays, nothing half-written does, and with room it goes on."""
    write(disk / "work" / "first", 64)
    before = {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="No space left") as err:
        write(disk / "work" / "second", 512)
    assert err.value.errno == errno.ENOSPC
    assert {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()} == before
    assert leftovers(disk) == []
    write(disk / "work" / "second", 64)
    assert len(list((disk / "work").iterdir())) == 2


def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a verb says that ends with an error that a person can put right."""
    monkeypatch.setattr("terraloom.log.configure", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["terraloom", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_disk_that_cannot_be_written(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "README.md").write_text("as it was")
    mount(disk, "remount", "ro")
    told = ends(monkeypatch, capsys, "schema", "--folder", str(disk))
    assert "cannot be written or read here (Read-only file system)" in told
    assert "to do: run in a folder of your own" in told and "Traceback" not in told
    assert (disk / "README.md").read_text() == "as it was"


def much_of_numpy() -> object:
    return np.ones(1 << 50)


def much_of_torch() -> object:
    import torch

    return torch.ones(1 << 50)


@pytest.mark.parametrize("allocate", [much_of_numpy, much_of_torch])
def test_not_enough_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    allocate: Callable[[], object],
) -> None:  # fmt: skip
    monkeypatch.setattr("terraloom.check.check_campaign", lambda *_, **__: allocate())
    told = ends(monkeypatch, capsys, "check", "campaign.yaml")
    assert "there is not enough memory" in told and "--cores" in told


# --- runs on stand-ins of all verbs --------------------------------------------------------------

KEYS = ("model={members: 1}", "folds={count: 3}")
TARGET = "results/chips/labels.json"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def worker(leader: int, verb: str) -> psutil.Process | None:
    """The process of a verb in a session."""
    for p in session(leader):
        try:
            if verb in p.cmdline():
                return p
        except psutil.NoSuchProcess:
            continue
    return None


@pytest.mark.slow
def test_a_second_run_a_kill_and_a_worker_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    place = str(put_stand_ins(folder, {}, campaign=REHEARSAL, keys=KEYS))
    monkeypatch.setenv("STAND_IN_S", "60")
    first = start(folder, TARGET, "--cores", "1", keys=KEYS, before=place)
    wait_for(lambda: list(folder.glob("resources/simulated/.tmp-*")), "the first job")
    second = snakemake(
        folder, TARGET, "--cores", "1", campaign=REHEARSAL, keys=KEYS, ok=False, before=place
    )
    assert f"a run is under way here: process {first.pid} of" in second
    assert "Do not unlock" in second and "Directory cannot be locked" in second
    assert "running for" in command("terraloom", "status", cwd=folder).stdout

    kill_tree(first)
    assert "killed after" in (shown := command("terraloom", "status", cwd=folder).stdout)
    assert "interrupted: simulate" in shown and leftovers(folder)
    done = finished_jobs(folder)
    monkeypatch.setenv("STAND_IN_S", "0.1")
    third = snakemake(folder, "--unlock", campaign=REHEARSAL, keys=KEYS)
    assert "the run before was killed" in third

    # One worker is ended as the kernel does it when memory is short.
    monkeypatch.setenv("STAND_IN_S", "60")
    fourth = start(folder, TARGET, "--cores", "1", keys=KEYS, before=place)
    wait_for(lambda: worker(fourth.pid, "simulate"), "its first job")
    assert (doomed := worker(fourth.pid, "simulate"))
    doomed.send_signal(signal.SIGKILL)
    assert fourth.wait(300) == 1, said(folder)
    shown = command("terraloom", "status", cwd=folder).stdout
    assert "failed after" in shown and "FAILED simulate" in shown and "out of memory?" in shown
    assert leftovers(folder) == []

    monkeypatch.setenv("STAND_IN_S", "0")
    options = {"campaign": REHEARSAL, "keys": KEYS}
    snakemake(folder, TARGET, "--cores", "1", before=place, **options)  # type: ignore[arg-type]
    assert all(finished_jobs(folder).get(o) == when for o, when in done.items())
    assert leftovers(folder) == []
    plan = snakemake(folder, TARGET, "-n", **options)  # type: ignore[arg-type]
    assert "Nothing to be done" in plan


# --- DVC -----------------------------------------------------------------------------------------

FILES = 400


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose map has many files, with DVC's settings of this one; nothing committed."""
    folder = tmp_path / "project"
    (folder / "results/map").mkdir(parents=True)
    stages = {"map": {"cmd": "true", "outs": [{"results/map": {"persist": True}}]}}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (folder / ".gitignore").write_text("/results/\n")
    dice = np.random.default_rng(5)
    for n in range(FILES):
        (folder / f"results/map/{n:04d}.tif").write_bytes(dice.bytes(100_000))
    (folder / "results/map" / PROVENANCE).touch()
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in (folder / "results/map").iterdir()}


@pytest.mark.slow
def test_a_commit_of_dvc_that_is_killed_is_done_again(project: Path) -> None:
    before = contents(project)
    process = subprocess.Popen(
        ["dvc", "commit", "-q", "-f"], cwd=project, env=ENV, start_new_session=True
    )
    stored = project / ".dvc/cache/files"
    wait_for(lambda: sum(p.is_file() for p in stored.rglob("*")) > FILES // 8, "some are stored")
    assert process.poll() is None, "it was too quick"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert contents(project) == before
    run(project, "dvc", "commit", "-q", "-f")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-q", "-m", "state")
    assert "up to date" in run(project, "dvc", "status")
    assert f"{FILES + 1} files" in verify_state(project)
    assert leftovers(project) == []
    shutil.rmtree(project / "results")
    run(project, "dvc", "checkout", "-q")
    assert contents(project) == before


@pytest.mark.slow
def test_results_on_a_disk_without_links_to_the_cache(project: Path, tmp_path: Path) -> None:
    """Neither hard links nor copies on write reach another disk: the files are copied."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mount(cache, "size=100m")
    try:
        run(project, "dvc", "cache", "dir", str(cache))
        before = contents(project)
        run(project, "dvc", "commit", "-q", "-f")
        (project / "results/map/0000.tif").write_bytes(b"spoilt")
        shutil.rmtree(project / "results")
        run(project, "dvc", "checkout", "-q")
        assert contents(project) == before
        assert all(p.stat().st_nlink == 1 for p in (project / "results/map").iterdir())
        assert f"{FILES + 1} files" in verify_state(project)
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)
