"""Predictions of labels that a network has not seen, and their score while it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from terraloom.errors import ModelError
from terraloom.models.fusion import FusionSpec
from terraloom.models.heads import TaskSpec, scene_of
from terraloom.models.losses import IGNORE
from terraloom.models.mapnet import MapNet
from terraloom.train.pack import Positions, blocks_of
from terraloom.train.windows import inputs_of, labels_of

__all__ = ["HeldOut", "Predictor", "Validator", "predict_held_out"]

#: Held-out pixels of a fold and task that are predicted (count); of more a random part.
MOST_PIXELS = 1_000_000
#: Chips that early stopping looks at (count).
_VALIDATION_CHIPS = 256


class Predictor(Protocol):
    """What predicts as :class:`MapNet` does, whatever runs it."""

    @property
    def spec(self) -> FusionSpec:
        """What it takes and predicts."""

    def predict(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`MapNet.predict`."""


@dataclass(frozen=True)
class HeldOut:
    """Predictions of the held-out labelled pixels of one task.

    Attributes:
        index: (S,) positions in the flattened (N, h, w) chips.
        fold: (S,) fold of each pixel.
        y: (S,) class, or value in the task's unit.
        p: (M, S, c) per member: class probabilities, (mean, variance), or boundary probability.
    """

    index: npt.NDArray[np.int64]
    fold: npt.NDArray[np.uint8]
    y: npt.NDArray[np.generic]
    p: npt.NDArray[np.float32]

    @staticmethod
    def join(parts: Sequence[HeldOut]) -> HeldOut:
        """All folds together; they must have the same number of members."""
        return HeldOut(
            np.concatenate([p.index for p in parts]),
            np.concatenate([p.fold for p in parts]),
            np.concatenate([p.y for p in parts]),
            np.concatenate([p.p for p in parts], axis=1),
        )


def _labels(chips: xr.Dataset) -> xr.Dataset:
    return chips[[str(v) for v in chips.variables if not str(v).startswith("x_")]]


def _labelled(part: xr.Dataset, tasks: Sequence[TaskSpec], fold: int) -> dict[str, Tensor]:
    """Labels of a fold, none elsewhere."""
    return labels_of(part, tasks, np.asarray(part["fold"].values) == fold)[0]


def _has(y: Tensor) -> Tensor:
    return y != IGNORE if y.dtype == torch.uint8 else torch.isfinite(y)


def predict_held_out(
    chips: xr.Dataset,
    members: Sequence[Predictor],
    held_out_fold: int,
    *,
    batch: int = 4,
    most: int = MOST_PIXELS,
) -> dict[str, HeldOut]:
    """Predict the labelled pixels of the fold that these members did not train on.

    Args:
        chips: As in :func:`terraloom.train.fit.fit_member`; read a few at a time.
        members: Networks in evaluation mode, all with the same tasks and ``held_out_fold``.
        held_out_fold: Their fold.
        batch: Chips per forward pass (count); without influence on the result.
        most: Of more labelled pixels than this a random part is predicted (count).

    Returns:
        Per task.
    """
    if not members:
        raise ModelError("no member", fix="train first")
    tasks = members[0].spec.tasks
    _, h, w = chips["fold"].shape
    found = {t.name: Positions(most) for t in tasks}
    for at, part in blocks_of(_labels(chips)):
        for name, y in _labelled(part, tasks, held_out_fold).items():
            found[name].add(np.flatnonzero(_has(y).numpy()) + at.start * h * w)
    index = {name: p.array() for name, p in found.items()}
    rows = np.unique(np.concatenate([i // (h * w) for i in index.values()]))
    got: dict[str, list[list[Tensor]]] = {t.name: [[] for _ in members] for t in tasks}
    true: dict[str, list[Tensor]] = {t.name: [] for t in tasks}
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        part = chips.isel(n=some).load()
        labels = _labelled(part, tasks, held_out_fold)
        x = inputs_of(part)
        picks = {t.name: _picked(index[t.name], some, h * w) for t in tasks}
        for name, pick in picks.items():
            true[name].append(labels[name].reshape(-1)[pick])
        for m, net in enumerate(members):
            for name, p in net.predict(x).items():
                got[name][m].append(p.cpu().permute(0, 2, 3, 1).flatten(0, 2)[picks[name]])
    out: dict[str, HeldOut] = {}
    for t in tasks:
        n = len(index[t.name])
        each = [torch.cat(v).numpy() if v else np.zeros((0, t.channels), np.float32)
                for v in got[t.name]]  # fmt: skip
        y_all = torch.cat(true[t.name]).numpy() if true[t.name] else np.zeros(0, np.float32)
        folds = np.full(n, held_out_fold, np.uint8)
        out[t.name] = HeldOut(index[t.name], folds, y_all, np.stack(each))
    return out


def _picked(index: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], size: int) -> Tensor:
    """Positions among the pixels of some chips."""
    parts = []
    for i, row in enumerate(rows):
        low, high = np.searchsorted(index, (row * size, (row + 1) * size))
        parts.append(index[low:high] - (row - i) * size)
    return torch.from_numpy(np.concatenate(parts))


class Validator:
    """Score of a network on a fold that it is not trained on, without keeping predictions.

    The score is the mean over tasks of macro-F1 (classes of pixels, or of whole chips), and of
    1 - squared error / variance (values and boundaries); 1 is perfect.

    Args:
        chips: The chips; of those with a label in the fold a random part, where there are many.
        tasks: The tasks.
        fold: The fold.
    """

    def __init__(self, chips: xr.Dataset, tasks: Sequence[TaskSpec], fold: int) -> None:
        rows: list[int] = []
        for at, part in blocks_of(_labels(chips)):
            some = [_has(y).flatten(1).any(1) for y in _labelled(part, tasks, fold).values()]
            rows += (torch.nonzero(torch.stack(some).any(0))[:, 0] + at.start).tolist()
        if not rows:
            raise ModelError(f"no label in fold {fold}", where="early stopping",
                             allowed="a fold with labels", fix="use more labels")  # fmt: skip
        if len(rows) > _VALIDATION_CHIPS:
            chosen = np.random.default_rng(fold).choice(rows, _VALIDATION_CHIPS, replace=False)
            rows = np.sort(chosen).tolist()
        self._chips, self._rows = chips, rows
        self._tasks, self._fold = tasks, fold

    def __call__(self, net: MapNet) -> float:
        """The score; the network must be in evaluation mode."""
        sums = {t.name: _Sums(t) for t in self._tasks}
        for start in range(0, len(self._rows), 4):
            part = self._chips.isel(n=self._rows[start : start + 4]).load()
            labels = _labelled(part, self._tasks, self._fold)
            for name, p in net.predict(inputs_of(part)).items():
                sums[name].add(p.cpu(), labels[name])
        scores = [v for v in (s.score() for s in sums.values()) if np.isfinite(v)]
        return float(np.mean(scores)) if scores else float("nan")


class _Sums:
    """Running sums behind the score of one task."""

    def __init__(self, task: TaskSpec) -> None:
        k = len(task.classes)
        self._kind = task.kind
        self._matrix = np.zeros((k, k), np.int64)
        self._sums = np.zeros(4)

    def add(self, p: Tensor, y: Tensor) -> None:
        has = _has(y)
        if self._kind == "scene":  # a chip is one label
            share = torch.nn.functional.one_hot(torch.where(has, y, 0).long(), p.shape[1])
            share = (share * has[..., None]).sum((1, 2))
            some = has.flatten(1).any(1)
            p, y = scene_of(p, has)[some][..., None], share[some].argmax(1)[:, None]
            has = torch.ones_like(y, dtype=torch.bool)
        if self._kind in ("segmentation", "scene"):
            pair = y[has].long() * len(self._matrix) + p.argmax(1)[has]
            self._matrix += np.bincount(pair.numpy(), minlength=self._matrix.size).reshape(
                self._matrix.shape
            )
            return
        true, said = y[has].double().numpy(), p[:, 0][has].double().numpy()
        self._sums += [len(true), true.sum(), (true**2).sum(), ((said - true) ** 2).sum()]

    def score(self) -> float:
        if self._kind in ("segmentation", "scene"):
            both = np.diag(self._matrix)
            total = self._matrix.sum(0) + self._matrix.sum(1)
            seen = self._matrix.sum(1) > 0
            return float((2 * both[seen] / total[seen]).mean()) if seen.any() else float("nan")
        n, first, second, error = self._sums
        spread = second - first**2 / n if n else 0.0
        return float(1 - error / spread) if spread > 0 else float("nan")
