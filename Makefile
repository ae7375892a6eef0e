# Each target makes what it needs: a machine with python3 (3.10 or later) and nothing else will do.
#
#   make demo       run the example
#   make test       run the tests that are quick: this is what to run often
#   make test-all   run every test, the slow ones too
#   make test-gpu   run the tests of the GPU: on the one that is here, else on a simulated one (needs gcc, g++, binutils)
#   make check      format, lint, types and the quick tests: run it before a commit
#   make wheel      build the package, install it in an empty environment and use it there
#   make format     mend what can be mended automatically
#   make clean      remove what these targets made
#
# CI runs `make check`, then only the slow tests (`make test-slow`), then `make wheel`: each test once.

PYTHON ?= python3
DEMO ?= examples/compare_strategies.py
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-all test-gpu check types wheel format clean

demo: $(INSTALLED)
	$(BIN)/python $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) -m slow

test-all: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS)

# The tests that depend on the device. What is left out there is listed at the end, with its reason.
GPU_TESTS := tests/simulated_gpu tests/devices/test_cuda*.py tests/runtime/test_attaching.py \
	tests/runtime/test_executor*.py tests/runtime/test_offload.py tests/runtime/test_pipelines.py \
	tests/runtime/test_spills.py tests/runtime/test_unread_weights.py

test-gpu: $(INSTALLED)
	TEST_DEVICE=cuda $(BIN)/python -m tests.simulated_gpu -m pytest -p tests.simulated_gpu.plugin -rs -m "not slow" \
		--numprocesses=$(WORKERS) $(GPU_TESTS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) types
	$(MAKE) test

# Checks the package as it is installed, the three folders linked together under its one name, and the tests.
types: $(INSTALLED)
	rm -rf build/house && mkdir -p build/house/taskgraph_offload
	ln -s $(CURDIR)/taskgraph_offload/* build/house/taskgraph_offload/
	ln -s $(CURDIR)/planner $(CURDIR)/viz build/house/taskgraph_offload/
	ln -s $(CURDIR)/tests build/house/
	$(BIN)/mypy

wheel:
	PYTHON=$(PYTHON) .ci/wheel

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

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
