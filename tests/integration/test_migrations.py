"""Alembic migrations that put tables under row-level security: online, as a script, and with an asynchronous engine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.operations.ops import UpgradeOps
from sqlalchemy import text

from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.migrations import DisableRLSOp, EnableRLSOp
from rhesis_tasks.testing import TenantDatabase

SYNC = """\
from alembic import context
from sqlalchemy import create_engine, pool

import rhesis_tasks.migrations  # noqa: F401

url = context.config.attributes["url"]
if context.is_offline_mode():
    context.configure(url=url, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url, poolclass=pool.NullPool).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
"""

ASYNC = """\
import asyncio

from alembic import context
from sqlalchemy import pool
from sqlalchemy.ext.asyncio import create_async_engine

import rhesis_tasks.migrations  # noqa: F401


def migrate(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()


async def main():
    engine = create_async_engine(context.config.attributes["url"], poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


asyncio.run(main())
"""

REVISION = """\
import sqlalchemy as sa
from alembic import context, op
from rhesis_tasks.ddl import DisableRLS, EnableRLS

revision = "0001"
down_revision = None
RLS = {"role": context.config.attributes["role"], "column_type": "text", "index_columns": ["body"], "strict": True}


def upgrade():
    op.create_table("note", sa.Column("organization_id", sa.Text), sa.Column("body", sa.Text))
    op.enable_rls("note", **RLS)
    op.create_table("other", sa.Column("organization_id", sa.Text), sa.Column("body", sa.Text))
    op.enable_rls("other", **RLS)
    op.disable_rls("other", **RLS)
    op.create_table("typed", sa.Column("organization_id", sa.Text), sa.Column("body", sa.Text))
    op.execute(EnableRLS("typed", **RLS))  # what type checkers understand


def downgrade():
    op.disable_rls("note", **RLS)
    op.execute(DisableRLS("typed", index_columns=["body"]))
"""

STATE = text(
    "SELECT relname, relrowsecurity AND relforcerowsecurity, "
    "(SELECT count(*) FROM pg_policies WHERE tablename = relname), "
    "(SELECT count(*) FROM pg_indexes WHERE tablename = relname), "
    "(SELECT count(*) FROM pg_proc WHERE proname = relname || '_organization_id_tenant') "
    "FROM pg_class WHERE relname IN ('note', 'other', 'typed') AND relkind = 'r' ORDER BY relname"
)
ON = (True, 2, 1, 1)
OFF = (False, 0, 0, 0)


def state(database: TenantDatabase) -> dict[str, tuple[Any, ...]]:
    """For each table: whether it is protected, and how many policies, indexes and strict functions it has."""
    with database.owner.connect() as connection:
        return {row[0]: tuple(row[1:]) for row in connection.execute(STATE)}


def project(database: TenantDatabase, folder: Path, env: str, driver: str = "psycopg") -> Config:
    """A project of Alembic's with one migration."""
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(env)
    (folder / "versions" / "0001.py").write_text(REVISION)
    config = Config(output_buffer=io.StringIO())
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = database.owner.url.set(drivername=f"postgresql+{driver}")
    config.attributes["role"] = database.role
    return config


@pytest.mark.parametrize(
    ("env", "driver"), [(SYNC, "psycopg"), (ASYNC, "psycopg"), (ASYNC, "asyncpg")], ids=["sync", "async", "asyncpg"]
)
def test_a_migration_protects_a_table_and_takes_it_back(
    tenant_database: TenantDatabase, tmp_path: Path, env: str, driver: str
) -> None:
    config = project(tenant_database, tmp_path, env, driver)

    command.upgrade(config, "head")
    upgraded = state(tenant_database)
    command.downgrade(config, "base")

    assert upgraded == {"note": ON, "other": OFF, "typed": ON}
    assert state(tenant_database) == {"note": OFF, "other": OFF, "typed": OFF}


def test_the_script_of_a_migration_does_the_same(tenant_database: TenantDatabase, tmp_path: Path) -> None:
    config = project(tenant_database, tmp_path, SYNC)

    command.upgrade(config, "head", sql=True)
    assert state(tenant_database) == {}
    with tenant_database.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(config.output_buffer.getvalue(), execution_options={"no_parameters": True})

    assert state(tenant_database) == {"note": ON, "other": OFF, "typed": ON}


def test_the_operations_are_each_others_reverse() -> None:
    enable = EnableRLSOp("note", role="app", column="org", index_columns=["body"], strict=True)

    disable = UpgradeOps([enable]).reverse().ops[0]

    assert isinstance(disable, DisableRLSOp)
    assert disable.statements == DisableRLSOp("note", column="org", index_columns=["body"]).statements
    assert disable.reverse().statements == enable.statements


def test_a_disabling_that_names_no_role_cannot_be_reversed() -> None:
    with pytest.raises(ConfigurationError, match=r"Give it all arguments of op\.enable_rls"):
        DisableRLSOp("note").reverse()
