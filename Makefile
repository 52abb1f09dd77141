# `make train` and `make test` set up everything on a fresh machine with Python 3.11 or later.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
NPM_PACKAGES := node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1 axe-core@4.14.1
NODE := .node/.ready-$(shell echo $(NPM_PACKAGES) | cksum | cut -d' ' -f1)
STAMP := .venv/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: train node llama-cpp test test-slow test-gpu test-faults real-models check format bench gpu-report \
	gpu-report-rehearse setup clean help

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: $(STAMP)  ## make .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; install one, or pass PYTHON=..."; exit 3; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench,check]'
	@rm -f .venv/.ready-* && touch $(STAMP)

train: setup     ## fine-tune the built-in demo in 4 bits and show what it learnt
	$(BIN)/qlora-kit evaluate --model demo --exact-match
	$(BIN)/qlora-kit train --model demo --bits 4 --output runs/demo --overwrite
	$(BIN)/qlora-kit evaluate --adapter runs/demo --exact-match
	$(BIN)/qlora-kit export runs/demo --to merged/demo --overwrite
	$(BIN)/qlora-kit evaluate --model merged/demo --bits 16 --exact-match

test: setup node  ## the default tests, a process a core
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: setup node  ## the long ones
	$(BIN)/python -m pytest -m slow

test-gpu: setup  ## those that need a GPU
	$(BIN)/python -m pytest -m gpu

test-faults: setup  ## the table of promises kept under faults
	$(BIN)/python -m tests.faults --json benchmarks/results/faults.json

node: $(NODE)  ## what tests ask of npm, in .node/: llama.cpp, and axe-core for pages

# Where npm or its registry is out of reach, the tests that ask these packages say so and are skipped.
$(NODE):
	@mkdir -p .node && rm -f .node/out-of-reach
	@timeout 600 npm install --prefix .node --silent --no-audit --no-fund --omit=optional --ignore-scripts \
		--fetch-retries=1 $(NPM_PACKAGES) && rm -f .node/.ready-* && touch $@ \
		|| echo "npm is not here, or could not fetch $(NPM_PACKAGES)" | tee .node/out-of-reach

llama-cpp: setup  ## compile llama-cpp-python for the slow test of raw logits: some ten minutes
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-binary llama-cpp-python llama-cpp-python

real-models: setup  ## fetch two small pretrained models into models/, for tests and demonstrations
	$(BIN)/python -m tests.real_models

check: setup     ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup    ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup     ## peak memory and the comparison with peers
	$(BIN)/python benchmarks/peak_vram.py --model deepseek-7b --bits 4
	$(BIN)/python benchmarks/throughput.py

gpu-report: setup  ## what has only been predicted, measured on this GPU; up to 13 minutes
	$(BIN)/python benchmarks/gpu_report.py

gpu-report-rehearse: setup  ## the same with tiny models, on a CPU as well
	$(BIN)/python benchmarks/gpu_report.py --rehearse

clean:           ## remove what the targets made
	rm -rf .venv .node .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
