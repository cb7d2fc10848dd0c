"""Chips of a finished campaign: the real demo (`havel`), or the pair of Chiapas."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from real_data import Rows, forest_scores, held_scores

from terraloom.io import read_store
from terraloom.models.heads import TaskSpec
from terraloom.train.fit import FitSettings, HeldOut, fit_member, predict_held_out


def report(file: Path, seeds: Sequence[int], *, epochs: float) -> None:
    """Print scores of held-out blocks, and what an ensemble of 3 costs.

    Args:
        file: ``chips.zip`` of the campaign.
        seeds: Seeds of the networks and the forest; the folds are those of the campaign.
        epochs: Passes over the chips; 36 in the campaign ``havel``.
    """
    chips = read_store(file).load()
    specs = [
        TaskSpec(t["name"], t["kind"], tuple(chips.attrs["classes"]), weight=1.0)
        if t["kind"] == "segmentation"
        else TaskSpec(t["name"], t["kind"], weight=0.3)
        for t in chips.attrs["tasks"]
    ]
    cover, rows, cost = specs[0], Rows(), []
    for seed in seeds:
        rows.add("forest", forest_scores(chips, cover, seed))
        held = []
        for fold in range(int(chips.attrs["folds"])):
            start = time.process_time()
            fit = fit_member(chips, specs, FitSettings(epochs=epochs), held_out_fold=fold,
                             member=0, seed=seed)  # fmt: skip
            cost.append(time.process_time() - start)
            held.append(predict_held_out(chips, [fit.network()], fold)[cover.name])
        rows.add(f"network, {epochs:g} epochs", held_scores(HeldOut.join(held)))
    three = 3 * sum(cost) / len(cost)
    print(f"{file}: held-out blocks, {len(seeds)} seeds of networks and forest; "
          f"{sum(cost):.0f} CPU s of training; an ensemble of 3 is {three:.0f} CPU s, on 2 cores "
          f"{2 * three / 3:.0f} s")  # fmt: skip
    print(rows.text())
