# Everything lives in .venv, made by `make setup` from requirements.lock. All it needs is Python 3.11 or newer.
#
#   make serve MODEL=demo PORT=8000 ARGS="kv_gib=2 max_rows=16"
#   make test ARGS="tests/generate -x"
#   make bench BENCH=decode ARGS="streams=1,8 peers=axicon,transformers"

PYTHON ?= python3
MODEL ?= demo
PORT ?= 8000
ARGS ?=
JOBS ?= 2
BENCH ?= decode server busy loaded startup

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(BIN)/uv

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-ray check bench combinations lock clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP)  ## Make .venv and install what requirements.lock pins, once

serve: setup  ## Serve MODEL (the embedded one by default) on PORT; Ctrl-C stops all of it
	@exec $(BIN)/axicon serve $(MODEL) port=$(PORT) $(ARGS)

test: setup  ## Run the tests, in JOBS processes (2)
	@# Hundreds of processes import the same modules: what one has compiled is kept, whatever the shell says of it.
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses $(JOBS) --no-loadscope-reorder $(ARGS)

test-ray: setup  ## Run only the tests that start Ray
	$(BIN)/pytest -m ray $(ARGS)

check: setup  ## Lint, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: setup  ## Measure decoding beside its peers, HTTP, busy neighbours, start; BENCH=decode only the first
	@for one in $(BENCH); do $(BIN)/python benchmarks/$$one.py $(ARGS) || exit 1; done

combinations: setup  ## Write docs/combinations.md, after a format, a policy or a drafter was added
	@$(BIN)/python -m tests.contracts.combinations

lock: setup  ## Resolve pyproject.toml into requirements.lock again; ARGS=--upgrade takes newer versions
	$(UV) pip compile pyproject.toml --extra demo --extra eval --extra sweep --extra distill --group dev --group bench --quiet $(ARGS) \
	  --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --output-file requirements.lock

clean:  ## Remove .venv, caches and build outputs; results in artifacts/ stay
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "axicon needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1 || echo missing): make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "could not make $(VENV): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV); the first time this fetches about 3 GB, most of it torch"
	@# uv is pinned by the same lock as everything else, so its entry is what pip gets.
	@awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.lock
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes --no-deps --compile-bytecode -r requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
