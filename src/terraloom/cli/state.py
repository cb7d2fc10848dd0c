"""Verbs for states: save, release, compare, pin, go back, look whether all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from terraloom.cli.base import PEOPLE, app, state_app

__all__ = [
    "compare", "doctor", "pin", "release", "state_log", "state_restore", "state_save",
    "state_verify",
]  # fmt: skip


@state_app.command("save")
def state_save(
    milestones: Annotated[
        list[str] | None, typer.Argument(help="scenes, chips, model, map; default: all there.")
    ] = None,
) -> None:
    """Store the provenance of finished milestones beside their files."""
    from terraloom.operate.provenance import save_state

    typer.echo(save_state(milestones=milestones or None))


@state_app.command("restore")
def state_restore() -> None:
    """Bring back the milestones of the checked-out commit, with their provenance."""
    from terraloom.operate.provenance import restore_state

    typer.echo(restore_state())


@state_app.command("verify")
def state_verify() -> None:
    """Hash all milestones and their stored copies again."""
    from terraloom.operate.versions import verify_state

    typer.echo(verify_state())


@state_app.command("log")
def state_log() -> None:
    """List the releases with their scores."""
    from terraloom.operate.versions import state_log as run

    typer.echo(run())


@app.command(rich_help_panel=PEOPLE)
def release(
    tag: Annotated[str, typer.Argument(help="Name of the release, such as map-2026.1.")],
    message: Annotated[str, typer.Option("--message", "-m", help="Sentence above the notes.")] = "",
    push: Annotated[bool, typer.Option(help="Push the results to the DVC remote.")] = True,
) -> None:
    """Record the results as a release: saved, committed, described, pushed, tagged."""
    from terraloom.operate.release import release as run

    typer.echo(run(tag, push=push, message=message))


@app.command(rich_help_panel=PEOPLE)
def compare(
    before: Annotated[str, typer.Argument(help="Tag or commit; WORK for what lies here now.")],
    after: Annotated[str, typer.Argument(help="Likewise.")] = "WORK",
    out: Annotated[
        Path | None, typer.Option(help="Folder for change.tif, change.csv and compare.json.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Compare two releases: campaign, scores, areas, and where the maps differ."""
    from terraloom.operate.compare import compare_states, text_of

    found = compare_states(before, after, out=out)
    typer.echo(json.dumps(found.record(), indent=1) if json_ else text_of(found))


@app.command(rich_help_panel=PEOPLE)
def pin(
    milestone: Annotated[str, typer.Argument(help="`model`; the only one that can be pinned.")],
    tag: Annotated[str, typer.Argument(help="Release whose model is used.")],
) -> None:
    """Use the model of a release for the campaign of today."""
    from terraloom.errors import StateError
    from terraloom.operate.pin import pin_model

    if milestone != "model":
        raise StateError(
            f"`{milestone}` cannot be pinned", allowed="model",
            fix="git checkout TAG && terraloom state restore brings everything back",
        )  # fmt: skip
    typer.echo(pin_model(tag))


@app.command(rich_help_panel=PEOPLE)
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look whether this place is fit for runs and for going back; exit status 1 if not."""
    from dataclasses import asdict

    from terraloom.operate.doctor import examine, text_of

    found = examine()
    typer.echo(json.dumps([asdict(f) for f in found], indent=1) if json_ else text_of(found))
    if any(f.how == "wrong" for f in found):
        raise typer.Exit(1)
