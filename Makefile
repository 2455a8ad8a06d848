# The tasks of this repository; .ci/run calls the same ones. Needs Python >= 3.11, make and nothing else.
#   make run  [ARGS="<recipe> -o key=value"]    install, and run a federation
#   make test [ARGS="-m unit"]                  install with the developer's tools, and test
#   make check                                  everything that the CI runs
# PYTHON=/path/to/python3.12 chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Of each stamp the content says nothing and the date all: nothing is installed again until one of its sources changes.
CREATED := $(VENV)/.stamp-created
RUN := $(VENV)/.stamp-run
DEV := $(VENV)/.stamp-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test check lint format types contracts docs install dev constraints clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# -------------------------------------------------------------------------------------------------------- installing

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: fedit needs Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks its venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN): $(CREATED) pyproject.toml constraints.txt
	@echo "Installing fedit and what it needs into $(VENV) (once; minutes, mostly for PyTorch)"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(CREATED) pyproject.toml constraints.txt
	@echo "Installing fedit and the developer's tools into $(VENV) (once; minutes, mostly for PyTorch)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $(RUN) $@

install: $(RUN)

dev: $(DEV)

# ------------------------------------------------------------------------------------------------------------- tasks

run: $(RUN)
	@$(BIN)/fedit run $(ARGS)

test: $(DEV)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(DEV)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

types: $(DEV)
	@$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(DEV)
	@$(BIN)/lint-imports --no-cache --no-logo

docs: $(DEV)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation is in site/index.html"

check: test lint types contracts docs

# ------------------------------------------------------------------------------------------------------- maintenance

# The newest versions that work beside both engines for real federations; rich, typer and packaging are held by Flower.
constraints:
	@$(PYTHON) -m venv --clear build/constraints
	@build/constraints/bin/python -m pip --quiet install '.[dev]' 'rich<15' 'typer<0.21' 'packaging<26'
	@{ sed -n '/^#/p' constraints.txt; \
	   build/constraints/bin/python -m pip freeze --all --exclude pip --exclude fedit | sed 's/+[^ ]*//'; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@rm -rf build/constraints

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
