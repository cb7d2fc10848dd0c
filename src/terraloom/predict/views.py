"""Flipped and turned views of a window, averaged: test-time augmentation.

The windows of :mod:`.windows` begin and end on whole strides, so a flipped one is pooled as the
other is, and the average depends on the cut no more than one view does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
    for name in logits:
        _to_probabilities(out[name])
    for view in _VIEWS[1:views]:
        found = predict({g: _turned(x, *view) for g, x in inputs.items()}, None)
        for name, total in out.items():
            if name.startswith("."):
                continue
            if name in logits:
                _to_probabilities(found[name])
            back = _back(found[name], *view)
            for n in range(total.shape[1]):
                rows, cols = within[n] if within else (slice(None), slice(None))
                total[:, n] += back[:, n, :, rows, cols]
    for name, total in out.items():
        if not name.startswith("."):
            total /= views
        if name in logits:
            np.log(np.maximum(total, np.finfo(np.float32).tiny, out=total), out=total)
    return out


def _to_probabilities(logits: F32) -> None:
    """Softmax over the classes of (..., K, h, w), in place."""
    logits -= logits.max(axis=-3, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-3, keepdims=True)
