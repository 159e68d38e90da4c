# Two commands do everything on a bare machine with Python 3.11 or later and make:
#
#     make repro [PROFILE=smoke|laptop|gemma|overnight|paper|path/to/profile.yaml]
#     make test

PROFILE ?= laptop
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PEERS := .venv-peers
export MASKSAE_EXECUTOR := $(or $(EXECUTOR),$(MASKSAE_EXECUTOR))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup repro paper plan verify share guide release test-slurm site status test lint lab clean peers test-peers benchmark
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## make the virtual environment with the pinned packages of requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is %d.%d. Set PYTHON=." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
	    git config filter.nbstripout.clean '$(VENV)/bin/python -m nbstripout --keep-id'; \
	    git config filter.nbstripout.smudge cat; \
	    git config filter.nbstripout.required false; \
	fi
	@touch $@

repro: $(READY)  ## bring every result of PROFILE up to date
	@python -m masksae.pipeline repro "$(PROFILE)"

paper: $(READY)  ## the paper at its own scale, both models: needs a hub and a GPU
	@python -m masksae.pipeline repro paper paper-gemma

plan: $(READY)  ## what PROFILE costs: work, hours, memory, disk; MEASURE=1 times a fraction here
	@python -m masksae.pipeline plan "$(PROFILE)" $(if $(MEASURE),--measure)

verify: $(READY)  ## published numbers of the paper's models beside those of PROFILE=paper or paper-gemma
	@python -m masksae.pipeline verify "$(if $(filter laptop,$(PROFILE)),paper,$(PROFILE))"

share: $(READY)  ## SAEs of PROFILE for the hub: build/PROFILE/hub; TO=owner/name pushes them
	@python -m masksae.pipeline share "$(PROFILE)" $(if $(TO),--to "$(TO)")

test-slurm: $(READY)  ## jobs on a real SLURM of one node, started and stopped here (Debian, as root)
	@command -v slurmctld munged >/dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge >/dev/null; }
	@MASKSAE_TEST_SLURM=1 python -m pytest -q tests/test_slurm.py

guide: $(READY)  ## the guide to a model of your own, on Gemma 3 270M (terms to be accepted once): docs/own-model.md
	@python -m masksae.pipeline guide

site: $(READY)  ## static pages of all that was run: build/site/index.html
	@python -m masksae.site

status: $(READY)  ## what `make repro` would do for PROFILE
	@python -m masksae.pipeline status "$(PROFILE)"

test: $(READY)  ## unit and property tests, the smoke pipeline, every notebook
	@python -m pytest -q -n 2 --dist loadfile

lint: $(READY)  ## style
	@ruff format --check masksae tests benchmarks && ruff check

lab: $(READY)  ## step through the notebooks in JupyterLab
	@jupyter lab --config jupyter_server_config.py notebooks

peers: $(PEERS)/.ready  ## a second environment with the libraries we compare with: dictionary_learning, SAELens, SAEBench

$(PEERS)/.ready: requirements-peers.lock pyproject.toml
	@echo "setting up $(PEERS) (once, a few minutes)"
	@$(PYTHON) -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.lock
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS)/nnsight-0.3 nnsight==0.3.7
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

test-peers: $(PEERS)/.ready  ## agreement and exchange with those libraries
	@$(PEERS)/bin/python -m pytest -q tests/test_peers*.py

benchmark: $(PEERS)/.ready  ## time and memory of a training step beside theirs
	@$(PEERS)/bin/python benchmarks/train.py

release: $(READY)  ## sdist and wheel into dist/, tried in a clean environment
	@bash tests/release.sh

clean:  ## remove the environment and everything under build/ (results/ and figures/ stay)
	rm -rf $(VENV) $(PEERS) build dist .dvc/tmp .dvc/cache
