PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

HYPOTHESIS_PROFILE ?= dev
export HYPOTHESIS_PROFILE

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench paper paper-fast clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | \
	  awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with symflow (editable) and everything the other targets need

# Runs again when a dependency or a pin changes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## breast cancer from zoo to report: writes report.html
	$(BIN)/symflow demo

test: $(STAMP) ## all tests and doctests, with line coverage of at least 92 %
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadscope \
	  --cov --cov-report=term --cov-fail-under=92

check: $(STAMP) ## lint, format, types and floors (no tests)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## sort imports, format, and repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## run the benchmarks and store their results in benchmarks/results
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/readme.py

paper: $(STAMP) ## run or resume the experiments of the paper, then tables, figures, manuscript
	$(MAKE) --directory=paper PYTHON=$(abspath $(BIN)/python)

paper-fast: $(STAMP) ## the same at reduced size: to try the machinery, not for results
	$(MAKE) --directory=paper fast PYTHON=$(abspath $(BIN)/python)

clean: ## remove caches and builds; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find symflow tests -name __pycache__ -type d -prune -exec rm -rf {} +
