"""Base of all configuration models and the choices shared by several of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Name", "Section", "TaskKind"]

#: Name of a source, task or campaign; it becomes part of file names.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]


class Section(BaseModel):
    """A part of a campaign file: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskKind(StrEnum):
    """What a task predicts."""

    SEGMENTATION = "segmentation"
    REGRESSION = "regression"
    BOUNDARY = "boundary"
