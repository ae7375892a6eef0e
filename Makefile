# Each target makes what it needs: a machine with python3 (3.10 or later) and nothing else will do.
#
#   make demo     run the example
#   make test     run the tests
#   make check    format, lint, types and tests: what CI runs
#   make format   mend what can be mended automatically
#   make clean    remove what these targets made

PYTHON ?= python3
DEMO ?= examples/compare_strategies.py
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check types format clean

demo: $(INSTALLED)
	$(BIN)/python $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) types
	$(MAKE) test

# What is type-checked is the package as it is installed: the three folders linked together under its one name.
types: $(INSTALLED)
	rm -rf build/house && mkdir -p build/house/taskgraph_offload
	ln -s $(CURDIR)/taskgraph_offload/* build/house/taskgraph_offload/
	ln -s $(CURDIR)/planner $(CURDIR)/viz build/house/taskgraph_offload/
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# An environment that is already there is completed, not replaced.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "This needs Python 3.10 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		       "Say which to use: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
