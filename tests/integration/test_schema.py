"""The library's own tables: made once by whoever may, and used by granted roles for what they need and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from celery.result import GroupResult
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.postgres.schema import VERSION, create_schema, ensure_schema, schema_sql
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase

if TYPE_CHECKING:
    from conftest import MakeApp

ACME = TenantContext("acme", "alice")

# Everything that makes up a schema, in a form that can be compared.
CONTENTS = text(
    "SELECT 'table', relname, relrowsecurity::text, relacl::text FROM pg_class "
    "WHERE relnamespace = to_regnamespace(:schema) "
    "UNION ALL SELECT 'policy', tablename || '.' || policyname, qual, with_check FROM pg_policies "
    "WHERE schemaname = :schema "
    "UNION ALL SELECT 'function', proname, prosecdef::text || proconfig::text, proacl::text FROM pg_proc "
    "WHERE pronamespace = to_regnamespace(:schema) "
    "ORDER BY 1, 2"
)


@pytest.fixture
def application(tenant_database: TenantDatabase) -> Iterator[Engine]:
    """An engine of the application's role."""
    engine = create_engine(database_url(tenant_database.url), poolclass=NullPool)
    yield engine
    engine.dispose()


def contents(database: TenantDatabase, schema: str) -> list[Any]:
    with database.owner.connect() as connection:
        return [tuple(row) for row in connection.execute(CONTENTS, {"schema": schema})]


def versions(database: TenantDatabase, schema: str) -> list[int]:
    with database.owner.connect() as connection:
        return list(connection.scalars(text(f"SELECT version FROM {schema}.schema_version")))


def may_create(database: TenantDatabase) -> None:
    name = quote_identifier(database_url(database.url).database)
    database.execute(f"GRANT CREATE ON DATABASE {name} TO {quote_identifier(database.role)}")


def at_once(number: int, work: Callable[[], None]) -> None:
    """Run it in threads that start at the same moment, and raise what any of them raised."""
    start = threading.Barrier(number, timeout=30)

    def one(_: int) -> None:
        start.wait()
        work()

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(one, range(number), timeout=60))


# --- creating ----------------------------------------------------------------------------------------------------


def test_creating_twice_changes_nothing(tenant_database: TenantDatabase) -> None:
    create_schema(tenant_database.owner, schema="jobs", roles=[tenant_database.role])
    once = contents(tenant_database, "jobs")

    create_schema(tenant_database.owner, schema="jobs", roles=[tenant_database.role])

    assert once
    assert contents(tenant_database, "jobs") == once
    assert versions(tenant_database, "jobs") == [VERSION]


def test_creating_again_keeps_the_records(tenant_database: TenantDatabase, make_app: MakeApp) -> None:
    app = make_app()
    with tenant_scope(ACME):
        app.backend.store_result("one", 42, "SUCCESS")

    create_schema(tenant_database.owner, roles=[tenant_database.role])

    with tenant_scope(ACME):
        assert app.backend.get_record("one").result == 42


def test_tables_of_version_5_get_what_is_new_in_them(tenant_database: TenantDatabase) -> None:
    create_schema(tenant_database.owner, schema="jobs")
    made = contents(tenant_database, "jobs")
    tenant_database.execute(
        "DROP INDEX jobs.dead_letter_queue, jobs.transient_message_task_id",
        "UPDATE jobs.schema_version SET version = 5",
    )

    create_schema(tenant_database.owner, schema="jobs")

    assert contents(tenant_database, "jobs") == made
    assert versions(tenant_database, "jobs") == [5, VERSION]


def test_creating_again_waits_for_nobody_who_uses_the_tables(tenant_database: TenantDatabase) -> None:
    tables = ("message", "transient_message", "queue", "binding", "exchange", "consumer", "subscription", "waiter")
    with tenant_database.owner.connect() as worker, tenant_database.owner.connect() as connection:
        for table in (*tables, "task_record", "group_record"):
            worker.exec_driver_sql(f"LOCK TABLE rhesis_tasks.{table} IN ROW EXCLUSIVE MODE")
        connection.exec_driver_sql("SET lock_timeout = '100ms'")

        create_schema(connection, roles=[tenant_database.role], web_roles=[tenant_database.role])


def test_four_may_create_at_the_same_time(tenant_database: TenantDatabase) -> None:
    at_once(4, lambda: create_schema(tenant_database.owner, schema="jobs", roles=[tenant_database.role]))

    create_schema(tenant_database.owner, schema="alone", roles=[tenant_database.role])
    alone = [tuple(str(part).replace("alone", "jobs") for part in row) for row in contents(tenant_database, "alone")]
    assert [tuple(map(str, row)) for row in contents(tenant_database, "jobs")] == alone
    assert versions(tenant_database, "jobs") == [VERSION]


def test_creating_on_a_connection_is_part_of_its_transaction(tenant_database: TenantDatabase) -> None:
    with tenant_database.owner.connect() as connection:
        create_schema(connection, schema="jobs")
        connection.rollback()

    assert contents(tenant_database, "jobs") == []


def test_the_sql_can_be_run_by_any_other_means(tenant_database: TenantDatabase, application: Engine) -> None:
    tenant_database.execute(schema_sql("jobs", [tenant_database.role]))

    ensure_schema(application, "jobs")

    assert versions(tenant_database, "jobs") == [VERSION]


# --- first use ---------------------------------------------------------------------------------------------------


def test_a_role_that_may_create_makes_the_tables_on_first_use(
    tenant_database: TenantDatabase, make_app: MakeApp
) -> None:
    may_create(tenant_database)
    app = make_app(schema="jobs")
    assert contents(tenant_database, "jobs") == [], "not while the application is configured"

    with tenant_scope(ACME):
        app.backend.store_result("one", 42, "SUCCESS")

        assert app.backend.get_record("one").result == 42


def test_four_first_uses_at_the_same_time_make_the_tables_once(
    tenant_database: TenantDatabase, application: Engine
) -> None:
    may_create(tenant_database)

    at_once(4, lambda: ensure_schema(application, "jobs"))

    with application.connect() as connection:
        assert connection.scalars(text("SELECT version FROM jobs.schema_version")).all() == [VERSION]


def no_schema(_: TenantDatabase) -> None: ...


def no_usage(database: TenantDatabase) -> None:
    create_schema(database.owner, schema="jobs")


def no_tables(database: TenantDatabase) -> None:
    create_schema(database.owner, schema="jobs")
    database.execute(f"GRANT USAGE ON SCHEMA jobs TO {quote_identifier(database.role)}")


@pytest.mark.parametrize("prepare", [no_schema, no_usage, no_tables])
def test_a_role_that_may_not_create_or_use_the_tables_is_told_the_remedy(
    tenant_database: TenantDatabase, make_app: MakeApp, prepare: Callable[[TenantDatabase], None]
) -> None:
    prepare(tenant_database)
    app = make_app(schema="jobs")
    before = contents(tenant_database, "jobs")

    with tenant_scope(ACME), pytest.raises(ConfigurationError, match=r"create_schema\(") as refused:
        app.backend.get_record("one")

    assert "'jobs'" in str(refused.value)
    assert contents(tenant_database, "jobs") == before

    create_schema(tenant_database.owner, schema="jobs", roles=[tenant_database.role])
    with tenant_scope(ACME):
        assert app.backend.get_record("one") is None, "the remedy helps without a new start"


@pytest.mark.parametrize("other", [VERSION + 1, VERSION - 1])
def test_tables_of_another_version_are_refused(
    tenant_database: TenantDatabase, application: Engine, other: int
) -> None:
    tenant_database.execute(f"UPDATE rhesis_tasks.schema_version SET version = {other}")

    with pytest.raises(ConfigurationError) as refused:
        ensure_schema(application, "rhesis_tasks")

    assert f"version {other}" in str(refused.value) and f"needs {VERSION}" in str(refused.value)


# --- what a granted role may do ----------------------------------------------------------------------------------


def test_a_granted_role_has_exactly_the_privileges_it_needs(application: Engine) -> None:
    tables = ("task_record", "group_record", "schema_version")
    privileges = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")

    with application.connect() as connection:
        granted = {
            table: [
                privilege
                for privilege in privileges
                if connection.scalar(
                    text("SELECT has_table_privilege(:table, :privilege)"),
                    {"table": f"rhesis_tasks.{table}", "privilege": privilege},
                )
            ]
            for table in tables
        }
        may_create_in_it = connection.scalar(text("SELECT has_schema_privilege('rhesis_tasks', 'CREATE')"))

    rows = ["SELECT", "INSERT", "UPDATE", "DELETE"]
    assert granted == {"task_record": rows, "group_record": rows, "schema_version": ["SELECT"]}
    assert may_create_in_it is False


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE rhesis_tasks.task_record",
        "TRUNCATE rhesis_tasks.group_record",
        "ALTER TABLE rhesis_tasks.task_record DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE rhesis_tasks.task_record ADD COLUMN mine text",
        "DROP POLICY tenant ON rhesis_tasks.task_record",
        "CREATE POLICY mine ON rhesis_tasks.task_record USING (true)",
        "DROP TABLE rhesis_tasks.group_record",
        "CREATE TABLE rhesis_tasks.mine ()",
        "UPDATE rhesis_tasks.schema_version SET version = 99",
        "ALTER FUNCTION rhesis_tasks.expire_records SECURITY INVOKER",
        "CREATE TRIGGER mine AFTER INSERT ON rhesis_tasks.task_record EXECUTE FUNCTION tsvector_update_trigger()",
    ],
)
def test_a_granted_role_cannot_change_what_protects_the_records(application: Engine, statement: str) -> None:
    with application.connect() as connection, pytest.raises(ProgrammingError) as refused:
        connection.execute(text(statement))

    assert getattr(refused.value.orig, "sqlstate", None) == "42501"


def test_a_granted_role_reads_no_records_of_tenants_without_one(application: Engine, make_app: MakeApp) -> None:
    app = make_app()
    with tenant_scope(ACME):
        app.backend.store_result("one", "secret", "SUCCESS")

    with application.connect() as connection:
        assert connection.execute(text("SELECT * FROM rhesis_tasks.task_record")).all() == []


@pytest.mark.parametrize("usage", [False, True], ids=["nothing", "only USAGE of the schema"])
def test_a_role_that_was_not_granted_the_tables_gets_nothing(
    tenant_database: TenantDatabase, superuser: Engine, usage: bool
) -> None:
    stranger = quote_identifier(f"{tenant_database.role}_stranger")
    refused: list[str | None] = []

    with superuser.connect() as connection:

        def attempt(statement: str) -> None:
            with connection.begin_nested():
                connection.exec_driver_sql(f"SET LOCAL ROLE {stranger}")
                connection.exec_driver_sql(statement)

        connection.exec_driver_sql(f"CREATE ROLE {stranger}")
        if usage:
            connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA rhesis_tasks TO {stranger}")
        for statement in (
            "SELECT * FROM rhesis_tasks.task_record",
            "SELECT * FROM rhesis_tasks.schema_version",
            "SELECT rhesis_tasks.expire_records(now())",
        ):
            with pytest.raises(ProgrammingError) as error:
                attempt(statement)
            refused.append(getattr(error.value.orig, "sqlstate", None))
        connection.rollback()

    assert refused == ["42501"] * 3


def test_the_function_that_expires_records_cannot_be_led_to_run_the_callers_code(
    tenant_database: TenantDatabase, superuser: Engine, application: Engine, make_app: MakeApp
) -> None:
    app = make_app()
    with tenant_scope(ACME):
        app.backend.store_result("one", 42, "SUCCESS")
    an_hour_later(tenant_database)
    schema = quote_identifier(tenant_database.role)
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema} AUTHORIZATION {schema}")

    with application.begin() as connection:
        # Operators and functions of the caller's, found before PostgreSQL's own by whoever uses its search path.
        connection.exec_driver_sql(
            "CREATE FUNCTION before(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE 'ran as %%', current_user; END $$; "
            "CREATE OPERATOR < (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = before)"
        )
        connection.exec_driver_sql(
            f"GRANT USAGE ON SCHEMA {schema} TO PUBLIC; SET LOCAL search_path = {schema}, pg_catalog"
        )
        with pytest.raises(DBAPIError, match=f"ran as {tenant_database.role}"), connection.begin_nested():
            connection.exec_driver_sql("SELECT now() < now()")

        expired = connection.exec_driver_sql("SELECT rhesis_tasks.expire_records(now() + interval '1 s')").scalar()

    assert expired == 1


def an_hour_later(database: TenantDatabase) -> None:
    earlier = "launched_at = launched_at - interval '1 hour', finished_at = finished_at - interval '1 hour'"
    database.execute(f"UPDATE rhesis_tasks.task_record SET {earlier}")


def test_what_has_just_ended_cannot_be_expired_by_whoever_may_expire(application: Engine, make_app: MakeApp) -> None:
    app = make_app()
    with tenant_scope(ACME):
        app.backend.store_result("one", 42, "SUCCESS")
        app.backend.save_group("group", GroupResult("group", []))

    with application.begin() as connection:
        expired = connection.scalar(text("SELECT rhesis_tasks.expire_records('infinity')"))

    assert expired == 0


def test_what_never_ended_expires_in_the_end(
    tenant_database: TenantDatabase, application: Engine, make_app: MakeApp
) -> None:
    app = make_app()
    with tenant_scope(ACME):
        for days in (1, 29, 31, 60):
            app.backend.record_launch(f"lost {days}", "work")
    for days in (1, 29, 31, 60):
        tenant_database.execute(
            f"UPDATE rhesis_tasks.task_record SET launched_at = now() - interval '{days} days' "
            f"WHERE task_id = 'lost {days}'"
        )

    with application.begin() as connection:
        expired = connection.scalar(text("SELECT rhesis_tasks.expire_records(now())"))

    assert expired == 2


def test_expiry_takes_a_batch_at_a_time(
    tenant_database: TenantDatabase, application: Engine, make_app: MakeApp
) -> None:
    app = make_app()
    with tenant_scope(ACME):
        for number in range(5):
            app.backend.store_result(f"task {number}", 42, "SUCCESS")
    an_hour_later(tenant_database)

    with application.begin() as connection:
        batches = [connection.scalar(text("SELECT rhesis_tasks.expire_records(now(), 2)")) for _ in range(4)]

    assert batches == [2, 2, 1, 0]
