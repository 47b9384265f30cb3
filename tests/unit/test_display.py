"""What operators see: in 80 columns, and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import uuid
from typing import Any

import pytest

from rhesis_tasks.display import as_json, audit_line, count_table, message_lines, operation_lines
from rhesis_tasks.operations import AuditRecord, MessageCount, MessageFilter, MessageInfo, MessageState, Operation

TWO_HOURS_AGO = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=125)
UUID = "0d7c1e2a-5a0e-4a53-9f3b-2f0a3f1c9a77"
WAITING = MessageInfo(
    id=1,
    state=MessageState.WAITING,
    queue="celery",
    priority=0,
    deliveries=0,
    organization_id=UUID,
    user_id="ann",
    task_id=UUID,
    task_name="shop.add",
    worker=None,
    reason=None,
    published_at=TWO_HOURS_AGO,
    due_at=None,
    expires_at=None,
    claimed_at=None,
    died_at=None,
)


def message(**values: Any) -> MessageInfo:
    return dataclasses.replace(WAITING, **values)


def operation(**values: Any) -> Operation:
    done: dict[str, Any] = {
        "action": "purge",
        "operator": "olga",
        "filter": MessageFilter(organization_id="acme", states=[MessageState.WAITING]),
        "is_dry_run": False,
        "id": uuid.UUID(UUID),
        "counted_at": TWO_HOURS_AGO,
        "before": {MessageState.WAITING: 1200},
        "after": {MessageState.WAITING: 0},
        "counts": {"waiting": 1200, "records": 1100},
        "records": 1100,
    }
    return Operation(**{**done, **values})


def test_a_message_fits_80_columns_though_its_ids_are_long() -> None:
    lines = list(message_lines(message(state=MessageState.RUNNING, worker="celery@host:123", deliveries=2)))

    assert lines == [
        f"running     2h  {UUID}  celery",
        "                shop.add",
        f"                organization {UUID}, user ann",
        "                by celery@host:123; delivered 2 times",
    ]
    assert max(map(len, lines)) <= 80


def test_a_message_that_is_no_tasks_is_shown_too() -> None:
    lines = list(message_lines(message(organization_id=None, user_id=None, task_id=None, task_name=None)))

    assert [line.split() for line in lines] == [["waiting", "2h", "-", "celery"], ["-"], ["no", "organization"]]


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172_800, "2d"), (-5, "0s")],
)
def test_an_age_is_in_one_unit(seconds: int, age: str) -> None:
    published_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)

    assert next(message_lines(message(published_at=published_at))).split()[1] == age


def test_counts_are_a_table() -> None:
    counts = [
        MessageCount("celery", MessageState.WAITING, 1_000_000, TWO_HOURS_AGO),
        MessageCount(None, MessageState.DEAD, 1, TWO_HOURS_AGO),
    ]

    assert list(count_table(counts, "queue")) == [
        "state      messages  oldest  queue",
        "waiting   1,000,000      2h  celery",
        "dead              1      2h  -",
    ]


def test_what_was_done_is_told_with_the_counts_before_and_after() -> None:
    assert list(operation_lines(operation())) == [
        "purge of organization acme, states waiting",
        "                before     after",
        "  waiting        1,200         0",
        "  records        1,100",
        f"Done by olga, audit record {UUID}.",
    ]


def test_what_would_be_done_says_that_nothing_was_and_where_no_record_is_touched() -> None:
    lines = list(operation_lines(operation(is_dry_run=True, counts={"waiting": 1200}, records=None)))

    assert lines[1:3] == ["                before", "  waiting        1,200"]
    assert lines[-2:] == [
        "No record of a task is touched: results are kept elsewhere.",
        "Nothing was changed.  Do it with --yes.",
    ]


def test_a_command_for_what_was_counted_alone_is_the_last_line() -> None:
    lines = list(operation_lines(operation(is_dry_run=True), "rhesis-tasks tasks purge ..."))

    assert lines[-2:] == [
        "Nothing was changed.  Do it with --yes; without what is published from now on:",
        "  rhesis-tasks tasks purge ...",
    ]


def test_an_audit_record_is_two_lines() -> None:
    record = AuditRecord(
        id=1,
        operation=uuid.UUID(UUID),
        action="purge",
        operator="olga",
        login="shop_worker",
        filter={"states": ["dead"], "organization_id": ""},
        counts={"dead": 2},
        at=datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC),
    )

    assert audit_line(record).splitlines() == [
        "2026-01-31 12:00:00Z  purge by olga (shop_worker): dead 2",
        "                      organization (none), states dead",
    ]
    assert json.loads(as_json(record))["at"] == "2026-01-31T12:00:00+00:00"


def test_json_has_names_for_states_and_ids_as_text() -> None:
    parsed = json.loads(as_json({"message": message(), "done": operation().before, "id": uuid.UUID(UUID)}))

    assert parsed["message"]["state"] == "waiting"
    assert parsed["done"] == {"waiting": 1200}
    assert parsed["id"] == UUID
