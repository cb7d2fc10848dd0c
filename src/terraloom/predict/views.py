"""Flipped and turned views of a window, averaged: test-time augmentation.

The windows of :mod:`.windows` begin and end on whole strides, so a flipped one is pooled as the
other is, and the average depends on the cut no more than one view does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from terraloom.predict.windows import Place

__all__ = ["predict_views"]

F32 = npt.NDArray[np.float32]
Predict = Callable[[Mapping[str, F32], Sequence[Place] | None], dict[str, F32]]

#: Whether rows, columns are reversed and then exchanged; the first four keep the window's shape.
_VIEWS = tuple((r, c, x) for x in (False, True) for r in (False, True) for c in (False, True))


def _turned(x: npt.NDArray[Any], rows: bool, cols: bool, exchange: bool) -> npt.NDArray[Any]:
    x = x[..., :: -1 if rows else 1, :: -1 if cols else 1]
    return np.ascontiguousarray(x.swapaxes(-1, -2) if exchange else x)


def _back(x: npt.NDArray[Any], rows: bool, cols: bool, exchange: bool) -> npt.NDArray[Any]:
    x = x.swapaxes(-1, -2) if exchange else x
    return x[..., :: -1 if rows else 1, :: -1 if cols else 1]


def predict_views(
    predict: Predict, inputs: Mapping[str, F32], views: int,
    within: Sequence[Place] | None = None, logits: Collection[str] = (),
) -> dict[str, F32]:  # fmt: skip
    """Each member's mean over views of windows.

    Args:
        predict: As :meth:`Ensemble.predict`.
        inputs: Per group (N, C, h, w).
        views: 1 (as it is), 4 (flips) or 8 (flips and quarter turns).
        within: Rows and columns that are wanted of each window; None: all.
        logits: Entries (M, N, K, h, w) whose probabilities are averaged.

    Returns:
        As ``predict``. Entries that are no predictions (their names begin with a dot) are those
        of the window as it is.
    """
    out = predict(inputs, within)
    if views == 1:
        return out
    averaged = [name for name in out if not name.startswith(".")]
    for name in logits:
        out[name] = _probabilities(out[name])
    for view in _VIEWS[1:views]:
        found = predict({g: _turned(x, *view) for g, x in inputs.items()}, None)
        for name in averaged:
            values = _probabilities(found[name]) if name in logits else found[name]
            back = _back(values, *view)
            for n in range(back.shape[1]):
                rows, cols = within[n] if within else (slice(None), slice(None))
                out[name][:, n] += back[:, n, :, rows, cols]
    for name in averaged:
        out[name] /= views
    for name in logits:
        out[name] = np.log(np.maximum(out[name], np.finfo(np.float32).tiny))
    return out


def _probabilities(logits: F32) -> F32:
    """Softmax over the classes of (..., K, h, w)."""
    p: F32 = torch.from_numpy(logits).softmax(-3).numpy()
    return p
