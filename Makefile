# Targets for people and for CI; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo bench debug check-node explain predict export watch report sweep certificates node-key docs docs-serve lint types test test-quick test-faults clean
.DEFAULT_GOAL := help

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## Create .venv and install the app with its development tools.

demo: $(STAMP) ## Fine-tune a ViT over 10 simulated clients through flwr run, in minutes.
	$(BIN)/python -m tools.launch . --clients 10
	@run=$$(ls -td runs/*-fedavg | head -1); echo "Next: make report RUN=$$run for a page of plots, make predict RUN=$$run" \
		"IMAGES=folder, make export RUN=$$run; with other settings: README, \"Changing what is run\"."

debug: $(STAMP) ## Run the app in one process without Ray: make debug ARGS="strategy=fedprox".
	$(BIN)/python -m tools.debug $(ARGS)

check-node: $(STAMP) ## Check a node's own data without joining: make check-node DATA=/srv/images [NODE_CONFIG=...] [ARGS=...].
	@test -n "$(DATA)$(NODE_CONFIG)$(ARGS)" || { echo 'Say which images: make check-node DATA=/srv/images' >&2; exit 2; }
	@$(BIN)/python -m tools.check_node $(if $(DATA),--data '$(DATA)') $(if $(NODE_CONFIG),--node-config '$(NODE_CONFIG)') $(ARGS)

explain: $(STAMP) ## Derive a merge table from recorded runs: make explain RUNS="runs/a runs/b" [OUT=folder] [ARGS=...].
	@test -n "$(RUNS)" || { echo 'Say which runs: make explain RUNS="runs/a runs/b"' >&2; exit 2; }
	$(BIN)/python -m tools.explain $(RUNS) --out $(or $(OUT),runs/explain) $(ARGS)

predict: $(STAMP) ## Predict images with a run's model: make predict RUN=runs/... IMAGES=folder [CLIENT=name] [OUT=file] [ARGS=...].
	@test -n "$(RUN)" -a -n "$(IMAGES)" || { echo 'Say which run and which images: make predict RUN=runs/... IMAGES=folder' >&2; exit 2; }
	@$(BIN)/python -m tools.predict '$(RUN)' '$(IMAGES)' $(if $(CLIENT),--client '$(CLIENT)') $(if $(OUT),--out '$(OUT)') $(ARGS)

export: $(STAMP) ## Export a run's model for peft, timm and ONNX: make export RUN=runs/... [CLIENT=name] [OUT=folder] [ARGS=...].
	@test -n "$(RUN)" || { echo 'Say which run: make export RUN=runs/...' >&2; exit 2; }
	@$(BIN)/python -m tools.export '$(RUN)' $(if $(CLIENT),--client '$(CLIENT)') $(if $(OUT),--out '$(OUT)') $(ARGS)

watch: $(STAMP) ## Follow a run while it goes on: make watch [RUN=runs/...].
	@$(BIN)/python -m tools.watch $(RUN)

report: $(STAMP) ## Make an HTML page about runs: make report RUN="runs/a runs/b" [OUT=report.html] [DATA=folder].
	@test -n "$(RUN)" || { echo 'Say which runs: make report RUN="runs/a runs/b"' >&2; exit 2; }
	@$(BIN)/python -m tools.report $(RUN) --out '$(or $(OUT),runs/report.html)' $(if $(DATA),--data '$(DATA)')

sweep: $(STAMP) ## Run all combinations, as Hydra's multirun: make sweep ARGS="strategy=fedavg,livar seed=1,2,3".
	$(BIN)/python -m tools.sweep $(ARGS)

certificates: $(STAMP) ## Make a CA and the SuperLink's certificate: make certificates HOSTS="superlink.example.org 10.0.0.5" [OUT=deploy/keys].
	@test -n "$(HOSTS)" || { echo 'Say by which names sites reach the SuperLink: make certificates HOSTS="superlink.example.org 10.0.0.5"' >&2; exit 2; }
	@$(BIN)/python -m tools.certificates $(HOSTS) $(if $(OUT),--out '$(OUT)') $(ARGS)

node-key: $(STAMP) ## Make a SuperNode's key pair: make node-key NAME=site-1 [OUT=deploy/keys].
	@test -n "$(NAME)" || { echo 'Say which site: make node-key NAME=site-1' >&2; exit 2; }
	@$(BIN)/python -m tools.node_key '$(NAME)' $(if $(OUT),--out '$(OUT)')

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## Build the documentation site: site/index.html.
	$(BIN)/python -m tools.site
	$(BIN)/mkdocs build --strict --quiet

docs-serve: $(STAMP) ## Serve the documentation on http://127.0.0.1:8000 and build it anew at every change.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(STAMP) ## Check style, formatting and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

bench: $(STAMP) ## Measure how fast the app is: docs/results/speed.md, runs/bench/speed.json [ARGS="--only step"].
	$(BIN)/python -m benchmarks.speed $(ARGS)

types: $(STAMP) ## Check types.
	$(BIN)/mypy

tests test-quick test-faults: export OMP_NUM_THREADS := 1

test: $(STAMP) ## Run all checks and all tests but test-faults, three at a time (those marked gpu or data where they can run).
	@$(MAKE) --no-print-directory -j 2 lint types tests

.PHONY: tests
tests: $(STAMP)
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not faults"

test-quick: $(STAMP) ## Run the tests that take seconds.
	$(BIN)/pytest -m "not slow and not e2e"

test-faults: $(STAMP) ## Run the tests that kill and freeze real processes and cut links: some 15 minutes.
	$(BIN)/pytest -m faults
	$(BIN)/pytest tests/test_hostile_clients.py

clean: ## Remove the environment and caches; run folders stay.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .flwr build dist site *.egg-info
