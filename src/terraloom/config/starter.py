"""``terraloom init``: a commented campaign file for a new region."""

from __future__ import annotations

import re
from pathlib import Path

from terraloom.errors import AoiError, ConfigError
from terraloom.io import write_text

__all__ = ["write_starter"]

_TEXT = """\
# yaml-language-server: $schema=../schema.json
# Every key is explained in config/README.md. Check this file with: terraloom check {path}
name: {name}
title: Land cover {year}
seed: 1

# What to map: a polygon file in any coordinate system, or a bounding box in degrees.
aoi:
{aoi}

# Where the scenes come from. `terraloom check` lists the sources it knows when one is misspelt.
sources:
  - source: sentinel-2-l2a
    max_cloud_pct: 60

masks:
  methods: [auto]      # the product's own layer where there is one, else tests of the spectrum
  dilation_m: 60       # width of the edge taken off around clouds, metres

# One masked median composite per period. Choose them by what your classes do over the year.
cube:
  periods:
    - {{name: spring, start: {year}-03-15, end: {year}-05-31}}
    - {{name: summer, start: {year}-06-01, end: {year}-08-31}}
    - {{name: autumn, start: {year}-09-01, end: {year}-10-31}}

tasks:
  - name: land_cover
    kind: segmentation
    classes: config/classes/{name}.csv   # columns code,name,color (#rrggbb)
    labels:
      file: {labels}
      column: {column}
      # mapping: {{wheat: cropland}}     # value in your file: class of the legend
      # drop: [unknown]                # values to leave out

# Held-out blocks: larger than the distance over which neighbouring pixels look alike.
folds:
  count: 4
  block_m: 2560
"""


def write_starter(aoi: str, out: Path, *, labels: str, column: str, year: int) -> Path:
    """Write a campaign file.

    Args:
        aoi: A vector file, or ``west,south,east,north`` in degrees.
        out: File to write; must not exist yet.
        labels: Vector file with labels.
        column: Column with the class.
        year: Year to map.

    Raises:
        AoiError: The AOI is neither a readable file nor four numbers.
        ConfigError: ``out`` exists, or its name cannot be that of a campaign.
    """
    if out.exists():
        raise ConfigError("the file exists already", where=str(out), fix="choose another --out")
    name = out.stem.lower().replace(" ", "-")
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name):
        raise ConfigError(
            f"{name!r} cannot be the name of a campaign", where=str(out),
            allowed="a letter, then at most 39 lower-case letters, digits, - or _",
            fix="choose another --out",
        )  # fmt: skip
    parts = aoi.split(",")
    if len(parts) == 4:
        try:
            west, south, east, north = (float(p) for p in parts)
        except ValueError as err:
            raise AoiError(f"{aoi!r} is not four numbers", where="aoi") from err
        if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
            raise AoiError(
                f"{aoi} is not west < east, south < north in degrees", where="aoi",
                allowed="longitude -180..180, latitude -90..90",
            )  # fmt: skip
        block = f"  bbox: [{west:g}, {south:g}, {east:g}, {north:g}]"
    else:
        from terraloom.aoi import read_aoi

        read_aoi(aoi, None, "")
        block = f"  file: {aoi}"
    text = _TEXT.format(path=out, name=name, aoi=block, labels=labels, column=column, year=year)
    write_text(out, text)
    return out
