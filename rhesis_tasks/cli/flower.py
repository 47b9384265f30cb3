"""``rhesis-tasks flower``."""

from __future__ import annotations

import click

from .application import app_option

__all__ = ["flower"]


@click.command()
@app_option
@click.option(
    "--address",
    envvar="FLOWER_ADDRESS",
    show_envvar=True,
    default="127.0.0.1",
    show_default=True,
    help="Where it listens; another than loopback needs FLOWER_BASIC_AUTH=user:password.",
)
@click.option("--port", envvar="FLOWER_PORT", show_envvar=True, default=5555, show_default=True, help="On which port.")
def flower(app: str, address: str, port: int) -> None:
    """Run Flower, which shows the tasks of all tenants and controls their workers.

    Its other settings are Flower's own variables, such as FLOWER_URL_PREFIX.
    """
    from ..flower import become_flower

    become_flower(app, address=address, port=port)
