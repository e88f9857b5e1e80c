# Everything a developer runs. Needs make, pip and some Python 3; `make setup` finds Python 3.12 or 3.13 by itself.
.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-all compat lint format bench chaos lock clean

BIN := .venv/bin
# A Python that a version manager or another environment put into this shell must not leak into ours.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV
# Without bytecode every process compiles all its packages anew: `make demo` takes 35 s instead of 10.
unexport PYTHONDONTWRITEBYTECODE

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup:  ## Set up what is missing (.tools with uv, .venv with the locked packages)
	@.ci/setup

demo: setup  ## Start everything embedded, run one turn of a real model, stop it all
	@$(BIN)/caravan demo

up: setup  ## Start everything embedded for development; Ctrl-C stops it
	@$(BIN)/caravan up

lint: setup  ## Lint, formatting, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Every check, and the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not thorough"

test-all: lint  ## The same, and each test of failures in both pools and in all its variants (half an hour)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

compat: setup  ## Every SDK version against one Caravan, compared with docs/compatibility.md; WRITE=1 writes that
	$(BIN)/python -m tests.compat $(if $(WRITE),--write)

format: setup  ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## The benchmarks
	$(BIN)/python -m tests.benchmarks

chaos: setup  ## Kill, stop, flush and restart everything at random for minutes, and see that nothing is lost
	$(BIN)/python -m tests.acceptance.chaos

lock:  ## Write the lock files anew from pyproject.toml
	@.ci/lock

clean:  ## Remove what setup and the tools made (data of `caravan up` stay)
	rm -rf .venv .tools .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
