"""``rhesis-tasks tenants ...``."""

from __future__ import annotations

import click

from .application import app_option, application
from .operating import operating, say

__all__ = ["tenants"]


@click.group()
def tenants() -> None:
    """What there is of a tenant."""


@tenants.command("offboard")
@click.argument("organization")
@app_option
@click.option("--stop", is_flag=True, help="Terminate what runs, instead of refusing.")
@click.option(
    "--timeout",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds to wait for what runs to have ended.",
)
@operating
def offboard(
    organization: str, app: str, stop: bool, timeout: float, yes: bool, operator: str | None, as_json: bool
) -> None:
    """Remove a tenant's messages, dead letters and records.

    Only counts them, until you say --yes.  Nothing of it can be had back.  The application's own tables are
    left alone, and so are the audit records.
    """
    from ..operations import MessageState, login_name
    from ..operations import offboard as remove

    done = remove(
        application(app),
        organization,
        operator=operator or login_name(),
        dry_run=not yes,
        stop=stop,
        timeout=timeout,
    )
    say(done, as_json, f"there is nothing of an organization {organization}")
    if done.is_dry_run and done.before[MessageState.RUNNING] and not stop:
        click.echo(
            "While tasks run it is refused: wait for their end, or give --stop, which terminates them.", err=True
        )
