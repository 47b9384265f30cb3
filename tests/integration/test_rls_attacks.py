"""Ways around row-level security.  Each test shows one that works, and then what stops it, or that nothing does.

All are SQL as an application's connection, or a colleague's migration, could send it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from servers import ON_BOTH_SERVERS
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, TenantSessions
from rhesis_tasks.errors import UnsafeConnectionError
from rhesis_tasks.rls import ORGANIZATION_SETTING, disable_rls, enable_rls
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase

if TYPE_CHECKING:
    from conftest import Notes

pytestmark = ON_BOTH_SERVERS

ACME = TenantContext("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "alice")
GLOBEX = TenantContext("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "bob")
ALL = ["a1", "a2", "a3", "g1", "g2"]
ACMES = ["a1", "a2", "a3"]


@pytest.fixture
def application(tenant_database: TenantDatabase) -> Iterator[Engine]:
    """An engine of the application's role, with nothing of ours on it."""
    engine = create_engine(database_url(tenant_database.url), poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def app_role(tenant_database: TenantDatabase) -> str:
    """The application's role, quoted."""
    return quote_identifier(tenant_database.role)


@pytest.fixture
def bypassing(superuser: Engine) -> Iterator[str]:
    """A role with BYPASSRLS that may use all tables of the application, quoted."""
    role = quote_identifier(f"test_bypass_{secrets.token_hex(4)}")
    run(superuser, f"CREATE ROLE {role} BYPASSRLS", f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    yield role
    run(superuser, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def run(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@contextmanager
def as_tenant(engine: Engine, tenant: TenantContext | None = ACME) -> Iterator[Connection]:
    """A transaction with the tenant's setting; with None, without."""
    with engine.begin() as connection:
        if tenant is not None:
            connection.execute(
                text("SELECT set_config(:setting, :id, true)"),
                {"setting": ORGANIZATION_SETTING, "id": tenant.organization_id},
            )
        yield connection


def column(connection: Connection, query: str) -> list[Any]:
    return list(connection.exec_driver_sql(query).scalars())


def seen(engine: Engine, tenant: TenantContext | None = ACME, query: str = "SELECT body FROM note") -> list[Any]:
    """The first column of what the query returns, sorted."""
    with as_tenant(engine, tenant) as connection:
        return sorted(column(connection, query))


def outcome(engine: Engine, statement: str, tenant: TenantContext | None = ACME) -> str:
    """What comes of a statement: the error's SQLSTATE, or else the number of rows, for example "2 rows"."""
    try:
        with as_tenant(engine, tenant) as connection:
            return f"{connection.exec_driver_sql(statement).rowcount} rows"
    except DBAPIError as error:
        return str(getattr(error.orig, "sqlstate", None))


REFUSED = "42501"  # insufficient_privilege
NOT_UNIQUE = "23505"
NO_SUCH_ROW = "23503"  # foreign_key_violation

# --- roles that policies do not bind -----------------------------------------------------------------------------


def test_the_owner_is_bound_by_force_only(notes: Notes) -> None:
    owner = notes.database.owner

    run(owner, "ALTER TABLE note NO FORCE ROW LEVEL SECURITY")
    assert seen(owner, None) == ALL

    run(owner, enable_rls("note", role=notes.database.role))
    assert (seen(owner, None), seen(owner, ACME)) == ([], [])


def test_a_member_of_a_bypassing_role_can_become_it(
    notes: Notes, application: Engine, superuser: Engine, app_role: str, bypassing: str
) -> None:
    run(superuser, f"GRANT {bypassing} TO {app_role}")
    with as_tenant(application) as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {bypassing}")
        assert sorted(column(connection, "SELECT body FROM note")) == ALL

    run(superuser, f"REVOKE {bypassing} FROM {app_role}")
    assert outcome(application, f"SET LOCAL ROLE {bypassing}") == REFUSED


def test_a_login_that_becomes_a_bypassing_role_gets_no_tenant_session(
    notes: Notes, application: Engine, superuser: Engine, app_role: str, bypassing: str
) -> None:
    run(superuser, f"GRANT {bypassing} TO {app_role}", f"ALTER ROLE {app_role} SET role = {bypassing}")
    assert seen(application) == ALL

    sessions = TenantSessions(notes.url)
    with pytest.raises(UnsafeConnectionError, match="BYPASSRLS"), sessions.begin(ACME) as session:
        notes.seen(session)
    sessions.dispose()


def test_a_migration_as_the_owner_changes_and_checks_no_rows_and_needs_a_bypassing_member(
    notes: Notes, superuser: Engine, bypassing: str
) -> None:
    update = "UPDATE note SET body = 'x'"
    dangling = "ALTER TABLE note ADD FOREIGN KEY (body) REFERENCES label (name)"  # a label that no note has
    valid = "SELECT convalidated FROM pg_constraint WHERE contype = 'f' AND conrelid = 'note'::regclass"
    owner = notes.database.owner
    run(owner, "CREATE TABLE label (name text PRIMARY KEY)")

    with owner.begin() as connection:
        assert connection.exec_driver_sql(update).rowcount == 0
        connection.exec_driver_sql(dangling)
        assert column(connection, valid) == [True]
        connection.rollback()

    run(superuser, f"GRANT {owner_of(notes.database)} TO {bypassing}")
    with superuser.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {bypassing}")
        assert connection.exec_driver_sql(update).rowcount == len(ALL)
        with pytest.raises(DBAPIError) as error:
            connection.exec_driver_sql(dangling)
    assert getattr(error.value.orig, "sqlstate", None) == NO_SUCH_ROW


def test_a_default_of_the_setting_makes_everybody_that_tenant(
    notes: Notes, application: Engine, superuser: Engine, app_role: str
) -> None:
    run(superuser, f"ALTER ROLE {app_role} SET {ORGANIZATION_SETTING} = '{GLOBEX.organization_id}'")
    assert (seen(application, None), seen(application)) == (notes.of(GLOBEX), ACMES)

    run(superuser, f"ALTER ROLE {app_role} SET {ORGANIZATION_SETTING} = ''")  # harmless
    assert (seen(application, None), seen(application)) == ([], ACMES)

    run(superuser, f"ALTER ROLE {app_role} RESET {ORGANIZATION_SETTING}")
    assert (seen(application, None), seen(application)) == ([], ACMES)


# --- other policies ----------------------------------------------------------------------------------------------


def test_a_stray_permissive_policy_is_stopped_by_the_floor(notes: Notes, application: Engine) -> None:
    owner = notes.database.owner
    run(owner, "CREATE POLICY stray ON note FOR SELECT TO PUBLIC USING (true)")

    run(owner, "DROP POLICY rhesis_tenant_floor ON note")
    assert (seen(application), seen(application, None)) == (ALL, ALL)

    run(owner, enable_rls("note", role=notes.database.role))
    assert (seen(application), seen(application, None)) == (ACMES, [])


def test_a_table_with_the_floor_only_denies_silently(notes: Notes, application: Engine) -> None:
    owner = notes.database.owner

    run(owner, "DROP POLICY rhesis_tenant ON note")
    assert (seen(application), outcome(application, "UPDATE note SET body = 'x'")) == ([], "0 rows")

    run(owner, enable_rls("note", role=notes.database.role))
    assert (seen(application), outcome(application, "UPDATE note SET body = 'x'")) == (ACMES, "3 rows")


def test_a_policy_that_reads_the_setting_strictly_fails_by_the_connections_history(
    notes: Notes, application: Engine
) -> None:
    def errors_of_one_connection() -> list[str]:
        """Of a query without a tenant: on a fresh connection, and after a transaction with one."""
        found = []
        with application.connect() as connection:
            for _ in range(2):
                try:
                    column(connection, "SELECT body FROM note")
                    found.append("none")
                except DBAPIError as error:
                    found.append(str(getattr(error.orig, "sqlstate", None)))
                connection.rollback()
                connection.exec_driver_sql(f"SET LOCAL {ORGANIZATION_SETTING} = '{ACME.organization_id}'")
                connection.commit()
        return found

    owner = notes.database.owner
    run(
        owner,
        disable_rls("note"),
        "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY own ON note USING (organization_id = current_setting('{ORGANIZATION_SETTING}')::uuid)",
    )
    assert errors_of_one_connection() == ["42704", "22P02"]  # undefined_object, invalid_text_representation

    run(owner, "DROP POLICY own ON note", enable_rls("note", role=notes.database.role))
    assert errors_of_one_connection() == ["none", "none"]

    run(owner, enable_rls("note", role=notes.database.role, strict=True))
    assert errors_of_one_connection() == [REFUSED, REFUSED]


def test_rows_without_an_organization_are_nobodys(notes: Notes, application: Engine) -> None:
    owner = notes.database.owner
    tenant = f"NULLIF(current_setting('{ORGANIZATION_SETTING}', true), '')::uuid"
    run(
        owner,
        disable_rls("note"),
        "ALTER TABLE note ALTER organization_id DROP NOT NULL, ENABLE ROW LEVEL SECURITY",
        "UPDATE note SET organization_id = NULL WHERE body = 'g1'",
        f"CREATE POLICY own ON note USING (organization_id IS NOT DISTINCT FROM {tenant})",
    )
    assert seen(application, None) == ["g1"]

    assert outcome(owner, enable_rls("note", role=notes.database.role)) == "23502"  # not_null_violation
    run(owner, "DELETE FROM note WHERE organization_id IS NULL", enable_rls("note", role=notes.database.role))
    assert (seen(application, None), seen(application)) == ([], ACMES)


def test_an_immutable_function_in_a_policy_keeps_the_first_tenant_in_a_prepared_plan(
    notes: Notes, application: Engine
) -> None:
    def second_tenants_rows() -> list[Any]:
        with application.connect() as connection:
            connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
            connection.exec_driver_sql("PREPARE bodies AS SELECT body FROM note")
            found = []
            for tenant in (ACME, GLOBEX):
                connection.exec_driver_sql(f"SET {ORGANIZATION_SETTING} = '{tenant.organization_id}'")
                found = sorted(column(connection, "EXECUTE bodies"))
            return found

    owner = notes.database.owner
    run(
        owner,
        disable_rls("note"),
        "CREATE FUNCTION tenant() RETURNS uuid LANGUAGE plpgsql IMMUTABLE AS "
        f"$$ BEGIN RETURN current_setting('{ORGANIZATION_SETTING}')::uuid; END $$",
        "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY own ON note USING (organization_id = tenant())",
    )
    assert second_tenants_rows() == ACMES

    run(owner, "DROP POLICY own ON note", enable_rls("note", role=notes.database.role))
    assert second_tenants_rows() == notes.of(GLOBEX)

    run(owner, enable_rls("note", role=notes.database.role, strict=True))
    assert second_tenants_rows() == notes.of(GLOBEX)


# --- what runs as somebody else ----------------------------------------------------------------------------------


def test_a_view_shows_what_its_owner_sees_unless_it_is_a_security_invoker(
    notes: Notes, application: Engine, superuser: Engine, app_role: str
) -> None:
    run(superuser, "CREATE VIEW every_note AS SELECT body FROM note", f"GRANT SELECT ON every_note TO {app_role}")
    assert seen(application, query="SELECT body FROM every_note") == ALL

    if superuser.dialect.server_version_info < (15,):
        pytest.skip("PostgreSQL 14 has no security_invoker")
    run(superuser, "ALTER VIEW every_note SET (security_invoker = true)")
    assert seen(application, query="SELECT body FROM every_note") == ACMES


def test_a_security_definer_function_of_a_bypassing_role_sees_everything(
    notes: Notes, application: Engine, superuser: Engine, bypassing: str
) -> None:
    run(
        superuser,
        "CREATE FUNCTION bodies() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER SET search_path = public "
        "AS 'SELECT body FROM note'",
        f"ALTER FUNCTION bodies() OWNER TO {bypassing}",
    )
    assert seen(application, query="SELECT bodies()") == ALL

    run(superuser, f"ALTER FUNCTION bodies() OWNER TO {owner_of(notes.database)}")
    assert seen(application, query="SELECT bodies()") == []  # the owner has no policy

    run(superuser, "ALTER FUNCTION bodies() SECURITY INVOKER")
    assert seen(application, query="SELECT bodies()") == ACMES


def owner_of(database: TenantDatabase) -> str:
    return quote_identifier(database.owner.url.username)


def test_a_materialized_view_holds_what_its_owner_saw_and_takes_no_policies(
    notes: Notes, application: Engine, superuser: Engine, app_role: str
) -> None:
    run(
        superuser,
        "CREATE MATERIALIZED VIEW copied AS SELECT * FROM note",
        f"GRANT SELECT ON copied TO {app_role}",
    )
    assert seen(application, query="SELECT body FROM copied") == ALL
    assert outcome(superuser, enable_rls("copied", role=notes.database.role)) == "42809"  # wrong_object_type

    # What the documentation advises: a view that filters, and no grant on what it reads.
    run(
        superuser,
        f"REVOKE SELECT ON copied FROM {app_role}",
        "CREATE VIEW my_copied WITH (security_barrier) AS SELECT * FROM copied WHERE organization_id = "
        f"(SELECT NULLIF(current_setting('{ORGANIZATION_SETTING}', true), '')::uuid)",
        f"GRANT SELECT ON my_copied TO {app_role}",
    )
    assert outcome(application, "SELECT body FROM copied") == REFUSED
    assert seen(application, query="SELECT body FROM my_copied") == ACMES
    assert seen(application, None, query="SELECT body FROM my_copied") == []


# --- ways to the rows that do not pass the table -----------------------------------------------------------------


def test_a_partition_needs_its_own_policies(
    tenant_database: TenantDatabase, application: Engine, app_role: str
) -> None:
    owner, role = tenant_database.owner, tenant_database.role
    run(
        owner,
        "CREATE TABLE event (organization_id uuid, day int) PARTITION BY RANGE (day)",
        "CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM (0) TO (10)",
        f"INSERT INTO event VALUES ('{ACME.organization_id}', 1), ('{GLOBEX.organization_id}', 2)",
        f"GRANT SELECT ON event, event_1 TO {app_role}",
        enable_rls("event", role=role),
    )
    through_the_parent = "SELECT day FROM event"
    direct = "SELECT day FROM event_1"
    assert (seen(application, query=through_the_parent), seen(application, query=direct)) == ([1], [1, 2])

    run(owner, enable_rls("event_1", role=role))
    assert (seen(application, query=through_the_parent), seen(application, query=direct)) == ([1], [1])


def test_truncate_is_not_governed_by_policies_and_taken_away(
    notes: Notes, application: Engine, superuser: Engine, app_role: str
) -> None:
    owner = notes.database.owner
    run(owner, f"GRANT TRUNCATE ON note TO {app_role}")
    with as_tenant(application) as connection:
        connection.exec_driver_sql("TRUNCATE note")
        connection.rollback()

    run(owner, enable_rls("note", role=notes.database.role))
    assert outcome(application, "TRUNCATE note") == REFUSED
    assert seen(superuser) == ALL


def test_copy_writes_no_row_of_another_tenant_and_reads_none(notes: Notes, application: Engine) -> None:
    def copied_in() -> str:
        return copied(application, "COPY note (organization_id, body) FROM STDIN", f"{GLOBEX.organization_id}\tx\n")

    owner = notes.database.owner
    run(owner, disable_rls("note"))
    assert copied_in() == "1 rows"
    run(owner, "DELETE FROM note WHERE body = 'x'")

    run(owner, enable_rls("note", role=notes.database.role))
    assert copied_in() == "0A000"  # feature_not_supported, whatever the rows are
    with as_tenant(application) as connection, driver_cursor(connection).copy("COPY note (body) TO STDOUT") as copy:
        assert sorted(b"".join(copy).decode().split()) == ACMES


def driver_cursor(connection: Connection) -> Any:
    """psycopg's cursor, since SQLAlchemy has no COPY."""
    return connection.connection.cursor()


def copied(engine: Engine, statement: str, rows: str) -> str:
    """What comes of copying rows in: "1 rows", or an SQLSTATE."""
    with as_tenant(engine) as connection:
        cursor = driver_cursor(connection)
        try:
            with cursor.copy(statement) as copy:
                copy.write(rows)
        except psycopg.Error as error:
            connection.rollback()
            return str(error.sqlstate)
        return f"{cursor.rowcount} rows"


def test_on_conflict_updates_no_row_of_another_tenant(notes: Notes, application: Engine, superuser: Engine) -> None:
    foreign = seen(superuser, query="SELECT id FROM note WHERE body = 'g1'")[0]
    upsert = (
        "INSERT INTO note (organization_id, id, body) OVERRIDING SYSTEM VALUE "
        f"VALUES ('{ACME.organization_id}', {foreign}, 'mine') ON CONFLICT (id) DO UPDATE SET body = 'overwritten'"
    )
    owner = notes.database.owner

    run(owner, disable_rls("note"))
    assert outcome(application, upsert) == "1 rows"
    assert "overwritten" in seen(superuser)
    run(owner, "UPDATE note SET body = 'g1' WHERE body = 'overwritten'", enable_rls("note", role=notes.database.role))

    assert outcome(application, upsert) == REFUSED
    assert seen(superuser) == ALL


# --- keys, which are checked without regard to policies ----------------------------------------------------------

PLAIN_KEYS = (
    "CREATE TABLE orders (organization_id uuid, id int PRIMARY KEY)",
    "CREATE TABLE items (organization_id uuid, order_id int REFERENCES orders (id) ON DELETE CASCADE, name text)",
)
COMPOSITE_KEYS = (
    "CREATE TABLE orders (organization_id uuid, id int, PRIMARY KEY (organization_id, id))",
    "CREATE TABLE items (organization_id uuid, order_id int, name text, "
    "FOREIGN KEY (organization_id, order_id) REFERENCES orders (organization_id, id) ON DELETE CASCADE)",
)


def create_orders(database: TenantDatabase, *tables: str) -> None:
    """Tables under row-level security in which acme has order 1, and globex order 2."""
    run(
        database.owner,
        "DROP TABLE IF EXISTS items, orders",
        *tables,
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON orders, items TO {quote_identifier(database.role)}",
        f"INSERT INTO orders VALUES ('{ACME.organization_id}', 1), ('{GLOBEX.organization_id}', 2)",
        enable_rls("orders", role=database.role, index_columns=None),
        enable_rls("items", role=database.role),
    )


def insert_order(tenant: TenantContext, number: int) -> str:
    return f"INSERT INTO orders VALUES ('{tenant.organization_id}', {number})"


def insert_item(tenant: TenantContext, order: int) -> str:
    return f"INSERT INTO items VALUES ('{tenant.organization_id}', {order}, 'of {tenant.user_id}')"


def test_a_primary_key_of_the_id_alone_tells_which_ids_exist(
    tenant_database: TenantDatabase, application: Engine
) -> None:
    def answers() -> tuple[str, str]:
        """To acme, for an id that globex has and for one that nobody has."""
        return outcome(application, insert_order(ACME, 2)), outcome(application, insert_order(ACME, 3))

    create_orders(tenant_database, *PLAIN_KEYS)
    assert answers() == (NOT_UNIQUE, "1 rows")

    create_orders(tenant_database, *COMPOSITE_KEYS)
    assert answers() == ("1 rows", "1 rows")


def test_a_foreign_key_to_the_id_alone_tells_which_ids_exist(
    tenant_database: TenantDatabase, application: Engine
) -> None:
    def answers() -> tuple[str, str]:
        return outcome(application, insert_item(ACME, 2)), outcome(application, insert_item(ACME, 3))

    create_orders(tenant_database, *PLAIN_KEYS)
    assert answers() == ("1 rows", NO_SUCH_ROW)

    create_orders(tenant_database, *COMPOSITE_KEYS)
    assert answers() == (NO_SUCH_ROW, NO_SUCH_ROW)


def test_a_foreign_key_to_the_id_alone_cascades_into_another_tenant(
    tenant_database: TenantDatabase, application: Engine
) -> None:
    def globex_items_after_acme_deletes_its_order() -> list[str]:
        outcome(application, insert_item(GLOBEX, 1), GLOBEX)  # points at acme's order, where it may
        outcome(application, insert_item(GLOBEX, 2), GLOBEX)
        assert outcome(application, "DELETE FROM orders WHERE id = 1") == "1 rows"
        return seen(application, GLOBEX, "SELECT order_id FROM items")

    create_orders(tenant_database, *PLAIN_KEYS)
    outcome(application, insert_item(GLOBEX, 1), GLOBEX)
    assert seen(application, GLOBEX, "SELECT order_id FROM items") == [1]
    assert globex_items_after_acme_deletes_its_order() == [2]

    create_orders(tenant_database, *COMPOSITE_KEYS)
    assert outcome(application, insert_item(GLOBEX, 1), GLOBEX) == NO_SUCH_ROW
    assert globex_items_after_acme_deletes_its_order() == [2]


# --- what is not stopped -----------------------------------------------------------------------------------------

INJECTED = f"set_config('{ORGANIZATION_SETTING}', '{GLOBEX.organization_id}', true)"


@pytest.mark.parametrize(
    "injection",
    [
        f"' IS NOT NULL AND (SELECT {INJECTED}) <> '",
        f"' UNION ALL SELECT {INJECTED} UNION ALL SELECT body FROM note WHERE body <> '",
        f"' AND false UNION ALL SELECT body FROM (SELECT {INJECTED} OFFSET 0) AS switch, note WHERE body <> '",
        f"' AND false UNION ALL (WITH switch AS MATERIALIZED (SELECT {INJECTED}) "
        "SELECT body FROM switch, note) UNION ALL SELECT '",
    ],
    ids=["in the condition", "in a union", "in a subquery", "in a common table expression"],
)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_injected_sql_switches_the_tenant(notes: Notes, application: Engine, injection: str, strict: bool) -> None:
    run(notes.database.owner, enable_rls("note", role=notes.database.role, strict=strict))
    query = "SELECT body FROM note WHERE body = '{}'"
    assert seen(application, query=query.format("a1")) == ["a1"]

    assert set(notes.of(GLOBEX)) <= set(seen(application, query=query.format(injection)))
