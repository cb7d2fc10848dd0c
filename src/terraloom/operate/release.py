"""A release: the present results, recorded, described against the last one, pushed and tagged.

The tag comes last, so a tag never points to results that are not where they should be. Each step
finds out by itself whether it was done before: the same command goes on where it stopped.
"""

from __future__ import annotations

import re
from pathlib import Path

from terraloom.errors import StateError
from terraloom.io import write_text
from terraloom.operate.compare import compare_states, present_text, text_of
from terraloom.operate.provenance import save_state
from terraloom.operate.stored import (
    LOCK,
    MILESTONES,
    WORK,
    call_dvc,
    git,
    locked_outs,
    present_state,
    remotes,
    tags_with_results,
)

__all__ = ["NOTES", "release"]

#: Folder of the release notes.
NOTES = Path("releases")
_SHOWN = 10
#: As a campaign can name it in ``milestones.model``.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Words that mean something else to the campaign, to `compare` or to git.
_TAKEN = ("build", "frozen", WORK, "HEAD")


def release(tag: str, run_dir: Path = Path(), *, push: bool = True, message: str = "") -> str:
    """Record the results that lie here as a release.

    Args:
        tag: Name of the release; a valid git tag that does not exist yet.
        run_dir: Folder of the project, with ``dvc.yaml`` and ``results/``.
        push: Whether to push the objects to the default DVC remote, where one is set.
        message: Sentence that stands above the notes.

    Returns:
        What was done, as lines of text, the notes last.

    Raises:
        StateError: The tag is there or not valid, files of the project were changed and not
            committed, results are unfinished or do not fit together, or git or DVC refused. What
            was done before stays; nothing is tagged.
    """
    _check_tag(run_dir, tag)
    own = (LOCK, (NOTES / f"{tag}.md").as_posix())
    _check_clean(run_dir, own)
    done: list[str] = []
    try:
        text = _record(tag, run_dir, own, message, done)
        commit = git(run_dir, "rev-parse", "--short", "HEAD").strip()
        done.append(_pushed(run_dir, tag, commit) if push else "not pushed: dvc push")
        git(run_dir, "tag", "-a", tag, "-m", message or f"Release {tag}")
    except StateError as err:
        raise _half_way(err, tag, done) from err
    done.append(f"git tag {tag}; to share it: git push --follow-tags")
    return "\n".join([*done, "", text])


def _record(
    tag: str, run_dir: Path, own: tuple[str, ...], message: str, done: list[str]
) -> str:  # fmt: skip
    """Milestones saved and committed with the notes; adds to ``done`` and gives the notes."""
    last = _last(run_dir)
    done.append(save_state(run_dir))
    call_dvc(run_dir, "commit", "--force")
    absent = [m for m in MILESTONES if f"results/{m}" not in locked_outs(run_dir)]
    if absent:
        raise StateError(
            f"DVC did not record {', '.join(absent)}", where=str(run_dir / "dvc.yaml"),
            fix="each milestone must be an output of a stage; see dvc.yaml of the project",
        )  # fmt: skip
    done.append("dvc commit: the results are in the cache")
    text = _notes(run_dir, tag, message, last)
    write_text(run_dir / own[1], text)
    git(run_dir, "add", "--", *own)
    if git(run_dir, "diff", "--cached", "--name-only"):
        git(run_dir, "commit", "-q", "-m", f"Release {tag}")
    commit = git(run_dir, "rev-parse", "--short", "HEAD").strip()
    done.append(f"git commit {commit}: {' and '.join(own)}")
    return text


def _half_way(err: StateError, tag: str, done: list[str]) -> StateError:
    """The error with what stands already; the same command goes on from there."""
    if not done:
        return err
    steps = "".join(f"\n  done: {line}" for step in done for line in step.splitlines())
    fix = f"{err.fix}\n  then: the same command again goes on" if err.fix else (
        f"cure it; then the same command again goes on: terraloom release {tag}"
    )  # fmt: skip
    return StateError(
        f"{err.found}\n  nothing is tagged{steps}", where=err.where, allowed=err.allowed, fix=fix
    )


def _check_tag(run_dir: Path, tag: str) -> None:
    try:
        git(run_dir, "check-ref-format", f"refs/tags/{tag}")
        valid = _NAME.fullmatch(tag) is not None and tag not in _TAKEN
    except StateError:
        valid = False
    if not valid:
        raise StateError(
            f"`{tag}` cannot be the name of a release", where="TAG",
            allowed=f"letters, digits, `.`, `_` and `-`; not {', '.join(_TAKEN)}",
            fix="such as map-2026.1",
        )  # fmt: skip
    if git(run_dir, "tag", "--list", tag).strip():
        raise StateError(
            f"the tag `{tag}` is there already", where=str(run_dir),
            fix="releases are never changed; take another name, such as the next number",
        )  # fmt: skip


def _check_clean(run_dir: Path, own: tuple[str, ...]) -> None:
    """Files that git knows, or should know, must be committed: the tag stands for the code."""
    prefix = git(run_dir, "rev-parse", "--show-prefix").strip()
    lines = git(run_dir, "status", "--porcelain", "--untracked-files=all", "-z").split("\0")
    changed = [line[3:].removeprefix(prefix) for line in lines if len(line) > 3]
    changed = [path for path in changed if path not in own]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise StateError(
            f"files are not committed: {', '.join(changed[:_SHOWN])}{more}", where=str(run_dir),
            fix="git add and git commit them (or .gitignore), run snakemake to the end, then again",
        )  # fmt: skip


def _last(run_dir: Path) -> str | None:
    """The newest tag with results that this commit comes from."""
    merged = set(git(run_dir, "tag", "--merged", "HEAD").split())
    tags = [tag for tag, _, _ in tags_with_results(run_dir) if tag in merged]
    return tags[-1] if tags else None


def _pushed(run_dir: Path, tag: str, commit: str) -> str:
    known = remotes(run_dir)
    if not known:
        return "no DVC remote is set: the objects are in this cache only (dvc remote add -d)"
    try:
        call_dvc(run_dir, "push")
    except StateError as err:
        raise StateError(
            f"the results are recorded in commit {commit} but were not pushed, so nothing is "
            f"tagged: {err.found}", where=", ".join(f"{n} ({u})" for n, u in known.items()),
            fix=f"when the remote answers: terraloom release {tag}; without it: "
            f"terraloom release {tag} --no-push",
        ) from err  # fmt: skip
    return f"dvc push: {', '.join(known)}"


def _notes(run_dir: Path, tag: str, message: str, last: str | None) -> str:
    head = f"# Release {tag}\n\n" + (f"{message}\n\n" if message else "")
    if last is None:
        return f"{head}The first release.\n{present_text(present_state(run_dir))}"
    changes = text_of(compare_states(last, WORK, run_dir), titled=False)
    return f"{head}Against {last}:\n\n{changes}"
