"""The page about asynchronous tasks does what it says, on a real server."""

from __future__ import annotations

import importlib
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from rhesis_tasks import TenantContext, tenant_scope, unconfigure
from rhesis_tasks.loops import close_loops
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.testing import TenantDatabase

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "async-tasks.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


class Shop(BaseHTTPRequestHandler):
    """Sends everybody away once, and says for how long."""

    seen: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        first = self.path not in self.seen
        self.seen.add(self.path)
        self.send_response(429 if first else 200)
        if first:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"42")

    def log_message(self, *_: Any) -> None: ...


def test_the_code_of_the_page_runs(
    tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    role = tenant_database.role
    for table, columns in (("orders", "item text"), ("prices", "url text, body text")):
        default = "organization_id text NOT NULL DEFAULT current_setting('app.current_organization')"
        tenant_database.execute(
            f"CREATE TABLE {table} ({default}, {columns})",
            f'GRANT SELECT, INSERT ON {table} TO "{role}"',
            enable_rls(table, role=role, column_type="text"),
        )
    monkeypatch.setenv("DATABASE_URL", tenant_database.url)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "async_page.py").write_text("\n".join(CODE))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        page = importlib.import_module("async_page")
        urls = [f"http://127.0.0.1:{server.server_port}/{number}" for number in range(20)]
        with tenant_scope(TenantContext("acme", "ann")):
            assert page.fetch_prices.apply((urls,)).get() == 20
            assert page.count_orders.apply().get() == 0
            assert page.crawl.apply((["a"],)).get() == ["a"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        close_loops()
        module = sys.modules.pop("async_page", None)
        if module is not None:
            unconfigure(module.app)
