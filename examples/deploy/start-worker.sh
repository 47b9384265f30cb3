#!/bin/sh
# Start a worker of the application.  Its settings are environment variables: CELERY_WORKER_CONCURRENCY,
# CELERY_WORKER_QUEUES, HEALTH_PORT, ...
#
# exec: the worker takes this script's place, and gets the signals that are sent to it.
set -eu

: "${DATABASE_URL:?is not set: the URL of the login that runs tasks}"

exec rhesis-tasks worker -A "${CELERY_APP:-app.worker}" "$@"
