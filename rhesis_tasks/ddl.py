"""Row-level security as SQLAlchemy's DDL: executed on a connection, or after a table was created."""

from __future__ import annotations

from typing import Any, Unpack

from sqlalchemy import DDL, Connection, CursorResult, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.compiler import DDLCompiler
from typing_extensions import override

from .errors import ConfigurationError
from .rls import DisableOptions, EnableOptions, disable_rls_statements, enable_rls_statements

__all__ = ["DisableRLS", "EnableRLS"]


class _Statements(ExecutableDDLElement):
    """Several statements that belong together, for one table."""

    inherit_cache = False

    def __init__(self, table: str | Table, statements: list[str]) -> None:
        self.table = table
        self.statements = statements

    @override
    def _execute_on_connection(self, connection: Connection, *_: Any, **__: Any) -> CursorResult[Any]:
        # One by one: asyncpg prepares what it sends, and several statements cannot be prepared at once.
        return [connection.execute(verbatim(statement)) for statement in self.statements][-1]


class EnableRLS(_Statements):
    """Put a table under row-level security.

    For ``connection.execute(...)``, and for ``event.listen(table, "after_create", ...)``.  Compiled, without a
    connection, it is one text of several statements.

    Args:
        table: its name, as ``table`` or ``schema.table``, or the Table.
        options: as for :func:`rhesis_tasks.rls.enable_rls`.

    Raises:
        ConfigurationError: as enable_rls().
    """

    def __init__(self, table: str | Table, **options: Unpack[EnableOptions]) -> None:
        super().__init__(table, enable_rls_statements(_name(table), **options))


class DisableRLS(_Statements):
    """Undo :class:`EnableRLS`.

    Args:
        table: its name, as ``table`` or ``schema.table``, or the Table.
        options: as for :func:`rhesis_tasks.rls.disable_rls`.

    Raises:
        ConfigurationError: as disable_rls().
    """

    def __init__(self, table: str | Table, **options: Unpack[DisableOptions]) -> None:
        super().__init__(table, disable_rls_statements(_name(table), **options))


def verbatim(statement: str) -> DDL:
    """A statement that SQLAlchemy takes as it is, whatever ``%`` and ``:`` it holds."""
    return DDL(statement.replace("%", "%%"))  # type: ignore[no-untyped-call]


@compiles(_Statements)
def _compiled(element: _Statements, compiler: DDLCompiler, **options: Any) -> str:
    return ";\n".join(compiler.process(verbatim(statement), **options) for statement in element.statements)


def _name(table: str | Table) -> str:
    if isinstance(table, str):
        return table
    if "." in table.name or (table.schema and "." in table.schema):
        raise ConfigurationError(f"a table whose name contains a dot cannot be put under row-level security: {table!r}")
    return f"{table.schema}.{table.name}" if table.schema else table.name
