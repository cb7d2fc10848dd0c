"""What DVC and git remember: the locked results, their copies in the cache, and the tags.

DVC trusts a database of its own about its cache. Nothing here does: files are hashed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from terraloom.errors import StateError
from terraloom.operate.stored import (
    LOCK,
    PROVENANCE,
    cache_folder,
    files_of,
    locked_outs,
    md5_of,
    object_path,
    tags_with_results,
)

__all__ = ["state_log", "verify_state"]

_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
_SHOWN = 50


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
    cache = cache_folder(run_dir)
    names = _object_names(run_dir, cache, outs)
    damaged, count = [], 0
    for path in sorted(cache.glob("[0-9a-f][0-9a-f]/*")):
        name = path.parent.name + path.name
        if not _OBJECT.fullmatch(name):
            continue
        count += 1
        if md5_of(path) != name.removesuffix(".dir"):
            damaged.append(f"cache object {name[:2]}/{name[2:]} ({names.get(name, 'old')})")
    files = 0
    for out, md5 in sorted(outs.items()):
        expected = files_of(cache, out, md5)
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
        elif md5_of(file) != md5:
            yield f"{path}: differs from {LOCK}"
        if not object_path(cache, md5).exists():
            yield f"{path}: no copy in the cache ({md5[:2]}/{md5[2:]})"
    if root.is_dir():
        here = {p.relative_to(run_dir).as_posix() for p in root.rglob("*") if p.is_file()}
        yield from (f"{path}: not in {LOCK}" for path in sorted(here - set(expected)))
        if out.startswith("results/") and f"{out}/{PROVENANCE}" not in expected:
            yield f"{out}: recorded without {PROVENANCE} (terraloom state save)"


def _object_names(run_dir: Path, cache: Path, outs: Mapping[str, str]) -> dict[str, str]:
    """What each object is, for messages: of the present lock, else of a tag."""
    names: dict[str, str] = {}
    states = [("", outs), *((f"{tag}: ", locked) for tag, _, locked in tags_with_results(run_dir))]
    for prefix, locked in states:
        for out, md5 in locked.items():
            names.setdefault(md5, prefix + out)
            for path, digest in (files_of(cache, out, md5) or {}).items():
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
    cache = cache_folder(run_dir)
    lines: list[str] = []
    shown: dict[tuple[str, str], str] = {}
    for tag, text, locked in tags_with_results(run_dir):
        block = [f"{tag}  {text}"]
        for out, md5 in locked.items():
            same = shown.setdefault((out, md5), tag)
            what = f"as {same}" if same != tag else _metrics(cache, out, md5)
            block.append(f"  {Path(out).name:<8} {md5[:8]}  {what}".rstrip())
        lines = block + lines
    return "\n".join(lines) or "no tag holds results yet: git tag NAME after dvc commit"


def _metrics(cache: Path, out: str, md5: str) -> str:
    files = files_of(cache, out, md5)
    if files is None:
        return "(not in the cache here: dvc fetch --all-tags)"
    digest = files.get(f"{out}/metrics.json")
    if digest is None:
        return ""
    try:
        data = json.loads(object_path(cache, digest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "(metrics.json is not in the cache here: dvc fetch --all-tags)"
    plain = {k: v for k, v in data.items() if isinstance(v, (int, float, str))}
    return " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in plain.items()
    )
