"""How far an exported ensemble departs from its networks, on chips with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["OnPixels", "chips_to_compare", "compared", "mean_iou", "on_pixels"]

#: Most chips to compare with (count).
_VERIFY = 64
#: Largest difference of a probability, and of a value over 1 + |value|.
MOST_DIFFERENCE = 1e-3
#: Of networks in 8 bits: least share of pixels with the same class, most points of mean IoU that
#: are lost, and largest mean difference of what has no class, of values over 1 + |value|.
LEAST_SAME, MOST_LOST, MOST_MEAN = 0.99, 0.5, 0.02

F32 = npt.NDArray[np.float32]


def chips_to_compare(n: int) -> list[int]:
    """Numbers of the chips that runtimes are compared on: spread over all, at most 64."""
    return [int(i) for i in np.linspace(0, n - 1, min(n, _VERIFY))]


def mean_iou(y: npt.NDArray[Any], said: npt.NDArray[Any]) -> float:
    """Mean over the classes of the labels of intersection over union."""
    return float(np.mean([((y == k) & (said == k)).sum() / ((y == k) | (said == k)).sum()
                          for k in np.unique(y)]))  # fmt: skip


def compared(
    reference: Ensemble, other: Ensemble, files: Sequence[Path], chips: xr.Dataset,
    *, int8: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare two runtimes of the same members.

    Args:
        reference: Members in torch.
        other: The same members in ONNX Runtime.
        files: Weights of the members, whose cards say which fold each has not seen.
        chips: Chips with labels.
        int8: The others run in 8 bits, where single probabilities may differ.

    Returns:
        Plain values. Per task largest and mean differences of what the map is made of; share of
        pixels with the same class; on held-out labels mean IoU (%) and calibration error before
        (torch) and after; ``passed``, ``failed`` (which limits were missed) and ``limits``.

    Raises:
        StateError: No chip has held-out labels.
    """
    found = on_pixels(reference, other, chips)
    labels = _on_labels(reference, other, files, chips)
    if int8:
        wrong = _too_coarse(found, labels)
        limits = (f"the same class at {100 * LEAST_SAME:g} % of the pixels, {MOST_LOST:g} points "
                  f"of mean IoU lost, mean differences of values of {MOST_MEAN:g}")  # fmt: skip
    else:
        wrong = [f"{k} differs by {v:.2g}" for k, v in found.largest.items()
                 if not v <= MOST_DIFFERENCE]  # fmt: skip
        limits = f"differences of at most {MOST_DIFFERENCE:g}"
    return {
        "passed": not wrong, "failed": ", ".join(wrong), "limits": limits, "pixels": found.pixels,
        "largest_difference": found.largest, "mean_difference": found.mean,
        "same_class": found.same, "held_out": labels,
    }  # fmt: skip


@dataclass(frozen=True)
class OnPixels:
    """How two runtimes differ over observed pixels, per task.

    Attributes:
        largest: Largest difference of a probability, or of a value over 1 + |value|.
        mean: Mean of these differences.
        same: Share of the pixels with the same class (0-1); segmentation only.
        iou: Mean intersection over union of the two class maps, over the classes of the first
            (0-1): rare classes count as much as common ones.
        pixels: Pixels that were compared (count).
    """

    largest: dict[str, float]
    mean: dict[str, float]
    same: dict[str, float]
    iou: dict[str, float]
    pixels: int

    def told(self) -> str:
        """In words."""
        parts = [f"same class of {k} at {100 * v:.2f} %, overlap of classes "
                 f"{100 * self.iou[k]:.2f} %" for k, v in self.same.items()]  # fmt: skip
        parts += [f"{k} by {v:.2g} on average" for k, v in self.mean.items() if k not in self.same]
        return ", ".join(parts)


def _too_coarse(found: OnPixels, labels: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Which limits of networks in 8 bits were missed."""
    wrong = [f"the same class of {k} at {100 * v:.2f} % of the pixels"
             for k, v in found.same.items() if not v >= LEAST_SAME]  # fmt: skip
    wrong += [f"{k} differs by {v:.2g} on average" for k, v in found.mean.items()
              if k not in found.same and not v <= MOST_MEAN]  # fmt: skip
    for k, r in labels.items():
        if not r["miou_before"] - r["miou_after"] <= MOST_LOST:
            wrong.append(f"mean IoU of {k} {r['miou_before']:.2f} -> {r['miou_after']:.2f} %")
    return wrong


def on_pixels(reference: Ensemble, other: Ensemble, chips: xr.Dataset) -> OnPixels:
    """Compare what the map is made of, at all observed pixels of chips."""
    largest: dict[str, float] = {}
    total: dict[str, float] = {}
    pairs: dict[str, npt.NDArray[np.int64]] = {}
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
            total[task.name] = total.get(task.name, 0.0) + float(off[:, seen].sum()) / len(off)
            if task.kind == "segmentation":
                k = len(a)
                both = (a.argmax(0) * k + b.argmax(0))[seen]
                n_of = np.bincount(both, minlength=k * k).reshape(k, k)
                pairs[task.name] = pairs.get(task.name, np.zeros((k, k), np.int64)) + n_of
    n = max(pixels, 1)
    same = {k: float(np.trace(m)) / n for k, m in pairs.items()}
    iou = {k: _overlap(m) for k, m in pairs.items()}
    return OnPixels(largest, {k: v / n for k, v in total.items()}, same, iou, pixels)


def _overlap(pairs: npt.NDArray[np.int64]) -> float:
    """Mean intersection over union of (K, K) counts, over the classes of the rows."""
    union = pairs.sum(0) + pairs.sum(1) - np.diag(pairs)
    there = pairs.sum(1) > 0
    return float((np.diag(pairs)[there] / union[there]).mean()) if there.any() else 1.0


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
