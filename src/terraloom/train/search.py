"""Search for better settings of training, inside the training folds of one held-out fold.

Scores are reported on held-out folds, so a fold must not help to choose the settings of the
networks that it scores. Each held-out fold therefore has a search of its own, which sees the other
folds only: settings are trained on all of them but one, and scored on that one. The networks of
different folds may then differ in their settings. A single search for all folds would cost a
fraction, but every score would come from labels that had chosen the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.errors import FoldError, ModelError
from terraloom.io import write_json
from terraloom.log import get_logger
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE
from terraloom.models.temporal import ENCODERS
from terraloom.preprocess.groups import group_factor
from terraloom.train.fit import FitSettings, fit_member
from terraloom.train.held_out import Validator
from terraloom.train.trials import Choice, Range, Space, Trial, Value, optimise
from terraloom.train.windows import modalities_of

__all__ = ["SearchResult", "search", "space_of"]

#: Chips of a search (count); of more a random part.
_MOST_CHIPS = 2000
#: Score of a training that diverged: that of a prediction as bad as the opposite of the mean.
_DIVERGED = -1.0

Masks = Callable[[int], npt.NDArray[np.bool_] | None]

log = get_logger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        settings: Settings of training, the best ones in place.
        best: The best trial; no worse than ``first``.
        first: The trial of the settings that the search started from.
        trials: All trials by number.
        validation_folds: Folds that scored the settings.
        seconds: Computing time of all trials (seconds).
    """

    settings: FitSettings
    best: Trial
    first: Trial
    trials: tuple[Trial, ...]
    validation_folds: tuple[int, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``best.json``."""
        return {
            "chosen": self.best.values,
            "score": self.best.score,
            "score_of_the_given_settings": self.first.score,
            "validation_folds": list(self.validation_folds),
            "seconds": round(self.seconds, 1),
            "trials": [asdict(t) for t in self.trials],
        }


def search(
    chips: xr.Dataset,
    tasks: Sequence[TaskSpec],
    base: FitSettings,
    *,
    held_out_fold: int,
    trials: int,
    minutes: float,
    seed: int,
    folds: int = 1,
    folder: Path | None = None,
    origin: str = "",
    keep_of: Masks | None = None,
) -> SearchResult:
    """Settings that are best for the networks which do not see a fold.

    No label of the held-out fold has any influence, and its pixels none on the normalisation.

    Args:
        chips: As in :func:`terraloom.train.fit.fit_member`.
        tasks: What to predict.
        base: Settings to start from; they are the first trial.
        held_out_fold: Fold that the search must not see.
        trials: Settings that are tried (count).
        minutes: Computing time, all jobs together, after which no trial is started (minutes).
        seed: Seed of the campaign.
        folds: Training folds on which each setting is scored (count); at most all.
        folder: Where the journal and ``best.json`` stand; None: nothing is written. Jobs with the
            same folder work on one search.
        origin: Digest of what is trained from; a search from something else starts anew.
        keep_of: For a held-out fold, the pixels (N, h, w) that may be trained on, or None.

    Returns:
        The same for the same seed, as long as the time suffices for all trials and one job does
        them.

    Raises:
        FoldError: Fewer than two folds with labels are left.
        ModelError: Optuna is not installed.
    """
    chips, rows = _some(chips, seed)
    use = _validation_folds(chips, tasks, held_out_fold)[:folds]
    hidden = {v: _hidden(chips, tasks, held_out_fold, v) for v in use}
    masks = {v: _mask(keep_of, (held_out_fold, v), rows) for v in use}
    space = space_of(base, tasks, chips)

    def score(values: dict[str, Value], step: int) -> float:
        settings, v = replace(base, **values), use[step]  # type: ignore[arg-type]
        try:
            fit = fit_member(
                hidden[v], tasks, settings, held_out_fold=v, member=0, seed=seed, keep=masks[v]
            )
        except ModelError as err:
            if "diverged" not in str(err):
                raise
            return _DIVERGED
        return Validator(hidden[v], tasks, v)(fit.network())

    start = {name: getattr(base, name) for name in space}
    found = optimise(
        score, space, steps=len(use), trials=trials, minutes=minutes,
        seed=seed + 1000 * held_out_fold, start=start,
        journal=folder / "journal.log" if folder else None,
        name=f"fold-{held_out_fold}-{origin[:16]}",
    )  # fmt: skip
    whole = [t for t in found if not t.ended]
    best = max(whole, key=lambda t: (t.score, -t.number))
    first = next((t for t in whole if t.values == start), found[0])
    result = SearchResult(
        replace(base, **best.values), best, first, tuple(found), tuple(use),  # type: ignore[arg-type]
        sum(t.seconds for t in found),
    )  # fmt: skip
    if folder:
        write_json(folder / "best.json", result.to_json())
    return result


def space_of(base: FitSettings, tasks: Sequence[TaskSpec], chips: xr.Dataset) -> Space:
    """What is searched: around the given settings, as far as they exist for the network.

    Width and depth are left alone where the width of every level is given, and so is depth for
    networks of single pixels. Depths whose strides do not divide the chips are left out.
    """
    known = {f.name for f in fields(base)}
    space: dict[str, Range | Choice] = {}
    network = str(getattr(base, "network", "fusion"))
    if not base.widths:
        space["width"] = Range(max(4, base.width // 2), 2 * base.width, log=True, whole=True)
        size = math.gcd(*chips["fold"].shape[1:])
        factors = [group_factor(g) for g in modalities_of(chips)]
        depths = [
            d for d in range(max(2, base.depth - 1), min(7, base.depth + 1) + 1)
            if d == base.depth or size % math.lcm(*factors, 2 ** (d - 1)) == 0
        ]  # fmt: skip
        if network not in ENCODERS and len(depths) > 1:
            space["depth"] = Choice(tuple(depths))
    rate = base.learning_rate
    space["learning_rate"] = Range(rate / 5, min(1.0, 4 * rate), log=True)
    epochs = base.epochs
    low, high = max(1, math.floor(epochs / 2)), math.ceil(2 * epochs)
    whole = float(epochs).is_integer()
    space["epochs"] = Range(min(low, epochs), high, log=True, whole=whole)
    space["batch"] = Choice(tuple(sorted({max(1, base.batch // 2), base.batch, 2 * base.batch})))
    if any(t.kind == "segmentation" for t in tasks):
        space["class_power"] = Range(0.0, 1.0)
        space["draw_power"] = Range(0.0, 1.0)
    if "balance" in known and len(tasks) > 1:
        space["balance"] = Choice(("equal", "uncertainty", "famo", "pcgrad", "upgrad"))
    return space


# --- folds ---------------------------------------------------------------------------------------


def _some(chips: xr.Dataset, seed: int) -> tuple[xr.Dataset, npt.NDArray[np.int64] | slice]:
    """All chips, or a random part of many, and which these are."""
    n = chips.sizes["n"]
    if n <= _MOST_CHIPS:
        return chips, slice(None)
    rows = np.sort(np.random.default_rng(seed).choice(n, _MOST_CHIPS, replace=False))
    return chips.isel(n=rows), rows


def _has(task: TaskSpec, y: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    has = y < len(task.classes) if task.classed else np.isfinite(y)
    return np.asarray(has, dtype=bool)


def _validation_folds(
    chips: xr.Dataset, tasks: Sequence[TaskSpec], held_out_fold: int
) -> list[int]:
    """Folds with labels of the most tasks, from the one after the held-out fold on, cyclically."""
    fold = np.asarray(chips["fold"].values)
    counts = np.zeros(256, np.int64)
    for t in tasks:
        counts[np.unique(fold[_has(t, np.asarray(chips[f"y_{t.name}"].values))])] += 1
    counts[[held_out_fold, IGNORE]] = 0
    found = np.flatnonzero(counts)
    if len(found) < 2:
        raise FoldError(
            f"{len(found)} folds with labels beside fold {held_out_fold}", where="model.search",
            allowed="2 or more: one to train on and one to compare on",
            fix="set folds.count to 3 or more, or leave model.search out",
        )  # fmt: skip
    best = [int(f) for f in found if counts[f] == counts.max()]
    return sorted(best, key=lambda f: (f < held_out_fold, f))


def _hidden(
    chips: xr.Dataset, tasks: Sequence[TaskSpec], held_out_fold: int, validation_fold: int
) -> xr.Dataset:
    """Chips without any label of the held-out fold, whose pixels join the validation fold.

    So they are left out of training and normalisation as the validation fold is, and score
    nothing, as they have no label.
    """
    fold = np.array(chips["fold"].values)
    gone = fold == held_out_fold
    fold[gone] = validation_fold
    out = chips.assign(fold=(chips["fold"].dims, fold))
    for t in tasks:
        for name, none in ((f"y_{t.name}", IGNORE if t.classed else np.nan),
                           (f"label_{t.name}", -1), (f"w_{t.name}", 0)):  # fmt: skip
            if name in chips:
                values = np.array(chips[name].values)
                values[gone] = none
                out[name] = (chips[name].dims, values, chips[name].attrs)
        if f"s_{t.name}" in chips:
            shares = np.array(chips[f"s_{t.name}"].values)
            shares[np.broadcast_to(gone[:, None], shares.shape)] = 0
            out[f"s_{t.name}"] = (chips[f"s_{t.name}"].dims, shares, chips[f"s_{t.name}"].attrs)
    return out


def _mask(
    keep_of: Masks | None, without: Iterable[int], rows: npt.NDArray[np.int64] | slice
) -> npt.NDArray[np.bool_] | None:
    """Pixels that are far enough from the labels of all these folds; None: all."""
    masks = [m[rows] for f in without if keep_of is not None and (m := keep_of(f)) is not None]
    return np.logical_and.reduce(masks) if masks else None


# --- the search itself ---------------------------------------------------------------------------
