# Everything runs in .venv, which `make` builds by itself. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help serve test lint clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: $(STAMP) ## install and answer on http://127.0.0.1:8000/v1 (Ctrl-C stops)
	@$(BIN)/deskroute serve $(ARGS)

test: $(STAMP) ## every test (no network, no GPU needed)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean: ## remove the environment, caches and local state
	rm -rf $(VENV) .deskroute .mypy_cache .ruff_cache .pytest_cache build *.egg-info
