"""Checks of scenes against themselves, against their records and against each other.

Every check is a pure function of what was read (:mod:`terraloom.preprocess.views`) and gives
records ``{"check", "item", "ok", "found", "allowed", "fix"}``. Limits were set on 62 clear dates of
a Sentinel-2 series over Flanders, 105 Landsat dates with SLC gaps, and simulated regions: no
clean scene comes near them.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from shapely import from_wkt

from terraloom.acquire.sources import load_source
from terraloom.preprocess.views import Header, View

__all__ = [
    "Record", "check_bands", "check_constant", "check_duplicates", "check_empty",
    "check_footprint", "check_lattice", "check_levels", "check_ranges", "record",
]  # fmt: skip

Record = dict[str, Any]
Array = npt.NDArray[np.floating]
Float32 = npt.NDArray[np.float32]

#: Fewer common clear pixels than this say nothing of a pair of scenes.
LEAST_PIXELS = 200
#: Scenes of one source a scene is compared with: the nearest in time.
NEIGHBOURS = 5
#: Pixel lattices agree within this share of a pixel (millimetres of a Sentinel-2 pixel).
LATTICE_TOL_PX = 0.01
#: Sizes of pixels agree within this share.
SIZE_TOL = 0.01
#: Share of an item's footprint that must lie inside its raster.
LEAST_FOOTPRINT = 0.5
#: Share of what the footprint promises of the windows that must hold pixels.
LEAST_PROMISED = 0.02
#: Twins differ by less than this share of the spread of their values (median pixel) ...
SAME_SHARE = 2e-3
#: ... and share this much of their footprints (intersection over union).
SAME_OUTLINE = 0.9
#: How a scene is left out.
DROP = "leave it out through sources[].filter, or take it from the catalogue"
#: Allowed values per unit: 1 and 99 per cent of the clear pixels.
RANGES = {
    "reflectance": (-0.25, 1.6), "dB": (-60.0, 30.0), "m": (-500.0, 9000.0), "index": (-1.1, 1.1),
}  # fmt: skip
#: Dark ends of all bands off by more than this share of the known offset: an offset too many.
OFFSET_SHARE = 0.7
#: Clouds may be brighter than the sensor can tell, reflectance.
SATURATED_FROM = 0.9
#: Snow is brighter than this in the visible, reflectance.
SNOW_FROM = 0.12
#: So many scenes are tried as the one that makes others look wrong.
SUSPECTS = 4
#: Dark ends of a band, per cent of its pixels: water or shade, and the darkest of the ground.
DARK_ENDS = (2, 5, 25)
#: Offset that is looked for where the source table has none, reflectance (Sentinel-2's).
USUAL_OFFSET = 0.1
#: Median backscatter off the other scenes of the source by more than this, decibels.
LEVEL_DB = 8.0
#: Two bands are swapped when exchanging them brings the scene so much nearer to the others, and
#: their difference runs against that of the others.
SWAP_GAIN, SWAP_CORRELATION = 0.8, -0.2


def record(
    check: str, item: str, *, ok: bool, found: str, allowed: str = "", fix: str = ""
) -> Record:
    """One line of the audit; what is fine needs no remedy."""
    return {
        "check": check, "item": item, "ok": bool(ok), "found": found, "allowed": allowed,
        "fix": "" if ok else fix,
    }  # fmt: skip


# --- one scene -------------------------------------------------------------------------------


def check_constant(view: View) -> Record:
    """A band of one value everywhere was never written, or written from a constant.

    Clouds may saturate a band, so bright values count only where the scene is clear.
    """
    flat = []
    for band, values in view.bands.items():
        fine = np.isfinite(values)
        seen = values[fine]
        if seen.size < LEAST_PIXELS or float(np.ptp(seen)) > 1e-6 * max(1.0, abs(float(seen[0]))):
            continue
        bright = _unit(view) == "reflectance" and float(seen[0]) > SATURATED_FROM
        if not bright or int((fine & view.clear).sum()) >= LEAST_PIXELS:
            flat.append(f"{band} is {float(seen[0]):.4g} everywhere")
    return record(
        "constant band", view.id, ok=not flat, found="; ".join(flat) or "bands vary",
        allowed="bands that vary",
        fix=f"fetch the item {view.id} again, leave the band out of sources[].bands, or drop it",
    )  # fmt: skip


def check_ranges(view: View) -> Record:
    """Clear values lie within what their unit can be."""
    unit = _unit(view)
    low, high = RANGES.get(unit, (-np.inf, np.inf))
    wrong, all_low, all_high = [], np.inf, -np.inf
    for band, values in view.bands.items():
        seen = values[view.clear & np.isfinite(values)]
        if seen.size < LEAST_PIXELS:
            continue
        p1, p99 = (float(v) for v in np.percentile(seen, [1, 99]))
        all_low, all_high = min(all_low, p1), max(all_high, p99)
        if p1 < low or p99 > high:
            wrong.append(f"{band} {p1:.4g} to {p99:.4g}")
    fine = "too few clear pixels" if all_high < all_low else f"{all_low:.3g} to {all_high:.3g}"
    return record(
        "value range", view.id, ok=not wrong, found=("; ".join(wrong) or fine) + f" ({unit})",
        allowed=f"{low:g} to {high:g} (1 to 99 per cent of the clear pixels)",
        fix="correct scale, offset, unit or nodata of the item's raster:bands or of the source "
        "table, and make a new item lock",
    )  # fmt: skip


def check_empty(view: View) -> Record:
    """Where the footprint promises pixels there are some."""
    share = float(np.mean([np.isfinite(v).mean() for v in view.bands.values()]))
    ok = share >= LEAST_PROMISED * view.expected or view.expected < LEAST_PROMISED
    return record(
        "pixels", view.id, ok=ok,
        found=f"{100 * share:.0f} % of the windows looked at have values; the footprint covers "
        f"{100 * view.expected:.0f} %",
        allowed="values where the footprint is",
        fix="the files lie elsewhere than their record says (a wrong CRS tag or transform?) or "
        f"are empty: correct them, or drop {view.id}",
    )  # fmt: skip


def check_footprint(item: Mapping[str, Any], heads: Sequence[Header]) -> Record:
    """The rasters lie where the footprint of the item says."""
    name = str(item["id"])
    found, ok = "the lock has no footprint", True
    if item.get("footprint"):
        outline = from_wkt(str(item["footprint"]))
        shares = {h.band: _inside(outline, h.outline) for h in heads}
        band, least = min(shares.items(), key=lambda kv: kv[1], default=("", 1.0))
        ok = least >= LEAST_FOOTPRINT
        found = f"{100 * least:.0f} % of the footprint lie inside band {band} (tagged "
        found += next((h.crs for h in heads if h.band == band), "nothing") + ")"
    return record(
        "place", name, ok=ok, found=found,
        allowed=f"at least {100 * LEAST_FOOTPRINT:.0f} %",
        fix=f"the CRS tag or transform of {name} is wrong: correct it (gdal_edit.py -a_srs), "
        "fetch the item again, or drop it",
    )  # fmt: skip


def _inside(outline: Any, raster: Any) -> float:
    if raster is None:
        return 0.0
    return float(outline.intersection(raster).area / outline.area) if outline.area else 1.0


# --- scenes of one source against each other ---------------------------------------------------


def check_lattice(heads: Mapping[str, Sequence[Header]], source: str) -> list[Record]:
    """Pixels of all scenes of a source lie on one lattice, of the size the source table says.

    A grid that lies half a pixel off (cell centres taken for corners) moves every label by half a
    pixel, and no eye sees it. Sentinel-2 grids start at multiples of their pixel size; for other
    sources (Landsat's start at half pixels) the lattice is that of most scenes.
    """
    table = load_source(source)
    sizes: dict[str, Counter[float]] = defaultdict(Counter)
    votes: dict[tuple[str, str, float], Counter[tuple[float, float]]] = defaultdict(Counter)
    for own in heads.values():
        for h in own:
            sizes[h.band][_size(h)] += 1
            votes[h.band, h.crs, _size(h)][_rounded(h.phase)] += 1
    records = []
    for item, own in heads.items():
        wrong = []
        for h in own:
            known = table.bands[h.band].group.startswith("s2_") and h.metres > 0
            native = table.bands[h.band].resolution_m
            if not known:
                native = max(sizes[h.band], key=lambda s: sizes[h.band][s])
            # Pixels in degrees get wider towards the poles (Copernicus DEM).
            if h.metres and abs(_size(h) / native - 1) > SIZE_TOL:
                wrong.append(f"{h.band}: pixels of {_size(h):g}, of the source {native:g}")
                continue
            home = (0.0, 0.0) if known else _home(votes[h.band, h.crs, _size(h)])
            off = [_apart(a, b) for a, b in zip(h.phase, home, strict=True)]
            if max(off) > LATTICE_TOL_PX:
                wrong.append(f"{h.band}: {off[0]:.2f} px across, {off[1]:.2f} px along the lattice")
        records.append(
            record(
                "lattice", item, ok=not wrong, found="; ".join(wrong) or "on the lattice",
                allowed="the native pixels of the source, on one lattice",
                fix=f"correct the transform of {item} (a corner given as a pixel centre?), fetch "
                "it again, or drop it",
            )
        )  # fmt: skip
    return records


def _size(head: Header) -> float:
    """Width of a pixel: metres, or degrees where the CRS has these."""
    return round(head.pixel * (head.metres or 1.0), 9)


def _rounded(phase: tuple[float, float]) -> tuple[float, float]:
    x, y = (round(v, 2) % 1.0 for v in phase)
    return x, y


def _home(votes: Counter[tuple[float, float]]) -> tuple[float, float]:
    """Phase of most scenes; of two the one that starts at a multiple of the pixel."""
    return max(votes, key=lambda p: (votes[p], -sum(p)))


def _apart(a: float, b: float) -> float:
    d = abs(a - b) % 1.0
    return min(d, 1.0 - d)


def check_duplicates(views: Sequence[View], items: Sequence[Mapping[str, Any]]) -> list[Record]:
    """No id twice, and no pixels of one acquisition under two ids.

    Pixels are compared, not digests, since twins may have been given different shifts. Neighbouring
    tiles of one overpass share pixels too; their footprints tell them apart.
    """
    names = Counter((str(i["source"]), str(i["id"])) for i in items)
    records = []
    for k, view in enumerate(views):
        count = names[str(view.item["source"]), view.id]
        twin = next((o.id for o in views[:k] if o.id != view.id and _same(o, view)), None)
        found = f"the id stands {count} times in the lock" if count > 1 else ""
        found = f"its pixels are those of {twin}" if twin else found
        records.append(
            record(
                "duplicate", view.id, ok=not found, found=found or "its pixels are its own",
                allowed="every acquisition once", fix=f"keep one of them: {DROP}",
            )
        )  # fmt: skip
    return records


def _same(a: View, b: View) -> bool:
    """Whether two views show the same pixels, up to a hundredth of a pixel of shift."""
    bands = [k for k in a.bands if k in b.bands]
    if not bands or a.item["source"] != b.item["source"]:
        return False
    for band in bands:
        x, y = a.bands[band].ravel(), b.bands[band].ravel()
        both = np.isfinite(x) & np.isfinite(y)
        if both.sum() < LEAST_PIXELS or both.sum() < 0.99 * np.isfinite(x).sum():
            return False
        x, y = x[both], y[both]
        spread = float(np.subtract(*np.percentile(x, [90, 10])))
        if not spread > 0 or float(np.median(np.abs(x - y))) > SAME_SHARE * spread:
            return False
    outlines = [from_wkt(str(v.item["footprint"])) for v in (a, b) if v.item.get("footprint")]
    if len(outlines) < 2:
        return True
    union = float(outlines[0].union(outlines[1]).area)
    return union == 0 or float(outlines[0].intersection(outlines[1]).area) / union > SAME_OUTLINE


def _others(k: int, views: Sequence[View], left_out: set[str]) -> list[View]:
    """Nearest scenes in time that have something to say."""
    when = [datetime.fromisoformat(str(v.item["datetime"])) for v in views]
    order = sorted(
        (i for i, v in enumerate(views) if i != k and v.id not in left_out and v.clear.any()),
        key=lambda i: abs((when[i] - when[k]).total_seconds()),
    )
    return [views[i] for i in order[:NEIGHBOURS]]


def _pairs(
    views: Sequence[View], left_out: set[str], *, snow: bool = True
) -> Iterator[tuple[View, list[str], Float32, Float32]]:
    """Each scene and the median of the others: (B, N) values of common clear pixels.

    Without ``snow`` pixels that look like snow are left out, too.
    """
    for k, view in enumerate(views):
        others = _others(k, views, left_out)
        bands = [b for b in view.bands if all(b in o.bands for o in others)]
        if not others or not bands:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no clear look: NaN, wanted
            reference = np.stack(
                [
                    np.nanmedian([np.where(o.clear, o.bands[b], np.nan) for o in others], axis=0)
                    for b in bands
                ]
            )
        own = np.stack([view.bands[b] for b in bands])
        both = view.clear & np.isfinite(reference).all(axis=0) & np.isfinite(own).all(axis=0)
        if not snow:
            both &= ~_snow(view)
        if int(both.sum()) >= LEAST_PIXELS:
            yield view, bands, own[:, both], reference[:, both].astype(np.float32)


def _snow(view: View) -> npt.NDArray[np.bool_]:
    """Pixels brighter in the visible bands there are than in the short-wave infrared, and not dark.

    Thin snow that no mask takes looks like no other date. One exchanged pair of bands does not
    make ground look like it as long as another visible band stays.
    """
    roles = load_source(view.item["source"]).roles()
    seen = [view.bands[roles[r]] for r in ("B02", "B03", "B04") if roles.get(r) in view.bands]
    infrared = [view.bands[roles[r]] for r in ("B11", "B12") if roles.get(r) in view.bands]
    if not seen or not infrared:
        return np.zeros(view.clear.shape, bool)
    visible = np.min(seen, axis=0)
    return np.asarray((visible > SNOW_FROM) & (visible > np.max(infrared, axis=0)))


def check_levels(views: Sequence[View]) -> list[Record]:
    """Dark ends of reflectance, and medians of backscatter, against the other scenes' of a source.

    An offset left in, or taken off twice, moves all bands alike; seasons, haze and snow do not.
    The worst scene is set aside and the rest are judged again, so that it does not make the
    others look wrong.
    """
    unit = _unit(views[0]) if views else ""
    if unit not in ("reflectance", "dB"):
        return []

    def judged(left_out: set[str]) -> dict[str, tuple[float, str]]:
        return {v.id: _level(unit, v, own, ref) for v, _, own, ref in _pairs(views, left_out)}

    bad: dict[str, str] = {}
    seen = judged(set())
    while wrong := [i for i in seen if i not in bad and seen[i][1]]:
        wrong = sorted(wrong, key=lambda i: -abs(seen[i][0]))[:SUSPECTS]
        trials = {i: judged({*bad, i}) for i in wrong}
        # The scene to set aside is the one without which fewest others look wrong.
        worst = min(wrong, key=lambda i: sum(bool(t[1]) for k, t in trials[i].items() if k != i))
        bad[worst] = seen[worst][1]
        seen = trials[worst]
    return [
        record(
            "offset", v.id, ok=v.id not in bad,
            found=bad.get(v.id) or _level_text(unit, seen.get(v.id)),
            allowed=f"dark ends within {OFFSET_SHARE * USUAL_OFFSET:.3f} of the other scenes'"
            if unit == "reflectance" else f"medians within {LEVEL_DB:g} dB of the other scenes'",
            fix=f"set scale, offset and unit of {v.id} in its raster:bands to what its pixels are "
            "(an offset is taken off once), make a new item lock, or drop it",
        )
        for v in views
    ]  # fmt: skip


def _level(unit: str, view: View, own: Float32, reference: Float32) -> tuple[float, str]:
    """Difference to the others, and what is wrong with it; empty: nothing."""
    if unit == "dB":
        far = np.median(own, axis=1) - np.median(reference, axis=1)
        worst = float(far[np.argmax(np.abs(far))])
        return worst, f"{worst:+.1f} dB off the other scenes" if abs(worst) > LEVEL_DB else ""
    ends = np.percentile(own, DARK_ENDS, axis=1)
    far = ends - np.percentile(reference, DARK_ENDS, axis=1)
    # Of each band the end that changed least says most: seasons darken or brighten some of them.
    least, most = float(far.max(axis=0).min()), float(far.min(axis=0).max())
    low = ends[1]
    known = abs(load_source(view.item["source"]).offset) or USUAL_OFFSET
    text = ""
    if least > OFFSET_SHARE * known:
        text = f"the dark ends of all bands lie {least:.3f} or more above the other scenes': "
        text += "an offset was not taken off"
    elif most < -0.5 * known and float(low.min()) < 0.05 * known:
        text = f"the dark ends of all bands lie {-most:.3f} or more below the other scenes' and "
        text += f"reach {float(low.min()):.3f}: an offset was taken off twice"
    return (least if least > 0 else min(most, 0.0)), text


def _level_text(unit: str, seen: tuple[float, str] | None) -> str:
    if seen is None:
        return "not compared: no other scene with common clear pixels"
    return f"{seen[0]:+.3f} off the other scenes" + (" dB" if unit == "dB" else "")


def check_bands(views: Sequence[View], suspect: Collection[str] = ()) -> list[Record]:
    """No band passes for another: two bands whose exchange makes the scene fit the others.

    Args:
        views: Scenes of one source.
        suspect: Ids of scenes that other checks found wrong; nothing is held against them.
    """
    if len(views) < 2:
        return []
    bad: dict[str, str] = {}
    seen: set[str] = set()
    while True:
        worst, gain, text = None, 1.0, ""
        for view, bands, own, reference in _pairs(views, {*bad, *suspect}, snow=False):
            seen.add(view.id)
            pair, found = _swapped(own, reference)
            if view.id not in bad and pair is not None and found < gain:
                worst, gain = view.id, found
                text = f"bands {bands[pair[0]]} and {bands[pair[1]]} fit the other scenes "
                text += f"{1 / max(found, 1e-6):.1f} times better when exchanged"
        if worst is None:
            break
        bad[worst] = text
    return [
        record(
            "band order", v.id, ok=v.id not in bad,
            found=bad.get(v.id)
            or ("as the other scenes'" if v.id in seen else "not compared: no other scene"),
            allowed="bands that look like the same band of the other scenes",
            fix=f"correct the assets of {v.id} (or the source table's `assets`), or drop it",
        )
        for v in views
    ]  # fmt: skip


def _swapped(own: Float32, reference: Float32) -> tuple[tuple[int, int] | None, float]:
    """Pair of bands (B, N) that is exchanged, and how much nearer exchanging brings the scene.

    Three tests that fail for different reasons must agree: the distance, and the sign of the
    bands' difference against the reference's, with and without its mean.
    """
    n = len(own)
    far = np.array([[float(np.abs(y - r).mean()) for r in reference] for y in own])
    best, gain = None, 1.0
    for i in range(n):
        for j in range(i + 1, n):
            found = (far[i, j] + far[j, i]) / max(far[i, i] + far[j, j], 1e-9)
            if found >= min(SWAP_GAIN, gain):
                continue
            a, b = own[i] - own[j], reference[i] - reference[j]
            level = float((a * b).sum())
            if level < 0 and _correlation(a, b) < SWAP_CORRELATION:
                best, gain = (i, j), found
    return best, gain


def _correlation(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size > 0 else 0.0


def _unit(view: View) -> str:
    """Unit of the values as read: power comes as decibels."""
    asset = next(iter(view.item["assets"].values()))
    unit = str(asset.get("unit") or load_source(view.item["source"]).unit)
    return {"power": "dB"}.get(unit, unit)
