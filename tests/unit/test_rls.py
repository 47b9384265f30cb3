"""The text of the row-level-security DDL; what it does is tested on a real server."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.rls import disable_rls, disable_rls_statements, enable_rls, enable_rls_statements


def index_of(sql: str) -> str:
    """The name, still quoted, of the index that a statement creates or drops."""
    found = re.search(r'INDEX IF (?:NOT )?EXISTS ((?:"(?:[^"]|"")+"\.?)+)', sql)
    assert found is not None
    return found[1]


def test_a_plain_table_gets_forced_row_level_security_for_the_role() -> None:
    sql = enable_rls("orders", role="app")

    assert 'ALTER TABLE "orders" FORCE ROW LEVEL SECURITY' in sql
    assert 'CREATE POLICY rhesis_tenant ON "orders" FOR ALL TO "app"' in sql
    assert 'CREATE POLICY rhesis_tenant_floor ON "orders" AS RESTRICTIVE FOR ALL TO PUBLIC' in sql
    condition = "(\"organization_id\" = (SELECT NULLIF(current_setting('app.current_organization', true), '')::uuid))"
    assert sql.count(f"USING {condition}") == sql.count(f"WITH CHECK {condition}") == 2


@pytest.mark.parametrize(
    ("table", "quoted"),
    [
        ("order", '"order"'),
        ("shop.orders", '"shop"."orders"'),
        ("Shop.Order Items", '"Shop"."Order Items"'),
        ('say "hi"', '"say ""hi"""'),
        ("x; DROP TABLE y; --", '"x; DROP TABLE y; --"'),
    ],
)
def test_every_statement_names_the_table_quoted(table: str, quoted: str) -> None:
    beside = ("SET LOCAL", "DROP INDEX", "DROP FUNCTION", "CREATE OR REPLACE FUNCTION", "GRANT EXECUTE")
    for all_statements in (enable_rls_statements(table, role="app", strict=True), disable_rls_statements(table)):
        statements = [each for each in all_statements if not each.startswith(beside)]
        assert len(statements) >= 4
        assert all(f" {quoted}" in statement for statement in statements)


def test_role_column_type_and_setting_are_the_ones_given() -> None:
    sql = enable_rls("orders", role='the "app"', column="Org Id", column_type="bigint", setting="my.org")

    assert 'TO "the ""app"""' in sql
    assert 'FROM PUBLIC, "the ""app"""' in sql
    assert "(\"Org Id\" = (SELECT NULLIF(current_setting('my.org', true), '')::bigint))" in sql
    assert 'ALTER COLUMN "Org Id" SET NOT NULL' in sql


@pytest.mark.parametrize(
    "table", ["orders", "shop.orders", "x" * 63, "é" * 31, "shop." + "x" * 60, 'q"' * 20, "s" * 63 + "." + "t" * 63]
)
def test_what_is_disabled_is_the_index_that_was_enabled(table: str) -> None:
    schema = table.rpartition(".")[0]

    created = index_of(enable_rls(table, role="app"))

    assert index_of(disable_rls(table)) == (f'"{schema}".' if schema else "") + created


@pytest.mark.parametrize("table", ["x" * 63, "x" * 60, "é" * 31])
def test_the_index_of_a_table_with_a_long_name_has_a_name_of_its_own(table: str) -> None:
    one, other = (
        index_of(enable_rls(table, role="app", column=column)) for column in ("organization_id", "organization_ref")
    )

    assert len({one, other, f'"{table}"'}) == 3
    assert len(one.strip('"').encode()) <= 63


@pytest.mark.parametrize("column_type", ["", "UUID", "jsonb", "uuid; DROP TABLE x", None])
def test_a_column_of_another_type_is_refused(column_type: Any) -> None:
    with pytest.raises(ConfigurationError, match="column_type must be one of bigint, integer, text, uuid"):
        enable_rls("orders", role="app", column_type=column_type)


@pytest.mark.parametrize("setting", ["", "org", ".org", "app.", "app.a.b", "app.x'y", "app org.x", "äpp.org", "1a.b"])
def test_a_setting_that_postgresql_would_not_take_is_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a setting is named like 'app\.current_organization'"):
        enable_rls("orders", role="app", setting=setting)


@pytest.mark.parametrize("options", [{}, {"index_columns": ["created_at"]}, {"strict": True}, {"index_columns": None}])
def test_the_text_is_the_statements_in_their_order(options: Any) -> None:
    statements = enable_rls_statements("orders", role="app", **options)

    assert enable_rls("orders", role="app", **options) == "".join(f"{each};\n" for each in statements)
    assert any("CREATE INDEX" in each for each in statements) == (options.get("index_columns", ()) is not None)


def test_further_columns_of_the_index_follow_the_organization_and_are_part_of_its_name() -> None:
    sql = enable_rls("orders", role="app", index_columns=["Created At", "id"])

    assert index_of(sql) == '"orders_organization_id_Created At_id_rls"'
    assert 'ON "orders" ("organization_id", "Created At", "id");' in sql
    assert index_of(disable_rls("orders", index_columns=["Created At", "id"])) == index_of(sql)


@pytest.mark.parametrize("table", ["", ".", "shop.", ".orders", "db.shop.orders", "x" * 64, "a\0b"])
def test_a_table_without_a_usable_name_is_refused(table: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not an SQL name|is named like"):
        enable_rls(table, role="app")
    with pytest.raises(ConfigurationError, match=r"is not an SQL name|is named like"):
        disable_rls(table)


def test_no_role_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="must name at least one role: the one that the application logs in"):
        enable_rls("orders", role=[])


@pytest.mark.parametrize("role", ["", None, 7, "x" * 64, ["app", ""], [None]])
def test_a_role_without_a_usable_name_is_refused(role: Any) -> None:
    with pytest.raises(ConfigurationError, match="is not an SQL name"):
        enable_rls("orders", role=role)
