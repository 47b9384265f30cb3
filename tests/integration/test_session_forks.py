"""A connection that a forked child, or a second event loop, would share.  Ours withstands it.

The server has no part in it, so one is enough.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rhesis_tasks.processes import child, python
from rhesis_tasks.settings import database_url

if TYPE_CHECKING:
    from conftest import Notes

FORK = textwrap.dedent(
    """
    import asyncio, os, signal, sys
    from sqlalchemy import create_engine, text
    from sqlalchemy.ext.asyncio import create_async_engine
    from rhesis_tasks import TenantContext, TenantSessions
    from rhesis_tasks.postgres import engines
    from rhesis_tasks.settings import async_database_url, database_url

    url, kind, protection, acme, globex = sys.argv[1:]
    single = {"pool_size": 1, "max_overflow": 0}
    LOOK = text("SELECT pg_backend_pid(), string_agg(body, ',' ORDER BY body) FROM note")

    def write(who, pid, bodies):
        os.write(1, f"{who} {pid} {bodies}\\n".encode())

    def in_child(work):
        if protection == "unprotected":
            engines._engines.clear()
        child = os.fork()
        if child == 0:
            signal.alarm(3)  # it may hang
            try:
                work()
            except BaseException as error:
                write("child", "failed", type(error).__name__)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            write("child", "failed", status)
        if protection == "unprotected":
            os._exit(0)  # nobody knows what is on its connection by now

    if kind in ("url", "engine", "system"):
        engine = create_engine(database_url(url), **single)
        if kind == "system":
            sessions = TenantSessions(url, system=engine)
        else:
            sessions = TenantSessions(url, **single) if kind == "url" else TenantSessions(engine)

        def look(who, organization):
            if kind == "system":
                with engine.connect() as connection:
                    write(who, *connection.execute(LOOK).one())
            else:
                with sessions.begin(TenantContext(organization)) as db:
                    write(who, *db.execute(LOOK).one())

        look("parent", acme)
        in_child(lambda: look("child", globex))
        look("parent", acme)
        sessions.dispose()
    else:
        made = create_async_engine(async_database_url(url), **single)
        sessions = TenantSessions(url, **single) if kind == "async url" else TenantSessions(made)

        async def look(who, organization):
            async with sessions.async_begin(TenantContext(organization)) as db:
                write(who, *(await db.execute(LOOK)).one())

        async def main():
            # Of the engine's own, so that no loop is known to the sessions yet.
            async with (sessions.async_engine() if kind == "async url" else made).connect() as connection:
                write("parent", *(await connection.execute(LOOK)).one())
            in_child(lambda: asyncio.run(look("child", globex)))
            await look("parent", acme)
            await sessions.async_dispose()

        asyncio.run(main())
    """
)


@pytest.mark.parametrize(
    ("kind", "driver"),
    [
        ("url", "psycopg"),
        ("engine", "psycopg"),
        ("system", "psycopg"),
        ("async engine", "psycopg"),
        ("async engine", "asyncpg"),
        ("async url", "psycopg"),
        ("async url", "asyncpg"),
    ],
)
def test_a_forked_child_would_speak_on_its_parents_connection(
    notes: Notes, tmp_path: Path, kind: str, driver: str
) -> None:
    script = tmp_path / "forks.py"
    script.write_text(FORK)
    url = database_url(notes.url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)

    def forked(protection: str) -> tuple[list[str], set[str]]:
        """What the child said, and the parent's connections."""
        arguments = (url, kind, protection, notes.acme.organization_id, notes.globex.organization_id)
        with child("forks.py", python(str(script), *arguments)) as running:
            assert running.process.wait(timeout=30) == 0, running.finished_output()
            lines = [line.split() for line in running.finished_output().splitlines()]
        said = [line[1:] for line in lines if line[0] == "child"]
        return said[0], {line[1] for line in lines if line[0] == "parent"}

    if kind != "async url":  # a child has another loop, and with it another engine
        (used, _), parents = forked("unprotected")
        assert used == "failed" or used in parents

    (used, bodies), parents = forked("protected")
    assert used not in {"failed", *parents}
    assert bodies == ("None" if kind == "system" else "g1,g2")


TWO_LOOPS = textwrap.dedent(
    """
    import asyncio, sys
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine
    from rhesis_tasks import TenantContext, TenantSessions
    from rhesis_tasks.settings import async_database_url

    url, acme = sys.argv[1:]
    single = {"pool_size": 1, "max_overflow": 0}

    async def many(engine):
        async def one():
            async with engine.connect() as connection:
                await connection.execute(text("SELECT body FROM note"))
                await asyncio.sleep(0.01)

        await asyncio.wait_for(asyncio.gather(*(one() for _ in range(4))), 2)

    async def ours():
        await many(sessions.async_engine())
        async with sessions.async_begin(TenantContext(acme)) as db:
            print(await db.scalar(text("SELECT string_agg(body, ',' ORDER BY body) FROM note")))

    sessions = TenantSessions(url, **single)
    for _ in range(3):
        asyncio.run(ours())

    shared = create_async_engine(async_database_url(url), **single)
    asyncio.run(many(shared))
    try:
        asyncio.run(many(shared))
    except BaseException as error:
        print("shared:", type(error).__name__, flush=True)
    """
)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_engine_that_two_event_loops_share_fails_or_hangs(notes: Notes, tmp_path: Path, driver: str) -> None:
    script = tmp_path / "loops.py"
    script.write_text(TWO_LOOPS)
    url = database_url(notes.url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)

    with child("loops.py", python(str(script), url, notes.acme.organization_id)) as running:
        running.wait_for("shared: ")
        lines = [line for line in running.output.splitlines() if line.startswith(("a1", "shared"))]

    assert lines[:3] == ["a1,a2,a3"] * 3
    assert lines[3].startswith("shared: ")
