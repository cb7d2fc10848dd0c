"""What all verbs share: the application, its options, common arguments."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from terraloom import __version__
from terraloom.errors import TerraloomError
from terraloom.log import hide_secrets

__all__ = [
    "LABELS", "MAP", "MODEL", "PEOPLE", "RUN_CAMPAIGN", "SCENES", "Batch", "CampaignFile", "Out",
    "Stamp", "app", "grid_of", "large_pages", "load", "load_to_read", "main", "state_app",
]  # fmt: skip

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


def load(path: Path) -> Any:
    """Campaign of a verb."""
    from terraloom.config.load import load_campaign

    return load_campaign(path)


def load_to_read(path: Path) -> Any:
    """Campaign of a verb that reads scenes: requests in flight and time-outs as it says."""
    from terraloom.acquire.fetch import limit_requests

    campaign = load(path)
    limit_requests(campaign.scenes.requests, campaign.scenes.timeout_s)
    return campaign


def grid_of(campaign: Any) -> Any:
    """Grid of a campaign."""
    from terraloom.aoi import campaign_grid

    return campaign_grid(campaign)


def large_pages() -> None:
    """Large tensors in large pages: 5-10 % faster. Torch looks when it is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


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
        _fail(str(err))
    except (OSError, MemoryError, RuntimeError) as err:
        said = _of_the_machine(err)
        if not said:
            raise
        _fail(f"{said}; finished tiles are kept")


def _fail(said: str) -> NoReturn:
    typer.echo(f"error: {hide_secrets(said)}", err=True)
    sys.exit(2)


def _of_the_machine(err: Exception) -> str:
    """What the machine lacks, and what to do; empty for other errors."""
    if isinstance(err, MemoryError) or "can't allocate memory" in str(err):  # numpy; torch
        return (
            "there is not enough memory\n  to do: fewer jobs at once (--cores), fewer threads or "
            "smaller windows (predict.window_px), or a larger machine"
        )
    if not isinstance(err, OSError):
        return ""
    file = err.filename or "a file"
    match err.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return (
                f"{file}: the disk is full, or your share of it\n  to do: free space and rerun; "
                "nothing half-written was left"
            )
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return (
                f"{file}: cannot be written or read here ({err.strerror})\n  to do: run "
                "in a folder of your own (snakemake --directory), or mend its permissions"
            )
    return ""
