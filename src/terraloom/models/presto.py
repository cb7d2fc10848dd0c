"""Presto: a transformer of monthly pixel series, pre-trained on Sentinel-1 and -2, ERA5 and SRTM.

The encoder of Tseng et al. 2023 (arXiv 2304.14065) in plain torch; parameter names are those of
the published weights. A token is one group of bands in one month: a linear embedding of the group
plus codes of month, band group and position in the series. Elevation is one token for the whole
series, and so is the place. Tokens that are not observed take no part in attention or in the mean.

Weights come from a file; nothing is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError
from terraloom.models.fusion import Normalisation
from terraloom.models.lora import add_lora
from terraloom.models.weights import read_weights

__all__ = [
    "ADAPT",
    "GROUPS",
    "PRESTO_BANDS",
    "Presto",
    "PrestoSeries",
    "load_presto",
    "presto_bands",
    "presto_scaling",
]

#: What is trained of the encoder: all of it, nothing, or low-rank additions.
ADAPT = ("fine-tune", "frozen", "lora")
#: Linear layers that LoRA adapts.
_LORA_LAYERS = ("qkv", "proj", "fc1", "fc2")
_MONTH_DAYS = 365.25 / 12

#: Bands in the order of the input.
PRESTO_BANDS = (
    "VV", "VH", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12",
    "temperature_2m", "total_precipitation", "elevation", "slope", "NDVI",
)  # fmt: skip
#: Bands that are embedded together; the order is that of the channel codes.
GROUPS: dict[str, tuple[str, ...]] = {
    "S1": ("VV", "VH"),
    "S2_RGB": ("B2", "B3", "B4"),
    "S2_Red_Edge": ("B5", "B6", "B7"),
    "S2_NIR_10m": ("B8",),
    "S2_NIR_20m": ("B8A",),
    "S2_SWIR": ("B11", "B12"),
    "ERA5": ("temperature_2m", "total_precipitation"),
    "SRTM": ("elevation", "slope"),
    "NDVI": ("NDVI",),
}
#: Input scaling of the weights, (value - mean) / sd, in our units: dB, reflectance (0-1), kelvin,
#: metres of rain per month, metres, degrees.
_SCALE: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("VV", "VH"), (-25.0, 25.0)),
    "temperature_2m": (272.15, 35.0),
    "total_precipitation": (0.0, 0.03),
    "elevation": (0.0, 2000.0),
    "slope": (0.0, 50.0),
}
#: Other names of the bands: common names of the STAC eo extension, and ours.
_ALIASES = {
    "blue": "B2", "green": "B3", "red": "B4", "nir": "B8", "nir08": "B8A", "swir16": "B11",
    "swir22": "B12", "rededge071": "B5", "rededge075": "B6", "rededge078": "B7",
    "dem": "elevation",
} | {f"b{i:02}": f"B{i}" for i in range(2, 9)}  # fmt: skip
_ALIASES |= {band.lower(): band for band in PRESTO_BANDS}
#: Classes of Dynamic World; this number itself stands for "unknown".
WORLD_CLASSES = 9
#: Steps of the longest series, two years.
MAX_STEPS = 24


def presto_bands(names: Sequence[str]) -> tuple[str, ...]:
    """Presto's bands for names such as ``B02``, ``nir08``, ``VV`` or ``dem``.

    Args:
        names: Names of our bands; case does not matter.

    Returns:
        One of :data:`PRESTO_BANDS` for each name.

    Raises:
        ModelError: A name that is no band of Presto, a band named twice, or a band that would be
            ignored because its group is incomplete (B4 with B8 counts: they give the NDVI).
    """
    where = "bands of Presto"
    found = [_ALIASES.get(name.lower(), "") for name in names]
    unknown = [n for n, band in zip(names, found, strict=True) if not band]
    if unknown:
        raise ModelError(
            f"no place for {', '.join(unknown)}", where=where, allowed=", ".join(sorted(_ALIASES)),
            fix="leave these bands out, or name them as the band they are like",
        )  # fmt: skip
    twice = sorted({b for b in found if found.count(b) > 1})
    if twice:
        raise ModelError(f"{', '.join(twice)} more than once", where=where, allowed="each once")
    have = set(found)
    used = {b for group in GROUPS.values() if have >= set(group) for b in group}
    used |= {"B4", "B8"} if have >= {"B4", "B8"} else set()
    for band in found:
        if band not in used:
            group = next(g for g in GROUPS.values() if band in g)
            raise ModelError(f"{band} without {', '.join(sorted(set(group) - have))}", where=where,
                             allowed=f"all of {', '.join(group)}, which share one token",
                             fix="add the others, or leave it out")  # fmt: skip
    return tuple(found)


def presto_scaling(bands: Sequence[str]) -> Normalisation:
    """Presto's own input scaling of bands as :func:`presto_bands` names them.

    Values are dB (VV, VH), reflectance of 0 to 1 (B*), kelvin, metres of rain per month, metres
    (elevation), degrees (slope) and the index itself (NDVI).
    """
    pairs = [_SCALE.get(band, (0.0, 1.0)) for band in bands]
    return Normalisation(tuple(m for m, _ in pairs), tuple(s for _, s in pairs))


class Presto(nn.Module):
    """The encoder: 128 features of a series.

    Args:
        width: Channels of a token (count).
        depth: Transformer blocks (count).
        heads: Attention heads (count).
        mlp_ratio: Hidden channels of a block's MLP per channel (count).
    """

    pos_embed: Tensor

    def __init__(
        self, width: int = 128, depth: int = 2, heads: int = 8, mlp_ratio: int = 4
    ) -> None:
        super().__init__()
        self.width = width
        self.eo_patch_embed = nn.ModuleDict(
            {name: nn.Linear(len(group), width) for name, group in GROUPS.items()}
        )
        self.dw_embed = nn.Embedding(WORLD_CLASSES + 1, width)
        self.latlon_embed = nn.Linear(3, width)
        self.channel_embed = nn.Embedding(len(GROUPS) + 1, width // 4)
        self.month_embed = nn.Embedding(12, width // 4, _weight=_months(width // 4), _freeze=True)
        self.register_buffer("pos_embed", _positions(MAX_STEPS, width // 2)[None])
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def tokens(
        self, x: Tensor, seen: Tensor, month: Tensor, world: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (N, L, width) of groups and months, and which of them are observed (N, L)."""
        n, length, _ = x.shape
        month_code = self.month_embed(month)
        place_code = self.pos_embed[:, :length].expand(n, -1, -1)
        parts, masks = [], []
        for i, (name, group) in enumerate(GROUPS.items()):
            at = [PRESTO_BANDS.index(band) for band in group]
            # A group is one token: without one of its bands it is not observed.
            on = seen[..., at].all(-1)
            if not bool(on.any()):
                continue
            code = self.channel_embed.weight[i].expand(n, length, -1)
            steps = slice(0, 1) if name == "SRTM" else slice(None)
            whole = torch.cat([month_code, code, place_code], -1)[:, steps]
            if name == "SRTM":  # one token without month or position
                quarter = code.shape[-1]
                whole = F.pad(code[:, :1], (quarter, self.width - 2 * quarter))
            parts.append(self.eo_patch_embed[name](x[:, steps][..., at]) + whole)
            masks.append(on[:, steps])
        if world is not None:
            code = self.channel_embed.weight[len(GROUPS)].expand(n, length, -1)
            parts.append(self.dw_embed(world) + torch.cat([month_code, code, place_code], -1))
            masks.append(world != WORLD_CLASSES)
        if not parts:
            return x.new_zeros((n, 0, self.width)), seen.new_zeros((n, 0))
        return torch.cat(parts, 1), torch.cat(masks, 1)

    def forward(
        self,
        x: Tensor,
        seen: Tensor,
        month: Tensor,
        lat_lon: Tensor | None = None,
        world: Tensor | None = None,
    ) -> Tensor:
        """Features of the series.

        Args:
            x: (N, T, 17) values scaled by :func:`presto_scaling`, in the order of
                :data:`PRESTO_BANDS`; T is 24 months at most. Elevation and slope are read from the
                first step.
            seen: (N, T, 17) bool, False = missing.
            month: (N, T) int64 month, 0 = January.
            lat_lon: (N, 2) latitude and longitude (degrees); None = unknown. The weights were
                trained with a place always.
            world: (N, T) int64 class of Dynamic World, 9 = unknown; None = unknown.

        Returns:
            (N, width): mean of the observed tokens after the blocks, normalised. Of a series
            without any token, the norm of zeros.

        Raises:
            ModelError: A series of more than 24 steps.
        """
        if x.shape[1] > MAX_STEPS or x.shape[2] != len(PRESTO_BANDS):
            raise ModelError(
                f"series of shape {tuple(x.shape)}", where="Presto",
                allowed=f"(N, T, {len(PRESTO_BANDS)}), T up to {MAX_STEPS}",
            )  # fmt: skip
        x = torch.where(seen, x, torch.zeros_like(x))
        tokens, on = self.tokens(x, seen, month, world)
        if lat_lon is not None:
            place = self.latlon_embed(_cartesian(lat_lon))[:, None]
            tokens = torch.cat([place, tokens], 1)
            on = torch.cat([on.new_ones((len(on), 1)), on], 1)
        if not tokens.shape[1]:
            mean = tokens.new_zeros((len(tokens), self.width))
        else:
            # Softmax over nothing is undefined: a series without tokens attends to all, and its
            # mean over no token is 0.
            attend = (on | ~on.any(1, keepdim=True))[:, None, None]
            for block in self.blocks:
                tokens = block(tokens, attend)
            mean = (tokens * on[..., None]).sum(1) / on.sum(1, keepdim=True).clamp_min(1)
        out: Tensor = self.norm(mean)
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        n, length, c = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, length, c))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, ratio * width)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PrestoSeries(nn.Module):
    """Presto for irregular dates: monthly means of named bands.

    Args:
        bands: Names that :func:`presto_bands` knows, in the order of the input.
        start_day: Day of year on which the season starts.
        period_days: Its length (days): 1 to 24 months.
        adapt: What is trained: ``fine-tune`` (all), ``frozen`` (nothing) or ``lora``.
        rank: Rank of the additions of LoRA (count).
        alpha: Their weight times their rank.
        lat_lon: Latitude and longitude of the area (degrees); None = unknown.

    Raises:
        ModelError: Bands, period, place or adaptation that do not do.
    """

    month: Tensor
    place: Tensor

    def __init__(
        self,
        bands: Sequence[str],
        *,
        start_day: float = 1.0,
        period_days: float = 365.25,
        adapt: str = "fine-tune",
        rank: int = 8,
        alpha: float = 16.0,
        lat_lon: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        months = round(period_days / _MONTH_DAYS)
        if not 1 <= months <= MAX_STEPS:
            raise ModelError(f"a period of {period_days} days", where="Presto",
                             allowed=f"1 to {MAX_STEPS} months")  # fmt: skip
        if lat_lon is not None and not (abs(lat_lon[0]) <= 90 and abs(lat_lon[1]) <= 360):
            raise ModelError(f"place {lat_lon}", where="Presto",
                             allowed="latitude and longitude in degrees")  # fmt: skip
        if adapt not in ADAPT:
            raise ModelError(f"adapt {adapt!r}", where="Presto", allowed=", ".join(ADAPT))
        self.step = period_days / months
        self.at = [PRESTO_BANDS.index(band) for band in presto_bands(bands)]
        middle = start_day - 1 + (torch.arange(months) + 0.5) * self.step
        month = torch.remainder(middle, 365.25).div(_MONTH_DAYS).long().clamp_max(11)
        self.register_buffer("month", month, persistent=False)
        place = torch.tensor(lat_lon or (), dtype=torch.float32)
        self.register_buffer("place", place, persistent=False)
        self.encoder = Presto()
        if adapt == "lora":
            add_lora(self.encoder, _LORA_LAYERS, rank=rank, alpha=alpha)
        elif adapt == "frozen":
            self.encoder.requires_grad_(False)

    def monthly(self, x: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means (N, M, 17) of what is observed in each month, and where there is any."""
        n, months = len(x), len(self.month)
        bins = (t / self.step).long().clamp(0, months - 1)[..., None].expand_as(x)
        zero = x.new_zeros((n, months, x.shape[2]))
        total = zero.scatter_add(1, bins, torch.where(mask, x, 0.0))
        count = zero.scatter_add(1, bins, mask.to(x.dtype))
        mean = x.new_zeros((n, months, len(PRESTO_BANDS)))
        seen = torch.zeros_like(mean, dtype=torch.bool)
        mean[..., self.at] = total / count.clamp_min(1)
        seen[..., self.at] = count > 0
        for band in map(PRESTO_BANDS.index, GROUPS["SRTM"]):  # of the whole series
            on = seen[..., band].sum(1, keepdim=True)
            whole = mean[..., band].sum(1, keepdim=True) / on.clamp_min(1)
            mean[..., band], seen[..., band] = whole, on > 0
        ndvi, nir, red = map(PRESTO_BANDS.index, ("NDVI", "B8", "B4"))
        if ndvi not in self.at:
            both = mean[..., nir] + mean[..., red]
            seen[..., ndvi] = seen[..., nir] & seen[..., red] & (both > 0)
            difference = mean[..., nir] - mean[..., red]
            mean[..., ndvi] = difference / torch.where(both > 0, both, 1.0)
        return mean, seen

    def forward(self, x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """Features of a series.

        Args:
            x: (N, T, B) values scaled by :func:`presto_scaling`, T of any length.
            mask: (N, T, B) bool, False = missing.
            t: (N, T) days since the start of the season, 0 to below ``period_days``.

        Returns:
            (N, 128).
        """
        n = len(x)
        place = self.place.expand(n, -1) if len(self.place) else None
        out: Tensor = self.encoder(*self.monthly(x, mask, t), self.month.expand(n, -1), place)
        return out


def _months(width: int) -> Tensor:
    """Codes of the twelve months: half the channels repeat the sine, half the cosine."""
    angle = torch.arange(12) * (2 * math.pi / 12)
    half = width // 2
    return torch.cat([angle.sin()[:, None].expand(-1, half),
                      angle.cos()[:, None].expand(-1, half)], -1).contiguous()  # fmt: skip


def _positions(steps: int, width: int) -> Tensor:
    """Sinusoidal codes of the step, base 1000."""
    rate = 1000.0 ** (-2 * torch.div(torch.arange(width), 2, rounding_mode="floor") / width)
    angle = torch.arange(steps)[:, None] * rate
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())


def _cartesian(lat_lon: Tensor) -> Tensor:
    """(N, 2) degrees to (N, 3) on the unit sphere: the date line is no border."""
    lat, lon = torch.deg2rad(lat_lon).unbind(-1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)


def load_presto(net: Presto, path: Path | str) -> None:
    """Put published weights into ``net``; the decoder in the file is left out.

    Args:
        net: Encoder of the default size; additions of :mod:`terraloom.models.lora` stay as they
            are.
        path: File of a torch state dict, whole model or encoder alone. Only tensors are read.

    Raises:
        ModelError: No such file, no state dict, or weights that do not fit.
    """
    where = str(path)
    state = read_weights(path, "give the path of Presto's default_model.pt")
    own = {k.removeprefix("encoder."): v for k, v in state.items() if not k.startswith("decoder.")}
    want = {k: v for k, v in net.state_dict().items() if ".lora_" not in k}
    wrong = sorted(k for k in want.keys() | own.keys()
                   if k not in want or not isinstance(own.get(k), Tensor)
                   or own[k].shape != want[k].shape)  # fmt: skip
    if wrong:
        raise ModelError(f"{len(wrong)} weights that do not fit, the first is {wrong[0]}",
                         where=where, allowed="the encoder of Presto, width 128, 2 blocks",
                         fix="give the path of Presto's default_model.pt")  # fmt: skip
    net.load_state_dict(own, strict=False)
