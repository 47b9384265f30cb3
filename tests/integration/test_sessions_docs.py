"""The page about sessions does what it says, on a real server."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

from rhesis_tasks import TenantContext, tenant_scope, unconfigure
from rhesis_tasks.sessions import sessions_of
from rhesis_tasks.testing import TenantDatabase

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sessions.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page_runs(
    tenant_database: TenantDatabase, superuser: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OWNER_DATABASE_URL", tenant_database.owner_url)
    monkeypatch.setenv("SYSTEM_DATABASE_URL", superuser.url.render_as_string(hide_password=False))
    monkeypatch.setenv("DATABASE_URL", tenant_database.url)
    monkeypatch.syspath_prepend(tmp_path)
    code = "\n".join(CODE).replace("shop_app", tenant_database.role).replace("from shop import add_order\n", "")
    (tmp_path / "sessions_page.py").write_text(code)

    try:
        page = importlib.import_module("sessions_page")
        with tenant_scope(TenantContext("acme", "ann")):
            assert page.ship_orders() == 2
            assert page.price_orders() == 2
            page.rename_order(2, "a rocket")
            assert page.report() == 2
    finally:
        module = sys.modules.pop("sessions_page", None)
        if module is not None:
            for sessions in (module.sessions, module.everything, sessions_of(module.app)):
                sessions.dispose()
            module.owner.dispose()
            unconfigure(module.app)
