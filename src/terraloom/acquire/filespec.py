"""The file that describes the local files of a source: what ``terraloom import-files`` reads."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from terraloom.acquire.sources import Codes, Unit
from terraloom.config.base import Section
from terraloom.config.load import read_yaml
from terraloom.errors import ConfigError

__all__ = ["BandSpec", "LayerSpec", "LocalSource", "Rule", "read_spec"]

BandKey = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,39}$")]
_GROUPS = {"date", "band", "item"}


class BandSpec(Section):
    """What is known of a band."""

    common_name: str = Field("", description="Common name of the STAC eo extension, like red.")
    center_wavelength_um: float | None = Field(None, gt=0, description="Centre (micrometres).")
    scale: float | None = Field(None, description="Only where it differs from the source's.")
    offset: float | None = Field(None, description="Only where it differs from the source's.")


class LayerSpec(Section):
    """What is known of a classification or quality layer."""

    codes: Codes = Field(description="What its numbers mean.")
    nodata: int = Field(0, description="Code that means no data.")
    recode: dict[int, int] = Field(
        default_factory=dict,
        description="Number in the file: number of `codes`; numbers not named become no data.",
    )


class Rule(Section):
    """Which files, and how their bands, dates and places are told."""

    path: str | None = Field(
        None, description="Files, with wildcards (* ? [] **); from the folder of the spec."
    )
    table: str | None = Field(
        None,
        description="Instead of `path`: CSV with columns path and, where needed, date, band, item, "
        "cloud_pct; paths from the folder of the table.",
    )
    pattern: str | None = Field(
        None,
        description="Regular expression with named groups date, band, item, searched in the path "
        "below the last folder without wildcard.",
    )
    date_format: str | None = Field(
        None,
        description="Format of dates by strptime; default: 2018-05-01, 20180501, 2018121 (day of "
        "year) or 20180501T103021 are told apart.",
    )
    date: datetime | None = Field(None, description="Date of all files of this rule.")
    dates: list[datetime] | str | None = Field(
        None,
        description="The bands of each file are dates: the list of them, or a text file with one "
        "a line.",
    )
    time: str | None = Field(
        None, pattern=r"^\d\d:\d\d$", description="Time of day, UTC, where only dates are known."
    )
    item: str | None = Field(None, description="Tells apart several items of one date.")
    bands: dict[BandKey, int | str] | Literal["wavelengths"] | None = Field(
        None,
        description="Band or layer key: number of the band in the file, or name of the variable, "
        "or text found by the group `band`. `wavelengths`: all bands, named by wavelength.",
    )
    format: Literal["raster", "polsarpro"] = Field(
        "raster", description="`polsarpro`: `path` names folders with T3, C3 or C2 matrices."
    )
    crs: str | None = Field(None, description="Only for files without coordinate system.")
    transform: tuple[float, float, float, float, float, float] | None = Field(
        None,
        description="Only for files without: pixel width, 0, left edge, 0, -pixel height, top.",
    )

    @field_validator("pattern")
    @classmethod
    def _regex(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = set(re.compile(value).groupindex)
        except re.error as err:
            raise ValueError(f"not a regular expression ({err})") from err
        if not groups or groups - _GROUPS:
            raise ValueError("needs named groups among (?P<date>..), (?P<band>..), (?P<item>..)")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Rule:
        if (self.path is None) == (self.table is None):
            raise ValueError("give either path or table")
        if self.dates is not None and (self.date is not None or self.bands == "wavelengths"):
            raise ValueError("`dates` says that bands are dates: no `date`, no wavelengths")
        return self


class LocalSource(Section):
    """One source made of local files: one sensor or product."""

    title: str = Field(description="What the data are.")
    kind: Literal["optical", "sar", "index", "polsar", "dem", "other"]
    unit: Unit = Field(description="Unit of stored * scale + offset.")
    scale: float | None = Field(None, description="Default: as the files say, else 1.")
    offset: float | None = Field(None, description="Default: as the files say, else 0.")
    nodata: float | None = Field(
        None, description="Stored value that means missing; default: as the files say."
    )
    static: bool = Field(False, description="One record for all time: elevation, LiDAR (yes/no).")
    sensor: str | None = Field(
        None, pattern=r"^[a-z][a-z0-9]{0,15}$",
        description="Beginning of group names, like s2 in s2_10; default: name of the folder.",
    )  # fmt: skip
    cube_m: Literal[10, 20, 30, 40, 60, 80, 120, 160, 240, 480] | None = Field(
        None, description="Pixel size in the cube (metres); default: the nearest to the files'."
    )
    mask_resolution_m: int | None = Field(
        None, gt=0, description="Pixel size of masks (metres); default: that of layers, or bands."
    )
    resampling: Literal["nearest", "bilinear", "cubic", "average"] = "bilinear"
    licence: str = Field("other", description="Licence of the data, SPDX name or `other`.")
    attribution: str = Field("", description="Who is to be named with maps of the data.")
    note: str = Field("", description="What readers of the table should know.")
    start: datetime | None = Field(None, description="Earlier dates are left out.")
    end: datetime | None = Field(None, description="Later days are left out.")
    empty: Literal["stop", "skip"] = Field(
        "stop", description="What to do with a band of which every pixel is missing."
    )
    bands: dict[BandKey, BandSpec] = Field(default_factory=dict)
    layers: dict[BandKey, LayerSpec] = Field(default_factory=dict)
    files: list[Rule] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> LocalSource:
        both = set(self.bands) & set(self.layers)
        if both:
            raise ValueError(f"{', '.join(sorted(both))} stands under bands and under layers")
        known = set(self.bands) | set(self.layers)
        for n, rule in enumerate(self.files):
            named = set(rule.bands) if isinstance(rule.bands, dict) else set()
            if known and named - known:
                raise ValueError(
                    f"files.{n}.bands: {', '.join(sorted(named - known))} is neither under bands "
                    "nor under layers"
                )
        return self


def read_spec(path: Path | str) -> LocalSource:
    """Read and validate the description of a source of local files.

    Raises:
        ConfigError: All problems at once, each with its key.
    """
    data = read_yaml(path)
    try:
        return LocalSource.model_validate(data)
    except ValidationError as err:
        lines = []
        for e in err.errors():
            key = ".".join(str(p) for p in e["loc"] if not str(p).startswith("function-"))
            lines.append(f"key `{key or '(whole file)'}`: {e['msg'].removeprefix('Value error, ')}")
        raise ConfigError(
            lines[0] if len(lines) == 1 else "\n  ".join(["several problems", *lines]),
            where=str(path),
            allowed="the keys of docs/how-to/local-files.md",
            fix="correct the file",
        ) from err
