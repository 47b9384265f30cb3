"""Asynchronous tenant sessions, by psycopg and by asyncpg: the same promises, on an engine for each event loop."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from rhesis_tasks import TenantSessions, tenant_scope, tenant_session
from rhesis_tasks.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    MissingTenantError,
    PolicyViolationError,
    TenantConflictError,
    TenantSessionError,
    UnsafeConnectionError,
)
from rhesis_tasks.processes import free_port
from rhesis_tasks.sessions import AsyncTenantSession, TenantSession
from rhesis_tasks.settings import database_url, quote_identifier

if TYPE_CHECKING:
    from conftest import Notes

    from rhesis_tasks.testing import TenantDatabase

SEEN = text("SELECT body FROM note ORDER BY body")
CURRENT = text("SELECT current_setting('app.current_organization', true)")


@pytest.fixture(params=["psycopg", "asyncpg"])
def url(request: pytest.FixtureRequest, notes: Notes) -> str:
    """The application's URL, by each driver."""
    return database_url(notes.url).set(drivername=f"postgresql+{request.param}").render_as_string(hide_password=False)


@pytest.fixture
def run(url: str) -> Callable[[Callable[[TenantSessions], Awaitable[Any]]], Any]:
    """Runs a coroutine function in an event loop, with sessions that are closed afterwards."""

    def run(body: Callable[[TenantSessions], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            sessions = TenantSessions(url)
            try:
                return await asyncio.wait_for(body(sessions), 60)
            finally:
                await sessions.async_dispose()
                sessions.dispose()

        return asyncio.run(main())

    return run


async def seen(db: AsyncSession) -> list[str]:
    return list((await db.execute(SEEN)).scalars())


def test_each_tenant_sees_its_own_rows(notes: Notes, run: Any) -> None:
    async def body(sessions: TenantSessions) -> list[list[str]]:
        async with sessions.async_begin(notes.acme) as db:
            acmes = await seen(db)
        with tenant_scope(notes.globex):
            async with sessions.async_session() as db:
                assert db.tenant == notes.globex
                return [acmes, await seen(db)]

    assert run(body) == [notes.of(notes.acme), notes.of(notes.globex)]


def test_begin_commits_and_rolls_back_and_commits_in_between(notes: Notes, run: Any) -> None:
    async def body(sessions: TenantSessions) -> list[str]:
        async def write(db: AsyncSession, what: str) -> None:
            await db.run_sync(lambda sync: notes.write(sync, notes.acme, what))

        with suppress(ZeroDivisionError):
            async with sessions.async_begin(notes.acme) as db:
                await write(db, "z1 rolled back")
                raise ZeroDivisionError
        async with sessions.async_begin(notes.acme) as db:
            await write(db, "z2 in between")
            await db.commit()
            assert not db.in_transaction(), "nothing is held meanwhile"
            await write(db, "z3 at the end")
        async with sessions.async_begin(notes.acme) as db:
            found = await seen(db)
            await db.execute(text("DELETE FROM note WHERE body LIKE 'z%'"))
            return found

    assert run(body) == [*notes.of(notes.acme), "z2 in between", "z3 at the end"]


def test_a_transaction_costs_exactly_one_more_statement(notes: Notes, run: Any) -> None:
    statements: list[str] = []

    async def body(sessions: TenantSessions) -> None:
        event.listen(
            sessions.async_engine().sync_engine,
            "before_cursor_execute",
            lambda _connection, _cursor, statement, *_: statements.append(statement),
        )
        async with sessions.async_begin(notes.acme) as db:
            await seen(db)  # the first transaction of a connection also looks at its login
        statements.clear()
        async with sessions.async_begin(notes.acme, statement_timeout=5, lock_timeout=5, readonly=True) as db:
            await db.execute(text("SELECT 1"))
            async with db.begin_nested():
                await db.execute(text("SELECT 2"))

    run(body)
    assert [statement.split("(")[0].split(" sa_")[0] for statement in statements if "SAVEPOINT" not in statement] == [
        "SELECT set_config",
        "SELECT 1",
        "SELECT 2",
    ]


def test_core_connections_carry_the_tenant_too(notes: Notes, run: Any) -> None:
    async def body(sessions: TenantSessions) -> list[str]:
        async with sessions.async_connection(notes.globex) as connection:
            return list((await connection.execute(SEEN)).scalars())

    assert run(body) == notes.of(notes.globex)


def test_what_is_refused_is_refused(notes: Notes, run: Any) -> None:
    async def body(sessions: TenantSessions) -> None:
        with pytest.raises(MissingTenantError):
            sessions.async_session()
        with pytest.raises(PolicyViolationError, match="another organization, or to none"):
            async with sessions.async_begin(notes.acme) as db:
                await db.run_sync(lambda sync: notes.write(sync, notes.globex, "smuggled"))
        async with sessions.async_begin(notes.acme) as db:
            with tenant_scope(notes.globex), pytest.raises(TenantConflictError):
                await seen(db)
        with pytest.raises(InvalidRequestError):
            await seen(db)  # closed
        async with sessions.async_engine().connect() as connection:
            with pytest.raises(TenantSessionError, match="cannot join a Connection"):
                AsyncTenantSession(connection, tenant=notes.acme)
        autocommitting = sessions.async_engine().execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncTenantSession(autocommitting, tenant=notes.acme) as db:
            with pytest.raises(UnsafeConnectionError, match="autocommit"):
                await seen(db)
            with pytest.raises(PendingRollbackError):
                await seen(db)

    run(body)


def test_a_decorated_coroutine_function_gets_an_async_session(notes: Notes, run: Any) -> None:
    async def body(sessions: TenantSessions) -> list[Any]:
        @tenant_session(sessions=sessions, readonly=True)
        async def look(db: AsyncSession, number: int) -> Any:
            return number, await seen(db), await db.scalar(text("SHOW transaction_read_only"))

        assert asyncio.iscoroutinefunction(look)
        with pytest.raises(MissingTenantError):
            await look(1)
        with tenant_scope(notes.acme):
            async with tenant_session(sessions=sessions) as db:
                return [await look(1), await seen(db)]

    assert run(body) == [(1, notes.of(notes.acme), "on"), notes.of(notes.acme)]


def test_tasks_of_two_tenants_on_one_pool_never_see_a_wrong_row(notes: Notes, run: Any, url: str) -> None:
    """Commits, rollbacks, errors and cancellations, and code without a tenant in between."""
    if "asyncpg" in url and sqlalchemy.__version__.startswith("2.0."):
        pytest.skip("SQLAlchemy 2.0.22 hands connections of asyncpg's on in the middle of a cancelled operation")
    chance = random.Random(7)
    reads = {"tenants": 0, "nobody's": 0, "cancelled": 0}

    async def body(sessions: TenantSessions) -> None:
        engine = sessions.async_engine()

        async def work(number: int) -> None:
            tenant = notes.acme if number % 2 else notes.globex
            with suppress(ZeroDivisionError):
                async with sessions.async_begin(tenant) as db:
                    assert await seen(db) == notes.of(tenant)
                    reads["tenants"] += 1
                    await asyncio.sleep(chance.random() / 500)
                    if number % 3 == 0:
                        await db.commit()
                        assert await seen(db) == notes.of(tenant)
                    if number % 5 == 0:
                        raise ZeroDivisionError

        async def nobody() -> None:
            async with engine.connect() as connection:
                assert list((await connection.execute(SEEN)).scalars()) == []
                reads["nobody's"] += 1

        async def cancelled(number: int) -> None:
            task = asyncio.create_task(work(number))
            await asyncio.sleep(chance.random() / 100)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            reads["cancelled"] += 1

        for _ in range(20):
            calls = [chance.choice([work, work, cancelled])(number) for number in range(15)]
            await asyncio.gather(*calls, *(nobody() for _ in range(5)))

    run(body)
    assert min(reads.values()) > 20, reads


@pytest.mark.filterwarnings("ignore:.*unclosed|.*was deleted while still open:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_event_loop_has_an_engine_of_its_own(notes: Notes, url: str) -> None:
    sessions = TenantSessions(url)
    engines = []

    async def look() -> list[str]:
        engines.append(sessions.async_engine())
        assert sessions.async_engine() is engines[-1]
        async with sessions.async_begin(notes.acme) as db:
            return await seen(db)

    for _ in range(3):
        assert asyncio.run(look()) == notes.of(notes.acme)
    assert len(set(engines)) == 3
    assert len(sessions._async_engines._engines) == 1, "those of closed loops are forgotten"  # type: ignore[union-attr]
    sessions.dispose()
    engines.clear()
    sessions._async_engines._engines.clear()  # type: ignore[union-attr]
    gc.collect()  # here, where their complaints are expected, and not in some later test


def test_an_applications_async_engine_serves_one_loop(notes: Notes, url: str) -> None:
    engine = create_async_engine(url)
    sessions = TenantSessions(engine)

    async def look() -> list[str]:
        async with sessions.async_begin(notes.acme) as db:
            return await seen(db)

    with asyncio.Runner() as first:
        first.run(look())
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(look())
        assert first.run(look()) == notes.of(notes.acme)
        first.run(engine.dispose())
    with pytest.raises(ConfigurationError, match="these sessions are asynchronous"):
        sessions(notes.acme)


def test_synchronous_sessions_say_that_they_have_no_async_ones(notes: Notes) -> None:
    sessions = TenantSessions(TenantSessions(notes.url).engine)

    async def main() -> None:
        with pytest.raises(ConfigurationError, match="these sessions are synchronous"):
            sessions.async_session(notes.acme)

    asyncio.run(main())


class Labelled(Session):
    label = "the application's own"


class AsyncLabelled(AsyncSession):
    sync_session_class = Labelled
    mark = "the application's own"


def test_the_applications_own_classes_and_makers_are_kept(notes: Notes, url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url)
        maker = async_sessionmaker(engine, class_=AsyncLabelled, expire_on_commit=False)
        for sessions in (TenantSessions(maker), TenantSessions(url, async_session_class=AsyncLabelled)):
            async with sessions.async_begin(notes.acme) as db:
                assert isinstance(db, AsyncLabelled)
                assert isinstance(db.sync_session, Labelled)
                assert isinstance(db.sync_session, TenantSession)
                assert db.sync_session.expire_on_commit is (db.bind is not engine), "as the maker says"
                assert await seen(db) == notes.of(notes.acme)
            await sessions.async_dispose()

    asyncio.run(main())


def test_an_unreachable_database_is_named(url: str, notes: Notes) -> None:
    nowhere = make_url(url).set(host="127.0.0.1", port=free_port(), query={}, password="hidden")

    async def main() -> None:
        sessions = TenantSessions(nowhere)
        with pytest.raises(DatabaseUnavailableError, match=r"cannot connect to .*127\.0\.0\.1") as error:
            async with sessions.async_begin(notes.acme) as db:
                await seen(db)
        assert "hidden" not in str(error.value)

    asyncio.run(main())


def test_an_applications_async_engine_may_go_to_another_loop_once_it_is_disposed_of(notes: Notes, url: str) -> None:
    sessions = TenantSessions(create_async_engine(url))

    async def look() -> list[str]:
        try:
            async with sessions.async_begin(notes.acme) as db:
                return await seen(db)
        finally:
            await sessions.async_dispose()

    assert [asyncio.run(look()) for _ in range(2)] == [notes.of(notes.acme)] * 2


def test_a_maker_may_name_the_session_inside(notes: Notes, url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url)
        async with TenantSessions(async_sessionmaker(engine, sync_session_class=Labelled)).async_begin(
            notes.acme
        ) as db:
            assert isinstance(db.sync_session, Labelled)
            assert await seen(db) == notes.of(notes.acme)
        await engine.dispose()

    asyncio.run(main())


def test_a_server_that_takes_no_connections_is_called_unavailable(
    notes: Notes, url: str, tenant_database: TenantDatabase
) -> None:
    if "asyncpg" in url and sqlalchemy.__version__.startswith("2.0."):
        pytest.skip("SQLAlchemy 2.0.22 lets asyncpg's own error through when it connects")
    name = quote_identifier(make_url(url).database)

    async def main() -> None:
        sessions = TenantSessions(url)
        with pytest.raises(DatabaseUnavailableError, match="is not currently accepting connections"):
            async with sessions.async_begin(notes.acme) as db:
                await seen(db)
        with pytest.raises(DatabaseUnavailableError):
            async with sessions.async_connection(notes.acme):
                pass

    with tenant_database.admin.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            asyncio.run(main())
        finally:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
