# Each target sets up what it needs: a virtual environment in .venv, the constraints file, an editable install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# As many processes as cores, each with one thread: torch's own threads would crowd each other out. Bytecode is kept, even
# where the environment forbids it: to compile the tests anew takes each process 7 of its first 17 seconds.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n auto --dist loadfile
STAMP := $(VENV)/.installed

# The store alone, without torch, on Python 3.12 and the zarr that needs it.
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
VENV312 ?= .venv-3.12
STAMP312 := $(VENV312)/.installed

# Both ends of the declared range: each dependency at its lower bound, and the newest there is. torch is one for both.
VENV_LOWEST ?= .venv-lowest
VENV_NEWEST ?= .venv-newest

.PHONY: help setup demo quick quick-lowest quick-newest test test-ci test-store-3.12 test-slow torture lint format docs dist-check clean
help:  ## Show this list
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs,pai,ros,wandb]'
	touch $(STAMP)

setup: $(STAMP)  ## Virtual environment with everything installed

demo: $(STAMP)  ## The whole story offline on the CPU: biased tiny model, cache, retraining, before and after
	rm -rf demo
	$(BIN)/alpacache demo --out demo

quick: $(STAMP)  ## What to run while working: no whole ways, no kernels (2 minutes on 2 cores)
	$(call PYTEST,$(VENV)) -m "not slow and not ci and not system"

$(VENV_LOWEST)/.installed: pyproject.toml constraints.txt .ci/lower-bounds
	$(PYTHON) -m venv $(VENV_LOWEST)
	.ci/lower-bounds > $(VENV_LOWEST)/constraints.txt
	$(VENV_LOWEST)/bin/python -m pip install -q -c $(VENV_LOWEST)/constraints.txt torch
	$(VENV_LOWEST)/bin/python -m pip install -q -c $(VENV_LOWEST)/constraints.txt -e '.[dev,pai,lora,ros,s3,wandb]'
	touch $@

# Old releases use what newer ones of their own dependencies deprecate.
quick-lowest: $(VENV_LOWEST)/.installed  ## `quick` with every dependency at its lower bound
	$(call PYTEST,$(VENV_LOWEST)) -W ignore::DeprecationWarning -m "not slow and not ci and not system"

$(VENV_NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_NEWEST)
	grep '^torch==' constraints.txt > $(VENV_NEWEST)/constraints.txt
	$(VENV_NEWEST)/bin/python -m pip install -q -c $(VENV_NEWEST)/constraints.txt torch
	$(VENV_NEWEST)/bin/python -m pip install -q -U -c $(VENV_NEWEST)/constraints.txt -e '.[dev,pai,lora,ros,s3,wandb]'
	touch $@

quick-newest: $(VENV_NEWEST)/.installed  ## `quick` with the newest of every dependency
	$(call PYTEST,$(VENV_NEWEST)) -m "not slow and not ci and not system"

test: $(STAMP)  ## The test suite (8 minutes on 2 cores)
	$(call PYTEST,$(VENV)) -m "not slow and not ci"

test-ci: $(STAMP)  ## What `make test` leaves to CI: kernels interpreted and compiled on the CPU, the demo shortened
	$(call PYTEST,$(VENV)) --dist load -m "ci and not slow"

$(STAMP312): constraints.txt
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip install -q -c constraints.txt 'zarr>=3.4' numcodecs awscrt numpy obstore hypothesis 'moto[server]' pytest pytest-timeout pytest-xdist
	$(VENV312)/bin/python -m pip install -q --no-deps -e .
	touch $(STAMP312)

test-store-3.12: $(STAMP312)  ## The store's tests on Python 3.12 and zarr 3.4, without torch
	$(call PYTEST,$(VENV312)) -m "not slow" tests/cache_store

test-slow: $(STAMP)  ## Everything, the slow tests included
	$(call PYTEST,$(VENV))

torture: $(STAMP)  ## Kills, power cuts, full disks and flipped bits: the store, then commands and runs (half an hour or more on 2 cores)
	$(BIN)/python benchmarks/torture_store.py --kills 300 --flips 3000
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture_runs.py --kills 40 --flips 8

lint: $(STAMP)  ## ruff (lint and format) and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## The documentation as a site in site/; a link that leads nowhere ends the build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist-check: $(STAMP)  ## Build sdist and wheel, run the wheel in a bare environment outside the checkout
	.ci/dist-check $(BIN)/python

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) $(VENV312) $(VENV_LOWEST) $(VENV_NEWEST) .pytest_cache .mypy_cache .ruff_cache build site *.egg-info
