"""``rhesis-tasks schema ...``."""

from __future__ import annotations

import sys

import click

from .database import engine

__all__ = ["schema"]


@click.group()
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
    from ..postgres.schema import create_schema, schema_status

    with engine(database_url) as database:
        create_schema(database, schema=name, roles=roles, web_roles=web_roles)
        click.echo(schema_status(database, name))


@schema.command("sql")
@_schema_name
@_roles
@_web_roles
def sql(name: str | None, roles: tuple[str, ...], web_roles: tuple[str, ...]) -> None:
    """Print the SQL that ``create`` runs, for a migration or a review; needs no database."""
    from ..postgres.schema import schema_sql

    click.echo(f"BEGIN;\n{schema_sql(name, roles, web_roles)}\nCOMMIT;")


@schema.command("status")
@_database_url
@_schema_name
def status(database_url: str, name: str | None) -> None:
    """Print which version there is and which is needed; exits with 1 unless they are the same."""
    from ..postgres.schema import schema_status

    with engine(database_url) as database:
        found = schema_status(database, name)
    click.echo(found)
    if not found.is_current:
        sys.exit(1)
