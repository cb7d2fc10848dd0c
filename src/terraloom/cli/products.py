"""Verbs of the map: prediction, accuracy, areas, report."""

from __future__ import annotations

from pathlib import Path

from terraloom.cli.base import (
    MAP,
    RUN_CAMPAIGN,
    Batch,
    CampaignFile,
    app,
    grid_of,
    large_pages,
    load,
)

__all__ = [
    "aggregate_regions", "build_report", "catalogue_products", "draw_sample",
    "estimate_areas", "mosaic_products", "polygonise_map", "predict_tiles",
    "score_rehearsal", "write_labelling_page", "write_tiles",
]  # fmt: skip


@app.command(rich_help_panel=MAP)
def predict_tiles(batch: Batch, campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Predict the tiles of one job with all members."""
    large_pages()
    from terraloom.predict.engine import predict_batch

    c = load(campaign)
    predict_batch(c, grid_of(c), batch)


@app.command(rich_help_panel=MAP)
def mosaic_products(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Join the tiles into products, with their overviews and styles."""
    from terraloom.predict.products import mosaic_products as run

    c = load(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=MAP)
def write_tiles(batch: Batch, campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the products of the tiles of one job, one raster per product and tile."""
    from terraloom.predict.tile_products import write_tiles as run

    c = load(campaign)
    run(c, grid_of(c), batch)


@app.command(rich_help_panel=MAP)
def polygonise_map(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the class map as polygons that no tile edge splits."""
    from terraloom.predict.polygons import polygonise_map as run

    c = load(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=MAP)
def draw_sample(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Draw the probability sample from the map."""
    from terraloom.assess.sampling import draw_sample as run

    run(load(campaign))


@app.command(rich_help_panel=MAP)
def write_labelling_page(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the page on which people answer the sample: one HTML file that works offline."""
    from terraloom.report.labelling import write_labelling_page as run

    c = load(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=MAP)
def estimate_areas(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Estimate the areas, or state the map areas as what they are."""
    from terraloom.assess.run import estimate_areas as run

    run(load(campaign))


@app.command(rich_help_panel=MAP)
def aggregate_regions(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Compute areas, means and totals of regions, with intervals."""
    from terraloom.assess.regions import aggregate_regions as run

    run(load(campaign))


@app.command(rich_help_panel=MAP)
def score_rehearsal(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Compare every stage with the simulated truth."""
    from terraloom.assess.rehearsal import score_rehearsal as run

    c = load(campaign)
    run(c, grid_of(c))


@app.command(rich_help_panel=MAP)
def catalogue_products(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the STAC catalogue of the products."""
    from terraloom.report.catalogue import catalogue_products as run

    run(Path("results"), load(campaign))


@app.command(rich_help_panel=MAP)
def build_report(campaign: CampaignFile = RUN_CAMPAIGN) -> None:
    """Write the report: one HTML file that opens offline."""
    from terraloom.report.page import build_report as run

    run(Path("results"), load(campaign), Path("results/map/report.html"))
