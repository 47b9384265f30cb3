"""The command ``rhesis-tasks``.  A command parses, calls one public function, prints."""

from __future__ import annotations

import os
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
    from celery import Celery
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


# --- tasks -------------------------------------------------------------------------------------------------------

_app = click.option(
    "-A",
    "--app",
    "app",
    required=True,
    metavar="MODULE",
    help="The Celery application, as for celery: module:attribute.",
)
_organization = click.option(
    "--organization", required=True, help="The tenant whose tasks they are; another one's are unknown."
)
_user = click.option("--user", help="Who is acting, for the records.")


@commands.group()
def tasks() -> None:
    """What a tenant's tasks are doing."""


@tasks.command("show")
@click.argument("task_id")
@_app
@_organization
@click.option("--follow", is_flag=True, help="Show its progress until it ends; exits with 1 unless it succeeds.")
def show(task_id: str, app: str, organization: str, follow: bool) -> None:
    """Print where a task is."""
    from .context import TenantContext, tenant_scope
    from .display import describe, follow_task
    from .states import State
    from .status import get_task

    with tenant_scope(TenantContext(organization)):
        application = _application(app)
        record = follow_task(application, task_id) if follow else get_task(application, task_id)
    if record is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    click.echo(describe(record))
    if follow and record.state is not State.SUCCESS:
        sys.exit(1)


@tasks.command("list")
@_app
@_organization
@click.option("--state", "states", multiple=True, help="Only those in this state; repeatable.")
@click.option("--name", help="Only those of this task.")
@click.option("--root", "root_id", help="Only those of this run.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
def list_command(
    app: str, organization: str, states: tuple[str, ...], name: str | None, root_id: str | None, limit: int
) -> None:
    """Print tasks, the latest launch first."""
    from .context import TenantContext, tenant_scope
    from .display import line
    from .states import State
    from .status import list_tasks

    try:
        wanted = [State(state) for state in states] or None
    except ValueError as error:
        raise click.BadParameter(f"{error}; one of {', '.join(State)}", param_hint="--state") from None
    with tenant_scope(TenantContext(organization)):
        for record in list_tasks(_application(app), states=wanted, name=name, root_id=root_id, limit=limit):
            click.echo(line(record))


@tasks.command("tree")
@click.argument("task_id")
@_app
@_organization
def tree(task_id: str, app: str, organization: str) -> None:
    """Print the run that a task belongs to, and where each of its tasks is."""
    from .context import TenantContext, tenant_scope
    from .display import outline
    from .status import task_tree

    with tenant_scope(TenantContext(organization)):
        node = task_tree(_application(app), task_id)
    if node is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    for each in outline(node):
        click.echo(each)


@tasks.command("cancel")
@click.argument("task_id")
@_app
@_organization
@_user
@click.option("--terminate", is_flag=True, help="Have the worker end it, if it runs (prefork).")
def cancel(task_id: str, app: str, organization: str, user: str | None, terminate: bool) -> None:
    """Cancel a task that waits, or ask one that runs to stop."""
    from .context import TenantContext, tenant_scope
    from .status import cancel_task

    with tenant_scope(TenantContext(organization, user)):
        outcome = cancel_task(_application(app), task_id, terminate=terminate)
    if outcome is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    click.echo(f"{task_id}: {outcome}")


def _application(name: str) -> Celery:
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


# --- errors ------------------------------------------------------------------------------------------------------


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
