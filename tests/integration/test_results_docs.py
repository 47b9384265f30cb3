"""The page about results does what it says, with a real worker."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from rhesis_tasks.processes import child, python

if TYPE_CHECKING:
    from rhesis_tasks.testing import StartWorker, TenantDatabase

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text()
SHOP, *CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)

# What the page says of the routes that its code has made.
USE = """
import json
from fastapi.testclient import TestClient

ann, gus = (TestClient(api, headers={"Authorization": f"Bearer {token}"}) for token in USERS)
listed = ann.get("/tasks/", params={"state": "success"}).json()
assert [item["task_id"] for item in listed["items"]] == [result.id] and listed["next"] is None
shown = ann.get(f"/tasks/{result.id}").json()
assert (shown["state"], shown["result"], shown["user_id"]) == ("success", 3, "ann")
events = ann.get(f"/tasks/{result.id}/events")
assert events.headers["content-type"].startswith("text/event-stream")
name, number, data = (line.partition(": ")[2] for line in events.text.splitlines()[:3])
assert (name, number, json.loads(data)) == ("end", "end", shown)
assert gus.get(f"/tasks/{result.id}/events").status_code == 404
assert ann.get(f"/tasks/{result.id}/tree").json() == {"task": shown, "children": []}
assert ann.post(f"/tasks/{result.id}/cancel").json() == {"outcome": "ended"}
assert ann.post(f"/tasks/{result.id}/cancel?terminate=true").status_code == 403
assert gus.get(f"/tasks/{result.id}").status_code == 404
assert gus.get("/tasks/").json() == {"items": [], "next": None}
assert set(shown) == FIELDS, set(shown) ^ FIELDS
print("done")
"""
[EXAMPLE] = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FIELDS = set(re.findall(r'"(\w+)":', EXAMPLE)) - {"done", "total", "message"}


def test_the_code_of_the_page_runs(tenant_database: TenantDatabase, start_worker: StartWorker, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    code = "\n".join(CODE).replace("shop_app", tenant_database.role)
    (tmp_path / "page.py").write_text(f"FIELDS = {FIELDS}\n{code}\n{USE}")
    environment = {"DATABASE_URL": tenant_database.url, "OWNER_DATABASE_URL": tenant_database.owner_url}
    start_worker("shop", pool="solo", env=environment)

    with child("the page", python("page.py"), env=environment, cwd=tmp_path) as page:
        try:
            status = page.process.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the page did not end within 60 seconds: {page.output}") from None
        output = page.finished_output()

    assert status == 0, output
    assert output.endswith("done\n")
