"""Training of networks on labelled series of single pixels, scored by cross-validation.

A table of series is small, so a fit takes seconds: AdamW, a cosine schedule after a short warm-up,
class weights, a moving average of the weights, and series that are thinned out at random (dates
and bands dropped, the calendar shifted) so that the network does not learn the gaps of its sample.

Early stopping looks at a fold of its own: neither trained on nor scored. Without it (the default)
the schedule runs to its end and all folds but the held-out one are trained on, which is worth more
where classes are rare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from terraloom.errors import FoldError, ModelError
from terraloom.io import sha256
from terraloom.models.fusion import Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.losses import SegmentationLoss, class_weights, segmentation_loss
from terraloom.models.temporal import SeriesNet, SeriesSpec
from terraloom.train.held_out import HeldOut
from terraloom.train.loop import follow
from terraloom.train.series_table import SeriesTable

__all__ = [
    "SeriesAugmentation",
    "SeriesFit",
    "SeriesSettings",
    "cross_validate",
    "fit_series",
]


@dataclass(frozen=True)
class SeriesAugmentation:
    """Random changes of the training series, new in every epoch.

    Attributes:
        date_dropout: Largest share of dates that are dropped; each series draws its own share
            between 0 and this, and keeps one date at least (0-1).
        band_dropout: Probability that a band is dropped from a whole series (0-1); one band stays.
        shift_days: Largest shift of a whole series in time, either way (days).
        noise: Standard deviation of noise added to each value (training sds of the band).
        offset: The same, added to a whole series, one draw per band (training sds).
    """

    date_dropout: float = 0.3
    band_dropout: float = 0.05
    shift_days: float = 8.0
    noise: float = 0.05
    offset: float = 0.1


@dataclass(frozen=True)
class SeriesSettings:
    """Settings of network and schedule.

    Attributes:
        encoder: ``ltae``, ``tempcnn``, ``gru`` or ``presto``.
        network: More fields of :class:`terraloom.models.temporal.SeriesSpec`, e.g. ``width``.
        epochs: Passes over the training series (count).
        batch: Series per step (count).
        learning_rate: Peak of the schedule.
        weights: File of pre-trained weights for ``presto``, read and never fetched; empty = none.
        pretrained_rate: Learning rate of these weights where they are trained, beside
            ``learning_rate`` (0-1).
        weight_decay: Of AdamW, on weight matrices only.
        warm_up: Share of the steps before the peak (0-1).
        ema: Decay of the moving average of the weights per step (0-1).
        class_power: Class weights are frequency^-power in the loss.
        loss: Smoothing and noise robustness of the loss.
        patience: Epochs without a better loss on the fold for early stopping before the fit ends;
            0 needs no such fold and runs all epochs.
        augmentation: Random changes of the series.
    """

    encoder: str = "tempcnn"
    network: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    batch: int = 64
    learning_rate: float = 3e-3
    weights: str = ""
    pretrained_rate: float = 0.1
    weight_decay: float = 1e-2
    warm_up: float = 0.1
    ema: float = 0.98
    class_power: float = 0.5
    loss: SegmentationLoss = field(default_factory=lambda: SegmentationLoss(smoothing=0.05))
    patience: int = 0
    augmentation: SeriesAugmentation = field(default_factory=SeriesAugmentation)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.patience < 0:
            raise ModelError(
                f"{self.epochs} epochs, batch {self.batch}, patience {self.patience}",
                where="SeriesSettings", allowed="1 or more, 1 or more, 0 or more",
            )  # fmt: skip
        adapt = self.network.get("adapt", "fine-tune")
        if self.encoder == "presto" and adapt != "fine-tune" and not self.weights:
            raise ModelError(f"{adapt} without weights", where="SeriesSettings.weights",
                             allowed="a file of pre-trained weights",
                             fix="give its path, or fine-tune from scratch")  # fmt: skip
        if self.weights and self.encoder != "presto":
            raise ModelError(f"weights for {self.encoder}", where="SeriesSettings.weights",
                             allowed="encoder presto", fix="leave the weights out")  # fmt: skip
        a = self.augmentation
        if not (0 <= a.date_dropout < 1 and 0 <= a.band_dropout < 1):
            raise ModelError(f"dropout {a.date_dropout}, {a.band_dropout}",
                             where="SeriesAugmentation", allowed="0 to below 1")  # fmt: skip


@dataclass(frozen=True)
class SeriesFit:
    """A trained network of pixel series.

    Attributes:
        state_dict: Averaged weights, with normalisation buffers.
        spec: The network.
        normalisation: Training statistics per band, or the encoder's own scaling.
        history: Mean ``loss`` per epoch and, with early stopping, ``stop_loss``.
        epoch: Epoch whose weights these are, from 1.
        held_out_fold: Fold that had no influence.
        stop_fold: Fold of early stopping; None without.
        seed: Seed of the fit.
        settings: Settings of training.
        pretrained: Name and SHA-256 of the file of pre-trained weights; empty without.
    """

    state_dict: dict[str, Tensor]
    spec: SeriesSpec
    normalisation: Normalisation
    history: dict[str, list[float]]
    epoch: int
    held_out_fold: int
    stop_fold: int | None
    seed: int
    settings: SeriesSettings
    pretrained: dict[str, str] = field(default_factory=dict)

    def network(self) -> SeriesNet:
        """The trained network in evaluation mode."""
        net = SeriesNet(self.spec, self.normalisation)
        net.load_state_dict(self.state_dict)
        return net.eval()

    def card(self) -> dict[str, Any]:
        """JSON form of all but the weights; no paths, equal fits have equal cards."""
        settings = asdict(self.settings)
        settings["weights"] = self.pretrained
        return {
            "spec": self.spec.to_json(), "normalisation": asdict(self.normalisation),
            "history": self.history, "epoch": self.epoch, "held_out_fold": self.held_out_fold,
            "stop_fold": self.stop_fold, "seed": self.seed, "settings": settings,
        }  # fmt: skip


def fit_series(
    table: SeriesTable,
    settings: SeriesSettings | None = None,
    *,
    held_out_fold: int,
    seed: int,
    stop_fold: int | None = None,
) -> SeriesFit:
    """Train on all folds but the held-out one (and but ``stop_fold``).

    Neither fold enters the loss, class weights or normalisation. Equal seeds and threads give equal
    bytes; torch's global random stream is left as it was.

    Args:
        table: The series; one class alone may be absent from training, not all but one.
        settings: Network and schedule.
        held_out_fold: Fold left out; one that no series has trains on all.
        seed: Of initial weights, order of series and augmentation.
        stop_fold: Fold that early stopping looks at; needed with ``settings.patience``.

    Raises:
        FoldError: Nothing or one class only is left to train on, or early stopping has no fold.
        ModelError: Training diverged, or settings make no network.
    """
    s = settings or SeriesSettings()
    train, stop = _divide(table, s, held_out_fold, stop_fold)
    task = TaskSpec("class", "segmentation", table.classes)
    spec = SeriesSpec(table.bands, (task,), s.encoder, **s.network)
    sample = _normalisation(train)
    stream = np.random.SeedSequence([seed, held_out_fold]).generate_state(2, np.uint64)
    # Initial weights and dropout draw from torch's global stream, which is forked.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream[0] >> 1))
        net = SeriesNet(spec, sample)
        slow = net.load_pretrained(s.weights) if s.weights else []
        generator = torch.Generator().manual_seed(int(stream[1] >> 1))
        state, history, epoch = _train(net, train, stop, s, slow, sample, generator)
    # An encoder may bring a scaling of its own.
    norm = Normalisation(tuple(net.mean.tolist()), tuple(net.std.tolist()))
    file = {"name": Path(s.weights).name, "sha256": sha256(s.weights)} if s.weights else {}
    return SeriesFit(
        state, spec, norm, history, epoch, held_out_fold, stop_fold if s.patience else None, seed,
        s, file,
    )  # fmt: skip


def _divide(
    table: SeriesTable, s: SeriesSettings, held_out_fold: int, stop_fold: int | None
) -> tuple[SeriesTable, SeriesTable | None]:
    keep = table.fold != held_out_fold
    stop: SeriesTable | None = None
    where = f"fold {held_out_fold} held out"
    if s.patience:
        own = table.fold == (-1 if stop_fold is None else stop_fold)
        if stop_fold == held_out_fold or not own.any():
            raise FoldError(
                f"early stopping on fold {stop_fold}", where=where,
                allowed="a fold with series, other than the held-out one",
                fix="give stop_fold, or patience 0",
            )  # fmt: skip
        keep &= ~own
        stop = table.rows(own)
    seen = np.unique(table.y[keep])
    if len(seen) < 2:
        names = ", ".join(table.classes[int(k)] for k in seen) or "none"
        raise FoldError(
            f"{int(keep.sum())} series of {len(seen)} class ({names}) are left to train on",
            where=where, allowed="two classes or more", fix="more labels, or smaller blocks",
        )  # fmt: skip
    return table.rows(keep), stop


def _normalisation(table: SeriesTable) -> Normalisation:
    flat = table.x.reshape(-1, table.x.shape[2]).astype(np.float64)
    seen = np.isfinite(flat)
    n = np.maximum(seen.sum(0), 1)
    mean = np.where(seen, flat, 0).sum(0) / n
    std = np.sqrt(np.where(seen, (flat - mean) ** 2, 0).sum(0) / n)
    std = np.where(std > 1e-9, std, 1.0)
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))


def _train(
    net: SeriesNet,
    train: SeriesTable,
    stop: SeriesTable | None,
    s: SeriesSettings,
    slow: Sequence[torch.nn.Parameter],
    sample: Normalisation,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, list[float]], int]:
    """Averaged weights of the last epoch, or of the best one on ``stop``; losses; the epoch."""
    x, days, y = _tensors(train)
    counts = np.bincount(train.y, minlength=len(train.classes))
    weights = torch.from_numpy(class_weights(counts, s.class_power)).float()
    steps = math.ceil(len(x) / s.batch)
    # Noise is in sds of the sample, also where an encoder brings its own scaling.
    std = torch.tensor(sample.std, dtype=torch.float32)
    optimiser = _optimiser(net, s, slow)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: _rate(i / (steps * s.epochs), s.warm_up)
    )
    average = _copy(net)
    history: dict[str, list[float]] = {"loss": []}
    if stop is not None:
        history["stop_loss"] = []
    best, chosen, at = average, s.epochs, 0
    for epoch in range(1, s.epochs + 1):
        net.train()
        losses = []
        for rows in torch.randperm(len(x), generator=generator).tensor_split(steps):
            bx, bt = _augment(x[rows], days[rows], std, s.augmentation, generator)
            loss = _loss(net(bx, bt)["class"], y[rows], weights, s.loss)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            at += 1
            follow(average, net.state_dict(), min(s.ema, at / (10 + at)))
            losses.append(loss.detach())
        history["loss"].append(float(torch.stack(losses).mean()))
        if not math.isfinite(history["loss"][-1]):
            raise ModelError(f"training diverged in epoch {epoch}",
                             fix="lower learning_rate, or look for extreme values")  # fmt: skip
        if stop is not None:
            history["stop_loss"].append(_stop_loss(net, average, stop, weights))
            if history["stop_loss"][-1] <= min(history["stop_loss"]):
                best, chosen = {k: v.clone() for k, v in average.items()}, epoch
            elif epoch - chosen >= s.patience:
                break
    return (average if stop is None else best), history, chosen if stop else s.epochs


def _optimiser(
    net: SeriesNet, s: SeriesSettings, slow: Sequence[torch.nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW on what is trained; decay on matrices only, a lower rate for pre-trained weights."""
    known = {id(p) for p in slow}
    groups: list[dict[str, Any]] = []
    for rate, old in ((s.learning_rate, False), (s.learning_rate * s.pretrained_rate, True)):
        own = [p for p in net.parameters() if p.requires_grad and (id(p) in known) == old]
        for matrix in (True, False):
            part = [p for p in own if (p.ndim > 1) == matrix]
            if part:
                decay = s.weight_decay if matrix else 0.0
                groups.append({"params": part, "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _rate(share: float, warm_up: float) -> float:
    """Learning rate beside its peak: a linear rise, then half a cosine down to 0."""
    if share < warm_up:
        return max(share / warm_up, 0.05)
    return 0.5 * (1 + math.cos(math.pi * min((share - warm_up) / (1 - warm_up), 1.0)))


def _tensors(table: SeriesTable) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.from_numpy(np.ascontiguousarray(table.x, dtype=np.float32)),
            torch.from_numpy(np.ascontiguousarray(table.days, dtype=np.float32)),
            torch.from_numpy(table.y.astype(np.int64)))  # fmt: skip


def _loss(logits: Tensor, y: Tensor, weights: Tensor, settings: SegmentationLoss) -> Tensor:
    return segmentation_loss(
        logits[..., None, None], y[:, None, None], weights=weights, settings=settings
    )


def _stop_loss(
    net: SeriesNet, average: dict[str, Tensor], stop: SeriesTable, weights: Tensor
) -> float:
    """Loss of the averaged weights on the fold of early stopping.

    A class that training has never seen has weight 0; on its series nothing can be learnt.
    """
    probe = SeriesNet(net.spec)
    probe.load_state_dict(average)
    x, days, y = _tensors(stop)
    with torch.no_grad():
        return float(_loss(probe.eval()(x, days)["class"], y, weights, SegmentationLoss()))


def _copy(net: SeriesNet) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def _augment(
    x: Tensor, days: Tensor, std: Tensor, a: SeriesAugmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Changed copies of a batch; values (n, T, B) and days (n, T)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    n, length, b = x.shape
    x = x + a.noise * std * torch.randn(x.shape, generator=generator)
    x = x + a.offset * std * torch.randn((n, 1, b), generator=generator)
    observed = torch.isfinite(x).any(-1)
    drop = uniform(n, length) < a.date_dropout * uniform(n, 1)
    lost = (observed & ~drop).sum(1, keepdim=True) == 0
    drop &= ~lost
    band = uniform(n, 1, b) < a.band_dropout
    # A series must not lose the only bands it has.
    left = (torch.isfinite(x) & ~drop[..., None] & ~band).flatten(1).any(1)
    band &= left[:, None, None]
    x = x.masked_fill(drop[..., None] | band, math.nan)
    return x, days + a.shift_days * (2 * uniform(n, 1) - 1)


def cross_validate(
    table: SeriesTable, settings: SeriesSettings | None = None, *, seeds: Sequence[int]
) -> HeldOut:
    """Out-of-fold class probabilities, one member per seed.

    With early stopping, the fold it looks at is the next one in order after the held-out fold, a
    further one for each further seed, so that members stop on different folds.

    Args:
        table: Series of two folds or more; of three or more with early stopping.
        settings: Network and schedule.
        seeds: One fit per seed and fold.

    Returns:
        Predictions of all series in the order of the table; ``p`` is (M, N, K).

    Raises:
        FoldError: Too few folds, no seed, or a fold that cannot be held out.
        ModelError: As :func:`fit_series`.
    """
    s = settings or SeriesSettings()
    folds = [int(f) for f in np.unique(table.fold)]
    least = 3 if s.patience else 2
    if len(folds) < least or not seeds:
        raise FoldError(f"{len(folds)} folds, {len(seeds)} seeds", where="cross-validation",
                        allowed=f"{least} folds or more, one seed or more")  # fmt: skip
    p = np.zeros((len(seeds), len(table.y), len(table.classes)), np.float32)
    for m, seed in enumerate(seeds):
        for i, fold in enumerate(folds):
            stop = folds[(i + 1 + m % (len(folds) - 1)) % len(folds)] if s.patience else None
            fit = fit_series(table, s, held_out_fold=fold, seed=seed, stop_fold=stop)
            rows = np.flatnonzero(table.fold == fold)
            x, days, _ = _tensors(table.rows(rows))
            p[m, rows] = fit.network().predict(x, days)["class"].numpy()
    return HeldOut(
        np.arange(len(table.y)), table.fold.astype(np.uint8), table.y.astype(np.int64), p
    )
