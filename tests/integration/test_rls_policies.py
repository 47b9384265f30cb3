"""Row-level security as enable_rls() sets it up: what PostgreSQL itself refuses, without any of our sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from servers import ON_BOTH_SERVERS
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from rhesis_tasks import TenantContext
from rhesis_tasks.rls import ORGANIZATION_SETTING, disable_rls, enable_rls
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase

if TYPE_CHECKING:
    from conftest import Notes

pytestmark = ON_BOTH_SERVERS


@pytest.fixture
def tenant_database(emptied_database: TenantDatabase) -> TenantDatabase:
    return emptied_database


# Each returns rows, so that what it changed can be counted.
MOVE_TO_GLOBEX = text("UPDATE note SET organization_id = CAST(:globex AS uuid) WHERE body = 'a1' RETURNING id")
DELETE_ALL = text("DELETE FROM note RETURNING id")


@pytest.fixture
def application(tenant_database: TenantDatabase) -> Iterator[Engine]:
    """An engine of the application's role, with a pool of one connection and nothing of ours on it."""
    engine = create_engine(database_url(tenant_database.url), pool_size=1, max_overflow=0, pool_timeout=10)
    yield engine
    engine.dispose()


def set_tenant(connection: Connection, organization_id: str, setting: str = ORGANIZATION_SETTING) -> None:
    connection.execute(
        text("SELECT set_config(:setting, :value, true)"), {"setting": setting, "value": organization_id}
    )


@contextmanager
def as_tenant(engine: Engine, tenant: TenantContext) -> Iterator[Connection]:
    """A transaction with the tenant's setting."""
    with engine.begin() as connection:
        set_tenant(connection, tenant.organization_id)
        yield connection


@contextmanager
def refused(engine: Engine, sqlstate: str = "42501") -> Iterator[Connection]:
    """A transaction in which the last statement must be refused (42501: insufficient privilege)."""
    with engine.connect() as connection, connection.begin() as transaction:
        with pytest.raises(DBAPIError) as error:
            yield connection
        assert getattr(error.value.orig, "sqlstate", None) == sqlstate, error.value
        transaction.rollback()


def all_bodies(superuser: Engine) -> list[str]:
    with superuser.connect() as connection:
        return list(connection.scalars(text("SELECT body FROM note ORDER BY body")))


ALL = ["a1", "a2", "a3", "g1", "g2"]


# --- with a tenant -----------------------------------------------------------------------------------------------


def test_a_tenant_reads_and_writes_its_own_rows(notes: Notes, application: Engine, superuser: Engine) -> None:
    with as_tenant(application, notes.acme) as connection:
        notes.write(connection, notes.acme, "a4")
        connection.execute(text("UPDATE note SET body = 'a0' WHERE body = 'a1'"))
        connection.execute(text("DELETE FROM note WHERE body = 'a2'"))

        assert notes.seen(connection) == ["a0", "a3", "a4"]
    assert all_bodies(superuser) == ["a0", "a3", "a4", "g1", "g2"]


def test_inserting_a_row_of_another_tenant_is_refused(notes: Notes, application: Engine, superuser: Engine) -> None:
    with refused(application) as connection:
        set_tenant(connection, notes.acme.organization_id)
        notes.write(connection, notes.globex, "smuggled")

    assert all_bodies(superuser) == ALL


def test_moving_a_row_to_another_tenant_is_refused(notes: Notes, application: Engine, superuser: Engine) -> None:
    with refused(application) as connection:
        set_tenant(connection, notes.acme.organization_id)
        connection.execute(MOVE_TO_GLOBEX, {"globex": notes.globex.organization_id})

    assert all_bodies(superuser) == ALL


def test_updating_and_deleting_reach_no_row_of_another_tenant(
    notes: Notes, application: Engine, superuser: Engine
) -> None:
    with as_tenant(application, notes.acme) as connection:
        stolen = connection.execute(
            text("UPDATE note SET organization_id = CAST(:acme AS uuid) WHERE body LIKE 'g%'"),
            {"acme": notes.acme.organization_id},
        )
        deleted = connection.execute(text("DELETE FROM note WHERE body LIKE 'g%'"))

    assert (stolen.rowcount, deleted.rowcount) == (0, 0)
    assert all_bodies(superuser) == ALL


def test_a_conflict_with_a_row_of_another_tenant_does_not_update_it(
    notes: Notes, application: Engine, superuser: Engine
) -> None:
    with superuser.connect() as connection:
        foreign = connection.scalar(text("SELECT id FROM note WHERE body = 'g1'"))

    with refused(application) as connection:
        set_tenant(connection, notes.acme.organization_id)
        connection.execute(
            text(
                "INSERT INTO note (organization_id, id, body) OVERRIDING SYSTEM VALUE "
                "VALUES (CAST(:acme AS uuid), :id, 'mine') ON CONFLICT (id) DO UPDATE SET body = excluded.body"
            ),
            {"acme": notes.acme.organization_id, "id": foreign},
        )

    assert all_bodies(superuser) == ALL


def test_a_row_that_names_no_tenant_is_refused(notes: Notes, application: Engine, superuser: Engine) -> None:
    with refused(application) as connection:
        set_tenant(connection, notes.acme.organization_id)
        connection.execute(text("INSERT INTO note (body) VALUES ('nobody''s')"))
    with refused(superuser, "23502") as connection:  # not_null_violation, also for those whom policies do not bind
        connection.execute(text("INSERT INTO note (body) VALUES ('nobody''s')"))

    assert all_bodies(superuser) == ALL


# --- without a tenant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["a fresh connection", "one with the setting left empty"])
def test_without_a_tenant_nothing_is_read_or_written(
    notes: Notes, application: Engine, superuser: Engine, history: str
) -> None:
    if history == "one with the setting left empty":
        with as_tenant(application, notes.acme) as connection:
            assert notes.seen(connection) == notes.of(notes.acme)
    expected = {"a fresh connection": None, "one with the setting left empty": ""}[history]

    with application.begin() as connection:
        assert connection.scalar(text(f"SELECT current_setting('{ORGANIZATION_SETTING}', true)")) == expected
        assert notes.seen(connection) == []
        assert connection.execute(MOVE_TO_GLOBEX, {"globex": notes.globex.organization_id}).all() == []
        assert connection.execute(DELETE_ALL).all() == []
    with refused(application) as connection:
        notes.write(connection, notes.acme, "nobody's")

    assert all_bodies(superuser) == ALL


def test_a_tenant_that_does_not_exist_sees_nothing(notes: Notes, application: Engine) -> None:
    with as_tenant(application, TenantContext("00000000-0000-4000-8000-000000000000")) as connection:
        assert notes.seen(connection) == []


def test_a_setting_that_is_no_uuid_is_an_error_not_an_open_door(notes: Notes, application: Engine) -> None:
    with refused(application, "22P02") as connection:  # invalid_text_representation
        set_tenant(connection, "' OR true --")
        notes.seen(connection)


# --- the owner ---------------------------------------------------------------------------------------------------


def test_the_owner_sees_and_writes_nothing_without_a_tenant(notes: Notes, superuser: Engine) -> None:
    with notes.database.owner.begin() as connection:
        assert notes.seen(connection) == []
        assert connection.execute(DELETE_ALL).all() == []
    with refused(notes.database.owner) as connection:
        notes.write(connection, notes.acme, "the owner's")

    assert all_bodies(superuser) == ALL


# --- the floor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stray", ["FOR SELECT TO PUBLIC USING (true)", "FOR ALL TO PUBLIC USING (true)"])
def test_a_stray_permissive_policy_opens_nothing(
    notes: Notes, application: Engine, superuser: Engine, stray: str
) -> None:
    notes.database.execute(f"CREATE POLICY stray ON note {stray}")

    with application.begin() as connection:
        without_a_tenant = notes.seen(connection)
    with as_tenant(application, notes.acme) as connection:
        with_a_tenant = notes.seen(connection)
    with refused(application) as connection:
        set_tenant(connection, notes.acme.organization_id)
        notes.write(connection, notes.globex, "smuggled")
    with notes.database.owner.begin() as connection:
        owners = notes.seen(connection)

    assert (without_a_tenant, with_a_tenant, owners) == ([], notes.of(notes.acme), [])
    assert all_bodies(superuser) == ALL


def test_a_role_that_was_only_granted_the_table_sees_nothing(notes: Notes, superuser: Engine) -> None:
    other = quote_identifier(f"{notes.database.role}_other")
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {other}; GRANT SELECT ON note TO {other}; SET LOCAL ROLE {other}")
        set_tenant(connection, notes.acme.organization_id)

        seen = notes.seen(connection)

        connection.rollback()
    assert seen == []


# --- what policies do not govern ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grantee", ["the role", "PUBLIC"])
def test_truncate_references_and_trigger_are_taken_away(
    tenant_database: TenantDatabase, application: Engine, grantee: str
) -> None:
    role = quote_identifier(tenant_database.role)
    tenant_database.execute(
        "CREATE TABLE note (organization_id uuid NOT NULL, body text)",
        f"GRANT ALL ON note TO {role if grantee == 'the role' else 'PUBLIC'}",
        enable_rls("note", role=tenant_database.role),
    )

    with refused(application) as connection:
        connection.execute(text("TRUNCATE note"))

    with application.connect() as connection:
        kept = connection.scalars(
            text(
                "SELECT privilege FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', "
                "'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege WHERE has_table_privilege('note', privilege)"
            )
        ).all()
    assert kept == ["SELECT", "INSERT", "UPDATE", "DELETE"]


# --- several roles -----------------------------------------------------------------------------------------------


def test_each_of_several_roles_sees_its_tenants_rows(
    notes: Notes, application: Engine, superuser: Engine, other_role: str
) -> None:
    other = quote_identifier(other_role)
    notes.database.execute(f"GRANT ALL ON note TO {other}", enable_rls("note", role=[notes.database.role, other_role]))

    with as_tenant(application, notes.acme) as connection:
        one = notes.seen(connection)
    with as_tenant(superuser, notes.globex) as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {other}")
        another = notes.seen(connection)
        truncates = connection.scalar(text("SELECT has_table_privilege('note', 'TRUNCATE')"))

    assert (one, another, truncates) == (notes.of(notes.acme), notes.of(notes.globex), False)


@pytest.fixture
def other_role(superuser: Engine, tenant_database: TenantDatabase) -> Iterator[str]:
    """Another role of the application's."""
    name = f"{tenant_database.role}_other"
    role = quote_identifier(name)
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
    yield name
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


# --- strict ------------------------------------------------------------------------------------------------------


@pytest.fixture
def strict_notes(notes: Notes) -> Notes:
    """The notes under strict policies."""
    notes.database.execute(enable_rls("note", role=notes.database.role, strict=True))
    return notes


@pytest.mark.parametrize("history", ["a fresh connection", "one with the setting left empty"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT body FROM note",
        "UPDATE note SET body = 'x'",
        "DELETE FROM note",
        "INSERT INTO note VALUES (NULL, DEFAULT, 'x')",
    ],
)
def test_strict_a_statement_without_a_tenant_is_refused_with_the_remedy(
    strict_notes: Notes, application: Engine, superuser: Engine, history: str, statement: str
) -> None:
    if history == "one with the setting left empty":
        with as_tenant(application, strict_notes.acme) as connection:
            assert strict_notes.seen(connection) == strict_notes.of(strict_notes.acme)

    with pytest.raises(DBAPIError) as error, application.begin() as connection:
        connection.exec_driver_sql(statement)

    assert getattr(error.value.orig, "sqlstate", None) == "42501"
    assert "no tenant: the setting app.current_organization is missing or empty" in str(error.value)
    assert "Use a tenant session" in str(error.value)
    assert all_bodies(superuser) == ALL


def test_strict_a_scan_that_meets_no_row_is_not_refused(strict_notes: Notes, application: Engine) -> None:
    strict_notes.database.execute(
        "ALTER TABLE note NO FORCE ROW LEVEL SECURITY", "DELETE FROM note", "ALTER TABLE note FORCE ROW LEVEL SECURITY"
    )

    with application.begin() as connection:
        connection.exec_driver_sql("SET LOCAL enable_indexscan = off; SET LOCAL enable_bitmapscan = off")
        assert strict_notes.seen(connection) == []


def test_strict_a_tenant_reads_and_writes_its_own_rows(
    strict_notes: Notes, application: Engine, superuser: Engine
) -> None:
    with as_tenant(application, strict_notes.acme) as connection:
        strict_notes.write(connection, strict_notes.acme, "a4")
        connection.execute(text("DELETE FROM note WHERE body <> 'a4'"))
    with refused(application) as connection:
        set_tenant(connection, strict_notes.acme.organization_id)
        strict_notes.write(connection, strict_notes.globex, "smuggled")

    assert all_bodies(superuser) == ["a4", "g1", "g2"]


def test_strict_the_function_cannot_be_led_astray_by_a_search_path(strict_notes: Notes, application: Engine) -> None:
    strict_notes.database.execute(
        "CREATE SCHEMA evil",
        "CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE sql "
        f"AS $$ SELECT '{strict_notes.globex.organization_id}' $$",
        "GRANT USAGE ON SCHEMA evil TO PUBLIC",
    )
    with application.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = evil, pg_catalog, public")
        set_tenant(connection, strict_notes.acme.organization_id)

        assert strict_notes.seen(connection) == strict_notes.of(strict_notes.acme)


def test_strict_works_where_functions_are_granted_to_nobody_by_default(notes: Notes, application: Engine) -> None:
    notes.database.execute(
        "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC",
        enable_rls("note", role=notes.database.role, strict=True),
    )

    with as_tenant(application, notes.acme) as connection:
        assert notes.seen(connection) == notes.of(notes.acme)
    notes.database.execute("ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC")


def test_strict_may_be_switched_on_and_off(notes: Notes, application: Engine) -> None:
    for strict in (True, True, False):
        notes.database.execute(enable_rls("note", role=notes.database.role, strict=strict))

    with application.begin() as connection:
        assert notes.seen(connection) == []
        assert connection.scalar(text("SELECT to_regproc('note_organization_id_tenant')")) is None


# --- again, and undone -------------------------------------------------------------------------------------------

PROTECTION = text(
    "SELECT relrowsecurity, relforcerowsecurity, "
    "(SELECT array_agg(policyname::text ORDER BY policyname) FROM pg_policies WHERE tablename = relname), "
    "(SELECT count(*) FROM pg_indexes WHERE tablename = relname AND indexdef LIKE '%(organization_id)') "
    "FROM pg_class WHERE relname = 'note'"
)


def protection(database: TenantDatabase) -> tuple[Any, ...]:
    """Row security enabled, forced, the policies, and the number of indexes on the organization."""
    with database.owner.connect() as connection:
        return tuple(connection.execute(PROTECTION).one())


def test_enabling_again_changes_nothing(notes: Notes, application: Engine) -> None:
    once = protection(notes.database)

    notes.database.execute(enable_rls("note", role=notes.database.role))

    assert once == protection(notes.database) == (True, True, ["rhesis_tenant", "rhesis_tenant_floor"], 1)
    with as_tenant(application, notes.globex) as connection:
        assert notes.seen(connection) == notes.of(notes.globex)


def test_disabling_undoes_it_and_may_be_repeated(notes: Notes, application: Engine) -> None:
    for _ in range(2):
        notes.database.execute(disable_rls("note"))

    assert protection(notes.database) == (False, False, None, 0)
    with application.connect() as connection:
        assert notes.seen(connection) == ALL


@pytest.mark.parametrize("options", [{}, {"index_columns": ["body", "id"]}, {"index_columns": None}], ids=str)
def test_disabling_leaves_nothing_of_strict_policies_and_their_index(notes: Notes, options: Any) -> None:
    leftovers = text(
        "SELECT indexname FROM pg_indexes WHERE tablename = 'note' AND indexname <> 'note_pkey' "
        "UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    )
    notes.database.execute(disable_rls("note"), enable_rls("note", role=notes.database.role, strict=True, **options))

    notes.database.execute(disable_rls("note", **options))

    assert protection(notes.database) == (False, False, None, 0)
    with notes.database.owner.connect() as connection:
        assert connection.scalars(leftovers).all() == []


def test_disabled_and_enabled_again_it_protects_again(notes: Notes, application: Engine) -> None:
    notes.database.execute(disable_rls("note"))

    notes.database.execute(enable_rls("note", role=notes.database.role))

    with application.connect() as connection:
        assert notes.seen(connection) == []


# --- other tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column_type", "mine", "theirs"),
    [
        ("uuid", "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"),
        ("text", "acme", "globex"),
        ("integer", "1", "2"),
        ("bigint", "5000000000", "5000000001"),
    ],
)
def test_organizations_may_be_uuids_text_or_numbers(
    tenant_database: TenantDatabase, application: Engine, column_type: str, mine: str, theirs: str
) -> None:
    tenant_database.execute(
        f"CREATE TABLE note (organization_id {column_type}, body text)",
        f"GRANT SELECT, INSERT ON note TO {quote_identifier(tenant_database.role)}",
        f"INSERT INTO note VALUES ('{mine}', 'mine'), ('{theirs}', 'theirs')",
        enable_rls("note", role=tenant_database.role, column_type=column_type),
    )
    bodies = text("SELECT body FROM note")

    with as_tenant(application, TenantContext(mine)) as connection:
        with_a_tenant = connection.scalars(bodies).all()
    with application.begin() as connection:
        without_a_tenant = connection.scalars(bodies).all()
    with refused(application) as connection:
        set_tenant(connection, mine)
        connection.exec_driver_sql(f"INSERT INTO note VALUES ('{theirs}', 'smuggled')")

    assert (with_a_tenant, without_a_tenant) == (["mine"], [])


def test_schema_column_and_setting_may_have_names_of_their_own(
    tenant_database: TenantDatabase, application: Engine
) -> None:
    role = quote_identifier(tenant_database.role)
    table, options = "Back Office.My Notes", {"column": "Tenant Id"}
    tenant_database.execute(
        'CREATE SCHEMA "Back Office"',
        'CREATE TABLE "Back Office"."My Notes" ("Tenant Id" uuid, body text)',
        f'GRANT USAGE ON SCHEMA "Back Office" TO {role}; GRANT SELECT ON "Back Office"."My Notes" TO {role}',
        "INSERT INTO \"Back Office\".\"My Notes\" VALUES ('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'mine')",
    )
    bodies = text('SELECT body FROM "Back Office"."My Notes"')

    def seen(setting: str) -> list[str]:
        with application.begin() as connection:
            set_tenant(connection, "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", setting)
            return list(connection.scalars(bodies))

    tenant_database.execute(enable_rls(table, role=tenant_database.role, setting="crm.tenant", **options))
    enabled = (seen("crm.tenant"), seen(ORGANIZATION_SETTING))
    tenant_database.execute(disable_rls(table, **options))
    disabled = seen("crm.other")

    assert (enabled, disabled) == ((["mine"], []), ["mine"])


def test_a_table_with_the_longest_possible_name_gets_its_index_too(tenant_database: TenantDatabase) -> None:
    table = "n" * 63
    tenant_database.execute(f"CREATE TABLE {table} (organization_id uuid, body text)")

    tenant_database.execute(enable_rls(table, role=tenant_database.role))

    with tenant_database.owner.connect() as connection:
        indexes = connection.scalar(text("SELECT count(*) FROM pg_indexes WHERE tablename = :t"), {"t": table})
    assert indexes == 1
    tenant_database.execute(disable_rls(table))


def test_a_table_in_use_is_not_waited_for_without_end(notes: Notes) -> None:
    with notes.database.owner.begin() as reader:
        reader.execute(text("SELECT count(*) FROM note"))

        with pytest.raises(DBAPIError) as error:
            notes.database.execute(
                enable_rls("note", role=notes.database.role).replace("lock_timeout = '3s'", "lock_timeout = '100ms'")
            )

    assert getattr(error.value.orig, "sqlstate", None) == "55P03"  # lock_not_available


# --- the plan ----------------------------------------------------------------------------------------------------


def plan_nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from plan_nodes(child)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM note",
        "SELECT body FROM note LIMIT 20",
        "UPDATE note SET body = 'x'",
        "DELETE FROM note",
    ],
)
def test_a_tenants_query_uses_the_index_and_reads_the_setting_once(
    tenant_database: TenantDatabase, application: Engine, query: str
) -> None:
    tenant_database.execute(
        "CREATE TABLE note (organization_id integer, body text)",
        f"GRANT SELECT, UPDATE, DELETE ON note TO {quote_identifier(tenant_database.role)}",
        "INSERT INTO note SELECT mod(number, 200), repeat('x', 100) FROM generate_series(1, 20000) AS number",
        enable_rls("note", role=tenant_database.role, column_type="integer"),
        "ANALYZE note",
    )

    with as_tenant(application, TenantContext(7)) as connection:
        (explained,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON, VERBOSE) {query}").scalar_one()

    nodes = list(plan_nodes(explained["Plan"]))
    scans = [node for node in nodes if node.get("Relation Name") == "note" and "Scan" in node["Node Type"]]
    assert {node["Index Name"] for node in nodes if "Index Name" in node} == {"note_organization_id_rls"}
    assert "Seq Scan" not in {node["Node Type"] for node in scans}
    # Each reading of the setting is a node of its own, run before the scan; the scan only compares.
    readings = [node for node in nodes if "current_setting" in json.dumps(node.get("Output", []))]
    assert readings and {node["Parent Relationship"] for node in readings} == {"InitPlan"}
    assert all("current_setting" not in json.dumps({**node, "Plans": []}) for node in nodes if node not in readings)
