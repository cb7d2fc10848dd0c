"""Training jobs of a campaign: the members of one fold, and the baseline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.io import digest_json, read_json, read_store, sha256, write_json
from terraloom.legend import read_legend
from terraloom.log import get_logger, progress
from terraloom.models.heads import TaskSpec
from terraloom.state import code_digest
from terraloom.train.checkpoint import Checkpoint
from terraloom.train.fit import FitSettings, fit_member, save_fit

__all__ = ["CHIPS", "MODEL", "fold_folder", "member_files", "task_specs", "train_fold"]

CHIPS = Path("results/chips/chips.zip")
MODEL = Path("results/model")
WORK = Path("work/train")

log = get_logger(__name__)


def fold_folder(fold: int) -> Path:
    """Folder of the members that do not see a fold."""
    return MODEL / f"fold-{fold}"


def member_files(fold: int) -> list[Path]:
    """Weights of the members that do not see a fold."""
    return sorted(fold_folder(fold).glob("member-*.safetensors"))


def task_specs(campaign: Campaign) -> list[TaskSpec]:
    """The campaign's tasks in the form the networks take."""
    specs = []
    for task in campaign.tasks:
        classes: tuple[str, ...] = ()
        if task.kind is TaskKind.SEGMENTATION:
            classes = read_legend(str(task.classes)).names
        specs.append(TaskSpec(task.name, str(task.kind), classes, task.unit, task.weight))
    return specs


def train_fold(campaign: Campaign, fold: int) -> None:
    """Train all members that do not see ``fold``.

    A member that was finished from the same chips, settings and code is kept, and one that was
    killed goes on where it stood, to the same bytes. The card of the fold is written last: it
    names the members and their digests.
    """
    torch.set_num_threads(1)  # more threads change the order of sums; jobs run side by side
    torch.use_deterministic_algorithms(True)
    chips = read_store(CHIPS).load()
    settings = FitSettings(
        width=campaign.model.width,
        epochs=campaign.model.epochs,
        batch=campaign.model.batch,
        learning_rate=campaign.model.learning_rate,
    )
    folder = fold_folder(fold)
    folder.mkdir(parents=True, exist_ok=True)
    members = {}
    origin = digest_json(
        [sha256(CHIPS), asdict(settings), [asdict(t) for t in task_specs(campaign)], fold,
         campaign.seed, code_digest("train.run")]
    )  # fmt: skip
    for m in progress(range(campaign.model.members), what=f"fold {fold}: members trained"):
        path = folder / f"member-{m}.safetensors"
        if not _finished(path, origin):
            checkpoint = Checkpoint(WORK / f"fold-{fold}-member-{m}.safetensors", origin)
            fit = fit_member(
                chips, task_specs(campaign), settings,
                held_out_fold=fold, member=m, seed=campaign.seed, checkpoint=checkpoint,
            )  # fmt: skip
            save_fit(path, fit, origin=origin)
            checkpoint.remove()
        members[path.name] = sha256(path)
    write_json(folder / "card.json", {"fold": fold, "members": members})


def _finished(path: Path, origin: str) -> bool:
    """Whether a member stands there that was trained from the same."""
    card = path.with_suffix(".json")
    if not (path.is_file() and card.is_file()):
        return False
    return bool(read_json(card).get("origin") == origin)


__all__ += ["TaskSpec"]
