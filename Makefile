# `make help` says what there is. Everything runs from .venv, which `make setup` builds from nothing.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format lock up down shell clean

BIN := .venv/bin
PYTEST_ARGS ?=
# Many tests wait more than they work.
PROCESSES ?= $(shell echo $$(( $$(nproc) + 2 )))
export RUNTIME KEEP

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## build .venv from the lock (only Python 3.11 or later needed); instant when nothing changed
	@scripts/bootstrap

demo: setup ## back up, destroy and restore a small real system; RUNTIME=docker in containers, KEEP=1 leaves it running
	@$(BIN)/python -m compose.demo

test: setup ## run all tests in parallel; PYTEST_ARGS="-k word" selects
	@$(BIN)/python -m pytest -n $(PROCESSES) --dist loadscope $(PYTEST_ARGS)

check: setup ## lint, formatting and types: what CI asks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## put the code into its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: setup ## resolve pyproject.toml into the locks again; LOCK_ARGS=--upgrade takes newer versions
	@scripts/lock $(LOCK_ARGS)

up: ## start the deployment of compose/: broker, workers, beat, Flower
	@scripts/deploy up

down: ## stop the deployment; its data stays
	@scripts/deploy down

shell: setup ## a Python shell with the tasks at hand
	@$(BIN)/celery -A workers shell

clean: ## remove .venv, caches and what demos left in var/demo
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist var/demo
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
