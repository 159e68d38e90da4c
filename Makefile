# Two commands do everything on a bare machine with Python 3.11 or later and make:
#
#     make repro [PROFILE=smoke|laptop|gemma|overnight|gpu|paper|path/to/profile.yaml]
#     make test

PROFILE ?= laptop
PYTHON ?= python3
export MASKSAE_EXECUTOR := $(or $(EXECUTOR),$(MASKSAE_EXECUTOR))
# An environment keeps the Python it was made with, unless PYTHON names another one.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup repro paper plan verify share guide release test-slurm site status test test-all lint lab clean peers test-peers benchmark synthetic
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup:  ## make the virtual environment with the pinned packages of requirements.lock
	@$(PYTHON) tools/environment.py .venv

repro: setup  ## bring every result of PROFILE up to date
	@python -m masksae repro "$(PROFILE)"

paper: setup  ## the paper at its own scale, both models: needs a hub and a GPU
	@python -m masksae repro paper paper-gemma

plan: setup  ## what PROFILE costs: work, hours, memory, disk; MEASURE=1 times a fraction here
	@python -m masksae plan "$(PROFILE)" $(if $(MEASURE),--measure)

verify: setup  ## published numbers of the paper's models beside those of PROFILE=paper or paper-gemma
	@python -m masksae verify "$(if $(filter laptop,$(PROFILE)),paper,$(PROFILE))"

share: setup  ## SAEs of PROFILE for the hub: build/PROFILE/hub; TO=owner/name pushes them, RELEASE=1 makes archives
	@python -m masksae share "$(PROFILE)" $(if $(TO),--to "$(TO)") $(if $(RELEASE),--release)

test-slurm: setup  ## jobs on a real SLURM of one node, started and stopped here (Debian, as root)
	@command -v slurmctld munged >/dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge >/dev/null; }
	@MASKSAE_TEST_SLURM=1 python -m pytest -q tests/app/test_slurm.py

guide: setup  ## the guide to a model of your own, on Gemma 3 270M (terms to be accepted once): docs/own-model.md
	@python -m masksae guide

site: setup  ## pages of all that was run, to read and to search: build/site/index.html
	@python -m masksae site

status: setup  ## what `make repro` would do for PROFILE
	@python -m masksae status "$(PROFILE)"

test: setup  ## what must pass everywhere: seven minutes on two cores
	@python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: setup  ## everything, for a night: long tests and faults too, peers, SLURM
	@MASKSAE_FUZZ=$${MASKSAE_FUZZ:-300} python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	@$(MAKE) --no-print-directory test-peers test-slurm

lint: setup  ## style, and types of the core
	@ruff format --check masksae tests benchmarks tools && ruff check && mypy

lab: setup  ## step through the notebooks in JupyterLab
	@jupyter lab --config notebooks/jupyter_server_config.py notebooks

peers:  ## a second environment with the libraries we compare with: dictionary_learning, SAELens, SAEBench
	@PATH="$(CURDIR)/.venv-peers/bin:$$PATH" $(PYTHON) tools/environment.py .venv-peers

test-peers: peers  ## agreement and exchange with those libraries
	@.venv-peers/bin/python -m pytest -q tests/peers

benchmark: peers  ## time and memory of a training step beside theirs
	@.venv-peers/bin/python benchmarks/train.py

synthetic: setup peers  ## arms and rivals in a world of known features, ten minutes: docs/synthetic.md
	@.venv-peers/bin/python benchmarks/synthetic.py
	@python benchmarks/synthetic.py --report

release: setup  ## sdist and wheel into dist/, tried in a clean environment
	@bash tests/release.sh

clean:  ## remove the environment and everything under build/ (results/ and figures/ stay)
	rm -rf .venv .venv-peers .venvs build dist .dvc/tmp .dvc/cache
