"""What sessions are made from, how their transactions are begun, and what they say when the database refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from servers import ON_BOTH_SERVERS
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.event import registry
from sqlalchemy.exc import DataError, DBAPIError, InvalidRequestError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from rhesis_tasks import TenantContext, TenantSessions, tenant_scope, tenant_session
from rhesis_tasks.binding import SettingNames
from rhesis_tasks.errors import (
    ConfigurationError,
    MissingTenantError,
    NotConfiguredError,
    PermissionDeniedError,
    PolicyViolationError,
    SettingMissingError,
    SettingValueError,
    TenantConflictError,
    TenantDatabaseError,
    TenantSessionError,
    UnsafeConnectionError,
)
from rhesis_tasks.rls import disable_rls, enable_rls
from rhesis_tasks.sessions import TenantSession
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

if TYPE_CHECKING:
    from conftest import Notes

pytestmark = ON_BOTH_SERVERS


@pytest.fixture
def tenant_database(emptied_database: TenantDatabase) -> TenantDatabase:
    return emptied_database


SEEN = text("SELECT body FROM note ORDER BY body")
SHOWN = ("transaction_read_only", "transaction_isolation", "statement_timeout", "lock_timeout", "role")
SHOW = text(f"SELECT {', '.join(f'current_setting({name!r})' for name in SHOWN)}")
USUAL = {
    "transaction_read_only": "off",
    "transaction_isolation": "read committed",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "role": "none",
}
ALL = ["a1", "a2", "a3", "g1", "g2"]

KINDS = ["sync", "psycopg", "asyncpg"]
OfEachKind = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def single(url: Any, kind: str, **options: Any) -> Iterator[TenantSessions]:
    """Sessions on a pool of one connection, by a driver."""
    driver = "psycopg" if kind == "sync" else kind
    url = database_url(url).set(drivername=f"postgresql+{driver}")
    sessions = TenantSessions(url, pool_size=1, max_overflow=0, pool_timeout=5, **options)
    yield sessions
    sessions.dispose()


def use(sessions: TenantSessions, kind: str, work: Callable[[Session], Any], way: str = "begin", **options: Any) -> Any:
    """What a function returns for a session of one kind: work on an AsyncSession is its run_sync()."""
    if kind == "sync":
        with getattr(sessions, way)(**options) as db:
            return work(db)

    async def main() -> Any:
        try:
            async with getattr(sessions, f"async_{way}")(**options) as db:
                return await db.run_sync(work)
        finally:
            await sessions.async_dispose()

    return asyncio.run(main())


def shown(db: Session | Connection) -> dict[str, str]:
    return dict(zip(SHOWN, db.execute(SHOW).one(), strict=True))


# --- how transactions are begun ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Observed:
    """What transactions with options are like."""

    first: dict[str, str]
    second: dict[str, str]
    statements: list[str]
    afterwards: dict[str, str]


def observe(sessions: TenantSessions, kind: str, tenant: TenantContext, **options: Any) -> Observed:
    """Two transactions of one session, and then one of nobody's on the same connection."""
    statements: list[str] = []

    def record(engine: Engine) -> None:
        listen = event.listen
        listen(engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: statements.append(statement))

    def pid(connection: Any) -> Any:
        return connection.scalar(text("SELECT pg_backend_pid()"))

    def two(db: Session) -> tuple[Any, ...]:
        first = shown(db)
        db.commit()
        statements.clear()
        second = shown(db)
        db.commit()
        return first, second, list(statements)

    if kind == "sync":
        record(sessions.engine)
        with sessions.begin(tenant, **options) as db:
            before = pid(db)
            found = two(db)
        with sessions.engine.connect() as connection:
            assert pid(connection) == before, "the test needs the same connection"
            return Observed(*found, shown(connection))

    async def main() -> Observed:
        record(sessions.async_engine().sync_engine)
        try:
            async with sessions.async_begin(tenant, **options) as db:
                before = await db.run_sync(pid)
                found = await db.run_sync(two)
            async with sessions.async_engine().connect() as connection:
                assert await connection.run_sync(pid) == before, "the test needs the same connection"
                return Observed(*found, await connection.run_sync(shown))
        finally:
            await sessions.async_dispose()

    return asyncio.run(main())


@OfEachKind
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"readonly": True}, {"transaction_read_only": "on"}),
        ({"isolation_level": "REPEATABLE READ"}, {"transaction_isolation": "repeatable read"}),
        ({"statement_timeout": 1.5}, {"statement_timeout": "1500ms"}),
        ({"lock_timeout": timedelta(seconds=2)}, {"lock_timeout": "2s"}),
        (
            {"readonly": True, "isolation_level": "SERIALIZABLE", "statement_timeout": 60, "lock_timeout": 0.001},
            {
                "transaction_read_only": "on",
                "transaction_isolation": "serializable",
                "statement_timeout": "1min",
                "lock_timeout": "1ms",
            },
        ),
    ],
    ids=["readonly", "isolation_level", "statement_timeout", "lock_timeout", "all"],
)
def test_options_hold_for_each_transaction_of_a_session_and_cost_nothing_and_leave_nothing(
    notes: Notes, kind: str, options: dict[str, Any], expected: dict[str, str]
) -> None:
    with single(notes.url, kind) as sessions:
        observed = observe(sessions, kind, notes.acme, **options)

    assert observed.first == observed.second == {**USUAL, **expected}
    assert [statement.split("(")[0] for statement in observed.statements] == [
        "SELECT set_config",
        "SELECT current_setting",
    ]
    assert observed.afterwards == USUAL


@OfEachKind
def test_the_database_enforces_the_options(notes: Notes, kind: str) -> None:
    with single(notes.url, kind) as sessions, notes.database.owner.begin() as locking:
        locking.exec_driver_sql("LOCK TABLE note")
        locked = {"tenant": notes.acme, "lock_timeout": 0.05}
        with pytest.raises(DBAPIError, match="lock timeout"):
            use(sessions, kind, lambda db: db.execute(SEEN), **locked)
        slow = {"tenant": notes.acme, "statement_timeout": timedelta(milliseconds=50)}
        with pytest.raises(DBAPIError, match="statement timeout"):
            use(sessions, kind, lambda db: db.execute(text("SELECT pg_sleep(10)")), **slow)
    with single(notes.url, kind) as sessions, pytest.raises(DBAPIError, match="read-only transaction"):
        use(sessions, kind, lambda db: notes.write(db, notes.acme, "a4"), tenant=notes.acme, readonly=True)


@OfEachKind
def test_options_go_with_core_connections_too(notes: Notes, kind: str) -> None:
    options: dict[str, Any] = {"readonly": True, "isolation_level": "SERIALIZABLE", "lock_timeout": 1}
    with single(notes.url, kind) as sessions:
        found = use(sessions, kind, shown, "connection", tenant=notes.acme, **options)  # type: ignore[arg-type]

    expected = {"transaction_read_only": "on", "transaction_isolation": "serializable", "lock_timeout": "1s"}
    assert found == {**USUAL, **expected}


@pytest.mark.parametrize(
    "wrong",
    [
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "serializable"},
        {"readonly": "false"},
        {"readonly": 0},
        {"statement_timeout": 0},
        {"statement_timeout": True},
        {"statement_timeout": "5s"},
        {"lock_timeout": -1},
        {"lock_timeout": float("nan")},
        {"lock_timeout": float("inf")},
        {"lock_timeout": timedelta(0)},
    ],
    ids=str,
)
def test_a_wrong_option_is_an_error_where_it_is_written(notes: Notes, wrong: dict[str, Any]) -> None:
    connected: list[str] = []
    with single(notes.url, "sync") as sessions, tenant_scope(notes.acme):
        event.listen(sessions.engine, "connect", lambda *_: connected.append("connected"))

        async def asynchronous() -> None:
            with pytest.raises(ConfigurationError):
                sessions.async_session(**wrong)
            with pytest.raises(ConfigurationError):
                await sessions.async_begin(**wrong).__aenter__()
            with pytest.raises(ConfigurationError):
                await sessions.async_connection(**wrong).__aenter__()

        for call in (sessions, tenant_session):
            with pytest.raises(ConfigurationError, match=next(iter(wrong))):
                call(**wrong)
        for block in (sessions.begin, sessions.connection):
            with pytest.raises(ConfigurationError, match=next(iter(wrong))):
                block(**wrong).__enter__()
        asyncio.run(asynchronous())

    assert connected == []


def test_sessions_with_options_leave_nothing_in_memory(notes: Notes) -> None:
    def listeners() -> int:
        gc.collect()
        return len(registry._key_to_collection)

    with single(notes.url, "sync") as sessions:
        counts = []
        for _ in range(3):
            for _ in range(10):
                with sessions.begin(notes.acme, readonly=True) as db:
                    assert notes.seen(db) == notes.of(notes.acme)
            counts.append(listeners())

    assert counts[0] == counts[1] == counts[2]


# --- names of settings -------------------------------------------------------------------------------------------

OTHER_NAMES = SettingNames(organization="shop.tenant", user="shop.person", project="shop.project")


@OfEachKind
@pytest.mark.parametrize("way", ["begin", "connection"])
def test_policies_may_read_settings_of_other_names(notes: Notes, kind: str, way: str) -> None:
    notes.database.execute(enable_rls("note", role=notes.database.role, setting="shop.tenant"))
    people = text("SELECT current_setting('shop.person', true), current_setting('app.current_user', true)")

    def look(db: Any) -> Any:
        return notes.seen(db), tuple(db.execute(people).one())

    with single(notes.url, kind, setting_names=OTHER_NAMES) as sessions:
        assert use(sessions, kind, look, way, tenant=notes.globex) == (notes.of(notes.globex), ("bob", None))
    with single(notes.url, kind) as usual:
        assert use(usual, kind, look, way, tenant=notes.globex) == ([], (None, "bob"))


@pytest.mark.parametrize(
    "names", [{"organization": "tenant"}, {"user": "app.x'y"}, {"user": "app.a", "project": "app.a"}], ids=str
)
def test_wrong_names_of_settings_are_refused(names: dict[str, str], postgres_url: str) -> None:
    with pytest.raises(ConfigurationError, match="setting"):
        SettingNames(**names)


# --- several databases -------------------------------------------------------------------------------------------


@pytest.fixture
def second(postgres_url: str, notes: Notes) -> Iterator[TenantDatabase]:
    """Another database, with the orders of the tenants."""
    with new_tenant_database(postgres_url) as database:
        database.execute(
            "CREATE TABLE orders (organization_id uuid, item text)",
            f"INSERT INTO orders VALUES ('{notes.acme.organization_id}', 'tea'),"
            f" ('{notes.globex.organization_id}', 'coffee')",
            f"GRANT SELECT ON orders TO {quote_identifier(database.role)}",
            enable_rls("orders", role=database.role),
        )
        yield database


ITEMS = text("SELECT item FROM orders")


def test_sessions_of_two_databases_at_once_carry_the_tenant_to_both(notes: Notes, second: TenantDatabase) -> None:
    with single(notes.url, "sync") as one, single(second.url, "sync") as two:
        with tenant_scope(notes.globex), one.begin() as first, two.begin() as other:
            assert (notes.seen(first), other.scalars(ITEMS).all()) == (notes.of(notes.globex), ["coffee"])

        with one.begin(notes.acme) as first, two.begin(notes.globex) as other:
            assert (notes.seen(first), other.scalars(ITEMS).all()) == (notes.of(notes.acme), ["coffee"])


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    organization_id: Mapped[str]
    item: Mapped[str] = mapped_column(primary_key=True)


def test_one_session_of_two_engines_carries_the_tenant_to_both(notes: Notes, second: TenantDatabase) -> None:
    main, orders = create_engine(database_url(notes.url)), create_engine(database_url(second.url))
    sessions = TenantSessions(sessionmaker(main, binds={Order: orders}))
    try:
        for options in ({}, {"readonly": True, "statement_timeout": 5}):
            with sessions.begin(notes.globex, **options) as db:  # type: ignore[arg-type]
                assert db.query(Order.item).all() == [("coffee",)]
                assert notes.seen(db) == notes.of(notes.globex)
                db.commit()
                assert db.query(Order.item).all() == [("coffee",)]
                if options:
                    assert shown(db)["transaction_read_only"] == "on"
                    assert (
                        db.connection(bind_arguments={"mapper": Order}).scalar(text("SHOW statement_timeout")) == "5s"
                    )
        with orders.connect() as connection:
            assert connection.scalars(ITEMS).all() == []
    finally:
        main.dispose()
        orders.dispose()


# --- what sessions are made from ---------------------------------------------------------------------------------


class Labelled(Session):
    label = "the application's own"


def test_a_sessionmakers_class_and_options_are_kept(notes: Notes) -> None:
    engine = create_engine(database_url(notes.url))
    maker = sessionmaker(engine, class_=Labelled, expire_on_commit=False, autoflush=False, info={"of": "the maker"})
    sessions = TenantSessions(maker)
    try:
        with sessions.begin(notes.acme) as db:
            assert isinstance(db, Labelled)
            assert isinstance(db, TenantSession)
            assert (db.expire_on_commit, db.autoflush, db.info["of"]) == (False, False, "the maker")
            assert notes.seen(db) == notes.of(notes.acme)
        assert sessions.engine is engine
        with maker() as plain:
            assert not isinstance(plain, TenantSession)
            assert notes.seen(plain) == []
    finally:
        engine.dispose()


def test_an_engine_and_an_async_engine_make_both_kinds(notes: Notes) -> None:
    url = database_url(notes.url)
    engine = create_engine(url)

    async def main() -> None:
        async_engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        for second in (async_engine, async_sessionmaker(async_engine)):
            if isinstance(second, AsyncEngine):
                sessions = TenantSessions(engine, async_engine=second)
                with sessions.begin(notes.acme) as db:
                    assert notes.seen(db) == notes.of(notes.acme)
            else:
                sessions = TenantSessions(second)
            async with sessions.async_begin(notes.acme) as async_db:
                assert await async_db.run_sync(notes.seen) == notes.of(notes.acme)
        await async_engine.dispose()

    asyncio.run(main())
    engine.dispose()


def test_what_sessions_cannot_be_made_from_is_refused(notes: Notes) -> None:
    engine = create_engine(database_url(notes.url))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (42, {}, "not int"),
        (sessionmaker(), {}, "needs bind="),
        (sessionmaker(binds={Order: engine}), {}, "needs bind="),
        (engine, {"pool_size": 3}, "engine options go with a URL"),
        (engine, {"async_engine_options": {"pool_size": 3}}, "engine options go with a URL"),
        (create_engine("sqlite://"), {}, "need PostgreSQL, not sqlite"),
        ("sqlite://", {}, "database URL"),
        (notes.url, {"system": notes.url, "system_role": "auditor"}, "give one of them"),
    ]
    for source, options, said in wrong:
        with pytest.raises(ConfigurationError, match=said):
            TenantSessions(source, **options)


# --- Core connections --------------------------------------------------------------------------------------------


def test_a_core_connection_is_one_transaction_of_its_tenant(notes: Notes, superuser: Engine) -> None:
    def write_and_fail(sessions: TenantSessions) -> None:
        with sessions.connection() as connection:
            notes.write(connection, notes.acme, "a5")
            raise KeyError

    with single(notes.url, "sync") as sessions:
        with pytest.raises(MissingTenantError), sessions.connection():
            pass
        with tenant_scope(notes.globex), pytest.raises(TenantConflictError), sessions.connection(notes.acme):
            pass
        with tenant_scope(notes.acme):
            with sessions.connection() as connection:
                notes.write(connection, notes.acme, "a4")
            with pytest.raises(KeyError):
                write_and_fail(sessions)
            with sessions.connection() as connection:
                assert notes.seen(connection) == ["a1", "a2", "a3", "a4"]
                connection.commit()
                with pytest.raises(InvalidRequestError):
                    notes.seen(connection)  # it would be another transaction, without a tenant
        with sessions.engine.connect() as connection:
            assert notes.seen(connection) == []
    with pytest.raises(UnsafeConnectionError, match="superuser"), TenantSessions(superuser).connection(notes.acme):
        pass


# --- sessions of nobody ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class System:
    """How a system session may log in."""

    url: str
    role: str


@pytest.fixture
def system(notes: Notes, superuser: Engine) -> Iterator[System]:
    """A login with BYPASSRLS, and a role with it that the application's login is a member of."""
    login, role = f"{notes.database.role}_system", f"{notes.database.role}_auditor"
    url = database_url(notes.url)
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {login} LOGIN BYPASSRLS PASSWORD '{url.password}'")
        connection.exec_driver_sql(f"CREATE ROLE {role} BYPASSRLS")
        connection.exec_driver_sql(f"GRANT SELECT, INSERT ON note TO {login}, {role}")
        connection.exec_driver_sql(f"GRANT {role} TO {notes.database.role}")
    yield System(url.set(drivername="postgresql", username=login).render_as_string(hide_password=False), role)
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {login}, {role}")
        connection.exec_driver_sql(f"DROP ROLE {login}, {role}")


@OfEachKind
@pytest.mark.parametrize("by", ["url", "role"])
def test_a_system_session_sees_all_tenants_rows_and_leaves_no_role_behind(
    notes: Notes, system: System, kind: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    def look(db: Session) -> list[str]:
        found = notes.seen(db)
        db.commit()
        assert notes.seen(db) == found, "after a commit in the middle as well"
        return found

    options: dict[str, Any] = {"system": system.url} if by == "url" else {"system_role": system.role}
    if by == "url" and kind == "asyncpg":
        options = {"system": database_url(system.url).set(drivername="postgresql+asyncpg")}
    with single(notes.url, kind, **options) as sessions, caplog.at_level(logging.INFO, "rhesis_tasks.system"):
        assert use(sessions, kind, look, "system_session", reason="the monthly bill") == ALL
        assert observe(sessions, kind, notes.acme).first == USUAL, "the role is gone from the connection"

    assert [(each.name, each.getMessage(), each.reason) for each in caplog.records if hasattr(each, "reason")] == [
        ("rhesis_tasks.system", "system session: the monthly bill", "the monthly bill")
    ]


@OfEachKind
def test_a_system_session_commits_at_its_end_and_rolls_back_on_an_error(
    notes: Notes, system: System, kind: str
) -> None:
    def write_and_fail(db: Session) -> None:
        notes.write(db, notes.acme, "a5")
        raise KeyError

    with single(notes.url, kind, system_role=system.role) as sessions:
        use(sessions, kind, lambda db: notes.write(db, notes.acme, "a4"), "system_session", reason="x")
        with pytest.raises(KeyError):
            use(sessions, kind, write_and_fail, "system_session", reason="x")
        found = use(sessions, kind, notes.seen, "system_session", reason="x", readonly=True, statement_timeout=5)

    assert found == ["a1", "a2", "a3", "a4", "g1", "g2"]


@OfEachKind
def test_a_system_session_is_refused_without_a_login_a_reason_or_while_a_tenant_is_active(
    notes: Notes, system: System, kind: str
) -> None:
    with single(notes.url, kind) as sessions, pytest.raises(NotConfiguredError, match="system="):
        use(sessions, kind, notes.seen, "system_session", reason="x")
    with single(notes.url, kind, system_role=system.role) as sessions:
        for reason in ("", " ", None):
            with pytest.raises(TenantSessionError, match="wants a reason"):
                use(sessions, kind, notes.seen, "system_session", reason=reason)
        with tenant_scope(notes.acme), pytest.raises(TenantSessionError, match="nobody's"):
            use(sessions, kind, notes.seen, "system_session", reason="x")


@pytest.mark.filterwarnings("ignore:transaction already deassociated from connection")
@OfEachKind
@pytest.mark.parametrize("by", ["url", "role"])
def test_the_connection_of_a_system_session_is_refused_to_a_tenants_code_and_after_its_own_commit(
    notes: Notes, system: System, kind: str, by: str
) -> None:
    def look(db: Session) -> list[str]:
        connection = db.connection()
        with tenant_scope(notes.acme), pytest.raises(TenantSessionError, match="the running code works for"):
            connection.execute(text("SELECT current_user"))
        with db.begin_nested():
            found = notes.seen(connection)
        connection.commit()
        with pytest.raises(TenantSessionError, match=r"is not the system's.  Commit and roll back by the session"):
            connection.execute(text("SELECT current_user"))
        db.rollback()
        assert notes.seen(db.connection()) == found, "the next transaction is the system's again"
        return found

    options: dict[str, Any] = {"system": system.url} if by == "url" else {"system_role": system.role}
    if by == "url" and kind == "asyncpg":
        options = {"system": database_url(system.url).set(drivername="postgresql+asyncpg")}
    with single(notes.url, kind, **options) as sessions:
        assert use(sessions, kind, look, "system_session", reason="x") == ALL
        assert observe(sessions, kind, notes.acme).first == USUAL


@OfEachKind
def test_a_system_session_of_a_role_that_policies_bind_is_refused_and_cannot_be_used_on(
    notes: Notes, system: System, kind: str, superuser: Engine
) -> None:
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"ALTER ROLE {system.role} NOBYPASSRLS")

    def look(db: Session) -> None:
        with pytest.raises(UnsafeConnectionError, match="Give it BYPASSRLS"):
            notes.seen(db)
        with pytest.raises(InvalidRequestError):
            notes.seen(db)
        db.rollback()

    with single(notes.url, kind, system_role=system.role) as sessions:
        use(sessions, kind, look, "system_session", reason="x")


# --- what the database refuses -----------------------------------------------------------------------------------


def _setting_missing(notes: Notes) -> str:
    return "SELECT current_setting('shop.tenant')"


def _setting_empty(notes: Notes) -> str:
    return "SELECT current_setting('app.current_project')::uuid"


def _id_of_another_type(notes: Notes) -> str:
    return "SELECT current_setting('app.current_user')::uuid"


def _row_of_another(notes: Notes) -> str:
    return f"INSERT INTO note (organization_id, body) VALUES ('{notes.globex.organization_id}', 'smuggled')"


def _row_changed_to_anothers(notes: Notes) -> str:
    return f"UPDATE note SET organization_id = '{notes.globex.organization_id}'"


def _no_privilege(notes: Notes) -> str:
    return "TRUNCATE note"


def _no_usage(notes: Notes) -> str:
    return "SELECT * FROM hidden.things"


REFUSED: list[tuple[Callable[[Notes], str], type[TenantDatabaseError], type[DBAPIError], str, str]] = [
    (_setting_missing, SettingMissingError, ProgrammingError, "unrecognized configuration parameter", "setting_names="),
    (_setting_empty, SettingValueError, DataError, 'invalid input syntax for type uuid: ""', "NULLIF"),
    (_id_of_another_type, SettingValueError, DataError, 'type uuid: "alice"', "column_type="),
    (_row_of_another, PolicyViolationError, ProgrammingError, "row-level security policy", "db.tenant.organization_id"),
    (_row_changed_to_anothers, PolicyViolationError, ProgrammingError, "row-level security policy", "TenantMixin"),
    (_no_privilege, PermissionDeniedError, ProgrammingError, "permission denied for table note", "GRANT"),
    (_no_usage, PermissionDeniedError, ProgrammingError, "permission denied for schema hidden", "USAGE"),
]
SQLSTATES = {SettingMissingError: "42704", SettingValueError: "22P02"}


def refuse(sessions: TenantSessions, kind: str, tenant: TenantContext, sql: str, **options: Any) -> Any:
    """The error that a statement meets."""
    with pytest.raises(DBAPIError) as refused:
        use(sessions, kind, lambda db: db.execute(text(sql)), tenant=tenant, **options)
    return refused.value


@OfEachKind
@pytest.mark.parametrize(("statement", "ours", "sqlalchemys", "says", "remedy"), REFUSED)
def test_what_the_database_refuses_is_explained(
    notes: Notes,
    kind: str,
    statement: Callable[[Notes], str],
    ours: type[TenantDatabaseError],
    sqlalchemys: type[DBAPIError],
    says: str,
    remedy: str,
) -> None:
    notes.database.execute("CREATE SCHEMA hidden", "CREATE TABLE hidden.things ()")
    sql = statement(notes)

    with single(notes.url, kind) as sessions:
        error = refuse(sessions, kind, notes.acme, sql)
        optioned = refuse(sessions, kind, notes.acme, sql, statement_timeout=5, isolation_level="REPEATABLE READ")

    for each in (error, optioned):
        assert type(each) is ours
        assert isinstance(each, sqlalchemys)
        assert isinstance(each, TenantSessionError)
        assert says in str(each) and remedy in str(each) and "alice" in str(each), str(each)
        assert (each.tenant, each.statement) == (notes.acme, sql)
        assert each.__cause__ is each.orig
        assert getattr(each.orig, "sqlstate", None) == SQLSTATES.get(ours, "42501")


@OfEachKind
def test_a_core_connections_errors_are_explained_too(notes: Notes, kind: str) -> None:
    with single(notes.url, kind) as sessions, pytest.raises(PolicyViolationError):
        use(sessions, kind, lambda db: db.execute(text(_row_of_another(notes))), "connection", tenant=notes.acme)


@OfEachKind
def test_a_policy_that_reads_an_unsent_or_empty_setting_is_explained(notes: Notes, kind: str) -> None:
    """The error that people meet in production, with policies that were not written by enable_rls."""
    with single(notes.url, kind) as sessions:
        for setting, expected in [("shop.tenant", SettingMissingError), ("app.current_project", SettingValueError)]:
            notes.database.execute(
                disable_rls("note"),
                "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
                "DROP POLICY IF EXISTS own ON note",
                f"CREATE POLICY own ON note USING (organization_id = current_setting('{setting}')::uuid)",
            )
            assert type(refuse(sessions, kind, notes.acme, "SELECT * FROM note")) is expected


@OfEachKind
def test_other_errors_and_those_of_code_without_a_tenant_are_left_alone(notes: Notes, kind: str) -> None:
    with single(notes.url, kind) as sessions:
        assert not isinstance(refuse(sessions, kind, notes.acme, "SELECT 1 / 0"), TenantDatabaseError)
        assert not isinstance(refuse(sessions, kind, notes.acme, "SELECT 'x'::uuid"), TenantDatabaseError)
        assert not isinstance(refuse(sessions, kind, notes.acme, "SELECT no_such_column"), TenantDatabaseError)

        def untenanted(connection: Connection) -> None:
            with pytest.raises(ProgrammingError, match="row-level security") as refused:
                connection.execute(text(_row_of_another(notes)))
            assert not isinstance(refused.value, TenantDatabaseError)

        if kind == "sync":
            refuse(sessions, kind, notes.acme, "SELECT 1 / 0")
            with sessions.engine.connect() as connection:
                untenanted(connection)
            return

        async def main() -> None:
            async with sessions.async_begin(notes.acme) as db:
                await db.execute(SEEN)
            async with sessions.async_engine().connect() as connection:
                await connection.run_sync(untenanted)
            await sessions.async_dispose()

        asyncio.run(main())
