"""What git and DVC hold: outputs of a commit, objects of the cache, tags, remotes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from terraloom.errors import StateError
from terraloom.log import hide_secrets
from terraloom.origin import PINNED
from terraloom.plan import SUFFIXES

__all__ = [
    "CAMPAIGN", "LOCK", "MILESTONES", "NEW", "PROVENANCE", "WORK", "Recorded", "cache_folder",
    "call_dvc", "check_objects", "files_of", "git", "locked_outs", "md5_of", "object_path",
    "open_state", "outs_at", "outs_of", "present_state", "remotes", "tags_with_results",
    "unsaved", "where_else",
]  # fmt: skip

#: Milestones in the order in which they are made.
MILESTONES = ("scenes", "chips", "model", "map")
#: Name of the file with Snakemake's records, in the folder of a milestone.
PROVENANCE = "provenance.jsonl"
#: Name of the campaign as it ran, in the folder of the map.
CAMPAIGN = "campaign.yaml"
LOCK = "dvc.lock"
#: The files that lie in the folder now, not those of a commit.
WORK = "WORK"
#: Instead of an object: other bytes than those recorded.
NEW = "new"
_INDEXES = tuple(suffix for suffix in SUFFIXES if suffix != ".tif")
_SHOWN = 5


def call_dvc(run_dir: Path, *words: str) -> str:
    """Run DVC of this environment and give what it printed.

    Raises:
        StateError: DVC is not installed, or it refused; the message says why.
    """
    program = shutil.which("dvc", path=str(Path(sys.executable).parent)) or shutil.which("dvc")
    if program is None:
        raise StateError("DVC is not installed", fix="pip install 'terraloom[dvc]'")
    done = subprocess.run(
        [program, *words], cwd=run_dir, capture_output=True, text=True, check=False,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if line.strip())
        fix = "see https://dvc.org/doc/user-guide/troubleshooting"
        if "--force" in said:
            fix = (
                "these files were never committed, so nothing was touched; to keep them: "
                "go back (git checkout -), terraloom state save, dvc commit -f; else delete them"
            )
        elif "missing-files" in said or "cache" in said:
            fix = "fetch the objects from a remote (dvc fetch), then again"
        raise StateError(f"dvc {' '.join(words)}: {said}", where=str(run_dir), fix=fix)
    return done.stdout


def locked_outs(run_dir: Path) -> dict[str, str]:
    """Object name (MD5, folders end in ``.dir``) of each output in ``dvc.lock``.

    Raises:
        StateError: There is no ``dvc.lock`` or it is not readable.
    """
    path = run_dir / LOCK
    if not path.exists():
        raise StateError(
            "no results are recorded here", where=str(path),
            fix="run this in the project folder at a commit with results; to record the present "
            "ones: terraloom state save && dvc commit -f",
        )  # fmt: skip
    try:
        return outs_of(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as err:
        raise StateError(
            "not a lock file of DVC 3", where=str(path), fix="git checkout dvc.lock"
        ) from err


def outs_of(text: str) -> dict[str, str]:
    """Object name of each output in the text of a ``dvc.lock``, milestones in their order."""
    stages = (yaml.safe_load(text) or {}).get("stages") or {}
    outs = {o["path"]: o["md5"] for s in stages.values() for o in s.get("outs") or ()}
    order = {f"results/{m}": i for i, m in enumerate(MILESTONES)}
    return dict(sorted(outs.items(), key=lambda out: (order.get(out[0], len(order)), out[0])))


def tags_with_results(run_dir: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Name, date with subject, and locked outputs of each tag with results, oldest first."""
    form = "--format=%(refname:short)%09%(creatordate:short)  %(subject)"
    for line in git(run_dir, "for-each-ref", "--sort=creatordate", form, "refs/tags").splitlines():
        tag, text = line.split("\t", 1)
        try:
            locked = outs_of(git(run_dir, "show", f"refs/tags/{tag}:./{LOCK}"))
        except (StateError, yaml.YAMLError, KeyError, AttributeError, TypeError):
            continue  # a tag from before the first results
        if locked:
            yield tag, text.strip(), locked


def git(run_dir: Path, *words: str) -> str:
    """Run git and give what it printed.

    Raises:
        StateError: It refused; the message says why.
    """
    done = subprocess.run(
        ["git", *words], cwd=run_dir, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        raise StateError(f"git {words[0]}: {done.stderr.strip()}", where=str(run_dir))
    return done.stdout


def cache_folder(run_dir: Path) -> Path:
    """Folder with the objects; the setting may point to a cache that others share."""
    return run_dir / call_dvc(run_dir, "cache", "dir").strip() / "files" / "md5"


def object_path(cache: Path, md5: str) -> Path:
    """Where an object lies in the cache, whether it is there or not."""
    return cache / md5[:2] / md5[2:]


def files_of(cache: Path, out: str, md5: str) -> dict[str, str] | None:
    """MD5 of each file of an output; None if the cache cannot say."""
    if not md5.endswith(".dir"):
        return {out: md5}
    try:
        listed = json.loads(object_path(cache, md5).read_text(encoding="utf-8"))
        return {f"{out}/{entry['relpath']}": str(entry["md5"]) for entry in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def md5_of(path: Path) -> str:
    """MD5 of a file, as DVC names its objects."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def remotes(run_dir: Path) -> dict[str, str]:
    """Address of each DVC remote, by name, without a password; its other settings hold secrets."""
    found = {}
    for line in call_dvc(run_dir, "config", "--list").splitlines():  # `remote list` breaks lines
        key, _, value = line.partition("=")
        if key.startswith("remote.") and key.endswith(".url"):
            name = key.removeprefix("remote.").removesuffix(".url")
            found[name] = hide_secrets(value)
    return found


def where_else(run_dir: Path) -> str:
    """What to do about an object that the cache lacks."""
    known = ", ".join(f"{name} ({url})" for name, url in remotes(run_dir).items())
    return (
        f"it may be in a remote: {known}; dvc fetch --all-tags" if known
        else "no remote is set here; copy the cache from where it was made, or add the remote it "
        "was pushed to (dvc remote add), then dvc fetch --all-tags"
    )  # fmt: skip


def unsaved(run_dir: Path, out: str) -> list[str]:
    """Files of an output that are in no recorded state: neither in the lock nor in a tag.

    Args:
        run_dir: Folder of the project.
        out: Path of the output, such as ``results/model``.
    """
    here = _files_here(run_dir, out)
    cache, known = cache_folder(run_dir), set()
    for locked in (*(outs for _, _, outs in tags_with_results(run_dir)), _locked_or_none(run_dir)):
        if out in locked:
            known |= set((files_of(cache, out, locked[out]) or {}).items())
    return [name for name, md5 in here.items() if (name, md5) not in known]


def _files_here(run_dir: Path, out: str) -> dict[str, str]:
    files = sorted(p for p in (run_dir / out).rglob("*") if p.is_file())
    return {p.relative_to(run_dir).as_posix(): md5_of(p) for p in files}


def _locked_or_none(run_dir: Path) -> dict[str, str]:
    return locked_outs(run_dir) if (run_dir / LOCK).exists() else {}


@dataclass(frozen=True)
class Recorded:
    """A recorded state whose files can be read without touching the workspace.

    Attributes:
        name: What it was asked for as: a tag, a commit, or WORK.
        folder: Folder that holds ``results/``.
        outs: Object name of each output; of WORK :data:`NEW` where it is not as recorded.
    """

    name: str
    folder: Path
    outs: dict[str, str]

    def json(self, path: str) -> Any:
        """Content of a JSON file below ``results/``; None where the state has none."""
        file = self.folder / "results" / path
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def content(self, milestone: str) -> str | None:
        """What stands for the bytes of a milestone: those of a pinned model are its release's."""
        pinned = self.json(f"{milestone}/{PINNED}")
        return str(pinned["object"]) if pinned else self.outs.get(f"results/{milestone}")

    @property
    def campaign(self) -> dict[str, Any] | None:
        """The campaign as it ran; None where the state was saved without it."""
        files = [self.folder / "results/map" / CAMPAIGN]
        if self.name == WORK:
            files.insert(0, self.folder / "work" / CAMPAIGN)
        file = next((f for f in files if f.is_file()), None)
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file else None


def open_state(run_dir: Path, name: str, into: Path) -> Recorded:
    """Files of a recorded state, as links to the objects of the cache; indexes of tiles as copies.

    Args:
        run_dir: Folder of the project, in a git repository.
        name: A tag or commit; ``WORK`` for the files that lie here now.
        into: Empty folder for the links.

    Raises:
        StateError: No such tag or commit, it has no results, or the cache lacks some of them.
    """
    if name == WORK:
        return present_state(run_dir)
    outs = outs_at(run_dir, name)
    cache = cache_folder(run_dir)
    absent: list[str] = []
    for path, digest in _objects(cache, outs, absent):
        source, link = object_path(cache, digest), into / path
        if not source.is_file():
            absent.append(_object_of(path, digest))
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        # GDAL looks for the tiles of an index beside what a link points to.
        if link.name.endswith(_INDEXES):
            shutil.copyfile(source, link)
        else:
            link.symlink_to(source.resolve())
    if absent:
        raise _lacking(run_dir, f"{name}: {cache}", absent)
    return Recorded(name, into, outs)


def present_state(run_dir: Path) -> Recorded:
    """The results that lie in the folder now; they are hashed, so this takes as long as they."""
    locked, cache = _locked_or_none(run_dir), cache_folder(run_dir)
    outs = {}
    for out in (f"results/{m}" for m in MILESTONES):
        here = _files_here(run_dir, out)
        if here:
            same = out in locked and files_of(cache, out, locked[out]) == here
            outs[out] = locked[out] if same else NEW
    return Recorded(WORK, run_dir, outs)


def check_objects(run_dir: Path, outs: Mapping[str, str]) -> None:
    """Refuse outputs whose objects are neither in the cache nor lie in the folder as recorded.

    Args:
        run_dir: Folder of the project.
        outs: Object name of each output.

    Raises:
        StateError: Names the objects and the remotes that may have them.
    """
    cache = cache_folder(run_dir)
    absent: list[str] = []
    for path, digest in _objects(cache, outs, absent):
        here = run_dir / path
        if not object_path(cache, digest).is_file() and not (
            here.is_file() and md5_of(here) == digest
        ):
            absent.append(_object_of(path, digest))
    if absent:
        raise _lacking(run_dir, str(cache), absent)


def _objects(cache: Path, outs: Mapping[str, str], absent: list[str]) -> Iterator[tuple[str, str]]:
    """Each file of outputs with its object; lists of files that the cache lacks go to absent."""
    for out, md5 in outs.items():
        files = files_of(cache, out, md5)
        if files is None:
            absent.append(_object_of(out, md5, "list of files "))
        yield from (files or {}).items()


def _object_of(path: str, md5: str, what: str = "") -> str:
    return f"{path} ({what}{md5[:2]}/{md5[2:]})"


def _lacking(run_dir: Path, where: str, absent: Sequence[str]) -> StateError:
    more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    return StateError(
        f"the cache lacks {', '.join(absent[:_SHOWN])}{more}", where=where, fix=where_else(run_dir)
    )


def outs_at(run_dir: Path, name: str) -> dict[str, str]:
    """Object name of each output at a tag or commit.

    Raises:
        StateError: No such tag or commit, or one without results.
    """
    try:
        git(run_dir, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except StateError as err:
        known = [tag for tag, _, _ in tags_with_results(run_dir)]
        raise StateError(
            f"no tag or commit `{name}`", where=str(run_dir),
            allowed=", ".join(known) or "no tag holds results yet",
            fix="terraloom state log lists the tags with results; git fetch --tags brings others",
        ) from err  # fmt: skip
    try:
        outs = outs_of(git(run_dir, "show", f"{name}:./{LOCK}"))
    except (StateError, yaml.YAMLError, KeyError, AttributeError, TypeError) as err:
        raise StateError(
            f"`{name}` holds no results", where=f"{name}:{LOCK}",
            allowed=", ".join(tag for tag, _, _ in tags_with_results(run_dir)),
        ) from err  # fmt: skip
    return outs
