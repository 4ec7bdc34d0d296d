# Two commands matter:   make quickstart   (see a language model learn)   ·   make test
#
# VENV=DIR         use or make another environment
# PYTHON=python3   the interpreter that makes it (3.11 or newer)
# TORCH_INDEX=URL  an extra package index, e.g. https://download.pytorch.org/whl/cpu for the small build of torch
#                  on a machine without a GPU (the default build for Linux brings several GB of CUDA libraries)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --prefer-binary $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable

.PHONY: quickstart test lint bench docs clean help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

# Threads that sleep while they wait rather than spin: on a machine that does other work too, several times faster.
quickstart: $(VENV)/.with-train  ## fine-tune SmolLM2-135M with LoRA, and see what it has learnt
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/python -m veneer.train.quickstart $(ARGS)

# Two workers with one thread each: torch would otherwise start a thread per core in each of them.
test: $(VENV)/.with-test  ## the whole suite, offline
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	$(BIN)/python -m pytest -n 2 -q $(PYTEST_ARGS)

lint: $(VENV)/.with-lint  ## format, style, types, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.with-test  ## speed and memory, beside the base model and peft
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/all.py $(ARGS)

docs: $(VENV)/.with-docs  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "Open site/index.html"

clean:  ## remove the environment, caches and builds
	rm -rf .venv dist build site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp for each extra, so that a second call installs nothing; an edited pyproject.toml installs again.
$(VENV)/.with-%: pyproject.toml | $(BIN)/python
	@echo "Installing veneer[$*] into $(VENV) (a few minutes the first time)"
	$(INSTALL) '.[$*]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "No interpreter called '$(PYTHON)'. Name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "veneer needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
