#!/bin/sh
# Bring the database up to date: the application's tables, then those of rhesis-tasks.  Safe to run again, and while
# workers of the version before run.  Nothing else needs the owner's login.
set -eu

: "${MIGRATION_DATABASE_URL:?is not set: the URL of the login that owns the tables}"
: "${APP_ROLE:?is not set: the role that runs tasks, as in DATABASE_URL}"

alembic upgrade head
# In the environment, not on the command line, where everybody on the machine could read the password.
DATABASE_URL="$MIGRATION_DATABASE_URL" exec rhesis-tasks schema create --role "$APP_ROLE"
