"""The model of a release for the campaign of today: git does not move, nothing is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

from terraloom.errors import StateError
from terraloom.io import write_json
from terraloom.operate.record import locked
from terraloom.operate.stored import (
    call_dvc,
    git,
    outs_at,
    unsaved,
)
from terraloom.origin import PINNED
from terraloom.scratch import scratch_folder

__all__ = ["pin_model"]

_MODEL = "results/model"
_SHOWN = 5


def pin_model(tag: str, run_dir: Path = Path()) -> str:
    """Put the model of a release in the place of the present one.

    What lies in ``results/model`` must be in a recorded state, since it is replaced. A file
    ``pinned.json`` beside the weights names the release. The campaign says the same with
    ``milestones: {model: TAG}``: the rules that train are then not in the plan, and a run refuses
    a model of another release.

    Args:
        tag: A tag with results.
        run_dir: Folder of the project, in a git repository.

    Returns:
        What was done and what to write into the campaign.

    Raises:
        StateError: No such tag, no model in it, a run is under way, the present model was never
            recorded, or neither cache nor remote has the files.
    """
    outs = outs_at(run_dir, tag)
    if _MODEL not in outs:
        raise StateError(
            f"`{tag}` has no model", where=f"{tag}:dvc.lock", allowed=", ".join(outs),
            fix="terraloom state log shows what each tag holds",
        )  # fmt: skip
    if locked(run_dir):
        raise StateError(
            "a run is under way here, or was killed", where=str(run_dir),
            fix="wait for it; if none is running: terraloom resume --only-clear",
        )  # fmt: skip
    model = run_dir / _MODEL
    lost = [name for name in unsaved(run_dir, _MODEL) if Path(name).name != PINNED]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise StateError(
            f"no recorded state holds {', '.join(lost[:_SHOWN])}{more}", where=str(model),
            fix="record it first (terraloom release, or terraloom state save && dvc commit -f and "
            "a git tag), or remove the folder",
        )  # fmt: skip
    commit = git(run_dir, "rev-list", "-n", "1", tag).strip()
    with scratch_folder(model.parent, "pin") as folder:
        new = folder / "model"
        call_dvc(run_dir, "get", ".", _MODEL, "--rev", tag, "--out", str(new.resolve()))
        write_json(new / PINNED, {"release": tag, "commit": commit, "object": outs[_MODEL]})
        if model.exists():
            model.rename(folder / "before")
        new.rename(model)
        shutil.rmtree(folder / "before", ignore_errors=True)
    return (
        f"{_MODEL} is the model of {tag} ({outs[_MODEL][:8]})\n"
        f"write into the campaign, so that it is neither trained nor mistaken:\n"
        f"milestones:\n  model: {tag}"
    )
