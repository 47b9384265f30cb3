"""A policy costs no more than the WHERE it stands for: the plans are the same, on a million rows of a hundred tenants.

Plans are compared, not times: which nodes, which indexes, in which order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from servers import ON_BOTH_SERVERS
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks.rls import ORGANIZATION_SETTING, enable_rls
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

pytestmark = ON_BOTH_SERVERS

TENANT = 42


@pytest.fixture(scope="module")
def million(postgres_url: str) -> Iterator[TenantDatabase]:
    """A database with a million rows of a hundred tenants in ``reading``, and a hundred thousand in ``sensor``."""
    with new_tenant_database(postgres_url) as database:
        database.execute(
            "CREATE TABLE reading (organization_id int, id int, sensor_id int, taken_at int, value int)",
            "INSERT INTO reading SELECT n / 10000, n, n / 10, n::bigint * 7919 % 1000000, n % 97 "
            "FROM generate_series(0, 999999) AS n",
            "ALTER TABLE reading ADD PRIMARY KEY (organization_id, id)",
            "CREATE TABLE sensor (organization_id int, id int, name text, PRIMARY KEY (organization_id, id))",
            "INSERT INTO sensor SELECT n / 1000, n, 'sensor ' || n FROM generate_series(0, 99999) AS n",
            f"GRANT SELECT, UPDATE, DELETE ON reading, sensor TO {quote_identifier(database.role)}",
        )
        yield database


@pytest.fixture(scope="module", params=[False, True], ids=["", "strict"])
def protected(million: TenantDatabase, request: pytest.FixtureRequest) -> TenantDatabase:
    """The database with both tables under row-level security, by plain or strict policies."""
    for table, further in {"reading": ["taken_at"], "sensor": None}.items():
        million.execute(
            enable_rls(table, role=million.role, column_type="integer", index_columns=further, strict=request.param)
        )
    with million.owner.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql("VACUUM ANALYZE reading, sensor")  # index-only scans need the visibility map
    return million


def connected(url: URL) -> Iterator[Connection]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(
            text("SELECT set_config(:setting, :tenant, true)"), {"setting": ORGANIZATION_SETTING, "tenant": str(TENANT)}
        )
        yield connection
    engine.dispose()


@pytest.fixture
def application(protected: TenantDatabase) -> Iterator[Connection]:
    """The application's connection, with the tenant, in a transaction that is rolled back."""
    yield from connected(database_url(protected.url))


@pytest.fixture
def unbound(protected: TenantDatabase) -> Iterator[Connection]:
    """A superuser's, whom no policy binds."""
    yield from connected(protected.admin.url.set(database=protected.owner.url.database))


def shape(plan: dict[str, Any]) -> list[Any]:
    """The nodes of a plan with their relations and indexes, without the subplans that read the setting."""
    names = ("Node Type", "Relation Name", "Index Name", "Join Type", "Parallel Aware", "Strategy")
    below = [shape(child) for child in plan.get("Plans", []) if child["Parent Relationship"] != "InitPlan"]
    if "One-Time Filter" in plan:  # with two tables: compares the two readings, once, before all else
        return list(below[0])
    return [{name: plan[name] for name in names if name in plan}, *below]


def planned(connection: Connection, query: str) -> list[Any]:
    (explained,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {query}").scalar_one()
    return shape(explained["Plan"])


# {} is where the application that trusts policies writes nothing, and one that does not writes the condition.
QUERIES = {
    "a sum": "SELECT sum(value) FROM reading WHERE {}",
    "the newest": "SELECT * FROM reading WHERE {} ORDER BY taken_at DESC LIMIT 20",
    "one row": "SELECT * FROM reading WHERE id = 420007 AND {}",
    "a range": "SELECT count(*) FROM reading WHERE taken_at BETWEEN 1000 AND 2000 AND {}",
    "a join": "SELECT sensor.name, value FROM reading JOIN sensor USING (organization_id) "
    "WHERE reading.id = 420007 AND sensor.id = sensor_id AND {}",
    "an update": "UPDATE reading SET value = 0 WHERE id = 420007 AND {}",
    "a delete": "DELETE FROM reading WHERE taken_at < 1000 AND {}",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_policys_plan_is_that_of_an_explicit_condition(
    protected: TenantDatabase, unbound: Connection, application: Connection, query: str
) -> None:
    explicit = planned(unbound, query.format(f"organization_id = {TENANT}"))

    assert planned(application, query.format("true")) == explicit
    assert "Index" in str(explicit) and "Seq Scan" not in str(explicit)


def test_a_query_under_a_policy_may_be_parallel(
    protected: TenantDatabase, unbound: Connection, application: Connection
) -> None:
    query = "SELECT sum(value) FROM reading WHERE {}"
    for connection in (unbound, application):
        connection.exec_driver_sql("SET enable_indexscan = off; SET enable_bitmapscan = off")
    explicit = planned(unbound, query.format(f"organization_id = {TENANT}"))

    assert "Gather" in str(explicit)
    assert planned(application, query.format("true")) == explicit
