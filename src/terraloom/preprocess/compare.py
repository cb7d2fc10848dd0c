"""How far mask methods agree, scene by scene, and how several become one.

Counts add up over blocks and strips, so that shares and scores are those of the whole scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import SceneError
from terraloom.preprocess.reasons import INVALID, Reason

__all__ = ["USED", "combine", "compare_rows", "count_agreement", "merge_counts"]

Reasons = npt.NDArray[np.uint8]

#: Name of the mask that the campaign uses: of all methods together, with its dilated edge.
USED = "used"
_SINGLE = {
    "clear": None, "cloud": Reason.CLOUD, "shadow": Reason.SHADOW, "snow": Reason.SNOW,
}  # fmt: skip
#: What pairs are compared in; ``invalid`` is everything that takes a pixel out.
_PAIRED = {"cloud": Reason.CLOUD, "shadow": Reason.SHADOW, "invalid": INVALID}


def combine(masks: Sequence[Reasons], how: str) -> Reasons:
    """One mask from those of several methods.

    Args:
        masks: M arrays (H, W) of reasons, without the dilated edge that is added afterwards.
        how: ``union``: a pixel has every reason that any method gives. ``vote``: a pixel is bad
            where more than half of the methods say so; it has the reasons that more than half
            agree on, or all that were given where the methods agree that it is bad but not why.
            Missing data are no matter of opinion: one method is enough.

    Raises:
        SceneError: No mask, masks of different shapes, or another word.
    """
    if not masks or len({m.shape for m in masks}) > 1:
        raise SceneError(f"masks of shapes {[m.shape for m in masks]}", allowed="one shape")
    if how not in ("union", "vote"):
        raise SceneError(f"{how!r}", where="masks.combine", allowed="union, vote")
    union: Reasons = np.bitwise_or.reduce(list(masks))
    if how == "union" or len(masks) == 1:
        return union
    half = len(masks) / 2
    out: Reasons = union & np.uint8(int(Reason.NODATA))
    for bit in Reason:
        if bit is not Reason.NODATA:
            agreed = sum((m & np.uint8(int(bit)) != 0).astype(np.uint8) for m in masks) > half
            out[agreed] |= int(bit)
    invalid = np.uint8(int(INVALID))
    bad = sum((m & invalid != 0).astype(np.uint8) for m in masks) > half
    unclear = bad & (out & invalid == 0)
    out[unclear] |= union[unclear] & invalid
    return out


def count_agreement(masks: Mapping[str, Reasons], inside: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Counts of one block of one scene.

    Args:
        masks: (H, W) reasons by method.
        inside: (H, W) bool, pixels that count, e.g. those of the AOI.

    Returns:
        ``methods``: method to counts of ``n`` and of clear, cloud, shadow, snow; ``pairs``:
        ``"a|b"`` to ``n`` and, for cloud, shadow and invalid, the counts [both, only a, only b].
        Pixels without data for one of the methods are left out.
    """
    seen = inside.copy()
    for mask in masks.values():
        seen &= (mask & np.uint8(int(Reason.NODATA))) == 0
    n = int(seen.sum())
    values = {name: mask[seen] for name, mask in masks.items()}
    methods = {
        name: {
            "n": n,
            **{k: int(_has(v, bit).sum()) for k, bit in _SINGLE.items()},
        }
        for name, v in values.items()
    }
    own = [name for name in values if name != USED]
    pairs = {}
    for a, b in combinations(own, 2):
        counts: dict[str, Any] = {"n": n}
        for key, bit in _PAIRED.items():
            x, y = _has(values[a], bit), _has(values[b], bit)
            counts[key] = [int((x & y).sum()), int((x & ~y).sum()), int((~x & y).sum())]
        pairs[f"{a}|{b}"] = counts
    return {"methods": methods, "pairs": pairs}


def _has(values: Reasons, bit: Reason | None) -> npt.NDArray[np.bool_]:
    """Pixels that have a reason, or that are clear where none is asked for."""
    found: npt.NDArray[np.bool_] = values & np.uint8(int(INVALID if bit is None else bit)) != 0
    return ~found if bit is None else found


def merge_counts(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum of nested counts, as of :func:`count_agreement`."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                total[key] = merge_counts([total.get(key, {}), value])
            elif isinstance(value, list):
                old = total.get(key, [0] * len(value))
                total[key] = [a + b for a, b in zip(old, value, strict=True)]
            else:
                total[key] = total.get(key, 0) + value
    return total


def compare_rows(manifests: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``masks.csv`` from the manifests of all mask jobs.

    Returns:
        Per scene and method a row with ``clear_pct``, ``cloud_pct``, ``shadow_pct`` and
        ``snow_pct`` of the AOI with data (``other`` is empty), and per scene and pair of methods a
        row with ``agreement_pct`` on which pixels are usable, and ``cloud_f1`` and ``shadow_f1`` of
        ``other`` against ``method``; None where neither has any. Sorted by scene.
    """
    scenes: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        for item_id, counts in manifest.get("compare", {}).items():
            scenes[item_id] = merge_counts([scenes.get(item_id, {}), counts])
    rows = []
    for item_id in sorted(scenes):
        for method, counts in scenes[item_id]["methods"].items():
            shares = {f"{k}_pct": _pct(counts[k], counts["n"]) for k in _SINGLE}
            rows.append(_row(item_id, method, "", counts["n"], **shares))
        for pair, counts in scenes[item_id]["pairs"].items():
            method, other = pair.split("|")
            differ = counts["invalid"][1] + counts["invalid"][2]
            rows.append(
                _row(
                    item_id, method, other, counts["n"],
                    agreement_pct=_pct(counts["n"] - differ, counts["n"]),
                    cloud_f1=_f1(*counts["cloud"]), shadow_f1=_f1(*counts["shadow"]),
                )
            )  # fmt: skip
    return rows


def _row(item_id: str, method: str, other: str, n: int, **found: float | None) -> dict[str, Any]:
    empty = dict.fromkeys(
        [*(f"{k}_pct" for k in _SINGLE), "agreement_pct", "cloud_f1", "shadow_f1"]
    )
    return {"id": item_id, "method": method, "other": other, "n_px": n, **empty, **found}


def _pct(part: int, n: int) -> float | None:
    return round(100 * part / n, 3) if n else None


def _f1(both: int, only_a: int, only_b: int) -> float | None:
    total = 2 * both + only_a + only_b
    return round(2 * both / total, 4) if total else None
