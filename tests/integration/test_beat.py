"""Celery beat, which has no tenant: real beat, real worker."""

from __future__ import annotations

import json
from pathlib import Path

from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent


def test_a_schedule_launches_for_a_tenant_it_names_or_across_tenants_and_for_nobody_else(
    tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    file = tmp_path / "seen"
    file.touch()
    env = {"DATABASE_URL": tenant_database.url, "BEAT_FILE": str(file)}
    command = python("-m", "celery", "-A", "beat_tasks", "beat", "--schedule", str(tmp_path / "schedule"))

    def seen() -> set[tuple[str | None, ...]]:
        return {tuple(json.loads(line)) for line in file.read_text().splitlines() if line.endswith("]")}

    wanted = {
        ("sweep", None, None),
        ("by sweep", "acme", None),
        ("by sweep", "globex", None),
        ("by beat", "acme", "the scheduler"),
    }
    with (
        running_worker("beat_tasks", cwd=HERE, pool="threads", env=env),
        child("beat", command, env=env, cwd=HERE) as beat,
    ):
        beat.wait_for("task beat_tasks.digest needs a tenant")
        wait_until("all that the schedule launches", lambda: seen() >= wanted)
        assert beat.running, "what is refused does not stop it"

    assert seen() == wanted


def test_beat_and_its_schedule_log_json_with_the_fields_of_the_context(
    tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    env = {"DATABASE_URL": tenant_database.url, "BEAT_FILE": str(tmp_path / "seen"), "LOG_FORMAT": "json"}
    command = python(
        "-m", "celery", "-q", "-A", "beat_tasks", "beat", "-l", "INFO", "--schedule", str(tmp_path / "schedule")
    )
    with child("beat", command, env=env, cwd=HERE) as beat:
        beat.wait_for("Sending due task")
        beat.wait_for("task beat_tasks.digest needs a tenant")

    lines = [json.loads(line) for line in beat.finished_output().splitlines()]
    sent = next(line for line in lines if "Sending due task" in line["message"])
    assert lines[0]["message"] == "beat: Starting..."
    assert (sent["level"], sent["logger"], sent["process"]) == ("INFO", "celery.beat", "MainProcess")
    assert (sent["organization_id"], sent["user_id"]) == ("-", "-")
    assert any("needs a tenant" in line.get("exception", "") for line in lines)
