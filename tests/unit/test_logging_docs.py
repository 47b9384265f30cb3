"""The code of the page about logging runs, and its recipes write what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("structlog")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logging.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
JSON = next(position for position, block in enumerate(BLOCKS) if "JsonFormatter" in block)

SAY = """
request_id.set("r-1")
with tenant_scope(TenantContext("acme", "ann")):
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("said", extra={"data": {"args": ["secret"]}})
"""
FIELDS = {
    "organization_id": "acme",
    "user_id": "ann",
    "task_id": "-",
    "task_name": "-",
    "root_id": "-",
    "request_id": "r-1",
}


def printed(*code: str, directory: Path) -> list[str]:
    """What code prints, after the page's up to the first recipe and its last."""
    script = directory / "logging_page.py"
    script.write_text("\n".join([*BLOCKS[:JSON], *BLOCKS[JSON + 2 :], *code]))
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    environ |= {"BROKER_URL": "memory://", "CELERY_RESULT_BACKEND": "cache+memory://"}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_the_code_of_the_page_prints_what_it_says(tmp_path: Path) -> None:
    lines = printed(directory=tmp_path)

    assert [re.search(r"\[org=.*", line)[0] for line in lines] == [  # type: ignore[index]
        "[org=- user=-] shop.orders: starting",
        "[org=acme user=ann] shop.orders: a request of acme's",
        "[org=acme user=support] shop.orders: on behalf of",
        "[org=- user=-] shop.orders: with its request",
    ]


def test_the_json_formatter_writes_the_fields_and_the_exception_and_no_arguments(tmp_path: Path) -> None:
    *_, line = printed(BLOCKS[JSON], 'write_json(logging.getLogger("shop"))', SAY, directory=tmp_path)

    written = json.loads(line)
    assert {name: written[name] for name in FIELDS} == FIELDS
    assert (written["level"], written["logger"], written["message"]) == ("ERROR", "shop.orders", "said")
    assert "ZeroDivisionError" in written["exception"]
    assert "secret" not in line


def test_structlogs_events_and_all_other_records_have_the_fields(tmp_path: Path) -> None:
    *_, event, record = printed(
        BLOCKS[JSON],
        BLOCKS[JSON + 1],
        'write_json(logging.getLogger("shop"))',
        'request_id.set("r-1")\n'
        'with tenant_scope(TenantContext("acme", "ann")):\n'
        '    structlog.get_logger("shop").info("counted", words=3, user_id="support")',
        SAY,
        directory=tmp_path,
    )

    counted = json.loads(event)
    assert {name: counted[name] for name in FIELDS} == {**FIELDS, "user_id": "support"}
    assert (counted["level"], counted["event"], counted["words"]) == ("info", "counted", 3)
    said = json.loads(record)
    assert {name: said[name] for name in FIELDS} == FIELDS
    assert (said["level"], said["event"]) == ("error", "said")
    assert "ZeroDivisionError" in said["exception"]
    assert "secret" not in record
