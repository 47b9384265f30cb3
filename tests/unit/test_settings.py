"""URLs in the forms people have, and the names of schemas and tables."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL, make_url

from rhesis_tasks.errors import ConfigurationError, MissingExtraError
from rhesis_tasks.settings import (
    broker_url,
    database_url,
    is_postgresql,
    quote_identifier,
    redacted,
    result_backend_url,
    schema_name,
)


def connect_arguments(url: URL) -> dict[str, Any]:
    """What psycopg is called with."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return dict(arguments)


# --- database_url ----------------------------------------------------------------------------------------------

FULL = {"host": "db", "port": 5433, "user": "app", "password": "secret", "dbname": "shop"}


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("postgres://app:secret@db:5433/shop", FULL),
        ("postgresql://app:secret@db:5433/shop", FULL),
        ("postgresql+psycopg://app:secret@db:5433/shop", FULL),
        ("postgresql+asyncpg://app:secret@db:5433/shop", FULL),
        ("postgresql+psycopg2://app:secret@db:5433/shop", FULL),
        ("psycopg://app:secret@db:5433/shop", FULL),
        ("  postgresql://app:secret@db:5433/shop\n", FULL),
        ("postgresql://db/shop", {"host": "db", "dbname": "shop"}),
        ("postgresql://app@db/shop", {"host": "db", "user": "app", "dbname": "shop"}),
        ("postgresql://db", {"host": "db"}),
        ("postgresql:///shop", {"dbname": "shop"}),
        ("postgresql://", {}),
        ("postgresql:///shop?host=/run/postgresql", {"host": "/run/postgresql", "dbname": "shop"}),
        (
            "postgresql://app:secret@/shop?host=/run/pg&port=5433",
            {"host": "/run/pg", "port": "5433", "user": "app", "password": "secret", "dbname": "shop"},
        ),
        ("postgresql://[::1]:5433/shop", {"host": "::1", "port": 5433, "dbname": "shop"}),
        ("postgresql://db/shop?sslmode=require", {"host": "db", "dbname": "shop", "sslmode": "require"}),
        ("postgresql://h1:1,h2:2/shop", {"host": "h1,h2", "port": "1,2", "dbname": "shop"}),
        ("postgresql://h1,h2:2,[::1]/shop", {"host": "h1,h2,::1", "port": "5432,2,5432", "dbname": "shop"}),
        (
            "postgresql://app:secret@h1,h2/shop?target_session_attrs=primary",
            {
                "host": "h1,h2",
                "port": "5432,5432",
                "user": "app",
                "password": "secret",
                "dbname": "shop",
                "target_session_attrs": "primary",
            },
        ),
    ],
)
def test_a_database_url_in_any_usual_form_reaches_psycopg_as_meant(url: str, arguments: dict[str, Any]) -> None:
    parsed = database_url(url)

    assert parsed.drivername == "postgresql+psycopg"
    assert connect_arguments(parsed) == arguments


def test_an_url_object_is_taken_as_it_is_but_for_the_driver() -> None:
    url = URL.create("postgresql+psycopg2", "app", "p@ss", "db", 5433, "shop", {"sslmode": "require"})

    assert database_url(url) == url.set(drivername="postgresql+psycopg")


@pytest.mark.parametrize(
    ("written", "password"),
    [
        ("secret", "secret"),
        ("p@ss", "p@ss"),
        ("p%40ss", "p@ss"),
        ("a/b?c#d", "a/b?c#d"),
        ("a%2Fb%3Fc%23d", "a/b?c#d"),
        ("a:b", "a:b"),
        ("a b", "a b"),
        ("a+b", "a+b"),
        ("100%", "100%"),
        ("100%25", "100%"),
        ("pässwörd", "pässwörd"),
        ("", ""),
    ],
)
def test_a_password_may_hold_anything_percent_encoded_or_not(written: str, password: str) -> None:
    parsed = database_url(f"postgresql://app:{written}@db:5433/shop")

    assert (parsed.username, parsed.password or "", parsed.host, parsed.database) == ("app", password, "db", "shop")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))
def test_a_percent_encoded_password_is_always_read_right(password: str) -> None:
    url = URL.create("postgresql", "app", password, "db", 5433, "shop").render_as_string(hide_password=False)

    assert database_url(url).password == password


@pytest.mark.parametrize(
    "url",
    [
        "",
        "shop",
        "app:s3cret@db/shop",
        "host=db password=s3cret",
        "mysql://app:s3cret@db/shop",
        "sqlite:///shop",
        "redis://:s3cret@db/0",
        "postgresqlx://app:s3cret@db/shop",
        "post-gres://app:s3cret@db/shop",
        "://app:s3cret@db/shop",
        "postgresql://app:s3cret@db:port/shop",
        "postgresql://app:s3cret@h1:port,h2/shop",
        "postgresql://app:s3cret@h1,h2:1:2/shop",
        # the host was forgotten
        "postgresql://app:s3cret/shop",
        "postgresql://app:s3cret",
    ],
)
def test_what_is_no_postgresql_url_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        database_url(url)

    assert "s3cret" not in str(caught.value)


def test_an_url_object_of_another_database_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"not mysql://app:\*\*\*@db/shop"):
        database_url(make_url("mysql://app:s3cret@db/shop"))


# --- broker and result backend ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgres://app:p%40ss@db:5433/shop",
        "postgresql://app:p@ss@db:5433/shop",
        "postgresql+psycopg://app:p@ss@db:5433/shop",
        "postgresql+psycopg2://app:p@ss@db:5433/shop",
        "postgresql+asyncpg://app:p@ss@db:5433/shop",
        " postgresql://app:p@ss@db:5433/shop ",
    ],
)
def test_a_postgresql_url_in_any_usual_form_is_broker_and_result_backend(url: str) -> None:
    assert broker_url(url) == "postgresql://app:p%40ss@db:5433/shop"
    assert result_backend_url(url) == "postgresql://app:p%40ss@db:5433/shop"


def test_several_hosts_reach_broker_and_result_backend_as_options() -> None:
    url = "postgresql://app:secret@h1:1,h2:2/shop"

    for rendered in (broker_url(url).removeprefix("sqla+"), result_backend_url(url)):
        assert connect_arguments(database_url(rendered)) == connect_arguments(database_url(url))


@pytest.mark.parametrize("form", [broker_url, result_backend_url])
@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@h:6379/0",
        "amqp://guest:guest@h//",
        "pyamqp://h1;pyamqp://h2",
        "memory://",
        "cache+memory://",
        "rpc://",
        "db+postgresql://app:secret@db/shop",
        "sqla+postgresql://app:secret@db/shop",
        "sqs://key:secret@",
    ],
)
def test_an_url_of_something_else_is_left_as_it_is(form: Any, url: str) -> None:
    assert not is_postgresql(url)
    assert form(url) == url


@pytest.mark.parametrize("form", [broker_url, result_backend_url])
def test_without_psycopg_a_postgresql_url_is_an_error_that_names_the_extra(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed

    with pytest.raises(MissingExtraError, match=r"pip install 'rhesis-tasks\[postgres\]'"):
        form("postgresql://db/shop")

    assert form("memory://") == "memory://"


# --- redacted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://app:s3cret@db:5433/shop", "postgresql://app:***@db:5433/shop"),
        ("postgres://app:s3cret@db/shop?sslmode=require", "postgres://app:***@db/shop?sslmode=require"),
        ("postgresql://app:s3cret@x@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:s3cret/?#@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app@db/shop", "postgresql://app@db/shop"),
        ("redis://:s3cret@h:6379/0", "redis://:***@h:6379/0"),
        ("postgresql://app:s3cret@db/shop", "postgresql://app:***@db/shop"),
    ],
)
def test_a_redacted_url_shows_all_but_the_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        make_url("postgresql://app:s3cret@db/shop"),
        "postgresql://app:s3cret@h1,h2/shop",
        "postgresql:///shop?user=app&password=s3cret",
        "postgresql:///shop?password=s3cret&host=/run/postgresql",
        make_url("postgresql:///shop?password=s3cret"),
    ],
)
def test_a_redacted_url_never_shows_the_password_wherever_it_stands(url: Any) -> None:
    assert "s3cret" not in redacted(url)


# --- names -----------------------------------------------------------------------------------------------------


def test_the_schema_is_the_argument_else_the_environments_else_the_librarys() -> None:
    environ = {"RHESIS_TASKS_SCHEMA": "from_environment"}

    assert schema_name("given", environ) == "given"
    assert schema_name(None, environ) == "from_environment"
    assert schema_name(None, {"RHESIS_TASKS_SCHEMA": ""}) == "rhesis_tasks"
    assert schema_name(None, {}) == "rhesis_tasks"


def test_the_environment_is_read_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHESIS_TASKS_SCHEMA", "set_later")

    assert schema_name() == "set_later"


@pytest.mark.parametrize("name", ["a", "_a", "a1", "rhesis_tasks", "x" * 63])
def test_a_lower_case_name_is_a_schema(name: str) -> None:
    assert schema_name(name, {}) == name


@pytest.mark.parametrize("name", ["A", "1a", "a-b", "a.b", "a b", 'a"', "é", "a\n", "x" * 64, "a;drop"])
def test_a_name_that_would_need_quoting_is_no_schema(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a lower-case SQL name"):
        schema_name(name, {})
    with pytest.raises(ConfigurationError, match="is not a lower-case SQL name"):
        schema_name(None, {"RHESIS_TASKS_SCHEMA": name})


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("order", '"order"'),
        ("Order Items", '"Order Items"'),
        ('say "hi"', '"say ""hi"""'),
        ('"', '""""'),
        ("a.b", '"a.b"'),
        ("a'; DROP TABLE x; --", '"a\'; DROP TABLE x; --"'),
        ("x" * 63, f'"{"x" * 63}"'),
        ("é" * 31, f'"{"é" * 31}"'),
    ],
)
def test_a_name_is_quoted_as_sql_wants_it(name: str, quoted: str) -> None:
    assert quote_identifier(name) == quoted


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64, "é" * 32, None, 7, b"a", ["a"], "a\ud800"])
def test_what_cannot_be_an_sql_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="is not an SQL name of 1 to 63 bytes"):
        quote_identifier(name)
