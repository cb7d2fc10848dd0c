"""Verbs for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terraloom.cli.base import (
    PEOPLE,
    RUN_CAMPAIGN,
    CampaignFile,
    Out,
    app,
    grid_of,
    large_pages,
    load,
)

__all__ = [
    "certify", "check", "cluster_profile", "init", "provenance", "schema", "score_series", "update",
]  # fmt: skip


@app.command(rich_help_panel=PEOPLE)
def init(
    aoi: Annotated[str, typer.Argument(help="Vector file, or west,south,east,north in degrees.")],
    out: Out = Path("config/campaigns/my-region.yaml"),
    labels: Annotated[str, typer.Option(help="Vector file with your labels.")] = "labels.gpkg",
    column: Annotated[str, typer.Option(help="Column with the class.")] = "class",
    year: Annotated[int, typer.Option(help="Year to map.")] = 2024,
) -> None:
    """Write a commented campaign file for an area of interest."""
    from terraloom.config.starter import write_starter

    path = write_starter(aoi, out, labels=labels, column=column, year=year)
    typer.echo(f"Wrote {path}. Next: terraloom check {path}")


@app.command(rich_help_panel=PEOPLE)
def check(
    campaign: Annotated[Path, typer.Argument(help="Campaign file.")],
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable plan.")] = False,
) -> None:
    """Validate a campaign and its inputs and show the plan; nothing is run."""
    from terraloom.check import check_campaign

    typer.echo(check_campaign(campaign, as_json=json_))


@app.command(rich_help_panel=PEOPLE)
def cluster_profile(
    site: Annotated[Path, typer.Argument(help="File that describes the cluster.")],
    out: Out = Path("workflow/profiles/my-site"),
) -> None:
    """Ask a SLURM cluster what it offers and write a Snakemake profile that fits it."""
    from terraloom.operate.cluster import write_profile

    typer.echo(write_profile(site, out))


@app.command(rich_help_panel=PEOPLE)
def certify(
    campaign: CampaignFile = RUN_CAMPAIGN,
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")] = Path(
        "results/map/certificate.json"
    ),
    size_px: Annotated[int, typer.Option(help="Side of the area that is predicted.")] = 1200,
) -> None:
    """Show that the finished model predicts the same, however the region is cut."""
    large_pages()
    from terraloom.predict.certify import certify as run

    c = load(campaign)
    certificate = run(c, grid_of(c), out, size_px=size_px)
    typer.echo(certificate.table())
    certificate.require()


@app.command(rich_help_panel=PEOPLE)
def update(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Extend the item lock with new scenes; only what they touch is computed again."""
    from terraloom.acquire.update import update_items
    from terraloom.preprocess.scenes import ITEMS

    c = load(campaign)
    typer.echo(update_items(c, grid_of(c), ITEMS))


@app.command(rich_help_panel=PEOPLE)
def schema(
    folder: Annotated[Path, typer.Option(help="Folder of the generated files.")] = Path("config"),
) -> None:
    """Rewrite the generated schema.json and README.md of the config folder."""
    from terraloom.config.reference import schema_text, tables_text
    from terraloom.io import write_text

    write_text(folder / "schema.json", schema_text())
    write_text(folder / "README.md", tables_text())


@app.command(rich_help_panel=PEOPLE)
def provenance(
    file: Annotated[Path, typer.Argument(help="A file of a map, or one of its tiles.")],
    everything: Annotated[bool, typer.Option("--all", help="List all scenes.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a file of a map was made from, and whether its bytes are those recorded."""
    from terraloom.report.file_provenance import origin_of, origin_text

    typer.echo(origin_text(origin_of(file), everything=everything, as_json=json_))


@app.command(rich_help_panel=PEOPLE)
def score_series(
    table: Annotated[Path, typer.Argument(help="CSV: sample, x, y, date, class and the bands.")],
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    encoder: Annotated[str, typer.Option(help="ltae, tempcnn, gru or presto.")] = "ltae",
    weights: Annotated[str, typer.Option(help="File of pre-trained weights (presto).")] = "",
    adapt: Annotated[str, typer.Option(help="Presto: fine-tune, frozen or lora.")] = "fine-tune",
    group: Annotated[str, typer.Option(help="Column of groups that stay whole.")] = "",
    block_deg: Annotated[float, typer.Option(help="Width of a block (degrees).")] = 1.0,
    folds: Annotated[int, typer.Option(help="Folds.")] = 10,
    seeds: Annotated[int, typer.Option(help="Networks per fold.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training series.")] = 30,
) -> None:
    """Score a network on a table of labelled pixel series, in spatial folds."""
    from terraloom.train.score_series import score_series as run

    record = run(
        table, out, encoder=encoder, weights=weights, adapt=adapt, group=group,
        block_deg=block_deg, folds=folds, seeds=range(seeds), epochs=epochs,
    )  # fmt: skip
    typer.echo("\n".join(record["lines"]))
