"""What DVC and git remember: the locked results, their copies in the cache, and the tags.

DVC trusts a database of its own about its cache. Nothing here does: files are hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from terraloom.errors import StateError

__all__ = [
    "MILESTONES",
    "PROVENANCE",
    "call_dvc",
    "locked_outs",
    "state_log",
    "verify_state",
]

#: Milestones in the order in which they are made.
MILESTONES = ("scenes", "chips", "model", "map")
#: Name of the file with Snakemake's records, in the folder of a milestone.
PROVENANCE = "provenance.jsonl"

_LOCK = "dvc.lock"
_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
_SHOWN = 50


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
    path = run_dir / _LOCK
    if not path.exists():
        raise StateError(
            "no results are recorded here", where=str(path),
            fix="run this in the project folder at a commit with results; to record the present "
            "ones: terraloom state save && dvc commit -f",
        )  # fmt: skip
    try:
        return _outs(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as err:
        raise StateError(
            "not a lock file of DVC 3", where=str(path), fix="git checkout dvc.lock"
        ) from err


def _outs(text: str) -> dict[str, str]:
    stages = (yaml.safe_load(text) or {}).get("stages") or {}
    outs = {o["path"]: o["md5"] for s in stages.values() for o in s.get("outs") or ()}
    order = {f"results/{m}": i for i, m in enumerate(MILESTONES)}
    return dict(sorted(outs.items(), key=lambda out: (order.get(out[0], len(order)), out[0])))


def verify_state(run_dir: Path = Path()) -> str:
    """Hash the results and all objects of the DVC cache again and name what is damaged.

    Args:
        run_dir: Folder with ``dvc.lock``.

    Returns:
        One line with what was checked.

    Raises:
        StateError: Something is damaged, missing, or differs from ``dvc.lock``; all of it is
            named.
    """
    outs = locked_outs(run_dir)
    cache = _cache(run_dir)
    names = _object_names(run_dir, cache, outs)
    damaged, count = [], 0
    for path in sorted(cache.glob("[0-9a-f][0-9a-f]/*")):
        name = path.parent.name + path.name
        if not _OBJECT.fullmatch(name):
            continue
        count += 1
        if _md5(path) != name.removesuffix(".dir"):
            damaged.append(f"cache object {name[:2]}/{name[2:]} ({names.get(name, 'old')})")
    files = 0
    for out, md5 in sorted(outs.items()):
        expected = _files(cache, out, md5)
        if expected is None:
            damaged.append(f"{out}: its list of files is not readable in the cache")
            continue
        files += len(expected)
        damaged += _compare(run_dir, cache, out, expected)
    if damaged:
        more = [f"and {len(damaged) - _SHOWN} more"] if len(damaged) > _SHOWN else []
        raise StateError(
            "\n  ".join([f"{len(damaged)} findings", *damaged[:_SHOWN], *more]),
            where=str(run_dir),
            fix="a damaged cache object: delete it and `dvc fetch`; a damaged result: delete it "
            "and `terraloom state restore`; results of a newer run: `terraloom state save && "
            "dvc commit -f`",
        )
    return f"{files} files of {len(outs)} folders and {count} cache objects are as recorded"


def _compare(run_dir: Path, cache: Path, out: str, expected: Mapping[str, str]) -> Iterator[str]:
    root = run_dir / out
    if not root.exists():
        yield f"{out}: not here (terraloom state restore)"
        return
    for path, md5 in sorted(expected.items()):
        file = run_dir / path
        if not file.is_file():
            yield f"{path}: missing"
        elif _md5(file) != md5:
            yield f"{path}: differs from {_LOCK}"
        if not _object(cache, md5).exists():
            yield f"{path}: no copy in the cache ({md5[:2]}/{md5[2:]})"
    if root.is_dir():
        here = {p.relative_to(run_dir).as_posix() for p in root.rglob("*") if p.is_file()}
        yield from (f"{path}: not in {_LOCK}" for path in sorted(here - set(expected)))
        if out.startswith("results/") and f"{out}/{PROVENANCE}" not in expected:
            yield f"{out}: recorded without {PROVENANCE} (terraloom state save)"


def _object_names(run_dir: Path, cache: Path, outs: Mapping[str, str]) -> dict[str, str]:
    """What each object is, for messages: of the present lock, else of a tag."""
    names: dict[str, str] = {}
    states = [("", outs), *((f"{tag}: ", locked) for tag, _, locked in _tags(run_dir))]
    for prefix, locked in states:
        for out, md5 in locked.items():
            names.setdefault(md5, prefix + out)
            for path, digest in (_files(cache, out, md5) or {}).items():
                names.setdefault(digest, prefix + path)
    return names


def state_log(run_dir: Path = Path()) -> str:
    """List the tags that hold results, newest first, with the metrics of their milestones.

    Args:
        run_dir: Folder with ``dvc.lock``, in a git repository.

    Returns:
        One line for each tag and one for each of its milestones; a milestone that is the same as
        in the tag before it says so.

    Raises:
        StateError: Not a git repository.
    """
    cache = _cache(run_dir)
    lines: list[str] = []
    shown: dict[tuple[str, str], str] = {}
    for tag, text, locked in _tags(run_dir):
        block = [f"{tag}  {text}"]
        for out, md5 in locked.items():
            same = shown.setdefault((out, md5), tag)
            what = f"as {same}" if same != tag else _metrics(cache, out, md5)
            block.append(f"  {Path(out).name:<8} {md5[:8]}  {what}".rstrip())
        lines = block + lines
    return "\n".join(lines) or "no tag holds results yet: git tag NAME after dvc commit"


def _metrics(cache: Path, out: str, md5: str) -> str:
    files = _files(cache, out, md5)
    if files is None:
        return "(not in the cache here: dvc fetch --all-tags)"
    digest = files.get(f"{out}/metrics.json")
    if digest is None:
        return ""
    try:
        data = json.loads(_object(cache, digest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "(metrics.json is not in the cache here: dvc fetch --all-tags)"
    plain = {k: v for k, v in data.items() if isinstance(v, (int, float, str))}
    return " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in plain.items()
    )


def _tags(run_dir: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Name, date with subject, and locked outputs of each tag with results, oldest first."""
    form = "--format=%(refname:short)%09%(creatordate:short)  %(subject)"
    for line in _git(run_dir, "for-each-ref", "--sort=creatordate", form, "refs/tags").splitlines():
        tag, text = line.split("\t", 1)
        try:
            locked = _outs(_git(run_dir, "show", f"refs/tags/{tag}:./{_LOCK}"))
        except (StateError, yaml.YAMLError, KeyError, AttributeError, TypeError):
            continue  # a tag from before the first results
        if locked:
            yield tag, text.strip(), locked


def _git(run_dir: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=run_dir, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        raise StateError(f"git {words[0]}: {done.stderr.strip()}", where=str(run_dir))
    return done.stdout


def _cache(run_dir: Path) -> Path:
    """Folder with the objects; the setting may point to a cache that others share."""
    return run_dir / call_dvc(run_dir, "cache", "dir").strip() / "files" / "md5"


def _object(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def _files(cache: Path, out: str, md5: str) -> dict[str, str] | None:
    """MD5 of each file of an output; None if the cache cannot say."""
    if not md5.endswith(".dir"):
        return {out: md5}
    try:
        listed = json.loads(_object(cache, md5).read_text(encoding="utf-8"))
        return {f"{out}/{entry['relpath']}": str(entry["md5"]) for entry in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _md5(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
