# A thin face over the four command lines; all logic is in the packages. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= demo
SHARDS ?= data/$(DATA)
PROMPT ?=
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup extract train sample test test-slow lint clean

help:           ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## ?/  make \1\t/' | expand -t 18
	@echo
	@echo '  DATA=demo|FOLDER|RECIPE  what to extract        ARGS="..."  further options of the command'
	@echo '  PROMPT="..."             what to sample         VENV=.venv  where the environment is'
	@echo '  SHARDS=FOLDER|URL        what to train on, data/$(DATA) if not said'

setup: $(VENV)/.ready  ## the virtual environment with pinned versions (the other targets do this by themselves)

$(VENV)/.ready: pyproject.toml constraints.txt .ci/repair_torchvision.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing the pinned packages into $(VENV) (about 2.5 GB; two to four minutes)'
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python .ci/repair_torchvision.py
	@touch $@

extract: setup  ## DATA -> shards with depth, normals, segmentation and line drawing
	@$(BIN)/python -m extract $(DATA) $(ARGS)

train: setup    ## shards -> intrinsic VAE -> LoRA
	@$(BIN)/python -m train both --shards $(SHARDS) $(ARGS)

sample: setup   ## PROMPT -> an image and its four intrinsics, by runs/demo if `make train` made it
	@$(BIN)/python -m infer sample $(if $(wildcard runs/demo/manifest.json),--run runs/demo) $(if $(PROMPT),--prompt "$(PROMPT)") $(ARGS)

test: setup     ## the quick tests, in three processes of one thread each: some of them mostly wait
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow" $(ARGS)

test-slow: setup  ## the tests that take longer
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --timeout 900 $(ARGS)

lint: setup     ## ruff (lint, format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:          ## removes the environment and caches, never data
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
