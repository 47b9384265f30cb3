"""The library's own tables and functions: their version, and who may use them.

Created on first use, or ahead of time by a role that may (:func:`create_schema`), for applications whose own
role may not create tables.  The SQL itself is in the folder ``sql``.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import logging
from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from ..errors import MissingPrivilegeError, SchemaError
from ..settings import quote_identifier, schema_name

__all__ = [
    "RECORDS_SETTING",
    "VERSION",
    "SchemaStatus",
    "create_schema",
    "ensure_schema",
    "schema_sql",
    "schema_status",
]

VERSION: Final = 6
"""Version 1 had the result backend's tables, version 2 the broker's too, version 3 progress and aborts of tasks,
version 4 the reason of a failure, version 5 delayed delivery, dead letters, the operators' audit records, and what
schedules have launched for each tenant, version 6 indexes for the dead letters of a queue and for tasks whose queue is
not durable."""

RECORDS_SETTING: Final = "rhesis_tasks.organization_id"
"""The transaction-local setting that the policies on our own tables read; the application's policies read theirs."""

_log = logging.getLogger(__name__)

_LOCK_KEY: Final = 0x72686573  # "rhes": any number will do, as long as all agree on it


@dataclasses.dataclass(frozen=True, slots=True)
class SchemaStatus:
    """What there is, and what this version of rhesis-tasks needs."""

    schema: str
    found: int | None  #: the version of the tables; None if there are none, or this login may not see them
    needed: int = VERSION

    @property
    def is_current(self) -> bool:
        return self.found == self.needed

    def __str__(self) -> str:
        if self.found is None:
            return f"schema {self.schema!r}: no tables of rhesis-tasks (version {self.needed} is needed)"
        return f"schema {self.schema!r}: version {self.found} (version {self.needed} is needed)"


def schema_sql(
    schema: str | None = None, roles: Iterable[str] = (), web_roles: Iterable[str] = (), *, tables: bool = True
) -> str:
    """The SQL that creates the tables and functions, or upgrades them, and grants their use; safe to run again.

    Args:
        schema: by default RHESIS_TASKS_SCHEMA, or ``rhesis_tasks``.
        roles: roles that run workers, or control them; they may launch tasks, too.
        web_roles: roles that launch tasks and read results, and nothing else.
        tables: False leaves the tables alone, which are there already: creating what exists would lock it.

    Raises:
        ConfigurationError: a name cannot be an SQL name.
    """
    name = schema_name(schema)
    parts = [
        _sql(part, name)
        for part in (
            "version",
            *(("records", "tables", "schedules") if tables else ()),
            "record_functions",
            "schedule_functions",
            "functions",
            "operation_functions",
        )
    ]
    for role in (*roles, *web_roles):
        parts.append(_sql("grant_web", name, role))
    for role in roles:
        parts.append(_sql("grant_worker", name, role))
    return "\n".join(parts)


def _sql(part: str, schema: str, role: str | None = None) -> str:
    sql = (importlib.resources.files(__package__) / "sql" / f"{part}.sql").read_text("utf-8")
    values = {"schema": quote_identifier(schema), "setting": RECORDS_SETTING, "version": str(VERSION)}
    if role is not None:
        values["role"] = quote_identifier(role)
    for key, value in values.items():
        sql = sql.replace(f"@{key}@", value)
    return sql


def create_schema(
    bind: Engine | Connection,
    *,
    schema: str | None = None,
    roles: Iterable[str] = (),
    web_roles: Iterable[str] = (),
) -> None:
    """Create or upgrade the library's tables and functions, to be run by the role that shall own them.

    Safe to run again and concurrently.  On a Connection it becomes part of the caller's transaction.

    Args:
        bind: where to.
        schema: by default RHESIS_TASKS_SCHEMA, or ``rhesis_tasks``.
        roles: roles that run workers, or control them; they may launch tasks, too.
        web_roles: roles that launch tasks and read results, and nothing else: they cannot read a message.

    Raises:
        MissingPrivilegeError: there is no such schema, and this login may not create one.
        SchemaError: the tables are of a newer version than this one.
    """
    if isinstance(bind, Engine):
        # Whatever the engine's isolation level is: one transaction.
        with bind.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            create_schema(connection, schema=schema, roles=roles, web_roles=web_roles)
        return
    bind.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    _require_right_to_create(bind, schema_name(schema))
    script = schema_sql(schema, roles, web_roles, tables=not _status(bind, schema_name(schema)).is_current)
    try:
        bind.exec_driver_sql(script, execution_options={"no_parameters": True})
    except OperationalError as error:
        state, reason = getattr(error.orig, "sqlstate", None), str(error.orig).partition("\n")[0]
        if state == "55P03":
            reason = f"{reason}: somebody is in a long transaction with the tables.  Nothing was changed; run it again"
        elif state != "55000":
            raise
        raise SchemaError(reason) from error


def _require_right_to_create(connection: Connection, schema: str) -> None:
    """Raises MissingPrivilegeError if there is no such schema and this login may not create it."""
    remedies = (
        "SELECT format('GRANT CREATE ON DATABASE %I TO %I', current_database(), current_user), "
        "format('CREATE SCHEMA %I AUTHORIZATION %I', CAST(:schema AS text), current_user) "
        "WHERE to_regnamespace(quote_ident(:schema)) IS NULL "
        "AND NOT has_database_privilege(current_database(), 'CREATE')"
    )
    for grant, create in connection.execute(text(remedies), {"schema": schema}):
        raise MissingPrivilegeError(
            f"there is no schema {schema!r}, and this login may not create it.  Give the URL of the role that shall "
            f"own it, or let the database's owner run `{grant}`, or a superuser `{create}`"
        )


def schema_status(bind: Engine, schema: str | None = None) -> SchemaStatus:
    """Which version of the tables there is."""
    with bind.connect() as connection:
        return _status(connection, schema_name(schema))


def _status(connection: Connection, schema: str) -> SchemaStatus:
    version_table = f"{quote_identifier(schema)}.schema_version"
    # to_regclass() raises nothing for a schema that is missing or that this login may not use.
    if connection.scalar(text("SELECT to_regclass(:name)"), {"name": version_table}) is None:
        return SchemaStatus(schema, None)
    return SchemaStatus(schema, connection.scalar(text(f"SELECT max(version) FROM {version_table}")))  # noqa: S608


def ensure_schema(engine: Engine, schema: str) -> None:
    """Create the library's tables if they are not there.

    Raises:
        MissingPrivilegeError: this login may not create or use them.
        SchemaError: they were made by another version.
    """
    try:
        status = schema_status(engine, schema)
        if status.found is None:
            create_schema(engine, schema=schema)
            _log.warning(
                "the tables in schema %r were created by the application's own login, which as their owner is not "
                "bound by their row-level security.  Let another role run `rhesis-tasks schema create` first",
                schema,
            )
            return
    except (ProgrammingError, MissingPrivilegeError) as error:
        if isinstance(error, ProgrammingError) and getattr(error.orig, "sqlstate", None) != "42501":
            raise
        raise MissingPrivilegeError(
            f"this login may not create or use the tables in schema {schema!r}.  Let their owner run "
            "`rhesis-tasks schema create --role THIS_LOGIN` (or create_schema(engine, roles=[...])) first"
        ) from None  # its text is the whole script
    require_version(status)


def require_version(status: SchemaStatus) -> None:
    """Raises SchemaError unless the tables are of the version that this one needs."""
    if status.is_current:
        return
    remedy = (
        "Let their owner run `rhesis-tasks schema create`, which upgrades them"
        if (status.found or 0) < status.needed
        else "Upgrade rhesis-tasks here"
    )
    raise SchemaError(
        f"the tables in schema {status.schema!r} have version {status.found}, and this version of rhesis-tasks needs "
        f"{status.needed}.  {remedy}",
        found=status.found,
        needed=status.needed,
    )
