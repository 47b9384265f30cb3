"""Engines that survive a fork, and that belong to one event loop each."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, NullPool, Pool, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ..errors import ConfigurationError, DatabaseUnavailableError
from ..settings import async_database_url, database_url, redacted, require_psycopg
from .patience import ANSWER_TIMEOUT

__all__ = [
    "READ_ONLY",
    "LoopEngines",
    "OneLoopEngine",
    "abandon_engines",
    "cancel_interrupted",
    "cut_busy",
    "cut_lent",
    "dispose_engines",
    "forget_pool_after_fork",
    "new_engine",
    "run",
    "shared_engine",
    "transaction_engine",
    "unavailable",
]

CONNECT_TIMEOUT: Final = 5
"""Seconds within which a connection of the library's own must be made, unless the URL says otherwise."""

READ_ONLY: Final = "25006"
"""The SQLSTATE of a server, or a transaction, that may not write."""


def new_engine(url: Any, **options: Any) -> Engine:
    """An engine for a PostgreSQL URL in any usual form, safe to inherit by a fork.

    Raises:
        MissingExtraError: psycopg is not installed.
        ConfigurationError: it is not a PostgreSQL URL.
    """
    require_psycopg()
    engine = create_engine(database_url(url), **{"pool_pre_ping": True, **options})
    forget_pool_after_fork(engine)
    return engine


def cancel_interrupted(engine: Engine) -> None:
    """Let a statement whose answer nobody waits for any more be cancelled, and its connection be closed.

    A soft time limit raises wherever the task is.  In the middle of a statement, the server would go on until it has an
    answer, with all its locks, and the connection could not even roll back.  (psycopg sees to it on Ctrl-C only.)
    """
    event.listen(engine, "handle_error", _give_up_interrupted)
    event.listen(engine, "close", _cancel)


def _give_up_interrupted(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is not None and not connection.invalidated and _is_active(connection.connection.dbapi_connection):
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False


def _cancel(connection: Any, _: object) -> None:
    if _is_active(connection):
        with suppress(Exception):  # it is gone, then
            connection.pgconn.get_cancel().cancel()


def _is_active(connection: Any) -> bool:
    """Whether a connection of psycopg's waits for the end of a statement."""
    pgconn = getattr(connection, "pgconn", None)
    return pgconn is not None and pgconn.transaction_status == _ACTIVE


_ACTIVE: Final = 1  # libpq's PQTRANS_ACTIVE


@functools.cache
def shared_engine(url: str) -> Engine:
    """The library's own engine for a URL, one in the process: Celery makes a result backend for each thread.

    Each statement is committed by itself.  Its user tries again what was sent over a lost connection.
    """
    return _own_engine(url)


@functools.cache
def transaction_engine(url: str) -> Engine:
    """The same for transactions, in which whoever holds one has further statements run on the shared engine.

    It has a connection for each: whoever waited for one while he holds another could wait for ever.
    """
    return _own_engine(url, max_overflow=-1)


def _own_engine(url: str, **options: Any) -> Engine:
    # A server that accepts and then says nothing would keep a launch waiting for ever.
    timeout = {} if "connect_timeout" in database_url(url).query else {"connect_timeout": CONNECT_TIMEOUT}
    engine = new_engine(
        url,
        connect_args=timeout,
        isolation_level="AUTOCOMMIT",
        pool_pre_ping=False,
        pool_reset_on_return=None,  # nothing is left open: what failed in the middle is not given back
        pool_timeout=ANSWER_TIMEOUT,
        **options,
    )
    event.listen(engine, "connect", _prepare_nothing_behind_a_pooler)
    return engine


def run(
    engine: Engine, statement: str, values: Sequence[Any], *, as_dicts: bool = False, timeout: float | None = None
) -> list[Any]:
    """Run one statement on a shared engine, in a transaction of its own; returns its rows, as tuples or dicts.

    With the engine's pool and errors only: SQLAlchemy's Connection and Result would cost the process more than all that
    psycopg does.

    Args:
        engine: as :func:`shared_engine` returns it.
        statement: as psycopg wants it, with ``%s``.
        values: those of its parameters.
        as_dicts: whether rows are dicts.
        timeout: seconds for which the answer is waited for; None: until it comes.

    Raises:
        AnswerTimeoutError: it did not come; all connections of the pool are closed.
        DatabaseUnavailableError: the server cannot be reached.
        DBAPIError: as SQLAlchemy raises it; a lost connection has taken the others in the pool along.
    """
    from psycopg import Error

    from .connection import no_answer
    from .statements import NoAnswer, Statements

    try:
        pooled = engine.raw_connection()
    except (Error, PoolTimeoutError) as error:
        raise unavailable(engine, error) from None
    connection: Any = pooled.driver_connection
    try:
        if (statements := pooled.info.get(Statements)) is None:
            statements = pooled.info[Statements] = Statements(
                connection, prepares=connection.prepare_threshold is not None
            )
        rows: list[Any] = statements.run(statement, values, as_dicts=as_dicts, timeout=timeout)
    except NoAnswer as error:
        engine.pool._invalidate(pooled, error)  # the others will not be answered either
        raise no_answer(engine.url, error) from None
    except Error as error:
        if is_lost := bool(connection.closed):
            engine.pool._invalidate(pooled, error)  # as SQLAlchemy's own Connection does
        elif error.sqlstate == READ_ONLY:
            pooled.invalidate()  # the next one may lead to the primary
        else:
            pooled.close()
        more: Any = {"connection_invalidated": is_lost, "dialect": engine.dialect}
        raise DBAPIError.instance(statement, tuple(values), error, Error, engine.hide_parameters, **more) from error
    except BaseException:
        pooled.invalidate()  # in the middle of a statement
        raise
    pooled.close()
    return rows


def unavailable(engine: Engine, error: BaseException) -> DatabaseUnavailableError:
    """What to raise where an engine cannot connect, or its connections are lent and do not come back."""
    url = redacted(engine.url)
    if isinstance(error, PoolTimeoutError):
        return DatabaseUnavailableError(f"no connection to {url} has become free within {ANSWER_TIMEOUT:g} s", url=url)
    return DatabaseUnavailableError(f"cannot connect to {url}: {error}", url=url)


def _prepare_nothing_behind_a_pooler(made: Any, _: object) -> None:
    from .statements import Statements

    # A pooler connects at once, whether or not it has a server.
    [(process_id,)] = Statements(made, prepares=False).run("SELECT pg_backend_pid()", timeout=ANSWER_TIMEOUT)
    if process_id != made.info.backend_pid:
        made.prepare_threshold = None  # the next transaction may be on another server connection


class LoopEngines:
    """An AsyncEngine for each event loop, made when it is first asked for.

    A connection belongs to the loop that made it; lent to another one, asyncpg fails and psycopg may hang.

    Args:
        url: a PostgreSQL URL in any usual form; with ``postgresql+asyncpg`` by asyncpg, else by psycopg.
        options: for ``create_async_engine``.
    """

    def __init__(self, url: str | URL, **options: Any) -> None:
        self._url = async_database_url(url)
        self._options = {"pool_pre_ping": True, **options}
        self._engines: dict[asyncio.AbstractEventLoop, AsyncEngine] = {}
        _sources.add(self)

    def current(self) -> AsyncEngine:
        """The engine of the running event loop.

        Raises:
            RuntimeError: none is running.
            MissingExtraError: the driver is not installed.
        """
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        if engine is None:
            self._forget_closed_loops()
            # Without a lock, which a fork might leave held for ever: no other thread runs this loop.
            engine = self._engines[loop] = create_async_engine(self._url, **self._options)
            forget_pool_after_fork(engine.sync_engine)
            _track(engine.sync_engine)
        return engine

    def _forget_closed_loops(self) -> None:
        for loop in list(self._engines):
            engine = self._engines.pop(loop, None) if loop.is_closed() else None
            if engine is not None:
                # Nothing can be said to its connections any more.
                engine.sync_engine.dispose(close=False)

    async def dispose(self) -> None:
        """Close the pooled connections of the running event loop."""
        engine = self._engines.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.dispose()

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget the engine of an event loop that will not run any more."""
        engine = self._engines.pop(loop, None)
        if engine is not None:
            engine.sync_engine.dispose(close=False)


class OneLoopEngine:
    """An application's own AsyncEngine, which serves one event loop, and another one once that is closed."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        _track(engine.sync_engine)
        _sources.add(self)

    def current(self) -> AsyncEngine:
        """The engine, for the running event loop.

        Raises:
            ConfigurationError: it serves another one.
            RuntimeError: none is running.
        """
        loop = asyncio.get_running_loop()
        known = self._loop() if self._loop is not None else None
        if known is loop or isinstance(self.engine.pool, NullPool):
            return self.engine
        if known is not None and not known.is_closed():
            raise ConfigurationError(
                "the AsyncEngine of these sessions has connections of another event loop.  Make them from a URL, so "
                "that each loop gets an engine of its own"
            )
        if self._loop is not None:
            self.engine.sync_engine.dispose(close=False)
        self._loop = weakref.ref(loop)
        return self.engine

    async def dispose(self) -> None:
        """Close its pooled connections, if they are the running event loop's; it may serve another one then."""
        if self._loop is not None and self._loop() is asyncio.get_running_loop():
            await self.engine.dispose()
            self._loop = None

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget its pooled connections, if they are those of an event loop that will not run any more."""
        if self._loop is not None and self._loop() is loop:
            self.engine.sync_engine.dispose(close=False)
            self._loop = None


_sources: weakref.WeakSet[LoopEngines | OneLoopEngine] = weakref.WeakSet()

# Connections by the event loop that has made them: all, and those that are lent.
_made: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_lent: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def _track(engine: Engine) -> None:
    """Know an asynchronous engine's connections, also those that nobody gives back."""

    def note(which: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]], connection: Any) -> None:
        which.setdefault(asyncio.get_running_loop(), weakref.WeakSet()).add(connection.driver_connection)

    def give_back(connection: Any, _: object) -> None:
        loop = asyncio._get_running_loop()
        if connection is not None and loop is not None:  # else it was dropped, and is closed
            _lent.get(loop, weakref.WeakSet()).discard(connection.driver_connection)

    event.listen(engine, "connect", lambda connection, _: note(_made, connection))
    event.listen(engine, "checkout", lambda connection, _, __: note(_lent, connection))
    event.listen(engine, "checkin", give_back)


def _cut(connection: Any) -> None:
    if not hasattr(connection, "terminate"):
        connection.pgconn.finish()
        return
    try:
        connection.terminate()  # asyncpg's
    except RuntimeError:  # its event loop is closed, and closes nothing any more
        connection._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def cut_lent(loop: asyncio.AbstractEventLoop) -> int:
    """Cut the connections of an event loop that are lent, or on their way to be closed; how many there were."""
    lent = _lent.pop(loop, None) if _lent else None
    if not lent:
        return 0
    for connection in list(lent):
        _cut(connection)
    return len(lent)


def cut_busy(connection: Connection) -> None:
    """Cut a connection that another thread may be using, and cancel the statement that it may be in the middle of.

    Not where that thread has ended the transaction meanwhile.

    Raises:
        TimeoutError: the statement did not end.
    """
    with suppress(InvalidRequestError):  # that thread has closed it just now
        driver: Any = None if connection.closed or connection.invalidated else connection.connection.dbapi_connection
        if driver is None:
            return
        lock = getattr(driver, "lock", None)  # psycopg's, which is held while an answer is waited for
        if lock is None:
            connection.invalidate()
            return
        if not lock.acquire(timeout=_SHORT):
            if connection.closed:
                return
            driver.cancel()
            if not lock.acquire(timeout=CONNECT_TIMEOUT):
                raise TimeoutError(f"a statement goes on {CONNECT_TIMEOUT} s after it was cancelled")
        try:
            if not connection.closed and driver.pgconn.transaction_status != _IDLE:
                connection.invalidate()
        finally:
            lock.release()


_SHORT: Final = 0.1  # seconds in which most statements end by themselves
_IDLE: Final = 0  # libpq's PQTRANS_IDLE


async def dispose_engines() -> None:
    """Close all pooled connections of the running event loop."""
    for source in list(_sources):
        await source.dispose()


def abandon_engines(loop: asyncio.AbstractEventLoop) -> None:
    """Cut all connections of an event loop that will not run any more, whatever they are in the middle of."""
    for connection in list(_made.pop(loop, ())):
        _cut(connection)
    for source in list(_sources):
        source.forget(loop)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[Pool] = []  # kept, so that no driver closes or complains of a parent's connection it deletes


def forget_pool_after_fork(engine: Engine) -> None:
    """Let a forked child start with an empty pool: the sockets in it are its parent's."""
    _engines.add(engine)


def _forget_pools() -> None:
    for engine in list(_engines):
        _inherited.append(engine.pool)
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_pools)
