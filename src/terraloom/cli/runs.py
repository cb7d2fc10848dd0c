"""Verbs for runs: where they stand, and what their jobs said."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from terraloom.cli.base import PEOPLE, app

__all__ = ["logs", "resume", "status"]


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


@app.command(rich_help_panel=PEOPLE)
def resume(
    only_clear: Annotated[
        bool, typer.Option("--only-clear", help="End and unlock, but do not start again.")
    ] = False,
    surely_dead: Annotated[
        bool,
        typer.Option("--surely-dead", help="The controller on another machine is gone for sure."),
    ] = False,
) -> None:
    """Go on with a run whose controller was killed: end its jobs, unlock, start it again."""
    from terraloom.operate.resume import resume as run

    restart = run(surely_dead=surely_dead)
    typer.echo(restart.said)
    typer.echo(f"in {restart.cwd}: {shlex.join(['snakemake', *restart.words[3:]])}")
    if not only_clear:
        restart.exec()
