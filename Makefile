# xutrain: set-up, tests, reproduction. `make` lists the targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := OMP_NUM_THREADS=1 $(BIN)/xutrain
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types check slow bench report docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-zA-Z0-9_.%-]+:.*## / {printf "  %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install xutrain with its development tools

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

demo: $(READY) ## the main job on embedded real data: seven codecs, a table and a picture (minutes)
	$(RUN) sweep demo
	$(RUN) report demo

test: $(READY) ## lint, types and all quick tests
	$(MAKE) --no-print-directory lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy
	$(BIN)/mypy

slow: $(READY) ## the slow tests as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

clean: ## remove caches (not runs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
