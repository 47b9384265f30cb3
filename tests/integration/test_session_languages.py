"""What the database refuses is explained in whatever language the server speaks."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_rig import running_server
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from rhesis_tasks import TenantContext, TenantSessions
from rhesis_tasks.errors import (
    PermissionDeniedError,
    PolicyViolationError,
    SettingMissingError,
    SettingValueError,
)
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

ACME = TenantContext("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "alice")
GLOBEX = TenantContext("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "bob")


@pytest.fixture(scope="module")
def german() -> Iterator[TenantDatabase]:
    """A database of a server that has German messages, in a locale that is made for it."""
    folder = Path(tempfile.mkdtemp(prefix="rhesis-locale-", dir="/tmp"))
    try:
        folder.chmod(0o755)  # the server runs as another user
        made = subprocess.run(
            ["localedef", "--inputfile=de_DE", "--charmap=UTF-8", str(folder / "de_DE.UTF-8")], capture_output=True
        )
        if not (folder / "de_DE.UTF-8").exists():
            pytest.skip(f"no German locale can be made here: {made.stderr.decode()}")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("LOCPATH", str(folder))
            with running_server() as server, new_tenant_database(server.url) as database:
                name = quote_identifier(database_url(database.url).database)
                with database.admin.connect() as connection:
                    connection.exec_driver_sql(f"ALTER DATABASE {name} SET lc_messages = 'de_DE.UTF-8'")
                database.execute(
                    "CREATE TABLE note (organization_id uuid)",
                    f"GRANT SELECT, INSERT ON note TO {quote_identifier(database.role)}",
                    enable_rls("note", role=database.role),
                )
                yield database
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("kind", ["sync", "psycopg", "asyncpg"])
@pytest.mark.parametrize(
    ("sql", "expected", "german_says"),
    [
        ("SELECT current_setting('shop.tenant')", SettingMissingError, "unbekannter Konfigurationsparameter"),
        ("SELECT current_setting('app.current_project')::uuid", SettingValueError, "Eingabesyntax für Typ uuid"),
        (f"INSERT INTO note VALUES ('{GLOBEX.organization_id}')", PolicyViolationError, "Sicherheit auf Zeilenebene"),
        ("TRUNCATE note", PermissionDeniedError, "keine Berechtigung für Tabelle note"),
    ],
    ids=["setting missing", "setting empty", "row of another", "no privilege"],
)
def test_what_a_german_server_refuses_is_explained(
    german: TenantDatabase, kind: str, sql: str, expected: type[DBAPIError], german_says: str
) -> None:
    driver = "psycopg" if kind == "sync" else kind
    sessions = TenantSessions(database_url(german.url).set(drivername=f"postgresql+{driver}"))

    def at_once() -> None:
        with sessions.begin(ACME) as db:
            db.execute(text(sql))

    async def asynchronously() -> None:
        try:
            async with sessions.async_begin(ACME) as db:
                await db.execute(text(sql))
        finally:
            await sessions.async_dispose()

    with pytest.raises(DBAPIError) as refused:
        at_once() if kind == "sync" else asyncio.run(asynchronously())
    sessions.dispose()

    assert type(refused.value) is expected
    assert german_says in str(refused.value)
