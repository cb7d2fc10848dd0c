"""Labels in time: how far a label lies from the images, and what that leaves of its weight.

A label counts with ``w = exp(-|gap| / tau) * (1 - p_change)``; the change test is
:func:`terraloom.labels.change.change_test`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from terraloom.config.base import TaskKind
from terraloom.errors import LabelError
from terraloom.labels.change import PeriodLike, change_test, days_since_1970, period_bounds
from terraloom.labels.rasterise import NO_LABEL, burn
from terraloom.legend import IGNORE_INDEX
from terraloom.preprocess.groups import group_factor, group_order

__all__ = ["gap_days", "label_series", "time_weights", "weigh_chips"]

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: Pixels looked at per label and chip.
_MOST_PX = 256


def gap_days(dates: Sequence[Any], periods: Sequence[PeriodLike]) -> Float:
    """Days between each label and the nearest image period, (N,) float64.

    Args:
        dates: (N,) ``YYYY-MM-DD`` (text or date) or None.
        periods: Periods of the images.

    Returns:
        0 inside a period, negative before the nearest one, positive after it, NaN without a date.

    Raises:
        LabelError: A date cannot be read, or there is no period.
    """
    start, end = period_bounds(periods)
    day = days_since_1970(dates)[:, None]
    gap = np.where(day < start, day - start, np.where(day > end, day - end, 0.0))
    gap = np.where(np.isnan(day), np.nan, gap)
    nearest: Float = gap[np.arange(len(gap)), np.abs(gap).argmin(axis=1)]
    return nearest


def time_weights(
    gap: npt.ArrayLike, p_change: npt.ArrayLike, *, tau_days: float | None = None
) -> Float:
    """Weights ``exp(-|gap| / tau) * (1 - p_change)``, 0-1, same shape as ``gap``.

    Args:
        gap: Days between label and images; NaN (no date) counts as 0.
        p_change: Probability of a change, 0-1; NaN (not tested) counts as 0.
        tau_days: A gap of this many days leaves 37 %; None or infinite: gaps do not count; 0:
            only labels without a gap count.

    Raises:
        LabelError: ``tau_days`` is negative or no number, or a probability is out of range.
    """
    g = np.abs(np.nan_to_num(np.asarray(gap, dtype=np.float64)))
    p = np.nan_to_num(np.asarray(p_change, dtype=np.float64))
    tau = np.inf if tau_days is None else float(tau_days)
    if not tau >= 0:
        raise LabelError(f"tau of {tau_days} days", where="labels.tau_days", allowed="0 or more")
    if ((p < 0) | (p > 1)).any():
        raise LabelError(f"probabilities {p.min():g} to {p.max():g}", where="change test",
                         allowed="0 to 1")  # fmt: skip
    decay = np.where(g == 0, 1.0, 0.0) if tau == 0 else np.exp(-g / tau)
    return np.asarray(decay * (1 - p), dtype=np.float64)


# --- chips ---------------------------------------------------------------------------------------


def label_series(
    chips: xr.Dataset,
    label: npt.NDArray[np.int32],
    count: int,
    periods: Sequence[PeriodLike],
) -> Float:
    """Median of each label's pixels per period and feature, (N, T, F) float64, NaN = none.

    Args:
        chips: Chips with ``x_<group>``; channels ``period/band`` or ``date/band``. Dates are
            averaged within their period; channels without a time (elevation) are left out.
        label: (n, H, W) row of the label of each pixel, -1 = none.
        count: Number of labels N.
        periods: T periods.

    Raises:
        LabelError: No channel belongs to any of the periods.
    """
    columns = _columns(chips, periods)
    at, of = _pixels(label)
    features = sorted({key for *_, key, _ in columns})
    out = np.full((count, len(periods), len(features)), np.nan)
    for f, key in enumerate(features):
        for t in range(len(periods)):
            mine = [(g, c) for g, c, k, p in columns if k == key and p == t]
            if not mine:
                continue
            n, r, c = at
            total, seen = np.zeros(len(of)), np.zeros(len(of))
            for group, channel in mine:
                step = group_factor(group)
                x = chips[f"x_{group}"].values[n, channel, r // step, c // step]
                total += np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
                seen += np.isfinite(x)
            value = np.where(seen > 0, total / np.maximum(seen, 1), np.nan)
            out[:, t, f] = _medians(value, of, count)
    return out


def _columns(chips: xr.Dataset, periods: Sequence[PeriodLike]) -> list[tuple[str, int, str, int]]:
    """Group, channel, feature (``group/band``) and period of each channel with a time."""
    names = {p.name: i for i, p in enumerate(periods)}
    groups = group_order(str(v)[2:] for v in chips.data_vars if str(v).startswith("x_"))
    found = []
    for g in groups:
        for c, name in enumerate(chips[f"channel_{g}"].values):
            step, _, band = str(name).rpartition("/")
            at = names.get(step)
            if at is None and step[:4].isdigit():
                hit = [i for i, p in enumerate(periods) if str(p.start) <= step <= str(p.end)]
                at = hit[0] if hit else None
            if at is not None:
                found.append((g, c, f"{g}/{band}", at))
    if not found:
        raise LabelError("no channel of the chips belongs to a period", where="chips",
                         allowed=", ".join(names), fix="cut the chips again")  # fmt: skip
    return found


def _pixels(label: npt.NDArray[np.int32]) -> tuple[tuple[npt.NDArray[np.intp], ...], Any]:
    """Positions of labelled pixels, evenly thinned to a bounded number per label and chip."""
    n, r, c = np.nonzero(label != NO_LABEL)
    of = label[n, r, c]
    key = n.astype(np.int64) * (int(label.max(initial=0)) + 1) + of
    order = np.argsort(key, kind="stable")
    _, first, inverse, size = np.unique(
        key[order], return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.arange(len(order)) - first[inverse]
    keep = np.sort(order[rank % np.maximum(-(-size // _MOST_PX), 1)[inverse] == 0])
    return (n[keep], r[keep], c[keep]), of[keep]


def _medians(value: Float, of: npt.NDArray[Any], count: int) -> Float:
    """Median of the finite values of each label, (N,)."""
    ok = np.isfinite(value)
    v, k = value[ok], of[ok]
    v = v[np.lexsort((v, k))]
    size = np.bincount(k, minlength=count)
    first = np.cumsum(size) - size
    out = np.full(count, np.nan)
    some = size > 0
    low, high = first + (size - 1) // 2, first + size // 2
    out[some] = (v[low[some]] + v[high[some]]) / 2
    return out


def weigh_chips(
    chips: xr.Dataset,
    labels: gpd.GeoDataFrame,
    task: str,
    *,
    periods: Sequence[PeriodLike],
    tau_days: float | None = None,
    drop_changed: float | None = None,
    erode_m: float = 0.0,
    held_out_fold: int | None = None,
    require: bool = True,
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Give chips a weight layer ``w_<task>`` from the time of its labels.

    The change test is made for segmentation; labels of other tasks get the weight of their gap.
    With ``held_out_fold``, classes are known by the labels of the other folds only.

    Args:
        chips: Chips as :func:`terraloom.labels.chips.cut_chips` writes them.
        labels: Aligned labels (columns ``task``, ``value``, ``date``, ``geometry``).
        task: Name of the task.
        periods: Periods of the cube.
        tau_days: See :func:`time_weights`.
        drop_changed: Labels with ``p_change`` of at least this have no label any more; None:
            none is taken away.
        erode_m: As the labels were burnt with.
        held_out_fold: Labels of this fold (column ``fold``) are tested, but have no part in what
            the classes look like.
        require: Refuse labels that all end up without weight.

    Returns:
        Chips with ``w_<task>`` (n, y_10, x_10) float32, 0-1, 0 where there is no label, and
        ``y_<task>`` without dropped labels; and a report: per label ``gap_days``, ``p_change``,
        ``weight``, and counts.

    Raises:
        LabelError: No such task, no labels of it, labels other than the chips were cut from, or
            all labels end up without weight.
    """
    facts = {str(t["name"]): t for t in chips.attrs["tasks"]}
    if task not in facts or f"y_{task}" not in chips:
        raise LabelError(f"no task {task!r} in the chips", where="chips",
                         allowed=", ".join(facts))  # fmt: skip
    kind = TaskKind(facts[task]["kind"])
    mine = labels[labels["task"] == task].reset_index(drop=True)
    if mine.empty:
        raise LabelError("no label of this task", where=f"task {task}",
                         allowed="at least one aligned label")  # fmt: skip
    y = chips[f"y_{task}"].values
    has = y != IGNORE_INDEX if kind is TaskKind.SEGMENTATION else np.isfinite(y)
    label = np.where(has, _label_rows(chips, mine, kind, erode_m), NO_LABEL)
    dates = mine["date"].tolist()
    gap = gap_days(dates, periods)
    p = np.zeros(len(mine))
    if kind is TaskKind.SEGMENTATION:
        series = label_series(chips, label, len(mine), periods)
        fit = None if held_out_fold is None else mine["fold"].to_numpy() != held_out_fold
        p = change_test(series, mine["value"].to_numpy(), dates, periods, fit=fit).p_change
    weight = time_weights(gap, p, tau_days=tau_days)
    drop = np.zeros(len(mine), dtype=bool) if drop_changed is None else p >= drop_changed
    weight[drop] = 0.0
    burnt = label != NO_LABEL
    _check(has, label, task)
    if require:
        _require_weight(label, weight, drop, task)
    w = np.where(burnt, weight[np.maximum(label, 0)], 0.0).astype(np.float32)
    gone = burnt & drop[np.maximum(label, 0)]
    y = np.where(gone, np.array(IGNORE_INDEX if y.dtype == np.uint8 else np.nan, y.dtype), y)
    old = chips[f"y_{task}"]
    stored = {k: v for k, v in old.encoding.items() if k == "chunks"}
    new = {
        f"w_{task}": xr.Variable(old.dims, w, encoding=stored),
        f"y_{task}": xr.Variable(old.dims, y, old.attrs, encoding=stored),
    }
    out = chips.assign(new)
    return out, _report(mine, gap, p, weight, drop, gone)


def _check(has: Bool, label: npt.NDArray[np.int32], task: str) -> None:
    lost = has & (label == NO_LABEL)
    if lost.any():
        raise LabelError(
            f"{int(lost.sum())} labelled pixels belong to no label", where=f"task {task}",
            allowed="the labels and the erosion that the chips were cut with",
            fix="cut the chips again",
        )  # fmt: skip


def _require_weight(label: npt.NDArray[np.int32], weight: Float, drop: Bool, task: str) -> None:
    there = np.unique(label[label != NO_LABEL])
    if len(there) and not (weight[there] > 0).any():
        raise LabelError(
            f"all {len(there)} labels are without weight: the ground of {int(drop[there].sum())} "
            "has changed, the others are too far in time", where=f"task {task}",
            allowed="at least one label near the images",
            fix="a larger labels.tau_days or labels.drop_changed, other cube.periods, or labels of "
            "another time",
        )  # fmt: skip


def _label_rows(
    chips: xr.Dataset, labels: gpd.GeoDataFrame, kind: TaskKind, erode_m: float
) -> npt.NDArray[np.int32]:
    """Row of ``labels`` of each chip pixel, (n, H, W); -1 = none."""
    named = chips.get(f"label_{labels['task'].iloc[0]}")
    if named is not None:
        ids = labels["label_id"].to_numpy()
        order = np.argsort(ids)
        at = np.minimum(np.searchsorted(ids[order], named.values), len(ids) - 1)
        found = order[at]
        return np.where(ids[found] == named.values, found, NO_LABEL).astype(np.int32)
    # Chips name the labels of segmentation tasks only; the others are burnt once more.
    size = int(chips.attrs["size_px"])
    base = Affine(*chips.attrs["transform"])
    boxes = [
        GeoBox((size, size), base @ Affine.translation(int(c), int(r)), chips.attrs["crs"])
        for r, c in zip(chips["row"].values, chips["col"].values, strict=True)
    ]
    return np.stack([burn(labels, b, kind=kind, erode_m=erode_m).label for b in boxes])


def _report(
    labels: Mapping[str, Any], gap: Float, p: Float, weight: Float, drop: Bool, gone: Bool
) -> dict[str, Any]:
    dated = np.isfinite(gap)
    return {
        "labels": len(gap),
        "without_date": int((~dated).sum()),
        "outside_periods": int((dated & (gap != 0)).sum()),
        "largest_gap_days": float(np.abs(gap[dated]).max()) if dated.any() else None,
        "changed": int((p >= 0.5).sum()),
        "dropped": int(drop.sum()),
        "dropped_px": int(gone.sum()),
        "mean_weight": round(float(weight.mean()), 4) if len(weight) else None,
        "per_label": {
            "label_id": [int(i) for i in labels["label_id"]],
            "gap_days": [None if not ok else float(g) for g, ok in zip(gap, dated, strict=True)],
            "p_change": [round(float(v), 4) for v in p],
            "weight": [round(float(v), 4) for v in weight],
        },
    }
