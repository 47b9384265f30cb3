"""Row-level security through SQLAlchemy: as DDL, as a listener, and on models that say whose their rows are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    Column,
    Connection,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Table,
    Text,
    create_mock_engine,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, TenantSessions
from rhesis_tasks.ddl import DisableRLS, EnableRLS
from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.models import TenantMixin, protect, tenant_column
from rhesis_tasks.settings import quote_identifier
from rhesis_tasks.testing import TenantDatabase

ACME = TenantContext("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "alice")
GLOBEX = TenantContext("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "bob")

PROTECTED = text("SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity ORDER BY relname")
FUNCTIONS = text("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
INDEXES = text("SELECT indexname FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname")


def protected(database: TenantDatabase) -> list[str]:
    """The application's tables under forced row-level security."""
    with database.owner.connect() as connection:
        return [name for name in connection.scalars(PROTECTED) if name not in {"task_record", "group_record"}]


Migration = Callable[[Connection], Any]


def with_psycopg(database: TenantDatabase, migration: Migration) -> None:
    with database.owner.begin() as connection:
        migration(connection)


def with_asyncpg(database: TenantDatabase, migration: Migration) -> None:
    async def migrate() -> None:
        engine = create_async_engine(database.owner.url.set(drivername="postgresql+asyncpg"), poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(migration)
        await engine.dispose()

    asyncio.run(migrate())


DRIVERS = pytest.mark.parametrize("driver", [with_psycopg, with_asyncpg])


def note_table(name: str = "note") -> Table:
    return Table(name, MetaData(), Column("organization_id", postgresql.UUID), Column("body", Text))


# --- as DDL ------------------------------------------------------------------------------------------------------


@DRIVERS
@pytest.mark.parametrize("name", ["note", "100% :mine"])
def test_executing_it_protects_and_unprotects_the_table(
    tenant_database: TenantDatabase, driver: Callable[..., None], name: str
) -> None:
    table = note_table(name)
    driver(tenant_database, table.create)

    driver(tenant_database, lambda connection: connection.execute(EnableRLS(name, role=tenant_database.role)))
    enabled = protected(tenant_database)
    driver(tenant_database, lambda connection: connection.execute(DisableRLS(table)))

    assert (enabled, protected(tenant_database)) == ([name], [])


@DRIVERS
def test_listening_to_the_creation_of_a_table_it_protects_it(
    tenant_database: TenantDatabase, driver: Callable[..., None]
) -> None:
    table = note_table()
    event.listen(table, "after_create", EnableRLS(table, role=tenant_database.role, strict=True))

    driver(tenant_database, table.metadata.create_all)

    assert protected(tenant_database) == ["note"]


def test_it_is_executed_only_if_its_condition_holds(tenant_database: TenantDatabase) -> None:
    table = note_table()
    for_oracle = EnableRLS(table, role=tenant_database.role).execute_if(dialect="oracle")
    event.listen(table, "after_create", for_oracle)

    with_psycopg(tenant_database, table.create)

    assert protected(tenant_database) == []


def test_compiled_it_is_a_script_that_protects(tenant_database: TenantDatabase) -> None:
    table = note_table()
    event.listen(table, "after_create", EnableRLS(table, role=tenant_database.role, strict=True))
    script: list[str] = []
    dialect = postgresql.dialect()
    mock = create_mock_engine("postgresql+psycopg://", lambda ddl, *_: script.append(str(ddl.compile(dialect=dialect))))

    table.metadata.create_all(mock, checkfirst=False)
    tenant_database.execute(";\n".join(script))

    assert protected(tenant_database) == ["note"]


def test_a_table_of_a_schema_is_named_with_it(tenant_database: TenantDatabase) -> None:
    table = Table("note", MetaData(schema="crm"), Column("organization_id", postgresql.UUID))
    tenant_database.execute("CREATE SCHEMA crm")
    event.listen(table, "after_create", EnableRLS(table, role=tenant_database.role))

    with_psycopg(tenant_database, table.create)

    with tenant_database.owner.connect() as connection:
        assert connection.scalars(text("SELECT schemaname FROM pg_policies WHERE tablename = 'note'")).all() == [
            "crm",
            "crm",
        ]


def test_a_table_with_a_dot_in_its_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="name contains a dot"):
        EnableRLS(note_table("shop.note"), role="app")


# --- models ------------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Folder(TenantMixin, Base):
    """The column of the mixin, and a key of the organization and an id."""

    __tablename__ = "folder"

    id: Mapped[int] = mapped_column(primary_key=True)
    organization_id: Mapped[UUID] = tenant_column(primary_key=True)
    name: Mapped[str]


class Page(TenantMixin, Base):
    """A foreign key that carries the organization."""

    __tablename__ = "page"
    __table_args__ = (ForeignKeyConstraint(["organization_id", "folder_id"], ["folder.organization_id", "folder.id"]),)

    id: Mapped[int] = mapped_column(primary_key=True)
    folder_id: Mapped[int]


class Country(Base):
    """Nobody's."""

    __tablename__ = "country"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def tables(tenant_database: TenantDatabase) -> TenantDatabase:
    """The database with the tables of the models, protected as they were created."""
    protect(Base.metadata, role=tenant_database.role)
    with_psycopg(tenant_database, Base.metadata.create_all)
    grant(tenant_database, "folder", "page", "country")
    return tenant_database


def grant(database: TenantDatabase, *names: str) -> None:
    database.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(names)} TO {quote_identifier(database.role)}")


def test_create_all_protects_the_tables_with_a_tenant_and_no_others(tables: TenantDatabase) -> None:
    assert protected(tables) == ["folder", "page"]
    with tables.owner.connect() as connection:
        # The primary key of folder begins with the organization, and serves.
        assert connection.scalars(INDEXES).all() == [
            "country_pkey",
            "folder_pkey",
            "page_organization_id_rls",
            "page_pkey",
        ]


def test_the_organization_comes_first_in_a_key() -> None:
    assert [column.name for column in Folder.__table__.primary_key] == ["organization_id", "id"]


def test_a_single_table_and_one_declared_later_are_protected_as_well(tenant_database: TenantDatabase) -> None:
    class Other(DeclarativeBase):
        pass

    protect(Other.metadata, role=tenant_database.role)

    class Later(TenantMixin, Other):
        __tablename__ = "later"

        id: Mapped[int] = mapped_column(primary_key=True)

    with_psycopg(tenant_database, Later.__table__.create)

    assert protected(tenant_database) == ["later"]


def test_rows_get_the_organization_of_the_transaction(tables: TenantDatabase) -> None:
    sessions = TenantSessions(tables.url)
    for tenant in (ACME, GLOBEX):
        with sessions.begin(tenant) as session:
            folder = Folder(id=1, name="letters")
            session.add(folder)
            session.flush()
            session.add(Page(id=1 if tenant is ACME else 2, folder_id=1))
            assert folder.organization_id == UUID(tenant.organization_id)
    with sessions.begin(ACME) as session:
        assert session.scalars(select(Folder.name)).all() == ["letters"]
        assert session.scalar(select(func.count()).select_from(Page)) == 1
    sessions.dispose()


def test_a_row_without_a_tenant_is_refused(tables: TenantDatabase) -> None:
    with pytest.raises(DBAPIError) as error, tables.owner.begin() as connection:
        connection.execute(insert(Folder).values(id=1, name="nobody's"))

    assert getattr(error.value.orig, "sqlstate", None) == "42501"


@pytest.mark.parametrize(
    ("column_type", "mine", "theirs"),
    [("text", "acme", "globex"), ("integer", "1", "2"), ("bigint", "5000000000", "7")],
)
def test_organizations_may_be_text_or_numbers(
    tenant_database: TenantDatabase, column_type: str, mine: str, theirs: str
) -> None:
    class Other(DeclarativeBase):
        pass

    class Thing(Other):
        __tablename__ = "thing"

        organization_id: Mapped[Any] = tenant_column(column_type, primary_key=True)
        id: Mapped[int] = mapped_column(Integer, primary_key=True)

    protect(Other.metadata, role=tenant_database.role)
    with_psycopg(tenant_database, Other.metadata.create_all)
    grant(tenant_database, "thing")
    sessions = TenantSessions(tenant_database.url)

    for organization in (mine, theirs):
        with sessions.begin(TenantContext(organization)) as session:
            session.add(Thing(id=1))
    with sessions.begin(TenantContext(mine)) as session:
        found = [str(each) for each in session.scalars(select(Thing.organization_id))]
    sessions.dispose()

    assert found == [mine]


def test_strict_models_leave_no_function_behind(tenant_database: TenantDatabase) -> None:
    protect(Base.metadata, role=tenant_database.role, strict=True)
    with_psycopg(tenant_database, Base.metadata.create_all)
    with tenant_database.owner.connect() as connection:
        assert len(connection.scalars(FUNCTIONS).all()) == 2

    with_psycopg(tenant_database, Base.metadata.drop_all)

    with tenant_database.owner.connect() as connection:
        assert connection.scalars(FUNCTIONS).all() == []


def test_a_role_without_a_name_is_refused_where_it_is_given() -> None:
    with pytest.raises(ConfigurationError, match="role must name at least one role"):
        protect(MetaData(), role=[])


def test_a_column_type_that_policies_do_not_know_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="column_type must be one of"):
        tenant_column("jsonb")
