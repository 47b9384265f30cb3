"""The command ``rhesis-tasks``.  A command parses, calls one public function, prints.

One file for each command or group of commands.
"""

from __future__ import annotations

import sys

import click

from ..errors import RhesisTasksError
from .demo import demo
from .flower import flower
from .schema import schema
from .tasks import tasks
from .tenants import tenants
from .worker import worker

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rhesis-tasks")
def commands() -> None:
    """Celery tasks that know their tenant."""


for command in (demo, flower, schema, tasks, tenants, worker):
    commands.add_command(command)


def main() -> None:
    """The entry point: errors of ours are a message and an exit code, not a traceback."""
    try:
        commands(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except RhesisTasksError as error:
        click.echo(f"rhesis-tasks: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
