"""Prediction of tiles with all members of the ensemble.

A tile is read with a halo as wide as the networks' receptive field, predicted, and cut back. So
the result of a pixel does not depend on tile size, job size or order: there is nothing to blend.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.errors import ModelError
from terraloom.grid import CampaignGrid, Tile
from terraloom.io import digest_json, read_json, read_store, sha256, write_json, write_store
from terraloom.log import get_logger, progress
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import card_path, check_contract, load_member
from terraloom.predict.reader import CubeReader
from terraloom.preprocess.reasons import INVALID
from terraloom.state import code_digest
from terraloom.train.ensemble import Calibration, calibrated
from terraloom.train.run import task_specs
from terraloom.uncertainty.decompose import (
    ENTROPY_NODATA,
    decompose_entropy,
    decompose_regression,
    encode_entropy,
)

__all__ = ["PROBABILITY_STEPS", "Ensemble", "predict_batch", "predict_tile"]

#: Probabilities are stored as uint8 0..200 for 0..1; 255 is no data.
PROBABILITY_STEPS = 200
PROBABILITY_NODATA = 255
REGRESSION_NODATA = -9999.0
#: Rows of a tile whose probabilities are calibrated at once.
_STRIP_ROWS = 8

MODEL = Path("results/model")
CUBES = Path("work/cube")
TILES = Path("work/predict")

log = get_logger(__name__)


@dataclass(frozen=True)
class Ensemble:
    """All members and their calibration.

    Attributes:
        members: Networks in evaluation mode.
        calibrations: Per segmentation task, found on held-out folds.
        digest: Digest of weights and calibration.
    """

    members: tuple[MapNet, ...]
    calibrations: Mapping[str, Calibration]
    digest: str

    @classmethod
    def load(cls, folder: Path = MODEL) -> Ensemble:
        """Read all members below a model folder.

        Raises:
            ModelError: No member is there, members differ in channels, or a task has no
                calibration.
        """
        files = sorted(folder.glob("fold-*/member-*.safetensors"))
        if not files:
            raise ModelError("no member is there", where=str(folder), fix="run target `model`")
        members = tuple(load_member(f)[0] for f in files)
        if len({str(m.spec.channels) for m in members}) > 1:
            raise ModelError("members of different kinds", where=str(folder), fix="train again")
        record = read_json(folder / "calibration.json")
        digest = digest_json([record, [sha256(f) for f in files]])
        found = {k: Calibration.from_record(v) for k, v in record.get("tasks", {}).items()}
        maps = {t.name for t in members[0].spec.tasks if t.kind == "segmentation"}
        if maps - set(found):
            raise ModelError(f"no calibration of {', '.join(sorted(maps - set(found)))}",
                             where=str(folder), fix="run target `model` again")  # fmt: skip
        return cls(members, found, digest)

    @property
    def halo_px(self) -> int:
        """Pixels to read around a tile."""
        stride = math.lcm(*(m.stride_px for m in self.members))
        return math.ceil(max(m.halo_px() for m in self.members) / stride) * stride

    def predict(self, inputs: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
        """Members' predictions of one window: per task (M, c, h, w) float32."""
        tensors = {g: torch.from_numpy(x)[None] for g, x in inputs.items()}
        outs = [m.predict(tensors) for m in self.members]
        return {name: np.stack([o[name][0].numpy() for o in outs]) for name in outs[0]}


def predict_batch(campaign: Campaign, grid: CampaignGrid, batch: str) -> None:
    """Predict the tiles of one job and write their manifest; finished tiles are kept."""
    torch.set_num_threads(campaign.predict.threads)
    torch.use_deterministic_algorithms(True)
    ensemble = Ensemble.load()
    reader = CubeReader(CUBES, grid)
    for file in sorted(MODEL.glob("fold-*/member-*.safetensors")):
        check_contract(
            read_json(card_path(file)), reader.channels, task_specs(campaign), where=str(file)
        )
    tiles = grid.batches(campaign.grid.tiles_per_job)[batch]
    code = code_digest("predict.engine")
    cubes = {
        name: record["digest"]
        for file in sorted(CUBES.glob("b*.json"))
        for name, record in read_json(file)["tiles"].items()
    }
    names = {(t.column, t.row): t.name for t in grid.tiles()}
    start, done_px = time.monotonic(), 0
    manifest: dict[str, Any] = {}
    for tile in progress(tiles, what=f"{batch}: tiles predicted"):
        path = TILES / f"{tile.name}.zip"
        around = _neighbourhood(tile, names, -(-ensemble.halo_px // grid.tile_px))
        near = {n: cubes[n] for n in around if n in cubes}
        tasks = [t.model_dump(mode="json") for t in campaign.tasks]
        digest = digest_json([code, ensemble.digest, near, tasks])
        if path.exists() and read_store(path).attrs.get("digest") == digest:
            log.info("tile %s: finished before, kept", tile.name)
        else:
            reasons = read_store(CUBES / f"{tile.name}.zip")["reasons"].to_numpy()
            dataset = predict_tile(tile, grid, campaign, ensemble, reader, reasons)
            dataset.attrs["digest"] = digest
            write_store(path, dataset)
            done_px += tile.geobox.shape[0] * tile.geobox.shape[1]
        manifest[tile.name] = {"path": path.as_posix(), "digest": digest}
    seconds = time.monotonic() - start
    log.info("%s: %.3f Mpx/s with %d members", batch, done_px / 1e6 / seconds,
             len(ensemble.members))  # fmt: skip
    write_json(TILES / f"{batch}.json", {"tiles": manifest})


def _neighbourhood(tile: Tile, names: Mapping[tuple[int, int], str], reach: int) -> list[str]:
    """Names of the tiles at most ``reach`` tiles away, itself included; ``names`` by position."""
    steps = range(-reach, reach + 1)
    places = [(tile.column + dx, tile.row + dy) for dy in steps for dx in steps]
    return [names[p] for p in places if p in names]


def predict_tile(
    tile: Tile,
    grid: CampaignGrid,
    campaign: Campaign,
    ensemble: Ensemble,
    reader: CubeReader,
    reasons: npt.NDArray[np.uint8],
) -> xr.Dataset:
    """Products of one tile at 10 m.

    Args:
        tile: The tile.
        grid: Grid of the campaign.
        campaign: The campaign.
        ensemble: Members and calibration.
        reader: Reader of the cubes.
        reasons: (H, W) bits; a pixel with an invalid bit gets no prediction.

    Returns:
        ``class_index`` (255 = none), ``probabilities``, ``uncertainty``, one variable per further
        task, ``reasons``; all encoded as in the products.
    """
    halo = ensemble.halo_px
    h, w = tile.geobox.shape
    row, col = tile.row * grid.tile_px, tile.column * grid.tile_px
    inputs = reader.window(row - halo, col - halo, h + 2 * halo, w + 2 * halo)
    raw = {
        name: values[..., halo : halo + h, halo : halo + w]
        for name, values in ensemble.predict(inputs).items()
    }
    valid = (reasons & np.uint8(INVALID)) == 0
    data: dict[str, Any] = {"reasons": (("y", "x"), reasons)}
    for task in campaign.tasks:
        values = raw[task.name]
        if task.kind is TaskKind.SEGMENTATION:
            data.update(_classes(values, ensemble.calibrations[task.name], valid))
        elif task.kind is TaskKind.REGRESSION:
            data[task.name] = (("part", "y", "x"), _regression(values, valid, task.range))
        else:
            data[task.name] = (("y", "x"), _encode(values.mean(axis=0)[0], valid))
    return xr.Dataset(data, attrs={"tile": tile.name})


def _classes(
    members: npt.NDArray[np.float32], calibration: Calibration, valid: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    sharp = np.empty(members.shape, np.float32)
    # Calibration works in float64: strips stay in cache, copies of the whole ensemble would not.
    for row in range(0, members.shape[2], _STRIP_ROWS):
        strip = slice(row, row + _STRIP_ROWS)
        sharp[:, :, strip] = calibrated(members[:, :, strip], calibration, axis=1)
    parts = decompose_entropy(sharp)
    k = members.shape[1]
    index = parts.mean.argmax(axis=0).astype(np.uint8)
    index[~valid] = 255
    entropies = [encode_entropy(e, k, valid) for e in
                 (parts.total, parts.aleatoric, parts.epistemic)]  # fmt: skip
    probabilities = np.stack([_encode(p, valid) for p in parts.mean])
    return {
        "class_index": (("y", "x"), index),
        "probabilities": (("class", "y", "x"), probabilities),
        "uncertainty": (("kind", "y", "x"), np.stack(entropies)),
    }


def _encode(
    probability: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    code = np.rint(np.clip(probability, 0, 1) * PROBABILITY_STEPS).astype(np.uint8)
    code[~valid] = PROBABILITY_NODATA
    return code


def _regression(
    members: npt.NDArray[np.float32],
    valid: npt.NDArray[np.bool_],
    allowed: tuple[float, float] | None,
) -> npt.NDArray[np.float32]:
    parts = decompose_regression(members[:, 0], members[:, 1])
    mean = parts.mean if allowed is None else np.clip(parts.mean, *allowed)
    out = np.stack([mean, parts.aleatoric_sd, parts.epistemic_sd]).astype(np.float32)
    out[:, ~valid] = REGRESSION_NODATA
    return out


__all__ += ["ENTROPY_NODATA", "PROBABILITY_NODATA", "REGRESSION_NODATA"]
