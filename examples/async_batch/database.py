"""What has to be there before the application starts: two roles, a database, tables under row-level security.

An application has this in its migrations; ``fastapi_app`` shows how.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Final

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from async_batch.models import Base, Prompt
from rhesis_tasks import TenantContext, TenantSessions
from rhesis_tasks.models import protect
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.settings import database_url, rendered

__all__ = ["TENANTS", "TEST_SET", "Database", "create_database", "load_prompts"]

TENANTS: Final = (TenantContext("acme", "ann"), TenantContext("globex", "bob"))
TEST_SET: Final = "politeness"
"""The name of a test set that each tenant has."""

OWNER: Final = "batch_owner"
APPLICATION: Final = "batch_app"
NAME: Final = "batch"


@dataclasses.dataclass(frozen=True, slots=True)
class Database:
    """A new database, and who connects to it."""

    superuser_url: str  #: sees every tenant's rows
    url: str  #: the application's: neither superuser nor owner of the tables, so row-level security binds it


def create_database(server_url: str) -> Database:
    """Create roles, database and tables on a server.

    Args:
        server_url: of a superuser's login.
    """
    server = database_url(server_url)
    password = secrets.token_hex(16)
    engine = create_engine(server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for role in (OWNER, APPLICATION):
            connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
        connection.exec_driver_sql(f"CREATE DATABASE {NAME} OWNER {OWNER}")

    owner = create_engine(server.set(username=OWNER, password=password, database=NAME), poolclass=NullPool)
    protect(Base.metadata, role=APPLICATION)  # each table as it is created
    with owner.begin() as connection:
        Base.metadata.create_all(connection)
        connection.exec_driver_sql(f"GRANT SELECT, INSERT ON prompts, evaluations TO {APPLICATION}")
        create_schema(connection, roles=[APPLICATION])  # the library's own tables: messages and records

    application = server.set(username=APPLICATION, password=password, database=NAME)
    return Database(rendered(server.set(database=NAME)), rendered(application))


def load_prompts(database: Database, count: int) -> None:
    """Store so many prompts for each tenant.  They are the same texts: only the tenant tells them apart."""
    sessions = TenantSessions(database.url, poolclass=NullPool)
    for tenant in TENANTS:
        with sessions.begin(tenant) as db:
            for number in range(1, count + 1):
                db.add(Prompt(test_set=TEST_SET, text=f"Question {number} of {count}: is this polite?"))
