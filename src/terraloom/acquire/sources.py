"""The source table: what Terraloom knows of each collection before it has seen an item.

One YAML file per source in ``acquire/sources/``; the file name is the key used in campaigns. Items
may say more (scale, offset, nodata, resolution); what they say goes before the table.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from terraloom.config.base import Section
from terraloom.errors import ConfigError

__all__ = ["BandTable", "SourceTable", "load_source", "source_keys", "sources_text"]

Unit = Literal["reflectance", "power", "dB", "m"]


class BandTable(Section):
    """One band, or one classification layer, of a source."""

    assets: list[str] = Field(min_length=1, description="Asset keys, the first found is used.")
    resolution_m: float = Field(gt=0, description="Native pixel size (metres).")
    group: str = Field(description="Modality: bands of one sensor and resolution, like s2_10.")
    common_name: str = Field("", description="Common name of the STAC eo extension.")
    center_wavelength_um: float | None = Field(None, description="Centre (micrometres).")


class SourceTable(Section):
    """What is known of a source.

    Attributes:
        key: Name of the source in campaigns.
        catalogue: Default STAC API; none where no open one serves the pixels.
        static: One record for all time, such as a DEM; periods do not apply.
        unit: What ``stored * scale + offset`` means.
        offset_rule: ``fixed``, or ``sentinel-2``: decided per item.
        nodata: Stored value that means missing.
        resampling: Method of the one warp of continuous bands.
        scl: Scene classification layer, read with nearest neighbour only.
        href_rewrite: Beginnings of asset addresses and what to put in their place.
    """

    key: str
    title: str
    kind: Literal["optical", "sar", "dem"]
    catalogue: str | None = None
    collection: str
    attribution: str = ""
    note: str = ""
    static: bool = False
    unit: Unit
    scale: float = 1.0
    offset: float = 0.0
    offset_rule: Literal["fixed", "sentinel-2"] = "fixed"
    nodata: float
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = "bilinear"
    bands: dict[str, BandTable] = Field(min_length=1)
    scl: BandTable | None = None
    href_rewrite: dict[str, str] = Field(default_factory=dict)

    def choose(self, bands: list[str] | None, *, where: str = "sources[].bands") -> list[str]:
        """Band keys in the table's order; all of them when ``bands`` is None.

        Raises:
            ConfigError: A band the source does not have.
        """
        if bands is None:
            return list(self.bands)
        unknown = [b for b in bands if b not in self.bands]
        if unknown or not bands:
            raise ConfigError(
                f"source {self.key} has no band {', '.join(unknown)}" if unknown else "no band",
                where=where,
                allowed=", ".join(self.bands),
                fix="correct the list, or leave it out to use all bands",
            )
        return [b for b in self.bands if b in bands]

    def band(self, key: str) -> BandTable:
        """Table of a band, or of the classification layer under the key ``SCL``."""
        if key == "SCL" and self.scl is not None:
            return self.scl
        self.choose([key])
        return self.bands[key]


def source_keys() -> list[str]:
    """Keys of all sources, sorted."""
    folder = files("terraloom.acquire").joinpath("sources")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


@lru_cache(maxsize=32)
def load_source(key: str) -> SourceTable:
    """Table of a source.

    Raises:
        ConfigError: No such source; the message lists those there are.
    """
    keys = source_keys()
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        raise ConfigError(
            f"there is no source {key!r}",
            where="sources[].source",
            allowed=", ".join(keys),
            fix=f"did you mean {near[0]!r}?" if near else "use one of these keys",
        )
    path = files("terraloom.acquire").joinpath("sources", f"{key}.yaml")
    try:
        return SourceTable(key=key, **yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, TypeError) as err:
        raise ConfigError(f"the source table is damaged: {err}", where=f"{key}.yaml") from err


def sources_text() -> str:
    """Markdown page of all sources, for ``docs/reference/sources.md``."""
    lines = ["# Sources", "", "Generated from `src/terraloom/acquire/sources/*.yaml`.", ""]
    for key in source_keys():
        s = load_source(key)
        stored = {
            "reflectance": f"reflectance = stored x {s.scale:g} + offset",
            "power": "linear power, read as decibels",
        }.get(s.unit, f"{s.unit} = stored x {s.scale:g} + {s.offset:g}")
        rule = "; offset decided per item" if s.offset_rule == "sentinel-2" else ""
        lines += [
            f"## `{key}`", "", f"{s.title}. {s.note}", "",
            f"- catalogue: {s.catalogue or 'none; give `sources[].catalogue`'}",
            f"- collection: `{s.collection}`",
            f"- values: {stored}{rule}; nodata {s.nodata:g}",
            f"- attribution: {s.attribution}", "",
            "| band | assets | pixel (m) | group | common name | centre (um) |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        layers = {**s.bands, **({"SCL": s.scl} if s.scl else {})}
        for name, b in layers.items():
            centre = "" if b.center_wavelength_um is None else f"{b.center_wavelength_um:g}"
            lines.append(
                f"| `{name}` | {', '.join(b.assets)} | {b.resolution_m:g} | `{b.group}` | "
                f"{b.common_name} | {centre} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
