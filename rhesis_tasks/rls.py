"""Row-level security: the SQL that makes PostgreSQL keep tenants apart.

The policies read a transaction-local setting that tenant sessions send at the start of each transaction.
Without it, or with an empty one, a query returns nothing and a write fails.  It stops mistakes, not SQL
injection: code that can run arbitrary SQL can set the setting too.

Here is the text only.  :mod:`rhesis_tasks.ddl` makes it SQLAlchemy's, :mod:`rhesis_tasks.migrations` Alembic's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, Required, TypedDict, Unpack

from .errors import ConfigurationError
from .settings import quote_identifier

__all__ = [
    "COLUMN_TYPES",
    "DisableOptions",
    "EnableOptions",
    "ORGANIZATION_SETTING",
    "setting_literal",
    "disable_rls",
    "disable_rls_statements",
    "enable_rls",
    "enable_rls_statements",
    "quoted_roles",
    "tenant_of_setting",
]

ORGANIZATION_SETTING: Final = "app.current_organization"

COLUMN_TYPES: Final = frozenset({"uuid", "text", "integer", "bigint"})
"""The types that the column of the organization may have."""


class EnableOptions(TypedDict, total=False):
    """The keyword arguments of :func:`enable_rls`."""

    role: Required[str | Sequence[str]]
    column: str
    column_type: str
    setting: str
    index_columns: Sequence[str] | None
    strict: bool


class DisableOptions(TypedDict, total=False):
    """The keyword arguments of :func:`disable_rls`."""

    column: str
    index_columns: Sequence[str] | None


def enable_rls(table: str, **options: Unpack[EnableOptions]) -> str:
    """The SQL that puts a table under forced row-level security, to be run by its owner in one transaction.

    Besides the policy for ``role`` it lays a floor: a restrictive policy for everybody, so that one stray
    permissive policy added later opens nothing.  TRUNCATE, REFERENCES and TRIGGER, which policies do not
    govern, are revoked; the column becomes NOT NULL and gets an index.  Running it again replaces the policies.

    Args:
        table: the table, as ``table`` or ``schema.table``.  Each partition is a table that needs its own.
        role: the application's role, or several: neither superuser nor owner nor BYPASSRLS.
        column: the column that holds the organization.
        column_type: its type: uuid (the default), text, integer or bigint.
        setting: the name of the setting that tenant sessions send.
        index_columns: further columns of the index, after the organization.  None makes no index: for a table
            whose primary key begins with the organization.
        strict: a statement without a tenant raises SQLSTATE 42501 instead of finding no rows.  Makes a function
            beside the table, which needs CREATE on its schema.

    Raises:
        ConfigurationError: a name cannot be an SQL name, there is no role, or the type is not one of these.
    """
    return _script(enable_rls_statements(table, **options))


def enable_rls_statements(
    table: str,
    *,
    role: str | Sequence[str],
    column: str = "organization_id",
    column_type: str = "uuid",
    setting: str = ORGANIZATION_SETTING,
    index_columns: Sequence[str] | None = (),
    strict: bool = False,
) -> list[str]:
    """The statements of :func:`enable_rls` one by one, for drivers that take one at a time (asyncpg)."""
    quoted, quoted_column, roles = _quoted_table(table), quote_identifier(column), quoted_roles(role)
    value = tenant_of_setting(column_type, setting)
    function = _beside(table, _name(table, column, "tenant")) + "()"
    if strict:
        value = function
    # (SELECT ...): evaluated once per statement instead of once per row.
    condition = f"({quoted_column} = (SELECT {value}))"
    return [
        "SET LOCAL lock_timeout = '3s'",
        f"ALTER TABLE {quoted} ALTER COLUMN {quoted_column} SET NOT NULL",
        f"ALTER TABLE {quoted} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {quoted} FORCE ROW LEVEL SECURITY",
        f"DROP POLICY IF EXISTS rhesis_tenant ON {quoted}",
        f"DROP POLICY IF EXISTS rhesis_tenant_floor ON {quoted}",
        f"DROP FUNCTION IF EXISTS {function}",
        *(_strict_function(function, column_type, setting) if strict else ()),
        f"CREATE POLICY rhesis_tenant ON {quoted} FOR ALL TO {roles}\n  USING {condition}\n  WITH CHECK {condition}",
        f"CREATE POLICY rhesis_tenant_floor ON {quoted} AS RESTRICTIVE FOR ALL TO PUBLIC\n"
        f"  USING {condition}\n  WITH CHECK {condition}",
        f"REVOKE TRUNCATE, REFERENCES, TRIGGER ON {quoted} FROM PUBLIC, {roles}",
        *_create_index(table, column, index_columns),
    ]


def disable_rls(table: str, **options: Unpack[DisableOptions]) -> str:
    """The SQL that undoes :func:`enable_rls`, but for NOT NULL and the revoked privileges.

    Every role with privileges on the table sees all rows afterwards.

    Args:
        table: the table, as ``table`` or ``schema.table``.
        column: the column that holds the organization.
        index_columns: what :func:`enable_rls` was given, since they are part of the index's name.

    Raises:
        ConfigurationError: a name cannot be an SQL name.
    """
    return _script(disable_rls_statements(table, **options))


def disable_rls_statements(
    table: str, *, column: str = "organization_id", index_columns: Sequence[str] | None = ()
) -> list[str]:
    """The statements of :func:`disable_rls` one by one."""
    quoted = _quoted_table(table)
    return [
        "SET LOCAL lock_timeout = '3s'",
        f"DROP POLICY IF EXISTS rhesis_tenant ON {quoted}",
        f"DROP POLICY IF EXISTS rhesis_tenant_floor ON {quoted}",
        f"DROP FUNCTION IF EXISTS {_beside(table, _name(table, column, 'tenant'))}()",
        f"ALTER TABLE {quoted} NO FORCE ROW LEVEL SECURITY",
        f"ALTER TABLE {quoted} DISABLE ROW LEVEL SECURITY",
        *(
            []
            if index_columns is None
            else [f"DROP INDEX IF EXISTS {_beside(table, _name(table, column, *index_columns, 'rls'))}"]
        ),
    ]


def tenant_of_setting(column_type: str = "uuid", setting: str = ORGANIZATION_SETTING) -> str:
    """The SQL expression of the current transaction's tenant, NULL without one.

    Raises:
        ConfigurationError: the type is not one of COLUMN_TYPES, or it is no name of a setting.
    """
    if column_type not in COLUMN_TYPES:
        raise ConfigurationError(f"column_type must be one of {', '.join(sorted(COLUMN_TYPES))}, not {column_type!r}")
    # NULLIF: after its first transaction a connection keeps the setting as '' for ever, and ''::uuid raises.
    return f"NULLIF(current_setting({setting_literal(setting)}, true), '')::{column_type}"


def _strict_function(function: str, column_type: str, setting: str) -> list[str]:
    # PARALLEL SAFE, without which no query on the table could be parallel.
    return [
        f"""\
CREATE OR REPLACE FUNCTION {function} RETURNS {column_type}
  LANGUAGE plpgsql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF COALESCE(current_setting({setting_literal(setting)}, true), '') = '' THEN
    RAISE insufficient_privilege USING
      MESSAGE = 'no tenant: the setting {setting} is missing or empty in this transaction',
      HINT = 'Use a tenant session: @tenant_session, or TenantSessions inside tenant_scope(...).';
  END IF;
  RETURN current_setting({setting_literal(setting)}, true);
END
$$""",
        f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC",
    ]


def _create_index(table: str, column: str, further: Sequence[str] | None) -> list[str]:
    if further is None:
        return []
    name = quote_identifier(_name(table, column, *further, "rls"))
    columns = ", ".join(map(quote_identifier, (column, *further)))
    return [f"CREATE INDEX IF NOT EXISTS {name} ON {_quoted_table(table)} ({columns})"]


def _script(statements: list[str]) -> str:
    return "".join(f"{statement};\n" for statement in statements)


def quoted_roles(role: Any) -> str:
    """One or several roles, as a list in SQL.

    Raises:
        ConfigurationError: there is none, or one has no usable name.
    """
    roles = [role] if isinstance(role, str) or not isinstance(role, Sequence) else role
    if not roles:
        raise ConfigurationError("role must name at least one role: the one that the application logs in as")
    return ", ".join(map(quote_identifier, roles))


def _quoted_table(table: str) -> str:
    parts = table.split(".")
    if len(parts) > 2:
        raise ConfigurationError(f"a table is named like 'table' or 'schema.table', not {table!r}")
    return ".".join(map(quote_identifier, parts))


def _beside(table: str, name: str) -> str:
    """The quoted name of something in the table's schema."""
    schema = table.rpartition(".")[0]
    return (quote_identifier(schema) + "." if schema else "") + quote_identifier(name)


def _name(table: str, *parts: str) -> str:
    name = "_".join([table.rpartition(".")[2], *parts])
    if len(name.encode()) <= 63:
        return name
    # PostgreSQL would cut it off, so that two long names could become one.
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[:54].decode(errors='ignore')}_{digest}"


def setting_literal(setting: str) -> str:
    """The name of a setting, as a literal in SQL.

    Raises:
        ConfigurationError: it is not like ``app.current_organization``.
    """
    prefix, dot, name = setting.partition(".") if isinstance(setting, str) else ("", "", "")
    if not dot or not all(part.isidentifier() and part.isascii() for part in (prefix, name)):
        raise ConfigurationError(f"a setting is named like 'app.current_organization', not {setting!r}")
    return f"'{setting}'"
