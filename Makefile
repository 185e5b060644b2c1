# Two commands do everything on a fresh machine: `make serve` and `make test`.
VENV ?= .venv
CONFIG ?= configs/nano.yaml
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup serve test test-unit check format bench-serve bench-gateway bench-fairness clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## Install everything into .venv (no-op when it is up to date)
	@scripts/setup

serve: setup  ## Serve the shipped nano model at http://127.0.0.1:8000/v1 (foreground)
	@exec moonshard serve $(CONFIG)

test: setup  ## Run all tests
	@scripts/test

test-unit: setup  ## Run the fast tests only
	pytest tests/unit tests/models

check: setup  ## Lint and type-check
	ruff format --check .
	ruff check .
	mypy

format: setup  ## Format the code and apply safe fixes
	ruff format .
	ruff check --fix .

bench-serve: setup  ## Measure Moonshard against native vLLM behind the same ingress
	python -m bench.serve

bench-gateway: setup  ## Measure what keys, limits and accounting cost
	python -m bench.gateway

bench-fairness: setup  ## Measure how two teams share full routers
	python -m bench.fairness

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
