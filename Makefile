# Each target does all of its own set-up: a virtual environment in .venv, from pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINIMUM := .venv-minimum

# Servers that the integration tests start, as Debian packages.
REDIS := $(wildcard /usr/bin/redis-server)
POSTGRES := $(wildcard /usr/lib/postgresql/15/bin/initdb)
PGBOUNCER := $(wildcard /usr/sbin/pgbouncer)
SYSTEMD := $(wildcard /usr/bin/systemd-analyze)

TESTED_WITH_MINIMUM := $(patsubst %,tests/integration/test_%.py,results sessions sessions_left_open async_sessions session_options rls_models migrations workers outcomes others forgeries async_tasks chords chord_outages waiting status redis transport statements broker_urls broker_control broker_faults)

.PHONY: servers demo test lint types unit integration minimum wheel constraints clean

demo: $(READY)  ## the main job, for real
	@$(BIN)/rhesis-tasks demo $(ARGS)

test: lint types unit integration minimum wheel  ## everything that CI checks

$(READY): constraints.txt pyproject.toml
	$(set-up)

$(MINIMUM)/.ready: constraints-minimum.txt pyproject.toml
	$(set-up)

define set-up
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; this is $(PYTHON) %s.  Say which: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Setting up $(@D) (once) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(READY)
	$(BIN)/pytest tests/unit

servers:  ## PostgreSQL 15, PgBouncer and Redis from Debian, and what checks systemd's units, if they are missing
ifeq ($(and $(POSTGRES),$(PGBOUNCER),$(REDIS),$(SYSTEMD)),)
	@echo "Installing postgresql-15, pgbouncer, redis-server and systemd (once) ..."
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql-15 pgbouncer redis-server systemd >/dev/null
endif

integration: $(READY) servers  ## on real PostgreSQL, with real workers
	$(BIN)/pytest tests/integration -n 2 --dist loadfile

minimum: $(MINIMUM)/.ready servers  ## with the oldest versions of what we depend on
	$(MINIMUM)/bin/python -m pytest tests/unit $(TESTED_WITH_MINIMUM) -m "not newest_only" -n 2 --dist loadfile

wheel: $(READY)  ## built, installed into clean environments, and imported there without extras
	$(BIN)/pytest tests/wheel

constraints:  ## pin the newest versions that pyproject.toml allows
	uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --upgrade --quiet -o constraints.txt
	uv pip compile pyproject.toml --extra demo --group minimum --resolution lowest-direct --universal \
	  --python-version 3.11 --generate-hashes --no-header --upgrade --quiet -o constraints-minimum.txt

clean:
	rm -rf $(VENV) $(MINIMUM) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
