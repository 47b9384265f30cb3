"""The Celery application that a command is for."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

import click

from ..errors import RhesisTasksError

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
        ClickException: there is none, or its module cannot be imported.
    """
    from celery import Celery
    from celery.app.utils import find_app

    sys.path.insert(0, os.getcwd())  # as celery does
    try:
        found = find_app(name)
    except (RhesisTasksError, BrokenPipeError):
        raise  # says itself what is wrong; or nobody reads what the module prints
    except Exception as error:  # whatever a module raises as it is imported
        raise click.ClickException(f"there is no Celery application {name!r}: {_reason(error)}") from error
    if not isinstance(found, Celery):
        raise click.ClickException(f"there is no Celery application {name!r}: that is of type {type(found).__name__}")
    return found


def _reason(error: Exception) -> str:
    """Why a name cannot be imported, in a line: the error, and where in the application's modules it was raised."""
    if isinstance(error, ImportError) and isinstance(error.__context__, AttributeError):
        return str(error.__context__)  # celery has then tried the whole name as that of a module
    text = str(error).partition("\n")[0]
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    is_theirs = "/celery/" not in frames[-1].filename and "/kombu/" not in frames[-1].filename
    return f"{kind}{text}" + (f" ({frames[-1].filename}, line {frames[-1].lineno})" if is_theirs else "")
