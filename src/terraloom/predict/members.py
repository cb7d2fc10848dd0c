"""What single networks say of a region: means over small cells, kept beside the ensemble's.

Totals of regions are sums, so the spread between networks needs no network's pixels, only their
means over cells well below the size of a region. Six by six pixels take a thirty-sixth of the room.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.predict.encoding import PROBABILITY_CODES

__all__ = ["MEMBER_CELL_PX", "decode_members", "encode_members", "member_layer"]

F32 = npt.NDArray[np.float32]

#: Rows and columns of a cell, 60 m; tiles, windows and strips are whole numbers of it.
MEMBER_CELL_PX = 6
_CODE = PROBABILITY_CODES[16]


def member_layer(task: Task) -> str:
    """Name of a task's layer in the store of a tile."""
    return f"members_{task.name}"


def encode_members(members: F32, valid: npt.NDArray[np.bool_], kind: TaskKind) -> Any:
    """Mean of every member over the valid pixels of each cell, as it is stored.

    Args:
        members: (M, c, h, w) probabilities, or values in their first channel; h and w whole cells.
        valid: (h, w).
        kind: Classes are stored as uint16 steps, values as float32.

    Returns:
        (M, c, h / 6, w / 6); nodata (NaN for values) where a cell has no valid pixel.
    """
    s = MEMBER_CELL_PX
    m, c, h, w = members.shape
    some = np.where(valid, members, np.float32(0)).reshape(m, c, h // s, s, w).sum(axis=3)
    total = some.reshape(m, c, h // s, w // s, s).sum(axis=4)
    count = valid.reshape(h // s, s, w // s, s).sum(axis=(1, 3))
    mean: F32 = total / np.maximum(count, 1).astype(np.float32)
    if kind is TaskKind.SEGMENTATION:
        return _CODE.encode(mean, np.broadcast_to(count > 0, mean.shape))
    mean[:, :, count == 0] = np.nan
    return mean


def decode_members(stored: npt.NDArray[Any]) -> F32:
    """Inverse of :func:`encode_members`; 0 where there is nothing."""
    if stored.dtype == np.dtype(_CODE.dtype):
        values = stored.astype(np.float32) / np.float32(_CODE.steps)
        return np.where(stored == _CODE.nodata, np.float32(0), values)
    return np.nan_to_num(stored.astype(np.float32))
