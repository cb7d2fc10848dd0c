"""Base of all configuration models and the choices shared by several of them."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

__all__ = ["Section", "TaskKind"]


class Section(BaseModel):
    """A part of a campaign file: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskKind(StrEnum):
    """What a task predicts."""

    SEGMENTATION = "segmentation"
    REGRESSION = "regression"
    BOUNDARY = "boundary"
