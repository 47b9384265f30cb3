"""SQLAlchemy models whose rows belong to a tenant, and tables that are protected as they are created."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import BigInteger, Column, Connection, Integer, MetaData, Table, Text, Uuid, event, text
from sqlalchemy.orm import Mapped, MappedColumn, mapped_column
from sqlalchemy.types import TypeEngine

from .ddl import DisableRLS, EnableRLS
from .rls import ORGANIZATION_SETTING, quoted_roles, tenant_of_setting

__all__ = ["TenantMixin", "protect", "tenant_column"]

_TYPES: Final[dict[str, type[TypeEngine[Any]]]] = {
    "uuid": Uuid,
    "text": Text,
    "integer": Integer,
    "bigint": BigInteger,
}
_TENANT: Final = "rhesis_tasks.tenant"  # in the info of a column: the options of enable_rls() that it decides
_PROTECTED: Final = "rhesis_tasks.protected"  # in the info of a MetaData: the others


def tenant_column(
    column_type: str = "uuid", *, setting: str = ORGANIZATION_SETTING, **options: Any
) -> MappedColumn[Any]:
    """A column for the organization that a row belongs to: not null, by default the transaction's tenant.

    Args:
        column_type: uuid, text, integer or bigint.
        setting: the name of the setting that tenant sessions send.
        options: further ones of SQLAlchemy's ``mapped_column``, as ``primary_key=True``.

    Raises:
        ConfigurationError: the type is not one of these, or it is no name of a setting.
    """
    default = text(tenant_of_setting(column_type, setting))
    info = {_TENANT: {"column_type": column_type, "setting": setting}, **options.pop("info", {})}
    # The first column, so that a composite primary key begins with it.
    options = {"nullable": False, "sort_order": -1, "server_default": default, **options}
    return mapped_column(_TYPES[column_type](), info=info, **options)


class TenantMixin:
    """A model whose rows belong to an organization, a UUID.  An INSERT need not name it.

    A model whose organizations are no UUIDs, or that has the organization in its primary key, has a
    :func:`tenant_column` of its own instead::

        class Order(Base):
            organization_id: Mapped[str] = tenant_column("text", primary_key=True)
    """

    organization_id: Mapped[UUID] = tenant_column()


def protect(metadata: MetaData, *, role: str | Sequence[str], strict: bool = False) -> None:
    """Put each table with a :func:`tenant_column` under row-level security as it is created.

    Holds for ``metadata.create_all()`` and for a single table's ``create()``, also of tables declared later.
    Tables that are there already are not looked at.

    Args:
        metadata: of the models: ``Base.metadata``.
        role: the application's role, or several.
        strict: see :func:`rhesis_tasks.rls.enable_rls`.

    Raises:
        ConfigurationError: there is no role, or one has no usable name.
    """
    quoted_roles(role)
    metadata.info[_PROTECTED] = {"role": role, "strict": strict}


@event.listens_for(Table, "after_create")
def _enable(table: Table, connection: Connection, **_: Any) -> None:
    for column in _tenant_columns(table):
        # The primary key serves as the index, if it begins with the organization.
        leads = column is next(iter(table.primary_key.columns), None)
        options: dict[str, Any] = {"column": column.name, "index_columns": None if leads else ()}
        connection.execute(EnableRLS(table, **options, **column.info[_TENANT], **table.metadata.info[_PROTECTED]))


@event.listens_for(Table, "before_drop")
def _disable(table: Table, connection: Connection, **_: Any) -> None:
    # All else goes with the table, but a strict function would stay.
    for column in _tenant_columns(table) if table.metadata.info.get(_PROTECTED, {}).get("strict") else ():
        connection.execute(DisableRLS(table, column=column.name))


def _tenant_columns(table: Table) -> list[Column[Any]]:
    if _PROTECTED not in table.metadata.info:
        return []
    return [column for column in table.columns if _TENANT in column.info]
