"""Where the content of scenes lies, measured again and apart from the alignment.

The alignment (:mod:`terraloom.preprocess.shifts`) says how far each scene lies off; here scenes are
read as the cube reads them, with these shifts taken off, and what is left is measured against the
clearest ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.geobox import GeoBox

from terraloom.acquire.sources import load_source
from terraloom.preprocess.checks import LEAST_PIXELS, Record, record
from terraloom.preprocess.coregister import Shift, estimate_shift
from terraloom.preprocess.stack import Scene
from terraloom.preprocess.views import COARSE, View, look_fine

__all__ = ["check_shifts"]

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Look = tuple[Float32, Bool]

#: Rest that an aligned scene may lie off, pixels of the source (10 m at least).
ALIGNED_PX = 0.25
#: Without alignment: as far as the scenes of the source lie apart anyway, but at least this.
UNALIGNED_PX, UNALIGNED_SPREADS = 0.4, 3.0
#: Rests up to this are measured, pixels of the source.
REACH_PX = 5.0
#: Scenes are compared with the clearest, so many of them.
REFERENCE_SCENES = 9
#: A scene is measured against so many of these.
COMPARED = 5
#: A rest that fewer windows tell is no evidence.
LEAST_WINDOWS = 4
#: Share of the windows that must be clear for a scene whose content is found nowhere to be wrong.
LEAST_CLEAR = 0.25
#: Correlation with the reference below which a scene shows another place, where others reach more.
STRANGE, FAMILIAR = 0.1, 0.4
#: Roles of the bands that are compared; of each row the first that all scenes have.
_ROLES = (("B04",), ("B08", "B8A"))
_UNKNOWN = Shift(math.nan, math.nan, 0.0, math.nan, 0)


class _Source:
    """Scenes of one optical source; those of the reference are kept in memory, others are not."""

    def __init__(
        self, scenes: Sequence[Scene], views: Sequence[View], places: Sequence[GeoBox]
    ) -> None:
        roles = load_source(str(scenes[0].item["source"])).roles()
        have = set.intersection(*(set(s.item["assets"]) for s in scenes))
        found = [[roles[r] for r in row if roles.get(r) in have] for row in _ROLES]
        self.bands = [row[0] for row in found if row]
        self.places = places
        self.scenes = {str(s.item["id"]): s for s in scenes}
        self.views = {v.id: v for v in views}
        clear = {v.id: float(v.clear.mean()) for v in views}
        best = sorted((i for i in clear if clear[i] > 0), key=lambda i: (-clear[i], i))
        self.answers: dict[str, list[float]] = {}
        self.looks: dict[str, Look] = {}
        if self.bands:
            self.looks = {i: self._read(i) for i in best[:REFERENCE_SCENES]}

    def _read(self, item: str) -> Look:
        return look_fine(self.scenes[item], self.bands, self.places)

    @property
    def pixel(self) -> float:
        """Pixel of the source in campaign pixels, at least one."""
        item = next(iter(self.scenes.values())).item
        own = max(float(item["assets"][b]["resolution_m"]) for b in self.bands)
        return max(own / float(abs(self.places[0].resolution.x)), 1.0)

    def rest(self, item: str, left_out: set[str]) -> Shift:
        """What a scene lies off the others, campaign pixels.

        It is measured against the scenes that share most clear pixels with it, one by one (a
        composite of them would add its seams), and the middle of the answers counts.
        """
        values, clear = self.looks.get(item) or self._read(item)
        shared = {
            i: int((clear & look[1]).sum())
            for i, look in self.looks.items()
            if i != item and i not in left_out
        }
        best = sorted((i for i in shared if shared[i] >= LEAST_PIXELS), key=lambda i: -shared[i])
        answers = [r for r in (self._against(i, values, clear) for i in best[:COMPARED]) if r.known]
        self.answers[item] = [math.hypot(r.dy_px, r.dx_px) for r in answers]
        return _middle(answers)

    def disagrees(self, item: str, allowed: float) -> float:
        """Share of the scenes it was held against that a scene does not lie on, 0-1."""
        return float(np.mean([a > allowed for a in self.answers[item]]))

    def _against(self, item: str, values: Float32, clear: Bool) -> Shift:
        reference, seen = self.looks[item]
        both = clear & seen
        # Windows fit into one place; smoothing grows with the source's own pixel.
        size = min(128, *self.places[0].shape)
        return estimate_shift(
            reference, values, both, max_shift_px=REACH_PX * self.pixel, window_px=size,
            max_windows=16, sigma_px=1.2 * self.pixel,
        )  # fmt: skip


def _middle(answers: Sequence[Shift]) -> Shift:
    """Weighted median of several answers, and how far they lie apart."""
    if not answers:
        return _UNKNOWN
    at = np.array([[r.dy_px, r.dx_px] for r in answers])
    weight = np.array([r.n_windows / (r.residual_px + 0.05) ** 2 for r in answers])
    middle = np.array([_weighted_median(at[:, k], weight) for k in (0, 1)])
    apart = np.hypot(*(at - middle).T)
    own = min(r.residual_px / math.sqrt(max(r.n_windows, 1)) for r in answers)
    spread = float(np.median(apart)) if len(answers) > 2 else 0.0
    return Shift(
        float(middle[0]), float(middle[1]), max(r.reliability for r in answers),
        max(own, spread), sum(r.n_windows for r in answers),
    )  # fmt: skip


def _weighted_median(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, 0.5 * total[-1])])


def check_shifts(
    scenes: Sequence[Scene],
    views: Sequence[View],
    places: Sequence[GeoBox],
    *,
    aligned: bool,
    suspect: Collection[str] = (),
) -> tuple[list[Record], dict[str, float]]:
    """Hold the position of every scene of one source against the others.

    The worst scene is set aside and the rest measured again, so that it does not pull the
    reference of the others. Of two scenes that disagree neither can be told to be the right one.

    Args:
        scenes: Scenes of one optical source, with the shifts the cube will use.
        views: Their coarse views.
        places: Windows to look at.
        aligned: Whether the campaign aligns scenes.
        suspect: Ids of scenes that other checks found wrong; nothing is held against them.

    Returns:
        Records, and the rest that each scene lies off, campaign pixels (10 m), where it could be
        told.
    """
    source = _Source(scenes, views, places)
    rests: dict[str, Shift] = {}
    bad: set[str] = set()
    if source.bands and len(source.looks) > 1:
        while True:
            rests |= {i: source.rest(i, bad | set(suspect)) for i in source.scenes if i not in bad}
            allowed = _allowed(source, rests, aligned)
            off = {i: _size(r) for i, r in rests.items() if i not in bad}
            wrong = [i for i, size in off.items() if size > allowed]
            if not wrong:
                break
            bad.add(max(wrong, key=lambda i: (source.disagrees(i, allowed), off[i])))
            if len(source.looks.keys() - bad) < 2:
                bad |= set(wrong)
                break
    else:
        allowed = ALIGNED_PX
    records = [_record(i, rests.get(i), i not in bad, allowed, aligned) for i in source.scenes]
    records += _check_content(source, {i for i, r in rests.items() if not r.known})
    return records, {i: math.hypot(r.dy_px, r.dx_px) for i, r in rests.items() if r.known}


def _allowed(source: _Source, rests: Mapping[str, Shift], aligned: bool) -> float:
    if aligned:
        return ALIGNED_PX * source.pixel
    sizes = np.array([math.hypot(r.dy_px, r.dx_px) for r in rests.values() if r.known])
    spread = 1.4826 * float(np.median(sizes)) if sizes.size else 0.0
    return max(UNALIGNED_PX * source.pixel, UNALIGNED_SPREADS * spread)


def _size(rest: Shift) -> float:
    """Rest that is beyond doubt: less its standard error; 0 when too little tells it."""
    if not rest.known or rest.n_windows < LEAST_WINDOWS:
        return 0.0
    error = rest.residual_px if math.isfinite(rest.residual_px) else 0.0
    return max(math.hypot(rest.dy_px, rest.dx_px) - error, 0.0)


def _record(item: str, rest: Shift | None, ok: bool, allowed: float, aligned: bool) -> Record:
    if rest is None:
        found = "not measured: no other scene, or none of the bands that are compared"
    elif not rest.known:
        found = "not measured: too few clear windows agree"
    else:
        found = f"{math.hypot(rest.dy_px, rest.dx_px):.2f} px ({10 * rest.dy_px:+.1f} m down, "
        found += f"{10 * rest.dx_px:+.1f} m right) off the other scenes"
    fix = "delete results/scenes/shifts.json and measure again, or leave the scene out"
    if not aligned:
        fix = "set coregister.enabled to true, or leave the scene out"
    return record(
        "shift", item, ok=ok, found=found, allowed=f"at most {allowed:.2f} px of 10 m", fix=fix
    )


# --- content that is found nowhere near ------------------------------------------------------


def _check_content(source: _Source, lost: set[str]) -> list[Record]:
    """Scenes without a measured rest: do they show this place, or another one?"""
    records = []
    likeness = {i: _likeness(source, i, lost) for i in source.scenes}
    known = [v for i, v in likeness.items() if i not in lost and v is not None]
    familiar = len(known) > 1 and float(np.median(known)) >= FAMILIAR
    for item in sorted(lost):
        view, found = source.views[item], likeness[item]
        if found is None or float(view.clear.mean()) < LEAST_CLEAR or not familiar:
            continue
        where = _far_shift(source, item, lost)
        metres = 10.0 * COARSE
        text = f"correlation {found:.2f} with the other scenes"
        if where.known:
            text = f"content lies {metres * where.dy_px:+.0f} m down and "
            text += f"{metres * where.dx_px:+.0f} m right of the other scenes'"
        ok = not where.known and found > STRANGE
        records.append(
            record(
                "content", item, ok=ok, found=text, allowed="the place its record names",
                fix=f"the CRS tag, datum or transform of {item} is wrong: correct it, fetch the "
                "item again, or leave it out",
            )
        )  # fmt: skip
    return records


def _coarse(source: _Source, item: str, lost: set[str]) -> tuple[Float32, Float32, Bool] | None:
    """Reference and scene on coarse pixels, (B, N, H, W), and where both are clear."""
    others = [v for i, v in source.views.items() if i != item and i not in lost]
    others = sorted(others, key=lambda v: -float(v.clear.mean()))[:REFERENCE_SCENES]
    if not others:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        middle = np.stack(
            [
                np.nanmedian([np.where(v.clear, v.bands[b], np.nan) for v in others], axis=0)
                for b in source.bands
            ]
        ).astype(np.float32)
    view = source.views[item]
    own = np.stack([view.bands[b] for b in source.bands])
    both = view.clear & np.isfinite(own).all(axis=0) & np.isfinite(middle).all(axis=0)
    return middle, own, both


def _likeness(source: _Source, item: str, lost: set[str]) -> float | None:
    """Largest absolute correlation of any band with the reference; None: too few pixels."""
    found = _coarse(source, item, lost) if source.bands else None
    if found is None or int(found[2].sum()) < LEAST_PIXELS:
        return None
    middle, own, both = found
    pairs = [np.corrcoef(a[both], b[both])[0, 1] for a, b in zip(middle, own, strict=True)]
    return float(np.nanmax(np.abs([*pairs, 0.0])))


def _far_shift(source: _Source, item: str, lost: set[str]) -> Shift:
    """Shift of the content on coarse pixels, up to a quarter of a window."""
    found = _coarse(source, item, lost)
    if found is None:
        return _UNKNOWN
    middle, own, both = found
    n, h, w = both.shape

    def laid(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return a.reshape(*a.shape[:-3], n * h, w)

    return estimate_shift(
        laid(middle), laid(own), laid(both), max_shift_px=h / 4, window_px=min(h, w),
        max_windows=n,
    )  # fmt: skip
