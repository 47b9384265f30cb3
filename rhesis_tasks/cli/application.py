"""The Celery application that a command is for."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["app_option", "application"]

app_option = click.option(
    "-A",
    "--app",
    "app",
    required=True,
    metavar="MODULE",
    help="The Celery application, as for celery: module:attribute.",
)


def application(name: str) -> Celery:
    """The Celery application that a command is for.

    Raises:
        ClickException: there is none.
    """
    from celery.app.utils import find_app

    sys.path.insert(0, os.getcwd())  # as celery does
    try:
        found: Celery = find_app(name)
    except (ImportError, AttributeError) as error:
        raise click.ClickException(f"there is no Celery application {name!r}: {error}") from error
    return found
