"""Tenant sessions: each transaction carries its tenant, and what would lose it is refused."""

from __future__ import annotations

import random
import textwrap
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool

from rhesis_tasks import BaseTask, TenantContext, TenantSessions, retry, tenant_scope, tenant_session, unconfigure
from rhesis_tasks.errors import (
    DatabaseUnavailableError,
    MissingTenantError,
    TenantConflictError,
    TenantSessionError,
    UnsafeConnectionError,
)
from rhesis_tasks.processes import child, free_port, python, wait_until
from rhesis_tasks.rls import ORGANIZATION_SETTING
from rhesis_tasks.sessions import TenantSession, sessions_of
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase

if TYPE_CHECKING:
    from conftest import MakeApp, Notes

CURRENT_ORGANIZATION = text(f"SELECT current_setting('{ORGANIZATION_SETTING}', true)")
SETTINGS = text(
    "SELECT current_setting('app.current_organization', true), current_setting('app.current_user', true), "
    "current_setting('app.current_project', true)"
)


@pytest.fixture
def tenant_database(emptied_database: TenantDatabase) -> TenantDatabase:
    return emptied_database


def terminate_backend(superuser: Engine, pid: int) -> None:
    """Kill a server process and wait until it is gone."""
    with superuser.connect() as connection:
        gone = connection.scalar(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    assert gone, f"backend {pid} was still there after 10 seconds"


def connections_counted(engine: Engine) -> list[str]:
    """Each connection that the engine's pool opens or lends, from now on."""
    counted: list[str] = []
    event.listen(engine, "connect", lambda *_: counted.append("opened"))
    event.listen(engine, "checkout", lambda *_: counted.append("lent"))
    return counted


# --- whose rows --------------------------------------------------------------------------------------------------


def test_a_tenant_sees_its_own_rows_and_no_others(notes: Notes, sessions: TenantSessions) -> None:
    with sessions(notes.acme) as db:
        seen_by_acme = notes.seen(db)
    with sessions(notes.globex) as db:
        seen_by_globex = notes.seen(db)

    assert (seen_by_acme, seen_by_globex) == (["a1", "a2", "a3"], ["g1", "g2"])


def test_a_session_without_a_named_tenant_is_the_active_tenants(notes: Notes, sessions: TenantSessions) -> None:
    with tenant_scope(notes.globex), sessions() as db:
        assert db.tenant == notes.globex
        assert notes.seen(db) == notes.of(notes.globex)


def test_organization_user_and_project_are_all_sent(sessions: TenantSessions) -> None:
    tenant = TenantContext("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "alice", "apollo")

    with sessions(tenant) as db:
        assert tuple(db.execute(SETTINGS).one()) == (tenant.organization_id, "alice", "apollo")


def test_an_unknown_user_is_sent_as_empty_after_a_known_one_on_the_same_connection(sessions: TenantSessions) -> None:
    organization = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
    with sessions.begin(TenantContext(organization, "alice", "apollo")) as db:
        db.execute(SETTINGS)

    with sessions.begin(TenantContext(organization)) as db:
        assert tuple(db.execute(SETTINGS).one()) == (organization, "", "")


def test_a_write_for_another_tenant_is_refused(notes: Notes, sessions: TenantSessions) -> None:
    with (
        sessions(notes.acme) as db,
        pytest.raises(Exception, match="violates row-level security policy") as refused,
    ):
        notes.write(db, notes.globex, "smuggled")

    assert isinstance(refused.value.__cause__, psycopg.errors.InsufficientPrivilege)


def test_no_tenant_raises_before_any_connection_is_opened(sessions: TenantSessions) -> None:
    counted = connections_counted(sessions.engine)

    with pytest.raises(MissingTenantError):
        sessions()
    with pytest.raises(MissingTenantError), sessions.begin():
        pass
    with pytest.raises(MissingTenantError):
        TenantSession(bind=sessions.engine)

    assert counted == []


# --- one statement per transaction -------------------------------------------------------------------------------


def test_a_transaction_costs_exactly_one_more_statement(
    notes: Notes, sessions: TenantSessions, statements: list[str]
) -> None:
    with sessions.begin(notes.acme) as db:
        db.execute(text("SELECT 'the first transaction of a connection also looks at its login'"))
    statements.clear()

    with sessions.begin(notes.acme) as db:
        db.execute(text("SELECT 1"))
        db.execute(text("SELECT 2"))

    assert [statement.split("(")[0] for statement in statements] == ["SELECT set_config", "SELECT 1", "SELECT 2"]


def test_savepoints_cost_no_statement_of_ours_and_keep_the_tenant(
    notes: Notes, sessions: TenantSessions, statements: list[str]
) -> None:
    with sessions.begin(notes.acme) as db:
        seen = [notes.seen(db)]
        for _ in range(3):
            with db.begin_nested() as savepoint:
                seen.append(notes.seen(db))
                savepoint.rollback()
            with db.begin_nested():
                seen.append(notes.seen(db))
        seen.append(notes.seen(db))

    assert seen == [notes.of(notes.acme)] * 8
    assert sum("set_config" in statement for statement in statements) == 1


def test_the_tenant_is_sent_again_after_a_commit_in_the_middle(
    notes: Notes, sessions: TenantSessions, statements: list[str]
) -> None:
    with sessions(notes.acme) as db:
        notes.write(db, notes.acme, "a4")
        db.commit()
        after = notes.seen(db)

    assert after == ["a1", "a2", "a3", "a4"]
    assert sum("set_config" in statement for statement in statements) == 2


def test_the_tenant_is_sent_again_after_a_rollback(
    notes: Notes, sessions: TenantSessions, statements: list[str]
) -> None:
    with sessions(notes.acme) as db:
        notes.write(db, notes.acme, "a4")
        db.rollback()
        after = notes.seen(db)

    assert after == ["a1", "a2", "a3"]
    assert sum("set_config" in statement for statement in statements) == 2


def test_the_tenant_is_sent_again_after_a_failed_statement(notes: Notes, sessions: TenantSessions) -> None:
    with sessions(notes.acme) as db:
        with pytest.raises(Exception, match="division by zero"):
            db.execute(text("SELECT 1 / 0"))
        db.rollback()

        assert notes.seen(db) == notes.of(notes.acme)


def test_a_raw_commit_inside_a_session_leads_to_no_rows(notes: Notes, sessions: TenantSessions) -> None:
    with sessions(notes.acme) as db:
        db.execute(text("COMMIT"))

        assert notes.seen(db) == []


def test_a_two_phase_transaction_carries_the_tenant(notes: Notes) -> None:
    class TwoPhaseSession(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(twophase=True, **options)

    sessions = TenantSessions(notes.url, session_class=TwoPhaseSession)
    try:
        with sessions(notes.acme) as db:
            assert notes.seen(db) == notes.of(notes.acme)
            assert db.connection().get_transaction() is not None
            db.rollback()
            assert notes.seen(db) == notes.of(notes.acme)
            db.rollback()
    finally:
        sessions.dispose()


# --- nothing stays behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["commit", "rollback", "close", "error"])
def test_nothing_is_left_on_the_pooled_connection(notes: Notes, sessions: TenantSessions, ending: str) -> None:
    with sessions(notes.acme) as db:
        pid = db.scalar(text("SELECT pg_backend_pid()"))
        assert notes.seen(db) == notes.of(notes.acme)
        if ending == "commit":
            db.commit()
        elif ending == "rollback":
            db.rollback()
        elif ending == "error":
            with pytest.raises(Exception, match="division by zero"):
                db.execute(text("SELECT 1 / 0"))

    with sessions.engine.connect() as untenanted:
        assert untenanted.scalar(text("SELECT pg_backend_pid()")) == pid, "the test needs the same connection"
        assert untenanted.scalar(CURRENT_ORGANIZATION) == ""
        assert notes.seen(untenanted) == []


def test_threads_of_two_tenants_on_one_small_pool_never_see_a_wrong_row(notes: Notes) -> None:
    threads, operations = 8, 60
    sessions = TenantSessions(notes.url, pool_size=2, max_overflow=0, pool_timeout=60)
    start = threading.Barrier(threads, timeout=30)

    def work(number: int) -> tuple[int, list[object]]:
        """Do operations that end in every way; return how many reads there were, and the wrong ones."""
        rng = random.Random(number)
        tenant = (notes.acme, notes.globex)[number % 2]
        reads, wrong = 0, []
        start.wait()
        for _ in range(operations):
            ending = rng.choice(["commit", "rollback", "close", "error", "untenanted"])
            if ending == "untenanted":
                with sessions.engine.connect() as connection:
                    seen, expected = notes.seen(connection), []
            else:
                with tenant_scope(tenant), sessions() as db:
                    seen, expected = notes.seen(db), notes.of(tenant)
                    if ending == "commit":
                        db.commit()
                    elif ending == "rollback":
                        db.rollback()
                    elif ending == "error":
                        with pytest.raises(Exception, match="division by zero"):
                            db.execute(text("SELECT 1 / 0"))
            reads += 1
            if seen != expected:
                wrong.append((tenant, ending, seen))
        return reads, wrong

    try:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, range(threads), timeout=60))
    finally:
        sessions.dispose()

    reads = sum(count for count, _ in results)
    wrong = [one for _, found in results for one in found]
    print(f"{reads} reads, {len(wrong)} wrong")
    assert (reads, wrong) == (threads * operations, [])


def test_after_the_server_killed_the_connection_the_next_transaction_carries_the_tenant(
    notes: Notes, sessions: TenantSessions, superuser: Engine
) -> None:
    with sessions(notes.acme) as db:
        pid = db.scalar(text("SELECT pg_backend_pid()"))
        terminate_backend(superuser, pid)

        with pytest.raises(OperationalError):
            notes.seen(db)
        with pytest.raises(PendingRollbackError):
            notes.seen(db)
        db.rollback()

        assert notes.seen(db) == notes.of(notes.acme)
        assert db.scalar(text("SELECT pg_backend_pid()")) != pid


def test_a_connection_killed_while_idle_in_the_pool_is_replaced_and_carries_the_tenant(
    notes: Notes, sessions: TenantSessions, superuser: Engine
) -> None:
    with sessions(notes.acme) as db:
        pid = db.scalar(text("SELECT pg_backend_pid()"))
    terminate_backend(superuser, pid)

    with sessions(notes.globex) as db:
        assert notes.seen(db) == notes.of(notes.globex)


FORK = textwrap.dedent(
    """
    import os, sys
    from sqlalchemy import create_engine, text
    from rhesis_tasks import TenantContext, TenantSessions
    from rhesis_tasks.settings import database_url

    url, kind, acme, globex = sys.argv[1:]
    pool = {"pool_size": 1, "max_overflow": 0}
    engine = create_engine(database_url(url), **pool)
    sessions = TenantSessions(url, **pool) if kind == "url" else TenantSessions(engine)

    def look(organization_id):
        with sessions.begin(TenantContext(organization_id)) as db:
            bodies = db.execute(text("SELECT body FROM note ORDER BY body")).scalars().all()
            return db.scalar(text("SELECT pg_backend_pid()")), ",".join(bodies)

    def write(file, who, pid, bodies):
        os.write(file, f"{who} {pid} {bodies}\\n".encode())

    write(1, "parent", *look(acme))
    reader, writer = os.pipe()
    go_reader, go_writer = os.pipe()
    forked = os.fork()
    if forked == 0:
        for _ in range(20):
            pid, bodies = look(globex)
            if bodies != "g1,g2":
                break
        write(1, "child", pid, bodies)
        os.write(writer, b"x")   # the parent goes on while the child still holds its own connection
        os.read(go_reader, 1)
        write(1, "child", *look(globex))
        sys.stdout.flush()
        os._exit(0)
    os.read(reader, 1)
    for _ in range(20):
        pid, bodies = look(acme)
        if bodies != "a1,a2,a3":
            break
    write(1, "parent", pid, bodies)
    os.write(go_writer, b"x")
    _, status = os.waitpid(forked, 0)
    write(1, "parent", *look(acme))
    sessions.dispose()
    sys.exit(os.waitstatus_to_exitcode(status))
    """
)


@pytest.mark.parametrize("kind", ["url", "engine"])
def test_a_forked_child_gets_its_own_connection_and_its_own_tenant(notes: Notes, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "forks.py"
    script.write_text(FORK)
    command = python("-W", "error", str(script), notes.url, kind)

    with child("forks.py", [*command, notes.acme.organization_id, notes.globex.organization_id]) as running:
        code = running.process.wait(timeout=30)
        output = running.finished_output()

    assert code == 0, output
    lines = [tuple(line.split()) for line in output.splitlines()]
    parents = {pid for who, pid, _ in lines if who == "parent"}
    children = {pid for who, pid, _ in lines if who == "child"}
    assert [(who, bodies) for who, _, bodies in lines] == [
        ("parent", "a1,a2,a3"),
        ("child", "g1,g2"),
        ("parent", "a1,a2,a3"),
        ("child", "g1,g2"),
        ("parent", "a1,a2,a3"),
    ]
    assert len(parents) == len(children) == 1, "each process keeps its own connection"
    assert parents.isdisjoint(children)


# --- connections that cannot keep the tenant ---------------------------------------------------------------------


def _engine_level(url: Any) -> Engine:
    return create_engine(url, isolation_level="AUTOCOMMIT")


def _execution_options(url: Any) -> Engine:
    return create_engine(url).execution_options(isolation_level="AUTOCOMMIT")


def _connect_listener(url: Any) -> Engine:
    engine = create_engine(url)
    event.listen(engine, "connect", lambda dbapi_connection, _: setattr(dbapi_connection, "autocommit", True))
    return engine


def _connect_arguments(url: Any) -> Engine:
    return create_engine(url, connect_args={"autocommit": True})


@pytest.mark.parametrize("make_engine", [_engine_level, _execution_options, _connect_listener, _connect_arguments])
def test_autocommit_is_refused_before_any_statement(notes: Notes, make_engine: Callable[[Any], Engine]) -> None:
    engine = make_engine(database_url(notes.url))
    executed: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: executed.append(statement))
    try:
        with TenantSessions(engine)(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="autocommit"):
            notes.seen(db)
    finally:
        engine.dispose()

    assert executed == []


def test_autocommit_asked_for_by_a_session_is_refused(notes: Notes, sessions: TenantSessions) -> None:
    with sessions(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="autocommit"):
        db.connection(execution_options={"isolation_level": "AUTOCOMMIT"})

    with sessions(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)


def test_autocommit_cannot_be_switched_on_in_the_middle_of_a_transaction(
    notes: Notes, sessions: TenantSessions
) -> None:
    with sessions(notes.acme) as db:
        notes.seen(db)

        with pytest.raises(InvalidRequestError):
            db.connection().execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(psycopg.ProgrammingError):
            db.connection().connection.dbapi_connection.autocommit = True

        assert notes.seen(db) == notes.of(notes.acme)


def test_a_superuser_is_refused(notes: Notes, superuser: Engine) -> None:
    with TenantSessions(superuser)(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="superuser"):
        notes.seen(db)


def test_a_login_with_bypassrls_is_refused(notes: Notes, superuser: Engine) -> None:
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"ALTER ROLE {quote_identifier(notes.database.role)} BYPASSRLS")
    sessions = TenantSessions(notes.url)
    try:
        for _ in range(2):  # refused for good, not only on a connection's first transaction
            with sessions(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="BYPASSRLS"):
                notes.seen(db)
    finally:
        sessions.dispose()


def test_a_login_that_works_as_a_bypassrls_role_is_refused(notes: Notes, superuser: Engine) -> None:
    role = quote_identifier(notes.database.role)
    bypass = quote_identifier(f"{notes.database.role}_bypass")
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {bypass} BYPASSRLS")
        connection.exec_driver_sql(f"GRANT {bypass} TO {role}")
    engine = create_engine(
        database_url(notes.url), poolclass=NullPool, connect_args={"options": f"-c role={notes.database.role}_bypass"}
    )
    try:
        with TenantSessions(engine)(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="BYPASSRLS"):
            notes.seen(db)
    finally:
        engine.dispose()
        with superuser.begin() as connection:
            connection.exec_driver_sql(f"DROP ROLE {bypass}")


def test_a_connection_that_changes_to_a_bypassrls_role_later_is_refused(notes: Notes, superuser: Engine) -> None:
    role = quote_identifier(notes.database.role)
    bypass = quote_identifier(f"{notes.database.role}_bypass")
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {bypass} BYPASSRLS")
        connection.exec_driver_sql(f"GRANT {bypass} TO {role}")
    sessions = TenantSessions(notes.url, pool_size=1, max_overflow=0)
    try:
        with sessions.begin(notes.acme) as db:
            db.connection().exec_driver_sql(
                f"SET ROLE {bypass}"
            )  # for the session of the server, not for this transaction
        with sessions(notes.globex) as db, pytest.raises(UnsafeConnectionError, match="BYPASSRLS"):
            notes.seen(db)
    finally:
        sessions.dispose()
        with superuser.begin() as connection:
            connection.exec_driver_sql(f"DROP ROLE {bypass}")


def test_a_superuser_that_works_as_the_applications_role_is_bound_until_it_is_itself_again(
    notes: Notes, superuser: Engine
) -> None:
    engine = create_engine(superuser.url, connect_args={"options": f"-c role={notes.database.role}"})
    try:
        with TenantSessions(engine)(notes.acme) as db:
            assert notes.seen(db) == notes.of(notes.acme)
            db.execute(text("SET ROLE NONE"))
            db.commit()

            with pytest.raises(UnsafeConnectionError, match="superuser"):
                notes.seen(db)
    finally:
        engine.dispose()


# --- a refusal that the caller swallows --------------------------------------------------------------------------


def test_after_a_swallowed_conflict_no_statement_runs_without_a_tenant(
    notes: Notes, sessions: TenantSessions, statements: list[str]
) -> None:
    with sessions(notes.acme) as db:
        with tenant_scope(notes.globex), pytest.raises(TenantConflictError):
            notes.seen(db)

        assert statements == []

        assert notes.seen(db) == notes.of(notes.acme)


def test_an_open_session_does_not_serve_code_that_works_for_another_tenant(
    notes: Notes, sessions: TenantSessions
) -> None:
    with tenant_scope(notes.acme), sessions.begin() as db:
        before = notes.seen(db)

        with tenant_scope(notes.globex), pytest.raises(TenantConflictError):
            notes.seen(db)

        assert notes.seen(db) == before == notes.of(notes.acme)


def test_after_a_swallowed_refusal_no_statement_runs_without_a_tenant(notes: Notes, superuser: Engine) -> None:
    executed: list[str] = []
    event.listen(superuser, "before_cursor_execute", lambda _c, _cursor, statement, *_: executed.append(statement))

    with TenantSessions(superuser)(notes.acme) as db:
        for _ in range(3):
            with pytest.raises((UnsafeConnectionError, PendingRollbackError)):
                notes.seen(db)
        db.rollback()
        with pytest.raises(UnsafeConnectionError):
            notes.seen(db)

    assert executed
    assert all("note" not in statement for statement in executed)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_after_a_swallowed_failure_of_the_hook_itself_no_statement_runs_without_a_tenant(
    notes: Notes, sessions: TenantSessions, statements: list[str], failure: type[BaseException]
) -> None:
    def fail_once(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "set_config" in statement and len(statements) == 1:
            raise failure

    event.listen(sessions.engine, "before_cursor_execute", fail_once)

    with sessions(notes.acme) as db:
        with pytest.raises(failure):
            notes.seen(db)
        with pytest.raises(PendingRollbackError):
            notes.seen(db)
        db.rollback()

        assert notes.seen(db) == notes.of(notes.acme)
    assert sum("note" in statement for statement in statements) == 1


# --- one session, one tenant -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [TenantContext("cccccccc-cccc-4ccc-8ccc-cccccccccccc"), "another user"])
def test_a_session_of_another_tenant_than_the_active_one_runs_nothing(
    notes: Notes, sessions: TenantSessions, statements: list[str], other: TenantContext | str
) -> None:
    active = other if isinstance(other, TenantContext) else TenantContext(notes.acme.organization_id, "mallory")

    with tenant_scope(active), sessions(notes.acme) as db, pytest.raises(TenantConflictError) as conflict:
        notes.seen(db)

    assert (conflict.value.first, conflict.value.second) == (notes.acme, active)
    assert statements == []


def test_a_session_of_the_active_organization_without_a_user_is_no_conflict(
    notes: Notes, sessions: TenantSessions
) -> None:
    with tenant_scope(notes.acme), sessions(TenantContext(notes.acme.organization_id)) as db:
        assert notes.seen(db) == notes.of(notes.acme)


def test_the_tenant_of_a_session_cannot_be_changed(notes: Notes, sessions: TenantSessions) -> None:
    with sessions(notes.acme) as db, pytest.raises(AttributeError):
        db.tenant = notes.globex  # type: ignore[misc]


def test_a_closed_session_cannot_be_used_again(notes: Notes, sessions: TenantSessions, statements: list[str]) -> None:
    db = sessions(notes.acme)
    notes.seen(db)
    db.close()
    statements.clear()

    with pytest.raises(InvalidRequestError, match="permanently closed"):
        notes.seen(db)
    assert statements == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_session_cannot_be_given_a_connection(notes: Notes, sessions: TenantSessions, begun: bool) -> None:
    with sessions.engine.connect() as connection:
        if begun:
            connection.begin()

        with pytest.raises(TenantSessionError, match="cannot join a Connection"):
            TenantSession(bind=connection, tenant=notes.acme)
        with pytest.raises(TenantSessionError, match="cannot join a Connection"):
            TenantSession(connection, tenant=notes.acme)


def test_a_session_cannot_be_sent_to_a_connection_for_one_statement(notes: Notes, sessions: TenantSessions) -> None:
    with sessions.engine.connect() as connection, connection.begin():
        with sessions(notes.acme) as db, pytest.raises(TenantSessionError, match="Connection"):
            db.execute(text("SELECT 1"), bind_arguments={"bind": connection})

        assert connection.scalar(CURRENT_ORGANIZATION) != notes.acme.organization_id
        assert notes.seen(connection) == []


def test_a_session_class_cannot_bring_a_connection(notes: Notes, sessions: TenantSessions) -> None:
    with sessions.engine.connect() as connection, connection.begin():

        class BoundSession(Session):
            def get_bind(self, *_: Any, **__: Any) -> Connection:
                return connection

        bound = TenantSessions(sessions.engine, session_class=BoundSession)

        with bound(notes.acme) as db, pytest.raises(TenantSessionError, match="Connection"):
            notes.seen(db)

        assert notes.seen(connection) == []


# --- the application's own classes -------------------------------------------------------------------------------


def test_the_applications_own_session_class_is_kept_and_carries_the_tenant(notes: Notes) -> None:
    class AuditedSession(Session):
        def seen(self) -> list[str]:
            return notes.seen(self)

    at_begin: list[list[str]] = []
    event.listen(AuditedSession, "after_begin", lambda _session, _transaction, c: at_begin.append(notes.seen(c)))
    sessions = TenantSessions(notes.url, session_class=AuditedSession)
    try:
        with sessions(notes.acme) as db:
            assert isinstance(db, AuditedSession)
            assert isinstance(db, TenantSession)
            assert db.seen() == notes.of(notes.acme)
    finally:
        sessions.dispose()

    assert at_begin == [notes.of(notes.acme)], "the application's own after_begin comes after the tenant"


LISTENER_FIRST = textwrap.dedent(
    """
    import sys
    from sqlalchemy import event, text
    from sqlalchemy.orm import Session

    @event.listens_for(Session, "after_begin")
    def audit(session, transaction, connection):
        print(connection.scalar(text("SELECT count(*) FROM note")))

    from rhesis_tasks import TenantContext, TenantSessions

    class Audited(Session): ...

    for session_class in (Session, Audited):
        sessions = TenantSessions(sys.argv[1], session_class=session_class)
        with sessions(TenantContext(sys.argv[2])) as db:
            db.connection()
        sessions.dispose()
    """
)


def test_listeners_that_were_there_before_ours_find_the_tenant_set(notes: Notes, tmp_path: Path) -> None:
    script = tmp_path / "listens.py"
    script.write_text(LISTENER_FIRST)

    with child("listens.py", python("-W", "error", str(script), notes.url, notes.acme.organization_id)) as running:
        code = running.process.wait(timeout=30)
        output = running.finished_output()

    assert (code, output.split()) == (0, ["3", "3"]), output


def test_a_session_class_derived_from_ours_is_kept(notes: Notes) -> None:
    class AuditedSession(TenantSession):
        def seen(self) -> list[str]:
            return notes.seen(self)

    sessions = TenantSessions(notes.url, session_class=AuditedSession)
    try:
        with sessions(notes.acme) as db:
            assert db.seen() == notes.of(notes.acme)
    finally:
        sessions.dispose()


@pytest.mark.parametrize("pool", [QueuePool, NullPool])
def test_the_applications_own_engine_is_used_and_carries_the_tenant(notes: Notes, pool: Any) -> None:
    engine = create_engine(database_url(notes.url), poolclass=pool)
    sessions = TenantSessions(engine)
    try:
        with sessions(notes.acme) as db:
            assert sessions.engine is engine
            assert db.get_bind() is engine
            assert notes.seen(db) == notes.of(notes.acme)
    finally:
        engine.dispose()


# --- begin() and @tenant_session ---------------------------------------------------------------------------------


def test_begin_commits_at_the_end_and_closes(notes: Notes, sessions: TenantSessions) -> None:
    with sessions.begin(notes.acme) as db:
        notes.write(db, notes.acme, "a4")

    with pytest.raises(InvalidRequestError, match="permanently closed"):
        db.execute(text("SELECT 1"))
    with sessions(notes.acme) as other:
        assert notes.seen(other) == ["a1", "a2", "a3", "a4"]


def test_begin_rolls_back_on_an_exception_and_closes(notes: Notes, sessions: TenantSessions) -> None:
    used: list[Session] = []

    def write_and_fail() -> None:
        with sessions.begin(notes.acme) as db:
            used.append(db)
            notes.write(db, notes.acme, "a4")
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        write_and_fail()

    with pytest.raises(InvalidRequestError, match="permanently closed"):
        used[0].execute(text("SELECT 1"))
    with sessions(notes.acme) as other:
        assert notes.seen(other) == notes.of(notes.acme)


def test_a_decorated_function_commits_when_it_returns(notes: Notes, sessions: TenantSessions) -> None:
    used: list[Session] = []

    @tenant_session(sessions=sessions)
    def add(db: Session, body: str, *, twice: bool = False) -> str:
        used.append(db)
        notes.write(db, notes.acme, body)
        return body * (1 + twice)

    with tenant_scope(notes.acme):
        returned = add("a4", twice=True)

    assert returned == "a4a4"
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        used[0].execute(text("SELECT 1"))
    with sessions(notes.acme) as other:
        assert notes.seen(other) == ["a1", "a2", "a3", "a4"]


def test_a_decorated_function_rolls_back_when_it_raises(notes: Notes, sessions: TenantSessions) -> None:
    used: list[Session] = []

    @tenant_session(sessions=sessions)
    def add(db: Session, body: str) -> None:
        used.append(db)
        notes.write(db, notes.acme, body)
        raise KeyError(body)

    with tenant_scope(notes.acme), pytest.raises(KeyError):
        add("a4")

    with pytest.raises(InvalidRequestError, match="permanently closed"):
        used[0].execute(text("SELECT 1"))
    with sessions(notes.acme) as other:
        assert notes.seen(other) == notes.of(notes.acme)


def test_a_decorated_function_is_refused_without_a_tenant_before_its_body_runs(sessions: TenantSessions) -> None:
    counted = connections_counted(sessions.engine)
    ran: list[str] = []

    @tenant_session(sessions=sessions)
    def work(db: Session) -> None:
        ran.append("body")

    with pytest.raises(MissingTenantError):
        work()

    assert (ran, counted) == ([], [])


def test_a_task_gets_a_session_of_its_tenant_by_decorator_and_by_method(notes: Notes, make_app: MakeApp) -> None:
    app = make_app()

    @app.task(base=BaseTask, bind=True, shared=False)
    @tenant_session
    def by_decorator(self: BaseTask, db: Session) -> list[str]:
        return notes.seen(db)

    @app.task(base=BaseTask, bind=True, shared=False)
    def by_method(self: BaseTask) -> list[list[str]]:
        with self.get_db_session() as db:
            notes.write(db, self.tenant, f"{self.tenant.user_id}'s")
            db.commit()
            before = notes.seen(db)
            notes.write(db, self.tenant, "not committed")
        with self.get_db_session(readonly=True) as db:
            assert db.scalar(text("SHOW transaction_read_only")) == "on"
            return [before, notes.seen(db)]

    with tenant_scope(notes.acme):
        assert by_method() == [["a1", "a2", "a3", "alice's"]] * 2
    with tenant_scope(notes.globex):
        assert by_decorator() == ["g1", "g2"]
        assert by_method() == [["bob's", "g1", "g2"]] * 2


def test_get_db_session_is_refused_without_a_tenant(make_app: MakeApp) -> None:
    app = make_app()

    @app.task(base=BaseTask, bind=True, shared=False)
    def work(self: BaseTask) -> None: ...

    with pytest.raises(MissingTenantError):
        work.get_db_session()


def test_unconfigure_closes_the_connections_that_configure_led_to(
    notes: Notes, make_app: MakeApp, superuser: Engine
) -> None:
    app = make_app()

    @app.task(base=BaseTask, bind=True, shared=False)
    def read(self: BaseTask) -> list[str]:
        with self.get_db_session() as db:
            return notes.seen(db)

    def connections() -> int:
        with superuser.connect() as connection:
            return connection.scalar(
                text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role"), {"role": notes.database.role}
            )

    with tenant_scope(notes.acme):
        read()
    made = sessions_of(app)
    try:
        assert connections() == 1

        unconfigure(app)

        wait_until("the server to see the connection closed", lambda: connections() == 0, timeout=5)
    finally:
        made.dispose()


# --- a database that cannot be reached ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:s3cret@127.0.0.1:{port}/acme",
        "postgresql://app:s3cret@127.0.0.1:{port},127.0.0.1:{port}/acme",
        "postgresql://127.0.0.1:{port}/acme?user=app&password=s3cret",
    ],
    ids=["usual", "two hosts", "password in the query"],
)
def test_an_unreachable_database_is_named_without_its_password(url: str) -> None:
    sessions = TenantSessions(url.format(port=(port := free_port())))

    with (
        pytest.raises(DatabaseUnavailableError) as unavailable,
        sessions.begin(TenantContext("acme")) as db,
    ):
        db.execute(text("SELECT 1"))

    error = unavailable.value
    assert "127.0.0.1" in str(error) and str(port) in str(error)
    shown = "".join(traceback.format_exception(error)) + repr(error) + str(error.url) + repr(sessions)
    assert "s3cret" not in shown


def test_an_error_of_another_database_is_not_called_an_unreachable_one_of_ours(
    notes: Notes, sessions: TenantSessions
) -> None:
    def ask_elsewhere() -> None:
        with sessions.begin(notes.acme):
            raise OperationalError("SELECT 1", {}, Exception("the other database's lock timeout"))

    with pytest.raises(OperationalError, match="the other database's"):
        ask_elsewhere()


def test_an_unreachable_database_is_worth_another_attempt() -> None:
    sessions = TenantSessions(f"postgresql://app@127.0.0.1:{free_port()}/acme")
    with (
        pytest.raises(DatabaseUnavailableError) as unavailable,
        sessions.begin(TenantContext("acme")) as db,
    ):
        db.execute(text("SELECT 1"))

    decision = retry.DEFAULT.decide(unavailable.value, retries=0)

    assert isinstance(decision, retry.RetryLater), decision


def test_a_transaction_that_cannot_be_serialized_is_not_called_an_unreachable_database(notes: Notes) -> None:
    sessions = TenantSessions(notes.url, isolation_level="SERIALIZABLE")

    def write_what_the_other_has_read() -> None:
        with sessions.begin(notes.acme) as one, sessions.begin(notes.acme) as two:
            assert notes.seen(one) == notes.seen(two) == notes.of(notes.acme)
            notes.write(one, notes.acme, "a4")
            notes.write(two, notes.acme, "a5")
        # ``two`` commits first, which leaves ``one`` unable to.

    try:
        with pytest.raises(OperationalError) as conflict:
            write_what_the_other_has_read()
    finally:
        sessions.dispose()

    assert isinstance(conflict.value.orig, psycopg.errors.SerializationFailure)


def test_a_connection_lost_before_the_commit_is_not_called_an_unreachable_database(
    notes: Notes, sessions: TenantSessions, superuser: Engine
) -> None:
    def write_and_lose_the_connection() -> None:
        with sessions.begin(notes.acme) as db:
            notes.write(db, notes.acme, "a4")
            terminate_backend(superuser, db.scalar(text("SELECT pg_backend_pid()")))

    with pytest.raises(Exception, match="terminating connection") as lost:
        write_and_lose_the_connection()

    assert "cannot connect" not in str(lost.value)
    with sessions(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)
