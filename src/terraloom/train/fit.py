"""Training of one member of the ensemble: small network, short schedule, no held-out label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from terraloom.errors import FoldError, ModelError
from terraloom.models.fusion import FusionNet, FusionSpec, Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import IGNORE, MultiTaskLoss, SegmentationLoss, class_weights
from terraloom.models.registry import build, load_member, ready, save_member
from terraloom.train.checkpoint import Checkpoint, Progress
from terraloom.train.windows import (
    Augmentation,
    Sampler,
    inputs_of,
    labels_of,
    normalisation_of,
    spec_of,
)

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
class FitSettings:
    """Settings of training.

    Attributes:
        width: Channels of the 10 m level (count).
        widths: Channels of every level; overrides ``width`` (counts).
        depth: Levels (count).
        convs: Convolutions per level (count).
        indices: Normalised differences as features.
        dropout: Share of feature maps dropped before the heads (0-1).
        epochs: Passes over the chips that have labels (count, may be a fraction).
        batch: Crops per step (count).
        crop_px: Height and width of a crop (10 m pixels).
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW, on convolution weights only.
        ema: Decay of the moving average of the weights per step (0-1).
        class_power: Class weights are frequency^-power in the loss.
        draw_power: Crops are drawn around a class with probability frequency^power.
        erode_px: Class labels this close to another class are not trained on (pixels).
        loss: Segmentation loss.
        augmentation: Random changes of the crops.
    """

    width: int = 12
    widths: tuple[int, ...] = ()
    depth: int = 4
    convs: int = 1
    indices: bool = True
    dropout: float = 0.05
    epochs: float = 12
    batch: int = 4
    crop_px: int = 72
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    ema: float = 0.97
    class_power: float = 0.5
    draw_power: float = 1.0
    erode_px: int = 0
    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    augmentation: Augmentation = field(default_factory=Augmentation)


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
    """

    state_dict: dict[str, Tensor]
    spec: FusionSpec
    normalisation: dict[str, Normalisation]
    history: dict[str, list[float]]
    held_out_fold: int
    member: int
    seed: int
    settings: FitSettings

    def network(self) -> FusionNet:
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
) -> FitResult:
    """Train one member on the labelled pixels of all folds but one.

    Labels of the held-out fold enter neither the loss nor class weights nor target scaling, and
    its pixels no normalisation. Its image values may be seen as unlabelled context around
    training pixels. The same seed and number of threads give the same bytes.

    Args:
        chips: ``x_<modality>`` (N, C, h, w), ``y_<task>`` (N, h, w), ``fold`` (N, h, w), 255 = no
            fold; optional ``w_<task>`` pixel weights.
        tasks: What to predict.
        settings: Size of network and schedule.
        held_out_fold: Fold left out; 254 trains on all.
        member: Number of the member; changes the random stream.
        seed: Seed of the campaign.
        checkpoint: Where a killed training goes on; the result is the same to the byte.

    Raises:
        FoldError: No labelled pixel remains.
        ModelError: Chips and tasks do not fit together.
    """
    fold = np.asarray(chips["fold"].values)
    keep = (fold != held_out_fold) & (fold != IGNORE)
    y, w = labels_of(chips, tasks, keep, erode_px=settings.erode_px)
    scaled = tuple(_scaled(t, y[t.name], w.get(t.name)) for t in tasks)
    spec = spec_of(
        chips, scaled, width=settings.width, depth=settings.depth, convs=settings.convs,
        indices=settings.indices, dropout=settings.dropout, widths=settings.widths,
    )  # fmt: skip
    stream = np.random.SeedSequence([seed, held_out_fold, member]).generate_state(2, np.uint64)
    # Initial weights and dropout draw from torch's global stream: it is forked, so that neither
    # the caller's stream nor another member's is touched.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream[0] >> 1))
        normalisation = normalisation_of(chips, spec, held_out_fold)
        net = build(spec, normalisation)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sampler = Sampler(
            net, chips, y, w, crop_px=settings.crop_px, class_power=settings.draw_power,
            augmentation=settings.augmentation,
            generator=torch.Generator().manual_seed(int(stream[1] >> 1)),
        )  # fmt: skip
        sampler.start_reduction(net, keep)
        loss = MultiTaskLoss(scaled, _weights(scaled, y, settings.class_power), settings.loss)
        state, history = _train(net, sampler, loss, settings, checkpoint)
    return FitResult(state, spec, normalisation, history, held_out_fold, member, seed, settings)


def _scaled(task: TaskSpec, y: Tensor, w: Tensor | None) -> TaskSpec:
    """The task with the mean and sd of its transformed training values."""
    if task.kind != "regression":
        return task
    v = replace(task, mean=0.0, std=1.0).standardise(y.double())
    ok = torch.isfinite(v)
    if w is not None:
        ok &= w > 0
    if not bool(ok.any()):
        raise FoldError(f"task {task.name} has no training value", fix="use more labels")
    std = float(v[ok].std(correction=0))
    return replace(task, mean=float(v[ok].mean()), std=std if std > 1e-9 else 1.0)


def _weights(tasks: Sequence[TaskSpec], y: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for t in tasks:
        if t.kind == "segmentation":
            labels = y[t.name].numpy()
            counts = np.bincount(labels[labels != IGNORE], minlength=len(t.classes))
            out[t.name] = torch.from_numpy(class_weights(counts, power)).float()
    return out


def _train(
    net: FusionNet,
    sampler: Sampler,
    loss: MultiTaskLoss,
    s: FitSettings,
    checkpoint: Checkpoint | None,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The loop: AdamW, one cycle with cosine, moving average of weights and statistics."""
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    steps = max(4, math.ceil(s.epochs * sampler.crops_per_epoch / s.batch))
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=s.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, s.learning_rate, total_steps=steps, pct_start=0.2
    )
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    history: dict[str, list[float]] = {t.name: [] for t in net.spec.tasks}
    now = Progress(net, average, optimiser, schedule, sampler.generator, history, loss.initial)
    if checkpoint is not None:
        checkpoint.restore(now)
    net.train()
    for step in range(now.step, steps):
        x, y, w = sampler.batch(s.batch)
        total, each = loss(net.forward_prepared(x), y, w)
        for name, values in history.items():
            values.append(each.get(name, math.nan))
        if total is not None:
            optimiser.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimiser.step()
        schedule.step()
        _follow(average, net.state_dict(), min(s.ema, (1 + step) / (10 + step)))
        now.step = step + 1
        if checkpoint is not None:
            checkpoint.keep(now)
    if not all(bool(torch.isfinite(v).all()) for v in average.values()):
        raise ModelError("training diverged", fix="lower model.learning_rate")
    return average, history


def _follow(average: dict[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    for k, v in state.items():
        if v.is_floating_point():
            average[k].lerp_(v.detach(), 1 - decay)
        else:
            average[k].copy_(v)


def save_fit(path: Path | str, fit: FitResult, *, origin: str = "") -> None:
    """Write a trained member: ``path`` (safetensors) and its JSON card.

    Args:
        path: The file.
        fit: The member.
        origin: Digest of what it was trained from.
    """
    save_member(
        path, fit.state_dict, fit.spec, fit.normalisation,
        {
            "origin": origin,
            "held_out_fold": fit.held_out_fold,
            "member": fit.member,
            "seed": fit.seed,
            "settings": asdict(fit.settings),
            "history": fit.history,
        },
    )  # fmt: skip


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


def predict_held_out(
    chips: xr.Dataset, members: Sequence[FusionNet], held_out_fold: int, *, batch: int = 4
) -> dict[str, HeldOut]:
    """Predict the labelled pixels of the fold that these members did not train on.

    Args:
        chips: As in :func:`fit_member`.
        members: Networks in evaluation mode, all with the same tasks and ``held_out_fold``.
        held_out_fold: Their fold.
        batch: Chips per forward pass (count); without influence on the result.

    Returns:
        Per task.
    """
    if not members:
        raise ModelError("no member", fix="train first")
    tasks = members[0].spec.tasks
    fold = np.asarray(chips["fold"].values)
    y, _ = labels_of(chips, tasks, fold == held_out_fold)
    labelled = {
        t.name: (y[t.name] != IGNORE if t.kind == "segmentation" else torch.isfinite(y[t.name]))
        for t in tasks
    }
    any_label = torch.stack(list(labelled.values())).any(0).flatten(1).any(1)
    rows = torch.nonzero(any_label)[:, 0].tolist()
    got: dict[str, list[list[Tensor]]] = {t.name: [[] for _ in members] for t in tasks}
    for start in range(0, len(rows), batch):
        at = rows[start : start + batch]
        x = inputs_of(chips, at)
        for m, net in enumerate(members):
            for name, p in net.predict(x).items():
                got[name][m].append(p.permute(0, 2, 3, 1)[labelled[name][at]])
    out: dict[str, HeldOut] = {}
    for t in tasks:
        ok = labelled[t.name].numpy()
        each = [
            torch.cat(v).numpy() if v else np.zeros((0, t.channels), np.float32)
            for v in got[t.name]
        ]
        out[t.name] = HeldOut(
            np.flatnonzero(ok), fold[ok].astype(np.uint8), y[t.name].numpy()[ok], np.stack(each)
        )
    return out
