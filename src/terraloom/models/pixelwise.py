"""Networks of pixel series as networks for maps: each 10 m pixel by itself.

A pixel's series holds the bands and indices of all modalities in each step; coarser modalities are
repeated. Static modalities stand beside as bands that are the same in every step that is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from terraloom.models.dated import YEAR_DAYS, DatedNet, DatedSpec
from terraloom.models.fusion import Normalisation
from terraloom.models.temporal import SeriesNet, SeriesSpec

__all__ = ["PixelNet", "series_spec"]

#: Series that are evaluated at once outside of training (count).
_ROWS = 65_536
#: A mask counts as whole from here on.
_WHOLE = 0.999


def series_spec(spec: DatedSpec) -> SeriesSpec:
    """The network of single series that a network for maps is made of.

    Its width is four times that of the spec, in whole eights. The season starts so that the steps
    lie in its middle.
    """
    first, last = min(spec.days.values()), max(spec.days.values())
    period = YEAR_DAYS * spec.years
    # Days count from 1970-01-01; a day of year of 1 is the first of January.
    start = 1.0 if spec.network == "presto" else first + 1 - (period - (last - first)) / 2
    return SeriesSpec(
        tuple(_names(spec)), spec.tasks, encoder=spec.network,
        width=8 * max(1, round(spec.width / 2)), heads=8, steps=24 * spec.years, start_day=start,
        period_days=period, dropout=spec.dropout, adapt=spec.adapt, lat_lon=spec.lat_lon,
    )  # fmt: skip


def _names(spec: DatedSpec) -> list[str]:
    """Names of the bands of a series: ``group/band``, or ``band`` for pre-trained weights."""
    if spec.network == "presto":
        return [b for g in (*spec.dated, *spec.static) for b in spec.bands_of(g)]
    names = []
    for g in (*spec.dated, *spec.static):
        one = spec.one_step([g])
        names += [f"{g}/{b}" for b in spec.bands_of(g)]
        names += [f"{g}/index{i}" for i in range(len(one.pairs(g)))]
    return names


class PixelNet(DatedNet):
    """A network of pixel series (:class:`SeriesNet`) that makes maps.

    Args:
        spec: Modalities, steps, tasks and size.
        normalisation: Per modality; without it features pass as they are (mean 0, sd 1).
    """

    def __init__(
        self, spec: DatedSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        super().__init__(spec, normalisation)
        self.series = SeriesNet(series_spec(spec))
        self.heads = self.series.heads
        self.series.heads = nn.ModuleDict()

    def load_pretrained(self, path: Path | str) -> list[nn.Parameter]:
        """Put published weights into the encoder; see :meth:`SeriesNet.load_pretrained`."""
        return self.series.load_pretrained(path)

    # --- geometry ------------------------------------------------------------------------------
    @property
    def stride_px(self) -> int:
        """Tile origins must be multiples of this many 10 m pixels: whole pixels of all groups."""
        return math.lcm(*self._factor.values())

    def receptive_field_px(self) -> int:
        """0, or as far as the coarsest pixel reaches that a 10 m pixel lies in."""
        return max(self._factor.values()) - 1

    def halo_px(self) -> int:
        """0: tiles hold whole pixels of all modalities, and nothing beyond is looked at."""
        return 0

    def _values_per_px(self) -> int:
        return len(self.spec.steps) * 4 * max(self.series.spec.width, len(self.series.spec.bands))

    # --- network -------------------------------------------------------------------------------
    def _series(self, x: Mapping[int, Tensor]) -> Tensor:
        """Series (N h w, T, bands) at 10 m, NaN = missing."""
        places, parts = self._places(), []
        for group in (*self.spec.dated, *self.spec.static):
            f, at = places[group]
            n, _, h, w = x[f].shape
            own = self.spec.steps_of(group)
            v = x[f][:, at].reshape(n, len(own), -1, h, w).permute(0, 3, 4, 1, 2)
            value, mask = v[..., :-1], v[..., -1:]
            # Where some channels are missing, those that are 0 (the mean, to the last bit) are.
            value = value.masked_fill(~((mask >= _WHOLE) | (value != 0) & (mask > 0)), math.nan)
            if self.spec.network == "presto":  # it has its own scaling, and its own indices
                value = self._physical(group, value)
            parts.append(self._all_steps(group, value, f))
        series = torch.cat(parts, -1)
        still = sum(p.shape[-1] for p in parts[len(self.spec.dated) :])
        if still:
            # What is always there must not make a date that is not seen count.
            dated = series[..., :-still]
            unseen = ~torch.isfinite(dated).any(-1, keepdim=True)
            series = torch.cat([dated, series[..., -still:].masked_fill(unseen, math.nan)], -1)
        return series.flatten(0, 2)

    def _physical(self, group: str, value: Tensor) -> Tensor:
        """Bands in their unit, without indices."""
        n = len(self.spec.bands_of(group))
        at = next(iter(self._columns[group].values()))[:n]
        mean = self.get_buffer(f"mean_{group}").flatten()[at]
        std = self.get_buffer(f"std_{group}").flatten()[at]
        return value[..., :n] * std + mean

    def _all_steps(self, group: str, value: Tensor, factor: int) -> Tensor:
        """(N, h, w, T, bands) at 10 m; a static modality is the same in all steps."""
        own, steps = self.spec.steps_of(group), self.spec.steps
        if own == ("",):
            value = value.expand(*value.shape[:3], len(steps), value.shape[4])
        elif own != steps:
            whole = value.new_full((*value.shape[:3], len(steps), value.shape[4]), math.nan)
            whole[..., [steps.index(s) for s in own], :] = value
            value = whole
        return value.repeat_interleave(factor, 1).repeat_interleave(factor, 2)

    def forward_prepared(self, x: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Raw head outputs of prepared inputs, (N, c, h, w) with h, w of the padded window."""
        f, plane = next(iter(x.items()))
        n, h, w = plane.shape[0], plane.shape[2] * f, plane.shape[3] * f
        series = self._series(x)
        # Batch norm in training needs all series together.
        rows = len(series) if self.training else _ROWS
        features = torch.cat([self._encoded(part) for part in torch.split(series, rows)])
        features = features.view(n, h, w, -1).permute(0, 3, 1, 2)
        return {name: head(features) for name, head in self.heads.items()}

    def forward_at(self, x: Mapping[int, Tensor], wanted: Tensor) -> dict[str, Tensor]:
        """Outputs of the pixels that count, those of a vector of zeros elsewhere.

        In training the statistics of batch norm are those of the pixels that count.
        """
        n, h, w = wanted.shape
        rows = torch.nonzero(wanted.flatten())[:, 0]
        if not len(rows) or len(rows) == wanted.numel():
            return self.forward_prepared(x)
        found = self._encoded(self._series(x)[rows])
        features = found.new_zeros((n * h * w, found.shape[1])).index_copy(0, rows, found)
        features = features.view(n, h, w, -1).permute(0, 3, 1, 2)
        return {name: head(features) for name, head in self.heads.items()}

    def _encoded(self, series: Tensor) -> Tensor:
        """(rows, width) of series (rows, T, bands)."""
        days = (self.day + 1).expand(len(series), -1)
        net = self.series
        out: Tensor = net.drop(net.encoder(net.prepare(series, days)))
        return out
