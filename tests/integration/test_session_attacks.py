"""Ways to lose or to swap a session's tenant.  Each test shows one that works, and then that ours withstands it.

Where nothing withstands it the test says so: it is then a limit, and no promise.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from celery import Celery
from servers import ON_BOTH_SERVERS
from sqlalchemy import Connection, Engine, ForeignKey, Uuid, create_engine, event, select, text
from sqlalchemy.exc import InvalidRequestError, OperationalError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool

from rhesis_tasks import TenantContext, TenantSessions, binding, configure, tenant_scope, tenant_session
from rhesis_tasks import sessions as sessions_module
from rhesis_tasks.errors import (
    ConfigurationError,
    InvalidTenantError,
    TaskDefinitionError,
    TenantConflictError,
    TenantSessionError,
    UnsafeConnectionError,
)
from rhesis_tasks.rls import ORGANIZATION_SETTING
from rhesis_tasks.sessions import TenantSession
from rhesis_tasks.settings import database_url, quote_identifier

if TYPE_CHECKING:
    from conftest import Notes

pytestmark = ON_BOTH_SERVERS

SEEN = text("SELECT body FROM note ORDER BY body")
PID = text("SELECT pg_backend_pid()")
SEND = text(f"SELECT set_config('{ORGANIZATION_SETTING}', :organization_id, true)")
ALL = ["a1", "a2", "a3", "g1", "g2"]

BothWays = pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])


# --- what others do, to be attacked ------------------------------------------------------------------------------


def send(connection: Any, tenant: TenantContext) -> None:
    """What a session does that checks nothing."""
    connection.execute(SEND, {"organization_id": tenant.organization_id})


def plain_session(engine: Engine | Connection, tenant: TenantContext, **options: Any) -> Session:
    """A Session that sends the tenant when a transaction begins, and checks nothing."""
    session = Session(engine, **options)
    session.info["tenant"] = tenant
    event.listen(session, "after_begin", lambda db, _, connection: send(connection, db.info["tenant"]))
    return session


@pytest.fixture
def sent_for_the_connection(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets tenant sessions send the tenant as SET does, not as SET LOCAL, from the call on."""

    def change() -> None:
        ours = binding._statement
        monkeypatch.setattr(binding, "_statement", lambda names: text(ours(names).text.replace("true)", "false)")))

    return change


@pytest.fixture
def with_engine(notes: Notes) -> Iterator[Callable[..., Engine]]:
    """Makes engines of the application's login with a single connection."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        single = {} if "poolclass" in options else {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        made.append(create_engine(database_url(notes.url), **{**single, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


@pytest.fixture
def bypassing(notes: Notes, superuser: Engine) -> Iterator[str]:
    """A role with BYPASSRLS that the application's login is a member of, quoted."""
    role = quote_identifier(f"{notes.database.role}_bypass")
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} BYPASSRLS")
        connection.exec_driver_sql(f"GRANT SELECT ON note TO {role}")
        connection.exec_driver_sql(f"GRANT {role} TO {quote_identifier(notes.database.role)}")
    yield role
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")


@contextmanager
def pooled(sessions: TenantSessions) -> Iterator[Connection]:
    """The pool's connection, as code without a tenant gets it."""
    with sessions.engine.connect() as connection:
        yield connection


# --- a refusal that is swallowed ---------------------------------------------------------------------------------


def test_a_swallowed_refusal_would_let_a_superuser_see_all_rows(
    notes: Notes, superuser: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_a_swallowed_refusal() -> list[str]:
        with TenantSessions(superuser)(notes.acme) as db:
            with pytest.raises(UnsafeConnectionError):
                notes.seen(db)
            return notes.seen(db)

    with monkeypatch.context() as without:
        without.setattr(Connection, "invalidate", lambda *_: None)
        assert after_a_swallowed_refusal() == ALL

    with pytest.raises(PendingRollbackError):
        after_a_swallowed_refusal()


@BothWays
def test_a_swallowed_refusal_leaves_no_usable_connection_asynchronously_either(
    notes: Notes, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def after_a_swallowed_refusal(sessions: TenantSessions) -> list[str]:
        with monkeypatch.context() as failing:
            failing.setattr(binding, "_send", lambda *_: 1 / 0)
            async with sessions.async_session(notes.acme) as db:
                with pytest.raises(ZeroDivisionError):
                    await seen(db)
                return await seen(db)

    with monkeypatch.context() as without:
        without.setattr(Connection, "invalidate", lambda *_: None)
        assert asynchronously(notes, driver, after_a_swallowed_refusal) == [], "it ran, without a tenant"

    with pytest.raises(PendingRollbackError):
        asynchronously(notes, driver, after_a_swallowed_refusal)


# --- autocommit --------------------------------------------------------------------------------------------------


def _engine_level(make: Callable[..., Engine]) -> Engine:
    return make(isolation_level="AUTOCOMMIT")


def _execution_option(make: Callable[..., Engine]) -> Engine:
    return make().execution_options(isolation_level="AUTOCOMMIT")


def _connect_listener(make: Callable[..., Engine]) -> Engine:
    engine = make()
    event.listen(engine, "connect", lambda dbapi_connection, _: setattr(dbapi_connection, "autocommit", True))
    return engine


def _left_by_other_code(make: Callable[..., Engine]) -> Engine:
    engine = make()
    raw = engine.raw_connection()
    raw.dbapi_connection.autocommit = True  # type: ignore[union-attr]
    raw.close()
    return engine


@pytest.mark.parametrize("autocommitting", [_engine_level, _execution_option, _connect_listener, _left_by_other_code])
def test_autocommit_loses_the_tenant_silently(
    notes: Notes, with_engine: Callable[..., Engine], autocommitting: Callable[..., Engine]
) -> None:
    with plain_session(autocommitting(with_engine), notes.acme) as db:
        assert notes.seen(db) == []

    with TenantSessions(autocommitting(with_engine))(notes.acme) as db:
        with pytest.raises(UnsafeConnectionError, match="autocommit"):
            notes.seen(db)
        with pytest.raises(PendingRollbackError):
            notes.seen(db)


@BothWays
def test_autocommit_set_on_the_drivers_connection_in_the_middle_is_refused_from_the_next_transaction_on(
    notes: Notes, driver: str
) -> None:
    async def body(sessions: TenantSessions) -> None:
        async with sessions.async_session(notes.acme) as db:
            assert await seen(db) == notes.of(notes.acme)
            dbapi_connection: Any = (await db.connection()).sync_connection.connection.dbapi_connection
            with suppress(psycopg.ProgrammingError):  # psycopg refuses it inside of a transaction
                await db.run_sync(lambda _: setattr(dbapi_connection, "autocommit", True))
            assert await seen(db) == notes.of(notes.acme)
            await db.commit()
            await db.run_sync(lambda _: setattr(dbapi_connection, "autocommit", True))

            with pytest.raises(UnsafeConnectionError, match="autocommit"):
                await seen(db)

    async def unguarded(sessions: TenantSessions) -> None:
        async with sessions.async_engine().connect() as connection:
            raw: Any = connection.sync_connection.connection.dbapi_connection  # type: ignore[union-attr]
            await connection.run_sync(lambda _: setattr(raw, "autocommit", True))
            await connection.execute(SEND, {"organization_id": notes.acme.organization_id})
            assert list((await connection.execute(SEEN)).scalars()) == []

    asynchronously(notes, driver, unguarded)
    asynchronously(notes, driver, body)


# --- transactions that end otherwise than the session thinks -----------------------------------------------------


def test_a_raw_commit_loses_the_tenant_and_leaves_none(
    notes: Notes, sessions: TenantSessions, sent_for_the_connection: Callable[[], None]
) -> None:
    def commit_by_hand() -> list[str]:
        with sessions(notes.acme) as db:
            db.execute(text("COMMIT"))
            within = notes.seen(db)
        with pooled(sessions) as untenanted:
            assert notes.seen(untenanted) == within
        return within

    assert commit_by_hand() == []

    sent_for_the_connection()
    assert commit_by_hand() == notes.of(notes.acme), "code without a tenant sees the last one's rows"


def test_a_tenant_that_is_sent_once_is_lost_with_the_connection(
    notes: Notes, sessions: TenantSessions, superuser: Engine
) -> None:
    def lose_the_connection(db: Session) -> list[str]:
        assert notes.seen(db) == notes.of(notes.acme)
        with superuser.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": db.scalar(PID)})
        with pytest.raises(OperationalError):
            notes.seen(db)
        db.rollback()
        return notes.seen(db)

    with Session(sessions.engine) as db:
        send(db, notes.acme)
        assert lose_the_connection(db) == []

    with sessions(notes.acme) as db:
        assert lose_the_connection(db) == notes.of(notes.acme)


def test_a_tenant_that_is_sent_inside_of_a_savepoint_is_lost_with_it(notes: Notes, sessions: TenantSessions) -> None:
    def roll_back_a_savepoint(db: Session, inside: Callable[[], None]) -> list[str]:
        with db.begin_nested() as savepoint:
            inside()
            assert notes.seen(db) == notes.of(notes.acme)
            savepoint.rollback()
        return notes.seen(db)

    with Session(sessions.engine) as db:
        assert roll_back_a_savepoint(db, lambda: send(db, notes.acme)) == []

    with sessions(notes.acme) as db:
        assert roll_back_a_savepoint(db, lambda: None) == notes.of(notes.acme)


def test_a_savepoint_can_bring_an_earlier_tenant_back(notes: Notes, sessions: TenantSessions) -> None:
    """Where the tenant of one transaction can be changed; ours cannot."""
    with Session(sessions.engine) as db:
        send(db, notes.globex)
        with db.begin_nested() as savepoint:
            send(db, notes.acme)
            savepoint.rollback()
        assert notes.seen(db) == notes.of(notes.globex)

    with tenant_scope(notes.globex), sessions() as db:
        notes.seen(db)
        with db.begin_nested(), tenant_scope(notes.acme), pytest.raises(TenantConflictError):
            notes.seen(db)
        assert notes.seen(db) == notes.of(notes.globex)


def test_the_begin_event_of_an_engine_misses_two_phase_transactions(
    notes: Notes, with_engine: Callable[..., Engine]
) -> None:
    class TwoPhaseSession(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(twophase=True, **options)

    engine = with_engine()
    event.listen(engine, "begin", lambda connection: send(connection, notes.acme))
    with Session(engine) as one_phase:
        assert notes.seen(one_phase) == notes.of(notes.acme)
    with TwoPhaseSession(bind=engine) as two_phases:
        assert notes.seen(two_phases) == []

    sessions = TenantSessions(with_engine(), session_class=TwoPhaseSession)
    with sessions(notes.globex) as db:
        assert notes.seen(db) == notes.of(notes.globex)
        db.rollback()
        assert notes.seen(db) == notes.of(notes.globex)
    with pooled(sessions) as untenanted:
        assert notes.seen(untenanted) == []


@BothWays
@pytest.mark.parametrize("moment", ["while nothing runs", "in a query", "in the hook"])
def test_a_cancelled_task_leaves_no_tenant_behind(
    notes: Notes, driver: str, moment: str, sent_for_the_connection: Callable[[], None]
) -> None:
    async def cancel(sessions: TenantSessions) -> list[str]:
        """What code without a tenant sees afterwards."""
        reached = asyncio.Event()

        async def work() -> None:
            async with sessions.async_begin(notes.acme) as db:
                assert await seen(db) == notes.of(notes.acme)
                await db.commit()
                if moment == "in the hook":
                    # The hook waits for the server for so long that it is cancelled there.
                    event.listen(
                        sessions.async_engine().sync_engine,
                        "before_cursor_execute",
                        lambda _c, _cursor, statement, parameters, *_: (
                            (statement.replace("SELECT ", "SELECT pg_sleep(30), ", 1), parameters)
                            if "set_config" in statement
                            else (statement, parameters)
                        ),
                        retval=True,
                    )
                    reached.set()
                await seen(db)
                reached.set()
                await (db.execute(text("SELECT pg_sleep(30)")) if moment == "in a query" else asyncio.sleep(30))

        task = asyncio.create_task(work())
        await asyncio.wait_for(reached.wait(), 10)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with sessions.async_engine().connect() as untenanted:
            left = list((await untenanted.execute(SEEN)).scalars())
        if moment != "in the hook":
            async with sessions.async_begin(notes.globex) as db:
                assert await seen(db) == notes.of(notes.globex)
        return left

    assert asynchronously(notes, driver, cancel) == []

    if moment == "while nothing runs":  # otherwise the connection itself may be given up
        sent_for_the_connection()
        assert asynchronously(notes, driver, cancel) == notes.of(notes.acme)


# --- somebody else's transaction ---------------------------------------------------------------------------------


def test_a_session_in_somebodys_transaction_leaves_its_tenant_there(notes: Notes, sessions: TenantSessions) -> None:
    with sessions.engine.connect() as connection, connection.begin():
        with plain_session(connection, notes.acme) as db:
            notes.seen(db)
            db.commit()
        assert notes.seen(connection) == notes.of(notes.acme)

    with sessions.engine.connect() as connection, connection.begin():
        with pytest.raises(TenantSessionError, match="cannot join a Connection"):
            TenantSession(connection, tenant=notes.acme)
        assert notes.seen(connection) == []


def test_a_closed_session_opens_again_with_its_tenant(notes: Notes, sessions: TenantSessions) -> None:
    plain = plain_session(sessions.engine, notes.acme)
    plain.close()
    assert notes.seen(plain) == notes.of(notes.acme)
    plain.close()

    ours = sessions(notes.acme)
    ours.close()
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        notes.seen(ours)


def test_a_session_that_nobody_closes_lends_its_tenant_on_where_the_pool_does_not_reset(
    notes: Notes, with_engine: Callable[..., Engine]
) -> None:
    def after_a_forgotten_session(engine: Engine, session: Callable[[], Session]) -> list[str]:
        db = session()
        assert notes.seen(db) == notes.of(notes.acme)
        del db
        gc.collect()
        with engine.connect() as untenanted:
            return notes.seen(untenanted)

    no_reset = with_engine(pool_reset_on_return=None)
    assert after_a_forgotten_session(no_reset, lambda: plain_session(no_reset, notes.acme)) == notes.of(notes.acme)

    with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
        TenantSessions(no_reset)
    with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
        TenantSessions(notes.url, pool_reset_on_return=None)
    usual = with_engine()
    assert after_a_forgotten_session(usual, lambda: TenantSessions(usual)(notes.acme)) == []


def test_a_raw_connection_that_comes_back_with_an_open_transaction_brings_its_tenant(
    notes: Notes, with_engine: Callable[..., Engine]
) -> None:
    """Code of the application's own that sends a tenant, and neither commits nor rolls back."""

    def after_a_raw_connection(engine: Engine) -> list[str]:
        raw = engine.raw_connection()
        raw.cursor().execute(f"SELECT set_config('{ORGANIZATION_SETTING}', '{notes.acme.organization_id}', true)")
        raw.close()
        with engine.connect() as untenanted:
            return notes.seen(untenanted)

    no_reset = with_engine(pool_reset_on_return=None)
    assert after_a_raw_connection(no_reset) == notes.of(notes.acme)

    with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
        TenantSessions(no_reset)
    assert after_a_raw_connection(TenantSessions(with_engine()).engine) == []


@BothWays
def test_an_asynchronous_pool_without_reset_is_refused_too(notes: Notes, driver: str) -> None:
    url = database_url(notes.url).set(drivername=f"postgresql+{driver}")
    sessions = TenantSessions(url, async_engine_options={"pool_reset_on_return": None})

    async def ask() -> None:
        with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
            sessions.async_session(notes.acme)
        with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
            async with sessions.async_connection(notes.acme):
                pass

    asyncio.run(ask())
    with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
        TenantSessions(create_async_engine(url, pool_reset_on_return=None))


def test_an_engine_of_a_single_model_is_held_to_the_same(notes: Notes, with_engine: Callable[..., Engine]) -> None:
    no_reset = with_engine(pool_reset_on_return=None)
    unpooled = with_engine(pool_reset_on_return=None, poolclass=NullPool)
    for engine, refused in [(no_reset, True), (unpooled, False)]:
        sessions = TenantSessions(sessionmaker(with_engine(), binds={Note: engine}))
        with sessions(notes.acme) as db:
            if refused:
                with pytest.raises(ConfigurationError, match="pool_reset_on_return"):
                    db.scalars(select(Note))
            else:
                assert [note.body for note in db.scalars(select(Note).order_by(Note.body))] == notes.of(notes.acme)


# --- objects in memory -------------------------------------------------------------------------------------------


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(Uuid(as_uuid=False))
    body: Mapped[str]
    replies: Mapped[list[Reply]] = relationship(back_populates="note")


class Reply(Base):
    __tablename__ = "reply"
    id: Mapped[int] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(Uuid(as_uuid=False))
    note_id: Mapped[int] = mapped_column(ForeignKey("note.id"))
    note: Mapped[Note] = relationship(back_populates="replies")


@pytest.fixture
def note_with_reply(notes: Notes, superuser: Engine) -> int:
    """The id of a note of acme's that has a reply."""
    with superuser.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE reply (organization_id uuid, id int PRIMARY KEY, note_id bigint REFERENCES note)"
        )
        connection.exec_driver_sql(f"GRANT ALL ON reply TO {quote_identifier(notes.database.role)}")
        connection.exec_driver_sql("INSERT INTO reply SELECT organization_id, 1, id FROM note WHERE body = 'a1'")
        return int(connection.exec_driver_sql("SELECT id FROM note WHERE body = 'a1'").scalar_one())


def test_a_session_whose_tenant_could_be_changed_would_hand_out_the_old_ones_objects(
    notes: Notes, sessions: TenantSessions, note_with_reply: int
) -> None:
    with plain_session(sessions.engine, notes.acme) as plain:
        kept = plain.get_one(Note, note_with_reply)
        plain.info["tenant"] = notes.globex
        assert plain.get(Note, note_with_reply) is kept

    with sessions(notes.acme) as db:
        db.get_one(Note, note_with_reply)
        with pytest.raises(AttributeError):
            db.tenant = notes.globex  # type: ignore[misc]
        with tenant_scope(notes.globex), pytest.raises(TenantConflictError):
            db.get(Note, note_with_reply)


def _get(db: Session, note: Note, reply: Reply) -> Any:
    return db.get(Note, note.id).body  # type: ignore[union-attr]


def _get_one(db: Session, note: Note, reply: Reply) -> Any:
    return db.get_one(Note, note.id).body


def _refresh(db: Session, note: Note, reply: Reply) -> Any:
    db.refresh(note)
    return note.body


def _expired(db: Session, note: Note, reply: Reply) -> Any:
    db.expire(note)
    return note.body


def _to_many(db: Session, note: Note, reply: Reply) -> Any:
    return note.replies[0].note.body


def _to_one(db: Session, note: Note, reply: Reply) -> Any:
    return reply.note.body  # from memory, without a statement


@pytest.mark.parametrize("read", [_get, _get_one, _refresh, _expired, _to_many, _to_one])
def test_an_open_session_loads_nothing_for_code_of_another_tenant(
    notes: Notes,
    sessions: TenantSessions,
    note_with_reply: int,
    read: Callable[[Session, Note, Reply], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_as_globex() -> Any:
        with sessions(notes.acme) as db:
            note, reply = db.get_one(Note, note_with_reply), db.scalars(select(Reply)).one()
            with tenant_scope(notes.globex):
                return read(db, note, reply)

    with monkeypatch.context() as without:
        for module in (sessions_module, binding):
            without.setattr(module, "refuse_other_tenant", lambda _: None)
        assert read_as_globex() == "a1"

    with pytest.raises(TenantConflictError):
        read_as_globex()


def test_pending_changes_are_not_written_for_code_of_another_tenant(
    notes: Notes, sessions: TenantSessions, note_with_reply: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit_as_globex(body: str) -> None:
        with sessions(notes.acme) as db:
            db.get_one(Note, note_with_reply).body = body
            with tenant_scope(notes.globex):
                db.commit()

    with monkeypatch.context() as without:
        for module in (sessions_module, binding):
            without.setattr(module, "refuse_other_tenant", lambda _: None)
        commit_as_globex("a1")

    with pytest.raises(TenantConflictError):
        commit_as_globex("written for nobody knows whom")
    with sessions(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)


# --- roles that policies do not bind -----------------------------------------------------------------------------


def test_a_superuser_sees_all_rows_whatever_the_tenant(notes: Notes, superuser: Engine) -> None:
    with plain_session(superuser, notes.acme) as db:
        assert notes.seen(db) == ALL

    with TenantSessions(superuser)(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="superuser"):
        notes.seen(db)


@pytest.fixture
def login_bypasses(notes: Notes, superuser: Engine) -> Callable[[], None]:
    """Lets the application's login bypass row-level security, from the call on."""

    def change() -> None:
        with superuser.begin() as connection:
            connection.exec_driver_sql(f"ALTER ROLE {quote_identifier(notes.database.role)} BYPASSRLS")

    return change


def test_a_login_with_bypassrls_sees_all_rows_whatever_the_tenant(
    notes: Notes, sessions: TenantSessions, login_bypasses: Callable[[], None]
) -> None:
    login_bypasses()
    with plain_session(sessions.engine, notes.acme) as db:
        assert notes.seen(db) == ALL

    with sessions(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="BYPASSRLS"):
        notes.seen(db)


def test_a_login_that_is_given_bypassrls_is_found_out_on_its_next_connection(
    notes: Notes, sessions: TenantSessions, login_bypasses: Callable[[], None]
) -> None:
    """A limit: it is asked once for each connection, since asking costs a round trip."""
    with sessions(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)
    login_bypasses()

    with sessions(notes.acme) as db:
        assert notes.seen(db) == ALL
    sessions.dispose()
    with sessions(notes.acme) as db, pytest.raises(UnsafeConnectionError, match="BYPASSRLS"):
        notes.seen(db)


def test_a_role_taken_inside_of_a_transaction_bypasses_it_and_no_later_one(
    notes: Notes, sessions: TenantSessions, bypassing: str, superuser: Engine
) -> None:
    """A limit: what runs in the transaction itself is not looked at.  A login should be a member of no such role."""
    with plain_session(sessions.engine, notes.acme) as plain:
        plain.execute(text(f"SET ROLE {bypassing}"))
        plain.commit()
        assert notes.seen(plain) == ALL
    sessions.dispose()

    with sessions(notes.acme) as db:
        db.execute(text(f"SET ROLE {bypassing}"))
        assert notes.seen(db) == ALL, "the limit"
        db.commit()
        with pytest.raises(UnsafeConnectionError, match="BYPASSRLS"):
            notes.seen(db)
    with sessions(notes.globex) as db:
        assert notes.seen(db) == notes.of(notes.globex), "on another connection"

    with sessions.begin(notes.acme) as db:
        db.execute(text(f"SET LOCAL ROLE {bypassing}"))
    with sessions(notes.globex) as db:
        assert notes.seen(db) == notes.of(notes.globex), "the role went with its transaction"

    with superuser.begin() as connection:
        connection.exec_driver_sql(f"REVOKE {bypassing} FROM {quote_identifier(notes.database.role)}")
    with sessions(notes.acme) as db, pytest.raises(SQLAlchemyError, match="permission denied to set role"):
        db.execute(text(f"SET ROLE {bypassing}"))


# --- settings that other code leaves on a connection -------------------------------------------------------------


def test_a_tenant_that_the_application_sets_by_hand_stays_for_code_without_a_tenant_and_for_no_session(
    notes: Notes, sessions: TenantSessions
) -> None:
    """A limit: code of the application's own that says SET, not SET LOCAL, poisons what has no tenant."""
    by_hand = text(f"SET {ORGANIZATION_SETTING} = '{notes.globex.organization_id}'")

    with sessions.begin(notes.acme) as db:
        db.execute(by_hand)
        assert notes.seen(db) == notes.of(notes.globex), "the limit: nothing stops the transaction's own SQL"
        db.commit()
        assert notes.seen(db) == notes.of(notes.acme), "the session's next transaction has its own tenant"

    with pooled(sessions) as untenanted:
        assert notes.seen(untenanted) == notes.of(notes.globex), "the limit"
    with Session(sessions.engine) as plain:
        assert notes.seen(plain) == notes.of(notes.globex), "the limit"
    with sessions(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)
    with sessions.connection(notes.acme) as connection:
        assert notes.seen(connection) == notes.of(notes.acme)


# --- forks and event loops ---------------------------------------------------------------------------------------


async def seen(db: AsyncSession) -> list[str]:
    return list((await db.execute(SEEN)).scalars())


def asynchronously(notes: Notes, driver: str, body: Callable[[TenantSessions], Awaitable[Any]]) -> Any:
    """What a coroutine function returns, with sessions on a pool of one connection."""

    async def main() -> Any:
        url = database_url(notes.url).set(drivername=f"postgresql+{driver}")
        sessions = TenantSessions(url, pool_size=1, max_overflow=0, pool_timeout=5)
        try:
            return await asyncio.wait_for(body(sessions), 30)
        finally:
            await sessions.async_dispose()
            sessions.dispose()

    return asyncio.run(main())


# --- what looks like a tenant session, or lets one be shared -----------------------------------------------------


def test_a_maker_or_engine_is_not_taken_for_tenant_sessions(notes: Notes) -> None:
    engine = create_engine(database_url(notes.url))
    for lookalike in (sessionmaker(engine), engine):
        with pytest.raises(ConfigurationError, match="sessions= takes TenantSessions"):
            tenant_session(sessions=lookalike)  # type: ignore[call-overload]
        with pytest.raises(ConfigurationError, match="sessions= takes TenantSessions"):
            configure(Celery("lookalike", set_as_current=False), sessions=lookalike)  # type: ignore[arg-type]
    engine.dispose()


def test_a_bind_that_is_named_for_a_connection_is_looked_at_as_well(notes: Notes, sessions: TenantSessions) -> None:
    elsewhere = create_engine(database_url(notes.url), poolclass=NullPool)
    with elsewhere.connect() as connection, sessions(notes.acme, readonly=True) as db:
        with pytest.raises(TenantSessionError, match="cannot join a Connection"):
            db.connection(bind_arguments={"bind": connection})
        with tenant_scope(notes.globex), pytest.raises(TenantConflictError):
            db.connection(bind_arguments={"bind": sessions.engine})
        ours = db.connection(bind_arguments={"bind": sessions.engine})
        assert ours.scalar(text("SHOW transaction_read_only")) == "on"
        assert db.connection() is ours


@pytest.mark.filterwarnings("ignore:transaction already deassociated from connection")
@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_transaction_that_is_ended_on_the_connection_itself_is_not_followed_by_one_of_nobodys(
    notes: Notes, sessions: TenantSessions, ending: str
) -> None:
    with Session(sessions.engine) as plain:
        getattr(plain.connection(), ending)()
        assert notes.seen(plain) == [], "SQLAlchemy begins another one, and tells no session"

    with sessions(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)
        getattr(db.connection(), ending)()
        with pytest.raises(TenantSessionError, match=r"db\.commit\(\), not db\.connection"):
            notes.seen(db)
        db.rollback()
        assert notes.seen(db) == notes.of(notes.acme)


@pytest.mark.parametrize("pool", [StaticPool, SingletonThreadPool])
def test_a_pool_that_lends_one_connection_to_two_sessions_is_refused(notes: Notes, pool: Any) -> None:
    engine = create_engine(database_url(notes.url), poolclass=pool)
    with engine.begin() as one, engine.connect() as other:
        one.execute(
            text("SELECT set_config('app.current_organization', :id, true)"), {"id": notes.acme.organization_id}
        )
        assert notes.seen(other) == notes.of(notes.acme), "the same connection, in the other's transaction"
    for source in (engine, notes.url):
        options = {"poolclass": pool} if source is notes.url else {}
        with pytest.raises(ConfigurationError, match="one's tenant would become the other's"):
            TenantSessions(source, **options)  # type: ignore[arg-type]
    engine.dispose()


def test_a_core_connection_serves_no_other_tenants_code(notes: Notes, sessions: TenantSessions) -> None:
    with sessions.connection(notes.acme) as connection:
        with tenant_scope(notes.globex), pytest.raises(TenantConflictError):
            notes.seen(connection)
        assert notes.seen(connection) == notes.of(notes.acme)


def test_a_tenant_is_a_tenant_or_a_user_of_one(notes: Notes, sessions: TenantSessions) -> None:
    class User:
        id = "alice"
        organization_id = notes.acme.organization_id

    with sessions(User()) as db:  # type: ignore[arg-type]
        assert (db.tenant, notes.seen(db)) == (notes.acme, notes.of(notes.acme))
    with tenant_scope(notes.acme):
        for wrong in ("", "acme", 7):
            with pytest.raises(InvalidTenantError), sessions.connection(wrong):  # type: ignore[arg-type]
                pass


def test_a_function_that_returns_what_runs_later_gets_no_session(notes: Notes, sessions: TenantSessions) -> None:
    async def later(db: Session) -> None: ...

    @tenant_session(sessions=sessions)
    def now(db: Session) -> Any:
        return later(db)

    with tenant_scope(notes.acme), pytest.raises(TaskDefinitionError, match="runs when the session is closed"):
        now()


def test_a_system_session_serves_no_tenants_code(notes: Notes, superuser: Engine) -> None:
    sessions = TenantSessions(notes.url, system=superuser)
    with sessions.system_session(reason="a test") as db:
        assert notes.seen(db) == [*notes.of(notes.acme), *notes.of(notes.globex)]
        with tenant_scope(notes.acme), pytest.raises(TenantSessionError, match="a system session is nobody's"):
            notes.seen(db)
    sessions.dispose()
