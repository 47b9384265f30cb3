#!/bin/bash
# Run once by the image of PostgreSQL, when its volume is empty: two logins, as the README of the example says.
# The one that runs tasks owns nothing and is bound by row-level security.
set -euo pipefail

: "${OWNER_PASSWORD:?is not set}" "${APP_PASSWORD:?is not set}"

psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:?is not set}" --dbname postgres <<'SQL'
\getenv owner_password OWNER_PASSWORD
\getenv app_password APP_PASSWORD
CREATE ROLE example_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE example_app LOGIN PASSWORD :'app_password';
CREATE DATABASE example OWNER example_owner;
REVOKE CONNECT ON DATABASE example FROM PUBLIC;
GRANT CONNECT ON DATABASE example TO example_app;
SQL
