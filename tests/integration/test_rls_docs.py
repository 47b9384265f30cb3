"""The page about row-level security does what it says, on a real server."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import text

from rhesis_tasks.rls import enable_rls
from rhesis_tasks.testing import TenantDatabase

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "row-level-security.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PROTECTED = text(
    "SELECT relname FROM pg_class WHERE relforcerowsecurity AND relnamespace = 'public'::regnamespace ORDER BY relname"
)


def protected(database: TenantDatabase) -> list[Any]:
    with database.owner.connect() as connection:
        return list(connection.scalars(PROTECTED))


def test_the_code_of_the_page_runs(
    tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OWNER_DATABASE_URL", tenant_database.owner_url)
    monkeypatch.setenv("DATABASE_URL", tenant_database.url)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rls_page.py").write_text("\n".join(CODE).replace("shop_app", tenant_database.role))

    page = importlib.import_module("rls_page")
    after_the_page = protected(tenant_database)
    with tenant_database.owner.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        page.upgrade()
    upgraded = protected(tenant_database)
    with tenant_database.owner.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        page.downgrade()
    page.sessions.dispose()
    page.owner.dispose()

    assert after_the_page == protected(tenant_database) == ["invoices", "orders", "parcels", "remarks"]
    assert upgraded == ["customers", *after_the_page]


def test_the_sql_of_the_page_is_what_is_emitted() -> None:
    assert f"```sql\n{enable_rls('orders', role='shop_app')}```" in PAGE
