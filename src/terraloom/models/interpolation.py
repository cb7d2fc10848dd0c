"""Series of single pixels at regular dates: linear in time, each band from its own valid dates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Series", "in_order", "interpolate", "interpolate_series"]

#: Days; two dates on one day have no distance to divide by.
_EPS = 1e-6


@dataclass(frozen=True)
class Series:
    """Prepared input: values (N, T, B) and their mask, position in the season, dates that count."""

    x: Tensor
    mask: Tensor
    t: Tensor
    date: Tensor


def in_order(s: Series, keep: int) -> Series:
    """Dates in order of time, those that do not count last; the first ``keep`` of them."""
    t = torch.where(s.date, s.t, torch.full_like(s.t, math.inf))
    order = t.argsort(dim=1, stable=True)[:, :keep]
    deep = order[..., None].expand(-1, -1, s.x.shape[2])
    return Series(s.x.gather(1, deep), s.mask.gather(1, deep), s.t.gather(1, order),
                   s.date.gather(1, order))  # fmt: skip


def interpolate(s: Series, grid: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Linear interpolation of each band between its own observations, the nearest one outside.

    Args:
        s: Prepared input.
        grid: (G,) days into the season, ascending.
        step: Days between them.

    Returns:
        Values (N, G, B), 0 without an observation, and nearness exp(-days / step) to the nearest
        observation, 0 without one.
    """
    n, length, bands = s.x.shape
    if length == 0:
        empty = s.x.new_zeros((n, len(grid), bands))
        return empty, empty
    s = in_order(s, length)
    # Dates that do not count stand last, after every day of the grid.
    t = torch.where(s.date, s.t, torch.full_like(s.t, math.inf)).contiguous()
    at = torch.arange(length, device=s.x.device)[None, :, None]
    earlier = torch.where(s.mask, at, -1).cummax(1)[0]
    later = torch.where(s.mask, at, length).flip(1).cummin(1)[0].flip(1)
    right = torch.searchsorted(t, grid.expand(n, -1).contiguous(), right=True)
    left_at = (right - 1)[..., None].expand(-1, -1, bands)
    right_at = right[..., None].expand(-1, -1, bands)
    i = torch.where(left_at >= 0, earlier.gather(1, left_at.clamp_min(0)), -1)
    j = torch.where(right_at < length, later.gather(1, right_at.clamp_max(length - 1)), length)
    has_i, has_j = i >= 0, j < length
    i, j = i.clamp_min(0), j.clamp_max(length - 1)
    times = s.t[..., None].expand(-1, -1, bands)
    before = torch.where(has_i, grid[:, None] - times.gather(1, i), math.inf)
    after = torch.where(has_j, times.gather(1, j) - grid[:, None], math.inf)
    share = torch.where(has_i & has_j, before / (before + after).clamp_min(_EPS), 0.0)
    share = torch.where(has_j & ~has_i, 1.0, share)
    value = torch.where(share < 1, s.x.gather(1, i) * (1 - share), 0.0) + s.x.gather(1, j) * share
    seen = has_i | has_j
    near = torch.exp(-torch.minimum(before, after) / step)
    return torch.where(seen, value, 0.0), near


def interpolate_series(
    x: Tensor, days: Tensor, *, steps: int, start_day: float = 1.0, period_days: float = 365.25
) -> Tensor:
    """Each band linear in time at regular days of the season, as ``tempcnn`` sees it.

    Args:
        x: (N, T, B) float32, NaN = missing.
        days: (N, T) day of year, NaN = padding.
        steps: Dates per season (count).
        start_day: Day of year on which the season starts.
        period_days: Its length (days).

    Returns:
        (N, steps, B); NaN where a band has no observation at all.
    """
    mask = torch.isfinite(x) & torch.isfinite(days)[..., None]
    date = mask.any(-1)
    t = torch.where(date, torch.remainder(days - start_day, period_days), 0.0)
    step = period_days / steps
    grid = (torch.arange(steps) + 0.5) * step
    value, near = interpolate(Series(torch.where(mask, x, 0.0), mask, t, date), grid, step)
    return value.masked_fill(near == 0, math.nan)
