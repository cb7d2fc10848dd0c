"""Measured values of the units, such as heights: columns of the answer files, one per task."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, nan

import numpy as np
import numpy.typing as npt
import pandas as pd

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task

__all__ = ["VALUE_PREFIX", "settle_values", "value_columns", "value_faults", "values_of"]

#: Column of a task's values: this and the name of the task.
VALUE_PREFIX = "value_"


def value_columns(tasks: Sequence[Task]) -> dict[str, Task]:
    """Regression tasks by the name of their column."""
    return {f"{VALUE_PREFIX}{t.name}": t for t in tasks if t.kind is TaskKind.REGRESSION}


def value_faults(table: pd.DataFrame, tasks: Sequence[Task]) -> list[str]:
    """Everything wrong with the values of a file, one line each.

    Args:
        table: Text columns, among them ``id`` and ``interpreter``.
        tasks: Tasks of the campaign.
    """
    known, found = value_columns(tasks), []
    for column in (c for c in table.columns if c.startswith(VALUE_PREFIX)):
        if column not in known:
            names = ", ".join(known) or "none: no task is of kind regression"
            found.append(f"column {column} is of no task; columns of values: {names}")
            continue
        task = known[column]
        low, high = task.range if task.range is not None else (-inf, inf)
        for i, text in zip(table["id"], table[column], strict=True):
            if text and not low <= _number(text) <= high:
                found.append(f"{i}: {column} {text!r}; a number from {low:g} to {high:g}")
    return found


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return nan
    return value if isfinite(value) else nan


def settle_values(table: pd.DataFrame, task: Task, consensus: str) -> dict[str, float]:
    """One value per unit: that of ``consensus``, else the mean of all who measured it.

    Args:
        table: Checked rows: id, interpreter and, where it is given, the task's column as text.
        task: A regression task.
        consensus: The interpreter whose rows settle disagreements.
    """
    column = f"{VALUE_PREFIX}{task.name}"
    if column not in table:
        return {}
    given = table[table[column] != ""].drop_duplicates(["id", "interpreter"])
    out = {}
    for i, part in given.groupby("id"):
        agreed = part[part["interpreter"] == consensus]
        chosen = agreed if len(agreed) else part
        out[str(i)] = float(chosen[column].astype(float).mean())
    return out


def values_of(ids: Sequence[str], values: dict[str, float]) -> npt.NDArray[np.float64]:
    """(N,) value of each unit, NaN where there is none."""
    return np.array([values.get(i, nan) for i in ids], dtype=np.float64)
