"""Beside Sentry, OpenTelemetry and a second application: the tenant arrives, and so does what is theirs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rhesis_tasks.processes import child, python
from rhesis_tasks.testing import new_tenant_database, running_worker

for library in ("sentry_sdk", "opentelemetry.sdk", "opentelemetry.instrumentation.celery"):
    pytest.importorskip(library)

HERE = Path(__file__).parent
TENANTS = {"tenant-a": ("ann", "project-a"), "tenant-b": ("bob", None)}
OTHER_TENANT = {"tenant-a": "tenant-b", "tenant-b": "tenant-a"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a launcher and a worker have left behind."""

    found: dict[str, Any]  #: what the launcher printed
    folder: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def spans(self, role: str, organization: str) -> list[dict[str, Any]]:
        """OpenTelemetry's spans of the trace that the tenant's launches are in."""
        trace = "0x" + self.found["traces"][organization]["otel"]
        return [span for span in self.lines(f"{role}-otel") if span["context"]["trace_id"] == trace]

    def events(self, role: str, organization: str) -> list[dict[str, Any]]:
        """Sentry's transactions and errors of the trace that the tenant's launches are in."""
        trace = self.found["traces"][organization]["sentry"]
        events = [line["payload"] for line in self.lines(f"{role}-sentry") if line["type"] in ("event", "transaction")]
        return [event for event in events if event["contexts"]["trace"]["trace_id"] == trace]


@pytest.fixture(scope="module")
def database_url(postgres_url: str) -> Iterator[str]:
    with new_tenant_database(postgres_url) as database:
        yield database.url


@pytest.fixture(scope="module", params=["before-prefork", "after-prefork", "before-threads", "after-threads"])
def run(request: pytest.FixtureRequest, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The others are set up before configure(), or after everything, in the launcher and in the worker."""
    order, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    env = {"DATABASE_URL": database_url, "OTHERS_ORDER": order, "OTHERS_FOLDER": str(folder)}
    launcher = python("-W", "error::RuntimeWarning", "-c", "import others_tasks; others_tasks.main()")
    with (
        running_worker("others_tasks:app", cwd=HERE, pool=pool, env={**env, "OTHERS_ROLE": "worker"}) as worker,
        child("launcher", launcher, cwd=HERE, env={**env, "OTHERS_ROLE": "launcher"}) as launching,
    ):
        assert launching.process.wait(90) == 0, launching.finished_output() + worker.output
        printed = launching.finished_output().splitlines()[-1]
    return Run(json.loads(printed), folder)  # the worker has ended, so that all is in the files


CASES = {
    "delay": [0],
    "apply_async": [0],
    "send_task": [0],
    "launch_with_context": [0],
    "policy": [2],
    "retry": [2],
    "chain": [0, 0, 0],
    "chord": [0, 0, 0],
    "bound chord": [0, 2, 0],
    "replace": [0],
}  # the retries of each part


@pytest.mark.parametrize("organization", TENANTS)
def test_the_context_reaches_every_body_beside_sentry_and_opentelemetry(run: Run, organization: str) -> None:
    saw = run.found["saw"][organization]
    user, project = TENANTS[organization]
    mine = {"organization": organization, "user": user, "project": project, "request_id": f"request-of-{organization}"}

    for case, retries in CASES.items():
        assert [{key: part[key] for key in mine} for part in saw[case]] == [mine] * len(retries), case
        assert sorted(part["retries"] for part in saw[case]) == sorted(retries), case


@pytest.mark.parametrize("organization", TENANTS)
def test_error_callbacks_have_the_context_too(run: Run, organization: str) -> None:
    notes = [note for note in run.lines("worker-callbacks") if note["organization"] == organization]

    assert sorted(note["case"] for note in notes) == ["link_error", "link_error of three arguments"]
    assert {note["request_id"] for note in notes} == {f"request-of-{organization}"}


@pytest.mark.parametrize("organization", TENANTS)
@pytest.mark.parametrize("library", ["sentry", "otel"])
def test_a_trace_goes_on_in_every_body(run: Run, organization: str, library: str) -> None:
    trace = run.found["traces"][organization][library]
    saw = {case: parts for case, parts in run.found["saw"][organization].items() if case in CASES}
    notes = [note for note in run.lines("worker-callbacks") if note["organization"] == organization]

    assert {case: {part[library] for part in parts} for case, parts in saw.items()} == {case: {trace} for case in CASES}
    assert {note[library] for note in notes} == {trace}


def test_nothing_of_a_tenant_is_left_for_work_of_nobody(run: Run) -> None:
    traces = {trace for traces in run.found["traces"].values() for trace in traces.values()}

    assert len(run.found["bare"]) == 6
    for saw in run.found["bare"]:
        assert (saw["organization"], saw["user"], saw["project"], saw["request_id"]) == (None, None, None, None)
        assert not traces & {saw["sentry"], saw["otel"]}


@pytest.mark.parametrize("organization", TENANTS)
def test_what_is_told_of_one_tenants_work_does_not_name_another(run: Run, organization: str) -> None:
    for role in ("launcher", "worker"):
        spans, events = run.spans(role, organization), run.events(role, organization)
        assert spans
        assert events
        assert OTHER_TENANT[organization] not in json.dumps([spans, events])


@pytest.mark.parametrize("organization", TENANTS)
def test_an_error_is_reported_to_sentry_once_and_retries_are_not(run: Run, organization: str) -> None:
    errors = [
        error for event in run.events("worker", organization) for error in event.get("exception", {}).get("values", [])
    ]

    assert [(error["type"], error["value"]) for error in errors] == [("ValueError", f"broken for {organization}")]


@pytest.mark.parametrize("organization", TENANTS)
def test_opentelemetrys_span_of_a_task_names_the_tenant(run: Run, organization: str) -> None:
    user, project = TENANTS[organization]
    expected = {"rhesis.organization_id": organization, "enduser.id": user, "rhesis.project_id": project}
    spans = [span for span in run.spans("worker", organization) if span["name"].startswith("run/others_tasks.")]

    assert len(spans) > sum(map(len, CASES.values()))
    for span in spans:
        assert {name: span["attributes"].get(name) for name in expected} == expected, span["name"]


def test_a_second_application_in_the_process_is_untouched(run: Run) -> None:
    notes = run.lines("launcher-second")

    assert sorted(note["case"] for note in notes) == ["from a task"] * 2 + ["from the launcher"] * 2
    for note in notes:
        assert "rhesis_tasks" not in note["request"]
        assert "rhesis_tasks" not in (note["headers"] or {})
        assert not {"organization_id", "user_id", "rhesis_tasks_activation"} & set(note["request"])
        assert (note["organization"], note["request_id"]) == (None, None)
