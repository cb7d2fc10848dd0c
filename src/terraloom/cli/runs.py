"""Verbs for runs: where they stand, and what their jobs said."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from terraloom.cli.base import PEOPLE, app

__all__ = ["logs", "status"]


@app.command(rich_help_panel=PEOPLE)
def status(
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    watch: Annotated[
        float, typer.Option(help="Show it anew every so many seconds while the run goes on.")
    ] = 0.0,
) -> None:
    """Show where the run of this folder stands: jobs, tiles, failures, time left, disk."""
    from terraloom.operate.status import read_status, text_of

    while True:
        now = read_status(Path())
        if watch and not json_:
            typer.echo("\x1b[2J\x1b[H", nl=False)
        typer.echo(json.dumps(now.record(), indent=1) if json_ else text_of(now))
        if not watch or now.state not in ("running", "unknown"):
            return
        time.sleep(watch)


@app.command(rich_help_panel=PEOPLE)
def logs(
    word: Annotated[str, typer.Argument(help="A tile, a rule, or a job such as b0003.")],
    lines: Annotated[int, typer.Option(help="Last lines of each log; 0: all.")] = 40,
) -> None:
    """Print the logs of a tile, a rule or a job of the last run."""
    from terraloom.operate.joblogs import show_logs

    typer.echo(show_logs(word, lines=lines))
