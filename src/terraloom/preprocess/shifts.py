"""Co-registration of a campaign: one sub-pixel shift per scene, or a field of them, in one frame.

The frame is that of the campaign's first optical source. Its scenes are measured among themselves;
scenes of other sources are measured among themselves too, and then their composite, which is
clearer and less noisy than any of them, against that of the frame, on the coarser of the two
grids. Radar scenes of one source are moved together: a single date is too noisy to be told from
the others.

The result follows from the item lock alone. Scenes that came later (``added`` > 0) are measured
against those that were there before, whose shifts they do not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid
from terraloom.io import write_json
from terraloom.log import get_logger
from terraloom.preprocess.coregister import (
    UNKNOWN,
    Shift,
    moved_by,
    put_back,
    shift_between,
    solve_shifts,
    without,
)
from terraloom.preprocess.field import ShiftField
from terraloom.preprocess.looks import (
    Look,
    choose_blocks,
    measure_fields,
    pixels_per,
    read_look,
    residuals,
)
from terraloom.preprocess.scenes import SHIFTS, gather_scenes, mask_statistics
from terraloom.preprocess.stack import Scene

__all__ = ["measure_shifts"]

Float32 = npt.NDArray[np.float32]

#: Scenes measured among themselves; the rest is measured against their mean. Bounds memory.
_MOST_ANCHORS = 24
#: Smoothing of radar, pixels: edges must stand out from speckle.
_SAR_SIGMA_PX = 2.5

#: A shift after which windows lie this much farther off than before does not mend the scene.
_WORSE_PX = 0.1

log = get_logger(__name__)


@dataclass
class _Result:
    """What is known of a scene so far."""

    shift: Shift
    before_px: float = math.nan
    after_px: float = math.nan
    field: ShiftField | None = None


def measure_shifts(campaign: Campaign, grid: CampaignGrid) -> None:
    """Write ``shifts.json``: per scene its shift, and scenes that could not be aligned.

    Scenes too cloudy to be used are not measured. One scene alone has nothing to be aligned to.
    ``refused`` names the scenes to drop, ``unaligned`` those that are kept all the same, by
    ``coregister.on_unaligned``.

    Raises:
        SceneError: An image cannot be read.
    """
    settings = campaign.coregister
    found: dict[str, _Result] = {}
    if settings.enabled:
        stats = mask_statistics(campaign, grid)
        clear = {i: s["clear_pct"] for i, s in stats.items()}
        scenes = [
            s
            for s in gather_scenes(campaign, decided=False)
            if clear.get(str(s.item["id"]), 100.0) >= campaign.scenes.min_clear_pct
        ]
        found = _Campaign(campaign, grid, scenes, clear).solve()
    for name, result in found.items():
        if result.after_px > result.before_px + _WORSE_PX:
            log.warning("%s: windows scatter more than its shift; left where it is", name)
            result.shift = replace(result.shift, dy_px=0.0, dx_px=0.0)
            result.after_px, result.field = result.before_px, None
    lost = {
        i: f"no shift of at most {settings.max_shift_m:g} m could be told; too few clear windows, "
        "or a larger shift"
        for i, r in found.items()
        if not r.shift.known
    }
    drop = settings.on_unaligned == "drop"
    for name, result in found.items():
        log.info("%s: dy %.3f, dx %.3f px", name, result.shift.dy_px, result.shift.dx_px)
    write_json(
        SHIFTS,
        {
            "shifts": {i: _record(r) for i, r in found.items()},
            "refused": lost if drop else {},
            "unaligned": {} if drop else {i: f"kept unaligned: {why}" for i, why in lost.items()},
            "pixel_m": grid.resolution_m,
        },
    )


def _record(result: _Result) -> dict[str, Any]:
    return {
        **asdict(result.shift), "before_px": result.before_px, "after_px": result.after_px,
        "field": None if result.field is None else result.field.record(),
    }  # fmt: skip


class _Campaign:
    """Scenes of all sources and what has been measured of them."""

    def __init__(
        self, campaign: Campaign, grid: CampaignGrid, scenes: Sequence[Scene],
        clear: dict[str, float],
    ) -> None:  # fmt: skip
        self.settings = campaign.coregister
        self.grid = grid
        self.clear = clear
        self.max_px = campaign.coregister.max_shift_m / grid.resolution_m
        self.found: dict[str, _Result] = {}
        self.sources: dict[str, list[Scene]] = {}
        for source in dict.fromkeys(s.source for s in campaign.sources):
            mine = [s for s in scenes if s.item["source"] == source]
            if mine:
                self.sources[source] = mine

    def solve(self) -> dict[str, _Result]:
        optical = [k for k in self.sources if self._kind(k) == "optical"]
        for source in optical:
            self._optical(source, frame=None if source == optical[0] else optical[0])
        if self.settings.sar and optical:
            for source in self.sources:
                if self._kind(source) == "sar":
                    self._radar(source, optical[0])
        if self.settings.local:
            for source in optical:
                self._fields(source)
        return self.found

    @staticmethod
    def _kind(source: str) -> str:
        return load_source(source).kind

    def _given(self) -> Path | None:
        named = self.settings.reference in ("mean", "clearest", "median")
        return None if named else Path(self.settings.reference)

    def _shift(self, scene: Scene) -> Shift:
        """Its shift; that of a scene which is alone, and so was not measured, is 0."""
        result = self.found.get(str(scene.item["id"]))
        return Shift(0.0, 0.0, 1.0, 0.0, 0) if result is None else result.shift

    def _best(self, scenes: Sequence[Scene]) -> list[Scene]:
        """The clearest scenes, in the order of the lock."""
        order = sorted(scenes, key=lambda s: (-self._clear(s), str(s.item["id"])))
        chosen = {str(s.item["id"]) for s in order[:_MOST_ANCHORS]}
        return [s for s in scenes if str(s.item["id"]) in chosen]

    def _clear(self, scene: Scene) -> float:
        return self.clear.get(str(scene.item["id"]), 100.0)

    # --- one source ----------------------------------------------------------------------------

    def _optical(self, source: str, frame: str | None) -> None:
        scenes = self.sources[source]
        for n in sorted({int(s.item.get("added", 0)) for s in scenes}):
            new = [s for s in scenes if int(s.item.get("added", 0)) == n]
            old = [s for s in scenes if int(s.item.get("added", 0)) < n and self._shift(s).known]
            if old:
                self._later(new, old)
            else:
                self._first(new, frame)

    def _first(self, scenes: list[Scene], frame: str | None) -> None:
        """The first scenes of a source: among themselves, then their composite in the frame."""
        if len(scenes) == 1 and frame is None and self._given() is None:
            return
        anchors = self._best(scenes)
        look = choose_blocks(scenes, self.grid, pixels_per([scenes[0]], self.grid), len(anchors))
        raw = {str(s.item["id"]): read_look(s, look) for s in anchors}
        max_px = self.max_px / look.factor
        if len(scenes) == 1:
            shifts = [Shift(0.0, 0.0, 1.0, 0.0, 1)]
        else:
            shifts = solve_shifts(list(raw.values()), max_shift_px=2 * max_px)
        known = dict(zip(raw, shifts, strict=True))
        others = [s for s in scenes if str(s.item["id"]) not in known]
        mean = self._composite(raw, known) if others else np.zeros(0, np.float32)
        for scene in others:  # one by one
            known[str(scene.item["id"])] = shift_between(
                mean, read_look(scene, look), max_shift_px=2 * max_px
            )
        dy, dx = self._origin(known, scenes)
        if frame is not None or self._given() is not None:
            at = {k: _scaled(s, look.factor) for k, s in known.items()}
            offset = self._offset(anchors, at, frame)
            dy, dx = offset.dy_px / look.factor, offset.dx_px / look.factor
        final = {k: _within(moved_by(s, dy, dx), max_px) for k, s in known.items()}
        self._keep(scenes, final, raw, look, {k: final[k] for k in raw}, raw)

    def _composite(self, raw: dict[str, Float32], shifts: dict[str, Shift]) -> Float32:
        """Mean (or median, as the campaign says) of scenes put back by their shifts; NaN: none."""
        stack = []
        for name, image in raw.items():
            values, weight = put_back(
                image, np.asarray(np.isfinite(image).all(axis=0)), shifts[name]
            )
            values[:, weight == 0] = np.nan
            stack.append(values)
        if self.settings.reference == "median":
            return _quiet(np.nanmedian, stack)
        return _quiet(np.nanmean, stack)

    def _origin(self, shifts: dict[str, Shift], scenes: Sequence[Scene]) -> tuple[float, float]:
        """What is added to all shifts, so that the frame is the one the campaign asks for."""
        known = {k: s for k, s in shifts.items() if s.known}
        if not known:
            return 0.0, 0.0
        table = np.array([(s.dy_px, s.dx_px) for s in known.values()])
        middle = table.mean(axis=0)
        if self.settings.reference == "median":
            middle = np.median(table, axis=0)
        if self.settings.reference == "clearest":
            clearest = max(
                (s for s in scenes if str(s.item["id"]) in known),
                key=lambda s: (self._clear(s), str(s.item["id"])),
            )
            at = known[str(clearest.item["id"])]
            return -at.dy_px, -at.dx_px
        return -float(middle[0]), -float(middle[1])

    def _offset(self, scenes: Sequence[Scene], at: dict[str, Shift], frame: str | None) -> Shift:
        """How far the composite of aligned scenes lies off the frame, campaign pixels."""
        base = self._best(self.sources[frame]) if frame is not None else []
        factor = pixels_per([scenes[0], *base[:1]], self.grid)
        look = choose_blocks([*scenes, *base], self.grid, factor, 2)
        if self._kind(str(scenes[0].item["source"])) == "sar":
            own, sigma = _linear_mean([read_look(s, look) for s in scenes]), _SAR_SIGMA_PX
        else:
            own, sigma = self._mean_placed(scenes, look, at), 1.2
        given = self._given()
        if frame is None and given is not None:
            reference = look.read_reference(given)
        else:
            shifts = {str(s.item["id"]): self._shift(s) for s in base}
            reference = self._mean_placed(base, look, shifts)
        # Every band of one with every band of the other, where they are not the same bands.
        if len(reference) != len(own) or sigma > 1.2:
            n, m = len(reference), len(own)
            reference, own = np.repeat(reference, m, axis=0), np.tile(own, (n, 1, 1))
        found = shift_between(
            reference, own, max_shift_px=self.max_px / factor, sigma_px=sigma
        )  # fmt: skip
        if not found.known:
            log.warning("%s: its position in the frame cannot be told", scenes[0].item["source"])
        return _scaled(found, factor)

    def _mean_placed(self, scenes: Sequence[Scene], look: Look, at: dict[str, Shift]) -> Float32:
        """Mean of scenes read on the frame's pixels, one at a time."""
        total, count = np.zeros(1, np.float32), np.zeros(1, np.float32)
        for scene in scenes:
            shift = at[str(scene.item["id"])]
            if shift.known:
                image = read_look(scene, look, shift)
                fine = np.isfinite(image)
                total = total + np.where(fine, image, 0)
                count = count + fine
        if count.ndim == 1:
            return np.full((len(look.roles), *look.shape), np.nan, np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean: Float32 = np.where(count > 0, total / count, np.nan).astype(np.float32)
        return mean

    def _later(self, new: list[Scene], old: list[Scene]) -> None:
        """Scenes that came later, against those whose shifts are settled."""
        anchors = self._best(old)
        factor = pixels_per([new[0]], self.grid)
        look = choose_blocks([*new, *anchors], self.grid, factor, len(anchors))
        images = {str(s.item["id"]): read_look(s, look, self._shift(s)) for s in anchors}
        still = {k: Shift(0.0, 0.0, 1.0, 0.0, 0) for k in images}
        reference = self._composite(images, still)
        max_px = self.max_px / look.factor
        final = {
            str(s.item["id"]): shift_between(reference, read_look(s, look), max_shift_px=max_px)
            for s in new
        }
        self._keep(new, final, images, look, still, {})

    def _keep(
        self, scenes: Sequence[Scene], final: dict[str, Shift], images: dict[str, Float32],
        look: Look, at: dict[str, Shift], raw: dict[str, Float32],
    ) -> None:  # fmt: skip
        """Settle the shifts, and measure what they leave against the other scenes."""
        back = {
            k: put_back(v, np.asarray(np.isfinite(v).all(axis=0)), at[k]) for k, v in images.items()
        }
        total = np.sum([v for v, _ in back.values()], axis=0)
        count = np.sum([w for _, w in back.values()], axis=0)
        for scene in scenes:
            name = str(scene.item["id"])
            shift = _scaled(final[name], look.factor)
            result = self.found[name] = _Result(shift)
            # Not against itself.
            values, weight = back.get(name, (np.zeros(1), np.zeros(1)))
            if shift.known and (count - weight > 0.5).any():
                others = without(total, count, values, weight)
                image = raw[name] if name in raw else read_look(scene, look)
                before = residuals(others, image, final[name])
                after = residuals(others, read_look(scene, look, shift), None)
                result.before_px, result.after_px = before * look.factor, after * look.factor

    def _radar(self, source: str, frame: str) -> None:
        scenes = self._best(self.sources[source])
        at = {str(s.item["id"]): Shift(0.0, 0.0, 1.0, 0.0, 1) for s in scenes}
        offset = self._offset(scenes, at, frame)
        for scene in self.sources[source]:
            self.found[str(scene.item["id"])] = _Result(offset)

    def _fields(self, source: str) -> None:
        scenes = [
            s
            for s in self.sources[source]
            if str(s.item["id"]) in self.found and self._shift(s).known
        ]
        shifts = {str(s.item["id"]): self._shift(s) for s in scenes}
        first = min((int(s.item.get("added", 0)) for s in scenes), default=0)
        base = self._best([s for s in scenes if int(s.item.get("added", 0)) == first])
        fields = measure_fields(scenes, base, shifts, self.grid, self.max_px, self._given())
        for name, field in fields.items():
            self.found[name].field = field
        self._rest(scenes, base)

    def _rest(self, scenes: Sequence[Scene], base: Sequence[Scene]) -> None:
        """What scenes with a field lie off the others, measured again with all fields applied."""
        bent = [s for s in scenes if self.found[str(s.item["id"])].field is not None]
        if not bent:
            return
        look = choose_blocks([*scenes, *base], self.grid, pixels_per(scenes[:1], self.grid), 4)

        def placed(scene: Scene) -> Float32:
            result = self.found[str(scene.item["id"])]
            return read_look(scene, look, result.shift, result.field)

        total = np.zeros((len(look.roles), *look.shape), np.float32)
        count = np.zeros_like(total)
        for scene in base:
            image = placed(scene)
            total += np.nan_to_num(image)
            count += np.isfinite(image)
        for scene in bent:
            image = placed(scene)
            own = np.isfinite(image) if scene in base else np.zeros(image.shape, np.bool_)
            weight = own.astype(np.float32)
            others = without(total, count, np.where(own, image, 0), weight)
            after = residuals(others, image, None) * look.factor
            self.found[str(scene.item["id"])].after_px = after


def _scaled(shift: Shift, factor: float) -> Shift:
    """A shift in pixels ``factor`` times as small."""
    return replace(
        shift, dy_px=shift.dy_px * factor, dx_px=shift.dx_px * factor,
        residual_px=shift.residual_px * factor,
    )  # fmt: skip


def _within(shift: Shift, max_px: float) -> Shift:
    near = shift.known and math.hypot(shift.dy_px, shift.dx_px) <= max_px
    return shift if near else UNKNOWN


def _linear_mean(images: Sequence[Float32]) -> Float32:
    """Mean of decibels, taken in linear power."""
    power = _quiet(np.nanmean, [np.power(10, im / 10, dtype=np.float32) for im in images])
    with np.errstate(invalid="ignore", divide="ignore"):
        decibels: Float32 = 10 * np.log10(power)
    return decibels


def _quiet(reduce: Any, stack: Sequence[Float32]) -> Float32:
    """Reduce over scenes; pixels without any stay NaN."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(reduce(np.stack(stack), axis=0), dtype=np.float32)
