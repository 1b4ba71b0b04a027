# make help shows the targets. VENV=<folder> uses another environment folder.
VENV ?= .venv
PYTHON ?= python3
REV ?=
OUT ?=
CLEAN ?=
ONLY ?=
CLASS ?=
ADOPT ?=
BY ?=
METRIC ?=
P ?=
RUNS ?=
SEARCH ?=
IMAGES ?=
WHAT ?=
.DEFAULT_GOAL := help
.PHONY: help repro check test coverage test-stages test-pipeline test-slow test-remote bench speedrun gpu verify verify-cpu kills fuzz lint plots images curves exps verdict search states params deps lock

# DVC starts the stages as `python`: the environment has to come first on PATH
# (no $(abspath): it splits a folder's name at a space)
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin:$(PATH)
# Where Python must not write bytecode at run time, uv writes it during the installation, as pip does: a start then takes a third of the time
ifneq ($(PYTHONDONTWRITEBYTECODE),)
export UV_COMPILE_BYTECODE := 1
endif
# uv is installed if it is missing; if uv cannot be installed or fails, pip installs the same packages
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
define install
{ command -v uv >/dev/null || $(PIP) --constraint requirements-dev.txt uv; } \
    && uv pip install --quiet --python $(VENV)/bin/python $(1) || $(PIP) $(1)
endef

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

repro: $(VENV)/.run ## Run the pipeline where something changed, then show the metrics and where the pictures are
	dvc repro
	@echo && dvc metrics show
	@echo && echo "Pictures to look at:" && ls -1 results/*/*.png results/train/pictures/*.png

check: lint ## Lint, types, and the quick tests: no whole training, no stage, no dvc, no second process
	pytest -n 2 --dist worksteal -m "not heavy and not process and not pipeline and not slow and not remote"

test: lint ## Lint, types, and the whole test suite
	pytest -n 2 --dist worksteal

coverage: $(VENV)/.dev ## The test suite, and the share of the lines that it runs: at least 90 %
	pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=90

test-stages: $(VENV)/.dev ## The tests of the suite that take a second, run trainings and stages, or start processes
	pytest -n 2 --dist worksteal -m "(heavy or process) and not pipeline and not slow and not remote"

test-pipeline: $(VENV)/.dev ## The tests of the suite that drive dvc in a clone
	pytest -n 2 --dist worksteal -m "pipeline and not slow and not remote"

test-slow: $(VENV)/.dev ## The slow tests
	pytest -m "slow and not remote"

test-remote: $(VENV)/.remote ## The tests against real servers, started on this machine: SSH, S3, PostgreSQL
	@PATH="$$PATH:/usr/sbin"; command -v sshd >/dev/null || { echo "sshd is missing: apt-get install openssh-server"; exit 1; }
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || { echo "PostgreSQL is missing: apt-get install postgresql"; exit 1; }
	pytest -m remote

bench: $(VENV)/.bench ## Measure speed, quality and memory beside the peers (two hours on 2 cores): benchmarks/results/
	python -m benchmarks

speedrun: $(VENV)/.bench ## CPU-seconds until the digits have a stated distance, or IMAGES=<folder> 32x32 photographs; WHAT="what changed"
	python -m benchmarks.speedrun $(if $(IMAGES),--colour '$(IMAGES)') $(if $(WHAT),--what '$(WHAT)')
	python -m benchmarks --render

gpu: $(VENV)/.bench ## Show all of it on this GPU, in 25 minutes: benchmarks/results/gpu/; IMAGES=<folder> adds a training on them
	python -m benchmarks.gpu $(if $(IMAGES),--images '$(IMAGES)',tests resume processes training_step samples)

verify: $(VENV)/.dev ## Run the pipeline again in a scratch clone, and compare each stage's bytes with the committed ones
	python -m tests.robustness.verify

verify-cpu: $(VENV)/.dev ## Compare the bytes of a tiny run with those on other CPUs, emulated by qemu-user
	@command -v qemu-x86_64 >/dev/null || { echo "qemu-x86_64 is missing: apt-get install qemu-user"; exit 1; }
	python -m tests.robustness.cpus

kills: $(VENV)/.dev ## Kill the pipeline 100 times at random moments, and compare the bytes with an undisturbed run
	python -m tests.robustness.kills

fuzz: $(VENV)/.dev ## Feed damaged and hostile parameters, images, models and states: each must end in one line
	python -m tests.robustness.fuzz

lint: $(VENV)/.dev ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

plots: $(VENV)/.run ## Write the page of numbers, curves and pictures; REV="main a b" compares revisions
	python -m tools.plots_page dvc_plots $(REV)

images: $(VENV)/.run ## Write samples as PNG files into OUT: of REV=<name>, only ONLY="0 5 10-19" or CLASS="cat dog"
	python -m tools.images $(if $(REV),'$(REV)') --only '$(ONLY)' --classes '$(CLASS)' --out '$(OUT)'

curves: $(VENV)/.run ## Draw the loss curves of REV="<name> <name> ..." in one picture, OUT
	python -m tools.curves $(or $(OUT),curves.png) $(REV)

exps: $(VENV)/.run ## Show the experiments, seeds together; BY=<parameter> draws, P=1 adds p-values, RUNS=1 a row per run
	python -m tools.exps $(if $(BY),--by '$(BY)') $(if $(METRIC),--metric $(METRIC)) $(if $(P),--p) $(if $(RUNS),--runs) \
	    $(if $(OUT),--out '$(OUT)')

verdict: $(VENV)/.run ## Is B better than A? REV="A B" are commits or experiments; METRIC=<name> compares another number
	python -m tools.verdict $(REV) $(if $(METRIC),--metric $(METRIC))

search: $(VENV)/.run ## Search conf/search/<SEARCH>.yaml by Optuna, or resume; ADOPT=<worker> takes over a lost worker's trials
	python -m tools.search $(or $(SEARCH),default) $(if $(ADOPT),--adopt $(ADOPT))

states: $(VENV)/.run ## Show the states of unfinished runs; CLEAN=1 deletes them, ADOPT=<name> lets today's code resume one
	python -m tools.states $(if $(CLEAN),--clean) $(if $(ADOPT),--adopt $(ADOPT))

params: $(VENV)/.run ## Compose params.yaml from conf/, as dvc exp run does
	python -m tools.params

deps: $(VENV)/.run ## Write the modules that each stage imports into dvc.yaml
	python -m tools.deps

lock: $(VENV)/.dev ## Compile the pinned requirements again from pyproject.toml
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --upgrade \
	    pyproject.toml -o requirements.txt
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --upgrade \
	    pyproject.toml --extra dev -c requirements.txt -o requirements-dev.txt
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --upgrade \
	    pyproject.toml --extra remote -c requirements-dev.txt -o requirements-remote.txt

# The stamp files record which requirements are installed; a newer requirements file installs again
$(VENV)/.run: requirements.txt pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(call install,-r requirements.txt)
	$(call install,--no-deps --no-build-isolation --editable .)
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(call install,-r requirements-dev.txt)
	@touch $@

$(VENV)/.bench: benchmarks/requirements.txt $(VENV)/.dev
	$(call install,-r benchmarks/requirements.txt)
	@touch $@

$(VENV)/.remote: requirements-remote.txt $(VENV)/.dev
	$(call install,-r requirements-remote.txt)
	@touch $@
