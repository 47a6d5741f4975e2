# Every target works from a clean clone with Python 3.11 or newer, make and a package index; the second time nothing is installed.
#   TORCH_INDEX=URL  takes torch from another index, for another build than the default one
#   PYTHON=...       the interpreter that .venv is made from
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH_INDEX ?=

# On shared virtual machines spinning OpenMP threads stall each other for seconds: let them sleep.
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install quickstart test cluster lint format docs bench clean

install: $(VENV)/.dev

quickstart: $(VENV)/.bench
	$(BIN)/mariotte quickstart

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What the tests of Ray and PostgreSQL need beside .dev; without it `make test` skips them. The server is the system's.
cluster: $(VENV)/.cluster

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/prepare_once.py

clean:
	rm -rf $(VENV) build dist site

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Mariotte needs Python 3.11 or newer, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: any other package that asks for it would bring the newest build with all of CUDA.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[bench]'
	touch $@

# lm-eval and torchao too: without them the tests that compare with them are skipped, each with its reason.
$(VENV)/.dev: $(VENV)/.bench
	$(PIP) -e '.[bench,dev,tasks,quant]'
	touch $@

$(VENV)/.cluster: $(VENV)/.dev
	$(PIP) -e '.[ray,postgres]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	touch $@
