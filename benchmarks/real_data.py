"""What the checks on real data share: chips from planes in memory, maps, scores, tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import torch
import xarray as xr
from odc.geo.geobox import GeoBox
from shapely.geometry import box
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.grid import CampaignGrid
from terraloom.labels.chips import NO_FOLD, chip_windows
from terraloom.labels.folds import FoldMap, assign_folds
from terraloom.labels.rasterise import NO_LABEL, burn
from terraloom.labels.read import read_labels
from terraloom.legend import IGNORE_INDEX, Legend
from terraloom.models.heads import TaskSpec
from terraloom.preprocess.groups import group_factor
from terraloom.train.baseline import pixel_forest, pixels_at_10m
from terraloom.train.fit import FitSettings, HeldOut, fit_member, predict_held_out

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", ROOT.parent / "shared" / "data"))


@dataclass
class Scene:
    """Inputs of one place in memory.

    Attributes:
        geobox: Pixels of the labels (H, W).
        planes: Per group (C, H / f, W / f) float32, NaN = invalid.
        channels: Per group, names ``period/band``.
        attrs: Per group, ``kind``, ``unit``, ``roles``.
    """

    geobox: GeoBox
    planes: dict[str, np.ndarray]
    channels: dict[str, list[str]]
    attrs: dict[str, dict[str, Any]]

    @property
    def grid(self) -> CampaignGrid:
        """The grid that labels are read for."""
        b = self.geobox.boundingbox
        return CampaignGrid(self.geobox, 384, box(b.left, b.bottom, b.right, b.top))


def legend_of(names: Sequence[str]) -> Legend:
    """A legend of these names, all in one colour."""
    return Legend(tuple(range(1, len(names) + 1)), tuple(names), ("#888888",) * len(names))


def burnt(
    scene: Scene, task: Task, legend: Legend, *, folds: int, block_m: float, seed: int
) -> tuple[dict[str, np.ndarray], gpd.GeoDataFrame, dict[str, Any]]:
    """Labels of a file on the pixels of a scene: value, fold, block; the frame; the report."""
    frame, report = read_labels(task, scene.grid, legend)
    frame["stratum"] = frame["value"].astype(np.int64)
    frame, fold_map = assign_folds(
        frame, geobox=scene.geobox, count=folds, block_m=block_m, seed=seed, names=legend.names
    )
    burned = burn(frame, scene.geobox, kind=TaskKind.SEGMENTATION, erode_m=task.labels.erode_m)
    return layers(burned.value, burned.label, frame, fold_map, scene.geobox), frame, report


def layers(
    y: np.ndarray, label: np.ndarray, frame: gpd.GeoDataFrame, fold_map: FoldMap, geobox: GeoBox
) -> dict[str, np.ndarray]:
    """Value, fold and block of each pixel: those of its label, else of its block."""
    fold, block = fold_map.folds(geobox), fold_map.blocks(geobox)
    has = label != NO_LABEL
    fold[has] = frame["fold"].to_numpy()[label[has]]
    block[has] = frame["block"].to_numpy()[label[has]]
    return {"y": y, "fold": fold, "block": block, "label": label.astype(np.int32)}


_FILL = {"fold": NO_FOLD, "block": -1}


def chips_of(
    scene: Scene, labels: Mapping[str, np.ndarray], *, size_px: int, everywhere: bool = False
) -> xr.Dataset:
    """Chips dataset, as `terraloom cut-chips` writes it, of planes in memory.

    Args:
        scene: The inputs.
        labels: ``y_<task>``, ``fold``, ``block`` (H, W), and ``label_<task>``, ``w_<task>``.
        size_px: Height and width of a chip.
        everywhere: Also chips without a label.
    """
    data: dict[str, list[np.ndarray]] = {}
    at: list[tuple[int, int]] = []
    labelled = [_has(v) for k, v in labels.items() if k.startswith("y_")]
    seen = np.any([np.zeros(scene.geobox.shape, bool), *labelled], axis=0)
    for window in chip_windows(tuple(scene.geobox.shape), size_px):
        if not everywhere and not seen[window].any():
            continue
        at.append((window[0].start, window[1].start))
        for g, plane in scene.planes.items():
            f = group_factor(g)
            cut = tuple(slice(s.start // f, s.stop // f) for s in window)
            data.setdefault(f"x_{g}", []).append(_padded(plane[(..., *cut)], size_px // f, np.nan))
        for name, layer in labels.items():
            fill = _FILL.get(name, -1 if layer.dtype == np.int32 else _nothing(layer))
            data.setdefault(name, []).append(_padded(layer[window], size_px, fill))
    variables: dict[str, Any] = {}
    for name, parts in data.items():
        dims: tuple[str, ...] = ("n", "y_10", "x_10")
        if name.startswith("x_"):
            res = 10 * group_factor(name[2:])
            dims = ("n", f"channel_{name[2:]}", f"y_{res}", f"x_{res}")
        variables[name] = (dims, np.stack(parts), scene.attrs.get(name[2:], {}))
    coords: dict[str, Any] = {
        k: ("n", np.array([a[i] for a in at], np.int64)) for i, k in enumerate(("row", "col"))
    }
    coords |= {f"channel_{g}": np.array(n, dtype=object) for g, n in scene.channels.items()}
    return xr.Dataset(variables, coords, {"size_px": size_px})


def _nothing(layer: np.ndarray) -> float:
    return IGNORE_INDEX if layer.dtype == np.uint8 else np.nan


def _has(y: np.ndarray) -> np.ndarray:
    return y != IGNORE_INDEX if y.dtype == np.uint8 else np.isfinite(y)


def _padded(a: np.ndarray, size: int, fill: float) -> np.ndarray:
    out = np.full((*a.shape[:-2], size, size), fill, dtype=a.dtype)
    out[..., : a.shape[-2], : a.shape[-1]] = a
    return out


def train(
    chips: xr.Dataset, tasks: Sequence[TaskSpec], settings: FitSettings, *, folds: Iterable[int],
    seed: int, members: int = 1,
) -> tuple[list[torch.nn.Module], dict[str, HeldOut]]:  # fmt: skip
    """All members of all folds, and what they predict for the labels they did not see."""
    nets: list[torch.nn.Module] = []
    held: dict[str, list[HeldOut]] = {}
    for fold in folds:
        mine = [
            fit_member(chips, tasks, settings, held_out_fold=fold, member=m, seed=seed).network()
            for m in range(members)
        ]
        nets += mine
        for name, part in predict_held_out(chips, mine, fold).items():
            held.setdefault(name, []).append(part)
    return nets, {name: HeldOut.join(parts) for name, parts in held.items()}


def mapped(
    nets: Sequence[torch.nn.Module], chips: xr.Dataset, shape: tuple[int, int], task: str
) -> np.ndarray:
    """Mean class probabilities (K, H, W) of all members, chip by chip with a halo around it."""
    planes = whole(chips, shape)
    halo, size = nets[0].halo_px(), int(chips.attrs["size_px"])
    out: np.ndarray | None = None
    for window in chip_windows(shape, size):
        inputs = {}
        for g, plane in planes.items():
            f = group_factor(g)
            inputs[g] = torch.from_numpy(_window(plane, window, halo, size, f))[None]
        p = torch.stack([net.predict(inputs)[task][0] for net in nets]).mean(0).numpy()
        if out is None:
            out = np.zeros((len(p), *shape), np.float32)
        h, w = out[0][window].shape
        out[(slice(None), *window)] = p[:, halo : halo + h, halo : halo + w]
    if out is None:
        raise ValueError("no chip")
    return out


def whole(chips: xr.Dataset, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Planes (C, H / f, W / f) per group, put together from chips."""
    out = {}
    for name in (str(v) for v in chips.data_vars if str(v).startswith("x_")):
        f, values = group_factor(name[2:]), chips[name].values
        h, w = (-(-n // f) for n in shape)
        plane = np.full((values.shape[1], h, w), np.nan, np.float32)
        for x, r, c in zip(values, chips["row"].values // f, chips["col"].values // f, strict=True):
            here = plane[:, r : r + x.shape[1], c : c + x.shape[2]]
            here[:] = x[:, : here.shape[1], : here.shape[2]]
        out[name[2:]] = plane
    return out


def _window(
    plane: np.ndarray, window: tuple[slice, slice], halo: int, size: int, f: int
) -> np.ndarray:
    """A window with its halo; NaN beyond the plane."""
    r, c = ((s.start - halo) // f for s in window)
    n = (size + 2 * halo) // f
    out = np.full((len(plane), n, n), np.nan, np.float32)
    r0, c0 = max(r, 0), max(c, 0)
    part = plane[:, r0 : r + n, c0 : c + n]
    out[:, r0 - r : r0 - r + part.shape[1], c0 - c : c0 - c + part.shape[2]] = part
    return out


def scores(y: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """Overall accuracy and macro-F1 over the classes of the reference."""
    there = np.unique(y)
    return {
        "OA": float(accuracy_score(y, guess)),
        "F1": float(f1_score(y, guess, labels=there, average="macro", zero_division=0)),
    }


def held_scores(held: HeldOut) -> dict[str, float]:
    """Scores of held-out pixels; the members' probabilities are averaged."""
    return scores(np.asarray(held.y).astype(int), held.p.mean(0).argmax(1))


def forest_scores(chips: xr.Dataset, task: TaskSpec, seed: int) -> dict[str, float]:
    """Scores of the package's random forest on the same labels and folds."""
    return held_scores(pixel_forest(chips, task, seed=seed))


def forest_map(chips: xr.Dataset, plane: np.ndarray, task: TaskSpec, seed: int) -> np.ndarray:
    """Class index (H, W) by one forest of all labelled pixels of a scene with one group.

    Args:
        chips: Labels and the same group.
        plane: (C, H, W) of the only group, at its own pixels; a missing value is -9999.
        task: The task.
        seed: Seed of the forest.
    """
    y = chips[f"y_{task.name}"].values.ravel()
    index = np.flatnonzero(y < len(task.classes))
    forest = RandomForestClassifier(60, min_samples_leaf=2, random_state=seed)
    forest.fit(pixels_at_10m(chips, index), y[index])
    flat = np.nan_to_num(plane.reshape(len(plane), -1).T, nan=-9999.0)
    guess: np.ndarray = forest.predict(flat).reshape(plane.shape[1:])
    return guess


class Rows:
    """Scores by row, one entry per seed."""

    def __init__(self) -> None:
        self._runs: dict[str, list[dict[str, float]]] = {}

    def add(self, name: str, values: Mapping[str, float]) -> None:
        """Scores of one seed."""
        self._runs.setdefault(name, []).append(dict(values))

    def text(self) -> str:
        """Mean, standard deviation over seeds and the lowest, per row and score."""
        lines = []
        for name, runs in self._runs.items():
            cells = []
            for k, v in pd.DataFrame(runs).items():
                sd = f"{v.std(ddof=1):.3f}" if len(v) > 1 else "-"
                cells.append(f"{k} {v.mean():.3f} (sd {sd}, least {v.min():.3f})")
            lines.append(f"  {name:34} " + "   ".join(cells))
        return "\n".join(lines)
