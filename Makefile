# Each target sets up what it needs. A machine with make and Python 3.11 or newer is enough.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt
TORCH = $(shell sed -n '/^torch==/p' constraints.txt)
EXTRAS := fast,lab,test,docs,dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench docs clean constraints

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/ready ## train the optimizers on real data, write demo-report/report.html
	@$(PY) -m parabola.cli compare digits --seeds 3 --out demo-report --overwrite
	@echo "Open $(CURDIR)/demo-report/report.html in a browser."

test: $(VENV)/ready ## run every test but the long ones
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 -m "not long"

test-all: $(VENV)/ready ## run every test
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8

lint: $(VENV)/ready ## check style and types
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

bench: $(VENV)/peers ## time optimizer steps and matrix roots beside other libraries
	@$(PY) benchmarks/step_cost.py
	@$(PY) benchmarks/roots.py

docs: $(VENV)/ready ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "Open $(CURDIR)/site/index.html in a browser."

clean: ## remove everything that the other targets made
	rm -rf $(VENV) demo-report site build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by its exact version, so that no later step of pip can choose another build.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Parabola needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Setting up $(VENV) (once; a minute or more, mostly downloads) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/peers: $(VENV)/ready
	@$(PIP) --editable ".[peers]"
	@touch $@

# For maintainers: pin the newest versions of everything but torch, from a fresh environment.
constraints:
	@sh -eu -c ' \
	  fresh=$$(mktemp -d); trap "rm -rf $$fresh" EXIT; \
	  $(PYTHON) -m venv $$fresh; \
	  pip="$$fresh/bin/python -m pip --disable-pip-version-check"; \
	  $$pip install --quiet --quiet "$(TORCH)"; \
	  $$pip install --quiet --quiet "$(TORCH)" ".[$(EXTRAS),peers]"; \
	  sed -n "/^#/p; /^torch==/p" constraints.txt > $$fresh/pins; \
	  $$pip freeze --all --exclude pip --exclude parabola --exclude torch >> $$fresh/pins; \
	  cp $$fresh/pins constraints.txt'
