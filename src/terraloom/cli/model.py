"""Verbs of the chips and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terraloom.cli.base import (
    LABELS,
    MODEL,
    RUN_CAMPAIGN,
    CampaignFile,
    app,
    grid_of,
    load,
    load_to_read,
)

__all__ = [
    "align_labels", "calibrate", "cut_chips", "export_model", "fit_baseline",
    "search_settings", "train_member",
]  # fmt: skip


@app.command(rich_help_panel=LABELS)
def align_labels(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Read and align the labels and divide them into spatial folds."""
    from terraloom.labels.align import align_labels as run
    from terraloom.legend import read_legend

    c = load(campaign)
    run(c, grid_of(c), read_legend(c.land_cover.classes), Path("results/chips"))


@app.command(rich_help_panel=LABELS)
def cut_chips(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Cut the training chips."""
    from terraloom.labels.chips import cut_chips as run

    c = load(campaign)
    run(c, grid_of(c), Path("work/cube"), Path("results/chips"))


@app.command(rich_help_panel=MODEL)
def search_settings(
    fold: Annotated[int, typer.Option(help="Fold that is held out.")],
    campaign: CampaignFile = RUN_CAMPAIGN,
) -> None:
    """Search settings for the networks that do not see one fold."""
    from terraloom.train.run import search_settings as run

    run(load(campaign), fold)


@app.command(rich_help_panel=MODEL)
def train_member(
    fold: Annotated[int, typer.Option(help="Fold that is held out.")],
    member: Annotated[int, typer.Option(help="Number of the member, from 0.")],
    campaign: CampaignFile = RUN_CAMPAIGN,
) -> None:
    """Train one network that does not see one fold."""
    from terraloom.train.run import train_member as run

    run(load(campaign), fold, member)


@app.command(rich_help_panel=MODEL)
def fit_baseline(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Fit the per-pixel random forest on the same folds."""
    from terraloom.assess.forest import fit_baseline as run

    c = load_to_read(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=MODEL)
def calibrate(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Calibrate the ensemble on held-out folds and score it there."""
    from terraloom.assess.held_out import calibrate as run

    run(load(campaign))


@app.command(rich_help_panel=MODEL)
def export_model(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Export the networks to ONNX and show that these predict the same."""
    from terraloom.predict.export import export_model as run

    typer.echo(run(load(campaign)))
