"""The library's own tables: their DDL, its version, and who may use them.

Created on first use, or ahead of time by a role that may (:func:`create_schema`), for applications whose own
role may not create tables.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import ProgrammingError

from ..errors import ConfigurationError
from ..settings import quote_identifier, schema_name

__all__ = ["RECORDS_SETTING", "VERSION", "create_schema", "ensure_schema", "schema_sql"]

VERSION: Final = 1

RECORDS_SETTING: Final = "rhesis_tasks.organization_id"
"""The transaction-local setting that the policies on our own tables read; the application's policies read theirs."""

_log = logging.getLogger(__name__)

_LOCK_KEY: Final = 0x72686573  # "rhes": any number will do, as long as all agree on it

# Work that belongs to no tenant has the organization '' (no TenantContext can have it), so that a connection
# without a tenant sees that work and no other.  The tables are not FORCEd: their owner does the maintenance
# across tenants, and applications connect as another role.
_DDL: Final = """\
CREATE SCHEMA IF NOT EXISTS {schema};

CREATE TABLE IF NOT EXISTS {schema}.schema_version (
    version     integer NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS {schema}.task_record (
    organization_id text NOT NULL DEFAULT '',
    task_id         text NOT NULL,
    user_id         text,
    name            text,
    state           text NOT NULL,
    custom_state    text,
    retries         integer NOT NULL DEFAULT 0,
    root_id         text,
    parent_id       text,
    queue           text,
    worker          text,
    result          bytea,
    children        bytea,
    error_type      text,
    error_message   text,
    traceback       text,
    launched_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at      timestamptz,
    finished_at     timestamptz,
    PRIMARY KEY (organization_id, task_id)
);
CREATE INDEX IF NOT EXISTS task_record_finished_at ON {schema}.task_record (finished_at);
CREATE INDEX IF NOT EXISTS task_record_unfinished ON {schema}.task_record (launched_at) WHERE finished_at IS NULL;

CREATE TABLE IF NOT EXISTS {schema}.group_record (
    organization_id text NOT NULL DEFAULT '',
    group_id        text NOT NULL,
    result          bytea,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (organization_id, group_id)
);
CREATE INDEX IF NOT EXISTS group_record_created_at ON {schema}.group_record (created_at);

ALTER TABLE {schema}.task_record ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS tenant ON {schema}.task_record;
CREATE POLICY tenant ON {schema}.task_record FOR ALL TO PUBLIC
  USING (organization_id = (SELECT coalesce(current_setting('{setting}', true), '')))
  WITH CHECK (organization_id = (SELECT coalesce(current_setting('{setting}', true), '')));

ALTER TABLE {schema}.group_record ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS tenant ON {schema}.group_record;
CREATE POLICY tenant ON {schema}.group_record FOR ALL TO PUBLIC
  USING (organization_id = (SELECT coalesce(current_setting('{setting}', true), '')))
  WITH CHECK (organization_id = (SELECT coalesce(current_setting('{setting}', true), '')));

INSERT INTO {schema}.schema_version (version)
SELECT {version} WHERE NOT EXISTS (SELECT FROM {schema}.schema_version);
"""

# Expiry reaches across tenants, so it is the owner's, lent to the roles that run workers; it lets nobody delete
# what has just ended.  What never ended (its message or its worker was lost) goes thirty days later.
_FUNCTIONS: Final = """\
CREATE OR REPLACE FUNCTION {schema}.expire_records(before timestamptz, batch integer DEFAULT 10000) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH old_tasks AS (
        DELETE FROM {schema}.task_record WHERE (organization_id, task_id) IN (
            SELECT organization_id, task_id FROM {schema}.task_record
            WHERE finished_at < least(before, now() - interval '1 minute')
               OR (finished_at IS NULL AND launched_at < least(before, now()) - interval '30 days')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1),
    old_groups AS (
        DELETE FROM {schema}.group_record WHERE (organization_id, group_id) IN (
            SELECT organization_id, group_id FROM {schema}.group_record
            WHERE created_at < least(before, now() - interval '1 minute')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1)
    SELECT (SELECT count(*) FROM old_tasks) + (SELECT count(*) FROM old_groups)
$$;
REVOKE ALL ON FUNCTION {schema}.expire_records(timestamptz, integer) FROM PUBLIC;
"""

_GRANTS: Final = """\
GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT ON {schema}.schema_version TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.task_record, {schema}.group_record TO {role};
GRANT EXECUTE ON FUNCTION {schema}.expire_records(timestamptz, integer) TO {role};
"""


def schema_sql(schema: str | None = None, roles: Iterable[str] = ()) -> str:
    """The SQL that creates the tables and grants their use to roles; safe to run again.

    Args:
        schema: by default RHESIS_TASKS_SCHEMA, or ``rhesis_tasks``.
        roles: the roles that the application's web and worker processes connect as.

    Raises:
        ConfigurationError: a name cannot be an SQL name.
    """
    names = {
        "schema": quote_identifier(schema_name(schema)),
        "setting": RECORDS_SETTING,
        "version": VERSION,
    }
    grants = [_GRANTS.format(role=quote_identifier(role), **names) for role in roles]
    return "\n".join([_DDL.format(**names), _FUNCTIONS.format(**names), *grants])


def create_schema(bind: Engine | Connection, *, schema: str | None = None, roles: Iterable[str] = ()) -> None:
    """Create the library's tables, to be run by the role that shall own them.

    Safe to run again and concurrently.  On a Connection it becomes part of the caller's transaction.

    Args:
        bind: where to.
        schema: by default RHESIS_TASKS_SCHEMA, or ``rhesis_tasks``.
        roles: the application's roles, which get to use them.
    """
    if isinstance(bind, Engine):
        with bind.begin() as connection:
            create_schema(connection, schema=schema, roles=roles)
        return
    bind.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    bind.exec_driver_sql(schema_sql(schema, roles), execution_options={"no_parameters": True})


def ensure_schema(engine: Engine, schema: str) -> None:
    """Create the library's tables if they are not there.

    Raises:
        ConfigurationError: this login may not create or use them, or they were made by another version.
    """
    version_table = f"{quote_identifier(schema)}.schema_version"
    try:
        with engine.begin() as connection:
            # to_regclass() raises nothing for a schema that is missing or that this login may not use.
            if connection.scalar(text("SELECT to_regclass(:name)"), {"name": version_table}) is None:
                create_schema(connection, schema=schema)
                _log.warning(
                    "the tables in schema %r were created by the application's own login, which as their owner is not "
                    "bound by their row-level security.  Let another role run create_schema(engine, roles=[...]) first",
                    schema,
                )
            found = connection.scalar(text(f"SELECT max(version) FROM {version_table}"))  # noqa: S608
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42501":
            raise
        raise ConfigurationError(
            f"this login may not create or use the tables in schema {schema!r}.  Let their owner run "
            "rhesis_tasks.postgres.schema.create_schema(engine, roles=[this login]) first"
        ) from error
    if found != VERSION:
        raise ConfigurationError(
            f"the tables in schema {schema!r} have version {found}; this version of rhesis-tasks needs {VERSION}"
        )
