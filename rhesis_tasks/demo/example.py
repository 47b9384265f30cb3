"""The example application as child processes: migrated, loaded, served, worked for."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx2 as httpx

from ..processes import Child, child, free_port, python, wait_until
from .database import DemoDatabase
from .errors import DemoError

__all__ = ["DemoUser", "Running", "example_folder", "load", "migrate", "running_example", "users_of"]


@dataclass(frozen=True, slots=True)
class DemoUser:
    """Somebody with a bearer token."""

    id: str
    organization_id: str
    token: str


@dataclass(frozen=True, slots=True)
class Running:
    """The example, up and ready."""

    url: str
    api: Child
    worker: Child


def example_folder() -> Path:
    """The example application: inside an installed package, or beside it in a checkout.

    Raises:
        DemoError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "example", package.parents[1] / "examples" / "fastapi_app"):
        if (folder / "app" / "main.py").is_file():
            return folder
    raise DemoError("the example application is not installed; install rhesis-tasks from its wheel or a checkout")


def _run(what: str, command: list[str], database: DemoDatabase, **env: str) -> str:
    """A step of the example's, to its end."""
    with child(what, command, env={**_environment(database), **env}, cwd=example_folder()) as step:
        try:
            code = step.process.wait(60)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{what} did not end within 60 seconds:\n{step.output}") from None
        output = step.finished_output()
        if code == 2:  # the user's input is at fault, and the output says how
            raise DemoError(output.strip(), exit_code=2)
        if code != 0:
            raise DemoError(f"{what} failed with exit code {code}:\n{output}")
        return output


def _environment(database: DemoDatabase) -> dict[str, str]:
    return {
        "DATABASE_URL": database.application_url,
        "RHESIS_TASKS_SCHEMA": database.library,
        # What the shell happens to have set is not for this application.
        "BROKER_URL": "",
        "CELERY_BROKER_URL": "",
        "CELERY_RESULT_BACKEND": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def migrate(database: DemoDatabase) -> None:
    """Create the example's tables, with row-level security, as their owner."""
    _run(
        "the migration",
        python("-m", "alembic", "upgrade", "head"),
        database,
        MIGRATION_DATABASE_URL=database.migration_url,
        APP_ROLE=database.role,
    )


def load(database: DemoDatabase, file: Path) -> str:
    """Load a JSON Lines file of test sets and tests, wholly or not at all.

    Raises:
        DemoError: a line of it is bad; the text names file, line and reason.
    """
    return _run("loading the input", python("-m", "app.load", str(file.resolve())), database)


def users_of(file: Path) -> list[DemoUser]:
    """A user with a new token for each of the first two organizations in a file that was loaded.

    Raises:
        DemoError: there is only one, so that nothing could be kept apart.
    """
    organizations: list[str] = []
    for line in file.read_text(encoding="utf-8").split("\n"):  # as the loader, and not at U+2028
        if line.strip():
            organization_id = str(UUID(json.loads(line)["organization_id"]))
            if organization_id not in organizations:
                organizations.append(organization_id)
    if len(organizations) < 2:
        raise DemoError(
            f"{file} has tests of one organization only; the demo needs two, to show that they are kept apart",
            exit_code=2,
        )
    return [
        DemoUser(f"user-{number}", organization_id, secrets.token_urlsafe(24))
        for number, organization_id in enumerate(organizations[:2], 1)
    ]


@contextmanager
def running_example(database: DemoDatabase, users: Iterable[DemoUser]) -> Iterator[Running]:
    """The API under uvicorn and a Celery worker, each a process of its own, until the end of the block."""
    tokens = {user.token: {"user_id": user.id, "organization_id": user.organization_id} for user in users}
    env = {**_environment(database), "API_TOKENS": json.dumps(tokens)}
    folder = example_folder()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        worker = stack.enter_context(
            child(
                "the worker",
                python(
                    *("-m", "celery", "-A", "app.worker:celery_app", "worker", "--loglevel", "INFO"),
                    *("--concurrency", "2", "--without-gossip", "--without-mingle"),
                ),
                env=env,
                cwd=folder,
            )
        )
        api = stack.enter_context(
            child(
                "the API",
                python("-m", "uvicorn", "app.main:app", "--host", "127.0.0.1", "--port", str(port)),
                env=env,
                cwd=folder,
            )
        )

        def answers() -> bool:
            if not api.running:
                raise DemoError(f"the API ended:\n{api.finished_output()}")
            try:
                return httpx.get(f"{url}/health", timeout=5).is_success
            except httpx.TransportError:
                return False

        wait_until("the API to answer", answers)
        worker.wait_for(" ready.")
        yield Running(url, api, worker)
