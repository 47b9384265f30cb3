"""Row-level security as operations of Alembic: ``op.enable_rls(...)`` and ``op.disable_rls(...)``.

Imported once, in ``env.py``; the operations are there afterwards, in every migration::

    import rhesis_tasks.migrations  # noqa: F401
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from typing_extensions import override

from .ddl import verbatim
from .errors import ConfigurationError, MissingExtraError
from .rls import DisableOptions, EnableOptions, disable_rls_statements, enable_rls_statements

try:
    from alembic.operations import MigrateOperation, Operations
except ImportError as error:
    raise MissingExtraError.of("alembic", "alembic") from error

__all__ = ["DisableRLSOp", "EnableRLSOp"]


class ReversibleOptions(DisableOptions, total=False):
    """The keyword arguments of ``op.disable_rls``: those of enable_rls(), of which none is required."""

    role: str | Sequence[str]
    column_type: str
    setting: str
    strict: bool


@Operations.register_operation("enable_rls")
class EnableRLSOp(MigrateOperation):
    """``op.enable_rls(table, role=...)``"""

    def __init__(self, table: str, **options: Unpack[EnableOptions]) -> None:
        self.table = table
        self.options = options
        self.statements = enable_rls_statements(table, **options)

    @classmethod
    def enable_rls(cls, operations: Operations, table: str, **options: Unpack[EnableOptions]) -> None:
        """Put a table under row-level security.

        Args:
            table: its name, as ``table`` or ``schema.table``.
            options: as for :func:`rhesis_tasks.rls.enable_rls`.

        Raises:
            ConfigurationError: as enable_rls().
        """
        operations.invoke(cls(table, **options))

    @override
    def reverse(self) -> DisableRLSOp:
        return DisableRLSOp(self.table, **self.options)


@Operations.register_operation("disable_rls")
class DisableRLSOp(MigrateOperation):
    """``op.disable_rls(table)``"""

    def __init__(self, table: str, **options: Unpack[ReversibleOptions]) -> None:
        self.table = table
        self.options = options
        undone = {name: value for name, value in options.items() if name in DisableOptions.__annotations__}
        self.statements = disable_rls_statements(table, **undone)  # type: ignore[arg-type]

    @classmethod
    def disable_rls(cls, operations: Operations, table: str, **options: Unpack[ReversibleOptions]) -> None:
        """Undo ``op.enable_rls``.

        Args:
            table: its name, as ``table`` or ``schema.table``.
            options: what ``op.enable_rls`` was given; ``column`` and ``index_columns`` are needed, the others only
                for ``reverse()``.

        Raises:
            ConfigurationError: as disable_rls().
        """
        operations.invoke(cls(table, **options))

    @override
    def reverse(self) -> EnableRLSOp:
        if "role" not in self.options:
            raise ConfigurationError(
                f"op.disable_rls({self.table!r}) cannot be reversed: it does not say for which role to enable it.  "
                "Give it all arguments of op.enable_rls"
            )
        return EnableRLSOp(self.table, **self.options)


@Operations.implementation_for(EnableRLSOp)
@Operations.implementation_for(DisableRLSOp)
def _run(operations: Operations, operation: EnableRLSOp | DisableRLSOp) -> None:
    for statement in operation.statements:
        operations.execute(verbatim(statement))
