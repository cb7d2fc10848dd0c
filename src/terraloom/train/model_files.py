"""Where chips and networks lie, and the tasks of a campaign as networks take them."""

from __future__ import annotations

from pathlib import Path

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.legend import read_legend
from terraloom.models.heads import TaskSpec

__all__ = ["CHIPS", "MODEL", "fold_folder", "member_file", "member_files", "task_specs"]

CHIPS = Path("results/chips/chips.zip")
MODEL = Path("results/model")


def fold_folder(fold: int) -> Path:
    """Folder of the members that do not see a fold."""
    return MODEL / f"fold-{fold}"


def member_file(fold: int, member: int) -> Path:
    """Weights of one member."""
    return fold_folder(fold) / f"member-{member}.safetensors"


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
        loss = task.loss
        specs.append(
            TaskSpec(
                task.name, str(task.kind), classes, task.unit, task.weight,
                transform=loss.transform, loss=loss.name, dice=loss.dice,
                smoothing=loss.smoothing, forget=loss.forget,
            )
        )  # fmt: skip
    return specs
