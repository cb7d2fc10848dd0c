"""Model skill on held-out labels, with intervals from a spatial block bootstrap.

Held-out labels are rarely a probability sample, so these numbers say how well the model does on
them, not how accurate the map is (Wadoux et al. 2021): use `estimators` for the latter. Pixels of
one block are correlated, so whole blocks are resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terraloom.errors import DesignError

__all__ = [
    "BootstrapEstimate",
    "ClassSkill",
    "SkillReport",
    "block_bootstrap",
    "confusion_matrix",
    "skill_from_matrix",
    "skill_report",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

#: Below this many blocks a percentile interval is too narrow to be taken at face value.
FEW_BLOCKS = 20


@dataclass(frozen=True, slots=True)
class BootstrapEstimate:
    """A metric with a percentile interval over resampled blocks.

    Attributes:
        value: The metric on all data.
        se: Standard deviation over resamples; NaN if fewer than two are defined.
        lower: Lower percentile.
        upper: Upper percentile.
    """

    value: float
    se: float
    lower: float
    upper: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON-able form, NaN as null."""
        pairs = {"value": self.value, "se": self.se, "lower": self.lower, "upper": self.upper}
        return {name: v if isfinite(v) else None for name, v in pairs.items()}


@dataclass(frozen=True, slots=True, eq=False)
class ClassSkill:
    """Metrics of one or many count matrices; arrays (..., K) or (...).

    Attributes:
        oa: Share of pixels that agree; NaN for an empty matrix.
        macro_f1: Mean F1 over classes on either side; NaN for an empty matrix.
        miou: Mean intersection over union over the same classes.
        precision: By class; NaN where the class is never predicted.
        recall: By class; NaN where the class is not in the reference.
        f1: By class; NaN where neither side has it.
        iou: By class; NaN where neither side has it.
    """

    oa: F64
    macro_f1: F64
    miou: F64
    precision: F64
    recall: F64
    f1: F64
    iou: F64


@dataclass(frozen=True, slots=True, eq=False)
class SkillReport:
    """Held-out skill of a classifier with block-bootstrap intervals.

    Attributes:
        classes: K class codes in matrix order.
        level: Confidence level, 0-1.
        n: Labelled pixels used.
        n_blocks: Spatial blocks that hold them.
        matrix: (K, K) int64 counts, rows = reference, columns = predicted.
        overall: `oa`, `macro_f1` and `miou`.
        per_class: `precision`, `recall`, `f1` and `iou` by class code.
        notes: Plain sentences on what limits these numbers.
    """

    classes: tuple[int, ...]
    level: float
    n: int
    n_blocks: int
    matrix: I64
    overall: dict[str, BootstrapEstimate]
    per_class: dict[int, dict[str, BootstrapEstimate]]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "what": "model skill on held-out labels, not map accuracy",
            "classes": list(self.classes),
            "level": self.level,
            "n": self.n,
            "n_blocks": self.n_blocks,
            "matrix": self.matrix.tolist(),
            "overall": {name: est.to_dict() for name, est in self.overall.items()},
            "per_class": {
                str(code): {name: est.to_dict() for name, est in row.items()}
                for code, row in self.per_class.items()
            },
            "notes": list(self.notes),
        }


def confusion_matrix(
    reference: ArrayLike, predicted: ArrayLike, classes: Sequence[int], *, ignore: int | None = 255
) -> I64:
    """Count matrix (K, K) int64, rows = reference, columns = predicted.

    Args:
        reference: Class codes of any shape; values equal to `ignore` are left out.
        predicted: Class codes of the same shape; values equal to `ignore` are left out too.
        classes: K class codes, in matrix order.
        ignore: Code that means no label or no prediction; None uses every pixel.

    Raises:
        DesignError: If the shapes differ or a code is not in `classes`.
    """
    _, flat = _cells(reference, predicted, classes, ignore)
    k = len(classes)
    return np.bincount(flat, minlength=k * k).reshape(k, k).astype(np.int64)


def skill_from_matrix(matrix: ArrayLike, present: NDArray[np.bool_] | None = None) -> ClassSkill:
    """Metrics of count matrices.

    Args:
        matrix: (..., K, K) counts, rows = reference, columns = predicted.
        present: (K,) classes that enter the means; None takes those found on either side.

    Returns:
        Metrics with the leading shape of `matrix`; nothing is averaged over undefined values.
    """
    m = np.asarray(matrix, dtype=np.float64)
    hit = np.diagonal(m, axis1=-2, axis2=-1)
    row, col = m.sum(axis=-1), m.sum(axis=-2)
    f1 = _divide(2 * hit, row + col)
    iou = _divide(hit, row + col - hit)
    used = row + col > 0 if present is None else (row + col > 0) & present
    return ClassSkill(
        oa=_divide(hit.sum(axis=-1), m.sum(axis=(-2, -1))),
        macro_f1=_mean_where(f1, used),
        miou=_mean_where(iou, used),
        precision=_divide(hit, col),
        recall=_divide(hit, row),
        f1=f1,
        iou=iou,
    )


def skill_report(
    reference: ArrayLike,
    predicted: ArrayLike,
    blocks: ArrayLike,
    classes: Sequence[int],
    *,
    rng: np.random.Generator,
    ignore: int | None = 255,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> SkillReport:
    """Held-out accuracy by class with block-bootstrap intervals.

    Counts add over blocks, so each resample is a weighted sum of block matrices: cost does not
    grow with the number of pixels.

    Args:
        reference: (N,) or (H, W) reference class codes.
        predicted: Predicted class codes, same shape.
        blocks: Spatial block of each pixel, same shape, any integer codes.
        classes: K class codes.
        rng: Source of the resamples.
        ignore: Code left out on either side.
        n_resamples: Bootstrap resamples.
        level: Confidence level, 0-1 exclusive.

    Raises:
        DesignError: If shapes differ, codes are unknown, or fewer than two blocks have labels.
    """
    keep, flat = _cells(reference, predicted, classes, ignore)
    names, block = np.unique(np.asarray(blocks).ravel()[keep], return_inverse=True)
    _require_blocks(names.size, level)
    k = len(classes)
    per_block = np.bincount(block * k * k + flat, minlength=names.size * k * k)
    per_block = per_block.reshape(names.size, k * k)
    draws = rng.multinomial(names.size, np.full(names.size, 1 / names.size), size=n_resamples)
    resampled = (draws @ per_block).reshape(n_resamples, k, k)
    matrix = per_block.sum(axis=0).reshape(k, k).astype(np.int64)
    value, spread = skill_from_matrix(matrix), skill_from_matrix(resampled)
    overall = {
        name: _interval(float(getattr(value, name)), getattr(spread, name), level)
        for name in ("oa", "macro_f1", "miou")
    }
    per_class = {
        int(code): {
            name: _interval(float(getattr(value, name)[i]), getattr(spread, name)[:, i], level)
            for name in ("precision", "recall", "f1", "iou")
        }
        for i, code in enumerate(classes)
    }
    notes = (
        (f"only {names.size} blocks: the intervals are probably too narrow",)
        if names.size < FEW_BLOCKS
        else ()
    )
    return SkillReport(
        tuple(int(c) for c in classes),
        level,
        int(matrix.sum()),
        int(names.size),
        matrix,
        overall,
        per_class,
        notes,
    )


def block_bootstrap(
    metric: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    blocks: ArrayLike,
    *,
    rng: np.random.Generator,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> BootstrapEstimate:
    """Percentile interval of any metric, resampling whole spatial blocks with replacement.

    Args:
        metric: Function of the arrays, each restricted to the resampled units along axis 0.
        arrays: Arrays whose first axis is N units.
        blocks: (N,) spatial block of each unit.
        rng: Source of the resamples.
        n_resamples: Bootstrap resamples.
        level: Confidence level, 0-1 exclusive.

    Raises:
        DesignError: If lengths differ or there are fewer than two blocks.

    References:
        Künsch (1989); Lahiri (2003), Resampling Methods for Dependent Data.
    """
    names, block = np.unique(np.asarray(blocks), return_inverse=True)
    lengths = {len(a) for a in arrays}
    if lengths != {block.size}:
        raise DesignError(
            f"arrays of {sorted(lengths)} units, {block.size} block codes",
            where="block bootstrap",
            allowed="the same first axis everywhere",
        )
    _require_blocks(names.size, level)
    order = np.argsort(block, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(block))[:-1])
    values = np.empty(n_resamples)
    for i in range(n_resamples):
        index = np.concatenate([members[b] for b in rng.integers(names.size, size=names.size)])
        values[i] = metric(*(a[index] for a in arrays))
    return _interval(float(metric(*arrays)), values, level)


def _cells(
    reference: ArrayLike, predicted: ArrayLike, classes: Sequence[int], ignore: int | None
) -> tuple[NDArray[np.bool_], I64]:
    """Which flattened pixels are used, and their flat cell index row * K + column."""
    ref, pred = np.asarray(reference), np.asarray(predicted)
    if ref.shape != pred.shape:
        raise DesignError(
            f"reference of shape {ref.shape}, prediction of shape {pred.shape}",
            allowed="the same shape",
        )
    ref, pred = ref.ravel(), pred.ravel()
    keep = np.ones(ref.size, dtype=np.bool_)
    if ignore is not None:
        keep = (ref != ignore) & (pred != ignore)
    row = _class_index(ref[keep], classes, "reference")
    col = _class_index(pred[keep], classes, "predicted")
    return keep, row * len(classes) + col


def _class_index(codes: NDArray[Any], classes: Sequence[int], what: str) -> I64:
    legend = np.asarray(classes, dtype=np.int64)
    order = np.argsort(legend, kind="stable")
    index = order[np.clip(np.searchsorted(legend[order], codes), 0, legend.size - 1)]
    wrong = legend[index] != codes
    if wrong.any():
        raise DesignError(
            f"{what} codes {np.unique(codes[wrong]).tolist()}",
            allowed=f"classes {legend.tolist()}",
            fix="pass the code that means no label as `ignore`",
        )
    return index.astype(np.int64)


def _require_blocks(n_blocks: int, level: float) -> None:
    if n_blocks < 2:
        raise DesignError(
            f"{n_blocks} spatial block(s) with labels",
            where="block bootstrap",
            allowed="two or more, better twenty",
            fix="use smaller blocks or more labels",
        )
    if not 0 < level < 1:
        raise DesignError(f"confidence level {level}", allowed="between 0 and 1, exclusive")


def _interval(value: float, resampled: F64, level: float) -> BootstrapEstimate:
    defined = resampled[np.isfinite(resampled)]
    if not isfinite(value) or defined.size < 2:
        return BootstrapEstimate(value, nan, nan, nan)
    lower, upper = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return BootstrapEstimate(value, float(defined.std(ddof=1)), float(lower), float(upper))


def _divide(top: F64, bottom: F64) -> F64:
    shape = np.broadcast_shapes(np.shape(top), np.shape(bottom))
    out: F64 = np.full(shape, nan)
    return np.divide(top, bottom, out=out, where=np.asarray(bottom) > 0)


def _mean_where(values: F64, used: NDArray[np.bool_]) -> F64:
    return _divide(np.where(used, values, 0.0).sum(axis=-1), used.sum(axis=-1).astype(np.float64))
