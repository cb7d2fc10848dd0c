"""Training of one member of the ensemble: small network, short schedule, no held-out label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from terraloom.errors import FoldError
from terraloom.models.coteaching import CoTeachingLoss, Pair
from terraloom.models.devices import choose_device
from terraloom.models.fusion import FusionSpec, Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE, MultiTaskLoss, class_weights
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import build, load_member, ready, save_member
from terraloom.train.augment import Augmentation
from terraloom.train.checkpoint import Checkpoint
from terraloom.train.distributed import World
from terraloom.train.held_out import HeldOut, Validator, predict_held_out
from terraloom.train.live import Live
from terraloom.train.loop import LoopSettings, train
from terraloom.train.pack import Pack, pack_chips, pack_labels
from terraloom.train.sampler import Sampler
from terraloom.train.windows import normalisation_of, spec_of, units_of

__all__ = [
    "FitResult",
    "FitSettings",
    "HeldOut",
    "fit_member",
    "load_member",
    "predict_held_out",
    "save_fit",
]


@dataclass(frozen=True)
class FitSettings(LoopSettings):
    """Settings of training: those of the loop, and what it runs on.

    Attributes:
        network: Network by name; see :data:`terraloom.models.registry.ARCHITECTURES`.
        adapt: What training changes of pre-trained weights: ``fine-tune``, ``frozen``, ``lora``.
        backbone: Encoder of the network ``backbone``.
        width: Channels of the 10 m level (count).
        widths: Channels of every level; overrides ``width`` (counts).
        depth: Levels (count).
        convs: Convolutions per level (count).
        indices: Normalised differences as features.
        dropout: Share of feature maps dropped before the heads (0-1).
        crop_px: Height and width of a crop (10 m pixels).
        class_power: Class weights are frequency^-power in the loss.
        draw_power: Crops are drawn around a class with probability frequency^power.
        erode_px: Class labels this close to another class are not trained on (pixels).
        augmentation: Random changes of the crops.
        co_teaching: Two networks choose the labels that each learns from, the first is kept; see
            :mod:`terraloom.models.coteaching`.
    """

    network: str = "fusion"
    adapt: str = "fine-tune"
    backbone: str = ""
    width: int = 12
    widths: tuple[int, ...] = ()
    depth: int = 4
    convs: int = 1
    indices: bool = True
    dropout: float = 0.05
    crop_px: int = 72
    class_power: float = 0.5
    draw_power: float = 1.0
    erode_px: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    co_teaching: bool = False


@dataclass(frozen=True)
class FitResult:
    """A trained member.

    Attributes:
        state_dict: Averaged weights, with normalisation buffers.
        spec: The network; its tasks hold the target scaling.
        normalisation: Training statistics per modality.
        history: Loss per task and step (NaN where a batch had no label of the task).
        held_out_fold: Fold that had no influence.
        member: Number of the member.
        seed: Seed of the campaign.
        settings: Settings of training.
        scores: Score of the fold of early stopping per epoch.
        epoch: Epoch whose weights these are, from 1.
        units: Unit of each modality.
    """

    state_dict: dict[str, Tensor]
    spec: FusionSpec
    normalisation: dict[str, Normalisation]
    history: dict[str, list[float]]
    held_out_fold: int
    member: int
    seed: int
    settings: FitSettings
    scores: list[float] = field(default_factory=list)
    epoch: int = 0
    units: dict[str, str] = field(default_factory=dict)

    def network(self) -> MapNet:
        """The trained network in evaluation mode, channels-last."""
        net = build(self.spec, self.normalisation)
        net.load_state_dict(self.state_dict)
        return ready(net)


def fit_member(
    chips: xr.Dataset,
    tasks: Sequence[TaskSpec],
    settings: FitSettings,
    *,
    held_out_fold: int,
    member: int,
    seed: int,
    checkpoint: Checkpoint | None = None,
    folder: Path | None = None,
    weights: Mapping[str, npt.NDArray[np.float32]] | None = None,
    keep: npt.NDArray[np.bool_] | None = None,
    world: World | None = None,
    transitions: Mapping[str, npt.ArrayLike] | None = None,
    pretrained: Path | str | None = None,
    live: Live | None = None,
) -> FitResult:
    """Train one member on the labelled pixels of all folds but one.

    Labels of the held-out fold enter neither the loss nor class weights nor target scaling, and
    its pixels no normalisation. Its image values may be seen as unlabelled context around
    training pixels. The same seed and number of threads give the same bytes.

    Args:
        chips: ``x_<modality>`` (N, C, h, w), ``y_<task>`` (N, h, w), ``fold`` (N, h, w), 255 = no
            fold; optional ``w_<task>`` pixel weights and ``s_<task>`` (N, K, h, w) shares of the
            classes in 1/255. Read a few at a time where they are not in memory.
        tasks: What to predict.
        settings: Size of network and schedule.
        held_out_fold: Fold left out; 254 trains on all.
        member: Number of the member; changes the random stream.
        seed: Seed of the campaign.
        checkpoint: Where a killed training goes on; the result is the same to the byte.
        folder: Where the packed training data lie while it runs; None: in memory.
        weights: Pixel weights (N, h, w) per task in place of those of the chips.
        keep: (N, h, w) pixels that may be trained on, e.g. outside a buffer; None: all.
        world: Processes that train together.
        transitions: Per task whose loss needs it, (K, K) probability of a label given the class.
        pretrained: Weights that the networks ``presto`` and ``backbone`` start from.
        live: Shows how far it is.

    Raises:
        FoldError: No labelled pixel remains.
        ModelError: Chips and tasks do not fit together.
    """
    stop = _stop_fold(chips, held_out_fold, member) if settings.patience else None
    free = _Free((held_out_fold, IGNORE, IGNORE if stop is None else stop), keep)
    labels = pack_labels(
        chips, tasks, free, erode_px=settings.erode_px, weights=weights, folder=folder
    )
    scaled = tuple(_scaled(t, labels) for t in tasks)
    spec = _spec(chips, scaled, settings)
    stream = np.random.SeedSequence([seed, held_out_fold, member]).generate_state(2, np.uint64)
    # Weights and dropout draw from torch's global streams: of the caller these stay untouched.
    cuda = choose_device(settings.device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(int(stream[0] >> 1))
        normalisation = normalisation_of(chips, spec, held_out_fold)
        nets = [_network(spec, normalisation, pretrained) for _ in range(1 + settings.co_teaching)]
        net = nets[0]
        pack = pack_chips(net, chips, labels, folder=folder)
        sampler = Sampler(
            net, pack, crop_px=settings.crop_px, class_power=settings.draw_power,
            augmentation=settings.augmentation,
            generator=torch.Generator().manual_seed(int(stream[1] >> 1)),
        )  # fmt: skip
        for each in nets:
            sampler.start_reduction(each, lambda i: free(slice(i, i + 1), chips.isel(n=[i]))[0])
        weighted = _weights(scaled, pack, settings.class_power)
        kind = CoTeachingLoss if settings.co_teaching else MultiTaskLoss
        done = train(
            Pair(*nets) if settings.co_teaching else net, sampler,
            kind(scaled, weighted, transitions=transitions), settings,
            checkpoint=checkpoint, world=world, live=live,
            score=None if stop is None else Validator(chips, scaled, stop),
        )  # fmt: skip
    return FitResult(
        _own(done.state, settings), spec, normalisation, done.history, held_out_fold, member, seed,
        settings, done.scores, done.epoch, units_of(chips),
    )  # fmt: skip


def _network(
    spec: FusionSpec, normalisation: dict[str, Normalisation], pretrained: Path | str | None
) -> MapNet:
    """A fresh network for training."""
    net = build(spec, normalisation)
    if pretrained is not None:
        net.load_pretrained(pretrained)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def _own(state: dict[str, Tensor], s: FitSettings) -> dict[str, Tensor]:
    """The state of the network that is handed back."""
    return Pair.of_first(state) if s.co_teaching else state


@dataclass(frozen=True)
class _Free:
    """Which pixels of chips may be trained on: not those of some folds, nor masked ones."""

    without: tuple[int, ...]
    keep: npt.NDArray[np.bool_] | None

    def __call__(self, at: slice, part: xr.Dataset) -> npt.NDArray[np.bool_]:
        ok = ~np.isin(part["fold"].values, self.without)
        if self.keep is not None:
            ok &= self.keep[at]
        return np.asarray(ok, dtype=bool)


def _spec(chips: xr.Dataset, tasks: Sequence[TaskSpec], s: FitSettings) -> FusionSpec:
    own = {"presto": {"adapt": s.adapt}, "backbone": {"backbone": s.backbone}}
    more = own.get(s.network, {})
    return spec_of(
        chips, tasks, s.network, width=s.width, depth=s.depth, convs=s.convs, indices=s.indices,
        dropout=s.dropout, widths=s.widths, **more,
    )  # fmt: skip


def _stop_fold(chips: xr.Dataset, held_out_fold: int, member: int) -> int:
    """The fold of early stopping: the next one after the held-out fold, another per member."""
    fold = np.asarray(chips["fold"].values)
    others = [int(f) for f in np.unique(fold) if f not in (held_out_fold, IGNORE)]
    if len(others) < 2:
        raise FoldError(f"{len(others)} folds to train on", where="model.patience",
                        allowed="2 or more, one of them to stop by",
                        fix="more folds.count, or model.patience: 0")  # fmt: skip
    after = sorted(others, key=lambda f: (f < held_out_fold, f))
    return after[member % len(after)]


def _scaled(task: TaskSpec, labels: Pack) -> TaskSpec:
    """The task with the mean and sd of its transformed training values."""
    if task.kind != "regression":
        return task
    v = replace(task, mean=0.0, std=1.0).standardise(labels.values(task).double())
    if not len(v):
        raise FoldError(f"task {task.name} has no training value", fix="use more labels")
    std = float(v.std(correction=0))
    return replace(task, mean=float(v.mean()), std=std if std > 1e-9 else 1.0)


def _weights(tasks: Sequence[TaskSpec], pack: Pack, power: float) -> dict[str, Tensor]:
    return {
        t.name: torch.from_numpy(class_weights(pack.class_counts(t), power)).float()
        for t in tasks
        if t.classed
    }


def save_fit(
    path: Path | str, fit: FitResult, *, origin: str = "", labels: Mapping[str, Any] | None = None
) -> None:
    """Write a trained member: ``path`` (safetensors) and its JSON card.

    Args:
        path: The file.
        fit: The member.
        origin: Digest of what it was trained from.
        labels: What was done to the labels, per task.
    """
    save_member(
        path, fit.state_dict, fit.spec, fit.normalisation,
        {
            "origin": origin,
            "units": fit.units,
            "labels": dict(labels or {}),
            "held_out_fold": fit.held_out_fold,
            "member": fit.member,
            "seed": fit.seed,
            "settings": asdict(fit.settings),
            "history": fit.history,
            "scores": fit.scores,
            "epoch": fit.epoch,
        },
    )  # fmt: skip
