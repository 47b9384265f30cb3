"""The statements of one psycopg connection: parsed and planned once by the server, sent and read with little ado.

psycopg's cursor does the same and more, such as a description of what it has read, which costs each message something.
How to adapt, to wait and what to raise stays psycopg's.

Needs psycopg when it is imported.
"""

from __future__ import annotations

import functools
import itertools
import re
import select
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.generators import execute
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.waiting import Ready, Wait

__all__ = ["NoAnswer", "Statements"]

T = TypeVar("T")

_EVENTS = {Wait.R: select.POLLIN, Wait.W: select.POLLOUT, Wait.RW: select.POLLIN | select.POLLOUT}
_TO_READ, _TO_WRITE = ~select.POLLOUT, ~select.POLLIN
_R, _W = int(Ready.R), int(Ready.W)
_SLICE = 100  # milliseconds between two looks whether another thread has closed the connection


class NoAnswer(psycopg.OperationalError):
    """There was no answer in time, and the connection was closed."""


def _wait_within(raw: psycopg.Connection[Any], steps: Generator[Any, Any, T], seconds: float) -> T:
    """As the connection's own ``wait()``, but only so long: psycopg has a bound for it only in its latest versions.

    Raises:
        NoAnswer: the answer did not come; the connection is closed.
    """
    end = time.monotonic() + seconds
    poll, socket = select.poll(), raw.pgconn.socket
    try:
        wanted = next(steps)
        while True:
            poll.register(socket, _EVENTS[wanted])
            while not (found := poll.poll(_SLICE)):
                if raw.closed:
                    raise psycopg.OperationalError("the connection was closed")
                if time.monotonic() >= end:
                    raw.close()
                    raise NoAnswer(f"no answer within {seconds:g} seconds")
            event = found[0][1]  # an error, too, is there to be read, or to be written
            wanted = steps.send((_R if event & _TO_READ else 0) | (_W if event & _TO_WRITE else 0))
    except StopIteration as done:
        answer: T = done.value
        return answer
    except psycopg.Error:
        raise
    except BaseException:
        raw.close()  # interrupted, in the middle of an answer
        raise


class Statements:
    """Runs statements on a connection that is in autocommit mode.  Safe to use from several threads.

    Args:
        raw: the connection.
        prepares: whether the server keeps what was prepared: not so if the next transaction may be on another server
            connection.
    """

    def __init__(self, raw: psycopg.Connection[Any], *, prepares: bool) -> None:
        self.raw = raw  #: the connection
        self._prepares = prepares
        self._adapter = Transformer(raw)
        self._names: dict[tuple[bytes, tuple[int, ...]], bytes | None] = {}  # None: was run once, not prepared yet
        self._numbers = itertools.count(1)

    def run(
        self, sql: str, parameters: Sequence[Any] = (), *, as_dicts: bool = False, timeout: float | None = None
    ) -> list[Any]:
        """Run one statement with its parameters in the places of ``%s`` and, for bytes, ``%b``.

        Args:
            sql: the statement.
            parameters: those of its values.
            as_dicts: whether rows are dicts, by the columns' names, and not tuples.
            timeout: seconds for which the answer is waited for; None: until it comes.

        Returns:
            its rows.

        Raises:
            NoAnswer: it did not come; the connection is closed.
            psycopg.Error: as psycopg's cursor does.
        """
        query, formats = _in_servers_form(sql)
        if len(parameters) != len(formats):  # psycopg's C code relies on it
            raise psycopg.ProgrammingError(f"places for {len(formats)} values, but {len(parameters)} were given: {sql}")
        pgconn, adapter = self.raw.pgconn, self._adapter
        with self.raw.lock:
            values = adapter.dump_sequence(parameters, formats)
            types, formats_sent = adapter.types or (), adapter.formats
            if (name := self._name(query, types, timeout)) is None:
                pgconn.send_query_params(query, values, param_types=types, param_formats=formats_sent)
            else:
                pgconn.send_query_prepared(name, values, param_formats=formats_sent)
            result = self._answer(timeout)
            if result.status != ExecStatus.TUPLES_OK:
                return []
            adapter.set_pgresult(result)
            return adapter.load_rows(0, result.ntuples, _dicts(result, self.raw.info.encoding) if as_dicts else tuple)

    def _name(self, query: bytes, types: tuple[int, ...], timeout: float | None) -> bytes | None:
        """What the server calls the statement; None if it does not have it, since it is run for the first time."""
        key = (query, types)
        name = self._names.get(key)
        if name is None and self._prepares:
            if key in self._names:
                name = b"rhesis_tasks_%d" % next(self._numbers)
                self.raw.pgconn.send_prepare(name, query, param_types=types)
                self._answer(timeout)
            self._names[key] = name
        return name

    def _answer(self, timeout: float | None) -> PGresult:
        steps = execute(self.raw.pgconn)
        results: list[PGresult]
        if timeout is None or not hasattr(select, "poll"):  # eventlet takes that away
            results = self.raw.wait(steps)
        else:
            results = _wait_within(self.raw, steps, timeout)
        if not results:
            raise psycopg.InternalError("the server's answer has no result")
        for result in results:  # the rows come first, and behind them that the commit has failed
            if result.status == ExecStatus.FATAL_ERROR:
                raise error_from_result(result, encoding=self.raw.info.encoding)
        return results[0]


def _dicts(result: PGresult, encoding: str) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """What makes a dict of a row."""
    names = [(result.fname(column) or b"").decode(encoding) for column in range(result.nfields)]
    return lambda row: dict(zip(names, row, strict=True))


@functools.lru_cache(maxsize=256)
def _in_servers_form(sql: str) -> tuple[bytes, list[PyFormat]]:
    """A statement with ``$1``, ``$2`` ... for its parameters, and how these are sent."""
    kinds: list[PyFormat] = []

    def numbered(mark: re.Match[str]) -> str:
        kinds.append(PyFormat.BINARY if mark[0] == "%b" else PyFormat.AUTO)
        return f"${len(kinds)}"

    return re.sub("%[sb]", numbered, sql).encode(), kinds
