"""The command ``rhesis-tasks``.  A command parses, calls one public function, prints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    MissingExtraError,
    MissingPrivilegeError,
    RhesisTasksError,
)

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rhesis-tasks")
def commands() -> None:
    """Celery tasks that know their tenant."""


@commands.command()
@click.option(
    "--input",
    "input_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON Lines file of test sets and tests of at least two organizations, instead of the example's.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the embedded server's data in this folder.",
)
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C, and print the URLs.")
def demo(input_file: Path | None, data_dir: Path | None, keep: bool) -> None:
    """Run the main job for real: two organizations, one worker, one PostgreSQL.

    Uses an embedded PostgreSQL, or DATABASE_URL if it is set; there it makes roles and schemas of random
    names, and drops them afterwards.  Exits with 0 only if everything it claims was true.
    """
    try:
        from rich.console import Console

        from .demo import DemoOptions, run_demo
    except ImportError as error:
        if isinstance(error, MissingExtraError):
            raise
        raise MissingExtraError.of(error.name or "rich", "demo") from error
    if not run_demo(DemoOptions(input=input_file, data_dir=data_dir, keep=keep), Console()):
        sys.exit(1)


@commands.group()
def schema() -> None:
    """The library's own tables and functions in the database."""


_database_url = click.option(
    "--database-url",
    envvar="DATABASE_URL",
    show_envvar=True,
    required=True,
    help="Of the role that owns the tables, or shall own them.",
)
_schema_name = click.option(
    "--schema", "name", envvar="RHESIS_TASKS_SCHEMA", show_envvar=True, help="The schema; rhesis_tasks by default."
)
_roles = click.option(
    "--role", "roles", multiple=True, help="A role that runs workers or controls them (it may launch, too); repeatable."
)
_web_roles = click.option(
    "--web-role", "web_roles", multiple=True, help="A role that only launches tasks and reads results; repeatable."
)


@schema.command("create")
@_database_url
@_schema_name
@_roles
@_web_roles
def create(database_url: str, name: str | None, roles: tuple[str, ...], web_roles: tuple[str, ...]) -> None:
    """Create the tables and functions, or upgrade them, and grant their use to roles.

    Safe to run again, also while workers run.
    """
    from .postgres.schema import create_schema, schema_status

    with _engine(database_url) as engine:
        create_schema(engine, schema=name, roles=roles, web_roles=web_roles)
        click.echo(schema_status(engine, name))


@schema.command("sql")
@_schema_name
@_roles
@_web_roles
def sql(name: str | None, roles: tuple[str, ...], web_roles: tuple[str, ...]) -> None:
    """Print the SQL that ``create`` runs, for a migration or a review; needs no database."""
    from .postgres.schema import schema_sql

    click.echo(f"BEGIN;\n{schema_sql(name, roles, web_roles)}\nCOMMIT;")


@schema.command("status")
@_database_url
@_schema_name
def status(database_url: str, name: str | None) -> None:
    """Print which version there is and which is needed; exits with 1 unless they are the same."""
    from .postgres.schema import schema_status

    with _engine(database_url) as engine:
        found = schema_status(engine, name)
    click.echo(found)
    if not found.is_current:
        sys.exit(1)


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    """An engine for one command; errors of its database are ours."""
    from sqlalchemy.exc import DBAPIError, OperationalError

    from .postgres.engines import new_engine
    from .settings import redacted

    engine = new_engine(url)
    try:
        yield engine
    except OperationalError as error:
        raise DatabaseUnavailableError(f"cannot connect to {redacted(engine.url)}: {error.orig}") from error
    except DBAPIError as error:
        refused = getattr(error.orig, "sqlstate", None) == "42501"
        reason = str(error.orig).partition("\n")[0]
        raise (MissingPrivilegeError if refused else ConfigurationError)(f"{redacted(engine.url)}: {reason}") from error
    finally:
        engine.dispose()


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
