"""The cube: a tile's harmonised stack at native resolutions, as composites or as dates.

Optical bands are masked composites of reflectance, SAR bands means of linear power kept as
decibels, static layers (elevation) are read once. What is read at once is bounded, whatever the
tile, and written before the next block is read. Rebuilding a tile reads only the periods whose
scenes have changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign, Composite
from terraloom.errors import ConfigError
from terraloom.grid import CampaignGrid, Tile
from terraloom.io import digest_json, sha256
from terraloom.log import get_logger
from terraloom.preprocess.groups import group_factor
from terraloom.preprocess.harmonise import view_unknown
from terraloom.preprocess.layering import Group, Layer, Step, Unit, assemble
from terraloom.preprocess.stack import (
    MASK_OUTSIDE,
    Scene,
    mask_on,
    role_of,
    touching,
)
from terraloom.preprocess.tilestore import TileStore, open_arrays

__all__ = [
    "MASK_OUTSIDE", "Scene", "build_tile", "cube_groups", "mask_on",
]  # fmt: skip

Float = npt.NDArray[np.float32]

#: What of an item's record decides its values, besides its assets.
_ITEM_KEYS = (
    "source", "datetime", "platform", "crs", "sun_azimuth_deg", "sun_elevation_deg",
    "view_azimuth_deg", "view_zenith_deg",
)  # fmt: skip
#: What of the cube's settings does not change what is read and composed.
_LATER = {"periods", "fill", "fill_max_days"}

log = get_logger(__name__)


def cube_groups(campaign: Campaign) -> list[Group]:
    """Groups of a campaign's cubes, in the order of its sources.

    Raises:
        ConfigError: A group's pixels do not fit the tiles, or two sources share a group without
            having the same bands.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for source in campaign.sources:
        table = load_source(source.source)
        for key in table.choose(source.bands):
            bands = found.setdefault(table.bands[key].group, {}).setdefault(source.source, [])
            if key not in bands:
                bands.append(key)
    groups = []
    for name, sources in found.items():
        first, *others = sources
        for other in others:
            if sources[other] != sources[first]:
                raise ConfigError(
                    f"group {name} has other bands in {other} than in {first}",
                    where="sources[].bands", allowed="the same bands in all sources of a group",
                    fix="choose bands that both have, or give one a group of its own in its table",
                )  # fmt: skip
        table = load_source(first)
        roles = {b: r for b in sources[first] if (r := role_of(first, b)) is not None}
        groups.append(
            Group(
                name,
                tuple(sources),
                tuple(sources[first]),
                10 * group_factor(name),
                table.kind,
                "dB" if table.kind == "sar" else table.unit,
                table.static,
                roles,
            )
        )
    return groups


# --- what there is to do -------------------------------------------------------------------------


def _layer(group: Group, campaign: Campaign, every: Sequence[Scene], near: set[str]) -> Layer:
    """Steps of a group: periods, or all days of the campaign, the same for every tile."""
    periods = campaign.cube.periods
    mine = [s for s in every if s.item["source"] in group.sources]
    here = [s for s in mine if s.item["id"] in near]
    if group.static:
        return Layer(group, (), (Unit("", here, {0: tuple(range(len(here)))}),))
    of = {s.item["id"]: campaign.cube.period_of(s.day) for s in mine}
    if campaign.cube.series == "composites":
        steps = tuple(Step(p.name, _middle(p)) for p in periods)
        units = []
        for n, p in enumerate(periods):
            scenes = [s for s in here if of[s.item["id"]] == p.name]
            units.append(Unit(p.name, scenes, {n: tuple(range(len(scenes)))}))
        return Layer(group, steps, tuple(units))
    days = sorted({s.day for s in mine if of[s.item["id"]] is not None})
    steps = tuple(Step(d.isoformat(), float(np.datetime64(d).astype(int))) for d in days)
    return Layer(group, steps, tuple(_units_of_days(group, campaign, here, of, steps)))


def _units_of_days(
    group: Group, campaign: Campaign, here: Sequence[Scene], of: dict[Any, str | None],
    steps: Sequence[Step],
) -> list[Unit]:  # fmt: skip
    """Days one by one; those of a period together where a filter needs all of them."""
    together = group.kind == "sar" and campaign.cube.speckle == "multitemporal"
    units = []
    for period in campaign.cube.periods:
        scenes = [s for s in here if of[s.item["id"]] == period.name]
        at: dict[int, list[int]] = {}
        for i, s in enumerate(scenes):
            n = next(n for n, step in enumerate(steps) if step.name == s.day.isoformat())
            at.setdefault(n, []).append(i)
        if together:
            units.append(Unit(period.name, scenes, {n: tuple(i) for n, i in at.items()}))
            continue
        units += [
            Unit(period.name, [scenes[i] for i in members], {n: tuple(range(len(members)))})
            for n, members in sorted(at.items())
        ]
    return units


def _middle(period: Composite) -> float:
    first, last = (np.datetime64(d).astype(int) for d in (period.start, period.end))
    return float(first + last) / 2


# --- digests -------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _file_digest(path: str, stamp: int, size: int) -> str:
    """Digest of a mask; many tiles of a job ask for the same ones."""
    del stamp, size
    return sha256(path)


def _mask_digest(path: Path) -> str:
    stat = path.stat()
    return _file_digest(str(path), stat.st_mtime_ns, stat.st_size)


def _scene_record(scene: Scene, bands: Sequence[str]) -> list[Any]:
    return [
        {k: scene.item.get(k) for k in _ITEM_KEYS},
        {b: scene.item["assets"].get(b) for b in bands},
        [(_mask_digest(path), band) for path, band in scene.masks],
        None if scene.shift is None else (scene.shift.dy_px, scene.shift.dx_px),
        None if scene.field is None else asdict(scene.field),
    ]


def _unit_digest(base: str, layer: Layer, unit: Unit) -> str:
    group = layer.group
    tables = [load_source(s) for s in group.sources]
    return digest_json(
        [base, group.record(), [(t.resampling, t.mask_resolution_m) for t in tables], unit.period,
         {layer.steps[n].name if layer.steps else "": i for n, i in unit.steps.items()},
         [_scene_record(s, group.bands) for s in unit.scenes]]
    )  # fmt: skip


def _masks_digest(base: str, period: Composite, scenes: Sequence[Scene]) -> str:
    return digest_json([base, period.name, [_scene_record(s, ()) for s in scenes]])


# --- build ---------------------------------------------------------------------------------------


def build_tile(
    tile: Tile, grid: CampaignGrid, campaign: Campaign, scenes: Sequence[Scene], path: Path,
    code: str,
) -> dict[str, Any]:  # fmt: skip
    """Build one tile's cube and write it as one store; a finished one is left as it is.

    Where an older store has a period of a group that nothing has changed for, it is taken from
    there; the result is the same, byte by byte, as of a build from nothing.

    Args:
        tile: The tile.
        grid: Grid of the campaign.
        campaign: The campaign.
        scenes: All used scenes of all sources; only those that touch the tile are opened.
        path: Store to write (``.zip``).
        code: Digest of the code, so that a changed program rebuilds the tile.

    Returns:
        Summary: ``path``, ``digest`` of everything the tile depends on, ``clear_pct``.

    Raises:
        SceneError: An item cannot be read or has no coefficients for a wanted adjustment.
        ConfigError: See :func:`cube_groups`.
    """
    cube = campaign.cube
    near = touching(scenes, tile.geobox)
    ids = {s.item["id"] for s in near}
    layers = [_layer(g, campaign, scenes, ids) for g in cube_groups(campaign)]
    base = digest_json(
        [code, tile.name, tile.geobox.affine[:6], list(tile.geobox.shape), str(tile.geobox.crs),
         cube.model_dump(mode="json", exclude=_LATER)]
    )  # fmt: skip
    optical = {
        p.name: [s for s in near if s.masks and cube.period_of(s.day) == p.name]
        for p in cube.periods
    }
    digests = {
        "masks": {p.name: _masks_digest(base, p, optical[p.name]) for p in cube.periods},
        **{
            layer.group.name: {
                layer.unit_name(u): _unit_digest(base, layer, u) for u in layer.units
            }
            for layer in layers
        },
    }
    digest = digest_json(
        [digests, grid.aoi.wkt, cube.model_dump(mode="json"),
         {layer.group.name: [s.name for s in layer.steps] for layer in layers}]
    )  # fmt: skip
    done = open_arrays(path)
    if done is not None and done.attrs.get("digest") == digest:
        log.info("tile %s: finished before, kept", tile.name)
        return {"path": path.as_posix(), "digest": digest, "clear_pct": done.attrs["clear_pct"]}
    with TileStore(path, tile.geobox.crs) as store:
        clear_pct = assemble(store, done, tile, grid, campaign, layers, optical, digests)
        store.attrs.update(_attrs(tile, campaign, near, digests, digest, clear_pct))
    return {"path": path.as_posix(), "digest": digest, "clear_pct": clear_pct}


def _attrs(
    tile: Tile, campaign: Campaign, near: Sequence[Scene], digests: dict[str, Any], digest: str,
    clear_pct: float,
) -> dict[str, Any]:  # fmt: skip
    cube = campaign.cube
    unknown = {
        str(s.item["id"]): why
        for s in near
        if cube.brdf != "none" and load_source(str(s.item["source"])).kind == "optical"
        and (why := view_unknown(s.item)) is not None
    }  # fmt: skip
    return {
        "tile": tile.name,
        "crs": str(tile.geobox.crs),
        "transform": [float(v) for v in tile.geobox.affine[:6]],
        "shape": list(tile.geobox.shape),
        "clear_pct": clear_pct,
        "settings": json.dumps(cube.model_dump(mode="json", exclude={"periods"}), sort_keys=True),
        "brdf_not_applied": json.dumps(unknown, sort_keys=True),
        "digests": json.dumps(digests, sort_keys=True),
        "digest": digest,
    }
