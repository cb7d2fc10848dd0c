"""What the networks know: features of labelled pixels, the measure of the area of applicability.

Each fold gives one network, its first member, with training pixels of other folds as reference,
and its own labelled pixels, which that network has not seen, for the threshold. Labels count
alike: one pixel of each is taken before a second of any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.config.campaign import Campaign
from terraloom.errors import FoldError, ModelError
from terraloom.io import read_store
from terraloom.legend import IGNORE_INDEX
from terraloom.log import get_logger
from terraloom.models.heads import Head
from terraloom.models.mapnet import FEATURES, MapNet
from terraloom.models.registry import check_contract, load_member
from terraloom.train.model_files import CHIPS, MODEL, member_files, task_specs
from terraloom.train.windows import inputs_of, modalities_of, units_of
from terraloom.uncertainty.applicability import (
    CELL_PX,
    Applicability,
    Space,
    cell_means,
    dissimilarity,
    fit_space,
    threshold_of,
)
from terraloom.uncertainty.applicability_file import write_applicability

__all__ = ["fit_applicability", "importance"]

#: Least labelled pixels of a fold from which a threshold can be told (count).
_LEAST = 10

I64 = npt.NDArray[np.int64]
log = get_logger(__name__)


def fit_applicability(campaign: Campaign) -> None:
    """Write ``applicability.safetensors`` and its card beside the members."""
    torch.set_num_threads(1)
    chips = read_store(CHIPS)
    task, most = campaign.land_cover.name, campaign.uncertainty.points
    label, fold = (chips[v].to_numpy().ravel() for v in (f"label_{task}", "fold"))
    label = np.where(chips[f"y_{task}"].to_numpy().ravel() == IGNORE_INDEX, -1, label)
    spaces: dict[str, Space] = {}
    training: list[npt.NDArray[np.float32]] = []
    for f in range(campaign.folds.count):
        file = member_files(f)[0]
        net, card = load_member(file)
        check_contract(
            card, modalities_of(chips), task_specs(campaign), units=units_of(chips), where=str(file)
        )
        rng = np.random.default_rng([campaign.seed, f])
        known = _some_pixels(label, fold != f, most, rng)
        own = _some_pixels(label, fold == f, most, rng)
        if min(len(known), len(own)) < _LEAST:
            raise FoldError(
                f"{len(own)} labelled pixels in fold {f}, {len(known)} outside", allowed="10 each",
                where=f"task {task}", fix="more labels, or uncertainty.applicability: no",
            )  # fmt: skip
        features = _features(net, chips, np.concatenate([known, own]))
        reference = features[: len(known)]
        space = fit_space(reference, importance(net, task) * reference.std(axis=0, ddof=1))
        spaces[f"fold-{f}/{file.stem}"] = space
        training.append(dissimilarity(features[len(known) :], space)[0])
    threshold = threshold_of(np.concatenate(training))
    found = Applicability(tuple(spaces.values()), threshold)
    write_applicability(MODEL, found, list(spaces), np.concatenate(training))


def _some_pixels(
    label: npt.NDArray[Any], take: npt.NDArray[np.bool_], most: int, rng: np.random.Generator
) -> I64:
    """Positions of at most so many labelled pixels, one of each label before a second of any."""
    at = rng.permutation(np.flatnonzero(take & (label >= 0)))
    order = np.argsort(label[at], kind="stable")
    _, first = np.unique(label[at][order], return_index=True)
    turn = np.empty(len(at), np.int64)
    turn[order] = np.arange(len(at)) - np.repeat(first, np.diff(np.append(first, len(at))))
    return np.sort(at[np.argsort(turn, kind="stable")[:most]])


def _features(net: MapNet, chips: xr.Dataset, at: I64, batch: int = 4) -> npt.NDArray[np.float32]:
    """(S, D) features of the cells of some pixels, positions in the flattened chips."""
    w = chips.sizes["x_10"]
    chip, row, col = np.unravel_index(at, chips["fold"].shape)
    cell = (row // CELL_PX) * (w // CELL_PX) + col // CELL_PX
    out: npt.NDArray[np.float32] | None = None
    rows = np.unique(chip)
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        described = net.predict(inputs_of(chips.isel(n=some).load()), describe=True)[
            FEATURES
        ].numpy()
        for n, f in zip(some, described, strict=True):
            mine = chip == n
            if out is None:
                out = np.empty((len(at), f.shape[0]), np.float32)
            out[mine] = cell_means(f)[cell[mine]]
    if out is None:
        raise ModelError("no pixel", where="features of the training pixels")
    return out


def importance(net: MapNet, task: str) -> npt.NDArray[np.float64]:
    """(D,) how much a task's prediction changes with each feature: the norm of its weights."""
    head = net.heads[task]
    if not isinstance(head, Head):
        raise ModelError(f"task {task} has no head", where="applicability")
    weights: npt.NDArray[np.float64] = head.conv.weight.detach().double().flatten(1).numpy()
    norms: npt.NDArray[np.float64] = np.sqrt((weights**2).sum(axis=0))
    return norms
