"""A pytest plugin: real PostgreSQL, roles as in production, real workers.

Active once the package is installed (entry point ``pytest11``); the servers need the extra ``demo``.

Fixtures, and the context managers they are made of, for other scopes:
    postgres_url: a superuser's URL on an embedded PostgreSQL, one for the session.
        Set ``RHESIS_TASKS_TEST_DATABASE_URL`` to use your own server instead.
    tenant_database, new_tenant_database(): a new database with an application role that row-level security binds.
    start_worker, running_worker(): real Celery workers, stopped afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.pool import NullPool

from .embedded import embedded_postgres
from .postgres.schema import create_schema
from .processes import Child, child, python
from .settings import database_url, quote_identifier, rendered

__all__ = [
    "StartWorker",
    "TenantDatabase",
    "new_tenant_database",
    "postgres_url",
    "running_worker",
    "start_worker",
    "tenant_database",
]


@dataclasses.dataclass(frozen=True, slots=True)
class TenantDatabase:
    """A database with the two logins an application has."""

    owner_url: str  #: owns the tables, runs migrations
    url: str  #: the application's: neither superuser nor owner nor BYPASSRLS
    role: str  #: the application's role
    owner: Engine  #: an engine of the owner's
    admin: Engine  #: an engine of the superuser's, on the server's own database

    def execute(self, *statements: str) -> None:
        """Run SQL as the owner, in one transaction."""
        with self.owner.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A superuser's URL on an embedded PostgreSQL."""
    own = os.environ.get("RHESIS_TASKS_TEST_DATABASE_URL")
    if own:
        yield own
        return
    with embedded_postgres() as url:
        yield url


@pytest.fixture
def tenant_database(postgres_url: str) -> Iterator[TenantDatabase]:
    """A new database with an owner, an application role and the library's own tables."""
    with new_tenant_database(postgres_url) as database:
        yield database


@contextmanager
def new_tenant_database(postgres_url: str) -> Iterator[TenantDatabase]:
    """A new database on a server, dropped at the end of the block.

    Args:
        postgres_url: the URL of a login that may create roles and databases.
    """
    admin_url = database_url(postgres_url)
    suffix = secrets.token_hex(4)
    name, owner, role = f"test_{suffix}", f"test_owner_{suffix}", f"test_app_{suffix}"
    password = secrets.token_hex(8)
    admin = create_engine(admin_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    quoted = {key: quote_identifier(value) for key, value in {"name": name, "owner": owner, "role": role}.items()}
    with admin.connect() as connection:
        for login in (quoted["owner"], quoted["role"]):
            connection.exec_driver_sql(f"CREATE ROLE {login} LOGIN PASSWORD '{password}'")
        connection.exec_driver_sql(f"CREATE DATABASE {quoted['name']} OWNER {quoted['owner']}")
    owner_url = admin_url.set(username=owner, password=password, database=name)
    engine = create_engine(owner_url, poolclass=NullPool)
    create_schema(engine, roles=[role])
    try:
        yield TenantDatabase(
            owner_url=_text(owner_url), url=_text(owner_url.set(username=role)), role=role, owner=engine, admin=admin
        )
    finally:
        engine.dispose()
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {quoted['name']} WITH (FORCE)")
            connection.exec_driver_sql(f"DROP ROLE {quoted['owner']}, {quoted['role']}")


def _text(url: URL) -> str:
    return rendered(url.set(drivername="postgresql"))


@contextmanager
def running_worker(
    app: str,
    *,
    cwd: Path,
    pool: str = "prefork",
    concurrency: int = 2,
    env: dict[str, str] | None = None,
    chatty: bool = False,
    arguments: Sequence[str] = (),
) -> Iterator[Child]:
    """A real Celery worker that is ready, stopped at the end of the block.

    Args:
        app: as for ``celery -A``: ``"module"`` or ``"module:app"``.
        cwd: the folder it starts in, from where it imports ``app``.
        pool: prefork, threads, solo, ...
        concurrency: processes or threads.
        env: added to the environment.
        chatty: let it greet other workers, and gossip with them.
        arguments: further arguments of ``celery worker``.

    Yields:
        The process; its ``output`` is the worker's log.
    """
    command = python(
        *("-m", "celery", "-A", app, "worker", "--loglevel", "INFO", "--pool", pool),
        *("--concurrency", str(concurrency)),
        *(() if chatty else ("--without-gossip", "--without-mingle")),
        *arguments,
    )
    with child(f"worker {app}", command, env=env, cwd=cwd) as worker:
        worker.wait_for(" ready.")
        yield worker


StartWorker = Callable[..., Child]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers: ``start_worker("module:app", cwd=folder, ...)``, with the arguments of running_worker()."""
    with ExitStack() as workers:

        def start(app: str, *, cwd: Path = tmp_path, **options: Any) -> Child:
            return workers.enter_context(running_worker(app, cwd=cwd, **options))

        yield start
