"""Buffer between folds: training pixels near held-out labels are set aside.

A block border does not keep apart what lies on both sides of it. With a buffer, a labelled pixel
of a training fold is left out while a labelled pixel of the held-out fold is closer than the
buffer, across chips (spatial leave-one-out: Le Rest et al. 2014, Global Ecology and Biogeography
23, 811-820; Roberts et al. 2017, Ecography 40, 913-929).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from terraloom.errors import FoldError
from terraloom.labels.folds import NO_FOLD

__all__ = ["buffered"]

#: Pixels asked for in one call: bounds the memory of distances.
_BATCH = 200_000


def buffered(
    chips_fold: npt.NDArray[np.uint8],
    labelled: npt.NDArray[np.bool_],
    rows: npt.ArrayLike,
    cols: npt.ArrayLike,
    pixel_m: float,
    held_out_fold: int,
    buffer_m: float,
    *,
    out: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Which pixels may train while a fold is held out.

    One chip after the other is looked at: arrays may be files that are mapped into memory.

    Args:
        chips_fold: (n, h, w) fold of each pixel, 255 none.
        labelled: (n, h, w) whether the pixel has a label of any task.
        rows: (n,) row of each chip's upper left pixel in the campaign's grid.
        cols: (n,) column of it.
        pixel_m: Width of a pixel, metres.
        held_out_fold: The fold that tests.
        buffer_m: Smallest allowed distance of pixel centres, metres; 0 keeps all.
        out: (n, h, w) array that takes the result; None: a new one.

    Returns:
        (n, h, w) False for labelled pixels of other folds closer than ``buffer_m``, centre to
        centre, to a labelled pixel of the held-out fold, in whatever chip; True elsewhere, also
        for the held-out fold itself and for pixels without label or fold.

    Raises:
        FoldError: Shapes that do not fit, or no pixel left to train with.
    """
    row, col = (np.asarray(v, dtype=np.int64) for v in (rows, cols))
    n = len(chips_fold)
    if labelled.shape != chips_fold.shape or row.shape != (n,) or col.shape != (n,):
        raise FoldError(
            f"fold {chips_fold.shape}, labelled {labelled.shape}, rows {row.shape}, columns "
            f"{col.shape}", where="folds.buffer_m", allowed="(n, h, w) twice and (n,) twice",
        )  # fmt: skip
    keep = np.empty(chips_fold.shape, dtype=bool) if out is None else out
    keep[:] = True
    if buffer_m <= 0:
        return keep
    own = [
        _outline(labelled[i] & (chips_fold[i] == held_out_fold)) + np.array([row[i], col[i]])
        for i in range(n)
    ]
    own_at = np.concatenate([np.zeros((0, 2), np.int64), *own]).astype(np.float64)
    if not len(own_at):
        return keep
    tree = cKDTree(own_at)
    reach = buffer_m / pixel_m
    bound = reach * (1 - 1e-9)
    left = found = 0
    for chip in range(n):
        fold = chips_fold[chip]
        at = np.argwhere(labelled[chip] & (fold != held_out_fold) & (fold != NO_FOLD))
        found += len(at)
        corner = np.array([row[chip], col[chip]])
        if not len(at) or _far(tree, at + corner, reach):
            left += len(at)
            continue
        for start in range(0, len(at), _BATCH):
            part = at[start : start + _BATCH]
            # Distances below this bound are found; those equal to it, but for dust, are not.
            near = tree.query(part + corner, distance_upper_bound=bound)[0]
            drop = np.isfinite(near)
            keep[chip][tuple(part[drop].T)] = False
            left += int((~drop).sum())
    if not left and found:
        raise FoldError(
            f"no label is {buffer_m:g} m or more from all labels of fold {held_out_fold}",
            where="folds.buffer_m", allowed="labels left to train with",
            fix="a smaller folds.buffer_m, larger blocks (folds.block_m) or more labels",
        )  # fmt: skip
    return keep


def _outline(held: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Row and column of the pixels of a chip's set that have a neighbour outside it, (P, 2).

    The nearest pixel of the set to one outside is always of these: from any other, a step towards
    the one outside stays in the set. Pixels at a chip's edge are kept without a look at the next.
    """
    inner = np.zeros_like(held)
    inner[1:-1, 1:-1] = held[:-2, 1:-1] & held[2:, 1:-1] & held[1:-1, :-2] & held[1:-1, 2:]
    return np.argwhere(held & ~inner)


def _far(tree: cKDTree, at: npt.NDArray[np.int64], reach: float) -> bool:
    """Whether all pixels of a chip lie farther than ``reach`` from the tree."""
    low, high = at.min(axis=0), at.max(axis=0)
    middle = (low + high) / 2
    radius = float(np.hypot(*(high - middle)))
    return bool(tree.query(middle)[0] - radius > reach)
