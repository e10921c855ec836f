# make train   everything from nothing: install, prepare data, train the quickstart model, evaluate it, print a sample
# make test    everything from nothing: install, lint, type check, fast tests;  make test-all adds the slow ones

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that is new enough; PYTHON=/path/to/python overrides it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
CONFIG ?= configs/run/quickstart.yaml
RUN ?= runs/quickstart
# Processes of a training run: one per GPU; on a CPU one process with all cores is the fastest.
NPROC ?= $(shell $(BIN)/python -c 'import torch; print(max(1, torch.cuda.device_count()))' 2>/dev/null || echo 1)
# Several GPUs share the model with FSDP2.
STRATEGY ?= $(if $(filter-out 1,$(NPROC)),parallel.strategy=fsdp2)
PYTEST_ARGS ?=

export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train install dev lint test test-all clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: Python 3.11 or newer is needed, and none was found (python3 is $$(python3 --version 2>&1 || true)); install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { \
		echo "make: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed-quickstart: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[quickstart]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed-quickstart

install: $(VENV)/.installed-quickstart

dev: $(VENV)/.installed-dev

# glibc gives freed memory back and zeroes it anew for each step's large tensors; keeping it saves a fifth of the time.
train: export MALLOC_MMAP_MAX_ := 0
train: export MALLOC_TRIM_THRESHOLD_ := 4000000000
train: export MALLOC_TOP_PAD_ := 67108864
train: install
	$(BIN)/python launch/prepare.py configs/prepare/stdlib.yaml
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) launch/train.py $(CONFIG) $(STRATEGY)
	$(BIN)/python launch/evaluate.py $(RUN) --compressors
	$(BIN)/python launch/generate.py $(RUN) --prompt $$'import unittest\n\nclass ' max_new_tokens=120 temperature=0.7 seed=1

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test test-all: export OMP_NUM_THREADS := 1
test test-all: export HF_HUB_OFFLINE := 1
test test-all: export TOKENIZERS_PARALLELISM := false

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
