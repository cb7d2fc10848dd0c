"""How far an exported ensemble departs from its networks, on chips with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.errors import StateError
from terraloom.io import read_json
from terraloom.models.registry import card_path
from terraloom.predict.calibration import calibrated_parts
from terraloom.predict.ensemble import Ensemble
from terraloom.preprocess.groups import group_factor, group_order
from terraloom.train.calibrate import calibration_error
from terraloom.train.ensemble import averaged
from terraloom.train.held_out import HeldOut, predict_held_out
from terraloom.train.windows import inputs_of

__all__ = ["chips_to_compare", "compared", "mean_iou"]

#: Most chips to compare with (count).
_VERIFY = 64
#: Largest difference of a probability, and of a value over 1 + |value|.
MOST_DIFFERENCE = 1e-3

F32 = npt.NDArray[np.float32]


def chips_to_compare(n: int) -> list[int]:
    """Numbers of the chips that runtimes are compared on: spread over all, at most 64."""
    return [int(i) for i in np.linspace(0, n - 1, min(n, _VERIFY))]


def mean_iou(y: npt.NDArray[Any], said: npt.NDArray[Any]) -> float:
    """Mean over the classes of the labels of intersection over union."""
    return float(np.mean([((y == k) & (said == k)).sum() / ((y == k) | (said == k)).sum()
                          for k in np.unique(y)]))  # fmt: skip


def compared(
    reference: Ensemble, other: Ensemble, files: Sequence[Path], chips: xr.Dataset
) -> dict[str, Any]:
    """Compare two runtimes of the same members.

    Args:
        reference: Members in torch.
        other: The same members in ONNX Runtime.
        files: Weights of the members, whose cards say which fold each has not seen.
        chips: Chips with labels.

    Returns:
        Plain values. Per task largest differences of what the map is made of; share of pixels
        with the same class; on held-out labels mean IoU (%) and calibration error before (torch)
        and after; ``passed``, ``failed`` (which limits were missed) and ``limits``.

    Raises:
        StateError: No chip has held-out labels.
    """
    differences, same, pixels = _on_pixels(reference, other, chips)
    labels = _on_labels(reference, other, files, chips)
    wrong = [f"{k} differs by {v:.2g}" for k, v in differences.items() if not v <= MOST_DIFFERENCE]
    limits = f"differences of at most {MOST_DIFFERENCE:g}"
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
