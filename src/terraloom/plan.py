"""The plan of a run: which files each milestone has, which tiles and jobs there are.

Everything here is known from the campaign file alone, so that a dry run shows the whole plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from terraloom.aoi import campaign_grid
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.config.load import parse_campaign, read_yaml
from terraloom.errors import ConfigError
from terraloom.grid import CampaignGrid, Tile
from terraloom.io import digest_json, write_text
from terraloom.origin import PINNED, map_digest

__all__ = [
    "CUBES", "SUFFIXES", "TILES", "Plan", "Resolved", "campaign_values", "check_pinned",
    "forget_pin", "product_names", "product_path", "product_suffix", "resolve_campaign",
]  # fmt: skip

#: Stores of tiles: their cubes, and what is predicted.
CUBES, TILES = Path("work/cube"), Path("work/predict")

#: From a tile to its neighbours.
STEPS = (-1, 0, 1)

#: More tiles than this are indexed in a GeoPackage: a VRT is read whole whenever it is opened.
VRT_TILES = 1000
#: How the file of a product may end: one raster, or an index of rasters (see `Products.layout`).
SUFFIXES = (".tif", ".vrt", ".gti.gpkg")

#: Paths below this folder are made by the run itself, in its own folder.
RUN_MADE = "resources/"


@dataclass(frozen=True)
class Resolved:
    """A campaign's keys with all overrides merged and paths made relative to the run's folder."""

    data: dict[str, Any]

    def write(self, path: Path | str) -> None:
        """Write as YAML, only when the content differs from what is there."""
        text = yaml.safe_dump(self.data, sort_keys=True, allow_unicode=True)
        path = Path(path)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def resolve_campaign(config: Mapping[str, Any], *, project: str = ".") -> tuple[Campaign, Resolved]:
    """Campaign file plus overrides to a validated campaign.

    Args:
        config: Key ``campaign`` with the file; any other key overrides the file's.
        project: Path of the project folder from the run's folder.

    Raises:
        ConfigError: See :func:`terraloom.config.load.load_campaign`.
    """
    overrides = dict(config)
    file = overrides.pop("campaign", None)
    if not isinstance(file, str):
        raise ConfigError(
            "no campaign is named", where="campaign",
            fix="snakemake --config campaign=config/campaigns/havel.yaml",
        )  # fmt: skip
    path = Path(file) if Path(file).exists() else Path(project) / file
    data = _merged(read_yaml(path), overrides)
    parse_campaign(data, where=str(file))
    data = _from_run_folder(data, project)
    return parse_campaign(data, where=str(file)), Resolved(data)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        out[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return out


def _from_run_folder(data: dict[str, Any], project: str) -> dict[str, Any]:
    """Prefix the path keys with the project folder, except what the run itself makes."""

    def path(value: str | None) -> str | None:
        if value is None or value.startswith((RUN_MADE, "/")) or "://" in value:
            return value
        return os.path.normpath(Path(project) / value)

    data = json.loads(json.dumps(data, default=str))
    aoi = data.get("aoi", {})
    if "file" in aoi:
        aoi["file"] = path(aoi["file"])
    archive = data.get("archive", {})
    if "files" in archive:
        archive["files"] = {name: path(file) for name, file in archive["files"].items()}
    reference = data.get("coregister", {}).get("reference", "mean")
    if reference not in ("mean", "clearest", "median"):
        data["coregister"]["reference"] = path(reference)
    for source in data.get("sources", []):
        if "catalogue" in source:
            source["catalogue"] = path(source["catalogue"])
        if str(source.get("source", "")).endswith((".yaml", ".yml")):
            source["source"] = path(source["source"])
    for task in data.get("tasks", []):
        if "classes" in task:
            task["classes"] = path(task["classes"])
        task["labels"]["file"] = path(task["labels"]["file"])
    for section, key in (("folds", "regions"), ("model", "weights"), ("regions", "file")):
        if (data.get(section) or {}).get(key):
            data[section][key] = path(data[section][key])
    sample = data.get("sample") or {}
    for key in ("strata", "drawn", "answers"):
        given = sample.get(key)
        if isinstance(given, list):
            sample[key] = [path(file) for file in given]
        elif given and given != "truth":
            sample[key] = path(given)
    return data


def check_pinned(campaign: Campaign, run_dir: Path = Path()) -> None:
    """Refuse the model of another release than the one the campaign names.

    Raises:
        ConfigError: ``milestones.model`` names a release, and ``results/model`` is not of it.
    """
    wanted = campaign.milestones.model
    if wanted in ("build", "frozen"):
        return
    path = run_dir / "results/model" / PINNED
    found = json.loads(path.read_text(encoding="utf-8"))["release"] if path.is_file() else None
    if found != wanted:
        there = f"of release {found}" if found else "not pinned" if path.parent.exists() else "none"
        raise ConfigError(
            f"the campaign wants the model of release {wanted}; here it is: {there}",
            where="milestones.model", allowed="build, frozen, or the name of a release",
            fix=f"terraloom pin model {wanted}",
        )  # fmt: skip


def forget_pin(campaign: Campaign, run_dir: Path = Path()) -> None:
    """The model is built again, so it is that of no release."""
    if campaign.milestones.model == "build":
        (run_dir / "results/model" / PINNED).unlink(missing_ok=True)


def product_names(campaign: Campaign) -> list[str]:
    """Names of the rasters of the map, in the order people look at them."""
    tasks = [t.name for t in campaign.tasks if t.kind is not TaskKind.SEGMENTATION]
    sieved = ["class_map_mmu"] if campaign.products.minimum_mapping_unit_ha > 0 else []
    sets = ["conformal_set"] if campaign.uncertainty.sets else []
    known = ["applicability"] if campaign.uncertainty.applicability else []
    return [
        "class_map", *sieved, "probabilities", "uncertainty", *sets, *known, *tasks, "reasons",
        "image",
    ]  # fmt: skip


def product_suffix(campaign: Campaign, name: str, tiles: int) -> str:
    """How the file of a product ends: ``.tif``, or that of an index over its tiles.

    The sieved map is one raster always: a patch may lie in any number of tiles.
    """
    if campaign.products.layout == "mosaic" or name == "class_map_mmu":
        return ".tif"
    index = campaign.products.index
    return ".vrt" if index == "vrt" or (index == "auto" and tiles <= VRT_TILES) else ".gti.gpkg"


def product_path(name: str, folder: Path | str = Path("results/map")) -> Path:
    """The file of a product that is there, whatever the layout; GDAL reads all of them alike.

    Args:
        name: Name of the product, such as ``class_map``.
        folder: Folder of the map.

    Returns:
        The file with one of :data:`SUFFIXES`; the first of them where none is there.
    """
    files = [Path(folder) / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((f for f in files if f.is_file()), files[0])


def campaign_values(campaign: Campaign, dotted: Sequence[str]) -> dict[str, Any]:
    """Values of campaign keys such as ``grid.crs``, by key."""

    def value(key: str) -> Any:
        found: Any = campaign.model_dump(mode="json")
        for part in key.split("."):
            found = [v[part] for v in found] if isinstance(found, list) else found[part]
        return found

    return {key: value(key) for key in dotted}


@dataclass(frozen=True)
class Plan:
    """Files and jobs of a campaign."""

    campaign: Campaign
    grid: CampaignGrid

    @classmethod
    def of(cls, campaign: Campaign) -> Plan:
        """Plan of a campaign; needs no data, only the AOI."""
        return cls(campaign, campaign_grid(campaign))

    @cached_property
    def batches(self) -> dict[str, list[Tile]]:
        """Tiles of each job."""
        return self.grid.batches(self.campaign.grid.tiles_per_job)

    @property
    def batch_names(self) -> list[str]:
        """Jobs of tiles."""
        return list(self.batches)

    @property
    def part_names(self) -> list[str]:
        """Strips of the AOI that scenes are masked in."""
        return [f"p{i:03d}" for i in range(self.campaign.scenes.jobs)]

    @property
    def period_names(self) -> list[str]:
        """Periods of time that scenes are masked in."""
        return [p.name for p in self.campaign.cube.periods]

    @property
    def catalogue_files(self) -> list[str]:
        """Local catalogues that must be there before the item search."""
        named = (s.catalogue for s in self.campaign.sources)
        return sorted({c for c in named if c and "://" not in c})

    @property
    def table_files(self) -> list[str]:
        """Source tables of the campaign's own."""
        return sorted({s.source for s in self.campaign.sources if "." in s.source})

    @property
    def reference_files(self) -> list[str]:
        """Image that scenes are aligned to."""
        reference = self.campaign.coregister.reference
        return [] if reference in ("mean", "clearest", "median") else [reference]

    @property
    def label_files(self) -> list[str]:
        """Files with labels, legends or the regions of folds."""
        tasks, regions = self.campaign.tasks, self.campaign.folds.regions
        files = {t.labels.file for t in tasks} | {t.classes for t in tasks if t.classes}
        return sorted(files | ({regions} if regions else set()))

    @property
    def weight_files(self) -> list[str]:
        """Pre-trained weights that networks start from."""
        return [self.campaign.model.weights] if self.campaign.model.weights else []

    @property
    def answer_files(self) -> list[str]:
        """Files that answer the probability sample."""
        sample = self.campaign.sample
        if sample is None:
            return []
        if sample.answers == "truth":
            return ["resources/simulated/truth/truth.json"]
        return sample.answer_paths

    @property
    def sample_files(self) -> list[str]:
        """Files that the draw of the sample reads besides the map."""
        sample = self.campaign.sample
        if sample is None:
            return []
        drawn = sample.drawn
        if drawn and not drawn.lower().endswith((".gpkg", ".geojson", ".json", ".shp", ".csv")):
            return [f"{drawn}/sample.gpkg", f"{drawn}/design.json"]
        return [f for f in (sample.strata, drawn) if f]

    @property
    def product_files(self) -> list[str]:
        """Rasters of the map milestone."""
        tiles = len(self.grid.tiles())
        return [
            f"results/map/{name}{product_suffix(self.campaign, name, tiles)}"
            for name in product_names(self.campaign)
        ]

    @property
    def polygon_files(self) -> list[str]:
        """Polygons of the class map."""
        return ["results/map/class_map.gpkg"] if self.campaign.products.vector else []

    @property
    def trust_files(self) -> list[str]:
        """Files of the model that say how far its predictions can be trusted."""
        wanted, folder = self.campaign.uncertainty, "results/model"
        sets = [f"{folder}/conformal.json"] if wanted.sets else []
        known = [f"{folder}/applicability.{end}" for end in ("safetensors", "json")]
        return sets + (known if wanted.applicability else [])

    @property
    def milestones(self) -> dict[str, list[str]]:
        """Files that stand when a milestone is done."""
        final = [f"results/map/{n}" for n in ("map.json", "tiles.csv", "areas.csv", "metrics.json")]
        if self.campaign.archive.kind == "simulated":
            final.append("results/map/scoreboard.json")
        if self.campaign.sample is not None:
            final.append("results/map/labelling.html")
        if self.campaign.regions:
            final += [f"results/map/regions.{end}" for end in ("csv", "gpkg", "json")]
        return {
            "scenes": [
                "results/scenes/items.json", "results/scenes/shifts.json",
                "results/scenes/quality.csv", "results/scenes/metrics.json",
            ],
            "chips": [
                "results/chips/chips.zip", "results/chips/folds.gpkg",
                "results/chips/labels.json", "results/chips/metrics.json",
            ],
            "model": [
                "results/model/calibration.json", "results/model/held_out.json",
                "results/model/metrics.json",
                *self.trust_files,
            ],
            "map": [*self.product_files, *self.polygon_files, *final],
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """Digest of all keys of the campaign, for what prints them."""
        return digest_json(self.campaign.model_dump(mode="json"))

    @property
    def map_digest(self) -> str:
        """Digest of the keys that the pixels of the map depend on, which its files carry."""
        return map_digest(self.campaign)

    def keys(self, *dotted: str) -> str:
        """The values of campaign keys as compact JSON, for the params of a rule."""
        return json.dumps(campaign_values(self.campaign, dotted), sort_keys=True, default=str)

    def around(self, batch: str) -> list[str]:
        """Jobs whose tiles are, or touch, the tiles of a job: prediction reads across borders."""
        near = {
            self._batch_at[place]
            for tile in self.batches[batch]
            for place in ((tile.column + dx, tile.row + dy) for dx in STEPS for dy in STEPS)
            if place in self._batch_at
        }
        return sorted(near, key=lambda name: int(name[1:]))

    @cached_property
    def _batch_at(self) -> dict[tuple[int, int], str]:
        """Job of the tile in a column and row."""
        return {(t.column, t.row): name for name, tiles in self.batches.items() for t in tiles}

    def summary(self) -> str:
        """What will be done, in a few lines."""
        c, tiles = self.campaign, self.grid.tiles()
        h, w = self.grid.geobox.shape
        networks = c.folds.count * c.model.members
        mpx = h * w / 1e6
        return (
            f"Campaign {c.name}: {c.title}\n"
            f"  grid {w} x {h} px of {self.grid.resolution_m:g} m ({mpx:.1f} Mpx), "
            f"{len(tiles)} tiles in {len(self.batch_names)} jobs\n"
            f"  periods {', '.join(p.name for p in c.cube.periods)}; tasks "
            f"{', '.join(f'{t.name} ({t.kind.value})' for t in c.tasks)}\n"
            f"  {networks} networks ({c.folds.count} folds x {c.model.members} members)"
        )

    def where_to_look(self) -> str:
        """The final line of a run."""
        folder = Path.cwd()
        lines = [f"Campaign {self.campaign.name} is done."]
        for what, file in (
            ("report", "results/map/report.html"),
            ("map", product_path("class_map").as_posix()),
            ("scoreboard", "results/map/scoreboard.json"),
        ):
            if (folder / file).exists():
                lines.append(f"  {what}: {(folder / file).as_posix()}")
        return "\n".join(lines)
