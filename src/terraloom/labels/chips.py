"""From aligned labels and cubes to training chips: the stage between ``cube`` and ``members``.

:func:`cut_chips` burns the labels of :func:`terraloom.labels.align.align_labels`, takes away what
no image shows, and cuts windows with their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.errors import CoverageError, StateError
from terraloom.grid import CampaignGrid, Tile, geobox_record, window_of
from terraloom.io import read_store, write_json, write_store, write_text
from terraloom.labels.align import burn_task, read_aligned
from terraloom.labels.folds import NO_FOLD, FoldMap
from terraloom.labels.rasterise import NO_LABEL
from terraloom.labels.spool import Spool
from terraloom.labels.time import weigh_chips
from terraloom.legend import IGNORE_INDEX
from terraloom.log import get_logger
from terraloom.preprocess.channels import channel_names, cube_inputs
from terraloom.preprocess.groups import group_factor
from terraloom.preprocess.reasons import INVALID, Reason

__all__ = ["chip_windows", "cut_chips"]

#: Chips in one piece of the store: a few megabytes, and few entries in the zip file.
_CHIPS_PER_CHUNK = 8

#: Attributes of a group's variable that chips keep.
_FACTS = ("kind", "unit", "roles")

log = get_logger(__name__)


@dataclass
class _Burnt:
    """Labels of one tile: values per task, fold and block of each pixel, all (H, W).

    Attributes:
        y: Value per task.
        label: Per segmentation task, ``label_id`` of the pixel's label; -1 for none.
        shares: Per task with soft labels (K, H, W) uint8, share of each class in 1/255.
        fold: Fold.
        block: Block.
    """

    y: dict[str, npt.NDArray[Any]]
    label: dict[str, npt.NDArray[np.int32]]
    shares: dict[str, npt.NDArray[np.uint8]]
    fold: npt.NDArray[np.uint8]
    block: npt.NDArray[np.int32]


@dataclass
class _Tally:
    """Pixels of one task: where its labels went."""

    overlap: int = 0
    between_folds: int = 0
    labelled: int = 0
    invalid: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Counts, and shares of the labelled pixels in percent."""
        n = max(self.labelled, 1)
        return {
            "labelled_px": self.labelled,
            "kept_px": self.labelled - self.invalid,
            "lost_overlap_px": self.overlap,
            "lost_between_folds_px": self.between_folds,
            "lost_invalid_pct": round(100 * self.invalid / n, 3),
            "lost_by_reason_pct": {k: round(100 * v / n, 3) for k, v in self.reasons.items()},
        }


def chip_windows(shape: tuple[int, int], size_px: int) -> Iterator[tuple[slice, slice]]:
    """Windows of ``size_px`` from the upper left; the last ones may reach beyond the shape."""
    for r in range(0, shape[0], size_px):
        for c in range(0, shape[1], size_px):
            yield slice(r, r + size_px), slice(c, c + size_px)


def cut_chips(
    campaign: Campaign, grid: CampaignGrid, cube_dir: Path | str, out_dir: Path | str
) -> dict[str, Any]:
    """Cut training chips with at least one labelled pixel.

    Chips tile each campaign tile from its upper left corner and never cross tiles; what reaches
    beyond a tile is NaN, without label and without fold. A pixel without a clear observation in
    any period has no label. Needs the files of ``align_labels`` in ``out_dir``; writes
    ``chips.zip`` and ``metrics.json``.

    Args:
        campaign: The campaign.
        grid: Its grid.
        cube_dir: Folder with one ``<tile>.zip`` per tile.
        out_dir: Folder to write to.

    Returns:
        The metrics: chips, labelled pixels per task, class and fold, and labels lost.

    Raises:
        StateError: Aligned labels or a tile's cube are missing, or cubes do not fit together.
        CoverageError: No label lies on a pixel with a clear observation.
    """
    out = Path(out_dir)
    labels, report = read_aligned(out, grid)
    folds = FoldMap.from_record(report["folds"], grid.geobox)
    by_task = {
        t.name: labels[labels["task"] == t.name].reset_index(drop=True) for t in campaign.tasks
    }
    tallies = {t.name: _Tally() for t in campaign.tasks}
    channels: dict[str, list[str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with Spool(out) as spool:
        for tile in grid.tiles():
            burnt = _burn_tile(campaign, by_task, report, folds, tile.geobox, tallies)
            if not any(_has_label(y).any() for y in burnt.y.values()):
                continue
            path = Path(cube_dir) / f"{tile.name}.zip"
            _chips_of_tile(campaign, grid, tile, path, burnt, tallies, channels, facts, spool)
        if not spool.count:
            raise CoverageError(
                f"none of the {len(labels)} labels lies where a period has a clear observation",
                where=f"campaign {campaign.name}", allowed="at least one labelled, clear pixel",
                fix="longer or other cube.periods, or labels elsewhere",
            )  # fmt: skip
        classes = list(report["classes"])
        dataset = _dataset(campaign, grid, spool.arrays(), channels, facts, classes)
        timing = _timing(campaign, dataset, labels, out)
        metrics = _metrics(campaign, dataset, tallies, report, classes) | {"time": timing}
        write_store(out / "chips.zip", dataset)
    write_json(out / "metrics.json", metrics)
    log.info("%d chips of %d px", metrics["chips"], campaign.chips.size_px)
    return metrics


def _timing(
    campaign: Campaign, chips: xr.Dataset, labels: gpd.GeoDataFrame, out: Path
) -> dict[str, Any]:
    """How labels would weigh by their time, for the tasks that ask for it; to a table.

    For people only: what is trained with is found anew for each held-out fold, without its labels.
    """
    timing: dict[str, Any] = {}
    for t in campaign.tasks:
        if t.labels.tau_days is None and t.labels.drop_changed is None:
            continue
        _, timing[t.name] = weigh_chips(
            chips, labels, t.name, periods=campaign.cube.periods, tau_days=t.labels.tau_days,
            drop_changed=t.labels.drop_changed, erode_m=t.labels.erode_m,
        )  # fmt: skip
        table = pd.DataFrame(timing[t.name].pop("per_label"))
        write_text(out / f"label_time-{t.name}.csv", table.to_csv(index=False, lineterminator="\n"))
        log.info("task %s: labels by their time: %s", t.name, timing[t.name])
    return timing


def _has_label(y: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(y != IGNORE_INDEX if y.dtype == np.uint8 else np.isfinite(y), dtype=bool)


def _burn_tile(
    campaign: Campaign,
    by_task: Mapping[str, gpd.GeoDataFrame],
    report: Mapping[str, Any],
    folds: FoldMap,
    geobox: GeoBox,
    tallies: Mapping[str, _Tally],
) -> _Burnt:
    """Values of all tasks, and the fold of each pixel: that of its label, else of its block.

    The class map's labels decide first. A label of another task that belongs to another fold than
    its pixel (the outer edge of a neighbour's parcel) is left out: no pixel is in two folds.
    """
    done = {}
    fold, block = folds.folds(geobox), folds.blocks(geobox)
    free = np.ones(geobox.shape, dtype=bool)
    tasks = sorted(campaign.tasks, key=lambda t: t.kind is not TaskKind.SEGMENTATION)
    for task in tasks:
        mine = by_task[task.name]
        read = report["tasks"][task.name]
        burned = burn_task(mine, geobox, task, read, len(report["classes"]))
        tallies[task.name].overlap += int(burned.conflict.sum())
        take = free & (burned.label != NO_LABEL)
        fold[take] = mine["fold"].to_numpy()[burned.label[take]]
        block[take] = mine["block"].to_numpy()[burned.label[take]]
        free &= ~take
        done[task.name] = burned, mine["fold"].to_numpy(dtype=np.int64)
    y, label, shares = {}, {}, {}
    for name, (burned, fold_of) in done.items():
        value = burned.value.copy()
        has = _has_label(value)
        other = has & (fold_of[burned.label] != fold)
        _forget(value, other)
        tallies[name].between_folds += int(other.sum())
        y[name] = value
        if value.dtype == np.uint8:
            ids = by_task[name]["label_id"].to_numpy(dtype=np.int32)
            label[name] = np.where(_has_label(value), ids[burned.label], NO_LABEL)
        if burned.shares is not None:
            shares[name] = _bytes_of(burned.shares, _has_label(value))
    return _Burnt(y, label, shares, fold, block)


def _bytes_of(shares: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.asarray(np.rint(255 * np.where(where, shares, 0)), dtype=np.uint8)


def _forget(y: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> None:
    y[where] = IGNORE_INDEX if y.dtype == np.uint8 else np.nan


def _chips_of_tile(
    campaign: Campaign,
    grid: CampaignGrid,
    tile: Tile,
    path: Path,
    burnt: _Burnt,
    tallies: Mapping[str, _Tally],
    channels: dict[str, list[str]],
    facts: dict[str, dict[str, Any]],
    spool: Spool,
) -> None:
    cube = read_store(path)
    if cube["reasons"].shape != tile.geobox.shape:
        raise StateError(
            f"cube of {cube['reasons'].shape} px, tile of {tuple(tile.geobox.shape)}",
            where=str(path), fix="delete work/cube and rerun",
        )  # fmt: skip
    _mask(burnt, cube["reasons"].to_numpy(), tallies)
    names = channel_names(cube)
    if channels and names != channels:
        raise StateError("its channels differ from those of the tiles before", where=str(path),
                         fix="delete work/cube and rerun")  # fmt: skip
    channels.update(names)
    # What the bands are (kind, unit, roles) goes on to the networks, unchanged.
    facts.update({g: {k: v for k, v in cube[g].attrs.items() if k in _FACTS} for g in names})
    size = campaign.chips.size_px
    rows, cols = window_of(tile.geobox, grid.geobox)
    labelled = np.any([_has_label(y) for y in burnt.y.values()], axis=0)
    h, w = tile.geobox.shape
    windows = [at for at in chip_windows((h, w), size) if labelled[at].any()]
    inputs = cube_inputs(cube) if windows else {}
    for window in windows:
        at = {"row": rows.start + window[0].start, "col": cols.start + window[1].start}
        spool.add(_chip(inputs, burnt, window, size) | {k: np.int64(v) for k, v in at.items()})


def _mask(burnt: _Burnt, reasons: npt.NDArray[np.uint8], tallies: Mapping[str, _Tally]) -> None:
    """Take away labels where no period has a clear observation, and count why."""
    invalid = (reasons & INVALID) != 0
    for name, y in burnt.y.items():
        has = _has_label(y)
        tally = tallies[name]
        tally.labelled += int(has.sum())
        lost = has & invalid
        tally.invalid += int(lost.sum())
        for reason in Reason:
            if reason & INVALID:
                n = int((lost & ((reasons & reason) != 0)).sum())
                key = str(reason.name).lower()
                tally.reasons[key] = tally.reasons.get(key, 0) + n
        _forget(y, lost)
        for part in (burnt.label, burnt.shares):
            if name in part:
                part[name][..., lost] = -1 if part is burnt.label else 0


def _chip(
    inputs: Mapping[str, npt.NDArray[np.float32]],
    burnt: _Burnt,
    window: tuple[slice, slice],
    size: int,
) -> dict[str, Any]:
    chip: dict[str, Any] = {}
    for group, x in inputs.items():
        f = group_factor(group)
        cut = tuple(slice(s.start // f, s.stop // f) for s in window)
        chip[f"x_{group}"] = _padded(x[(slice(None), *cut)], size // f, np.nan)
    for name, y in burnt.y.items():
        fill = IGNORE_INDEX if y.dtype == np.uint8 else np.nan
        chip[f"y_{name}"] = _padded(y[window], size, fill)
    for name, label in burnt.label.items():
        chip[f"label_{name}"] = _padded(label[window], size, NO_LABEL)
    for name, share in burnt.shares.items():
        chip[f"s_{name}"] = _padded(share[(slice(None), *window)], size, 0)
    chip["fold"] = _padded(burnt.fold[window], size, NO_FOLD)
    chip["block"] = _padded(burnt.block[window], size, -1)
    return chip


def _padded(a: npt.NDArray[Any], size: int, fill: float) -> npt.NDArray[Any]:
    out = np.full((*a.shape[:-2], size, size), fill, dtype=a.dtype)
    out[..., : a.shape[-2], : a.shape[-1]] = a
    return out


def _dataset(
    campaign: Campaign,
    grid: CampaignGrid,
    arrays: Mapping[str, npt.NDArray[Any]],
    channels: Mapping[str, list[str]],
    facts: Mapping[str, dict[str, Any]],
    classes: list[str],
) -> xr.Dataset:
    """Chips as one dataset: ``x_<group>``, ``y_<task>``, ``fold``, ``block`` along ``n``.

    Further ``label_<task>``, the label of each pixel, and ``s_<task>``, shares of the classes.
    """
    data: dict[str, Any] = {}
    for name, values in arrays.items():
        if name in ("row", "col"):
            continue
        dims: tuple[str, ...] = ("n", "y_10", "x_10")
        if name.startswith("x_"):
            res = 10 * group_factor(name[2:])
            dims = ("n", f"channel_{name[2:]}", f"y_{res}", f"x_{res}")
        elif name.startswith("s_"):
            dims = ("n", "class", "y_10", "x_10")
        chunks = (min(_CHIPS_PER_CHUNK, len(values)), *values.shape[1:])
        known = facts.get(name[2:], {}) if name.startswith("x_") else {}
        data[name] = xr.Variable(dims, values, known, encoding={"chunks": chunks})
    coords: dict[str, Any] = {k: ("n", np.array(arrays[k])) for k in ("row", "col")}
    # As objects they become zarr's own string type; numpy's fixed width is not in its standard.
    coords |= {f"channel_{g}": np.array(names, dtype=object) for g, names in channels.items()}
    attrs = geobox_record(grid.geobox) | {
        "size_px": campaign.chips.size_px,
        "folds": campaign.folds.count,
        "classes": classes,
        "days": {p.name: _middle(p.start, p.end) for p in campaign.cube.periods},
        "tasks": [{"name": t.name, "kind": str(t.kind), "unit": t.unit} for t in campaign.tasks],
    }
    return xr.Dataset(data, coords, attrs)


def _middle(start: date, end: date) -> float:
    """Middle of a period, days since 1970-01-01."""
    return (start.toordinal() + end.toordinal()) / 2 - date(1970, 1, 1).toordinal()


def _metrics(
    campaign: Campaign,
    dataset: xr.Dataset,
    tallies: Mapping[str, _Tally],
    report: Mapping[str, Any],
    classes: Sequence[str],
) -> dict[str, Any]:
    fold = dataset["fold"].to_numpy()
    count = campaign.folds.count
    y = dataset[f"y_{campaign.land_cover.name}"].to_numpy()
    table = np.zeros((len(classes), count), dtype=np.int64)
    has = y != IGNORE_INDEX
    np.add.at(table, (y[has].astype(np.int64), fold[has].astype(np.int64)), 1)
    in_folds = (table > 0).sum(axis=1)
    for k in np.flatnonzero(in_folds < 2):
        log.warning("class %s has pixels in %d fold(s)", classes[int(k)], in_folds[k])
    tasks = {}
    for name, tally in tallies.items():
        read = report["tasks"][name]
        tasks[name] = tally.record() | {
            "labels_kept": read["kept"],
            "labels_dropped": sum(read["dropped"].values()),
        }
    return {
        "chips": int(dataset.sizes["n"]),
        "tasks": tasks,
        "class_px": {c: int(n) for c, n in zip(classes, table.sum(axis=1), strict=True)},
        "class_px_per_fold": {
            c: [int(n) for n in row] for c, row in zip(classes, table, strict=True)
        },
        "classes_in_one_fold": [c for c, n in zip(classes, in_folds, strict=True) if n < 2],
        "overlaps_across_folds": report["audit"]["overlaps_across_folds"],
    }
