"""A Celery application beside Sentry, OpenTelemetry and a second application that is not configured.

Started as ``celery -A others_tasks:app``; :func:`main` runs in a process of its own, launches everything once for each
tenant and prints what came back.  ``OTHERS_ORDER`` says whether the libraries are set up before configure() or after
everything; what they send is appended to files in ``OTHERS_FOLDER`` that begin with ``OTHERS_ROLE``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import sentry_sdk
from celery import Celery, chain, chord
from celery.result import AsyncResult
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    TenantContext,
    configure,
    current_tenant,
    launch_with_context,
    register_context_var,
    tenant_scope,
)
from rhesis_tasks.processes import wait_until

TIMEOUT = 30
FOLDER = Path(os.environ["OTHERS_FOLDER"])
ROLE = os.environ["OTHERS_ROLE"]
TENANTS = [TenantContext("tenant-a", "ann", "project-a"), TenantContext("tenant-b", "bob")]


def append(kind: str, line: Any) -> None:
    """One write for each line, so that processes do not mix theirs."""
    with (FOLDER / f"{ROLE}-{kind}.jsonl").open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


class ToFile(Transport):
    """Where Sentry's envelopes go."""

    def capture_envelope(self, envelope: Envelope) -> None:
        for item in envelope.items:
            append("sentry", {"type": item.type, "payload": item.payload.json})


class SpansToFile(SpanExporter):
    """Where OpenTelemetry's spans go."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            append("otel", json.loads(span.to_json()))
        return SpanExportResult.SUCCESS


def set_up_the_others() -> None:
    sentry_sdk.init(
        dsn="http://key@localhost:9/1", transport=ToFile, traces_sample_rate=1.0, integrations=[CeleryIntegration()]
    )
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(SpansToFile()))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()


request_id: ContextVar[str] = ContextVar("request_id")
register_context_var(request_id, log=True)

first = os.environ["OTHERS_ORDER"] == "before"
if first:
    set_up_the_others()
app = Celery("others_tasks", set_as_current=True)
configure(app)
second = Celery("second", broker=os.environ["DATABASE_URL"], set_as_current=False)
second.conf.update(task_default_queue="second", task_ignore_result=True)


def seen(task: Any, case: str = "") -> dict[str, Any]:
    """What the body of a task knows."""
    tenant = current_tenant()
    sentry = sentry_sdk.get_current_span()
    return {
        "case": case,
        "organization": tenant and tenant.organization_id,
        "user": tenant and tenant.user_id,
        "project": tenant and tenant.project_id,
        "request_id": request_id.get(None),
        "retries": task.request.retries,
        "sentry": sentry and sentry.trace_id,
        "otel": format(trace.get_current_span().get_span_context().trace_id, "032x"),
    }


@app.task(base=BaseTask, bind=True)
def look(self: BaseTask, before: Any = None) -> list[dict[str, Any]]:
    """What it sees, after what the parts of the canvas before it saw."""
    earlier = [each for part in before or [] for each in (part if isinstance(part, list) else [part])]
    return [*earlier, seen(self)]


@app.task(base=BaseTask, bind=True, retry_policy=RetryPolicy(max_retries=3, base=0.01, retry_on=(ConnectionError,)))
def flaky(self: BaseTask) -> list[dict[str, Any]]:
    if self.request.retries < 2:
        raise ConnectionError("down")
    return [seen(self)]


@app.task(base=BaseTask, bind=True)
def retries_itself(self: BaseTask) -> list[dict[str, Any]]:
    if self.request.retries < 2:
        raise self.retry(countdown=0, headers={"mine": "1"} if self.request.retries else None)
    return [seen(self)]


@app.task(base=BaseTask, bind=True)
def replaced(self: BaseTask) -> list[dict[str, Any]]:
    raise self.replace(look.s())


@app.task(base=BaseTask, bind=True)
def broken(self: BaseTask) -> None:
    raise ValueError(f"broken for {self.tenant.organization_id}")


@app.task(base=BaseTask, bind=True)
def note_failure(self: BaseTask, failed: str) -> None:
    append("callbacks", seen(self, "link_error"))


@app.task(base=BaseTask)
def note_failure_here(request: Any, error: Any, traceback: Any) -> None:
    """Called by the worker itself, in the process where the task failed."""
    append("callbacks", seen(note_failure_here, "link_error of three arguments"))


@app.task(bind=True)
def plain(self: Any) -> list[dict[str, Any]]:
    """Insists on no tenant."""
    return [seen(self)]


@app.task(base=BaseTask, bind=True)
def launch_second(self: BaseTask) -> None:
    look_second.delay("from a task")


@second.task(bind=True)
def look_second(self: Any, case: str) -> None:
    append("second", {**seen(self, case), "request": sorted(vars(self.request)), "headers": self.request.headers})


if not first:
    set_up_the_others()


def launched(tenant: TenantContext) -> dict[str, AsyncResult[Any]]:
    """Everything once, for the active tenant."""
    failing = broken.s().on_error(note_failure.s()).on_error(note_failure_here.s())
    return {
        "delay": look.delay(),
        "apply_async": look.apply_async(headers={"mine": "1"}),
        "send_task": app.send_task("others_tasks.look"),
        "launch_with_context": launch_with_context(look, context=tenant),
        "policy": flaky.delay(),
        "retry": retries_itself.delay(),
        "chain": chain(look.s(), look.s(), look.s()).apply_async(),
        "chord": chord([look.s(), look.s()], look.s()).apply_async(),
        "bound chord": launch_with_context(chord([look.s(), flaky.s()], look.s()), context=tenant),
        "replace": replaced.delay(),
        "link_error": failing.apply_async(),
    }


def noted(name: str) -> int:
    path = FOLDER / f"{name}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def main() -> None:
    """Launch for both tenants, then without any, and print what the bodies saw."""
    # Not at the top: Sentry wraps a function that Celery's worker modules import by name.
    from celery.contrib.testing.worker import start_worker

    tracer = trace.get_tracer("launcher")
    started = []
    for tenant in TENANTS:
        with (
            tenant_scope(tenant),
            sentry_sdk.isolation_scope(),
            sentry_sdk.start_transaction(op="test", name=f"launch for {tenant.organization_id}") as transaction,
            tracer.start_as_current_span("launch") as span,
        ):
            token = request_id.set(f"request-of-{tenant.organization_id}")
            traces = {"sentry": transaction.trace_id, "otel": format(span.get_span_context().trace_id, "032x")}
            started.append((tenant, traces, launched(tenant)))
            look_second.delay("from the launcher")
            launch_second.delay()
            request_id.reset(token)
    bare = [plain.apply_async(headers={"rhesis_tasks": {"v": 1}}) for _ in range(6)]

    found: dict[str, Any] = {"traces": {}, "saw": {}}
    for tenant, traces, results in started:
        with tenant_scope(tenant):
            found["traces"][tenant.organization_id] = traces
            found["saw"][tenant.organization_id] = {
                case: result.get(timeout=TIMEOUT, propagate=case != "link_error") for case, result in results.items()
            }
    found["bare"] = [result.get(timeout=TIMEOUT)[0] for result in bare]
    wait_until("the error callbacks", lambda: noted("worker-callbacks") == 4, TIMEOUT)
    # The second application's worker runs here, beside the first application.
    with start_worker(second, pool="solo", perform_ping_check=False, shutdown_timeout=TIMEOUT):
        wait_until("the second application's tasks", lambda: noted("launcher-second") == 4, TIMEOUT)
    json.dump(found, sys.stdout, default=repr)
