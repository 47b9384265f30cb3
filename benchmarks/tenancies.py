"""The contenders of sessions.py: databases with the same rows, each set up as its contender wants it, and transactions.

What all have in common is the engine's options, the table, its indexes and where its rows lie.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    Uuid,
    bindparam,
    column,
    create_engine,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from rhesis_tasks import TenantContext, TenantSessions, tenant_scope, tenant_session
from rhesis_tasks.rls import enable_rls_statements

__all__ = [
    "DRIVERS",
    "NAMES",
    "QUERIES",
    "Contender",
    "MissingError",
    "Query",
    "contender",
    "server_version",
    "set_up",
    "tenants",
]

DRIVERS: Final = ("psycopg", "psycopg async", "asyncpg")
NAMES: Final = {
    "plain": "plain session, WHERE",
    "again": "plain session, once more",
    "begin": "rhesis-tasks, begin()",
    "decorator": "rhesis-tasks, @tenant_session",
    "pinging": "rhesis-tasks, begin() from a URL, which pings",
    "sqlalchemy-tenants": "sqlalchemy-tenants",
    "rls": "rls",
}
"""The contenders, in the order of the table; each with each driver."""

_APPLICATION: Final = "bench_app"
_OWNER: Final = "bench_owner"  # sqlalchemy-tenants logs in as the owner, who makes a role for each tenant
_DATABASES: Final = {
    "plain": "bench_plain",
    "rhesis": "bench_rhesis",
    "sqlalchemy-tenants": "bench_st",
    "rls": "bench_rls",
}
_USER: Final = "0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c12"


class MissingError(Exception):
    """What a contender needs is not installed."""


# --- the rows and what is asked for ----------------------------------------------------------------------------

_events: Final = Table(
    "events",
    MetaData(),
    Column("id", BigInteger, primary_key=True),
    Column("tenant", Uuid),  # sqlalchemy-tenants' policies know no other name
    Column("created_at", DateTime(timezone=True)),
    Column("amount", Integer),
    Column("note", Text),
)


@dataclass(frozen=True, slots=True)
class Query:
    """A query as row-level security lets one write it, and with the tenant's condition."""

    name: str
    bare: Select[Any]

    @property
    def explicit(self) -> Select[Any]:
        """The same with the condition."""
        return self.bare.where(_events.c.tenant == bindparam("tenant"))


QUERIES: Final = (
    Query("key", select(_events.c.amount, _events.c.note).where(_events.c.id == bindparam("id"))),
    Query("sum", select(func.sum(_events.c.amount))),
    Query("top 20", select(_events.c.id, _events.c.amount).order_by(_events.c.created_at.desc()).limit(20)),
)


def tenants(count: int) -> list[UUID]:
    """The tenants; row ``id`` belongs to the one at ``id % count``."""
    return [UUID(int=number) for number in range(1, count + 1)]


# --- the databases ---------------------------------------------------------------------------------------------


def set_up(superuser: str, rows: int, owners: Sequence[UUID]) -> None:
    """Make the databases: one is filled, the others are copies of it, so that the rows lie in the same places.

    Args:
        superuser: the URL of the server.
        rows: how many.
        owners: the tenants.
    """
    with _connected(superuser, "postgres") as connection:
        connection.exec_driver_sql(f"CREATE ROLE {_APPLICATION} LOGIN")
        connection.exec_driver_sql(f"CREATE ROLE {_OWNER} LOGIN CREATEROLE")
        connection.exec_driver_sql(f"CREATE DATABASE {_DATABASES['plain']}")
    with _connected(superuser, _DATABASES["plain"]) as connection:
        connection.exec_driver_sql(
            "CREATE TABLE events (id bigint PRIMARY KEY, tenant uuid NOT NULL, created_at timestamptz NOT NULL, "
            "amount integer NOT NULL, note text NOT NULL)"
        )
        connection.execute(_FILL, {"rows": rows, "tenants": len(owners)})
        connection.exec_driver_sql("CREATE INDEX ON events (tenant, created_at)")
        connection.exec_driver_sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON events TO {_APPLICATION}")
        connection.exec_driver_sql("VACUUM (ANALYZE) events")
    with _connected(superuser, "postgres") as connection:
        for name, database in _DATABASES.items():
            if name != "plain":
                connection.exec_driver_sql(f"CREATE DATABASE {database} TEMPLATE {_DATABASES['plain']}")
    for name, prepare in _PREPARE.items():
        if name not in _MODULES or _installed(name):
            with _connected(superuser, _DATABASES[name]) as connection:
                prepare(connection, owners)
    with _connected(superuser, "postgres") as connection:
        connection.exec_driver_sql("CHECKPOINT")


_FILL: Final = text(
    """
    INSERT INTO events
    SELECT id, CAST(lpad(to_hex(id % :tenants + 1), 32, '0') AS uuid),
           timestamptz '2025-01-01' + make_interval(secs => id), id % 997, 'note ' || id
    FROM generate_series(1, :rows) AS id
    """
)


@contextmanager
def _connected(superuser: str, database: str) -> Iterator[Connection]:
    """A connection in autocommit mode."""
    engine = create_engine(_url(superuser, "psycopg", database), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()  # a database that is copied must have no connections


def server_version(superuser: str) -> str:
    """PostgreSQL's."""
    with _connected(superuser, "postgres") as connection:
        return str(connection.exec_driver_sql("SHOW server_version").scalar_one()).partition(" ")[0]


def _prepare_rhesis(connection: Connection, _: Sequence[UUID]) -> None:
    for statement in enable_rls_statements("events", role=_APPLICATION, column="tenant", index_columns=None):
        connection.exec_driver_sql(statement)


def _prepare_sqlalchemy_tenants(connection: Connection, owners: Sequence[UUID]) -> None:
    """What its Alembic hook and ``create_tenant()`` do."""
    from sqlalchemy_tenants import core
    from sqlalchemy_tenants.managers import PostgresManager

    connection.exec_driver_sql(f"ALTER TABLE events OWNER TO {_OWNER}")
    connection.exec_driver_sql(
        core._GET_TENANT_FUNCTION_TEMPLATE.format(
            name=core.GET_TENANT_FUNCTION_NAME, tenant_role_prefix=core.TENANT_ROLE_PREFIX
        )
    )
    connection.exec_driver_sql("ALTER TABLE events ENABLE ROW LEVEL SECURITY")
    connection.exec_driver_sql(core.get_table_policy(table_name="events", column_type=UUID))
    engine = create_engine(connection.engine.url.set(username=_OWNER))
    manager = PostgresManager.from_engine(engine, schema_name="public")
    for owner in owners:
        manager.create_tenant(owner)
    engine.dispose()


def _prepare_rls(connection: Connection, _: Sequence[UUID]) -> None:
    """As its README has it."""
    from rls.alembic_rls import set_metadata_info
    from rls.create_policies import create_policies
    from rls.schemas import Command, ConditionArg, Permissive
    from sqlalchemy import UUID as SQL_UUID  # it knows no dialect, so Uuid would be CHAR(32)

    class Base(DeclarativeBase):
        pass

    class Event(Base):
        __table__ = _events.to_metadata(Base.metadata)
        __rls_policies__: Final = [
            Permissive(
                condition_args=[ConditionArg(comparator_name="tenant", type=SQL_UUID)],
                cmd=[Command.all],
                custom_expr=lambda tenant: column("tenant") == tenant,
            )
        ]

    base: Any = Base  # it asks for the type that SQLAlchemy 1.4 had
    set_metadata_info(base)
    create_policies(base, connection)


_PREPARE: Final[Mapping[str, Callable[[Connection, Sequence[UUID]], None]]] = {
    "rhesis": _prepare_rhesis,
    "sqlalchemy-tenants": _prepare_sqlalchemy_tenants,
    "rls": _prepare_rls,
}
_MODULES: Final = {"sqlalchemy-tenants": "sqlalchemy_tenants", "rls": "rls"}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(_MODULES[name]) is not None


# --- the contenders --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """How one contender runs a query in a transaction of its own, for a tenant."""

    transaction: Callable[[UUID, Select[Any], Mapping[str, Any]], Any]  #: gives the rows, or an awaitable of them
    close: Callable[[], Any]
    explicit: bool = False  #: whether the query has to have the tenant's condition
    scope: Callable[[UUID], AbstractContextManager[object]] = lambda _: nullcontext()  #: around it, not measured

    def statement(self, query: Query) -> Select[Any]:
        """The query as this contender needs it."""
        return query.explicit if self.explicit else query.bare


def contender(name: str, driver: str, superuser: str, owners: Sequence[UUID], *, host: str | None = None) -> Contender:
    """A contender with an engine of its own.

    Args:
        name: of NAMES.
        driver: of DRIVERS.
        superuser: the URL of the server.
        owners: the tenants.
        host: the folder of a socket to be used instead of the server's.

    Raises:
        MissingError: it is not installed.
    """
    if name in _MODULES and not _installed(name):
        raise MissingError(f"not installed: PyPI's {name}")
    database = _DATABASES[_SET_UP.get(name, name)]
    url = _url(superuser, driver.partition(" ")[0], database, host)
    login = _OWNER if name == "sqlalchemy-tenants" else _APPLICATION
    makers = _SYNC if driver == "psycopg" else _ASYNC
    return makers[name](url.set(username=login), owners)


_SET_UP: Final = {"again": "plain", "begin": "rhesis", "decorator": "rhesis", "pinging": "rhesis"}


def _url(superuser: str, driver: str, database: str, host: str | None = None) -> URL:
    url = make_url(superuser).set(drivername=f"postgresql+{driver}", database=database)
    return url if host is None else url.update_query_dict({"host": host})


def _contexts(owners: Sequence[UUID]) -> dict[UUID, TenantContext]:
    return {owner: TenantContext(str(owner), _USER) for owner in owners}


def _plain(url: URL, _: Sequence[UUID]) -> Contender:
    engine = create_engine(url)
    maker = sessionmaker(engine)

    def transaction(_: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        with maker.begin() as session:
            return session.execute(statement, parameters).all()

    return Contender(transaction, engine.dispose, explicit=True)


def _plain_async(url: URL, _: Sequence[UUID]) -> Contender:
    engine = create_async_engine(url)
    maker = async_sessionmaker(engine)

    async def transaction(_: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        async with maker.begin() as session:
            return (await session.execute(statement, parameters)).all()

    return Contender(transaction, engine.dispose, explicit=True)


def _begin(url: URL, owners: Sequence[UUID]) -> Contender:
    return _begin_of(TenantSessions(create_engine(url)), owners)


def _pinging(url: URL, owners: Sequence[UUID]) -> Contender:
    return _begin_of(TenantSessions(url), owners)


def _begin_of(sessions: TenantSessions, owners: Sequence[UUID]) -> Contender:
    contexts = _contexts(owners)

    def transaction(owner: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        with sessions.begin(contexts[owner]) as session:
            return session.execute(statement, parameters).all()

    return Contender(transaction, sessions.dispose)


def _begin_async(url: URL, owners: Sequence[UUID]) -> Contender:
    return _begin_async_of(TenantSessions(create_async_engine(url)), owners)


def _pinging_async(url: URL, owners: Sequence[UUID]) -> Contender:
    return _begin_async_of(TenantSessions(url), owners)


def _begin_async_of(sessions: TenantSessions, owners: Sequence[UUID]) -> Contender:
    contexts = _contexts(owners)

    async def transaction(owner: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        async with sessions.async_begin(contexts[owner]) as session:
            return (await session.execute(statement, parameters)).all()

    return Contender(transaction, sessions.async_dispose)


def _decorator(url: URL, owners: Sequence[UUID]) -> Contender:
    sessions, contexts = TenantSessions(create_engine(url)), _contexts(owners)

    @tenant_session(sessions=sessions)
    def rows(db: Session, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        return db.execute(statement, parameters).all()

    def transaction(_: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        return rows(statement, parameters)

    return Contender(transaction, sessions.dispose, scope=lambda owner: tenant_scope(contexts[owner]))


def _decorator_async(url: URL, owners: Sequence[UUID]) -> Contender:
    sessions, contexts = TenantSessions(create_async_engine(url)), _contexts(owners)

    @tenant_session(sessions=sessions)
    async def rows(db: AsyncSession, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        return (await db.execute(statement, parameters)).all()

    def transaction(_: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        return rows(statement, parameters)

    return Contender(transaction, sessions.async_dispose, scope=lambda owner: tenant_scope(contexts[owner]))


def _sqlalchemy_tenants(url: URL, _: Sequence[UUID]) -> Contender:
    from sqlalchemy_tenants.managers import PostgresManager

    engine = create_engine(url)
    manager = PostgresManager.from_engine(engine, schema_name="public")

    def transaction(owner: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        with manager.new_tenant_session(owner) as session:
            rows = session.execute(statement, parameters).all()
            session.commit()
            return rows

    return Contender(transaction, engine.dispose)


def _sqlalchemy_tenants_async(url: URL, _: Sequence[UUID]) -> Contender:
    from sqlalchemy_tenants.aio.managers import PostgresManager

    engine = create_async_engine(url)
    manager = PostgresManager.from_engine(engine, schema_name="public")

    async def transaction(owner: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        async with manager.new_tenant_session(owner) as session:
            rows = (await session.execute(statement, parameters)).all()
            await session.commit()
            return rows

    return Contender(transaction, engine.dispose)


def _rls_contexts(owners: Sequence[UUID]) -> Any:
    """What gives the context, as its documentation has it, frozen as it likes it best."""
    from pydantic import BaseModel, ConfigDict
    from rls.rls_sessioner import ContextGetter

    class Context(BaseModel):
        model_config = ConfigDict(frozen=True)
        tenant: UUID

    contexts = {owner: Context(tenant=owner) for owner in owners}

    class Getter(ContextGetter):
        def get_context(self, owner: UUID) -> Context:
            return contexts[owner]

    return Getter()


def _rls(url: URL, owners: Sequence[UUID]) -> Contender:
    from rls.rls_session import RlsSession
    from rls.rls_sessioner import RlsSessioner

    engine = create_engine(url)
    sessions = RlsSessioner(sessionmaker(engine, class_=RlsSession), _rls_contexts(owners))

    def transaction(owner: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        with sessions(owner) as session:
            rows = session.execute(statement, parameters).all()
            session.commit()
            return rows

    return Contender(transaction, engine.dispose)


def _rls_async(url: URL, owners: Sequence[UUID]) -> Contender:
    from rls.rls_session import AsyncRlsSession
    from rls.rls_sessioner import AsyncRlsSessioner

    engine = create_async_engine(url)
    sessions = AsyncRlsSessioner(async_sessionmaker(engine, class_=AsyncRlsSession), _rls_contexts(owners))

    async def transaction(owner: UUID, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        async with sessions(owner) as session:
            rows = (await session.execute(statement, parameters)).all()
            await session.commit()
            return rows

    return Contender(transaction, engine.dispose)


_SYNC: Final[Mapping[str, Callable[[URL, Sequence[UUID]], Contender]]] = {
    "plain": _plain,
    "again": _plain,
    "begin": _begin,
    "decorator": _decorator,
    "pinging": _pinging,
    "sqlalchemy-tenants": _sqlalchemy_tenants,
    "rls": _rls,
}
_ASYNC: Final[Mapping[str, Callable[[URL, Sequence[UUID]], Contender]]] = {
    "plain": _plain_async,
    "again": _plain_async,
    "begin": _begin_async,
    "decorator": _decorator_async,
    "pinging": _pinging_async,
    "sqlalchemy-tenants": _sqlalchemy_tenants_async,
    "rls": _rls_async,
}
