"""How Alembic reaches the database: as the role that owns the tables, which is not the application's.

Tables go to the first schema of the search path, which ``?options=-csearch_path%3Dname`` in the URL sets.
"""

from __future__ import annotations

import os
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import create_engine, make_url, pool

import rhesis_tasks.migrations  # noqa: F401  makes op.enable_rls and op.disable_rls
from app.models import Base


def required(name: str) -> str:
    """An environment variable that migrations cannot do without."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise CommandError(f"the environment variable {name} is not set; see .env.example")
    return value


if context.is_offline_mode():
    raise CommandError("--sql is not supported: these migrations look at the database they run in")
url = make_url(required("MIGRATION_DATABASE_URL")).set(drivername="postgresql+psycopg")
context.config.attributes["app_role"] = required("APP_ROLE")
if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

engine = create_engine(url, poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()
