"""The picture beside the map: natural colours where a sensor has them, else what there is.

One rule for every tile: which group and bands are shown and how values become grey levels is
settled once for the whole map, so that tiles look alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from terraloom.errors import StateError
from terraloom.preprocess.channels import channel_names
from terraloom.preprocess.groups import group_factor, group_facts, group_order

__all__ = ["Picture", "paint", "plan_picture"]

Float = npt.NDArray[np.float32]
Kind = Literal["natural", "false-colour", "grey"]

#: Reflectance .02-.30 covers land without clouds; the root lifts forests out of the dark.
_NATURAL = (0.02, 0.30, 0.6)
#: Percentiles of all tiles that other values are stretched between.
_STRETCH_PCT = (2.0, 98.0)
#: Diagonals of polarimetric matrices as red, green, blue; of T3 this is the Pauli picture.
_POLSAR = (("T22", "T33", "T11"), ("C11", "C22", "C33"))
#: Pixels of one tile that enter the percentiles (count), about.
_SAMPLE_PX = 20_000
_POWER_FLOOR = 1e-5


@dataclass(frozen=True)
class Picture:
    """What is shown and how.

    Attributes:
        kind: ``natural`` colours, ``false-colour`` (radar) or ``grey`` (one band).
        group: Group shown.
        bands: What is red, green and blue, e.g. ``("VV", "VH", "VV - VH")``.
        low: Value of each that becomes level 1.
        high: Value of each that becomes level 255.
        power: Exponent of the curve between them.
        decibel: Linear power is shown in decibels.
    """

    kind: Kind
    group: str
    bands: tuple[str, str, str]
    low: tuple[float, float, float] = (_NATURAL[0],) * 3
    high: tuple[float, float, float] = (_NATURAL[1],) * 3
    power: float = _NATURAL[2]
    decibel: bool = False

    def record(self) -> dict[str, Any]:
        """Plain values for ``map.json``."""
        return asdict(self) | {k: list(getattr(self, k)) for k in ("bands", "low", "high")}


def plan_picture(stores: Iterable[xr.Dataset]) -> Picture:
    """Choose group and bands, and the stretch where it is not fixed.

    Natural colours of the finest group with red, green and blue; else radar in false colours;
    else the first band of the finest group in grey, elevation last.

    Args:
        stores: Cubes of all tiles, opened one after the other; with natural colours of
            reflectance only the first is looked at.

    Raises:
        StateError: There is no cube, or it has no group.
    """
    picture, samples = None, []
    for store in stores:
        if picture is None:
            picture, fixed = _choose(store)
            if fixed:
                return picture
        rgb = _colours(picture, store)
        step = max(1, round((rgb[0].size / _SAMPLE_PX) ** 0.5))
        samples.append(rgb[:, ::step, ::step].reshape(3, -1))
    if picture is None:
        raise StateError("no cube for the picture", where="work/cube", fix="run the stage before")
    values = np.concatenate(samples, axis=1)
    low, high = [], []
    for band in values:
        seen = band[np.isfinite(band)]
        a, b = np.percentile(seen, _STRETCH_PCT) if seen.size else (0.0, 1.0)
        low.append(float(a))
        high.append(float(b) if b > a else float(a) + 1.0)
    return Picture(
        picture.kind, picture.group, picture.bands, (low[0], low[1], low[2]),
        (high[0], high[1], high[2]), 1.0, picture.decibel,
    )  # fmt: skip


def _choose(store: xr.Dataset) -> tuple[Picture, bool]:
    """Group and bands, and whether the fixed curve of reflectance serves."""
    groups = group_order(channel_names(store))
    if not groups:
        raise StateError("a cube without groups", where="work/cube", fix="run the stage before")
    facts = {g: group_facts(g, store[g].attrs) for g in groups}
    for g in groups:
        have = _bands(store, g)
        red, green, blue = (
            next((b for b in have if facts[g].roles.get(b) == r), None)
            for r in ("B04", "B03", "B02")
        )
        if red and green and blue:
            return Picture("natural", g, (red, green, blue)), facts[g].unit in ("reflectance", "")
    for g in (g for g in groups if facts[g].kind in ("sar", "polsar")):
        have, decibel = _bands(store, g), facts[g].unit == "power"
        for trio in _POLSAR:
            if set(trio) <= set(have):
                return Picture("false-colour", g, trio, decibel=decibel), False
        if len(have) > 1:
            a, b = have[:2]
            return Picture("false-colour", g, (a, b, f"{a} - {b}"), decibel=decibel), False
    first = next((g for g in groups if facts[g].kind != "dem"), groups[0])
    band = _bands(store, first)[0]
    return Picture("grey", first, (band,) * 3, decibel=facts[first].unit == "power"), False


def _bands(store: xr.Dataset, group: str) -> list[str]:
    return [str(b) for b in store[f"band_{group}"].to_numpy()]


def _colours(picture: Picture, store: xr.Dataset) -> Float:
    """Values (3, h, w) shown at the group's pixel size: the last of each pixel over time."""
    array, have = store[picture.group], _bands(store, picture.group)
    wanted = [b for b in dict.fromkeys(picture.bands) if b in have]
    picked = array.isel({f"band_{picture.group}": [have.index(b) for b in wanted]})
    if picked.ndim == 4:
        values = np.full((len(wanted), *picked.shape[-2:]), np.nan, np.float32)
        for t in reversed(range(picked.shape[0])):
            layer = picked[t].to_numpy()
            values = np.where(np.isfinite(values), values, layer)
            if np.isfinite(values).all():
                break
    else:
        values = picked.to_numpy().astype(np.float32)
    if picture.decibel:
        values = 10 * np.log10(np.maximum(values, _POWER_FLOOR))
    at = dict(zip(wanted, values, strict=True))
    if picture.bands[2] not in at:  # two bands: the third colour is their ratio in decibels
        at[picture.bands[2]] = at[wanted[0]] - at[wanted[1]]
    return np.stack([at[b] for b in picture.bands]).astype(np.float32)


def paint(picture: Picture, store: xr.Dataset, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The picture of one tile.

    Args:
        picture: What is shown and how.
        store: Cube of the tile.
        shape: (H, W) of the tile at 10 m; coarser pixels are repeated.

    Returns:
        (3, H, W), 1-255; 0 where there is no value.
    """
    f = group_factor(picture.group)
    rgb = _colours(picture, store).repeat(f, axis=1).repeat(f, axis=2)[:, : shape[0], : shape[1]]
    low, high = (np.array(v)[:, None, None] for v in (picture.low, picture.high))
    scaled = (rgb - low.astype(np.float32)) / (high - low).astype(np.float32)
    scaled = np.clip(scaled, 0, 1) ** np.float32(picture.power)
    return np.asarray(np.nan_to_num(1 + 254 * scaled, nan=0.0), dtype=np.uint8)
