# One word a chore; CI calls the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
# Compiling every file of torch and transformers costs more than compiling those that are imported, when they are; where
# the environment forbids to keep what was compiled, every process would do it again, seconds each.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: setup demo test test-all test-slow test-latest lint format docs bench clean

setup: $(READY)  ## a virtual environment with the tested versions

$(READY): pyproject.toml constraints.txt requirements/compact.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[compact]'
	$(PIP) --no-deps --requirement requirements/compact.txt
	touch $@

$(DEV): $(READY) requirements/ui.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --requirement requirements/ui.txt
	touch $@

demo: setup  ## prepare, train, score, report: about ten minutes on two cores
	$(BIN)/vlm2vec demo

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: lint  ## every check but the slow tests
	$(PYTEST)

test-all: lint  ## the slow tests, too
	$(PYTEST) -m ""

test-slow: $(DEV)  ## the slow tests alone
	$(PYTEST) -m slow

LATEST := .venv-latest
test-latest:  ## every check with the newest released dependencies, in an environment of its own
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet --upgrade --no-compile torch
	$(LATEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --no-compile --editable '.[dev]'
	$(LATEST)/bin/pip install --quiet --no-compile --no-deps --requirement requirements/compact.txt --requirement requirements/ui.txt
	$(LATEST)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV)  ## the documentation site, into site/: strict, without the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

BENCH := $(wildcard benchmarks/*.py)
bench: $(DEV)  ## the speed measurements; each prints a table and a JSON line; BENCH=benchmarks/train_step.py: one of them
	for file in $(BENCH); do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) $(LATEST) site .mypy_cache .ruff_cache .pytest_cache
