"""The tile-invariance certificate: one area, predicted in different ways, with one result.

The area is predicted as one window and then in windows of other sizes, several together, by
several workers at once, and on the CPU where the campaign uses a GPU. What may differ is rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.errors import ModelError, StateError
from terraloom.grid import CampaignGrid
from terraloom.io import write_json
from terraloom.log import get_logger
from terraloom.plan import CUBES
from terraloom.predict.calibration import calibrated_parts
from terraloom.predict.engine import load_ensemble
from terraloom.predict.ensemble import Ensemble
from terraloom.predict.reader import CubeReader
from terraloom.predict.views import F32, predict_views
from terraloom.predict.windows import Window
from terraloom.preprocess.reasons import INVALID

__all__ = ["TOLERANCE", "Certificate", "Comparison", "Setting", "certify"]

#: Probabilities may differ by this; values of regressions by this times 1 + |value|.
TOLERANCE = 1e-4
#: Classes whose probabilities are closer than rounding are a tie: neither is the right one.
_TIE = 1e-5
#: Pixels this near the border of a window are its seam.
_SEAM_PX = 16
_WINDOWS_PX = (256, 512, 1000)

log = get_logger(__name__)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """A way to predict an area.

    Attributes:
        window_px: Height and width of the windows.
        batch: Windows predicted together (count).
        workers: Batches predicted at the same time (count).
        device: Where.
    """

    window_px: int
    batch: int = 1
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Comparison:
    """How far a setting departs from the area in one window.

    Attributes:
        setting: The setting.
        classes_changed: Pixels with another class (count).
        ties: Pixels with another class of equal probability, not counted there (count).
        seam: Largest difference of a probability within 16 px of a window's border.
        interior: Largest difference elsewhere; NaN where there is no elsewhere.
        values: Largest difference of a regression, over 1 + |value|; NaN without one.
    """

    setting: Setting
    classes_changed: int
    ties: int
    seam: float
    interior: float
    values: float

    @property
    def passed(self) -> bool:
        """Whether this is rounding."""
        far = np.nanmax([self.seam, self.interior, self.values, 0.0])
        return self.classes_changed == 0 and bool(far <= TOLERANCE)


@dataclass(frozen=True)
class Certificate:
    """What was compared, and whether all of it agrees.

    Attributes:
        area: The area, in pixels of the grid.
        valid_px: Pixels of it that were compared (count).
        model: Digest of the ensemble.
        comparisons: One per setting.
    """

    area: Window
    valid_px: int
    model: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every setting agrees."""
        return all(c.passed for c in self.comparisons)

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "passed": self.passed, "tolerance": TOLERANCE, "tie": _TIE, "seam_px": _SEAM_PX,
            "area": asdict(self.area), "valid_px": self.valid_px, "model": self.model,
            "settings": [asdict(c) | {"passed": c.passed} for c in self.comparisons],
        }  # fmt: skip

    def table(self) -> str:
        """Text for people."""
        a = self.area
        lines = [
            f"Tile invariance of model {self.model}: {a.height} x {a.width} px at row {a.row}, "
            f"column {a.col}; {self.valid_px} valid pixels, against one window of them all",
            f"{'window':>7} {'batch':>5} {'workers':>7} {'device':>6} {'classes':>8} {'ties':>5} "
            f"{'seam':>8} {'interior':>8} {'values':>8}",
        ]
        for c in self.comparisons:
            s = c.setting
            lines.append(
                f"{s.window_px:>7} {s.batch:>5} {s.workers:>7} {s.device:>6} "
                f"{c.classes_changed:>8} {c.ties:>5} {_short(c.seam)} {_short(c.interior)} "
                f"{_short(c.values)}  {'ok' if c.passed else 'DIFFERS'}"
            )
        lines.append(
            f"{'Passed' if self.passed else 'FAILED'}: classes changed (count), largest difference "
            f"of a probability within {_SEAM_PX} px of a border and elsewhere, of values; "
            f"allowed 0 and {TOLERANCE:g}"
        )
        return "\n".join(lines)

    def require(self) -> None:
        """Refuse what does not agree.

        Raises:
            ModelError: Names each setting and how far it is off.
        """
        if not self.passed:
            wrong = "; ".join(
                f"windows of {c.setting.window_px} px, batch {c.setting.batch}, "
                f"{c.setting.workers} workers, {c.setting.device}: {c.classes_changed} classes, "
                f"probabilities by {np.nanmax([c.seam, c.interior]):.2g}, values by {c.values:.2g}"
                for c in self.comparisons if not c.passed
            )  # fmt: skip
            raise ModelError(
                f"predictions depend on how the region is cut ({wrong})", where="results/model",
                allowed=f"the same classes, and probabilities within {TOLERANCE:g}",
                fix="the network looks further than its receptive field says, or depends on the "
                "window; do not use its map",
            )  # fmt: skip


def _short(value: float) -> str:
    return f"{'-':>8}" if np.isnan(value) else f"{value:8.1e}"


def certify(
    campaign: Campaign, grid: CampaignGrid, out: Path, *, size_px: int = 1200,
    windows_px: Sequence[int] = _WINDOWS_PX,
) -> Certificate:  # fmt: skip
    """Predict an area of a finished run in different ways, compare, and write the certificate.

    Args:
        campaign: The campaign.
        grid: Its grid.
        out: JSON file to write.
        size_px: Height and width of the area; less where the grid is smaller.
        windows_px: Sizes of windows; those that are no smaller than the area are left out.

    Raises:
        StateError: The area has no valid pixel.
    """
    reader = CubeReader(CUBES, grid)
    ensemble = load_ensemble(campaign, reader)
    area = _area(grid, size_px)
    valid = (reader.reasons(area) & np.uint8(INVALID)) == 0
    if not valid.any():
        raise StateError("no valid pixel to compare", where=f"work/cube, {area}",
                         fix="give a larger --size-px")  # fmt: skip
    regressions = {t.name for t in campaign.tasks if t.kind is TaskKind.REGRESSION}
    device = ensemble.device.type
    whole = Setting(max(area.height, area.width), device=device)
    reference = _predicted(whole, area, ensemble, reader, campaign)
    found = []
    for setting in _settings(whole, windows_px):
        log.info("%s", setting)
        here = ensemble.on(setting.device)
        other = _predicted(setting, area, here, reader, campaign)
        found.append(_compared(setting, valid, reference, other, regressions))
    certificate = Certificate(area, int(valid.sum()), ensemble.digest, tuple(found))
    write_json(out, certificate.record())
    return certificate


def _settings(whole: Setting, windows_px: Sequence[int]) -> Iterator[Setting]:
    sizes = [s for s in windows_px if s < whole.window_px]
    for size in sizes:
        yield replace(whole, window_px=size)
    for size in sizes[:1]:
        yield replace(whole, window_px=size, batch=8)
        yield replace(whole, window_px=size, workers=2)
    for size in sizes[1:2]:
        yield replace(whole, window_px=size, batch=8, workers=2)
    yield replace(whole, workers=2)
    if whole.device != "cpu":
        yield replace(whole, device="cpu")


def _area(grid: CampaignGrid, size_px: int) -> Window:
    """A square around the middle of the tiles, within the grid."""
    tiles = grid.tiles()
    middle = Window.of(tiles[len(tiles) // 2], grid.tile_px)
    h, w = grid.geobox.shape
    height, width = min(size_px, h), min(size_px, w)
    row = min(max(middle.row + middle.height // 2 - height // 2, 0), h - height)
    col = min(max(middle.col + middle.width // 2 - width // 2, 0), w - width)
    return Window(row, col, height, width)


def _tiled(area: Window, size: int) -> list[Window]:
    """Windows of exactly a size, wherever that lies in the strides of the network."""
    return [
        area.common(Window(r, c, size, size))
        for r in range(area.row, area.row + area.height, size)
        for c in range(area.col, area.col + area.width, size)
    ]


def _predicted(
    setting: Setting, area: Window, ensemble: Ensemble, reader: CubeReader, campaign: Campaign
) -> dict[str, F32]:
    """What the map would be made of: per task (c, h, w) of the area."""
    halo, stride = ensemble.halo_px, ensemble.stride_px
    groups: dict[tuple[int, int], list[Window]] = {}
    for window in _tiled(area, setting.window_px):
        around = window.padded(halo, stride)
        groups.setdefault((around.height, around.width), []).append(window)
    batches = [
        ws[i : i + setting.batch]
        for ws in groups.values()
        for i in range(0, len(ws), setting.batch)
    ]
    out: dict[str, F32] = {}

    def one(batch: list[Window]) -> list[tuple[Window, dict[str, F32]]]:
        parts = [w.padded(halo, stride) for w in batch]
        inputs = [reader.window(p.row, p.col, p.height, p.width) for p in parts]
        stacked = {g: np.stack([i[g] for i in inputs]) for g in inputs[0]}
        views, maps = campaign.predict.views, ensemble.calibrations
        values = predict_views(ensemble.predict, stacked, views, logits=maps)
        cuts = [(w, w.within(p)) for w, p in zip(batch, parts, strict=True)]
        return [
            (w, _means(campaign, ensemble, {k: v[:, n, :, r, c] for k, v in values.items()}))
            for n, (w, (r, c)) in enumerate(cuts)
        ]

    with ThreadPoolExecutor(setting.workers) as pool:
        for found in pool.map(one, batches):
            for window, means in found:
                for name, values in means.items():
                    if name not in out:
                        out[name] = np.empty((len(values), area.height, area.width), np.float32)
                    out[name][(slice(None), *window.within(area))] = values
    return out


def _means(campaign: Campaign, ensemble: Ensemble, values: Mapping[str, F32]) -> dict[str, F32]:
    out = {}
    for task in campaign.tasks:
        members = values[task.name]
        if task.kind is TaskKind.SEGMENTATION:
            out[task.name] = calibrated_parts(members, ensemble.calibrations[task.name]).mean
        else:
            out[task.name] = members[:, :1].mean(axis=0)
    return out


def _seams(shape: tuple[int, ...], size: int) -> npt.NDArray[np.bool_]:
    """Pixels (h, w) near the border of a window inside the area."""

    def near(n: int) -> npt.NDArray[np.bool_]:
        at = np.arange(n)
        edges = np.arange(size, n, size)
        return np.asarray((np.abs(at[:, None] - edges + 0.5) < _SEAM_PX).any(axis=1))

    return near(shape[0])[:, None] | near(shape[1])[None]


def _compared(
    setting: Setting, valid: npt.NDArray[np.bool_], reference: Mapping[str, F32],
    other: Mapping[str, F32], regressions: Collection[str],
) -> Comparison:  # fmt: skip
    seam = _seams(valid.shape, setting.window_px) & valid
    inner = valid & ~seam
    changed = ties = 0
    at_seam, inside, values = [np.nan], [np.nan], [np.nan]
    for name, a in reference.items():
        b = other[name]
        off = np.abs(a - b).max(axis=0)
        if name in regressions:
            values.append(float((off / (1 + np.abs(a[0])))[valid].max()))
            continue
        if len(a) > 1:
            best, now = a.argmax(axis=0), b.argmax(axis=0)
            moved = (best != now) & valid
            p, q = (np.take_along_axis(a, k[None], 0)[0] for k in (best, now))
            tie = moved & (p - q < _TIE)
            ties += int(tie.sum())
            changed += int((moved & ~tie).sum())
        at_seam.append(float(off[seam].max()) if seam.any() else np.nan)
        inside.append(float(off[inner].max()) if inner.any() else np.nan)
    return Comparison(
        setting, changed, ties, *(float(np.fmax.reduce(v)) for v in (at_seam, inside, values))
    )
