"""What workers do when they are told to stop tasks, each for its tenant; :func:`.status.stop_tasks` tells them.

Celery's own ``revoke`` knows ids alone, and two organizations may have tasks of the same id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from celery.utils.collections import LimitedSet
from celery.worker import state as worker_state
from celery.worker.control import control_command

from .status import STOP

__all__ = ["stopped"]

_log = logging.getLogger(__name__)

stopped: Final[Any] = LimitedSet(maxlen=50_000, expires=10_800.0)
"""Organization and id of tasks that are not to begin here: as many, and as long, as Celery remembers revoked ones."""


@control_command(name=STOP, visible=False)
def stop(state: Any, tasks: Sequence[Sequence[str | None]], terminate: bool = False) -> dict[str, Any]:
    """Begin with none of some tasks, and end those that run if that is wanted."""
    told = {(organization_id, task_id) for organization_id, task_id in tasks}
    stopped.update(told)
    ids = {task_id for _, task_id in told}
    requests: Any = worker_state.reserved_requests
    found = [each for each in list(requests) if each.id in ids and any((one, each.id) in told for one in _owners(each))]
    if terminate:
        for request in found:
            _log.info("terminating %s[%s]", request.name, request.id)
            with suppress(NotImplementedError):  # threads go on
                request.terminate(state.consumer.pool)
    return {"ok": [request.id for request in found]}


def _owners(request: Any) -> Sequence[str | None]:
    """Whose a request is; nobody's that could be told of, if it is no tenant-aware task's."""
    owners: Sequence[str | None] = getattr(request, "owners", ())
    return owners
