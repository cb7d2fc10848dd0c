"""How far an exported ensemble departs from its networks, on chips that it was not made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.errors import StateError
from terraloom.io import read_json
from terraloom.models.registry import card_path
from terraloom.predict.ensemble import Ensemble
from terraloom.predict.sharpen import calibrated_parts
from terraloom.preprocess.groups import group_factor, group_order
from terraloom.train.calibrate import calibration_error
from terraloom.train.ensemble import averaged
from terraloom.train.held_out import HeldOut, predict_held_out
from terraloom.train.windows import inputs_of

__all__ = ["Split", "compared", "mean_iou", "split_chips"]

#: Most chips to calibrate and to compare with (count).
_CALIBRATE, _VERIFY = 16, 64
#: Largest difference of a probability in fp32, and of a value over 1 + |value|.
MOST_FP32 = 1e-3
#: Least share of pixels with the same class, and largest loss of mean IoU (points), in int8.
LEAST_SAME, MOST_IOU_LOSS = 0.99, 0.5

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Split:
    """Chips by number: those that quantisation looks at, and those that it is judged on."""

    calibrate: list[int]
    verify: list[int]


def split_chips(chips: xr.Dataset) -> Split:
    """Two sets of chips that have no pixel in common; at least half of all are for judging.

    Raises:
        StateError: Chips are too few, or all of them overlap.
    """
    rows, cols = (np.asarray(chips[k].values, dtype=np.int64) for k in ("row", "col"))
    size, n = int(chips.attrs["size_px"]), len(rows)
    near = (abs(rows[:, None] - rows) < size) & (abs(cols[:, None] - cols) < size)
    taken: list[int] = []
    rest = np.ones(n, bool)
    for i in np.random.default_rng(0).permutation(n).tolist():
        left = rest & ~near[i]
        if left.sum() >= max(n / 2, 1) and len(taken) < _CALIBRATE:
            taken.append(i)
            rest = left
    if not taken:
        raise StateError(f"{n} chips, which overlap", where="results/chips/chips.zip",
                         allowed="chips in two places, to calibrate and to compare with",
                         fix="use more labels or smaller chips")  # fmt: skip
    found = np.flatnonzero(rest)
    few = found[np.linspace(0, len(found) - 1, min(len(found), _VERIFY)).astype(int)]
    return Split(sorted(taken), few.tolist())


def mean_iou(y: npt.NDArray[Any], said: npt.NDArray[Any]) -> float:
    """Mean over the classes of the labels of intersection over union."""
    return float(np.mean([((y == k) & (said == k)).sum() / ((y == k) | (said == k)).sum()
                          for k in np.unique(y)]))  # fmt: skip


def compared(
    reference: Ensemble, other: Ensemble, files: Sequence[Path], chips: xr.Dataset, runtime: str
) -> dict[str, Any]:
    """Compare two runtimes of the same members.

    Args:
        reference: Members in torch.
        other: The same members in ONNX Runtime.
        files: Weights of the members, whose cards say which fold each has not seen.
        chips: Chips with labels.
        runtime: ``onnx`` or ``onnx-int8``.

    Returns:
        Plain values. Per task largest differences of what the map is made of; share of pixels
        with the same class; on held-out labels mean IoU (%) and calibration error before (torch)
        and after; ``passed``, ``failed`` (which limits were missed) and ``limits``.

    Raises:
        StateError: No chip has held-out labels.
    """
    differences, same, pixels = _on_pixels(reference, other, chips)
    labels = _on_labels(reference, other, files, chips)
    wrong = []
    if runtime == "onnx":
        limits = f"differences of at most {MOST_FP32:g}"
        wrong += [f"{k} differs by {v:.2g}" for k, v in differences.items() if not v <= MOST_FP32]
    else:
        limits = (f"the same class at {100 * LEAST_SAME:g} % of the pixels or more, and a loss of "
                  f"mean IoU of {MOST_IOU_LOSS:g} points or less")  # fmt: skip
        for name, share in same.items():
            if not share >= LEAST_SAME:
                wrong.append(f"{name} keeps its class at {100 * share:.2f} % of the pixels")
        for name, r in labels.items():
            if not r["miou_before"] - r["miou_after"] <= MOST_IOU_LOSS:
                wrong.append(f"mean IoU of {name} falls from {r['miou_before']:.2f} to "
                             f"{r['miou_after']:.2f} %")  # fmt: skip
    return {
        "passed": not wrong, "failed": ", ".join(wrong), "limits": limits, "pixels": pixels,
        "largest_difference": differences, "same_class": same, "held_out": labels,
    }  # fmt: skip


def _on_pixels(
    reference: Ensemble, other: Ensemble, chips: xr.Dataset
) -> tuple[dict[str, float], dict[str, float], int]:
    """Largest difference and share of the same class per task, over observed pixels."""
    largest: dict[str, float] = {}
    same: dict[str, int] = {}
    pixels = 0
    for i in range(chips.sizes["n"]):
        inputs = {g: x.numpy() for g, x in inputs_of(chips.isel(n=[i]).load()).items()}
        seen = _observed(inputs)
        pixels += int(seen.sum())
        before, after = reference.predict(inputs), other.predict(inputs)
        for task in reference.members[0].spec.tasks:
            a, b = (_means(e, task.name, task.kind, v[task.name][:, 0])
                    for e, v in ((reference, before), (other, after)))  # fmt: skip
            off = np.abs(a - b) / (1 + np.abs(a) if task.kind == "regression" else 1)
            worst = float(off[:, seen].max(initial=0))
            largest[task.name] = max(largest.get(task.name, 0.0), worst)
            if task.kind == "segmentation":
                equal = int((a.argmax(0) == b.argmax(0))[seen].sum())
                same[task.name] = same.get(task.name, 0) + equal
    return largest, {k: v / max(pixels, 1) for k, v in same.items()}, pixels


def _observed(inputs: dict[str, F32]) -> npt.NDArray[np.bool_]:
    """Pixels (h, w) with a value of the finest group."""
    g = group_order(inputs)[0]
    f = group_factor(g)
    return np.asarray(np.isfinite(inputs[g][0]).any(axis=0).repeat(f, 0).repeat(f, 1))


def _means(ensemble: Ensemble, name: str, kind: str, members: F32) -> F32:
    if kind == "segmentation":
        return calibrated_parts(members, ensemble.calibrations[name]).mean
    some = members[:, :1] if kind == "regression" else members
    return np.asarray(some.mean(axis=0), dtype=np.float32)


def _on_labels(
    reference: Ensemble, other: Ensemble, files: Sequence[Path], chips: xr.Dataset
) -> dict[str, dict[str, float]]:
    """Mean IoU (%) and calibration error per segmentation task, each fold by its own members."""
    folds = [int(read_json(card_path(f))["held_out_fold"]) for f in files]

    def held(ensemble: Ensemble, fold: int) -> dict[str, HeldOut]:
        mine = [m for m, f in zip(ensemble.members, folds, strict=True) if f == fold]
        return predict_held_out(chips, mine, fold, batch=1)

    parts = {f: (held(reference, f), held(other, f)) for f in sorted(set(folds))}
    out = {}
    for name, calibration in reference.calibrations.items():
        both = [HeldOut.join([p[i][name] for p in parts.values()]) for i in (0, 1)]
        y = both[0].y.astype(np.int64)
        if not len(y):
            raise StateError(f"no held-out label of {name} in the chips to compare with",
                             where="results/chips/chips.zip", fix="use more labels")  # fmt: skip
        p = [averaged(h.p, calibration) for h in both]
        iou = [100 * mean_iou(y, q.argmax(1)) for q in p]
        ece = [calibration_error(q, y) for q in p]
        out[name] = {"labels": float(len(y)), "miou_before": iou[0], "miou_after": iou[1],
                     "ece_before": ece[0], "ece_after": ece[1]}  # fmt: skip
    return out
