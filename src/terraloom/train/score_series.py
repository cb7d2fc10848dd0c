"""Scores of networks of pixel series in blocked cross-validation, beside a random forest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import accuracy_score, f1_score

from terraloom.errors import FoldError
from terraloom.io import write_json
from terraloom.labels.leakage import check_twins
from terraloom.models.interpolation import interpolate_series
from terraloom.train.baseline import out_of_fold
from terraloom.train.held_out import HeldOut
from terraloom.train.series import SeriesSettings, cross_validate
from terraloom.train.series_table import SeriesTable, read_series, season_of

__all__ = ["SeriesScores", "forest_series", "score_series", "scores_of"]

_TREES = 200
#: Stands for a missing value in the forest, far below any reflectance or backscatter in dB.
_MISSING = -9999.0


@dataclass(frozen=True)
class SeriesScores:
    """Scores of out-of-fold predictions.

    Attributes:
        accuracy: Overall accuracy of each member (0-1).
        f1: Macro-F1 of each member, over the classes among the labels (0-1).
        joint_accuracy: Overall accuracy of the members' mean probability.
        joint_f1: Its macro-F1.
        reachable: Share of series whose class another fold has too: no classifier can be more
            accurate on these folds (0-1).
        samples: Number of series.
    """

    accuracy: tuple[float, ...]
    f1: tuple[float, ...]
    joint_accuracy: float
    joint_f1: float
    reachable: float
    samples: int

    def record(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def line(self) -> str:
        """One line: mean and sd over members, and of their mean probability."""
        (a, b), (c, d) = (
            (np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0) for v in (self.accuracy, self.f1)
        )
        return (f"OA {a:.3f} sd {b:.3f}, macro-F1 {c:.3f} sd {d:.3f}; joint OA "
                f"{self.joint_accuracy:.3f}, macro-F1 {self.joint_f1:.3f}; reachable OA "
                f"{self.reachable:.3f}, n {self.samples}")  # fmt: skip


def scores_of(held: HeldOut) -> SeriesScores:
    """Scores of out-of-fold class probabilities, such as :func:`cross_validate` makes.

    Raises:
        FoldError: There are no predictions.
    """
    y = np.asarray(held.y)
    if not len(y):
        raise FoldError("no held-out series", where="scores of series", fix="check the folds")
    names = np.unique(y)
    folds_of = {k: np.unique(held.fold[y == k]) for k in names}
    reachable = np.mean([len(folds_of[k]) > 1 for k in y])

    def both(p: npt.NDArray[Any]) -> tuple[float, float]:
        out = p.argmax(-1)
        f1 = f1_score(y, out, average="macro", labels=names, zero_division=0)
        return float(accuracy_score(y, out)), float(f1)

    each = [both(p) for p in held.p]
    joint = both(held.p.mean(0))
    return SeriesScores(tuple(a for a, _ in each), tuple(f for _, f in each), *joint,
                        float(reachable), len(y))  # fmt: skip


def forest_series(table: SeriesTable, *, seeds: Sequence[int], jobs: int = 1) -> HeldOut:
    """Out-of-fold class probabilities of random forests on series interpolated to 24 dates.

    Args:
        table: Series of two folds or more.
        seeds: One forest per seed and fold.
        jobs: Threads (count); without influence on the result.

    Returns:
        As :func:`terraloom.train.series.cross_validate`.
    """
    x = interpolate_series(
        torch.from_numpy(table.x), torch.from_numpy(table.days), steps=24, **season_of(table)
    )
    features = np.nan_to_num(x.flatten(1).numpy(), nan=_MISSING)
    each = [
        out_of_fold(features, table.y, table.fold, len(table.classes), seed=int(seed),
                    trees=_TREES, jobs=jobs)
        for seed in seeds
    ]  # fmt: skip
    p = np.stack(each)
    return HeldOut(np.arange(len(table.y)), table.fold.astype(np.uint8), table.y, p)


def score_series(
    path: Path | str,
    out: Path | str | None = None,
    *,
    encoder: str = "ltae",
    weights: str = "",
    adapt: str = "fine-tune",
    bands: Sequence[str] = (),
    group: str = "",
    block_deg: float = 1.0,
    folds: int = 10,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 30,
    jobs: int = 1,
) -> dict[str, Any]:
    """Score a network and a random forest on a table of labelled series, on the same folds.

    The season is read off the dates. The forest is scored on the same folds shuffled, too: what
    random folds would have claimed.

    Args:
        path: CSV, see :func:`terraloom.train.series_table.read_series`.
        out: JSON file for the record; None writes none.
        encoder: ``ltae``, ``tempcnn``, ``gru`` or ``presto``.
        weights: File of pre-trained weights for ``presto``.
        adapt: What is trained of ``presto``.
        bands: Columns of bands; none = all.
        group: Column of groups that stay whole; empty = blocks of degrees.
        block_deg: Width of a block (degrees).
        folds: Folds (count).
        seeds: One network and one forest per seed and fold.
        epochs: Passes over the training series (count).
        jobs: Threads of the forest (count).

    Returns:
        The record: facts of the table, settings, ``scores`` of ``network``, ``forest`` and
        ``forest_on_random_folds``, and ``lines`` that say the same to a person.

    Raises:
        LabelError: A table that cannot be read.
        FoldError: Folds that cannot be made or held out.
        ModelError: Settings that make no network.
    """
    if not seeds:
        raise FoldError("no seed", where="score_series", allowed="one or more")
    table = read_series(
        path, bands=bands, group=group, block_deg=block_deg, folds=folds, seed=int(seeds[0])
    )
    network: dict[str, Any] = season_of(table)
    if encoder == "presto":
        network["adapt"] = adapt
    settings = SeriesSettings(encoder, network, epochs=epochs, weights=weights)
    shuffled = np.random.default_rng(int(seeds[0])).permutation(table.fold)
    scores = {
        "network": scores_of(cross_validate(table, settings, seeds=seeds)),
        "forest": scores_of(forest_series(table, seeds=seeds, jobs=jobs)),
        "forest_on_random_folds": scores_of(
            forest_series(replace(table, fold=shuffled), seeds=seeds[:1], jobs=jobs)
        ),
    }
    twins = [r for r in check_twins(table.x.reshape(len(table.y), -1), table.fold) if not r["ok"]]
    counts = np.bincount(table.y, minlength=len(table.classes))
    card = asdict(settings)
    card["weights"] = Path(weights).name
    record = {
        "table": {
            "file": Path(path).name, "series": len(table.y), "dates": table.x.shape[1],
            "bands": list(table.bands), "folds": folds, "group": group or f"{block_deg:g} degrees",
            "classes": {k: int(c) for k, c in zip(table.classes, counts, strict=True)},
        },
        "settings": card,
        "seeds": list(map(int, seeds)),
        "scores": {name: s.record() for name, s in scores.items()},
        "leakage": twins,
        "lines": [*(f"{r['check']}: {r['item']}, {r['found']}" for r in twins),
                  *(f"{name.replace('_', ' ')}: {s.line()}" for name, s in scores.items())],
    }  # fmt: skip
    if out is not None:
        write_json(out, record)
    return record
