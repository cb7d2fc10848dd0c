"""The workflow as a person starts it, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from terraloom.scratch import host_name

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HAVEL, REHEARSAL = "config/campaigns/havel.yaml", "config/campaigns/rehearsal.yaml"
#: Settings that make a run of the real campaign as small as it can be.
TINY = ("model={members: 1, epochs: 1}",)


def command(
    *words: str, cwd: Path = ROOT, ok: bool = True, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment of the tests, one thread per library.

    Programs in the folder ``before`` are found first.
    """
    env = os.environ | {
        "PATH": os.pathsep.join([*filter(None, [before]), str(BIN), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def snakemake(
    folder: Path, *words: str, campaign: str = HAVEL, keys: tuple[str, ...] = (), ok: bool = True,
    before: str = "",
) -> str:  # fmt: skip
    """Output of Snakemake for a campaign that runs in a folder."""
    config = ["--config", f"campaign={campaign}", *keys]
    done = command("snakemake", *words, "--directory", str(folder), *config, ok=ok, before=before)
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


#: Stands in for every verb: writes the outputs of the rule, as the summary lists them.
_STAND_IN = """#!{python}
import json, os, pathlib, sys, time
verb, words = sys.argv[1], sys.argv[2:]
here = pathlib.Path({folder!r})
chosen = [w for o, w in zip(words, words[1:]) if o in ("--batch", "--period", "--part", "--fold")]
for name, rule in json.loads((here / "outputs.json").read_text()).items():
    parts = name.replace(".", "/").replace("fold-", "").split("/")
    parts = parts + [p for part in parts for p in part.split("-")]
    if rule == verb.replace("-", "_") and all(c in parts for c in chosen):
        made = pathlib.Path(name)
        made.parent.mkdir(parents=True, exist_ok=True)
        kept = here / "kept" / pathlib.Path(name).name
        text = kept.read_text() if kept.exists() else name
        if "--stamp" in words:
            text = json.dumps({{"stamp": words[words.index("--stamp") + 1]}})
        temporary = made.with_name(f".tmp-{{os.getpid()}}@{host}-x")
        temporary.write_text(text)
        time.sleep(float(os.environ.get("STAND_IN_S", "0")))
        temporary.rename(made)
"""


def run_stand_ins(folder: Path, kept: dict[str, str], **options: object) -> None:
    """Run a campaign with stand-ins for all verbs, so that Snakemake records every job.

    Args:
        folder: Folder of the run.
        kept: Name of an output: the text it gets.
        **options: Of :func:`snakemake`.
    """
    place = put_stand_ins(folder, kept, **options)
    snakemake(folder, "all", "--cores", "2", before=str(place), **options)  # type: ignore[arg-type]


def put_stand_ins(folder: Path, kept: dict[str, str], **options: object) -> Path:
    """Make stand-ins for all verbs; the folder they are in.

    Each takes ``STAND_IN_S`` seconds (of the environment) for an output, under a temporary name.
    """
    place = folder / "stand-in"
    (place / "kept").mkdir(parents=True, exist_ok=True)
    summary = snakemake(folder, "all", "--summary", **options)  # type: ignore[arg-type]
    rows = [line.split("\t") for line in summary.splitlines() if "\t" in line]
    outputs = {row[0]: row[2] for row in rows if "/" in row[0]}
    (place / "outputs.json").write_text(json.dumps(outputs))
    for name, text in kept.items():
        (place / "kept" / name).write_text(text)
    program = place / "terraloom"
    program.write_text(_STAND_IN.format(python=sys.executable, folder=str(place), host=host_name()))
    program.chmod(0o755)
    return place
