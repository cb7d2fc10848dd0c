"""Random changes of training windows, like those that imaging conditions make.

They work on prepared features: normalised (1 is a standard deviation of the training pixels), 0
where a value is missing, with the valid share of the channels as last feature of each group.
Labels keep their place. A value that is missing stays missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from terraloom.models.mapnet import PartSpec
from terraloom.preprocess.groups import group_facts

__all__ = ["Augmentation", "Augmenter", "haze_strength"]

#: Wavelengths of the Sentinel-2 bands, which name the roles (nm).
_WAVELENGTH_NM = {
    "B01": 443, "B02": 490, "B03": 560, "B04": 665, "B05": 705, "B06": 740, "B07": 783,
    "B08": 842, "B8A": 865, "B09": 945, "B10": 1375, "B11": 1610, "B12": 2190,
}  # fmt: skip
#: What dense haze looks like: a bright veil in every band that it reaches (sd).
_VEIL_SD = 3.0
#: What a full shadow looks like (sd).
_SHADE_SD = -2.0
#: Strength of haze, depth of a shadow, and share of a window under clouds: lowest and highest.
_HAZE, _DEPTH, _COVER = (0.2, 0.8), (0.4, 0.8), (0.05, 0.4)


@dataclass(frozen=True)
class Augmentation:
    """How much of each change; 0 is none.

    Attributes:
        gain: Half-width of a common gain per window and group (ratio).
        bias: Standard deviation of a shift per window and feature (sd).
        drop_band: Probability that a feature, a band or index of a period, becomes its mean.
        drop_sensor: Probability that a group, a sensor's bands of one pixel size, is missing from
            a window. One is always kept.
        drop_date: Probability that a period is missing from a window. One is always kept.
        noise: Standard deviation of noise of each value (sd).
        haze: Probability that a period of a window lies under haze: a smooth veil, which brightens
            and flattens bands of short wavelengths most.
        cloud: Probability that clouds hide parts of a period of a window, and darken others.
        shift_px: Largest shift of a sensor against labels and other sensors (10 m pixels).
        flips: Flips and rotations by 90 degrees; made where the windows are cut.
    """

    gain: float = 0.05
    bias: float = 0.03
    drop_band: float = 0.01
    drop_sensor: float = 0.02
    drop_date: float = 0.0
    noise: float = 0.0
    haze: float = 0.0
    cloud: float = 0.0
    shift_px: float = 0.0
    flips: bool = True


class _Network(Protocol):
    """What is asked of a network."""

    def feature_slices(self) -> dict[str, tuple[int, slice]]:
        """Per part, ``group`` or ``group@date``: pixel size factor and features, mask last."""

    def part_spec(self) -> PartSpec:
        """Channels, roles and indices of the parts."""


def haze_strength(role: str) -> float:
    """How much haze reaches a band, beside the shortest wavelength (0-1).

    Scattering falls with the square of the wavelength, the exponent of a clear to moderate
    atmosphere of Chavez (1988).

    Args:
        role: Sentinel-2 band that the band is like; another name gives 0.
    """
    nm = _WAVELENGTH_NM.get(role)
    return 0.0 if nm is None else (_WAVELENGTH_NM["B01"] / nm) ** 2


@dataclass(frozen=True)
class _Group:
    """Facts of a group's c features: first its channels, then what is computed from them.

    Attributes:
        factor: Pixel size (10 m pixels).
        at: Its features, mask last.
        channels: Number of channels.
        sensor: Number of its sensor.
        period: (c,) number of a feature's period; -1: it has none.
        haze: (c,) strength of haze.
        optical: (c,) whether clouds hide it.
    """

    factor: int
    at: slice
    channels: int
    sensor: int
    period: Tensor
    haze: Tensor
    optical: Tensor


class Augmenter:
    """Applies an :class:`Augmentation` to prepared windows of a network.

    Haze and clouds need to know what a band is: groups whose bands have no spectral role keep
    clear.

    Args:
        net: The network, for its features.
        settings: How much of each change.
    """

    def __init__(self, net: _Network, settings: Augmentation) -> None:
        self.settings = settings
        slices, spec = net.feature_slices(), net.part_spec()
        sensors = list(dict.fromkeys(_sensor(g) for g in slices))
        names = {g: [str(n).rpartition("/") for n in spec.channels[g]] for g in slices}
        self._periods = list(dict.fromkeys(p for g in slices for p, _, _ in names[g]))
        self._dates = [i for i, p in enumerate(self._periods) if p]
        self._groups: list[_Group] = []
        for g, (f, at) in slices.items():
            c, own = at.stop - 1 - at.start, len(names[g])
            parts = [[i] for i in range(own)] + [list(p) for p in spec.pairs(g)]
            period = torch.full((c,), -1)
            haze, optical = torch.zeros(c), torch.zeros(c, dtype=torch.bool)
            roles = _roles(spec, g)
            for i, of in enumerate(parts[:c]):
                period[i] = self._periods.index(names[g][of[0]][0])
                for k in of:
                    band = names[g][k][2]
                    haze[i] = max(float(haze[i]), haze_strength(roles.get(band, "")))
                    optical[i] |= band in roles
            self._groups.append(
                _Group(f, at, own, sensors.index(_sensor(g)), period, haze, optical)
            )
        self._sensors = len(sensors)
        self._seen = sorted({
            int(p) for g in self._groups for p in g.period[g.optical].tolist() if p >= 0
        })  # fmt: skip

    def __call__(self, x: Mapping[int, Tensor], generator: torch.Generator) -> None:
        """Change windows in place.

        Args:
            x: Per pixel size factor (n, features + masks, h, w).
            generator: Source of randomness; a change that is switched off draws nothing, but gain,
                bias, bands and sensors always do.
        """
        a = self.settings
        self._jitter(x, generator)
        if a.shift_px > 0:
            self._shift(x, generator)
        if a.haze > 0 and self._seen:
            self._haze(x, generator)
        if a.noise > 0:
            for g in self._groups:
                values, mask = _parts(x, g)
                noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
                values.add_(a.noise * noise * _valid(values, mask))
        if a.cloud > 0 and self._seen:
            self._cloud(x, generator)
        if a.drop_date > 0 and self._dates:
            self._drop_dates(x, generator)

    def _jitter(self, x: Mapping[int, Tensor], generator: torch.Generator) -> None:
        """Gain, bias, and missing bands and sensors."""
        a, n = self.settings, _count(x)
        lost = _uniform(generator, n, len(self._groups)) < a.drop_sensor
        lost[lost.all(1)] = False
        for i, g in enumerate(self._groups):
            values, mask = _parts(x, g)
            c = values.shape[1]
            gain = 1 + a.gain * (2 * _uniform(generator, n, 1, 1, 1) - 1)
            bias = a.bias * torch.randn((n, c, 1, 1), generator=generator)
            kept = (_uniform(generator, n, c, 1, 1) >= a.drop_band).to(values.dtype)
            here = (~lost[:, i]).to(values.dtype)[:, None, None, None]
            # The bias must not fill invalid pixels: there the value stays the training mean.
            values.mul_(gain).add_(bias * (mask > 0)).mul_(kept * here)
            mask.mul_(here)

    def _drop_dates(self, x: Mapping[int, Tensor], generator: torch.Generator) -> None:
        n, dates = _count(x), torch.tensor(self._dates)
        gone = _uniform(generator, n, len(dates)) < self.settings.drop_date
        gone[gone.all(1)] = False
        for g in self._groups:
            features = (gone[:, None] & (g.period[:, None] == dates)[None]).any(2)
            _remove(x, g, features, features.new_ones((1, 1, 1, 1)))

    def _period(self, n: int, generator: torch.Generator) -> Tensor:
        """A period with optical bands for each window, (n, 1)."""
        at = torch.randint(len(self._seen), (n, 1), generator=generator)
        return torch.tensor(self._seen)[at]

    def _haze(self, x: Mapping[int, Tensor], generator: torch.Generator) -> None:
        n, period = _count(x), self._period(_count(x), generator)
        strength = _between(generator, n, _HAZE)
        strength *= _uniform(generator, n, 1, 1, 1) < self.settings.haze
        veil = strength * _smooth(generator, n, _size(x), 4)
        for g in self._groups:
            values, mask = _parts(x, g)
            reach = (g.haze * (g.period == period))[:, :, None, None]
            bright = torch.full((values.shape[1], 1, 1), _VEIL_SD)
            bright[g.channels :] = 0  # a veil takes contrast from ratios
            t = F.avg_pool2d(veil, g.factor) * reach * _valid(values, mask)
            values.add_(t * (bright - values))

    def _cloud(self, x: Mapping[int, Tensor], generator: torch.Generator) -> None:
        """Clouds make a period's optical values invalid; their shadows, elsewhere, darken them."""
        n, size, period = _count(x), _size(x), self._period(_count(x), generator)
        shape = 0.6 * _smooth(generator, n, size, 4) + 0.4 * _smooth(generator, n, size, 12)
        cover = _between(generator, n, _COVER).flatten()
        cover *= _uniform(generator, n) < self.settings.cloud
        depth = _between(generator, n, _DEPTH)
        away = (torch.tensor(size) * (0.5 * _uniform(generator, n, 2) - 0.25)).round().int()
        cloud, shadow = torch.zeros_like(shape), torch.zeros_like(shape)
        for i, share in enumerate(cover.tolist()):
            hidden = round(share * size[0] * size[1])
            if hidden:
                cloud[i] = shape[i] >= shape[i].flatten().topk(hidden).values[-1]
                shadow[i] = cloud[i].roll(away[i].tolist(), (1, 2)) * (1 - cloud[i])
        for g in self._groups:
            features = g.optical & (g.period == period)
            values, mask = _parts(x, g)
            dark = features.clone()
            dark[:, g.channels :] = False  # a shadow dims all bands alike, ratios stay
            t = depth * F.avg_pool2d(shadow, g.factor) * dark[:, :, None, None]
            values.add_(t * _valid(values, mask) * (_SHADE_SD - values))
            _remove(x, g, features, F.max_pool2d(cloud, g.factor) > 0)

    def _shift(self, x: Mapping[int, Tensor], generator: torch.Generator) -> None:
        n = _count(x)
        sensor = torch.randint(self._sensors, (n,), generator=generator)
        by = self.settings.shift_px * (2 * _uniform(generator, n, 2) - 1)
        for g in self._groups:
            moved = torch.nonzero(sensor == g.sensor)[:, 0]
            if len(moved):
                part = x[g.factor][moved, g.at]
                x[g.factor][moved, g.at] = _shifted(part, by[moved] / g.factor)


def _shifted(x: Tensor, by: Tensor) -> Tensor:
    """Values and mask (n, c + 1, h, w) moved down and right by (n, 2) pixels, bilinear.

    Only valid pixels are averaged; a pixel is valid if they have half the weight. The edge of the
    window repeats.
    """
    n, _, h, w = x.shape
    ok = (x[:, -1:] > 0).to(x.dtype)
    step = -2 * by.flip(1) / torch.tensor([w, h])
    theta = torch.eye(2, 3).repeat(n, 1, 1)
    theta[:, :, 2] = step
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False).to(x.dtype)
    out = F.grid_sample(torch.cat([x * ok, ok], 1), grid, padding_mode="border",
                        align_corners=False)  # fmt: skip
    share = out[:, -1:]
    return out[:, :-1] / share.clamp_min(0.5) * (share >= 0.5)


def _remove(x: Mapping[int, Tensor], g: _Group, features: Tensor, where: Tensor) -> None:
    """Make features (n, c) of a group invalid at pixels (n or 1, 1, h or 1, w or 1)."""
    values, mask = _parts(x, g)
    gone = where & features[:, :, None, None]
    c = g.channels
    lost = ((values[:, :c] != 0) & gone[:, :c]).sum(1, keepdim=True) / c
    left = (mask - lost).clamp_min(0)
    # Less than half a channel is rounding; where all channels go nothing is left.
    left = left * (left > 0.5 / c) * ~gone[:, :c].all(1, keepdim=True)
    mask.copy_(torch.where(gone[:, :c].any(1, keepdim=True), left, mask))
    values.masked_fill_(gone | ((mask == 0) & (features.any(1)[:, None, None, None])), 0.0)


def _roles(spec: PartSpec, group: str) -> dict[str, str]:
    roles = spec.roles.get(group)
    return group_facts(group, {} if roles is None else {"roles": roles}).roles


def _sensor(group: str) -> str:
    return group.partition("@")[0].rsplit("_", 1)[0]


def _parts(x: Mapping[int, Tensor], g: _Group) -> tuple[Tensor, Tensor]:
    """Views of a group's values (n, c, h, w) and mask (n, 1, h, w)."""
    all_of = x[g.factor]
    return all_of[:, g.at.start : g.at.stop - 1], all_of[:, g.at.stop - 1 : g.at.stop]


def _valid(values: Tensor, mask: Tensor) -> Tensor:
    """1 where a value is there: a missing one is 0."""
    return ((values != 0) & (mask > 0)).to(values.dtype)


def _count(x: Mapping[int, Tensor]) -> int:
    return int(next(iter(x.values())).shape[0])


def _size(x: Mapping[int, Tensor]) -> tuple[int, int]:
    """Height and width of the windows in 10 m pixels."""
    f, v = next(iter(x.items()))
    return f * v.shape[2], f * v.shape[3]


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator)


def _between(generator: torch.Generator, n: int, ends: tuple[float, float]) -> Tensor:
    """(n, 1, 1, 1) evenly between two numbers."""
    return ends[0] + (ends[1] - ends[0]) * _uniform(generator, n, 1, 1, 1)


def _smooth(generator: torch.Generator, n: int, size: tuple[int, int], cells: int) -> Tensor:
    """Smooth fields (n, 1, H, W) from 0 to 1, with about this many hills along the longer side."""
    longest = max(size)
    grid = [max(2, math.ceil(cells * s / longest)) for s in size]
    field = F.interpolate(_uniform(generator, n, 1, *grid), size, mode="bicubic",
                          align_corners=False)  # fmt: skip
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - low) / (high - low).clamp_min(1e-6)
