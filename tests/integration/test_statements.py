"""The statements of a broker's connection: prepared when they are run again, adapted as psycopg does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from rhesis_tasks.errors import AnswerTimeoutError, DatabaseUnavailableError
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.statements import Statements
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase

TEXT = "SELECT length(%s::text)"
PREPARED = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT length($1::text)'"


@pytest.fixture
def connection(database_of_the_module: TenantDatabase) -> Iterator[Connection]:
    connection = Connection(database_url(database_of_the_module.url), name="test")
    yield connection
    connection.close()


def test_a_statement_is_prepared_when_it_is_run_for_the_second_time(connection: Connection) -> None:
    seen = []
    for _ in range(3):
        assert connection.query(TEXT, ("four",)) == [(4,)]
        seen += connection.query(PREPARED)

    assert seen == [(0,), (1,), (1,)]


def test_a_statement_is_prepared_again_for_values_of_other_types(connection: Connection) -> None:
    for value in (1, 2, 2**40, 2**41, None, None):
        assert connection.query("SELECT %s::bigint", (value,)) == [(value,)]


def test_behind_a_pooler_nothing_is_prepared(connection: Connection) -> None:
    statements = Statements(connection.open(), prepares=False)

    for _ in range(3):
        assert statements.run(TEXT, ("four",)) == [(4,)]

    assert statements.run(PREPARED) == [(0,)]


def test_values_come_and_go_as_psycopg_has_them(connection: Connection) -> None:
    values = ("a", b"\0\xff", None, 1.5, True, ["x", None, 'y"'], [1, 2**40], [])

    for _ in range(3):
        [row] = connection.query(
            "SELECT %s::text, %b::bytea, %s::text, %s::float8, %s::boolean, %s::text[], %s::bigint[], %s::text[]",
            values,
        )
        assert row == values


def test_a_statement_with_no_rows_returns_none(connection: Connection) -> None:
    assert connection.query("LISTEN nobody") == []
    assert connection.query("SELECT 1 WHERE false") == []


@pytest.mark.parametrize("parameters", [(), ("a", "b")])
def test_too_few_or_too_many_parameters_are_an_error(connection: Connection, parameters: tuple[str, ...]) -> None:
    with pytest.raises(psycopg.ProgrammingError, match=f"places for 1 values, but {len(parameters)} were given"):
        connection.query(TEXT, parameters)

    assert connection.query(TEXT, ("four",)) == [(4,)]


def test_after_an_error_the_connection_goes_on(connection: Connection) -> None:
    for value in ("1", "no number", "no number", "2"):
        if value.isdigit():
            assert connection.query("SELECT %s::text::integer", (value,)) == [(int(value),)]
        else:
            with pytest.raises(psycopg.errors.InvalidTextRepresentation, match="no number"):
                connection.query("SELECT %s::text::integer", (value,))
    with pytest.raises(psycopg.errors.SyntaxError):
        connection.query("no statement")

    assert connection.generation == 1


def test_a_new_connection_prepares_its_own(connection: Connection) -> None:
    for _ in range(2):
        connection.query(TEXT, ("four",))
        connection.query(TEXT, ("four",))
        assert connection.query(PREPARED) == [(1,)]
        connection.close()

    assert connection.generation == 2


def test_an_answer_that_does_not_come_in_time_is_an_error_and_the_connection_is_closed(connection: Connection) -> None:
    for _ in range(2):
        assert connection.query("SELECT pg_sleep(%s), 1", (0.2,), timeout=5) == [("", 1)]

    with pytest.raises(AnswerTimeoutError, match=r"no answer within 0\.3 seconds"):
        connection.query("SELECT pg_sleep(%s), 1", (5,), timeout=0.3)

    assert connection.query("SELECT 1", timeout=5) == [(1,)]
    assert connection.generation == 2


def test_what_is_interrupted_while_it_waits_for_an_answer_leaves_a_connection_that_can_be_asked(
    connection: Connection,
) -> None:
    connection.open()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            connection.query("SELECT pg_sleep(10)", timeout=10)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert connection.query("SELECT 1", timeout=5) == [(1,)]


def test_who_waits_for_an_answer_is_told_that_another_thread_has_cut_the_connection(connection: Connection) -> None:
    connection.open()
    threading.Timer(0.3, connection.cut).start()

    with pytest.raises(DatabaseUnavailableError, match="closed") as told:
        connection.query("SELECT pg_sleep(10)", timeout=10)

    assert not isinstance(told.value, AnswerTimeoutError)


def test_threads_take_turns(connection: Connection) -> None:
    together = threading.Barrier(8)

    def ask(number: int) -> bool:
        together.wait(10)
        return all(
            connection.query("SELECT %s::integer, repeat(%s, 1000)", (number, str(number)))
            == [(number, str(number) * 1000)]
            for _ in range(200)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
