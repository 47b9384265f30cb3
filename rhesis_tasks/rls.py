"""Row-level security: the SQL that makes PostgreSQL keep tenants apart.

The policies read a transaction-local setting that tenant sessions send at the start of each transaction.
Without it, or with an empty one, a query returns nothing and a write fails.  It stops mistakes, not SQL
injection: code that can run arbitrary SQL can set the setting too.
"""

from __future__ import annotations

import hashlib
from typing import Final

from .errors import ConfigurationError
from .settings import quote_identifier

__all__ = ["ORGANIZATION_SETTING", "disable_rls", "enable_rls"]

ORGANIZATION_SETTING: Final = "app.current_organization"

_COLUMN_TYPES: Final = frozenset({"uuid", "text", "integer", "bigint"})


def enable_rls(
    table: str,
    *,
    role: str,
    column: str = "organization_id",
    column_type: str = "uuid",
    setting: str = ORGANIZATION_SETTING,
) -> str:
    """The SQL that puts a table under forced row-level security, to be run by its owner in one transaction.

    Besides the policy for ``role`` it lays a floor: a restrictive policy for everybody, so that one stray
    permissive policy added later opens nothing.  TRUNCATE, REFERENCES and TRIGGER, which policies do not
    govern, are revoked; the column becomes NOT NULL and gets an index.  Running it again replaces the policies.

    Args:
        table: the table, as ``table`` or ``schema.table``.
        role: the application's role: neither superuser nor owner nor BYPASSRLS.
        column: the column that holds the organization.
        column_type: its type: uuid, text, integer or bigint.
        setting: the name of the setting that tenant sessions send.

    Raises:
        ConfigurationError: a name cannot be an SQL name, or the type is not one of these.
    """
    if column_type not in _COLUMN_TYPES:
        raise ConfigurationError(f"column_type must be one of {', '.join(sorted(_COLUMN_TYPES))}, not {column_type!r}")
    quoted, quoted_role = _quoted_table(table), quote_identifier(role)
    # NULLIF: after its first transaction a connection keeps the setting as '' for ever, and ''::uuid raises.
    # (SELECT ...): evaluated once per statement instead of once per row.
    value = f"(SELECT NULLIF(current_setting({_literal(setting)}, true), '')::{column_type})"
    condition = f"({quote_identifier(column)} = {value})"
    return f"""\
SET LOCAL lock_timeout = '3s';
ALTER TABLE {quoted} ALTER COLUMN {quote_identifier(column)} SET NOT NULL;
ALTER TABLE {quoted} ENABLE ROW LEVEL SECURITY;
ALTER TABLE {quoted} FORCE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS rhesis_tenant ON {quoted};
CREATE POLICY rhesis_tenant ON {quoted} FOR ALL TO {quoted_role}
  USING {condition}
  WITH CHECK {condition};
DROP POLICY IF EXISTS rhesis_tenant_floor ON {quoted};
CREATE POLICY rhesis_tenant_floor ON {quoted} AS RESTRICTIVE FOR ALL TO PUBLIC
  USING {condition}
  WITH CHECK {condition};
REVOKE TRUNCATE, REFERENCES, TRIGGER ON {quoted} FROM PUBLIC, {quoted_role};
CREATE INDEX IF NOT EXISTS {quote_identifier(_index_name(table, column))} ON {quoted} ({quote_identifier(column)});
"""


def disable_rls(table: str, *, column: str = "organization_id") -> str:
    """The SQL that undoes :func:`enable_rls`, but for NOT NULL and the revoked privileges.

    Every role with privileges on the table sees all rows afterwards.
    """
    quoted = _quoted_table(table)
    schema = table.rpartition(".")[0]
    index = (quote_identifier(schema) + "." if schema else "") + quote_identifier(_index_name(table, column))
    return f"""\
SET LOCAL lock_timeout = '3s';
DROP POLICY IF EXISTS rhesis_tenant ON {quoted};
DROP POLICY IF EXISTS rhesis_tenant_floor ON {quoted};
ALTER TABLE {quoted} NO FORCE ROW LEVEL SECURITY;
ALTER TABLE {quoted} DISABLE ROW LEVEL SECURITY;
DROP INDEX IF EXISTS {index};
"""


def _quoted_table(table: str) -> str:
    return ".".join(quote_identifier(part) for part in table.split("."))


def _index_name(table: str, column: str) -> str:
    name = f"{table.rpartition('.')[2]}_{column}_rls"
    if len(name.encode()) <= 63:
        return name
    # PostgreSQL would cut it off, so that two long names could become one.
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[:54].decode(errors='ignore')}_{digest}"


def _literal(setting: str) -> str:
    prefix, dot, name = setting.partition(".")
    if not dot or not all(part.isidentifier() and part.isascii() for part in (prefix, name)):
        raise ConfigurationError(f"a setting is named like 'app.current_organization', not {setting!r}")
    return f"'{setting}'"
