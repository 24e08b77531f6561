# Everything a fresh machine needs besides make is Python >= 3.11 with venv. `make demo` and `make test` set up by themselves.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# Processes that run tests: auto is one for each core, as many as memory allows (tests/conftest.py counts them).
WORKERS ?= auto
# worksteal gives each worker one run of neighbouring tests, so that module fixtures (a trained run, a warm process) are
# mostly built once, and lets whoever is done take from the other's end. loadscope keeps whole files together: its last
# file keeps one worker busy while the others wait.
PARALLEL := -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-fast test-long lint docs dist sbom bench clean
.DEFAULT_GOAL := demo

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV), once; torch and its companions take some minutes to fetch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## train the embedded tiny Phi-3 on its chats, offline, and check the adapter (the default)
	$(BIN)/phi3-lora train

test: $(VENV)/.installed  ## run the whole suite on all cores; WORKERS=1 uses one
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.installed  ## run the tests that take no training run, under a minute
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not long"

test-long: $(VENV)/.installed  ## run what make test leaves out: others' scripts, browsers, notebooks, several nodes
	$(BIN)/python -m pytest $(PARALLEL) -m long

lint: $(VENV)/.installed  ## check style, types and import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed  ## build the site of the documentation into build/site, which opens from the disk
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=tools $(BIN)/python -m mkdocs build --strict

dist: $(VENV)/.installed  ## build the wheel and the sdist, and check both
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m check_wheel_contents dist/*.whl

sbom: dist  ## write the bill of materials of an environment with the wheel alone (CycloneDX)
	rm -rf build/sbom && $(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/phi3-lora-plugin.cdx.json build/sbom/bin/python

bench: $(VENV)/.installed  ## compare speed with the peers, half an hour and more; BENCH="A --pairs 2" for less
	$(BIN)/python -m benchmarks $(BENCH)

clean:  ## delete the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
