"""The logs of a tile, a job or a rule, found by its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from terraloom.errors import StateError
from terraloom.operate.record import read_run

__all__ = ["find_logs", "show_logs"]


def find_logs(word: str, folder: Path = Path()) -> list[Path]:
    """Log files of the jobs that a word names, in the order of the plan.

    Args:
        word: A rule (``build_cube``), a tile (``x003y001``), a job of tiles (``b0002``), or
            another wildcard of a job (``0-1``: fold 0, member 1; ``spring``).
        folder: Folder of the run.

    Returns:
        Paths from the folder; some may not be there yet.

    Raises:
        StateError: No run is recorded here, or no job has that name.
    """
    run = read_run(folder)
    of_tiles = [job for job, tiles in run["tiles"].items() if word in tiles]
    rule = word.replace("-", "_")
    found = [
        Path(path)
        for job in run["jobs"]
        if rule == job["rule"] or word in _names(job) or job["name"] in of_tiles
        for path in job["log"]
    ]
    if not found:
        known = {n for job in run["jobs"] for n in (job["rule"], *_names(job)) if n}
        known |= {tile for tiles in run["tiles"].values() for tile in tiles}
        near = difflib.get_close_matches(word, sorted(known), n=3)
        rules = dict.fromkeys(job["rule"] for job in run["jobs"])
        raise StateError(
            f"no job of the last run is named {word}", where="terraloom logs",
            allowed=f"a tile or one of {', '.join(rules)}",
            fix=f"did you mean {' or '.join(near)}?" if near else "terraloom status",
        )  # fmt: skip
    return list(dict.fromkeys(found))


def _names(job: Mapping[str, Any]) -> set[str]:
    name: str = job["name"]
    return {name, *name.split("-")} - {""}


def show_logs(word: str, folder: Path = Path(), *, lines: int = 40) -> str:
    """The last lines of each log that a word names, under its path.

    Args:
        word: As of :func:`find_logs`.
        folder: Folder of the run.
        lines: Most lines per log; 0 for all.
    """
    tiles = {tile for of_job in read_run(folder)["tiles"].values() for tile in of_job}
    parts = []
    for path in find_logs(word, folder):
        if not (folder / path).exists():
            parts.append(f"==> {path.as_posix()}: not written yet")
            continue
        text = (folder / path).read_text(encoding="utf-8", errors="replace").splitlines()
        shown = text[-lines:] if lines else text
        if word in tiles:  # what is about the tile may stand far above the end
            above = text[: len(text) - len(shown)]
            shown = [*(line for line in above if word in line), *shown]
        parts.append("\n".join([f"==> {path.as_posix()} ({len(text)} lines)", *shown]))
    return "\n\n".join(parts)
