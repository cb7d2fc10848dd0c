"""Temporaries of killed processes go, those of living ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from terraloom.io import replace_folder, write_store, write_text
from terraloom.scratch import host_name, prefix, scratch_folder, staging, sweep

WRITER = """
import sys, time
from pathlib import Path
from terraloom.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), "store") as folder:
    (folder / "part").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_swept_and_the_living_one_keeps_its_own(
    tmp_path: Path,
) -> None:
    deep = tmp_path / "work/cube"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(deep)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert sweep([tmp_path]) == [], "it lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = list(deep.iterdir())
    assert len(left) == 1 and f"{process.pid}@{host_name()}" in left[0].name
    write_text(deep / "x000y000.zip", "finished")
    with scratch_folder(deep, "store") as mine:
        assert sweep([tmp_path / "work", tmp_path / "absent"]) == left
        assert mine.is_dir()
    assert [p.name for p in deep.iterdir()] == ["x000y000.zip"]


@pytest.mark.parametrize("name", [".tmp-12@other-node-abc.tif", ".tmp-older-form", ".tmp-cog-x"])
def test_of_other_machines_only_what_nobody_wrote_to_for_days(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("half")
    assert sweep([tmp_path]) == []
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(path, (long_ago, long_ago))
    assert sweep([tmp_path]) == [path]


def test_a_replaced_folder_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for text in ("first", "second"):
        new = tmp_path / f"{prefix('new')}{text}"
        new.mkdir()
        (new / "file").write_text(text)
        replace_folder(new, tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final/file").read_text() == "second"


def test_parts_are_staged_where_a_cluster_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, node = tmp_path / "run", tmp_path / "node"
    for common in ("", "/tmp", "/var/tmp/"):  # not chosen by anybody
        monkeypatch.setenv("TMPDIR", common)
        assert staging(beside) == beside
    monkeypatch.setenv("TMPDIR", str(node))
    seen: list[list[str]] = []
    data = xr.Dataset({"a": ("x", np.arange(3))})
    monkeypatch.setattr(
        "terraloom.io.zip_folder",
        lambda folder, path: seen.append([p.name for p in node.iterdir()]) or write_text(path, ""),
    )
    write_store(beside / "a.zip", data)
    assert len(seen[0]) == 1 and seen[0][0].startswith(prefix("store"))
    assert not list(node.iterdir()) and [p.name for p in beside.iterdir()] == ["a.zip"]
