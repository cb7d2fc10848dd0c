"""The source table: what Terraloom knows of each collection before it has seen an item.

One YAML file per source in ``acquire/sources/``; the file name is the key used in campaigns. A
campaign may also name a file of its own, which has the same keys. Items may say more (scale,
offset, nodata, resolution); what they say goes before the table.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from terraloom.config.base import Section
from terraloom.errors import ConfigError

__all__ = [
    "BandTable", "LayerTable", "Provider", "SourceTable", "load_source", "source_keys",
    "sources_text",
]  # fmt: skip

Unit = Literal["reflectance", "power", "dB", "m", "index", "1"]
Codes = Literal["scl", "qa_pixel", "qa_radsat", "fmask", "hls_fmask", "modis_reliability"]

_UNITS = {"1": "value"}

#: Common name of the STAC eo extension: the Sentinel-2 band that plays the same part.
ROLES = {
    "coastal": "B01", "blue": "B02", "green": "B03", "red": "B04", "nir": "B08", "nir08": "B8A",
    "nir09": "B09", "cirrus": "B10", "swir16": "B11", "swir22": "B12",
    "rededge071": "B05", "rededge075": "B06", "rededge078": "B07",
}  # fmt: skip


class BandTable(Section):
    """One band of a source."""

    assets: list[str] = Field(min_length=1, description="Asset keys, the first found is used.")
    band: int = Field(1, ge=1, description="Number of the band in its file, from 1.")
    resolution_m: float = Field(gt=0, description="Native pixel size (metres).")
    group: str = Field(description="Modality: bands of one sensor and pixel size, like s2_10.")
    common_name: str = Field("", description="Common name of the STAC eo extension.")
    center_wavelength_um: float | None = Field(None, description="Centre (micrometres).")

    @field_validator("group")
    @classmethod
    def _named(cls, group: str) -> str:
        size = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*_([1-9][0-9]*)", group)
        if size is None or int(size[1]) % 10 or 480 % int(size[1]):
            raise ValueError(
                f"group {group!r} does not end in a pixel size that fits the tiles: _10, _20, _30, "
                "_40, _60, _80, _120, _160, _240 or _480 (metres)"
            )
        return group


class LayerTable(Section):
    """A classification or quality layer of the product; read with nearest neighbour only."""

    assets: list[str] = Field(min_length=1, description="Asset keys, the first found is used.")
    band: int = Field(1, ge=1, description="Number of the band in its file, from 1.")
    resolution_m: float = Field(gt=0, description="Native pixel size (metres).")
    codes: Codes = Field(description="What its numbers mean; see terraloom.preprocess.layers.")
    nodata: float = Field(0, description="Code that means no data.")


class Provider(Section):
    """One catalogue that serves a source."""

    catalogue: str = Field(description="URL of a STAC API, or path or URL of a catalog.json.")
    collection: str = Field(description="Id of the collection there.")
    sign: str | None = Field(None, description="Hook that signs its addresses.")


class SourceTable(Section):
    """What is known of a source.

    Attributes:
        key: Name of the source in campaigns.
        collection: Id of the collection in catalogues that no provider describes.
        providers: Catalogues that serve the source; the first is the default. None where no
            archive serves pixels that can be read as they are.
        static: One record for all time, such as a DEM; periods do not apply.
        unit: What ``stored * scale + offset`` means.
        offset_rule: ``fixed``, or ``sentinel-2``: decided per item.
        nodata: Stored value that means missing.
        resampling: Method of the one warp of continuous bands.
        layers: Classification and quality layers of the product.
        mask_resolution_m: Pixel size that masks are made at.
        href_rewrite: Beginnings of asset addresses and what to put in their place.
    """

    key: str
    title: str
    kind: Literal["optical", "sar", "index", "polsar", "dem", "other"]
    collection: str
    providers: dict[str, Provider] = Field(default_factory=dict)
    attribution: str = ""
    note: str = ""
    static: bool = False
    unit: Unit
    scale: float = Field(1.0, gt=0)
    offset: float = 0.0
    offset_rule: Literal["fixed", "sentinel-2"] = "fixed"
    nodata: float
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = "bilinear"
    bands: dict[str, BandTable] = Field(min_length=1)
    layers: dict[str, LayerTable] = Field(default_factory=dict)
    mask_resolution_m: int = Field(20, gt=0)
    href_rewrite: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> SourceTable:
        both = sorted(set(self.bands) & set(self.layers))
        if both:
            raise ValueError(f"{', '.join(both)} is both a band and a layer")
        return self

    @property
    def catalogue(self) -> str | None:
        """Catalogue of the first provider; None where the campaign has to name one."""
        return next((p.catalogue for p in self.providers.values()), None)

    def provider(
        self,
        name: str | None = None,
        catalogue: str | None = None,
        collection: str | None = None,
        *,
        where: str = "sources[]",
    ) -> Provider:
        """Where the items come from: a provider of the table, or the campaign's own catalogue.

        Args:
            name: Provider; default: the one whose catalogue is given, else the first.
            catalogue: Catalogue of the campaign, in place of the provider's.
            collection: Collection of the campaign, in place of the provider's.
            where: Key of the campaign, for errors.

        Raises:
            ConfigError: No such provider, or no catalogue at all.
        """
        if name is not None and name not in self.providers:
            raise ConfigError(
                f"source {self.key} has no provider {name!r}",
                where=f"{where}.provider",
                allowed=", ".join(self.providers) or "(none)",
                fix="correct it, leave it out, or name a catalogue of your own in "
                "sources[].catalogue",
            )
        if name is None and catalogue is None:
            name = next(iter(self.providers), None)
            if name is None:
                raise ConfigError(
                    f"source {self.key} has no catalogue of its own",
                    where=f"{where}.catalogue",
                    allowed="URL of a STAC API or path of a catalog.json",
                    fix=self.note or "name one",
                )
        if name is None:
            same = [p for p in self.providers.values() if _same(p.catalogue, str(catalogue))]
            known = same[0] if same else None
        else:
            known = self.providers[name]
        return Provider(
            catalogue=catalogue or (known.catalogue if known else ""),
            collection=collection or (known.collection if known else self.collection),
            sign=known.sign if known else None,
        )

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

    def band(self, key: str) -> BandTable | LayerTable:
        """Table of a band or of a layer."""
        if key in self.layers:
            return self.layers[key]
        self.choose([key])
        return self.bands[key]

    def roles(self) -> dict[str, str]:
        """Sentinel-2 band name of a spectral role: this source's band that plays it.

        Masks and co-registration know roles only, so they work for every optical sensor. Bands
        that are named like Sentinel-2 bands play their own part; others by their common name. A
        sensor with the narrow near infrared only (Landsat) plays the wide one (B08) with it too.
        """
        names = {*ROLES.values(), "B05", "B06", "B07"}
        found = {b: b for b in self.bands if b in names and self.bands[b].group.startswith("s2_")}
        found = found or {
            ROLES[t.common_name]: b for b, t in self.bands.items() if t.common_name in ROLES
        }
        if "B08" not in found and "B8A" in found:
            # First, so that who asks which role a band plays is told its own.
            found = {"B08": found["B8A"], **found}
        return found


def source_keys() -> list[str]:
    """Keys of all sources, sorted."""
    folder = files("terraloom.acquire").joinpath("sources")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load_source(key: str) -> SourceTable:
    """Table of a source.

    Args:
        key: One of :func:`source_keys`, or the path of a table of your own (``.yaml``), from the
            working directory.

    Raises:
        ConfigError: No such source; the message lists those there are. Or a table that is not
            valid; the message names the keys.
    """
    if key.endswith((".yaml", ".yml")):
        path = Path(key)
        try:
            changed = path.stat().st_mtime_ns
        except OSError as err:
            raise ConfigError(
                f"the source table cannot be read ({err.strerror})",
                where=f"sources[].source {key}",
                allowed="a key of docs/reference/sources.md, or the path of a source table",
                fix="correct the path; it starts at the project folder",
            ) from err
        return _own(key, Path.cwd() / path, changed)
    return _built_in(key)


@lru_cache(maxsize=32)
def _own(key: str, path: Path, changed: int) -> SourceTable:  # a changed file is read again
    return _read_table(key, path)


@lru_cache(maxsize=32)
def _built_in(key: str) -> SourceTable:
    keys = source_keys()
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        raise ConfigError(
            f"there is no source {key!r}",
            where="sources[].source",
            allowed=", ".join(keys) + ", or the path of a source table (.yaml)",
            fix=f"did you mean {near[0]!r}?" if near else "use one of these keys",
        )
    return _read_table(key, files("terraloom.acquire").joinpath("sources", f"{key}.yaml"))


def _read_table(key: str, path: Traversable) -> SourceTable:
    try:
        return SourceTable(key=key, **yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as err:
        wrong = [
            f"{'.'.join(map(str, e['loc'])) or 'table'}: {e['msg'].removeprefix('Value error, ')}"
            for e in err.errors()
        ]
        found = "; ".join(wrong)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as err:
        found = " ".join(str(err).split())
    raise ConfigError(
        f"the source table is not valid: {found}",
        where=key,
        allowed="the keys of docs/how-to/add-a-source.md",
        fix="correct the table",
    )


def _same(a: str, b: str) -> bool:
    return a.rstrip("/") == b.rstrip("/")


def sources_text() -> str:
    """Markdown page of all sources, for ``docs/reference/sources.md``."""
    lines = [
        "# Sources", "", "Generated from `src/terraloom/acquire/sources/*.yaml`. A source that is "
        "not here: [add it](../how-to/add-a-source.md).", "",
    ]  # fmt: skip
    for key in source_keys():
        lines += [*_section(load_source(key)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(s: SourceTable) -> list[str]:
    rule = " + offset decided per item" if s.offset_rule == "sentinel-2" else f" + {s.offset:g}"
    stored = f"{_UNITS.get(s.unit, s.unit)} = stored x {s.scale:g}{rule}"
    if s.unit == "power":
        stored = "linear power, resampled and averaged as power, read as decibels"
    lines = [
        f"## `{s.key}`", "", f"{s.title}. {s.note}".rstrip(), "",
        f"- collection: `{s.collection}`",
        f"- values: {stored}; nodata {s.nodata:g}; resampling {s.resampling}",
        f"- attribution: {s.attribution}", "",
    ]  # fmt: skip
    if s.providers:
        lines += ["| provider | catalogue | collection | signed by |", "|---|---|---|---|"]
        lines += [
            f"| `{n}` | {p.catalogue} | `{p.collection}` | {p.sign or ''} |"
            for n, p in s.providers.items()
        ] + [""]
    else:
        lines += ["No provider: give `sources[].catalogue`.", ""]
    lines += [
        "| band | assets | pixel (m) | group | common name | centre (um) |",
        "|---|---|---|---|---|---|",
    ]
    for name, b in s.bands.items():
        centre = "" if b.center_wavelength_um is None else f"{b.center_wavelength_um:g}"
        lines.append(
            f"| `{name}` | {', '.join(b.assets)} | {b.resolution_m:g} | `{b.group}` | "
            f"{b.common_name} | {centre} |"
        )
    for name, layer in s.layers.items():
        lines.append(
            f"| `{name}` | {', '.join(layer.assets)} | {layer.resolution_m:g} | "
            f"layer of codes `{layer.codes}`, no data {layer.nodata:g} | | |"
        )
    return lines
