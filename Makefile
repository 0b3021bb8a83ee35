# `make train` and `make test` work on a bare machine with Python >= 3.10 and a package index.
PYTHON ?= python3
# On a machine without a GPU, PyTorch's CPU wheels save gigabytes:
#   make train PIP_FLAGS="--extra-index-url <PyTorch's CPU wheel index>"
PIP_FLAGS ?=
CONFIG ?= configs/stdlib.yaml
DATA ?= data/stdlib
# A 12 MB sample and small pieces: what a small model can learn from in minutes.
PREPARE_FLAGS ?= --vocab-size 2048 --limit-mb 12 --val-fraction 0.03
# One thread in each of two processes is faster on two cores than two threads in one process.
NPROC ?= 2
# Tests at a time; files stay whole, since the ranks that a file's tests share are its own.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: setup train test test-all test-slow test-cluster lint format bench clean
.DEFAULT_GOAL := help

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.ready-dev  ## set up .venv with everything the tests need

# torch first and pinned: an unpinned one, pulled in by another package, may be the largest build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once, one to three minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch numpy setuptools
	@$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "Adding what the tests need ..."
	@$(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

train: $(VENV)/.ready  ## train a decoder on Python's own library, show what it writes
	@$(BIN)/scalellm prepare --source stdlib --out $(DATA) $(PREPARE_FLAGS)
	@$(BIN)/scalellm train $(CONFIG) --nproc $(NPROC) --resume auto data.path=$(DATA) $(OVERRIDES)

test: $(VENV)/.ready-dev  ## the fast tests
	@$(PYTEST) -m "not slow and not cluster and not gpu"

test-all: test test-slow test-cluster  ## the fast and the slow tests, and real clusters

test-slow: $(VENV)/.ready-dev  ## compilers, whole documents, the whole matrix: half an hour
	@$(PYTEST) -m "(slow or gpu) and not cluster"

test-cluster: $(VENV)/.ready-dev  ## several hosts out of namespaces, and what dies there; needs root
	@$(BIN)/python -m pytest -m cluster

lint: $(VENV)/.ready-dev  ## formatting, lint, types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: $(VENV)/.ready-dev  ## format in place
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(VENV)/.ready-dev  ## the matrix of strategies: parity, then memory
	@$(BIN)/scalellm bench parity
	@$(BIN)/scalellm bench memory

clean:  ## remove the environment and caches, keep data/ and runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
