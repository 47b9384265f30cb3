"""What is asked about schedules that run a task for each tenant; knows nothing of Celery.

Each statement is one call of a function in ``sql/schedule_functions.sql``, which says what is decided there.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection

from ..settings import quote_identifier
from ..states import UNFINISHED
from .records import RecordTable

__all__ = ["ScheduleTable", "Step", "Verdict"]

Verdict: TypeAlias = Literal["decided", "launched", "running", "free"]

_UNFINISHED: Final = sorted(state.value for state in UNFINISHED)


@dataclasses.dataclass(slots=True, eq=False)
class Step:
    """Some tenants of a tick, while nobody else decides about its schedule."""

    verdicts: Mapping[str, Verdict]  #: by organization
    launched: dict[str, str] = dataclasses.field(default_factory=dict)
    """What was launched in the block: the task's id, by organization.  Kept when the block ends."""


class ScheduleTable:
    """What schedules have launched, next to the records.

    Args:
        records: where.
        has_messages: whether the broker's messages are there, too.
        lost_after: where they are not: the seconds after which a run that has not ended counts as lost.
    """

    def __init__(self, records: RecordTable, *, has_messages: bool, lost_after: float) -> None:
        self._records = records
        self._has_messages = has_messages
        self._lost_after = lost_after
        self._prefix = f"SELECT * FROM {quote_identifier(records.schema)}."  # noqa: S608

    def is_finished(self, schedule: str, due: datetime.datetime) -> bool:
        """Whether all tenants of a tick were decided about, or of a later one."""
        with self._records.transaction() as connection:
            return bool(self._call(connection, "schedule_finished", (schedule, due))[0]["schedule_finished"])

    def finish(self, schedule: str, due: datetime.datetime) -> None:
        """Say that all were."""
        with self._records.transaction() as connection:
            self._call(connection, "schedule_launched", (schedule, due, [""], [None]))

    @contextmanager
    def step(self, schedule: str, due: datetime.datetime, task_ids: Mapping[str, str]) -> Iterator[Step]:
        """Decide about some tenants of a tick; the block launches those that are free.

        What it has launched is kept, also if it fails then.

        Args:
            schedule: its name.
            due: the tick.
            task_ids: the id that a tenant's run has or would have, by organization.
        """
        values = (schedule, due, list(task_ids), list(task_ids.values()))
        with self._records.transaction() as connection:
            rows = self._call(
                connection, "schedule_begin", (*values, _UNFINISHED, self._has_messages, self._lost_after)
            )
            step = Step({row["organization_id"]: row["verdict"] for row in rows})
            error: BaseException | None = None
            try:
                yield step
            except Exception as caught:
                error = caught
            if step.launched:
                launched = (schedule, due, list(step.launched), list(step.launched.values()))
                self._call(connection, "schedule_launched", launched)
        if error is not None:
            raise error

    def forget(self, organization_id: str) -> int:
        """Forget a tenant that has left; of how many schedules it was."""
        with self._records.transaction() as connection:
            return int(self._call(connection, "schedule_forget", (organization_id,))[0]["schedule_forget"])

    def _call(self, connection: Connection, function: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        statement = f"{self._prefix}{function}({', '.join(['%s'] * len(values))})"
        return [dict(row) for row in connection.exec_driver_sql(statement, tuple(values)).mappings()]
