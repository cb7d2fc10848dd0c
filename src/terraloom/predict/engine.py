"""Prediction of tiles with all members of the ensemble.

A window is read with a halo as wide as the networks' receptive field, predicted, and cut back. So
the result of a pixel does not depend on windows, tiles, job size or order: there is nothing to
blend. On processors a thread each reads, predicts and writes a window; beside a GPU the next
window is read and the one before is written while one is predicted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid, Tile, row_areas_m2
from terraloom.io import digest_json, read_json, write_json
from terraloom.log import get_logger
from terraloom.models.registry import card_path, check_contract
from terraloom.plan import CUBES, TILES
from terraloom.predict.ensemble import Ensemble, member_files, workers_of
from terraloom.predict.layers import Layers
from terraloom.predict.overlap import overlapped, side_by_side
from terraloom.predict.reader import CubeReader
from terraloom.predict.tilewriter import TileWriter
from terraloom.predict.views import F32, predict_views
from terraloom.predict.windows import Place, Window, cut, in_batches
from terraloom.preprocess.tilestore import open_arrays
from terraloom.state import code_digest
from terraloom.train.model_files import task_specs

__all__ = ["Speed", "fitting_window_px", "load_ensemble", "predict_batch"]

#: Most bytes that the values of the windows in flight take: one read, one predicted, one written.
_MOST_BYTES = 1_500_000_000
#: Copies of a window's values that are held at once, features of the network among them: by a
#: thread that works on a window alone, and where windows are read and written beside it.
_COPIES_ALONE, _COPIES_BESIDE = 3, 6

Batch = list[tuple[Window, tuple[Tile, ...]]]
#: Inputs or predictions of a batch of windows, the reason bits of each, and where each lies in
#: what is read for it.
Loaded = tuple[dict[str, F32], list[npt.NDArray[np.uint8]], list[Place]]
log = get_logger(__name__)


@dataclass
class Speed:
    """What a job has done, and in which time.

    Attributes:
        delivered_px: Pixels of predicted tiles (count).
        computed_px: Pixels that the networks were run on, halo and all (count).
        area_ha: True area of the predicted tiles.
        seconds: Wall time, all of the work in it.
        network_s: Of it, inside the networks.
        start: Clock when the work began.
    """

    delivered_px: int = 0
    computed_px: int = 0
    area_ha: float = 0.0
    seconds: float = 0.0
    network_s: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        """The work is done."""
        self.seconds = time.monotonic() - self.start

    def record(self) -> dict[str, float]:
        """Rates for the manifest of a job."""
        s = max(self.seconds, 1e-9)
        return {
            "mpx_per_s": self.delivered_px / 1e6 / s,
            "computed_mpx_per_s": self.computed_px / 1e6 / s,
            "ha_per_s": self.area_ha / s,
            "network_share": self.network_s / s,
            "seconds": self.seconds,
        }


def load_ensemble(campaign: Campaign, reader: CubeReader) -> Ensemble:
    """The ensemble of a campaign, ready to predict what a reader reads.

    Raises:
        ModelError: It was trained for other bands, classes or tasks; or see
            :meth:`Ensemble.load`.
    """
    ensemble = Ensemble.load(campaign=campaign)
    for file in member_files():
        check_contract(
            read_json(card_path(file)), reader.channels, task_specs(campaign), where=str(file)
        )
    return ensemble


def fitting_window_px(campaign: Campaign, ensemble: Ensemble) -> int:
    """``predict.window_px``, or less where a window's values would take too much memory."""
    how = campaign.predict
    workers = workers_of(how.threads, ensemble.device)
    copies = workers * _COPIES_ALONE if workers > 1 else _COPIES_BESIDE
    per_px = 4 * copies * ensemble.values_per_px * how.batch
    side = int(math.sqrt(_MOST_BYTES / per_px)) - 2 * ensemble.halo_px
    fits = max(side, 96)
    if fits < how.window_px:
        log.info("windows of %d px instead of %d, to bound memory", fits, how.window_px)
    return min(fits, how.window_px)


def predict_batch(campaign: Campaign, grid: CampaignGrid, batch: str) -> None:
    """Predict the tiles of one job and write their manifest; finished tiles are kept."""
    reader = CubeReader(CUBES, grid)
    ensemble = load_ensemble(campaign, reader)
    tiles = grid.batches(campaign.grid.tiles_per_job)[batch]
    digests = _digests(campaign, grid, tiles, ensemble)
    todo = {t.name: t for t in tiles if not _finished(t, digests[t.name])}
    for tile in tiles:
        if tile.name not in todo:
            log.info("tile %s: finished before, kept", tile.name)
    manifest = TILES / f"{batch}.json"
    speed = predict_tiles(campaign, grid, batch, tiles, todo, digests, ensemble, reader)
    rates = speed.record()
    if todo:
        how = f"{campaign.predict.runtime} on {ensemble.device}"
        log.info(
            "%s: %.3f Mpx/s, %.1f ha/s with %d members in %s; %.3f Mpx/s computed, %.0f %% of the "
            "time in the networks", batch, rates["mpx_per_s"], rates["ha_per_s"],
            len(ensemble.members), how, rates["computed_mpx_per_s"],
            100 * rates["network_share"],
        )  # fmt: skip
    elif manifest.exists():
        rates = read_json(manifest).get("speed", rates)  # nothing done: the same manifest as before
    record = {
        t.name: {"path": _path(t).as_posix(), "digest": digests[t.name]} for t in tiles
    }  # fmt: skip
    write_json(manifest, {"tiles": record, "speed": rates})


def predict_tiles(
    campaign: Campaign, grid: CampaignGrid, job: str, tiles: Sequence[Tile],
    todo: Mapping[str, Tile], digests: Mapping[str, str], ensemble: Ensemble, reader: CubeReader,
) -> Speed:  # fmt: skip
    """Predict tiles and write a store of each.

    Args:
        campaign: The campaign.
        grid: Its grid.
        job: Name of the job.
        tiles: Its tiles, which decide how they are cut into windows.
        todo: Those of them to predict, by name.
        digests: Digest of what each depends on, to be kept in its store.
        ensemble: The networks.
        reader: Reader of the cubes.

    Returns:
        How fast that was.
    """
    how, speed = campaign.predict, Speed()
    windows = cut(tiles, grid.tile_px, fitting_window_px(campaign, ensemble), ensemble.stride_px)
    wanted = [(w, held) for w, held in windows if any(t.name in todo for t in held)]
    layers = Layers(campaign.tasks, ensemble.calibrations, campaign.products.probability_bits,
                    ensemble.trust, spread=campaign.regions is not None)  # fmt: skip
    batches = list(in_batches(wanted, how.batch))
    halo, stride, maps = ensemble.halo_px, ensemble.stride_px, ensemble.calibrations
    done, last, lock = 0, time.monotonic(), threading.Lock()

    def load(batch: Batch) -> Loaded:
        parts, places = [], []
        for window, _ in batch:
            around = window.padded(halo, stride)
            parts.append(reader.window(around.row, around.col, around.height, around.width))
            places.append(window.within(around))
        inputs = {g: np.stack([p[g] for p in parts]) for g in parts[0]}
        return inputs, [reader.reasons(window) for window, _ in batch], places

    def compute(loaded: Loaded) -> Loaded:
        start = time.monotonic()
        values = predict_views(ensemble.predict, loaded[0], how.views, loaded[2], maps)
        with lock:
            speed.network_s += time.monotonic() - start
        return values, *loaded[1:]

    def store(batch: Batch, found: Loaded) -> None:
        nonlocal done, last
        for n, (window, held) in enumerate(batch):
            values = {name: v[:, n] for name, v in found[0].items()}
            writer.write(window, [t for t in held if t.name in todo], values, found[1][n])
        with lock:
            speed.computed_px += sum(_size(w.padded(halo, stride)) for w, _ in batch)
            done += 1
            if (now := time.monotonic()) - last > 5:
                left = (now - speed.start) / done * (len(batches) - done)
                log.info("%d of %d windows done, about %.0f s left", done, len(batches), left)
                last = now

    workers = workers_of(how.threads, ensemble.device)
    with TileWriter(TILES, job, layers, grid, digests, wanted, how.threads // workers) as writer:
        if ensemble.device.type == "cpu":
            side_by_side(batches, lambda b: store(b, compute(load(b))), workers,
                         lambda: torch.set_num_threads(how.threads // workers))  # fmt: skip
            speed.network_s /= workers
        else:
            overlapped(batches, load, compute, store)
    speed.stop()
    for tile in todo.values():
        h, w = tile.geobox.shape
        speed.delivered_px += h * w
        speed.area_ha += float(row_areas_m2(tile.geobox).sum()) * w / 1e4
    return speed


def _size(window: Window) -> int:
    return window.height * window.width


def _path(tile: Tile) -> Path:
    return TILES / f"{tile.name}.zip"


def _finished(tile: Tile, digest: str) -> bool:
    done = open_arrays(_path(tile))
    return done is not None and bool(done.attrs.get("digest") == digest)


def _digests(
    campaign: Campaign, grid: CampaignGrid, tiles: Sequence[Tile], ensemble: Ensemble
) -> dict[str, str]:
    """Digest of all that the values of each tile depend on; windows and devices are not in it."""
    code = code_digest("predict.engine")
    cubes = _cubes(campaign, grid)
    names = {(t.column, t.row): t.name for t in grid.tiles()}
    tasks = [t.model_dump(mode="json") for t in campaign.tasks]
    how = campaign.predict
    means = [how.runtime, how.precision, how.views, how.dropout_passes,
             how.dropout_passes and campaign.seed, campaign.products.probability_bits,
             campaign.regions is not None]  # fmt: skip
    found = {}
    for tile in tiles:
        around = _neighbourhood(tile, names, -(-ensemble.halo_px // grid.tile_px))
        near = {n: cubes[n] for n in around if n in cubes}
        found[tile.name] = digest_json([code, ensemble.digest, near, tasks, means])
    return found


def _cubes(campaign: Campaign, grid: CampaignGrid) -> dict[str, str]:
    """Digest of each cube that there is, by tile.

    Only what the manifest of a tile's own job says of it: those of jobs that were packed otherwise
    before lie beside them.
    """
    found: dict[str, str] = {}
    for job, tiles in grid.batches(campaign.grid.tiles_per_job).items():
        file = CUBES / f"{job}.json"
        made = read_json(file)["tiles"] if file.exists() else {}
        found |= {t.name: made[t.name]["digest"] for t in tiles if t.name in made}
    return found


def _neighbourhood(tile: Tile, names: Mapping[tuple[int, int], str], reach: int) -> list[str]:
    """Names of the tiles at most ``reach`` tiles away, itself included; ``names`` by position."""
    steps = range(-reach, reach + 1)
    places = [(tile.column + dx, tile.row + dy) for dy in steps for dx in steps]
    return [names[p] for p in places if p in names]
