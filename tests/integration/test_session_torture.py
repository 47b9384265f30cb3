"""Tenant sessions on a shared pool, directly and behind PgBouncer, with all that can go wrong: no wrong row is read.

``RHESIS_TASKS_TORTURE_OPERATIONS`` says how many operations there are at least on each way to the server; run with
``-s`` to see the counts, and with ``--timeout 0`` if there are many.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from broker_rig import PostgresServer, running_server
from pooler import running_pgbouncer
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, TenantSessions, binding, tenant_scope
from rhesis_tasks.errors import PolicyViolationError
from rhesis_tasks.rls import ORGANIZATION_SETTING, enable_rls
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

OPERATIONS = int(os.environ.get("RHESIS_TASKS_TORTURE_OPERATIONS", "10000"))
TENANTS = [TenantContext(f"{number:08d}-0000-4000-8000-000000000000", f"user-{number}") for number in range(8)]
AT_ONCE = 8
"""Threads, or asyncio tasks, on a pool of half as many connections."""
SERVER_CONNECTIONS = 3
"""Those of PgBouncer, which its clients share."""

SEEN = text("SELECT body FROM note ORDER BY body")
PID = text("SELECT pg_backend_pid()")
WRITE = text("INSERT INTO written (organization_id, body) VALUES (CAST(:organization_id AS uuid), 'x')")

ENDINGS = {
    "commit": 6,
    "commits in the middle": 5,
    "rollback": 4,
    "error": 3,
    "savepoints": 3,
    "write for another": 2,
    "core": 2,
    "nobody": 8,
    "cancelled": 4,
    "killed": 0.3,
}
"""What an operation does after its first read, and how often."""


EXPECTED: dict[str, tuple[type[BaseException], ...]] = {
    "error": (DBAPIError,),
    "write for another": (PolicyViolationError,),
    "killed": (DBAPIError, OSError),
    "cancelled": (KeyboardInterrupt, asyncio.CancelledError),
}


@dataclasses.dataclass
class Checker:
    """Counts what is read, and keeps what is wrong."""

    endings: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    reads: int = 0
    nobodys: int = 0
    wrong: list[tuple[str, str, list[str]]] = dataclasses.field(default_factory=list)
    leaked: list[list[str]] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)

    def tenant(self, ending: str, tenant: TenantContext, seen: list[str]) -> None:
        """What a session of this tenant has read."""
        self.reads += 1
        if seen != bodies(tenant):
            self.wrong.append((ending, tenant.organization_id, seen))

    def nobody(self, seen: list[str]) -> None:
        """What code without a tenant has read."""
        self.nobodys += 1
        if seen:
            self.leaked.append(seen)

    @contextmanager
    def operation(self, ending: str) -> Iterator[None]:
        """Counts it, and keeps its error if it should have none."""
        try:
            yield
        except EXPECTED.get(ending, ()):
            pass
        except DBAPIError as error:
            self.failed.append(f"{ending}: {type(error.orig).__name__} {error}")
        self.endings[ending] += 1

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {ending}" for ending, number in sorted(self.endings.items()))
        return (
            f"{sum(self.endings.values())} operations ({kinds}): {len(self.wrong)} wrong of {self.reads} reads by "
            f"tenants, {len(self.leaked)} of {self.nobodys} reads by nobody saw rows, {len(self.failed)} "
            "other failures"
        )


def bodies(tenant: TenantContext) -> list[str]:
    """The notes of a tenant: each has another number of them."""
    number = TENANTS.index(tenant)
    return [f"{number}-{note}" for note in range(number + 1)]


# --- where -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


def make_notes(database: TenantDatabase) -> None:
    """A table of notes that nobody changes, and one to write to, under row-level security."""
    role = quote_identifier(database.role)
    notes = ", ".join(f"('{tenant.organization_id}', '{body}')" for tenant in TENANTS for body in bodies(tenant))
    database.execute(
        "CREATE TABLE note (organization_id uuid, body text)",
        "CREATE TABLE written (organization_id uuid, body text)",
        f"INSERT INTO note VALUES {notes}",
        f"GRANT SELECT ON note TO {role}",
        f"GRANT SELECT, INSERT ON written TO {role}",
        enable_rls("note", role=database.role),
        enable_rls("written", role=database.role),
    )


@pytest.fixture(scope="module")
def database(server: PostgresServer) -> Iterator[TenantDatabase]:
    """A database with notes."""
    with new_tenant_database(server.url) as database:
        make_notes(database)
        yield database


@pytest.fixture(scope="module", params=["direct", "pgbouncer"])
def port(request: pytest.FixtureRequest, server: PostgresServer, database: TenantDatabase) -> Iterator[int]:
    """Where the server is reached: by itself, or through PgBouncer in transaction mode."""
    if request.param == "direct":
        yield server.port
        return
    with running_pgbouncer(server, "transaction", SERVER_CONNECTIONS) as bouncer:
        yield bouncer.port


@pytest.fixture
def killer(server: PostgresServer, database: TenantDatabase) -> Iterator[Engine]:
    """An engine of the superuser's, past the pooler."""
    url = database_url(server.url).set(database=database_url(database.url).database)
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


# What PgBouncer before 1.21 needs: no prepared statements, which would be on another client's server connection.
OLD_POOLER: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_args": {"prepare_threshold": None}},
    "asyncpg": {
        "connect_args": {"prepare_threshold": None},  # for the synchronous sessions, which are psycopg's
        "async_engine_options": {
            "connect_args": {
                "statement_cache_size": 0,
                "prepared_statement_cache_size": 0,
                "prepared_statement_name_func": str,
            }
        },
    },
}


@pytest.fixture
def make_sessions(database: TenantDatabase, port: int) -> Callable[[str], TenantSessions]:
    """Makes sessions by a driver, on a pool that is smaller than what runs at once."""

    def make(driver: str) -> TenantSessions:
        url = database_url(database.url).set(drivername=f"postgresql+{driver}", port=port)
        return TenantSessions(url, pool_size=AT_ONCE // 2, max_overflow=0, pool_timeout=60, **OLD_POOLER[driver])

    return make


# --- what --------------------------------------------------------------------------------------------------------


def torture_threads(sessions: TenantSessions, killer: Engine, operations: int) -> Checker:
    """Threads with synchronous sessions.  Nothing is cancelled, since threads cannot be."""
    checkers = [Checker() for _ in range(AT_ONCE)]

    def kill(pid: Any) -> None:
        with killer.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    def read(db: Any) -> list[str]:
        return list(db.execute(SEEN).scalars())

    def one(chance: random.Random, ending: str, checker: Checker) -> None:
        tenant = chance.choice(TENANTS)
        if ending == "nobody":
            with sessions.engine.connect() as connection:
                checker.nobody(read(connection))
                if chance.random() < 0.5:
                    connection.commit()
            return
        if ending == "core":
            with sessions.connection(tenant) as connection:
                checker.tenant(ending, tenant, read(connection))
            return
        with tenant_scope(tenant), sessions.begin() as db:
            checker.tenant(ending, tenant, read(db))
            match ending:
                case "commits in the middle":
                    for _ in range(2):
                        db.execute(WRITE, {"organization_id": tenant.organization_id})
                        db.commit()
                        checker.tenant(ending, tenant, read(db))
                case "rollback":
                    db.rollback()
                    checker.tenant(ending, tenant, read(db))
                case "error":
                    db.execute(text("SELECT 1 / 0"))
                case "savepoints":
                    for end in ("rollback", "commit"):
                        savepoint = db.begin_nested()
                        checker.tenant(ending, tenant, read(db))
                        getattr(savepoint, end)()
                        checker.tenant(ending, tenant, read(db))
                case "write for another":
                    other = TENANTS[TENANTS.index(tenant) - 1]
                    db.execute(WRITE, {"organization_id": other.organization_id})
                case "cancelled":
                    raise KeyboardInterrupt
                case "killed":
                    kill(db.scalar(PID))
                    with suppress(DBAPIError):
                        read(db)
                    with suppress(PendingRollbackError, DBAPIError):
                        checker.tenant(ending, tenant, read(db))
                    db.rollback()
                    checker.tenant(ending, tenant, read(db))

    def work(number: int) -> None:
        chance, checker = random.Random(number), checkers[number]
        for _ in range(operations // AT_ONCE + 1):
            ending = chance.choices(list(ENDINGS), list(ENDINGS.values()))[0]
            with checker.operation(ending):
                one(chance, ending, checker)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(AT_ONCE)))
    return together(checkers)


def together(checkers: list[Checker]) -> Checker:
    whole = Checker()
    for each in checkers:
        whole.endings += each.endings
        whole.reads += each.reads
        whole.nobodys += each.nobodys
        whole.wrong += each.wrong
        whole.leaked += each.leaked
        whole.failed += each.failed
    return whole


def torture_tasks(sessions: TenantSessions, killer: Engine, operations: int) -> Checker:
    """Asyncio tasks with asynchronous sessions, some of which are cancelled somewhere."""
    checker = Checker()

    def kill(pid: Any) -> None:
        with killer.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    async def read(db: Any) -> list[str]:
        return list((await db.execute(SEEN)).scalars())

    async def one(chance: random.Random, ending: str) -> None:
        tenant = chance.choice(TENANTS)
        if ending == "nobody":
            async with sessions.async_engine().connect() as connection:
                checker.nobody(await read(connection))
                if chance.random() < 0.5:
                    await connection.commit()
            return
        if ending == "core":
            async with sessions.async_connection(tenant) as connection:
                checker.tenant(ending, tenant, await read(connection))
            return
        with tenant_scope(tenant):
            async with sessions.async_begin() as db:
                checker.tenant(ending, tenant, await read(db))
                match ending:
                    case "commits in the middle" | "cancelled":
                        for _ in range(2):
                            await db.execute(WRITE, {"organization_id": tenant.organization_id})
                            await db.commit()
                            checker.tenant(ending, tenant, await read(db))
                    case "rollback":
                        await db.rollback()
                        checker.tenant(ending, tenant, await read(db))
                    case "error":
                        await db.execute(text("SELECT 1 / 0"))
                    case "savepoints":
                        for end in ("rollback", "commit"):
                            savepoint = await db.begin_nested()
                            checker.tenant(ending, tenant, await read(db))
                            await getattr(savepoint, end)()
                            checker.tenant(ending, tenant, await read(db))
                    case "write for another":
                        other = TENANTS[TENANTS.index(tenant) - 1]
                        await db.execute(WRITE, {"organization_id": other.organization_id})
                    case "killed":
                        pid = await db.scalar(PID)
                        await asyncio.to_thread(kill, pid)
                        with suppress(DBAPIError):
                            await read(db)
                        with suppress(PendingRollbackError, DBAPIError):
                            checker.tenant(ending, tenant, await read(db))
                        await db.rollback()
                        checker.tenant(ending, tenant, await read(db))

    async def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(operations // AT_ONCE + 1):
            ending = chance.choices(list(ENDINGS), list(ENDINGS.values()))[0]
            with checker.operation(ending):
                if ending == "cancelled":
                    task = asyncio.create_task(one(chance, ending))
                    await asyncio.sleep(chance.random() / 100)
                    task.cancel()
                    await task
                else:
                    await one(chance, ending)

    async def main() -> None:
        try:
            await asyncio.gather(*(work(number) for number in range(AT_ONCE)))
        finally:
            await sessions.async_dispose()

    asyncio.run(main())
    return checker


TORTURES = {
    "psycopg, threads": ("psycopg", torture_threads, 0.5),
    "psycopg, asyncio": ("psycopg", torture_tasks, 0.25),
    "asyncpg, asyncio": ("asyncpg", torture_tasks, 0.25),
}
"""By which driver and how, and which part of the operations."""


def torture(
    name: str, make_sessions: Callable[[str], TenantSessions], killer: Engine, operations: float, title: str
) -> Checker:
    driver, how, part = TORTURES[name]
    sessions = make_sessions(driver)
    began = time.monotonic()
    try:
        checker = how(sessions, killer, math.ceil(operations * part))
    finally:
        sessions.dispose()
    print(f"\n{name}, {title}: {checker}, in {time.monotonic() - began:.1f} s")
    return checker


# --- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORTURES)
def test_no_tenant_reads_a_wrong_row_and_nobody_reads_any(
    name: str,
    make_sessions: Callable[[str], TenantSessions],
    killer: Engine,
    database: TenantDatabase,
    request: pytest.FixtureRequest,
) -> None:
    checker = torture(name, make_sessions, killer, OPERATIONS, request.node.callspec.params["port"])

    assert (checker.wrong, checker.leaked) == ([], [])
    assert checker.failed == []
    assert sum(checker.endings.values()) >= OPERATIONS * TORTURES[name][2]
    assert min(checker.endings[ending] for ending in ENDINGS) > 0, "each ending was tried"
    assert checker.reads >= sum(checker.endings.values()) / 2, "most operations did read"


@pytest.mark.parametrize("name", TORTURES)
def test_the_torture_finds_the_leaks_of_a_tenant_that_is_sent_for_the_connection(
    name: str,
    make_sessions: Callable[[str], TenantSessions],
    killer: Engine,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    ours = binding._statement
    monkeypatch.setattr(binding, "_statement", lambda names: text(ours(names).text.replace("true)", "false)")))

    checker = torture(name, make_sessions, killer, 600, f"{request.node.callspec.params['port']}, broken on purpose")

    assert len(checker.leaked) > checker.nobodys / 2


@pytest.mark.parametrize("name", TORTURES)
def test_the_torture_finds_the_wrong_rows_of_a_tenant_that_is_sent_once_for_each_connection(
    name: str,
    make_sessions: Callable[[str], TenantSessions],
    killer: Engine,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    ours = binding._statement
    send = binding._send

    def send_once(connection: Connection, *arguments: Any) -> None:
        if "sent" not in connection.info:
            send(connection, *arguments)
            connection.info["sent"] = True

    monkeypatch.setattr(binding, "_statement", lambda names: text(ours(names).text.replace("true)", "false)")))
    monkeypatch.setattr(binding, "_send", send_once)

    checker = torture(name, make_sessions, killer, 600, f"{request.node.callspec.params['port']}, broken on purpose")

    assert len(checker.wrong) > checker.reads / 4


def test_a_prepared_transaction_keeps_to_its_tenant_and_leaves_none_behind() -> None:
    """Two-phase commit, on a server that allows it: PostgreSQL's default does not."""

    class TwoPhaseSession(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(twophase=True, **options)

    tenant = TENANTS[3]
    with running_server() as server:
        superuser = create_engine(database_url(server.url), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with superuser.connect() as connection:
            connection.exec_driver_sql("ALTER SYSTEM SET max_prepared_transactions = 2")
        server.restart("fast")
        with new_tenant_database(server.url) as database:
            make_notes(database)
            sessions = TenantSessions(database.url, session_class=TwoPhaseSession, pool_size=1, max_overflow=0)
            with sessions.begin(tenant) as db:
                for _ in range(2):
                    db.execute(WRITE, {"organization_id": tenant.organization_id})
                    assert list(db.scalars(SEEN)) == bodies(tenant)
                    db.prepare()
                    db.commit()
            with sessions.engine.connect() as untenanted:
                assert list(untenanted.scalars(SEEN)) == []
            with sessions.begin(tenant) as db:
                assert db.scalar(text("SELECT count(*) FROM written")) == 2
            with sessions.begin(TENANTS[4]) as db:
                assert db.scalar(text("SELECT count(*) FROM written")) == 0
            sessions.dispose()


def test_a_server_connection_that_another_client_has_poisoned_serves_each_session_its_own_tenant(
    server: PostgresServer, database: TenantDatabase
) -> None:
    """A limit: code without a tenant sees what another client of the pooler has left on its server connection."""
    one, other = TENANTS[1], TENANTS[2]

    def seen(db: Any) -> list[str]:
        return list(db.execute(SEEN).scalars())

    with running_pgbouncer(server, "transaction", 1) as bouncer:
        url = database_url(database.url).set(port=bouncer.port)
        # Another process, that says SET, or set_config(..., false), and goes away.
        client = create_engine(url, poolclass=NullPool)
        with client.begin() as connection:
            connection.exec_driver_sql(f"SET {ORGANIZATION_SETTING} = '{other.organization_id}'")

        with client.connect() as untenanted, Session(client) as plain:
            assert seen(untenanted) == bodies(other), "the limit: the attack works on what sends no tenant"
            untenanted.rollback()
            assert seen(plain) == bodies(other)
        sessions = TenantSessions(url, connect_args={"prepare_threshold": None})
        try:
            with sessions.begin(one) as db:
                assert seen(db) == bodies(one)
                db.commit()
                assert seen(db) == bodies(one)
            with sessions.connection(one) as connection:
                assert seen(connection) == bodies(one)
        finally:
            sessions.dispose()
