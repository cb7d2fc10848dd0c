"""Base of all configuration models and the choices shared by several of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

__all__ = ["Name", "Section", "TaskKind"]

#: Name of a source, task or campaign; it becomes part of file names.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]


class Section(BaseModel):
    """A part of a campaign file: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any, info: ValidationInfo) -> Any:
        """A choice between whole numbers: `snakemake --config` gives those in braces as text."""
        if isinstance(value, str) and info.field_name in cls.model_fields:
            kind = cls.model_fields[info.field_name].annotation
            if get_origin(kind) is Literal:
                return {str(k): k for k in get_args(kind) if isinstance(k, int)}.get(value, value)
        return value


class TaskKind(StrEnum):
    """What a task predicts."""

    SEGMENTATION = "segmentation"
    REGRESSION = "regression"
    BOUNDARY = "boundary"
