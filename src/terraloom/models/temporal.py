"""Networks for series of single pixels: irregular dates, gaps and missing bands.

Encoders turn a series into one vector, and the heads of :mod:`terraloom.models.heads` turn that
into predictions:

- ``ltae``: each date is embedded by itself, and learnt queries weigh the dates (lightweight
  temporal attention; Garnot and Landrieu 2020, arXiv 2007.00586). The order of rows is no matter.
- ``tempcnn``: each band is interpolated to a regular grid of days from its own valid dates, then
  convolved (Pelletier, Webb and Petitjean 2019, Remote Sensing 11, 523).
- ``gru``: gated recurrent units forwards and backwards over the valid dates in order of time
  (Cho et al. 2014, arXiv 1406.1078).
- ``presto``: monthly means through a pre-trained transformer (:mod:`terraloom.models.presto`),
  fine-tuned, frozen, or adapted by LoRA. Its bands are scaled as it was trained, not by the sample.

What is not observed has no influence: padding, cloudy dates and missing bands are left out of
attention, interpolation and recurrence, so the output is the same as without these rows. A missing
band of a date that is valid otherwise passes 0 and a mask of 0, which the embedding tells from a
value; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from terraloom.errors import ModelError
from terraloom.models.fusion import Normalisation
from terraloom.models.heads import Head, TaskSpec, check_fields, make_head
from terraloom.models.interpolation import Series, in_order, interpolate
from terraloom.models.presto import ADAPT, PrestoSeries, load_presto, presto_bands, presto_scaling

__all__ = ["ENCODERS", "SeriesNet", "SeriesSpec"]

ENCODERS = ("ltae", "tempcnn", "gru", "presto")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SeriesSpec:
    """All that is needed to build the network again.

    Attributes:
        bands: Names of the bands, in the order of the last axis of the input.
        tasks: What the heads predict.
        encoder: ``ltae``, ``tempcnn``, ``gru`` or ``presto``.
        width: Channels of the encoder and of its output (count).
        layers: Convolutions of ``tempcnn``, or recurrent layers of ``gru`` (count).
        heads: Attention heads of ``ltae`` (count); divides ``width``.
        key: Channels of a key of ``ltae`` (count).
        kernel: Width of a convolution of ``tempcnn`` (grid steps, odd).
        steps: Grid of ``tempcnn``: dates per period (count).
        start_day: Day of year on which the season starts; days before it belong to its end.
        period_days: Days after which the calendar repeats. Series of several years need a longer
            one, and days that count on past the first year.
        harmonics: Sine and cosine pairs that encode the day (count).
        dropout: Share of features dropped in training (0-1).
        adapt: What is trained of ``presto``: ``fine-tune``, ``frozen`` or ``lora``.
        rank: Rank of the additions of LoRA (count).
        alpha: Weight of these additions times their rank.
        lat_lon: Place of the area for ``presto`` (latitude, longitude; degrees); None = unknown.
    """

    bands: tuple[str, ...]
    tasks: tuple[TaskSpec, ...]
    encoder: str = "ltae"
    width: int = 64
    layers: int = 3
    heads: int = 8
    key: int = 8
    kernel: int = 5
    steps: int = 24
    start_day: float = 1.0
    period_days: float = 365.25
    harmonics: int = 8
    dropout: float = 0.2
    adapt: str = "fine-tune"
    rank: int = 8
    alpha: float = 16.0
    lat_lon: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        def refuse(found: str, key: str, allowed: str) -> None:
            raise ModelError(found, where=f"SeriesSpec.{key}", allowed=allowed)

        if not self.bands or len(set(self.bands)) != len(self.bands):
            refuse(f"bands {', '.join(self.bands) or 'none'}", "bands", "one or more, each once")
        if not self.tasks:
            refuse("no task", "tasks", "one or more")
        if self.encoder not in ENCODERS:
            refuse(f"encoder {self.encoder!r}", "encoder", ", ".join(ENCODERS))
        for key in ("width", "layers", "heads", "key", "kernel", "steps", "harmonics"):
            if getattr(self, key) < 1:
                refuse(f"{key} {getattr(self, key)}", key, "1 or more")
        if self.encoder == "ltae" and self.width % self.heads:
            refuse(f"{self.heads} heads for width {self.width}", "heads", "a divisor of the width")
        if self.encoder == "gru" and self.width % 2:
            refuse(f"width {self.width}", "width", "even: half of it runs each way")
        if self.kernel % 2 == 0:
            refuse(f"kernel {self.kernel}", "kernel", "odd")
        if not (math.isfinite(self.start_day) and 0 < self.period_days < math.inf):
            refuse(f"period of {self.period_days} days", "period_days", "finite and above 0")
        if not 0 <= self.dropout < 1:
            refuse(f"dropout {self.dropout}", "dropout", "0 to below 1")
        if self.adapt not in ADAPT:
            refuse(f"adapt {self.adapt!r}", "adapt", ", ".join(ADAPT))
        if self.lat_lon and not (abs(self.lat_lon[0]) <= 90 and abs(self.lat_lon[1]) <= 360):
            refuse(f"place {self.lat_lon}", "lat_lon", "latitude, longitude in degrees")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the member's card."""
        return asdict(self)

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> SeriesSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            ModelError: The card has a field that this version does not know.
        """
        check_fields(cls, card, "spec of a member's card")
        tasks = tuple(TaskSpec.from_json(t) for t in card["tasks"])
        given = {**card, "bands": tuple(card["bands"]), "tasks": tasks}
        if given.get("lat_lon") is not None:
            given["lat_lon"] = tuple(given["lat_lon"])
        return cls(**given)


class SeriesNet(nn.Module):
    """Encoder of pixel series with one head per task.

    Args:
        spec: Bands, tasks and size.
        normalisation: Mean and sd per band of the training pixels; None leaves values as they are.
            ``presto`` has its own scaling and takes none: values are in the units of
            :func:`terraloom.models.presto.presto_scaling`.

    Raises:
        ModelError: The normalisation does not fit the bands, or ``presto`` does not know a band.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: SeriesSpec, normalisation: Normalisation | None = None) -> None:
        super().__init__()
        self.spec = spec
        b = len(spec.bands)
        norm = normalisation or Normalisation((0.0,) * b, (1.0,) * b)
        if spec.encoder == "presto":
            norm = presto_scaling(presto_bands(spec.bands))
        if norm.decibel or len(norm.mean) != b or len(norm.std) != b or min(norm.std) <= 0:
            raise ModelError(
                f"{len(norm.mean)} means and {len(norm.std)} sds", where="SeriesNet.normalisation",
                allowed=f"{b} of each, sd above 0; powers are given in decibels already",
            )  # fmt: skip
        self.register_buffer("mean", torch.tensor(norm.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(norm.std, dtype=torch.float32))
        kinds = {"ltae": _Attention, "tempcnn": _Convolutions, "gru": _Recurrence,
                 "presto": _Pretrained}  # fmt: skip
        self.encoder: nn.Module = kinds[spec.encoder](spec)
        self.drop = nn.Dropout(spec.dropout)
        self.heads = nn.ModuleDict({t.name: make_head(t, spec.width) for t in spec.tasks})

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters: encoder, heads, total."""
        parts = {"encoder": self.encoder, "heads": self.heads}
        counts = {k: sum(p.numel() for p in m.parameters() if p.requires_grad)
                  for k, m in parts.items()}  # fmt: skip
        return {**counts, "total": sum(counts.values())}

    def load_pretrained(self, path: Path | str) -> list[nn.Parameter]:
        """Put published weights into the encoder.

        Args:
            path: File of weights, see :func:`terraloom.models.presto.load_presto`.

        Returns:
            The parameters that come from the file and are trained.

        Raises:
            ModelError: The encoder has no published weights, or the file does not fit.
        """
        if not isinstance(self.encoder, _Pretrained):
            raise ModelError(f"weights {path} for {self.spec.encoder}", where="SeriesNet",
                             allowed="encoder presto", fix="leave the weights out")  # fmt: skip
        encoder = self.encoder.presto.encoder
        load_presto(encoder, path)
        return [p for k, p in encoder.named_parameters() if p.requires_grad and ".lora_" not in k]

    def prepare(self, x: Tensor, days: Tensor, valid: Tensor | None = None) -> Series:
        """Standardised values and masks; see :meth:`forward` for the arguments."""
        b = len(self.spec.bands)
        if x.ndim != 3 or x.shape[2] != b or days.shape != x.shape[:2]:
            raise ModelError(f"values {tuple(x.shape)} with days {tuple(days.shape)}",
                             where="SeriesNet", allowed=f"(N, T, {b}) with (N, T)")  # fmt: skip
        date = torch.isfinite(days)
        if valid is not None:
            if valid.shape != days.shape or valid.dtype != torch.bool:
                raise ModelError(f"mask {tuple(valid.shape)} of {valid.dtype}", where="SeriesNet",
                                 allowed=f"{tuple(days.shape)} of bool")  # fmt: skip
            date = date & valid
        mask = torch.isfinite(x) & date[..., None]
        z = (torch.where(mask, x, torch.zeros_like(x)) - self.mean) / self.std
        date = mask.any(-1)
        t = torch.remainder(days - self.spec.start_day, self.spec.period_days)
        t = torch.where(date, t, torch.zeros_like(t))
        return Series(z * mask, mask, t, date)

    def forward(self, x: Tensor, days: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Raw head outputs per task: logits, or mean and log variance (standardised).

        Args:
            x: (N, T, B) float32; NaN = missing. T is any length, 0 included.
            days: (N, T) float32 day of year; NaN = padding. Days may count on past the New Year:
                they are taken modulo ``period_days``.
            valid: (N, T) bool; False = padding or cloud. None: all dates that have a day.

        Returns:
            Task name: (N, c). Of a series without any observation this is the heads' answer to a
            vector of zeros (``ltae``, ``gru``) or to a grid of zeros (``tempcnn``).

        Raises:
            ModelError: Shapes that do not fit.
        """
        f = self.drop(self.encoder(self.prepare(x, days, valid)))[..., None, None]
        return {name: head(f)[..., 0, 0] for name, head in self.heads.items()}

    @torch.inference_mode()
    def predict(self, x: Tensor, days: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Physical predictions per task; the network must be in evaluation mode.

        Returns:
            Task name: (N, K) probabilities, (N, 2) mean and variance in the task's unit, or (N, 1)
            probability of a boundary; NaN for a series without any observation.

        Raises:
            ModelError: Training mode, or shapes that do not fit.
        """
        if self.training:
            raise ModelError("the network is in training mode", fix="call .eval() before predict")
        seen = self.prepare(x, days, valid).date.any(1)
        out: dict[str, Tensor] = {}
        for name, raw in self(x, days, valid).items():
            head = self.heads[name]
            if isinstance(head, Head):
                p = head.physical(raw[..., None, None])[..., 0, 0]
                out[name] = p.masked_fill(~seen[:, None], math.nan)
        return out


class _DayCode(nn.Module):
    """Position in the season as sine and cosine pairs; equal on both sides of the New Year."""

    rate: Tensor

    def __init__(self, spec: SeriesSpec) -> None:
        super().__init__()
        self.size = 2 * spec.harmonics
        rate = 2 * math.pi * torch.arange(1, spec.harmonics + 1) / spec.period_days
        self.register_buffer("rate", rate, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(N, T) days to (N, T, 2 harmonics)."""
        angle = t[..., None] * self.rate
        return torch.cat([angle.sin(), angle.cos()], -1)


class _Attention(nn.Module):
    """L-TAE: per head one learnt query, keys from the dates, channel groups as values."""

    def __init__(self, spec: SeriesSpec) -> None:
        super().__init__()
        w, self.n_heads = spec.width, spec.heads
        self.embed = nn.Sequential(
            nn.Linear(2 * len(spec.bands), w), nn.ReLU(), nn.Linear(w, w), nn.LayerNorm(w)
        )
        self.code = _DayCode(spec)
        self.place = nn.Linear(self.code.size, w, bias=False)
        self.keys = nn.Linear(w, spec.heads * spec.key)
        self.query = nn.Parameter(torch.randn(spec.heads, spec.key) * spec.key**-0.5)
        self.out = nn.Sequential(nn.Linear(w, w), nn.LayerNorm(w), nn.ReLU())

    def weights(self, e: Tensor, date: Tensor) -> Tensor:
        """Attention (N, T, heads): 0 on dates that do not count, sum 1 over the others."""
        n, length = date.shape
        score = (self.keys(e).view(n, length, self.n_heads, -1) * self.query).sum(-1)
        score = score * self.query.shape[1] ** -0.5
        score = score.masked_fill(~date[..., None], torch.finfo(score.dtype).min)
        weights: Tensor = score.softmax(1) * date[..., None]
        return weights

    def forward(self, s: Series) -> Tensor:
        """(N, width)."""
        e = self.embed(torch.cat([s.x, s.mask.to(s.x.dtype)], -1)) + self.place(self.code(s.t))
        n, length, w = e.shape
        if length == 0:
            pooled = e.new_zeros((n, w))
        else:
            groups = e.view(n, length, self.n_heads, -1)
            pooled = (self.weights(e, s.date)[..., None] * groups).sum(1).reshape(n, w)
        out: Tensor = self.out(pooled) * s.date.any(1, keepdim=True)
        return out


class _Convolutions(nn.Module):
    """TempCNN on values interpolated to a grid, with the nearness of an observation beside them."""

    grid: Tensor

    def __init__(self, spec: SeriesSpec) -> None:
        super().__init__()
        w, self.step = spec.width, spec.period_days / spec.steps
        self.register_buffer("grid", (torch.arange(spec.steps) + 0.5) * self.step, persistent=False)
        layers: list[nn.Module] = []
        for i in range(spec.layers):
            c = 2 * len(spec.bands) if i == 0 else w
            layers += [nn.Conv1d(c, w, spec.kernel, padding=spec.kernel // 2, bias=False),
                       nn.BatchNorm1d(w), nn.ReLU(), nn.Dropout(spec.dropout)]  # fmt: skip
        self.convolve = nn.Sequential(*layers)
        self.out = nn.Sequential(nn.Linear(w * spec.steps, w), nn.LayerNorm(w), nn.ReLU())

    def forward(self, s: Series) -> Tensor:
        """(N, width)."""
        value, near = interpolate(s, self.grid, self.step)
        f = self.convolve(torch.cat([value, near], -1).transpose(1, 2))
        out: Tensor = self.out(f.flatten(1))
        return out


class _Recurrence(nn.Module):
    """Bidirectional GRU over the dates that count, in order of time; mean and maximum of it."""

    def __init__(self, spec: SeriesSpec) -> None:
        super().__init__()
        w, self.period = spec.width, spec.period_days
        self.code = _DayCode(spec)
        self.embed = nn.Linear(2 * len(spec.bands) + self.code.size + 1, w)
        self.gru = nn.GRU(w, w // 2, spec.layers, batch_first=True, bidirectional=True)
        self.out = nn.Sequential(nn.Linear(2 * w, w), nn.LayerNorm(w), nn.ReLU())

    def forward(self, s: Series) -> Tensor:
        """(N, width)."""
        longest = int(s.date.sum(1).max()) if s.date.numel() else 0
        seen = s.date.any(1, keepdim=True)
        if longest == 0:
            return self._finish(s.x.new_zeros((len(s.x), 2 * self.embed.out_features)), seen)
        s = in_order(s, longest)
        gap = torch.diff(s.t, dim=1, prepend=s.t[:, :1]) / self.period
        x = torch.cat([s.x, s.mask.to(s.x.dtype), self.code(s.t), gap[..., None]], -1)
        lengths = s.date.sum(1).clamp_min(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        h = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=longest
        )[0]
        on = s.date[..., None]
        mean = (h * on).sum(1) / on.sum(1).clamp_min(1)
        most = h.masked_fill(~on, torch.finfo(h.dtype).min).amax(1)
        return self._finish(torch.cat([mean, most], -1), seen)

    def _finish(self, pooled: Tensor, seen: Tensor) -> Tensor:
        out: Tensor = self.out(torch.where(seen, pooled, torch.zeros_like(pooled))) * seen
        return out


class _Pretrained(nn.Module):
    """Presto, and a trained projection of its features to the width of the network."""

    def __init__(self, spec: SeriesSpec) -> None:
        super().__init__()
        w = spec.width
        self.presto = PrestoSeries(
            spec.bands, start_day=spec.start_day, period_days=spec.period_days, adapt=spec.adapt,
            rank=spec.rank, alpha=spec.alpha, lat_lon=spec.lat_lon,
        )  # fmt: skip
        features = self.presto.encoder.width
        self.out = nn.Sequential(nn.Linear(features, w), nn.LayerNorm(w), nn.ReLU())

    def forward(self, s: Series) -> Tensor:
        """(N, width)."""
        out: Tensor = self.out(self.presto(s.x, s.mask, s.t)) * s.date.any(1, keepdim=True)
        return out
