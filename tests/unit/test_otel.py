"""The tenant on OpenTelemetry's spans."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from celery import Celery

from rhesis_tasks import BaseTask, TenantContext, tenant_scope
from rhesis_tasks.otel import mark_current_span
from rhesis_tasks.processes import child, python

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

ACME = TenantContext("acme", "ann", "apollo")
NAMES = {"rhesis.organization_id": "acme", "enduser.id": "ann", "rhesis.project_id": "apollo"}


class Spans:
    """A tracer, and the spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")

    def attributes(self) -> list[dict[str, Any]]:
        ended: tuple[ReadableSpan, ...] = self._exporter.get_finished_spans()
        return [dict(span.attributes or {}) for span in ended]


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def broken_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """A current span of somebody's that works no more."""

    class Broken(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            raise RuntimeError("no span today")

    monkeypatch.setattr(trace, "get_current_span", lambda: Broken(trace.INVALID_SPAN_CONTEXT))


@pytest.mark.parametrize(
    ("tenant", "expected"),
    [
        (ACME, NAMES),
        (TenantContext("acme", "ann"), {"rhesis.organization_id": "acme", "enduser.id": "ann"}),
        (TenantContext("acme"), {"rhesis.organization_id": "acme"}),
    ],
)
def test_the_current_span_gets_what_is_known_of_the_tenant(
    tenant: TenantContext, expected: dict[str, str], spans: Spans
) -> None:
    with tenant_scope(tenant), spans.tracer.start_as_current_span("work"):
        mark_current_span()

    assert spans.attributes() == [expected]


def test_without_a_tenant_a_span_stays_as_it_is(spans: Spans) -> None:
    with spans.tracer.start_as_current_span("work"):
        mark_current_span()

    assert spans.attributes() == [{}]


def test_the_span_in_which_a_body_runs_names_the_tenant_and_its_own_spans_are_left_alone(
    app: Celery, spans: Spans
) -> None:
    @app.task(base=BaseTask)
    def work() -> None:
        with spans.tracer.start_as_current_span("inner"), tenant_scope(TenantContext("globex")):
            pass

    with tenant_scope(ACME), spans.tracer.start_as_current_span("outer"):
        work.apply()

    inner, outer = spans.attributes()
    assert (inner, outer) == ({}, NAMES)


@pytest.mark.usefixtures("broken_span")
def test_a_span_that_fails_is_told_at_debug_and_changes_nothing(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rhesis_tasks.otel")

    @app.task(base=BaseTask)
    def work() -> int:
        return 42

    with tenant_scope(ACME):
        assert work.apply().get() == 42

    told = [record for record in caplog.records if record.name == "rhesis_tasks.otel"]
    assert [record.levelname for record in told] == ["DEBUG"]
    assert "no span today" in caplog.text


def test_a_module_that_is_not_fully_imported_yet_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", type(sys)("opentelemetry.trace"))

    with tenant_scope(ACME):
        mark_current_span()


def test_where_nobody_imports_opentelemetry_nothing_is_imported_or_asked() -> None:
    script = """
import sys
from rhesis_tasks import TenantContext, configure, tenant_scope
from rhesis_tasks.otel import mark_current_span

with tenant_scope(TenantContext("acme")):
    mark_current_span()
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry", "celery.worker"))))
"""
    with child("imports", python("-c", script)) as imports:
        assert imports.process.wait(30) == 0, imports.finished_output()

        # Nor Celery's worker, functions of which Sentry replaces before it is imported.
        assert imports.finished_output().strip() == "[]"
