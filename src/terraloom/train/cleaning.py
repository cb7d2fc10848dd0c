"""Weights of labels in training: by their time, and by whether held-out predictions believe them.

Both are found anew for each held-out fold, from the other folds alone: what a label weighs must
not depend on labels that the network is tested on. So the classes that a change test compares
with are known by training labels only, and wrong labels are judged by forests that are fitted and
cross-validated within the training folds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import xarray as xr
from sklearn.ensemble import RandomForestClassifier

from terraloom.config.campaign import Campaign
from terraloom.errors import LabelError
from terraloom.labels.change import PeriodLike
from terraloom.labels.clean import (
    LabelReview,
    Predict,
    label_weights,
    pixel_weights,
    review_counts,
    review_in_rounds,
    transition,
)
from terraloom.labels.rasterise import NO_LABEL
from terraloom.labels.time import weigh_chips
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.train.baseline import pixels_at_10m
from terraloom.train.pack import array_in, blocks_of

__all__ = ["LabelRule", "TrainingWeights", "label_rules", "training_weights"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Size of a forest that judges labels: it must find what is regular, not win a contest.
_TREES, _MAX_TRAIN = 60, 8000
#: Pixels looked at per label (count): a label is judged as a whole.
_MOST_PX = 64
#: Parts that the blocks of a single training fold are dealt to.
_PARTS = 4
#: Chips whose pixels are read at once (count).
_BLOCK = 32


@dataclass(frozen=True)
class LabelRule:
    """What becomes of the labels of one task in training.

    Attributes:
        clean: ``drop`` or ``weigh`` labels that held-out predictions contradict, or ``none``.
        tau_days: A gap of this many days to the images leaves 37 % of the weight; None: all.
        drop_changed: Labels whose ground changed with this probability are left out; None: none.
        erode_m: As the labels were burnt with.
        forward: Whether the loss needs the label noise.
    """

    clean: Literal["none", "drop", "weigh"] = "none"
    tau_days: float | None = None
    drop_changed: float | None = None
    erode_m: float = 0.0
    forward: bool = False

    @property
    def timed(self) -> bool:
        """Whether the labels' time counts."""
        return self.tau_days is not None or self.drop_changed is not None

    @property
    def reviewed(self) -> bool:
        """Whether the labels are judged."""
        return self.clean != "none" or self.forward


@dataclass(frozen=True)
class TrainingWeights:
    """Weights of labels for one held-out fold.

    Attributes:
        weights: Per task with a rule (N, h, w) float32, 0-1; 0 in the held-out fold, and where
            there is no label or one that must not be trained on.
        transitions: Per task whose loss needs it, (K, K) probability of a label (column) given
            the true class (row).
        record: Per task with a rule, what was done, for the card of the member.
    """

    weights: dict[str, F32] = field(default_factory=dict)
    transitions: dict[str, F64] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def label_rules(campaign: Campaign) -> dict[str, LabelRule]:
    """The campaign's rules, of all tasks that have any."""
    rules = {
        t.name: LabelRule(
            t.labels.clean, t.labels.tau_days, t.labels.drop_changed, t.labels.erode_m,
            t.loss.name == "forward",
        )
        for t in campaign.tasks
    }  # fmt: skip
    return {name: r for name, r in rules.items() if r.timed or r.reviewed}


def training_weights(
    chips: xr.Dataset,
    tasks: Sequence[TaskSpec],
    rules: Mapping[str, LabelRule],
    *,
    held_out_fold: int,
    seed: int,
    labels: gpd.GeoDataFrame | None = None,
    periods: Sequence[PeriodLike] = (),
    keep: npt.NDArray[np.bool_] | None = None,
    folder: Path | None = None,
) -> TrainingWeights:
    """Weights of all pixels' labels for one held-out fold, which has no influence on them.

    Args:
        chips: ``x_<group>``, ``y_<task>``, ``fold``, ``block``, of segmentation tasks
            ``label_<task>``; a ``w_<task>`` multiplies.
        tasks: The tasks.
        rules: Rules of the tasks that have any.
        held_out_fold: Fold kept for testing.
        seed: Of the forests and their subsamples.
        labels: Aligned labels; only where a rule looks at their time.
        periods: Periods of the images; likewise.
        keep: (N, h, w) pixels that may be trained on; None: all.
        folder: Where the weights lie; None: in memory.

    Raises:
        LabelError: All labels of a task end up without weight, or the labels' time is asked for
            without labels.
        FoldError: The training folds have labels in one place only, so that none can be judged.
    """
    out = TrainingWeights()
    for task in tasks:
        if task.name not in rules:
            continue
        rule, record = rules[task.name], {}
        w = array_in(chips["fold"].shape, np.float32, folder, f"weight-{task.name}")
        labelled = _start(w, chips, task, held_out_fold, keep)
        if rule.timed:
            timed, record["time"] = _by_time(chips, task, rule, labels, periods, held_out_fold)
            w *= timed
        _require(w, labelled, task, held_out_fold, record)
        if rule.reviewed:
            review = _review(chips, task, w, held_out_fold, seed)
            each = np.ones(0 if review is None else len(review.ids))
            if review is not None and rule.clean != "none":
                each = label_weights(review, rule.clean)
                for at, part in blocks_of(chips[[f"label_{task.name}"]]):
                    w[at] *= pixel_weights(review, each, part[f"label_{task.name}"].values)
            if review is not None:
                record["clean"] = {"how": rule.clean, **review_counts(review, each)}
            if rule.forward:
                noise = np.eye(len(task.classes)) if review is None else transition(review, each)
                out.transitions[task.name] = noise
                record["transition"] = noise.round(4).tolist()
            _require(w, labelled, task, held_out_fold, record)
        out.weights[task.name] = w
        total = sum(float(v.sum(dtype=np.float64)) for v in w)
        out.record[task.name] = record | {
            "labelled_px": labelled,
            "without_weight_px": labelled - _positive(w),
            "mean_weight": round(total / labelled, 4),
        }
    return out


def _start(
    w: F32, chips: xr.Dataset, task: TaskSpec, held_out_fold: int,
    keep: npt.NDArray[np.bool_] | None,
) -> int:  # fmt: skip
    """Fill in weights before any rule: those of the chips, else 1; how many pixels are labelled."""
    names = [n for n in (f"y_{task.name}", f"w_{task.name}") if n in chips]
    labelled = 0
    for at, part in blocks_of(chips[["fold", *names]]):
        fold, y = part["fold"].values, part[f"y_{task.name}"].values
        has = (fold != held_out_fold) & (fold != IGNORE)
        has &= (y < len(task.classes)) if y.dtype == np.uint8 else np.isfinite(y)
        if keep is not None:
            has &= keep[at]
        labelled += int(has.sum())
        w[at] = has
        if f"w_{task.name}" in part:
            w[at] *= np.nan_to_num(part[f"w_{task.name}"].values)
    return labelled


def _positive(w: F32) -> int:
    """How many pixels have a weight, chip by chip."""
    return sum(int((v > 0).sum()) for v in w)


def _require(w: F32, labelled: int, task: TaskSpec, fold: int, record: Mapping[str, Any]) -> None:
    """Some pixel must be left to train on; else say what took the others."""
    if _positive(w):
        return
    if not labelled:
        found, fix = "no labelled pixel", "use more labels, or other folds"
    else:
        found = f"all {labelled} labelled pixels are without weight"
        fix = "check the labels and their legend"
        if "time" in record:
            t = record["time"]
            found += f": {t['dropped']} of {t['labels']} labels changed, {t['far']} are far in time"
            fix = "a larger labels.tau_days or labels.drop_changed, or labels of another time"
    raise LabelError(found, where=f"task {task.name}, training without fold {fold}",
                     allowed="at least one label to train on", fix=fix)  # fmt: skip


def _by_time(
    chips: xr.Dataset,
    task: TaskSpec,
    rule: LabelRule,
    labels: gpd.GeoDataFrame | None,
    periods: Sequence[PeriodLike],
    held_out_fold: int,
) -> tuple[F32, dict[str, Any]]:
    """Weights of the labels' time, (N, h, w), and what is known of the training labels."""
    if labels is None:
        raise LabelError("no labels to take dates from", where=f"task {task.name}",
                         allowed="the labels that the chips were cut from")  # fmt: skip
    timed, report = weigh_chips(
        chips, labels, task.name, periods=periods, tau_days=rule.tau_days,
        drop_changed=rule.drop_changed, erode_m=rule.erode_m, held_out_fold=held_out_fold,
        require=False,
    )  # fmt: skip
    per = report["per_label"]
    mine = labels.loc[labels["task"] == task.name, "fold"].to_numpy() != held_out_fold
    p, weight = np.array(per["p_change"])[mine], np.array(per["weight"])[mine]
    gone = np.zeros(len(p), bool) if rule.drop_changed is None else p >= rule.drop_changed
    return timed[f"w_{task.name}"].values, {
        "labels": int(mine.sum()),
        "dropped": int(gone.sum()),
        "far": int((~gone & (weight < 1e-3)).sum()),
        "mean_weight": round(float(weight.mean()), 4) if len(weight) else None,
    }


def _review(
    chips: xr.Dataset, task: TaskSpec, w: F32, held_out_fold: int, seed: int
) -> LabelReview | None:
    """Labels of the training folds, judged within them; None where none can be."""
    classes = len(task.classes)
    label, target = f"label_{task.name}", f"y_{task.name}"
    index = _thinned(chips[[label]], label, w)
    y = _values(chips, target, index)
    of = _values(chips, label, index).astype(np.int64)
    part = _parts(chips, index)
    # A forest knows nothing of a class that all other parts lack: such labels are not judged.
    alone = [k for k in np.unique(y) if len(np.unique(part[y == k])) < 2]
    of[np.isin(y, alone)] = NO_LABEL
    if (of == NO_LABEL).all():
        return None
    rng = np.random.default_rng([seed, held_out_fold])

    def fit(x: npt.NDArray[Any], known: npt.NDArray[Any]) -> Predict:
        rows = np.sort(rng.permutation(len(known))[:_MAX_TRAIN])
        forest = RandomForestClassifier(
            _TREES, min_samples_leaf=2, n_jobs=1, random_state=int(rng.integers(2**31))
        ).fit(x[rows], known[rows])

        def predict(new: npt.NDArray[Any]) -> npt.NDArray[Any]:
            p = np.zeros((len(new), classes))
            p[:, forest.classes_.astype(int)] = forest.predict_proba(new)
            return p

        return predict

    return review_in_rounds(_features(chips, index), y, part, fit, of)


def _thinned(chips: xr.Dataset, label: str, w: F32) -> npt.NDArray[np.int64]:
    """Flat positions of at most ``_MOST_PX`` weighed pixels per label, evenly, ascending."""
    pixels = w.shape[1] * w.shape[2]
    size: Counter[int] = Counter()

    def found() -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]]:
        for at, part in blocks_of(chips):
            of = part[label].values.ravel()
            index = np.flatnonzero((w[at].ravel() > 0) & (of != NO_LABEL))
            yield index + at.start * pixels, of[index]

    for _, of in found():
        size.update(
            dict(zip(*(v.tolist() for v in np.unique(of, return_counts=True)), strict=True))
        )
    before: Counter[int] = Counter()
    kept = [np.zeros(0, np.int64)]
    for index, of in found():
        order = np.argsort(of, kind="stable")
        names, first, inverse, count = np.unique(
            of[order], return_index=True, return_inverse=True, return_counts=True
        )
        step = np.array([-(-size[k] // _MOST_PX) for k in names.tolist()], dtype=np.int64)
        gone = np.array([before[k] for k in names.tolist()], dtype=np.int64)
        rank = np.arange(len(order)) - first[inverse] + gone[inverse]
        kept.append(np.sort(index[order[rank % step[inverse] == 0]]))
        before.update(dict(zip(names.tolist(), count.tolist(), strict=True)))
    return np.concatenate(kept)


def _values(chips: xr.Dataset, name: str, index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Values of single pixels of a plane (N, h, w); ``index`` ascends."""
    pixels = math.prod(chips[name].shape[1:])
    parts = []
    for at, part in blocks_of(chips[[name]]):
        low, high = np.searchsorted(index, (at.start * pixels, at.stop * pixels))
        parts.append(part[name].values.ravel()[index[low:high] - at.start * pixels])
    return np.concatenate(parts)


def _parts(chips: xr.Dataset, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Spatial part of each pixel: its fold, or of a single fold its block, dealt to a few."""
    fold = _values(chips, "fold", index).astype(np.int64)
    if len(np.unique(fold)) > 1:
        return fold
    _, rank = np.unique(_values(chips, "block", index), return_inverse=True)
    return np.asarray(rank % _PARTS, dtype=np.int64)


def _features(chips: xr.Dataset, index: npt.NDArray[np.int64]) -> F32:
    """Bands of single pixels, read a few chips at a time; ``index`` ascends."""
    n, h, w = chips["fold"].shape
    inputs = chips[["fold", *(str(v) for v in chips.variables if str(v).startswith("x_"))]]
    parts = []
    for start in range(0, n, _BLOCK):
        low, high = np.searchsorted(index, (start * h * w, (start + _BLOCK) * h * w))
        if high > low:
            block = inputs.isel(n=slice(start, start + _BLOCK))
            parts.append(pixels_at_10m(block, index[low:high] - start * h * w))
    return np.concatenate(parts)
