"""What the two users do over HTTP: launch, follow, fetch, and try to see each other's work."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any, Self

import httpx2 as httpx

from ..states import TERMINAL
from .errors import DemoError
from .example import DemoUser

__all__ = ["Account", "Launched", "Outcome", "Watched", "follow", "watch"]


@dataclasses.dataclass(frozen=True, slots=True)
class Launched:
    """What one user has launched."""

    runs: tuple[str, ...]
    tasks: tuple[str, ...]  #: all tasks but the two that fail
    slow: str  #: one of them, which reports its progress
    flaky: str
    broken: str

    @property
    def all_tasks(self) -> tuple[str, ...]:
        return (*self.tasks, self.flaky, self.broken)


@dataclasses.dataclass(frozen=True, slots=True)
class Watched:
    """What was seen of a user's slow task while it ran."""

    progress: tuple[dict[str, Any], ...]  #: by its own user, each once
    is_hidden: bool  #: from the other one, each time


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How one user's work ended."""

    user: DemoUser
    statuses: dict[str, dict[str, Any]]
    reports: list[dict[str, Any]]
    watched: Watched

    def count(self, state: str) -> int:
        return sum(status["state"] == state for status in self.statuses.values())

    @property
    def retried(self) -> int:
        return sum(status["retries"] > 0 for status in self.statuses.values())


class Account:
    """One user's access to the API."""

    def __init__(self, url: str, user: DemoUser) -> None:
        self.user = user
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {user.token}"}, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def _json(self, response: httpx.Response) -> Any:
        if not response.is_success:
            raise DemoError(
                f"{response.request.method} {response.request.url.path}: {response.status_code} {response.text}"
            )
        return response.json()

    def get(self, path: str) -> Any:
        return self._json(self.http.get(path))

    def post(self, path: str, body: Any = None) -> Any:
        return self._json(self.http.post(path, json=body))

    def launch(self) -> Launched:
        """A run of each test set, and the examples; the slow one last, so that nothing waits for it."""
        runs, tasks = [], []
        for test_set in self.get("/test-sets"):
            if test_set["tests"]:
                started = self.post(f"/test-sets/{test_set['id']}/runs")
                runs.append(started["run_id"])
                tasks += [started["task_id"], *started["part_task_ids"]]
        tasks.append(self.post("/examples/word-count", {"text": "the tenant travels with the work"})["task_id"])
        flaky, broken, slow = (self.post(f"/examples/{name}")["task_id"] for name in ("flaky", "broken", "slow"))
        return Launched(tuple(runs), (*tasks, slow), slow, flaky, broken)

    def status(self, task_id: str) -> dict[str, Any]:
        status: dict[str, Any] = self.get(f"/tasks/{task_id}")
        return status

    def listed(self) -> list[str]:
        """All tasks of the organization, page by page."""
        found: list[str] = []
        cursor = ""
        while True:
            page = self.get(f"/tasks/?limit=20{cursor}")
            found += [task["task_id"] for task in page["items"]]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    def outcome(self, launched: Launched, watched: Watched) -> Outcome:
        """Everything that was launched, as it ended."""
        return Outcome(
            self.user,
            {task_id: self.status(task_id) for task_id in launched.all_tasks},
            [self.get(f"/runs/{run_id}") for run_id in launched.runs],
            watched,
        )

    def sees_nothing_of(self, other: Launched) -> bool:
        """Whether another organization's runs and tasks answer exactly as ids that do not exist."""
        paths = [("/runs", run_id) for run_id in other.runs] + [("/tasks", task_id) for task_id in other.all_tasks]
        return bool(paths) and all(self.knows_nothing_of(*each) for each in paths)

    def knows_nothing_of(self, path: str, id_: str) -> bool:
        """Whether an id answers exactly as one that does not exist."""
        one, two = self.http.get(f"{path}/{id_}"), self.http.get(f"{path}/{uuid.uuid4()}")
        return one.status_code == two.status_code == 404 and one.content == two.content


def follow(
    account: Account, launched: Launched, on_progress: Callable[[int, int], None], timeout: float = 120.0
) -> None:
    """Wait until all that a user launched has ended, telling how many have.

    Raises:
        DemoError: it takes longer than ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    waiting = list(launched.all_tasks)
    total = len(waiting)
    while waiting:
        waiting = [task_id for task_id in waiting if account.status(task_id)["state"] not in TERMINAL]
        on_progress(total - len(waiting), total)
        if waiting and time.monotonic() > deadline:
            raise DemoError(
                f"{len(waiting)} of {total} tasks of {account.user.id} did not end within {timeout:g} seconds"
            )
        time.sleep(0.2 if waiting else 0)


def watch(
    account: Account,
    other: Account,
    task_id: str,
    on_progress: Callable[[dict[str, Any]], None],
    timeout: float = 120.0,
) -> Watched:
    """Tell each progress of a user's task until it ends, and let the other user try to see it each time.

    Raises:
        DemoError: it takes longer than ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    seen: list[dict[str, Any]] = []
    is_hidden = True
    while True:
        status = account.status(task_id)
        progress = status["progress"]
        if progress is not None and progress not in seen:
            on_progress(progress)
            if status["state"] == "started":
                seen.append(progress)
                is_hidden &= other.knows_nothing_of("/tasks", task_id)
        if status["state"] in TERMINAL:
            return Watched(tuple(seen), is_hidden)
        if time.monotonic() > deadline:
            raise DemoError(f"the slow task of {account.user.id} did not end within {timeout:g} seconds")
        time.sleep(0.2)
