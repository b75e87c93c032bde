# make quickstart   set up, then search for the best small model on this machine (about 8 minutes)
# make test         set up, then run the tests
# make gpu-check    check kernels and strategies on a GPU, and time published models on it (8 minutes)
# make check        lint, format, types, import contracts, tests
# make clean        remove the environment and caches; searches and their results stay

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed

HALF := tests/gpu tests/models tests/release tests/training
## half of the tests by time: the suite takes two cores, and Ray's tests must not meet each other;
## `set -m`, because a shell's background jobs otherwise ignore Ctrl-C, and a test sends one

PIP_PROGRESS = \
  /^(Collecting|Processing)/ { if (++found % 20 == 0) print "    " found " packages found" } \
  /^Installing collected/ { print "    installing them" } \
  { fflush() }

.PHONY: quickstart test gpu-check check lint clean help

help:
	@sed -n 's/^# //p' Makefile

$(INSTALLED): requirements.lock pyproject.toml
	@echo "==> setting up $(VENV) from requirements.lock (about 3 minutes, 3 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "thriftlm needs Python 3.11 to 3.13; set PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	  --requirement requirements.lock | awk '$(PIP_PROGRESS)'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	  --no-build-isolation --editable .
	@touch $@
	@echo "==> ready"

quickstart: $(INSTALLED)
	@$(BIN)/thriftlm search quickstart

test: $(INSTALLED)
	@echo "==> $(HALF) beside everything else, which is shown first"
	@set -m; log=$$(mktemp); \
	$(BIN)/python -m pytest -p no:cacheprovider $(HALF) >$$log 2>&1 & half=$$!; \
	trap 'kill -INT -- -$$half 2>/dev/null' EXIT; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(HALF)); rest=$$?; \
	wait $$half; first=$$?; cat $$log; rm $$log; exit $$((first || rest))

gpu-check: $(INSTALLED)
	@$(BIN)/python -m tests.gpu.check

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
