# xutrain: set-up, tests, reproduction. `make` lists the targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := OMP_NUM_THREADS=1 $(BIN)/xutrain
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types slurm-test slow report docs clean bench bench-peers

help: ## list the targets
	@awk -F ':.*## ' '/^[a-zA-Z0-9_.%-]+:.*## / {printf "  %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PAPER: $(PAPERS)"

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy
	$(BIN)/mypy

slurm-test: $(READY) ## jobs under a real SLURM of this machine (root; installs Debian's where it is missing), or the reason why not
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm -rs tests/slurm

slow: $(READY) ## the slow tests as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

PAPERS := $(sort $(shell sed -n 's/^group: *//p' configs/suites/*.yaml))
SCALE ?= cpu
CLUSTER ?=
REPRODUCE := $(addprefix reproduce-,$(PAPERS))
SLURM := $(addprefix slurm-,$(PAPERS))
.PHONY: reproduce $(REPRODUCE) $(SLURM)

reproduce: $(READY) ## every paper's suites at cpu scale and one report; ends with 5 where a claim does not hold
	$(RUN) sweep all
	$(RUN) report all --check

reproduce-PAPER: ## one paper's suites and report; SCALE=cpu (default) or paper; PAPER is one of the names below
	@echo "say which: $(REPRODUCE)"

$(REPRODUCE): reproduce-%: $(READY)
	$(RUN) sweep $* --scale $(SCALE)
	$(RUN) report $* --scale $(SCALE) --check

slurm-PAPER: ## the same through SLURM, paper scale: CLUSTER=name of a profile in configs/clusters
	@echo "say which: $(SLURM)"

$(SLURM): slurm-%: $(READY)
	$(RUN) sweep $* --scale $(if $(filter command line environment,$(origin SCALE)),$(SCALE),paper) --launcher slurm $(if $(CLUSTER),--cluster $(CLUSTER))

bench: $(READY) ## all benchmarks in one run, 25 minutes at most: benchmarks/RESULTS.md; ONLY="codecs links" OUT=mine.md for some
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py $(if $(ONLY),--add --only $(ONLY)) $(if $(OUT),--out $(OUT))

bench-peers: $(READY) ## environments of their own for the peers that benchmarks compare with, under .bench
	$(BIN)/python benchmarks/peers/make.py

docs: $(READY) ## the pages of docs/ as a site, build/docs/index.html; warnings and broken links are errors
	$(BIN)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

report: $(READY) ## the report over every suite at SCALE, without running anything
	$(RUN) report all --scale $(SCALE)

clean: ## remove caches (not runs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
