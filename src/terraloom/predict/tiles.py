"""Predicted tiles: whether they are whole, and their values product by product."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.campaign import Campaign
from terraloom.errors import StateError
from terraloom.grid import CampaignGrid, Tile
from terraloom.io import read_json, read_store
from terraloom.legend import IGNORE_INDEX, NODATA_CODE, Legend
from terraloom.plan import CUBES, TILES
from terraloom.predict.picture import Picture, paint, plan_picture
from terraloom.predict.specs import Spec

__all__ = ["check_tiles", "picture_of", "tile_reader"]

#: Tiles whose cubes are looked at for the stretch of a picture without natural colours.
_PICTURE_TILES = 64
#: Damaged tiles that an error names.
_NAMED = 5

Array = npt.NDArray[Any]


def check_tiles(
    campaign: Campaign, grid: CampaignGrid, specs: Mapping[str, Spec], tiles: Sequence[Tile]
) -> dict[str, str]:
    """Refuse predicted tiles that are missing, damaged, or not what the products need.

    Every byte of every tile is read once against its check sum, so that no product is begun
    that cannot be finished.

    Args:
        campaign: The campaign.
        grid: Its grid.
        specs: Products by name.
        tiles: Tiles to check.

    Returns:
        Digest of the inputs of each tile, by name.

    Raises:
        StateError: Names the tiles, what is wrong with each, and the files to delete.
    """
    batches = grid.batches(campaign.grid.tiles_per_job)
    batch_of = {t.name: name for name, held in batches.items() for t in held}
    listed: dict[str, str] = {}
    for name in sorted({batch_of[t.name] for t in tiles}):
        manifest = TILES / f"{name}.json"
        if manifest.is_file():
            listed |= {t: str(r["digest"]) for t, r in read_json(manifest)["tiles"].items()}
    bad: list[tuple[str, str]] = []
    found: dict[str, str] = {}
    for tile in tiles:
        wrong, digest = _fault(tile, specs, listed.get(tile.name))
        found[tile.name] = digest
        if wrong:
            bad.append((tile.name, wrong))
    if bad:
        named = "; ".join(f"{t}: {why}" for t, why in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        away = [f"{TILES}/{t}.zip" for t, _ in bad[:_NAMED]]
        away += sorted({f"{TILES}/{batch_of[t]}.json" for t, _ in bad})
        raise StateError(
            f"{len(bad)} of {len(tiles)} predicted tiles cannot be used: {named}{more}",
            where=TILES.as_posix(), allowed="whole tiles of this run",
            fix=f"rm {' '.join(away)}; then rerun: only these tiles are predicted again, and the "
            "products stay as they were until all is well",
        )  # fmt: skip
    return found


def _fault(tile: Tile, specs: Mapping[str, Spec], listed: str | None) -> tuple[str, str]:
    """What is wrong with a tile, if anything, and the digest it carries."""
    path = TILES / f"{tile.name}.zip"
    if damage := _damage(path):
        return damage, ""
    try:
        store = read_store(path)
    except (StateError, ValueError) as err:
        return str(err).splitlines()[0], ""
    digest = str(store.attrs.get("digest", ""))
    if listed is not None and digest != listed:
        return "it is of another run than its job's manifest", digest
    for name, spec in specs.items():
        variable = _variable(name)
        if variable is None:
            continue
        if variable not in store:
            return f"it has no {variable}", digest
        want = (spec.count, *tile.geobox.shape)
        shape = store[variable].shape
        if ((want[0] > 1 or len(shape) == 3) and shape != want) or shape[-2:] != want[1:]:
            return f"{variable} is {shape}, not {want}", digest
        if str(store[variable].dtype) != spec.dtype:
            return f"{variable} is {store[variable].dtype}, not {spec.dtype}", digest
    return "", digest


def _damage(path: Path) -> str:
    """What is wrong with a zip file, all its bytes read; empty where nothing is."""
    if not path.is_file():
        return "the file is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as err:
        return f"the file is damaged ({err})"
    return f"the file is damaged (check sum of {broken})" if broken else ""


def _variable(product: str) -> str | None:
    """Variable of a predicted tile that a product is made of; None: of something else."""
    if product in ("image", "class_map_mmu"):
        return None
    return "class_index" if product == "class_map" else product


def picture_of(grid: CampaignGrid) -> Picture:
    """What the image shows, settled once for all tiles: from at most 64, evenly spread."""
    tiles = grid.tiles()
    step = -(-len(tiles) // _PICTURE_TILES)
    return plan_picture(_cubes(tiles[::step]))


def _cubes(tiles: Iterable[Tile]) -> Iterator[Any]:
    for tile in tiles:
        path = CUBES / f"{tile.name}.zip"
        if damage := _damage(path):
            raise StateError(
                damage, where=path.as_posix(),
                fix="delete it and the manifest of its job (work/cube/b*.json that names it); "
                "then rerun",
            )  # fmt: skip
        yield read_store(path)


def tile_reader(name: str, legend: Legend, picture: Picture) -> Callable[[Tile], Array]:
    """Function that gives the stored values (B, H, W) of a product for a tile.

    Args:
        name: Name of the product.
        legend: Codes of the classes.
        picture: What the image shows.
    """
    codes = np.full(256, NODATA_CODE, np.uint8)
    codes[: len(legend)] = legend.codes
    codes[IGNORE_INDEX] = NODATA_CODE

    def read(tile: Tile) -> Array:
        if name == "image":
            return paint(picture, next(_cubes([tile])), tile.geobox.shape)
        values: Array = read_store(TILES / f"{tile.name}.zip")[_variable(name)].to_numpy()
        if name == "class_map":
            values = codes[values]
        return values if values.ndim == 3 else values[None]

    return read
