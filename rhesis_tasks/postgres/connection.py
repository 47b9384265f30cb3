"""One psycopg connection: opened when needed, its errors made ours, never shared with a forked child.

Knows nothing of queues.  All that the broker asks of the database goes through :meth:`Connection.query`.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import URL
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from ..errors import AnswerTimeoutError, DatabaseFullError, DatabaseUnavailableError, MissingPrivilegeError, SchemaError
from ..settings import redacted, require_psycopg

if TYPE_CHECKING:
    import psycopg

    from .statements import Statements

__all__ = ["Connection", "is_asking", "no_answer", "read_only"]

# Notice a peer that is gone without a word in seconds, not in hours.  (Ignored on unix sockets.)
_KEEPALIVES: Final = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}


# What helps when the server says that it has no room, by SQLSTATE.
_NEEDS: Final = {
    "53000": "Give the server more of what it lacks",
    "53100": "Make room on the server's disk; nothing was stored",
    "53200": "Give the server more memory, or lower what it may use",
    "53300": "Raise max_connections, or let fewer processes connect",
    "53400": "Raise the server's limit",
}


# Of a refused connection libpq has no SQLSTATE, only the text, in the server's language.
_TOO_MANY: Final = ("too many clients", "too many connections", "remaining connection slots")


class Connection:
    """A connection in autocommit mode, opened on the first query and again after it was lost.

    Safe to use from several threads.  In a forked child it is closed, without a word to the server.

    Args:
        url: a URL as :func:`~rhesis_tasks.settings.database_url` returns it.
        name: what ``pg_stat_activity`` shows as ``application_name``.
        connect_timeout: seconds.
    """

    def __init__(self, url: URL, *, name: str, connect_timeout: float | None = None) -> None:
        require_psycopg()
        self.url = url
        self.generation = 0  #: how often it was opened
        self.is_pooled = False  #: whether a pooler such as PgBouncer stands between; known once it is open
        self._parameters = _parameters(url, name, connect_timeout)
        self._statements: Statements | None = None  # of the psycopg connection
        self._opening = threading.RLock()
        self._asking: set[int] = set()  # threads in the middle of a statement
        self._on_notification: Callable[[str], None] | None = None
        _all.add(self)

    def __repr__(self) -> str:
        return f"Connection({redacted(self.url)!r})"

    def open(self, timeout: float | None = None) -> psycopg.Connection[Any]:
        """The psycopg connection, opened if it is not.

        Args:
            timeout: seconds for which a pooler, which connects at once, may take until it has a server; None: for ever.

        Raises:
            DatabaseUnavailableError: the server cannot be reached, refuses the login, or is read-only.
        """
        return self._opened(timeout).raw

    def _opened(self, timeout: float | None) -> Statements:
        found = self._statements
        if found is not None and not found.raw.closed:
            return found
        with self._opening:
            if self._statements is None or self._statements.raw.closed:
                self._statements = self._connected(timeout)
                self.generation += 1
            return self._statements

    def _connected(self, timeout: float | None) -> Statements:
        import psycopg

        from .statements import Statements

        try:
            while True:
                forks = _forks
                raw = psycopg.connect(**self._parameters, autocommit=True)
                _sockets.add(raw)
                if forks == _forks:
                    break
                raw.close()  # a child that was forked meanwhile has the socket, too, and does not know
            [(pid, is_read_only)] = Statements(raw, prepares=False).run(
                "SELECT pg_backend_pid(), current_setting('transaction_read_only') = 'on'", timeout=timeout
            )
        except psycopg.Error as error:
            message = f"cannot connect to {redacted(self.url)}: {_first_lines(error)}"
            if any(word in message for word in _TOO_MANY):
                raise DatabaseFullError(f"{message}.  {_NEEDS['53300']}", url=redacted(self.url)) from None
            raise self._unavailable(message) from None
        if is_read_only:
            raw.close()
            raise self._unavailable(read_only(self.url))
        self.is_pooled = pid != raw.info.backend_pid
        if (call := self._on_notification) is not None:
            raw.add_notify_handler(lambda notification: call(notification.payload))  # received during a query
        return Statements(raw, prepares=not self.is_pooled)

    def on_notification(self, call: Callable[[str], None]) -> None:
        """Call a function with the payload of each notification; to be said before it is opened."""
        self._on_notification = call

    def query(self, sql: str, parameters: Sequence[Any] = (), *, timeout: float | None = None) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own, and return its rows.

        Args:
            sql: the statement, with ``%s`` for its parameters.
            parameters: their values.
            timeout: seconds for which the answer is waited for; None: until it comes.

        Raises:
            AnswerTimeoutError: it did not come, and the connection was closed.
            DatabaseUnavailableError: the connection cannot be made or was lost; whether the statement was
                carried out is not known then.
            DatabaseFullError: the server has no room for it; nothing was carried out.
            MissingPrivilegeError: the login may not do this.
            SchemaError: the functions of the library are not there, or are another version's.
        """
        thread = threading.get_ident()
        if thread in self._asking:
            # Celery shuts down inside of a signal handler, which would wait for itself.
            raise self._unavailable(f"{redacted(self.url)}: interrupted in the middle of a statement")
        self._asking.add(thread)
        try:
            return self._opened(timeout).run(sql, parameters, timeout=timeout)
        except Exception as error:
            self._raise_ours(error)
            raise
        finally:
            self._asking.discard(thread)

    def _raise_ours(self, error: Exception) -> None:
        """Raise what an error of psycopg's is for whoever asked; the connection is closed if it is of no use now."""
        import psycopg

        from .statements import NoAnswer

        if isinstance(error, NoAnswer):
            raise no_answer(self.url, error) from None
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            if (need := _NEEDS.get(error.sqlstate or "")) is not None:
                raise DatabaseFullError(
                    f"{redacted(self.url)} has no room: {_first_lines(error)}.  {need}", url=redacted(self.url)
                ) from error
            if error.sqlstate is None or error.sqlstate[:2] in ("08", "57"):
                self.close()
            raise self._unavailable(f"{redacted(self.url)}: {_first_lines(error)}") from error
        if not isinstance(error, psycopg.Error):
            return
        if error.sqlstate == "25006":  # it has become a standby
            self.close()
            raise self._unavailable(read_only(self.url)) from error
        if error.sqlstate == "42501":
            raise MissingPrivilegeError(
                f"the login {self.url.username!r} may not do this: {_first_lines(error)}.  Let the owner of the "
                "library's tables run `rhesis-tasks schema create` with --role for logins that run or control "
                "workers, --web-role for logins that only launch tasks"
            ) from error
        if error.sqlstate in ("3F000", "42883", "42P01"):
            raise SchemaError(
                f"the library's tables or functions are not there: {_first_lines(error)}.  Run "
                "`rhesis-tasks schema create`"
            ) from error

    def _unavailable(self, message: str) -> DatabaseUnavailableError:
        return DatabaseUnavailableError(message, url=redacted(self.url))

    def fileno(self) -> int:
        """The socket to wait on."""
        return self.open().fileno()

    def receive(self) -> None:
        """Take in what has arrived on the socket; notifications go to on_notification.

        Raises:
            DatabaseUnavailableError: the connection was lost.
        """
        import psycopg

        raw = self.open()
        try:
            raw.pgconn.consume_input()
        except psycopg.OperationalError as error:
            self.close()
            raise self._unavailable(f"{redacted(self.url)}: {_first_lines(error)}") from error
        while notification := raw.pgconn.notifies():
            if self._on_notification is not None:
                self._on_notification(notification.extra.decode())

    def cut(self) -> None:
        """Let whoever waits for an answer get an error; from any thread."""
        opened = self._statements
        if opened is not None:
            with suppress(Exception), socket.socket(fileno=os.dup(opened.raw.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; the next query opens it again."""
        opened, self._statements = self._statements, None
        if opened is not None:
            opened.raw.close()

    def _forget(self) -> None:
        """In a forked child: the connection is the parent's."""
        self._statements = None
        self._opening = threading.RLock()
        self._asking = set()


def is_asking(thread: int | None) -> bool:
    """Whether a thread waits for the answer to a statement, on any connection."""
    return any(thread in connection._asking for connection in list(_all))


@functools.cache
def _dialect() -> PGDialect_psycopg:
    return PGDialect_psycopg()  # type: ignore[no-untyped-call]


def _parameters(url: URL, name: str, connect_timeout: float | None) -> dict[str, Any]:
    """What libpq is told; what the URL says wins."""
    _, found = _dialect().create_connect_args(url)  # type: ignore[no-untyped-call]
    defaults: dict[str, Any] = {**_KEEPALIVES, "application_name": name}
    if connect_timeout:
        defaults["connect_timeout"] = max(2, round(connect_timeout))  # libpq takes 2 seconds at least
    if "," in str(found.get("host", "")):
        defaults["target_session_attrs"] = "read-write"
    return {**defaults, **found}


def _first_lines(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip()) or type(error).__name__


def no_answer(url: URL, error: BaseException) -> AnswerTimeoutError:
    """What to raise where a server does not answer."""
    return AnswerTimeoutError(
        f"{redacted(url)}: {error}, and the connection was closed.  Whether what it was asked for was done, such as a "
        "message taken or a record written, is not known: it still may be, once the server goes on",
        url=redacted(url),
    )


def read_only(url: URL) -> str:
    """What to say of a server, or a login, that may not write."""
    return (
        f"{redacted(url)} is read-only: a standby, a server that recovers, or default_transaction_read_only.  Connect "
        "to the primary; several hosts may be given: ?host=h1,h2&port=5432,5432"
    )


# --- forks -----------------------------------------------------------------------------------------------------

_all: weakref.WeakSet[Connection] = weakref.WeakSet()
_sockets: weakref.WeakSet[psycopg.Connection[Any]] = weakref.WeakSet()
_inherited: list[Any] = []  # kept, so that libpq does not say goodbye in the parent's name when it deletes them


def _leave_to_parent() -> None:
    """In a forked child, let go of the parent's connections.

    Its sockets are closed here, or an advisory lock would outlive the parent that is killed.  Something must keep
    their numbers taken, since libpq still knows them.
    """
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for raw in list(_sockets):
            if not raw.closed:
                os.dup2(nowhere, raw.fileno(), inheritable=False)
            _inherited.append(raw)
    finally:
        os.close(nowhere)
    for connection in list(_all):
        connection._forget()


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_parent=_count_fork, after_in_child=_leave_to_parent)
