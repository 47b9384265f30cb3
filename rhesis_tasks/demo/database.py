"""The demo's database: an embedded server, or roles and schemas of random names in the user's own."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool

from ..embedded import embedded_postgres
from ..errors import DatabaseUnavailableError
from ..settings import database_url, quote_identifier, redacted, rendered
from .errors import DemoError

__all__ = ["DemoDatabase", "demo_database"]


@dataclasses.dataclass(frozen=True, slots=True)
class DemoDatabase:
    """Where the demo's tables are, and who may do what."""

    admin: URL
    role: str  #: the application's: neither superuser nor owner nor BYPASSRLS
    password: str
    tables: str  #: the schema of the example's tables
    library: str  #: the schema of the library's tables

    @property
    def migration_url(self) -> str:
        """The owner's URL, for migrations."""
        return _text(self.admin.update_query_dict({"options": f"-csearch_path={self.tables}"}))

    @property
    def application_url(self) -> str:
        """The URL that the API and the worker get."""
        return _text(self.admin.set(username=self.role, password=self.password))


@contextmanager
def demo_database(own_url: str | None, data_dir: Path | None) -> Iterator[DemoDatabase]:
    """A database with a fresh application role.

    Args:
        own_url: the user's own PostgreSQL; what is made there is dropped at the end.
        data_dir: where the embedded server keeps its data; by default it is thrown away.

    Raises:
        DemoError: the login may not create roles or schemas.
        DatabaseUnavailableError: there is no such server.
    """
    if own_url is None:
        with embedded_postgres(data_dir) as url:
            database = _names(database_url(url), "rhesis_demo")
            with _connected(database.admin) as connection:
                _drop(connection, database)  # what an earlier run left in --data-dir
                _create(connection, database)
            yield database
        return
    database = _names(database_url(own_url), f"rhesis_demo_{secrets.token_hex(4)}")
    try:
        with _connected(database.admin) as connection:
            _create(connection, database)
        yield database
    finally:
        with _connected(database.admin) as connection:
            _drop(connection, database)


def _names(admin: URL, prefix: str) -> DemoDatabase:
    return DemoDatabase(
        admin=admin,
        role=f"{prefix}_app",
        password=secrets.token_urlsafe(16),
        tables=prefix,
        library=f"{prefix}_tasks",
    )


@contextmanager
def _connected(admin: URL) -> Iterator[Connection]:
    engine = create_engine(admin, poolclass=NullPool)
    try:
        with engine.begin() as connection:
            yield connection
    except OperationalError as error:
        raise DatabaseUnavailableError(
            f"cannot connect to {redacted(admin)}: {error.orig}", url=redacted(admin)
        ) from error
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42501":
            raise
        raise DemoError(
            f"the login {admin.username!r} of DATABASE_URL may not do what the demo needs: {error.orig}.\n"
            "It needs CREATEROLE, and CREATE on the database; or unset DATABASE_URL to use an embedded server."
        ) from error


def _create(connection: Connection, database: DemoDatabase) -> None:
    role = quote_identifier(database.role)
    name = quote_identifier(connection.scalar(text("SELECT current_database()")))
    for statement in (
        f"CREATE ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB PASSWORD '{database.password}'",
        f"GRANT {role} TO CURRENT_USER",
        f"CREATE SCHEMA {quote_identifier(database.tables)}",
        f"GRANT USAGE ON SCHEMA {quote_identifier(database.tables)} TO {role}",
        f"ALTER ROLE {role} IN DATABASE {name} SET search_path = {quote_identifier(database.tables)}",
    ):
        connection.exec_driver_sql(statement)


def _drop(connection: Connection, database: DemoDatabase) -> None:
    for schema in (database.tables, database.library):
        connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {quote_identifier(schema)} CASCADE")
    role = quote_identifier(database.role)
    known = text("SELECT count(*) FROM pg_roles WHERE rolname = :role")
    if connection.scalar(known, {"role": database.role}):
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")


def _text(url: URL) -> str:
    return rendered(url.set(drivername="postgresql"))
