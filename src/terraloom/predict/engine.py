"""Prediction of tiles with all members of the ensemble.

A tile is read with a halo as wide as the networks' receptive field, predicted, and cut back. So
the result of a pixel does not depend on tile size, job size or order: there is nothing to blend.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, Tile
from terraloom.io import digest_json, read_json, read_store, write_json, write_store
from terraloom.log import get_logger, progress
from terraloom.models.registry import card_path, check_contract
from terraloom.predict.ensemble import Ensemble, member_files
from terraloom.predict.layers import Layers
from terraloom.predict.reader import CubeReader
from terraloom.preprocess.reasons import INVALID
from terraloom.state import code_digest
from terraloom.train.run import task_specs

__all__ = ["CUBES", "TILES", "predict_batch", "predict_tile"]

CUBES = Path("work/cube")
TILES = Path("work/predict")

log = get_logger(__name__)


def predict_batch(campaign: Campaign, grid: CampaignGrid, batch: str) -> None:
    """Predict the tiles of one job and write their manifest; finished tiles are kept."""
    torch.set_num_threads(campaign.predict.threads)
    torch.use_deterministic_algorithms(True)
    ensemble = Ensemble.load()
    reader = CubeReader(CUBES, grid)
    for file in member_files():
        check_contract(
            read_json(card_path(file)), reader.channels, task_specs(campaign), where=str(file)
        )
    tiles = grid.batches(campaign.grid.tiles_per_job)[batch]
    code, bits = code_digest("predict.engine"), campaign.products.probability_bits
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
        digest = digest_json([code, ensemble.digest, near, tasks, bits])
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
        name: values[:, 0, :, halo : halo + h, halo : halo + w]
        for name, values in ensemble.predict({g: x[None] for g, x in inputs.items()}).items()
    }
    valid = (reasons & np.uint8(INVALID)) == 0
    layers = Layers(campaign.tasks, ensemble.calibrations, campaign.products.probability_bits)
    data: dict[str, Any] = {"reasons": (("y", "x"), reasons)}
    for name, values in layers.encode(raw, valid).items():
        data[name] = (layers.dims(name, values.ndim), values)
    return xr.Dataset(data, attrs={"tile": tile.name})
