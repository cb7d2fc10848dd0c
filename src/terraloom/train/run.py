"""Training jobs of a campaign: one member of the ensemble each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.config.campaign import Campaign
from terraloom.errors import StateError
from terraloom.grid import geobox_from_record
from terraloom.io import digest_json, read_json, read_store, sha256
from terraloom.labels.buffer import buffered
from terraloom.legend import IGNORE_INDEX
from terraloom.log import get_logger
from terraloom.models.devices import be_exact, choose_device
from terraloom.models.heads import TaskSpec
from terraloom.models.temporal import ENCODERS
from terraloom.state import code_digest
from terraloom.train.augment import Augmentation
from terraloom.train.checkpoint import Checkpoint
from terraloom.train.cleaning import TrainingWeights, label_rules, training_weights
from terraloom.train.distributed import World, join_world, leave_world
from terraloom.train.fit import FitSettings, fit_member, save_fit
from terraloom.train.live import Live
from terraloom.train.model_files import CHIPS, member_file, task_specs
from terraloom.train.pack import array_in, blocks_of
from terraloom.train.preset import preset
from terraloom.train.search import search

__all__ = ["WORK", "fit_settings", "search_settings", "train_member"]

WORK = Path("work/train")
SEARCH = Path("work/search")

log = get_logger(__name__)


def fit_settings(campaign: Campaign, chips: xr.Dataset) -> FitSettings:
    """The campaign's settings of training in the form that training takes.

    With ``model.preset: auto`` keys that the campaign does not give follow from the labels.
    """
    m = campaign.model
    if m.preset == "auto":
        ruled = preset(chips, task_specs(campaign))
        free = {k: v for k, v in ruled.settings.items() if k not in m.model_fields_set}
        for key, value in free.items():
            log.info("model.%s: %s (%s)", key, value, ruled.reasons[key])
        m = m.model_copy(update=free)
    single = m.network in ENCODERS
    return FitSettings(
        network=m.network, adapt=m.adapt, backbone=m.backbone or "", width=m.width,
        depth=m.depth, dropout=m.dropout,
        epochs=m.epochs, batch=m.batch, accumulate=m.accumulate, learning_rate=m.learning_rate,
        weight_decay=m.weight_decay, ema=m.ema, patience=m.patience, precision=m.precision,
        device=m.device, balance=m.balance, co_teaching=m.co_teaching,
        draw_power={"area": 1.0, "class": 0.0}[m.sampling],
        # Networks of single pixels gain nothing from neighbours, and cost more per pixel.
        crop_px=24 if single else FitSettings.crop_px,
        augmentation=Augmentation(**m.augment.model_dump()),
    )  # fmt: skip


def search_settings(campaign: Campaign, fold: int) -> None:
    """Search settings for the members that do not see ``fold``, inside their training folds."""
    wanted = campaign.model.search
    if wanted is None:
        raise StateError("the campaign asks for no search", where="model.search",
                         fix="give model.search, or leave this command out")  # fmt: skip
    torch.set_num_threads(1)
    chips = read_store(CHIPS)
    base, tasks = fit_settings(campaign, chips), task_specs(campaign)
    origin = digest_json(
        [sha256(CHIPS), asdict(base), [asdict(t) for t in tasks], fold, campaign.seed,
         code_digest("train.search")]
    )  # fmt: skip
    found = search(
        chips, tasks, base, held_out_fold=fold, trials=wanted.trials, minutes=wanted.minutes,
        seed=campaign.seed, folds=wanted.folds, folder=SEARCH / f"fold-{fold}", origin=origin,
        keep_of=lambda f: _outside_buffer(campaign, chips, f),
    )  # fmt: skip
    log.info("fold %d: best of %d settings: %s", fold, len(found.trials), found.best)


def train_member(campaign: Campaign, fold: int, member: int) -> None:
    """Train one network that does not see ``fold``.

    A training that was killed goes on where it stood, to the same bytes. With
    ``model.processes`` above 1 that many processes train it together.
    """
    if campaign.model.processes > 1 and "WORLD_SIZE" not in os.environ:
        _run_together(campaign.model.processes)
        return
    torch.set_num_threads(1)  # more threads change the order of sums; jobs run side by side
    device = choose_device(campaign.model.device)
    be_exact(device)
    world = join_world(device)
    try:
        _train(campaign, fold, member, world)
    finally:
        leave_world()


def _run_together(processes: int) -> None:
    """This very command in several processes that know of each other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={processes}", "-m", "terraloom.cli", *sys.argv[1:]]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise StateError(
            f"training in {processes} processes ended with code {done.returncode}",
            where="model.processes", fix="see the message above; or set model.processes to 1",
        )  # fmt: skip


def _train(campaign: Campaign, fold: int, member: int, world: World) -> None:
    chips = read_store(CHIPS)
    settings, tasks = fit_settings(campaign, chips), task_specs(campaign)
    if campaign.model.search is not None:
        chosen = read_json(SEARCH / f"fold-{fold}" / "best.json")["chosen"]
        settings = replace(settings, **chosen)
    labels = CHIPS.with_name("folds.gpkg")
    origin = digest_json(
        [sha256(CHIPS), sha256(labels), asdict(settings), [asdict(t) for t in tasks], fold, member,
         campaign.seed, campaign.folds.model_dump(mode="json"),
         [asdict(r) for r in label_rules(campaign).values()], code_digest("train.run")]
    )  # fmt: skip
    name = f"fold-{fold}-member-{member}"
    checkpoint = Checkpoint(WORK / f"{name}.safetensors", origin)
    folder = WORK / f"{name}-pack-{world.rank}"
    try:
        keep = _outside_buffer(campaign, chips, fold, folder)
        found = _weighed(campaign, chips, tasks, fold, keep, folder)
        fit = fit_member(
            chips, tasks, settings, held_out_fold=fold, member=member, seed=campaign.seed,
            checkpoint=checkpoint, folder=folder, keep=keep, weights=found.weights,
            transitions=found.transitions, world=world, pretrained=campaign.model.weights,
            live=Live(WORK / f"{name}.csv"),
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if world.rank:
        return  # one of them writes
    save_fit(member_file(fold, member), fit, origin=origin, labels=found.record)
    checkpoint.remove()
    first = next(iter(fit.history.values()))
    log.info("fold %d, member %d: %d steps, epoch %d kept", fold, member, len(first), fit.epoch)


def _weighed(
    campaign: Campaign,
    chips: xr.Dataset,
    tasks: list[TaskSpec],
    fold: int,
    keep: npt.NDArray[np.bool_] | None,
    folder: Path,
) -> TrainingWeights:
    """Weights of the labels for a held-out fold, by the rules of their tasks."""
    rules = label_rules(campaign)
    if not rules:
        return TrainingWeights()
    aligned = gpd.read_file(CHIPS.with_name("folds.gpkg"), layer="labels")
    aligned = aligned.set_crs(str(geobox_from_record(chips.attrs).crs), allow_override=True)
    return training_weights(
        chips, tasks, rules, held_out_fold=fold, seed=campaign.seed, labels=aligned,
        periods=campaign.cube.periods, keep=keep, folder=folder,
    )  # fmt: skip


def _outside_buffer(
    campaign: Campaign, chips: xr.Dataset, fold: int, folder: Path | None = None
) -> npt.NDArray[np.bool_] | None:
    """Pixels that are far enough from held-out labels; None: all are. In files with a folder."""
    if campaign.folds.buffer_m == 0:
        return None
    size = chips["fold"].shape
    folds = array_in(size, np.uint8, folder, "fold")
    labelled = array_in(size, np.bool_, folder, "labelled")
    names = [f"y_{t.name}" for t in campaign.tasks]
    for at, part in blocks_of(chips[["fold", *names]]):
        folds[at] = part["fold"].values
        targets = [part[n].values for n in names]
        labelled[at] = np.any(
            [y != IGNORE_INDEX if y.dtype == np.uint8 else np.isfinite(y) for y in targets], axis=0
        )
    pixel_m = abs(float(geobox_from_record(chips.attrs).resolution.x))
    return buffered(
        folds, labelled, chips["row"].values, chips["col"].values, pixel_m, fold,
        campaign.folds.buffer_m, out=array_in(size, np.bool_, folder, "keep"),
    )  # fmt: skip
