# Each target sets up what it needs: a virtual environment in .venv, the constraints file, an editable install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow lint format clean
help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,pai]'
	touch $(STAMP)

setup: $(STAMP)  ## Virtual environment with everything installed

demo: $(STAMP)  ## The whole story offline on the CPU: biased tiny model, cache, retraining, before and after
	rm -rf demo
	$(BIN)/alpacache demo --out demo

test: $(STAMP)  ## The test suite (minutes, CPU)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)  ## Everything, the slow tests included
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff (lint and format) and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
