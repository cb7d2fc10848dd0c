"""The workflow as a person starts it, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HAVEL, REHEARSAL = "config/campaigns/havel.yaml", "config/campaigns/rehearsal.yaml"
#: Settings that make a run of the real campaign as small as it can be.
TINY = ("model={members: 1, epochs: 1}",)


def command(*words: str, cwd: Path = ROOT, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment of the tests, one thread per library."""
    env = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def snakemake(
    folder: Path, *words: str, campaign: str = HAVEL, keys: tuple[str, ...] = (), ok: bool = True
) -> str:
    """Output of Snakemake for a campaign that runs in a folder."""
    config = ["--config", f"campaign={campaign}", *keys]
    done = command("snakemake", *words, "--directory", str(folder), *config, ok=ok)
    return done.stdout + done.stderr


def jobs(text: str) -> dict[str, int]:
    """Jobs per rule, from the statistics a dry run prints."""
    found: dict[str, int] = {}
    for table in re.findall(r"Job stats:\njob +count\n[- ]+\n((?:\w+ +\d+\n)+)", text):
        found = {name: int(n) for name, n in (line.split() for line in table.splitlines())}
    found.pop("total", None)
    return found


def pretend_done(folder: Path, **options: object) -> None:
    """Give every output of a campaign a stand-in and let Snakemake record it as made."""
    summary = snakemake(folder, "all", "--summary", **options)  # type: ignore[arg-type]
    for line in summary.splitlines():
        name = line.split("\t")[0]
        if "\t" in line and "/" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    snakemake(folder, "all", "--touch", "--forceall", **options)  # type: ignore[arg-type]
