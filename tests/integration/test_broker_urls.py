"""Broker URLs in the forms people have: each of them is connected with, and a message goes through it."""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
import pytest
from broker_rig import PostgresServer, running_server
from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid
from sqlalchemy import text

from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import free_port, python
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import StartWorker, TenantDatabase, new_tenant_database

if TYPE_CHECKING:
    from conftest import MakeApp

TIMEOUT = 20
PASSWORD = "p@ss:w/rd;?#%&+ é"


@pytest.fixture(scope="module")
def tenant_database(postgres_url: str) -> Iterator[TenantDatabase]:
    """One database on the embedded server, behind its unix socket, for all these tests."""
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server on a loopback port that asks everybody but its superuser for a password."""
    with running_server() as server:
        require_passwords(server)
        yield server


def require_passwords(server: PostgresServer) -> None:
    """Let a server that trusted everybody trust its superuser only."""
    with psycopg.connect(server.url, autocommit=True) as superuser:
        (rules,) = superuser.execute("SHOW hba_file").fetchone() or ("",)
        Path(rules).write_text("host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        superuser.execute("SELECT pg_reload_conf()")


@pytest.fixture(scope="module")
def tcp(server: PostgresServer) -> Iterator[TenantDatabase]:
    """A database on that server."""
    with new_tenant_database(server.url) as database:
        yield database


@pytest.fixture
def parts(tcp: TenantDatabase) -> dict[str, Any]:
    """What the application's URL is put together from."""
    url = database_url(tcp.url)
    return {"user": url.username, "password": url.password, "port": url.port, "name": url.database, "dead": free_port()}


def goes_through(connection: Connection, database: TenantDatabase, schema: str = "rhesis_tasks") -> bool:
    """Whether a message that is published through a connection is in that database, and comes out again."""
    queue = f"test-{uuid()}"
    with connection:
        connection.Producer().publish({"hello": queue}, routing_key=queue)
        with database.owner.connect() as owner:
            stored = owner.scalar(text(f"SELECT count(*) FROM {schema}.message WHERE queue = '{queue}'"))
        message = connection.SimpleQueue(queue, no_ack=True).get_nowait()
        return stored == 1 and message.payload == {"hello": queue}


def test_a_wrong_password_is_noticed_so_that_these_tests_mean_something(
    tcp: TenantDatabase, parts: dict[str, Any]
) -> None:
    wrong = tcp.url.replace(parts["password"], "wrong")

    with Connection(wrong) as connection, pytest.raises(OperationalError, match="password authentication failed"):
        connection.ensure_connection(max_retries=0, timeout=0.1)


# --- schemes and drivers -----------------------------------------------------------------------------------------

SCHEMES = ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kombu_connects_with_every_scheme_once_rhesis_tasks_is_imported(
    tcp: TenantDatabase, parts: dict[str, Any], scheme: str
) -> None:
    url = "{scheme}://{user}:{password}@127.0.0.1:{port}/{name}".format(scheme=scheme, **parts)

    assert goes_through(Connection(url), tcp)


@pytest.mark.parametrize("given_as", ["database_url", "broker_url", "DATABASE_URL", "BROKER_URL"])
def test_a_configured_application_connects_with_every_scheme(
    tcp: TenantDatabase, parts: dict[str, Any], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, given_as: str
) -> None:
    for scheme in SCHEMES:
        url = "{scheme}://{user}:{password}@127.0.0.1:{port}/{name}".format(scheme=scheme, **parts)
        if given_as.isupper():
            monkeypatch.setenv(given_as, url)

        app = make_app(
            url if given_as == "database_url" else None, broker_url=url if given_as == "broker_url" else None
        )

        assert goes_through(app.connection_for_write(), tcp), scheme


def test_a_plain_application_uses_its_broker_url_once_rhesis_tasks_is_imported(tcp: TenantDatabase) -> None:
    app = Celery(set_as_current=False, broker=tcp.url)

    assert goes_through(app.connection_for_write(), tcp)


@pytest.mark.parametrize("configured", [True, False])
def test_the_broker_url_of_celerys_environment_is_used(
    tcp: TenantDatabase, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    app = make_app(broker_url=None) if configured else Celery(set_as_current=False)
    monkeypatch.setenv("CELERY_BROKER_URL", tcp.url)

    assert goes_through(app.connection_for_write(), tcp)


def test_an_explicit_broker_url_wins_over_the_environment_and_the_database(
    tcp: TenantDatabase, tenant_database: TenantDatabase, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_URL", tenant_database.url)

    app = make_app(tenant_database.url, broker_url=tcp.url)

    assert goes_through(app.connection_for_write(), tcp)


def test_the_applications_own_broker_url_wins_over_what_is_configured_for_all(
    tcp: TenantDatabase, tenant_database: TenantDatabase, make_app: MakeApp
) -> None:
    app = make_app(tenant_database.url, broker_url=None)

    app.conf.broker_url = tcp.url

    assert goes_through(app.connection_for_write(), tcp)


def test_a_url_of_its_own_for_writing_is_used_for_writing(tcp: TenantDatabase, tenant_database: TenantDatabase) -> None:
    app = Celery(set_as_current=False, broker=tenant_database.url, broker_write_url=tcp.url)

    assert goes_through(app.connection_for_write(), tcp)
    assert goes_through(app.connection_for_read(), tenant_database)


# --- hosts and sockets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "postgresql://{user}:{password}@127.0.0.1:{dead},127.0.0.1:{port}/{name}",
        "postgresql://{user}:{password}@127.0.0.1:{port},127.0.0.1:{dead}/{name}",
        "postgres://{user}:{password}@/{name}?host=127.0.0.1,127.0.0.1&port={dead},{port}",
        "postgresql+psycopg://{user}:{password}@/{name}?host=127.0.0.1:{dead}&host=127.0.0.1:{port}",
    ],
)
@pytest.mark.parametrize("configured", [True, False], ids=["configured", "bare"])
def test_of_several_hosts_the_one_that_answers_is_used(
    tcp: TenantDatabase, parts: dict[str, Any], make_app: MakeApp, form: str, configured: bool
) -> None:
    url = form.format(**parts)

    app = make_app(broker_url=url) if configured else Celery(set_as_current=False, broker=url)

    assert goes_through(app.connection_for_write(), tcp)


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "bare"])
def test_a_unix_socket_is_used(tenant_database: TenantDatabase, make_app: MakeApp, configured: bool) -> None:
    assert "@/" in tenant_database.url and "?host=" in tenant_database.url

    app = make_app(broker_url=None) if configured else Celery(set_as_current=False, broker=tenant_database.url)

    assert goes_through(app.connection_for_write(), tenant_database)


def test_what_else_the_url_says_is_for_the_server(tcp: TenantDatabase) -> None:
    with Connection(f"{tcp.url}?sslmode=disable&application_name=mine") as connection:
        connection.connect()

        with tcp.owner.connect() as owner:
            names = owner.scalars(text("SELECT application_name FROM pg_stat_activity")).all()

    assert "mine" in names


def failover(parts: dict[str, Any]) -> list[str]:
    """Two URLs, the first of a server that is not there."""
    form = "postgresql://{user}:{password}@127.0.0.1:{at}/{name}"
    return [form.format(at=port, **parts) for port in (parts["dead"], parts["port"])]


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "semicolons"])
def test_of_several_broker_urls_the_one_that_answers_is_used(
    tcp: TenantDatabase, parts: dict[str, Any], as_list: bool
) -> None:
    urls = failover(parts)
    app = Celery(set_as_current=False, broker=urls if as_list else ";".join(urls))
    connection = app.connection_for_write()

    connection.ensure_connection(max_retries=3, interval_start=0, timeout=TIMEOUT)

    assert goes_through(connection, tcp)
    assert parts["password"] not in repr(connection)


@pytest.mark.parametrize("given_as", ["broker_url", "BROKER_URL"])
def test_a_configured_application_takes_several_broker_urls_as_celery_does(
    tcp: TenantDatabase, parts: dict[str, Any], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, given_as: str
) -> None:
    urls = ";".join(failover(parts))
    if given_as == "BROKER_URL":
        monkeypatch.setenv("BROKER_URL", urls)
    app = make_app(broker_url=urls if given_as == "broker_url" else None)
    connection = app.connection_for_write()

    connection.ensure_connection(max_retries=3, interval_start=0, timeout=TIMEOUT)

    assert goes_through(connection, tcp)


def test_a_task_is_published_over_the_broker_url_that_answers(tcp: TenantDatabase, parts: dict[str, Any]) -> None:
    app = Celery(set_as_current=False, broker=failover(parts))

    with app.connection_for_write() as connection:
        app.send_task("anything", task_id="sent over the second", connection=connection)

    with tcp.owner.connect() as owner:
        assert owner.scalar(text("SELECT count(*) FROM rhesis_tasks.message WHERE task_id = 'sent over the second'"))


# --- passwords ---------------------------------------------------------------------------------------------------


@pytest.fixture
def with_odd_password(tcp: TenantDatabase) -> Iterator[TenantDatabase]:
    """The application has a password that no URL can hold as it is."""
    plain = database_url(tcp.url).password
    with tcp.admin.connect() as superuser:
        set_password(superuser, tcp.role, PASSWORD)
        yield tcp
        set_password(superuser, tcp.role, plain)


def set_password(superuser: Any, role: str, password: str | None) -> None:
    superuser.connection.execute(
        psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}").format(psycopg.sql.Identifier(role), psycopg.sql.Literal(password))
    )


@pytest.mark.parametrize(
    "written", [quote(PASSWORD, safe=""), quote(PASSWORD), PASSWORD], ids=["encoded", "half encoded", "as it is"]
)
@pytest.mark.parametrize("given_as", ["database_url", "broker_url"])
def test_a_password_may_hold_any_characters(
    with_odd_password: TenantDatabase, parts: dict[str, Any], make_app: MakeApp, written: str, given_as: str
) -> None:
    url = "postgresql://{user}:{written}@127.0.0.1:{port}/{name}".format(written=written, **parts)

    app = make_app(url if given_as == "database_url" else None, broker_url=None if given_as == "database_url" else url)

    assert goes_through(app.connection_for_write(), with_odd_password)
    assert goes_through(app.connection_for_read().clone(), with_odd_password)
    assert "w/rd" not in repr(app.connection_for_read()) and "w%2Frd" not in repr(app.connection_for_read())


def test_a_bare_url_may_hold_any_password_percent_encoded(
    with_odd_password: TenantDatabase, parts: dict[str, Any]
) -> None:
    url = "postgresql://{user}:{written}@127.0.0.1:{port}/{name}".format(written=quote(PASSWORD, safe=""), **parts)

    assert goes_through(Connection(url), with_odd_password)


def test_one_of_several_broker_urls_may_hold_any_password_percent_encoded(
    with_odd_password: TenantDatabase, parts: dict[str, Any]
) -> None:
    parts["password"] = quote(PASSWORD, safe="")
    connection = Connection(failover(parts))

    connection.ensure_connection(max_retries=3, interval_start=0, timeout=TIMEOUT)

    assert goes_through(connection, with_odd_password)


def test_a_password_may_come_from_libpqs_own_places(
    tcp: TenantDatabase, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", parts["password"])

    assert goes_through(Connection("postgresql://{user}@127.0.0.1:{port}/{name}".format(**parts)), tcp)


# --- the schema --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_schemas(tenant_database: TenantDatabase) -> TenantDatabase:
    """A database with the library's tables in two more schemas, ``jobs`` and ``others``."""
    for schema in ("jobs", "others"):
        create_schema(tenant_database.owner, schema=schema, roles=[tenant_database.role])
    return tenant_database


def test_the_schema_may_be_named_in_the_url(two_schemas: TenantDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHESIS_TASKS_SCHEMA", "others")

    assert goes_through(Connection(f"{two_schemas.url}&schema=jobs"), two_schemas, "jobs")


def test_the_schema_may_be_a_transport_option_which_wins(two_schemas: TenantDatabase) -> None:
    connection = Connection(f"{two_schemas.url}&schema=others", transport_options={"schema": "jobs"})

    assert goes_through(connection, two_schemas, "jobs")


def test_the_schema_may_come_from_the_environment(
    two_schemas: TenantDatabase, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHESIS_TASKS_SCHEMA", "jobs")

    assert goes_through(Connection(two_schemas.url), two_schemas, "jobs")
    assert goes_through(make_app(broker_url=None).connection_for_write(), two_schemas, "jobs")


def test_the_schema_may_be_given_to_configure(
    two_schemas: TenantDatabase, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHESIS_TASKS_SCHEMA", "others")

    by_database, by_broker = (
        make_app(broker_url=None, schema="jobs"),
        make_app(broker_url=two_schemas.url, schema="jobs"),
    )

    assert goes_through(by_database.connection_for_write(), two_schemas, "jobs")
    assert goes_through(by_broker.connection_for_write(), two_schemas, "jobs")


def test_the_schema_in_the_broker_url_wins_over_the_one_given_to_configure(
    two_schemas: TenantDatabase, make_app: MakeApp
) -> None:
    app = make_app(broker_url=f"{two_schemas.url}&schema=jobs", schema="others")

    assert goes_through(app.connection_for_write(), two_schemas, "jobs")


@pytest.mark.parametrize("given_as", ["CELERY_BROKER_URL", "broker_url of the application"])
def test_the_schema_given_to_configure_holds_for_a_broker_url_from_elsewhere(
    two_schemas: TenantDatabase, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, given_as: str
) -> None:
    """Or a worker that is started with ``-b`` would consume from other tables than the application publishes to."""
    app = make_app(broker_url=None, schema="jobs")
    if given_as == "CELERY_BROKER_URL":
        monkeypatch.setenv("CELERY_BROKER_URL", two_schemas.url)
    else:
        app.conf.broker_url = two_schemas.url

    assert goes_through(app.connection_for_write(), two_schemas, "jobs")


@pytest.mark.parametrize("query", ["schema=Jobs", "schema=no-name", "schema=jobs&schema=others"])
def test_a_schema_that_cannot_be_one_is_refused(tenant_database: TenantDatabase, query: str) -> None:
    with pytest.raises(ConfigurationError, match=r"schema .*not a lower-case SQL name|more than one schema"):
        Connection(f"{tenant_database.url}&{query}").connect()


# --- the command line --------------------------------------------------------------------------------------------


def test_celerys_programs_take_the_broker_url_from_the_command_line_and_from_the_environment(
    tcp: TenantDatabase, tmp_path: Path, start_worker: StartWorker
) -> None:
    (tmp_path / "plain.py").write_text(
        textwrap.dedent(
            """
            import rhesis_tasks
            from celery import Celery

            app = Celery("plain")
            """
        )
    )
    worker = start_worker("plain", pool="solo", env={"CELERY_BROKER_URL": tcp.url}, arguments=["-n", "plain@here"])

    ping = subprocess.run(
        python(
            *("-m", "celery", "-A", "plain", "-b", tcp.url),
            *("inspect", "ping", "--destination", "plain@here", "--timeout", str(TIMEOUT), "--json"),
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert ping.returncode == 0, ping.stdout + ping.stderr
    assert json.loads(ping.stdout.splitlines()[0]) == {"plain@here": {"ok": "pong"}}
    password = database_url(tcp.url).password
    assert password and password not in worker.output + ping.stdout + ping.stderr
    assert tcp.role in worker.output, "the worker says where it is connected"
