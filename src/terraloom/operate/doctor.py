"""Is this place fit for runs, and for going back to them: what is wrong, and what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import yaml

from terraloom.errors import StateError
from terraloom.operate.cluster import read_cluster
from terraloom.operate.provenance import check_format
from terraloom.operate.stored import MILESTONES, call_dvc, git, remotes, tags_with_results

__all__ = ["Finding", "examine", "text_of"]

#: Less free disk than this is worth a word, bytes.
_LITTLE = 5 * 10**9
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What it is.
        how: good; worth a word; or wrong: something will be lost or will fail.
        said: What was found.
        fix: What to do; empty where it is good.
    """

    what: str
    how: Literal["good", "note", "wrong"]
    said: str
    fix: str = ""


def examine(run_dir: Path = Path()) -> list[Finding]:
    """Look at all that makes runs fail or states be lost.

    Args:
        run_dir: Folder of the project.

    Returns:
        One finding or more per matter. What cannot be asked is a finding too; nothing is raised.
    """
    checks: tuple[tuple[str, Callable[[Path], Iterable[Finding]]], ...] = (
        ("Snakemake", _snakemake), ("git", _git), ("DVC outputs", _outputs), ("cache", _cache),
        ("shared cache", _shared_cache), ("remotes", _remotes), ("disk", _disk),
        ("threads", _threads), ("SLURM", _slurm),
    )  # fmt: skip
    found = []
    for what, check in checks:
        try:
            found += list(check(run_dir))
        except (StateError, OSError) as err:
            fix = err.fix if isinstance(err, StateError) else ""
            said = err.found if isinstance(err, StateError) else str(err)
            found.append(Finding(what, "wrong", said, fix))
    return found


def text_of(findings: Iterable[Finding]) -> str:
    """Findings as lines, with what to do below each."""
    mark = {"good": "ok   ", "note": "note ", "wrong": "WRONG"}
    lines = []
    for f in findings:
        lines.append(f"{mark[f.how]}  {f.what}: {f.said}")
        if f.fix:
            lines.append(f"       to do: {f.fix}")
    return "\n".join(lines)


def _snakemake(run_dir: Path) -> Iterator[Finding]:
    check_format()
    yield Finding("Snakemake", "good", f"{metadata.version('snakemake')}, its records are known")


def _git(run_dir: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", "wrong", "not installed", "install git")
        return
    try:
        changed = git(run_dir, "status", "--porcelain").splitlines()
    except StateError:
        yield Finding("git", "wrong", "not a repository", "git init, or work in a clone")
        return
    if changed:
        yield Finding("git", "note", f"{len(changed)} files are not committed",
                      "a release wants all committed")  # fmt: skip
    else:
        yield Finding("git", "good", "everything is committed")


def _outputs(run_dir: Path) -> Iterator[Finding]:
    path = run_dir / "dvc.yaml"
    if not path.is_file():
        yield Finding("DVC outputs", "wrong", "there is no dvc.yaml here",
                      "go to the project folder")  # fmt: skip
        return
    stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages") or {}
    kept: dict[str, bool] = {}
    for stage in stages.values():
        for out in stage.get("outs") or ():
            entry = out if isinstance(out, dict) else {out: {}}
            kept |= {name: bool((how or {}).get("persist")) for name, how in entry.items()}
    absent = [f"results/{m}" for m in MILESTONES if f"results/{m}" not in kept]
    loose = [name for name, persist in kept.items() if not persist]
    if absent:
        yield Finding("DVC outputs", "wrong", f"dvc.yaml lacks {', '.join(absent)}",
                      "git checkout dvc.yaml: one stage per milestone")  # fmt: skip
    if loose:
        yield Finding(
            "DVC outputs", "wrong",
            f"without `persist`: {', '.join(loose)}; dvc repro deletes them before it runs, and "
            "Snakemake does not make missing intermediates again",
            "`persist: true` below each output in dvc.yaml",
        )  # fmt: skip
    if not absent and not loose:
        yield Finding("DVC outputs", "good", f"{len(kept)} milestones, all persistent")


def _setting(run_dir: Path, key: str) -> str:
    """A setting of DVC; empty where it is not set, which DVC calls an error."""
    try:
        return call_dvc(run_dir, "config", key).strip()
    except StateError:
        return ""


def _cache(run_dir: Path) -> Iterator[Finding]:
    types = _setting(run_dir, "cache.type")  # not set: reflink, copy
    first = types.split(",")
    risky = [t for t in ("hardlink", "symlink") if t in first]
    if "hardlink" in risky and os.geteuid() == 0:
        yield Finding(
            "cache", "wrong",
            "linked with hardlinks as root: a program that writes in place changes the cache, "
            "and the damage comes back at every restore",
            "dvc config cache.type reflink,copy; then terraloom state verify",
        )  # fmt: skip
    elif "symlink" in risky:
        yield Finding("cache", "note", "linked with symlinks: time stamps of results are the "
                      "cache's", "dvc config cache.type reflink,copy")  # fmt: skip
    else:
        yield Finding("cache", "good", f"cache.type is {types or 'reflink,copy'}")


def _shared_cache(run_dir: Path) -> Iterator[Finding]:
    """A cache outside the project, which other worktrees or users share."""
    folder = (run_dir / call_dvc(run_dir, "cache", "dir").strip()).resolve()
    if folder.is_relative_to(run_dir.resolve()):
        return
    group = _setting(run_dir, "cache.shared") == "group"
    if not folder.is_dir():
        yield Finding("shared cache", "wrong", f"there is no folder {folder}",
                      "make it, mount its disk, or dvc cache dir FOLDER")  # fmt: skip
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("shared cache", "wrong", f"{folder} cannot be written by you",
                      "ask its owner for the rights of its group")  # fmt: skip
    elif folder.stat().st_uid != os.geteuid() and not group:
        yield Finding("shared cache", "note", f"{folder} belongs to another user, and what you add "
                      "is yours alone", "dvc config cache.shared group")  # fmt: skip
    else:
        yield Finding("shared cache", "good", f"{folder}")


def _remotes(run_dir: Path) -> Iterator[Finding]:
    known = remotes(run_dir)
    if not known:
        yield Finding("remotes", "note", "none: results are in this cache only",
                      "dvc remote add -d NAME ADDRESS, then dvc push")  # fmt: skip
        return
    yield Finding("remotes", "good", ", ".join(f"{n} ({u})" for n, u in known.items()))
    everywhere = _outside_git(run_dir)
    late = [
        tag for tag, _, _ in tags_with_results(run_dir)
        if not everywhere and not any(f'remote "{n}"' in _config_at(run_dir, tag) for n in known)
    ]  # fmt: skip
    if late:
        yield Finding(
            "remotes", "wrong",
            f"set after these releases: {', '.join(late)}; `dvc push --all-tags` leaves out what "
            "only they hold, without an error",
            "dvc remote add --local NAME ADDRESS (it holds for all tags), then dvc push --all-tags",
        )  # fmt: skip


def _outside_git(run_dir: Path) -> bool:
    """Whether the address of a remote is set outside git, so that it holds for all tags."""
    listed = (call_dvc(run_dir, "config", "--list", f"--{level}") for level in ("local", "global"))
    lines = "\n".join(listed).splitlines()
    return any(line.startswith("remote.") and ".url=" in line for line in lines)


def _config_at(run_dir: Path, tag: str) -> str:
    try:
        return git(run_dir, "show", f"refs/tags/{tag}:./.dvc/config")
    except StateError:
        return ""  # DVC came later


def _disk(run_dir: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(run_dir).free
    said = f"{free / 1e9:.1f} GB free"
    fix = "free space, or link work/ to another disk; `dvc gc` removes old objects"
    yield Finding("disk", "note" if free < _LITTLE else "good", said, fix if free < _LITTLE else "")


def _threads(run_dir: Path) -> Iterator[Finding]:
    unset = [name for name in _THREADS[:2] if name not in os.environ]
    if unset:
        yield Finding(
            "threads", "note",
            f"{', '.join(unset)} not set: each job may start one thread per core",
            f"export {' '.join(f'{n}=1' for n in unset)}",
        )  # fmt: skip
    else:
        yield Finding("threads", "good", "libraries keep to one thread per job")


def _slurm(run_dir: Path) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("SLURM", "good", "not a cluster: no sbatch here")
        return
    cluster = read_cluster()
    yield Finding("SLURM", "good", f"answers; partitions {', '.join(cluster.partitions)}")
