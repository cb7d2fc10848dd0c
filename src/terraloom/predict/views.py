"""Flipped and turned views of a window, averaged: test-time augmentation.

The windows of :mod:`.windows` begin and end on whole strides, so a flipped one is pooled as the
other is, and the average depends on the cut no more than one view does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["predict_views"]

F32 = npt.NDArray[np.float32]
Predict = Callable[[Mapping[str, F32]], dict[str, F32]]

#: Whether rows, columns are reversed and then exchanged; the first four keep the window's shape.
_VIEWS = tuple((r, c, x) for x in (False, True) for r in (False, True) for c in (False, True))


def _turned(x: npt.NDArray[Any], rows: bool, cols: bool, exchange: bool) -> npt.NDArray[Any]:
    x = x[..., :: -1 if rows else 1, :: -1 if cols else 1]
    return np.ascontiguousarray(x.swapaxes(-1, -2) if exchange else x)


def _back(x: npt.NDArray[Any], rows: bool, cols: bool, exchange: bool) -> npt.NDArray[Any]:
    x = x.swapaxes(-1, -2) if exchange else x
    return x[..., :: -1 if rows else 1, :: -1 if cols else 1]


def predict_views(predict: Predict, inputs: Mapping[str, F32], views: int) -> dict[str, F32]:
    """Each member's mean over views of a window.

    Args:
        predict: As :meth:`Ensemble.predict`.
        inputs: Per group (N, C, h, w).
        views: 1 (as it is), 4 (flips) or 8 (flips and quarter turns).

    Returns:
        As ``predict``. Entries that are no predictions (their names begin with a dot) are those
        of the window as it is.
    """
    out = predict(inputs)
    if views == 1:
        return out
    for view in _VIEWS[1:views]:
        found = predict({g: _turned(x, *view) for g, x in inputs.items()})
        for name, total in out.items():
            if not name.startswith("."):
                total += _back(found[name], *view)
    for name, total in out.items():
        if not name.startswith("."):
            total /= views
    return out
