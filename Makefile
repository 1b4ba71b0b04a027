# make help shows the targets. VENV=<folder> uses another environment folder.
VENV ?= .venv
PYTHON ?= python3
REV ?=
.DEFAULT_GOAL := help
.PHONY: help repro test lint plots params lock

# DVC starts the stages as `python`: the environment has to come first on PATH
# (no $(abspath): it splits a folder's name at a space)
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin:$(PATH)
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

repro: $(VENV)/.run ## Run the pipeline where something changed, then show the metrics and where the pictures are
	dvc repro
	@echo && dvc metrics show
	@echo && echo "Pictures to look at:" && ls -1 results/*/*.png results/train/pictures/*.png

test: lint ## Lint, types, and the whole test suite with coverage
	pytest -n 2 --cov --cov-report=term --cov-fail-under=90

lint: $(VENV)/.dev ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

plots: $(VENV)/.run ## Write the page of curves and pictures; REV="main other" compares revisions
	dvc plots $(if $(REV),diff $(REV),show) --out dvc_plots

params: $(VENV)/.run ## Compose params.yaml from conf/, as dvc exp run does
	python -c 'from dvc.utils.hydra import compose_and_dump as c; c("params.yaml", "$(CURDIR)/conf", None, "config", "", [])'

lock: $(VENV)/.dev ## Compile the pinned requirements again from pyproject.toml
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --upgrade \
	    pyproject.toml -o requirements.txt
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --upgrade \
	    pyproject.toml --extra dev -c requirements.txt -o requirements-dev.txt

# The stamps say which requirements are installed; a newer file installs again
$(VENV)/.run: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(INSTALL) -r requirements-dev.txt
	@touch $@
