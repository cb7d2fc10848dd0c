"""Networks over time for maps: what they are built from, and their inputs date by date.

Channels named ``step/band`` belong to a step in time: a period or a date. All other modalities
(elevation) are static. A step that is invalid in a pixel has no influence there, whatever fills it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date

import torch
from torch import Tensor

from terraloom.errors import ModelError
from terraloom.models.fusion import FusionSpec, Normalisation
from terraloom.models.mapnet import MapNet, PartSpec
from terraloom.preprocess.groups import group_facts, group_order

__all__ = ["NETWORKS", "YEAR_DAYS", "DatedNet", "DatedSpec", "step_days"]

#: Networks over time: windows first, then single pixels.
NETWORKS = ("utae", "convgru", "convlstm", "ltae", "tempcnn", "gru", "presto")
YEAR_DAYS = 365.25
#: Values that a prediction holds at once per layer of features (count): about 128 MB.
_PART_VALUES = 32_000_000


def step_days(
    steps: Iterable[str], known: Mapping[str, float] | None = None, *, where: str = "chips"
) -> dict[str, float]:
    """Day of each step in time, counted from 1970-01-01.

    Args:
        steps: Names of periods or dates.
        known: Days of periods, e.g. their middles; beside them names that are an ISO date
            (``2018-05-03``) or month (``2018-05``, its 16th) say their day themselves.
        where: What is read, for the error.

    Raises:
        ModelError: A period whose day is not known.
    """
    out: dict[str, float] = {}
    for step in steps:
        if known is not None and step in known:
            out[step] = float(known[step])
            continue
        try:
            day = date.fromisoformat(step if len(step) != 7 else f"{step}-16")
        except ValueError as err:
            raise ModelError(
                f"the day of period {step} is not known", where=where,
                allowed="a day of each period beside the chips, or names such as 2018-05-03",
                fix="cut the chips again, or use network: fusion",
            ) from err  # fmt: skip
        out[step] = float((day - date(1970, 1, 1)).days)
    return out


@dataclass(frozen=True)
class DatedSpec(FusionSpec):
    """All that is needed to build a network over time again.

    Attributes:
        network: One of :data:`NETWORKS`.
        days: Day of each step since 1970-01-01; steps that are missing here say it by their name.
        attention: Attention heads (count).
        key: Channels of a key (count).
        harmonics: Sine and cosine pairs that encode the day (count).
        adapt: What is trained of ``presto``: ``fine-tune``, ``frozen`` or ``lora``.
        lat_lon: Place of the area for ``presto`` (latitude, longitude; degrees); None = unknown.
    """

    network: str = "utae"
    days: dict[str, float] = field(default_factory=dict)
    attention: int = 4
    key: int = 8
    harmonics: int = 4
    adapt: str = "fine-tune"
    lat_lon: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in NETWORKS:
            raise ModelError(f"network {self.network!r}", where="DatedSpec.network",
                             allowed=", ".join(NETWORKS))  # fmt: skip
        if self.lat_lon is not None:
            object.__setattr__(self, "lat_lon", tuple(self.lat_lon))
        for key in ("attention", "key", "harmonics"):
            if getattr(self, key) < 1:
                raise ModelError(f"{key} {getattr(self, key)}", where=f"DatedSpec.{key}",
                                 allowed="1 or more")  # fmt: skip
        if not self.steps:
            raise ModelError(
                f"no modality over time among {', '.join(self.channels)}",
                where=f"network {self.network}", allowed="channels named period/band",
                fix="use network: fusion",
            )  # fmt: skip
        object.__setattr__(self, "days", step_days(self.steps, self.days))
        for group, names in self.channels.items():
            bands: dict[str, list[str]] = {}
            for name in names:
                step, _, band = name.rpartition("/")
                bands.setdefault(step, []).append(band)
            if any(v != next(iter(bands.values())) for v in bands.values()):
                raise ModelError(
                    "steps with different bands", where=group, allowed="the same in every step",
                    fix="use network: fusion",
                )  # fmt: skip

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps of all modalities, in the order in which they are first named, finest first."""
        names = (n.rpartition("/")[0] for g in group_order(self.channels) for n in self.channels[g])
        return tuple(dict.fromkeys(step for step in names if step))

    def steps_of(self, group: str) -> tuple[str, ...]:
        """Steps of one modality; a single empty name for a static one."""
        return tuple(dict.fromkeys(n.rpartition("/")[0] for n in self.channels[group]))

    def bands_of(self, group: str) -> tuple[str, ...]:
        """Bands of one modality, the same in every step."""
        return tuple(dict.fromkeys(n.rpartition("/")[2] for n in self.channels[group]))

    @property
    def dated(self) -> tuple[str, ...]:
        """Modalities over time."""
        return tuple(g for g in group_order(self.channels) if self.steps_of(g) != ("",))

    @property
    def static(self) -> tuple[str, ...]:
        """Modalities without time."""
        return tuple(g for g in group_order(self.channels) if self.steps_of(g) == ("",))

    @property
    def years(self) -> int:
        """Whole years that the steps lie in (count); after them the calendar repeats."""
        span = max(self.days.values()) - min(self.days.values())
        return max(1, math.ceil(span / YEAR_DAYS))

    def one_step(self, groups: Iterable[str]) -> FusionSpec:
        """The network of some modalities in one step."""
        groups = tuple(groups)
        return FusionSpec(
            {g: self.bands_of(g) for g in groups}, self.tasks, width=self.width, depth=self.depth,
            convs=self.convs, indices=self.indices, dropout=self.dropout, widths=self.widths,
            roles={g: r for g, r in self.roles.items() if g in groups}, reduce_to=self.reduce_to,
            decoder=self.decoder,
        )  # fmt: skip


class DatedNet(MapNet):
    """Base of the networks over time: features stand step by step, each step with its own mask.

    Statistics of a band are shared by all steps: what distinguishes a step from the others is what
    these networks look at.

    Args:
        spec: Modalities, steps, tasks and size.
        normalisation: Per modality, of each channel and index by itself.

    Attributes:
        day: (T,) days since 1970-01-01.
    """

    spec: DatedSpec
    day: Tensor

    def __init__(
        self, spec: DatedSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        shared = None
        if normalisation is not None:
            shared = {g: _shared(spec, g, normalisation[g]) for g in spec.channels}
        super().__init__(spec, shared)
        self.reduce = torch.nn.ModuleDict()
        days = torch.tensor([spec.days[s] for s in spec.steps], dtype=torch.float32)
        self.register_buffer("day", days, persistent=False)
        self._columns = {g: _columns(spec, g) for g in self._groups}

    # --- inputs --------------------------------------------------------------------------------
    def _features(self, group: str) -> int:
        return sum(len(columns) + 1 for columns in self._columns[group].values())

    def feature_slices(self) -> dict[str, tuple[int, slice]]:
        """Per ``modality@step`` (static: modality): pixel size factor and features, mask last."""
        out: dict[str, tuple[int, slice]] = {}
        for group, (f, at) in self._places().items():
            start = at.start
            for step, columns in self._columns[group].items():
                stop = start + len(columns) + 1
                out[f"{group}@{step}" if step else group] = (f, slice(start, stop))
                start = stop
        return out

    def part_spec(self) -> PartSpec:
        """Channels, roles and indices per ``modality@step``."""
        channels, roles, pairs = {}, {}, {}
        for group, parts in self._columns.items():
            names = self.spec.channels[group]
            for step, columns in parts.items():
                key = f"{group}@{step}" if step else group
                at = {c: i for i, c in enumerate(c for c in columns if c < len(names))}
                channels[key] = tuple(names[c] for c in at)
                pairs[key] = [(at[a], at[b]) for a, b in self._pairs[group] if a in at]
                # Modalities without an entry may play roles by their name.
                roles[key] = self.spec.roles.get(group, group_facts(group, {}).roles)
        return _Parts(channels, roles, pairs)

    def _write(self, out: Tensor, group: str, x: Tensor, valid: Tensor) -> None:
        start, channels = 0, len(self.spec.channels[group])
        for columns in self._columns[group].values():
            stop = start + len(columns)
            out[:, start:stop] = x[:, columns]
            mine = [c for c in columns if c < channels]
            out[:, stop] = valid[:, mine].to(x.dtype).mean(1)
            start = stop + 1

    def by_step(self, x: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Prepared features of the modalities over time, (N, T, features + masks, h, w).

        Within a step modalities stand as in :meth:`DatedSpec.one_step`; those that do not have the
        step are invalid there.
        """
        places = self._places()
        out: dict[int, list[Tensor]] = {}
        for group in (g for g in self._groups if g in self.spec.dated):
            f, at = places[group]
            n, _, h, w = x[f].shape
            own = self.spec.steps_of(group)
            part = x[f][:, at].reshape(n, len(own), -1, h, w)
            if own != self.spec.steps:
                whole = part.new_zeros((n, len(self.spec.steps), *part.shape[2:]))
                whole[:, [self.spec.steps.index(s) for s in own]] = part
                part = whole
            out.setdefault(f, []).append(part)
        return {f: torch.cat(v, 2) for f, v in out.items()}

    def still(self, x: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Prepared features of the static modalities, (N, features + masks, h, w)."""
        places = self._places()
        out: dict[int, list[Tensor]] = {}
        for group in (g for g in self._groups if g in self.spec.static):
            f, at = places[group]
            out.setdefault(f, []).append(x[f][:, at])
        return {f: torch.cat(v, 1) for f, v in out.items()}

    # --- prediction in parts -------------------------------------------------------------------
    def _values_per_px(self) -> int:
        """Values of the largest layer of features per 10 m pixel (count)."""
        return len(self.spec.steps) * max(self.spec.widths[0], 16)

    @torch.inference_mode()
    def predict(
        self, inputs: Mapping[str, Tensor], *, describe: bool = False, logits: bool = False
    ) -> dict[str, Tensor]:
        """See :meth:`MapNet.predict`; a large window is predicted in parts, with equal results."""
        n, height, width = self._size(inputs)
        halo, stride = self.halo_px(), self.stride_px
        most = _PART_VALUES // (n * self._values_per_px())
        side = max(int(math.sqrt(most)) - 2 * halo, 2 * halo, stride) // stride * stride
        if height <= side + 2 * halo and width <= side + 2 * halo:
            return super().predict(inputs, describe=describe, logits=logits)
        whole = super().predict
        rows: list[dict[str, Tensor]] = []
        for top in range(0, height, side):
            row: list[dict[str, Tensor]] = []
            for left in range(0, width, side):
                r0, c0 = max(top - halo, 0), max(left - halo, 0)
                r1, c1 = min(top + side + halo, height), min(left + side + halo, width)
                part = {
                    g: x[..., r0 // f : -(-r1 // f), c0 // f : -(-c1 // f)]
                    for g, x in inputs.items() if (f := self._factor.get(g))
                }  # fmt: skip
                h, w = min(side, height - top), min(side, width - left)
                row.append({
                    k: v[..., top - r0 : top - r0 + h, left - c0 : left - c0 + w]
                    for k, v in whole(part, describe=describe, logits=logits).items()
                })  # fmt: skip
            rows.append({k: torch.cat([p[k] for p in row], -1) for k in row[0]})
        return {k: torch.cat([p[k] for p in rows], -2) for k in rows[0]}


@dataclass(frozen=True)
class _Parts:
    """See :class:`PartSpec`."""

    channels: dict[str, tuple[str, ...]]
    roles: dict[str, dict[str, str]]
    found: dict[str, list[tuple[int, int]]]

    def pairs(self, group: str) -> list[tuple[int, int]]:
        """Positions of the channels of a part whose normalised differences follow them."""
        return self.found[group]


def _columns(spec: DatedSpec, group: str) -> dict[str, list[int]]:
    """Per step, the columns of its channels and of its indices among the modality's features."""
    names = spec.channels[group]
    step_of = [n.rpartition("/")[0] for n in names]
    out: dict[str, list[int]] = {s: [] for s in spec.steps_of(group)}
    for i, step in enumerate(step_of):
        out[step].append(i)
    for i, (a, _) in enumerate(spec.pairs(group)):
        out[step_of[a]].append(len(names) + i)
    return out


def _shared(spec: DatedSpec, group: str, norm: Normalisation) -> Normalisation:
    """Statistics of each band and index over all steps.

    A mean of 0 with a spread of 1 stands for a channel without a valid value: it does not count.
    """
    n = len(spec.channels[group]) + len(spec.pairs(group))
    if len(norm.mean) != n or len(norm.std) != n:
        raise ModelError(f"{len(norm.mean)} means for {n} features", where=group)
    steps = list(_columns(spec, group).values())
    mean, std = list(norm.mean), list(norm.std)
    for columns in zip(*steps, strict=True):
        pairs = [(norm.mean[i], norm.std[i]) for i in columns]
        known = [p for p in pairs if p != (0.0, 1.0)] or pairs[:1]
        centre = sum(m for m, _ in known) / len(known)
        spread = math.sqrt(sum(s**2 + (m - centre) ** 2 for m, s in known) / len(known))
        for i in columns:
            mean[i], std[i] = centre, spread
    return replace(norm, mean=tuple(mean), std=tuple(std))
