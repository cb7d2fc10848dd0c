"""A toy project with the folders of a campaign, under git and DVC, and releases of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from affine import Affine
from odc.geo.geobox import GeoBox

from terraloom.io import write_json, write_raster, write_text
from terraloom.operate.provenance import MILESTONES, RECORD_FORMAT, _record_path

BIN = Path(sys.executable).parent
ENV = {
    **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org",
}  # fmt: skip
OUTS = {m: {"cmd": "true", "outs": [{f"results/{m}": {"persist": True}}]} for m in MILESTONES}
GRID = GeoBox((40, 60), Affine(10, 0, 399960, 0, -10, 5800020), "EPSG:32633")
NAMES = {1: "water", 2: "forest", 3: "farm"}


def run(folder: Path, *words: str, ok: bool = True, **more: str) -> str:
    """Output of a command in a folder, both streams."""
    done = subprocess.run(
        words, cwd=folder, env=ENV | more, capture_output=True, text=True, check=False
    )
    assert not ok or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def make_project(folder: Path, *, cache: Path | None = None) -> Path:
    """Empty project: git, DVC, one commit."""
    folder.mkdir(parents=True)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": OUTS}))
    (folder / ".gitignore").write_text("/.snakemake/\n/work/\n/resources/\n/results/\n")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    if cache is not None:
        run(folder, "dvc", "cache", "dir", str(cache))
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "project")
    return folder


def make_results(
    folder: Path, *, seed: int = 0, strip: int = 0, iou: float = 0.5, **keys: Any
) -> None:
    """Results of a run with records of Snakemake for them, without running anything.

    Args:
        folder: The project.
        seed: What the model holds.
        strip: Columns of water that become forest.
        iou: A score.
        keys: Campaign keys.
    """
    results = folder / "results"
    codes = np.full(GRID.shape, 3, np.uint8)
    codes[:, :30] = 1
    codes[:, :strip] = 2
    codes[0] = 0
    write_raster(results / "map/class_map.tif", codes, GRID, nodata=0)
    legend = [{"code": c, "name": n} for c, n in NAMES.items()]
    write_json(results / "map/map.json", {"legend": legend})
    write_text(
        results / "map/areas.csv",
        "code,name,area_ha,low_ha,high_ha,map_area_ha,status\n"
        f"1,water,{11.5 - strip / 4},11,13,12,x\n",
    )
    write_json(results / "map/metrics.json", {"valid_pct": 97.5})
    write_json(results / "model/metrics.json", {"iou": iou})
    write_text(results / "model/net.txt", f"net {seed}\n")
    write_text(results / "chips/chips.zip", "chips\n")
    write_text(results / "scenes/items.json", "{}\n")
    write_text(folder / "work/campaign.yaml", yaml.safe_dump({"name": "toy", "seed": seed, **keys}))
    records = folder / ".snakemake/metadata"
    records.mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in results.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name in ("provenance.jsonl", "campaign.yaml", "pinned.json"):
            continue
        late = "/model/" in name or "/map/" in name
        record = {
            "record_format_version": RECORD_FORMAT, "rule": path.stem, "input": [], "params": [],
            "shellcmd": f"make {name} {seed if late else 0}", "log": [], "input_checksums": {},
            "starttime": 1.0, "endtime": 2.0, "incomplete": False,
        }  # fmt: skip
        _record_path(records, name).write_text(json.dumps(record))
