# Each target does all of its own set-up: a virtual environment in .venv, from pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types unit integration wheel constraints clean

demo: $(READY)  ## the main job, for real
	@$(BIN)/rhesis-tasks demo $(ARGS)

test: lint types unit integration wheel  ## everything that CI checks

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; this is $(PYTHON) %s.  Say which: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(READY)
	$(BIN)/pytest tests/unit

integration: $(READY)  ## on real PostgreSQL, with real workers
	$(BIN)/pytest tests/integration -n 2 --dist loadfile

wheel: $(READY)  ## built, installed into clean environments, and imported there without extras
	$(BIN)/pytest tests/wheel

constraints:  ## pin the newest versions that pyproject.toml allows
	uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --upgrade --quiet -o constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
