"""Verbs that go back to an earlier version."""

from __future__ import annotations

from typing import Annotated

import typer

from terraloom.cli.base import (
    state_app,
)

__all__ = ["state_log", "state_restore", "state_save", "state_verify"]


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
